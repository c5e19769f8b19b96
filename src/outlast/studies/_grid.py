"""From a study and the user's choices to the list of its cells."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import yaml
from pydantic import ValidationError

from outlast.studies._design import Part, Scale, ScaleName, Study

Precision = Literal["32-true", "bf16-mixed", "16-mixed", "64-true"]
Strategy = Literal["auto", "ddp", "fsdp"]
Accelerator = Literal["auto", "cpu", "cuda"]


@dataclass(frozen=True)
class Launch:
    """How each cell trains. It is part of a cell's identity, since it changes the last digits of results."""

    accelerator: Accelerator = "auto"
    devices: int = 1
    precision: Precision = "32-true"
    strategy: Strategy = "auto"
    threads: int = 1


@dataclass(frozen=True)
class Cell:
    """One point of a grid, in JSON types only: it travels to workers and into files."""

    study: str
    origin: str
    part: str
    scale: str
    setting: str
    arm: str
    seed: int
    config: Mapping[str, Any]
    launch: Mapping[str, Any]
    version: int

    @property
    def key(self) -> str:
        """Hash of everything that the result depends on."""
        return hashlib.sha256(canonical(asdict(self)).encode()).hexdigest()

    @property
    def row(self) -> str:
        """Setting and arm, as results name them."""
        return row_name(self.setting, self.arm)

    @property
    def file_name(self) -> str:
        """Readable, and distinct for distinct cells."""
        return f"{self.row.replace('/', '_')}_seed{self.seed}_{self.key[:10]}.json"

    def __str__(self) -> str:
        return f"{self.study} {self.part} {self.row} seed {self.seed}"


@dataclass(frozen=True)
class Plan:
    """A study at a scale with the user's choices, as the manifest of a run folder keeps it."""

    study: str
    scale: ScaleName
    seeds: int
    parts: tuple[str, ...]
    overrides: Mapping[str, str]
    launch: Launch


def canonical(value: object) -> str:
    """JSON with one spelling."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def row_name(setting: str, arm: str) -> str:
    """``setting/arm``, or the arm alone where there is one unnamed setting."""
    return f"{setting}/{arm}" if setting else arm


def chosen_parts(study: Study, scale: ScaleName, names: Sequence[str]) -> list[Part]:
    """The parts to run: those named, else all that have this scale.

    Raises:
        ValueError: an unknown part, or none that has the scale.
    """
    parts = [study.part(name) for name in names] if names else list(study.parts)
    with_scale = [part for part in parts if scale in part.scales]
    if not with_scale:
        raise ValueError(f"study {study.name!r} has nothing to run at scale {scale!r}")
    return with_scale


def without_repeats(study: Study, plans: Sequence[Plan]) -> list[Plan]:
    """The plans of one folder, each with the parts that no other plan has with the same settings and more seeds (or as many, and later).

    Raises:
        ValueError: an unknown part.
    """
    best: dict[str, tuple[int, int]] = {}  # of each part with its settings: seeds and place of the plan that shows it
    for place, plan in enumerate(plans):
        for part in chosen_parts(study, plan.scale, plan.parts):
            key = _identity(part, plan)
            best[key] = max(best.get(key, (0, 0)), (plan.seeds, place))
    found: list[Plan] = []
    for place, plan in enumerate(plans):
        parts = chosen_parts(study, plan.scale, plan.parts)
        own = [part.name for part in parts if best[_identity(part, plan)][1] == place]
        if own:
            found.append(plan if len(own) == len(parts) else replace(plan, parts=tuple(own)))
    return found


def _identity(part: Part, plan: Plan) -> str:
    """What tells a part's cells from those of another plan, seeds aside: overrides count where the part has such a setting."""
    own = {name: value for name, value in plan.overrides.items() if name in part.settings_type.model_fields}
    return canonical([part.name, plan.scale, own, asdict(plan.launch)])


def cells(study: Study, plan: Plan) -> list[Cell]:
    """All cells of a plan, seed by seed, so that a stopped run leaves whole seeds.

    Raises:
        ValueError: unknown part or setting of ``--set``, a value of the wrong type, or a setting that the arms vary.
    """
    parts = chosen_parts(study, plan.scale, plan.parts)
    overrides = {name: yaml.safe_load(value) for name, value in plan.overrides.items()}
    unknown = [name for name in overrides if not any(name in part.settings_type.model_fields for part in parts)]
    if unknown:
        known = sorted({name for part in parts for name in part.settings_type.model_fields})
        raise ValueError(f"study {study.name!r} has no setting {unknown[0]!r}; its settings: {', '.join(known)}")
    return [
        cell
        for seed in range(plan.seeds)
        for part in parts
        for cell in _cells_of_part(study, part, part.scales[plan.scale], plan, overrides, seed)
    ]


def _cells_of_part(study: Study, part: Part, scale: Scale, plan: Plan, overrides: Mapping[str, Any], seed: int) -> list[Cell]:
    fields = part.settings_type.model_fields
    own = {name: value for name, value in overrides.items() if name in fields}
    varied = {name for arm in scale.arms for name in part.arm(arm).changes} | {n for s in scale.settings for n in s.changes}
    clash = sorted(set(own) & varied)
    if clash:
        raise ValueError(f"{clash[0]!r} is what the arms and settings of {study.name} ({part.name}) vary, so --set cannot fix it")
    found: list[Cell] = []
    for setting in scale.settings:
        for name in setting.arms or scale.arms:
            values = {**scale.changes, **setting.changes, **own, **part.arm(name).changes}
            try:
                config = part.settings_type(**values).model_dump(mode="json")
            except ValidationError as error:
                first = error.errors()[0]
                where = ".".join(map(str, first["loc"]))
                raise ValueError(f"setting {where!r}: {first['msg'].lower()}, got {first['input']!r}") from error
            found.append(
                Cell(
                    study=study.name,
                    origin=study.origin,
                    part=part.name,
                    scale=plan.scale,
                    setting=setting.name,
                    arm=name,
                    seed=seed,
                    config=config,
                    launch=asdict(plan.launch),
                    version=part.version,
                )
            )
    return found
