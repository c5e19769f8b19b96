"""An optional backend on CUDA: the Triton kernels of flash-linear-attention for causal attention with bounded features.

Used where that package (``fla``) is installed and has agreed with the engine, forward and backward, on a small random problem of the same
kind on the same device; otherwise, and for maps whose stabiliser must not see later keys, the engine runs. Nobody has to ask for it. Unlike
the engine it keeps the features of all rows for the backward pass.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from outlast._core._precision import full_precision
from outlast.attention._chunks import Call
from outlast.attention._forward import Run, divide, inverse
from outlast.errors import OutlastWarning

Kernel = Callable[..., tuple[Tensor, Tensor]]
TOLERANCE = 1e-2  # the kernels multiply in reduced precision
_agreed: dict[tuple[Any, ...], bool] = {}


def find_kernel() -> Kernel | None:
    """Fla's chunked linear attention with a scalar gate; None where it cannot be imported."""
    try:
        module = importlib.import_module("fla.ops.simple_gla")
    except Exception:
        return None
    return module.chunk_simple_gla


def applies(q: Tensor, *, feature_map: str, causal: bool) -> bool:
    """Whether a call could go to the kernel."""
    return q.is_cuda and causal and feature_map in ("gaussian", "arccos", "relu", "elu1") and not torch.compiler.is_compiling()


class _Features(torch.autograd.Function):
    """Features of all rows at once, with the maps' own derivatives (the maps work in place, which autograd cannot follow)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, call: Call, query: bool) -> Tensor:
        value = call.map.features(x, W, call.scale, query=query).value
        assert value is not None
        ctx.save_for_backward(x, W, value)
        ctx.call, ctx.query = call, query
        return value

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        x, W, value = ctx.saved_tensors
        by_x, by_p = ctx.call.map.backward(grads[0], value, None, x, W, ctx.call.scale, query=ctx.query)
        by_W = None
        if by_p is not None and ctx.needs_input_grad[1]:
            by_W = by_p.mT @ x
            by_W = by_W.sum(0, keepdim=True) if len(W) == 1 else by_W
        return by_x, by_W, None, None


def _features(call: Call, x: Tensor, query: bool) -> Tensor:
    found: Any = _Features.apply(x, call.W, call, query)
    return found


def run_kernel(kernel: Kernel, call: Call, S: Tensor | None, z: Tensor | None, n: Tensor | None, denominator: str, eps: float) -> Run:
    """One causal call by the kernel, differentiated by autograd and the kernel's own backward pass."""
    q = _features(call, call.queries(0, call.Lq), True)
    k = _features(call, call.keys(0, call.Lk), False)
    v = call.values(0, call.Lk)  # zero rows for padding: nothing is added there
    log_gate, cumulated = call.W.new_zeros(v.shape[:2]), None
    if call.log_gate is not None:
        weight, log_gate = call.gates(0, call.Lk)
        k, cumulated = k * weight[..., None], call.exactly(log_gate).cumsum(-1)
    first = None if S is None or z is None else torch.cat([S, z[..., None]], -1)
    outs: list[Tensor] = []
    state = first
    for group in call.by_head(q).unbind(1):
        # (batch, length, heads, size); N is the batch.
        out, state = kernel(
            group[:, :, None],
            k[:, :, None],
            v[:, :, None],
            g=log_gate[:, :, None],
            scale=1.0,
            initial_state=None if first is None else first[:, None],
            output_final_state=True,
        )
        outs.append(out[:, :, 0].to(call.dtype))
    o = torch.stack(outs, 1)
    assert state is not None
    state = state[:, 0].to(call.dtype)
    start = call.W.new_zeros(call.N) if n is None else n
    seen = call.seen(start, 0, call.Lq, cumulated)
    shown = seen[:, None].expand(o.shape[:-1])
    den, clamped = divide(o[..., -1], shown, denominator, eps)
    out = (o[..., :-1] * inverse(den, shown > 0.0)[..., None]).to(call.q.dtype)
    c = call.W.new_zeros(call.N, call.R)
    starts = torch.zeros(call.Lq, dtype=torch.bool, device="cpu")
    return Run(out, state[..., :-1], state[..., -1], c, seen[:, -1].detach(), den.detach(), clamped, starts)


def agrees(kernel: Kernel, engine: Callable[..., Run], call: Call, denominator: str, eps: float) -> bool:
    """Whether kernel and engine agree on a small problem of the kind of a call; found out once, and said if not."""
    key = (call.map.name, call.q.dtype, call.q.device, call.d, call.D, call.R, call.log_gate is not None, call.keep is not None)
    if key not in _agreed:
        try:
            difference = _difference(kernel, engine, call, denominator, eps)
        except Exception as error:
            difference, why = float("inf"), f": {error}"
        else:
            why = f" by {difference:.1e}"
        _agreed[key] = difference <= TOLERANCE
        if not _agreed[key]:
            message = f"flash-linear-attention's kernel differs from our own computation{why}; it is not used"
            warnings.warn(message, OutlastWarning, stacklevel=4)
    return _agreed[key]


def _difference(kernel: Kernel, engine: Callable[..., Run], call: Call, denominator: str, eps: float) -> float:
    """Largest relative difference of outputs and gradients."""
    N, G, L = 2, call.G, 96
    stream = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=stream, device="cpu").to(call.q.device, call.q.dtype).requires_grad_()

    q, k, v = normal(N, G, L, call.d), normal(N, L, call.d), normal(N, L, call.D)
    W = call.W[:1].detach()
    keep = None if call.keep is None else (torch.rand(N, L, generator=stream, device="cpu") > 0.3).to(call.q.device)
    logits = normal(N, L)
    gate = None if call.log_gate is None else torch.nn.functional.logsigmoid(logits)
    inputs = [q, k, v] if gate is None else [q, k, v, logits]
    small = Call(q, k, v, W, keep, gate, call.map.name, True, call.scale, call.chunk)
    with torch.enable_grad():
        ours = engine(q, k, v, W, keep, gate, None, None, None, None, call.map.name, denominator, True, call.scale, call.chunk, eps)
        with full_precision(q.device):
            theirs = run_kernel(kernel, small, None, None, None, denominator, eps)
        pairs = [(ours.out_NGLD, theirs.out_NGLD), (ours.S_NRD, theirs.S_NRD)]
        gradients = [torch.autograd.grad(run.out_NGLD.float().square().sum(), inputs, retain_graph=True) for run in (ours, theirs)]
    pairs += list(zip(*gradients, strict=True))
    return max(float((a - b).detach().float().norm() / a.detach().float().norm()) for a, b in pairs)
