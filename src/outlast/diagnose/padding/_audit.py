"""Which layers treat the sides of an image unequally, at this input size and at others."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from torch import nn

from outlast._core._checks import integer, real
from outlast._core._result import Result
from outlast.diagnose.padding._arithmetic import transposed, window
from outlast.diagnose.padding._trace import Graph, Step, trace
from outlast.errors import UnsupportedError

AXES = {1: ("width",), 2: ("height", "width"), 3: ("depth", "height", "width")}


@dataclass(frozen=True, repr=False)
class LayerRow(Result):
    """One layer on one axis.

    Attributes:
        name: of the module.
        op: ``"conv"``, ``"max_pool"``, ``"avg_pool"`` or ``"conv_transpose"``.
        axis: ``"height"``, ``"width"`` or ``"depth"``.
        n: length of its input, explicit pads before it left out.
        kernel: taps.
        stride: step.
        dilation: distance of the taps.
        pad_left: padding on the left or top, explicit pads before it included.
        pad_right: on the right or bottom.
        out: output length.
        used_left: padding that is read on the left.
        used_right: on the right.
        dropped: real columns that no window reads.
        skew: lean in pixels of its input (of its output for transposed convolutions); negative leans left or up.
        skew_input_px: the same in pixels of the model's input.
        ceil_mode: of pooling.
        mode: of padding.
        checkerboard: transposed convolution whose kernel is no multiple of its stride.
    """

    name: str
    op: str
    axis: str
    n: int
    kernel: int
    stride: int
    dilation: int
    pad_left: int
    pad_right: int
    out: int
    used_left: int
    used_right: int
    dropped: int
    skew: int
    skew_input_px: float
    ceil_mode: bool
    mode: str
    checkerboard: bool = False

    @property
    def uneven(self) -> bool:
        """Whether the two sides' padding is read unequally."""
        return self.used_left != self.used_right


@dataclass(frozen=True, repr=False)
class PaddingReport(Result):
    """What an audit found.

    Attributes:
        input_size: channels and spatial sizes.
        layers: all windows, layer by layer and axis by axis.
        grid_skew_px: lean of the last feature map's grid against the centre of the input, for each spatial axis, in pixels.
        total_stride: pixels of the input between neighbours of the last map, the largest over the axes.
        unread: layers that could not be judged, since an operation before them (a slice, a reshaping) moves pixels in a way that is not
            followed.
        notes: what was approximated, and branches that are joined out of step.
    """

    input_size: tuple[int, ...]
    layers: tuple[LayerRow, ...]
    grid_skew_px: tuple[float, ...]
    total_stride: float
    notes: tuple[str, ...]
    unread: tuple[str, ...] = ()

    @property
    def is_even(self) -> bool:
        """Whether every layer was judged and is mirror symmetric on every axis."""
        return not self.unread and all(row.skew == 0 for row in self.layers)

    @property
    def skewed(self) -> tuple[LayerRow, ...]:
        """The layers that are not."""
        return tuple(row for row in self.layers if row.skew != 0)

    def to_markdown(self) -> str:
        """The skewed layers as a table."""
        size = "x".join(map(str, self.input_size[1:]))
        lean = ", ".join(f"{name} {value:+g}" for name, value in zip(AXES[len(self.input_size) - 1], self.grid_skew_px, strict=True))
        leaning = f"{len(self.skewed)} of {len(self.layers)} layers and axes lean"
        head = [f"Input {size}: {leaning}; the last map's grid is off centre by (px): {lean}.", *self.notes]
        if not self.skewed:
            return "\n".join(head)
        titles = ("layer", "op", "axis", "input", "window", "padding", "read", "dropped", "skew", "in input pixels")
        table = ["", f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
        for row in self.skewed:
            shape = f"{row.kernel}" + (f" dilated {row.dilation}" if row.dilation > 1 else "") + f", stride {row.stride}"
            cells = (row.name, row.op, row.axis, row.n, shape, f"{row.pad_left}, {row.pad_right}", f"{row.used_left}, {row.used_right}")
            table.append(f"| {' | '.join(map(str, cells))} | {row.dropped} | {row.skew:+d} | {row.skew_input_px:+g} |")
        return "\n".join([*head, *table])

    def __str__(self) -> str:
        return self.to_markdown()

    def _draw(self, ax: Any) -> None:
        rows = [row for row in self.layers if row.stride > 1 or row.skew != 0]
        names = list(dict.fromkeys(row.name for row in rows))
        for axis, colour in zip(AXES[len(self.input_size) - 1], ("C0", "C1", "C2"), strict=False):
            mine = [row for row in rows if row.axis == axis]
            heights = [names.index(row.name) for row in mine]
            ax.plot([row.skew_input_px for row in mine], heights, "o", color=colour, label=axis, alpha=0.6)
        ax.set_yticks(range(len(names)), names)
        ax.invert_yaxis()
        ax.axvline(0.0, color="grey", linestyle="--")
        ax.set_xlabel("lean in pixels of the input (negative: left or up)")
        ax.legend()


_TRIED = 6  # candidates for each size that is asked for
_PER_AXIS = 20  # lengths of each axis that are combined where axes differ


@dataclass(frozen=True, repr=False)
class SizeSuggestion(Result):
    """An input size and what remains to lean there.

    Attributes:
        size: spatial sizes.
        residual_skew: sum over layers of the lean in pixels of the input, over all axes; 0 is clean.
        relative_cost: pixels over those of the size asked about.
    """

    size: tuple[int, ...]
    residual_skew: float
    relative_cost: float


@dataclass(frozen=True)
class _Grid:
    """Where the columns of a map lie on the input's axis: the first one's centre, their distance, their number."""

    length: int
    start: Fraction
    jump: Fraction
    pads: tuple[int, int] = (0, 0)  # explicit padding inside ``length``, not yet read by a window
    mode: str = "zeros"


def replay(graph: Graph, axis: int, length: int) -> tuple[list[LayerRow], _Grid | None, list[str]]:
    """One axis of a traced graph at any length: rows, the last grid, notes.

    Raises:
        ValueError: a window does not fit; the message names its layer.
    """
    grids: dict[int, _Grid | None] = {}
    rows: list[LayerRow] = []
    notes: list[str] = []
    rank = len(graph.steps[0].before)
    last: _Grid | None = None
    for number, step in enumerate(graph.steps):
        grid = _input_or_source(step, grids, length)
        if grid is not None and step.kind in ("window", "transposed"):
            row, grid = _window(step, axis, rank, grid)
            rows.append(row)
        elif grid is not None and step.kind == "pad":
            left, right = step.axes[axis]["left"], step.axes[axis]["right"]
            pads = (grid.pads[0] + left, grid.pads[1] + right)
            grid = _Grid(grid.length + left + right, grid.start - grid.jump * left, grid.jump, pads, step.mode)
        elif grid is not None and step.kind in ("resize", "adaptive"):
            out = step.after[axis] if step.kind == "adaptive" else round(grid.length * step.after[axis] / step.before[axis])
            ratio = Fraction(grid.length, out)
            grid = _Grid(out, grid.start + grid.jump * (ratio - 1) / 2, grid.jump * ratio)
        elif step.kind == "join":
            others = [grids[source] for source in step.sources]
            found = {(other.start, other.jump) for other in others if other is not None}
            if len(found) > 1:
                where = step.name or "the model"
                notes.append(f"branch_offset_mismatch: {where} joins branches whose grids differ on the {AXES[rank][axis]}")
        elif step.kind == "global":
            grid = None
        grids[number] = grid
        if grid is not None and step.kind != "adaptive":  # a pool to a fixed size makes no new map of its own
            last = grid
    return rows, last, notes


def _input_or_source(step: Step, grids: Mapping[int, _Grid | None], length: int) -> _Grid | None:
    if step.kind == "input":
        return _Grid(length, Fraction(0), Fraction(1))
    return next((grids[source] for source in step.sources if grids[source] is not None), None)


def _window(step: Step, axis: int, rank: int, grid: _Grid) -> tuple[LayerRow, _Grid]:
    given = step.axes[axis]
    kernel, stride, dilation = given["kernel"], given["stride"], given["dilation"]
    extent = dilation * (kernel - 1) + 1
    n = grid.length - sum(grid.pads)
    if step.kind == "transposed":
        left = right = given["pad"]
        found = transposed(grid.length, kernel, stride, dilation, left, given["extra"])
        jump = grid.jump / stride
        start = grid.start + jump * (left - Fraction(extent - 1, 2))
        scale, n = jump, grid.length
    else:
        left, right = given["left"] + grid.pads[0], given["right"] + grid.pads[1]
        try:
            found = window(n, kernel, stride, dilation, left, right, ceil_mode=step.ceil_mode)
        except ValueError as error:
            raise ValueError(f"the input is too small for layer {step.name!r}: {error}") from None
        jump = grid.jump * stride
        # ``grid.start`` is that of the padded map; windows count from the layer's own padding.
        start = grid.start + grid.jump * (Fraction(extent - 1, 2) - given["left"])
        scale = grid.jump
    row = LayerRow(
        name=step.name,
        op=step.op,
        axis=AXES[rank][axis],
        n=n,
        kernel=kernel,
        stride=stride,
        dilation=dilation,
        pad_left=left,
        pad_right=right,
        out=found.out,
        used_left=found.used_left,
        used_right=found.used_right,
        dropped=found.dropped,
        skew=found.skew,
        skew_input_px=float(found.skew * scale),
        ceil_mode=step.ceil_mode,
        mode=step.mode if step.mode == "partial" else grid.mode,
        checkerboard=step.kind == "transposed" and extent % stride != 0,
    )
    return row, _Grid(found.out, start, jump)


def audit(
    model: nn.Module,
    input_size: Sequence[int],
    *,
    batch: int = 1,
    args: Sequence[Any] | None = None,
    kwargs: Mapping[str, Any] | None = None,
) -> PaddingReport:
    """Find the layers that treat the sides of an image unequally, in one pass without data.

    Example:
        ```python
        report = audit(torchvision.models.resnet50(), (3, 224, 224))
        print(report)               # eight layers lean left and up on each axis; at 225 none does
        ```

    Args:
        model: any torch model; functional pools and pads are seen as well as modules. It is left as it is.
        input_size: channels and spatial sizes: ``(C, H, W)``, ``(C, L)`` or ``(C, D, H, W)``.
        batch: images in the pass, for models that need more than one.
        args: further positional arguments of the model.
        kwargs: keyword arguments.

    Raises:
        TypeError: not a module.
        ValueError: a size below 1, or smaller than a window (the message names the layer).
        UnsupportedError: the model runs neither without data nor on zeros.
    """
    size = checked_size(model, input_size)
    graph = trace(model, size, batch=batch, args=args, kwargs=kwargs)
    return _report(graph, size)


def checked_size(model: object, input_size: Sequence[int]) -> tuple[int, ...]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    size = tuple(integer("input_size", value, low=1) for value in input_size)
    if not 2 <= len(size) <= 4:
        raise ValueError(f"input_size must be channels and one to three spatial sizes, got {tuple(input_size)}")
    return size


def _report(graph: Graph, size: tuple[int, ...]) -> PaddingReport:
    found = [replay(graph, axis, length) for axis, length in enumerate(size[1:])]
    # Layer by layer, the axes of one layer together.
    rows = [row for layer in zip(*(rows for rows, _, _ in found), strict=True) for row in layer]
    skews: list[float] = []
    strides: list[float] = []
    for (_, grid, _), length in zip(found, size[1:], strict=True):
        assert grid is not None
        skews.append(float(2 * grid.start + (grid.length - 1) * grid.jump - (length - 1)))
        strides.append(float(grid.jump))
    notes = list(dict.fromkeys(note for _, _, notes in found for note in notes))
    if not rows:
        notes.append("no convolution or pooling was found")
    for name, op in graph.unread.items():
        notes.append(f"not judged: layer {name!r}, since {op} before it moves pixels in a way that is not followed")
    return PaddingReport(size, tuple(rows), tuple(skews), max(strides), tuple(notes), tuple(graph.unread))


def suggest_sizes(
    model: nn.Module, near: int | Sequence[int] = 224, n: int = 5, max_growth: float = 1.3, channels: int = 3
) -> list[SizeSuggestion]:
    """Input sizes near a given one at which no layer leans; where there is none, those at which layers lean least.

    Cleanliness depends on the size only through its remainder by the total stride, so one pass of the model and integers decide every size.

    Args:
        model: as ``audit``.
        near: one length for squares, or ``(H, W)``.
        n: suggestions.
        max_growth: largest length over the one asked about; lengths down to its inverse are looked at.
        channels: of the input.

    Returns:
        The nearest clean sizes, nearest first.

    Raises:
        ValueError: sizes out of range, or nothing in reach that the model takes.
        UnsupportedError: the model runs neither without data nor on zeros.
    """
    wanted = (near, near) if isinstance(near, int) else tuple(near)
    integer("n", n, low=1)
    real("max_growth", max_growth, low=1.0)
    size = checked_size(model, (channels, *wanted))
    graph = trace(model, size)
    # A resize to the size of another map has no ratio of its own, so such models are traced anew at every size.
    resizes = [step for step in graph.steps if step.kind == "resize"]
    fixed = all(after % before == 0 for step in resizes for before, after in zip(step.before, step.after, strict=True))
    found = _taken(model, _nearest(model, graph, wanted, channels, max_growth, anew=not fixed), channels, n)
    if fixed and resizes and any(_skew_at(model, each.size, channels) != each.residual_skew for each in found):
        # The ratio held at the traced size only.
        found = _taken(model, _nearest(model, graph, wanted, channels, max_growth, anew=True), channels, n)
    if not found:
        raise ValueError(f"the model takes no other size near {'x'.join(map(str, wanted))} that leans less or as little")
    return found


def _taken(model: nn.Module, candidates: Sequence[SizeSuggestion], channels: int, n: int) -> list[SizeSuggestion]:
    """The first n sizes that the model takes: dense heads and joins of maps refuse some."""
    found: list[SizeSuggestion] = []
    for each in candidates[: _TRIED * n]:
        try:
            trace(model, (channels, *each.size), quiet=True)
        except (ValueError, UnsupportedError):
            continue
        found.append(each)
        if len(found) == n:
            break
    return found


def _skew_at(model: nn.Module, size: Sequence[int], channels: int) -> float:
    return _skew_of(trace(model, (channels, *size), quiet=True), size)


def _skew_of(graph: Graph, size: Sequence[int]) -> float:
    return sum(abs(row.skew_input_px) for axis, length in enumerate(size) for row in replay(graph, axis, length)[0])


def _nearest(
    model: nn.Module, graph: Graph, wanted: tuple[int, ...], channels: int, max_growth: float, *, anew: bool
) -> list[SizeSuggestion]:
    """The sizes that lean least, nearest first; with ``anew`` the model is traced at each of them."""

    def skew(axis: int, length: int) -> float:
        lengths = [length if each == axis else asked for each, asked in enumerate(wanted)]
        found = trace(model, (channels, *lengths), quiet=True) if anew else graph
        return sum(abs(row.skew_input_px) for row in replay(found, axis, length)[0])

    candidates: list[list[tuple[float, int]]] = []
    for axis, length in enumerate(wanted):
        found: list[tuple[float, int]] = []
        for each in range(max(1, math.ceil(length / max_growth)), math.floor(length * max_growth) + 1):
            try:
                found.append((skew(axis, each), each))
            except (ValueError, UnsupportedError):  # too small for a window, or refused
                continue
        if not found:
            raise ValueError(f"no length near {length} fits the model's windows")
        least = min(value for value, _ in found)
        best = sorted((entry for entry in found if entry[0] == least), key=lambda entry: (abs(entry[1] - length), entry[1]))
        candidates.append(best)
    pixels = math.prod(wanted)
    common = set.intersection(*({length for _, length in each} for each in candidates))
    if len(set(wanted)) == 1 and common:
        pairs = [tuple([entry] * len(wanted)) for entry in candidates[0] if entry[1] in common]
    else:
        pairs = [()]
        for each in candidates:
            pairs = [(*pair, entry) for pair in pairs for entry in each[:_PER_AXIS]]
        pairs.sort(key=lambda pair: sum(abs(length - asked) for (_, length), asked in zip(pair, wanted, strict=True)))
    return [
        SizeSuggestion(
            tuple(length for _, length in pair), sum(value for value, _ in pair), math.prod(length for _, length in pair) / pixels
        )
        for pair in pairs
    ]
