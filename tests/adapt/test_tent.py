"""Tent and Norm against closed forms, plain loops and each other; what a reset, a checkpoint and a bad batch leave behind."""

from __future__ import annotations

import copy
import io
import math
import warnings
from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from outlast.adapt import (
    Anchor,
    CollapseAlarm,
    Diversity,
    DriftLimit,
    EntropyFilter,
    Norm,
    PeriodicReset,
    Recovery,
    RedundancyFilter,
    RingBuffer,
    StochasticRestore,
    Tent,
    TestTimeAdapter,
    entropy,
    norm_affine_except,
    recalibrate_batchnorm,
)
from outlast.errors import DivergedError, OutlastWarning, StateError, UnsupportedError

BN = "batch"
LN = "layer"


def net(kind=BN, *, seed=0, dropout=0.0, classes=5):
    """6 inputs, two normalised layers."""
    torch.manual_seed(seed)
    norm = {"batch": nn.BatchNorm1d, "layer": nn.LayerNorm, "none": lambda _n: nn.Identity()}[kind]
    model = nn.Sequential(
        nn.Linear(6, 16), norm(16), nn.Tanh(), nn.Dropout(dropout), nn.Linear(16, 16), norm(16), nn.Tanh(), nn.Linear(16, classes)
    )
    if kind == BN:
        recalibrate_batchnorm(model, [torch.randn(64, 6, generator=rng(9)) for _ in range(3)])
    return model.eval()


def rng(seed=1):
    return torch.Generator().manual_seed(seed)


def stream(count=4, rows=32, seed=1):
    g = rng(seed)
    return [1.0 + 2.0 * torch.randn(rows, 6, generator=g) for _ in range(count)]


def quiet(make, *args, **settings):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", OutlastWarning)
        return make(*args, **settings)


def sgd(lr, momentum=0.0):
    return lambda params: torch.optim.SGD(params, lr=lr, momentum=momentum)


def values(adapter):
    return {name: parameter.detach().clone() for name, parameter in adapter.adapted.items()}


def same_state(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


# ---- the loss ----------------------------------------------------------------------------------------------------------


def test_entropy_has_its_known_values():
    assert entropy(torch.zeros(1, 7, dtype=torch.float64)).item() == pytest.approx(math.log(7), abs=1e-12)
    assert entropy(torch.tensor([[0.0, math.log(3)]], dtype=torch.float64)).item() == pytest.approx(0.5623351446, abs=1e-10)
    assert entropy(torch.tensor([[1.0, 2.0, 3.0]], dtype=torch.float64)).item() == pytest.approx(0.8323955818, abs=1e-10)
    sharp = torch.tensor([[1e4, 0.0, 0.0]], requires_grad=True)
    value = entropy(sharp)
    value.backward()
    assert value.item() == 0
    assert torch.isfinite(sharp.grad).all()


def test_entropy_gradient_is_the_closed_form():
    z = torch.randn(5, 4, dtype=torch.float64, generator=rng(), requires_grad=True)
    h = entropy(z, reduction="none")
    (grad,) = torch.autograd.grad(h.sum(), z)
    p = z.softmax(1)
    torch.testing.assert_close(grad, -p * (p.log() + h[:, None]), atol=1e-10, rtol=0)
    torch.testing.assert_close(grad.sum(1), torch.zeros(5, dtype=torch.float64), atol=1e-12, rtol=0)
    z = torch.tensor([[0.0, math.log(3)]], dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(entropy(z), z)
    torch.testing.assert_close(grad, torch.tensor([[0.205990, -0.205990]], dtype=torch.float64), atol=1e-6, rtol=0)
    assert torch.autograd.gradcheck(entropy, z)


def test_entropy_is_invariant_to_shifts_and_follows_permutations():
    z = torch.randn(6, 5, generator=rng(), dtype=torch.float64)
    h = entropy(z, reduction="none")
    torch.testing.assert_close(entropy(z + 3.7, reduction="none"), h)
    torch.testing.assert_close(entropy(z[:, torch.randperm(5, generator=rng())], reduction="none"), h)
    order = torch.randperm(6, generator=rng())
    torch.testing.assert_close(entropy(z[order], reduction="none"), h[order])


def test_entropy_of_masked_classes_and_of_half_precision_is_finite():
    z = torch.tensor([[0.0, -math.inf, 0.0]], requires_grad=True)
    value = entropy(z)
    value.backward()
    assert value.item() == pytest.approx(math.log(2))
    assert torch.isfinite(z.grad).all()
    assert torch.isfinite(entropy(torch.tensor([[60000.0, -60000.0]], dtype=torch.float16)))
    assert entropy(torch.zeros(2, 3, 4, 4), reduction="none").shape == (2, 4, 4)


@pytest.mark.parametrize(
    ("logits", "settings", "error"),
    [
        (torch.zeros(2, 3, dtype=torch.long), {}, TypeError),
        (torch.zeros(2, 1), {}, ValueError),
        (torch.zeros(3), {}, ValueError),
        (torch.zeros(2, 3), {"reduction": "max"}, ValueError),
    ],
)
def test_entropy_refuses(logits, settings, error):
    with pytest.raises(error):
        entropy(logits, **settings)


# ---- statistics --------------------------------------------------------------------------------------------------------


def test_without_movement_tent_is_norm_and_source_statistics_are_the_source():
    model, batches = net(), stream()
    still, norm = Tent(model, optimizer=sgd(0.0)), Norm(model)
    for x in batches:
        assert torch.equal(still(x), norm(x))
    kept = Tent(model, stats="source", optimizer=sgd(0.0))
    for x in batches:
        assert torch.equal(kept(x), model(x).detach())


def test_batch_statistics_are_those_of_functional_batch_norm():
    layer = nn.BatchNorm1d(3)
    nn.init.normal_(layer.weight, generator=rng())
    nn.init.normal_(layer.bias, generator=rng(2))
    x = 5.0 + 3.0 * torch.randn(50, 3, generator=rng())
    y = Norm(layer)(x)
    assert torch.equal(y, F.batch_norm(x, None, None, layer.weight, layer.bias, True).detach())
    torch.testing.assert_close(y.mean(0), layer.bias.detach(), atol=1e-5, rtol=1e-5)
    v = x.var(0, correction=0)
    torch.testing.assert_close(y.var(0, correction=0), layer.weight.detach() ** 2 * v / (v + layer.eps), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("prior", "reference"), [(0, "batch"), (10**9, "source")])
def test_blend_reaches_both_ends(prior, reference):
    model, x = net(), stream(1)[0]
    expected = Norm(model)(x) if reference == "batch" else model(x).detach()
    torch.testing.assert_close(Norm(model, stats="blend", stats_prior=prior)(x), expected, atol=1e-5, rtol=1e-5)


def test_ema_is_the_running_estimate():
    layer = nn.BatchNorm1d(6)
    adapter = Norm(layer, stats="ema", stats_momentum=0.3)
    mean, var = torch.zeros(6), torch.ones(6)
    for x in stream(3):
        mean, var = 0.7 * mean + 0.3 * x.mean(0), 0.7 * var + 0.3 * x.var(0, correction=0)
        torch.testing.assert_close(adapter(x), (x - mean) / (var + layer.eps).sqrt(), atol=1e-5, rtol=1e-5)
    x = stream(1)[0]
    fixed = (x - mean) / (var + layer.eps).sqrt()
    torch.testing.assert_close(adapter.predict(x), fixed, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(adapter.predict(x), fixed, atol=1e-5, rtol=1e-5)  # predict takes nothing in


@pytest.mark.parametrize("stats", ["batch", "source", "ema", "blend"])
def test_buffers_and_frozen_weights_stay_bit_for_bit_and_the_source_checkpoint_always_loads(stats):
    model = net()
    checkpoint = copy.deepcopy(model.state_dict())
    adapter = Tent(model, stats=stats, lr=0.01)
    for x in stream():
        adapter(x)
    moved = set(adapter.adapted)
    assert moved == {"1.weight", "1.bias", "5.weight", "5.bias"}
    for name, value in adapter.model.state_dict().items():
        assert torch.equal(value, checkpoint[name]) == (name not in moved), name
    assert same_state(model.state_dict(), checkpoint)  # the caller's model is another
    adapter.model.load_state_dict(checkpoint, strict=True)


# ---- the step ----------------------------------------------------------------------------------------------------------


def test_first_step_is_the_gradient_of_the_mean_entropy():
    model, x = net(), stream(1)[0]
    adapter = Tent(model, optimizer=sgd(0.1))
    start = values(adapter)
    adapter(x)
    reference = copy.deepcopy(model)
    for module in reference.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.train()
    wanted = [parameter for name, parameter in reference.named_parameters() if name in start]
    grads = torch.autograd.grad(entropy(reference(x)), wanted)
    for (name, before), grad in zip(start.items(), grads, strict=True):
        torch.testing.assert_close(adapter.adapted[name].detach(), before - 0.1 * grad, atol=1e-6, rtol=0)


def test_first_adam_step_moves_each_coordinate_by_the_rate():
    model, x = net().double(), stream(1)[0].double()
    adapter = Tent(model, lr=1e-3)
    start = values(adapter)
    reference = copy.deepcopy(model)
    for module in reference.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.train()
    grads = torch.autograd.grad(entropy(reference(x)), [dict(reference.named_parameters())[name] for name in start])
    adapter(x)
    large = 0
    for (name, before), grad in zip(start.items(), grads, strict=True):
        moved, counted = adapter.adapted[name].detach() - before, grad.abs() > 1e-4  # far above Adam's eps of 1e-8
        large += int(counted.sum())
        torch.testing.assert_close(moved[counted], -1e-3 * grad[counted].sign(), rtol=1e-4, atol=0)
    assert large > 0.8 * sum(grad.numel() for grad in grads)


def test_prediction_before_is_norms_and_after_is_a_second_forward():
    model, x = net(), stream(1)[0]
    assert torch.equal(Tent(model, lr=0.05)(x), Norm(model)(x))
    after = Tent(model, lr=0.05, predict="after")
    y = after(x)
    assert torch.equal(y, after.predict(x))
    assert not torch.equal(y, Norm(model)(x))


def test_two_steps_return_the_forward_before_the_last_update():
    model, x = net(), stream(1)[0]
    one = Tent(model, lr=0.05)
    one(x)
    assert torch.equal(Tent(model, lr=0.05, steps=2)(x), one.predict(x))


def test_entropy_falls_on_a_repeated_batch():
    adapter, x = Tent(net(), optimizer=sgd(1e-3)), stream(1)[0]
    found = [float(entropy(adapter(x))) for _ in range(20)]
    assert all(b <= a + 1e-7 for a, b in pairwise(found))
    assert found[-1] < found[0]


def test_rows_may_be_permuted():
    model, x = net(), stream(1)[0]
    order = torch.randperm(len(x), generator=rng())
    left, right = Tent(model, optimizer=sgd(0.1)), Tent(model, optimizer=sgd(0.1))
    torch.testing.assert_close(left(x)[order], right(x[order]), atol=1e-5, rtol=1e-5)
    for a, b in zip(values(left).values(), values(right).values(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0)


def test_two_micro_batches_are_one_batch():
    model, x = net(LN), stream(1)[0]
    whole, halves = quiet(Tent, model, optimizer=sgd(0.1)), quiet(Tent, model, optimizer=sgd(0.1), accumulate=2)
    whole(x)
    for part in x.split(16):
        halves(part)
    assert halves.report.updates == 1
    for a, b in zip(values(whole).values(), values(halves).values(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0)


def test_loss_and_parameters_of_ones_own():
    adapter = TestTimeAdapter(
        net(), loss=lambda z: z.square().mean(1), params=lambda name, _p: name.startswith("7"), optimizer=sgd(0.1), stats="source"
    )
    assert list(adapter.adapted) == ["7.weight", "7.bias"]
    x = stream(1)[0]
    losses = [float(adapter(x).square().mean()) for _ in range(10)]
    assert losses[-1] < losses[0]


def test_dense_predictions_average_over_positions():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1))
    adapter = Tent.recommended(model, optimizer=sgd(0.1))
    y = adapter(torch.randn(6, 3, 5, 5, generator=rng()))
    assert y.shape == (6, 4, 5, 5)
    assert adapter.report.seen == 6


# ---- callers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_every_caller_gets_the_same(context):
    model = net()
    plain, other = Tent(model, lr=0.01), Tent(model, lr=0.01)
    for x in stream():
        with torch.no_grad():
            expected = plain(x)
        with context():
            y = other(x * 1.0)
        assert torch.equal(y, expected)
        assert not y.requires_grad
        assert not y.is_inference()
    assert same_state(plain.model.state_dict(), other.model.state_dict())


def test_dropout_stays_off_and_the_flags_of_train_change_nothing():
    adapter = Tent(net(dropout=0.5), lr=0.01)
    adapter.train()
    x = stream(1)[0]
    assert torch.equal(adapter.predict(x), adapter.predict(x))
    with adapter.source():
        assert torch.equal(adapter(x), adapter(x))
    first = Tent(net(dropout=0.5), lr=0.01).train()
    assert torch.equal(first(x), Tent(net(dropout=0.5), lr=0.01).eval()(x))


def test_source_and_frozen_are_what_they_say():
    model = net()
    adapter = Tent(model, lr=0.05)
    for x in stream():
        adapter(x)
    x = stream(1, seed=5)[0]
    before = values(adapter)
    with adapter.source():
        assert torch.equal(adapter(x), model(x).detach())
        assert torch.equal(adapter.predict(x), model(x).detach())
    with adapter.frozen():
        assert torch.equal(adapter(x), adapter.predict(x))
    assert same_state(values(adapter), before)
    assert adapter.report.seen == 4 * 32


def test_autocast_keeps_float32_parameters_and_gradients():
    adapter = Tent(net(), lr=0.01)
    with torch.autocast("cpu", torch.bfloat16):
        y = adapter(stream(1)[0])
    assert y.dtype == torch.bfloat16
    assert adapter.report.updates == 1
    assert {p.dtype for p in adapter.adapted.values()} == {torch.float32}
    assert math.isfinite(adapter.report.loss)


def test_offline_adaptation_then_prediction():
    model = net()
    batches = [(x, torch.zeros(len(x))) for x in stream()]
    report = (adapter := Tent(model, lr=0.01)).adapt(batches, epochs=3)
    assert report.updates == 12
    before = values(adapter)
    adapter.predict(batches[0][0])
    assert same_state(values(adapter), before)


@dataclass
class Output:
    logits: torch.Tensor
    hidden: torch.Tensor


class Wrapped(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x, *, double=False):
        z = self.inner(x)
        return Output(2 * z if double else z, z)


def test_outputs_of_any_kind_come_back_detached():
    model = net()
    adapter = Tent(Wrapped(model), output_to_logits=lambda output: output.logits, lr=0.01)
    y = adapter(stream(1)[0], double=True)
    assert isinstance(y, Output)
    assert not y.logits.requires_grad
    assert not y.hidden.requires_grad
    with pytest.raises(TypeError, match="fields logits, hidden"):
        Tent(Wrapped(model))(stream(1)[0])


# ---- state -------------------------------------------------------------------------------------------------------------

GUARDS = {
    "none": list,
    "filter": lambda: [EntropyFilter(0.9)],
    "redundancy": lambda: [RedundancyFilter(0.95)],
    "recovery": lambda: [Recovery(0.9)],
    "periodic": lambda: [PeriodicReset(2)],
    "diversity": lambda: [Diversity(0.5)],
    "anchor": lambda: [Anchor(0.1)],
    "stochastic": lambda: [StochasticRestore(0.3)],
    "drift": lambda: [DriftLimit(0.01)],
    "alarm": lambda: [CollapseAlarm(window=32, max_drop=0.0)],
    "buffer": lambda: [RingBuffer(48)],
    "all": lambda: [EntropyFilter(0.9), Recovery(), Diversity(0.1), Anchor(0.1), StochasticRestore(0.1), CollapseAlarm(64)],
}


@pytest.mark.parametrize("guards", GUARDS)
@pytest.mark.parametrize("stats", ["batch", "ema"])
def test_reset_and_replay_equals_a_fresh_adapter(guards, stats):
    model, batches = net(), stream(6)
    used = Tent(model, lr=0.03, guards=GUARDS[guards](), stats=stats)
    for x in stream(5, seed=7):
        used(x)
    used.reset()
    assert used.report.updates == 0
    fresh = Tent(model, lr=0.03, guards=GUARDS[guards](), stats=stats)
    for x in batches:
        assert torch.equal(used(x), fresh(x))
    assert same_state(values(used), values(fresh))
    assert used.report.to_dict() == fresh.report.to_dict()


@pytest.mark.parametrize("guards", GUARDS)
@pytest.mark.parametrize("settings", [{}, {"stats": "ema"}, {"accumulate": 2}, {"optimizer": sgd(0.05, momentum=0.9)}])
def test_saved_in_mid_stream_it_goes_on_bit_for_bit(guards, settings):
    model, batches = net(), stream(7)
    whole = Tent(model, lr=0.03, guards=GUARDS[guards](), **settings)
    for x in batches[:3]:
        whole(x)
    file = io.BytesIO()
    torch.save(whole.state_dict(), file)
    file.seek(0)
    other = Tent(net(seed=3), lr=0.03, guards=GUARDS[guards](), **settings)
    other.load_state_dict(torch.load(file, weights_only=True))
    for x in batches[3:]:
        assert torch.equal(whole(x), other(x))
    assert whole.report.to_dict() == other.report.to_dict()
    whole.reset()
    other.reset()
    assert torch.equal(whole(batches[0]), other(batches[0]))


def test_episodic_outputs_do_not_depend_on_what_was_before():
    model, x = net(), stream(1)[0]
    used = Tent(model, lr=0.05, episodic=True, steps=3, guards=[CollapseAlarm(window=16, max_drop=0.0)])
    for other in stream(3, seed=5):
        used(other)
    assert torch.equal(used(x), Tent(model, lr=0.05, episodic=True, steps=3)(x))


def test_state_of_other_guards_or_parameters_is_refused():
    state = Tent(net(), guards=[Recovery()]).state_dict()
    with pytest.raises(ValueError, match="Recovery"):
        Tent(net()).load_state_dict(state)
    with pytest.raises(ValueError, match="adapts other parameters"):
        Tent(net(), params=norm_affine_except(last="5")).load_state_dict(Tent(net()).state_dict())


def test_moving_the_model_keeps_what_adapts():
    adapter = Tent(net(), lr=0.01)
    adapter(stream(1)[0])
    adapter.to(torch.float64)
    before = values(adapter)
    adapter(stream(1)[0].double())
    assert adapter.report.updates == 2
    assert not same_state(values(adapter), before)
    adapter.reset()
    assert next(iter(adapter.adapted.values())).dtype == torch.float64


def test_a_copy_is_independent():
    adapter = Tent(net(), lr=0.05, stats="ema")
    adapter(stream(1)[0])
    twin = copy.deepcopy(adapter)
    x = stream(1, seed=4)[0]
    assert torch.equal(twin(x), adapter(x))
    before = values(adapter)
    twin(x)
    assert same_state(values(adapter), before)


@pytest.mark.parametrize("stats", ["batch", "source", "ema"])
def test_merged_module_predicts_as_the_adapter(stats):
    model = net()
    adapter = Tent(model, lr=0.05, stats=stats)
    for x in stream():
        adapter(x)
    merged = adapter.merge()
    assert type(merged) is nn.Sequential
    x = stream(1, seed=8)[0]
    torch.testing.assert_close(merged(x).detach(), adapter.predict(x), atol=1e-5, rtol=1e-5)
    assert all(parameter.requires_grad for parameter in merged.parameters())
    Tent(merged) if stats != "batch" else None  # it can be adapted again


def test_merge_estimates_statistics_from_batches():
    adapter = Tent(net(), lr=0.05, stats="blend")
    with pytest.raises(ValueError, match="blend"):
        adapter.merge()
    merged = adapter.merge([torch.cat(stream(4))])
    assert torch.allclose(merged[1].running_mean, adapter.model[0](torch.cat(stream(4))).mean(0), atol=1e-5)


def test_inplace_adapts_the_model_itself():
    model = net()
    adapter = Tent(model, inplace=True, lr=0.05)
    adapter(stream(1)[0])
    assert adapter.model is model
    with pytest.raises(ValueError, match="adapted already"):
        Tent(model)


def test_without_a_kept_source_there_is_no_way_back():
    adapter = Tent(net(), keep_source=False)
    adapter(stream(1)[0])
    with pytest.raises(StateError):
        adapter.reset()
    with pytest.raises(StateError), adapter.source():
        pass
    with pytest.raises(ValueError, match="keep_source"):
        Tent(net(), keep_source=False, guards=[Recovery()])
    with pytest.raises(ValueError, match="keep_source"):
        Tent(net(), keep_source=False, episodic=True)


# ---- guards ------------------------------------------------------------------------------------------------------------


class Given(nn.Module):
    """Puts out given logits, moved by one scale."""

    def __init__(self, logits):
        super().__init__()
        self.norm = nn.LayerNorm(logits.shape[1], elementwise_affine=True)
        self.register_buffer("logits", logits)

    def forward(self, x):
        return self.logits * self.norm.weight + self.norm.bias


def test_filter_takes_the_mean_over_the_rows_kept():
    logits = torch.tensor([[10.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    adapter = quiet(Tent, Given(logits), optimizer=sgd(0.0), guards=[EntropyFilter(0.4)])
    adapter(torch.zeros(2, 1))
    report = adapter.report
    assert report.used == 1
    assert report.loss == pytest.approx(float(entropy(logits[:1])), rel=1e-5)


def test_batch_with_no_row_kept_is_skipped_and_adam_does_not_move():
    adapter = Tent(net(), lr=0.01)
    adapter(stream(1)[0])
    adapter = Tent(net(), lr=0.01, guards=[EntropyFilter(1e-6)])
    before = values(adapter)
    adapter(stream(1)[0])
    assert adapter.report.skipped == 1
    assert adapter.report.updates == 0
    assert same_state(values(adapter), before)


def test_redundant_rows_are_left_out():
    logits = torch.tensor([[5.0, 0.0, 0.0], [0.0, 5.0, 0.0]])
    model = Given(logits)
    adapter = quiet(Tent, model, optimizer=sgd(0.0), guards=[RedundancyFilter(0.5, momentum=0.0)])
    adapter(torch.zeros(2, 1))
    assert adapter.report.used == 2  # nothing to be redundant with yet
    adapter.model.logits[1] = torch.tensor([0.0, 0.0, 5.0])
    adapter(torch.zeros(2, 1))
    assert adapter.report.used == 3  # the first is like the mean, the second is new


def test_recovery_restores_and_forgets():
    logits = torch.tensor([[9.0, 0.0, 0.0]]).repeat(4, 1)
    adapter = quiet(Tent, Given(logits), optimizer=sgd(0.1), guards=[Recovery(0.03)])
    adapter(torch.zeros(4, 1))
    report = adapter.report
    assert report.resets == 1
    assert ("recovery") in [kind for _, kind in report.events]
    assert report.drift == 0
    adapter.model.logits = torch.tensor([[1.0, 0.0, 0.0]]).repeat(4, 1)
    adapter(torch.zeros(4, 1))
    assert adapter.report.resets == 1  # the old low mean is gone


def test_periodic_reset_counts_updates():
    adapter = Tent(net(), lr=0.05, guards=[PeriodicReset(3)])
    for x in stream(7):
        adapter(x)
    assert adapter.report.resets == 2
    assert [number for number, kind in adapter.report.events if kind == "periodic reset"] == [3, 6]


def test_diversity_is_the_entropy_of_the_mean_prediction():
    model, x = net(), stream(1)[0]
    adapter = Tent(model, optimizer=sgd(0.1), guards=[Diversity(0.7)])
    start = values(adapter)
    adapter(x)
    reference = copy.deepcopy(model)
    for module in reference.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.train()
    wanted = [parameter for name, parameter in reference.named_parameters() if name in start]
    z = reference(x)
    mean = z.softmax(1).mean(0)
    grads = torch.autograd.grad(entropy(z) - 0.7 * -(mean * mean.log()).sum(), wanted)
    for (name, before), grad in zip(start.items(), grads, strict=True):
        torch.testing.assert_close(adapter.adapted[name].detach(), before - 0.1 * grad, atol=1e-6, rtol=0)


def test_anchor_pulls_back_and_takes_fisher_weights():
    model, batches = net(), stream(6)
    free, tied = Tent(model, lr=0.05), Tent(model, lr=0.05, guards=[Anchor(100.0)])
    for x in batches:
        free(x)
        tied(x)
    assert tied.report.drift < 0.5 * free.report.drift
    source = Tent(model)
    with source.frozen():
        fisher = Anchor.fisher_of(source.model, batches, parameters=source.adapted)
    assert set(fisher) == set(source.adapted)
    assert all((value >= 0).all() for value in fisher.values())
    Tent(model, guards=[Anchor(1.0, fisher)])(batches[0])
    with pytest.raises(ValueError, match="no entry"):
        Tent(model, guards=[Anchor(1.0, {})])(batches[0])


def test_stochastic_restore_returns_all_or_none():
    model, x = net(), stream(1)[0]
    all_back = Tent(model, lr=0.05, guards=[StochasticRestore(1.0)])
    all_back(x)
    assert all_back.report.drift == 0
    none_back, plain = Tent(model, lr=0.05, guards=[StochasticRestore(0.0)]), Tent(model, lr=0.05)
    none_back(x)
    plain(x)
    assert same_state(values(none_back), values(plain))


def test_drift_limit_holds_the_distance():
    adapter = Tent(net(), lr=0.5, guards=[DriftLimit(0.02)])
    for x in stream(5):
        adapter(x)
    assert adapter.report.drift == pytest.approx(0.02, rel=1e-4)


def collapse_stream(adapter, count=200):
    for x in stream(count, rows=16, seed=3):
        adapter(x)
    return adapter


def confident(kind):
    """Logits spread enough for entropy minimisation to run away."""
    model = net(kind)
    with torch.no_grad():
        model[7].weight *= 4.0
    return model


def test_absurd_rate_collapses_and_the_alarm_freezes_at_the_source():
    model = confident(LN)
    loose = collapse_stream(quiet(Tent, model, lr=0.1))
    assert loose.report.marginal_entropy < 0.6
    adapter = collapse_stream(quiet(Tent, model, lr=0.1, guards=[CollapseAlarm(window=64)]))
    kinds = [kind for _, kind in adapter.report.events]
    assert kinds == ["collapse alarm", "frozen"]
    assert adapter.report.drift == 0
    x = stream(1)[0]
    assert torch.equal(adapter(x), model(x).detach())
    adapter.reset()
    adapter(x)
    assert adapter.report.updates == 1


def test_alarm_that_resets_goes_on_and_the_next_prediction_is_norms():
    model = confident(BN)
    adapter = Tent(model, lr=0.3, guards=[CollapseAlarm(window=64, action="reset")])
    for x in stream(200, rows=16, seed=3):
        seen = adapter.report.resets
        adapter(x)
        if adapter.report.resets > seen:
            break
    assert adapter.report.resets == 1
    x = stream(1)[0]
    assert torch.equal(adapter(x), Norm(model)(x))


def test_alarm_warns_or_raises():
    with pytest.warns(OutlastWarning, match="collapse"):
        collapse_stream(quiet(Tent, confident(LN), lr=0.1, guards=[CollapseAlarm(window=64, action="warn")]))
    with pytest.raises(DivergedError, match="collapse"):
        collapse_stream(quiet(Tent, confident(LN), lr=0.1, guards=[CollapseAlarm(window=64, action="raise")]))


def test_constant_logits_move_nothing():
    class Constant(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.LayerNorm(4)

        def forward(self, x):
            return 0.0 * self.norm(x)

    adapter = quiet(Tent, Constant(), optimizer=sgd(0.5))
    before = values(adapter)
    for _ in range(3):
        adapter(torch.randn(8, 4, generator=rng()))
    assert same_state(values(adapter), before)
    assert adapter.report.marginal_entropy == pytest.approx(1.0, abs=1e-6)


def test_ring_buffer_serves_single_rows():
    model = net()
    adapter = Tent(model, lr=0.01, guards=[RingBuffer(32, min_rows=8)])
    rows = torch.cat(stream(4))
    outputs = [adapter(row[None]) for row in rows]
    assert all(y.shape == (1, 5) for y in outputs)
    assert torch.equal(outputs[0], model(rows[:1]).detach())  # too few rows for statistics
    assert adapter.report.updates == len(rows) // 32
    torch.testing.assert_close(outputs[31], Norm(model)(rows[:32])[-1:], atol=1e-6, rtol=1e-6)
    unchanged = Tent(model, lr=1e-12, guards=[RingBuffer(32, min_rows=8)])
    for row in rows[:51]:
        unchanged(row[None])
    torch.testing.assert_close(unchanged(rows[51][None]), Norm(model)(rows[20:52])[-1:], atol=1e-6, rtol=1e-6)  # the last 32
    with pytest.raises(ValueError, match="RingBuffer holds rows"):
        adapter(torch.zeros(1, 7))


def test_guards_belong_to_one_adapter_and_to_the_right_kind():
    guard = Recovery()
    Tent(net(), guards=[guard])
    with pytest.raises(ValueError, match="in use"):
        Tent(net(), guards=[guard])
    with pytest.raises(TypeError, match="Guard objects"):
        Tent(net(), guards=["filter"])


def test_recommended_has_three_guards_and_takes_more():
    assert "EntropyFilter+Recovery+CollapseAlarm" in repr(Tent.recommended(net()))
    assert "CollapseAlarm+Diversity" in repr(Tent.recommended(net(), guards=[Diversity()]))
    with pytest.raises(ValueError, match="safe"):
        Tent.recommended(net(), guards="bold")


# ---- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda: Tent(net("none")), ValueError, "Identity, Linear"),
        (lambda: Norm(net(LN)), ValueError, "no BatchNorm"),
        (lambda: Tent(nn.BatchNorm1d(4, affine=False)), ValueError, "affine=False"),
        (lambda: Tent(net(), params=lambda *_: False), ValueError, "selects none"),
        (lambda: Tent(net(), params="all"), ValueError, "norm_affine"),
        (lambda: Tent(net(), steps=0), ValueError, "steps"),
        (lambda: TestTimeAdapter(net(), steps=-1), ValueError, "steps"),
        (lambda: Tent(net(), lr=0.0), ValueError, "lr"),
        (lambda: Tent(net(), lr=math.inf), ValueError, "lr"),
        (lambda: Tent(net(), stats="test"), ValueError, "stats"),
        (lambda: Tent(net(), predict="never"), ValueError, "predict"),
        (lambda: Tent(net(), stats_prior=-1), ValueError, "stats_prior"),
        (lambda: Tent(net(), stats_momentum=1.5), ValueError, "stats_momentum"),
        (lambda: Tent(net(), accumulate=0), ValueError, "accumulate"),
        (lambda: Tent(net(), min_batch=0), ValueError, "min_batch"),
        (lambda: EntropyFilter(0.0), ValueError, "margin"),
        (lambda: CollapseAlarm(action="cry"), ValueError, "action"),
        (lambda: StochasticRestore(1.1), ValueError, "p must"),
        (lambda: RingBuffer(4, min_rows=5), ValueError, "min_rows"),
        (lambda: Norm(net(), lr=0.1), ValueError, "takes no steps"),
        (lambda: Tent("model"), TypeError, "torch.nn.Module"),
        (lambda: Tent(net(), optimizer=torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)), TypeError, "factory"),
        (lambda: Tent(net(), optimizer=3), TypeError, "function"),
        (lambda: Tent(net(), optimizer=lambda _p: None)(stream(1)[0]), TypeError, "torch.optim.Optimizer"),
        (lambda: Tent(Tent(net())), ValueError, "adapted already"),
        (lambda: Tent(nn.Sequential(Tent(net()))), ValueError, "adapted already"),
        (lambda: Tent(nn.Sequential(nn.LazyBatchNorm1d())), ValueError, "not initialised"),
        (lambda: Tent(net(), loss=lambda z: z.mean())(stream(1)[0]), ValueError, "one value a row"),
        (lambda: quiet(Tent, nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 1)))(stream(1)[0]), ValueError, "Bernoulli"),
        (lambda: quiet(Tent, nn.Sequential(nn.LayerNorm(6), nn.Flatten(0)))(stream(1)[0]), ValueError, "shape"),
        (lambda: Tent(Integers())(stream(1)[0]), TypeError, "floating"),
        (lambda: recalibrate_batchnorm(net(LN), stream()), ValueError, "no BatchNorm"),
        (lambda: recalibrate_batchnorm(net(), []), ValueError, "empty"),
        (lambda: norm_affine_except(last=-1), ValueError, "last"),
        (lambda: Tent(net(), params=norm_affine_except(last="layer9")), ValueError, "layer9"),
        (lambda: Tent(net(), params=norm_affine_except(last=2)), ValueError, "leaves nothing"),
    ],
)
def test_mistakes_are_named(make, error, says):
    with pytest.raises(error, match=says):
        make()


class Integers(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(6)

    def forward(self, x):
        return self.norm(x).long()


def test_quantised_models_are_refused():
    class Quantised(nn.Module):
        pass

    Quantised.__module__ = "torch.ao.nn.quantized.modules.linear"
    with pytest.raises(UnsupportedError, match="quantised"):
        Tent(nn.Sequential(nn.BatchNorm1d(3), Quantised()))


def test_probabilities_are_pointed_out_once():
    adapter = Tent(nn.Sequential(net(), nn.Softmax(1)))
    with pytest.warns(OutlastWarning, match="looks like probabilities"):
        adapter(stream(1)[0])
    adapter(stream(1)[0])  # warnings are errors here: said once


def test_empty_and_small_batches_change_nothing():
    model = net()
    adapter = Tent(model, min_batch=8)
    before = values(adapter)
    assert adapter(torch.zeros(0, 6)).shape == (0, 5)
    x = stream(1)[0][:4]
    assert torch.equal(adapter(x), model(x).detach())
    assert adapter.report.skipped == 2
    assert same_state(values(adapter), before)


def test_single_row_with_batch_statistics_is_explained():
    with pytest.raises(ValueError, match="RingBuffer"), pytest.warns(OutlastWarning, match="one row"):
        Tent(net())(stream(1)[0][:1])
    images = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    adapter = Norm(images)
    with pytest.warns(OutlastWarning, match="one row"):
        adapter(torch.randn(1, 1, 6, 6, generator=rng()))
    adapter(torch.randn(1, 1, 6, 6, generator=rng()))
    quiet(Norm, net(), stats="blend")(stream(1)[0][:1])


@pytest.mark.parametrize("kind", [BN, LN])
@pytest.mark.parametrize("stats", ["batch", "ema"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_batches_that_are_not_finite_change_nothing(kind, stats, accumulate):
    model = net(kind)
    adapter, twin = (
        quiet(Tent, model, lr=0.01, stats=stats, accumulate=accumulate, guards=[EntropyFilter(0.99), RedundancyFilter(0.999)])
        for _ in range(2)
    )
    good, bad = stream(4), stream(1)[0].clone()
    bad[3, 2] = math.nan
    adapter(good[0])
    twin(good[0])
    y = adapter(bad)
    assert torch.isnan(y).any()
    assert "nonfinite" in [event for _, event in adapter.report.events]
    for batch in good[1:]:
        assert torch.equal(adapter(batch), twin(batch))
    assert same_state(values(adapter), values(twin))
    assert adapter.report.used == twin.report.used > 0


def test_a_gradient_that_overflows_changes_nothing():
    steep = False

    def loss(logits):  # its gradient is infinite on demand while its value is not, as of half precision without a scaler
        value = entropy(logits, reduction="none")
        return value + (value - value.detach()).sqrt() if steep else value

    model, (bad, *good) = net(LN), stream(5)
    adapter, twin = (quiet(Tent, model, lr=0.01, guards=[RedundancyFilter(0.999)], loss=loss) for _ in range(2))
    steep = True
    adapter(bad)
    steep = False
    assert [event for _, event in adapter.report.events] == ["nonfinite"]
    for batch in good:
        assert torch.equal(adapter(batch), twin(batch))
    assert same_state(values(adapter), values(twin))
    assert torch.equal(*(each._guards[0].state_dict()["mean"] for each in (adapter, twin)))


def test_ten_bad_batches_in_a_row_are_said():
    bad = torch.full((8, 6), math.inf)
    adapter = Tent(net())
    with pytest.warns(OutlastWarning, match="ten batches"):
        adapter.adapt([bad] * 10)
    adapter = Tent(net(), guards=[CollapseAlarm(action="raise")])
    with pytest.raises(DivergedError, match="ten batches"):
        adapter.adapt([bad] * 10)


def test_models_without_batchnorm_are_warned_about_once():
    with pytest.warns(OutlastWarning, match="batch size no longer matters"):
        Tent(net(LN))


# ---- choices and reports -----------------------------------------------------------------------------------------------


def test_last_blocks_can_be_left_out():
    class Vit(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4)) for _ in range(4)])
            self.norm = nn.LayerNorm(4)

        def forward(self, x):
            for block in self.blocks:
                x = block(x)
            return self.norm(x)

    names = set(quiet(Tent, Vit(), params=norm_affine_except(last=2)).adapted)
    assert names == {"blocks.0.0.weight", "blocks.0.0.bias", "blocks.1.0.weight", "blocks.1.0.bias"}
    assert not any(name.startswith("norm") for name in quiet(Tent, Vit(), params=norm_affine_except(last="norm")).adapted)
    assert len(quiet(Tent, Vit(), params=norm_affine_except(last=0)).adapted) == 10


def test_report_is_json_and_draws():
    matplotlib = pytest.importorskip("matplotlib", reason="matplotlib (extra report) is not installed")
    adapter = Tent(net(), lr=0.01, guards=[PeriodicReset(2)])
    for x in stream():
        adapter(x)
    content = adapter.report.to_dict()
    assert content["updates"] == 4
    assert content["seen"] == content["used"] == 4 * 32
    assert 0 < content["marginal_entropy"] <= 1
    assert content["events"] == [[2, "periodic reset"], [4, "periodic reset"]]
    assert adapter.report.plot().get_xlabel() == "update"
    matplotlib.pyplot.close("all")


def test_repr_says_what_adapts():
    text = repr(Tent(net(), lr=0.01))
    assert "adapts 64 of 533 weights in 4 tensors" in text
    assert "Adam(lr=0.01)" in text
    assert "statistics only" in repr(Norm(net()))


def test_recalibration_is_the_cumulative_average():
    model = nn.Sequential(nn.BatchNorm1d(6), nn.Dropout(0.5), nn.BatchNorm1d(6, momentum=0.7))
    model.train()
    batches = stream(5)
    recalibrate_batchnorm(model, [(x, 0) for x in batches])
    torch.testing.assert_close(model[0].running_mean, torch.stack([x.mean(0) for x in batches]).mean(0))
    torch.testing.assert_close(model[0].running_var, torch.stack([x.var(0) for x in batches]).mean(0))
    assert model[2].momentum == 0.7
    assert model.training
    assert model[1].training


# ---- defects that were found -------------------------------------------------------------------------------------------


def test_gradients_left_by_the_users_training_are_not_used():
    model = net()
    model(stream(1)[0]).square().sum().mul(100).backward()
    adapter, twin = Tent(model, inplace=False, optimizer=sgd(0.1)), Tent(net(), optimizer=sgd(0.1))
    own = Tent(model, inplace=True, optimizer=sgd(0.1))
    for each in (adapter, twin, own):
        each(stream(1)[0])
    assert same_state(values(adapter), values(twin))
    assert same_state(values(own), values(twin))


@pytest.mark.parametrize("make", [lambda m: Norm(m, stats="ema"), lambda m: frozen_by_alarm(Tent(m, stats="ema"))])
def test_bad_batch_does_not_enter_the_running_estimate(make):
    adapter, twin = make(net()), make(net())
    good, bad = stream(2), stream(1)[0].clone()
    bad[0, 0] = math.nan
    for each in (adapter, twin):
        each(good[0])
    adapter(bad)
    assert "nonfinite" in [kind for _, kind in adapter.report.events]
    assert torch.equal(adapter(good[1]), twin(good[1]))


def frozen_by_alarm(adapter):
    adapter.freeze()
    return adapter


def test_norm_says_ten_bad_batches_too():
    with pytest.warns(OutlastWarning, match="ten batches"):
        Norm(net()).adapt([torch.full((8, 6), math.nan)] * 10)


def test_ring_buffer_does_not_keep_bad_rows():
    adapter = Tent(net(), guards=[RingBuffer(8)])
    rows = torch.cat(stream(1))
    for row in rows[:8]:
        adapter(row[None])
    adapter(torch.full((1, 6), math.nan))
    assert torch.isfinite(adapter(rows[8:9])).all()


def test_what_changes_the_adapter_is_refused_inside_source():
    adapter = Tent(net(), lr=0.1)
    adapter(stream(1)[0])
    state = adapter.state_dict()
    with adapter.source():
        for call in (adapter.reset, adapter.state_dict, adapter.merge, lambda: adapter.load_state_dict(state)):
            with pytest.raises(StateError, match="source"):
                call()
    assert adapter.report.drift > 0


def test_diversity_bears_a_class_that_never_comes():
    model = net()
    with torch.no_grad():
        model[7].bias[0] = -150.0
    adapter = Tent(model, guards=[Diversity()])
    adapter.adapt(stream(3))
    assert adapter.report.updates == 3


@pytest.mark.parametrize(
    "settings",
    [
        {"episodic": True, "accumulate": 2},
        {"steps": 2, "accumulate": 2},
    ],
)
def test_settings_that_never_lead_to_a_step_are_refused(settings):
    with pytest.raises(ValueError, match="accumulate"):
        Tent(net(), **settings)
    with pytest.raises(ValueError, match="RingBuffer"):
        Tent(net(), episodic=True, guards=[RingBuffer(8)])


def test_small_rows_in_a_large_buffer_adapt():
    adapter = Tent(net(), min_batch=4, guards=[RingBuffer(8)])
    for row in torch.cat(stream(1)):
        adapter(row[None])
    assert adapter.report.updates == 4


def test_checkpoints_without_metadata_load_too():
    plain = {name: value for name, value in net().state_dict().items() if "num_batches" not in name}
    adapter = Tent(net(seed=4))
    adapter(stream(1)[0])
    adapter.model.load_state_dict(dict(plain))
    assert adapter.report.drift == 0
    adapter(stream(1)[0])
    adapter.reset()
    assert torch.equal(adapter(stream(1)[0]), Tent(net())(stream(1)[0]))  # the loaded model is the source now


@pytest.mark.parametrize("stats", ["ema", "blend"])
def test_low_precision_models_mix_statistics(stats):
    adapter = Tent(net().bfloat16(), stats=stats)
    assert adapter(stream(1)[0].bfloat16()).dtype == torch.bfloat16


def test_states_take_the_type_of_the_adapter():
    saved = Tent(net(), stats="ema", guards=[RingBuffer(8)])
    for row in torch.cat(stream(1))[:9]:
        saved(row[None])
    other = Tent(net().double(), stats="ema", guards=[RingBuffer(8)])
    other.load_state_dict(saved.state_dict())
    other.reset()
    other(stream(1)[0].double())
    saved.to(torch.bfloat16)
    assert saved(stream(1)[0][:1].bfloat16()).dtype == torch.bfloat16


def test_predict_and_frozen_choose_statistics_as_forward_does():
    model, x = net(dropout=0.5), stream(1)[0]
    adapter = Tent(model, min_batch=16)
    assert torch.equal(adapter.predict(x[:4]), model(x[:4]).detach())
    adapter.model.train()
    assert torch.equal(adapter.predict(x), adapter.predict(x))
    buffered = Tent(model, guards=[RingBuffer(16)])
    for row in x[:16]:
        buffered(row[None])
    again = buffered.predict(x[16:17])
    with buffered.frozen():
        assert torch.equal(buffered(x[16:17]), again)
    with pytest.raises(ValueError, match="RingBuffer"), pytest.warns(OutlastWarning):
        Tent(net()).predict(x[:1])


def test_a_batch_counts_once_whatever_its_steps():
    adapter = Tent(net(), steps=3)
    adapter(stream(1)[0])
    assert (adapter.report.seen, adapter.report.used, adapter.report.updates) == (32, 32, 3)
    adapter(torch.full((8, 6), math.nan))
    assert adapter.report.skipped == 1
    assert len(adapter.report.events) == 1
    filtered = Tent(net(), steps=3, guards=[EntropyFilter(1e-6)])
    filtered(stream(1)[0])
    assert filtered.report.skipped == 1
    ema = [Tent(net(), stats="ema", steps=steps, optimizer=sgd(1e-12), predict="after") for steps in (1, 4)]
    for x in stream(3):
        torch.testing.assert_close(ema[0](x), ema[1](x), atol=1e-5, rtol=1e-5)
        norm = ema[0].predict(x)
        assert norm.shape == (32, 5)


def test_redundancy_averages_what_was_used_over_micro_batches():
    logits = torch.tensor([[5.0, 0.0, 0.0], [0.1, 0.0, 0.0]])
    guard = RedundancyFilter(0.999)
    adapter = quiet(Tent, Given(logits), optimizer=sgd(0.0), guards=[guard, EntropyFilter(0.5)], accumulate=2)
    adapter(torch.zeros(2, 1))
    adapter.model.logits = logits.flip(1)
    adapter(torch.zeros(2, 1))
    torch.testing.assert_close(guard._mean, torch.stack([logits[0], logits.flip(1)[0]]).softmax(1).mean(0))


def test_nothing_returned_requires_a_gradient():
    from types import SimpleNamespace

    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = net()

        def forward(self, x):
            z = self.inner(x)
            return {"a": Output(z, z), "b": SimpleNamespace(z=[z], name="n")}

    y = Tent(Odd(), output_to_logits=lambda output: output["a"].logits)(stream(1)[0])
    assert not y["a"].hidden.requires_grad
    assert not y["b"].z[0].requires_grad
    assert y["b"].name == "n"


def test_built_under_inference_mode_it_adapts():
    model = net()
    with torch.inference_mode():
        adapter = Tent(model)
        adapter(stream(1)[0])
    assert adapter.report.updates == 1


def test_flags_that_others_clear_are_set_again():
    adapter = Tent(net(), lr=0.01)
    adapter.requires_grad_(False)
    adapter(stream(1)[0])
    assert adapter.report.drift > 0


def test_failed_recalibration_leaves_the_statistics():
    model = net()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError):
        recalibrate_batchnorm(model, [stream(1)[0], torch.zeros(3, 9)])
    assert same_state(model.state_dict(), before)


def test_one_guard_twice_is_refused():
    guard = Recovery()
    with pytest.raises(ValueError, match="in use"):
        Tent(net(), guards=[guard, guard])
