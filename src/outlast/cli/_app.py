"""The subcommands, their options, and how errors become one line and an exit code."""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
import webbrowser
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import App, CycloptsError, Parameter

from outlast import __version__

if TYPE_CHECKING:
    from outlast.report._page import Figures
    from outlast.studies._design import ScaleName, Study
    from outlast.studies._grid import Accelerator, Plan, Precision, Strategy
    from outlast.studies._statistics import Interval
    from outlast.studies._summary import Summary
else:  # cyclopts reads annotations; the real names live in modules that --help should not wait for
    from typing import Literal

    ScaleName = Literal["quick", "standard", "paper"]
    Accelerator = Literal["auto", "cpu", "cuda"]
    Precision = Literal["32-true", "bf16-mixed", "16-mixed", "64-true"]
    Strategy = Literal["auto", "ddp", "fsdp"]

_VARIANTS = {"small": "embedded", "full": "full set", "package": "in packages of the extras studies or text"}
OK, FAILURE, USAGE, CLAIM_FAILED = 0, 1, 2, 3

app = App(
    name="outlast",
    help="Train models that outlast their training data. Start with: outlast demo",
    version=__version__,
    exit_on_error=False,
    print_error=False,
    result_action="return_value",
    suppress_keyboard_interrupt=False,  # a stop says how to go on: run_command does that
)
app.register_install_completion_command(help="Install completion of commands and options for your shell.")
data_app = App(name="data", help="Which data sets are at hand, where they lie, and how to get the others.")
app.command(data_app)
diagnose_app = App(name="diagnose", help="Know your network and your data, without training.")
app.command(diagnose_app)

Out = Annotated[Path, Parameter(help="Folder for results. Finished cells in it are never computed again.")]
Traceback = Annotated[bool, Parameter(negative="", help="Print the traceback of an error instead of one line.")]


class Stopped(KeyboardInterrupt):
    """Ctrl-C or SIGTERM; carries the exit code."""

    def __init__(self, code: int) -> None:
        super().__init__()
        self.code = code


def demo_plan(study: Study) -> Plan:
    """A study as the demo runs it."""
    from outlast.studies._grid import Launch, Plan

    return Plan(study.name, "quick", _seeds_of(study, "quick", None), (), {}, Launch(accelerator="cpu"))


@app.command
def demo(
    *,
    out: Out = Path("runs/demo"),
    only: Annotated[
        list[str] | None,
        Parameter(negative="", help="Only studies of this theme ('few labels', 'long', ...) or of this name; may be repeated."),
    ] = None,
    processes: Annotated[
        int | None, Parameter(help="Processes that share the cells: two, or one on a single core. Parts that measure speed run alone.")
    ] = None,
    quiet: Annotated[bool, Parameter(negative="")] = False,
    traceback: Traceback = False,
) -> int:
    """Run every study at quick scale on embedded data and write one report.

    Interrupt it whenever you like: the same command goes on where it stopped.
    """
    from outlast.cli._helper import Helpers, StandStill
    from outlast.cli._progress import make_progress
    from outlast.errors import MissingDataError, MissingExtraError
    from outlast.report import write_report
    from outlast.studies import get
    from outlast.studies._registry import names_of
    from outlast.studies._run import run
    from outlast.studies._summary import not_run, summarise, tally

    processes = min(2, len(os.sched_getaffinity(0))) if processes is None else processes
    if processes < 1:
        raise ValueError(f"--processes must be at least 1, got {processes}")
    progress = make_progress(quiet=quiet)
    chosen = names_of(only or ())
    if not quiet:
        progress.note(f"{len(chosen)} {'study' if len(chosen) == 1 else 'studies'} at quick scale; results and report go to {out}")
    page = out / "report.html"
    summaries: list[Summary] = []
    drawn: Figures = {}
    _hide_gpus()
    with Helpers(out, processes - 1, chosen) as helpers:
        watched = StandStill(progress, helpers, lambda cell: get(cell.origin).part(cell.part).timed)
        for name in chosen:
            study = get(name)
            plan = demo_plan(study)
            try:
                summaries.append(summarise(run(study, plan, out, watched), _command(plan, out)))
            except (MissingDataError, MissingExtraError) as error:
                summaries.append(not_run(study, "quick", str(error)))
                progress.note(f"{name} is not run: {error}")
            write_report(summaries, page, drawn)
    for summary in summaries:
        _print_summary(summary)
    print(f"\n{len(summaries)} studies: {tally([claim for summary in summaries for claim in summary.claims])}\nReport: {page.resolve()}")
    return OK if all(s.not_run or (s.finished == s.total) for s in summaries) else FAILURE


def _hide_gpus() -> None:
    """Left visible, each optimizer step asks the driver how many there are: 0.3 ms, as long as a step of a small perceptron."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""


def _gpu_at_hand() -> bool:
    import torch

    return torch.cuda.is_available()


@app.command
def studies(*, traceback: Traceback = False) -> int:
    """List what can be run: question, paper, parts, data and time at each scale."""
    from outlast.studies import get, names

    for name in names():
        study = get(name)
        print(f"{name}: {study.question}\n  paper: {study.paper}\n  follows: {study.follows}")
        for part in study.parts:
            print(f"  part {part.name}: {part.question}")
            for claim in part.claims:
                print(f"    claim ({', '.join(s for s in claim.scales if s in part.scales)}): {claim.text}")
            for scale_name, scale in part.scales.items():
                wants = ", ".join(f"{data} ({_VARIANTS[variant]})" for data, variant in scale.data) or "none"
                grid = sum(len(setting.arms or scale.arms) for setting in scale.settings)
                print(f"    {scale_name}: {grid} arms x {scale.seeds} seeds, about {scale.minutes:g} min on {scale.machine}; data: {wants}")
    return OK


@app.command
def run(
    study: Annotated[str, Parameter(help="Name of a study (see: outlast studies), or your own as module:NAME.")],
    /,
    *,
    scale: Annotated[ScaleName, Parameter(help="quick (embedded data), standard (full data sets), paper (GPUs).")] = "quick",
    seeds: Annotated[int | None, Parameter(help="Number of seeds; claims need at least 3. Default: the study's own.")] = None,
    part: Annotated[list[str] | None, Parameter(negative="", help="Run only this part; may be repeated.")] = None,
    set_: Annotated[
        list[str] | None, Parameter(name="--set", negative="", help="key=value: change a setting of the study; may be repeated.")
    ] = None,
    out: Out = Path("runs"),
    accelerator: Annotated[Accelerator, Parameter(help="Where cells train.")] = "auto",
    devices: Annotated[int, Parameter(help="Devices (or CPU processes) for each cell.")] = 1,
    precision: Annotated[Precision, Parameter(help="Number format of training.")] = "32-true",
    strategy: Annotated[Strategy, Parameter(help="How several devices share a cell.")] = "auto",
    threads: Annotated[int, Parameter(help="CPU threads of each cell. One gives the same digits on every run.")] = 1,
    workers: Annotated[int, Parameter(help="Cells at the same time, through Ray (extra cluster; RAY_ADDRESS names a cluster).")] = 1,
    json_: Annotated[bool, Parameter(name="--json", negative="", help="Print one JSON object on standard output, nothing else.")] = False,
    quiet: Annotated[bool, Parameter(negative="", help="No progress.")] = False,
    strict: Annotated[bool, Parameter(negative="", help="Exit with 3 if a claim fails.")] = False,
    traceback: Traceback = False,
) -> int:
    """Run one study and judge its claims. Cells that are finished already are not computed again."""
    from outlast.cli._progress import make_progress
    from outlast.studies import get
    from outlast.studies._grid import Launch, Plan
    from outlast.studies._run import run as run_plan
    from outlast.studies._summary import summarise

    for name, value in (("seeds", seeds), ("devices", devices), ("threads", threads), ("workers", workers)):
        if value is not None and value < 1:
            raise ValueError(f"--{name} must be at least 1, got {value}")
    chosen = get(study)
    if accelerator == "cpu" or (accelerator == "auto" and not _gpu_at_hand()):
        _hide_gpus()
    overrides: dict[str, str] = {}
    for item in set_ or []:
        key, equals, value = item.partition("=")
        if not equals or not key:
            raise ValueError(f"--set takes key=value, got {item!r}")
        overrides[key] = value
    launch = Launch(accelerator, devices, precision, strategy, threads)
    plan = Plan(study, scale, seeds or _seeds_of(chosen, scale, part), tuple(part or ()), overrides, launch)
    result = run_plan(chosen, plan, out, make_progress(quiet=quiet), workers=workers)
    summary = summarise(result, _command(plan, out))
    if json_:
        print(json.dumps(summary.to_dict(), allow_nan=False))
    else:
        _print_summary(summary)
    if not result.complete:
        return FAILURE
    return CLAIM_FAILED if strict and summary.verdict == "fails" else OK


@app.command
def report(
    folder: Annotated[Path, Parameter(help="Folder of results, as --out names it.")] = Path("runs"),
    /,
    *,
    output: Annotated[Path | None, Parameter(help="The page to write; default: report.html in the folder.")] = None,
    open_: Annotated[bool, Parameter(name="--open", negative="", help="Show it in the browser.")] = False,
    traceback: Traceback = False,
) -> int:
    """Write one HTML page from all results of a folder."""
    from outlast.cli._progress import QuietProgress
    from outlast.errors import DamagedFileError, MissingDataError
    from outlast.report import write_report
    from outlast.studies import get
    from outlast.studies._grid import cells, without_repeats
    from outlast.studies._run import collect
    from outlast.studies._store import read_plans
    from outlast.studies._summary import summarise

    progress = QuietProgress()
    summaries: list[Summary] = []
    for manifest in sorted(folder.glob("**/run.json")):
        root = manifest.parents[2]
        fitting: dict[str, list[Plan]] = {}
        try:
            plans = read_plans(manifest.parent)
        except DamagedFileError as error:
            progress.note(f"left out of the report: {error}")
            continue
        for plan in plans:
            try:
                cells(get(plan.study), plan)  # a study may have changed since
                fitting.setdefault(plan.study, []).append(plan)
            except ValueError as error:
                progress.note(f"left out of the report: {_command(plan, root)}: {error}")
        for name, own in fitting.items():
            study = get(name)
            kept = without_repeats(study, own)
            summaries += [summarise(collect(study, plan, root, progress.note), _command(plan, root)) for plan in kept]
    if not summaries:
        raise MissingDataError(f"no results in {folder}; make some with: outlast run sam --out {folder}")
    page = output or folder / "report.html"
    write_report(summaries, page)
    print(page.resolve())
    if open_:
        webbrowser.open(page.resolve().as_uri())
    return OK


@data_app.default
def list_data(*, traceback: Traceback = False) -> int:
    """List the data sets: what is embedded, what lies in OUTLAST_DATA, and how to get the rest."""
    from outlast.data import DATASETS, TEXTS, WEIGHTS, data_folder, find, find_catalogues, find_encoder, find_text, find_weights
    from outlast.errors import MissingDataError

    folder = data_folder()
    print(f"OUTLAST_DATA: {folder or 'not set (name a folder with the full data sets there)'}")
    for name, entry in DATASETS.items():
        print(f"\n{name}: {entry.title}, {entry.content}\n  licence: {entry.licence}\n  source: {entry.source}")
        if entry.small:
            print(f"  embedded: {', '.join(f'{count:,} {split}' for split, count in entry.small.items())} images")
        for split, count in entry.splits.items():
            try:
                where = str(find(name, split, "full").files[0].parent)  # pyright: ignore[reportArgumentType]
            except MissingDataError:
                where = f"not at hand; get it with: outlast data fetch {name}"
            print(f"  full {split}, {count:,} images: {where}")
        if entry.note:
            print(f"  note: {entry.note}")
    for name, text in TEXTS.items():
        print(f"\n{name}: {text.content}\n  licence: {text.licence}\n  source: {text.source}")
        print(f"  embedded: {', '.join(f'{count:,} {split}' for split, count in text.small.items())} bytes")
        for split, count in text.sizes.items():
            try:
                where = str(find_text(name, split).parent)
            except MissingDataError:
                where = f"not at hand; put {text.folder}/{text.files[split][0]} (or .xz) into the folder that OUTLAST_DATA names"  # pyright: ignore[reportArgumentType]
            print(f"  full {split}, {count:,} bytes: {where}")
    for name, weights in WEIGHTS.items():
        print(f"\n{name}: weights of a {weights.content}\n  licence: {weights.licence}\n  source: {weights.source}")
        try:
            print(f"  file: {find_weights(name)}")
        except MissingDataError as error:
            print(f"  {error}")
    for name, content, extra, there in (
        ("catalogues", "translated messages of Django and Wagtail (BSD-3-Clause)", "studies", lambda: ", ".join(find_catalogues())),
        ("minilm", "the text encoder all-MiniLM-L6-v2 (Apache-2.0)", "text", lambda: str(find_encoder())),
    ):
        print(f"\n{name}: {content}, inside packages of the extra {extra}")
        try:
            print(f"  found: {there()}")
        except MissingDataError as error:
            print(f"  {error}")
    return OK


@data_app.command
def fetch(
    name: Annotated[str, Parameter(help="Name of a data set (see: outlast data).")],
    /,
    *,
    folder: Annotated[Path | None, Parameter(help="Where to; default: the folder that OUTLAST_DATA names.")] = None,
    traceback: Traceback = False,
) -> int:
    """Download a data set, with checksums, through torchvision."""
    from outlast.data import fetch as fetch_set

    print(fetch_set(name, folder))
    return OK


@diagnose_app.command
def dimension(
    data: Annotated[str, Parameter(help="A data set's name (see: outlast data), a .npy or .npz file, or a folder of images.")],
    /,
    *,
    k: Annotated[str, Parameter(help="Neighbours, separated by commas.")] = "3,5,10,20",
    method: Annotated[str, Parameter(help="mackay, levina_bickel, levina_bickel_unbiased, or pope2021.")] = "mackay",
    anchors: Annotated[int | None, Parameter(help="Rows whose neighbourhoods are used. Default: all up to 20,000, else 2,000.")] = None,
    split: Annotated[str, Parameter(help="Of a named data set: train or test.")] = "train",
    bootstrap: Annotated[int, Parameter(help="Resamples for 95 % intervals; 0 for none.")] = 0,
    seed: Annotated[int, Parameter(help="Of anchors and resamples.")] = 0,
    figure: Annotated[Path | None, Parameter(help="Write a picture there (.svg, .png, .pdf).")] = None,
    json_: Annotated[bool, Parameter(name="--json", negative="", help="Print one JSON object on standard output, nothing else.")] = False,
    traceback: Traceback = False,
) -> int:
    """Estimate the intrinsic dimension of a data set: how many numbers it takes to describe its rows."""
    from outlast.cli._dimension import print_dimension, read_rows
    from outlast.diagnose.dimension import estimate

    try:
        ks = [int(item) for item in k.split(",")]
    except ValueError as error:
        raise ValueError(f"--k takes integers separated by commas, got {k!r}") from error
    result = estimate(read_rows(data, split), method, ks, anchors=anchors, bootstrap=bootstrap, seed=seed)  # pyright: ignore[reportArgumentType]
    if figure is not None:
        from outlast.cli._figure import write_figure

        write_figure(result, figure)
    if json_:
        print(json.dumps(result.to_dict(), allow_nan=False))
    else:
        print_dimension(result)
    return OK


@diagnose_app.command
def padding(
    model: Annotated[str, Parameter(help="torchvision:NAME, timm:NAME, or module:callable that gives a model.")],
    /,
    *,
    size: Annotated[str, Parameter(help="Input size: a length for squares, or HxW.")] = "224",
    channels: Annotated[int, Parameter(help="Of the input.")] = 3,
    suggest: Annotated[int, Parameter(help="Name this many clean sizes near by.")] = 0,
    fail_on: Annotated[Literal["skew"] | None, Parameter(help="skew: exit with 1 where a layer leans or could not be judged.")] = None,
    limit: Annotated[float, Parameter(help="Lean in pixels of the input that --fail-on skew lets pass.")] = 0.0,
    reach: Annotated[Path | None, Parameter(name="--foveation", help="Draw how far each pixel reaches (.png, .svg, .pdf).")] = None,
    json_: Annotated[bool, Parameter(name="--json", negative="", help="Print one JSON object on standard output, nothing else.")] = False,
    traceback: Traceback = False,
) -> int:
    """Find the layers of a model that treat the sides of an image unequally, and input sizes at which none does."""
    from outlast.cli._padding import one_line_warnings, print_padding, read_model, read_size
    from outlast.diagnose.padding import audit, foveation, suggest_sizes

    with one_line_warnings():
        network, sizes = read_model(model), read_size(size)
        report = audit(network, (channels, *sizes))
        suggestions = suggest_sizes(network, sizes, suggest, channels=channels) if suggest else []
    if reach is not None:
        from outlast.cli._figure import write_figure

        write_figure(foveation(network, (channels, *sizes)), reach)
    if json_:
        print(json.dumps({"report": report.to_dict(), "suggestions": [each.to_dict() for each in suggestions]}, allow_nan=False))
    else:
        print_padding(report, suggestions)
    worst = max((abs(row.skew_input_px) for row in report.layers), default=0.0)
    if not limit >= 0.0:
        raise ValueError(f"--limit is a number of pixels of at least 0, got {limit}")
    return FAILURE if fail_on == "skew" and (worst > limit or report.unread) else OK


def run_command(words: Sequence[str]) -> int:
    """Run a command line and return its exit code; errors become one line on standard error."""
    from outlast.errors import OutlastError

    signal.signal(signal.SIGTERM, _on_terminate)
    show = "--traceback" in words
    try:
        if not words:
            app.help_print([])
            return OK
        code = app(list(words))
    except CycloptsError as error:
        return _fail(" ".join(str(error).split()), USAGE)
    except (ValueError, TypeError) as error:
        if show:
            traceback.print_exc()
        return _fail(str(error), FAILURE if isinstance(error, OutlastError) else USAGE)
    except KeyboardInterrupt as stop:
        return _stopped(words, stop.code if isinstance(stop, Stopped) else 130)
    except (OSError, OutlastError) as error:
        if show:
            traceback.print_exc()
        return _fail(_os_message(error), FAILURE)
    except Exception as error:  # of a user's own study, or a defect of ours
        if show:
            traceback.print_exc()
        return _fail(f"{type(error).__name__}: {error}{'' if show else ' (--traceback shows where)'}", FAILURE)
    return code if isinstance(code, int) else OK


def _on_terminate(_signal: int, _frame: FrameType | None) -> None:
    raise Stopped(143)


def _stopped(words: Sequence[str], code: int) -> int:
    print(f"\noutlast: stopped; finished cells are kept. Go on with: outlast {' '.join(words)}", file=sys.stderr)
    return code


def _fail(message: str, code: int) -> int:
    print(f"outlast: {' '.join(message.split())}", file=sys.stderr)
    return code


def _os_message(error: BaseException) -> str:
    from outlast.errors import OutlastError

    if isinstance(error, OSError) and not isinstance(error, OutlastError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return str(error)


def _seeds_of(study: Study, scale: ScaleName, parts: Sequence[str] | None) -> int:
    from outlast.studies._grid import chosen_parts

    return max(part.scales[scale].seeds for part in chosen_parts(study, scale, parts or ()))


def _command(plan: Plan, out: Path) -> str:
    """The command that repeats a run."""
    import shlex
    from dataclasses import asdict

    from outlast.studies._grid import Launch

    words = ["outlast", "run", plan.study, "--scale", plan.scale, "--seeds", str(plan.seeds)]
    words += [word for part in plan.parts for word in ("--part", part)]
    words += [word for key, value in plan.overrides.items() for word in ("--set", f"{key}={value}")]
    plain = asdict(Launch())
    words += [word for key, value in asdict(plan.launch).items() if value != plain[key] for word in (f"--{key}", str(value))]
    words += ["--out", str(out)] if out != Path("runs") else []
    return shlex.join(words)


def _print_summary(summary: Summary) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False, width=None if sys.stdout.isatty() else 240)  # a file has no width to wrap to
    console.print(Text(f"\n{summary.name} ({summary.scale} scale, {summary.seeds} seeds): {summary.question}", style="bold"))
    if summary.not_run:
        console.print(Text(f"not run: {summary.not_run}"))
        return
    for part in summary.parts:
        table = Table(box=None, pad_edge=False)
        table.add_column("arm")
        for metric in part.metrics:
            table.add_column(f"{metric.title}{f' ({metric.unit})' if metric.unit else ''}", justify="right")
        for row in part.rows:
            cells = [_with_interval(row.metrics[metric.name], metric.digits) for metric in part.metrics]
            table.add_row(Text(f"{row.title}{f' [{row.setting}]' if len(part.results.settings) > 1 else ''}"), *cells)
        console.print(table)
    styles = {"holds": "green", "fails": "bold red", "undecided": "yellow"}
    for judged in summary.claims:
        line = Text(f"{judged.verdict:>9}  ", style=styles[judged.verdict])
        line.append(judged.claim.text, style="default")
        if judged.measured is not None:
            unit = f" {judged.claim.unit}" if judged.claim.unit else ""
            line.append(f": {_with_interval(judged.measured, judged.claim.digits)}{unit}", style="default")
        if judged.reason:
            line.append(f" ({judged.reason})", style="default")
        console.print(line)
    for failure in summary.failed:
        console.print(Text(f"failed cell: {failure}"))
    if summary.absent:
        console.print(Text(f"not at {summary.scale} scale: {', '.join(summary.absent)}"))
    console.print(Text(f"{summary.finished} of {summary.total} cells, {summary.seconds:.0f} s of computation, results in {summary.folder}"))


def _with_interval(value: Interval, digits: int) -> str:
    if value.low is None or value.high is None:
        return f"{value.mean:.{digits}f}"
    return f"{value.mean:.{digits}f} [{value.low:.{digits}f}, {value.high:.{digits}f}]"
