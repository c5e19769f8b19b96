"""The page: whole, escaped, readable in a real browser."""

from __future__ import annotations

import dataclasses
import re
import shutil

import pytest
import toy_study

from outlast.cli._progress import QuietProgress
from outlast.report import render, write_report
from outlast.studies import get, names
from outlast.studies._grid import Launch, Plan
from outlast.studies._run import collect, run
from outlast.studies._summary import not_run, summarise

HOSTILE = '<script>document.title="broken"</script>"\'&<img src=x onerror=alert(1)>'
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@pytest.fixture(scope="module")
def summaries(tmp_path_factory):
    plan = Plan("toy_study:STUDY", "quick", 3, (), {}, Launch("cpu"))
    summary = summarise(run(toy_study.STUDY, plan, tmp_path_factory.mktemp("runs"), QuietProgress()), "outlast run toy")
    hostile = dataclasses.replace(summary, name=HOSTILE, title=HOSTILE, question=HOSTILE, folder=HOSTILE, failed=(HOSTILE,))
    return [summary, hostile, not_run(toy_study.STUDY, "paper", "CIFAR-10 is not at hand")]


def test_everything_from_data_is_escaped(summaries):
    page = render(summaries)
    assert HOSTILE not in page
    assert "<img src=x" not in page
    assert page.count("<script>") == 1
    assert "More &lt;b&gt;" in page


def test_page_needs_nothing_from_outside(summaries):
    page = render(summaries)
    assert not re.findall(r'(?:src|href)="(?!#)', page)
    assert "@import" not in page
    assert "url(http" not in page


def test_verdicts_intervals_and_command_are_shown(summaries):
    page = render(summaries[:1])
    for text in (
        '<span class="verdict holds">holds</span>',
        '<span class="verdict fails">fails</span>',
        "2.99 to 3.03",
        "outlast run toy",
        "torch",
    ):
        assert text in page


def test_cells_that_failed_leave_the_rest_of_the_page(tmp_path):
    plan = Plan("toy_study:STUDY", "quick", 3, (), {"fail": "raise"}, Launch("cpu"))
    summary = summarise(run(toy_study.STUDY, plan, tmp_path, QuietProgress()), "outlast run toy")
    page = render([summary])
    assert (summary.finished, summary.total) == (3, 6)
    assert "Not drawn: more with seed 0 is not finished." in page
    assert "told to fail" in page
    assert [claim.verdict for claim in summary.claims] == ["undecided", "undecided"]


@pytest.mark.parametrize("name", names())
def test_a_study_without_a_finished_cell_is_a_section_of_undecided_claims(name, tmp_path):
    study = get(name)
    summary = summarise(collect(study, Plan(name, "quick", 3, (), {}, Launch("cpu")), tmp_path, print), f"outlast run {name}")
    assert summary.finished == 0
    assert {claim.verdict for claim in summary.claims} == {"undecided"}
    assert study.title in render([summary])


def test_a_mistake_beside_missing_cells_is_named(tmp_path):
    wrong = dataclasses.replace(toy_study.PART.claims[0], measure=lambda results, seed: results.value("plain", "scoer", seed))
    study = dataclasses.replace(toy_study.STUDY, parts=(dataclasses.replace(toy_study.PART, claims=(wrong,)),))
    plan = Plan("toy_study:STUDY", "quick", 3, (), {"fail": "raise"}, Launch("cpu"))
    summary = summarise(run(study, plan, tmp_path, QuietProgress()), "outlast run toy")
    assert summary.claims[0].reason == "toy adding more seed 0 is not finished (KeyError: 'scoer')"


def test_a_mistake_in_a_complete_part_is_not_hidden(summaries):
    part = summaries[0].parts[0]
    broken = dataclasses.replace(part, figures=(dataclasses.replace(part.figures[0], alt=lambda results: 1 / 0),))
    with pytest.raises(ZeroDivisionError):
        render([dataclasses.replace(summaries[0], parts=(broken,))])


def test_ids_are_unique(summaries):
    ids = re.findall(r'\sid="([^"]+)"', render(summaries))
    assert len(ids) == len(set(ids))


def test_figures_of_a_growing_list_are_drawn_once(summaries):
    calls = []
    part = summaries[0].parts[0]
    figure = dataclasses.replace(part.figures[0], draw=lambda canvas, results: calls.append(1) or toy_study.draw(canvas, results))
    counted = dataclasses.replace(summaries[0], parts=(dataclasses.replace(part, figures=(figure,)),))
    drawn = {}
    render([counted], drawn)
    assert len(calls) == 1
    page = render([counted, counted], drawn)
    assert len(calls) == 2
    assert page == render([counted, counted])


def test_page_is_written_whole(summaries, tmp_path):
    write_report(summaries, tmp_path / "a" / "report.html")
    assert (tmp_path / "a" / "report.html").read_text().rstrip().endswith("</html>")
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["report.html"]


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright (extra dev) is not installed")
    if CHROMIUM is None:
        pytest.skip("Debian's chromium is not installed")
    with sync_api.sync_playwright() as play:
        chromium = play.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield chromium
        chromium.close()


@pytest.fixture
def page_file(summaries, tmp_path):
    write_report(summaries, tmp_path / "report.html")
    return (tmp_path / "report.html").as_uri()


def opened(browser, uri, **options):
    context = browser.new_context(**options)
    page = context.new_page()
    errors = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("request", lambda request: errors.append(request.url) if not request.url.startswith("file:") else None)
    page.on("dialog", lambda dialog: errors.append(dialog.message))
    page.goto(uri)
    return page, errors


@pytest.mark.browser
def test_browser_shows_hostile_names_as_text(browser, page_file):
    page, errors = opened(browser, page_file)
    assert page.title() == "outlast: 3 studies"
    assert HOSTILE in page.inner_text("body")
    assert errors == []


def luminance(colour):
    parts = [int(value) / 255 for value in re.findall(r"\d+", colour)[:3]]
    red, green, blue = (v / 12.92 if v <= 0.03928 else ((v + 0.055) / 1.055) ** 2.4 for v in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(page, selector):
    colours = page.eval_on_selector(
        selector,
        """node => { let back = node; while (getComputedStyle(back).backgroundColor === 'rgba(0, 0, 0, 0)') back = back.parentElement;
        return [getComputedStyle(node).color, getComputedStyle(back).backgroundColor]; }""",
    )
    light, dark = sorted(map(luminance, colours), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_is_readable_in_both_schemes(browser, page_file, scheme):
    page, errors = opened(browser, page_file, color_scheme=scheme)
    background = page.eval_on_selector("body", "node => getComputedStyle(node).backgroundColor")
    assert (luminance(background) > 0.5) == (scheme == "light")
    for selector in ("h1", ".soft", ".holds", ".fails", ".not-run", "a[href^='#study']", "td", "figure p", "code"):
        assert contrast(page, selector) >= 4.5, selector
    assert page.eval_on_selector("figure svg text", "node => getComputedStyle(node).fill") == page.eval_on_selector(
        "body", "node => getComputedStyle(node).color"
    )
    assert errors == []


@pytest.mark.browser
def test_colours_can_be_switched_with_the_keyboard(browser, page_file):
    page, _ = opened(browser, page_file, color_scheme="light")
    before = page.eval_on_selector("body", "node => getComputedStyle(node).backgroundColor")
    page.keyboard.press("Tab")  # the link that skips to the scoreboard
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "theme"
    page.keyboard.press("Enter")
    assert page.eval_on_selector("body", "node => getComputedStyle(node).backgroundColor") != before
    assert page.get_attribute("#theme", "aria-pressed") == "true"


@pytest.mark.browser
@pytest.mark.parametrize("width", [360, 768, 1440])
def test_nothing_overflows_the_page(browser, page_file, width):
    page, _ = opened(browser, page_file, viewport={"width": width, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") <= width


@pytest.mark.browser
def test_page_prints_dark_on_white(browser, page_file):
    page, _ = opened(browser, page_file, color_scheme="dark")
    page.emulate_media(media="print", color_scheme="dark")
    assert page.eval_on_selector("body", "node => getComputedStyle(node).backgroundColor") == "rgb(255, 255, 255)"
    assert not page.is_visible("#theme")


@pytest.mark.browser
def test_every_figure_has_words(browser, page_file):
    page, _ = opened(browser, page_file)
    assert page.eval_on_selector_all(
        "figure", "nodes => nodes.every(n => n.getAttribute('aria-label') && n.querySelector('p').innerText.length > 5)"
    )
