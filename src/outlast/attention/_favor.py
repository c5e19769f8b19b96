"""FAVOR+: softmax attention estimated with positive random features.

Choromanski et al., "Rethinking Attention with Performers", ICLR 2021.
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple, cast, overload

import torch
from torch import Tensor

from outlast._core._checks import choice, integer
from outlast._core._precision import full_precision
from outlast._core._random import generator as derived_generator
from outlast._core._random import orthogonal_blocks
from outlast._core._typing import Float
from outlast.attention._arguments import Problem, checked, checked_state
from outlast.attention._chunks import NOTHING_SEEN
from outlast.attention._linear import linear_attention
from outlast.attention._maps import MAPS
from outlast.attention._redraw import Redrawn
from outlast.errors import UnsupportedError

FEATURE_MAPS = ("positive", "hyperbolic", "trig", "relu", "elu1")


class FavorState(NamedTuple):
    """What a causal decoder keeps instead of all keys and values; of constant size, in float32 (float64 for float64 inputs).

    Attributes:
        S: sum of features of keys times values, divided by exp(c), ``(B, H, R, Dv)``.
        z: sum of features of keys, divided by exp(c), ``(B, H, R)``.
        c: largest logarithm of each feature so far, ``(B, H, R)``.
        n: number of keys seen, ``(B, H)``; under padding each row has seen its own.

    H counts key heads (query heads where the projection has one matrix for each of them).
    """

    S: Tensor
    z: Tensor
    c: Tensor
    n: Tensor

    def detach(self) -> FavorState:
        """The same numbers without their history."""
        return FavorState(*(x.detach() for x in self))

    def to(self, *args: Any, **kwargs: Any) -> FavorState:
        """On another device, or in another precision."""
        return FavorState(*(x.to(*args, **kwargs) for x in self))

    def index_select(self, indices: Tensor) -> FavorState:
        """Rows of the batch in another order, for beam search."""
        return FavorState(*(x.index_select(0, indices) for x in self))


def draw_projection(
    num_features: int,
    head_dim: int,
    *,
    num_heads: int | None = None,
    orthogonal: bool = True,
    norms: Literal["chi", "sqrt_d"] = "chi",
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Random vectors for features, ``(num_features, head_dim)`` or ``(num_heads, num_features, head_dim)``.

    Each row is marginally normal, N(0, I). Orthogonal rows (the default) are drawn in blocks of ``head_dim`` from the uniform distribution
    on orthogonal matrices and given independent chi-distributed norms; blocks are independent (section 2.4 of the paper).

    Args:
        num_features: number of random vectors, M.
        head_dim: d.
        num_heads: one matrix for each head; None for a single one.
        orthogonal: False for independent rows.
        norms: ``"chi"``, or ``"sqrt_d"`` for rows of norm sqrt(d): the regularised softmax kernel SMREG, biased but of lower variance.
        generator: the source of randomness; draws are made on its device in float64.
        device: where the result lies.
        dtype: of the result; torch's default.

    Raises:
        ValueError: sizes below 1, or unknown norms.
    """
    integer("num_features", num_features, low=1)
    integer("head_dim", head_dim, low=1)
    choice("norms", norms, ("chi", "sqrt_d"))
    heads = 1 if num_heads is None else integer("num_heads", num_heads, low=1)
    shape = (heads, num_features, head_dim)
    where = None if generator is None else generator.device
    if orthogonal:
        rows = orthogonal_blocks(*shape, generator=generator)
        if norms == "chi":
            rows = rows * torch.randn(*shape, generator=generator, dtype=torch.float64, device=where).norm(dim=-1, keepdim=True)
    else:
        rows = torch.randn(*shape, generator=generator, dtype=torch.float64, device=where)
        if norms == "sqrt_d":
            rows = rows / rows.norm(dim=-1, keepdim=True)
    if norms == "sqrt_d":
        rows = rows * math.sqrt(head_dim)
    rows = rows.to(device=device, dtype=dtype or torch.get_default_dtype())
    return rows[0] if num_heads is None else rows


@overload
def favor_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    projection: Tensor,
    feature_map: str = "positive",
    stabilizer: str = "per_feature",
    chunk_size: int = 128,
    state: FavorState | None = None,
    return_state: Literal[False] = False,
    eps: float = 1e-6,
) -> Tensor: ...


@overload
def favor_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    projection: Tensor,
    feature_map: str = "positive",
    stabilizer: str = "per_feature",
    chunk_size: int = 128,
    state: FavorState | None = None,
    return_state: Literal[True],
    eps: float = 1e-6,
) -> tuple[Tensor, FavorState]: ...


def favor_attention(
    query: Float[Tensor, "*batch Lq d"],
    key: Float[Tensor, "*batch_k Lk d"],
    value: Float[Tensor, "*batch_k Lk Dv"],
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    projection: Tensor,
    feature_map: str = "positive",
    stabilizer: str = "per_feature",
    chunk_size: int = 128,
    state: FavorState | None = None,
    return_state: bool = False,
    eps: float = 1e-6,
) -> Tensor | tuple[Tensor, FavorState]:
    """Attention in linear time, called like ``torch.nn.functional.scaled_dot_product_attention``.

    With the maps ``positive`` and ``hyperbolic`` each weight is an unbiased estimate of the softmax weight before normalisation (lemma 1
    of the paper); how good the estimate is depends on the norms of queries and keys: measure with ``attention_error``.

    Example:
        ```python
        projection = draw_projection(256, head_dim=64, num_heads=8, generator=torch.Generator().manual_seed(0))
        out = favor_attention(q, k, v, is_causal=True, projection=projection)
        ```

    Args:
        query: ``(..., H, Lq, d)``; three dimensions are ``(batch, length, d)``.
        key: ``(..., Hk, Lk, d)``.
        value: ``(..., Hk, Lk, Dv)``.
        attn_mask: boolean mask over keys, ``(B, Lk)`` or ``(B, 1, 1, Lk)``, True for keys that count.
        dropout_p: must be 0; there is no matrix of weights.
        is_causal: query t sees keys up to t.
        scale: factor of the products of queries with keys; 1/sqrt(d).
        enable_gqa: ``Hk`` may divide H, as grouped-query attention has it.
        projection: random vectors ``(M, d)``, or one matrix for each head (``H`` or ``Hk``); not used by ``elu1``.
        feature_map: ``"positive"``, ``"hyperbolic"`` (R = 2 M), ``"trig"`` (a baseline of either sign), ``"relu"`` (the generalised
            kernel) or ``"elu1"`` (linear transformer).
        stabilizer: ``"per_feature"``, or ``"official"``: the maximum over all keys and features and ``eps``, as the authors' code has it;
            it lets later keys reach earlier outputs, and is there to compare (its features are kept, so memory is larger).
        chunk_size: rows worked on at a time. Where a key is so much longer than those before it that float32's range does not hold both,
            the causal form takes smaller chunks there, which costs time.
        state: what came before, from ``return_state=True``, made with the same projection (which only its shape tells).
        return_state: also return the state after these keys.
        eps: of the official stabiliser; not used otherwise.

    Returns:
        ``(..., H, Lq, Dv)`` in the dtype of the query, and with ``return_state`` the ``FavorState``. A query that sees no key gives
        zeros.

    Raises:
        ValueError: shapes that do not fit, a mask over pairs or an additive bias, unknown names, ``is_causal`` with unequal lengths, a
            state of another batch or projection.
        TypeError: integer or mixed dtypes.
        UnsupportedError: ``dropout_p`` above 0; forward-mode or second derivatives; the official stabiliser with a state or another map
            than ``positive``.
    """
    choice("feature_map", feature_map, FEATURE_MAPS)
    choice("stabilizer", stabilizer, ("per_feature", "official"))
    problem = checked(
        query,
        key,
        value,
        projection,
        attn_mask,
        dropout_p=dropout_p,
        is_causal=is_causal,
        scale=scale,
        enable_gqa=enable_gqa,
        feature_map=feature_map,
        chunk_size=chunk_size,
        with_state=state is not None,
    )
    settings: dict[str, Any] = {"causal": is_causal, "chunk_size": chunk_size, "keep_NL": problem.keep_NL}
    if stabilizer == "official":
        if state is not None or return_state or feature_map != "positive":
            raise UnsupportedError("the official stabiliser takes one maximum over all keys: it has no state, and only the map 'positive'")
        if not key.shape[-2]:
            return query.new_zeros(problem.shape)
        with full_precision(query.device):
            q, k = _official_features(problem, eps)
        run = linear_attention(q, k, problem.v_NLD, problem.W[:1], feature_map="given", denominator="guard", eps=1e-6, **settings)
        return run.out_NGLD.to(query.dtype).reshape(problem.shape)
    before = None
    if state is not None:
        R = MAPS[feature_map].num_features(problem.W.shape[-2], query.shape[-1])
        lead = (problem.batch, problem.key_heads)
        shapes = {"S": (*lead, R, value.shape[-1]), "z": (*lead, R), "c": (*lead, R), "n": lead}
        checked_state(state, FavorState, shapes)
        S, z, c, n = (problem.rows(x).to(problem.W.dtype) for x in state)
        before = S, z, c.clamp_min(NOTHING_SEEN), n  # half precision would have made it -inf
    run = linear_attention(
        problem.q_NGLd, problem.k_NLd, problem.v_NLD, problem.W, feature_map=feature_map, scale=problem.scale, state=before, **settings
    )
    out = run.out_NGLD.reshape(problem.shape)
    if not return_state:
        return out
    return out, FavorState(*(problem.heads(x) for x in (run.S_NRD, run.z_NR, run.c_NR, run.n_N)))


def _official_features(problem: Problem, eps: float) -> tuple[Tensor, Tensor]:
    """Features as the authors' code stabilises them: the query's own maximum, one maximum over all keys and features, plus eps."""
    W, keep = problem.W, problem.keep_NL
    ratio = W.shape[-2] ** -0.5

    def logs(x: Tensor, matrix: Tensor) -> tuple[Tensor, Tensor]:
        return x @ matrix.mT, (x * x).sum(-1, keepdim=True) * (0.5 * problem.scale)

    q, q_norm = logs(problem.q_NGLd.to(W.dtype), W[:, None] if len(W) > 1 else W)
    keys = problem.k_NLd.to(W.dtype)
    k, k_norm = logs(keys if keep is None else keys.masked_fill(~keep[..., None], 0.0), W)
    visible = k.detach() if keep is None else k.detach().masked_fill(~keep[..., None], -math.inf)
    largest = visible.amax((-1, -2), keepdim=True)
    largest = torch.where(largest == -math.inf, 0.0, largest)  # every key masked
    return (
        ratio * ((q - q_norm - q.detach().amax(-1, keepdim=True)).exp() + eps),
        ratio * ((k - k_norm - largest).exp() + eps),
    )


class FavorAttention(Redrawn):
    """FAVOR+ with its random vectors: a drop-in for ``scaled_dot_product_attention`` inside a layer, without parameters.

    Choromanski et al., "Rethinking Attention with Performers", ICLR 2021.

    Example:
        ```python
        attention = FavorAttention(head_dim=64, num_heads=8, layer=3)
        out = attention(q, k, v, is_causal=True)            # (B, 8, L, 64) each
        handle = redraw_after_steps(model, optimizer)       # fresh vectors every 1,000 steps of the optimizer
        ```

    The vectors of draw i are a function of (seed, layer, i) alone: all processes and a resumed run agree without communication. They are
    buffers in the state dict. ``forward`` never draws, so checkpointing and compilation replay it exactly.

    Args:
        head_dim: d.
        num_heads: query heads; each has its own vectors (each group, with ``num_kv_heads``).
        num_features: random vectors of a head, M.
        feature_map: as ``favor_attention``.
        norms: as ``draw_projection``.
        redraw_interval: optimizer steps between draws, None for never.
        seed: of the draws.
        layer: place of the layer in its model: layers of one number and seed have the same vectors.
        orthogonal: as ``draw_projection``.
        num_kv_heads: key heads of grouped-query attention.
        chunk_size: as ``favor_attention``.

    Raises:
        ValueError: sizes below 1, unknown names, key heads that do not divide the query heads.
    """

    projection: Tensor

    def __init__(
        self,
        head_dim: int,
        num_heads: int,
        num_features: int = 256,
        feature_map: str = "positive",
        norms: Literal["chi", "sqrt_d"] = "chi",
        redraw_interval: int | None = 1000,
        seed: int = 0,
        *,
        layer: int = 0,
        orthogonal: bool = True,
        num_kv_heads: int | None = None,
        chunk_size: int = 128,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(redraw_interval=redraw_interval, seed=seed, layer=layer)
        self.head_dim = integer("head_dim", head_dim, low=1)
        self.num_heads = integer("num_heads", num_heads, low=1)
        self.num_kv_heads = num_heads if num_kv_heads is None else integer("num_kv_heads", num_kv_heads, low=1)
        if num_heads % self.num_kv_heads:
            raise ValueError(f"num_kv_heads must divide num_heads, got {num_kv_heads} and {num_heads}")
        self.num_features = integer("num_features", num_features, low=1)
        self.feature_map = choice("feature_map", feature_map, FEATURE_MAPS)
        choice("norms", norms, ("chi", "sqrt_d"))
        self.norms: Literal["chi", "sqrt_d"] = norms
        self.orthogonal = orthogonal
        self.chunk_size = integer("chunk_size", chunk_size, low=1)
        place = torch.get_default_device() if device is None else device
        self.register_buffer("projection", self._draw(seed, 0).to(device=place, dtype=dtype or torch.get_default_dtype()))

    def reset_parameters(self) -> None:
        """The vectors of the first draw, as after construction (there are no parameters)."""
        self.reset_draws()

    def _draw(self, seed: int, index: int) -> Tensor:
        return draw_projection(
            self.num_features,
            self.head_dim,
            num_heads=self.num_kv_heads,
            orthogonal=self.orthogonal,
            norms=self.norms,
            generator=derived_generator(seed, f"favor/{self.layer}", index),
            dtype=torch.float64,
        )

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
        *,
        state: FavorState | None = None,
        return_state: bool = False,
    ) -> Tensor | tuple[Tensor, FavorState]:
        """``favor_attention`` with this module's vectors; raises as that does."""
        return favor_attention(  # pyright: ignore[reportCallIssue, reportUnknownVariableType]
            query,
            key,
            value,
            attn_mask,
            dropout_p,
            is_causal,
            scale,
            enable_gqa or self.num_kv_heads != self.num_heads,
            projection=self.projection,
            feature_map=self.feature_map,
            chunk_size=self.chunk_size,
            state=state,
            return_state=return_state,  # pyright: ignore[reportArgumentType]
        )

    def init_state(self, batch: int, *, value_dim: int | None = None) -> FavorState:
        """The state before the first key.

        Args:
            batch: B.
            value_dim: size of a value; ``head_dim``.
        """
        integer("batch", batch, low=1)
        R = MAPS[self.feature_map].num_features(self.num_features, self.head_dim)
        work = torch.float64 if self.projection.dtype == torch.float64 else torch.float32
        lead = (batch, self.num_kv_heads)
        zeros = self.projection.new_zeros
        return FavorState(
            zeros(*lead, R, value_dim or self.head_dim, dtype=work),
            zeros(*lead, R, dtype=work),
            self.projection.new_full((*lead, R), NOTHING_SEEN, dtype=work),
            zeros(*lead, dtype=work),
        )

    def step(
        self, query: Tensor, key: Tensor, value: Tensor, state: FavorState, *, scale: float | None = None
    ) -> tuple[Tensor, FavorState]:
        """One more position, equal to the causal form, in time that does not depend on the position.

        Args:
            query: ``(B, H, d)`` or ``(B, H, 1, d)``.
            key: likewise, with the key heads.
            value: likewise.
            state: from ``init_state``, from ``return_state=True``, or from the last step.
            scale: as ``favor_attention``.

        Returns:
            The output in the same form, and the new state.

        Raises:
            ValueError: more than one position, or as ``favor_attention``.
        """
        single = query.ndim == 3
        q, k, v = (x[:, :, None] if single else x for x in (query, key, value))
        if q.ndim != 4 or q.shape[2] != 1:
            raise ValueError(f"step() takes one position, (B, H, d) or (B, H, 1, d), got query of shape {tuple(query.shape)}")
        out, after = cast("tuple[Tensor, FavorState]", self(q, k, v, is_causal=True, scale=scale, state=state, return_state=True))
        return out[:, :, 0] if single else out, after

    def extra_repr(self) -> str:
        heads = f"{self.num_heads}" if self.num_heads == self.num_kv_heads else f"{self.num_heads} over {self.num_kv_heads}"
        return (
            f"head_dim={self.head_dim}, num_heads={heads}, num_features={self.num_features}, feature_map={self.feature_map!r}, "
            f"norms={self.norms!r}, redraw_interval={self.redraw_interval}, {self._drawn()}"
        )
