"""Study ``rfa``: is random feature attention a good attention of its own, what does its gate bring, and what does decoding cost?

Peng et al., "Random Feature Attention", ICLR 2021: section 3.1 (the kernel), section 4.2 (language models with and without gate), section
4.3 (decoding). No sizes, steps or learning rates of the paper are at hand, so all parts are ours, at a size that two cores can train.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from outlast.studies._design import Arm, Claim, Figure, Metric, Outcome, Part, Scale, Setting, Settings, Study
from outlast.studies._results import difference
from outlast.studies._sequence_tasks import (
    DECODING_METRICS,
    ELU1,
    EXACT,
    LANGUAGE_METRICS,
    LISTOPS_METRICS,
    NONE,
    POSITIVE,
    RFA,
    RFA_ARCCOS,
    RFA_GATE,
    Decoding,
    Language,
    ListOps,
    Network,
    decoding_cell,
    language_cell,
    listops_cell,
    trained_language_model,
)

if TYPE_CHECKING:
    from torch import Tensor, nn

    from outlast.studies._context import Context
    from outlast.studies._results import Results

# ---- kernel -------------------------------------------------------------------------------------------------------------------


class Kernel(Settings):
    """Random unit queries and keys, one query a draw."""

    feature_map: Literal["gaussian", "arccos"] = "gaussian"
    features: int = Field(default=64, ge=1)
    tau: float = Field(default=1.0, gt=0)
    keys: int = Field(default=64, ge=1)
    head_dim: int = Field(default=64, ge=1)
    draws: int = Field(default=200, ge=2)


def kernel_cell(config: Kernel, seed: int, context: Context) -> Outcome:
    """Relative error of the denominator, which is a sum of kernels, and the share of negative ones."""
    import math

    import torch

    from outlast.attention._maps import MAPS

    stream = context.generator("inputs")
    d, each = config.head_dim, MAPS[config.feature_map]
    q, k = (torch.nn.functional.normalize(torch.randn(config.draws, n, d, generator=stream), dim=-1) for n in (1, config.keys))
    W = torch.randn(config.draws, config.features, d, generator=context.generator("vectors")) / config.tau
    fq, fk = (each.features(x, W, 1.0, query=query).value for x, query in ((q, True), (k, False)))
    assert fq is not None
    assert fk is not None
    sums = (fq * fk.sum(1, keepdim=True)).sum((1, 2)).double()
    cosine = (q @ k.mT)[:, 0].clamp(-1.0, 1.0).double()
    if config.feature_map == "gaussian":
        kernel = torch.exp((cosine - 1.0) / config.tau**2)
    else:
        angle = cosine.arccos()
        kernel = (angle.sin() + (math.pi - angle) * cosine) / (2.0 * math.pi * config.tau**2)
    exact = kernel.sum(1)
    return Outcome(
        {
            "error": 100.0 * float(((sums - exact) / exact).square().mean().sqrt()),
            "negative": 100.0 * float((sums < 0.0).double().mean()),
        }
    )


def _gain(results: Results, seed: int) -> float:
    """Slope of the logarithm of the error over the logarithm of the features, from 16 to 1,024."""
    import math

    return -math.log(results.value("gaussian", "error", seed, "d1024") / results.value("gaussian", "error", seed, "d16")) / math.log(64.0)


_KERNEL_SETTINGS = (
    *(Setting(f"d{features}", f"{features:,} vectors, tau 1", {"features": features}) for features in (16, 64, 256, 1024)),
    Setting("sharp", "64 vectors, tau 0.5", {"tau": 0.5}),
    Setting("sharp-one", "64 vectors, tau 0.5, one key", {"tau": 0.5, "keys": 1}),
    Setting("sharpest", "64 vectors, tau 0.25", {"tau": 0.25}),
)


def _draw_kernel(figure: Any, results: Results) -> None:
    axes = figure.subplots()
    sizes = (16, 64, 256, 1024)
    for arm in ("gaussian", "arccos"):
        axes.loglog(sizes, [results.mean(arm, "error", f"d{size}") for size in sizes], marker="o", label=arm)
    axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
    axes.set_yticks([2, 5, 10, 20, 40], ["2", "5", "10", "20", "40"])
    axes.minorticks_off()
    axes.set_xlabel("random vectors")
    axes.set_ylabel("relative error of the denominator, %")
    axes.legend()


def _describe_kernel(results: Results) -> str:
    parts = [
        f"{arm} {results.mean(arm, 'error', 'd16'):.1f} to {results.mean(arm, 'error', 'd1024'):.1f} %" for arm in ("gaussian", "arccos")
    ]
    return "Relative error of the denominator over 64 keys, from 16 to 1,024 random vectors: " + "; ".join(parts) + "."


_KERNEL = Part(
    name="kernel",
    question="How many random vectors does the kernel need, and when do denominators turn negative?",
    settings_type=Kernel,
    cell=kernel_cell,
    arms=(
        Arm("gaussian", "Gaussian features", "method"),
        Arm("arccos", "arc-cosine features", "ablation", {"feature_map": "arccos"}),
    ),
    metrics=(
        Metric("error", "Relative error of the denominator", "%", "lower"),
        Metric("negative", "Negative denominators", "%", "lower"),
    ),
    claims=(
        Claim("rate", "The error falls with the root of the number of vectors: exponent at least 0.4 (0.5 is exact)", _gain, 0.4, digits=2),
        Claim(
            "negative",
            "At tau 0.5 at least a quarter of the denominators over one key are negative",
            lambda results, seed: results.value("gaussian", "negative", seed, "sharp-one"),
            25.0,
            unit="%",
        ),
        Claim(
            "arccos",
            "Arc-cosine features never give a negative one",
            lambda results, seed: max(results.value("arccos", "negative", seed, setting.name) for setting in _KERNEL_SETTINGS),
            0.0,
            "at most",
            "%",
        ),
    ),
    figures=(Figure("error", "Error of the denominator against random vectors", _describe_kernel, _draw_kernel),),
    scales={
        "quick": Scale(arms=("gaussian", "arccos"), settings=_KERNEL_SETTINGS, minutes=0.1),
        "standard": Scale(arms=("gaussian", "arccos"), settings=_KERNEL_SETTINGS, changes={"draws": 1000}, minutes=0.2),
    },
)

# ---- language -------------------------------------------------------------------------------------------------------------------


_ALL = ("none", "exact", "rfa", "rfa-gate", "rfa-arccos", "elu1", "positive")

_LANGUAGE = Part(
    name="language",
    question="What does a language model gain by the gate, and lose against softmax attention?",
    settings_type=Language,
    cell=language_cell,
    arms=(NONE, EXACT, RFA, RFA_GATE, RFA_ARCCOS, ELU1, POSITIVE),
    metrics=LANGUAGE_METRICS,
    claims=(
        Claim(
            "gate",
            "The gate saves at least 0.1 bits per byte over random features without it",
            lambda results, seed: results.value("rfa", "bits", seed) - results.value("rfa-gate", "bits", seed),
            0.1,
            unit="bits",
            digits=3,
        ),
        Claim(
            "exact",
            "With the gate no bits per byte are lost against softmax attention after as many steps",
            difference("rfa-gate", "exact", "bits"),
            0.0,
            "at most",
            "bits",
            3,
        ),
        Claim(
            "arccos",
            "Gaussian features are better than arc-cosine ones",
            difference("rfa-arccos", "rfa", "bits"),
            0.0,
            unit="bits",
            digits=3,
            scales=("standard", "paper"),
        ),
    ),
    scales={
        "quick": Scale(
            arms=("exact", "rfa", "rfa-gate"),
            changes={"variant": "small", "width": 32, "batch": 8, "steps": 200, "features": 16, "test_windows": 64},
            data=(("novels", "small"),),
            dropped="most of the training, four kinds of attention",
            minutes=0.4,
        ),
        "standard": Scale(arms=_ALL, data=(("novels", "full"),), minutes=14),
        "paper": Scale(
            arms=_ALL,
            changes={"width": 512, "heads": 8, "layers": 6, "length": 512, "features": 64, "steps": 100_000, "lr": 1e-3, "redraw": 1000},
            data=(("novels", "full"),),
            minutes=3000,
            machine="a GPU (estimated)",
        ),
    },
    deviations=("novels byte by byte; the paper trains on WikiText-103",),
)


class Stateful(Language):
    """A language model that reads a text in segments."""

    segments: int = Field(default=8, ge=2)
    streams: int = Field(default=8, ge=1)


def stateful_cell(config: Stateful, seed: int, context: Context) -> Outcome:
    """Bits per byte of consecutive segments with the state carried from one to the next, and with the state reset."""
    import torch

    from outlast.studies._sequence import Random, SequenceModel

    model, _, test = trained_language_model(config, context)
    model.eval()
    assert isinstance(model, SequenceModel)
    whole = config.length * config.segments
    starts = torch.randint(0, len(test) - whole - 1, (config.streams,), generator=context.generator("streams"))
    text = test[starts[:, None] + torch.arange(whole + 1)].long().to(context.fabric.device)
    layers = [block.attend.layer for block in model.blocks if isinstance(block.attend, Random)]  # pyright: ignore[reportAttributeAccessIssue]

    @torch.no_grad()
    def measure(carry: bool) -> Tensor:
        total = torch.zeros(config.length, dtype=torch.float64)
        states = [layer.init_state(config.streams) for layer in layers]
        for segment in range(config.segments):
            at = segment * config.length
            symbols, targets = text[:, at : at + config.length], text[:, at + 1 : at + config.length + 1]
            if not carry:
                states = [layer.init_state(config.streams) for layer in layers]
            # The convolution sees the bytes before the segment either way: only the state differs.
            x = model.begin(symbols, text[:, at - 3 : at] if segment else None)
            for index, block in enumerate(model.blocks):
                attended, states[index] = layers[index](block.norm1(x), is_causal=True, state=states[index])  # pyright: ignore
                x = x + attended
                x = x + block.feed(block.norm2(x))  # pyright: ignore
            loss = torch.nn.functional.cross_entropy(model.head(model.norm(x)).mT, targets, reduction="none")
            if segment:  # the first has nothing to carry
                total += loss.sum(0).double().cpu() / 0.6931471805599453
        return total / (config.streams * (config.segments - 1))

    reset, carried = measure(False), measure(True)
    early = config.length // 8
    return Outcome(
        {
            "reset": float(reset.mean()),
            "carried": float(carried.mean()),
            "reset_early": float(reset[:early].mean()),
            "carried_early": float(carried[:early].mean()),
        },
        {"reset": [float(x.mean()) for x in reset.tensor_split(16)], "carried": [float(x.mean()) for x in carried.tensor_split(16)]},
    )


_STATEFUL = Part(
    name="stateful",
    question="Does a state that is carried from segment to segment help?",
    settings_type=Stateful,
    cell=stateful_cell,
    arms=(RFA, RFA_GATE),
    metrics=(
        Metric("reset", "Bits per byte, state reset", "bits", "lower", 3),
        Metric("carried", "State carried", "bits", "lower", 3),
        Metric("reset_early", "First eighth of a segment, reset", "bits", "lower", 3),
        Metric("carried_early", "First eighth, carried", "bits", "lower", 3),
    ),
    claims=(
        Claim(
            "early",
            "With the gate, the first eighth of a segment gains by the carried state",
            lambda results, seed: results.value("rfa-gate", "reset_early", seed) - results.value("rfa-gate", "carried_early", seed),
            0.0,
            unit="bits",
            digits=3,
        ),
        Claim(
            "whole",
            "With the gate, the segment as a whole gains by the carried state",
            lambda results, seed: results.value("rfa-gate", "reset", seed) - results.value("rfa-gate", "carried", seed),
            0.0,
            unit="bits",
            digits=3,
        ),
    ),
    scales={
        "standard": Scale(arms=("rfa", "rfa-gate"), changes={"convolve": True, "steps": 500}, data=(("novels", "full"),), minutes=4),
    },
)

# ---- recency --------------------------------------------------------------------------------------------------------------------


class Recency(Network):
    """Repeat the symbol of n steps ago."""

    distance: int = Field(default=16, ge=1)
    length: int = Field(default=128, ge=2)
    symbols: int = Field(default=16, ge=2)
    test_count: int = Field(default=64, ge=1)


def recency_cell(config: Recency, seed: int, context: Context) -> Outcome:
    """Train on random symbols and measure the share of positions that repeat the right one."""
    import torch

    from outlast.studies._sequence import next_symbol_loss

    def data(name: str, count: int) -> tuple[Tensor, Tensor]:
        x = torch.randint(0, config.symbols, (count, config.length), generator=context.generator(name))
        y = torch.full_like(x, -100)
        y[:, config.distance :] = x[:, : -config.distance]
        return x, y

    inputs, targets = data("symbols", config.steps * config.batch)
    model: nn.Module = config.build(context, config.symbols, config.length, config.symbols)
    model, milliseconds = config.train(context, model, inputs, targets, next_symbol_loss)
    test, answers = data("test symbols", config.test_count)
    model.eval()
    with torch.no_grad():
        hits = model(test.to(context.fabric.device)).argmax(-1).cpu() == answers
    return Outcome({"accuracy": 100.0 * float(hits[:, config.distance :].double().mean()), "milliseconds": milliseconds})


_DISTANCES = tuple(Setting(f"n{n}", f"{n} steps ago", {"distance": n}) for n in (4, 16, 64))

_RECENCY = Part(
    name="recency",
    question="From how far back can a symbol be recalled, with and without a gate?",
    settings_type=Recency,
    cell=recency_cell,
    arms=(EXACT, RFA, RFA_GATE),
    metrics=(Metric("accuracy", "Accuracy", "%", "higher"), Metric("milliseconds", "A training step", "ms", None, 0)),
    claims=(
        Claim(
            "near",
            "From 4 steps ago the gate recalls at least as well as random features without it",
            lambda results, seed: results.value("rfa-gate", "accuracy", seed, "n4") - results.value("rfa", "accuracy", seed, "n4"),
            -1.0,
            unit="points",
        ),
        Claim(
            "far",
            "From 64 steps ago the gate recalls less than random features without it",
            lambda results, seed: results.value("rfa", "accuracy", seed, "n64") - results.value("rfa-gate", "accuracy", seed, "n64"),
            0.0,
            unit="points",
        ),
    ),
    scales={
        "standard": Scale(
            arms=("exact", "rfa", "rfa-gate"),
            settings=_DISTANCES,
            changes={"width": 32, "features": 32, "steps": 600},
            minutes=9,
        ),
    },
    deviations=("a task of ours",),
)

# ---- decoding and ListOps --------------------------------------------------------------------------------------------------------

_POSITIONS = tuple(Setting(f"p{position}", f"position {position:,}", {"position": position}) for position in (128, 2048, 8192))

_DECODING = Part(
    name="decoding",
    timed=True,
    question="What does one more token cost?",
    settings_type=Decoding,
    cell=decoding_cell,
    arms=(
        Arm("rfa", "random features with their state", "method", {"kind": "rfa"}),
        Arm("exact", "exact attention with a cache", "baseline", {"kind": "exact"}),
    ),
    metrics=DECODING_METRICS,
    claims=(
        Claim(
            "flat",
            "A step at position 8,192 takes at most a tenth longer than at position 128",
            lambda results, seed: results.value("rfa", "milliseconds", seed, "p8192") / results.value("rfa", "milliseconds", seed, "p128"),
            1.1,
            "at most",
            "x",
            2,
        ),
        Claim(
            "memory",
            "At position 2,048 the state takes less than a tenth of the cache",
            lambda results, seed: results.value("rfa", "kilobytes", seed, "p2048") / results.value("exact", "kilobytes", seed, "p2048"),
            0.1,
            "at most",
            "x",
            3,
        ),
        Claim(
            "faster",
            "At position 8,192 a step is faster than exact attention's",
            lambda results, seed: (
                results.value("exact", "milliseconds", seed, "p8192") / results.value("rfa", "milliseconds", seed, "p8192")
            ),
            1.0,
            unit="x",
        ),
    ),
    scales={
        "quick": Scale(arms=("rfa", "exact"), settings=_POSITIONS, minutes=0.1),
        "standard": Scale(arms=("rfa", "exact"), settings=_POSITIONS, minutes=0.2),
    },
    version=2,
)

_LISTOPS = Part(
    name="listops",
    question="And an encoder of nested lists?",
    settings_type=ListOps,
    cell=listops_cell,
    arms=(EXACT, RFA, POSITIVE),
    metrics=LISTOPS_METRICS,
    claims=(
        Claim(
            "rfa",
            "On ListOps, random features cost at most 5 points of accuracy",
            lambda results, seed: results.value("exact", "accuracy", seed) - results.value("rfa", "accuracy", seed),
            5.0,
            "at most",
            "points",
        ),
    ),
    scales={"standard": Scale(arms=("exact", "rfa", "positive"), changes={"features": 32, "steps": 1000}, minutes=5)},
    deviations=("expressions of 16 to 64 symbols and depth 3; Long Range Arena has 500 to 2,000 and depth 10",),
)

STUDY = Study(
    name="rfa",
    title="Random feature attention",
    question="Is random feature attention a good attention of its own, what does its gate bring, and what does decoding cost?",
    paper="Peng et al., Random Feature Attention, ICLR 2021",
    follows="sections 3.1, 4.2 and 4.3, at a small size",
    theme="long sequences",
    parts=(_KERNEL, _LANGUAGE, _STATEFUL, _RECENCY, _DECODING, _LISTOPS),
    origin="outlast.studies.rfa:STUDY",
)
