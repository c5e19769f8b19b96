"""Study ``performer``: how good is the linear estimate of softmax attention, where is it faster, and what does it cost a model?

Choromanski et al., "Rethinking Attention with Performers", ICLR 2021: figure 4 (error against features), figure 3 (speed), section 4.2 (a
pretrained transformer converted), table 1 and section 4.4 at a size that two cores can train.
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
    RELU,
    SMREG,
    Decoding,
    Language,
    ListOps,
    Network,
    decoding_cell,
    language_cell,
    listops_cell,
    one_thread,
)

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from outlast.studies._context import Context
    from outlast.studies._results import Results

# ---- kernel: error of the estimate ------------------------------------------------------------------------------------------


class Kernel(Settings):
    """Attention on Gaussian queries, keys and values under many draws of the random vectors."""

    feature_map: Literal["positive", "hyperbolic", "trig"] = "positive"
    orthogonal: bool = True
    norms: Literal["chi", "sqrt_d"] = "chi"
    features: int = Field(default=64, ge=2)
    size: float = Field(default=1.0, gt=0)
    length: int = Field(default=1024, ge=2)
    head_dim: int = Field(default=16, ge=1)
    draws: int = Field(default=100, ge=2)


def kernel_cell(config: Kernel, seed: int, context: Context) -> Outcome:
    """Error of the output over draws; R features for every map, so that maps with two a vector get half the vectors."""
    import torch
    import torch.nn.functional as F

    from outlast.attention import draw_projection, favor_attention

    stream = context.generator("inputs")
    q, k, v = (torch.randn(1, 1, config.length, config.head_dim, generator=stream) for _ in range(3))
    q, k = config.size * q, config.size * k
    exact = F.scaled_dot_product_attention(q, k, v)
    vectors = config.features if config.feature_map == "positive" else config.features // 2
    W = draw_projection(
        vectors,
        config.head_dim,
        num_heads=config.draws,
        orthogonal=config.orthogonal,
        norms=config.norms,
        generator=context.generator("vectors"),
    )
    each: list[Tensor] = []
    for part in W.split(10):
        query, key, value = (x.expand(1, len(part), -1, -1) for x in (q, k, v))
        found = favor_attention(query, key, value, projection=part, feature_map=config.feature_map)
        each.append((found - exact).square().mean((0, 2, 3)))
    errors = torch.cat(each).double()
    return Outcome({"error": float(errors.median()), "log_error": float(errors.log10().mean())})


def _decades(worse: str, better: str, setting: str) -> Any:
    """Decades of output error between two arms, mean of the logarithm over draws."""
    return lambda results, seed: results.value(worse, "log_error", seed, setting) - results.value(better, "log_error", seed, setting)


def _wall(results: Results, seed: int) -> float:
    """Decades that doubled norms cost more than 16 times the features gain."""
    return results.value("orthogonal", "log_error", seed, "long") - results.value("orthogonal", "log_error", seed, "m16")


_KERNEL_SETTINGS = (
    Setting("m16", "16 features", {"features": 16}),
    Setting("m64", "64 features", {"features": 64}),
    Setting("m256", "256 features", {"features": 256}),
    Setting("long", "256 features, queries and keys twice as long", {"features": 256, "size": 2.0}),
)
_KERNEL_ARMS = ("orthogonal", "independent", "smreg", "hyperbolic", "trig")


def _draw_kernel(figure: Any, results: Results) -> None:
    axes = figure.subplots()
    for arm in _KERNEL_ARMS:
        values = [results.mean(arm, "error", setting) for setting in ("m16", "m64", "m256")]
        axes.loglog([16, 64, 256], values, marker="o", label=arm)
    axes.set_xticks([16, 64, 256], ["16", "64", "256"])
    axes.minorticks_off()
    axes.set_xlabel("features")
    axes.set_ylabel("squared error of the output")
    figure.legend(loc="outside lower center", ncols=3)


def _describe_kernel(results: Results) -> str:
    parts = [f"{arm} {results.mean(arm, 'error', 'm16'):.2g} to {results.mean(arm, 'error', 'm256'):.2g}" for arm in _KERNEL_ARMS]
    return "Median squared error of the output from 16 to 256 features, mean over seeds: " + "; ".join(parts) + "."


_KERNEL = Part(
    name="kernel",
    question="How far is the estimate from softmax attention, and which random vectors are best?",
    settings_type=Kernel,
    cell=kernel_cell,
    arms=(
        Arm("orthogonal", "positive features, orthogonal rows", "method"),
        Arm("independent", "positive features, independent rows", "ablation", {"orthogonal": False}),
        Arm("smreg", "positive features, rows of one norm", "method", {"norms": "sqrt_d"}),
        Arm("hyperbolic", "hyperbolic features", "ablation", {"feature_map": "hyperbolic"}),
        Arm("trig", "trigonometric features", "baseline", {"feature_map": "trig"}),
    ),
    metrics=(
        Metric("error", "Squared error of the output (median)", "", "lower", 5),
        Metric("log_error", "Its decimal logarithm (mean)", "", "lower", 2),
    ),
    claims=(
        Claim(
            "positive",
            "With 64 features, positive ones err at least 100 times less than trigonometric ones",
            _decades("trig", "orthogonal", "m64"),
            2.0,
            unit="decades",
            digits=2,
        ),
        Claim(
            "orthogonal",
            "With 256 features, orthogonal rows err less than independent ones",
            _decades("independent", "orthogonal", "m256"),
            0.0,
            unit="decades",
            digits=2,
        ),
        Claim(
            "smreg",
            "With 256 features, rows of one norm err less still, although their estimate is biased",
            _decades("orthogonal", "smreg", "m256"),
            0.0,
            unit="decades",
            digits=2,
        ),
        Claim(
            "wall",
            "Twice as long queries and keys cost more than 16 times the features can make up",
            _wall,
            0.0,
            unit="decades",
            digits=2,
        ),
    ),
    figures=(Figure("error", "Error against features, queries and keys of unit variance", _describe_kernel, _draw_kernel),),
    scales={
        "quick": Scale(
            arms=_KERNEL_ARMS,
            settings=_KERNEL_SETTINGS,
            changes={"length": 256, "draws": 50},
            dropped="half of the draws, three quarters of the length",
            minutes=0.1,
        ),
        "standard": Scale(arms=_KERNEL_ARMS, settings=_KERNEL_SETTINGS, minutes=1),
        "paper": Scale(arms=_KERNEL_ARMS, settings=_KERNEL_SETTINGS, changes={"length": 4096}, minutes=5),
    },
)

# ---- speed --------------------------------------------------------------------------------------------------------------------


class Speed(Settings):
    """Causal attention over four heads of size 64, one sequence."""

    features: int = Field(default=256, ge=1)
    length: int = Field(default=2048, ge=1)
    chunk: int = Field(default=128, ge=1)
    repeats: int = Field(default=3, ge=1)


def speed_cell(config: Speed, seed: int, context: Context) -> Outcome:
    """Exact and linear attention in turns on one thread, forward and with backward; medians."""
    import statistics

    import torch
    import torch.nn.functional as F

    from outlast.attention import draw_projection, favor_attention

    stream, device = context.generator("inputs"), context.fabric.device
    q, k, v = (torch.randn(1, 4, config.length, 64, generator=stream).to(device).requires_grad_() for _ in range(3))
    W = draw_projection(config.features, 64, num_heads=4, generator=context.generator("vectors")).to(device)
    rivals = {
        "exact": lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True),
        "linear": lambda: favor_attention(q, k, v, is_causal=True, projection=W, chunk_size=config.chunk),
    }
    times: dict[str, list[float]] = {f"{name} {what}": [] for name in rivals for what in ("forward", "both")}
    with one_thread():
        for repeat in range(config.repeats + 1):
            for name, attend in rivals.items():
                start = context.clock()
                with torch.no_grad():
                    attend()
                middle = context.clock()
                attend().sum().backward()
                end = context.clock()
                if repeat:
                    times[f"{name} forward"].append(1e3 * (middle - start))
                    times[f"{name} both"].append(1e3 * (end - middle))
    found = {name: statistics.median(values) for name, values in times.items()}
    return Outcome(
        {
            "exact_forward": found["exact forward"],
            "forward": found["linear forward"],
            "speedup": found["exact forward"] / found["linear forward"],
            "exact_both": found["exact both"],
            "both": found["linear both"],
            "speedup_both": found["exact both"] / found["linear both"],
        }
    )


def _speedup(arm: str, metric: str, setting: str) -> Any:
    return lambda results, seed: results.value(arm, metric, seed, setting)


_LENGTHS = (512, 1024, 2048, 4096, 8192, 16_384, 32_768)
_LENGTH_SETTINGS = tuple(
    Setting(f"l{length}", f"{length:,} positions", {"length": length} | ({"repeats": 1} if length > 20_000 else {})) for length in _LENGTHS
)


def _draw_speed(figure: Any, results: Results) -> None:
    axes = figure.subplots(1, 2, sharey=True)
    lengths = [length for length in _LENGTHS if f"l{length}" in results.settings]
    for ax, metric, title in zip(axes, ("speedup", "speedup_both"), ("forward", "forward and backward"), strict=True):
        for arm in ("favor-256", "favor-64"):
            ax.loglog(lengths, [results.mean(arm, metric, f"l{length}") for length in lengths], marker="o", label=arm)
        ax.axhline(1.0, color="grey", linestyle="--", label="exact attention")
        ax.set_title(title)
        shown = lengths[:: 2 if len(lengths) > 4 else 1]
        ax.set_xticks(shown, [f"{length:,}" for length in shown])
        ax.set_xlabel("positions")
    low, high = axes[0].get_ylim()
    marks = [mark for mark in (0.5, 1, 2, 5, 10, 20, 40) if low <= mark <= high]
    for ax in axes:
        ax.set_yticks(marks, [f"{mark:g}" for mark in marks])
        ax.minorticks_off()
    axes[0].set_ylabel("times as fast as exact attention")
    lines = axes[0].get_lines()
    figure.legend(lines, [line.get_label() for line in lines], loc="outside lower center", ncols=3)


def _describe_speed(results: Results) -> str:
    longest = results.settings[-1]
    parts = [
        f"{arm}: {results.mean(arm, 'speedup', longest):.1f} times forward, {results.mean(arm, 'speedup_both', longest):.1f} with backward"
        for arm in ("favor-256", "favor-64")
    ]
    return f"Speed over exact attention on one thread at {longest[1:]} positions, mean over seeds. " + "; ".join(parts) + "."


_SPEED = Part(
    name="speed",
    timed=True,
    question="From which length on is it faster than exact attention?",
    settings_type=Speed,
    cell=speed_cell,
    arms=(
        Arm("favor-256", "FAVOR+, 256 features", "method"),
        Arm("favor-64", "FAVOR+, 64 features", "method", {"features": 64}),
    ),
    metrics=(
        Metric("exact_forward", "Exact, forward", "ms", None),
        Metric("forward", "Forward", "ms", "lower"),
        Metric("speedup", "Speed-up forward", "x", "higher", 2),
        Metric("exact_both", "Exact, with backward", "ms", None),
        Metric("both", "With backward", "ms", "lower"),
        Metric("speedup_both", "Speed-up with backward", "x", "higher", 2),
    ),
    claims=(
        Claim(
            "forward",
            "256 features: at 4,096 positions at least 1.5 times as fast, forward",
            _speedup("favor-256", "speedup", "l4096"),
            1.5,
            unit="x",
        ),
        Claim(
            "both",
            "256 features: at 4,096 positions at least 1.5 times as fast, with backward",
            _speedup("favor-256", "speedup_both", "l4096"),
            1.5,
            unit="x",
        ),
        Claim(
            "forward-long",
            "256 features: at 16,384 positions at least twice as fast, forward",
            _speedup("favor-256", "speedup", "l16384"),
            2.0,
            unit="x",
            scales=("standard",),
        ),
        Claim(
            "both-long",
            "256 features: at 16,384 positions at least four times as fast, with backward",
            _speedup("favor-256", "speedup_both", "l16384"),
            4.0,
            unit="x",
            scales=("standard",),
        ),
        Claim(
            "few",
            "64 features: at 16,384 positions more than five times as fast, forward",
            _speedup("favor-64", "speedup", "l16384"),
            5.0,
            unit="x",
            scales=("standard",),
        ),
        Claim(
            "few-both",
            "64 features: at 16,384 positions more than five times as fast, with backward",
            _speedup("favor-64", "speedup_both", "l16384"),
            5.0,
            unit="x",
            scales=("standard",),
        ),
    ),
    figures=(Figure("speed", "Speed over exact attention on one thread", _describe_speed, _draw_speed),),
    scales={
        "quick": Scale(
            arms=("favor-256", "favor-64"),
            settings=_LENGTH_SETTINGS[:4],
            changes={"repeats": 1},
            dropped="two of three repetitions, lengths above 4,096",
            minutes=0.2,
        ),
        "standard": Scale(arms=("favor-256", "favor-64"), settings=_LENGTH_SETTINGS, minutes=12),
    },
    deviations=("a processor with one thread; the paper times accelerators",),
)

# ---- decoding -------------------------------------------------------------------------------------------------------------------

_POSITIONS = tuple(Setting(f"p{position}", f"position {position:,}", {"position": position}) for position in (100, 1000, 10_000))

_DECODING = Part(
    name="decoding",
    timed=True,
    question="What does one more token cost?",
    settings_type=Decoding,
    cell=decoding_cell,
    arms=(
        Arm("favor", "FAVOR+ with its state", "method"),
        Arm("exact", "exact attention with a cache", "baseline", {"kind": "exact"}),
    ),
    metrics=DECODING_METRICS,
    claims=(
        Claim(
            "flat",
            "A step at position 10,000 takes at most a tenth longer than at position 100",
            lambda results, seed: (
                results.value("favor", "milliseconds", seed, "p10000") / results.value("favor", "milliseconds", seed, "p100")
            ),
            1.1,
            "at most",
            "x",
            2,
        ),
    ),
    scales={
        "quick": Scale(arms=("favor", "exact"), settings=_POSITIONS, changes={"features": 256}, minutes=0.1),
        "standard": Scale(arms=("favor", "exact"), settings=_POSITIONS, changes={"features": 256}, minutes=0.2),
    },
    version=2,
)

# ---- models trained with it -----------------------------------------------------------------------------------------------------


_LANGUAGE = Part(
    name="language",
    question="What does a language model lose that is trained with it?",
    settings_type=Language,
    cell=language_cell,
    arms=(NONE, EXACT, POSITIVE, SMREG, RELU, ELU1),
    metrics=LANGUAGE_METRICS,
    claims=(
        Claim(
            "positive",
            "After as many steps positive features are at least 0.1 bits per byte behind exact attention: sharp look-ups are learnt later",
            difference("positive", "exact", "bits"),
            0.1,
            unit="bits",
            digits=3,
        ),
        Claim(
            "used",
            "After as many steps positive features are at least 0.3 bits per byte ahead of no attention",
            lambda results, seed: results.value("none", "bits", seed) - results.value("positive", "bits", seed),
            0.3,
            unit="bits",
            digits=3,
        ),
        Claim(
            "relu",
            "On text, the ReLU kernel is no worse than the estimate of softmax",
            lambda results, seed: results.value("positive", "bits", seed) - results.value("relu", "bits", seed),
            0.0,
            unit="bits",
            digits=3,
        ),
    ),
    scales={
        "standard": Scale(arms=("none", "exact", "positive", "smreg", "relu", "elu1"), data=(("novels", "full"),), minutes=9),
        "paper": Scale(
            arms=("none", "exact", "positive", "smreg", "relu", "elu1"),
            changes={"width": 512, "heads": 8, "layers": 6, "length": 8192, "features": 256, "steps": 100_000, "lr": 1e-3, "redraw": 1000},
            data=(("novels", "full"),),
            minutes=6000,
            machine="a GPU (estimated)",
        ),
    },
    deviations=("novels byte by byte; the paper trains on proteins, PG-19 and LM1B",),
)


class Pixels(Network):
    """Grey values of Fashion-MNIST, one after another."""

    side: int = Field(default=28, ge=4, le=28)
    count: int = Field(default=10_000, ge=1)
    test_count: int = Field(default=200, ge=1)
    levels: int = Field(default=256, ge=2, le=256)


def pixels_cell(config: Pixels, seed: int, context: Context) -> Outcome:
    """Predict each pixel from those before it; the first from a constant."""
    import torch

    from outlast.data import load
    from outlast.studies._sequence import bits, next_symbol_loss

    def pictures(split: Literal["train", "test"], count: int) -> tuple[torch.Tensor, torch.Tensor]:
        images = load("fashion-mnist", split, variant="small").images
        chosen = torch.randperm(len(images), generator=context.generator(split))[:count]
        values = images[chosen].flatten(1).long() * config.levels // 256
        return torch.nn.functional.pad(values, (1, -1)), values

    inputs, targets = pictures("train", config.count)
    model = config.build(context, config.levels, inputs.shape[1], config.levels)
    model, milliseconds = config.train(context, model, inputs, targets, next_symbol_loss)
    test, values = pictures("test", config.test_count)
    each = bits(model, test, values, context.fabric.device, 8)
    return Outcome({"bits": float(each.mean()), "milliseconds": milliseconds})


_PIXELS = Part(
    name="pixels",
    question="And a model of pictures, pixel by pixel?",
    settings_type=Pixels,
    cell=pixels_cell,
    arms=(EXACT, POSITIVE, RELU),
    metrics=(Metric("bits", "Bits per dimension, test", "bits", "lower", 3), Metric("milliseconds", "A training step", "ms", None, 0)),
    claims=(
        Claim(
            "positive",
            "On pixels, positive features cost at most 0.1 bits per dimension",
            difference("positive", "exact", "bits"),
            0.1,
            "at most",
            "bits",
            3,
        ),
        Claim(
            "relu",
            "On pixels, the ReLU kernel costs at most 0.1 bits per dimension",
            difference("relu", "exact", "bits"),
            0.1,
            "at most",
            "bits",
            3,
        ),
    ),
    scales={
        "standard": Scale(arms=("exact", "positive", "relu"), changes={"batch": 4}, data=(("fashion-mnist", "small"),), minutes=6),
    },
    deviations=("Fashion-MNIST with 784 positions; the paper has ImageNet64 with 12,288",),
)

_LISTOPS = Part(
    name="listops",
    question="And an encoder of nested lists?",
    settings_type=ListOps,
    cell=listops_cell,
    arms=(EXACT, POSITIVE, RELU),
    metrics=LISTOPS_METRICS,
    claims=(
        Claim(
            "positive",
            "On ListOps, positive features cost at most 5 points of accuracy",
            lambda results, seed: results.value("exact", "accuracy", seed) - results.value("positive", "accuracy", seed),
            5.0,
            "at most",
            "points",
        ),
    ),
    scales={"standard": Scale(arms=("exact", "positive", "relu"), changes={"steps": 1000}, minutes=5)},
    deviations=("expressions of 16 to 64 symbols and depth 3; Long Range Arena has 500 to 2,000 and depth 10",),
)

# ---- a pretrained encoder ----------------------------------------------------------------------------------------------------------


class Sentences(Settings):
    """all-MiniLM-L6-v2, converted without training."""

    attention: Literal["exact", "uniform", "favor"] = "favor"
    feature_map: Literal["positive", "hyperbolic", "trig", "elu1"] = "positive"
    features: int = Field(default=256, ge=1)
    orthogonal: bool = True
    norms: Literal["chi", "sqrt_d"] = "chi"
    texts: int = Field(default=200, ge=8)
    tokens: int = Field(default=128, ge=8)
    tuning_steps: int = Field(default=0, ge=0)
    tuning_batch: int = Field(default=16, ge=1)
    lr: float = Field(default=2e-5, gt=0)


def _docstrings() -> list[str]:
    """Unique docstrings of the standard library, at most two a module, in the order of modules."""
    import importlib
    import inspect
    import sys
    import warnings

    found: dict[str, None] = {}
    skipped = {"antigravity", "this", "idlelib", "turtledemo", "lib2to3"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in sorted(sys.stdlib_module_names - skipped):
            if name.startswith("_"):
                continue
            try:
                module = importlib.import_module(name)
            except Exception:  # noqa: S112  modules of other platforms fail in their own ways
                continue
            kept = 0
            members = [module, *(value for _, value in sorted(vars(module).items()) if inspect.isclass(value) or inspect.isfunction(value))]
            for member in members:
                text = inspect.getdoc(member)
                # Attributes of a type repeat its docstring: identical texts would fake perfect agreement.
                if text is not None and len(text) > 200 and getattr(member, "__module__", name) == name and text not in found:
                    found[text] = None
                    kept += 1
                if kept == 2:
                    break
    return list(found)


def sentences_cell(config: Sentences, seed: int, context: Context) -> Outcome:
    """Embed texts with exact and with converted attention, and compare what users see: the similarities between texts."""
    import copy
    import os

    import torch

    from outlast._core._extras import require
    from outlast.attention import convert_attention
    from outlast.data import find_encoder

    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    transformers = require("transformers", extra="text", purpose="the part 'sentences'")
    require("transformers.utils.logging", extra="text", purpose="the part 'sentences'").disable_progress_bar()  # of 103 tensors
    folder = str(find_encoder())
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    exact = transformers.AutoModel.from_pretrained(folder).eval()
    texts = _docstrings()
    order = torch.randperm(len(texts), generator=context.generator("texts")).tolist()
    chosen, others = [texts[i] for i in order[: config.texts]], [texts[i] for i in order[config.texts :]]

    def embed(model: Any, batch: list[str]) -> torch.Tensor:
        parts: list[torch.Tensor] = []
        for start in range(0, len(batch), 16):
            given = tokenizer(batch[start : start + 16], padding=True, truncation=True, max_length=config.tokens, return_tensors="pt")
            hidden = model(**given).last_hidden_state
            keep = given["attention_mask"][..., None]
            parts.append(torch.nn.functional.normalize((hidden * keep).sum(1) / keep.sum(1), dim=-1))
        return torch.cat(parts)

    with torch.no_grad():
        target = embed(exact, chosen)
    model = copy.deepcopy(exact)
    # The control of convert_attention compares exact attention through the same hooks, and raises beyond 1e-4.
    with _quiet():
        convert_attention(
            model,
            config.features,
            feature_map=config.feature_map,
            orthogonal=config.orthogonal,
            norms=config.norms,
            seed=seed,
            redraw_interval=None,
        )
    if config.attention == "exact":
        model.set_attn_implementation("outlast_exact")
    elif config.attention == "uniform":
        for layer in model.encoder.layer:
            for projection in (layer.attention.self.query, layer.attention.self.key):
                torch.nn.init.zeros_(projection.weight)
                torch.nn.init.zeros_(projection.bias)
        model.set_attn_implementation("outlast_exact")
    if config.tuning_steps:
        _tune(model, exact, embed, others, config, context)
    with torch.no_grad():
        found = embed(model.eval(), chosen)
    cosine = float((found * target).sum(-1).mean())
    return Outcome({"cosine": cosine, **_agreement(found, target)})


def _quiet() -> Any:
    """Dropout of attention is not applied in evaluation anyway."""
    import contextlib
    import warnings

    @contextlib.contextmanager
    def quiet() -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield

    return quiet()


def _agreement(found: Tensor, target: Tensor) -> dict[str, float]:
    import torch

    def ranks(x: Tensor) -> Tensor:
        return x.argsort().argsort().double()

    n = len(found)
    pairs = torch.triu_indices(n, n, 1)
    ours, theirs = ((x @ x.T) for x in (found, target))
    both = torch.stack([ranks(ours[pairs[0], pairs[1]]), ranks(theirs[pairs[0], pairs[1]])])
    nearest = [x.fill_diagonal_(-2.0).argmax(1) for x in (ours, theirs)]
    return {"spearman": float(torch.corrcoef(both)[0, 1]), "nearest": 100.0 * float((nearest[0] == nearest[1]).double().mean())}


def _tune(model: Any, exact: Any, embed: Any, texts: list[str], config: Sentences, context: Context) -> None:
    """Match the exact model's embeddings on texts that are not measured."""
    import torch

    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr)
    stream = context.generator("tuning")
    model.eval()  # without dropout: the target has none
    for step in range(config.tuning_steps):
        batch = [texts[i] for i in torch.randint(0, len(texts), (config.tuning_batch,), generator=stream).tolist()]
        with torch.no_grad():
            target = embed(exact, batch)
        loss = (embed(model, batch) - target).square().sum(-1).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        context.report(step + 1, config.tuning_steps, float(loss.detach()))


_SENTENCE_METRICS = (
    Metric("cosine", "Cosine with exact embeddings", "", "higher", 3),
    Metric("spearman", "Rank correlation of similarities", "", "higher", 3),
    Metric("nearest", "Same nearest text", "%", "higher", 0),
)

_SENTENCES = Part(
    name="sentences",
    question="What remains of a pretrained text encoder that is converted without training?",
    settings_type=Sentences,
    cell=sentences_cell,
    arms=(
        Arm("exact", "exact attention through the same hooks", "baseline", {"attention": "exact", "features": 1}),
        Arm("uniform", "mean of the values", "baseline", {"attention": "uniform", "features": 1}),
        Arm("elu1", "elu + 1", "baseline", {"feature_map": "elu1", "features": 1}),
        Arm("trig", "trigonometric, 256 features", "baseline", {"feature_map": "trig", "features": 128}),
        Arm("positive-64", "positive, 64 features", "method", {"features": 64}),
        Arm("positive-256", "positive, 256 features", "method"),
        Arm("positive-1024", "positive, 1,024 features", "method", {"features": 1024}),
        Arm("independent", "positive, 256, independent rows", "ablation", {"orthogonal": False}),
        Arm("smreg", "positive, 256, rows of one norm", "method", {"norms": "sqrt_d"}),
        Arm("hyperbolic", "hyperbolic, 256 features", "ablation", {"feature_map": "hyperbolic", "features": 128}),
    ),
    metrics=_SENTENCE_METRICS,
    claims=(
        Claim(
            "control",
            "Exact attention through the same hooks gives the same embeddings (cosine short of 1)",
            lambda results, seed: 1.0 - results.value("exact", "cosine", seed),
            1e-4,
            "at most",
            digits=6,
        ),
        Claim(
            "information",
            "256 positive features come at least 0.1 in cosine nearer to exact embeddings than the mean of the values",
            lambda results, seed: results.value("positive-256", "cosine", seed) - results.value("uniform", "cosine", seed),
            0.1,
            digits=3,
        ),
        Claim(
            "not-faithful",
            "It is no faithful swap: the cosine stays below 0.9",
            lambda results, seed: results.value("positive-256", "cosine", seed),
            0.9,
            "at most",
            digits=3,
        ),
    ),
    scales={
        "standard": Scale(
            arms=(
                "exact",
                "uniform",
                "elu1",
                "trig",
                "positive-64",
                "positive-256",
                "positive-1024",
                "independent",
                "smreg",
                "hyperbolic",
            ),
            data=(("minilm", "package"),),
            minutes=8,
        ),
    },
    deviations=("a sentence encoder and docstrings of the standard library; the paper converts a language model of LM1B",),
)

_FINETUNE = Part(
    name="finetune",
    question="How much comes back with a little training?",
    settings_type=Sentences,
    cell=sentences_cell,
    arms=(
        Arm("converted", "converted, 256 positive features", "baseline"),
        Arm("tuned", "and tuned to match the embeddings of other texts", "method", {"tuning_steps": 200}),
    ),
    metrics=_SENTENCE_METRICS,
    claims=(
        Claim(
            "recovers",
            "200 steps of matching embeddings bring back at least half of the lost cosine",
            lambda results, seed: (
                (results.value("tuned", "cosine", seed) - results.value("converted", "cosine", seed))
                / (1.0 - results.value("converted", "cosine", seed))
            ),
            0.5,
            digits=2,
        ),
    ),
    scales={
        "standard": Scale(arms=("converted", "tuned"), changes={"texts": 100, "tokens": 64}, data=(("minilm", "package"),), minutes=6),
    },
)

STUDY = Study(
    name="performer",
    title="Performer: linear attention by positive random features",
    question="How good is the linear estimate of softmax attention, where is it faster, and what does it cost a model?",
    paper="Choromanski et al., Rethinking Attention with Performers, ICLR 2021",
    follows="figures 3 and 4, section 4.2; tables at a small size",
    theme="long sequences",
    parts=(_KERNEL, _SPEED, _DECODING, _LANGUAGE, _PIXELS, _LISTOPS, _SENTENCES, _FINETUNE),
    origin="outlast.studies.performer:STUDY",
)
