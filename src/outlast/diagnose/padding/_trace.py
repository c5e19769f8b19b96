"""Which spatial operations a model runs, read from one pass without data: every operator is seen, also those that no module owns.

The pass runs on the meta device, where tensors have shapes and no numbers, so it costs no arithmetic. What comes out is a small graph of
windows, pads and resizes that other input sizes can be replayed on with integers alone.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from outlast._core._distributed import unwrapped
from outlast._core._foreach import is_sharded, whole
from outlast._core._norm import eval_mode
from outlast.diagnose.padding._pad import _Partial, watching_pads
from outlast.errors import OutlastWarning, UnsupportedError

aten = torch.ops.aten


@dataclass(frozen=True)
class Step:
    """One operation on the spatial axes.

    Attributes:
        kind: ``"input"``, ``"window"``, ``"transposed"``, ``"pad"``, ``"resize"``, ``"adaptive"``, ``"global"`` or ``"join"``.
        name: of the module that ran it.
        op: as it is printed, such as ``"conv"`` or ``"max_pool"``.
        sources: numbers of the steps it reads.
        sizes: lengths of the axes before and after, as traced.
        axes: for each spatial axis what the operation does there.
        mode: of padding, for pads; "partial" for what partial convolutions do.
        ceil_mode: of pooling.
        weights: for joins, what each source counts; empty for 1 each.
    """

    kind: str
    name: str
    op: str
    sources: tuple[int, ...]
    before: tuple[int, ...]
    after: tuple[int, ...]
    axes: tuple[Mapping[str, int], ...] = ()
    mode: str = "zeros"
    ceil_mode: bool = False
    weights: tuple[float, ...] = ()


@dataclass
class Graph:
    """Steps in the order in which they ran; the first are the inputs.

    ``unread`` names layers that read a map whose place was lost, and the operation that lost it.
    """

    steps: list[Step] = field(default_factory=list)
    unread: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _Place:
    """Which step a tensor comes from, and which of its dimensions (counted from the end) are spatial."""

    step: int
    dims: tuple[int, ...]


def spatial_sizes(tensor: Tensor, dims: Sequence[int]) -> tuple[int, ...]:
    """Lengths of the spatial dimensions."""
    return tuple(int(tensor.shape[dim]) for dim in dims)


def _without_memory(model: nn.Module) -> nn.Module:
    """The model with the same tensors and objects of its own, since detectors keep anchors of the device that they ran on last."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    try:
        return copy.deepcopy(model, shared)
    except Exception:  # sharded modules refuse to be copied, and what users make may
        sharded = torch.distributed.is_available() and any(is_sharded(tensor) for tensor in model.parameters())
        return _unsharded(model, {}) if sharded else model


def _unsharded(module: nn.Module, known: dict[nn.Module, nn.Module]) -> nn.Module:
    """The modules without the hooks of FSDP2, which gather what they hold, with the same tensors."""
    if module in known:
        return known[module]
    kind: Any = type(module)
    kind = kind.__mro__[getattr(kind, "_orig_cls_mro_index", 0)]  # fully_shard puts classes of its own in front of the user's
    found = known[module] = kind.__new__(kind)
    found.__dict__ = {name: copy.copy(value) if isinstance(value, dict | set) else value for name, value in module.__dict__.items()}
    for name, child in module._modules.items():
        found._modules[name] = None if child is None else _unsharded(child, known)
    for hooks in (found._forward_pre_hooks, found._forward_hooks):
        theirs = [number for number, hook in hooks.items() if str(getattr(hook, "__module__", "")).startswith("torch.distributed.")]
        for number in theirs:
            del hooks[number]
    return found


_Running = tuple[nn.Module, Tensor | None]  # a module and its first input


class _Reader(TorchDispatchMode):
    """Follows places through operators and writes down the spatial ones."""

    def __init__(self, graph: Graph, running: list[_Running], names: Mapping[nn.Module, str]) -> None:
        super().__init__()
        self.graph, self.running, self.names = graph, running, names
        self.places: Any = WeakTensorKeyDictionary()
        self.lost: Any = WeakTensorKeyDictionary()  # tensors that come from the input, and the operation that lost their place

    def begin(self, tensor: Tensor, rank: int) -> None:
        dims = tuple(range(-rank, 0))
        size = spatial_sizes(tensor, dims)
        self.graph.steps.append(Step("input", "", "input", (), size, size))
        self.places[tensor] = _Place(len(self.graph.steps) - 1, dims)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        self._follow(func.overloadpacket, args, kwargs, out)
        return out

    def _follow(self, op: Any, args: Any, kwargs: Any, out: Any) -> None:
        first = out[0] if isinstance(out, tuple | list) and out else out
        if not isinstance(first, Tensor):
            return
        spatial = _SPATIAL.get(op)
        if spatial is not None:
            place = self.places.get(args[0]) or self._padded_inside(op, args[0])
            if place is not None:
                self._add(spatial(args, kwargs), place, args[0], first)
            elif op in _WINDOWS:
                self._unread(op, args[0], first)
            elif args[0] in self.lost:
                self._lose(op, first, self.lost[args[0]])
            return
        given = _tensors(args)
        inputs = [t for t in given if t in self.places]
        if not inputs:
            gone = next((self.lost[t] for t in given if t in self.lost), None)
            if gone is not None:
                self._lose(op, first, gone)
            return
        if op in (aten.permute, aten.transpose, aten.t):
            self._permute(op, args, first, self.places[inputs[0]])
            return
        outputs = [t for t in (out if isinstance(out, tuple | list) else (out,)) if isinstance(t, Tensor)]
        for each in outputs:
            self._inherit(op, inputs, each)
            if each not in self.places:
                self._lose(op, each, str(op).rpartition(".")[2])

    def _lose(self, op: Any, out: Tensor, cause: str) -> None:
        """Remember that the place of a map is not known any more; no cause for the regions that a detector has cut out."""
        if out.ndim >= 3 and out.is_floating_point():
            self.lost[out] = "" if str(op).startswith("torchvision") else cause

    def _unread(self, op: Any, source: Tensor, out: Tensor) -> None:
        """A window reads a map that is not followed: that must be said."""
        cause = self.lost.get(source, "a copy")
        inside = bool(self.running) and not isinstance(self.running[-1][0], _Partial)  # partial convolutions count taps on ones
        if cause and inside and source.ndim >= 3 and max(source.shape[2:], default=1) > 1:
            self.graph.unread.setdefault(self._name(), cause)
        self._lose(op, out, cause)

    def padded(self, source: Tensor, out: Tensor, amounts: Sequence[int], mode: str) -> None:
        """An explicit pad whose operators (copies, gathers) do not tell what they are."""
        place = self.places.get(source)
        if place is not None and place.dims == tuple(range(-len(place.dims), 0)):
            values = [*amounts, *[0] * (2 * len(place.dims) - len(amounts))]
            pairs = list(zip(values[::2], values[1::2], strict=True))[::-1]
            axes = [{"left": left, "right": right} for left, right in pairs]
            self._add({"kind": "pad", "op": f"pad_{mode}", "axes": axes, "mode": mode}, place, source, out)

    def _padded_inside(self, op: Any, padded: Tensor) -> _Place | None:
        """The place of what a convolution with a padding mode made of its input: torch wraps by copying, ours by indexing."""
        module, given = self.running[-1] if self.running else (None, None)
        if op is not aten.convolution or given is None or not isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            return None
        place, mode = self.places.get(given), module.padding_mode
        if place is None or mode == "zeros":
            return None
        amounts = list(module._reversed_padding_repeated_twice)
        pairs = list(zip(amounts[::2], amounts[1::2], strict=True))[::-1]
        axes = [{"left": left, "right": right} for left, right in pairs]
        self._add({"kind": "pad", "op": f"pad_{mode}", "axes": axes, "mode": mode}, place, given, padded)
        return self.places[padded]

    def _inherit(self, op: Any, inputs: list[Tensor], out: Tensor) -> None:
        """Elementwise operators, normalisation, products over channels: the place stays where the spatial sizes do."""
        found: list[_Place] = []
        for tensor in inputs:
            place = self.places[tensor]
            fits = out.ndim >= max(-dim for dim in place.dims) and spatial_sizes(out, place.dims) == spatial_sizes(tensor, place.dims)
            if fits and (out.ndim == tensor.ndim or place.dims == tuple(range(-len(place.dims), 0))):
                found.append(place)
        if not found:
            place = self.places[inputs[0]]
            fits = out.ndim == inputs[0].ndim and set(spatial_sizes(out, place.dims)) == {1}
            if op in _REDUCTIONS and fits:  # a global mean that keeps its axes, as in squeeze-and-excite
                self._add(_adaptive((), {}), place, inputs[0], out)
            return
        steps = tuple(dict.fromkeys(place.step for place in found))
        if len(steps) > 1:
            sizes = spatial_sizes(out, found[0].dims)
            weights: tuple[float, ...] = ()
            if op is aten.cat:  # a mean over channels follows: sources count by their channels
                channels = dict.fromkeys(steps, 0.0)
                for tensor in inputs:
                    channels[self.places[tensor].step] = channels.get(self.places[tensor].step, 0.0) + tensor.shape[1]
                weights = tuple(channels[step] / out.shape[1] for step in steps)
            if op is aten.mul:  # a gate is made from what it multiplies, and counts as 1
                weights = tuple(float(step == min(steps)) for step in steps)
            name = str(op).rpartition(".")[2]
            self.graph.steps.append(Step("join", self._name(), name, steps, sizes, sizes, weights=weights))
            self.places[out] = _Place(len(self.graph.steps) - 1, found[0].dims)
        else:
            self.places[out] = found[0]

    def _permute(self, op: Any, args: Any, out: Tensor, place: _Place) -> None:
        ndim = out.ndim
        if op is aten.permute:
            order = [int(dim) % ndim for dim in args[1]]
        else:
            order = list(range(ndim))
            one, two = (int(dim) % ndim for dim in (args[1:3] if op is aten.transpose else (0, 1)))
            order[one], order[two] = order[two], order[one]
        where = {source: target for target, source in enumerate(order)}
        self.places[out] = _Place(place.step, tuple(where[dim % ndim] - ndim for dim in place.dims))

    def _name(self) -> str:
        return self.names[self.running[-1][0]] if self.running and self.running[-1][0] in self.names else ""

    def _add(self, found: dict[str, Any], place: _Place, source: Tensor, out: Tensor) -> None:
        rank = len(place.dims)
        before, after = spatial_sizes(source, place.dims), spatial_sizes(out, place.dims)
        axes = tuple(dict(axis) for axis in found.pop("axes"))
        if len(axes) != rank:
            axes = axes[-rank:] if len(axes) > rank else axes + ({},) * (rank - len(axes))
        if self.running and isinstance(self.running[-1][0], _Partial):
            found["mode"] = "partial"
        if found["kind"] == "adaptive" and set(after) == {1}:
            found["kind"] = "global"
        self.graph.steps.append(Step(name=self._name(), sources=(place.step,), before=before, after=after, axes=axes, **found))
        self.places[out] = _Place(len(self.graph.steps) - 1, place.dims)


def _tensors(args: Any) -> list[Tensor]:
    found: list[Tensor] = []
    for arg in args:
        if isinstance(arg, Tensor):
            found.append(arg)
        elif isinstance(arg, tuple | list):
            found += [t for t in arg if isinstance(t, Tensor)]
    return found


def _argument(args: Any, index: int, default: Any) -> Any:
    return args[index] if len(args) > index else default


def _each(value: Any, rank: int) -> list[int]:
    """A setting for each axis."""
    values = [int(v) for v in value] if isinstance(value, list | tuple) else [int(value)]
    return values * rank if len(values) == 1 else values


def _convolution(args: Any, _: Any) -> dict[str, Any]:
    weight, stride, padding, dilation, is_transposed, output_padding = args[1], *args[3:8]
    rank = weight.ndim - 2
    stride, padding, dilation, output_padding = (_each(v, rank) for v in (stride, padding, dilation, output_padding))
    if is_transposed:
        axes = [
            {
                "kernel": int(weight.shape[2 + i]),
                "stride": stride[i],
                "dilation": dilation[i],
                "pad": padding[i],
                "extra": output_padding[i],
            }
            for i in range(rank)
        ]
        return {"kind": "transposed", "op": "conv_transpose", "axes": axes}
    axes = [
        {"kernel": int(weight.shape[2 + i]), "stride": stride[i], "dilation": dilation[i], "left": padding[i], "right": padding[i]}
        for i in range(rank)
    ]
    return {"kind": "window", "op": "conv", "axes": axes}


def _pool(op: str, rank: int, has_dilation: bool) -> Callable[[Any, Any], dict[str, Any]]:
    def read(args: Any, kwargs: Any) -> dict[str, Any]:
        kernel = _each(args[1], rank)
        stride = _each(_argument(args, 2, None) or kernel, rank)
        padding = _each(_argument(args, 3, 0), rank)
        dilation = _each(_argument(args, 4, 1) if has_dilation else 1, rank)
        ceil_mode = bool(_argument(args, 5 if has_dilation else 4, kwargs.get("ceil_mode", False)))
        axes = [
            {"kernel": kernel[i], "stride": stride[i], "dilation": dilation[i], "left": padding[i], "right": padding[i]}
            for i in range(rank)
        ]
        return {"kind": "window", "op": op, "axes": axes, "ceil_mode": ceil_mode}

    return read


def _pad(mode: str) -> Callable[[Any, Any], dict[str, Any]]:
    def read(args: Any, _: Any) -> dict[str, Any]:
        amounts = [int(v) for v in args[1]]
        pairs = list(zip(amounts[::2], amounts[1::2], strict=True))[::-1]  # the last axis comes first
        return {"kind": "pad", "op": f"pad_{mode}", "axes": [{"left": left, "right": right} for left, right in pairs], "mode": mode}

    return read


def _resize(args: Any, _: Any) -> dict[str, Any]:
    return {"kind": "resize", "op": "resize", "axes": []}


def _adaptive(args: Any, _: Any) -> dict[str, Any]:
    return {"kind": "adaptive", "op": "adaptive_pool", "axes": []}


class _CircularPads(TorchFunctionMode):
    """Sees circular padding before torch turns it into copies."""

    def __init__(self, reader: _Reader) -> None:
        super().__init__()
        self._reader = reader

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func is nn.functional.pad:
            amounts = args[1] if len(args) > 1 else kwargs["pad"]
            if (args[2] if len(args) > 2 else kwargs.get("mode")) == "circular":
                self._reader.padded(args[0], out, amounts, "circular")
        return out


_SPATIAL: dict[Any, Callable[[Any, Any], dict[str, Any]]] = {
    aten.convolution: _convolution,
    aten.max_pool2d_with_indices: _pool("max_pool", 2, True),
    aten.max_pool3d_with_indices: _pool("max_pool", 3, True),
    aten.avg_pool2d: _pool("avg_pool", 2, False),
    aten.avg_pool3d: _pool("avg_pool", 3, False),
    aten.constant_pad_nd: _pad("zeros"),
    aten.reflection_pad1d: _pad("reflect"),
    aten.reflection_pad2d: _pad("reflect"),
    aten.reflection_pad3d: _pad("reflect"),
    aten.replication_pad1d: _pad("replicate"),
    aten.replication_pad2d: _pad("replicate"),
    aten.replication_pad3d: _pad("replicate"),
    aten._adaptive_avg_pool2d: _adaptive,
    aten._adaptive_avg_pool3d: _adaptive,
    aten.adaptive_max_pool2d: _adaptive,
    aten.adaptive_max_pool3d: _adaptive,
    **{
        getattr(aten, name): _resize
        for name in (
            "upsample_nearest1d",
            "upsample_nearest2d",
            "upsample_nearest3d",
            "_upsample_nearest_exact2d",
            "upsample_bilinear2d",
            "upsample_bicubic2d",
            "upsample_linear1d",
            "upsample_trilinear3d",
            "_upsample_bilinear2d_aa",
        )
    },
}


_WINDOWS = (
    aten.convolution,
    aten.max_pool2d_with_indices,
    aten.max_pool3d_with_indices,
    aten.avg_pool2d,
    aten.avg_pool3d,
)
_REDUCTIONS = (aten.mean, aten.sum, aten.amax, aten.max, aten.amin)


@contextmanager
def _running_modules(stack: list[_Running], names: Mapping[nn.Module, str]) -> Generator[None]:
    """Keeps the modules that are running, with what they were given."""

    def enter(module: nn.Module, args: Any) -> None:
        if module in names:
            stack.append((module, args[0] if args and isinstance(args[0], Tensor) else None))

    def leave(module: nn.Module, _args: Any, _out: Any) -> None:
        if module in names:
            stack.pop()

    hooks = [
        nn.modules.module.register_module_forward_pre_hook(enter),
        nn.modules.module.register_module_forward_hook(leave, always_call=True),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


_TOO_SMALL = ("Kernel size can't be greater", "Calculated padded input size", "Output size is too small", "should be less than")


def trace(
    model: nn.Module,
    input_size: Sequence[int],
    *,
    batch: int = 1,
    args: Sequence[Any] | None = None,
    kwargs: Mapping[str, Any] | None = None,
    quiet: bool = False,
) -> Graph:
    """Run the model once and write down what happens on the spatial axes.

    Args:
        model: left as it is: parameters, buffers, flags and the random generator.
        input_size: channels and spatial sizes, ``(C, H, W)``, ``(C, L)`` or ``(C, D, H, W)``.
        batch: images in the pass.
        args: further positional arguments of the model.
        kwargs: keyword arguments.
        quiet: no warning where real zeros are used.

    Raises:
        ValueError: the input is smaller than a window; the message names the layer.
        UnsupportedError: the model runs neither without data nor on zeros.
    """
    inner = unwrapped(model)
    failure: Exception | None = None
    for device in ("meta", "cpu"):
        graph, stack = Graph(), list[_Running]()
        runner = _without_memory(inner)
        names = {module: name for name, module in runner.named_modules()}
        weights: dict[str, Tensor] = {}
        for name, value in (*runner.named_parameters(), *runner.named_buffers()):
            # Copies on the CPU: the model may be on another device, and a real pass may write into buffers.
            if device == "meta":
                weights[name] = (
                    torch.empty(value.shape, dtype=value.dtype, device=device)
                    if is_sharded(value)
                    else torch.empty_like(value, device=device)
                )
            else:
                weights[name] = whole(value.detach()).to("cpu", copy=True)
        rest = [arg.to(device) if isinstance(arg, Tensor) else arg for arg in args or ()]
        named = {name: arg.to(device) if isinstance(arg, Tensor) else arg for name, arg in (kwargs or {}).items()}
        with torch.no_grad(), eval_mode(runner), torch.random.fork_rng(devices=[]), _running_modules(stack, names):
            dtype = next((value.dtype for value in runner.parameters() if value.is_floating_point()), torch.get_default_dtype())
            x = torch.zeros(batch, *input_size, device=device, dtype=dtype)
            reader = _Reader(graph, stack, names)
            reader.begin(x, len(input_size) - 1)
            try:
                with reader, _CircularPads(reader), watching_pads(reader.padded):
                    torch.func.functional_call(runner, weights, (x, *rest), named)
                return graph
            except Exception as error:
                failure = error
                if any(words in str(error) for words in _TOO_SMALL):
                    last = graph.steps[-1].name
                    raise ValueError(f"an input of {tuple(input_size)} is smaller than a window after layer {last!r}: {error}") from error
        if device == "meta" and not quiet:
            message = f"the model cannot run without data ({_first_line(failure)}); real zeros are used"
            warnings.warn(message, OutlastWarning, stacklevel=3)
    raise UnsupportedError(f"the model runs neither without data nor on zeros: {_first_line(failure)}") from failure


def _first_line(error: Exception | None) -> str:
    return str(error).strip().split("\n")[0][:200]
