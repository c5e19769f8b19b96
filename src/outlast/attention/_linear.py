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
:data:`LARGEST_RISE`, the chunk is cut into smaller ones, at the end into single rows, which are always exact.

The two passes are operators of torch (``torch.library``), so ``torch.compile`` takes each as one node whatever the length.

Names of dimensions: B batch, H key heads, N = B H, G queries heads to a key head, L length, C chunk, d head size, D size of values, E = D
+ 1, M random vectors, R features.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from outlast.attention._maps import MAPS, FeatureMap

HEADROOM = 36 * math.log(2.0)
"""Causal features are scaled by 2^36, which leaves that much more room below. A power of two, so that scaling the state is exact."""
LARGEST_RISE = 90.0
"""Nats by which the logarithm of a feature may rise inside a chunk: with the headroom, what counts stays above float32's smallest
number."""
_SCALE = 2.0**36
_CLOSED = -1e4  # log of a gate of 0: differences of infinities would be NaN
NOTHING_SEEN = -1e30  # stands for -inf, whose differences would be NaN


class Run(NamedTuple):
    """What the operator returns."""

    out_NGLD: Tensor
    S_NRD: Tensor
    z_NR: Tensor
    c_NR: Tensor
    n_N: Tensor
    den_NGL: Tensor
    clamped_NGL: Tensor
    starts_L: Tensor  # on the CPU: where the chunks of a causal call begin


class _Call:
    """One call's constant parts, and the chunks of its inputs in working precision."""

    def __init__(
        self,
        q_NGLd: Tensor,
        k_NLd: Tensor,
        v_NLD: Tensor,
        W: Tensor,
        keep_NL: Tensor | None,
        log_gate_NL: Tensor | None,
        feature_map: str,
        causal: bool,
        scale: float,
        chunk: int,
    ) -> None:
        self.q, self.k, self.v, self.keep, self.log_gate = q_NGLd, k_NLd, v_NLD, keep_NL, log_gate_NL
        self.W = W
        self.map: type[FeatureMap] = MAPS[feature_map]
        self.causal, self.scale, self.chunk = causal, scale, chunk
        self.N, self.G, self.Lq, self.d = q_NGLd.shape
        self.Lk, self.D = v_NLD.shape[1:]
        self.dtype = W.dtype
        self.R = self.map.num_features(W.shape[-2], self.d)
        self.headroom = HEADROOM if causal and self.map.log_keys else 0.0

    def spans(self, length: int) -> list[tuple[int, int]]:
        """Starts and ends of chunks of equal size."""
        return [(start, min(start + self.chunk, length)) for start in range(0, length, self.chunk)]

    def rise(self, before_NR: Tensor, after_NR: Tensor, log_NCR: Tensor, start: int, end: int) -> Tensor:
        """How far a chunk raises the stabiliser above what its first row sees: the room that the chunk needs."""
        first = log_NCR[:, 0]
        if self.keep is not None:  # the first row that sees anything
            index = self.keep[:, start:end].to(torch.uint8).argmax(1)
            first = log_NCR[torch.arange(self.N, device=index.device), index]
        return (after_NR - torch.maximum(before_NR, first)).amax()

    def queries(self, start: int, end: int) -> Tensor:
        """Rows of queries, the heads of a group one after another, ``(N, G C, d)``."""
        return self.q[:, :, start:end].to(self.dtype).reshape(self.N, -1, self.d)

    def keys(self, start: int, end: int) -> Tensor:
        """Rows of keys; padding is zero, whatever it holds."""
        k = self.k[:, start:end].to(self.dtype)
        return k if self.keep is None else k.masked_fill(~self.keep[:, start:end, None], 0.0)

    def values(self, start: int, end: int) -> Tensor:
        """Values with a column of ones, ``(N, C, E)``; rows of padding are zero, the one included."""
        v = self.v.new_empty(self.N, end - start, self.D + 1, dtype=self.dtype)
        v[..., : self.D] = self.v[:, start:end]
        v[..., self.D] = 1.0
        return v if self.keep is None else v.masked_fill_(~self.keep[:, start:end, None], 0.0)

    def raw_keys(self, k_NCd: Tensor, start: int, end: int) -> tuple[Tensor | None, Tensor | None]:
        """Value and logarithm of the keys' features; the logarithm of padding is -inf."""
        value, log = self.map.features(k_NCd, self.W, self.scale, query=False)
        if log is not None and self.keep is not None:
            log.masked_fill_(~self.keep[:, start:end, None], -math.inf)
        return value, log

    def raised(self, c_NR: Tensor, log_NCR: Tensor | None) -> Tensor:
        """The stabiliser after a chunk."""
        return c_NR if log_NCR is None else torch.maximum(c_NR, log_NCR.amax(1))

    def key_features(self, value: Tensor | None, log: Tensor | None, c_NR: Tensor) -> Tensor:
        """Features of keys under a stabiliser. May use the storage of its arguments."""
        if log is None:
            assert value is not None
            return value
        reference = c_NR[:, None, :1] if self.map.shared_log else c_NR[:, None]
        weight = log.sub_(reference - self.headroom).exp_()
        return weight if value is None else value.mul_(weight)

    def query_features(self, q_NKd: Tensor, c_NR: Tensor) -> Tensor:
        """Features of queries that match keys under the same stabiliser; the largest of a row is 2^36 (causal) or 1."""
        value, log = self.map.features(q_NKd, self.W, self.scale, query=True)
        if log is None:
            assert value is not None
            return value
        log += c_NR[:, None]
        return log.sub_(log.amax(-1, keepdim=True) - self.headroom).exp_()

    def by_head(self, rows_NKX: Tensor) -> Tensor:
        """``(N, G C, X)`` as ``(N, G, C, X)``."""
        return rows_NKX.view(self.N, self.G, -1, rows_NKX.shape[-1])

    def weigh(self, A_NKC: Tensor, gate: _Gate | None) -> Tensor:
        """Sets what a causal query must not see to zero and applies the decay, in place."""
        if gate is None:
            self.by_head(A_NKC).tril_()
        else:
            A_NKC.mul_(gate.decay_NKC)
        return A_NKC


class _Gate(NamedTuple):
    """Decay inside a chunk, from cumulated log gates."""

    decay_NKC: Tensor  # exp(b_i - b_j) for j <= i, else 0; the rows of a group one after another
    from_start_NK1: Tensor  # exp(b_i)
    to_end_NC1: Tensor  # exp(b_last - b_j)
    whole_N11: Tensor  # exp(b_last)
    weight_NC1: Tensor  # 1 - g, zero for padding
    total_NC: Tensor  # b, in double precision

    @staticmethod
    def of(call: _Call, start: int, end: int) -> _Gate | None:
        if call.log_gate is None:
            return None
        log_gate = call.log_gate[:, start:end].to(call.dtype)
        weight = -torch.expm1(log_gate)
        log_gate = log_gate.clamp_min(_CLOSED)
        if call.keep is not None:  # padding is a step that does not happen
            hidden = ~call.keep[:, start:end]
            log_gate, weight = log_gate.masked_fill(hidden, 0.0), weight.masked_fill(hidden, 0.0)
        # Double: a small step after large ones would vanish in their float32 sum, and only differences matter.
        exact = torch.float64 if log_gate.device.type != "mps" else call.dtype
        b = log_gate.to(exact).cumsum(-1)
        difference = b[:, :, None] - b[:, None, :]
        above = torch.ones(difference.shape[-2:], dtype=torch.bool, device=b.device).triu_(1)
        # Masked before the exponential: every exponent that remains is at most 0.
        decay = difference.to(call.dtype).masked_fill_(above, -math.inf).exp_()
        return _Gate(
            decay.repeat(1, call.G, 1),
            b.exp().to(call.dtype).repeat(1, call.G)[..., None],
            (b[:, -1:] - b).exp().to(call.dtype)[..., None],
            b[:, -1:, None].exp().to(call.dtype),
            weight[..., None],
            b,
        )


def _seen(call: _Call, n_N: Tensor, start: int, end: int, gate: _Gate | None) -> Tensor:
    """Weight of the keys that each row of a causal chunk sees, ``(N, C)``; the last column is the state's."""
    if gate is not None:
        return (1.0 - gate.total_NC.exp() * (1.0 - n_N.to(gate.total_NC.dtype)[:, None])).to(call.dtype)
    if call.keep is None:
        return n_N[:, None] + torch.arange(1, end - start + 1, device=n_N.device, dtype=call.dtype)
    return n_N[:, None] + call.keep[:, start:end].to(call.dtype).cumsum(-1)


def _divide(a: Tensor, seen: Tensor, denominator: str, eps: float) -> tuple[Tensor, Tensor]:
    """The denominator to divide by, and where it was replaced. Rows that see nothing get 0, which stands for "no output"."""
    if denominator == "plain":
        den, clamped = a, torch.zeros_like(a, dtype=torch.bool)
    elif denominator == "safe":
        limit = eps * seen
        clamped = a.abs() <= limit
        den = torch.where(clamped, torch.where(a < 0.0, -limit, limit), a)
    elif denominator == "at_least":
        clamped = a < eps
        den = a.clamp_min(eps)
    else:
        clamped = torch.zeros_like(a, dtype=torch.bool)
        den = torch.where(a.abs() <= eps, a + 2.0 * eps, a)
    return torch.where(seen > 0.0, den, 0.0), clamped


def _inverse(den: Tensor, seen_something: Tensor) -> Tensor:
    """1 / den; rows that see no key get 0. A visible row whose denominator is 0 has left the range and becomes infinite, then NaN."""
    return torch.where(seen_something, 1.0 / den, 0.0)


class _Outputs:
    """Where the forward pass writes."""

    def __init__(self, call: _Call, denominator: str, eps: float) -> None:
        shape = call.N, call.G, call.Lq
        self.call, self.denominator, self.eps = call, denominator, eps
        self.out = call.q.new_empty(*shape, call.D)
        self.den = call.W.new_empty(shape)
        self.clamped = call.W.new_empty(shape, dtype=torch.bool)

    def put(self, start: int, end: int, o_NKE: Tensor, seen_NC: Tensor) -> None:
        o = self.call.by_head(o_NKE)
        seen = seen_NC[:, None].expand(o.shape[:-1])
        den, self.clamped[:, :, start:end] = _divide(o[..., -1], seen, self.denominator, self.eps)
        self.den[:, :, start:end] = den
        self.out[:, :, start:end] = o[..., :-1] * _inverse(den, seen > 0.0)[..., None]


def _forward(
    call: _Call, S_NRD: Tensor | None, z_NR: Tensor | None, c_NR: Tensor | None, n_N: Tensor | None, denominator: str, eps: float
) -> Run:
    c = call.W.new_full((call.N, call.R), NOTHING_SEEN) if c_NR is None else c_NR.clone()
    n = call.W.new_zeros(call.N) if n_N is None else n_N.clone()
    outputs = _Outputs(call, denominator, eps)
    plan = call.spans(call.Lq)
    if call.causal:
        while True:
            state, after, seen, rises = _forward_causal(call, plan, outputs, _start(call, S_NRD, z_NR), c, n)
            finer = _finer(plan, rises)
            if finer == plan:
                break
            plan = finer
        c, n = after, seen
    else:
        state, c = _summarise(call, _start(call, S_NRD, z_NR), c)
        n = n + (call.Lk if call.keep is None else call.keep.sum(-1).to(call.dtype))
        for start, end in plan:
            q = call.query_features(call.queries(start, end), c)
            outputs.put(start, end, q @ state, n[:, None].expand(-1, end - start))
    if call.headroom:
        state /= _SCALE
    starts = torch.zeros(call.Lq, dtype=torch.bool)
    starts[[start for start, _ in plan]] = True
    return Run(outputs.out, state[..., :-1].clone(), state[..., -1].clone(), c, n.clone(), outputs.den, outputs.clamped, starts)


def _forward_causal(
    call: _Call, plan: list[tuple[int, int]], outputs: _Outputs, state: Tensor, c: Tensor, n: Tensor
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """State, stabiliser and weight of the keys after all chunks, and the rise of each chunk."""
    rises: list[Tensor] = []
    for start, end in plan:
        gate = _Gate.of(call, start, end)
        v = call.values(start, end)
        value, log = call.raw_keys(call.keys(start, end), start, end)
        raised = call.raised(c, log)
        if log is not None:
            rises.append(call.rise(c, raised, log, start, end))
            state *= (c - raised).exp_()[..., None]
            c = raised
        k = call.key_features(value, log, c)
        q = call.query_features(call.queries(start, end), c)
        if gate is not None:
            k = k * gate.weight_NC1
        A = call.weigh(q @ k.mT, gate)
        seen = _seen(call, n, start, end, gate)
        n = seen[:, -1]
        outputs.put(start, end, (A @ v).baddbmm_(q if gate is None else q * gate.from_start_NK1, state), seen)
        if gate is not None:
            state *= gate.whole_N11
            k = k * gate.to_end_NC1
        state.baddbmm_(k.mT, v)
    return state, c, n, rises


def _finer(plan: list[tuple[int, int]], rises: list[Tensor]) -> list[tuple[int, int]]:
    """The plan with chunks that rise too far cut into eight."""
    if not rises:
        return plan
    finer: list[tuple[int, int]] = []
    for (start, end), rise in zip(plan, torch.stack(rises).tolist(), strict=True):
        size = end - start if rise <= LARGEST_RISE or rise != rise else -(-(end - start) // 8)  # NaN stays NaN in any plan
        finer.extend((at, min(at + size, end)) for at in range(start, end, size))
    return finer


def _start(call: _Call, S_NRD: Tensor | None, z_NR: Tensor | None) -> Tensor:
    """The state with its column for the denominator, ``(N, R, E)``, in the scale of the loop."""
    if S_NRD is None or z_NR is None:
        return torch.zeros(call.N, call.R, call.D + 1, dtype=call.dtype, device=call.q.device)
    state = torch.cat([S_NRD, z_NR[..., None]], -1)
    return state * _SCALE if call.headroom else state


def _summarise(call: _Call, state_NRE: Tensor, c_NR: Tensor) -> tuple[Tensor, Tensor]:
    """State and stabiliser after all keys, not causal and without a gate."""
    for start, end in call.spans(call.Lk):
        value, log = call.raw_keys(call.keys(start, end), start, end)
        raised = call.raised(c_NR, log)
        if log is not None:
            state_NRE *= (c_NR - raised).exp_()[..., None]
            c_NR = raised
        state_NRE.baddbmm_(call.key_features(value, log, c_NR).mT, call.values(start, end))
    return state_NRE, c_NR


_OutputGradient = Callable[[int, int], tuple[Tensor, Tensor]]


class _Gradients:
    """Where the backward pass writes."""

    def __init__(self, call: _Call, with_projection: bool) -> None:
        self.q = torch.empty(call.q.shape, dtype=call.q.dtype, device=call.q.device)
        self.k = torch.empty(call.k.shape, dtype=call.k.dtype, device=call.k.device)
        self.v = torch.empty(call.v.shape, dtype=call.v.dtype, device=call.v.device)
        self.by_W = torch.zeros_like(call.W) if with_projection and call.map.needs_projection else None
        self.call = call
        self.log_gate: Tensor | None = None
        if call.log_gate is not None:
            # Gradients by cumulated log gates and by the weights 1 - g. The former are summed over the whole length: in double precision.
            exact = torch.float64 if call.q.device.type != "mps" else call.dtype
            self.log_gate = torch.zeros(call.N, call.Lk, dtype=exact, device=call.q.device)
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


def _backward(
    call: _Call,
    grad_out: Tensor,
    grad_S: Tensor | None,
    grad_z: Tensor | None,
    S_NRD: Tensor | None,
    z_NR: Tensor | None,
    c_NR: Tensor | None,
    run: Run,
    with_projection: bool,
) -> tuple[_Gradients, Tensor]:
    grads = _Gradients(call, with_projection)
    D = call.D
    # A row that sees no key has den 0 and gives no gradient; a visible row whose denominator is 0 is NaN in the output already.
    inverse_NGL = torch.where(run.den_NGL == 0.0, 0.0, 1.0 / run.den_NGL)

    def output_gradient(start: int, end: int) -> tuple[Tensor, Tensor]:
        """Gradient by numerator and denominator, both in units of the denominator, and 1 / denominator."""
        g = grad_out[:, :, start:end].to(call.dtype)
        by_den = -(g * run.out_NGLD[:, :, start:end].to(call.dtype)).sum(-1)
        by_den = by_den.masked_fill_(run.clamped_NGL[:, :, start:end], 0.0)
        both = torch.cat([g, by_den[..., None]], -1)
        return both.reshape(call.N, -1, D + 1), inverse_NGL[:, :, start:end].reshape(call.N, -1, 1)

    grad_state = torch.zeros(call.N, call.R, D + 1, dtype=call.dtype, device=call.q.device)
    if grad_S is not None:
        grad_state[..., :D] = grad_S
    if grad_z is not None:
        grad_state[..., D] = grad_z
    if call.causal:
        final = (grad_state[..., :D] * run.S_NRD).sum((-1, -2)) + (grad_state[..., D] * run.z_NR).sum(-1)
        if call.headroom:
            grad_state /= _SCALE
        edges = [*run.starts_L.nonzero().flatten().tolist(), call.Lq]
        plan = list(pairwise(edges))
        cs = _sweep_queries(call, plan, grads, output_gradient, _start(call, S_NRD, z_NR), c_NR)
        _sweep_keys(call, plan, grads, output_gradient, grad_state, cs)
        grads.finish_gate(final)
        if call.headroom:
            grad_state *= _SCALE
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
    call: _Call, plan: list[tuple[int, int]], grads: _Gradients, output_gradient: _OutputGradient, state: Tensor, c_NR: Tensor | None
) -> list[Tensor]:
    """Forwards with the state: gradients of the queries. Returns the stabiliser before the first chunk and after each."""
    c = call.W.new_full((call.N, call.R), NOTHING_SEEN) if c_NR is None else c_NR
    cs = [c]
    for start, end in plan:
        gate = _Gate.of(call, start, end)
        v = call.values(start, end)
        value, log = call.raw_keys(call.keys(start, end), start, end)
        raised = call.raised(c, log)
        if log is not None:
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
            grad_q = by_state.baddbmm_(call.weigh(grad_A, gate), k)
        else:
            k = k * gate.weight_NC1
            grad_q = by_state.mul_(gate.from_start_NK1).baddbmm_(call.weigh(grad_A, gate), k)
            assert grads.log_gate is not None
            grads.log_gate[:, start:end] += call.by_head((weighted * grad_q).sum(-1, keepdim=True)).sum((1, 3))
            state *= gate.whole_N11
            k = k * gate.to_end_NC1
        grads.put_queries(start, end, grad_q, weighted, inverse, q)
        state.baddbmm_(k.mT, v)
    return cs


def _sweep_keys(
    call: _Call,
    plan: list[tuple[int, int]],
    grads: _Gradients,
    output_gradient: _OutputGradient,
    grad_state: Tensor,
    cs: list[Tensor],
) -> None:
    """Backwards with the gradient of the state, which ends as that of the first state: gradients of keys and values."""
    for index, (start, end) in reversed(list(enumerate(plan))):
        gate = _Gate.of(call, start, end)
        before, c = cs[index], cs[index + 1]
        k, v = call.keys(start, end), call.values(start, end)
        value, log = call.raw_keys(k, start, end)
        features = call.key_features(value, log, c)
        g, inverse = output_gradient(start, end)
        weighted = call.query_features(call.queries(start, end), c).mul_(inverse)
        weight = None if gate is None else gate.weight_NC1
        gated = features if weight is None else features * weight
        A = call.weigh(weighted @ gated.mT, gate)
        grad_A = call.weigh(g @ v.mT, gate)
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


_NAME = "outlast::linear_attention"


def _call_of(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    W: Tensor,
    keep: Tensor | None,
    log_gate: Tensor | None,
    form: str,
    causal: bool,
    scale: float,
    chunk: int,
) -> tuple[_Call, str]:
    feature_map, denominator = form.split("/")
    return _Call(q, k, v, W, keep, log_gate, feature_map, causal, scale, chunk), denominator


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
    form: str,
    causal: bool,
    scale: float,
    chunk: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    call, denominator = _call_of(q, k, v, W, keep, log_gate, form, causal, scale, chunk)
    with torch.autocast(q.device.type, enabled=False):
        run = _forward(call, S, z, c, n, denominator, eps)
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
    form: str,
    causal: bool,
    scale: float,
    chunk: int,
    eps: float,
) -> tuple[Tensor, ...]:
    N, G, Lq, d = q.shape
    D = v.shape[-1]
    R = MAPS[form.split("/")[0]].num_features(W.shape[-2], d)
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
    form: str,
    causal: bool,
    scale: float,
    chunk: int,
    with_projection: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    call, _ = _call_of(q, k, v, W, keep, log_gate, form, causal, scale, chunk)
    with torch.autocast(q.device.type, enabled=False):
        grads, grad_state = _backward(call, grad_out, grad_S, grad_z, S, z, c, Run(*run), with_projection)
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
    form: str,
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
        like(W) if with_projection and MAPS[form.split("/")[0]].needs_projection else nothing(0),
        nothing(0) if log_gate is None else log_gate.new_empty(log_gate.shape),
        nothing(0) if S is None else S.new_empty(S.shape),
        nothing(0) if z is None else z.new_empty(z.shape),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, W, keep, log_gate, S, z, c, _, form, causal, scale, chunk, _ = inputs
    ctx.save_for_backward(q, k, v, W, keep, log_gate, S, z, c, *output)
    ctx.mark_non_differentiable(*output[3:])
    ctx.settings = form, causal, scale, chunk


def _derivative(ctx: Any, grad_out: Tensor, grad_S: Tensor | None, grad_z: Tensor | None, *_: object) -> tuple[Tensor | None, ...]:
    q, k, v, W, keep, log_gate, S, z, c, *run = ctx.saved_tensors
    form, causal, scale, chunk = ctx.settings
    found = _operator_backward(
        grad_out, grad_S, grad_z, q, k, v, W, keep, log_gate, S, z, c, run, form, causal, scale, chunk, ctx.needs_input_grad[3]
    )
    by_q, by_k, by_v, by_W, by_gate, by_S, by_z = found
    given = (True, True, True, MAPS[form.split("/")[0]].needs_projection, False, log_gate is not None, S is not None, S is not None)
    gradients = (by_q, by_k, by_v, by_W, None, by_gate, by_S, by_z)
    wanted = [grad if there and ctx.needs_input_grad[i] else None for i, (grad, there) in enumerate(zip(gradients, given, strict=True))]
    return (*wanted, *(None for _ in range(7)))


torch.library.register_autograd(_NAME, _derivative, setup_context=_setup_context)


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
    form = f"{feature_map}/{denominator}"
    return Run(*_operator(q_NGLd, k_NLd, v_NLD, W, keep_NL, log_gate_NL, S, z, c, n, form, causal, scale, chunk_size, eps))
