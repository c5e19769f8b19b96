"""From finished cells to what people read: rows with intervals, claims with verdicts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from outlast.studies._design import MIN_SEEDS, Claim, Figure, Metric, Part, Study
from outlast.studies._grid import row_name
from outlast.studies._results import Results
from outlast.studies._run import Run
from outlast.studies._statistics import Interval, Verdict, interval, verdict


@dataclass(frozen=True)
class Row:
    """One arm in one setting."""

    name: str
    title: str
    role: str
    setting: str
    metrics: Mapping[str, Interval]


@dataclass(frozen=True)
class JudgedClaim:
    """A claim with what was measured; ``measured`` is None where cells are missing."""

    claim: Claim
    verdict: Verdict
    measured: Interval | None
    reason: str = ""


@dataclass(frozen=True)
class PartSummary:
    """A part's rows, claims, and what its figures draw from."""

    name: str
    question: str
    metrics: tuple[Metric, ...]
    rows: tuple[Row, ...]
    claims: tuple[JudgedClaim, ...]
    figures: tuple[Figure, ...]
    results: Results
    deviations: tuple[str, ...]
    dropped: str


@dataclass(frozen=True)
class Summary:
    """A study's outcome at one scale, or why it was not run; ``absent`` parts do not have this scale."""

    name: str
    title: str
    question: str
    paper: str
    follows: str
    theme: str
    scale: str
    seeds: int = 0
    seconds: float = 0.0
    folder: str = ""
    command: str = ""
    parts: tuple[PartSummary, ...] = ()
    absent: tuple[str, ...] = ()
    finished: int = 0
    total: int = 0
    failed: tuple[str, ...] = ()
    not_run: str = ""
    environments: tuple[Mapping[str, Any], ...] = ()
    overrides: Mapping[str, str] = field(default_factory=dict)
    launch: Mapping[str, Any] = field(default_factory=dict)

    @property
    def claims(self) -> list[JudgedClaim]:
        """The claims of all parts."""
        return [claim for part in self.parts for claim in part.claims]

    @property
    def verdict(self) -> Verdict:
        """``fails`` if any claim fails, ``holds`` if all hold, else ``undecided``."""
        verdicts = {claim.verdict for claim in self.claims}
        if "fails" in verdicts:
            return "fails"
        return "holds" if verdicts == {"holds"} else "undecided"

    def to_dict(self) -> dict[str, Any]:
        """The object that ``outlast run --json`` prints."""
        several = len(self.parts) > 1
        return {
            "study": self.name,
            "scale": self.scale,
            "seeds": self.seeds,
            "seconds": self.seconds,
            "folder": self.folder,
            "claims": [_claim_dict(claim) for claim in self.claims],
            "arms": {
                f"{part.name}/{row.name}" if several else row.name: {name: value.to_dict() for name, value in row.metrics.items()}
                for part in self.parts
                for row in part.rows
            },
        }


def _claim_dict(judged: JudgedClaim) -> dict[str, Any]:
    measured = judged.measured
    return {
        "name": judged.claim.name,
        "text": judged.claim.text,
        "verdict": judged.verdict,
        "estimate": measured.mean if measured else None,
        "low": measured.low if measured else None,
        "high": measured.high if measured else None,
        "threshold": judged.claim.threshold,
    }


def summarise(run: Run, command: str) -> Summary:
    """Judge a run's claims and average its rows over seeds."""
    environments: list[Mapping[str, Any]] = []
    for record in run.records.values():
        if record["environment"] not in environments:
            environments.append(record["environment"])
    parts = [part for part in run.study.parts if any(cell.part == part.name for cell in run.cells)]
    return Summary(
        name=run.study.name,
        title=run.study.title,
        question=run.study.question,
        paper=run.study.paper,
        follows=run.study.follows,
        theme=run.study.theme,
        scale=run.plan.scale,
        seeds=run.plan.seeds,
        seconds=sum(record["seconds"] for record in run.records.values()),
        folder=str(run.folder),
        command=command,
        parts=tuple(_summarise_part(part, run) for part in parts),
        absent=tuple(f"{part.name} ({part.question})" for part in run.study.parts if run.plan.scale not in part.scales),
        finished=len(run.records),
        total=len(run.cells),
        failed=tuple(f"{cell}: {reason}" for cell, reason in run.failed),
        environments=tuple(environments),
        overrides=run.plan.overrides,
        launch=next((cell.launch for cell in run.cells), {}),
    )


def tally(claims: Sequence[JudgedClaim]) -> str:
    """How many claims hold, are undecided and fail, in words."""
    counts = Counter(claim.verdict for claim in claims)
    words = (("holds", "hold"), ("undecided", "undecided"), ("fails", "fail"))
    return ", ".join(f"{counts[name]} {word}" for name, word in words if counts[name]) or "no claim"


def not_run(study: Study, scale: str, reason: str) -> Summary:
    """A study that could not be run, with the reason."""
    return Summary(study.name, study.title, study.question, study.paper, study.follows, study.theme, scale, not_run=reason)


def _summarise_part(part: Part, run: Run) -> PartSummary:
    scale = part.scales[run.plan.scale]
    seeds = range(run.plan.seeds)
    grid = [cell for cell in run.cells if cell.part == part.name]
    records = [run.records[cell.key] for cell in grid if cell.key in run.records]
    missing = [str(cell) for cell in grid if cell.key not in run.records]
    results = Results(records, [setting.name for setting in scale.settings], scale.arms, seeds, missing)
    rows: list[Row] = []
    for setting in scale.settings:
        for name in setting.arms or scale.arms:
            arm = part.arm(name)
            values = {metric.name: results.values(name, metric.name, setting.name) for metric in part.metrics}
            if all(values.values()):
                measured = {metric: interval(numbers) for metric, numbers in values.items()}
                rows.append(Row(row_name(setting.name, name), arm.title, arm.role, setting.title, measured))
    return PartSummary(
        name=part.name,
        question=part.question,
        metrics=part.metrics,
        rows=tuple(rows),
        claims=tuple(_judge(claim, results) for claim in part.claims if run.plan.scale in claim.scales),
        figures=tuple(figure for figure in part.figures if run.plan.scale in figure.scales and rows),
        results=results,
        deviations=part.deviations,
        dropped=scale.dropped,
    )


def _judge(claim: Claim, results: Results) -> JudgedClaim:
    try:
        measured = interval([claim.measure(results, seed) for seed in results.seeds])
    except Exception as error:
        if not results.missing:
            raise
        return JudgedClaim(claim, "undecided", None, results.why(error))
    reason = "" if len(results.seeds) >= MIN_SEEDS else f"needs at least {MIN_SEEDS} seeds"
    return JudgedClaim(claim, verdict(measured, claim.threshold, claim.direction, min_seeds=MIN_SEEDS), measured, reason)
