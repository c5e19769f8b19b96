"""The layer engine: all tasks' rows in one forward and one backward pass, with a weight gradient for each task.

Where tasks have batches of their own, put together into one, input gradients of all rows cost one pass; only weight
gradients are needed by task. Each layer's gradients are vaccinated and freed as the backward pass reaches it.

For a linear layer with rows x and output gradients d, the inner product of two tasks' gradients is

    <g_i, g_j> = sum over rows a of i and b of j of (x_a . x_b) (d_a . d_b)

so that with few rows no task's gradient is ever formed.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from outlast._core._calls import CALLS, bind, spatial
from outlast.errors import StateError
from outlast.multitask import _vectors


@dataclass
class Labels:
    """Which task each row belongs to. Rows may be brought into the order of tasks to make blocks of them.

    Attributes:
        ids: number of the task (or of its half) of each row, ``(N,)``.
        count: number of tasks (or halves).
    """

    ids: Tensor
    count: int
    order: Tensor | None = None
    sizes: list[int] = field(default_factory=list[int])

    def __post_init__(self) -> None:
        self.sizes = torch.bincount(self.ids, minlength=self.count).tolist()
        if len(self.ids) > 1 and bool((self.ids[1:] < self.ids[:-1]).any()):
            self.order = self.ids.argsort(stable=True)

    def blocks(self, rows: Tensor) -> tuple[Tensor, ...]:
        """Rows ``(N, ...)`` of each task."""
        rows = rows if self.order is None else rows[self.order]
        return rows.split(self.sizes)

    def of(self, rows: int) -> Tensor:
        """Labels of ``rows`` rows that come from the N by flattening."""
        return self.ids.repeat_interleave(rows // len(self.ids))

    def sums(self, rows: Tensor) -> Tensor:
        """Sum of rows ``(N, ...)`` by task."""
        return rows.new_zeros(self.count, *rows.shape[1:]).index_add_(0, self.ids, rows)


class Contribution(Protocol):
    """What one parameter's uses give: inner products of tasks' gradients, and weighted sums of them.

    ``size`` is the number of entries held, ``count`` that of the tasks (or halves).
    """

    @property
    def size(self) -> int: ...
    @property
    def count(self) -> int: ...
    def gram(self) -> Tensor: ...
    def combine(self, weights: Tensor) -> Tensor: ...


class Dense:
    """Gradients that were formed for each task, ``(T, *shape)``."""

    def __init__(self, grads: Tensor) -> None:
        self.grads = grads

    @property
    def size(self) -> int:
        return self.grads.numel()

    @property
    def count(self) -> int:
        return len(self.grads)

    def gram(self) -> Tensor:
        return _vectors.gram(list(self.grads.flatten(1)))

    def combine(self, weights: Tensor) -> Tensor:
        flat = weights.to(self.grads.device, self.grads.dtype) @ self.grads.flatten(1)
        return flat.view(self.grads.shape[1:])


class Outputs:
    """Output gradients of a linear layer's rows, and their products, which its weight and its bias both need."""

    def __init__(self, d: Tensor) -> None:
        self.d = d
        self._between: Tensor | None = None

    @property
    def scale(self) -> Tensor:
        """Largest entry: products of small gradients would underflow, of large ones overflow."""
        return self.d.abs().amax().clamp(min=torch.finfo(self.d.dtype).tiny)

    @property
    def between(self) -> Tensor:
        """``(d_a . d_b) / scale^2`` for all pairs of rows."""
        if self._between is None:
            scaled = self.d / self.scale
            self._between = scaled @ scaled.T
        return self._between


class Ghost:
    """A linear weight's (``x`` given) or bias's gradients as rows and output gradients, never formed."""

    def __init__(self, x: Tensor | None, outputs: Outputs, labels: Tensor, count: int) -> None:
        self._x, self._outputs, self._labels, self.count = x, outputs, labels, count

    @property
    def size(self) -> int:
        return self._outputs.d.numel() + (0 if self._x is None else self._x.numel())

    def gram(self) -> Tensor:
        between = self._outputs.between
        kernel = between if self._x is None else (self._x @ self._x.T).mul_(between)
        members = F.one_hot(self._labels, self.count).double()
        return ((members.T @ kernel.double() @ members) * self._outputs.scale.double().square()).cpu()

    def combine(self, weights: Tensor) -> Tensor:
        d = self._outputs.d
        rows = weights.to(d.device, d.dtype)[self._labels]
        return rows @ d if self._x is None else (d * rows[:, None]).T @ self._x

    @staticmethod
    def joined(parts: Sequence[Ghost]) -> Ghost:
        """Several uses as one with all their rows."""
        outputs = Outputs(torch.cat([part._outputs.d for part in parts]))
        xs = [part._x for part in parts if part._x is not None]
        return Ghost(torch.cat(xs) if xs else None, outputs, torch.cat([part._labels for part in parts]), parts[0].count)


@dataclass
class Token:
    """An embedding's gradients for the tokens that occurred."""

    grads: Tensor  # (T, occurring, width)
    tokens: Tensor
    shape: torch.Size

    @property
    def size(self) -> int:
        return self.grads.numel()

    @property
    def count(self) -> int:
        return len(self.grads)

    def gram(self) -> Tensor:
        return Dense(self.grads).gram()

    def combine(self, weights: Tensor) -> Tensor:
        return self.grads.new_zeros(self.shape).index_copy_(0, self.tokens, Dense(self.grads).combine(weights))


@dataclass
class _Use:
    """One call that used a tracked weight."""

    kind: str
    call: dict[str, Any]
    weight: int | None  # numbers in the list of parameters
    bias: int | None


class Session:
    """One labelled forward pass and the backward pass that belongs to it.

    Args:
        labels: tasks (or halves) of the N rows.
        parameters: those whose gradients are taken by task.
        names: of all parameters, for messages.
        ready: called with a group's number and the contributions of its parameters, once the last of them is known.
        group_of: number of the group of each parameter.
        done: called at the end of the backward pass.
        strict: raise where a use cannot be labelled, instead of noting it.
        optional: parameters whose gradient may also go the ordinary way.
    """

    def __init__(
        self,
        labels: Labels,
        parameters: Mapping[int, nn.Parameter],
        names: Sequence[str],
        group_of: Mapping[int, int],
        ready: Callable[[Session, int, dict[int, list[Contribution]]], None],
        done: Callable[[Session], None],
        *,
        strict: bool,
        optional: frozenset[int] = frozenset(),
    ) -> None:
        self.labels = labels
        self.number_of = {id(parameter): number for number, parameter in parameters.items()}
        self.parameters = parameters
        self.names = names
        self.group_of = group_of
        self.strict = strict
        self.optional = optional
        self.tasks: frozenset[Any] = frozenset()
        self.failed: str | None = None  # why the loop engine has to do it
        self.looped = False  # whether backward passes are the loop engine's, one for each task
        self.started = self.finished = False
        self.unseen = False  # whether a tracked weight was used without gradient
        self._ready, self._done = ready, done
        self._open: dict[int, int] = {}  # uses of each group that have not come back
        self._parts: dict[int, dict[int, list[Contribution]]] = {}
        self._hooks: list[RemovableHandle] = []

    def fail(self, reason: str) -> None:
        """Note (or raise) that a parameter's gradients cannot be told apart by rows."""
        if self.strict:
            raise ValueError(f"engine='layer': {reason}; use engine='loop' or 'auto' with a loss for each task, or leave it out of shared=")
        self.failed = self.failed or reason

    def used(self, use: _Use) -> None:
        """Count a use in the forward pass."""
        for number in (use.weight, use.bias):
            if number is not None:
                group = self.group_of[number]
                self._open[group] = self._open.get(group, 0) + 1

    def begin(self) -> bool:
        """Called by each node of the backward pass; whether it is the one pass for all tasks."""
        if self.looped:
            return False
        if self.failed is not None:
            raise ValueError(f"this pass cannot keep the tasks apart: {self.failed}; give backward() a loss for each task")
        if self.finished:
            raise StateError("a second backward pass through a forward pass inside rows(): its rows are gone")
        if not self.started:
            self.started = True
            engine: Any = torch.autograd.Variable._execution_engine
            engine.queue_callback(self._finish)
            self._guard()
        return True

    def _guard(self) -> None:
        """Refuse an ordinary gradient during this pass: a use that the mode could not see (a custom function, a recomputation)."""
        task, own = torch._C._current_graph_task_id(), weakref.ref(self)

        def refuse(name: str, grad: Tensor | None) -> None:
            # A recomputation (reentrant checkpointing) runs as a task of its own inside this one. A pass that failed leaves
            # its hooks until the vaccine is used again; they mind their own pass only.
            session = own()
            present = torch._C._current_graph_task_id()
            if grad is None or session is None or session.finished:
                return
            if present == task or (session.unseen and present > task):
                session.let_go()
                raise ValueError(f"parameter {name!r} is used where rows() cannot see it; leave rows() out, give backward() the losses")

        for number, parameter in self.parameters.items():
            if number not in self.optional:
                self._hooks.append(parameter.register_hook(functools.partial(refuse, self.names[number])))

    def let_go(self) -> None:
        """Take the guards off the parameters."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def give(self, number: int, part: Contribution) -> None:
        """Take one use's contribution; hands the group on when it was the last."""
        group = self.group_of[number]
        self._parts.setdefault(group, {}).setdefault(number, []).append(part)
        self._open[group] -= 1
        if self._open[group] == 0:
            self._ready(self, group, self._parts.pop(group))

    def _finish(self) -> None:
        for group in sorted(self._parts):  # groups of which some use had no gradient
            self._ready(self, group, self._parts[group])
        self._parts.clear()
        self.let_go()
        self.finished = True
        self._done(self)


class Labelling(TorchFunctionMode):
    """Replaces calls of tracked weights by ones whose backward pass keeps tasks apart."""

    def __init__(self, session: Session) -> None:
        super().__init__()
        self._session = session

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        found = CALLS.get(func)
        if found is not None:
            out = self._labelled(func, *found, args, kwargs)
            if out is not None:
                return out
        out = func(*args, **kwargs)
        self._check_plain(func, args, kwargs, out)
        return out

    def _check_plain(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        """Nothing that carries a gradient may come of a tracked parameter in an ordinary call."""
        session = self._session
        in_place = out is None
        if not in_place and not any(isinstance(leaf, Tensor) and leaf.requires_grad and not leaf.is_leaf for leaf in tree_leaves(out)):
            return
        for leaf in tree_leaves((args, kwargs)):
            number = session.number_of.get(id(leaf)) if isinstance(leaf, nn.Parameter) else None
            if number is not None and number not in session.optional:
                session.fail(f"parameter {session.names[number]!r} is used by {getattr(func, '__name__', func)}, which has no rows")

    def _labelled(self, func: Any, kind: str, names: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
        session = self._session
        call = bind(names, args, kwargs)
        if kind == "batch_norm" and call.get("training"):
            session.fail("batch normalisation in training mode mixes rows, so that a task's loss reaches other tasks' rows")
            return None
        weight, bias = call.get("weight"), call.get("bias")
        numbers = [session.number_of.get(id(value)) if isinstance(value, Tensor) else None for value in (weight, bias)]
        if numbers == [None, None]:
            return None
        if not torch.is_grad_enabled():
            session.unseen = True  # reentrant checkpointing runs so, and again with gradients inside the backward pass
            return None
        x: Tensor | None = call.get("input")
        problem = self._problem(kind, call, x, [session.parameters[number] for number in numbers if number is not None])
        if problem is not None:
            if any(number is not None and number not in session.optional for number in numbers):
                name = session.names[next(number for number in numbers if number is not None)]
                session.fail(f"parameter {name!r} {problem}")
            return None
        assert x is not None
        # Tensors in it would outlive the backward pass as long as the loss does.
        use = _Use(kind, {name: value for name, value in call.items() if not isinstance(value, Tensor)}, *numbers)
        session.used(use)
        if kind in _NORMS:
            plain = {**call, "weight": None, "bias": None} if kind != "rms_norm" else {**call, "weight": None}
            out: Any = _Affine.apply(func(**_named_for(func, plain)), weight, bias, session, use)
            return out
        out = _Map.apply(x, weight, bias, func, args, kwargs, session, use)
        return out

    def _problem(self, kind: str, call: Mapping[str, Any], x: Tensor | None, tracked: Sequence[Tensor]) -> str | None:
        """Why a call's parameters cannot be told apart by rows."""
        count = len(self._session.labels.ids)
        if kind not in _SUPPORTED or x is None:
            return f"is used by {kind}, which has no rows that could be told apart"
        if x.ndim == 0 or len(x) != count or (kind == "conv" and x.ndim != call["weight"].ndim):
            return f"sees an input of shape {tuple(x.shape)}, whose rows are not the {count} labelled"
        if kind == "embedding":
            if call.get("scale_grad_by_freq") or call.get("sparse"):
                return "is an embedding with sparse gradients or with gradients scaled by frequency"
            if x.ndim == 1 and torch.equal(x, torch.arange(count, device=x.device)):
                return f"looks up the numbers 0 to {count - 1}, which are positions and no rows"
        if any(hook for parameter in tracked for hook in (parameter._backward_hooks or {}).values() if not _is_guard(hook)):
            return "has hooks on its gradient, which the layer engine would not call"
        autograd: Any = torch._C
        if autograd._autograd._top_saved_tensors_default_hooks(False) is not None:
            return "is used under activation checkpointing (or other hooks on saved tensors), which runs the forward pass again"
        return None


def _is_guard(hook: Any) -> bool:
    return isinstance(hook, functools.partial) and hook.func.__qualname__.startswith("Session._guard")


_NORMS = ("layer_norm", "rms_norm", "group_norm", "batch_norm")
_SUPPORTED = ("linear", "conv", "embedding", *_NORMS)


def _named_for(func: Any, call: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in call.items() if name in CALLS[func][1]}


class _Map(torch.autograd.Function):
    """A linear map, convolution or embedding; its weight gradients go to the session."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, func: Any, args: Any, kwargs: Any, session: Session, use: _Use
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.has_bias, ctx.session, ctx.use = bias is not None, session, use
        return func(*args, **kwargs)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x, weight = ctx.saved_tensors
        d: Tensor = grads[0]
        session: Session = ctx.session
        use: _Use = ctx.use
        dtype = torch.promote_types(d.dtype, torch.float32)
        dx = _input_grad(use, d, weight, x) if ctx.needs_input_grad[0] else None
        if not session.begin():
            return dx, *_plain_grads(use, x, d, weight, ctx.needs_input_grad[1], ctx.has_bias and ctx.needs_input_grad[2]), *[None] * 5
        for number, part in _parts_of(use, x, d.to(dtype), weight, session.labels):
            session.give(number, part)
        # what the session does not track goes the ordinary way
        other_weight = ctx.needs_input_grad[1] and use.weight is None
        other_bias = ctx.has_bias and ctx.needs_input_grad[2] and use.bias is None
        rest = _plain_grads(use, x, d, weight, other_weight, other_bias) if other_weight or other_bias else (None, None)
        return dx, *rest, *[None] * 5


class _Affine(torch.autograd.Function):
    """Scale and shift behind a normalisation, channels in the last dimensions (layer, RMS) or in dimension 1."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, session: Session, use: _Use) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        ctx.session, ctx.use = session, use
        shape = _affine_shape(use, x, weight if weight is not None else bias)
        out = x if weight is None else x * weight.view(shape)
        out = out if bias is None else out + bias.view(shape)
        return out.view_as(out) if out is x else out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x, weight, bias = ctx.saved_tensors
        d: Tensor = grads[0]
        session: Session = ctx.session
        use: _Use = ctx.use
        shape = _affine_shape(use, x, weight if weight is not None else bias)
        dx = d if weight is None else d * weight.view(shape)
        inner = (
            [axis for axis in range(1, x.ndim) if shape[axis] == 1 and x.shape[axis] != 1]
            if use.kind in ("group_norm", "batch_norm")
            else list(range(1, x.ndim - (weight if weight is not None else bias).ndim))
        )
        by_row: list[Tensor | None] = []
        for parameter, values in ((weight, d * x), (bias, d)):
            summed = values.sum(inner) if inner else values
            by_row.append(None if parameter is None else summed.reshape(len(x), *parameter.shape))
        labelled = session.begin()
        out: list[Tensor | None] = []
        for rows, number, parameter in zip(by_row, (use.weight, use.bias), (weight, bias), strict=True):
            if rows is None or parameter is None:
                out.append(None)
            elif labelled and number is not None:
                session.give(number, Dense(session.labels.sums(rows.to(torch.promote_types(rows.dtype, torch.float32)))))
                out.append(None)
            else:
                out.append(rows.sum(0).to(parameter.dtype))
        return dx, *out, None, None


def _affine_shape(use: _Use, x: Tensor, parameter: Tensor | None) -> tuple[int, ...]:
    assert parameter is not None
    if use.kind in ("group_norm", "batch_norm"):
        return (1, -1, *[1] * (x.ndim - 2))
    return (*[1] * (x.ndim - parameter.ndim), *parameter.shape)


def _input_grad(use: _Use, d: Tensor, weight: Tensor, x: Tensor) -> Tensor:
    if use.kind == "linear":
        return (d @ weight.to(d.dtype)).to(x.dtype)
    return _conv_backward(use, d, x.to(d.dtype), weight.to(d.dtype), (True, False, False))[0].to(x.dtype)


def _plain_grads(use: _Use, x: Tensor, d: Tensor, weight: Tensor, for_weight: bool, for_bias: bool) -> tuple[Tensor | None, Tensor | None]:
    """What autograd would give, in the dtype of the parameters."""
    one = Labels(torch.zeros(len(x), dtype=torch.int64, device=x.device), 1)
    parts = dict(_parts_of(_Use(use.kind, use.call, 0 if for_weight else None, 1 if for_bias else None), x, d, weight, one, ghost=False))
    ones = torch.ones(1, device=d.device)
    found = [parts[number].combine(ones).to(weight.dtype) if number in parts else None for number in (0, 1)]
    return found[0], found[1]


def _parts_of(
    use: _Use, x: Tensor, d: Tensor, weight: Tensor, labels: Labels, *, ghost: bool | None = None
) -> list[tuple[int, Contribution]]:
    """Contributions of one call's weight and bias."""
    if use.kind == "linear":
        return _linear_parts(use, x.to(d.dtype), d, labels, ghost)
    if use.kind == "embedding":
        return [] if use.weight is None else [(use.weight, _token_part(use, x, d, weight, labels))]
    found: list[tuple[int, Contribution]] = []
    if use.weight is not None:
        pieces = zip(labels.blocks(x.to(d.dtype)), labels.blocks(d), strict=True)
        w = weight.to(d.dtype)
        grads = [_conv_backward(use, b, a, w, (False, True, False))[1] if len(a) else torch.zeros_like(w) for a, b in pieces]
        found.append((use.weight, Dense(torch.stack(grads))))
    if use.bias is not None:
        found.append((use.bias, Dense(labels.sums(d.flatten(2).sum(2)))))
    return found


def _linear_parts(use: _Use, x: Tensor, d: Tensor, labels: Labels, ghost: bool | None) -> list[tuple[int, Contribution]]:
    wide_x, wide_d = x.reshape(-1, x.shape[-1]), d.reshape(-1, d.shape[-1])
    rows, inputs, outputs = len(wide_x), x.shape[-1], d.shape[-1]
    count = labels.count
    found: list[tuple[int, Contribution]] = []
    if ghost is None:  # products of all pairs of rows, against forming, reading and combining T gradients
        ghost = rows**2 * (inputs + outputs) < count * inputs * outputs * (count + 60)
    if ghost:
        own, products = labels.of(rows), Outputs(wide_d)
        if use.weight is not None:
            found.append((use.weight, Ghost(wide_x, products, own, count)))
        if use.bias is not None:
            found.append((use.bias, Ghost(None, products, own, count)))
        return found
    if use.weight is not None:
        xs, ds = labels.blocks(x), labels.blocks(d)
        if len(set(labels.sizes)) == 1 and labels.order is None:
            grads = torch.bmm(d.reshape(count, -1, outputs).mT, x.reshape(count, -1, inputs))
        else:
            grads = torch.stack([b.reshape(-1, outputs).T @ a.reshape(-1, inputs) for a, b in zip(xs, ds, strict=True)])
        found.append((use.weight, Dense(grads)))
    if use.bias is not None:
        found.append((use.bias, Dense(labels.sums(d.reshape(len(d), -1, outputs).sum(1)))))
    return found


def _token_part(use: _Use, x: Tensor, d: Tensor, weight: Tensor, labels: Labels) -> Contribution:
    flat, wide = x.reshape(-1), d.reshape(-1, d.shape[-1])
    padding = use.call.get("padding_idx")
    if padding is not None:
        wide = wide * (flat != padding % len(weight))[:, None]
    tokens, place = flat.unique(return_inverse=True)
    grads = wide.new_zeros(labels.count * len(tokens), wide.shape[1])
    grads.index_add_(0, labels.of(len(flat)) * len(tokens) + place, wide)
    return Token(grads.view(labels.count, len(tokens), -1), tokens, weight.shape)


def _conv_backward(use: _Use, d: Tensor, x: Tensor, weight: Tensor, mask: tuple[bool, bool, bool]) -> Any:
    call, count = use.call, weight.ndim - 2
    padding = call.get("padding", 0)
    dilation = spatial(call.get("dilation", 1), count)
    crop: list[int] = []
    if padding == "valid":
        padding = 0
    if padding == "same":
        totals = [size * (kernel - 1) for size, kernel in zip(dilation, weight.shape[2:], strict=True)]
        for total in reversed(totals):
            crop += [total // 2, total - total // 2]
        x, padding = F.pad(x, crop), 0
    found = list(
        torch.ops.aten.convolution_backward(
            d, x, weight, None, spatial(call.get("stride", 1), count), spatial(padding, count), dilation,
            False, (0,) * count, int(call.get("groups", 1)), mask,
        )
    )  # fmt: skip
    if crop and found[0] is not None:
        found[0] = F.pad(found[0], [-amount for amount in crop])
    return found


def dense(part: Contribution) -> Tensor:
    """A contribution's gradients by task, ``(T, *shape)``."""
    return part.grads if isinstance(part, Dense) else torch.stack([part.combine(row) for row in torch.eye(part.count)])


def merged(parts: Sequence[Contribution]) -> Contribution:
    """Several uses of one parameter: rows go side by side where they are rows, else gradients are added."""
    if all(isinstance(part, Ghost) for part in parts):
        return Ghost.joined([part for part in parts if isinstance(part, Ghost)])
    return Dense(torch.stack([dense(part) for part in parts]).sum(0))
