"""Seeing every row that a weight multiplies, in any module, in functional use, with tied weights.

Forward hooks miss what modules do by functional calls: ``nn.MultiheadAttention`` never calls its own ``out_proj``. A
torch-function mode keyed by the identity of the weight sees them all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from outlast._core._calls import CALLS, bind, channel_rows, patches
from outlast.continual._sites import EmbeddingSite, LinearSite, Site

Find = Callable[[str, Tensor, Tensor | None, int], list[tuple[Site, bool]]]
_CHUNK = 1 << 24  # entries of patches that are formed at a time


class Sink(Protocol):
    """Who takes what the collector sees."""

    def rows(self, site: LinearSite, rows: Tensor, groups: slice) -> None: ...
    def tokens(self, site: EmbeddingSite, tokens: Tensor) -> None: ...


class Collector(TorchFunctionMode):
    """Hands the rows of each known weight to a sink.

    Args:
        find: the sites of ``(kind, weight, bias, groups)`` as they stand in a call, and whether the call adds the site's
            bias; an empty list for weights of others.
        sink: takes rows ``(groups, n, d)``; where the site has its bias in the map, with a constant behind: 1, or 0 where
            the call does not add it.
        odd: told of parameters in calls that are no linear map, with the call's name.
    """

    def __init__(self, find: Find, sink: Sink, odd: Callable[[object, str], None]) -> None:
        super().__init__()
        self._find = find
        self._sink = sink
        self._odd = odd

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        found = CALLS.get(func)
        if found is not None:
            kind, names = found
            with torch.no_grad():
                self._look(kind, bind(names, args, kwargs))
            return func(*args, **kwargs)
        out = func(*args, **kwargs)
        if any(isinstance(leaf, Tensor) for leaf in tree_leaves(out)):  # else it asked for a shape or a device
            for leaf in tree_leaves((args, kwargs)):
                if isinstance(leaf, nn.Parameter):
                    self._odd(leaf, getattr(func, "__name__", str(func)))
        return out

    def _look(self, kind: str, call: dict[str, Any]) -> None:
        if kind == "attention":
            self._attention(call)
            return
        weight = call.get("weight")
        if kind.endswith("norm") or not isinstance(weight, Tensor):
            return
        groups = int(call.get("groups", 1))
        for site, joint in self._find("embedding" if kind.startswith("embedding") else kind, weight, call.get("bias"), groups):
            x: Tensor = call["input"].detach()
            if isinstance(site, EmbeddingSite):
                self._sink.tokens(site, x)
            elif kind in ("linear", "addmm"):
                self._give(site, x.reshape(1, -1, x.shape[-1]), joint=joint)
            else:
                x = x if x.ndim == weight.ndim else x[None]
                make = patches if kind == "conv" else channel_rows
                positions = x[0].numel() * (weight[0, 0].numel() if kind == "conv" else 1)  # at most, with stride 1
                for part in x.split(max(1, _CHUNK // max(1, positions))):
                    self._give(site, make(part, weight, call), joint=joint)

    def _give(self, site: LinearSite, rows: Tensor, groups: slice = slice(None), *, joint: bool) -> None:
        rows = rows.detach()
        if site.bias is not None:
            constant = rows.new_ones if joint else rows.new_zeros
            rows = torch.cat([rows, constant(*rows.shape[:-1], 1)], -1)
        self._sink.rows(site, rows, groups)

    def _attention(self, call: dict[str, Any]) -> None:
        inputs: tuple[Tensor, ...] = (call["query"], call["key"], call["value"])
        bias: Tensor | None = call["in_proj_bias"]
        if call.get("use_separate_proj_weight"):
            for x, name in zip(inputs, ("q_proj_weight", "k_proj_weight", "v_proj_weight"), strict=True):
                for site, joint in self._find("linear", call[name], bias, 1):
                    assert isinstance(site, LinearSite)
                    self._give(site, x.reshape(1, -1, x.shape[-1]), joint=joint)
        else:
            for site, joint in self._find("attention", call["in_proj_weight"], bias, 3):
                assert isinstance(site, LinearSite)
                same = all(other is inputs[0] or _same_view(other, inputs[0]) for other in inputs[1:])
                if site.shared and not same:
                    site.split()
                inputs = inputs[:1] if site.shared else inputs
                for number, x in enumerate(inputs):
                    self._give(
                        site, x.reshape(1, -1, x.shape[-1]), slice(number, number + 1) if not site.shared else slice(None), joint=joint
                    )
        out: Tensor = call["out_proj_weight"]
        sites = self._find("linear", out, call["out_proj_bias"], 1)
        if sites:
            # With an identity for its last map the call returns the rows that the real one multiplies.
            eye = torch.eye(out.shape[1], dtype=out.dtype, device=out.device)
            changes: dict[str, Any] = {"out_proj_weight": eye, "out_proj_bias": None, "training": False, "need_weights": False}
            context, _ = F.multi_head_attention_forward(**(call | changes))
            for site, joint in sites:
                assert isinstance(site, LinearSite)
                self._give(site, context.reshape(1, -1, context.shape[-1]), joint=joint)


def _same_view(left: Tensor, right: Tensor) -> bool:
    """Whether two tensors are the same memory seen the same way: ``batch_first`` transposes each input on its own."""
    return left.data_ptr() == right.data_ptr() and left.shape == right.shape and left.stride() == right.stride()


@contextmanager
def _no_fast_path() -> Any:
    """Attention's fused path in eval mode would not call the functions that the collector sees."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


@contextmanager
def collecting(find: Find, sink: Sink, odd: Callable[[object, str], None]) -> Any:
    """Collect during the body."""
    mode: AbstractContextManager[Any] = Collector(find, sink, odd)
    with _no_fast_path(), mode:
        yield
