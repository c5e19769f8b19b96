"""Gradient projection memory: every layer kind, every policy, what is protected and what is not."""

from __future__ import annotations

import copy
import io
import re
import warnings

import pytest
import torch
from helpers import Tiny, cross_entropy, mlp, same, snapshot, token_batches
from torch import nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from outlast.continual import GradientProjectionMemory, continual_metrics
from outlast.errors import OutlastWarning, StateError
from outlast.robust import SAM

SGD, Adam, AdamW = torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def train(model, optimizer, data, steps=50):
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        (model(data) - 1.0).square().mean().backward()
        optimizer.step()
    model.eval()


class Functional(nn.Module):
    """Bare parameters in functional calls."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(5, 12) * 0.3)
        self.b = nn.Parameter(torch.zeros(5))
        self.kernel = nn.Parameter(torch.randn(4, 3, 3) * 0.3)

    def forward(self, x):
        return F.linear(F.conv1d(x, self.kernel, padding=1).flatten(1), self.w, self.b)


class Attention(nn.Module):
    def __init__(self, kdim=None, cross=False, batch_first=True):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, kdim=kdim, vdim=kdim, batch_first=batch_first)
        self.norm = nn.LayerNorm(8)
        self.cross = nn.Parameter(torch.randn(2, 2, kdim or 8), requires_grad=False) if cross else None

    def forward(self, x):
        key = x if self.cross is None else self.cross
        return self.norm(x + self.attention(x, key, key)[0])


def hf_conv1d():
    pytorch_utils = pytest.importorskip("transformers.pytorch_utils", reason="transformers (extra text) is not installed")
    return pytorch_utils.Conv1D(5, 12)


LAYERS = {
    "linear": (lambda: nn.Linear(12, 5), (12,), 4),
    "linear without bias": (lambda: nn.Linear(12, 5, bias=False), (12,), 4),
    "tokens": (lambda: nn.Linear(12, 5), (2, 12), 2),
    "mlp": (lambda: nn.Sequential(nn.Linear(12, 9), nn.Tanh(), nn.Linear(9, 5)), (12,), 4),
    "complement": (lambda: nn.Linear(12, 5), (12,), 9),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, padding=1), (4, 4), 1),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1), (4, 4, 4), 2),
    "conv2d groups": (lambda: nn.Conv2d(6, 8, 3, padding=1, groups=2), (6, 3, 3), 1),
    "conv2d dilation": (lambda: nn.Conv2d(4, 6, 3, dilation=2, padding="same"), (4, 4, 4), 1),
    "conv2d circular": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"), (4, 4, 4), 1),
    "conv2d channels last": (lambda: nn.Conv2d(4, 6, 3, padding=1).to(memory_format=torch.channels_last), (4, 4, 4), 1),
    "depthwise": (lambda: nn.Conv2d(4, 4, 3, groups=4), (4, 4, 4), 1),
    "conv3d": (lambda: nn.Conv3d(2, 4, 2), (2, 3, 3, 3), 1),
    "transposed": (lambda: nn.ConvTranspose2d(12, 8, 3, stride=2), (12, 2, 2), 1),
    "transposed groups": (lambda: nn.ConvTranspose2d(12, 8, 3, groups=2), (12, 2, 2), 1),
    "transformers' Conv1D": (hf_conv1d, (12,), 4),
    "functional": (Functional, (3, 3), 2),
    "attention": (Attention, (3, 8), 2),
    "attention, sequence first": (lambda: Attention(batch_first=False), (2, 8), 3),
    "attention, one key": (lambda: Attention(cross=True), (3, 8), 2),
    "attention, other widths": (lambda: Attention(kdim=6, cross=True), (3, 8), 2),
}


@pytest.mark.parametrize("name", LAYERS)
def test_outputs_on_old_inputs_stay_while_weights_move(name):
    build, shape, count = LAYERS[name]
    torch.manual_seed(0)
    model = build()
    old, new = torch.randn(count, *shape, generator=rng(1)), torch.randn(count, *shape, generator=rng(2))
    memory = GradientProjectionMemory(model, threshold=1.0)
    optimizer = AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    memory.attach(optimizer)
    memory.consolidate([old])
    assert 0 < memory.capacity < 1
    model.eval()
    before, weights = model(old).detach(), snapshot(model)
    train(model, optimizer, new, steps=100)
    assert float((model(old).detach() - before).abs().max()) < 1e-5
    assert max(float((a - b).abs().max()) for a, b in zip(weights, snapshot(model), strict=True)) > 1e-2
    assert max(memory.interference([old]).values()) < 1e-5


@pytest.mark.parametrize("name", ["linear", "conv2d groups", "transposed", "transformers' Conv1D", "complement", "attention"])
def test_low_precision_weights_are_protected_to_their_precision(name):
    build, shape, count = LAYERS[name]
    torch.manual_seed(0)
    model = build().to(torch.bfloat16)
    old, new = (torch.randn(count, *shape, generator=rng(seed)).to(torch.bfloat16) for seed in (1, 2))
    memory = GradientProjectionMemory(model, threshold=1.0)
    optimizer = AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    memory.attach(optimizer)
    memory.consolidate([old])
    model.eval()
    before = model(old).detach().float()
    train(model, optimizer, new, steps=30)
    assert float((model(old).detach().float() - before).abs().max()) < 0.05 * float(before.abs().max())


@pytest.mark.parametrize("optimizer", ["Adam", "RMSprop", "Adagrad", "NAdam", "Adadelta", "Rprop", "LBFGS"])
def test_every_optimizer_is_constrained(optimizer):
    model = mlp()
    old, new = torch.randn(3, 4, generator=rng(1)), torch.randn(16, 4, generator=rng(2))
    memory = GradientProjectionMemory(model, threshold=1.0)
    made = getattr(torch.optim, optimizer)(model.parameters(), lr=0.05)
    memory.attach(made)
    memory.consolidate([old])
    before, start = model(old).detach(), snapshot(model)

    def closure():
        made.zero_grad()
        loss = (model(new) - 1).square().mean()
        loss.backward()
        return loss

    for _ in range(10):
        made.step(closure)
    assert float((model(old).detach() - before).abs().max()) < 1e-5
    assert not same(start, snapshot(model))


def test_an_average_of_weights_is_protected_within_a_task_and_not_across_its_beginning():
    model = mlp()
    old, new = (torch.randn(3, 4, generator=rng(seed)) for seed in (1, 2))
    memory = GradientProjectionMemory(model, threshold=1.0)
    optimizer = SGD(model.parameters(), lr=0.1)
    memory.attach(optimizer)
    spanning = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    spanning.update_parameters(model)  # the first takes the weights as they are
    train(model, optimizer, old, steps=10)
    memory.consolidate([old])
    before, start = model(old).detach(), snapshot(model)
    own = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    for _ in range(10):
        train(model, optimizer, new, steps=1)
        for average in (own, spanning):
            average.update_parameters(model)
    assert float((own.module(old).detach() - before).abs().max()) < 1e-5
    assert not same(start, snapshot(own.module))
    assert float((spanning.module(old).detach() - before).abs().max()) > 1e-3


def test_anchor_equals_projecting_every_step():
    torch.manual_seed(0)
    model = nn.Linear(10, 6, bias=False, dtype=torch.float64)
    twin = copy.deepcopy(model)
    old, new = torch.randn(4, 10, generator=rng(1), dtype=torch.float64), torch.randn(20, 10, generator=rng(2), dtype=torch.float64)
    memory = GradientProjectionMemory(model, threshold=1.0)
    optimizer, other = (AdamW(m.parameters(), lr=1e-2, weight_decay=0.3) for m in (model, twin))
    memory.attach(optimizer)
    memory.consolidate([old])
    basis = torch.linalg.qr(old.T).Q
    for _ in range(50):
        for m, o in ((model, optimizer), (twin, other)):
            o.zero_grad()
            (m(new) - 1).square().mean().backward()
            before = m.weight.detach().clone()
            o.step()
            if m is twin:
                with torch.no_grad():
                    step = m.weight - before
                    m.weight.copy_(before + step - (step @ basis) @ basis.T)
    assert float((model.weight - twin.weight).detach().abs().max()) <= 1e-12


def test_modes_agree_for_plain_sgd_and_every_defers():
    found = []
    for mode, every in (("step", 1), ("gradient", 1), ("both", 1)):
        model = mlp()
        optimizer = SGD(model.parameters(), lr=0.1)
        memory = GradientProjectionMemory(model, threshold=0.9)
        memory.attach(optimizer, mode=mode, every=every)
        memory.consolidate([torch.randn(3, 4, generator=rng(1))])
        train(model, optimizer, torch.randn(16, 4, generator=rng(2)), steps=20)
        found.append(snapshot(model))
    for other in found[1:]:
        assert max(float((a - b).abs().max()) for a, b in zip(found[0], other, strict=True)) < 1e-6


def test_every_restores_late_and_before_consolidation():
    model = mlp()
    old = torch.randn(2, 4, generator=rng(1))
    optimizer = AdamW(model.parameters(), lr=0.05)
    memory = GradientProjectionMemory(model, threshold=1.0)
    memory.attach(optimizer, every=3)
    memory.consolidate([old])
    before = model(old).detach()
    train(model, optimizer, torch.randn(16, 4, generator=rng(2)), steps=2)
    assert float((model(old).detach() - before).abs().max()) > 1e-4
    memory.consolidate([torch.randn(2, 4, generator=rng(3))])
    assert float((model(old).detach() - before).abs().max()) < 1e-5


def test_gradient_mode_alone_forgets_with_adamw():
    drifts = {}
    for mode in ("step", "gradient"):
        model = mlp()
        optimizer = AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
        memory = GradientProjectionMemory(model, threshold=1.0)
        memory.attach(optimizer, mode=mode, force=True)
        old = torch.randn(2, 4, generator=rng(1))
        memory.consolidate([old])
        before = model(old).detach()
        train(model, optimizer, torch.randn(16, 4, generator=rng(2)), steps=100)
        drifts[mode] = float((model(old).detach() - before).abs().max())
    assert drifts["step"] < 1e-5
    assert drifts["gradient"] > 0.05


def test_projection_is_idempotent_symmetric_and_kills_old_gradients():
    torch.manual_seed(0)
    model = nn.Conv2d(4, 6, 3, padding=1, groups=2)
    old = torch.randn(1, 4, 3, 3, generator=rng(1))
    memory = GradientProjectionMemory(model, threshold=1.0)
    memory.consolidate([old])
    model(old).square().mean().backward()
    size = float(model.weight.grad.norm())
    memory.project_gradients_()
    assert float(model.weight.grad.norm()) <= 1e-6 * size
    torch.manual_seed(1)
    model.weight.grad, model.bias.grad = torch.randn_like(model.weight), torch.randn_like(model.bias)
    whole = torch.cat([model.weight.grad.flatten(), model.bias.grad])
    memory.project_gradients_()
    kept = torch.cat([model.weight.grad.flatten(), model.bias.grad])
    assert abs(float((whole - kept) @ kept)) < 1e-4
    memory.project_gradients_()
    again = torch.cat([model.weight.grad.flatten(), model.bias.grad])
    assert float((kept - again).abs().max()) < 1e-6


def test_bias_moves_only_together_with_the_weight():
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    x = torch.randn(1, 4, generator=rng(1))
    memory = GradientProjectionMemory(model, threshold=1.0)
    optimizer = Adam(model.parameters(), lr=0.05)
    memory.attach(optimizer)
    memory.consolidate([x.expand(6, 4)])
    before, bias = model(x).detach(), model.bias.detach().clone()
    train(model, optimizer, torch.randn(10, 4, generator=rng(2)), steps=20)
    assert float((model(x).detach() - before).abs().max()) < 1e-5
    assert float((model.bias.detach() - bias).abs().max()) > 1e-2


@pytest.mark.parametrize(("policy", "moves"), [("freeze", False), ("free", True)])
def test_bias_policies(policy, moves):
    model = mlp()
    memory = GradientProjectionMemory(model, threshold=0.9, bias=policy)
    optimizer = AdamW(model.parameters(), lr=0.05, weight_decay=0.1)
    memory.attach(optimizer)
    train(model, optimizer, torch.randn(8, 4, generator=rng(2)), steps=3)
    memory.consolidate([torch.randn(3, 4, generator=rng(1))])
    bias = model[0].bias.detach().clone()
    train(model, optimizer, torch.randn(8, 4, generator=rng(3)), steps=3)
    assert torch.equal(bias, model[0].bias) != moves


def test_biases_of_transposed_convolutions_are_held():
    model = nn.ConvTranspose1d(6, 4, 3)
    memory = GradientProjectionMemory(model, threshold=0.9)
    assert "bias" in repr(memory)
    memory.attach(optimizer := SGD(model.parameters(), lr=0.1))
    memory.consolidate([torch.randn(2, 6, 3)])
    bias = model.bias.detach().clone()
    train(model, optimizer, torch.randn(2, 6, 3), steps=3)
    assert torch.equal(bias, model.bias)


# ---- embeddings -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sparse", [False, True])
def test_frequent_tokens_are_held(sparse):
    table = nn.Embedding(6, 3, sparse=sparse)
    memory = GradientProjectionMemory(table, threshold=0.8)
    report = memory.consolidate([torch.tensor([0, 0, 0, 0, 1, 1, 1, 2, 2, 5])])
    assert report.layers[0].rank == 3
    assert sorted(memory._sites["weight"].protected.tolist()) == [0, 1, 2]
    optimizer = SGD(table.parameters(), lr=0.1)
    memory.attach(optimizer, mode="both")
    before = table.weight.detach().clone()
    optimizer.zero_grad()
    table(torch.arange(6)).sum().backward()
    optimizer.step()
    moved = (table.weight.detach() - before).abs().amax(1) > 0
    assert moved.tolist() == [False, False, False, True, True, True]
    assert memory.interference([torch.tensor([0, 1, 2])]) == {"weight": 0.0}


def test_tied_head_is_protected_on_both_sides():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(10, 6)
            self.head = nn.Linear(6, 10, bias=False)
            self.head.weight = self.table.weight

        def forward(self, tokens):
            return self.head(self.table(tokens))

    torch.manual_seed(0)
    model = Tied()
    memory = GradientProjectionMemory(model, threshold=1.0)
    assert set(memory.ranks) == {"table", "head"}
    old = torch.tensor([1, 2, 2])
    memory.consolidate([old])
    before = model(old).detach()
    optimizer = AdamW(model.parameters(), lr=0.05, weight_decay=0.1)
    memory.attach(optimizer)
    start = model.head.weight.detach().clone()
    for _ in range(20):
        optimizer.zero_grad()
        F.cross_entropy(model(torch.tensor([4, 5, 6])), torch.tensor([1, 2, 3])).backward()
        optimizer.step()
    assert float((model(old).detach() - before).abs().max()) < 1e-5
    assert float((model.head.weight.detach() - start).abs().max()) > 1e-2


def test_bags_of_tokens_are_counted():
    bag = nn.EmbeddingBag(5, 2)
    memory = GradientProjectionMemory(bag, threshold=0.5)
    memory.consolidate([torch.tensor([[3, 3], [3, 1]])])
    assert memory._sites["weight"].protected.tolist() == [3]


# ---- norm layers and the rest -----------------------------------------------------------------------------------------


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 8)
        self.bn = nn.BatchNorm1d(8)
        self.ln = nn.LayerNorm(8)
        self.scale = nn.Parameter(torch.ones(8))
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.ln(torch.tanh(self.bn(self.first(x)))) * self.scale)


def two_tasks(**settings):
    torch.manual_seed(0)
    model = Normed()
    memory = GradientProjectionMemory(model, threshold=1.0, **settings)
    optimizer = SGD(model.parameters(), lr=0.1, weight_decay=0.01)
    memory.attach(optimizer)
    first, second = torch.randn(6, 4, generator=rng(1)) * 0.5, torch.randn(6, 4, generator=rng(2)) + 3
    train(model, optimizer, first, steps=5)
    memory.consolidate([first[:2]])
    model.eval()
    before = model(first[:2]).detach()
    kept = {name: value.detach().clone() for name, value in model.state_dict().items()}
    train(model, optimizer, second, steps=5)
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, kept[name])}
    return model, memory, before, first[:2], moved


def test_frozen_norms_stay_in_eval_mode_and_keep_outputs():
    model, memory, before, old, moved = two_tasks()
    assert moved == {"first.weight", "first.bias", "head.weight", "head.bias"}
    assert float((model(old).detach() - before).abs().max()) < 1e-5
    model.train()
    assert model.training
    assert not model.bn.training
    copied = copy.deepcopy(model).train()
    assert not copied.bn.training
    assert copied.bn.train.args[0] is copied.bn
    memory.release()
    assert model.train().bn.training
    assert memory.ranks["first"][0] == 0


def test_paper_norms_use_the_batch():
    model, _, _, _, moved = two_tasks(norm="paper")
    assert model.bn.running_mean is None
    assert "bn.weight" not in moved


def test_free_norms_and_others_move():
    _, _, _, _, moved = two_tasks(norm="free", other="free")
    assert {"bn.weight", "bn.running_mean", "ln.weight", "scale"} <= moved


def test_norms_per_task_are_put_back():
    model, memory, before, old, moved = two_tasks(norm="per_task")
    assert {"bn.weight", "bn.running_mean", "ln.weight"} <= moved
    live = snapshot(model)
    assert float((model(old).detach() - before).abs().max()) > 1e-3
    memory.set_task(0)
    assert float((model(old).detach() - before).abs().max()) < 1e-5
    with pytest.raises(StateError, match="set_task"):
        memory.consolidate([old])
    memory.set_task(None)
    assert same(live, snapshot(model))
    memory.consolidate([old], task="second")
    assert memory.tasks == (0, "second")
    with pytest.raises(ValueError, match="known: 0, 'second'"):
        memory.set_task(7)
    with pytest.raises(StateError, match="per_task"):
        GradientProjectionMemory(mlp()).set_task(0)


def test_excluded_heads_are_free_and_finished_heads_can_be_held():
    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            self.trunk = nn.Linear(4, 6)
            self.heads = nn.ModuleList(nn.Linear(6, 2) for _ in range(2))

        def forward(self, x):
            return torch.cat([head(self.trunk(x)) for head in self.heads], 1)

    model = Heads()
    memory = GradientProjectionMemory(model, exclude=["heads"])
    assert set(memory.ranks) == {"trunk"}
    optimizer = SGD(model.parameters(), lr=0.1, weight_decay=0.1)
    memory.attach(optimizer)
    with pytest.raises(StateError, match="first consolidate"):
        memory.freeze("heads.0")
    memory.consolidate([torch.randn(5, 4)])
    memory.freeze("heads.0")
    first, second = (copy.deepcopy(model.heads[n].state_dict()) for n in (0, 1))
    train(model, optimizer, torch.randn(5, 4), steps=2)
    assert torch.equal(first["weight"], model.heads[0].weight)
    assert not torch.equal(second["weight"], model.heads[1].weight)


# ---- consolidation ----------------------------------------------------------------------------------------------------


def test_second_consolidation_with_the_same_data_adds_nothing():
    for threshold in (0.9, 1.0):
        model = mlp()
        memory = GradientProjectionMemory(model, threshold=threshold)
        data = [torch.randn(3, 4, generator=rng(1))]
        first = memory.consolidate(data)
        second = memory.consolidate(data)
        assert all(layer.added > 0 for layer in first.layers)
        assert all(layer.added == 0 for layer in second.layers)


def test_union_holds_enough_of_each_task_and_stays_orthonormal():
    model = nn.Linear(30, 5)
    memory = GradientProjectionMemory(model, threshold=0.9)
    tasks = [torch.randn(40, 30, generator=rng(n)) * torch.logspace(0, -2, 30)[torch.randperm(30, generator=rng(n))] for n in range(4)]
    ranks = []
    for task in tasks:
        memory.consolidate([task])
        ranks.append(memory.ranks["weight"][0])
        basis = memory._sites["weight"].basis[0]
        assert float((basis.T @ basis - torch.eye(basis.shape[1])).abs().max()) <= 1e-5
    assert ranks == sorted(ranks)
    for task in tasks:
        rows = torch.cat([task, torch.ones(40, 1)], 1)
        assert float((rows @ basis).square().sum()) >= (0.9 - 1e-6) * float(rows.square().sum())


def test_depthwise_fills_and_then_nothing_moves():
    torch.manual_seed(0)
    model = nn.Conv2d(4, 4, 3, groups=4, bias=False)
    memory = GradientProjectionMemory(model, threshold=1.0)
    with pytest.warns(OutlastWarning, match="memory is full"):
        report = memory.consolidate([torch.randn(3, 4, 8, 8)])
    assert report.layers[0].rank == 9
    assert report.layers[0].groups == 4
    optimizer = AdamW(model.parameters(), lr=0.1)
    memory.attach(optimizer)
    before = model.weight.detach().clone()
    train(model, optimizer, torch.randn(3, 4, 8, 8), steps=3)
    assert float((model.weight.detach() - before).abs().max()) <= 1e-12
    assert memory.capacity == 1.0


def test_max_samples_counts_samples_not_batches():
    model = nn.Linear(4, 2)
    memory = GradientProjectionMemory(model)
    report = memory.consolidate([torch.randn(7, 4) for _ in range(5)], max_samples=10)
    assert report.layers[0].rows == 10


def test_batches_may_be_tuples_mappings_or_anything_with_forward():
    class Named(nn.Linear):
        def forward(self, x):
            return super().forward(x)

    model = Named(4, 2)
    x = torch.randn(5, 4, generator=rng(1))
    ranks = set()
    for batches, forward in (
        ([x], None),
        ([(x, torch.zeros(5))], None),
        ([{"x": x, "labels": torch.zeros(5)}], None),
        ([("any", x)], lambda m, b: m(b[1])),
    ):
        memory = GradientProjectionMemory(model)
        memory.consolidate(batches, forward=forward)
        ranks.add(memory.ranks["weight"])
    assert len(ranks) == 1


def test_collect_takes_an_ordinary_forward_pass():
    one, two = GradientProjectionMemory(model := mlp()), GradientProjectionMemory(model)
    x = torch.randn(3, 4, generator=rng(1))
    one.consolidate([x])
    with two.collect():
        loss = model(x).sum()
    loss.backward()
    two.consolidate()
    assert one.ranks == two.ranks
    with pytest.raises(ValueError, match="nothing to consolidate"):
        two.consolidate()


def test_shared_module_gives_rows_of_both_calls():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(6, 6)

        def forward(self, x):
            return self.layer(torch.tanh(self.layer(x)))

    report = GradientProjectionMemory(Twice()).consolidate([torch.randn(5, 6)])
    assert report.layers[0].rows == 10


def test_modes_and_flags_of_the_model_are_as_before():
    model = mlp(dropout=0.5)
    model[2].eval()
    memory = GradientProjectionMemory(model)
    memory.consolidate([torch.randn(3, 4)])
    assert model.training
    assert not model[2].training


def test_consolidation_is_all_or_nothing():
    model = mlp()
    memory = GradientProjectionMemory(model, threshold=0.9)
    memory.consolidate([torch.randn(3, 4, generator=rng(1))])
    state = memory.state_dict()
    bad = torch.randn(3, 4, generator=rng(2))
    bad[1, 2] = float("nan")
    with pytest.raises(ValueError, match=r"0: its inputs are not finite"):
        memory.consolidate([bad])

    def broken():
        yield torch.randn(3, 4)
        raise KeyError("disk")

    with pytest.raises(KeyError):
        memory.consolidate(broken())
    for name, entry in memory.state_dict()["layers"].items():
        assert torch.equal(entry["basis"], state["layers"][name]["basis"])
    assert memory.tasks == (0,)
    assert "1 tasks" in repr(memory)


def test_layers_that_never_ran_are_named():
    class Unused(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.spare = nn.Linear(4, 3), nn.Linear(4, 3)

        def forward(self, x):
            return self.used(x)

    memory = GradientProjectionMemory(Unused())
    with pytest.warns(OutlastWarning, match="did not run during consolidate.*spare"):
        report = memory.consolidate([torch.randn(3, 4)])
    assert {layer.name: layer.rows for layer in report.layers} == {"used": 3, "spare": 0}


def test_scaled_projection_leaves_unimportant_directions_partly_free():
    found = {}
    for scale in (None, 1.0):
        torch.manual_seed(0)
        model = nn.Linear(8, 4, bias=False)
        memory = GradientProjectionMemory(model, threshold=0.99, importance_scale=scale)
        old = torch.randn(40, 8, generator=rng(1)) * torch.logspace(0, -1.5, 8)
        memory.consolidate([old])
        optimizer = SGD(model.parameters(), lr=0.1)
        memory.attach(optimizer)
        before = model.weight.detach().clone()
        train(model, optimizer, torch.randn(30, 8, generator=rng(2)), steps=20)
        found[scale] = ((model.weight.detach() - before) @ memory._sites["weight"].basis[0]).norm(dim=0)
        site = memory._sites["weight"]
    assert float(found[None].max()) < 1e-5
    assert float(found[1.0][0]) < 1e-5  # the strongest direction has importance 1
    assert bool((found[1.0][2:] > 2 * found[1.0][1]).all())
    assert float(found[1.0][-1]) > 1e-2
    assert bool(((site.scale > 0) & (site.scale <= 1)).all())
    memory.consolidate([old])
    assert bool((site.scale[0, 1:] > 0).all())
    assert float(site.scale.max()) == 1.0


def test_scaled_projection_scales_each_step():
    torch.manual_seed(0)
    model = nn.Linear(5, 3, bias=False, dtype=torch.float64)
    memory = GradientProjectionMemory(model, threshold=0.999, importance_scale=2.0)
    memory.consolidate([torch.randn(30, 5, generator=rng(1), dtype=torch.float64) * torch.tensor([3.0, 1, 0.5, 0.2, 0.1])])
    site = memory._sites["weight"]
    basis, scale = site.basis[0], site.scale[0]
    twin = model.weight.detach().clone()
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.5)
    memory.attach(optimizer)
    for _ in range(10):
        optimizer.zero_grad()
        model(torch.randn(6, 5, generator=rng(4), dtype=torch.float64)).square().mean().backward()
        before = model.weight.detach().clone()
        optimizer.step()
        step = -0.1 * optimizer.state[model.weight]["momentum_buffer"]
        twin = before + step - ((step @ basis) * scale) @ basis.T
        assert float((model.weight.detach() - twin).abs().max()) < 1e-12
        memory.project_()
        assert float((model.weight.detach() - twin).abs().max()) < 1e-12


# ---- loops ------------------------------------------------------------------------------------------------------------


def run_tasks(model, memory, optimizer, tasks):
    for task in range(tasks):
        for batch in token_batches(3, seed=task):
            optimizer.zero_grad()
            cross_entropy(model, batch).backward()
            optimizer.step()
        memory.consolidate(token_batches(1, seed=50 + task))


@pytest.mark.parametrize("mode", ["step", "both"])
def test_resume_in_the_middle_of_a_task_is_bit_for_bit(mode):
    def build():
        torch.manual_seed(0)
        model = Tiny()
        memory = GradientProjectionMemory(model, threshold=0.9)
        optimizer = AdamW(model.parameters(), lr=0.02, weight_decay=0.1)
        memory.attach(optimizer, mode=mode, every=2)
        return model, memory, optimizer

    model, memory, optimizer = build()
    run_tasks(model, memory, optimizer, 2)
    batches = token_batches(6, seed=9)
    for batch in batches[:3]:
        optimizer.zero_grad()
        cross_entropy(model, batch).backward()
        optimizer.step()
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "memory": memory.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    other, again, stepper = build()
    other.load_state_dict(state["model"])
    again.load_state_dict(state["memory"])
    stepper.load_state_dict(state["optimizer"])
    for m, o in ((model, optimizer), (other, stepper)):
        for batch in batches[3:]:
            o.zero_grad()
            cross_entropy(m, batch).backward()
            o.step()
    assert same(snapshot(model), snapshot(other))
    one, two = (each.consolidate(token_batches(1, seed=5)) for each in (memory, again))
    assert [layer.to_dict() for layer in one.layers] == [layer.to_dict() for layer in two.layers]
    assert same(snapshot(model), snapshot(other))


def test_state_of_norms_per_task_and_frozen_norms_travels():
    for settings in ({"norm": "per_task"}, {}):
        model, memory, before, old, _ = two_tasks(**settings)
        other = Normed()
        again = GradientProjectionMemory(other, threshold=1.0, **settings)
        other.load_state_dict(model.state_dict())
        again.load_state_dict(memory.state_dict())
        if settings:
            again.set_task(0)
        other.eval()
        assert float((other(old).detach() - before).abs().max()) < 1e-5
        assert other.train().bn.training == bool(settings)


def test_momentum_does_not_cross_a_task_unless_asked():
    for reset, left in ((True, 0), (False, 4)):
        model = mlp()
        optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
        memory = GradientProjectionMemory(model)
        memory.attach(optimizer, reset_state=reset)
        train(model, optimizer, torch.randn(5, 4), steps=2)
        memory.consolidate([torch.randn(5, 4)])
        assert len(optimizer.state) == left


def test_removed_handle_constrains_no_more():
    model = mlp()
    optimizer = SGD(model.parameters(), lr=0.5)
    memory = GradientProjectionMemory(model, threshold=1.0)
    handle = memory.attach(optimizer)
    old = torch.randn(2, 4, generator=rng(1))
    memory.consolidate([old])
    before = model(old).detach()
    with handle:
        pass
    train(model, optimizer, torch.randn(5, 4, generator=rng(2)), steps=3)
    assert float((model(old).detach() - before).abs().max()) > 1e-3


def test_copied_model_is_on_its_own():
    model = mlp()
    optimizer = SGD(model.parameters(), lr=0.5)
    memory = GradientProjectionMemory(model, threshold=1.0)
    memory.attach(optimizer)
    memory.consolidate([torch.randn(2, 4, generator=rng(1))])
    twin = copy.deepcopy(model)
    start = snapshot(twin)
    train(model, optimizer, torch.randn(5, 4, generator=rng(2)), steps=3)
    assert same(start, snapshot(twin))


@pytest.mark.parametrize("kind", ["accumulate", "clip", "sam"])
def test_accumulation_and_clipping_and_sam_keep_old_outputs(kind):
    model = mlp()
    base = SGD(model.parameters(), lr=0.2, momentum=0.9, weight_decay=0.01)
    optimizer = SAM(base, rho=0.1) if kind == "sam" else base
    memory = GradientProjectionMemory(model, threshold=1.0)
    memory.attach(optimizer, mode="both" if kind == "clip" else "step")
    old, new = torch.randn(2, 4, generator=rng(1)), torch.randn(8, 4, generator=rng(2))
    memory.consolidate([old])
    before, start = model(old).detach(), snapshot(model)

    def closure():
        optimizer.zero_grad()
        loss = (model(new) - 1).square().mean()
        loss.backward()
        return loss

    for _ in range(5):
        if kind == "sam":
            optimizer.step(closure)
            continue
        optimizer.zero_grad()
        for part in new.split(4):
            (model(part) - 1).square().mean().backward()
        if kind == "clip":
            memory.project_gradients_()
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
    assert float((model(old).detach() - before).abs().max()) < 1e-5
    assert not same(start, snapshot(model))


def test_amp_trains_and_protects():
    model = mlp()
    optimizer = AdamW(model.parameters(), lr=0.02)
    memory = GradientProjectionMemory(model, threshold=1.0)
    memory.attach(optimizer)
    old, new = torch.randn(2, 4, generator=rng(1)), torch.randn(8, 4, generator=rng(2))
    memory.consolidate([old])
    before = model(old).detach()
    scaler = torch.amp.GradScaler("cpu")
    for step in range(5):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = (model(new) - 1).square().mean()
        if step == 2:
            loss = loss * float("inf")
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert float((model(old).detach() - before).abs().max()) < 1e-5


def test_compiled_model_is_seen_and_protected():
    for inplace in (False, True):
        torch.compiler.reset()
        model = mlp()
        compiled = model if inplace else torch.compile(model, backend="eager")
        if inplace:
            model.compile(backend="eager")
        memory = GradientProjectionMemory(compiled, threshold=1.0)
        optimizer = AdamW(model.parameters(), lr=0.02)
        memory.attach(optimizer)
        old, new = torch.randn(2, 4, generator=rng(1)), torch.randn(8, 4, generator=rng(2))
        compiled(new).sum().backward()
        memory.consolidate([old])
        assert memory.ranks == {"0": (2, 5), "2": (2, 9)}
        before = model(old).detach()
        train(compiled, optimizer, new, steps=5)
        assert float((model(old).detach() - before).abs().max()) < 1e-5


def test_several_optimizers_share_the_parameters():
    model = mlp()
    memory = GradientProjectionMemory(model, threshold=1.0)
    first, second = SGD(model[0].parameters(), lr=0.1), Adam(model[2].parameters(), lr=0.05)
    memory.attach([first, second])
    old = torch.randn(2, 4, generator=rng(1))
    memory.consolidate([old])
    before = model(old).detach()
    for _ in range(3):
        model(torch.randn(5, 4, generator=rng(2))).square().mean().backward()
        first.step()
        second.step()
    assert float((model(old).detach() - before).abs().max()) < 1e-5


def test_adapter_learns_beside_protected_inputs():
    torch.manual_seed(0)
    base = nn.Linear(10, 4)
    memory = GradientProjectionMemory(base, threshold=1.0)
    old, new = torch.randn(4, 10, generator=rng(1)), torch.randn(20, 10, generator=rng(2))
    down, up = nn.Parameter(torch.randn(3, 10) * 0.1), nn.Parameter(torch.randn(4, 3) * 0.1)
    with pytest.raises(StateError, match="nothing is protected"):
        memory.constrain_adapter("weight", down)
    memory.consolidate([old])
    base.requires_grad_(False)
    with pytest.raises(ValueError, match="no linear layer 'other'"):
        memory.constrain_adapter("other", down)
    with pytest.raises(ValueError, match=r"\(r, 10\)"):
        memory.constrain_adapter("weight", up)
    memory.constrain_adapter("weight", down)
    optimizer = AdamW([down, up], lr=0.02, weight_decay=0.1)
    memory.attach(optimizer)

    def model(x):
        return base(x) + x @ down.T @ up.T

    before, start = model(old).detach(), (model(new) - 1).square().mean().item()
    for _ in range(40):
        optimizer.zero_grad()
        (model(new) - 1).square().mean().backward()
        optimizer.step()
    assert float((model(old).detach() - before).abs().max()) < 1e-5
    assert (model(new) - 1).square().mean().item() < 0.9 * start
    with torch.no_grad():
        base.weight += up @ down
    memory.consolidate([new[:3]])
    assert not memory._adapters


# ---- reports ----------------------------------------------------------------------------------------------------------


def test_reports_are_json_and_pictures():
    model = mlp()
    memory = GradientProjectionMemory(model, threshold={"0": 0.8, "2.weight": 0.99}, threshold_step=0.01)
    memory.consolidate([torch.randn(2, 4, generator=rng(1))])
    report = memory.consolidate([torch.randn(2, 4, generator=rng(2))], task=("a", 1))
    assert [layer.threshold for layer in report.layers] == [0.81, 1.0]
    record = report.to_dict()
    assert record["kind"] == "ConsolidationReport"
    assert record["task"] == "('a', 1)"
    assert record["layers"][0]["name"] == "0"
    assert "% taken" in repr(report)
    axes = pytest.importorskip("matplotlib.pyplot", reason="matplotlib (extra report) is not installed").figure().subplots()
    assert report.plot(axes) is axes
    assert memory.nbytes > 0


def test_interference_sees_forgetting():
    model = mlp()
    old = torch.randn(5, 4, generator=rng(1))
    memory = GradientProjectionMemory(model, threshold=0.9)
    with pytest.raises(StateError, match="nothing was consolidated"):
        memory.interference([old])
    memory.consolidate([old])
    weight = model[0].weight.detach().clone()
    with torch.no_grad():
        model[0].weight.mul_(1.1)
        joint = torch.cat([model[0].weight, model[0].bias[:, None]], 1)
        rows = torch.cat([old, torch.ones(5, 1)], 1)
        changed = torch.cat([model[0].weight - weight, torch.zeros(8, 1)], 1)
        expected = float((rows @ changed.T).norm() / (rows @ joint.T).norm())
    assert memory.interference([old])["0"] == pytest.approx(expected, rel=1e-4)
    with pytest.raises(ValueError, match="empty"):
        memory.interference([])
    with pytest.raises(ValueError, match="max_samples"):
        memory.interference([old], max_samples=0)
    lean = GradientProjectionMemory(mlp(), threshold=0.5, keep_reference=False)
    lean.consolidate([old])
    with pytest.raises(StateError, match="keep_reference"):
        lean.interference([old])


def test_metrics_of_the_known_matrix():
    found = continual_metrics([[90, 0], [80, 85]])
    assert (found.acc, found.bwt, found.forgetting, found.learning_accuracy) == (82.5, -10.0, 10.0, 87.5)
    three = continual_metrics(torch.tensor([[90.0, 0, 0], [95, 80, 0], [85, 70, 60]]))
    assert three.forgetting == pytest.approx((10 + 10) / 2)
    assert three.bwt == pytest.approx((-5 - 10) / 2)
    assert continual_metrics([[50.0]]).bwt == 0.0
    assert three.to_dict()["matrix"][1][0] == 95
    axes = pytest.importorskip("matplotlib.pyplot", reason="matplotlib (extra report) is not installed").figure().subplots()
    assert three.plot(axes) is axes
    for bad in ([[1.0, 2.0]], [], [[float("nan")]]):
        with pytest.raises(ValueError, match="R "):
            continual_metrics(bad)


# ---- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"threshold": 0.0}, "threshold must be"),
        ({"threshold": float("nan")}, "threshold must be"),
        ({"threshold": {"0": 1.5}}, "threshold of '0'"),
        ({"threshold": {"fist": 0.5}}, "threshold names 'fist'"),
        ({"max_rank": 0}, "max_rank"),
        ({"max_rank": -0.5}, "max_rank"),
        ({"include": ["layer9"]}, "include names 'layer9'"),
        ({"exclude": [re.compile("nope")]}, "exclude names 'nope'"),
        ({"exclude": [re.compile("weight")]}, "no layer to constrain"),
        ({"bias": "keep"}, "bias must be one of"),
        ({"norm": "keep"}, "norm must be one of"),
        ({"rank_rule": "any"}, "rank_rule must be one of"),
        ({"importance_scale": -1.0}, "importance_scale"),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        GradientProjectionMemory(mlp(), **settings)


def test_names_near_a_wrong_one_are_listed():
    model = nn.ModuleDict({"encoder": nn.Linear(2, 2), "decoder": nn.Linear(2, 2)})
    with pytest.raises(ValueError, match=r"near: .*encoder"):
        GradientProjectionMemory(model, include=["encodr"])


def test_threshold_functions_are_checked_when_called():
    memory = GradientProjectionMemory(mlp(), threshold=lambda name, task: -1.0)
    with pytest.raises(ValueError, match="threshold of '0'"):
        memory.consolidate([torch.randn(3, 4)])
    scheduled = GradientProjectionMemory(mlp(), threshold=0.97, threshold_step=0.02)
    reports = [scheduled.consolidate([torch.ones(3, 4)]) for _ in range(3)]
    assert [round(report.layers[0].threshold, 2) for report in reports] == [0.97, 0.99, 1.0]


def test_schedules_above_one_are_clipped():
    memory = GradientProjectionMemory(mlp(), threshold=lambda name, task: 0.97 + 0.02 * task)
    for expected in (0.97, 0.99, 1.0):
        assert memory.consolidate([torch.ones(3, 4)]).layers[0].threshold == pytest.approx(expected)


def test_models_without_linear_maps_and_unsupported_weights_are_refused():
    with pytest.raises(ValueError, match="no layer to constrain"):
        GradientProjectionMemory(nn.BatchNorm1d(3))
    with pytest.raises(TypeError, match="complex"):
        GradientProjectionMemory(nn.Linear(2, 2, dtype=torch.complex64))
    with pytest.raises(TypeError, match="Module"):
        GradientProjectionMemory(lambda x: x)
    sparse = nn.Linear(2, 2)
    sparse.weight = nn.Parameter(torch.eye(2).to_sparse())
    with pytest.raises(TypeError, match="sparse"):
        GradientProjectionMemory(sparse)


def test_what_is_no_linear_map_can_be_an_error():
    with pytest.raises(ValueError, match=r"ln\.\w+ is no linear map"):
        GradientProjectionMemory(Normed(), other="error")

    class Position(nn.Module):
        def __init__(self):
            super().__init__()
            self.place = nn.Parameter(torch.zeros(3, 4))
            self.layer = nn.Linear(4, 2)

        def forward(self, x):
            return self.layer(x + self.place)

    memory = GradientProjectionMemory(Position(), other="error")
    with pytest.raises(ValueError, match="other='error': place"):
        memory.consolidate([torch.randn(2, 3, 4)])
    assert memory.tasks == ()


def test_wrong_attachments_are_refused():
    model = mlp()
    memory = GradientProjectionMemory(model)
    with pytest.raises(ValueError, match=r"Adam: .*mode='step'"):
        memory.attach(Adam(model.parameters()), mode="gradient")
    with pytest.raises(ValueError, match=r"weight decay.*mode='step'"):
        memory.attach(SGD(model.parameters(), lr=0.1, weight_decay=0.1), mode="gradient")
    memory.attach(Adam(model.parameters()), mode="gradient", force=True)
    with pytest.raises(ValueError, match=r"does not have '2\.weight'"):
        memory.attach(SGD(model[0].parameters(), lr=0.1))
    model[2].requires_grad_(False)
    memory.attach(SGD(model[0].parameters(), lr=0.1))
    with pytest.raises(TypeError, match="Optimizer"):
        memory.attach(model)
    with pytest.raises(ValueError, match="mode must be"):
        memory.attach(SGD(model.parameters(), lr=0.1), mode="weights")


def test_empty_and_zero_data():
    memory = GradientProjectionMemory(nn.Linear(4, 2, bias=False))
    with pytest.raises(ValueError, match="nothing to consolidate"):
        memory.consolidate([])
    report = memory.consolidate([torch.zeros(3, 4)])
    assert report.layers[0].rank == 0
    with pytest.raises(ValueError, match="max_samples"):
        memory.consolidate([torch.zeros(3, 4)], max_samples=0)


def test_rank_cap_is_said_once():
    memory = GradientProjectionMemory(nn.Linear(10, 3, bias=False), threshold=0.99, max_rank=0.3)
    data = torch.randn(50, 10, generator=rng(1))
    with pytest.warns(OutlastWarning, match=r"max_rank=0\.3"):
        report = memory.consolidate([data])
    assert report.layers[0].rank == 3
    assert memory._limit(10) == 3
    assert GradientProjectionMemory(nn.Linear(10, 3), max_rank=4)._limit(11) == 4


def test_state_of_another_model_is_refused():
    memory = GradientProjectionMemory(mlp())
    memory.consolidate([torch.randn(3, 4)])
    state = memory.state_dict()
    with pytest.raises(ValueError, match="layers that the model lacks: 2"):
        GradientProjectionMemory(nn.Sequential(nn.Linear(4, 8))).load_state_dict(state)
    with pytest.raises(ValueError, match=r"2: the state has a linear weight of shape \(3, 8\)"):
        GradientProjectionMemory(nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 5))).load_state_dict(state)
    with pytest.raises(ValueError, match="rows of 5"):
        GradientProjectionMemory(mlp(), bias="free").load_state_dict(state)


def test_weights_that_are_computed_are_held_with_the_rest():
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 8)), nn.Linear(8, 3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        memory = GradientProjectionMemory(model)
        memory.consolidate([torch.randn(4, 4)])
    assert set(memory.ranks) == {"1"}
    assert "0.parametrizations.weight.original1" in repr(memory)


# ---- defects that were found once -------------------------------------------------------------------------------------


def drift_of(model, memory, old, new, *, optimizer=None, **settings):
    """How far outputs on old inputs move while others are learned."""
    memory.consolidate([old])
    model.eval()
    before = model(old).detach()
    optimizer = optimizer or SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    memory.attach(optimizer, **settings)
    for _ in range(20):
        optimizer.zero_grad()
        out = model(new)
        (out - 1.0).square().mean().backward()
        optimizer.step()
    return float((model(old).detach() - before).norm() / before.norm())


def test_layers_that_the_model_gets_later_are_taken_up():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2))
    memory = GradientProjectionMemory(model, threshold=1.0)
    memory.consolidate([torch.randn(2, 8, generator=rng(1))])
    model[2] = nn.Sequential(model[2], nn.Linear(2, 3))
    assert drift_of(model, memory, torch.randn(1, 8, generator=rng(2)), torch.randn(9, 8, generator=rng(3))) < 1e-5
    assert "2.1" in memory.ranks
    model.add_module("head", nn.Linear(3, 2))
    memory.freeze("head")
    assert "head.weight" in memory.state_dict()["held"]


def test_memory_follows_the_model_in_precision():
    torch.manual_seed(0)
    model = mlp()
    memory = GradientProjectionMemory(model, threshold=1.0)
    model.double()
    old, new = (torch.randn(3, 4, generator=rng(seed), dtype=torch.float64) for seed in (1, 2))
    assert drift_of(model, memory, old, new) < 1e-12


def test_copied_memory_works_on_its_copy():
    model = nn.Linear(4, 4)
    memory = GradientProjectionMemory(model)
    memory.attach(SGD(model.parameters(), lr=0.1))
    memory.consolidate([torch.randn(2, 4)])
    other = copy.deepcopy(memory)
    assert other.ranks == memory.ranks
    assert set(other.state_dict()["layers"]) == {"weight"}
    assert other._sites["weight"].weight is not model.weight


class SelfThenCross(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        y = self.attention(x, x, x)[0]
        return self.attention(y, x, x)[0]


def test_one_attention_layer_for_both_kinds_of_call():
    torch.manual_seed(0)
    model = SelfThenCross()
    memory = GradientProjectionMemory(model, threshold=1.0)
    assert drift_of(model, memory, torch.randn(1, 2, 8, generator=rng(1)), torch.randn(5, 3, 8, generator=rng(2))) < 1e-5
    assert memory._sites["attention.in_proj"].groups == 3


def test_state_before_a_split_can_be_loaded_after_it():
    model = Attention()
    memory = GradientProjectionMemory(model, threshold=0.5)
    memory.consolidate([torch.randn(2, 3, 8)])
    state = memory.state_dict()
    model.cross = nn.Parameter(torch.randn(2, 5, 8), requires_grad=False)
    memory.consolidate([torch.randn(2, 3, 8)])
    memory.load_state_dict(state)
    memory.consolidate([torch.randn(2, 3, 8)])
    assert memory._sites["attention.in_proj"].groups == 3


def test_what_was_frozen_at_first_is_held_when_it_trains():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 20), nn.LayerNorm(20), nn.Tanh(), nn.Linear(20, 4))
    for parameter in model[:2].parameters():
        parameter.requires_grad_(False)
    memory = GradientProjectionMemory(model, threshold=1.0)
    old, new = torch.randn(4, 20, generator=rng(1)), torch.randn(9, 20, generator=rng(2))
    memory.consolidate([old])
    model.requires_grad_(True)
    assert drift_of(model, memory, old, new) < 1e-5


def test_biases_alone_may_train_later():
    torch.manual_seed(0)
    model = mlp()
    memory = GradientProjectionMemory(model, threshold=1.0)
    old, new = torch.randn(2, 4, generator=rng(1)), torch.randn(9, 4, generator=rng(2))
    memory.consolidate([old])
    for layer in (model[0], model[2]):
        layer.weight.requires_grad_(False)
    assert drift_of(model, memory, old, new) < 1e-5


def test_tied_head_with_a_bias():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(30, 16)
            self.head = nn.Linear(16, 30)
            self.head.weight = self.table.weight

        def forward(self, tokens):
            return self.head(torch.tanh(self.table(tokens)))

    torch.manual_seed(0)
    model = Tied()
    memory = GradientProjectionMemory(model, threshold=1.0)
    assert drift_of(model, memory, torch.arange(6), torch.arange(6, 30)) < 1e-5
    weight = model.head.weight.detach().clone()
    memory.project_()
    assert float((model.head.weight.detach() - weight).abs().max()) < 1e-6


@pytest.mark.parametrize("kind", ["two biases", "one without", "functional without", "one bias, two weights"])
def test_weights_and_biases_that_are_shared(kind):
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(8, 8)
            self.b = nn.Linear(8, 8, bias=kind != "one without")
            if kind == "one bias, two weights":
                self.b.bias = self.a.bias
            else:
                self.b.weight = self.a.weight

        def forward(self, x):
            h = torch.tanh(self.a(x))
            return F.linear(h, self.a.weight) if kind == "functional without" else self.b(h)

    torch.manual_seed(0)
    model = Shared()
    memory = GradientProjectionMemory(model, threshold=1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", OutlastWarning)
        assert drift_of(model, memory, torch.randn(2, 8, generator=rng(1)), torch.randn(9, 8, generator=rng(2))) < 1e-5


def test_uses_that_are_no_linear_map_are_said_and_held():
    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(10, 6)
            self.first = nn.Linear(6, 6)

        def forward(self, tokens):
            return torch.tanh(self.first(self.table(tokens))) @ self.table.weight.T

    torch.manual_seed(0)
    model = Head()
    memory = GradientProjectionMemory(model, threshold=1.0)
    with pytest.warns(OutlastWarning, match=r"table\.weight is also used by .*held"):
        assert drift_of(model, memory, torch.arange(3), torch.arange(3, 9)) < 1e-5
    assert drift_of(model, GradientProjectionMemory(model, other="free"), torch.arange(3), torch.arange(3, 9)) > 1e-3
    with pytest.raises(ValueError, match=r"other='error': table\.weight"):
        GradientProjectionMemory(model, other="error").consolidate([torch.arange(3)])


def test_weight_standardised_convolutions_are_held():
    class Standardised(nn.Conv2d):
        def forward(self, x):
            weight = (self.weight - self.weight.mean((1, 2, 3), keepdim=True)) / self.weight.std((1, 2, 3), keepdim=True)
            return F.conv2d(x, weight, self.bias)

    torch.manual_seed(0)
    model = nn.Sequential(Standardised(2, 4, 3), nn.Flatten(), nn.Linear(16, 3))
    memory = GradientProjectionMemory(model, threshold=1.0)
    optimizer = SGD(model.parameters(), lr=0.01)
    with pytest.warns(OutlastWarning, match="also used by"):
        assert (
            drift_of(
                model, memory, torch.randn(3, 2, 4, 4, generator=rng(1)), torch.randn(8, 2, 4, 4, generator=rng(2)), optimizer=optimizer
            )
            < 1e-5
        )


def test_gradient_mode_attached_late_starts_from_an_empty_buffer():
    torch.manual_seed(0)
    model = mlp()
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    old, new = torch.randn(2, 4, generator=rng(1)), torch.randn(9, 4, generator=rng(2))
    train(model, optimizer, old, steps=5)
    memory = GradientProjectionMemory(model, threshold=1.0)
    assert drift_of(model, memory, old, new, optimizer=optimizer, mode="gradient") < 1e-5
    optimizer.param_groups[0]["weight_decay"] = 0.5
    with pytest.raises(ValueError, match="weight decay"):
        train(model, optimizer, new, steps=1)


def test_tied_exclusions_and_recurrent_weights_are_said():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.head = nn.Embedding(5, 4), nn.Linear(4, 5, bias=False)
            self.head.weight = self.table.weight
            self.lstm = nn.LSTM(4, 4, batch_first=True)
            self.mid = nn.Linear(4, 4)

        def forward(self, x):
            return self.head(self.mid(self.lstm(self.table(x))[0]))

    with pytest.warns(OutlastWarning, match=r"also table\.weight: a tied parameter"):
        memory = GradientProjectionMemory(Tied(), exclude=["head"])
    with pytest.warns(OutlastWarning, match=r"recurrent weights.*lstm\.weight_ih_l0"):
        memory.consolidate([torch.tensor([[1, 2]])])
    only = GradientProjectionMemory(nn.LSTM(4, 4))
    with pytest.raises(ValueError, match="no constrained layer"):
        only.consolidate([torch.randn(3, 2, 4)])
    with pytest.warns(OutlastWarning, match="without running statistics"):
        GradientProjectionMemory(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, track_running_stats=False)))


def test_scaled_projection_refuses_to_scale_twice():
    model = mlp()
    with pytest.raises(ValueError, match="scale it twice"):
        GradientProjectionMemory(model, importance_scale=1.0).attach(SGD(model.parameters(), lr=0.1), mode="both")


def test_mappings_of_any_kind_are_counted():
    from collections import UserDict

    memory = GradientProjectionMemory(nn.Linear(4, 2), threshold=0.5)
    batches = [UserDict(input=torch.randn(100, 4), labels=torch.zeros(100)) for _ in range(3)]
    assert memory.consolidate(batches, max_samples=150).layers[0].rows == 150


def test_adapters_travel():
    class Adapted(nn.Module):
        def __init__(self):
            super().__init__()
            self.base = nn.Linear(10, 4)
            self.down, self.up = nn.Linear(10, 3, bias=False), nn.Linear(3, 4, bias=False)

        def forward(self, x):
            return self.base(x) + self.up(self.down(x))

    torch.manual_seed(0)
    model = Adapted()
    old, new = torch.randn(4, 10, generator=rng(1)), torch.randn(20, 10, generator=rng(2))
    model.base.requires_grad_(False)
    memory = GradientProjectionMemory(model, threshold=1.0, include=["base"])
    memory.consolidate([old])
    memory.constrain_adapter("base", model.down.weight)
    state = memory.state_dict()
    other = copy.deepcopy(model)
    again = GradientProjectionMemory(other, threshold=1.0, include=["base"])
    again.load_state_dict(state)
    before = other(old).detach()
    optimizer = AdamW([*other.down.parameters(), *other.up.parameters()], lr=0.02)
    again.attach(optimizer)
    train(other, optimizer, new, steps=20)
    assert float((other(old).detach() - before).abs().max()) < 1e-5


def test_state_with_an_adapter_outside_the_model_loads_and_says_what_to_do():
    torch.manual_seed(0)
    model = nn.Linear(10, 4)
    old = torch.randn(4, 10, generator=rng(1))
    memory = GradientProjectionMemory(model, threshold=1.0)
    memory.consolidate([old])
    memory.constrain_adapter("weight", nn.Parameter(torch.randn(3, 10)))
    again = GradientProjectionMemory(copy.deepcopy(model), threshold=1.0)
    with pytest.warns(OutlastWarning, match=r"constrain_adapter\(\) again"):
        again.load_state_dict(memory.state_dict())
    assert again.ranks == memory.ranks
    down = nn.Parameter(torch.randn(3, 10))
    again.constrain_adapter("weight", down)
    assert float((old @ down.detach().T).abs().max()) < 1e-5


def test_freeze_and_release_and_load_leave_nothing_behind():
    model = Normed()
    memory = GradientProjectionMemory(model, threshold=0.9)
    empty = memory.state_dict()
    with pytest.raises(StateError):
        memory.freeze("head")
    memory.consolidate([torch.randn(5, 4)])
    assert "head.weight" not in memory._held
    memory.freeze("head")
    memory.release()
    memory.consolidate([torch.randn(5, 4)])
    assert "head.weight" not in memory._held
    assert not model.train().bn.training
    memory.load_state_dict(empty)
    assert model.train().bn.training


def test_official_rule_holds_for_the_first_task_alone():
    memory = GradientProjectionMemory(nn.Linear(6, 2, bias=False), threshold=0.9, rank_rule="official")
    rows = torch.zeros(4, 6)
    rows[:, 0] = 1.0
    assert memory.consolidate([rows]).layers[0].rank == 0
    assert memory.consolidate([rows]).layers[0].rank == 1


def test_excluded_norms_without_parameters_stay_free():
    model = nn.ModuleDict({"body": nn.Linear(4, 4), "head": nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, affine=False))})
    memory = GradientProjectionMemory(model, exclude=["head"])
    assert not memory._layers.batch_norms()


def test_training_an_old_task_s_norms_is_refused():
    model, memory, _, old, _ = two_tasks(norm="per_task")
    memory.set_task(0)
    optimizer = SGD(model.parameters(), lr=0.1)
    memory.attach(optimizer)
    with pytest.raises(StateError, match=r"set_task\(None\)"):
        train(model, optimizer, old, steps=1)


def test_lazy_modules_and_thresholds_of_biases_are_refused():
    with pytest.raises(ValueError, match="lazy"):
        GradientProjectionMemory(nn.LazyLinear(4))
    with pytest.raises(ValueError, match=r"threshold names '0\.bias'"):
        GradientProjectionMemory(mlp(), threshold={"0.bias": 0.5})


def test_interference_does_not_take_up_layers():
    class Late(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.late, self.on = nn.Linear(4, 4), nn.Parameter(torch.randn(4, 4)), False

        def forward(self, x):
            x = self.layer(x)
            return F.linear(x, self.late) if self.on else x

    model = Late()
    memory = GradientProjectionMemory(model)
    memory.consolidate([torch.randn(2, 4)])
    model.on = True
    assert set(memory.interference([torch.randn(2, 4)])) == {"layer"}
    memory.consolidate([torch.randn(2, 4)])
    assert set(memory.ranks) == {"layer", "late"}


def test_state_fits_whatever_trained_when_the_memory_was_built():
    model = mlp()
    memory = GradientProjectionMemory(model, threshold=1.0)
    old, new = torch.randn(2, 4, generator=rng(1)), torch.randn(9, 4, generator=rng(2))
    memory.consolidate([old])
    other = copy.deepcopy(model)
    other[0].requires_grad_(False)
    again = GradientProjectionMemory(other, threshold=1.0)
    again.load_state_dict(memory.state_dict())
    other.requires_grad_(True)
    before, bias = other(old).detach(), other[0].bias.detach().clone()
    optimizer = SGD(other.parameters(), lr=0.1)
    again.attach(optimizer)
    train(other, optimizer, new, steps=5)
    assert float((other(old).detach() - before).abs().max()) < 1e-5
    assert not torch.equal(bias, other[0].bias)


@pytest.mark.parametrize("kind", ["linear", "conv", "complement", "lean"])
def test_a_bias_that_is_frozen_later_stays(kind):
    torch.manual_seed(0)
    shape = (4, 3, 3) if kind == "conv" else (12,)
    model = nn.Conv2d(4, 6, 3, padding=1, groups=2) if kind == "conv" else nn.Linear(12, 5)
    memory = GradientProjectionMemory(model, threshold=1.0, keep_reference=kind != "lean")
    old, new = torch.randn(9 if kind == "complement" else 1, *shape, generator=rng(1)), torch.randn(9, *shape, generator=rng(2))
    memory.consolidate([old])
    model.bias.requires_grad_(False)
    bias, before = model.bias.detach().clone(), model(old).detach()
    optimizer = AdamW([model.weight], lr=0.02, weight_decay=0.1)
    memory.attach(optimizer)
    start = model.weight.detach().clone()
    train(model, optimizer, new, steps=10)
    assert torch.equal(model.bias, bias)
    assert float((model(old).detach() - before).abs().max()) < 1e-5
    assert float((model.weight.detach() - start).abs().max()) > 1e-2


def test_release_puts_live_norms_back():
    model, memory, _, old, _ = two_tasks(norm="per_task")
    live = snapshot(model)
    memory.set_task(0)
    memory.release()
    assert same(live, snapshot(model))
    memory.consolidate([old])


def test_replaced_parameters_are_followed_or_refused():
    model = mlp()
    memory = GradientProjectionMemory(model, threshold=1.0)
    old = torch.randn(2, 4, generator=rng(1))
    memory.consolidate([old])
    model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()}, assign=True)
    optimizer = SGD(model.parameters(), lr=0.1)
    memory.attach(optimizer)
    before = model(old).detach()
    train(model, optimizer, torch.randn(9, 4, generator=rng(2)), steps=5)
    assert float((model(old).detach() - before).abs().max()) < 1e-5
    model[2] = nn.Linear(8, 5)
    with pytest.raises(ValueError, match=r"2\.weight was replaced by one of another shape \(\(3, 8\), now \(5, 8\)\)"):
        memory.attach(SGD(model.parameters(), lr=0.1))
