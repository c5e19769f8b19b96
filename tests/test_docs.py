"""Every Python block of the documents runs, page by page, and every link between files leads somewhere."""

from __future__ import annotations

import importlib
import pkgutil
import re
from pathlib import Path

import pytest

import outlast
from outlast.studies import get, names

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


@pytest.mark.parametrize("name", names())
def test_cards_have_one_shape_and_their_figures_a_command(name):
    text = (ROOT / "docs" / "cards" / f"{name}.md").read_text()
    plain = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    titles = re.findall(r"^## (.+)$", plain, re.MULTILINE)
    assert titles == ["Use it", "Settings", "Cost", "When it hurts", "Evidence", "Attribution"]
    what, _, settings, cost, _, evidence, attribution = re.split(r"^## .+$", plain, flags=re.MULTILINE)
    assert re.match(r"# .+\n\n\S", what)
    assert "```python" in text
    assert "| setting | start with | why |" in settings
    benchmarks = re.findall(r"`python -m benchmarks (\w+)`", cost)
    assert benchmarks
    assert all((ROOT / "benchmarks" / f"{benchmark}.py").exists() for benchmark in benchmarks)
    assert f"outlast run {name} --" in evidence
    assert re.search(r"ICLR\s+2021", attribution)
    assert "(../api.md)" in attribution
    assert f"cards/{name}.md" in (ROOT / "mkdocs.yml").read_text()
    assert f"cards/{name}.md" in (ROOT / "README.md").read_text()
    for option in re.findall(r"--part ([\w-]+)", evidence):
        assert option in [part.name for part in get(name).parts]


def test_every_public_name_is_in_the_reference():
    listed = set(re.findall(r"^::: (\S+)$", (ROOT / "docs" / "api.md").read_text(), re.MULTILINE))
    missing = []
    for info in pkgutil.walk_packages(outlast.__path__, "outlast."):
        if "._" in info.name or info.name.startswith(("outlast.cli", "outlast.report")) or info.name in listed:
            continue
        if info.name in ("outlast.diagnose", "outlast.__main__") or info.name.startswith("outlast.studies."):
            continue  # a folder of rooms; studies are found by their names
        for public in importlib.import_module(info.name).__all__:
            path = f"{info.name}.{public}"
            missing += [] if path in listed else [path]
    assert missing == []
    assert not [path for path in listed if "._" in path]
