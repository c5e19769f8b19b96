"""GradVac in loops: engines, groups, missing tasks, resume, other methods beside it."""

from __future__ import annotations

import copy
import io
import warnings

import pytest
import torch
from helpers import batches, cross_entropy, farthest, mlp, same, snapshot
from torch import nn
from torch.nn import functional as F

from outlast.continual import GradientProjectionMemory
from outlast.errors import OutlastWarning, StateError
from outlast.multitask import GradVac, gradient_similarity, pcgrad
from outlast.robust import SAM

SGD = torch.optim.SGD
TASKS = ["a", "b", "c"]


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


class Mixed(nn.Module):
    """Every layer kind of the layer engine, one of them used twice."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(20, 8, padding_idx=0)
        self.conv = nn.Conv1d(8, 8, 3, padding="same", groups=2)
        self.group_norm = nn.GroupNorm(2, 8)
        self.first = nn.Linear(48, 16)
        self.layer_norm = nn.LayerNorm(16)
        self.twice = nn.Linear(16, 16)
        self.rms = nn.RMSNorm(16)
        self.last = nn.Linear(16, 5)

    def forward(self, x):
        h = self.group_norm(self.conv(self.table(x).transpose(1, 2)))
        h = torch.relu(self.layer_norm(self.first(h.flatten(1))))
        h = torch.tanh(self.twice(torch.tanh(self.twice(h))))
        return self.last(self.rms(h))


def mixed_data(rows=24, seed=0, tasks=3):
    stream = rng(seed)
    ids = torch.randint(0, tasks, (rows,), generator=stream)
    return ids, torch.randint(0, 20, (rows, 6), generator=stream), torch.randint(0, 5, (rows,), generator=stream)


def by_task(out, y, ids):
    each = F.cross_entropy(out, y, reduction="none")
    return {task: each[ids == number].sum() / len(y) for number, task in enumerate(TASKS) if bool((ids == number).any())}


def close(left, right, tolerance=1e-5):
    for a, b in zip(left.parameters(), right.parameters(), strict=True):
        assert float((a.detach() - b.detach()).abs().max()) <= tolerance * max(1.0, float(a.detach().abs().max()))


# ---- engines ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"groups": "tensor"},
        {"groups": "model"},
        {"groups": lambda name: name[0]},
        {"target": 0.5},
        {"target": {("a", "b"): 0.9}},
        {"beta": 0.5, "floor": 0.1},
        {"vaccinate": ["a"], "weights": {"b": 2.0}, "rescale": "preserve", "reduction": "mean"},
    ],
)
def test_all_ways_give_the_same_gradient(settings):
    torch.manual_seed(0)
    models = [Mixed()]
    models += [copy.deepcopy(models[0]) for _ in range(3)]
    optimizers = [SGD(m.parameters(), lr=0.1) for m in models]
    vaccines = [GradVac(o, TASKS, model=m, **settings) for m, o in zip(models, optimizers, strict=True)]
    for step in range(3):
        ids, x, y = mixed_data(seed=step)
        for way, (model, optimizer, vaccine) in enumerate(zip(models, optimizers, vaccines, strict=True)):
            optimizer.zero_grad()
            if way == 0:
                vaccine.backward(by_task(model(x), y, ids))
            elif way == 1:
                vaccine.combine(by_task(model(x), y, ids)).backward()
            else:
                with vaccine.rows(ids):
                    out = model(x)
                if way == 2:
                    vaccine.backward(by_task(out, y, ids))
                else:
                    F.cross_entropy(out, y).backward()
            optimizer.step()
    for model, vaccine in zip(models[1:], vaccines[1:], strict=True):
        close(models[0], model)
        assert torch.allclose(vaccines[0].state_dict()["targets"], vaccine.state_dict()["targets"], atol=1e-6)
        assert vaccine.last.groups == vaccines[0].last.groups
        assert torch.allclose(vaccine.last.effective_weights, vaccines[0].last.effective_weights, atol=1e-4)
    assert same(snapshot(models[0]), snapshot(models[1]))


def test_equal_blocks_and_long_rows_take_the_dense_form():
    """Sequences have more rows than the ghost form is good for; equal blocks are one batched product."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    twin = copy.deepcopy(model)
    x = torch.randn(6, 50, 3)
    ids = torch.arange(3).repeat_interleave(2)
    vaccines = [GradVac(SGD(m.parameters(), lr=0.1), TASKS, model=m, target=0.6) for m in (model, twin)]
    with vaccines[0].rows(ids):
        loss = model(x).square().sum()
    loss.backward()
    vaccines[1].backward({task: twin(x[2 * n : 2 * n + 2]).square().sum() for n, task in enumerate(TASKS)})
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad, rtol=1e-4, atol=1e-5)


def test_factor_of_a_combined_loss_reaches_the_gradient():
    model, twin = mlp(), mlp()
    data = {task: batches(1, seed=n)[0] for n, task in enumerate(TASKS)}
    one, two = (GradVac(SGD(m.parameters(), lr=0.1), TASKS, model=m) for m in (model, twin))
    combined = one.combine({task: cross_entropy(model, batch) for task, batch in data.items()})
    assert float(combined.detach()) == pytest.approx(sum(float(cross_entropy(model, b).detach()) for b in data.values()), rel=1e-6)
    (combined * 8).backward()
    two.backward({task: cross_entropy(twin, batch) for task, batch in data.items()})
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(a.grad, 8 * b.grad, atol=1e-6)
    assert torch.allclose(one.state_dict()["targets"], two.state_dict()["targets"], atol=1e-7)
    with pytest.raises(StateError, match="second time"):
        combined.backward()


def test_effective_weights_explain_the_gradient():
    model = mlp(dtype=torch.float64)
    data = {task: batches(1, seed=n, dtype=torch.float64)[0] for n, task in enumerate(TASKS)}
    vaccine = GradVac(SGD(model.parameters(), lr=0.1), TASKS, model=model, target=0.7)
    report = vaccine.backward({task: cross_entropy(model, batch) for task, batch in data.items()})
    parameters = list(model.parameters())
    alone = {task: torch.autograd.grad(cross_entropy(model, batch), parameters) for task, batch in data.items()}
    for k, members in enumerate(((0, 1), (2, 3))):
        for n in members:
            expected = sum(w * alone[task][n] for w, task in zip(report.effective_weights[k], report.tasks, strict=True))
            assert torch.allclose(parameters[n].grad, expected, atol=1e-12)
    plain = torch.cat([sum(alone[task][n] for task in TASKS).flatten() for n in (0, 1)])
    mine = torch.cat([parameters[n].grad.flatten() for n in (0, 1)])
    assert float(report.norm_ratio[0]) == pytest.approx(float(mine.norm() / plain.norm()), rel=1e-9)


def test_without_vaccination_it_is_the_plain_sum():
    model, twin = mlp(), mlp()
    data = {task: batches(1, seed=n)[0] for n, task in enumerate(TASKS)}
    GradVac(SGD(model.parameters(), lr=0.1), TASKS, target=-0.999, model=model).backward(
        {t: cross_entropy(model, b) for t, b in data.items()}
    )
    sum(cross_entropy(twin, b) for b in data.values()).backward()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad, atol=1e-6)


def test_accumulation_vaccinates_the_sum_of_micro_batches():
    model, twin = mlp(), mlp()
    data = {task: batches(1, size=8, seed=n)[0] for n, task in enumerate(TASKS)}
    one, two = (GradVac(SGD(m.parameters(), lr=0.1), TASKS, model=m, target=0.5) for m in (model, twin))
    one.backward({task: cross_entropy(model, batch) for task, batch in data.items()})
    for part in range(2):
        losses = {task: cross_entropy(twin, (x[4 * part : 4 * part + 4], y[4 * part : 4 * part + 4])) / 2 for task, (x, y) in data.items()}
        report = two.backward(losses, final=part == 1)
        assert (report is None) == (part == 0)
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad, atol=1e-6)
    assert torch.allclose(one.last.cosine, two.last.cosine, atol=1e-5)


def test_gradients_are_added_to_those_that_are_there():
    model = mlp()
    data = batches(2)
    vaccine = GradVac(SGD(model.parameters(), lr=0.1), TASKS, model=model)
    losses = lambda: {task: cross_entropy(model, data[0]) * (n + 1) for n, task in enumerate(TASKS)}  # noqa: E731
    vaccine.backward(losses())
    first = [p.grad.clone() for p in model.parameters()]
    vaccine.backward(losses())
    for parameter, grad in zip(model.parameters(), first, strict=True):
        assert torch.allclose(parameter.grad, 2 * grad, atol=1e-6)


# ---- tasks ------------------------------------------------------------------------------------------------------------


class Heads(nn.Module):
    def __init__(self):
        super().__init__()
        self.trunk = nn.Linear(4, 6)
        self.heads = nn.ModuleDict({task: nn.Linear(6, 3) for task in TASKS})

    def forward(self, x, task):
        return self.heads[task](torch.tanh(self.trunk(x)))


def test_heads_keep_their_plain_gradient():
    torch.manual_seed(0)
    model = Heads()
    data = {task: batches(1, seed=n)[0] for n, task in enumerate(TASKS)}
    vaccine = GradVac(SGD(model.parameters(), lr=0.1), TASKS, model=model, target=0.9)
    loss = lambda task: F.cross_entropy(model(data[task][0], task), data[task][1])  # noqa: E731
    report = vaccine.backward({task: loss(task) for task in TASKS})
    assert report.groups == ("trunk",)
    for task in TASKS:
        own = list(model.heads[task].parameters())
        for parameter, grad in zip(own, torch.autograd.grad(loss(task), own), strict=True):
            assert torch.equal(parameter.grad, grad)


def test_absent_tasks_keep_their_targets_and_new_ones_start_at_zero():
    model = mlp()
    data = {task: batches(1, seed=n)[0] for n, task in enumerate("abcd")}
    vaccine = GradVac(SGD(model.parameters(), lr=0.1), model=model, beta=0.5)
    step = lambda names: vaccine.backward({task: cross_entropy(model, data[task]) for task in names})  # noqa: E731
    step("abc")
    kept = {group: pairs["a", "c"] for group, pairs in vaccine.targets.items()}
    for _ in range(5):
        step("ab")
    assert {group: pairs["a", "c"] for group, pairs in vaccine.targets.items()} == kept
    step("ad")
    assert vaccine.tasks == ("a", "b", "c", "d")
    vaccine.reset(["a"])
    assert all(pairs["a", "c"] == pairs["d", "a"] == 0.0 for pairs in vaccine.targets.values())
    assert any(pairs["b", "c"] != 0.0 for pairs in vaccine.targets.values())
    vaccine.reset()
    assert not vaccine.state_dict()["targets"].any()
    with pytest.raises(ValueError, match="unknown task 'z'"):
        vaccine.reset(["z"])


def test_one_task_is_an_ordinary_backward():
    model, twin = mlp(), mlp()
    batch = batches(1)[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = GradVac(SGD(model.parameters(), lr=0.1), TASKS, model=model).backward({"b": cross_entropy(model, batch)})
    cross_entropy(twin, batch).backward()
    assert same([p.grad for p in model.parameters()], [p.grad for p in twin.parameters()])
    assert report.tasks == ("b",)


def test_order_of_the_mapping_does_not_matter():
    found = []
    for names in ("abc", "cab"):
        model = mlp()
        data = {task: batches(1, seed=ord(task))[0] for task in "abc"}
        vaccine = GradVac(SGD(model.parameters(), lr=0.1), TASKS, model=model, target=0.6, generator=rng(4))
        vaccine.backward({task: cross_entropy(model, data[task]) for task in names})
        found.append([p.grad for p in model.parameters()])
    assert same(*found)


def test_nothing_shared_is_said_once():
    model = nn.ModuleDict({task: nn.Linear(4, 3) for task in "ab"})
    vaccine = GradVac(SGD(model.parameters(), lr=0.1), ["a", "b"], model=model)
    x = torch.randn(3, 4)
    losses = lambda: {task: model[task](x).square().mean() for task in "ab"}  # noqa: E731
    with pytest.warns(OutlastWarning, match="no parameter is shared"):
        report = vaccine.backward(losses())
    assert report.groups == ()
    assert model["a"].weight.grad is not None
    vaccine.backward(losses())


def test_pcgrad_is_the_fixed_target_zero():
    model = mlp()
    vaccine = pcgrad(SGD(model.parameters(), lr=0.1), TASKS, model=model)
    assert "1 groups" in repr(vaccine)
    report = vaccine.backward({task: cross_entropy(model, batches(1, seed=n)[0]) for n, task in enumerate(TASKS)})
    assert not report.target.any()
    assert not vaccine.state_dict()["targets"].any()


# ---- groups -----------------------------------------------------------------------------------------------------------


def test_groups_by_model_by_names_and_by_order_agree():
    model = mlp()
    by_model = GradVac(SGD(model.parameters(), lr=0.1), model=model).groups
    by_name = GradVac(SGD(model.named_parameters(), lr=0.1)).groups
    by_order = GradVac(SGD(model.parameters(), lr=0.1)).groups
    assert by_model == by_name == {"0": ["0.weight", "0.bias"], "2": ["2.weight", "2.bias"]}
    assert by_order == {"layer 0": ["0", "1"], "layer 1": ["2", "3"]}


def test_attention_is_grouped_by_identity():
    model = nn.MultiheadAttention(8, 2)
    groups = GradVac(SGD(model.parameters(), lr=0.1), model=model).groups
    assert groups["out_proj"] == ["out_proj.weight", "out_proj.bias"]
    assert any("in_proj_weight" in members for members in groups.values())


def test_groups_of_the_user():
    model = mlp()
    weights = [p for p in model.parameters() if p.ndim == 2]
    vaccine = GradVac(SGD(model.parameters(), lr=0.1), model=model, groups={"weights": weights})
    assert vaccine.groups == {"weights": ["0.weight", "2.weight"], "rest": ["0.bias", "2.bias"]}
    with pytest.raises(ValueError, match="in two groups"):
        GradVac(SGD(model.parameters(), lr=0.1), groups={"x": weights, "y": weights[:1]})
    with pytest.raises(ValueError, match="does not have"):
        GradVac(SGD(model.parameters(), lr=0.1), groups={"x": [nn.Parameter(torch.zeros(2))]})
    with pytest.raises(ValueError, match="parameter names"):
        GradVac(SGD(model.parameters(), lr=0.1), groups=len)


# ---- numbers ----------------------------------------------------------------------------------------------------------


def test_gradients_that_are_not_finite_pass_as_the_plain_sum():
    for engine in ("loop", "layer"):
        model = mlp()
        vaccine = GradVac(SGD(model.parameters(), lr=0.1), TASKS, model=model, beta=0.5)
        data = {task: batches(1, size=4, seed=n)[0] for n, task in enumerate(TASKS)}
        vaccine.backward({task: cross_entropy(model, batch) for task, batch in data.items()})
        before = vaccine.state_dict()["targets"]
        model.zero_grad()
        if engine == "loop":
            losses = {task: cross_entropy(model, batch) for task, batch in data.items()}
            losses["b"] = losses["b"] * float("inf")
            report = vaccine.backward(losses)
        else:
            with vaccine.rows(torch.arange(3).repeat_interleave(4)):
                out = model(torch.cat([batch[0] for batch in data.values()]))
            (out.sum() * float("inf")).backward()
            report = vaccine.last
        assert not report.finite
        assert not torch.isfinite(model[0].weight.grad).all()
        assert torch.equal(before, vaccine.state_dict()["targets"])


def test_gradient_scaler_skips_and_recovers():
    model = mlp()
    optimizer = SGD(model.parameters(), lr=0.1)
    vaccine = GradVac(optimizer, TASKS, model=model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    start = snapshot(model)
    for step in range(3):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            losses = {task: cross_entropy(model, batches(1, seed=n)[0]).float() for n, task in enumerate(TASKS)}
        if step == 1:
            losses["a"] = losses["a"] * float("nan")
        scaler.scale(vaccine.combine(losses)).backward()
        scaler.step(optimizer)
        scaler.update()
        assert vaccine.last.finite == (step != 1)
    assert farthest(model, mlp()) > 0
    assert not same(start, snapshot(model))
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_layer_engine_under_autocast():
    model, twin = mlp(), mlp()
    ids, x = torch.arange(3).repeat_interleave(4), torch.randn(12, 4, generator=rng(1))
    one, two = (GradVac(SGD(m.parameters(), lr=0.1), TASKS, model=m) for m in (model, twin))
    with torch.autocast("cpu", torch.bfloat16), one.rows(ids):
        loss = model(x).float().square().mean()
    loss.backward()
    two.backward({task: twin(x[ids == n]).square().sum() / 36 for n, task in enumerate(TASKS)})
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert a.grad.dtype == torch.float32
        assert torch.allclose(a.grad, b.grad, rtol=0.1, atol=0.02)


def test_rescaling_preserves_the_norm_of_the_sum():
    model, twin = mlp(), mlp()
    data = {task: batches(1, seed=n)[0] for n, task in enumerate(TASKS)}
    vaccine = GradVac(SGD(model.parameters(), lr=0.1), TASKS, model=model, target=0.9, rescale="preserve", groups="model")
    report = vaccine.backward({task: cross_entropy(model, batch) for task, batch in data.items()})
    sum(cross_entropy(twin, batch) for batch in data.values()).backward()
    norms = [torch.cat([p.grad.flatten() for p in m.parameters()]).norm() for m in (model, twin)]
    assert float(norms[0]) == pytest.approx(float(norms[1]), rel=1e-5)
    assert float(report.norm_ratio) == pytest.approx(1.0)


@pytest.mark.parametrize("engine", ["loop", "layer"])
def test_debiased_average_is_higher_under_noise(engine):
    """Two tasks with one true direction and much noise: the naive cosine is pulled to zero, the debiased one is not."""
    found = {}
    for debias in (False, True):
        torch.manual_seed(0)
        model = nn.Linear(30, 1, bias=False)
        vaccine = GradVac(SGD(model.parameters(), lr=0.0), ["a", "b"], model=model, beta=0.05, debias=debias)
        stream = rng(2)
        for _ in range(200):
            x = 0.35 + torch.randn(16, 30, generator=stream)
            if engine == "layer":
                with vaccine.rows(torch.arange(2).repeat_interleave(8)):
                    out = model(x)
                out.sum().backward()
            else:
                rows = model(x)[:, 0]
                losses = {"a": rows[:8], "b": rows[8:]}
                vaccine.backward(losses if debias else {task: loss.sum() for task, loss in losses.items()})
            model.zero_grad()
        found[debias] = vaccine.targets["root"]["a", "b"]
    assert found[False] < 0.65
    assert found[True] > found[False] + 0.2


# ---- other methods and tools ------------------------------------------------------------------------------------------


def test_vaccine_memory_sam_and_clipping_in_one_loop():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))
    base = torch.optim.AdamW(model.parameters(), lr=0.02, weight_decay=0.1)
    optimizer = SAM(base, rho=0.05)
    memory = GradientProjectionMemory(model, threshold=1.0)
    memory.attach(optimizer)
    vaccine = GradVac(optimizer, TASKS, model=model)
    old = torch.randn(2, 8, generator=rng(1))
    memory.consolidate([old])
    before = model(old).detach()
    data = {task: (torch.randn(8, 8, generator=rng(n)), torch.randint(0, 3, (8,), generator=rng(n))) for n, task in enumerate(TASKS)}

    def closure():
        optimizer.zero_grad()
        each = {task: cross_entropy(model, batch) for task, batch in data.items()}
        vaccine.backward(each)
        memory.project_gradients_()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        return torch.stack(list(each.values())).sum().detach()

    losses = [float(optimizer.step(closure)) for _ in range(20)]
    assert losses[-1] < 0.8 * losses[0]
    assert float((model(old).detach() - before).abs().max()) < 1e-5


def test_state_travels_and_the_run_goes_on_the_same():
    def build():
        model = mlp()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        return model, optimizer, GradVac(optimizer, model=model, beta=0.3)

    def step(model, optimizer, vaccine, number):
        optimizer.zero_grad()
        vaccine.backward({task: cross_entropy(model, batches(1, seed=10 * number + n)[0]) for n, task in enumerate("abc")})
        optimizer.step()

    one = build()
    for number in range(5):
        step(*one, number)
    file = io.BytesIO()
    torch.save([each.state_dict() for each in one], file)
    file.seek(0)
    two = build()
    for each, state in zip(two, torch.load(file, weights_only=True), strict=True):
        each.load_state_dict(state)
    for number in range(5, 15):
        step(*one, number)
        step(*two, number)
    assert same(snapshot(one[0]), snapshot(two[0]))
    assert torch.equal(one[2].state_dict()["targets"], two[2].state_dict()["targets"])


def test_states_merge_tasks_and_refuse_other_groups():
    model = mlp()
    source = GradVac(SGD(model.parameters(), lr=0.1), model=model, beta=1.0)
    source.backward({task: cross_entropy(model, batches(1, seed=n)[0]) for n, task in enumerate("ab")})
    other = GradVac(SGD(model.parameters(), lr=0.1), model=model, beta=1.0)
    other.backward({task: cross_entropy(model, batches(1, seed=n)[0]) for n, task in enumerate("cb")})
    kept = other.targets["0"]["c", "b"]
    other.load_state_dict(source.state_dict())
    assert other.tasks == ("c", "b", "a")
    assert other.targets["0"]["c", "b"] == kept
    assert other.targets["0"]["a", "b"] == source.targets["0"]["a", "b"]
    with pytest.raises(ValueError, match="other groups"):
        GradVac(SGD(model.parameters(), lr=0.1), model=model, groups="tensor").load_state_dict(source.state_dict())
    with pytest.raises(ValueError, match="unknown task"):
        GradVac(SGD(model.parameters(), lr=0.1), ["x"], model=model).load_state_dict(source.state_dict())


def test_compiled_model_takes_both_engines():
    torch.compiler.reset()
    model, twin = mlp(), mlp()
    compiled = torch.compile(twin, backend="eager")
    ids, x = torch.arange(3).repeat_interleave(4), torch.randn(12, 4, generator=rng(1))
    one, two = (GradVac(SGD(m.parameters(), lr=0.1), TASKS, model=m) for m in (model, compiled))
    one.backward({task: model(x[ids == n]).square().sum() for n, task in enumerate(TASKS)})
    two.backward({task: compiled(x[ids == n]).square().sum() for n, task in enumerate(TASKS)})
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad, atol=1e-6)
    for vaccine, called in ((one, model), (two, compiled)):
        called.zero_grad()
        with vaccine.rows(ids):
            loss = called(x).square().sum()
        loss.backward()
    assert torch.allclose(one.last.cosine, two.last.cosine, atol=1e-6)
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad, atol=1e-6)


def test_report_is_json_and_a_picture():
    model = mlp()
    vaccine = GradVac(SGD(model.parameters(), lr=0.1), model=model)
    report = vaccine.backward({("x", 1): cross_entropy(model, batches(1)[0]), "b": cross_entropy(model, batches(1, seed=4)[0])})
    record = report.to_dict()
    assert record["tasks"] == ["('x', 1)", "b"]
    assert record["finite"] is True
    assert "acted on" in repr(report)
    axes = pytest.importorskip("matplotlib.pyplot", reason="matplotlib (extra report) is not installed").figure().subplots()
    assert report.plot(axes) is axes


# ---- the layer engine's limits ----------------------------------------------------------------------------------------


class Positioned(nn.Module):
    def __init__(self):
        super().__init__()
        self.place = nn.Parameter(torch.zeros(4))
        self.layer = nn.Linear(4, 3)

    def forward(self, x):
        return self.layer(x + self.place)


def test_uses_without_rows_are_refused_or_left_to_the_loop():
    ids, x = torch.arange(3).repeat_interleave(2), torch.randn(6, 4, generator=rng(1))
    model, twin = Positioned(), Positioned()
    twin.load_state_dict(model.state_dict())
    strict = GradVac(SGD(model.parameters(), lr=0.1), TASKS, model=model, engine="layer")
    with pytest.raises(ValueError, match=r"'place' is used by add"), strict.rows(ids):
        model(x)
    auto = GradVac(SGD(model.parameters(), lr=0.1), TASKS, model=model)
    plain = GradVac(SGD(twin.parameters(), lr=0.1), TASKS, model=twin)
    with pytest.warns(OutlastWarning, match="'place' is used by add"), auto.rows(ids):
        out = model(x)
    auto.backward({task: out[ids == n].square().sum() for n, task in enumerate(TASKS)})
    other = twin(x)
    plain.backward({task: other[ids == n].square().sum() for n, task in enumerate(TASKS)})
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad, atol=1e-6)


def test_a_plain_backward_that_cannot_be_told_apart_is_refused():
    model = Positioned()
    vaccine = GradVac(SGD(model.parameters(), lr=0.1), TASKS, model=model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", OutlastWarning)
        with vaccine.rows(torch.arange(3)):
            first = model.layer(torch.randn(3, 4))
            loss = (first.sum() + model(torch.randn(3, 4)).sum()).square()
    with pytest.raises(ValueError, match="'place' is used by add"):
        loss.backward()


def test_batch_norm_in_training_mode_mixes_rows():
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 2))
    vaccine = GradVac(SGD(model.parameters(), lr=0.1), TASKS, model=model, engine="layer")
    with pytest.raises(ValueError, match="mixes rows"), vaccine.rows(torch.arange(3)):
        model(torch.randn(3, 4))
    model.eval()
    with vaccine.rows(torch.arange(3)):
        loss = model(torch.randn(3, 4)).sum()
    loss.backward()
    assert vaccine.last.groups == ("0", "1", "2")


def test_a_loss_from_another_forward_pass_is_not_taken_for_a_labelled_one():
    model, twin = mlp(), mlp()
    one, two = (GradVac(SGD(m.parameters(), lr=0.1), TASKS, model=m, target=0.8) for m in (model, twin))
    with one.rows(torch.arange(3)):
        model(torch.randn(3, 4))
    for m, vaccine in ((model, one), (twin, two)):
        vaccine.backward({task: cross_entropy(m, batches(1, seed=n)[0]) for n, task in enumerate(TASKS)})
    assert same([p.grad for p in model.parameters()], [p.grad for p in twin.parameters()])
    assert one.last.norm_ratio[0] > 1.0
    with one.rows(torch.arange(3)):
        loss = model(torch.randn(3, 4)).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(StateError, match="second backward"):
        loss.backward()


def test_rows_that_do_not_fit_are_refused():
    model = mlp()
    vaccine = GradVac(SGD(model.parameters(), lr=0.1), TASKS, model=model, engine="layer")
    with pytest.raises(ValueError, match=r"input of shape \(5, 4\)"), vaccine.rows(torch.arange(3)):
        model(torch.randn(5, 4))
    for ids, message in (
        (torch.zeros(2, 2, dtype=torch.int64), "vector of task numbers"),
        (torch.tensor([0.5]), "vector of task numbers"),
        (torch.tensor([3]), r"\[0, 2\]"),
    ):
        with pytest.raises(ValueError, match=message), vaccine.rows(ids):
            pass
    with (
        pytest.raises(ValueError, match="engine='loop'"),
        GradVac(SGD(model.parameters(), lr=0.1), TASKS, engine="loop").rows(torch.arange(3)),
    ):
        pass
    with pytest.raises(ValueError, match="tasks' names"), GradVac(SGD(model.parameters(), lr=0.1)).rows(torch.arange(3)):
        pass
    with vaccine.rows(torch.arange(3)):
        out = model(torch.randn(3, 4))
    with pytest.raises(ValueError, match="final=False"):
        vaccine.backward({task: out[n].sum() for n, task in enumerate(TASKS)}, final=False)
    with pytest.raises(ValueError, match="the labelled rows of"):
        vaccine.backward({"a": out.sum()})
    with pytest.raises(ValueError, match="different forward passes; without rows"):
        vaccine.backward({"a": out.sum(), "b": model(torch.randn(3, 4)).sum(), "c": out.sum()})


def test_untracked_parameters_get_their_plain_gradient_in_the_layer_engine():
    model, twin = mlp(), mlp()
    ids, x = torch.arange(3).repeat_interleave(4), torch.randn(12, 4, generator=rng(1))
    vaccine = GradVac(SGD(model.parameters(), lr=0.1), TASKS, model=model, shared=list(model[0].parameters()), target=0.9)
    with vaccine.rows(ids):
        loss = model(x).square().sum()
    loss.backward()
    twin(x).square().sum().backward()
    assert torch.allclose(model[2].weight.grad, twin[2].weight.grad, atol=1e-5)
    assert not torch.allclose(model[0].weight.grad, twin[0].weight.grad, atol=1e-3)


# ---- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"beta": 2.0}, "beta must be"),
        ({"target": 1.5}, "target must be"),
        ({"target": -1.0}, "target must be"),
        ({"target": {("a", "z"): 0.5}}, "target names 'z'"),
        ({"target": {"a": 0.5}}, "pairs of tasks"),
        ({"max_target": 1.0}, "max_target must be"),
        ({"groups": "block"}, "groups must be one of"),
        ({"shared": "all"}, "shared must be one of"),
        ({"reduction": "max"}, "reduction must be one of"),
        ({"rescale": "yes"}, "rescale must be one of"),
        ({"engine": "fast"}, "engine must be one of"),
        ({"vaccinate": ["z"]}, "vaccinate names 'z'"),
        ({"weights": {"z": 1.0}}, "weights names 'z'"),
        ({"shared": [nn.Parameter(torch.zeros(2))]}, "shared holds"),
        ({"tasks": ["a", "a"]}, "twice"),
        ({"tasks": []}, "tasks is empty"),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        GradVac(SGD(mlp().parameters(), lr=0.1), **{"tasks": TASKS, **settings})


def test_targets_above_the_cap_are_capped_with_a_warning():
    with pytest.warns(OutlastWarning, match="capped at 0.99"):
        vaccine = GradVac(SGD(mlp().parameters(), lr=0.1), TASKS, target=1.0)
    assert vaccine.targets["layer 0"]["a", "b"] == 0.99


def test_wrong_losses_are_refused():
    model = mlp()
    vaccine = GradVac(SGD(model.parameters(), lr=0.1), TASKS, model=model)
    good = cross_entropy(model, batches(1)[0])
    for losses, message in (
        ({}, "at least one"),
        ([good], "mapping"),
        ({"z": good}, "unknown task 'z'; the tasks are 'a', 'b', 'c'"),
        ({"a": good, "b": model(torch.randn(2, 4))}, r"task 'b' must be a scalar, got shape \(2, 3\)"),
        ({"a": good.detach()}, "task 'a' has no graph"),
        ({"a": torch.ones((), requires_grad=True) * 2}, "no loss depends on a parameter"),
    ):
        with pytest.raises(ValueError, match=message):
            vaccine.backward(losses)
    with pytest.raises(TypeError, match="task 'a' is a float"):
        vaccine.backward({"a": 1.0})
    with pytest.raises(TypeError, match="Optimizer"):
        GradVac(model)
    noisy = GradVac(SGD(model.parameters(), lr=0.1), TASKS, model=model, debias=True)
    with pytest.raises(ValueError, match="at least 2 rows"):
        noisy.backward({"a": model(torch.randn(1, 4))[:, 0]})


# ---- similarity -------------------------------------------------------------------------------------------------------


def similar_losses(model, rows=64):
    """Tasks a and b want the same, c the opposite."""
    stream = rng(3)
    x = torch.randn(3, rows, 4, generator=stream)
    wanted = {"a": 1.0, "b": 0.9, "c": -1.0}
    return {task: (model(x[n])[:, 0] - goal * 3).square() for n, (task, goal) in enumerate(wanted.items())}


def test_similarity_finds_who_belongs_together():
    model = mlp()
    found = gradient_similarity(model, similar_losses(model))
    assert found.debiased
    assert found.nearest() == {"a": "b", "b": "a", "c": found.nearest()["c"]}
    assert float(found.overall[0, 1]) > 0.8 > float(found.overall[0, 2])
    assert torch.equal(found.overall.diagonal(), torch.ones(3, dtype=torch.float64))
    assert found.groups == ("0", "2")
    assert set(map(frozenset, found.clusters(2))) == {frozenset("ab"), frozenset("c")}
    assert set(found.order()) == set("abc")
    assert found.order().index("c") in (0, 2)
    assert found.to_dict()["tasks"] == ["a", "b", "c"]
    axes = pytest.importorskip("matplotlib.pyplot", reason="matplotlib (extra report) is not installed").figure().subplots()
    assert found.plot(axes) is axes
    with pytest.raises(ValueError, match="between 1 and"):
        found.clusters(4)


def test_similarity_without_debiasing_is_the_plain_cosine():
    model = mlp(dtype=torch.float64)
    data = {task: batches(1, seed=n, dtype=torch.float64)[0] for n, task in enumerate("ab")}
    with pytest.warns(OutlastWarning, match="not debiased"):
        found = gradient_similarity(model, {task: cross_entropy(model, batch) for task, batch in data.items()})
    flat = [
        torch.cat([g.flatten() for g in torch.autograd.grad(cross_entropy(model, batch), list(model.parameters()))])
        for batch in data.values()
    ]
    assert float(found.overall[0, 1]) == pytest.approx(float(F.cosine_similarity(*flat, dim=0)), rel=1e-9)


def test_similarity_over_loaders_is_the_mean_gradient():
    model = mlp(dropout=0.5, dtype=torch.float64)
    loaders = {task: batches(3, size=6, seed=n, dtype=torch.float64) for n, task in enumerate("ab")}
    found = gradient_similarity(model, loaders, loss_fn=cross_entropy, debias=False)
    model.eval()
    joined = {task: (torch.cat([x for x, _ in data]), torch.cat([y for _, y in data])) for task, data in loaders.items()}
    flat = [
        torch.cat([g.flatten() for g in torch.autograd.grad(cross_entropy(model, batch), list(model.parameters()))])
        for batch in joined.values()
    ]
    assert float(found.overall[0, 1]) == pytest.approx(float(F.cosine_similarity(*flat, dim=0)), rel=1e-9)
    single = {task: [batch] for task, batch in joined.items()}
    assert gradient_similarity(model, single, loss_fn=cross_entropy).debiased


def test_debiased_similarity_is_not_pulled_to_zero():
    torch.manual_seed(0)
    model = nn.Linear(40, 1, bias=False)
    values = {True: [], False: []}
    for seed in range(20):
        x = 0.3 + torch.randn(2, 20, 40, generator=rng(seed))
        for debias in values:
            found = gradient_similarity(model, {n: model(x[n])[:, 0] for n in range(2)}, debias=debias)
            values[debias].append(float(found.overall[0, 1]))
    naive, clean = (sum(values[debias]) / 20 for debias in (False, True))
    assert naive < 0.75 < clean


def test_wrong_similarity_arguments_are_refused():
    model = mlp()
    good = similar_losses(model)
    with pytest.raises(ValueError, match="two tasks"):
        gradient_similarity(model, {"a": good["a"]})
    with pytest.raises(TypeError, match="loss_fn"):
        gradient_similarity(model, {"a": batches(1), "b": batches(1)})
    with pytest.raises(ValueError, match="no batches"):
        gradient_similarity(model, {"a": [], "b": batches(1)}, loss_fn=cross_entropy)
    with pytest.raises(ValueError, match="depends on no parameter"):
        gradient_similarity(model, {"a": good["a"], "b": torch.ones(4, requires_grad=True) * 2})
    with pytest.raises(ValueError, match="does not have"):
        gradient_similarity(model, good, parameters=[nn.Parameter(torch.zeros(2))])
    with pytest.raises(ValueError, match="not finite"):
        gradient_similarity(model, {"a": good["a"], "b": good["b"] * float("nan")})


# ---- defects that were found once -------------------------------------------------------------------------------------

IDS = torch.arange(6) % 2


def by_both_engines(model, forward, **settings):
    """The same step by both engines; gradients by name."""
    found = []
    for engine in ("layer", "loop"):
        net = copy.deepcopy(model)
        vaccine = GradVac(SGD(net.parameters(), lr=0.1), TASKS[:2], model=net, engine=engine, **settings)
        if engine == "layer":
            with vaccine.rows(IDS):
                out = forward(net)
            out.sum().backward()
        else:
            out = forward(net)
            vaccine.backward({task: out[n == IDS].sum() for n, task in enumerate(TASKS[:2])})
        found.append({name: p.grad for name, p in net.named_parameters()})
    return found


@pytest.mark.parametrize(
    ("build", "shape", "message"),
    [
        (lambda: nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True), (6, 5, 8), "is used by multi_head_attention"),
        (lambda: nn.LSTM(8, 4, batch_first=True), (6, 5, 8), "is used by lstm"),
        (lambda: nn.Bilinear(8, 8, 4), (6, 8), "is used by bilinear"),
    ],
)
def test_weights_that_hide_in_other_calls_are_refused(build, shape, message):
    model = build()
    x = torch.randn(*shape, generator=rng(1))
    vaccine = GradVac(SGD(model.parameters(), lr=0.1), TASKS[:2], model=model, engine="layer")
    with pytest.raises(ValueError, match=message), vaccine.rows(IDS):
        model(x, x) if isinstance(model, nn.Bilinear) else model(x)


def test_weights_inside_custom_functions_are_refused():
    class Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, w):
            ctx.save_for_backward(x, w)
            return x @ w

        @staticmethod
        def backward(ctx, grad):
            x, w = ctx.saved_tensors
            return grad @ w.T, x.T @ grad

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.w, self.last = nn.Parameter(torch.randn(8, 4)), nn.Linear(4, 2)

        def forward(self, x):
            return self.last(Product.apply(x, self.w))

    model = Net()
    vaccine = GradVac(SGD(model.parameters(), lr=0.1), TASKS[:2], model=model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", OutlastWarning)
        with vaccine.rows(IDS):
            loss = model(torch.randn(6, 8)).sum()
        with pytest.raises(ValueError, match=r"'w' is used|cannot keep the tasks apart"):
            loss.backward()
    model.zero_grad()
    model(torch.randn(6, 8)).sum().backward()  # nothing is left behind
    assert model.w.grad is not None


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_is_refused(reentrant):
    from torch.utils.checkpoint import checkpoint

    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2))
    vaccine = GradVac(SGD(model.parameters(), lr=0.1), TASKS[:2], model=model, engine="layer")
    x = torch.randn(6, 8, requires_grad=True)

    def step():
        with vaccine.rows(IDS):
            loss = model[1](checkpoint(model[0], x, use_reentrant=reentrant)).sum()
        loss.backward()

    with pytest.raises(ValueError, match=r"checkpointing|cannot see"):
        step()


def test_untracked_parameters_follow_weights_and_reduction():
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))
    x = torch.randn(6, 8, generator=rng(1))
    found = []
    for engine in ("layer", "loop"):
        net = copy.deepcopy(model)
        optimizer, shared = SGD(net.parameters(), lr=0.1), list(net[0].parameters())
        vaccine = GradVac(optimizer, TASKS[:2], model=net, shared=shared, weights={"a": 3.0}, reduction="mean")
        if engine == "layer":
            with vaccine.rows(IDS):
                loss = net(x).square().sum()
            loss.backward()
        else:
            out = net(x).square().sum(1)
            vaccine.backward({task: out[n == IDS].sum() for n, task in enumerate(TASKS[:2])})
        found.append([p.grad for p in net.parameters()])
        assert vaccine.last.groups == ("0",)
    for a, b in zip(*found, strict=True):
        assert torch.allclose(a, b, atol=1e-5)


def test_combining_in_an_evaluation_is_the_plain_value():
    model = mlp()
    vaccine = GradVac(SGD(model.parameters(), lr=0.1), TASKS, model=model)
    with torch.no_grad():
        value = vaccine.combine({task: cross_entropy(model, batches(1)[0]) for task in TASKS})
    assert float(value) == pytest.approx(3 * float(cross_entropy(model, batches(1)[0]).detach()), rel=1e-6)


def test_positions_are_no_rows():
    class Positions(nn.Module):
        def __init__(self):
            super().__init__()
            self.place, self.layer = nn.Embedding(6, 8), nn.Linear(8, 2)

        def forward(self, x):
            return self.layer(x + self.place(torch.arange(6)))

    model = Positions()
    vaccine = GradVac(SGD(model.parameters(), lr=0.1), TASKS[:2], model=model, engine="layer")
    with pytest.raises(ValueError, match="are positions"), vaccine.rows(IDS):
        model(torch.randn(6, 6, 8))


def test_options_of_embeddings():
    tokens = torch.randint(0, 10, (6, 4), generator=rng(1))
    model = nn.Embedding(10, 8)
    layer, loop = by_both_engines(model, lambda net: F.embedding(tokens, net.weight, padding_idx=-1).square().sum((1, 2)))
    assert torch.allclose(layer["weight"], loop["weight"], atol=1e-5)
    assert not layer["weight"][-1].any()
    for options in ({"scale_grad_by_freq": True}, {"sparse": True}):
        net = nn.Embedding(10, 8, **options)
        vaccine = GradVac(SGD(net.parameters(), lr=0.1), TASKS[:2], model=net, engine="layer")
        with pytest.raises(ValueError, match="embedding with sparse"), vaccine.rows(IDS):
            net(tokens)
        out = net(tokens).sum((1, 2))
        vaccine.backward({task: out[n == IDS].sum() for n, task in enumerate(TASKS[:2])})
        assert not net.weight.grad.is_sparse


def test_hooks_on_gradients_are_refused_by_the_layer_engine():
    model = mlp()
    model[0].weight.register_hook(lambda grad: grad * 0.5)
    vaccine = GradVac(SGD(model.parameters(), lr=0.1), TASKS, model=model, engine="layer")
    with pytest.raises(ValueError, match="has hooks"), vaccine.rows(torch.arange(3)):
        model(torch.randn(3, 4))


def test_parameters_that_the_optimizer_gets_later_are_taken_up():
    model = mlp()
    optimizer = SGD(model[2].parameters(), lr=0.1)
    vaccine = GradVac(optimizer, TASKS, model=model, beta=1.0)
    losses = lambda: {task: cross_entropy(model, batches(1, seed=n)[0]) for n, task in enumerate(TASKS)}  # noqa: E731
    vaccine.backward(losses())
    kept = vaccine.targets["2"]
    optimizer.add_param_group({"params": list(model[0].parameters())})
    model.zero_grad()
    vaccine.backward(losses())
    assert model[0].weight.grad is not None
    assert set(vaccine.targets) == {"0", "2"}
    assert float(vaccine.last.target[vaccine.last.groups.index("2"), 0, 1]) == pytest.approx(kept["a", "b"])


def test_written_gradients_have_memory_of_their_own():
    a, b = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))
    vaccine = GradVac(SGD([a, b], lr=0.1), ["t"])
    vaccine.backward({"t": a.sum() + b.sum()})
    assert a.grad.data_ptr() != b.grad.data_ptr()
    nn.utils.clip_grad_norm_([a, b], 1.0)
    assert float(torch.cat([a.grad, b.grad]).norm()) == pytest.approx(1.0, rel=1e-4)
    grad = a.grad
    vaccine.backward({"t": (a * b).sum()})
    assert a.grad is grad


def test_graphs_of_separate_batches_are_freed():
    model = mlp()
    losses = {task: cross_entropy(model, batches(1, seed=n)[0]) for n, task in enumerate(TASKS)}
    GradVac(SGD(model.parameters(), lr=0.1), TASKS, model=model).backward(losses)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(losses["a"], model[0].weight)


@pytest.mark.parametrize("scale", [1e-25, 1e19])
@pytest.mark.parametrize("engine", ["layer", "loop"])
def test_gradients_of_any_size(scale, engine):
    found = []
    for factor in (1.0, scale):
        model = mlp()
        vaccine = GradVac(SGD(model.parameters(), lr=0.1), TASKS[:2], model=model, target=0.5)
        x = torch.randn(6, 4, generator=rng(1))
        if engine == "layer":
            with vaccine.rows(IDS):
                out = model(x).square().sum(1)
            (out.sum() * factor).backward()
        else:
            out = model(x).square().sum(1)
            vaccine.backward({task: out[n == IDS].sum() * factor for n, task in enumerate(TASKS[:2])})
        assert vaccine.last.finite
        found.append(vaccine.last.cosine)
    assert torch.allclose(*found, atol=1e-4)


def test_combinations_without_bounds_are_left_out():
    torch.manual_seed(0)
    weight = nn.Parameter(torch.zeros(60, dtype=torch.float64))
    goals = torch.randn(60, 60, dtype=torch.float64) - 0.2
    vaccine = GradVac(SGD([weight], lr=0.1), list(range(60)), target=0.99)
    with pytest.warns(OutlastWarning, match="beyond all bounds"):
        report = vaccine.backward({n: (weight * goals[n]).sum() for n in range(60)})
    assert not report.finite
    assert torch.allclose(weight.grad, goals.sum(0))


def test_complex_parameters_foreign_states_and_split_halves_are_refused():
    with pytest.raises(TypeError, match="complex"):
        GradVac(SGD([nn.Parameter(torch.zeros(2, dtype=torch.complex64))], lr=0.1))
    model = mlp()
    with pytest.raises(ValueError, match="lacks tasks"):
        GradVac(SGD(model.parameters(), lr=0.1)).load_state_dict({"groups": []})
    vaccine = GradVac(SGD(model.parameters(), lr=0.1), TASKS, model=model, debias=True)
    with pytest.raises(ValueError, match="both halves"):
        vaccine.backward({"a": model(torch.randn(4, 4))[:, 0]}, final=False)


def test_similarity_of_low_precision_models():
    model = mlp()
    x = torch.randn(2, 8, 4, generator=rng(1))
    full = gradient_similarity(model, {n: model(x[n])[:, 0].square() for n in range(2)}, debias=False)
    half = copy.deepcopy(model).half()
    low = gradient_similarity(half, {n: half(x[n].half())[:, 0].square() * 1e-3 for n in range(2)}, debias=False)
    assert float(low.overall[0, 1]) == pytest.approx(float(full.overall[0, 1]), abs=0.05)


def test_report_of_one_task_prints():
    model = mlp()
    vaccine = GradVac(SGD(model.parameters(), lr=0.1), TASKS, model=model)
    assert "nan" not in repr(vaccine.backward({"a": cross_entropy(model, batches(1)[0])}))


def test_combining_takes_up_parameters_and_exchanged_ones():
    model = mlp()
    optimizer = SGD(model[2].parameters(), lr=0.1)
    vaccine = GradVac(optimizer, TASKS, model=model)
    losses = lambda: {task: cross_entropy(model, batches(1, seed=n)[0]) for n, task in enumerate(TASKS)}  # noqa: E731
    vaccine.backward(losses(), final=False)
    optimizer.add_param_group({"params": list(model[0].parameters())})
    vaccine.combine(losses()).backward()
    assert model[0].weight.grad is not None
    model[2] = nn.Linear(8, 3)
    optimizer.param_groups.clear()
    optimizer.add_param_group({"params": list(model.parameters())})
    vaccine.backward(losses())
    assert model[2].weight.grad is not None


@pytest.mark.parametrize("engine", ["auto", "layer"])
def test_a_failed_pass_leaves_nothing_behind(engine):
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))
    vaccine = GradVac(SGD(model.parameters(), lr=0.1), TASKS[:2], model=model, engine=engine)
    x = torch.randn(6, 4)

    def fail(_grad):
        raise KeyError("out of memory")

    with vaccine.rows(IDS):
        hidden = model[1](model[0](x))
        hidden.register_hook(fail)
        loss = model[2](hidden).square().mean()
    with pytest.raises(KeyError):
        loss.backward()
    model.zero_grad()
    model(x).mean().backward()
    for _ in range(2):
        with vaccine.rows(IDS):
            again = model(x).square().mean()
        again.backward()
    assert not any(p._backward_hooks for p in model.parameters())
    assert vaccine.last.finite


def test_activations_are_freed_by_the_backward_pass():
    import gc
    import weakref

    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))
    vaccine = GradVac(SGD(model.parameters(), lr=0.1), TASKS[:2], model=model)
    with vaccine.rows(IDS):
        hidden = model[1](model[0](torch.randn(6, 4)))
        loss = model[2](hidden).square().mean()
    alive = weakref.ref(hidden)
    loss.backward()
    del hidden
    gc.collect()
    assert alive() is None
    assert loss.grad_fn is not None


def test_similarity_of_sparse_embeddings():
    model = nn.Embedding(5, 3, sparse=True)
    losses = {n: model(torch.tensor([n, 2])).square().sum((0, 1)) for n in range(2)}
    assert gradient_similarity(model, losses, debias=False).overall.shape == (2, 2)
