"""Methods together, as docs/composition.md promises: mixed precision, accumulation, two processes, resumption."""

from __future__ import annotations

import copy

import pytest
import torch
from compositions import ALL, APART, NO_PARTS, STEPS, Composition, VaccineMemory, WithMemory, in_two, sgd
from helpers import families, in_processes, mlp, same
from torch.utils._pytree import tree_leaves

from outlast.multitask import GradVac

KINDS = pytest.mark.parametrize("kind", ALL, ids=lambda kind: kind.__name__)


def plain(model):
    return model


def farthest(a, b):
    return float((a.float() - b.float()).abs().max())


def assert_close(left, right, tolerance):
    for a, b in zip(left, right, strict=True):
        torch.testing.assert_close(a.float(), b.float(), rtol=0, atol=tolerance)


@KINDS
def test_training_repeats_and_moves_every_weight(kind):
    made = kind(plain)
    start = [p.detach().clone() for p in made.model.parameters()]
    first = made.run(range(STEPS))
    assert same(first, kind(plain).run(range(STEPS)))
    assert all(not torch.equal(a, b) for a, b in zip(start, made.model.parameters(), strict=True))


@KINDS
def test_resumption_is_bit_for_bit(kind, tmp_path):
    for cut in (2, 4):  # within the first task and within the second
        whole, half = kind(plain), kind(plain)
        expected = whole.run(range(STEPS))
        half.run(range(cut))
        torch.save(half.state(), tmp_path / "state.pt")
        resumed = kind(plain)
        resumed.load(torch.load(tmp_path / "state.pt", weights_only=True))
        assert same(expected, resumed.run(range(cut, STEPS)))


@pytest.mark.parametrize("kind", [kind for kind in ALL if kind not in NO_PARTS], ids=lambda kind: kind.__name__)
def test_accumulated_pieces_are_the_whole_batch(kind):
    assert_close(kind(plain).run(range(STEPS), parts=2), kind(plain).run(range(STEPS)), 2e-5)


@KINDS
def test_bf16_autocast_trains_near_float32(kind):
    exact = kind(plain).run(range(STEPS))
    start = list(kind(plain).model.state_dict().values())
    made = kind(plain)
    made.bf16 = True
    mixed = made.run(range(STEPS))
    way = torch.cat([(a.double() - b.double()).flatten() for a, b in zip(exact, start, strict=True)])
    apart = torch.cat([(a.double() - b.double()).flatten() for a, b in zip(exact, mixed, strict=True)])
    assert 0.0 < float(apart.norm()) < 0.25 * float(way.norm())
    assert all(value.dtype == torch.float32 for value in made.model.parameters())


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without distributed")
def test_two_processes_train_as_one(tmp_path):
    alone = in_two(0, 1)
    first, second = in_processes(in_two, tmp_path)
    for name, expected in alone.items():
        assert same(first[name], second[name]), name
        assert name in {kind.__name__ for kind in APART} or max(map(farthest, first[name], expected)) < 5e-5, name


@pytest.mark.parametrize("kind", [kind for kind in ALL if issubclass(kind, WithMemory)], ids=lambda kind: kind.__name__)
def test_the_memory_holds_what_the_first_task_used(kind):
    """Layers give the old inputs what they gave, whatever makes the steps."""
    free, held = kind(plain), kind(plain)
    old = held.batch(50)
    for made in (free, held):
        made.run(range(STEPS // 2 - 1))
        made.step(STEPS // 2 - 1, 1, lambda x: x)
        if made is held:
            made.memory.consolidate([old], max_samples=None)
        first = next(m for m in made.model.modules() if isinstance(m, torch.nn.Linear | torch.nn.Conv2d))
        seen = []
        hook = first.register_forward_hook(lambda _m, inputs, out, seen=seen: seen.append((inputs[0].detach(), out.detach())))
        made.model(old[0])
        for number in range(STEPS // 2, STEPS):
            made.step(number, 1, lambda x: x)
        made.model(old[0])
        hook.remove()
        made.moved = float((seen[-1][1] - seen[0][1]).norm())
    assert held.memory.ranks
    assert free.moved > 0.1
    assert held.moved < 0.01 * free.moved


@pytest.mark.filterwarnings("ignore:the model has no BatchNorm")
def test_tent_follows_other_trainings():
    """On a converted network and on one with a memory, which adapting a copy leaves alone."""
    from outlast.adapt import Tent
    from outlast.diagnose import padding

    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3, padding=1), torch.nn.BatchNorm2d(4), torch.nn.Flatten(), torch.nn.Linear(256, 3))
    converted = padding.convert(net, "symmetric").eval()
    adapter = Tent(converted, lr=1e-2)
    x = torch.randn(16, 1, 8, 8)
    first = adapter(x)
    assert adapter.report.updates == 1
    assert not torch.equal(first, adapter(x))
    assert isinstance(adapter.merge()[0], type(converted[0]))

    made = next(kind for kind in ALL if kind.__name__ == "MixUpMemory")(plain)
    made.model.insert(1, torch.nn.LayerNorm(8))
    made.run(range(STEPS // 2 + 1))
    before = {name: value.clone() for name, value in made.model.state_dict().items()}
    held = copy.deepcopy(made.memory.state_dict())
    adapted = Tent(made.model, lr=1e-2)
    adapted(made.batch(7)[0])
    assert adapted.report.updates == 1
    assert all(torch.equal(value, made.model.state_dict()[name]) for name, value in before.items())
    for now, then in zip(tree_leaves(made.memory.state_dict()), tree_leaves(held), strict=True):
        assert torch.equal(now, then) if isinstance(now, torch.Tensor) else now == then


def test_calibration_follows_adaptation():
    """On an encoder that STARTUP adapted, classes of the target's domain are told apart from one label each."""
    from torch.utils.data import DataLoader, TensorDataset

    from outlast.data import Indexed
    from outlast.fewshot import BaseStatistics, DistributionCalibration, TwoViews, adapt_representation, embed

    torch.manual_seed(0)
    (base, base_labels), (novel, labels) = families()
    teacher = torch.nn.Sequential(torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.ReLU()), torch.nn.Linear(32, 40))
    source = DataLoader(TensorDataset(base, base_labels), batch_size=240)
    target = DataLoader(Indexed(TensorDataset(novel)), batch_size=240)
    views = TwoViews(lambda rows: rows + 0.1 * torch.randn_like(rows), batch_ndim=2)
    found = adapt_representation(teacher, source, target, epochs=2, lr=0.05, views=views)
    assert not torch.equal(next(found.backbone.parameters()), teacher[0][0].weight)
    features, names = embed(found.backbone, source)
    queries, truth = embed(found.backbone, DataLoader(TensorDataset(novel, labels), batch_size=240))
    statistics = BaseStatistics.from_features(features, names)
    few = labels.unique()[:5]
    shots = torch.stack([(truth == c).nonzero()[0, 0] for c in few])
    rest = torch.isin(truth, few)
    rest[shots] = False
    predicted = DistributionCalibration(statistics, random_state=0).fit(queries[shots], truth[shots]).predict(queries[rest])
    assert float((torch.as_tensor(predicted) == truth[rest]).float().mean()) > 0.5  # chance is 0.2


def test_a_vaccine_made_before_or_after_a_memory_trains_alike():
    class Before(VaccineMemory):
        def __init__(self, wrap):
            Composition.__init__(self, mlp(), wrap)
            self.optimizer = sgd(self.model)
            self.vaccine = GradVac(self.optimizer, ["a", "b"], model=self.wrapped, beta=0.3)
            self.memory = self.remember()

    assert same(Before(plain).run(range(STEPS)), VaccineMemory(plain).run(range(STEPS)))
