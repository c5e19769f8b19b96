"""Moments, exact loss, regularisers and bounds of mixup, against closed forms and direct formulas."""

from __future__ import annotations

import json
import math
from itertools import pairwise

import pytest
import torch
from helpers import drawn, rng
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from outlast.diagnose.mixup_theory import (
    adversarial_bound,
    adversarial_loss_logistic,
    adversarial_loss_quadratic,
    beta_moments,
    exact_mixup_loss,
    gauss_jacobi,
    glm_penalty,
    mixup_penalty,
    mixup_terms,
    rademacher_bound_glm,
    rademacher_bound_two_layer,
    retentivity,
    sample_lambda,
)
from outlast.diagnose.robustness import fgsm
from outlast.errors import OutlastWarning

FORMS = ("mixed", "label_preserving")


def logistic(n=40, d=6, *, seed=0, scale=1.0):
    """Data with labels of a linear model, and that model at logits of about ``scale``."""
    stream = rng(seed)
    X = torch.randn(n, d, generator=stream, dtype=torch.float64)
    theta = torch.randn(d, generator=stream, dtype=torch.float64)
    theta = theta / (X @ theta).std()
    y = (torch.rand(n, generator=stream, dtype=torch.float64) < torch.sigmoid(2 * X @ theta)).long()
    return theta * scale, X, y


def net(*widths, activation=nn.Tanh, bias=True, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers = []
        for before, after in pairwise(widths):
            layers += [nn.Linear(before, after, bias=bias), activation()]
        return nn.Sequential(*layers[:-1]).double()


# ---- O1 -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("alpha", "m1", "ratio"), [(0.2, 1 / 7, math.inf), (1, 1 / 3, math.inf), (2, 0.4, 3.0), (8, 8 / 17, 9 / 7)])
def test_moments_of_the_table(alpha, m1, ratio):
    found = beta_moments(alpha)
    assert found.m1 == pytest.approx(m1, rel=1e-12)
    assert found.m2 == pytest.approx(m1 / 2, rel=1e-12)
    assert found.ratio == pytest.approx(ratio, rel=1e-12)
    assert json.dumps(found.to_dict())


@given(a=st.floats(0.05, 30), b=st.floats(0.05, 30))
@settings(max_examples=50, deadline=None)
def test_quadrature_has_the_moments_of_the_law(a, b):
    lam, weight = gauss_jacobi(a, b, 16)
    total = a + b
    assert float((weight * lam).sum()) == pytest.approx(a / total, abs=1e-12)
    assert float((weight * lam**2).sum()) == pytest.approx(a * (a + 1) / (total * (total + 1)), abs=1e-12)
    assert float((weight * lam**5).sum()) == pytest.approx(math.prod((a + k) / (total + k) for k in range(5)), abs=1e-11)
    found = beta_moments(a, b)
    assert found.m2 == pytest.approx(found.m1 / 2)
    assert found.m2 == pytest.approx(float((weight * lam * (1 - lam)).sum()), abs=1e-12)
    if min(a, b) > 1.05:
        one, two = gauss_jacobi(a + 1, b, 400), gauss_jacobi(b + 1, a, 400)
        ratio = [float((w * ((1 - x) / x) ** 2).sum()) for x, w in (one, two)]
        if min(a, b) > 2.5:  # the integrand is singular, so that quadrature converges slowly below
            assert found.ratio == pytest.approx(a / total * ratio[0] + b / total * ratio[1], rel=1e-2)


def test_law_that_keeps_labels_is_sampled_as_its_moments_say():
    away = 1 - sample_lambda(3.0, 2.5, (400_000,), law="tilde", generator=rng())
    found = beta_moments(3.0, 2.5)
    ratio = (away / (1 - away)).square()
    for measured, expected in ((away, found.m1), (away.square(), found.m2), (ratio, found.ratio)):
        assert abs(float(measured.mean()) - expected) < 5 * float(measured.std()) / math.sqrt(400_000)


# ---- O2: exact loss --------------------------------------------------------------------------------------------------------


def brute(f, X, y, a, b, loss, nodes=64):
    lam, weight = gauss_jacobi(a, b, nodes)
    total = 0.0
    for share, mass in zip(lam.tolist(), weight.tolist(), strict=True):
        for i in range(len(X)):
            x = share * X[i] + (1 - share) * X
            target = share * y[i] + (1 - share) * y
            total += mass * float(loss(f(x), target).mean().detach()) / len(X)
    return total


@pytest.mark.parametrize(("a", "b"), [(0.2, None), (1.0, None), (4.0, None), (0.5, 2.0), (1e-3, None)])
@pytest.mark.parametrize("form", FORMS)
def test_both_forms_are_the_expectation_over_pairs(a, b, form):
    theta, X, y = logistic(15)
    linear = nn.Linear(6, 1, bias=True).double()
    deep, three = net(6, 5, 1), net(6, 5, 3)
    one_hot = F.one_hot(y + (X[:, 0] > 0), 3).double()

    def bce(u, t):
        return F.softplus(u.flatten(), threshold=100) - t * u.flatten()

    def ce(u, t):
        return u.logsumexp(1) - (t * u).sum(1)

    options = {"beta": b, "form": form}
    second = a if b is None else b
    for f in (theta, linear, deep):
        call = (lambda x, w=f: x @ w) if f is theta else f
        found = exact_mixup_loss(f, X, y, a, **options).detach()
        assert float(found) == pytest.approx(brute(call, X, y.double(), a, second, bce), abs=1e-12)
    for f in (three, nn.Linear(6, 3).double()):
        found = float(exact_mixup_loss(f, X, one_hot, a, loss="ce", **options).detach())
        assert found == pytest.approx(brute(f, X, one_hot, a, second, ce), abs=1e-12)
        assert found == pytest.approx(
            float(exact_mixup_loss(f, X, one_hot.argmax(1), a, loss="ce", chunk=7, **options).detach()), abs=1e-12
        )
    counts = torch.poisson(torch.ones(15, dtype=torch.float64), generator=rng())
    found = float(exact_mixup_loss(deep, X, counts, a, loss="glm", log_partition=torch.exp, **options).detach())
    assert found == pytest.approx(brute(deep, X, counts, a, second, lambda u, t: u.flatten().exp() - t * u.flatten()), abs=1e-12)


def test_linear_path_equals_the_general_one_also_in_gradient():
    _, X, y = logistic(30)
    linear = nn.Linear(6, 1).double()
    values, grads = [], []
    for f in (linear, lambda x: linear(x)):
        value = exact_mixup_loss(f, X, y, 0.7, nodes=16)
        values.append(value.detach())
        grads.append(torch.cat([g.flatten() for g in torch.autograd.grad(value, list(linear.parameters()))]))
    torch.testing.assert_close(*values, rtol=0, atol=1e-13)
    torch.testing.assert_close(*grads, rtol=0, atol=1e-12)
    step = 1e-6
    with torch.no_grad():
        linear.weight[0, 2] += step
        moved = exact_mixup_loss(linear, X, y, 0.7, nodes=16)
    assert float((moved - values[0]) / step) == pytest.approx(float(grads[0][2]), abs=1e-5)


def test_random_pairs_are_near_all_pairs():
    theta, X, y = logistic(60)
    whole = float(exact_mixup_loss(theta, X, y, 1.0))
    values = [float(exact_mixup_loss(theta, X, y, 1.0, pairs=5, nodes=8, generator=rng(s))) for s in range(40)]
    error = torch.tensor(values).std() / math.sqrt(40)
    assert abs(sum(values) / 40 - whole) < 4 * float(error)


def test_images_and_modes_of_modules():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(), nn.Dropout(), nn.Linear(8, 3))
    model.train()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    X, y = torch.randn(6, 1, 4, 4, generator=rng()), torch.tensor([0, 1, 2, 0, 1, 2])
    value = exact_mixup_loss(model, X, y, 1.0, loss="ce", nodes=4)
    assert value.dtype == torch.float64
    mixup_terms(model, X, y, 1.0, loss="ce")
    mixup_penalty(model, X, y, 1.0, loss="ce").backward()
    assert all(module.training for module in model.modules())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert model[0].weight.grad is not None


# ---- O3 to O6: terms -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("a", "b"), [(0.3, None), (1.0, None), (2.0, 0.7)])
def test_expansion_is_exact_for_linear_models_under_squared_loss(a, b):
    theta, X, _ = logistic()
    y = torch.randn(40, generator=rng(5), dtype=torch.float64)
    for f in (theta, lambda x: x @ theta):
        found = mixup_terms(f, X, y, a, beta=b, loss="mse", exact=True)
        assert found.approx == pytest.approx(found.exact, rel=1e-10)
        assert found.R3 == 0.0
        assert found.rel_error < 1e-9


@pytest.mark.parametrize("alpha", [0.2, 1.0, 4.0])
def test_expansion_describes_models_of_little_confidence(alpha):
    errors = []
    for scale in (0.3, 0.15, 0.075):
        theta, X, y = logistic(80, 10, scale=scale)
        errors.append(mixup_terms(theta, X, y, alpha, loss="bce", exact=True).rel_error)
    assert errors[0] < 0.01
    assert errors[0] / errors[1] > 3.5
    assert errors[1] / errors[2] > 3.8
    theta, X, y = logistic(80, 10, scale=10.0)
    wrong = mixup_terms(theta, X, 1 - y, alpha, loss="bce", exact=True)
    assert wrong.R1 < 0.0
    assert wrong.rel_error > 0.1


def test_terms_of_a_network_are_the_direct_formulas():
    X = torch.randn(12, 4, generator=rng(), dtype=torch.float64)
    y = torch.randint(0, 3, (12,), generator=rng(1))
    f = net(4, 6, 3)
    found = mixup_terms(f, X, y, 0.8, loss="ce")
    moments = beta_moments(0.8)
    mean = X.mean(0)
    covariance = (X - mean).T @ (X - mean) / 12
    R1 = R2 = R3 = 0.0
    for x, label in zip(X, y, strict=True):
        J = torch.autograd.functional.jacobian(f, x)
        p = f(x).softmax(0).detach()
        residual = p - F.one_hot(label, 3)
        sigma = covariance + torch.outer(mean - x, mean - x)
        R1 += float(moments.m1 * residual @ J @ (mean - x)) / 12
        R2 += float(moments.m2 / 2 * torch.trace(J @ sigma @ J.T @ (torch.diag(p) - torch.outer(p, p)))) / 12
        for c in range(3):
            H = torch.autograd.functional.hessian(lambda z, c=c: f(z)[c], x)
            R3 += float(moments.m2 / 2 * residual[c] * torch.trace(H @ sigma)) / 12
    for name, expected in (("R1", R1), ("R2", R2), ("R3", R3)):
        assert getattr(found, name) == pytest.approx(expected, rel=1e-8)
    assert found.approx == pytest.approx(found.standard + R1 + R2 + R3)
    assert found.exact is None
    assert found.stderr == {"R1": 0.0, "R2": 0.0, "R3": 0.0, "sum": 0.0}


def test_random_pairs_are_unbiased_and_know_their_error():
    X = torch.randn(20, 4, generator=rng(), dtype=torch.float64)
    y = torch.randint(0, 2, (20,), generator=rng(1))
    f = net(4, 5, 1)
    whole = mixup_terms(f, X, y, 1.0, loss="bce")
    draws = [mixup_terms(f, X, y, 1.0, loss="bce", pairs=1, generator=rng(seed)) for seed in range(300)]
    for name in ("R1", "R2", "R3"):
        values = torch.tensor([getattr(draw, name) for draw in draws], dtype=torch.float64)
        assert abs(float(values.mean()) - getattr(whole, name)) < 4 * float(values.std()) / math.sqrt(300) + 1e-12
    claimed = torch.tensor([draw.stderr["R2"] for draw in draws]).mean()
    assert 0.9 < float(claimed / torch.tensor([draw.R2 for draw in draws]).std()) < 1.6
    same = mixup_terms(f, X, y, 1.0, loss="bce", pairs=3, exact=True, generator=rng(7))
    assert same.exact is not None  # over the same pairs, so that the error is that of the expansion
    assert same.rel_error < 3 * mixup_terms(f, X, y, 1.0, loss="bce", exact=True).rel_error + 0.2


def test_penalty_is_the_terms_and_its_gradient_is_right():
    X = torch.randn(10, 4, generator=rng(), dtype=torch.float64)
    y = torch.randint(0, 3, (10,), generator=rng(1))
    f = net(4, 5, 3)
    value = mixup_penalty(f, X, y, 1.0, loss="ce", pairs=4, generator=rng(2))
    terms = mixup_terms(f, X, y, 1.0, loss="ce", pairs=4, generator=rng(2))
    assert float(value.detach()) == pytest.approx(terms.approx - terms.standard)
    grads = torch.autograd.grad(value, list(f.parameters()))
    step = 1e-5
    for parameter, grad in zip(f.parameters(), grads, strict=True):
        flat = parameter.data.flatten()
        sides = []
        for sign in (1, -1):
            flat[1] += sign * step
            sides.append(float(mixup_penalty(f, X, y, 1.0, loss="ce", pairs=4, generator=rng(2)).detach()))
            flat[1] -= sign * step
        assert (sides[0] - sides[1]) / (2 * step) == pytest.approx(float(grad.flatten()[1]), abs=1e-7, rel=1e-5)
    assert mixup_penalty(net(4, 5, 3).float(), X.float(), y, 1.0, loss="ce").dtype == torch.float32


# ---- O7, O8: attacks -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["linear", "relu"])
def test_bound_is_never_violated_on_models_that_meet_its_conditions(kind):
    for seed in range(200):
        stream = rng(seed)
        X = torch.randn(12, 5, generator=stream, dtype=torch.float64)
        X = X - X.mean(0)
        f = (
            torch.randn(5, generator=stream, dtype=torch.float64)
            if kind == "linear"
            else net(5, 7, 1, activation=nn.ReLU, bias=False, seed=seed)
        )
        out = X @ f if kind == "linear" else f(X).detach()[:, 0]
        y = (out >= 0).long()
        found = adversarial_bound(f, X, y, (0.2, 1.0, 4.0)[seed % 3])
        assert found.holds, found
        assert found.violations == {}
        assert found.mixup_quadratic >= found.adv_own - 1e-12
        assert found.adv_own >= found.adv_i - 1e-12 >= found.adv_mix - 2e-12
        assert found.eps_mix == float(found.eps_i.min())
        assert found.eps_i.shape == (12,)
        sure = int(out.abs().argmax())  # some outputs of ReLU networks are 0, which fits both labels
        y[sure] = 1 - y[sure]
        wrong = adversarial_bound(f, X, y, 1.0)
        assert not wrong.holds
        assert wrong.violations["misclassified"] == 1.0


def test_bound_says_why_it_does_not_hold():
    theta, X, y = logistic()
    assert "not centred" in adversarial_bound(theta, X, y, 1.0).violations
    X = X - X.mean(0)
    found = adversarial_bound(net(6, 5, 1), X, y, 1.0)
    assert not found.holds
    assert {"bias", "curvature"} <= set(found.violations)
    X[0] = 0.0
    assert float(adversarial_bound(theta, X, y, 1.0).R[0]) == 0.0
    constant = adversarial_bound(lambda x: x[:, 0] * 0.0, X, y, 1.0)
    assert constant.R.tolist() == [0.0] * len(X)


def test_quadratic_adversarial_loss_is_right_to_third_order():
    theta, X, y = logistic(scale=2.0)
    errors = [
        float(adversarial_loss_quadratic(theta, X, y, eta) - adversarial_loss_logistic(theta, X, y, eta)) for eta in (0.02, 0.04, 0.08)
    ]
    assert 6.0 < errors[1] / errors[0] < 10.0
    assert 6.0 < errors[2] / errors[1] < 10.0
    each = torch.linspace(0, 0.1, 40)
    assert float(adversarial_loss_logistic(theta, X, y, each)) > float(adversarial_loss_logistic(theta, X, y, 0.0))


def test_fgsm_attains_the_worst_loss_of_a_linear_model():
    theta, X, y = logistic()

    class Linear(nn.Module):
        def forward(self, x):
            return x @ theta

    attacked = fgsm(Linear(), X, y.double(), 0.1, loss_fn=F.binary_cross_entropy_with_logits)
    reached = F.binary_cross_entropy_with_logits(attacked @ theta, y.double())
    assert float(reached) == pytest.approx(float(adversarial_loss_logistic(theta, X, y, 0.1, norm=math.inf)), abs=1e-12)


# ---- O15, O16: generalisation -----------------------------------------------------------------------------------------------


def test_penalty_of_generalised_linear_models():
    theta, X, _ = logistic()
    X = X - X.mean(0)
    spread = float((X @ theta).square().mean())
    assert float(glm_penalty(theta, X, 2.0, family="gaussian")) == pytest.approx(0.5 * 3 * spread)
    assert float(glm_penalty(theta, X, 0.5, family="gaussian", moment="plain")) == pytest.approx(0.5 * beta_moments(0.5).m2 * spread)
    assert float(glm_penalty(theta, X, 2.0, family="poisson")) == pytest.approx(1.5 * float((X @ theta).exp().mean()) * spread)
    p = torch.sigmoid(X @ theta)
    assert float(glm_penalty(theta, X, 2.0)) == pytest.approx(1.5 * float((p * (1 - p)).mean()) * spread)
    with pytest.warns(OutlastWarning, match="plain"):
        assert float(glm_penalty(theta, X, 1.0)) == math.inf
    with pytest.warns(OutlastWarning, match="not centred"):
        glm_penalty(theta, X + 1, 2.0)
    with pytest.raises(ValueError, match="theta must be"):
        glm_penalty(theta[:3], X, 2.0)


def test_bounds_grow_and_fall_as_they_should():
    for gamma in (0.01, 0.3, 5.0):
        base = rademacher_bound_glm(gamma, 0.2, 5, 100)
        assert rademacher_bound_glm(2 * gamma, 0.2, 5, 100) > base
        assert rademacher_bound_glm(gamma, 0.2, 10, 100) > base
        assert rademacher_bound_glm(gamma, 0.2, 5, 400) == pytest.approx(base / 2)
        assert rademacher_bound_glm(gamma, 0.2, 5, 100, tight=True) <= base + 1e-12
    assert rademacher_bound_two_layer(1.0, 3, 1.0, 100) == pytest.approx(0.4)
    for call in (
        lambda: rademacher_bound_glm(1.0, 0.6, 5, 10),
        lambda: rademacher_bound_glm(-1.0, 0.2, 5, 10),
        lambda: rademacher_bound_two_layer(1.0, -1, 0.0, 5),
    ):
        with pytest.raises(ValueError, match="must be"):
            call()


def test_complexity_is_bounded_by_the_rank_and_not_the_dimension():
    """The empirical complexity of the class, computed exactly, of data of rank 3 in 50 dimensions."""
    low = torch.randn(400, 3, generator=rng(), dtype=torch.float64) @ torch.randn(3, 50, generator=rng(1), dtype=torch.float64)
    X = low - low.mean(0)
    rank = int(torch.linalg.matrix_rank(X.T @ X / 400))
    assert rank == 3
    # gaussian family: theta' S theta <= gamma, whose complexity is sqrt(gamma) E |S^(+1/2) mean(sigma_i x_i)|
    values, vectors = torch.linalg.eigh(X.T @ X / 400)
    whitened = (X @ vectors[:, -3:]) / values[-3:].sqrt()
    signs = torch.randint(0, 2, (2000, 400), generator=rng(2), dtype=torch.float64) * 2 - 1
    complexity = float((signs @ whitened / 400).norm(dim=1).mean())
    assert complexity <= rademacher_bound_glm(1.0, 0.5, rank, 400, tight=True) + 1e-12
    assert complexity > 0.8 * math.sqrt(3 / 400)
    assert rademacher_bound_glm(1.0, 0.5, rank, 400) < 0.3 * rademacher_bound_glm(1.0, 0.5, 50, 400)


def test_retentivity():
    X = torch.randn(500, 4, generator=rng(), dtype=torch.float64)
    assert retentivity(X, "gaussian") == 0.5
    one, large = retentivity(X, "logistic"), retentivity(X, "logistic", radius=5.0)
    assert 0.03 < one < 0.06
    assert large < one
    assert retentivity(X, "logistic", seed=0) == one
    with pytest.raises(ValueError, match="no variance"):
        retentivity(torch.zeros(5, 2), "logistic")


# ---- section 7 --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"alpha": 0.0}, ValueError, "alpha"),
        ({"alpha": math.nan}, ValueError, "alpha"),
        ({"nodes": 1}, ValueError, "nodes"),
        ({"loss": "hinge"}, ValueError, "loss"),
        ({"loss": "glm"}, ValueError, "log_partition"),
        ({"log_partition": torch.exp}, ValueError, "log_partition"),
        ({"form": "soft"}, ValueError, "form"),
        ({"y": torch.full((40,), 2)}, ValueError, "0 or 1"),
        ({"y": torch.zeros(39)}, ValueError, "40 rows"),
        ({"y": torch.zeros(40, 2)}, ValueError, "y has shape"),
        ({"X": torch.zeros(0, 6), "y": torch.zeros(0)}, ValueError, "not empty"),
        ({"X": torch.zeros(40, 6, dtype=torch.int64)}, TypeError, "floating-point"),
        ({"pairs": 0}, ValueError, "pairs"),
        ({"f": torch.zeros(5)}, ValueError, "linear model"),
        ({"f": lambda x: x[:, :2]}, ValueError, "one output"),
        ({"f": lambda x: x.sum()}, ValueError, "must map"),
        ({"X": torch.zeros(3000, 6), "y": torch.zeros(3000)}, ValueError, "pairs="),
    ],
)
def test_bad_input(change, error, text):
    theta, X, y = logistic()
    given = {"f": theta, "X": X, "y": y, "alpha": 1.0, **change}
    f, X, y, alpha = (given.pop(name) for name in ("f", "X", "y", "alpha"))
    with pytest.raises(error, match=text):
        exact_mixup_loss(f, X, y, alpha, **given)


def test_bad_class_ids():
    X = torch.zeros(4, 2)
    with pytest.raises(ValueError, match=r"\[0, 3\)"):
        exact_mixup_loss(net(2, 3), X, torch.tensor([0, 1, 2, 3]), 1.0, loss="ce")
    with pytest.raises(TypeError, match="class ids"):
        exact_mixup_loss(net(2, 3), X, torch.zeros(4), 1.0, loss="ce")
    with pytest.raises(ValueError, match="needs logits"):
        exact_mixup_loss(torch.zeros(2), X, torch.zeros(4, dtype=torch.int64), 1.0, loss="ce")
    with pytest.raises(ValueError, match="radius"):
        adversarial_loss_quadratic(torch.zeros(2), X, torch.zeros(4), -1.0)
    with pytest.raises(ValueError, match="norm"):
        adversarial_loss_logistic(torch.zeros(2), X, torch.zeros(4), 0.1, norm=1)


def test_results_have_pictures():
    pytest.importorskip("matplotlib")
    theta, X, y = logistic()
    assert drawn(mixup_terms(theta, X, y, 1.0, loss="bce", exact=True))
    assert drawn(adversarial_bound(theta, X, y, 1.0))
    assert json.dumps(adversarial_bound(theta, X, y, 1.0).to_dict())


# ---- defects that were found ------------------------------------------------------------------------------------------------


def test_gradient_of_the_exact_loss_is_that_of_eval_mode():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Tanh(), nn.Linear(8, 1)).double()
    X, y = torch.randn(6, 4, generator=rng(), dtype=torch.float64), torch.tensor([0, 1] * 3)
    grads = []
    for training in (True, False):
        model.train(training)
        model.zero_grad()
        exact_mixup_loss(model, X, y, 1.0, nodes=4).backward()
        grads.append(model[0].weight.grad.clone())
    assert float(model[1].running_mean.abs().sum()) == 0.0
    torch.testing.assert_close(*grads)


def test_penalty_without_weights_is_infinite_not_undefined():
    X = torch.randn(5, 3, generator=rng())
    with pytest.warns(OutlastWarning, match="plain"):
        assert float(glm_penalty(torch.zeros(3), X - X.mean(0), 0.2)) == math.inf


def test_centring_in_single_precision_is_centring():
    X = torch.rand(500, 1, 14, 14, generator=rng())
    X = X - X.mean(0)
    theta = torch.randn(196, generator=rng(1)) * 0.01
    assert adversarial_bound(theta, X, ((X.flatten(1) @ theta) > 0).long(), 1.0).holds


def test_columns_and_values_that_are_not_finite():
    X = torch.randn(5, 3, generator=rng())
    column = torch.randn(5, 1, generator=rng(1))
    model = nn.Linear(3, 1)
    with torch.no_grad():
        one, two = (exact_mixup_loss(model, X, y, 1.0, loss="mse") for y in (column, column[:, 0]))
    assert float(one) == float(two)
    with pytest.raises(ValueError, match="finite"):
        exact_mixup_loss(model, X * math.nan, column, 1.0, loss="mse")
