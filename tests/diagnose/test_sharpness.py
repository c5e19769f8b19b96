from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from helpers import batches, cross_entropy, flat, gradient, mlp, same, snapshot
from torch import nn
from torch.nn import functional as F

from outlast.diagnose.sharpness import hessian_spectrum, sam_bound, sharpness
from outlast.errors import DivergedError


class Quadratic(nn.Module):
    """0.5 w'Aw for every sample."""

    def __init__(self, A, w):
        super().__init__()
        self.A, self.w = A, nn.Parameter(w)

    def forward(self, x):
        return 0.5 * self.w @ self.A @ self.w * x


def value(model, batch):
    return model(batch).mean()


def spd(size=5):
    root = torch.randn(size, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return root @ root.T


ONES = torch.ones(6, dtype=torch.float64)
W = torch.arange(1.0, 6.0, dtype=torch.float64)


# ---- O14 ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rho", [0.0, 0.05, 2.0])
def test_one_step_on_a_quadratic_is_exact(rho):
    A = spd()
    found = sharpness(Quadratic(A, W.clone()), value, ONES, rho=rho)
    g = A @ W
    expected = rho * g.norm() + rho**2 / 2 * (g @ A @ g) / (g @ g)
    assert found.value == pytest.approx(float(expected), rel=1e-9, abs=1e-12)
    assert found.loss == pytest.approx(float(0.5 * W @ A @ W))
    assert found.perturbed_loss == pytest.approx(found.loss + found.value)
    assert (found.m, found.rho) == (None, rho)


def test_more_steps_find_the_worst_point_of_a_quadratic():
    A = torch.diag(torch.tensor([1.0, 30.0], dtype=torch.float64))
    model = Quadratic(A, torch.tensor([1.0, 0.01], dtype=torch.float64))
    angles = torch.linspace(0, 2 * math.pi, 20001, dtype=torch.float64)
    points = model.w.detach()[:, None] + 0.5 * torch.stack([angles.cos(), angles.sin()])
    worst = float((0.5 * (points * (A @ points)).sum(0)).max()) - float(model(torch.ones(1)).detach())
    one, many = (sharpness(model, value, ONES, rho=0.5, steps=n).value for n in (1, 400))
    assert one < 0.5 * worst
    assert 0.98 * worst < many <= worst


@pytest.mark.parametrize(("p", "q"), [(1.0, math.inf), (3.0, 1.5), (math.inf, 1.0)])
def test_small_balls_of_other_norms_rise_by_the_dual_norm(p, q):
    A = spd()
    found = sharpness(Quadratic(A, W.clone()), value, ONES, rho=1e-6, p=p)
    assert found.value / 1e-6 == pytest.approx(float(torch.linalg.vector_norm(A @ W, q)), rel=1e-3)


def test_parts_have_their_own_worst_points():
    model, (batch,) = mlp(dtype=torch.float64), batches(1, dtype=torch.float64)
    found = sharpness(model, cross_entropy, batch, rho=0.3, m=3)
    pieces = [(batch[0][s], batch[1][s]) for s in (slice(0, 3), slice(3, 6), slice(6, 8))]
    alone = [sharpness(model, cross_entropy, piece, rho=0.3) for piece in pieces]
    np.testing.assert_allclose(found.per_part, [one.value for one in alone])
    assert found.value == pytest.approx(np.average(found.per_part, weights=[3, 3, 2]))
    assert found.loss == pytest.approx(float(cross_entropy(model, batch).detach()))
    assert found.value > sharpness(model, cross_entropy, batch, rho=0.3).value
    assert found.m == 3


def test_batches_together_are_one_set_of_data():
    model, (batch,) = mlp(dtype=torch.float64), batches(1, dtype=torch.float64)
    cut = [(batch[0][:5], batch[1][:5]), (batch[0][5:], batch[1][5:])]
    whole, parts = (sharpness(model, cross_entropy, data, rho=0.3, steps=2) for data in (batch, cut))
    assert parts.value == pytest.approx(whole.value, rel=1e-9)
    assert parts.per_part.shape == (1,)


def test_adaptive_ball_ignores_rescaling_of_layers():
    def measured(scale):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8, bias=False), nn.ReLU(), nn.Linear(8, 3, bias=False)).double()
        with torch.no_grad():
            model[0].weight.mul_(scale)
            model[2].weight.div_(scale)
        data = batches(1, dtype=torch.float64)
        return [sharpness(model, cross_entropy, data, rho=0.5, adaptive=a, eta=0.0, steps=3).value for a in (True, False)]

    one, other = measured(1.0), measured(5.0)
    assert one[0] == pytest.approx(other[0], rel=1e-6)
    assert one[1] != pytest.approx(other[1], rel=1e-2)


# ---- O13 ----------------------------------------------------------------------------------------------------------------


def regression(dtype=torch.float64, n=40, size=8):
    rng = torch.Generator().manual_seed(0)
    X = torch.randn(n, size, generator=rng, dtype=torch.float64).to(dtype) * torch.arange(1, size + 1).to(dtype)
    y = torch.randint(0, 2, (n,), generator=rng).to(dtype)
    return nn.Linear(size, 1, bias=False).to(dtype), X, y


def top(matrix, k=5):
    return np.linalg.eigvalsh(matrix.double().numpy())[::-1][:k]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("mode", ["lanczos", "power"])
@pytest.mark.parametrize("cut", [False, True])
def test_linear_regression_has_the_covariance_as_hessian(dtype, mode, cut):
    model, X, y = regression(dtype)
    data = [(X[:13], y[:13]), (X[13:], y[13:])] if cut else (X, y)
    found = hessian_spectrum(
        model, lambda net, b: 0.5 * (net(b[0]).squeeze(1) - b[1]).square().mean(), data, mode=mode, iters=64 if mode == "lanczos" else 150
    )
    expected = top(X.T @ X / len(X))
    np.testing.assert_allclose(found.eigenvalues, expected, rtol=1e-4)
    assert found.ratio_1_5 == pytest.approx(expected[0] / expected[4], rel=1e-3)
    assert (found.residuals < (1e-2 if mode == "power" else 1e-3) * expected[0]).all()


def test_logistic_regression_at_zero():
    model, X, y = regression()
    nn.init.zeros_(model.weight)
    found = hessian_spectrum(model, lambda net, b: F.binary_cross_entropy_with_logits(net(b[0]).squeeze(1), b[1]), (X, y))
    np.testing.assert_allclose(found.eigenvalues, top(X.T @ X / (4 * len(X))), rtol=1e-4)


def test_diagonal_quadratic_is_exact_with_negative_and_repeated_eigenvalues():
    diagonal = torch.tensor([7.0, 3.0, 3.0, 1e-3, -2.0, -9.0], dtype=torch.float64)
    found = hessian_spectrum(Quadratic(torch.diag(diagonal), torch.ones(6, dtype=torch.float64)), value, ONES, k=6)
    np.testing.assert_allclose(found.eigenvalues, diagonal.numpy(), rtol=1e-9)
    np.testing.assert_allclose(found.residuals, 0, atol=1e-8)
    assert found.trace == pytest.approx(float(diagonal.sum()))  # signs squared are 1: exact for a diagonal
    assert found.trace_stderr == pytest.approx(0, abs=1e-9)


def test_power_iteration_finds_the_largest_by_magnitude():
    diagonal = torch.tensor([7.0, 3.0, 1.0, -9.0], dtype=torch.float64)
    found = hessian_spectrum(Quadratic(torch.diag(diagonal), torch.ones(4, dtype=torch.float64)), value, ONES, k=2, mode="power", iters=200)
    np.testing.assert_allclose(found.eigenvalues, [7.0, -9.0], rtol=1e-6)
    assert found.density.shape == (2, 0)
    assert math.isnan(found.ratio_1_5)


def test_density_is_a_distribution_with_the_traces_mean():
    A = spd(40)
    found = hessian_spectrum(Quadratic(A, torch.ones(40, dtype=torch.float64)), value, ONES, iters=20, probes=200)
    nodes, weights = found.density
    assert nodes.shape == (20,)
    assert weights.sum() == pytest.approx(1.0)
    assert (weights >= 0).all()
    assert nodes.max() <= top(A)[0] * (1 + 1e-9)
    assert abs(found.trace - float(A.trace())) < 4 * found.trace_stderr
    assert 0 < found.trace_stderr < 0.1 * float(A.trace())


def test_lanczos_equals_the_dense_hessian_of_a_network():
    model, (batch,) = mlp(norm=True, dtype=torch.float64).eval(), batches(1, dtype=torch.float64)
    parameters = list(model.parameters())
    grads = torch.autograd.grad(cross_entropy(model, batch), parameters, create_graph=True)
    entries = torch.cat([g.reshape(-1) for g in grads])
    rows = [torch.autograd.grad(e, parameters, retain_graph=True, materialize_grads=True) for e in entries]
    dense = torch.stack([flat(row) for row in rows])
    found = hessian_spectrum(model, cross_entropy, batch, iters=83)
    np.testing.assert_allclose(found.eigenvalues, top(dense), rtol=1e-6)


def test_seed_decides_and_the_global_generator_is_left_alone():
    model, X, y = regression()

    def run(seed):
        return hessian_spectrum(model, lambda net, b: (net(b[0]).squeeze(1) - b[1]).square().mean(), (X, y), seed=seed, iters=6)

    state = torch.get_rng_state()
    assert run(1).trace == run(1).trace != run(2).trace
    assert torch.equal(state, torch.get_rng_state())


def test_linear_loss_has_a_zero_hessian():
    model, X, y = regression()
    found = hessian_spectrum(model, lambda net, b: net(b[0]).mean(), (X, y), k=2)
    np.testing.assert_array_equal(found.eigenvalues, [0, 0])


# ---- O15 ----------------------------------------------------------------------------------------------------------------

BOUND = {"perturbed_loss": 0.1, "w_norm_sq": 50.0, "k": 1000, "n": 50_000, "rho": 0.05, "delta": 0.05}


def test_bound_is_the_formula():
    k, n = 1000, 50_000
    inside = k * math.log(1 + 50 / 0.05**2 * (1 + math.sqrt(math.log(n) / k)) ** 2) + 4 * math.log(n / 0.05) + 8 * math.log(6 * n + 3 * k)
    assert sam_bound(**BOUND) == pytest.approx(0.1 + math.sqrt(inside / (n - 1)), rel=1e-12)


@pytest.mark.parametrize(
    ("name", "values", "sign"), [("rho", [0.01, 0.05, 0.5], -1), ("k", [10, 1000, 10**6], 1), ("n", [10**4, 10**6], -1)]
)
def test_bound_falls_with_the_radius_and_grows_with_the_weights(name, values, sign):
    bounds = [sam_bound(**{**BOUND, name: v}) for v in values]
    assert bounds == sorted(bounds, reverse=sign < 0)
    assert len(set(bounds)) == len(bounds)


@pytest.mark.parametrize(
    "bad",
    [
        {"perturbed_loss": -0.1},
        {"perturbed_loss": 1.1},
        {"w_norm_sq": -1.0},
        {"k": 0},
        {"n": 1},
        {"rho": 0.0},
        {"delta": 0.0},
        {"delta": 2.0},
    ],
    ids=str,
)
def test_bound_refuses_values_out_of_range(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        sam_bound(**{**BOUND, **bad})


# ---- unchanged model, results, bad input --------------------------------------------------------------------------------

MEASURES = {
    "sharpness": lambda model, data: sharpness(model, cross_entropy, data, rho=0.5, m=4, steps=2, adaptive=True),
    "lanczos": lambda model, data: hessian_spectrum(model, cross_entropy, data, k=2, iters=5),
    "power": lambda model, data: hessian_spectrum(model, cross_entropy, data, k=2, iters=5, mode="power"),
}


@pytest.mark.parametrize("measure", MEASURES)
def test_model_is_as_before(measure):
    model, data = mlp(norm=True, dropout=0.5), batches(2)
    model[1].eval()
    model[0].weight.grad = torch.ones_like(model[0].weight)
    before, modes = snapshot(model), [m.training for m in model.modules()]
    with torch.no_grad():
        MEASURES[measure](model, data)
    assert same(before, snapshot(model))
    assert modes == [m.training for m in model.modules()]
    assert [p.grad is None for p in model.parameters()] == [False, *[True] * 5]
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("at", [1, 2])
def test_model_is_as_before_when_the_loss_raises(at):
    model, (batch,) = mlp(norm=True), batches(1)
    before, calls = snapshot(model), []

    def loss_fn(net, data):
        calls.append(1)
        if len(calls) == at:
            raise ZeroDivisionError
        return cross_entropy(net, data)

    with pytest.raises(ZeroDivisionError):
        sharpness(model, loss_fn, batch)
    assert same(before, snapshot(model))
    assert model.training


def test_frozen_weights_are_not_part_of_the_measurement():
    model, (batch,) = mlp(dtype=torch.float64), batches(1, dtype=torch.float64)
    model[0].requires_grad_(False)
    found = sharpness(model, cross_entropy, batch, rho=1e-6)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert found.value / 1e-6 == pytest.approx(float(flat(gradient(cross_entropy(model, batch), trained)).norm()), rel=1e-3)
    with pytest.raises(ValueError, match="k must be at most the model's 27"):
        hessian_spectrum(model, cross_entropy, batch, k=28)


@pytest.mark.parametrize("measure", MEASURES)
def test_results_are_json_short_text_and_a_plot(measure):
    from matplotlib import pyplot

    result = MEASURES[measure](mlp(), batches(2))
    entries = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert entries["kind"] == type(result).__name__
    assert entries["version"] == 1
    assert len(repr(result)) < 250
    axes = result.plot()
    assert axes.get_xlabel()
    assert result.plot(axes) is axes
    pyplot.close(axes.figure)
    with pytest.raises(AttributeError):
        result.rho = 1.0


@pytest.mark.parametrize(
    "bad",
    [{"rho": -1.0}, {"rho": math.nan}, {"p": 0.5}, {"m": 0}, {"m": 9}, {"steps": 0}, {"steps": 2, "p": 3.0}, {"eta": -1.0}],
    ids=str,
)
def test_sharpness_refuses_values_out_of_range(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        sharpness(mlp(), cross_entropy, batches(1)[0], **bad)


@pytest.mark.parametrize("bad", [{"k": 0}, {"k": 68}, {"iters": 0}, {"seed": -1}, {"mode": "qr"}, {"probes": 1}], ids=str)
def test_spectrum_refuses_values_out_of_range(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        hessian_spectrum(mlp(), cross_entropy, batches(1)[0], **bad)


@pytest.mark.parametrize("measure", MEASURES)
def test_no_data_and_no_weights_are_refused(measure):
    with pytest.raises(ValueError, match="no batches"):
        MEASURES[measure](mlp(), [])
    with pytest.raises(TypeError, match="iterable"):
        MEASURES[measure](mlp(), 3)
    with pytest.raises(ValueError, match="requires_grad"):
        MEASURES[measure](mlp().requires_grad_(False), batches(1))


@pytest.mark.parametrize("measure", MEASURES)
def test_loss_that_is_not_finite_is_named(measure):
    model = mlp()
    nn.init.constant_(model[2].bias, math.nan)
    before = snapshot(model)
    with pytest.raises(DivergedError, match="finite"):
        MEASURES[measure](model, batches(2))
    assert model.training
    assert all(torch.equal(a.nan_to_num(7), b.nan_to_num(7)) for a, b in zip(before, snapshot(model), strict=True))
