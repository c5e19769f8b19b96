"""Cells that the studies of FAVOR+ and of random feature attention share: language, ListOps, decoding."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from outlast.studies._design import Arm, Metric, Outcome, Settings

if TYPE_CHECKING:
    import torch
    from torch import nn

    from outlast.studies._context import Context

Kind = Literal["none", "exact", "positive", "smreg", "relu", "elu1", "rfa", "rfa-gate", "rfa-arccos"]


class Network(Settings):
    """A small transformer whose attention is exchanged."""

    kind: Kind = "exact"
    width: int = Field(default=64, ge=4)
    heads: int = Field(default=2, ge=1)
    layers: int = Field(default=2, ge=1)
    features: int = Field(default=64, ge=1)
    redraw: int = Field(default=100, ge=1)
    steps: int = Field(default=400, ge=1)
    batch: int = Field(default=16, ge=1)
    lr: float = Field(default=2e-3, gt=0)

    def build(self, context: Context, symbols: int, length: int, outputs: int, **form: bool) -> nn.Module:
        """The network, initialised by the seed alone: all kinds of one seed share what they have in common."""
        from outlast.studies._sequence import SequenceModel

        return context.initialise(
            lambda: SequenceModel(
                symbols,
                length,
                outputs,
                self.kind,
                width=self.width,
                heads=self.heads,
                layers=self.layers,
                features=self.features,
                redraw=self.redraw,
                **form,
            )
        )

    def train(
        self, context: Context, model: nn.Module, inputs: torch.Tensor, targets: torch.Tensor, loss_fn: Any
    ) -> tuple[nn.Module, float]:
        """The trained network without wrappers, and milliseconds a step."""
        from outlast.studies._sequence import optimizer_of, warm_cosine

        start = context.clock()
        trained = context.train(
            model,
            optimizer_of(self.lr),
            inputs,
            targets,
            loss_fn=loss_fn,
            epochs=-(-self.steps // (len(inputs) // self.batch)),
            batch_size=self.batch,
            max_steps=self.steps,
            schedule=lambda optimizer, _: warm_cosine(optimizer, self.steps),
        )
        return context.plain(trained), 1e3 * (context.clock() - start) / self.steps


NONE = Arm("none", "no attention", "baseline", {"kind": "none"})
EXACT = Arm("exact", "softmax attention", "baseline")
POSITIVE = Arm("positive", "FAVOR+, positive features", "method", {"kind": "positive"})
SMREG = Arm("smreg", "FAVOR+, rows of one norm", "method", {"kind": "smreg"})
RELU = Arm("relu", "generalised kernel, ReLU", "method", {"kind": "relu"})
ELU1 = Arm("elu1", "linear transformer, elu + 1", "baseline", {"kind": "elu1"})
RFA = Arm("rfa", "random features", "method", {"kind": "rfa"})
RFA_GATE = Arm("rfa-gate", "random features with a gate", "method", {"kind": "rfa-gate"})
RFA_ARCCOS = Arm("rfa-arccos", "random features, arc cosine", "ablation", {"kind": "rfa-arccos"})


class Language(Network):
    """Next byte of English prose."""

    length: int = Field(default=128, ge=8)
    steps: int = Field(default=1500, ge=1)
    lr: float = Field(default=4e-3, gt=0)
    features: int = Field(default=32, ge=1)
    convolve: bool = False
    variant: Literal["full", "small"] = "full"
    test_windows: int = Field(default=128, ge=1)


LANGUAGE_METRICS = (
    Metric("bits", "Bits per byte, test", "bits", "lower", 3),
    Metric("last", "Of the last quarter of a window", "bits", "lower", 3),
    Metric("milliseconds", "A training step", "ms", None, 0),
)


def language_cell(config: Language, seed: int, context: Context) -> Outcome:
    """Train on random windows of the training novels and measure on other novels."""
    model, milliseconds, test = trained_language_model(config, context)
    from outlast.studies._sequence import bits, windows

    inputs, targets = windows(test, config.length, config.test_windows, context.generator("test windows"))
    each = bits(model, inputs, targets, context.fabric.device)
    quarter = config.length // 4
    return Outcome(
        {"bits": float(each.mean()), "last": float(each[-quarter:].mean()), "milliseconds": milliseconds},
        {"bits": [float(part.mean()) for part in each.tensor_split(16)]},
    )


def trained_language_model(config: Language, context: Context) -> tuple[nn.Module, float, torch.Tensor]:
    """The model, milliseconds a step, and the test text."""
    from outlast.data import load_text
    from outlast.studies._sequence import next_symbol_loss, windows

    text = load_text("novels", "train", variant=config.variant)
    inputs, targets = windows(text, config.length, config.steps * config.batch, context.generator("windows"))
    model = config.build(context, 256, config.length, 256, convolve=config.convolve)
    model, milliseconds = config.train(context, model, inputs, targets, next_symbol_loss)
    return model, milliseconds, load_text("novels", "test", variant=config.variant)


class ListOps(Network):
    """The value of a nested list expression, ten classes."""

    shortest: int = Field(default=16, ge=1)
    longest: int = Field(default=64, ge=4)
    depth: int = Field(default=3, ge=1)
    count: int = Field(default=12_000, ge=1)
    test_count: int = Field(default=2000, ge=1)


LISTOPS_METRICS = (Metric("accuracy", "Accuracy", "%", "higher"), Metric("milliseconds", "A training step", "ms", None, 0))


def listops_cell(config: ListOps, seed: int, context: Context) -> Outcome:
    """Train an encoder on expressions and measure on others."""
    import torch
    import torch.nn.functional as F

    from outlast.studies._sequence import LISTOPS_SYMBOLS, listops

    sizes = (config.shortest, config.longest)
    inputs, values = listops(config.count, *sizes, context.generator("expressions"), depth=config.depth)
    model = config.build(context, LISTOPS_SYMBOLS, config.longest, 10, classes=True)
    model, milliseconds = config.train(context, model, inputs, values, F.cross_entropy)
    test, answers = listops(config.test_count, *sizes, context.generator("test expressions"), depth=config.depth)
    model.eval()
    with torch.no_grad():
        hits = sum(
            int((model(x.to(context.fabric.device)).argmax(-1).cpu() == y).sum())
            for x, y in zip(test.split(100), answers.split(100), strict=True)
        )
    return Outcome({"accuracy": 100.0 * hits / config.test_count, "milliseconds": milliseconds})


@contextmanager
def one_thread() -> Generator[None]:
    """Timings on one thread, whatever the run has: starting a second one takes longer than a small step."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class Decoding(Settings):
    """One more position after a prefix, with random queries, keys and values."""

    kind: Literal["exact", "favor", "rfa"] = "favor"
    position: int = Field(default=128, ge=1)
    heads: int = Field(default=8, ge=1)
    head_dim: int = Field(default=64, ge=1)
    features: int = Field(default=64, ge=1)
    repeats: int = Field(default=200, ge=3)


DECODING_METRICS = (
    Metric("milliseconds", "A step", "ms", "lower", 3),
    Metric("kilobytes", "State or cache", "kB", "lower", 0),
)


def decoding_cell(config: Decoding, seed: int, context: Context) -> Outcome:
    """Median time of a step at a position, and the size of what it needs of the past."""
    import statistics
    from collections.abc import Callable

    import torch
    import torch.nn.functional as F

    from outlast.attention import draw_projection, favor_attention, rfa_attention

    stream, H, d = context.generator("decoding"), config.heads, config.head_dim
    device = context.fabric.device
    q, k, v = (torch.randn(1, H, config.position, d, generator=stream).to(device) for _ in range(3))
    new = [torch.randn(1, H, 1, d, generator=stream).to(device) for _ in range(3)]
    step: Callable[[], object]
    if config.kind == "exact":
        # A cache with room for the new position, as a decoder that does not copy it at each step has.
        keys, values = (torch.cat(pair, 2) for pair in ((k, new[1]), (v, new[2])))

        def exact() -> object:
            keys[:, :, -1:], values[:, :, -1:] = new[1], new[2]
            return F.scaled_dot_product_attention(new[0], keys, values)

        step, numbers = exact, 2 * H * config.position * d
    else:
        W = draw_projection(config.features, d, num_heads=H, generator=context.generator("vectors")).to(device)
        settings: dict[str, Any] = {"is_causal": True, "projection": W}
        attend: Any = favor_attention if config.kind == "favor" else rfa_attention
        _, state = attend(q, k, v, return_state=True, **settings)
        step, numbers = lambda: attend(*new, state=state, return_state=True, **settings), sum(part.numel() for part in state)
    times: list[float] = []
    with torch.no_grad(), one_thread():
        for _ in range(config.repeats + 20):
            start = context.clock()
            step()
            times.append(context.clock() - start)
    return Outcome({"milliseconds": 1e3 * statistics.median(times[20:]), "kilobytes": 4e-3 * numbers})
