"""Every example runs as a user would run it, and is short."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
NEEDS = {
    "fabric_processes": ("lightning_fabric",),
    "lightning_module": ("lightning",),
    "plain_loop": (),
    "sklearn_pipeline": ("sklearn",),
    "stable_baselines3_deployment": ("stable_baselines3", "gymnasium"),
    "timm_deployment": ("timm",),
    "transformers_attention": ("transformers",),
    "transformers_trainer": ("transformers", "accelerate"),
}
SAYS = {
    "fabric_processes": "2 processes, loss 0.",
    "lightning_module": "loss of the last batch",
    "plain_loop": "after task 1",
    "sklearn_pipeline": "accuracy with one example",
    "stable_baselines3_deployment": "PolicyAdaptReport",
    "timm_deployment": "updates=3",
    "transformers_attention": "cosine to exact attention",
    "transformers_trainer": "task 1",
}


def test_all_are_listed():
    assert sorted(path.stem for path in EXAMPLES.glob("*.py")) == sorted(NEEDS)


@pytest.mark.parametrize(("name", "words"), [*((name, ()) for name in NEEDS), ("fabric_processes", ("--fsdp",))], ids=lambda x: str(x))
def test_it_runs(name, words, tmp_path):
    for module in NEEDS[name]:
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed")
    path = EXAMPLES / f"{name}.py"
    assert len(path.read_text().splitlines()) < 60
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(
        [sys.executable, str(path), *words], capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert SAYS[name] in done.stdout
    assert "OutlastWarning" not in done.stderr  # an example follows its own advice
    if name == "plain_loop":  # the memory holds the first task
        first, second = (float(value) for value in re.findall(r"0\.\d+", done.stdout.splitlines()[-1]))
        assert first > 0.7
        assert second > 0.7
