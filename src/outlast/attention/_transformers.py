"""Linear attention inside models of the transformers library."""

from __future__ import annotations

import warnings
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from outlast._core._checks import integer, real
from outlast._core._extras import require
from outlast._core._norm import eval_mode
from outlast._core._random import generator as derived_generator
from outlast.attention._favor import FavorAttention, FavorState
from outlast.errors import OutlastWarning, UnsupportedError

NAME = "outlast_favor"
_CONTROL = "outlast_exact"
_DROPOUTS = ("attention_probs_dropout_prob", "attention_dropout", "attn_pdrop", "attn_dropout")


def convert_attention(
    model: nn.Module,
    num_features: int = 256,
    *,
    feature_map: str = "positive",
    norms: Literal["chi", "sqrt_d"] = "chi",
    orthogonal: bool = True,
    redraw_interval: int | None = 1000,
    seed: int = 0,
    chunk_size: int = 128,
    example_inputs: Mapping[str, Any] | None = None,
    tolerance: float = 1e-4,
) -> nn.Module:
    """Replace softmax attention in a transformers model by FAVOR+, in place.

    Registers an attention function **and** a mask function (without the latter the library drops padding masks silently), then gives each
    attention layer random vectors of its own, as a ``FavorAttention`` named ``outlast_favor``. Before that, exact softmax attention
    goes through the same two hooks on a padded batch and must reproduce the model's own output.

    Without training the estimate is rough: measure with ``attention_error``, fine-tune, or train from scratch. In training,
    ``redraw_after_steps(model, optimizer)`` redraws. ``model.set_attn_implementation("sdpa")`` brings exact attention back
    (the random vectors stay in the state dict). ``generate``
    works and keeps its cache of keys and values: each step costs time linear in the position, not constant. ``from_pretrained`` does not
    know the vectors: convert what it gives with the same settings, then ``load_state_dict`` of the converted model brings draws and
    counters back.

    Args:
        model: a transformers model whose attention goes through the library's registry.
        num_features: random vectors of a head.
        feature_map: as ``favor_attention``.
        norms: as ``draw_projection``.
        orthogonal: as ``draw_projection``.
        redraw_interval: as ``FavorAttention``.
        seed: of the draws.
        chunk_size: as ``favor_attention``.
        example_inputs: keyword arguments of a forward pass for the control; random token ids with padding where the model takes
            ``input_ids``.
        tolerance: largest difference of the control from the model's own output, relative to its largest entry; never less than four
            roundings of the model's precision.

    Returns:
        The same model.

    Raises:
        MissingExtraError: transformers is not installed (extra ``text``).
        TypeError: not a transformers model.
        ValueError: example inputs are needed, or settings that ``FavorAttention`` refuses.
        UnsupportedError: attention does not go through the registry, needs masks over pairs (sliding windows, packed sequences), or the
            control does not agree. The model is then as it was.
    """
    transformers = require("transformers", extra="text", purpose="convert_attention()")
    if not isinstance(model, transformers.PreTrainedModel):
        raise TypeError(
            f"model must be a transformers model, got {type(model).__name__}; for others, call favor_attention in the layer itself"
        )
    integer("num_features", num_features, low=1)
    real("tolerance", tolerance, low=0.0)
    _register(transformers)
    inputs = _example(model, seed) if example_inputs is None else dict(example_inputs)
    before = _implementations(model)
    seen: dict[nn.Module, tuple[int, int, int]] = {}
    try:
        with torch.no_grad(), eval_mode(model):
            if NAME in before.values():  # converted already: the control is against exact attention
                _set(model, "sdpa")
            own = _output(model, inputs)
            _set(model, _CONTROL)
            with _recording(seen):
                control = _output(model, inputs)
        if not seen:
            raise UnsupportedError(f"attention of {type(model).__name__} does not go through the library's registry of attention functions")
        _compare(own, control, inputs, max(tolerance, 4.0 * torch.finfo(own.dtype).eps))
        # Before anything is attached, so that refused settings leave the model alone.
        layers = [
            (
                module,
                FavorAttention(
                    size,
                    heads,
                    num_features,
                    feature_map,
                    norms,
                    redraw_interval,
                    seed,
                    layer=index,
                    orthogonal=orthogonal,
                    num_kv_heads=kv_heads,
                    chunk_size=chunk_size,
                    device=next(module.parameters()).device,
                    dtype=torch.float32,
                ),
            )
            for index, (module, (size, heads, kv_heads)) in enumerate(seen.items())
        ]
    except BaseException:
        _restore(model, before)
        raise
    for module, layer in layers:
        module.add_module(NAME, layer.train(module.training))
    _set(model, NAME)
    dropped = [name for name in _DROPOUTS if getattr(model.config, name, 0.0)]
    if dropped:
        message = (
            f"{dropped[0]}={getattr(model.config, dropped[0])} of the model is not applied: "
            "linear attention has no matrix of weights to drop from"
        )
        warnings.warn(message, OutlastWarning, stacklevel=2)
    return model


def _register(transformers: Any) -> None:
    masks = require("transformers.masking_utils", extra="text", purpose="convert_attention()")
    for name, function in ((NAME, _favor), (_CONTROL, _exact)):
        transformers.AttentionInterface.register(name, function)
        transformers.AttentionMaskInterface.register(name, _mask_for(masks))


def _mask_for(masks: Any) -> Any:
    """The mask function: padding over keys, or None. Causality is left to the attention function."""

    def padding(
        batch_size: int,
        q_length: int,
        kv_length: int,
        q_offset: int = 0,
        kv_offset: int = 0,
        mask_function: Any = masks.causal_mask_function,
        attention_mask: Tensor | None = None,
        **_: Any,
    ) -> Tensor | None:
        if mask_function not in (masks.causal_mask_function, masks.bidirectional_mask_function):
            raise UnsupportedError(
                "the model asks for a mask over pairs of queries and keys (a sliding window, packed sequences, an overlay), "
                "which linear attention cannot apply"
            )
        if int(kv_offset) != 0 or (mask_function is masks.causal_mask_function and int(q_offset) + q_length != kv_length):
            raise UnsupportedError("the cache does not hold exactly the keys up to the last query; use the default dynamic cache")
        if attention_mask is None:
            return None
        keep = attention_mask.bool()[:, :kv_length]
        keep = F.pad(keep, (0, kv_length - keep.shape[-1]))
        return keep[:, None, None]

    return padding


_recorded: list[dict[nn.Module, tuple[int, int, int]]] = []


@contextmanager
def _recording(seen: dict[nn.Module, tuple[int, int, int]]) -> Generator[None]:
    _recorded.append(seen)
    try:
        yield
    finally:
        _recorded.pop()


def _causal(module: nn.Module, is_causal: bool | None, query: Tensor) -> bool:
    return bool(getattr(module, "is_causal", True) if is_causal is None else is_causal) and query.shape[2] > 1


def _refuse(extra: Mapping[str, Any]) -> None:
    for name in ("sliding_window", "softcap", "s_aux", "position_bias", "head_mask"):
        if extra.get(name) is not None:
            raise UnsupportedError(f"the model's attention uses {name}, which linear attention does not have")


def _exact(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **extra: Any,
) -> tuple[Tensor, None]:
    """Exact attention from what the hooks hand over: the control."""
    _refuse(extra)
    for seen in _recorded[-1:]:
        seen[module] = (query.shape[-1], query.shape[1], key.shape[1])
    Lq, Lk = query.shape[2], key.shape[2]
    allowed = torch.ones(Lq, Lk, dtype=torch.bool, device=query.device)
    if _causal(module, is_causal, query):
        allowed = allowed.tril(Lk - Lq)
    if attention_mask is not None:
        allowed = allowed & attention_mask
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=allowed, scale=scaling, enable_gqa=query.shape[1] != key.shape[1])
    return out.transpose(1, 2).contiguous(), None


def _favor(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **extra: Any,
) -> tuple[Tensor, None]:
    """FAVOR+ with the vectors of the layer. The library's attention dropout is not applied, as convert_attention said."""
    _refuse(extra)
    layer = getattr(module, NAME, None)
    if not isinstance(layer, FavorAttention):
        raise UnsupportedError(f"{type(module).__name__} has no random vectors: convert the model with outlast.attention.convert_attention")
    past = key.shape[2] - query.shape[2]
    causal = _causal(module, is_causal, query)
    state: FavorState | None = None
    if causal and past > 0:  # several queries after a cache: the cached keys are summarised first
        mask = None if attention_mask is None else attention_mask[..., :past]
        _, state = layer(query[:, :, :0], key[:, :, :past], value[:, :, :past], mask, scale=scaling, return_state=True)
        key, value = key[:, :, past:], value[:, :, past:]
        attention_mask = None if attention_mask is None else attention_mask[..., past:]
    out = layer(query, key, value, attention_mask, is_causal=causal, scale=scaling, state=state)
    return out.transpose(1, 2).contiguous(), None


def _example(model: Any, seed: int) -> dict[str, Any]:
    """Two rows of random tokens, the second shorter and padded."""
    vocabulary = getattr(model.config.get_text_config(), "vocab_size", None)
    if model.main_input_name != "input_ids" or vocabulary is None:
        raise ValueError(
            f"{type(model).__name__} takes {model.main_input_name}: give example_inputs, the keyword arguments of a forward pass"
        )
    ids = torch.randint(0, vocabulary, (2, 12), generator=derived_generator(seed, "example tokens"), device="cpu").to(model.device)
    keep = torch.ones_like(ids)
    keep[1, 7:] = 0
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": keep}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids[:, :5]
    return inputs


def _output(model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    found = model(**inputs)
    return found[0]


def _compare(own: Tensor, control: Tensor, inputs: Mapping[str, Any], tolerance: float) -> None:
    keep = inputs.get("attention_mask")
    if isinstance(keep, Tensor) and keep.shape == own.shape[:2]:  # what stands at padded positions means nothing
        own, control = own[keep.bool()], control[keep.bool()]
    difference = float((own - control).abs().max() / own.abs().max().clamp_min(1e-12))
    if not difference <= tolerance:  # NaN included
        raise UnsupportedError(
            f"exact attention through the hooks differs from the model's own by {difference:.1e} (at most {tolerance:g}): "
            "the model's attention does something that the hooks do not see, so it cannot be converted"
        )


def _implementations(model: Any) -> dict[nn.Module, str | None]:
    return {
        module: module.config._attn_implementation
        for module in model.modules()
        if hasattr(getattr(module, "config", None), "_attn_implementation")
    }


def _set(model: Any, name: str) -> None:
    model.set_attn_implementation(name)


def _restore(model: Any, before: Mapping[nn.Module, str | None]) -> None:
    for module, name in before.items():
        config: Any = module.config
        config._attn_implementation = name
