"""What the attention functions ask of their arguments, and the way from the user's shapes to the engine's and back."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from outlast._core._checks import integer, real
from outlast.attention._maps import MAPS
from outlast.errors import UnsupportedError


class Problem(NamedTuple):
    """One call in the engine's shapes: N = batch times key heads, G query heads to a key head."""

    q_NGLd: Tensor
    k_NLd: Tensor
    v_NLD: Tensor
    W: Tensor  # (1, M, d) or (N, M, d), times the root of the scale
    keep_NL: Tensor | None
    scale: float
    batch: int
    key_heads: int
    shape: tuple[int, ...]  # of the output

    def rows(self, x: Tensor) -> Tensor:
        """``(B, H, ...)`` as ``(N, ...)``."""
        return x.reshape(self.batch * self.key_heads, *x.shape[2:])

    def heads(self, x: Tensor) -> Tensor:
        """``(N, ...)`` as ``(B, H, ...)``."""
        return x.unflatten(0, (self.batch, self.key_heads))


def checked(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    projection: Tensor,
    attn_mask: Tensor | None,
    *,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    feature_map: str,
    chunk_size: int,
    with_state: bool,
) -> Problem:
    """Check one call and bring it into the engine's shapes.

    Raises:
        ValueError: shapes that do not fit, a mask that cannot be factored, a scale or chunk size out of range.
        TypeError: integer or mixed dtypes.
        UnsupportedError: dropout.
    """
    integer("chunk_size", chunk_size, low=1)
    if not torch.compiler.is_compiling():  # there, a changing float has no value to look at
        real("dropout_p", dropout_p, low=0.0, high=1.0)
        real("scale", 1.0 if scale is None else scale, low=0.0, low_open=True)
    if dropout_p > 0.0:
        raise UnsupportedError("dropout_p > 0: linear attention has no matrix of weights to drop from; apply dropout to its output instead")
    for name, tensor in (("query", query), ("key", key), ("value", value), ("projection", projection)):
        if not tensor.is_floating_point():
            raise TypeError(f"{name} must have a floating point dtype, got {tensor.dtype}")
    if torch.is_autocast_enabled(query.device.type):
        # Under autocast a model may hand over float32 queries and keys (after rotary positions) with bfloat16 values.
        widest = torch.promote_types(torch.promote_types(query.dtype, key.dtype), value.dtype)
        query, key, value = (x.to(widest) for x in (query, key, value))
    if not query.dtype == key.dtype == value.dtype:
        raise TypeError(f"query, key and value must have one dtype, got {query.dtype}, {key.dtype} and {value.dtype}")
    rank = query.ndim
    if rank < 2 or key.ndim != rank or value.ndim != rank:
        raise ValueError(
            "query, key and value must have the same number of dimensions, at least (length, size), "
            f"got shapes {tuple(query.shape)}, {tuple(key.shape)} and {tuple(value.shape)}"
        )
    shape = (*query.shape[:-1], value.shape[-1])
    q, k, v = (_four(x) for x in (query, key, value))
    if k.shape[:3] != v.shape[:3]:
        raise ValueError(f"key and value must agree in batch, heads and length, got shapes {tuple(key.shape)} and {tuple(value.shape)}")
    B, H, Lq, d = q.shape
    Hk, Lk = k.shape[1:3]
    if k.shape[3] != d:
        raise ValueError(f"query and key must have one head size, got {d} and {k.shape[3]}")
    if not H or not d:
        raise ValueError(f"queries need at least one head and a head size of at least 1, got shape {tuple(query.shape)}")
    if query.shape[:-3] != key.shape[:-3] or k.shape[0] != B:
        raise ValueError(f"query and key must have one batch size, got shapes {tuple(query.shape)} and {tuple(key.shape)}")
    if Hk != H and not (enable_gqa and Hk > 0 and H % Hk == 0):
        raise ValueError(f"{Hk} key heads for {H} query heads: the number must divide, and enable_gqa=True must say that heads are shared")
    if is_causal and Lq != Lk:
        # A state does not change that: new queries and new keys are the same positions.
        past = "" if with_state else "; for queries after a prefix, pass the prefix as state"
        raise ValueError(f"is_causal needs one query for each key, got {Lq} queries and {Lk} keys{past}")
    factor = 1.0 / math.sqrt(d) if scale is None else scale

    W = projection if projection.ndim == 3 else projection[None]
    if W.ndim != 3 or (W.shape[-1] != d and MAPS[feature_map].needs_projection):
        raise ValueError(f"projection must have shape (features, {d}) or (heads, features, {d}), got {tuple(projection.shape)}")
    if W.shape[-2] < 1:
        raise ValueError("projection must hold at least one random vector")
    if len(W) not in (1, Hk, H):
        raise ValueError(f"projection has {len(W)} heads; it must have 1, {Hk} (key heads) or {H} (query heads)")
    if len(W) == H != Hk:  # features of a key differ by query head, so nothing can be shared
        k, v = (x.repeat_interleave(H // Hk, 1) for x in (k, v))
        Hk = H
    work = torch.float64 if query.dtype == torch.float64 else torch.float32
    vectors = W.to(work) * factor**0.5
    if len(W) > 1:
        vectors = vectors.expand(B, *vectors.shape).reshape(B * Hk, *vectors.shape[1:])
    keep = None if attn_mask is None else _key_padding(attn_mask, B, Lq, Lk)
    if keep is not None:
        keep = keep[:, None].expand(B, Hk, Lk).reshape(B * Hk, Lk)
    return Problem(
        q.reshape(B * Hk, H // Hk, Lq, d), k.reshape(B * Hk, Lk, d), v.reshape(B * Hk, Lk, v.shape[-1]), vectors, keep, factor, B, Hk, shape
    )


def _four(x: Tensor) -> Tensor:
    """Any leading shape as ``(batch, heads, length, size)``: three dimensions have no head, more than four have several batches."""
    if x.ndim == 2:
        return x[None, None]
    return x[:, None] if x.ndim == 3 else x.flatten(0, -4)


def _key_padding(mask: Tensor, B: int, Lq: int, Lk: int) -> Tensor:
    """A mask over keys as ``(B, Lk)``."""
    if mask.is_floating_point():
        raise ValueError(
            "attn_mask is an additive bias, which does not factor into features: only a boolean mask over keys does (True = keep); "
            "use torch.nn.functional.scaled_dot_product_attention for a bias, and is_causal=True for the causal mask"
        )
    if mask.dtype != torch.bool:
        raise TypeError(f"attn_mask must be boolean (True = keep), got {mask.dtype}; a mask of ones and zeros is mask.bool()")
    if mask.ndim == 2 and Lq == B == mask.shape[0] and B > 1:
        raise ValueError(
            f"attn_mask of shape {tuple(mask.shape)} could be a mask over pairs as well as one over keys: give ({B}, 1, 1, {Lk}) "
            f"for the latter, "
            "is_causal=True for the causal mask"
        )
    flat: Tensor | None = mask
    if mask.ndim > 2:
        flat = mask.flatten(0, -4) if mask.ndim > 4 else mask
        flat = None if any(size != 1 for size in flat.shape[1:-1]) else flat.flatten(1)
    if flat is None or flat.ndim != 2 or flat.shape[1] != Lk or flat.shape[0] not in (1, B):
        dense = mask.shape[-2:] == (Lq, Lk) or (mask.ndim > 2 and mask.shape[-2] != 1)
        why = "a mask over pairs of queries and keys does not factor into features" if dense else "the shape does not fit"
        raise ValueError(
            f"attn_mask of shape {tuple(mask.shape)}: {why}; it must be ({B}, {Lk}) or ({B}, 1, 1, {Lk}), one value for each key. "
            "Use is_causal=True for the causal mask and torch.nn.functional.scaled_dot_product_attention for any other"
        )
    return flat.expand(B, Lk)


def checked_state(state: object, kind: type, shapes: dict[str, tuple[int, ...]]) -> None:
    """Refuse a state of another kind, batch, size of projection or size of values."""
    if not isinstance(state, kind):
        raise TypeError(f"state must be a {kind.__name__}, got {type(state).__name__}")
    for field, shape in shapes.items():
        found = tuple(getattr(state, field).shape)
        if found != shape:
            raise ValueError(
                f"state is of another batch, projection or value size: {kind.__name__}.{field} has shape {found}, expected {shape}"
            )
