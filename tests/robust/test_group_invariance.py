"""The invariance penalty, the inference of groups, and the method in a loop."""

from __future__ import annotations

import inspect
import io
import itertools
import math

import pytest
import torch
from helpers import drawn, in_processes, invariance_run, rng
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from outlast._core._once import Once
from outlast.data import Indexed
from outlast.errors import DamagedFileError, OutlastWarning
from outlast.robust import (
    SAM,
    GroupBalancedCrossEntropy,
    GroupInvariance,
    GroupPartition,
    InvariancePenalty,
    balanced_sampler,
    collect_features,
    group_balanced_cross_entropy,
    infer_groups,
    invariance_penalty,
)
from outlast.robust import _invariance as module
from outlast.robust._group_inference import _Splitters, cohen_kappa

penalty_of = inspect.unwrap(invariance_penalty)


def batch(n=40, K=5, *, seed=0, groups=2, dtype=torch.float64):
    stream = rng(seed)
    logits = 2 * torch.randn(n, K, generator=stream, dtype=dtype)
    return logits, torch.randint(0, K, (n,), generator=stream), torch.randint(0, groups, (n,), generator=stream)


def naive(logits, labels, groups, *, eps=1e-12, divergence="kl", num_groups=2):
    """The double loop."""
    p = logits.softmax(1)
    found = []
    for c in range(logits.shape[1]):
        total = logits.new_zeros(())
        means = [p[(labels == c) & (groups == g)] for g in range(num_groups)]
        for g in range(1, num_groups):
            if len(means[0]) and len(means[g]):
                m0, m1 = means[0].mean(0).clamp(eps, 1 - eps), means[g].mean(0).clamp(eps, 1 - eps)
                if divergence == "reverse_kl":
                    m0, m1 = m1, m0
                if divergence == "js":
                    m = (m0 + m1) / 2
                    total = total + 0.5 * (m1 * (m1 / m).log()).sum() + 0.5 * (m0 * (m0 / m).log()).sum()
                else:
                    total = total + (m1 * (m1 / m0).log()).sum()
        found.append(total / (num_groups - 1))
    return torch.stack(found)


# ---- O1 to O6: the penalty ----------------------------------------------------------------------------------------------------


def test_worked_example():
    logits = torch.tensor([[0.9, 0.1], [0.7, 0.3], [0.5, 0.5]], dtype=torch.float64).log()
    labels, groups = torch.zeros(3, dtype=torch.int64), torch.tensor([0, 0, 1])
    assert float(invariance_penalty(logits, labels, groups, reduction="sum")) == pytest.approx(0.2231435513, abs=1e-9)
    assert float(invariance_penalty(logits, labels, groups)) == pytest.approx(0.11157178, abs=1e-7)
    each = InvariancePenalty(reduction="none")(logits, labels, groups)
    assert each.tolist() == pytest.approx([0.2231435513, 0.0])


@pytest.mark.parametrize("K", [2, 9, 100, 300])  # beyond 128 classes the table is of those in the batch
@pytest.mark.parametrize("divergence", ["kl", "reverse_kl", "js"])
@pytest.mark.parametrize("num_groups", [2, 4])
def test_equals_the_double_loop_and_its_gradient(K, divergence, num_groups):
    for seed in range(4):
        logits, labels, groups = batch(60, K, seed=seed, groups=num_groups)
        if K == 300:
            labels = labels % 5 * 70  # few classes, several examples each
        groups[torch.rand(60, generator=rng(seed)) < 0.2] = -1
        logits.requires_grad_()
        options = {"divergence": divergence, "num_groups": num_groups}
        ours, theirs = invariance_penalty(logits, labels, groups, reduction="none", **options), naive(logits, labels, groups, **options)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-13)
        one, two = (torch.autograd.grad(value.sum(), logits)[0] for value in (ours, theirs))
        torch.testing.assert_close(one, two, rtol=0, atol=1e-13)
        mean = invariance_penalty(logits, labels, groups, **options)
        assert float(mean.detach()) == pytest.approx(float(ours.sum().detach()) / K)


def test_single_precision_and_half():
    logits, labels, groups = batch(60, 9)
    exact = float(invariance_penalty(logits, labels, groups))
    assert float(invariance_penalty(logits.float(), labels, groups)) == pytest.approx(exact, rel=1e-5)
    half = invariance_penalty(logits.bfloat16(), labels, groups)
    assert half.dtype == torch.float32
    assert float(half) == pytest.approx(float(invariance_penalty(logits.bfloat16().double(), labels, groups)), rel=1e-5)


@given(seed=st.integers(0, 1000), K=st.sampled_from([2, 5]))
@settings(max_examples=30, deadline=None)
def test_identities(seed, K):
    logits, labels, groups = batch(30, K, seed=seed)
    groups[:2] = torch.tensor([0, 1])
    labels[:2] = 0
    call = penalty_of(logits, labels, groups)
    assert float(call) >= -1e-12
    order = torch.randperm(30, generator=rng(seed))
    columns = torch.randperm(K, generator=rng(seed + 1))
    renamed = columns.argsort()[labels]
    for other in (
        penalty_of(logits[order], labels[order], groups[order]),
        penalty_of(logits[:, columns], renamed, groups),
        penalty_of(logits + torch.randn(30, 1, generator=rng(seed), dtype=torch.float64), labels, groups),
        penalty_of(logits.repeat(2, 1), labels.repeat(2), groups.repeat(2)),
        penalty_of(logits, labels, 1 - groups, divergence="reverse_kl"),
    ):
        assert float(other) == pytest.approx(float(call), abs=1e-12)
    assert float(penalty_of(logits, labels, groups, divergence="js", reduction="none").max()) <= math.log(2) + 1e-12
    same = penalty_of(logits.repeat(2, 1), labels.repeat(2), torch.arange(2).repeat_interleave(30))
    assert float(same) == pytest.approx(0.0, abs=1e-14)


def test_gradcheck():
    logits, labels, groups = batch(12, 3)
    logits.requires_grad_()
    for divergence in ("kl", "reverse_kl", "js"):
        assert torch.autograd.gradcheck(lambda z, d=divergence: invariance_penalty(z, labels, groups, divergence=d), logits)
    assert torch.autograd.gradcheck(lambda z: group_balanced_cross_entropy(z, labels, groups), logits)


def test_groups_that_are_too_small_are_absent():
    logits, labels, groups = batch(40, 3)
    counts = torch.stack([torch.tensor([((labels == c) & (groups == g)).sum() for g in (0, 1)]) for c in range(3)])
    least = int(counts.min()) + 1
    found = invariance_penalty(logits, labels, groups, reduction="none", min_per_group=least)
    assert ((found > 0) == (counts >= least).all(1)).all()


@pytest.mark.filterwarnings("ignore:no class of the batch")
def test_many_classes_none_of_which_has_both_groups():
    logits, _, groups = batch(20, 300)
    logits.requires_grad_()
    found = invariance_penalty(logits, torch.arange(20), groups, reduction="none")
    assert torch.equal(found.detach(), torch.zeros(300, dtype=torch.float64))
    assert torch.equal(torch.autograd.grad(found.sum(), logits)[0], torch.zeros(20, 300, dtype=torch.float64))


def test_compiled_penalty_has_one_graph():
    torch._dynamo.reset()
    graphs = []

    def backend(graph, _inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(penalty_of, backend=backend, fullgraph=True)
    for seed in range(3):
        logits, labels, groups = batch(40, 5, seed=seed)
        if seed == 2:
            groups[:] = 0
        expected = naive(logits, labels, groups).sum() / 5
        torch.testing.assert_close(compiled(logits, labels, groups), expected, rtol=0, atol=1e-13)
    assert len(graphs) == 1


def test_differs_from_a_port_that_is_wrong():
    """SpuCo's loss takes the last class alone and gives KL probabilities for log-probabilities: the value that it shows is negative."""
    logits, labels, groups = batch(60, 4)
    p = logits.softmax(1)
    wrong = 0.0
    for c in range(4):
        m0, m1 = (p[(labels == c) & (groups == g)].mean(0) for g in (0, 1))
        wrong = F.kl_div(m0, m1, reduction="batchmean")
    right = invariance_penalty(logits, labels, groups)
    assert float(wrong) < 0.0 < float(right)


# ---- O7: balanced cross-entropy -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight", [None, torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_balanced_cross_entropy(weight, smoothing):
    logits, labels, groups = batch(30, 3)
    options = {"weight": weight, "label_smoothing": smoothing}
    expected = sum(F.cross_entropy(logits[groups == g], labels[groups == g], **options) for g in (0, 1)) / 2
    found = GroupBalancedCrossEntropy(**options)(logits, labels, groups)
    if smoothing == 0.0 or weight is None:
        torch.testing.assert_close(found, expected)
    for same in (torch.zeros(30, dtype=torch.int64), torch.full((30,), -1)):
        if smoothing == 0.0 or weight is None:
            torch.testing.assert_close(
                group_balanced_cross_entropy(logits, labels, same, **options), F.cross_entropy(logits, labels, **options)
            )
    if weight is None:
        equal = torch.arange(30) % 2
        torch.testing.assert_close(
            group_balanced_cross_entropy(logits, labels, equal, **options), F.cross_entropy(logits, labels, **options)
        )
        groups[:10] = -1
        known = groups >= 0
        parts = [F.cross_entropy(logits[groups == g], labels[groups == g], **options) for g in (0, 1)]
        unknown = F.cross_entropy(logits[~known], labels[~known], **options)
        mixed = 2 / 3 * sum(parts) / 2 + 1 / 3 * unknown
        torch.testing.assert_close(group_balanced_cross_entropy(logits, labels, groups, **options), mixed)


# ---- O11: several processes -----------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::outlast.errors.OutlastWarning")  # the reference is a toy
def test_two_processes_are_one(tmp_path):
    alone = invariance_run(0, 1)
    results = in_processes(invariance_run, tmp_path)
    assert torch.equal(results[0]["statistics"], results[1]["statistics"])
    for result in results:
        for name, value in alone.items():
            torch.testing.assert_close(result[name], value, rtol=0, atol=1e-6, msg=name)


# ---- O8 to O11: inference of groups ---------------------------------------------------------------------------------------------


def planted(D, *, seed, n=1000):
    """A fifth of each class is shifted and has a large loss."""
    stream = rng(seed)
    y = torch.arange(n) % 2
    minority = torch.zeros(n, dtype=torch.bool)
    for c in (0, 1):
        own = (y == c).nonzero()[:, 0]
        minority[own[torch.randperm(len(own), generator=stream)[: len(own) // 5]]] = True
    f = 0.3 * torch.randn(n, D, generator=stream) + 3.0 * minority[:, None]
    z = torch.zeros(n, 2)
    z[torch.arange(n), y] = torch.where(minority, -2.95, 4.6) + 0.1 * torch.randn(n, generator=stream)
    return f, z, y, minority


@pytest.mark.parametrize("D", [2, 16])
@pytest.mark.filterwarnings("ignore:restarts agree little")
def test_planted_split_is_recovered(D):
    agreements = []
    for seed in range(3):
        f, z, y, minority = planted(D, seed=seed)
        with torch.random.fork_rng():
            found = infer_groups(f, z, y, generator=rng(seed))
        agreements.append(float((found.groups == minority.long()).double().mean()))
        for entry in found.classes:
            assert entry.split
            assert entry.losses[1] >= entry.losses[0]
    assert min(agreements) >= 0.98
    by_loss = infer_groups(f, z, y, method="loss")
    assert float((by_loss.groups == minority.long()).double().mean()) >= 0.98


def test_gradient_of_multipliers_is_the_closed_form():
    z, y, _ = batch(10, 4)
    mu = torch.ones(10, 4, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(F.cross_entropy(z * mu, y, reduction="sum"), mu)
    torch.testing.assert_close((z.softmax(1) - F.one_hot(y, 4)) * z, grad, rtol=0, atol=1e-12)


@pytest.mark.filterwarnings("ignore::outlast.errors.OutlastWarning")  # the reference is a toy
def test_eiil_is_the_optimum():
    z, y, _ = batch(12, 3, seed=4, dtype=torch.float32)
    y = torch.arange(12) % 2  # every class has six examples and splits
    found = infer_groups(torch.randn(12, 2, generator=rng()), z, y, method="eiil")
    G = (((z.softmax(1) - F.one_hot(y, 3)) * z).sum(1)).double()

    def objective(w):
        return float((w * G).sum() ** 2 + ((1 - w) * G).sum() ** 2)

    scores = found.scores.double()
    best = max(objective(torch.tensor(w, dtype=torch.double)) for w in itertools.product((0.0, 1.0), repeat=12))
    assert objective(scores) == pytest.approx(best)
    for i in range(12):
        flipped = scores.clone()
        flipped[i] = 1 - flipped[i]
        assert objective(flipped) <= objective(scores) + 1e-12


def test_splits_are_repeatable_and_named_by_loss():
    f, z, y, _ = planted(8, seed=1)
    for method in ("partition", "loss", "error"):
        one, two = (infer_groups(f, z, y, method=method, generator=rng(5)) for _ in range(2))
        assert torch.equal(one.groups, two.groups)
        assert torch.equal(one.scores, two.scores)
        losses = F.cross_entropy(z, y, reduction="none")
        for entry in one.classes:
            own = y == entry.label
            assert entry.sizes == (int((one.groups[own] == 0).sum()), int((one.groups[own] == 1).sum()))
            assert float(losses[own & (one.groups == 1)].mean()) == pytest.approx(entry.losses[1], rel=1e-5)
    assert torch.equal(infer_groups(f, z, y).groups, infer_groups(f, z, y).groups)


def test_splitters_are_spectrally_normalised_networks():
    nets = _Splitters(3, 5, rng())
    x = torch.randn(3, 7, 5, generator=rng(1))
    out = nets(x)
    for k in range(3):
        h = x[k]
        for weight, bias in zip(nets.weights[:-1], nets.biases, strict=True):
            w = weight[k] / torch.linalg.matrix_norm(weight[k], 2)
            h = F.layer_norm(h @ w + bias[k], (w.shape[1],)).relu()
        expected = (h @ nets.weights[-1][k] / nets.weights[-1][k].norm())[:, 0]
        torch.testing.assert_close(out[k], expected, rtol=1e-2, atol=2e-3)
    torch.testing.assert_close(nets(x[1:2], slice(1, 2))[0], nets(x)[1], rtol=1e-3, atol=1e-4)


@pytest.mark.filterwarnings("ignore::outlast.errors.OutlastWarning")  # the reference is a toy
def test_classes_that_cannot_be_split():
    f, z, y, _ = planted(4, seed=0, n=200)
    y = y.clone()
    y[:3] = 2
    z = torch.cat([z, torch.full((200, 1), -3.0)], 1)
    own = (y == 1).nonzero()[:, 0]
    f[own] = 1.0
    found = infer_groups(f, z, y)
    reasons = {entry.label: entry.reason for entry in found.classes}
    assert reasons[2] == "fewer than 4 examples"
    assert reasons[1] == "constant features"
    assert int(found.groups[y != 0].sum()) == 0
    assert found.usable
    flat = torch.zeros(40, 2)
    flat[:, 0] = 1.0
    none = infer_groups(torch.randn(40, 3, generator=rng()), flat, torch.zeros(40, dtype=torch.int64))
    assert not none.usable
    assert none.classes[0].reason == "all losses equal"


def test_reference_models_that_show_no_bias_are_told():
    f, z, y, _ = planted(4, seed=0, n=200)
    with pytest.warns(OutlastWarning, match="at chance"):
        infer_groups(f, -z, y, method="error")
    sure = F.one_hot(y, 2) * 30.0 + torch.rand(200, 1, generator=rng())
    with pytest.warns(OutlastWarning, match="too long"):
        infer_groups(f, sure, y, method="loss")
    with pytest.warns(OutlastWarning, match="agree little"):
        infer_groups(torch.randn(200, 4, generator=rng(3)), z, y, steps=1, restarts=4)


def test_partition_is_kept_whole(tmp_path):
    f, z, y, _ = planted(4, seed=0, n=200)
    found = infer_groups(f, z, y)
    found.save(tmp_path / "groups.npz")
    again = GroupPartition.load(tmp_path / "groups.npz")
    assert torch.equal(again.groups, found.groups)
    assert torch.equal(again.scores, found.scores)
    assert again.classes == found.classes
    assert (again.reference_accuracy, again.stability) == (found.reference_accuracy, found.stability)
    assert repr(again) == repr(found)
    assert found.to_dict()["kind"] == "GroupPartition"
    data = (tmp_path / "groups.npz").read_bytes()
    (tmp_path / "groups.npz").write_bytes(data[: len(data) // 2])
    with pytest.raises(DamagedFileError, match="can be read whole"):
        GroupPartition.load(tmp_path / "groups.npz")
    pytest.importorskip("matplotlib")
    assert drawn(found)


def test_kappa():
    one = torch.tensor([0, 0, 1, 1])
    assert cohen_kappa(one, one) == 1.0
    assert cohen_kappa(one, 1 - one) == -1.0
    assert cohen_kappa(one, torch.tensor([0, 1, 0, 1])) == 0.0


# ---- collecting and the loop ----------------------------------------------------------------------------------------------------


def network(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


def coloured(n=240, *, seed=0):
    """Three classes whose easy cue (feature 0 to 2) is right for four fifths."""
    stream = rng(seed)
    y = torch.arange(n) % 3
    cue = torch.where(torch.rand(n, generator=stream) < 0.8, y, torch.randint(0, 3, (n,), generator=stream))
    x = torch.cat([3.0 * F.one_hot(cue, 3), F.one_hot(y, 3).float()], 1) + 0.3 * torch.randn(n, 6, generator=stream)
    return x, y


def loaders(n=240, batch_size=60):
    data = Indexed(TensorDataset(*coloured(n)))
    return DataLoader(data, batch_size, shuffle=True, generator=rng(1)), DataLoader(data, batch_size)


def test_features_are_those_before_the_head():
    net = network().train()
    _, loader = loaders()
    before = net[1].running_mean.clone()
    f, z, y = collect_features(net, loader, head="3", recalibrate_batchnorm=False)
    assert net.training
    assert torch.equal(net[1].running_mean, before)
    net.eval()
    x, labels = coloured()
    torch.testing.assert_close(f, net[:3](x).detach())
    torch.testing.assert_close(z, net(x).detach())
    assert torch.equal(y, labels)
    collect_features(net, loader, head=net[3])
    torch.testing.assert_close(net[1].running_mean, net[0](x).mean(0).detach(), rtol=1e-4, atol=1e-5)
    for head, text in (("nothing", "no layer 'nothing'"), (nn.Linear(2, 2), "no part of the model")):
        with pytest.raises(ValueError, match=text):
            collect_features(net, loader, head=head)
    with pytest.raises(ValueError, match="no batches"):
        collect_features(net, [], head="3", recalibrate_batchnorm=False)


def test_method_in_a_loop_and_its_schedule():
    net = network()
    method = GroupInvariance(net, head="3", weight=8.0, ramp_steps=4)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    train, evaluation = loaders()
    weights = []
    for epoch in range(3):
        for x, y, i in train:
            loss = method.loss(x, y, i)
            if epoch == 0:
                torch.testing.assert_close(loss.total, F.cross_entropy(loss.logits, y))
                assert (loss.weight, float(loss.penalty)) == (0.0, 0.0)
            else:
                weights.append(loss.weight)
                groups = method.groups[i]
                expected = group_balanced_cross_entropy(loss.logits, y, groups)
                torch.testing.assert_close(loss.cross_entropy, expected)
                torch.testing.assert_close(loss.penalty, invariance_penalty(loss.logits, y, groups))
                torch.testing.assert_close(loss.total.detach(), loss.cross_entropy + loss.weight * loss.penalty)
            optimizer.zero_grad()
            loss.total.backward()
            optimizer.step()
        if epoch == 0:
            partition = method.infer(evaluation)
            assert partition.usable
            assert torch.equal(method.groups, partition.groups)
    assert weights == [2.0, 4.0, 6.0, 8.0, 8.0, 8.0, 8.0, 8.0]
    with torch.no_grad():
        method.loss(*next(iter(train)))
    assert method.steps == 8


@pytest.mark.parametrize("detach", [True, False])
def test_head_learns_from_the_cross_entropy_alone(detach):
    x, y = coloured(60)
    groups = torch.randint(0, 2, (60,), generator=rng(3))
    grads = {}
    for weight in (0.0, 5.0):
        net = network()
        method = GroupInvariance(net, head="3", weight=weight, ramp_steps=1, detach_head=detach)
        method.set_groups(groups)
        method.loss(x, y, torch.arange(60)).total.backward()
        grads[weight] = [parameter.grad.clone() for parameter in net.parameters()]
    net = network()
    logits = net(x)
    (group_balanced_cross_entropy(logits, y, groups) + 5.0 * invariance_penalty(logits, y, groups)).backward()
    plain = [parameter.grad for parameter in net.parameters()]
    for found, expected in zip(grads[5.0][:4], plain[:4], strict=True):
        torch.testing.assert_close(found, expected)
    same = all(torch.equal(one, two) for one, two in zip(grads[5.0][4:], grads[0.0][4:], strict=True))
    assert same == detach
    if not detach:
        torch.testing.assert_close(grads[5.0][4], plain[4])


@pytest.mark.filterwarnings("ignore::outlast.errors.OutlastWarning")  # the reference is a toy
def test_resume_is_bit_for_bit():
    def run(steps, state=None):
        net = network()
        method = GroupInvariance(net, head="3", weight=3.0, ramp_steps=5)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
        done = 0
        if state is not None:
            state = torch.load(io.BytesIO(state), weights_only=True)
            net.load_state_dict(state["net"])
            optimizer.load_state_dict(state["optimizer"])
            method.load_state_dict(state["method"])
            done = state["done"]
        x, y = coloured(60)
        i = torch.arange(60)
        for step in range(done, steps):
            if step == 2:
                method.infer([(x, y, i)])
            optimizer.zero_grad()
            method.loss(x, y, i).total.backward()
            optimizer.step()
        buffer = io.BytesIO()
        torch.save({"net": net.state_dict(), "optimizer": optimizer.state_dict(), "method": method.state_dict(), "done": steps}, buffer)
        return net, method, buffer.getvalue()

    whole, _, _ = run(8)
    _, _, half = run(4)
    resumed, method, _ = run(8, half)
    assert all(torch.equal(one, two) for one, two in zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True))
    assert method.steps == 6
    with pytest.raises(ValueError, match="'groups', 'steps' and 'weight'"):
        method.load_state_dict({"groups": None})


def test_in_one_loop_with_sam():
    net = network()
    method = GroupInvariance(net, head="3", ramp_steps=2)
    optimizer = SAM(torch.optim.SGD(net.parameters(), lr=0.05))
    x, y = coloured(60)
    method.set_groups(torch.randint(0, 2, (60,), generator=rng()))

    def closure():
        optimizer.zero_grad()
        loss = method.loss(x, y, torch.arange(60)).total
        loss.backward()
        return loss

    first = float(optimizer.step(closure).detach())
    for _ in range(20):
        last = float(optimizer.step(closure).detach())
    assert last < first


def test_every_batch_of_the_sampler_holds_every_cell():
    f, z, y, _ = planted(4, seed=0, n=200)
    partition = infer_groups(f, z, y, method="error")
    sampler = balanced_sampler(partition, 12, generator=rng(2))
    batches = list(sampler)
    assert len(batches) == len(sampler) == 200 // 12
    for chosen in batches:
        cells = [(int(y[i]), int(partition.groups[i])) for i in chosen]
        assert {cells.count(cell) for cell in set(cells)} == {3}
    loader = DataLoader(Indexed(TensorDataset(f, y)), batch_sampler=balanced_sampler(partition, 8))
    assert len(next(iter(loader))[0]) == 8
    with pytest.raises(ValueError, match="cannot hold all 4"):
        balanced_sampler(partition, 3)


def test_weight_is_chosen_from_the_curve():
    curve = {0.0: 0.80, 1.0: 0.86, 3.0: 0.85, 10.0: 0.835, 30.0: 0.70}
    assert GroupInvariance.choose_weight(curve) == 10.0
    assert GroupInvariance.choose_weight(curve, tolerance=0.0) == 1.0
    net = network()
    x, y = coloured(60)
    groups = (torch.arange(60) % 5 == 0).long()
    method = GroupInvariance(net, head="3", ramp_steps=1)
    found = method.group_accuracy([(x[:30], y[:30], torch.arange(30)), (x[30:], y[30:], torch.arange(30, 60))], groups)
    hits = (net.eval()(x).argmax(1) == y).double()
    cells = [hits[(y == c) & (groups == g)].mean() for c in range(3) for g in (0, 1)]
    assert found == pytest.approx(float(torch.stack(cells).mean()))
    with pytest.raises(ValueError, match="curve is empty"):
        GroupInvariance.choose_weight({})


# ---- section 7 ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"logits": torch.zeros(40)}, ValueError, r"\(B, K\)"),
        ({"labels": torch.zeros(39, dtype=torch.int64)}, ValueError, r"\(39,\)"),
        ({"labels": torch.full((40,), 5)}, ValueError, r"labels must be in \[0, 5\)"),
        ({"groups": torch.full((40,), 2)}, ValueError, r"groups must be in \[-1, 2\)"),
        ({"groups": torch.zeros(40)}, TypeError, "groups must be integers"),
        ({"labels": torch.zeros(40)}, TypeError, "labels must be integers"),
        ({"logits": torch.full((40, 5), math.nan)}, ValueError, "not finite"),
        ({"logits": torch.zeros(40, 1), "labels": torch.zeros(40, dtype=torch.int64)}, ValueError, "one class"),
        (
            {"logits": torch.zeros(0, 5), "labels": torch.zeros(0, dtype=torch.int64), "groups": torch.zeros(0, dtype=torch.int64)},
            ValueError,
            "empty",
        ),
    ],
)
@pytest.mark.parametrize("function", [invariance_penalty, group_balanced_cross_entropy])
def test_bad_input_of_the_losses(function, change, error, text):
    logits, labels, groups = batch()
    given = {"logits": logits, "labels": labels, "groups": groups, **change}
    with pytest.raises(error, match=text):
        inspect.unwrap(function)(**given)


def test_bad_options():
    for options in ({"divergence": "tv"}, {"reduction": "max"}, {"eps": 0.0}, {"num_groups": 1}, {"min_per_group": 0}):
        with pytest.raises(ValueError, match="must be"):
            invariance_penalty(*batch(), **options)


def test_no_class_with_both_groups_is_said_once(monkeypatch):
    monkeypatch.setattr(module, "_once", Once(2))
    logits, labels, groups = batch()
    logits.requires_grad_()
    with pytest.warns(OutlastWarning, match="both groups"):
        value = invariance_penalty(logits, labels, torch.zeros_like(groups))
    (grad,) = torch.autograd.grad(value, logits)
    assert float(value.detach()) == 0.0
    assert torch.equal(grad, torch.zeros_like(grad))
    invariance_penalty(logits, labels, torch.zeros_like(groups))  # no second warning, which would be an error


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"method": "kmeans"}, ValueError, "method"),
        ({"restarts": 0}, ValueError, "restarts"),
        ({"quantile": 1.5}, ValueError, "quantile"),
        ({"features": torch.zeros(30, 4)}, ValueError, r"\(30, 4\)"),
        ({"labels": torch.full((200,), 2)}, ValueError, r"\[0, 2\)"),
        ({"labels": torch.zeros(200)}, TypeError, "integers"),
        ({"logits": torch.full((200, 2), math.inf)}, ValueError, "finite"),
    ],
)
def test_bad_input_of_the_inference(change, error, text):
    f, z, y, _ = planted(4, seed=0, n=200)
    with pytest.raises(error, match=text):
        inspect.unwrap(infer_groups)(**{"features": f, "logits": z, "labels": y, **change})


def test_bad_input_of_the_method():
    net = network()
    x, y = coloured(60)
    i = torch.arange(60)
    method = GroupInvariance(net, head="3", ramp_steps=1)
    with pytest.raises(ValueError, match="Indexed"):
        method.infer([(x, y)])
    method.set_groups(i % 2)
    with pytest.raises(ValueError, match="partition of 60"):
        method.loss(x, y, i + 1)
    method.set_groups(torch.zeros(60, dtype=torch.int64))
    with pytest.raises(ValueError, match="split no class"):
        method.loss(x, y, i)
    with pytest.raises(TypeError, match="integers"):
        method.set_groups(torch.zeros(60))
    with pytest.raises(ValueError, match="0, 1, or -1"):
        method.set_groups(torch.full((60,), 3))
    for options in ({"weight": -1.0}, {"ramp_steps": 0}, {"divergence": "tv"}, {"head": "9"}):
        with pytest.raises(ValueError, match=r"must be|no layer"):
            GroupInvariance(net, **{"head": "3", "ramp_steps": 1, **options})


# ---- defects that were found ----------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::outlast.errors.OutlastWarning")  # the reference is a toy
def test_numbers_with_gaps_keep_their_place():
    x, y = coloured(60)
    numbers = torch.arange(10, 130, 2)
    net = network()
    method = GroupInvariance(net, head="3", ramp_steps=1)
    partition = method.infer([(x[30:], y[30:], numbers[30:]), (x[:30], y[:30], numbers[:30])], method="loss")
    assert len(partition.groups) == 129
    assert torch.equal(partition.groups, method.groups)
    assert torch.equal(partition.labels[numbers], y)
    assert int((partition.groups >= 0).sum()) == 60
    drawn = {i for chosen in balanced_sampler(partition, 12) for i in chosen}
    assert drawn <= set(numbers.tolist())
    method.group_accuracy([(x, y, numbers)], partition)
    with pytest.raises(ValueError, match="negative"):
        method.infer([(x, y, numbers - 11)], method="loss")
    with pytest.raises(TypeError, match="numbers of examples"):
        method.loss(x, y, numbers + 0.5)


def test_compiled_models_that_ran_before():
    torch._dynamo.reset()
    net = network()
    compiled = torch.compile(net, backend="eager")
    x, y = coloured(60)
    method = GroupInvariance(compiled, head="3", ramp_steps=1)
    method.set_groups(torch.arange(60) % 2)
    first = method.loss(x, y, torch.arange(60)).penalty
    compiled(x)
    torch.testing.assert_close(method.loss(x, y, torch.arange(60)).penalty, first)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32])
def test_any_integers_are_labels_and_groups(dtype):
    logits, labels, groups = batch(60, 100)
    for function in (invariance_penalty, group_balanced_cross_entropy):
        expected = inspect.unwrap(function)(logits, labels, groups)
        torch.testing.assert_close(inspect.unwrap(function)(logits, labels.to(dtype), groups.to(dtype)), expected)


def test_groups_are_inferred_under_inference_mode_and_other_defaults():
    f, z, y, _ = planted(4, seed=0, n=200)
    expected = infer_groups(f, z, y, steps=5, restarts=1).groups
    with torch.inference_mode():
        assert torch.equal(infer_groups(f * 1.0, z * 1.0, y, steps=5, restarts=1).groups, expected)
    try:
        torch.set_default_dtype(torch.float64)
        assert torch.equal(infer_groups(f, z, y, steps=5, restarts=1).groups, expected)
        invariance_penalty(z, y, torch.arange(200) // 2 % 2)
    finally:
        torch.set_default_dtype(torch.float32)


def test_statistics_of_a_head_see_one_pass_a_step():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)))
    method = GroupInvariance(net, head="1", ramp_steps=1)
    method.set_groups(torch.arange(60) % 2)
    method.loss(*coloured(60), torch.arange(60))
    assert int(net[1][1].num_batches_tracked) == 1


def test_sampler_repeats_by_epoch():
    f, z, y, _ = planted(4, seed=0, n=200)
    partition = infer_groups(f, z, y, method="error")
    sampler = balanced_sampler(partition, 8, generator=rng(2))
    epochs = [list(sampler) for _ in range(3)]
    assert epochs[0] != epochs[1]
    again = balanced_sampler(partition, 8, generator=rng(2))
    again.set_epoch(2)
    assert list(again) == epochs[2]


def test_the_ramp_counts_steps_of_an_optimizer():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    method = GroupInvariance(net, head="2", weight=4.0, ramp_steps=4)
    method.set_groups(torch.arange(12) % 2)
    x, y, i = torch.randn(12, 6), torch.arange(12) // 2 % 3, torch.arange(12)
    handle = method.attach(optimizer)
    weights = []
    for _ in range(2):
        weights += [method.loss(x, y, i).weight, method.loss(x, y, i).weight]  # two calls a step, as SAM makes them
        optimizer.step()
    assert weights == [1.0, 1.0, 2.0, 2.0]
    handle.remove()
    assert [method.loss(x, y, i).weight, method.loss(x, y, i).weight] == [3.0, 4.0]
