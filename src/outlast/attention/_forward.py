"""Output, state and denominators, chunk by chunk."""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

import torch
from torch import Tensor

from outlast.attention._chunks import LARGEST_RISE, NOTHING_SEEN, SCALE, Call, Gate, Plan


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


def divide(a: Tensor, seen: Tensor, denominator: str, eps: float) -> tuple[Tensor, Tensor]:
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


def inverse(den: Tensor, seen_something: Tensor) -> Tensor:
    """1 / den; rows that see no key get 0. A visible row whose denominator is 0 has left the range and becomes infinite, then NaN."""
    return torch.where(seen_something, 1.0 / den, 0.0)


class _Outputs:
    """Where the forward pass writes."""

    def __init__(self, call: Call, denominator: str, eps: float) -> None:
        shape = call.N, call.G, call.Lq
        self.call, self.denominator, self.eps = call, denominator, eps
        self.out = call.q.new_empty(*shape, call.D)
        self.den = call.W.new_empty(shape)
        self.clamped = call.W.new_empty(shape, dtype=torch.bool)

    def put(self, start: int, end: int, o_NKE: Tensor, seen_NC: Tensor) -> None:
        o = self.call.by_head(o_NKE)
        seen = seen_NC[:, None].expand(o.shape[:-1])
        den, self.clamped[:, :, start:end] = divide(o[..., -1], seen, self.denominator, self.eps)
        self.den[:, :, start:end] = den
        self.out[:, :, start:end] = o[..., :-1] * inverse(den, seen > 0.0)[..., None]


def forward(
    call: Call, S_NRD: Tensor | None, z_NR: Tensor | None, c_NR: Tensor | None, n_N: Tensor | None, denominator: str, eps: float
) -> Run:
    c = call.W.new_full((call.N, call.R), NOTHING_SEEN) if c_NR is None else c_NR.clone()
    n = call.W.new_zeros(call.N) if n_N is None else n_N.clone()
    outputs = _Outputs(call, denominator, eps)
    plan = call.spans(call.Lq)
    if call.causal:
        while True:
            start = first_state(call, S_NRD, z_NR), c, n
            state, after, seen, done, rises = _forward_causal(call, plan, outputs, *start)
            plan = _finer(done, rises)
            if plan == done:
                break
        c, n = after, seen
    else:
        state, c = _summarise(call, first_state(call, S_NRD, z_NR), c)
        n = n + (call.Lk if call.keep is None else call.keep.sum(-1).to(call.dtype))
        for start, end in plan:
            q = call.query_features(call.queries(start, end), c)
            outputs.put(start, end, q @ state, n[:, None].expand(-1, end - start))
    if call.headroom:
        state /= SCALE
    starts = torch.zeros(call.Lq, dtype=torch.bool, device="cpu")
    starts[[start for start, _ in plan]] = True
    return Run(outputs.out, state[..., :-1].clone(), state[..., -1].clone(), c, n.clone(), outputs.den, outputs.clamped, starts)


def _forward_causal(
    call: Call, plan: Plan, outputs: _Outputs, state: Tensor, c: Tensor, n: Tensor
) -> tuple[Tensor, Tensor, Tensor, Plan, list[Tensor]]:
    """State, stabiliser and weight of the keys after all chunks, the chunks taken, and the rise of each where it was not looked at yet."""
    rises: list[Tensor] = []
    done: Plan = []
    pending = deque(plan)
    looks = state.device.type == "cpu"  # reading a number from another device would stop it at every chunk
    while pending:
        start, end = pending.popleft()
        value, log = call.raw_keys(call.keys(start, end), start, end)
        if log is not None:
            raised = torch.maximum(c, log.amax(1))
            rise = call.rise(c, raised, log, start, end)
            if not looks:
                rises.append(rise)
            elif float(rise) > LARGEST_RISE and end - start > 1:
                pending.extendleft(reversed(_cut(start, end, 4)))
                continue
            state *= (c - raised).exp_()[..., None]
            c = raised
        done.append((start, end))
        gate = Gate.of(call, start, end)
        v = call.values(start, end)
        k = call.key_features(value, log, c)
        q = call.query_features(call.queries(start, end), c)
        if gate is not None:
            k = k * gate.weight_NC1
        A = call.mask_causally(q @ k.mT, gate)
        seen = call.seen(n, start, end, None if gate is None else gate.total_NC)
        n = seen[:, -1]
        outputs.put(start, end, (A @ v).baddbmm_(q if gate is None else q * gate.from_start_NK1, state), seen)
        if gate is not None:
            state *= gate.whole_N11
            k = k * gate.to_end_NC1
        state.baddbmm_(k.mT, v)
    return state, c, n, done, rises


def _cut(start: int, end: int, parts: int) -> Plan:
    size = -(-(end - start) // parts)
    return [(at, min(at + size, end)) for at in range(start, end, size)]


def _finer(plan: Plan, rises: list[Tensor]) -> Plan:
    """The plan with chunks that rise too far cut into eight; NaN stays NaN in any plan."""
    if not rises:
        return plan
    finer: Plan = []
    for (start, end), rise in zip(plan, torch.stack(rises).tolist(), strict=True):
        finer.extend(_cut(start, end, 8) if rise > LARGEST_RISE else [(start, end)])
    return finer


def first_state(call: Call, S_NRD: Tensor | None, z_NR: Tensor | None) -> Tensor:
    """The state with its column for the denominator, ``(N, R, E)``, in the scale of the loop."""
    if S_NRD is None or z_NR is None:
        return torch.zeros(call.N, call.R, call.D + 1, dtype=call.dtype, device=call.q.device)
    state = torch.cat([S_NRD, z_NR[..., None]], -1)
    return state * SCALE if call.headroom else state


def _summarise(call: Call, state_NRE: Tensor, c_NR: Tensor) -> tuple[Tensor, Tensor]:
    """State and stabiliser after all keys, not causal and without a gate."""
    for start, end in call.spans(call.Lk):
        value, log = call.raw_keys(call.keys(start, end), start, end)
        if log is not None:
            raised = torch.maximum(c_NR, log.amax(1))
            state_NRE *= (c_NR - raised).exp_()[..., None]
            c_NR = raised
        state_NRE.baddbmm_(call.key_features(value, log, c_NR).mT, call.values(start, end))
    return state_NRE, c_NR
