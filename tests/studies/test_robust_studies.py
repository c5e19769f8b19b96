"""The studies of mixup, its theory and group-invariant predictions at toy size."""

from __future__ import annotations

from dataclasses import asdict

import pytest
import torch
from helpers import rng
from torch.nn import functional as F

from outlast.studies import _group_baselines as baselines
from outlast.studies._context import Context
from outlast.studies._grid import Launch
from outlast.studies.group_invariance import STUDY as GROUPS
from outlast.studies.group_invariance import Coloured, _colours, _data
from outlast.studies.group_invariance import cell as coloured_cell
from outlast.studies.mixup import STUDY as MIXUP
from outlast.studies.mixup import Training
from outlast.studies.mixup import cell as mixup_cell
from outlast.studies.mixup_theory import STUDY as THEORY
from outlast.studies.mixup_theory import Bound, Expansion, Moons, _two_moons, bound_cell, expansion_cell, moons_cell

SMALL = Coloured(variant="small", images=1000, width=2, epochs=3, batch_size=64)


def context(seed=0):
    return Context(seed, asdict(Launch("cpu")), lambda *_: None)


@pytest.fixture
def cold(monkeypatch):
    """No work shared with earlier cells."""
    monkeypatch.setattr("outlast.studies._context._SHARED", {})


@pytest.mark.parametrize("arm", [arm.name for arm in MIXUP.parts[0].arms])
def test_cells_of_mixup_repeat(arm):
    part = MIXUP.parts[0]
    config = Training(variant="small", train_size=128, epochs=1, attacked=100, **part.arm(arm).changes)
    first = mixup_cell(config, 0, context())
    assert dict(first.metrics) == dict(mixup_cell(config, 0, context()).metrics)
    assert set(first.metrics) == {metric.name for metric in part.metrics}


@pytest.mark.parametrize("objective", ["standard", "exact", "approximate"])
@pytest.mark.parametrize("model", ["logistic", "relu"])
def test_cells_of_moons(objective, model):
    found = moons_cell(Moons(objective=objective, model=model, n=10, steps=4, checks=2), 0, context())
    assert set(found.metrics) == {metric.name for metric in THEORY.part("moons").metrics}
    assert len(found.series["exact"]) == 3
    assert found.series["exact"][-1] < found.series["exact"][0]


def test_moons_are_two_half_circles():
    points, y = _two_moons(1000, 0.0, rng())
    upper, lower = points[y == 0], points[y == 1]
    torch.testing.assert_close(upper.norm(dim=1), torch.ones(500, dtype=torch.float64))
    torch.testing.assert_close((lower - torch.tensor([1.0, 0.5], dtype=torch.float64)).norm(dim=1), torch.ones(500, dtype=torch.float64))
    assert float(upper[:, 1].min()) >= 0.0
    assert float(lower[:, 1].max()) <= 0.5


def test_cells_of_expansion_and_bound():
    small, large = (expansion_cell(Expansion(scale=scale, models=3), 0, context()) for scale in (0.1, 10.0))
    assert small.metrics["error"] < 0.01 < large.metrics["error"]
    for model in ("linear", "relu"):
        assert bound_cell(Bound(model=model, models=5), 0, context()).metrics["holds"] == 100.0
    for broken in ("labels", "centre"):
        assert bound_cell(Bound(broken=broken, models=5), 0, context()).metrics["holds"] == 0.0


@pytest.mark.filterwarnings("ignore::outlast.errors.OutlastWarning")  # the reference is a toy
@pytest.mark.parametrize("arm", [arm.name for arm in GROUPS.parts[0].arms])
def test_cells_of_group_invariance_do_not_depend_on_what_ran_before(arm, cold):
    part = GROUPS.parts[0]
    config = SMALL.model_copy(update=dict(part.arm(arm).changes))
    first = coloured_cell(config, 0, context())
    assert dict(first.metrics) == dict(coloured_cell(config, 0, context()).metrics)
    assert set(first.metrics) == {metric.name for metric in part.metrics}


def test_colours_are_far_apart_and_shifted_as_said(cold):
    own, minority, unseen = _colours()
    every = [*own, *minority, *unseen]
    assert (len(own), len(minority), len(unseen)) == (9, 10, 10)
    for colours, before in ((minority, own), (unseen, [*own, *minority])):
        assert min(sum((a - b) ** 2 for a, b in zip(one, two, strict=True)) for one in colours for two in before) > 2500
    assert len(set(every)) == 29
    data = _data(SMALL, context())
    x, y = data["systematic"]
    painted = torch.stack([image.flatten(1).amax(1) for image in x])
    table = torch.tensor(own) / 255.0
    nearest = torch.cdist((painted + 1) / 2, table).argmin(1)
    assert float((nearest == y).float().mean()) < 0.02  # the thinnest strokes are dark at 14x14
    assert abs(float(data["minority"].float().mean()) - 0.2) < 0.05
    assert float(_data(SMALL.model_copy(update={"biased": False}), context())["minority"].float().mean()) == 1.0


def test_baselines_are_their_formulas():
    logits = torch.randn(20, 3, generator=rng()).requires_grad_()
    labels, groups = torch.randint(0, 3, (20,), generator=rng(1)), torch.arange(20) // 10
    risks = [F.cross_entropy(logits[groups == g], labels[groups == g]) for g in (0, 1)]
    torch.testing.assert_close(baselines.rex(logits, labels, groups), 0.25 * (risks[0] - risks[1]).square())
    weights = torch.where(groups == 1, 1.0, 0.25)
    expected = (weights * F.cross_entropy(logits, labels, reduction="none")).sum() / weights.sum()
    torch.testing.assert_close(baselines.reweighted(logits, labels, groups, 3.0), expected)
    products = []
    for g in (0, 1):
        halves = []
        for half in (slice(0, None, 2), slice(1, None, 2)):
            mu = torch.ones(3, requires_grad=True)
            loss = F.cross_entropy(logits[groups == g][half] * mu, labels[groups == g][half])
            halves.append(torch.autograd.grad(loss, mu, create_graph=True)[0])
        products.append((halves[0] * halves[1]).sum())
    torch.testing.assert_close(baselines.irm(logits, labels, groups), sum(products) / 2)
    q = torch.tensor([0.5, 0.5])
    value = baselines.dro(logits, labels, groups, q, 0.1)
    ratio = torch.stack(risks).detach() / sum(risks).detach()
    q_expected = (0.1 * ratio).exp() / (0.1 * ratio).exp().sum()
    torch.testing.assert_close(q, q_expected)
    torch.testing.assert_close(value, q_expected[0] * risks[0] + q_expected[1] * risks[1])
    same = torch.randn(10, 4, generator=rng(2)).repeat(2, 1)
    assert float(baselines.cmmd(same, torch.zeros(20, dtype=torch.int64), groups)) == pytest.approx(0.0, abs=1e-6)


def test_penalty_beats_plain_training_by_half_of_what_is_claimed(cold):
    quick = GROUPS.parts[0].scales["quick"]
    found = {}
    for name in ("erm", "balanced", "pgi"):
        config = Coloured(**quick.changes, **GROUPS.parts[0].arm(name).changes)
        found[name] = coloured_cell(config, 0, context()).metrics
    assert found["pgi"]["systematic"] - found["erm"]["systematic"] >= 10.0
    assert found["pgi"]["systematic"] - found["balanced"]["systematic"] >= 5.0
    assert found["pgi"]["in"] - found["erm"]["in"] >= -6.0
    assert found["pgi"]["ap_unseen"] - found["erm"]["ap_unseen"] >= 10.0
