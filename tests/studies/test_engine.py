"""Runs, resumes, stops, failures and verdicts of the study engine."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import toy_study

from outlast._core._ray import ray_session
from outlast.cli._progress import QuietProgress
from outlast.report import write_report
from outlast.studies import Claim, Metric, Scale, Study, get, names
from outlast.studies import _run as engine
from outlast.studies._compute import compute
from outlast.studies._context import Context
from outlast.studies._grid import Launch, Plan, cells, without_repeats
from outlast.studies._run import run
from outlast.studies._statistics import interval, verdict
from outlast.studies._store import read_plans
from outlast.studies._summary import summarise

TESTS = Path(__file__).parents[1]


def plan(scale="quick", seeds=3, parts=(), **overrides):
    return Plan("toy_study:STUDY", scale, seeds, parts, overrides, Launch("cpu"))


def run_toy(folder, the_plan=None, workers=1):
    return run(toy_study.STUDY, the_plan or plan(), folder, QuietProgress(), workers=workers)


class Finer(toy_study.Toy):
    extra: float = 1.0


@pytest.fixture
def log(tmp_path, monkeypatch):
    path = tmp_path / "log"
    monkeypatch.setenv("TOY_LOG", str(path))
    monkeypatch.setenv("PYTHONPATH", str(TESTS))
    return path


def computed(log):
    return len(log.read_text().splitlines()) if log.exists() else 0


def test_all_cells_run_and_claims_are_judged(tmp_path):
    summary = summarise(run_toy(tmp_path), "command")
    assert [(claim.claim.name, claim.verdict) for claim in summary.claims] == [("adds", "holds"), ("adds-a-lot", "fails")]
    assert summary.verdict == "fails"
    content = summary.to_dict()
    assert content["arms"]["more"]["score"]["values"] == pytest.approx([3.0, 3.01, 3.02])
    assert set(content) == {"study", "scale", "seeds", "seconds", "folder", "claims", "arms"}
    assert set(content["claims"][0]) == {"name", "text", "verdict", "estimate", "low", "high", "threshold"}


def test_settings_make_rows_of_their_own(tmp_path):
    summary = summarise(run_toy(tmp_path, plan("standard")), "")
    assert [row.name for row in summary.parts[0].rows] == ["a/plain", "a/more", "b/plain"]


def test_finished_cells_are_not_computed_again(tmp_path, log):
    run_toy(tmp_path / "runs")
    run_toy(tmp_path / "runs")
    assert computed(log) == 6
    run_toy(tmp_path / "runs", plan(seeds=4))
    assert computed(log) == 8


def test_another_setting_is_another_cell(tmp_path, log):
    run_toy(tmp_path / "runs")
    run_toy(tmp_path / "runs", plan(base="2"))
    assert computed(log) == 12


@pytest.mark.parametrize("damage", ["truncate", "change", "empty", "no object"])
def test_damaged_result_is_set_aside_reported_and_computed_again(tmp_path, log, capsys, damage):
    first = run_toy(tmp_path / "runs")
    path = sorted(first.folder.glob("adding/*.json"))[0]
    text = path.read_text()
    path.write_text(
        {"truncate": text[: len(text) // 2], "change": text.replace('"score": ', '"score": 9'), "empty": "", "no object": "[]"}[damage]
    )
    damaged = path.read_bytes()
    run_toy(tmp_path / "runs")
    assert computed(log) == 7
    aside = list(path.parent.glob("*.damaged"))
    assert [file.read_bytes() for file in aside] == [damaged]
    assert "damaged" in capsys.readouterr().err
    assert path.read_text() != damaged.decode()


def test_failing_cell_is_named_and_others_go_on(tmp_path, capsys):
    result = run_toy(tmp_path, plan(fail="raise"))
    assert len(result.records) == 3
    assert len(result.failed) == 3
    assert not result.complete
    assert "told to fail" in capsys.readouterr().err
    assert summarise(result, "").claims[0].verdict == "undecided"


def test_metric_that_is_not_finite_is_a_failure(tmp_path):
    result = run_toy(tmp_path, plan(fail="nan"))
    assert not result.records
    assert "DivergedError" in result.failed[0][1]


def test_fewer_than_three_seeds_decide_nothing(tmp_path):
    assert {claim.verdict for claim in summarise(run_toy(tmp_path, plan(seeds=2)), "").claims} == {"undecided"}


def test_two_ray_workers_give_the_same_results_and_name_failures(tmp_path, log):
    pytest.importorskip("ray", reason="ray (extra cluster) is not installed")
    alone = run_toy(tmp_path / "alone")
    with ray_session(2, 1, "tests"):  # a start costs half a minute
        spread = run_toy(tmp_path / "spread", workers=2)
        failing = run_toy(tmp_path / "failing", plan(seeds=1, fail="raise"), workers=2)
    assert {k: r["metrics"] for k, r in spread.records.items()} == {k: r["metrics"] for k, r in alone.records.items()}
    assert len(failing.records) == 1
    assert "told to fail" in failing.failed[0][1]


def command(folder, *words):
    return [sys.executable, "-m", "outlast", "run", "toy_study:STUDY", "--out", str(folder), "--accelerator", "cpu", *words]


def test_kill_at_random_moments_loses_and_repeats_nothing(tmp_path, log):
    folder = tmp_path / "runs"
    words = command(folder, "--seeds", "8", "--set", "wait=0.05", "--json")
    rng = random.Random(0)
    finished = set()
    for number in range(5):
        before = computed(log)
        process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, cwd=TESTS)
        while number and computed(log) == before:  # a cell has begun; the first is killed while it starts
            assert process.poll() is None
            time.sleep(0.01)
        time.sleep(rng.uniform(0.0, 0.6))
        process.kill()
        assert b"damaged" not in process.communicate()[1]
        now = {path.name: path.read_bytes() for path in folder.glob("toy/quick/adding/*.json")}
        assert finished <= set(now.items())
        finished = set(now.items())
    done = subprocess.run(words, capture_output=True, text=True, cwd=TESTS, check=True)
    assert json.loads(done.stdout)["claims"][0]["verdict"] == "holds"
    assert finished <= {(path.name, path.read_bytes()) for path in folder.glob("toy/quick/adding/*.json")}
    assert computed(log) <= 16 + 5  # at most the one cell that each kill interrupted


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stop_says_how_to_go_on(tmp_path, log, sent, code):
    process = subprocess.Popen(command(tmp_path / "runs", "--set", "wait=5"), stderr=subprocess.PIPE, text=True, cwd=TESTS)
    while computed(log) == 0:
        time.sleep(0.05)
    process.send_signal(sent)
    error = process.communicate(timeout=20)[1]
    assert process.returncode == code
    assert "Go on with: outlast run toy_study:STUDY" in error
    assert "Traceback" not in error


def test_two_processes_share_a_folder_and_compute_each_cell_once(tmp_path, log):
    words = command(tmp_path / "runs", "--set", "wait=0.1", "--quiet")
    both = [subprocess.Popen(words, stdout=subprocess.DEVNULL, cwd=TESTS) for _ in range(2)]
    assert [process.wait() for process in both] == [0, 0]
    assert computed(log) == 6


def test_full_disk_is_one_line_and_keeps_what_is_finished(tmp_path, monkeypatch):
    import outlast.studies._store as store

    first = run_toy(tmp_path, plan(seeds=1))
    kept = {path: path.read_bytes() for path in first.folder.rglob("*.json")}
    real, calls = store.write_whole, []

    def full(path, data):
        calls.append(path)
        if path.name != "run.json":
            raise OSError(28, "No space left on device", str(path))
        real(path, data)

    monkeypatch.setattr(store, "write_whole", full)
    with pytest.raises(OSError, match="No space left"):
        run_toy(tmp_path, plan(seeds=2))
    assert {path: path.read_bytes() for path in kept if path.name != "run.json"} == {p: d for p, d in kept.items() if p.name != "run.json"}


def test_plans_of_one_folder_are_all_kept(tmp_path):
    for the_plan in (plan(), plan(seeds=2), plan(base="2.0"), plan()):
        folder = run_toy(tmp_path, the_plan).folder
    assert read_plans(folder) == (plan(seeds=2), plan(base="2.0"), plan())
    (folder / "run.json").write_text(json.dumps({"format": "outlast.run", "version": 1, **asdict(plan(seeds=4))}))
    assert read_plans(folder) == (plan(seeds=4),)  # as written by an earlier release
    (folder / "run.json").write_text("{")
    assert read_plans(run_toy(tmp_path, plan(seeds=1)).folder) == (plan(seeds=1),)


def test_a_part_is_shown_once_with_the_most_seeds():
    study = Study(
        "toy", "", "?", "A, 2021", "t", "tests", (toy_study.PART, replace(toy_study.PART, name="speed", timed=True)), "toy_study:STUDY"
    )
    both, more, other = plan(seeds=3), plan(seeds=5, parts=("speed",)), plan(seeds=5, base="2.0")
    assert without_repeats(study, [both, more, other]) == [replace(both, parts=("adding",)), more, other]
    assert without_repeats(study, [more, plan(seeds=5)]) == [plan(seeds=5)]
    assert without_repeats(study, [plan(seeds=5), more]) == [replace(plan(seeds=5), parts=("adding",)), more]
    assert without_repeats(study, [both]) == [both]
    finer = replace(study.parts[1], settings_type=Finer)  # --set extra= is of this part alone
    study = replace(study, parts=(study.parts[0], finer))
    plain, own = plan(), plan(extra="2.0")
    assert without_repeats(study, [plain, own]) == [replace(plain, parts=("speed",)), own]


def test_parts_without_the_scale_are_named(tmp_path):
    later = replace(toy_study.PART, name="later", question="And later?", scales={"standard": toy_study.PART.scales["standard"]})
    study = Study("toy", "", "?", "A, 2021", "t", "tests", (toy_study.PART, later), "toy_study:STUDY")
    summary = summarise(run(study, plan(), tmp_path, QuietProgress()), "")
    assert summary.absent == ("later (And later?)",)
    write_report([summary], tmp_path / "report.html")
    assert "Not at quick scale: later (And later?)." in (tmp_path / "report.html").read_text()


def test_workers_run_what_measures_speed_one_by_one_at_the_end(tmp_path, monkeypatch):
    parts = (replace(toy_study.PART, name="speed", timed=True), toy_study.PART)
    study = Study("toy", "", "?", "A, 2021", "t", "tests", parts, "toy_study:STUDY")
    seen = []

    def work(_self, _ray, missing, workers, *_):
        seen.append(({cell.part for cell in missing}, len(missing), workers))

    monkeypatch.setattr(engine, "ray_session", lambda *_: nullcontext())
    monkeypatch.setattr(engine._RayWorkers, "_work", work)
    run(study, plan(seeds=2), tmp_path, QuietProgress(), workers=4)
    assert seen == [({"adding"}, 4, 4), ({"speed"}, 4, 1)]


def test_the_clock_waits_for_the_device(monkeypatch):
    context = Context(0, asdict(Launch("cpu")), lambda *_: None)
    waited = []
    monkeypatch.setattr(torch.accelerator, "synchronize", waited.append)
    context.clock()
    assert not waited
    context.fabric = SimpleNamespace(device=torch.device("cuda", 0))
    assert context.clock() <= time.perf_counter()
    assert waited == [torch.device("cuda", 0)]


def test_overrides_are_typed():
    with pytest.raises(ValueError, match=r"no setting 'nonsense'; its settings: base, fail"):
        cells(toy_study.STUDY, plan(nonsense="1"))
    with pytest.raises(ValueError, match="setting 'size'"):
        cells(toy_study.STUDY, plan(size="many"))
    with pytest.raises(ValueError, match="greater than or equal to 1"):
        cells(toy_study.STUDY, plan(size="0"))
    with pytest.raises(ValueError, match="what the arms"):
        cells(toy_study.STUDY, plan(gain="1"))
    assert cells(toy_study.STUDY, plan(size="5"))[0].config["size"] == 5


def test_interval_is_students():
    found = interval([1.0, 2.0, 3.0])
    assert (found.mean, found.low, found.high) == pytest.approx((2.0, 2 - 4.302653 / 3**0.5, 2 + 4.302653 / 3**0.5), rel=1e-6)
    assert interval([1.0]).low is None


@pytest.mark.parametrize(
    ("values", "threshold", "direction", "expected"),
    [
        ([5.0, 5.1, 4.9], 4.0, "at least", "holds"),
        ([5.0, 5.1, 4.9], 6.0, "at least", "fails"),
        ([5.0, 5.1, 4.9], 5.0, "at least", "undecided"),
        ([5.0, 5.1, 4.9], 6.0, "at most", "holds"),
        ([5.0, 5.1, 4.9], 4.0, "at most", "fails"),
        ([5.0, 5.0], 4.0, "at least", "undecided"),
    ],
)
def test_verdicts_come_from_intervals(values, threshold, direction, expected):
    assert verdict(interval(values), threshold, direction, min_seeds=3) == expected


def test_declarations_are_checked():
    with pytest.raises(ValueError, match="lower-case"):
        Study("<script>", "", "", "", "", "", (), "")
    with pytest.raises(ValueError, match="no arm"):
        toy_study.Part(
            "p",
            "",
            toy_study.Toy,
            toy_study.cell,
            (),
            (Metric("m", ""),),
            (Claim("c", "", lambda _r, _s: 0.0, 0.0),),
            {"quick": Scale(arms=("x",))},
        )
    with pytest.raises(ValueError, match=r"unknown study 'sma'.*did you mean 'sam'"):
        get("sma")


def test_cells_are_pure_functions_of_configuration_and_seed(tmp_path):
    small = {"epochs": "2", "train_size": "256", "spectrum_samples": "256", "evaluations": "1"}
    runs = [run(get("sam"), Plan("sam", "quick", 1, (), small, Launch("cpu")), tmp_path / str(n), QuietProgress()) for n in range(2)]
    assert {k: r["metrics"] for k, r in runs[0].records.items()} == {k: r["metrics"] for k, r in runs[1].records.items()}
    assert len(runs[0].records) == 4


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_cells_train_on_two_processes(strategy):
    small = {"epochs": "2", "train_size": "256", "spectrum_samples": "256", "evaluations": "1"}

    def metrics(launch):
        grid = cells(get("sam"), Plan("sam", "quick", 1, (), small, launch))
        return compute(next(cell for cell in grid if cell.arm == "sgd"), lambda *_: None)["metrics"]

    assert metrics(Launch("cpu", devices=2, strategy=strategy)) == pytest.approx(metrics(Launch("cpu")), rel=1e-2)


@pytest.mark.data
@pytest.mark.skipif(not os.environ.get("OUTLAST_DATA"), reason="OUTLAST_DATA is not set: no CIFAR-10")
def test_paper_scale_builds_and_trains_two_steps(tmp_path):
    short = {"max_steps": "2", "spectrum_samples": "32", "spectrum_iterations": "1", "batch_size": "32", "test_size": "64"}
    plan_ = Plan("sam", "paper", 1, (), short, Launch("cpu"))
    study = get("sam")
    wanted = [cell for cell in cells(study, plan_) if cell.setting == "noise-0.4" and cell.arm == "sam-0.1"]
    assert wanted[0].config["model"] == "resnet32"
    assert wanted[0].config["train_size"] is None
    # the accuracy on 50,000 noisy training images is minutes of work on a processor and the same code as on 64
    short_cell = replace(wanted[0], config={**wanted[0].config, "train_size": 64})
    record = compute(short_cell, lambda *_: None)
    assert set(record["metrics"]) == {metric.name for metric in study.part("label-noise").metrics}


def test_shared_work_is_done_once_for_a_seed_and_a_key():
    from dataclasses import asdict

    from outlast.studies._context import Context

    calls = []

    def work(context, key):
        return context.shared(key, lambda: calls.append((context.seed, key)) or len(calls))

    first, second = (Context(seed, asdict(Launch("cpu")), lambda *_: None) for seed in (101, 102))
    assert work(first, ("a",)) == work(first, ("a",))
    work(second, ("a",))
    work(first, ("b",))
    assert calls == [(101, ("a",)), (102, ("a",)), (101, ("b",))]


def test_every_study_declares_what_it_claims():
    for name in names():
        study = get(name)
        for part in study.parts:
            for scale in part.scales:
                grid = cells(study, Plan(name, scale, 3, (part.name,), {}, Launch("cpu")))
                assert len({cell.key for cell in grid}) == len(grid)
                assert all(cell.launch["threads"] == 1 for cell in grid)
            assert part.claims
            assert all(set(claim.scales) & set(part.scales) for claim in part.claims)


@pytest.mark.parametrize(
    ("name", "part", "short"),
    [
        ("tent", "fashion", {"train_size": "512", "epochs": "1", "images": "200"}),
        ("tent", "groupnorm", {"train_size": "512", "epochs": "1", "images": "200"}),
        ("intrinsic-dimension", "real", {"anchors": "100"}),
        ("intrinsic-dimension", "ladder", {"draws": "1", "n": "300"}),
        ("intrinsic-dimension", "upscaling", {}),
        ("intrinsic-dimension", "learning", {"draws": "1", "steps": "5"}),
    ],
)
def test_parts_run_and_repeat(tmp_path, name, part, short):
    from outlast.report import render
    from outlast.studies import _context

    runs = []
    for folder in ("a", "b"):
        _context._SHARED.clear()
        runs.append(run(get(name), Plan(name, "quick", 1, (part,), short, Launch("cpu")), tmp_path / folder, QuietProgress()))
    assert runs[0].complete
    assert {k: r["metrics"] for k, r in runs[0].records.items()} == {k: r["metrics"] for k, r in runs[1].records.items()}
    page = render([summarise(runs[0], "command")])
    assert page.count('<li><span class="verdict') == sum("quick" in claim.scales for claim in get(name).part(part).claims)


@pytest.mark.data
def test_generative_part_runs_short():
    short = {"steps": "3", "n": "200", "train_size": "200"}
    study = get("intrinsic-dimension")
    grid = cells(study, Plan(study.name, "standard", 1, ("gan",), short, Launch("cpu")))
    if not os.environ.get("OUTLAST_DATA"):
        pytest.skip("OUTLAST_DATA is not set: no full Fashion-MNIST")
    record = compute(grid[0], lambda *_: None)
    assert set(record["metrics"]) == {"d2", "d4", "d8", "d16", "d32"}
    assert len(record["series"]["samples 2"]) == 8 * 14 * 14


# ---- helping processes --------------------------------------------------------------------------------------------------------------


def test_a_helper_leaves_nothing_to_do_but_what_measures_speed(tmp_path, log):
    from outlast.studies._run import assist

    folder = tmp_path / "runs"
    assist(toy_study.STUDY, plan(), folder, QuietProgress())
    assert computed(log) == 6
    assert not list(folder.rglob("run.json"))  # the manifest is the other process's
    run_toy(folder)
    assert computed(log) == 6
    timed = replace(toy_study.STUDY, parts=(replace(toy_study.PART, timed=True), *toy_study.STUDY.parts[1:]))
    assist(timed, plan(parts=("adding",)), tmp_path / "other", QuietProgress())
    assert computed(log) == 6


def test_helpers_stand_still_while_speed_is_measured(tmp_path):
    from outlast.cli._helper import Helpers, StandStill

    def state(process):
        for _ in range(100):
            found = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0]
            if found in "TS":
                return found
            time.sleep(0.02)
        return found

    told = []

    class Told(QuietProgress):
        def cell_started(self, cell):
            told.append(("started", cell))

        def cell_finished(self, cell, seconds):
            told.append(("finished", cell, seconds))

        def cell_failed(self, cell, error):
            told.append(("failed", cell))

    with subprocess.Popen(["sleep", "60"]) as process, Helpers(tmp_path, 0, ()) as helpers:
        helpers._running = [process]
        progress = StandStill(Told(), helpers, lambda cell: cell == "speed")
        progress.cell_started("accuracy")
        assert state(process) == "S"
        progress.cell_finished("accuracy", 1.0)
        progress.cell_started("speed")
        time.sleep(0.1)
        assert state(process) == "T"
        progress.cell_failed("speed", ValueError())
        time.sleep(0.1)
        assert state(process) == "S"
        progress.cell_started("speed")
        helpers.__exit__(None, None, None)  # one that stands still is ended, too
        assert process.returncode == -signal.SIGTERM
    assert [entry[0] for entry in told] == ["started", "finished", "started", "failed", "started"]


def test_parts_that_measure_speed_are_known():
    timed = {(name, part.name) for name in names() for part in get(name).parts if part.timed}
    assert timed == {("performer", "speed"), ("performer", "decoding"), ("rfa", "decoding")}
