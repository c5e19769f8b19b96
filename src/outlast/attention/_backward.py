"""Gradients from the inputs and the denominators: features are made again, states are never rebuilt by subtracting."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from outlast.attention._chunks import NOTHING_SEEN, SCALE, Call, Gate, Plan
from outlast.attention._forward import Run, first_state

_OutputGradient = Callable[[int, int], tuple[Tensor, Tensor]]


class Gradients:
    """Where the backward pass writes."""

    def __init__(self, call: Call, with_projection: bool) -> None:
        self.q = torch.empty(call.q.shape, dtype=call.q.dtype, device=call.q.device)
        self.k = torch.empty(call.k.shape, dtype=call.k.dtype, device=call.k.device)
        self.v = torch.empty(call.v.shape, dtype=call.v.dtype, device=call.v.device)
        self.by_W = torch.zeros_like(call.W) if with_projection and call.map.needs_projection else None
        self.call = call
        self.log_gate: Tensor | None = None
        if call.log_gate is not None:
            # Gradients by cumulated log gates and by the weights 1 - g. The former are summed over the whole length: in double precision.
            self.log_gate = call.exactly(call.W.new_zeros(call.N, call.Lk))
            self.weight = torch.zeros(call.N, call.Lk, dtype=call.dtype, device=call.q.device)

    def add_projection(self, grad_p: Tensor | None, x: Tensor) -> None:
        if self.by_W is None or grad_p is None:
            return
        each = grad_p.mT @ x
        self.by_W += each.sum(0, keepdim=True) if len(self.by_W) == 1 else each

    def put_queries(self, start: int, end: int, grad_q: Tensor, weighted: Tensor, inverse: Tensor, q: Tensor) -> None:
        grad, grad_p = self.call.map.backward(grad_q, weighted, inverse, q, self.call.W, self.call.scale, query=True)
        self.q[:, :, start:end] = self.call.by_head(grad)
        self.add_projection(grad_p, q)

    def put_keys(self, start: int, end: int, grad_k: Tensor, weighted: Tensor, weight: Tensor | None, k: Tensor) -> None:
        grad, grad_p = self.call.map.backward(grad_k, weighted, weight, k, self.call.W, self.call.scale, query=False)
        self.k[:, start:end] = self.masked(grad, start, end)
        self.add_projection(grad_p if grad_p is None else self.masked(grad_p, start, end), k)

    def put_values(self, start: int, end: int, grad_v: Tensor) -> None:
        self.v[:, start:end] = self.masked(grad_v[..., : self.call.D], start, end)

    def finish_gate(self, final_N: Tensor) -> None:
        """From gradients by cumulated log gates to gradients by log gates: each is part of all later sums, the last of the final state."""
        if self.log_gate is None or self.call.log_gate is None:
            return
        self.log_gate[:, -1:] += final_N[:, None]
        grad = self.log_gate.flip(-1).cumsum(-1).flip(-1).to(self.call.dtype)
        grad -= self.weight * self.call.log_gate.to(self.call.dtype).exp()
        keep = self.call.keep
        self.log_gate = (grad if keep is None else grad.masked_fill_(~keep, 0.0)).to(self.call.log_gate.dtype)

    def masked(self, grad: Tensor, start: int, end: int) -> Tensor:
        keep = self.call.keep
        return grad if keep is None else grad.masked_fill(~keep[:, start:end, None], 0.0)


def backward(
    call: Call,
    grad_out: Tensor,
    grad_S: Tensor | None,
    grad_z: Tensor | None,
    S_NRD: Tensor | None,
    z_NR: Tensor | None,
    c_NR: Tensor | None,
    run: Run,
    with_projection: bool,
) -> tuple[Gradients, Tensor]:
    grads = Gradients(call, with_projection)
    D = call.D
    # A row that sees no key has den 0 and gives no gradient; a visible row whose denominator is 0 is NaN in the output already.
    inverse_NGL = torch.where(run.den_NGL == 0.0, 0.0, 1.0 / run.den_NGL)

    def output_gradient(start: int, end: int) -> tuple[Tensor, Tensor]:
        """Gradient by numerator and denominator, both in units of the denominator, and 1 / denominator."""
        g = grad_out[:, :, start:end].to(call.dtype)
        by_den = -(g * run.out_NGLD[:, :, start:end].to(call.dtype)).sum(-1)
        by_den = by_den.masked_fill_(run.clamped_NGL[:, :, start:end], 0.0)
        both = torch.cat([g, by_den[..., None]], -1)
        return both.flatten(1, 2), inverse_NGL[:, :, start:end].flatten(1, 2)[..., None]

    grad_state = torch.zeros(call.N, call.R, D + 1, dtype=call.dtype, device=call.q.device)
    if grad_S is not None:
        grad_state[..., :D] = grad_S
    if grad_z is not None:
        grad_state[..., D] = grad_z
    if call.causal:
        final = (grad_state[..., :D] * run.S_NRD).sum((-1, -2)) + (grad_state[..., D] * run.z_NR).sum(-1)
        if call.headroom:
            grad_state /= SCALE
        edges = [*run.starts_L.nonzero().flatten().tolist(), call.Lq]
        plan = list(pairwise(edges))
        cs = _sweep_queries(call, plan, grads, output_gradient, first_state(call, S_NRD, z_NR), c_NR)
        _sweep_keys(call, plan, grads, output_gradient, grad_state, cs)
        grads.finish_gate(final)
        if call.headroom:
            grad_state *= SCALE
        return grads, grad_state
    state = torch.cat([run.S_NRD, run.z_NR[..., None]], -1)
    for start, end in call.spans(call.Lq):
        g, inverse = output_gradient(start, end)
        q = call.queries(start, end)
        weighted = call.query_features(q, run.c_NR) * inverse
        grads.put_queries(start, end, g @ state.mT, weighted, inverse, q)
        grad_state.baddbmm_(weighted.mT, g)
    for start, end in call.spans(call.Lk):
        k, v = call.keys(start, end), call.values(start, end)
        value, log = call.raw_keys(k, start, end)
        features = call.key_features(value, log, run.c_NR)
        grads.put_keys(start, end, v @ grad_state.mT, features, None, k)
        grads.put_values(start, end, features @ grad_state)
    if call.map.log_keys and c_NR is not None:
        grad_state *= (c_NR - run.c_NR).exp_()[..., None]
    return grads, grad_state


def _sweep_queries(
    call: Call, plan: Plan, grads: Gradients, output_gradient: _OutputGradient, state: Tensor, c_NR: Tensor | None
) -> list[Tensor]:
    """Forwards with the state: gradients of the queries. Returns the stabiliser before the first chunk and after each."""
    c = call.W.new_full((call.N, call.R), NOTHING_SEEN) if c_NR is None else c_NR
    cs = [c]
    for start, end in plan:
        gate = Gate.of(call, start, end)
        v = call.values(start, end)
        value, log = call.raw_keys(call.keys(start, end), start, end)
        if log is not None:
            raised = torch.maximum(c, log.amax(1))
            state *= (c - raised).exp_()[..., None]
            c = raised
        cs.append(c)
        k = call.key_features(value, log, c)
        g, inverse = output_gradient(start, end)
        q = call.queries(start, end)
        weighted = call.query_features(q, c).mul_(inverse)
        grad_A = g @ v.mT
        by_state = g @ state.mT
        if gate is None:
            grad_q = by_state.baddbmm_(call.mask_causally(grad_A, gate), k)
        else:
            k = k * gate.weight_NC1
            grad_q = by_state.mul_(gate.from_start_NK1).baddbmm_(call.mask_causally(grad_A, gate), k)
            assert grads.log_gate is not None
            grads.log_gate[:, start:end] += call.by_head((weighted * grad_q).sum(-1, keepdim=True)).sum((1, 3))
            state *= gate.whole_N11
            k = k * gate.to_end_NC1
        grads.put_queries(start, end, grad_q, weighted, inverse, q)
        state.baddbmm_(k.mT, v)
    return cs


def _sweep_keys(
    call: Call,
    plan: Plan,
    grads: Gradients,
    output_gradient: _OutputGradient,
    grad_state: Tensor,
    cs: list[Tensor],
) -> None:
    """Backwards with the gradient of the state, which ends as that of the first state: gradients of keys and values."""
    for index, (start, end) in reversed(list(enumerate(plan))):
        gate = Gate.of(call, start, end)
        before, c = cs[index], cs[index + 1]
        k, v = call.keys(start, end), call.values(start, end)
        value, log = call.raw_keys(k, start, end)
        features = call.key_features(value, log, c)
        g, inverse = output_gradient(start, end)
        weighted = call.query_features(call.queries(start, end), c).mul_(inverse)
        weight = None if gate is None else gate.weight_NC1
        gated = features if weight is None else features * weight
        A = call.mask_causally(weighted @ gated.mT, gate)
        grad_A = call.mask_causally(g @ v.mT, gate)
        grad_k = v @ grad_state.mT
        if gate is not None:
            grad_k *= gate.to_end_NC1
        grad_v = (A.mT @ g).baddbmm_(gated if gate is None else gated * gate.to_end_NC1, grad_state)
        grad_k.baddbmm_(grad_A.mT, weighted)
        if gate is not None:
            assert grads.log_gate is not None
            grads.log_gate[:, start:end] -= (gated * grad_k).sum(-1)
            grads.weight[:, start:end] = (features * grad_k).sum(-1)
            grad_state *= gate.whole_N11
            weighted = weighted * gate.from_start_NK1
        grads.put_keys(start, end, grad_k, gated, weight, k)
        grads.put_values(start, end, grad_v)
        grad_state.baddbmm_(weighted.mT, g)
        if call.map.log_keys:
            grad_state *= (before - c).exp_()[..., None]
