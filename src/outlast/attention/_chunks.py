"""What forward and backward pass share: the chunks of a call's inputs, their features under the stabiliser, the gate inside a chunk."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from outlast.attention._maps import MAPS, FeatureMap

HEADROOM = 36 * math.log(2.0)
"""Causal features are scaled by 2^36, which leaves that much more room below. A power of two, so that scaling the state is exact."""
SCALE = 2.0**36
LARGEST_RISE = 75.0
"""Nats by which the logarithm of a feature may rise inside a chunk. Below, products of features of a query and a visible key must stay
normal in float32: they lie above exp(50 - 75) times the share that counts. Above, products with keys that a mask will hide, divided by the
denominator, reach exp(75) and must stay finite."""
NOTHING_SEEN = -1e30  # stands for -inf, whose differences would be NaN
_CLOSED = -1e4  # log of a gate of 0: likewise

Plan = list[tuple[int, int]]  # starts and ends of chunks


class Call:
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
        """How far a chunk raises the stabiliser above what its first row that sees anything sees: the room that the chunk needs."""
        if not self.N:
            return after_NR.new_zeros(())
        visible = torch.maximum(before_NR, log_NCR[:, 0])
        if self.keep is not None:
            # Where neither the state nor the first row holds a key, rows see nothing up to the first one that is kept.
            first = self.keep[:, start:end].to(torch.uint8).argmax(1)
            later = log_NCR[torch.arange(self.N, device=first.device), first]
            visible = torch.where(visible > 0.5 * NOTHING_SEEN, visible, later)
        return (after_NR - visible).amax()

    def queries(self, start: int, end: int) -> Tensor:
        """Rows of queries, the heads of a group one after another, ``(N, G C, d)``."""
        return self.q[:, :, start:end].to(self.dtype).reshape(self.N, self.G * (end - start), self.d)

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

    def gates(self, start: int, end: int) -> tuple[Tensor, Tensor]:
        """Weight ``1 - g`` and log gate of rows, ``(N, C)`` each; padding is a step that does not happen."""
        assert self.log_gate is not None
        log_gate = self.log_gate[:, start:end].to(self.dtype)
        weight = -torch.expm1(log_gate)
        log_gate = log_gate.clamp_min(_CLOSED)
        if self.keep is not None:
            hidden = ~self.keep[:, start:end]
            log_gate, weight = log_gate.masked_fill(hidden, 0.0), weight.masked_fill(hidden, 0.0)
        return weight, log_gate

    def exactly(self, x: Tensor) -> Tensor:
        """In double precision where the device has it: a small step after large ones would vanish in a float32 sum of log gates."""
        return x.double() if x.device.type != "mps" else x

    def seen(self, n_N: Tensor, start: int, end: int, cumulated_NC: Tensor | None) -> Tensor:
        """Weight of the keys that each row of a causal chunk sees, ``(N, C)``, after keys of weight n; ``cumulated_NC`` are log gates."""
        if cumulated_NC is not None:
            # n g + (1 - g) over the steps, without subtracting from 1: gates near 1 leave tiny weights.
            return (cumulated_NC.exp() * n_N.to(cumulated_NC.dtype)[:, None] - torch.expm1(cumulated_NC)).to(self.dtype)
        if self.keep is None:
            return n_N[:, None] + torch.arange(1, end - start + 1, device=n_N.device, dtype=self.dtype)
        return n_N[:, None] + self.keep[:, start:end].to(self.dtype).cumsum(-1)

    def by_head(self, rows_NKX: Tensor) -> Tensor:
        """``(N, G C, X)`` as ``(N, G, C, X)``."""
        return rows_NKX.unflatten(1, (self.G, rows_NKX.shape[1] // self.G))

    def mask_causally(self, A_NKC: Tensor, gate: Gate | None) -> Tensor:
        """Sets what a causal query must not see to zero and applies the decay, in place."""
        by_head = self.by_head(A_NKC).tril_()  # first, since what is hidden may be as large as numbers go
        if gate is not None:
            by_head *= gate.decay_N1CC
        return A_NKC


class Gate(NamedTuple):
    """Decay inside a chunk, from cumulated log gates."""

    decay_N1CC: Tensor  # exp(b_i - b_j) for j <= i
    from_start_NK1: Tensor  # exp(b_i)
    to_end_NC1: Tensor  # exp(b_last - b_j)
    whole_N11: Tensor  # exp(b_last)
    weight_NC1: Tensor  # 1 - g, zero for padding
    total_NC: Tensor  # b, in double precision

    @staticmethod
    def of(call: Call, start: int, end: int) -> Gate | None:
        if call.log_gate is None:
            return None
        weight, log_gate = call.gates(start, end)
        b = call.exactly(log_gate).cumsum(-1)
        # Above the diagonal, where attention is zero, the difference is positive: cut, so that every exponent is at most 0.
        difference = b[:, :, None] - b[:, None, :]
        decay = difference.to(call.dtype).clamp_max_(0.0).exp_()
        return Gate(
            decay[:, None],
            b.exp().to(call.dtype).repeat(1, call.G)[..., None],
            (b[:, -1:] - b).exp().to(call.dtype)[..., None],
            b[:, -1:, None].exp().to(call.dtype),
            weight[..., None],
            b,
        )
