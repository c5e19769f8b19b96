"""A study that costs nothing: its cells add numbers. Cells can be told to wait, to fail, or to give NaN."""

from __future__ import annotations

import os
import time
from pathlib import Path

from pydantic import Field

from outlast.studies import Arm, Claim, Figure, Metric, Outcome, Part, Scale, Setting, Settings, Study


class Toy(Settings):
    base: float = 1.0
    gain: float = 0.0
    size: int = Field(default=3, ge=1)
    wait: float = 0.0
    fail: str = ""


def cell(config, seed, context):
    log = os.environ.get("TOY_LOG")
    if log:
        with Path(log).open("a") as file:
            file.write(f"{config.gain} {seed}\n")
    for epoch in range(config.size):
        time.sleep(config.wait)
        context.report(epoch + 1, config.size, 1.0)
    if config.fail == "raise" and config.gain:
        raise ValueError("told to fail")
    value = float("nan") if config.fail == "nan" else config.base + config.gain + 0.01 * seed
    return Outcome({"score": value}, {"curve": [value] * config.size})


def draw(figure, results):
    axes = figure.subplots()
    for arm in results.arms:
        axes.plot(results.series(arm, "curve", 0), label=arm)
    axes.legend()


PART = Part(
    name="adding",
    question="Does adding add?",
    settings_type=Toy,
    cell=cell,
    arms=(Arm("plain", "Plain", "baseline"), Arm("more", "More <b>", "method", {"gain": 2.0})),
    metrics=(Metric("score", "Score & more", "points", "higher", 2),),
    claims=(
        Claim("adds", "More is at least 1 above plain", lambda r, s: r.value("more", "score", s) - r.value("plain", "score", s), 1.0),
        Claim("adds-a-lot", "More is at least 5 above plain", lambda r, s: r.value("more", "score", s) - r.value("plain", "score", s), 5.0),
    ),
    figures=(Figure("curve", "Curves", lambda r: "Flat lines.", draw),),
    scales={
        "quick": Scale(arms=("plain", "more")),
        "standard": Scale(
            arms=("plain", "more"), settings=(Setting("a", "A", {"base": 1.0}), Setting("b", "B", {"base": 2.0}, ("plain",)))
        ),
        "paper": Scale(arms=("plain",), data=(("cifar10", "full"),)),
    },
)
STUDY = Study("toy", "Toy", "Does it run?", "Nobody, Nowhere, 2021", "Table 0", "tests", (PART,), "toy_study:STUDY")
