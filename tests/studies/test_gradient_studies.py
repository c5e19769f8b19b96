"""The studies gpm and gradvac: their cells in small, their baselines against formulas."""

from __future__ import annotations

from dataclasses import asdict

import pytest
import torch
from helpers import rng
from torch import nn
from torch.nn import functional as F

from outlast.data import load_catalogues
from outlast.studies import get
from outlast.studies._context import Context
from outlast.studies._grid import Launch
from outlast.studies.gpm import _AGEM, _EWC, Permuted, Split, permuted_cell, split_cell
from outlast.studies.gradvac import EIGHT, FAMILIES, SIXTEEN, Kinship, Vaccine, _Text, kinship_cell, vaccine_cell

PERMUTED = Permuted(tasks=3, epochs=3, test_size=200, variant="small", train_size=1000, width=40)
SPLIT = Split(
    dataset="fashion-mnist", variant="small", tasks=2, train_size=100, test_size=50, epochs=1, channels=4, hidden=16, samples=40, lr=0.05
)


def context(seed=0):
    return Context(seed, asdict(Launch("cpu")), lambda *_: None)


@pytest.mark.parametrize(("optimizer", "lr"), [("sgd", 0.1), ("adam", 3e-3)])
def test_permuted_tasks_are_kept_by_the_step_and_under_adam_not_by_the_gradient(optimizer, lr):
    def learn(method):
        changes = {"method": method, "optimizer": optimizer, "lr": lr}
        return permuted_cell(PERMUTED.model_copy(update=changes), 0, context()).metrics

    plain, step, gradient = (learn(method) for method in ("none", "step", "gradient"))
    assert plain["learned"] > 80.0
    assert step["bwt"] > plain["bwt"] + 8.0
    if optimizer == "sgd":
        assert gradient["acc"] == pytest.approx(step["acc"], abs=0.5)
    else:
        assert gradient["bwt"] < step["bwt"] - 2.0
    again = learn("step")
    assert {k: v for k, v in again.items() if k != "train_seconds"} == {k: v for k, v in step.items() if k != "train_seconds"}


@pytest.mark.parametrize("arm", [arm.name for arm in get("gpm").part("split").arms])
def test_every_arm_of_the_split_part_runs(arm):
    changes = get("gpm").part("split").arm(arm).changes
    metrics = split_cell(SPLIT.model_copy(update=dict(changes)), 0, context()).metrics
    assert 0.0 <= metrics["acc"] <= 100.0
    assert set(metrics) == {metric.name for metric in get("gpm").part("split").metrics}


def test_ewc_is_its_formula():
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    images, labels = torch.randn(6, 3, generator=rng()), torch.arange(6) % 2
    penalty = _EWC(strength=5.0)
    assert penalty.penalty() == 0
    penalty.remember(model, images, labels, F.cross_entropy)
    assert penalty.penalty().item() == 0.0
    fisher = torch.zeros_like(model.weight)
    for x, y in zip(images, labels, strict=True):
        fisher += torch.autograd.grad(F.cross_entropy(model(x[None]), y[None]), model.weight)[0].square() / 6
    with torch.no_grad():
        model.weight += 0.5
    assert penalty.penalty().item() == pytest.approx(2.5 * 0.25 * float(fisher.sum()), rel=1e-5)
    assert model.training


def test_agem_projects_a_gradient_that_would_raise_the_stored_loss_and_no_other():
    for sign in (1.0, -1.0):
        torch.manual_seed(0)
        model = nn.Linear(4, 1, bias=False)
        stored = torch.randn(5, 4, generator=rng())

        def loss_fn(output, target):
            return (output[:, 0] * target).mean()

        memory = _AGEM(5, loss_fn)
        memory.remember(stored, torch.ones(5))
        reference = stored.mean(0)
        own = sign * reference + torch.tensor([0.3, -0.2, 0.1, 0.4])
        optimizer = memory.around(torch.optim.SGD(model.parameters(), lr=1.0), model)
        before = model.weight.detach().clone()

        def closure(model=model, own=own):
            model.weight.grad = own[None].clone()
            return torch.zeros(())

        optimizer.step(closure)
        moved = (before - model.weight.detach())[0]
        along = float(own @ reference)
        expected = own - along / float(reference @ reference) * reference if along < 0 else own
        assert (along < 0) == (sign < 0)
        torch.testing.assert_close(moved, expected)


def test_text_is_held_out_by_message_and_the_same_for_all_languages():
    pytest.importorskip("django")
    pytest.importorskip("wagtail")
    text = _Text(Vaccine(held_out=20, vocabulary=60), context())
    assert text.languages == EIGHT
    lengths = {language: int((text.test[language][1] == 0).sum()) for language in EIGHT}  # 0 ends a message
    assert set(lengths.values()) == {20}  # the same twenty messages, translated
    catalogue = load_catalogues(["fr"])["fr"]  # each message is in one of the two, with its end
    assert len(text.train["fr"][0]) + len(text.test["fr"][0]) == sum(len(message) + 1 for message in catalogue.values())
    low, high = (len(text.train[language][0]) for language in ("gl", "fr"))
    assert low < high / 5  # a hundred messages
    x, y = text.train["de"]
    assert x.shape[1] == 10
    assert int(max(x.max(), y.max())) < 60
    other = _Text(Vaccine(held_out=20, vocabulary=60), context(1))
    assert not torch.equal(other.test["de"][0][:50], text.test["de"][0][:50])


def test_kinship_compares_within_and_across_families():
    pytest.importorskip("django")
    pytest.importorskip("wagtail")
    assert sorted(SIXTEEN) == sorted(language for members in FAMILIES.values() for language in members)
    config = Kinship(steps=30, rows=16, width=24, vocabulary=60, held_out=40, similarity_rows=300)
    found = kinship_cell(config, 0, context())
    cosine = torch.tensor(found.series["cosine"]).reshape(16, 16)
    torch.testing.assert_close(cosine, cosine.T)
    torch.testing.assert_close(cosine.diagonal(), torch.ones(16))
    family = torch.tensor([number for number, members in enumerate(FAMILIES.values()) for _ in members])
    same = (family[:, None] == family[None]) & ~torch.eye(16, dtype=torch.bool)
    assert found.metrics["within"] == pytest.approx(float(cosine[same].mean()), abs=1e-6)
    assert found.metrics["across"] == pytest.approx(float(cosine[family[:, None] != family[None]].mean()), abs=1e-6)


def test_ways_of_combining_languages():
    pytest.importorskip("django")
    pytest.importorskip("wagtail")
    small = Vaccine(steps=20, rows=16, width=24, vocabulary=60, held_out=20)
    arms = {arm.name: arm.changes for arm in get("gradvac").part("vaccine").arms}
    shared = context()
    found = {name: vaccine_cell(small.model_copy(update=dict(changes)), 0, shared) for name, changes in arms.items()}
    assert len({outcome.metrics["all"] for outcome in found.values()}) == len(arms)  # no two are the same training
    assert found["sum"].metrics["acted"] == 0.0
    assert found["fixed-low"].metrics["target"] == pytest.approx(0.5)
    # the control takes its weights from the very vaccine that it is compared with
    assert found["static"].series["weights"] == found["fixed-low"].series["weights"]
    assert found["static"].metrics["largest_weight"] > 1.0
