"""How far linear attention is from exact attention on given queries and keys."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from outlast._core._checks import choice, real
from outlast._core._precision import full_precision
from outlast._core._result import Result
from outlast.attention._arguments import Problem, checked
from outlast.attention._chunks import HEADROOM
from outlast.attention._favor import FEATURE_MAPS
from outlast.attention._linear import linear_attention
from outlast.attention._maps import MAPS, Features
from outlast.errors import OutlastWarning


@dataclass(frozen=True, repr=False)
class AttentionErrorResult(Result):
    """Distance of an estimate from exact softmax attention.

    Attributes:
        rel_error: norm of the difference over the norm of the exact output.
        rel_error_per_head: the same for each head.
        uniform_error: what the mean of the visible values would score: an estimate near it carries no information.
        effective_features: features that share a query's denominator, ``(sum a)^2 / sum a^2``, mean over queries; None for maps of either
            sign.
        num_features: R, what ``effective_features`` could be.
        query_norm: mean norm of the queries times the root of the scale; the variance of the estimate grows as ``exp(|q + k|^2)``.
        key_norm: the same of the keys.
        min_denominator: smallest denominator after stabilising; at least 1 for positive maps without a causal mask.
    """

    rel_error: float
    rel_error_per_head: tuple[float, ...]
    uniform_error: float
    effective_features: float | None
    num_features: int
    query_norm: float
    key_norm: float
    min_denominator: float

    def _draw(self, ax: Any) -> None:
        heads = range(len(self.rel_error_per_head))
        ax.bar(heads, self.rel_error_per_head, label="estimate")
        ax.axhline(self.uniform_error, color="grey", linestyle="--", label="mean of the values")
        ax.set_xlabel("head")
        ax.set_ylabel("relative error of the output")
        ax.set_ylim(0.0)
        ax.legend()


@torch.no_grad()
def attention_error(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    projection: Tensor,
    attn_mask: Tensor | None = None,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    feature_map: str = "positive",
    chunk_size: int = 128,
    warn_above: float = 0.2,
) -> AttentionErrorResult:
    """Compare ``favor_attention`` with exact attention, and warn where the estimate is poor.

    Exact attention is computed: time is quadratic in the length. Take queries and keys from the model in question, since the error
    depends on their norms more than on anything else.

    Args:
        query: as ``favor_attention``, and so the rest.
        key: keys.
        value: values.
        projection: random vectors.
        attn_mask: mask over keys.
        is_causal: causal form.
        scale: as there.
        enable_gqa: as there.
        feature_map: as there.
        chunk_size: as there.
        warn_above: relative error from which a warning is given.

    Returns:
        An ``AttentionErrorResult``.

    Raises:
        ValueError: as ``favor_attention``, or nothing to compare.
        TypeError: as there.
    """
    real("warn_above", warn_above, low=0.0, infinite=True)
    choice("feature_map", feature_map, FEATURE_MAPS)
    problem = checked(
        query,
        key,
        value,
        projection,
        attn_mask,
        dropout_p=0.0,
        is_causal=is_causal,
        scale=scale,
        enable_gqa=enable_gqa,
        feature_map=feature_map,
        chunk_size=chunk_size,
        with_state=False,
    )
    if not all(x.numel() for x in (query, key, value)):
        raise ValueError("nothing to compare: there are no queries, keys or values")
    run = linear_attention(
        problem.q_NGLd,
        problem.k_NLd,
        problem.v_NLD,
        problem.W,
        feature_map=feature_map,
        causal=is_causal,
        scale=problem.scale,
        chunk_size=chunk_size,
        keep_NL=problem.keep_NL,
    )
    work = problem.W.dtype
    q, k, v = problem.q_NGLd.to(work), problem.k_NLd.to(work)[:, None], problem.v_NLD.to(work)[:, None]
    keep = torch.ones(k.shape[0], k.shape[2], dtype=torch.bool, device=k.device) if problem.keep_NL is None else problem.keep_NL
    k, v = (x.masked_fill(~keep[:, None, :, None], 0.0) for x in (k, v))
    visible = keep[:, None, None].expand(-1, 1, q.shape[2], -1)
    if is_causal:
        visible = visible.tril()
    if not visible.any():
        raise ValueError("nothing to compare: attn_mask hides every key")
    with full_precision(q.device):
        exact = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, scale=problem.scale)
        effective_features = _effective_features(problem, is_causal, feature_map)
    counted = keep.to(work)[:, None, :, None]
    sums, counts = (x.cumsum(2) if is_causal else x.sum(2, keepdim=True) for x in (v, counted))
    uniform = (sums / counts).expand_as(exact)
    rows = visible.any(-1)[..., None].expand_as(exact)  # rows that see nothing are no measurement
    exact, uniform, ours = (torch.where(rows, x, 0.0) for x in (exact, uniform, run.out_NGLD.to(work)))

    def error(x: Tensor) -> float:
        return float(_ratio((x - exact).square().sum(), exact.square().sum()))

    heads = problem.batch, problem.key_heads * q.shape[1], -1
    by_head = [x.reshape(heads).square().sum((0, 2)) for x in (ours - exact, exact)]
    shift = 2.0 * HEADROOM if is_causal and MAPS[feature_map].log_keys else 0.0
    smallest = run.den_NGL[rows[..., 0]].min()
    result = AttentionErrorResult(
        rel_error=error(ours),
        rel_error_per_head=tuple(_ratio(by_head[0], by_head[1]).tolist()),
        uniform_error=error(uniform),
        effective_features=effective_features,
        num_features=MAPS[feature_map].num_features(problem.W.shape[-2], q.shape[-1]),
        query_norm=float(q.norm(dim=-1).mean()) * problem.scale**0.5,
        key_norm=float(k.norm(dim=-1)[:, 0][keep].mean()) * problem.scale**0.5,
        min_denominator=float(smallest) * math.exp(-shift),
    )
    if result.rel_error > warn_above:
        effective = (
            "" if result.effective_features is None else f"; {result.effective_features:.1f} of {result.num_features} features do the work"
        )
        message = (
            f"the estimate is {100 * result.rel_error:.0f} % away from exact attention (the mean of the values: "
            f"{100 * result.uniform_error:.0f} %)"
            f"{effective}. Norms of queries and keys are {result.query_norm:.1f} and {result.key_norm:.1f}: where they are large, "
            "more features help little; train with this attention, or keep exact attention here"
        )
        warnings.warn(message, OutlastWarning, stacklevel=2)
    return result


def _effective_features(problem: Problem, is_causal: bool, feature_map: str) -> float | None:
    """Participation ratio of the features in the denominators of up to 64 queries, mean over them."""
    each = MAPS[feature_map]
    if each.signed:
        return None
    work, Lq = problem.W.dtype, problem.q_NGLd.shape[2]
    picked = torch.linspace(0, Lq - 1, min(Lq, 64), device=problem.W.device).long()
    ratios: list[Tensor] = []
    for n in range(len(problem.k_NLd)):
        W = problem.W[n if len(problem.W) > 1 else 0][None]
        q = _log(each.features(problem.q_NGLd[n, :, picked].to(work), W, problem.scale, query=True))
        keys = problem.k_NLd[n][None].to(work)
        if problem.keep_NL is not None:
            keys = keys.masked_fill(~problem.keep_NL[n, :, None], 0.0)
        k = _log(each.features(keys, W, problem.scale, query=False))[0]
        if problem.keep_NL is not None:
            k = k.masked_fill(~problem.keep_NL[n, :, None], -torch.inf)
        sums = k.logcumsumexp(0)[picked] if is_causal else k.logsumexp(0, keepdim=True)
        share = (q + sums).softmax(-1)
        ratios.append(1.0 / share.square().sum(-1).flatten())
    found = torch.cat(ratios)
    found = found[found.isfinite()]  # queries that see nothing
    return float(found.mean()) if len(found) else None


def _log(features: Features) -> Tensor:
    """Logarithms of features of one sign."""
    if features.log is not None:
        return features.log
    assert features.value is not None
    return features.value.log()


def _ratio(difference: Tensor, exact: Tensor) -> Tensor:
    """Relative error from squared norms; an exact output of zero is met or missed."""
    return torch.where(exact > 0.0, difference / exact, torch.where(difference > 0.0, torch.inf, 0.0)).sqrt()
