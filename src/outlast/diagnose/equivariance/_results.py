"""What the equivariance test finds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from outlast._core._result import Result
from outlast.diagnose.equivariance._initialisation import SymmetryResult

Verdict = Literal["equivariant", "not equivariant", "no difference found", "untested"]


@dataclass(frozen=True, repr=False)
class GroupVerdict(Result):
    """One group.

    Attributes:
        group: its name.
        verdict: ``"equivariant"`` or ``"not equivariant"`` from the coupled test; the distributional one can only say ``"not
            equivariant"`` or ``"no difference found"``; ``"untested"`` where training changed nothing.
        r: largest difference of outputs over their standard deviation, one for each draw; for the distributional method the mean
            disagreement across minus within the two sets of runs.
        flips: share of probes whose decision differs, worst draw; for the distributional method between runs across the two sets, mean.
        coupled: whether the first layer's weights followed the transformation.
        p_value: of the distributional method, over all draws; None for the coupled one.
    """

    group: str
    verdict: Verdict
    r: tuple[float, ...]
    flips: float
    coupled: bool
    p_value: float | None = None


@dataclass(frozen=True, repr=False)
class EquivarianceResult(Result):
    """Which transformations a way of training is blind to.

    Attributes:
        groups: one verdict for each group.
        method: ``"coupled"`` or ``"distributional"``.
        tolerance: largest r that counts as equal.
        initialisation: what the law of the first layer's initial weights is symmetric to; None if it was not looked at.
        dims: features of an input.
        meaning: what follows, in words.
        notes: what a reader must know about this test.
    """

    groups: tuple[GroupVerdict, ...]
    method: str
    tolerance: float
    initialisation: SymmetryResult | None
    dims: int
    meaning: tuple[str, ...]
    notes: tuple[str, ...]

    def __getitem__(self, group: str) -> GroupVerdict:
        """The verdict on a group.

        Raises:
            KeyError: it was not tested.
        """
        for each in self.groups:
            if each.group == group:
                return each
        raise KeyError(group)

    def __repr__(self) -> str:
        rows = "; ".join(
            f"{each.group} {each.verdict}"
            + (f" (p = {each.p_value:.3g})" if each.p_value is not None else f" (r = {max(each.r):.2g})" if each.r else "")
            for each in self.groups
        )
        return f"EquivarianceResult({rows})" + "".join(f"\n  {line}" for line in (*self.meaning, *self.notes))

    def _draw(self, ax: Any) -> None:
        names = [each.group for each in self.groups]
        floor = 1e-17
        for place, each in enumerate(self.groups):
            ax.plot([max(value, floor) for value in each.r], [place] * len(each.r), "o")
        if self.method == "coupled":
            ax.set_xscale("log")
            ax.axvline(self.tolerance, linestyle="--", color="grey")
            ax.set_xlabel("largest difference of outputs, in standard deviations")
        else:
            ax.set_xlabel("disagreement across minus within runs")
        ax.set_yticks(range(len(names)), names)


def interpret(verdicts: tuple[GroupVerdict, ...], initialisation: SymmetryResult | None, dims: int, *, dense: bool) -> tuple[str, ...]:
    """The verdicts in words: what this way of training cannot use of its input."""
    equal = {each.group for each in verdicts if each.verdict == "equivariant"}
    law = initialisation.law if initialisation is not None else None
    lines: list[str] = []
    if any(group.startswith("orthogonal") for group in equal):
        if law in (None, "orthogonal"):
            lines.append(
                f"blind to rotations of the input: order D^2 = {dims**2:,} examples for quadratic relations; consider convolution, "
                "locality, or pretrained features"
            )
        else:
            lines.append(
                f"the updates commute with rotations, but the initial weights are not drawn rotation symmetric (their law: {law}): "
                "this training is only as blind as its initialisation"
            )
    blind_to_order = (equal & {"permutation", "signed_permutation"}) or any(group.startswith("orthogonal") for group in equal)
    if blind_to_order and law not in ("none", "sign_flip") and not (lines and law in (None, "orthogonal")):
        lines.append(
            f"pixel order unused: every fixed shuffling of the {dims:,} features would give the same result; order D examples can be "
            "needed where a convolution needs a few"
        )
    if "shift" in equal and not dense and not blind_to_order:
        lines.append("uses translation: shifted data are learned as the data themselves")
    if not equal and any(each.verdict == "not equivariant" for each in verdicts):
        lines.append("not blind to what was tested: training can use the structure that these transformations destroy")
    return tuple(lines)
