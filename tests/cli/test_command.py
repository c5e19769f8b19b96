"""The command as a user types it: help, exit codes, one line for each mistake."""

from __future__ import annotations

import io
import json
import os
import pkgutil
import signal
import subprocess
import sys
import time
import webbrowser
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import toy_study
from rich.console import Console
from rich.progress import TimeRemainingColumn

import outlast as package
from outlast.cli._app import run_command
from outlast.cli._progress import RichProgress
from outlast.studies._grid import Launch, Plan, cells

TESTS = Path(__file__).parents[1]
EXTRAS = (
    "jaxtyping beartype scipy sklearn torchvision pydantic rich cyclopts matplotlib "
    "lightning_fabric ray transformers yaml jinja2 PIL safetensors gymnasium timm faiss"
)


def outlast(*words, **env):
    words = [sys.executable, "-m", "outlast", *map(str, words)]
    return subprocess.run(words, capture_output=True, text=True, cwd=TESTS, env={**os.environ, **env}, check=False)


@pytest.fixture
def refused(capsys, monkeypatch):
    """Runs a command in this process, since a start costs seconds and most mistakes need none; one of each code has a process."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    before = signal.getsignal(signal.SIGTERM)

    def run(*words):
        code = run_command([*map(str, words)])
        told = capsys.readouterr()
        assert told.out == ""
        assert len(told.err.strip().splitlines()) == 1
        return code, told.err

    yield run
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def inside(capsys, monkeypatch):
    """``outlast`` in this process, for what needs no process of its own: a start costs seconds."""
    monkeypatch.syspath_prepend(str(TESTS))
    before = signal.getsignal(signal.SIGTERM)

    def run(*words, **env):
        for name, value in env.items():
            monkeypatch.setenv(name, value)
        capsys.readouterr()
        code = run_command([*map(str, words)])
        told = capsys.readouterr()
        return SimpleNamespace(returncode=code, stdout=told.out, stderr=told.err)

    yield run
    signal.signal(signal.SIGTERM, before)


def toy(folder, *words, **env):
    return outlast("run", "toy_study:STUDY", "--accelerator", "cpu", "--out", folder, *words, **env)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["frobnicate"], 'Unknown command "frobnicate"'),
        (["run"], "STUDY"),
        (["run", "nothing"], "unknown study 'nothing'"),
        (["run", "sam", "--scale", "huge"], "quick"),
        (["run", "sam", "--seeds", "many"], "--seeds"),
        (["run", "sam", "--seeds", "0"], "--seeds must be at least 1"),
        (["run", "sam", "--set", "epochs"], "key=value"),
        (["run", "sam", "--set", "epochz=3"], "no setting 'epochz'"),
        (["run", "sam", "--set", "epochs=three"], "setting 'epochs'"),
        (["run", "sam", "--part", "other"], "its parts: label-noise"),
        (["run", "no_such_module:STUDY"], "no study at"),
        (["demo", "--only", "cooking"], "the themes: after deployment, continual learning"),
        (["data", "fetch", "imagenet"], "unknown data set 'imagenet'"),
    ],
)
def test_usage_mistakes_are_one_line_and_exit_2(words, says, refused):
    code, told = refused(*words)
    assert code == 2
    assert says in told


@pytest.mark.parametrize(("accelerator", "left"), [("cpu", ""), ("cuda", "0,1")])
def test_graphics_cards_are_hidden_where_none_is_used(tmp_path, monkeypatch, capsys, accelerator, left):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    before = signal.getsignal(signal.SIGTERM)
    try:
        run_command(["run", "sam", "--accelerator", accelerator, "--scale", "paper", "--part", "none", "--out", str(tmp_path)])
    finally:
        signal.signal(signal.SIGTERM, before)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == left


def test_a_usage_mistake_ends_the_process_with_2():
    done = outlast("run", "nothing")
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.strip().splitlines()) == 1


def test_help_answers_fast_and_without_torch():
    start = time.perf_counter()
    done = outlast("--help")
    assert time.perf_counter() - start < 5  # the target of half a second is measured in benchmarks, not asserted here
    assert "demo" in done.stdout
    code = "import sys, outlast.cli._app, outlast.studies; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    "words", [[], ["run", "--help"], ["report", "--help"], ["data", "--help"], ["demo", "--help"], ["studies"], ["data"]]
)
def test_things_to_read_are_read(words):
    done = outlast(*words)
    assert done.returncode == 0
    assert len(done.stdout) > 200
    assert done.stderr == ""


def test_json_is_the_only_thing_on_standard_output(tmp_path, inside):
    done = inside("run", "toy_study:STUDY", "--accelerator", "cpu", "--out", tmp_path, "--json")
    assert done.returncode == 0
    content = json.loads(done.stdout)
    assert content["study"] == "toy"
    assert [claim["verdict"] for claim in content["claims"]] == ["holds", "fails"]
    assert "[6/6]" in done.stderr


def test_quiet_says_nothing_on_standard_error(tmp_path, inside):
    done = inside("run", "toy_study:STUDY", "--accelerator", "cpu", "--out", tmp_path, "--quiet")
    assert done.stderr == ""
    assert "holds" in done.stdout


def test_strict_exits_3_for_a_failing_claim(tmp_path):
    assert toy(tmp_path, "--strict").returncode == 3


def test_failed_cell_exits_1(tmp_path):
    done = toy(tmp_path, "--set", "fail=raise")
    assert done.returncode == 1
    assert "told to fail" in done.stderr
    assert "Traceback" not in done.stderr


def test_missing_data_exits_1(tmp_path):
    done = toy(tmp_path, "--scale", "paper", OUTLAST_DATA="")
    assert done.returncode == 1
    assert "outlast data fetch cifar10" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_unwritable_folder_exits_1(tmp_path):
    (tmp_path / "file").write_text("")
    done = toy(tmp_path / "file" / "runs")
    assert done.returncode == 1
    assert "file" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_missing_extra_is_one_line_with_the_way_out(tmp_path):
    block = "import sys; sys.modules['lightning_fabric'] = None; sys.argv[1:] = {words!r}; from outlast.cli import main; main()"
    words = ["run", "toy_study:STUDY", "--out", str(tmp_path), "--seeds", "1"]
    done = subprocess.run([sys.executable, "-c", block.format(words=words)], capture_output=True, text=True, cwd=TESTS, check=False)
    assert done.returncode == 1
    assert 'pip install "outlast[train]"' in done.stderr
    block = "import sys; sys.modules['cyclopts'] = None; from outlast.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", block], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert 'pip install "outlast[cli]"' in done.stderr


def test_the_demo_runs_what_is_asked_for_and_goes_on(tmp_path):
    """Of two studies the theme's alone; the same command again, with a helping process, keeps every finished cell."""
    code = (
        "import sys; sys.path.insert(0, '.')\n"
        "import outlast.studies._registry as registry\n"
        "registry._STUDIES = {'toy': 'toy_study:STUDY', 'sam': 'outlast.studies.sam:STUDY'}\n"
        "from outlast.cli import main\n"
        "main()\n"
    )
    words = [sys.executable, "-c", code, "demo", "--only", "test", "--processes", "1", "--out", str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True, cwd=TESTS, check=False)
    assert done.returncode == 0, done.stderr
    assert "1 study at quick scale" in done.stderr
    assert "Does it run?" in (tmp_path / "report.html").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "toy"]
    written = {path: path.stat().st_mtime_ns for path in tmp_path.glob("toy/quick/*/*.json")}
    assert len(written) == 6
    words[words.index("1")] = "2"
    again = subprocess.run(words, capture_output=True, text=True, cwd=TESTS, check=False)
    assert again.returncode == 0, again.stderr
    assert "6 of 6 cells" in again.stdout
    assert {path: path.stat().st_mtime_ns for path in written} == written


def test_themes_and_names_choose_studies():
    from outlast.studies import names
    from outlast.studies._registry import names_of

    assert names_of([]) == names()
    assert names_of(["few labels"]) == ("startup", "distribution-calibration")
    assert names_of(["Long", "sam"]) == ("sam", "performer", "rfa")


@pytest.mark.slow
def test_the_wheel_needs_torch_and_numpy_alone(tmp_path):
    root = TESTS.parent
    subprocess.run([sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(root)], check=True)
    (wheel,) = tmp_path.glob("outlast-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        metadata = archive.read(next(name for name in names if name.endswith("METADATA"))).decode()
        archive.extractall(tmp_path / "site")
    wanted = [line.split(": ", 1)[1] for line in metadata.splitlines() if line.startswith("Requires-Dist") and "extra ==" not in line]
    assert sorted(line.split(">")[0] for line in wanted) == ["numpy", "torch"]
    assert sum(path.stat().st_size for path in (tmp_path / "site").rglob("*") if path.is_file()) < 25e6
    done = subprocess.run(
        [sys.executable, "-c", "import outlast; print(outlast.__file__, outlast.__version__)"],
        env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert str(tmp_path) in done.stdout


def test_report_collects_a_folder(tmp_path, inside):
    inside("run", "toy_study:STUDY", "--accelerator", "cpu", "--out", tmp_path, "--quiet")
    done = inside("report", tmp_path)
    assert done.returncode == 0
    assert Path(done.stdout.strip()) == tmp_path / "report.html"
    assert "Does it run?" in (tmp_path / "report.html").read_text()
    empty = inside("report", tmp_path / "empty")
    assert empty.returncode == 1
    assert "no results" in empty.stderr


def test_report_shows_two_runs_that_share_a_folder(tmp_path, inside, monkeypatch):
    opened = []
    monkeypatch.setattr(webbrowser, "open", opened.append)
    words = ["run", "toy_study:STUDY", "--accelerator", "cpu", "--quiet", "--out", tmp_path]
    assert inside(*words).returncode == 0
    assert inside(*words, "--set", "base=2", "--seeds", "4").returncode == 0
    assert inside("report", tmp_path, "--open").returncode == 0
    page = (tmp_path / "report.html").read_text()
    assert page.count("outlast run toy_study:STUDY") == 2
    assert "--set base=2" in page
    assert opened == [(tmp_path / "report.html").as_uri()]


def test_report_leaves_out_a_plan_that_does_not_fit_any_more(tmp_path, inside):
    words = ["run", "toy_study:STUDY", "--accelerator", "cpu", "--quiet", "--out", tmp_path]
    assert inside(*words).returncode == 0
    path = tmp_path / "toy" / "quick" / "run.json"
    content = json.loads(path.read_text())
    good = content["plans"][0]
    content["plans"] = [{**good, "parts": ["renamed"]}, good, {**good, "overrides": {"gone": "1"}}]
    path.write_text(json.dumps(content))
    done = inside("report", tmp_path)
    assert done.returncode == 0
    assert done.stderr.count("left out of the report: outlast run") == 2
    assert "'renamed'" in done.stderr
    assert (tmp_path / "report.html").read_text().count("outlast run toy_study:STUDY") == 1


def test_report_leaves_out_a_damaged_manifest(tmp_path, inside):
    inside("run", "toy_study:STUDY", "--accelerator", "cpu", "--out", tmp_path, "--quiet")
    (tmp_path / "toy" / "standard").mkdir()
    (tmp_path / "toy" / "standard" / "run.json").write_text("{")
    done = inside("report", tmp_path)
    assert done.returncode == 0
    assert "left out" in done.stderr


def test_what_a_user_s_module_raises_is_one_line(tmp_path, monkeypatch, refused):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "broken_study.py").write_text("1 / 0\n")
    (tmp_path / "broken_model.py").write_text("def make():\n    raise RuntimeError('no weights')\n")
    (tmp_path / "broken_claim.py").write_text(
        "from dataclasses import replace\nimport sys\n"
        f"sys.path.insert(0, {str(TESTS)!r})\nimport toy_study\n"
        "claim = replace(toy_study.PART.claims[0], measure=lambda results, seed: {}['nothing'])\n"
        "STUDY = replace(toy_study.STUDY, parts=(replace(toy_study.PART, claims=(claim,)),))\n"
    )
    code, told = refused("run", "broken_study:STUDY")
    assert code == 2
    assert "ZeroDivisionError" in told
    code, told = refused("diagnose", "padding", "broken_model:make")
    assert code == 2
    assert "RuntimeError: no weights" in told
    code, told = refused("run", "broken_claim:STUDY", "--accelerator", "cpu", "--quiet", "--out", tmp_path / "runs")
    assert code == 1
    assert "KeyError: 'nothing'" in told


def test_the_traceback_of_a_defect_is_shown_on_request_by_commands_that_list(inside, monkeypatch):
    monkeypatch.setattr("outlast.data.data_folder", lambda: 1 / 0)
    done = inside("data")
    assert (done.returncode, done.stderr) == (1, "outlast: ZeroDivisionError: division by zero (--traceback shows where)\n")
    done = inside("data", "--traceback")
    assert done.stderr.startswith("Traceback")
    assert done.stderr.endswith("outlast: ZeroDivisionError: division by zero\n")
    assert inside("studies", "--traceback").returncode == 0


def test_a_terminal_shows_the_time_left_and_goes_on_after_a_failure():
    told = io.StringIO()
    the_plan = Plan("toy_study:STUDY", "quick", 2, (), {}, Launch("cpu"))
    grid = cells(toy_study.STUDY, the_plan)
    progress = RichProgress(Console(file=told, force_terminal=True, width=140))
    progress.start(toy_study.STUDY, the_plan, len(grid), 0)
    bars = progress._bars
    assert any(isinstance(column, TimeRemainingColumn) for column in bars.columns)
    for number, cell in enumerate(grid):
        progress.cell_started(cell)
        progress.epoch(cell, 1, 3, 0.5)
        if number == 1:
            progress.cell_failed(cell, ValueError("told to fail"))
        else:
            progress.cell_finished(cell, 1.0)
    study = bars.tasks[0]
    assert (study.completed, study.total, study.finished) == (4, 4, True)
    progress.stop()
    assert "loss 0.500" in told.getvalue()
    assert "0:00:00" in told.getvalue()


def test_traceback_is_printed_on_request():
    assert "Traceback" in outlast("run", "nothing", "--traceback").stderr


def test_core_needs_torch_and_numpy_alone():
    code = (
        "import sys\n"
        "class Block:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        root = name.partition('.')[0]\n"
        "        if root in set(sys.argv[1].split()):\n"
        "            raise ImportError(name)\n"
        "sys.meta_path.insert(0, Block())\n"
        "import importlib\n"
        "for name in sys.argv[2:]: importlib.import_module(name)\n"
        "from outlast.data import load\n"
        "assert len(load('mnist', variant='small')) == 10_000\n"
    )
    rooms = [info.name for info in pkgutil.walk_packages(package.__path__, "outlast.") if "._" not in info.name]
    methods = [name for name in rooms if not name.startswith(("outlast.cli", "outlast.studies", "outlast.report", "outlast.__main__"))]
    assert len(methods) > 15
    subprocess.run([sys.executable, "-c", code, EXTRAS, *methods], check=True)


def test_dimension_of_a_data_set_a_file_and_a_folder(tmp_path, inside):
    import numpy as np

    rng = np.random.default_rng(0)
    rows = rng.normal(size=(300, 4)).astype(np.float32)
    np.save(tmp_path / "rows.npy", rows)
    np.savez(tmp_path / "rows.npz", rows=rows)
    (tmp_path / "images").mkdir()
    image_module = pytest.importorskip("PIL.Image", reason="pillow (extra vision) is not installed")
    for number in range(120):
        image_module.fromarray(rng.integers(0, 255, (4, 4, 3), np.uint8)).save(tmp_path / "images" / f"{number}.png")
    found = {}
    for name in ("rows.npy", "rows.npz", "images"):
        done = inside("diagnose", "dimension", tmp_path / name, "--k", "3,10", "--json")
        assert (done.returncode, done.stderr) == (0, "")
        found[name] = json.loads(done.stdout)
    assert found["rows.npy"] == found["rows.npz"]
    assert found["rows.npy"]["value"] == pytest.approx(4, rel=0.15)
    assert found["images"]["n"] == 120
    done = inside("diagnose", "dimension", "mnist", "--anchors", "200", "--figure", tmp_path / "a" / "figure.svg", OUTLAST_DATA="")
    assert done.returncode == 0
    assert "200 anchors among 10,000 distinct rows" in done.stdout
    assert "</svg>" in (tmp_path / "a" / "figure.svg").read_text()


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["nowhere"], 1, "no such file or folder"),
        (["mnist", "--k", "3,x"], 2, "--k takes integers"),
        (["mnist", "--k", "1"], 2, "k must be at least 2"),
        (["mnist", "--split", "validation"], 2, "split must be"),
        (["mnist", "--method", "guess"], 2, "method must be"),
        (["empty"], 1, "holds no images"),
        (["text.txt"], 2, "give a .npy or .npz file"),
        (["broken.npy"], 1, "cannot be read as an array"),
        (["objects.npy"], 1, "cannot be read as an array"),
        (["two.npz"], 2, "holds 2 arrays"),
        (["cut.npz"], 1, "cannot be read as an array"),
        (["objects.npz"], 1, "cannot be read as an array"),
        (["words.npy"], 2, "real numbers"),
    ],
)
def test_dimension_mistakes_are_one_line(tmp_path, words, code, says, refused):
    import numpy as np

    (tmp_path / "empty").mkdir()
    (tmp_path / "text.txt").write_text("1 2 3")
    (tmp_path / "broken.npy").write_bytes(b"\x93NUMPY")
    np.save(tmp_path / "objects.npy", np.array([{}, 1], dtype=object))
    np.save(tmp_path / "words.npy", np.array([["a"], ["b"]]))
    np.savez(tmp_path / "two.npz", a=np.zeros(3), b=np.zeros(3))
    np.savez(tmp_path / "objects.npz", a=np.array([{}], dtype=object))
    (tmp_path / "cut.npz").write_bytes((tmp_path / "two.npz").read_bytes()[:200])
    here = tmp_path / words[0]
    found, told = refused("diagnose", "dimension", here if here.exists() else words[0], *words[1:])
    assert found == code
    assert says in told


def test_padding_names_what_leans_and_where_nothing_does(tmp_path, inside, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    done = inside("diagnose", "padding", "torchvision:resnet18", "--suggest", "2", "--foveation", tmp_path / "reach.svg")
    assert (done.returncode, done.stderr) == (0, "")
    assert "16 of 42 layers and axes lean; last map off centre by -31, -31 px" in done.stdout
    assert "layer4.0.downsample.0  conv      h+w" in done.stdout
    assert "size 225x225: clean, 1.01 of the pixels" in done.stdout
    assert "</svg>" in (tmp_path / "reach.svg").read_text()
    fails = ("diagnose", "padding", "torchvision:resnet18", "--fail-on", "skew")
    assert inside(*fails).returncode == 1
    assert inside(*fails, "--limit", "16").returncode == 0
    assert inside(*fails, "--size", "225x257").returncode == 0
    lost = "from torch import nn\nmodel = nn.Sequential(nn.PixelUnshuffle(2), nn.Conv2d(4, 1, 1))\n"
    (tmp_path / "lost.py").write_text(lost)
    done = inside(*("diagnose", "padding", "lost:model", "--channels", "1", "--fail-on", "skew"))
    assert done.returncode == 1
    assert "not judged: layer '1'" in done.stdout
    (tmp_path / "mine.py").write_text("from torch import nn\ndef build():\n    return nn.Conv2d(1, 1, 3, 2, 1)\nmodel = build()\n")
    for name in ("build", "model"):
        done = inside("diagnose", "padding", f"mine:{name}", "--size", "9", "--channels", "1", "--json")
        found = json.loads(done.stdout)
        assert found["report"]["grid_skew_px"] == [0.0, 0.0]
        assert found["suggestions"] == []


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["resnet18"], "torchvision:NAME, timm:NAME or module:callable"),
        (["torchvision:resnet19"], "no model 'resnet19'"),
        (["timm:nothing"], "no model 'nothing'"),
        (["no_such:model"], "no model at 'no_such:model'"),
        (["json:JSONDecoder"], "not a torch.nn.Module"),
        (["torchvision:resnet18", "--size", "big"], "--size takes a length or HxW"),
        (["torchvision:resnet18", "--size", "0"], "input_size"),
        (["torchvision:alexnet", "--size", "20"], "smaller than a window"),
    ],
)
def test_padding_mistakes_are_one_line_and_exit_2(words, says, refused):
    code, told = refused("diagnose", "padding", *words)
    assert code == 2
    assert says in told
