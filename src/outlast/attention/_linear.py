"""The engine: linear attention in chunks, with its derivative, for every feature map and every form.

Attention with features is ``out_t = phi(q_t) S_t / phi(q_t).z_t`` with ``S = sum phi(k_j) v_j^T`` and ``z = sum phi(k_j)``. Inside a
chunk of C rows it is a masked product of C x C, between chunks only the state (S, z) travels, so time and memory are linear in the length
and no tensor of size L x R x D exists. Numerator and denominator are one product: values carry a column of ones.

Features are made inside the loop, and again in the backward pass: what autograd keeps is q, k, v, the output and the denominators. The
backward pass sweeps forwards with the state for the gradient of the queries and backwards with the gradient of the state for keys and
values; a state is never rebuilt by subtracting.

Stabiliser. Positive features are ``exp(log)``. The state holds the largest logarithm c of the keys that it has seen, for each feature,
and S and z are kept divided by exp(c); it grows chunk by chunk, so no key reaches an earlier chunk. Inside a chunk the maximum over the
chunk is used: it cancels exactly as long as numbers stay within range. Where a key exceeds what earlier rows of its chunk see by more than
``LARGEST_RISE``, the chunk is cut into smaller ones, at the end into single rows, which are always exact.

The two passes are operators of torch (``torch.library``), so ``torch.compile`` takes each as one node whatever the length.

Names of dimensions: B batch, H key heads, N = B H, G queries heads to a key head, L length, C chunk, d head size, D size of values, E = D
+ 1, M random vectors, R features.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from outlast._core._precision import full_precision
from outlast.attention._backward import backward
from outlast.attention._chunks import Call
from outlast.attention._forward import Run, forward
from outlast.attention._kernels import agrees, applies, find_kernel, run_kernel
from outlast.attention._maps import MAPS
from outlast.errors import UnsupportedError

_NAME = "outlast::linear_attention"


@torch.library.custom_op(_NAME, mutates_args=())
def _operator(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    W: Tensor,
    keep: Tensor | None,
    log_gate: Tensor | None,
    S: Tensor | None,
    z: Tensor | None,
    c: Tensor | None,
    n: Tensor | None,
    feature_map: str,
    denominator: str,
    causal: bool,
    scale: float,
    chunk: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    call = Call(q, k, v, W, keep, log_gate, feature_map, causal, scale, chunk)
    with full_precision(q.device):
        run = forward(call, S, z, c, n, denominator, eps)
    return run


@_operator.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    W: Tensor,
    keep: Tensor | None,
    log_gate: Tensor | None,
    S: Tensor | None,
    z: Tensor | None,
    c: Tensor | None,
    n: Tensor | None,
    feature_map: str,
    denominator: str,
    causal: bool,
    scale: float,
    chunk: int,
    eps: float,
) -> tuple[Tensor, ...]:
    N, G, Lq, d = q.shape
    D = v.shape[-1]
    R = MAPS[feature_map].num_features(W.shape[-2], d)
    like = W.new_empty
    return (
        q.new_empty(N, G, Lq, D),
        like(N, R, D),
        like(N, R),
        like(N, R),
        like(N),
        like(N, G, Lq),
        like((N, G, Lq), dtype=torch.bool),
        torch.empty(Lq, dtype=torch.bool),
    )


@torch.library.custom_op(f"{_NAME}_backward", mutates_args=())
def _operator_backward(
    grad_out: Tensor,
    grad_S: Tensor | None,
    grad_z: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    W: Tensor,
    keep: Tensor | None,
    log_gate: Tensor | None,
    S: Tensor | None,
    z: Tensor | None,
    c: Tensor | None,
    run: list[Tensor],
    feature_map: str,
    causal: bool,
    scale: float,
    chunk: int,
    with_projection: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    call = Call(q, k, v, W, keep, log_gate, feature_map, causal, scale, chunk)
    with full_precision(q.device):
        grads, grad_state = backward(call, grad_out, grad_S, grad_z, S, z, c, Run(*run), with_projection)
    nothing = W.new_empty
    return (
        grads.q,
        grads.k,
        grads.v,
        nothing(0) if grads.by_W is None else grads.by_W,
        nothing(0) if grads.log_gate is None else grads.log_gate,
        nothing(0) if S is None else grad_state[..., :-1].clone(),
        nothing(0) if S is None else grad_state[..., -1].clone(),
    )


@_operator_backward.register_fake
def _(
    grad_out: Tensor,
    grad_S: Tensor | None,
    grad_z: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    W: Tensor,
    keep: Tensor | None,
    log_gate: Tensor | None,
    S: Tensor | None,
    z: Tensor | None,
    c: Tensor | None,
    run: list[Tensor],
    feature_map: str,
    causal: bool,
    scale: float,
    chunk: int,
    with_projection: bool,
) -> tuple[Tensor, ...]:
    like = torch.empty_like
    nothing = W.new_empty
    return (
        q.new_empty(q.shape),
        k.new_empty(k.shape),
        v.new_empty(v.shape),
        like(W) if with_projection and MAPS[feature_map].needs_projection else nothing(0),
        nothing(0) if log_gate is None else log_gate.new_empty(log_gate.shape),
        nothing(0) if S is None else S.new_empty(S.shape),
        nothing(0) if z is None else z.new_empty(z.shape),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, W, keep, log_gate, S, z, c, _, feature_map, _, causal, scale, chunk, _ = inputs
    ctx.save_for_backward(q, k, v, W, keep, log_gate, S, z, c, *output)
    ctx.mark_non_differentiable(*output[3:])
    ctx.settings = feature_map, causal, scale, chunk


def _derivative(ctx: Any, grad_out: Tensor, grad_S: Tensor | None, grad_z: Tensor | None, *_: object) -> tuple[Tensor | None, ...]:
    q, k, v, W, keep, log_gate, S, z, c, *run = ctx.saved_tensors
    feature_map, causal, scale, chunk = ctx.settings
    found = _operator_backward(
        grad_out, grad_S, grad_z, q, k, v, W, keep, log_gate, S, z, c, run, feature_map, causal, scale, chunk, ctx.needs_input_grad[3]
    )
    by_q, by_k, by_v, by_W, by_gate, by_S, by_z = found
    given = (True, True, True, MAPS[feature_map].needs_projection, False, log_gate is not None, S is not None, S is not None)
    gradients = (by_q, by_k, by_v, by_W, None, by_gate, by_S, by_z)
    wanted = [grad if there and ctx.needs_input_grad[i] else None for i, (grad, there) in enumerate(zip(gradients, given, strict=True))]
    return (*wanted, *(None for _ in range(8)))


torch.library.register_autograd(_NAME, _derivative, setup_context=_setup_context)


def _refuse(*_: object) -> None:
    raise UnsupportedError("linear attention has first derivatives only: its backward pass cannot be differentiated again")


torch.library.register_autograd(f"{_NAME}_backward", _refuse)


def _has_tangent(*tensors: Tensor | None) -> bool:
    """Whether forward-mode differentiation is under way, which the operator would silently take as zero."""
    return forward_ad._current_level >= 0 and any(t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors)


def linear_attention(
    q_NGLd: Tensor,
    k_NLd: Tensor,
    v_NLD: Tensor,
    W: Tensor,
    *,
    feature_map: str,
    denominator: str = "plain",
    causal: bool,
    scale: float = 1.0,
    chunk_size: int = 128,
    keep_NL: Tensor | None = None,
    log_gate_NL: Tensor | None = None,
    state: tuple[Tensor, Tensor, Tensor | None, Tensor] | None = None,
    eps: float = 1e-3,
) -> Run:
    """Attention with features. Arguments are checked by the callers.

    Args:
        q_NGLd: queries; the G heads of a group share one key head.
        k_NLd: keys.
        v_NLD: values.
        W: random vectors ``(1, M, d)`` or ``(N, M, d)``, multiplied by the root of ``scale``, in the precision to work in.
        feature_map: a name of ``MAPS``.
        denominator: ``"plain"``, ``"safe"`` (at least ``eps`` times the weight of the keys seen, by size), ``"at_least"`` (``eps``), or
            ``"guard"`` (where it is below ``eps`` by size, twice ``eps`` is added).
        causal: query t sees keys up to t, and the state.
        scale: factor of the products of queries with keys.
        chunk_size: C.
        keep_NL: False for padding.
        log_gate_NL: log of the gate of each key, at most 0; needs ``causal``.
        state: S ``(N, R, D)``, z ``(N, R)``, c ``(N, R)`` (None for maps without stabiliser), n ``(N)`` of earlier keys.
        eps: for the denominator.

    Returns:
        Output in the dtype of the queries, the state after the keys, the denominators used and where they were replaced.
    """
    S, z, c, n = (None, None, None, None) if state is None else state
    if not torch.compiler.is_compiling() and _has_tangent(q_NGLd, k_NLd, v_NLD, W, log_gate_NL, S, z):
        raise UnsupportedError("linear attention has no forward-mode derivative; use reverse mode")
    settings = (feature_map, denominator, causal, scale, chunk_size, eps)
    if applies(q_NGLd, feature_map=feature_map, causal=causal):
        kernel = find_kernel()
        call = Call(q_NGLd, k_NLd, v_NLD, W, keep_NL, log_gate_NL, feature_map, causal, scale, chunk_size)
        if kernel is not None and agrees(kernel, _engine, call, denominator, eps):
            with full_precision(q_NGLd.device):
                return run_kernel(kernel, call, S, z, n, denominator, eps)
    return _engine(q_NGLd, k_NLd, v_NLD, W, keep_NL, log_gate_NL, S, z, c, n, *settings)


def _engine(*args: Any) -> Run:
    return Run(*_operator(*args))
