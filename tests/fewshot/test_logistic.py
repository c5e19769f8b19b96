"""Batched logistic regression against scikit-learn, its own optimality, and independence of the batch."""

from __future__ import annotations

import inspect

import numpy as np
import pytest
import torch

from outlast.errors import OutlastWarning
from outlast.fewshot import LogisticClassifier, batched_logistic_regression


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def problems(e=4, n=40, d=6, c=3, seed=0, dtype=torch.float64):
    X = torch.randn(e, n, d, generator=rng(seed), dtype=dtype)
    y = torch.randint(0, c, (e, n), generator=rng(seed + 1))
    y[:, :c] = torch.arange(c)
    return X, y


@pytest.mark.parametrize(("n", "d"), [(40, 6), (8, 30)])
@pytest.mark.parametrize("C", [1.0, 15.0])
def test_optimum_is_scikit_learn_s(n, d, C):
    linear_model = pytest.importorskip("sklearn.linear_model", reason="scikit-learn (extra vision) is not installed")
    X, y = problems(n=n, d=d)
    fit = batched_logistic_regression(X, y, C=C, tol=1e-10)
    assert bool(fit.converged.all())
    for number in range(len(X)):
        model = linear_model.LogisticRegression(C=C, tol=1e-10, max_iter=20_000).fit(X[number].numpy(), y[number].numpy())
        scale = np.abs(model.coef_).max()
        assert np.abs(model.coef_ - fit.weight[number].numpy()).max() < 1e-4 * scale
        theirs, ours = model.intercept_ - model.intercept_.mean(), fit.bias[number] - fit.bias[number].mean()
        assert np.abs(theirs - ours.numpy()).max() < 1e-4 * scale
        assert np.array_equal(model.predict(X[number].numpy()), (X[number] @ fit.weight[number].T + fit.bias[number]).argmax(1).numpy())


def test_gradient_vanishes_and_classes_sum_to_zero():
    X, y = problems(dtype=torch.float32, n=200)
    fit = batched_logistic_regression(X, y)
    assert bool((fit.grad_norm <= 1e-4).all())
    assert float(fit.weight.sum(1).abs().max()) < 1e-5
    w = fit.weight.clone().requires_grad_()
    b = fit.bias.clone().requires_grad_()
    logits = X @ w.mT + b[:, None]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="none").view(4, 200).mean(1)
    total = loss + w.square().sum((1, 2)) / (2 * 200)
    assert torch.allclose(total.detach(), fit.loss, atol=1e-5)
    grads = torch.autograd.grad(total.sum(), (w, b))
    assert float(max(grad.abs().max() for grad in grads)) <= 1.1e-4


def test_constant_features_give_the_class_frequencies():
    X = torch.ones(1, 10, 3, dtype=torch.float64)
    y = torch.tensor([[0] * 5 + [1] * 3 + [2] * 2])
    fit = batched_logistic_regression(X * 0, y, tol=1e-12)
    assert float(fit.weight.abs().max()) < 1e-9
    log = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64).log()
    assert torch.allclose(fit.bias[0] - fit.bias[0].mean(), log - log.mean(), atol=1e-9)


@pytest.mark.parametrize("precondition", ["none", "gaussian"])
def test_each_problem_has_the_answer_that_it_has_alone(precondition):
    X, y = problems(e=9, dtype=torch.float32)
    X = X * torch.logspace(-1, 1, 9)[:, None, None]
    whole = batched_logistic_regression(X, y, precondition=precondition)
    order = torch.randperm(9, generator=rng(2))
    mixed = batched_logistic_regression(X[order], y[order], precondition=precondition)
    assert torch.allclose(whole.weight[order], mixed.weight, atol=1e-5)
    for number in range(9):
        alone = batched_logistic_regression(X[number, None], y[number, None], precondition=precondition)
        assert torch.allclose(alone.weight[0], whole.weight[number], atol=1e-5)
        assert int(alone.n_iter) == int(whole.n_iter[number])


def test_large_problems_are_visited_one_by_one(monkeypatch):
    from outlast.fewshot import _logistic

    X, y = problems(e=3, n=100, d=8)
    whole = batched_logistic_regression(X, y, tol=1e-8)
    monkeypatch.setattr(_logistic, "_LARGE", 1)
    assert torch.allclose(batched_logistic_regression(X, y, tol=1e-8).weight, whole.weight, atol=1e-9)


def test_weights_of_rows_intercepts_and_starts():
    X, y = problems(n=20)
    weights = torch.ones(20, dtype=torch.float64)
    weights[5:] = 0.0
    few = batched_logistic_regression(X[:, :5], y[:, :5], num_classes=3, tol=1e-10)
    same = batched_logistic_regression(X, y, sample_weight=weights, tol=1e-10)
    assert torch.allclose(few.weight, same.weight, atol=1e-6)
    assert not batched_logistic_regression(X, y, fit_intercept=False).bias.any()
    again = batched_logistic_regression(X, y, init=(same.weight, same.bias), sample_weight=weights, tol=1e-8)
    assert int(again.n_iter.max()) == 0


def test_problems_that_do_not_converge_are_said():
    X, y = problems()
    with pytest.warns(OutlastWarning, match="4 of 4 logistic regressions did not reach"):
        fit = batched_logistic_regression(X, y, max_iter=1, tol=1e-12)
    assert not fit.converged.any()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"X": torch.zeros(2, 3)}, ValueError, "shape"),
        ({"X": torch.zeros(1, 3, 2, dtype=torch.int64)}, TypeError, "floating"),
        ({"y": torch.zeros(1, 3)}, TypeError, "integers"),
        ({"X": torch.full((1, 3, 2), float("nan"))}, ValueError, "NaN"),
        ({"num_classes": 1}, ValueError, r"\[0, 0\]"),
        ({"C": 0.0}, ValueError, "C must be"),
        ({"tol": -1.0}, ValueError, "tol must be"),
        ({"max_iter": -1}, ValueError, "max_iter must be"),
        ({"precondition": "newton"}, ValueError, "precondition"),
        ({"sample_weight": torch.zeros(3)}, ValueError, "sample_weight"),
    ],
)
def test_wrong_arguments_are_refused(changes, error, message):
    arguments = {"X": torch.zeros(1, 3, 2), "y": torch.tensor([[0, 1, 1]]), **changes}
    with pytest.raises(error, match=message):
        inspect.unwrap(batched_logistic_regression)(arguments.pop("X"), arguments.pop("y"), **arguments)


def test_classifier_names_classes_as_they_came():
    X = np.array([[0.0, 0.0], [1.0, 1.0], [5.0, 5.0], [6.0, 6.0]])
    model = LogisticClassifier().fit(X, ["low", "low", "high", "high"])
    assert model.classes_.tolist() == ["high", "low"]
    assert model.predict([[0.5, 0.5]]).tolist() == ["low"]
    assert model.predict_proba(X).sum(1) == pytest.approx(1.0)
    assert model.score(X, ["low", "low", "high", "high"]) == 1.0
    batched = LogisticClassifier().fit(torch.tensor(X)[None].repeat(2, 1, 1), torch.tensor([[7, 7, 9, 9], [4, 4, 2, 2]]))
    assert batched.predict(torch.tensor(X)[None].repeat(2, 1, 1)).tolist() == [[7, 7, 9, 9], [4, 4, 2, 2]]


def test_preconditioner_without_intercept_and_on_singular_rows():
    X, y = problems(n=200, d=5)
    X = X + 2
    plain, gaussian = (batched_logistic_regression(X, y, fit_intercept=False, precondition=p, tol=1e-8) for p in ("none", "gaussian"))
    assert not gaussian.bias.any()
    assert torch.allclose(plain.weight, gaussian.weight, atol=1e-5)
    singular = torch.rand(1, 300, 40, generator=rng(3))
    singular[..., :10] = 0.0
    singular[..., 10:20] = singular[..., 20:30]
    labels = torch.randint(0, 3, (1, 300), generator=rng(4))
    fit = batched_logistic_regression(singular, labels, C=1e4, precondition="gaussian", max_iter=3000)
    assert torch.isfinite(fit.weight).all()
    with pytest.raises(ValueError, match="finite"):
        batched_logistic_regression(X, y, sample_weight=torch.full((200,), float("inf")))
