"""Random feature attention with and without a gate (Peng et al., "Random Feature Attention", ICLR 2021)."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, cast, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from outlast._core._checks import choice, integer, real
from outlast._core._precision import full_precision
from outlast._core._random import generator as derived_generator
from outlast._core._result import Result
from outlast._core._typing import Float
from outlast.attention._arguments import checked, checked_state
from outlast.attention._chunks import NOTHING_SEEN
from outlast.attention._forward import Run
from outlast.attention._linear import linear_attention
from outlast.attention._maps import MAPS
from outlast.attention._redraw import Redrawn
from outlast.errors import OutlastWarning, StateError

FEATURE_MAPS = ("gaussian", "arccos", "positive")
EPSILON = 1e-3  # of the safe denominator, relative to the weight of the keys seen


class RfaState(NamedTuple):
    """What a causal decoder keeps, or the summary of a source; in float32 (float64 for float64 inputs).

    Attributes:
        S: (gated) sum of features of keys times values, ``(B, H, R, Dv)``.
        z: (gated) sum of features of keys, ``(B, H, R)``.
        n: sum of the weights of the keys: their number, with a gate at most 1, ``(B, H)``.
        c: logarithm that S and z are divided by, ``(B, H, R)``; of use for ``feature_map="positive"`` only.
    """

    S: Tensor
    z: Tensor
    n: Tensor
    c: Tensor

    def detach(self) -> RfaState:
        """The same numbers without their history, as the next segment of a stream takes them."""
        return RfaState(*(x.detach() for x in self))

    def to(self, *args: Any, **kwargs: Any) -> RfaState:
        """On another device, or in another precision."""
        return RfaState(*(x.to(*args, **kwargs) for x in self))

    def index_select(self, indices: Tensor) -> RfaState:
        """Rows of the batch in another order, for beam search."""
        return RfaState(*(x.index_select(0, indices) for x in self))


@dataclass(frozen=True, repr=False)
class DenominatorReport(Result):
    """How often denominators of random feature attention were unusable.

    Attributes:
        rows: outputs counted, over batch, heads and positions.
        clamped_share: share whose denominator was too small and was replaced.
        negative_share: share whose denominator was negative and was used.
    """

    rows: int
    clamped_share: float
    negative_share: float


def _unit(x: Tensor) -> Tensor:
    """Rows of norm 1; a zero row stays zero, with a finite gradient."""
    return x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-12)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    *,
    dropout_p: float = 0.0,
    is_causal: bool,
    enable_gqa: bool = False,
    projection: Tensor,
    feature_map: str,
    log_gate: Tensor | None,
    normalize_qk: bool,
    denominator: str,
    chunk_size: int,
    state: RfaState | None,
) -> tuple[Tensor, RfaState, Run]:
    choice("feature_map", feature_map, FEATURE_MAPS)
    choice("denominator", denominator, ("safe", "official"))
    problem = checked(
        query,
        key,
        value,
        projection,
        attn_mask,
        dropout_p=dropout_p,
        is_causal=is_causal,
        scale=1.0,
        enable_gqa=enable_gqa,
        feature_map=feature_map,
        chunk_size=chunk_size,
        with_state=state is not None,
    )
    work, D = problem.W.dtype, problem.W.shape[-2]
    lead = (problem.batch, problem.key_heads)
    gate = None
    if log_gate is not None:
        if not log_gate.is_floating_point():
            raise TypeError(f"log_gate must have a floating point dtype, got {log_gate.dtype}")
        if not is_causal:
            raise ValueError("log_gate weighs keys by their distance in the past: it needs is_causal=True")
        if tuple(log_gate.shape) != (*lead, problem.k_NLd.shape[1]):
            raise ValueError(
                f"log_gate must have shape {(*lead, problem.k_NLd.shape[1])}, one value a key head and key, got {tuple(log_gate.shape)}"
            )
        gate = problem.rows(log_gate)
    before = None
    R = MAPS[feature_map].num_features(D, query.shape[-1])
    if state is not None:
        shapes = {"S": (*lead, R, value.shape[-1]), "z": (*lead, R), "n": lead, "c": (*lead, R)}
        checked_state(state, RfaState, shapes)
        S, z, n, c = (problem.rows(x).to(work) for x in state)
        before = S, z, c.clamp_min(NOTHING_SEEN), n
    q, k = problem.q_NGLd, problem.k_NLd
    if normalize_qk:
        # In working precision: the error of a norm in half precision would become one of the temperature.
        with full_precision(q.device):
            if problem.keep_NL is not None:  # whatever padding holds, its gradient is zero
                k = k.masked_fill(~problem.keep_NL[..., None], 0.0)
            q, k = _unit(q.to(work)), _unit(k.to(work))
    if feature_map == "positive":
        if denominator == "official":
            raise ValueError("denominator='official' belongs to the bounded maps; feature_map='positive' needs none")
        kind, eps = "plain", EPSILON
    elif denominator == "safe":
        kind, eps = "safe", EPSILON
    else:  # features times 0.1 instead of D^-1/2, denominators of at least 1
        kind, eps = "at_least", 100.0 / D
    run = linear_attention(
        q,
        k,
        problem.v_NLD,
        problem.W,
        feature_map=feature_map,
        denominator=kind,
        causal=is_causal,
        chunk_size=chunk_size,
        keep_NL=problem.keep_NL,
        log_gate_NL=gate,
        state=before,
        eps=eps,
    )
    after = RfaState(*(problem.heads(x) for x in (run.S_NRD, run.z_NR, run.n_N, run.c_NR)))
    return run.out_NGLD.to(query.dtype).reshape(problem.shape), after, run


@overload
def rfa_attention(
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
    feature_map: str = "gaussian",
    log_gate: Tensor | None = None,
    normalize_qk: bool = True,
    denominator: str = "safe",
    chunk_size: int = 128,
    state: RfaState | None = None,
    return_state: Literal[False] = False,
) -> Tensor: ...


@overload
def rfa_attention(
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
    feature_map: str = "gaussian",
    log_gate: Tensor | None = None,
    normalize_qk: bool = True,
    denominator: str = "safe",
    chunk_size: int = 128,
    state: RfaState | None = None,
    return_state: Literal[True],
) -> tuple[Tensor, RfaState]: ...


def rfa_attention(
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
    feature_map: str = "gaussian",
    log_gate: Tensor | None = None,
    normalize_qk: bool = True,
    denominator: str = "safe",
    chunk_size: int = 128,
    state: RfaState | None = None,
    return_state: bool = False,
) -> Tensor | tuple[Tensor, RfaState]:
    """Random feature attention, called like ``torch.nn.functional.scaled_dot_product_attention``.

    Queries and keys are brought to norm 1; the features then estimate a softmax of their cosines (section 3.1 of the paper). Not for
    converting a pretrained model: its norms carry meaning; ``favor_attention`` is.

    Example:
        ```python
        base = torch.randn(num_heads, 64, head_dim, generator=torch.Generator().manual_seed(0))
        out = rfa_attention(q, k, v, is_causal=True, projection=base / tau, log_gate=F.logsigmoid(gate_logits))
        ```

    Args:
        query: ``(..., H, Lq, d)``.
        key: ``(..., Hk, Lk, d)``.
        value: ``(..., Hk, Lk, Dv)``.
        attn_mask: boolean mask over keys, ``(B, Lk)`` or ``(B, 1, 1, Lk)``, True for keys that count.
        dropout_p: must be 0.
        is_causal: query t sees keys up to t.
        scale: must be None; the temperature is part of ``projection``.
        enable_gqa: ``Hk`` may divide H.
        projection: N(0, 1) vectors times sigma / tau, ``(H, D, d)``, ``(1, D, d)`` or ``(D, d)``.
        feature_map: ``"gaussian"`` (R = 2 D), ``"arccos"`` or ``"positive"`` (R = D, never negative).
        log_gate: logarithm of the gate of each key, ``(B, H, Lk)`` (key heads), at most 0: ``logsigmoid`` of its pre-activation.
        normalize_qk: False where queries and keys have norm 1 already.
        denominator: ``"safe"``: at least 1e-3 of the weight of the keys seen, by size (a limit that gradients take as constant);
            ``"official"``: as the authors' code, features times 0.1 and at least 1, which shrinks early outputs.
        chunk_size: rows worked on at a time.
        state: what came before, made with the same projection (which only its shape tells).
        return_state: also return the state after these keys.

    Returns:
        ``(..., H, Lq, Dv)`` in the dtype of the query, and with ``return_state`` the ``RfaState``. A query that sees no key gives
        zeros.

    Raises:
        ValueError: ``scale`` given, ``log_gate`` without ``is_causal``, above 0 or of another shape, a mask over pairs or an additive
            bias, shapes that do not fit, a state of another batch or projection.
        TypeError: integer or mixed dtypes.
        UnsupportedError: ``dropout_p`` above 0.
    """
    if scale is not None:
        raise ValueError("scale has no place here: the temperature is part of the projection (sigma / tau)")
    if log_gate is not None and not torch.compiler.is_compiling() and bool((log_gate > 0.0).any()):
        raise ValueError(f"log_gate must be at most 0 (a gate is at most 1), got {float(log_gate.max()):g}; is it before logsigmoid?")
    out, after, _ = _attend(
        query,
        key,
        value,
        attn_mask,
        dropout_p=dropout_p,
        is_causal=is_causal,
        enable_gqa=enable_gqa,
        projection=projection,
        feature_map=feature_map,
        log_gate=log_gate,
        normalize_qk=normalize_qk,
        denominator=denominator,
        chunk_size=chunk_size,
        state=state,
    )
    return (out, after) if return_state else out


class RandomFeatureAttention(Redrawn):
    """A whole attention layer with random features: projections of queries, keys, values and output, optionally a gate.

    Example:
        ```python
        layer = RandomFeatureAttention(512, num_heads=8, gate=True, causal=True)
        y = layer(x)                                        # (B, L, 512)
        handle = redraw_after_steps(model, optimizer)       # new random vectors after every step

        state = layer.init_state(B)                         # decoding, one position at a time
        y_t, state = layer.step(x_t, state)
        ```

    In training the vectors of draw i are a function of (seed, layer, i), picked from a pool of ``pool_size`` matrices that is a function
    of the seed; in evaluation the layer uses vectors of its own that never change. Both are buffers. ``forward`` draws nothing.

    Keep ``sigma`` out of weight decay: it is a temperature, and decay would flatten attention (``rfa_parameter_groups``).

    Args:
        embed_dim: width of the input and output.
        num_heads: H; divides ``embed_dim``.
        num_features: random vectors of a head, D.
        gate: learn an exponential recency weight for each head (section 3.2 of the paper); needs causal attention.
        feature_map: as ``rfa_attention``.
        tau: temperature; smaller is sharper, and needs more features.
        learn_sigma: learn an elementwise factor of the random vectors, starting at 1.
        pool_size: matrices to pick from; None for fresh ones at every draw.
        seed: of the draws.
        layer: place of the layer in its model: layers of one number and seed have the same vectors.
        causal: whether attention is causal where a call does not say; False also forbids ``step``.
        bias: of the four projections.
        redraw_interval: optimizer steps between draws, None for never.
        chunk_size: as ``rfa_attention``.

    Raises:
        ValueError: sizes below 1, heads that do not divide the width, ``tau`` not positive, a pool smaller than the number of heads, a
            gate with ``causal=False``.
    """

    projection: Tensor
    eval_projection: Tensor
    sigma: Tensor

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        num_features: int = 64,
        gate: bool = False,
        feature_map: str = "gaussian",
        tau: float = 1.0,
        learn_sigma: bool = True,
        pool_size: int | None = 500,
        seed: int = 0,
        *,
        layer: int = 0,
        causal: bool | None = None,
        bias: bool = True,
        redraw_interval: int | None = 1,
        chunk_size: int = 128,
    ) -> None:
        super().__init__(redraw_interval=redraw_interval, seed=seed, layer=layer)
        self.embed_dim = integer("embed_dim", embed_dim, low=1)
        self.num_heads = integer("num_heads", num_heads, low=1)
        if embed_dim % num_heads:
            raise ValueError(f"num_heads must divide embed_dim, got {num_heads} and {embed_dim}")
        self.head_dim = embed_dim // num_heads
        self.num_features = integer("num_features", num_features, low=1)
        self.feature_map = choice("feature_map", feature_map, FEATURE_MAPS)
        self.tau = real("tau", tau, low=0.0, low_open=True)
        self.pool_size = None if pool_size is None else integer("pool_size", pool_size, low=1)
        if self.pool_size is not None and self.pool_size < (self.layer + 1) * num_heads:
            raise ValueError(
                f"pool_size must be at least {(self.layer + 1) * num_heads}, the heads of the layers up to this one, which draw without "
                f"replacement: got {pool_size}"
            )
        if gate and causal is False:
            raise ValueError("gate=True weighs keys by their distance in the past: it needs causal attention")
        self.causal = causal
        self.chunk_size = integer("chunk_size", chunk_size, low=1)
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(embed_dim, embed_dim, bias=bias) for _ in range(4))
        self.gate_proj = nn.Linear(embed_dim, num_heads) if gate else None
        ones = torch.ones(num_heads, 1, self.head_dim)
        if learn_sigma:
            self.sigma = nn.Parameter(ones)
        else:
            self.register_buffer("sigma", ones)
        place, dtype = torch.get_default_device(), torch.get_default_dtype()
        self.register_buffer("projection", self._draw(seed, 0).to(place, dtype))
        self.register_buffer("eval_projection", self._evaluation_draw(seed).to(place, dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier with gain 2^-1/2 for the projections; gates that remember from 4 to 256 positions over the heads; sigma 1; first draw."""
        for linear in (self.q_proj, self.k_proj, self.v_proj, self.out_proj):
            nn.init.xavier_uniform_(linear.weight, gain=2.0**-0.5)
            if linear.bias is not None:  # pyright: ignore[reportUnnecessaryComparison]
                nn.init.zeros_(linear.bias)
        if self.gate_proj is not None:
            nn.init.xavier_uniform_(self.gate_proj.weight, gain=2.0**-0.5)
            reach = torch.logspace(math.log2(4.0), math.log2(256.0), self.num_heads, base=2.0)
            with torch.no_grad():
                self.gate_proj.bias.copy_((reach - 1.0).log())  # g = 1 - 1 / reach
        nn.init.ones_(self.sigma)
        self.reset_draws()
        with torch.no_grad():
            self.eval_projection.copy_(self._evaluation_draw(self._first_seed))

    def _draw(self, seed: int, index: int) -> Tensor:
        if self.pool_size is None:
            return self._normal(self.num_heads, stream=derived_generator(seed, f"rfa/{self.layer}", index))
        # The pool is never stored: each entry is a function of the seed and its number. Layers share one order, so that no two heads
        # of a model have the same entry.
        order = torch.randperm(self.pool_size, generator=derived_generator(seed, "rfa order", index), device="cpu")
        mine = order[self.layer * self.num_heads : (self.layer + 1) * self.num_heads].tolist()
        return torch.cat([self._normal(1, stream=derived_generator(seed, "rfa pool", entry)) for entry in mine])

    def _evaluation_draw(self, seed: int) -> Tensor:
        return self._normal(self.num_heads, stream=derived_generator(seed, f"rfa evaluation/{self.layer}"))

    def _normal(self, heads: int, *, stream: torch.Generator) -> Tensor:
        shape = (heads, self.num_features, self.head_dim)
        return torch.randn(shape, generator=stream, dtype=torch.float64, device="cpu")

    def random_vectors(self) -> Tensor:
        """The vectors in use, times sigma / tau, ``(H, D, d)``."""
        return (self.projection if self.training else self.eval_projection) * (self.sigma / self.tau)

    def forward(
        self,
        x: Float[Tensor, "B Lq C"],
        context: Float[Tensor, "B Lk C"] | None = None,
        key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
        state: RfaState | None = None,
        *,
        return_state: bool | None = None,
    ) -> Tensor | tuple[Tensor, RfaState]:
        """Attend from ``x`` to itself, to ``context``, or to a summary.

        Args:
            x: ``(B, Lq, embed_dim)``.
            context: what to attend to, ``(B, Lk, embed_dim)``; x itself.
            key_padding_mask: ``(B, Lk)``, True for padding (the meaning that ``torch.nn.MultiheadAttention`` gives it).
            is_causal: the module's ``causal``, else False.
            state: causal: what came before, for streams cut into segments. Not causal: a summary from ``summarize``; without
                ``context`` the queries attend to it alone.
            return_state: also return the state; True for causal calls with a state unless said otherwise.

        Returns:
            ``(B, Lq, embed_dim)``, or that and the state.

        Raises:
            ValueError: a gate without ``is_causal``, ``context`` in a causal call, causal attention on a module with ``causal=False``, or
                as ``rfa_attention``.
        """
        causal = bool(self.causal) if is_causal is None else is_causal
        for name, each in (("x", x), ("context", context)):
            if each is not None and (each.ndim != 3 or each.shape[-1] != self.embed_dim):
                raise ValueError(f"{name} must have shape (batch, length, {self.embed_dim}), got {tuple(each.shape)}")
        out, after, _ = self._run(x, context, key_padding_mask, causal, state)
        y = self.out_proj(out.transpose(1, 2).flatten(-2))
        wanted = (causal and state is not None) if return_state is None else return_state
        return (y, after) if wanted else y

    def _run(
        self, x: Tensor, context: Tensor | None, padding: Tensor | None, causal: bool, state: RfaState | None
    ) -> tuple[Tensor, RfaState, Run]:
        if causal and self.causal is False:
            raise ValueError("is_causal=True on a module made with causal=False")
        if causal and context is not None:
            raise ValueError("is_causal attends from x to itself: context has no order relative to it")
        self._need_causal_gate(causal)
        summary_alone = state is not None and context is None and not causal
        if summary_alone and padding is not None:
            raise ValueError("key_padding_mask without keys: padding was left out when the summary was made")
        source = x[:, :0] if summary_alone else x if context is None else context
        log_gate = None
        if self.gate_proj is not None:
            logits = self.gate_proj(x)
            log_gate = F.logsigmoid(logits if logits.dtype == torch.float64 else logits.float()).mT
        return self._attend(self.q_proj(x), source, padding, causal, log_gate, state)

    def _need_causal_gate(self, causal: bool) -> None:
        if self.gate_proj is not None and not causal:
            raise ValueError("gate=True weighs keys by their distance in the past: call with is_causal=True")

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)

    def _attend(
        self,
        q: Tensor,
        source: Tensor,
        padding: Tensor | None,
        causal: bool,
        log_gate: Tensor | None,
        state: RfaState | None,
    ) -> tuple[Tensor, RfaState, Run]:
        if padding is not None and padding.dtype != torch.bool:
            raise TypeError(f"key_padding_mask must be boolean (True = padding), got {padding.dtype}")
        if padding is not None and padding.shape != source.shape[:2]:
            raise ValueError(f"key_padding_mask must have shape {tuple(source.shape[:2])}, got {tuple(padding.shape)}")
        return _attend(
            self._heads(q),
            self._heads(self.k_proj(source)),
            self._heads(self.v_proj(source)),
            None if padding is None else ~padding[:, None, None],
            is_causal=causal,
            projection=self.random_vectors(),
            feature_map=self.feature_map,
            log_gate=log_gate,
            normalize_qk=True,
            denominator="safe",
            chunk_size=self.chunk_size,
            state=state,
        )

    def summarize(self, context: Float[Tensor, "B Lk C"], key_padding_mask: Tensor | None = None) -> RfaState:
        """The summary of a source, for any number of queries: ``forward(x, state=summary)``.

        Args:
            context: ``(B, Lk, embed_dim)``.
            key_padding_mask: ``(B, Lk)``, True for padding.

        A summary belongs to the vectors it was made with: not to those of evaluation when made in training, nor to the next draw.

        Raises:
            ValueError: a module with a gate.
        """
        self._need_causal_gate(False)
        return self._attend(context[:, :0], context, key_padding_mask, False, None, None)[1]

    def init_state(self, batch: int) -> RfaState:
        """The state before the first position of a batch of B."""
        integer("batch", batch, low=1)
        R = MAPS[self.feature_map].num_features(self.num_features, self.head_dim)
        work = torch.float64 if self.projection.dtype == torch.float64 else torch.float32
        lead = (batch, self.num_heads)
        zeros = self.projection.new_zeros
        c = self.projection.new_full((*lead, R), NOTHING_SEEN, dtype=work)
        return RfaState(zeros(*lead, R, self.head_dim, dtype=work), zeros(*lead, R, dtype=work), zeros(*lead, dtype=work), c)

    def step(self, x_t: Float[Tensor, "B C"], state: RfaState) -> tuple[Tensor, RfaState]:
        """One more position ``(B, embed_dim)``; equal to the causal form, in time that does not depend on the position.

        Raises:
            StateError: a module made with ``causal=False``.
            ValueError: a state of another batch.
        """
        if x_t.ndim != 2:
            raise ValueError(f"step() takes one position of shape (batch, {self.embed_dim}), got {tuple(x_t.shape)}")
        if self.causal is False:
            raise StateError("step() continues a causal sequence; this module was made with causal=False")
        y, after = cast("tuple[Tensor, RfaState]", self(x_t[:, None], is_causal=True, state=state, return_state=True))
        return y[:, 0], after

    @torch.no_grad()
    def denominators(
        self,
        x: Float[Tensor, "B Lq C"],
        context: Float[Tensor, "B Lk C"] | None = None,
        key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
        *,
        warn_above: float = 0.05,
    ) -> DenominatorReport:
        """What becomes of the denominators on an input; warns where too many are replaced or negative.

        Args:
            x: as ``forward``, and so the rest.
            context: what to attend to.
            key_padding_mask: True for padding.
            is_causal: the module's ``causal``, else False.
            warn_above: share of replaced and negative denominators from which a warning is given.

        Raises:
            ValueError: as ``forward``, or no query sees a key.
        """
        causal = bool(self.causal) if is_causal is None else is_causal
        run = self._run(x, context, key_padding_mask, causal, None)[2]
        den, clamped = (t.reshape(len(x), self.num_heads, -1) for t in (run.den_NGL, run.clamped_NGL))
        keep = torch.ones(x.shape[:2] if context is None else context.shape[:2], dtype=torch.bool, device=x.device)
        if key_padding_mask is not None:
            keep = keep & ~key_padding_mask
        visible = keep.cumsum(-1) > 0 if causal else keep.any(-1, keepdim=True).expand(x.shape[:2])
        rows = int(visible.sum()) * self.num_heads
        if not rows:
            raise ValueError("no query sees a key: there is nothing to report")
        shown = visible[:, None]
        report = DenominatorReport(rows, float((clamped & shown).sum()) / rows, float(((den < 0.0) & ~clamped & shown).sum()) / rows)
        if report.clamped_share + report.negative_share > warn_above:
            message = (
                f"{100 * report.clamped_share:.1f} % of the denominators are too small to divide by and "
                f"{100 * report.negative_share:.1f} % are "
                f"negative: attention is sharper than {self.num_features} features can estimate. More features, a larger tau, or "
                "feature_map='arccos' help"
            )
            warnings.warn(message, OutlastWarning, stacklevel=2)
        return report

    def extra_repr(self) -> str:
        return (
            f"{self.embed_dim}, num_heads={self.num_heads}, num_features={self.num_features}, gate={self.gate_proj is not None}, "
            f"feature_map={self.feature_map!r}, tau={self.tau:g}, causal={self.causal}, {self._drawn()}"
        )


def rfa_parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Parameters for an optimizer, with the temperatures ``sigma`` of random feature attention kept out of weight decay.

    Args:
        model: holds any number of ``RandomFeatureAttention`` layers.
        weight_decay: for all other parameters.

    Example:
        ```python
        optimizer = torch.optim.AdamW(rfa_parameter_groups(model, weight_decay=0.1), lr=1e-3)
        ```
    """
    temperatures = {id(module.sigma) for module in model.modules() if isinstance(module, RandomFeatureAttention)}
    decayed = [parameter for parameter in model.parameters() if id(parameter) not in temperatures]
    kept = [parameter for parameter in model.parameters() if id(parameter) in temperatures]
    return [
        group for group in ({"params": decayed, "weight_decay": weight_decay}, {"params": kept, "weight_decay": 0.0}) if group["params"]
    ]
