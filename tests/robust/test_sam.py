from __future__ import annotations

import copy
import io
import math
import pickle
import warnings

import pytest
import torch
from helpers import (
    batches,
    by_hand,
    closure_of,
    cross_entropy,
    farthest,
    flat,
    gradient,
    mlp,
    same,
    snapshot,
    train_by_hand,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from outlast.errors import OutlastWarning, StateError, UnsupportedError
from outlast.robust import SAM, sam_gradient

SGD = torch.optim.SGD
Adam = torch.optim.Adam


def sam_of(model, base=SGD, lr=0.1, base_settings=None, **settings):
    return SAM(base(model.parameters(), lr=lr, **(base_settings or {})), **settings)


def train(optimizer, model, data):
    return [optimizer.step(closure_of(optimizer, model, batch)) for batch in data]


def plain_train(optimizer, model, data):
    for batch in data:
        closure_of(optimizer, model, batch)()
        optimizer.step()


def ascent(grads, *, weights=None, **options):
    """eps of one ascend() from given gradients, with the returned norm."""
    parameters = [nn.Parameter(torch.zeros_like(g) if weights is None else weights[i].clone()) for i, g in enumerate(grads)]
    start = [p.detach().clone() for p in parameters]
    for parameter, grad in zip(parameters, grads, strict=True):
        parameter.grad = grad.clone()
    optimizer = SAM(SGD(parameters, lr=0.1), buffers="update", **options)
    norm = optimizer.ascend()
    return [(p.detach() - s) for p, s in zip(parameters, start, strict=True)], norm


def quadratic(A, w):
    def closure():
        w.grad = None
        loss = 0.5 * w @ A @ w
        loss.backward()
        return loss

    return closure


def spd(size=5, seed=0):
    root = torch.randn(size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return root @ root.T


# ---- O1: rho = 0 ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("base", "base_settings"), [(SGD, {"momentum": 0.9, "weight_decay": 0.01}), (Adam, {}), (torch.optim.AdamW, {"amsgrad": True})]
)
def test_rho_zero_is_the_base_optimizer_bit_for_bit(base, base_settings):
    plain, ours = mlp(norm=True, dropout=0.3), mlp(norm=True, dropout=0.3)
    reference = base(plain.parameters(), lr=0.05, **base_settings)
    torch.manual_seed(5)
    plain_train(reference, plain, batches(20))
    after = torch.get_rng_state()
    torch.manual_seed(5)
    train(sam_of(ours, base, 0.05, base_settings, rho=0.0), ours, batches(20))
    assert same(snapshot(plain), snapshot(ours))
    assert torch.equal(after, torch.get_rng_state())


def test_rho_zero_calls_the_closure_once():
    w = nn.Parameter(torch.ones(3))
    calls = []
    optimizer = SAM(SGD([w], lr=0.1), rho=0.0)

    def closure():
        calls.append(1)
        return quadratic(torch.eye(3), w)()

    optimizer.step(closure)
    assert len(calls) == 1


def test_radius_zero_in_the_groups_after_a_looksam_step_is_the_base_optimizer():
    model = mlp()
    optimizer = sam_of(model, rho=0.3, every=2, reuse="looksam")
    train(optimizer, model, batches(1))
    other = copy.deepcopy(model)
    for group in optimizer.param_groups:
        group["rho"] = 0.0
    train(optimizer, model, batches(1, seed=2))
    plain_train(SGD(other.parameters(), lr=0.1), other, batches(1, seed=2))
    assert same(snapshot(model), snapshot(other))


# ---- O2, O5, O6: quadratics -------------------------------------------------------------------------------------------


def test_gradient_of_a_quadratic_is_the_closed_form():
    A, start = spd(), torch.arange(1.0, 6.0, dtype=torch.float64)
    w = nn.Parameter(start.clone())
    SAM(SGD([w], lr=1.0), rho=0.3).step(quadratic(A, w))
    g = A @ start
    expected = A @ (start + 0.3 * g / g.norm())
    torch.testing.assert_close(start - w.detach(), expected, rtol=1e-6, atol=0)


def test_gradient_of_an_isotropic_quadratic_grows_by_the_radius():
    start = torch.tensor([3.0, 4.0], dtype=torch.float64)
    w = nn.Parameter(start.clone())
    SAM(SGD([w], lr=1.0), rho=0.5).step(quadratic(2.0 * torch.eye(2, dtype=torch.float64), w))
    torch.testing.assert_close(start - w.detach(), 2.0 * start * (1 + 0.5 / 5.0), rtol=1e-10, atol=0)


def test_small_radius_gives_the_gradient_norm_and_the_hessian_direction():
    model, (batch,) = mlp(dtype=torch.float64), batches(1, dtype=torch.float64)
    parameters = list(model.parameters())
    grads = torch.autograd.grad(cross_entropy(model, batch), parameters, create_graph=True)
    g = flat(grads)
    inner = sum((x * x.detach()).sum() for x in grads)
    Hg = flat(gradient(inner, parameters))
    errors = []
    for rho in (1e-2, 1e-3):
        optimizer = sam_of(model, lr=0.0, rho=rho)
        optimizer.step(closure_of(optimizer, model, batch))
        sharp = flat([p.grad for p in parameters])
        errors.append(float((sharp - g - rho * Hg / g.norm()).norm() / (rho * Hg / g.norm()).norm()))
        assert float(optimizer.last.sharpness) / rho == pytest.approx(float(g.norm()), rel=20 * rho)
    assert errors[1] < 0.2 * errors[0] < 0.2


def test_constant_steps_end_in_the_two_cycle():
    w = nn.Parameter(torch.tensor([1.0], dtype=torch.float64))
    optimizer = SAM(SGD([w], lr=0.1), rho=0.05)
    for _ in range(300):
        optimizer.step(quadratic(2.0 * torch.eye(1, dtype=torch.float64), w))
    assert abs(float(w.detach())) == pytest.approx(0.1 * 2 * 0.05 / (2 - 0.1 * 2), rel=1e-9)


# ---- O3: dual norms ---------------------------------------------------------------------------------------------------


def norm_of(vector, p):
    """Without over- or underflow of the powers."""
    largest = float(vector.abs().max())
    return largest * float(torch.linalg.vector_norm(vector / largest, p))


def check_dual(grads, p, rho, rtol):
    eps, norm = ascent(grads, rho=rho, p=p)
    q = math.inf if p == 1 else 1.0 if math.isinf(p) else p / (p - 1)
    e, g = flat(eps), flat(grads)
    size = norm_of(g, q)
    assert norm_of(e, p) == pytest.approx(rho, rel=rtol)
    assert float(e @ g) == pytest.approx(rho * size, rel=rtol)
    assert float(norm) == pytest.approx(size, rel=rtol)


@pytest.mark.parametrize("p", [1.0, 1.5, 2.0, 3.0, math.inf])
def test_perturbation_attains_the_dual_norm(p):
    rng = torch.Generator().manual_seed(0)
    check_dual([torch.randn(shape, generator=rng, dtype=torch.float64) for shape in [(4, 3), (7,), ()]], p, 0.3, 1e-12)


@settings(max_examples=60, deadline=None)
@given(
    p=st.one_of(st.just(1.0), st.floats(1.05, 1e6), st.just(math.inf)),
    seed=st.integers(0, 1000),
    magnitude=st.floats(1e-2, 1e30),
    rho=st.floats(1e-3, 10.0),
)
def test_any_norm_and_any_gradient_attain_the_dual_norm(p, seed, magnitude, rho):
    rng = torch.Generator().manual_seed(seed)
    grads = [magnitude * torch.randn(shape, generator=rng, dtype=torch.float64) for shape in [(3, 2), (1,), (5,)]]
    check_dual(grads, p, rho, 1e-9)


def test_p_one_moves_the_first_of_equal_entries():
    eps, _ = ascent([torch.tensor([1.0, -3.0]), torch.tensor([3.0, 3.0])], rho=0.5, p=1.0)
    assert flat(eps).tolist() == [0.0, -0.5, 0.0, 0.0]


def test_p_one_works_on_channels_last_weights():
    conv = nn.Conv2d(3, 4, 2).to(memory_format=torch.channels_last)
    start = conv.weight.detach().clone()
    optimizer = sam_of(conv, rho=0.5, p=1.0, buffers="update")
    conv(torch.randn(2, 3, 5, 5).to(memory_format=torch.channels_last)).square().sum().backward()
    conv.bias.grad = None
    grad = conv.weight.grad.clone()
    optimizer.ascend()
    expected = torch.zeros_like(start)
    index = torch.unravel_index(grad.abs().argmax(), grad.shape)
    expected[index] = 0.5 * grad[index].sign()
    torch.testing.assert_close(conv.weight.detach() - start, expected)


def test_norm_is_over_all_parameters_together():
    eps, norm = ascent([torch.tensor([3.0]), torch.tensor([4.0])], rho=1.0)
    assert float(norm) == pytest.approx(5.0)
    assert [float(e) for e in eps] == pytest.approx([0.6, 0.8])


def test_mixed_precision_groups_share_one_norm():
    eps, norm = ascent([torch.tensor([3.0]), torch.tensor([4.0], dtype=torch.float64)], rho=1.0)
    assert float(norm) == pytest.approx(5.0)
    assert [float(e) for e in eps] == pytest.approx([0.6, 0.8])


# ---- O4: scale ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"adaptive": True}, {"p": 3.0}, {"p": math.inf}])
def test_scaling_the_loss_leaves_the_perturbation(options):
    rng = torch.Generator().manual_seed(3)
    grads, weights = ([torch.randn(4, 3, generator=rng), torch.randn(5, generator=rng)] for _ in range(2))
    one, _ = ascent(grads, weights=weights, rho=0.3, **options)
    other, _ = ascent([2.0**16 * g for g in grads], weights=weights, rho=0.3, **options)
    torch.testing.assert_close(flat(one), flat(other), rtol=1e-6, atol=0)


# ---- O7: ASAM -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("eta", [0.0, 0.01, 0.5])
def test_adaptive_ball_has_the_radius_in_scaled_coordinates(eta):
    model, (batch,) = mlp(dtype=torch.float64), batches(1, dtype=torch.float64)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = SAM(SGD(model.parameters(), lr=0.1), model, rho=0.5, adaptive=True, eta=eta)
    cross_entropy(model, batch).backward()
    optimizer.ascend()
    parts = [
        (p.detach() - before[name]) / ((before[name].abs() + eta) if "weight" in name else 1.0) for name, p in model.named_parameters()
    ]
    assert float(flat(parts).norm()) == pytest.approx(0.5, rel=1e-9)


def test_adaptive_moves_weights_that_are_zero():
    eps, _ = ascent([torch.ones(2, 2)], rho=0.5, adaptive=True)
    assert (eps[0] > 0).all()


def test_adaptive_knows_norm_weights_by_name_and_by_named_parameters():
    norm = nn.BatchNorm1d(3)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([1.0, 2.0, 3.0]))
    moved = []
    for base, model in [(SGD(norm.parameters(), lr=0.1), norm), (SGD(norm.named_parameters(), lr=0.1), None)]:
        optimizer = SAM(base, model, rho=0.5, adaptive=True, eta=0.0, buffers="update")
        norm.weight.grad, norm.bias.grad = torch.ones(3), torch.ones(3)
        before = norm.weight.detach().clone()
        optimizer.ascend()
        moved.append(norm.weight.detach() - before)
        optimizer.restore()
    expected = 0.5 * torch.tensor([1.0, 4.0, 9.0]) / math.sqrt(1 + 4 + 9 + 3)
    for step in moved:
        torch.testing.assert_close(step, expected)


def test_adaptive_perturbed_loss_ignores_rescaling_of_layers_and_plain_does_not():
    def perturbed_loss(scale, adaptive):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8, bias=False), nn.ReLU(), nn.Linear(8, 3, bias=False)).double()
        with torch.no_grad():
            model[0].weight.mul_(scale)
            model[2].weight.div_(scale)
        optimizer = SAM(SGD(model.parameters(), lr=0.0), model, rho=0.5, adaptive=adaptive, eta=0.0)
        train(optimizer, model, batches(1, dtype=torch.float64))
        return float(optimizer.last.perturbed_loss)

    assert perturbed_loss(5.0, True) == pytest.approx(perturbed_loss(1.0, True), rel=1e-6)
    assert perturbed_loss(5.0, False) != pytest.approx(perturbed_loss(1.0, False), rel=1e-2)


# ---- O9: restoring ------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:SAM perturbs bfloat16:outlast.errors.OutlastWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("foreach", [True, False])
def test_restore_is_bit_exact_and_in_place(dtype, foreach):
    model, (batch,) = mlp(dtype=dtype), batches(1, dtype=dtype)
    before, places = snapshot(model), [p.data_ptr() for p in model.parameters()]
    optimizer = SAM(SGD(model.parameters(), lr=0.1), model, rho=0.7, foreach=foreach)
    cross_entropy(model, batch).backward()
    optimizer.ascend()
    assert not same(before, snapshot(model))
    optimizer.restore()
    assert same(before, snapshot(model))
    train(optimizer, model, batches(2, dtype=dtype))
    assert places == [p.data_ptr() for p in model.parameters()]


def test_tied_weights_stay_tied_and_count_once():
    torch.manual_seed(0)
    embed, head = nn.Embedding(5, 4), nn.Linear(4, 5, bias=False)
    head.weight = embed.weight
    model = nn.Sequential(embed, head)
    tokens = torch.tensor([0, 1, 2])
    before = embed.weight.detach().clone()
    optimizer = SAM(SGD(model.parameters(), lr=0.0), model, rho=0.3)
    nn.functional.cross_entropy(model(tokens), tokens).backward()
    optimizer.ascend()
    assert float((head.weight.detach() - before).norm()) == pytest.approx(0.3, rel=1e-5)
    optimizer.restore()
    assert head.weight is embed.weight
    assert torch.equal(head.weight, before)


def test_parameter_without_gradient_in_the_second_pass_is_restored():
    used, dropped = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    optimizer = SAM(SGD([used, dropped], lr=0.1), rho=0.5)
    passes = []

    def closure():
        optimizer.zero_grad()
        passes.append(1)
        loss = used.square().sum() + (dropped.square().sum() if len(passes) == 1 else 0.0)
        loss.backward()
        return loss

    optimizer.step(closure)
    assert torch.equal(dropped, torch.ones(3))
    assert not torch.equal(used, torch.ones(3))


def test_parameter_that_first_gets_a_gradient_in_the_second_pass_is_updated():
    used, late = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    optimizer = SAM(SGD([used, late], lr=0.1), rho=0.5)
    passes = []

    def closure():
        optimizer.zero_grad()
        passes.append(late.detach().clone())
        loss = used.square().sum() + (late.sum() if len(passes) == 2 else 0.0)
        loss.backward()
        return loss

    optimizer.step(closure)
    assert torch.equal(passes[1], torch.ones(3))
    torch.testing.assert_close(late.detach(), torch.full((3,), 0.9))


@pytest.mark.parametrize("failing", [1, 2, 3])
def test_failing_closure_leaves_weights_buffers_and_later_steps_intact(failing):
    model, (batch,) = mlp(norm=True), batches(1)
    optimizer = sam_of(model, rho=0.5, inner_steps=2)
    calls = []

    def closure():
        calls.append(1)
        loss = closure_of(optimizer, model, batch)()
        if len(calls) == failing:
            raise KeyboardInterrupt
        return loss

    weights = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(KeyboardInterrupt):
        optimizer.step(closure)
    assert same(weights, list(model.parameters()))
    assert model[1].num_batches_tracked == 1
    optimizer.step(closure_of(optimizer, model, batch))
    assert model[1].num_batches_tracked == 2


def test_no_global_hook_stays_behind():
    from torch.nn.modules import module

    model, (batch,) = mlp(), batches(1)
    optimizer = sam_of(model)

    def closure():
        raise RuntimeError("first pass")

    train(optimizer, model, [batch])
    with pytest.raises(RuntimeError, match="first pass"):
        optimizer.step(closure)
    assert not module._global_forward_pre_hooks


def test_perturbed_restores_when_its_body_raises_and_step_then_refuses():
    model, (batch,) = mlp(), batches(1)
    optimizer = SAM(SGD(model.parameters(), lr=0.1), model)
    before = snapshot(model)
    cross_entropy(model, batch).backward()
    with pytest.raises(ZeroDivisionError), optimizer.perturbed():  # noqa: PT012 - the context is what is tested
        assert not same(before, snapshot(model))
        raise ZeroDivisionError
    assert same(before, snapshot(model))
    with pytest.raises(StateError):
        optimizer.step()


# ---- O10: buffers and random numbers -----------------------------------------------------------------------------------


class Normed(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(4, 6), norm, nn.Linear(6, 3)

    def forward(self, x):
        hidden = self.first(x)
        if isinstance(self.norm, nn.InstanceNorm1d):
            return self.last(self.norm(torch.stack([hidden, hidden**2], 2)).mean(2) + hidden)
        return self.last(self.norm(hidden))


NORMS = {
    "batch": lambda: nn.BatchNorm1d(6),
    "batch, cumulative": lambda: nn.BatchNorm1d(6, momentum=None),
    "instance": lambda: nn.InstanceNorm1d(6, track_running_stats=True),
    "spectral": lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(6, 6)),
}


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(("form", "inner_steps"), [("closure", 1), ("closure", 3), ("two-call", 1), ("two-call with model", 1)])
def test_buffers_are_those_of_one_plain_pass(norm, form, inner_steps):
    torch.manual_seed(0)
    plain = Normed(NORMS[norm]())
    ours = copy.deepcopy(plain)
    (batch,) = batches(1)
    cross_entropy(plain, batch)
    base = SGD(ours.parameters(), lr=0.1)
    optimizer = SAM(base, ours if form == "two-call with model" else None, rho=0.5, inner_steps=inner_steps)
    if form == "closure":
        optimizer.step(closure_of(optimizer, ours, batch))
    elif form == "two-call":
        with optimizer.first_pass():
            cross_entropy(ours, batch).backward()
        with optimizer.perturbed():
            cross_entropy(ours, batch).backward()
    else:
        cross_entropy(ours, batch).backward()
        with optimizer.perturbed():
            cross_entropy(ours, batch).backward()
    assert same(list(plain.buffers()), list(ours.buffers()))


def test_buffers_update_lets_the_second_pass_change_them():
    model = mlp(norm=True)
    train(sam_of(model, buffers="update"), model, batches(1))
    assert model[1].num_batches_tracked == 2


def test_two_call_form_without_any_model_warns_once_that_buffers_are_not_frozen():
    model, (batch,) = mlp(norm=True), batches(1)
    optimizer = sam_of(model)
    seen = []
    for _ in range(2):
        cross_entropy(model, batch).backward()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            optimizer.ascend()
        seen += caught
        optimizer.restore()
        optimizer.step()
    assert [w.category for w in seen] == [OutlastWarning]


def masks_of_a_step(two_call=False, **options):
    model, (batch,) = mlp(dropout=0.5), batches(1)
    masks = []
    model[2].register_forward_hook(lambda m, i, out: masks.append(out.detach() == 0))
    optimizer = sam_of(model, **options)
    torch.manual_seed(9)
    if two_call:
        with optimizer.first_pass():
            cross_entropy(model, batch).backward()
        with optimizer.perturbed():
            cross_entropy(model, batch).backward()
    else:
        optimizer.step(closure_of(optimizer, model, batch))
    return masks, torch.rand(1)


@pytest.mark.parametrize("options", [{}, {"inner_steps": 3}, {"two_call": True}])
def test_all_passes_draw_the_same_mask_and_leave_the_generator_after_the_first(options):
    masks, following = masks_of_a_step(**options)
    assert len(masks) == 1 + options.get("inner_steps", 1)
    assert all(torch.equal(masks[0], mask) for mask in masks)
    assert masks[0].any()
    model, (batch,) = mlp(dropout=0.5), batches(1)
    torch.manual_seed(9)
    cross_entropy(model, batch)
    assert torch.equal(following, torch.rand(1))


def test_same_rng_false_draws_new_masks():
    masks, _ = masks_of_a_step(same_rng=False)
    assert not torch.equal(*masks)


# ---- O11: checkpoints and copies ----------------------------------------------------------------------------------------

OPTIONS = [
    {},
    {"every": 2, "reuse": "looksam", "rho": 0.3},
    {"every": 3},
    {"perturb_fraction": 0.5, "rho": 0.3},
    {"adaptive": True, "rho": 1.0, "inner_steps": 2},
]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("base", [SGD, Adam])
def test_resuming_equals_never_stopping(options, base):
    base_settings = {"momentum": 0.9} if base is SGD else {}
    data = batches(7)
    whole = mlp(norm=True, dropout=0.2)
    first = copy.deepcopy(whole)
    torch.manual_seed(1)
    train(sam_of(whole, base, 0.1, base_settings, **options), whole, data)
    torch.manual_seed(1)
    stopped = sam_of(first, base, 0.1, base_settings, **options)
    train(stopped, first, data[:3])
    after = torch.get_rng_state()
    file = io.BytesIO()
    torch.save((first.state_dict(), stopped.state_dict()), file)
    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    second = mlp(norm=True, dropout=0.2, seed=99)
    second.load_state_dict(weights)
    resumed = sam_of(second, base, 0.1, base_settings, **options)
    resumed.load_state_dict(state)
    torch.set_rng_state(after)
    train(resumed, second, data[3:])
    assert same(snapshot(whole), snapshot(second))


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_copies_go_on_like_the_original(options, way):
    model, data = mlp(), batches(5)
    optimizer = sam_of(model, **options)
    train(optimizer, model, data[:2])
    pair = (model, optimizer)
    twin, copied = copy.deepcopy(pair) if way == "deepcopy" else pickle.loads(pickle.dumps(pair))
    train(optimizer, model, data[2:])
    assert farthest(model, twin) > 0
    train(copied, twin, data[2:])
    assert same(snapshot(model), snapshot(twin))
    assert copied.param_groups is copied.base.param_groups
    assert copied.base is not optimizer.base


class Descent(torch.optim.Optimizer):
    """An optimizer as users write them: its groups hold nothing but lr."""

    def __init__(self, parameters, lr):
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(p.grad, alpha=group["lr"])


def test_copy_around_a_users_own_optimizer_can_load_a_checkpoint():
    model = mlp()
    optimizer = SAM(Descent(model.parameters(), lr=0.1))
    train(optimizer, model, batches(1))
    copied = copy.deepcopy(optimizer)
    copied.load_state_dict(optimizer.state_dict())
    assert copied.param_groups[0]["rho"] == 0.05


def test_checkpoint_has_no_copy_of_the_weights():
    model = mlp()
    optimizer = sam_of(model, base_settings={"momentum": 0.9})
    train(optimizer, model, batches(2))
    state = optimizer.state_dict()
    plain = optimizer.base.state_dict()
    assert set(state) == {*plain, "outlast_sam"}
    assert state["outlast_sam"] == {"version": 1, "t": 2, "g_v": None}
    assert same([s["momentum_buffer"] for s in state["state"].values()], [s["momentum_buffer"] for s in plain["state"].values()])


def test_plain_checkpoint_of_the_base_loads_with_our_radius():
    model = mlp()
    plain = SGD(model.parameters(), lr=0.1, momentum=0.9)
    plain_train(plain, model, batches(2))
    optimizer = sam_of(model, lr=0.7, base_settings={"momentum": 0.9}, rho=0.2, every=2)
    train(optimizer, model, batches(1))
    optimizer.load_state_dict(plain.state_dict())
    assert optimizer.param_groups[0]["lr"] == 0.1
    assert optimizer.param_groups[0]["rho"] == 0.2
    assert optimizer.due
    train(optimizer, model, batches(1))


def test_base_loads_our_checkpoint():
    model = mlp()
    optimizer = sam_of(model, base_settings={"momentum": 0.9})
    train(optimizer, model, batches(2))
    plain = SGD(model.parameters(), lr=0.3, momentum=0.9)
    plain.load_state_dict(optimizer.state_dict())
    plain_train(plain, model, batches(1))


def test_checkpoint_of_another_version_is_refused():
    optimizer = sam_of(mlp())
    state = optimizer.state_dict()
    state["outlast_sam"]["version"] = 2
    with pytest.raises(ValueError, match="version 2"):
        optimizer.load_state_dict(state)


def test_loading_while_perturbed_does_not_lose_the_weights():
    model, (batch,) = mlp(), batches(1)
    optimizer = SAM(SGD(model.parameters(), lr=0.1), model)
    state, before = optimizer.state_dict(), snapshot(model)
    cross_entropy(model, batch).backward()
    optimizer.ascend()
    with pytest.raises(StateError):
        optimizer.load_state_dict(state)
    optimizer.restore()
    assert same(before, snapshot(model))


def test_looksam_component_is_kept_in_float32():
    model = mlp(dtype=torch.bfloat16)
    optimizer = sam_of(model, every=2, reuse="looksam")
    with pytest.warns(OutlastWarning):
        train(optimizer, model, batches(1, dtype=torch.bfloat16))
    assert {g.dtype for g in optimizer.state_dict()["outlast_sam"]["g_v"]} == {torch.float32}


# ---- one optimizer with the base ----------------------------------------------------------------------------------------


def test_groups_and_state_are_the_bases_own_objects():
    model = mlp()
    base = SGD(model.parameters(), lr=0.1, momentum=0.9)
    groups, state = base.param_groups, base.state
    optimizer = SAM(base)
    train(optimizer, model, batches(1))
    assert optimizer.param_groups is groups is base.param_groups
    assert optimizer.state is state is base.state
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.param_groups is base.param_groups
    assert optimizer.state is base.state


@pytest.mark.parametrize("on", ["sam", "base"])
def test_schedulers_see_the_bases_groups(on):
    model = mlp()
    optimizer = sam_of(model, lr=1.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer if on == "sam" else optimizer.base, 1, gamma=0.1)
    train(optimizer, model, batches(1))
    scheduler.step()
    assert optimizer.base.param_groups[0]["lr"] == pytest.approx(0.1)
    assert pickle.loads(pickle.dumps(optimizer)).param_groups[0]["lr"] == pytest.approx(0.1)


def test_radius_in_the_group_is_what_counts():
    w = nn.Parameter(torch.zeros(2))
    optimizer = SAM(SGD([w], lr=0.1), rho=0.1, buffers="update")
    optimizer.param_groups[0]["rho"] = 0.5
    w.grad = torch.tensor([3.0, 4.0])
    optimizer.ascend()
    torch.testing.assert_close(w.detach(), torch.tensor([0.3, 0.4]))


def test_wrapping_a_base_again_does_not_keep_the_first_radius_silently():
    w = nn.Parameter(torch.zeros(2))
    base = SGD([w], lr=0.1)
    SAM(base, rho=0.1)
    try:
        again = SAM(base, rho=0.5)
    except (UnsupportedError, StateError, ValueError):
        return
    assert again.param_groups[0]["rho"] == 0.5


@pytest.mark.parametrize("options", [{}, {"p": 3.0}, {"adaptive": True}])
def test_groups_have_their_own_radii_and_still_count_in_one_norm(options):
    rng = torch.Generator().manual_seed(0)
    weights = [torch.randn(3, 2, generator=rng) for _ in range(3)]
    grads = [torch.randn(3, 2, generator=rng) for _ in range(3)]
    together, norm = ascent(grads, weights=weights, rho=1.0, **options)
    parameters = [nn.Parameter(w.clone()) for w in weights]
    groups = [{"params": [p], "rho": rho} for p, rho in zip(parameters, (0.5, 0.0, 0.2), strict=True)]
    optimizer = SAM(SGD(groups, lr=0.1), buffers="update", **options)
    for p, g in zip(parameters, grads, strict=True):
        p.grad = g.clone()
    assert float(optimizer.ascend()) == pytest.approx(float(norm))
    for p, w, e, rho in zip(parameters, weights, together, (0.5, 0.0, 0.2), strict=True):
        torch.testing.assert_close(p.detach() - w, rho * e)
    assert torch.equal(parameters[1], weights[1])


def test_group_added_later_gets_the_defaults():
    a, b = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    optimizer = SAM(SGD([a], lr=0.1), rho=0.5, buffers="update")
    optimizer.add_param_group({"params": [b]})
    assert [g["rho"] for g in optimizer.base.param_groups] == [0.5, 0.5]
    a.grad, b.grad = torch.tensor([3.0]), torch.tensor([4.0])
    optimizer.ascend()
    torch.testing.assert_close(flat([a, b]), torch.tensor([0.3, 0.4]))


def test_hook_of_the_base_runs_once_a_step_at_restored_weights():
    model = mlp()
    optimizer = sam_of(model, rho=0.5)
    before, seen = snapshot(model), []
    optimizer.base.register_step_pre_hook(lambda *_: seen.append(same(before, snapshot(model))))
    train(optimizer, model, batches(1))
    assert seen == [True]


def test_closure_is_called_twice_and_the_first_loss_comes_back():
    w = nn.Parameter(torch.tensor([3.0, 4.0]))
    optimizer = SAM(SGD([w], lr=0.1), rho=0.5)
    points = []

    def closure():
        points.append(w.detach().clone())
        return quadratic(torch.eye(2), w)()

    loss = optimizer.step(closure)
    assert len(points) == 2
    torch.testing.assert_close(points[1], points[0] * 1.1)
    assert float(loss) == pytest.approx(12.5)
    assert not loss.requires_grad
    assert float(optimizer.last.loss) == pytest.approx(12.5)
    assert float(optimizer.last.perturbed_loss) == pytest.approx(0.5 * 5.5**2)
    assert float(optimizer.last.sharpness) == pytest.approx(0.5 * 5.5**2 - 12.5)
    assert float(optimizer.last.grad_norm) == pytest.approx(5.0)
    assert not optimizer.last.skipped


def test_closure_works_under_no_grad_and_may_be_cleared_outside():
    model, other = mlp(), mlp()
    (batch,) = batches(1)
    optimizer, reference = sam_of(model), sam_of(other)
    optimizer.zero_grad()

    def closure():
        loss = cross_entropy(model, batch)
        loss.backward()
        return loss

    with torch.no_grad():
        optimizer.step(closure)
    train(reference, other, [batch])
    assert same(snapshot(model), snapshot(other))


def test_closure_that_clears_with_zeros_is_taken():
    model, other = mlp(), mlp()
    optimizer, reference = sam_of(model), sam_of(other)
    for batch in batches(3):

        def closure(batch=batch):
            model.zero_grad(set_to_none=False)
            loss = cross_entropy(model, batch)
            loss.backward()
            return loss

        optimizer.step(closure)
    train(reference, other, batches(3))
    assert same(snapshot(model), snapshot(other))


def test_two_call_form_equals_the_closure():
    model, other = mlp(norm=True, dropout=0.3), mlp(norm=True, dropout=0.3)
    one, two = sam_of(model, rho=0.3, base_settings={"momentum": 0.9}), sam_of(other, rho=0.3, base_settings={"momentum": 0.9})
    torch.manual_seed(2)
    train(one, model, batches(4))
    torch.manual_seed(2)
    for batch in batches(4):
        two.zero_grad()
        with two.first_pass():
            cross_entropy(other, batch).backward()
        norm = two.ascend()
        assert all(p.grad is None for p in other.parameters())
        cross_entropy(other, batch).backward()
        two.restore()
        two.restore()
        assert two.step() is None
    assert same(snapshot(model), snapshot(other))
    assert torch.equal(norm, one.last.grad_norm)


def test_foreach_off_gives_the_same():
    models = [mlp(norm=True), mlp(norm=True)]
    for model, foreach in zip(models, (True, False), strict=True):
        train(sam_of(model, foreach=foreach, every=2, reuse="looksam", rho=0.2), model, batches(4))
    assert same(snapshot(models[0]), snapshot(models[1]))


@pytest.mark.parametrize("options", [{}, {"p": 3.0}, {"inner_steps": 3}, {"every": 2, "reuse": "looksam"}, {"perturb_weight_decay": True}])
def test_maximising_equals_minimising_the_negative(options):
    base_settings = {"weight_decay": 0.3}
    model, other = mlp(dtype=torch.float64), mlp(dtype=torch.float64)
    up = sam_of(model, base_settings={**base_settings, "maximize": True}, rho=0.3, **options)
    down = sam_of(other, base_settings=base_settings, rho=0.3, **options)
    for batch in batches(4, dtype=torch.float64):
        up.step(closure_of(up, model, batch))
        down.step(closure_of(down, other, batch, scale=-1.0))
    assert farthest(model, other) < 1e-12


# ---- options ------------------------------------------------------------------------------------------------------------


def test_every_takes_two_passes_on_each_kth_step_only():
    model, (batch,) = mlp(), batches(1)
    optimizer = sam_of(model, every=3)
    counts = []
    for _ in range(7):
        calls = []

        def closure(calls=calls):
            calls.append(1)
            return closure_of(optimizer, model, batch)()

        assert optimizer.due == (len(counts) % 3 == 0)
        optimizer.step(closure)
        counts.append(len(calls))
    assert counts == [2, 1, 1, 2, 1, 1, 2]


def looksam_by_hand(model, data, *, every, alpha, rho, lr):
    parameters = list(model.parameters())
    component = None
    for t, batch in enumerate(data):
        if t % every == 0:
            plain, sharp = (flat(g) for g in by_hand(lambda batch=batch: cross_entropy(model, batch), parameters, rho))
            component = sharp - (sharp @ plain) / (plain @ plain) * plain
            step = sharp
        else:
            plain = flat(gradient(cross_entropy(model, batch), parameters))
            step = plain + alpha * plain.norm() / component.norm() * component
        with torch.no_grad():
            for p, piece in zip(parameters, step.split([p.numel() for p in parameters]), strict=True):
                p.sub_(lr * piece.view_as(p))


@pytest.mark.parametrize("form", ["closure", "two-call", "micro", "global"])
@pytest.mark.parametrize("alpha", [0.0, 0.7])
def test_looksam_equals_its_definition_over_the_whole_vector(form, alpha):
    data = batches(7)
    model, other = mlp(), mlp()
    looksam_by_hand(other, data, every=3, alpha=alpha, rho=0.3, lr=0.1)
    optimizer = sam_of(model, rho=0.3, every=3, reuse="looksam", alpha=alpha, accumulate="global" if form == "global" else "micro")
    for batch in data:
        if form == "closure":
            optimizer.step(closure_of(optimizer, model, batch))
        elif form in ("micro", "global"):  # halves of one batch that are the batch again
            optimizer.step([closure_of(optimizer, model, batch, scale=0.5)] * 2)
        else:
            optimizer.zero_grad()
            with optimizer.first_pass():
                cross_entropy(model, batch).backward()
            if optimizer.due:
                with optimizer.perturbed():
                    cross_entropy(model, batch).backward()
            optimizer.step()
    assert farthest(model, other) < 1e-5


def test_looksam_survives_a_gradient_that_is_infinite_in_one_pass():
    w = nn.Parameter(torch.tensor([1.0, 2.0]))
    optimizer = SAM(SGD([w], lr=0.1), every=2, reuse="looksam")
    factors = iter([math.inf, 1.0, 1.0])

    def closure():
        loss = quadratic(torch.diag(torch.tensor([1.0, 3.0])), w)()
        w.grad.mul_(next(factors))
        return loss

    optimizer.step(closure)
    assert optimizer.last.skipped
    optimizer.step(closure)
    assert torch.isfinite(w).all()


def moved_by(model, batch, optimizer):
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer.zero_grad()
    cross_entropy(model, batch).backward()
    norm = optimizer.ascend()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    size = float(flat([p - before[name] for name, p in model.named_parameters()]).norm())
    optimizer.restore()
    return moved, size, norm


@pytest.mark.parametrize(
    ("perturb", "names"),
    [
        ("all", {"0.weight", "0.bias", "1.weight", "1.bias", "3.weight", "3.bias"}),
        ("norm", {"1.weight", "1.bias"}),
        ("no_norm", {"0.weight", "0.bias", "3.weight", "3.bias"}),
        (lambda p: p.ndim == 2, {"0.weight", "3.weight"}),
    ],
)
def test_perturb_chooses_the_parameters_and_keeps_the_radius(perturb, names):
    # in eval mode, since BatchNorm takes the gradient of a bias in front of it
    model, (batch,) = mlp(norm=True, dtype=torch.float64).eval(), batches(1, dtype=torch.float64)
    optimizer = SAM(SGD(model.parameters(), lr=0.1), model, rho=0.3, perturb=perturb)
    moved, size, _ = moved_by(model, batch, optimizer)
    assert moved == names
    assert size == pytest.approx(0.3, rel=1e-9)


def test_fraction_draws_tensors_and_scales_them_up():
    parameters = [nn.Parameter(torch.zeros(1)) for _ in range(400)]
    optimizer = SAM(SGD(parameters, lr=0.0), rho=0.5, perturb_fraction=0.25, buffers="update", seed=3)

    def draw():
        for p in parameters:
            p.grad = torch.ones(1)
        optimizer.ascend()
        eps = flat(parameters).clone()
        optimizer.restore()
        return eps

    first, again = draw(), draw()
    assert torch.equal(first, again)  # a function of (seed, t)
    torch.testing.assert_close(first[first != 0], torch.full((int((first != 0).sum()),), 0.5 / 20 / 0.25))
    assert 0.15 < float((first != 0).float().mean()) < 0.35
    optimizer.step()
    assert not torch.equal(draw(), first)


def test_weight_decay_joins_the_perturbation_on_demand():
    w = nn.Parameter(torch.tensor([1.0, 0.0]))
    optimizer = SAM(SGD([w], lr=0.1, weight_decay=2.0), rho=0.5, perturb_weight_decay=True, buffers="update")
    w.grad = torch.tensor([0.0, 2.0])
    norm = optimizer.ascend()
    assert float(norm) == pytest.approx(math.sqrt(8))
    torch.testing.assert_close(w.detach(), torch.tensor([1.0, 0.0]) + 0.5 / math.sqrt(2))


def test_weight_decay_stays_out_by_default():
    w = nn.Parameter(torch.tensor([1.0, 0.0]))
    optimizer = SAM(SGD([w], lr=0.1, weight_decay=2.0), rho=0.5, buffers="update")
    w.grad = torch.tensor([0.0, 2.0])
    optimizer.ascend()
    torch.testing.assert_close(w.detach(), torch.tensor([1.0, 0.5]))


@pytest.mark.parametrize("steps", [1, 2, 3, 5])
def test_inner_steps_equal_projected_ascent(steps):
    A, start, rho = spd(), torch.arange(1.0, 6.0, dtype=torch.float64), 0.7
    w = nn.Parameter(start.clone())
    optimizer = SAM(SGD([w], lr=1.0), rho=rho, inner_steps=steps)
    calls = []

    def closure():
        calls.append(1)
        return quadratic(A, w)()

    optimizer.step(closure)
    eps, rate = torch.zeros_like(start), 1.0 if steps == 1 else steps / 2
    for _ in range(steps):
        g = A @ (start + eps)
        eps = eps + rho / rate * g / g.norm()
        eps = eps * min(1.0, rho / float(eps.norm()))
    assert len(calls) == steps + 1
    torch.testing.assert_close(start - w.detach(), A @ (start + eps), rtol=1e-9, atol=0)


def test_two_call_form_with_inner_steps_refuses_or_reaches_the_radius():
    w = nn.Parameter(torch.zeros(2))
    optimizer = SAM(SGD([w], lr=0.1), rho=0.5, inner_steps=4, buffers="update")
    w.grad = torch.tensor([3.0, 4.0])
    try:
        optimizer.ascend()
    except (UnsupportedError, StateError):
        return
    assert float(w.detach().norm()) == pytest.approx(0.5)


# ---- accumulation -------------------------------------------------------------------------------------------------------


def halves(batch):
    return list(zip(batch[0].chunk(2), batch[1].chunk(2), strict=True))


@pytest.mark.parametrize("clears", [True, False])
def test_micro_accumulation_is_m_sharpness(clears):
    model, (batch,) = mlp(dtype=torch.float64), batches(1, dtype=torch.float64)
    loss, expected = sam_gradient(cross_entropy, model, batch, rho=0.3, m=4)
    optimizer = sam_of(model, lr=0.0, rho=0.3)
    closures = []
    for part in halves(batch):

        def closure(part=part):
            if clears:
                optimizer.zero_grad()
            part_loss = cross_entropy(model, part) / 2
            part_loss.backward()
            return part_loss

        closures.append(closure)
    returned = optimizer.step(closures)
    torch.testing.assert_close(flat([p.grad for p in model.parameters()]), flat(expected), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(returned, loss)


def test_global_accumulation_is_sam_of_the_whole_batch():
    model, other = mlp(dtype=torch.float64), mlp(dtype=torch.float64)
    one = sam_of(model, rho=0.3, accumulate="global", base_settings={"momentum": 0.9})
    two = sam_of(other, rho=0.3, base_settings={"momentum": 0.9})
    for batch in batches(3, dtype=torch.float64):
        a = one.step([closure_of(one, model, part, 0.5) for part in halves(batch)])
        b = two.step(closure_of(two, other, batch))
        torch.testing.assert_close(a, b)
    assert farthest(model, other) < 1e-12


@pytest.mark.parametrize("accumulate", ["micro", "global"])
def test_statistics_of_accumulated_steps_are_those_of_all_closures(accumulate):
    model, (batch,) = mlp(), batches(1)
    optimizer = sam_of(model, accumulate=accumulate)
    loss = optimizer.step([closure_of(optimizer, model, part, 0.5) for part in halves(batch)])
    torch.testing.assert_close(optimizer.last.loss, loss)


@pytest.mark.parametrize("accumulate", ["micro", "global"])
def test_accumulation_with_batch_norm_and_dropout_keeps_the_first_passes_buffers(accumulate):
    model, other = mlp(norm=True, dropout=0.3), mlp(norm=True, dropout=0.3)
    (batch,) = batches(1)
    optimizer = sam_of(model, accumulate=accumulate)
    torch.manual_seed(3)
    optimizer.step([closure_of(optimizer, model, part, 0.5) for part in halves(batch)])
    after = torch.get_rng_state()
    torch.manual_seed(3)
    for part in halves(batch):
        cross_entropy(other, part)
    assert same(list(model.buffers()), list(other.buffers()))
    assert torch.equal(after, torch.get_rng_state())


def test_rho_zero_accumulates_like_the_base():
    model, other = mlp(), mlp()
    (batch,) = batches(1)
    optimizer = sam_of(model, rho=0.0)
    optimizer.step([closure_of(optimizer, model, part, 0.5) for part in halves(batch)])
    base = SGD(other.parameters(), lr=0.1)
    for part in halves(batch):
        (0.5 * cross_entropy(other, part)).backward()
    base.step()
    assert same(snapshot(model), snapshot(other))


def test_training_equals_a_loop_by_hand():
    model, other, data = mlp(dtype=torch.float64), mlp(dtype=torch.float64), batches(5, dtype=torch.float64)
    train(sam_of(model, rho=0.3, base_settings={"momentum": 0.9}), model, data)
    train_by_hand(other, [[batch] for batch in data], rho=0.3, lr=0.1, momentum=0.9)
    assert farthest(model, other) < 1e-10


# ---- defined results ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"p": 1.0}, {"p": 3.0}, {"p": math.inf}, {"adaptive": True}, {"inner_steps": 2}])
def test_zero_gradient_moves_nothing_and_the_base_still_steps(options):
    w = nn.Parameter(torch.ones(2, 2))
    optimizer = SAM(SGD([w], lr=0.1, weight_decay=1.0), rho=0.5, **options)
    points = []

    def closure():
        optimizer.zero_grad()
        points.append(w.detach().clone())
        loss = (0.0 * w).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert all(torch.equal(p, torch.ones(2, 2)) for p in points)
    torch.testing.assert_close(w.detach(), torch.full((2, 2), 0.9))
    assert not optimizer.last.skipped


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize(
    "options", [{}, {"p": 1.0}, {"p": 3.0}, {"p": math.inf}, {"adaptive": True}, {"inner_steps": 3}, {"foreach": False}]
)
def test_non_finite_gradient_never_reaches_the_weights(bad, options):
    w = nn.Parameter(torch.ones(2, 2))
    optimizer = SAM(SGD([w], lr=0.1), rho=0.5, **options)
    points = []

    def closure():
        optimizer.zero_grad()
        points.append(w.detach().clone())
        loss = w.sum()
        loss.backward()
        if len(points) == 1:
            w.grad[0, 1] = bad
        return loss

    optimizer.step(closure)
    assert torch.equal(points[1], torch.ones(2, 2))
    assert optimizer.last.skipped
    assert torch.isfinite(w).all()


def test_frozen_parameters_and_empty_groups_are_untouched():
    model, (batch,) = mlp(), batches(1)
    model[0].requires_grad_(False)
    kept = model[0].weight.detach().clone()
    base = SGD([{"params": []}, {"params": list(model.parameters())}], lr=0.1)
    optimizer = SAM(base, rho=0.3)
    optimizer.step(closure_of(optimizer, model, batch))
    assert torch.equal(model[0].weight, kept)
    assert model[0].weight.grad is None


def test_low_precision_weights_warn_once():
    model = mlp(dtype=torch.bfloat16)
    optimizer = sam_of(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(optimizer, model, batches(3, dtype=torch.bfloat16))
    assert [w.category for w in caught] == [OutlastWarning]
    assert "autocast" in str(caught[0].message)


# ---- GradScaler ---------------------------------------------------------------------------------------------------------


def scaled_step(scaler, optimizer, model, batch, *, blow_up=False):
    optimizer.zero_grad()
    with optimizer.first_pass():
        scaler.scale(cross_entropy(model, batch)).backward()
    if blow_up:
        model[0].weight.grad[0, 0] = math.inf
    optimizer.ascend()
    scaler.scale(cross_entropy(model, batch)).backward()
    if blow_up:
        model[0].weight.grad[0, 0] = math.inf
    optimizer.restore()
    scaler.unscale_(optimizer.base)
    scaler.step(optimizer.base)
    scaler.update()


@pytest.mark.parametrize("options", [{}, {"adaptive": True}])
def test_grad_scaler_trains_like_plain_and_skips_an_overflow(options):
    model, other, data = mlp(), mlp(), batches(4)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    optimizer = sam_of(model, rho=0.3, base_settings={"momentum": 0.9}, **options)
    reference = sam_of(other, rho=0.3, base_settings={"momentum": 0.9}, **options)
    before = snapshot(model)
    scaled_step(scaler, optimizer, model, data[0], blow_up=True)
    assert same(before, snapshot(model))
    assert optimizer.last.skipped
    assert scaler.get_scale() == 2.0**15
    for batch in data:
        scaled_step(scaler, optimizer, model, batch)
    train(reference, other, data)
    assert farthest(model, other) < 1e-6


def test_grad_scaler_with_looksam_equals_plain_looksam():
    model, other, data = mlp(), mlp(), batches(6)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    options = {"every": 2, "reuse": "looksam", "rho": 0.3}
    optimizer, reference = sam_of(model, **options), sam_of(other, **options)
    for step, batch in enumerate(data):
        if optimizer.due:
            scaled_step(scaler, optimizer, model, batch, blow_up=step == 2)
        else:
            optimizer.zero_grad()
            scaler.scale(cross_entropy(model, batch)).backward()
            scaler.step(optimizer.base)
            scaler.update()
    train(reference, other, [data[i] for i in (0, 1, 3)])
    for batch in data[4:]:
        reference.step(closure_of(reference, other, batch))
    assert optimizer.state_dict()["outlast_sam"]["t"] == 5
    assert farthest(model, other) < 1e-5


def test_fused_base_inside_a_scaler_refuses_closures():
    model, (batch,) = mlp(), batches(1)
    optimizer = sam_of(model, base_settings={"fused": True})
    optimizer.base.grad_scale = torch.tensor(2.0)
    with pytest.raises(UnsupportedError, match="two-call"):
        optimizer.step(closure_of(optimizer, model, batch))


# ---- bad input ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"rho": -0.1},
        {"rho": math.inf},
        {"rho": math.nan},
        {"p": 0.5},
        {"p": math.nan},
        {"eta": -1.0},
        {"eta": math.nan},
        {"every": 0},
        {"perturb_fraction": 0.0},
        {"perturb_fraction": 1.5},
        {"inner_steps": 0},
        {"inner_steps": 2, "p": 3.0},
        {"reuse": "looksam", "every": 2, "inner_steps": 2},
        {"reuse": "looksam"},
        {"reuse": "no"},
        {"perturb": "some"},
        {"perturb": "norm"},
        {"perturb": "no_norm"},
        {"buffers": "keep"},
        {"sync": "none"},
        {"accumulate": "all"},
    ],
    ids=str,
)
def test_value_out_of_range_is_refused_by_name_and_leaves_the_base_alone(options):
    base = SGD(mlp().parameters(), lr=0.1)
    with pytest.raises(ValueError) as caught:
        SAM(base, **options)
    assert next(iter(options)) in str(caught.value)
    assert "rho" not in base.param_groups[0]


@pytest.mark.parametrize("options", [{"rho": "0.1"}, {"rho": True}, {"p": "2"}, {"every": 1.5}, {"inner_steps": None}], ids=str)
def test_value_of_the_wrong_type_is_refused(options):
    with pytest.raises(TypeError, match=next(iter(options))):
        sam_of(mlp(), **options)


@pytest.mark.parametrize("name", ["rho", "eta"])
def test_bad_value_in_a_group_is_refused(name):
    with pytest.raises(ValueError, match=name):
        SAM(SGD([{"params": [nn.Parameter(torch.ones(1))], name: -1.0}], lr=0.1))


def test_base_that_is_a_class_or_no_optimizer_is_refused():
    with pytest.raises(TypeError, match=r"build it first: SAM\(torch.optim.SGD"):
        SAM(SGD)
    with pytest.raises(TypeError, match="list"):
        SAM(list(mlp().parameters()))


@pytest.mark.parametrize("base", [torch.optim.LBFGS, torch.optim.Adadelta])
def test_bases_without_meaning_are_refused(base):
    with pytest.raises(UnsupportedError, match=base.__name__):
        SAM(base(mlp().parameters()))


def test_sam_around_sam_is_refused():
    with pytest.raises(UnsupportedError):
        SAM(sam_of(mlp()))


def test_sparse_gradients_are_refused_before_anything_moves():
    embed = nn.Embedding(4, 2, sparse=True)
    before = embed.weight.detach().clone()
    optimizer = SAM(SGD(embed.parameters(), lr=0.1))

    def closure():
        optimizer.zero_grad()
        loss = embed(torch.tensor([1])).sum()
        loss.backward()
        return loss

    with pytest.raises(TypeError, match="sparse"):
        optimizer.step(closure)
    assert torch.equal(embed.weight, before)
    optimizer.state_dict()


def test_complex_gradients_are_refused():
    w = nn.Parameter(torch.ones(2, dtype=torch.complex64))
    optimizer = SAM(SGD([w], lr=0.1))
    w.grad = torch.ones_like(w)
    with pytest.raises(TypeError, match="complex"):
        optimizer.ascend()


def test_calls_in_an_order_without_meaning_are_refused():
    model, (batch,) = mlp(), batches(1)
    optimizer = SAM(SGD(model.parameters(), lr=0.1), model)
    with pytest.raises(StateError, match="bf16-mixed"):
        optimizer.step()
    with pytest.raises(StateError, match="backward"):
        optimizer.ascend()
    cross_entropy(model, batch).backward()
    optimizer.ascend()
    with pytest.raises(StateError, match="restore"):
        optimizer.ascend()
    with pytest.raises(StateError, match="restore"):
        optimizer.state_dict()
    with pytest.raises(StateError, match="restore"):
        optimizer.step(closure_of(optimizer, model, batch))
    optimizer.restore()


def test_one_ascent_allows_one_step():
    model, (batch,) = mlp(), batches(1)
    optimizer = SAM(SGD(model.parameters(), lr=0.1), model)
    cross_entropy(model, batch).backward()
    with optimizer.perturbed():
        cross_entropy(model, batch).backward()
    optimizer.step()
    with pytest.raises(StateError):
        optimizer.step()


@pytest.mark.parametrize("in_pass", [1, 2])
def test_closure_without_backward_is_refused(in_pass):
    model, (batch,) = mlp(), batches(1)
    optimizer = sam_of(model, rho=0.5)
    before, calls = snapshot(model), []

    def closure():
        calls.append(1)
        optimizer.zero_grad()
        loss = cross_entropy(model, batch)
        if len(calls) != in_pass:
            loss.backward()
        return loss

    with pytest.raises(StateError, match="backward"):
        optimizer.step(closure)
    assert same(before, snapshot(model))


def test_gradients_accumulated_before_the_step_are_not_lost_silently():
    model, (one, two) = mlp(), batches(2)
    optimizer = sam_of(model)
    optimizer.zero_grad()
    cross_entropy(model, one).backward()

    def closure():
        loss = cross_entropy(model, two)
        loss.backward()
        return loss

    with pytest.raises(StateError, match="accumulate"):
        optimizer.step(closure)


def test_empty_sequence_of_closures_is_refused():
    with pytest.raises(ValueError, match="closures"):
        sam_of(mlp()).step([])


def test_closure_that_returns_nothing_is_named():
    w = nn.Parameter(torch.ones(2))
    optimizer = SAM(SGD([w], lr=0.1))

    def closure():
        quadratic(torch.eye(2), w)()

    with pytest.raises((TypeError, StateError), match="return"):
        optimizer.step(closure)


def test_repr_says_what_it_is():
    text = repr(sam_of(mlp(), rho=0.2, every=4))
    assert text == "SAM(SGD, rho=0.2, p=2, adaptive=False, every=4, groups=1)"


def test_modules_outside_the_given_model_have_their_buffers_frozen_too():
    body, head = mlp(), nn.BatchNorm1d(3)
    optimizer = SAM(SGD([*body.parameters(), *head.parameters()], lr=0.1), body)
    optimizer.step(closure_of(optimizer, nn.Sequential(body, head), batches(1)[0]))
    assert head.num_batches_tracked == 1


@pytest.mark.filterwarnings("default")
def test_warning_of_the_model_is_shown_once_as_in_plain_training():
    model, data = mlp(), batches(5)
    model[1].register_forward_hook(lambda *_: warnings.warn("from the model", UserWarning, stacklevel=1))
    optimizer, shown = sam_of(model), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(warnings, "showwarning", lambda *_, **__: shown.append(1))
        patch.setattr(warnings, "_showwarnmsg_impl", lambda *_: shown.append(1))
        train(optimizer, model, data)
    assert len(shown) == 1


def test_gradients_that_the_last_step_left_are_spent_also_where_the_closure_keeps_them():
    model, other = mlp(), mlp()
    optimizer, reference = sam_of(model), sam_of(other)

    def keeping(batch):
        def closure():
            loss = cross_entropy(model, batch)
            loss.backward()
            return loss

        return closure

    for batch in batches(3):
        optimizer.step(keeping(batch))
    train(reference, other, batches(3))
    assert same(snapshot(model), snapshot(other))
