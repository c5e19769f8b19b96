"""Every Python block of the documents runs, page by page, and every link between files leads somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_python_blocks_run(page):
    namespace = {"__name__": "page"}
    for block in re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL):
        exec(compile(block, str(page), "exec"), namespace)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_between_files_lead_somewhere(page):
    for target in re.findall(r"\]\((?!http|#)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_nothing_is_left_to_fill_in(page):
    assert not re.search(r"^[A-Z_]{6,}$", page.read_text(), re.MULTILINE)


def test_study_of_the_documents_runs(tmp_path):
    from outlast.cli._progress import QuietProgress
    from outlast.studies._grid import Launch, Plan
    from outlast.studies._run import run
    from outlast.studies._summary import summarise

    block = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / "studies.md").read_text(), re.MULTILINE | re.DOTALL)[0]
    (tmp_path / "halves.py").write_text(block)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(tmp_path)
        import halves

        plan = Plan("halves:STUDY", "quick", 10, (), {}, Launch("cpu"))
        summary = summarise(run(halves.STUDY, plan, tmp_path / "runs", QuietProgress()), "")
    assert summary.claims[0].verdict == "holds"
