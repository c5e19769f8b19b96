"""The vocabulary that a study is declared in.

A study asks one question of one paper. It has parts; a part is a grid of settings x arms x seeds, of which each point is
a cell: a pure function of its configuration and its seed. Declarations import neither torch nor numpy, so that the
command can list studies at once.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict

if TYPE_CHECKING:
    from outlast.studies._context import Context
    from outlast.studies._results import Results

ScaleName = Literal["quick", "standard", "paper"]
SCALES: tuple[ScaleName, ...] = ("quick", "standard", "paper")
MIN_SEEDS = 3
_NAME = re.compile(r"[a-z0-9]+(?:[-.][a-z0-9]+)*")


def _check_name(kind: str, name: str) -> None:
    if not _NAME.fullmatch(name):  # names become files and keys of results
        raise ValueError(f"the name of a {kind} is made of lower-case letters, digits, '-' and '.', got {name!r}")


class Settings(BaseModel):
    """Base of a part's typed configuration: frozen, unknown keys refused. Its fields are what ``--set`` takes."""

    model_config = ConfigDict(frozen=True, extra="forbid")


@dataclass(frozen=True)
class Metric:
    """One figure that every cell of a part reports.

    Attributes:
        name: key in results.
        title: head of its column.
        unit: printed behind values, ``""`` for none.
        better: which direction is good; None where neither is.
        digits: decimals in tables.
    """

    name: str
    title: str
    unit: str = ""
    better: Literal["higher", "lower"] | None = None
    digits: int = 1


@dataclass(frozen=True)
class Arm:
    """One row of a comparison: what it changes in the configuration."""

    name: str
    title: str
    role: Literal["method", "baseline", "ablation"]
    changes: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_name("arm", self.name)


@dataclass(frozen=True)
class Setting:
    """A circumstance in which all arms are compared, such as a noise level. The empty name is for a single one."""

    name: str = ""
    title: str = ""
    changes: Mapping[str, Any] = field(default_factory=dict)
    arms: tuple[str, ...] | None = None  # None: all arms of the scale

    def __post_init__(self) -> None:
        if self.name:
            _check_name("setting", self.name)


@dataclass(frozen=True)
class Scale:
    """One size of a part.

    Attributes:
        arms: names of the arms that run.
        settings: circumstances, the first being the one that figures show.
        changes: configuration of this scale, over the defaults of the part's ``Settings``.
        data: (data set, variant) pairs that must be at hand; ``"package"`` for data inside packages of an extra.
        minutes: measured or, for ``paper``, estimated time; ``machine`` says on what.
        machine: the machine of that time.
        dropped: what is left out in comparison with the next larger scale.
        seeds: default number of seeds.
    """

    arms: tuple[str, ...]
    settings: tuple[Setting, ...] = (Setting(),)
    changes: Mapping[str, Any] = field(default_factory=dict)
    data: tuple[tuple[str, Literal["full", "small", "package"]], ...] = ()
    minutes: float = 1.0
    machine: str = "2 CPU cores"
    dropped: str = ""
    seeds: int = MIN_SEEDS


@dataclass(frozen=True)
class Claim:
    """A sentence with a test on measured results.

    ``measure(results, seed)`` gives one number for each seed (paired where arms are compared: the same seed has the same
    data). Its mean's 95 % interval decides against ``threshold``.
    """

    name: str
    text: str
    measure: Callable[[Results, int], float]
    threshold: float
    direction: Literal["at least", "at most"] = "at least"
    unit: str = ""
    digits: int = 1
    scales: tuple[ScaleName, ...] = SCALES


@dataclass(frozen=True)
class Figure:
    """A picture drawn from results with matplotlib, and what it shows in words.

    ``draw(figure, results)`` fills a ``matplotlib.figure.Figure``; ``alt(results)`` is its text alternative.
    """

    name: str
    title: str
    alt: Callable[[Results], str]
    draw: Callable[[Any, Results], None]
    scales: tuple[ScaleName, ...] = SCALES


@dataclass(frozen=True)
class Outcome:
    """What a cell gives back: one number for each metric of its part, and curves for figures."""

    metrics: Mapping[str, float]
    series: Mapping[str, Sequence[float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Part:
    """A grid of cells with its claims.

    ``version`` goes up whenever ``cell`` computes something else: results of older versions are not used any more. ``timed`` says that
    cells measure speed, so that nothing else may run beside them.
    """

    name: str
    question: str
    settings_type: type[Settings]
    cell: Callable[[Any, int, Context], Outcome]
    arms: tuple[Arm, ...]
    metrics: tuple[Metric, ...]
    claims: tuple[Claim, ...]
    scales: Mapping[ScaleName, Scale]
    figures: tuple[Figure, ...] = ()
    deviations: tuple[str, ...] = ()
    version: int = 1
    timed: bool = False

    def __post_init__(self) -> None:
        _check_name("part", self.name)
        known = {arm.name for arm in self.arms}
        for name, scale in self.scales.items():
            used = {*scale.arms, *(arm for setting in scale.settings for arm in setting.arms or ())}
            if used - known:
                raise ValueError(f"part {self.name!r} has no arm {', '.join(sorted(used - known))}, which its scale {name!r} names")

    def arm(self, name: str) -> Arm:
        """The arm of that name."""
        return next(arm for arm in self.arms if arm.name == name)


@dataclass(frozen=True)
class Study:
    """One paper's question and its parts.

    ``origin`` is where a worker finds the declaration again: ``"package.module:NAME"``.
    """

    name: str
    title: str
    question: str
    paper: str
    follows: str
    theme: str
    parts: tuple[Part, ...]
    origin: str

    def __post_init__(self) -> None:
        _check_name("study", self.name)

    def part(self, name: str) -> Part:
        """The part of that name.

        Raises:
            ValueError: there is none; the message lists them.
        """
        for part in self.parts:
            if part.name == name:
                return part
        raise ValueError(f"study {self.name!r} has no part {name!r}; its parts: {', '.join(part.name for part in self.parts)}")
