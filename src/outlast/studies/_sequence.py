"""Sequences: the small transformer whose attention is exchanged, and the tasks that studies of attention train it on."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from outlast.attention import FavorAttention, RandomFeatureAttention, redraw_after_steps, rfa_parameter_groups
from outlast.studies._sequence_tasks import Kind

_RFA = {"rfa": "gaussian", "rfa-gate": "gaussian", "rfa-arccos": "arccos"}


class Projected(nn.Module):
    """Multi-head attention whose core is exact or FAVOR+."""

    def __init__(self, width: int, heads: int, core: nn.Module) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.core = core

    def forward(self, x: Tensor, padding: Tensor | None, is_causal: bool) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        keep = None if padding is None else ~padding[:, None, None]
        out = self.core(q, k, v, keep, is_causal=is_causal)
        return self.out(out.transpose(1, 2).flatten(-2))


class Exact(nn.Module):
    """Softmax attention."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None, *, is_causal: bool) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=keep, is_causal=is_causal)


class Nothing(nn.Module):
    """No attention: what the rest of the model can do alone."""

    def forward(self, x: Tensor, padding: Tensor | None, is_causal: bool) -> Tensor:
        return torch.zeros_like(x)


class Random(nn.Module):
    """A whole layer of random feature attention, in the form of ``Projected``."""

    def __init__(self, layer: RandomFeatureAttention) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, padding: Tensor | None, is_causal: bool) -> Tensor:
        out = self.layer(x, key_padding_mask=padding, is_causal=is_causal)
        assert isinstance(out, Tensor)
        return out


def attention(kind: Kind, width: int, heads: int, features: int, *, layer: int, redraw: int | None) -> nn.Module:
    """One attention layer, called as ``(x, padding, is_causal)``."""
    if kind == "none":
        return Nothing()
    if kind in _RFA:
        return Random(
            RandomFeatureAttention(
                width, heads, features, kind == "rfa-gate", feature_map=_RFA[kind], layer=layer, redraw_interval=1 if redraw else None
            )
        )
    if kind == "exact":
        return Projected(width, heads, Exact())
    feature_map: Any = "positive" if kind == "smreg" else kind
    norms: Any = "sqrt_d" if kind == "smreg" else "chi"
    core = FavorAttention(width // heads, heads, features, feature_map, norms, redraw, layer=layer)
    return Projected(width, heads, core)


class Block(nn.Module):
    """Attention and a feed-forward layer, each after its LayerNorm and around a residual."""

    def __init__(self, width: int, attend: nn.Module) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attend = attend
        self.feed = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, padding: Tensor | None, is_causal: bool) -> Tensor:
        x = x + self.attend(self.norm1(x), padding, is_causal)
        return x + self.feed(self.norm2(x))


class SequenceModel(nn.Module):
    """A transformer over symbols.

    Args:
        symbols: size of the alphabet; one more stands for padding where ``classes`` is given.
        length: longest sequence; order is learned by position.
        outputs: logits per position (causal), or per sequence where ``classes`` is set.
        kind: the attention.
        width: of the model.
        heads: of each layer.
        layers: their number.
        features: random vectors of a head.
        redraw: steps between draws of FAVOR+; random feature attention draws at every step. None: never.
        classes: encode the whole sequence, without a causal mask, and classify its mean.
        convolve: give order by a causal depthwise convolution over four positions instead, so that segments can go on for ever.
    """

    def __init__(
        self,
        symbols: int,
        length: int,
        outputs: int,
        kind: Kind,
        *,
        width: int,
        heads: int,
        layers: int,
        features: int,
        redraw: int | None,
        classes: bool = False,
        convolve: bool = False,
    ) -> None:
        super().__init__()
        self.padding = symbols if classes else None
        self.embed = nn.Embedding(symbols + classes, width)
        self.place = None if convolve else nn.Parameter(0.02 * torch.randn(length, width))
        self.near = nn.Conv1d(width, width, 4, groups=width) if convolve else None
        nn.init.normal_(self.embed.weight, std=0.02 if not convolve else 0.5)
        self.blocks = nn.ModuleList(
            Block(width, attention(kind, width, heads, features, layer=index, redraw=redraw)) for index in range(layers)
        )
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, outputs)

    def begin(self, symbols: Tensor, before: Tensor | None = None) -> Tensor:
        """What enters the first block; ``before`` are the three symbols before these."""
        x = self.embed(symbols)
        if self.place is not None:
            return x + self.place[: symbols.shape[1]]
        assert self.near is not None
        past = F.pad(x, (0, 0, 3, 0)) if before is None else torch.cat([self.embed(before), x], 1)
        return x + self.near(past.mT).mT

    def forward(self, symbols: Tensor) -> Tensor:
        padding = None if self.padding is None else symbols == self.padding
        x = self.begin(symbols)
        for block in self.blocks:
            x = block(x, padding, padding is None)
        x = self.norm(x)
        if padding is None:
            return self.head(x)
        weight = (~padding).to(x.dtype)[..., None]
        return self.head((x * weight).sum(1) / weight.sum(1))


def optimizer_of(lr: float, decay: float = 0.01) -> Callable[[nn.Module], torch.optim.Optimizer]:
    """AdamW whose steps redraw random vectors and whose decay leaves temperatures alone."""

    def make(model: nn.Module) -> torch.optim.Optimizer:
        optimizer = torch.optim.AdamW(rfa_parameter_groups(model, decay), lr=lr)
        if any(isinstance(module, FavorAttention | RandomFeatureAttention) for module in model.modules()):
            redraw_after_steps(model, optimizer)
        return optimizer

    return make


def warm_cosine(optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LRScheduler:
    """A tenth of the steps to warm up, then a cosine to zero."""
    warm = max(1, steps // 10)

    def rate(step: int) -> float:
        return (step + 1) / warm if step < warm else 0.5 * (1.0 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, rate)


def next_symbol_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of every position in nats; targets below 0 do not count."""
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten().long(), ignore_index=-100)


@torch.no_grad()
def bits(model: nn.Module, inputs: Tensor, targets: Tensor, device: torch.device, batch: int = 16) -> Tensor:
    """Mean bits of each position over sequences."""
    model.eval()
    total = torch.zeros(inputs.shape[1], dtype=torch.float64)
    for x, y in zip(inputs.split(batch), targets.split(batch), strict=True):
        loss = F.cross_entropy(model(x.to(device)).mT.float(), y.to(device).long(), reduction="none")
        total += loss.sum(0).double().cpu()
    return total / len(inputs) / math.log(2.0)


def windows(text: Tensor, length: int, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random windows of a text and the bytes that follow each position, int64 ``(count, length)``."""
    starts = torch.randint(0, len(text) - length - 1, (count,), generator=generator)
    both = text[starts[:, None] + torch.arange(length + 1)].long()
    return both[:, :-1], both[:, 1:]


# ---- ListOps: nested lists of MIN, MAX, MED and SUM modulo 10 ---------------------------------------------------------

_OPERATORS = ("MIN", "MAX", "MED", "SM")
LISTOPS_SYMBOLS = 10 + len(_OPERATORS) + 1  # digits, opening operators, the closing bracket


def _value(operator: int, arguments: list[int]) -> int:
    ordered = sorted(arguments)
    return (ordered[0], ordered[-1], ordered[len(ordered) // 2], sum(arguments) % 10)[operator]


def _tree(depth: int, most: int, draw: Callable[[int], int]) -> tuple[list[int], int]:
    if depth == 0 or draw(4) == 0:
        digit = draw(10)
        return [digit], digit
    operator = draw(len(_OPERATORS))
    symbols, values = [10 + operator], []
    for _ in range(2 + draw(most - 1)):
        part, value = _tree(depth - 1, most, draw)
        symbols += part
        values.append(value)
    return [*symbols, LISTOPS_SYMBOLS - 1], _value(operator, values)


def listops(count: int, shortest: int, longest: int, generator: torch.Generator, *, depth: int = 4, most: int = 5) -> tuple[Tensor, Tensor]:
    """Expressions and their values (Nangia, Bowman, 2018), of a length in a range, padded with one more symbol.

    Args:
        count: how many.
        shortest: fewest symbols.
        longest: most symbols, and the width of the result.
        generator: the source of randomness.
        depth: of nesting.
        most: arguments of an operator; the least is two.

    Returns:
        Symbols ``(count, longest)`` and values 0 to 9, int64.
    """
    pool: list[float] = []

    def draw(below: int) -> int:
        if not pool:
            pool.extend(torch.rand(100_000, generator=generator).tolist())
        return int(pool.pop() * below)

    rows = torch.full((count, longest), LISTOPS_SYMBOLS)
    values = torch.zeros(count, dtype=torch.int64)
    made = 0
    while made < count:
        symbols, value = _tree(depth, most, draw)
        if shortest <= len(symbols) <= longest:
            rows[made, : len(symbols)], values[made] = torch.tensor(symbols), value
            made += 1
    return rows, values
