"""The vaccine on Gram matrices against the vector form, closed forms and identities."""

from __future__ import annotations

import inspect
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from outlast.multitask import gradvac_coefficients


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def gradients(seed=0, tasks=4, size=30, groups=None):
    shape = (tasks, size) if groups is None else (groups, tasks, size)
    return torch.randn(*shape, generator=rng(seed), dtype=torch.float64) + 0.3


def by_vectors(g, target, order, beta):
    """Algorithm 1, one pair after another on whole vectors."""
    total = torch.zeros_like(g[0])
    new = target.clone()
    for i in range(len(g)):
        own = g[i].clone()
        for j in order[i].tolist():
            phi = float(own @ g[j] / (own.norm() * g[j].norm()))
            t = float(target[i, j])
            if phi < t:
                weight = own.norm() * (t * math.sqrt(1 - phi**2) - phi * math.sqrt(1 - t**2)) / (g[j].norm() * math.sqrt(1 - t**2))
                own = own + weight * g[j]
            new[i, j] = (1 - beta) * target[i, j] + beta * phi
        total = total + own
    return total, new


@pytest.mark.parametrize("target", [-0.3, 0.0, 0.5, 0.9])
def test_one_vaccination_reaches_the_target_exactly(target):
    g = torch.tensor([[1.0, 0.0, 0.0], [-0.5, 1.0, 0.4]], dtype=torch.float64)
    c, _, phi = gradvac_coefficients(g @ g.T, torch.full((2, 2), target, dtype=torch.float64), beta=0.0)
    own = c[0] @ g
    assert float(own @ g[1] / (own.norm() * g[1].norm())) == pytest.approx(target, abs=1e-12)
    ratio = float(own.norm() / g[0].norm())
    assert ratio == pytest.approx(math.sqrt((1 - float(phi[0, 1]) ** 2) / (1 - target**2)), rel=1e-12)


@pytest.mark.parametrize(("target", "ratio"), [(0.5, 1.130195), (0.9, 2.245471)])
def test_norm_grows_by_the_known_ratio(target, ratio):
    phi = 0.204923
    g = torch.tensor([[1.0, 0.0], [phi, math.sqrt(1 - phi**2)]], dtype=torch.float64)
    c, _, _ = gradvac_coefficients(g @ g.T, torch.full((2, 2), target))
    assert float((c[0] @ g).norm()) == pytest.approx(ratio, abs=1e-6)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10_000), st.floats(0.0, 1.0))
def test_gram_form_equals_vector_form(seed, beta):
    target = torch.zeros(4, 4, dtype=torch.float64)
    old = target.clone()
    for step in range(10):
        g = gradients(seed + step)
        order = torch.stack(
            [torch.tensor([j for j in torch.randperm(4, generator=rng(seed + 7 * step + i)).tolist() if j != i]) for i in range(4)]
        )
        c, target, _ = gradvac_coefficients(g @ g.T, target, beta=beta, order=order)
        total, old = by_vectors(g, old, order, beta)
        assert torch.allclose(c.sum(0) @ g, total, atol=1e-11)
        assert torch.allclose(target, old, atol=1e-12)


def test_target_zero_is_pcgrad_and_so_is_the_first_step():
    g = gradients(3) - 0.5
    order = torch.tensor([[1, 2, 3], [0, 2, 3], [0, 1, 3], [0, 1, 2]])
    for beta in (0.0, 0.01, 0.5):
        c, _, _ = gradvac_coefficients(g @ g.T, torch.zeros(4, 4), beta=beta, order=order)
        expected = torch.zeros_like(g[0])
        for i in range(4):
            own = g[i].clone()
            for j in order[i].tolist():
                inner = own @ g[j]
                if inner < 0:
                    own = own - inner / (g[j] @ g[j]) * g[j]
            expected += own
        assert torch.allclose(c.sum(0) @ g, expected, atol=1e-12)


def test_a_cosine_above_its_target_changes_nothing():
    g = gradients(1).abs()
    c, _, _ = gradvac_coefficients(g @ g.T, torch.full((4, 4), -0.5))
    assert torch.equal(c, torch.eye(4, dtype=torch.float64))


def test_opposite_gradients_cancel():
    g = torch.tensor([[1.0, 0.0], [-1.0, 0.0]], dtype=torch.float64)
    c, _, _ = gradvac_coefficients(g @ g.T, torch.zeros(2, 2))
    assert c.sum(0).tolist() == [2.0, 2.0]
    assert (c.sum(0) @ g).tolist() == [0.0, 0.0]


def test_fixed_target_for_one_task_only():
    g = torch.tensor([[1.0, 0.0], [0.0, 2.0]], dtype=torch.float64)
    c, new, phi = gradvac_coefficients(
        g @ g.T, torch.full((2, 2), 0.6, dtype=torch.float64), vaccinate=torch.tensor([True, False]), beta=0.0
    )
    assert float(phi[0, 1]) == 0.0
    assert float(c[0, 1]) == pytest.approx(0.375)
    assert torch.allclose(c.sum(0) @ g, torch.tensor([1.0, 2.75], dtype=torch.float64))
    assert torch.equal(new, torch.full((2, 2), 0.6, dtype=torch.float64))


def test_moving_average_follows_every_measurement():
    def gram(phi):
        return torch.tensor([[1.0, phi], [phi, 1.0]], dtype=torch.float64)

    target = torch.zeros(2, 2)
    for expected in (0.2, 0.3, 0.35):
        c, target, _ = gradvac_coefficients(gram(0.4), target, beta=0.5)
        assert float(target[0, 1]) == pytest.approx(expected)
        assert torch.equal(c, torch.eye(2, dtype=torch.float64))
    c, target, _ = gradvac_coefficients(gram(0.1), target, beta=0.5)
    assert float(c[0, 1]) == pytest.approx((0.35 * math.sqrt(1 - 0.01) - 0.1 * math.sqrt(1 - 0.35**2)) / math.sqrt(1 - 0.35**2))
    assert float(target[0, 1]) == pytest.approx(0.225)


def test_no_ratchet():
    """An average that learned only from low cosines would sink below them and the vaccine would die."""
    stream = rng(5)
    target = torch.zeros(2, 2)
    acted = 0
    for _ in range(2000):
        phi = float((0.3 + 0.15 * torch.randn((), generator=stream)).clamp(-1, 1))
        c, target, _ = gradvac_coefficients(torch.tensor([[1.0, phi], [phi, 1.0]]), target)
        acted += float(c[0, 1]) > 0
    assert 0.25 <= float(target[0, 1]) <= 0.35
    assert 0.35 <= acted / 2000 <= 0.6


def test_scaling_other_losses_changes_nothing_and_a_common_factor_comes_out():
    g = gradients(4)
    order = torch.tensor([[1, 2, 3], [0, 2, 3], [0, 1, 3], [0, 1, 2]])
    target = torch.full((4, 4), 0.4)
    c, new, _ = gradvac_coefficients(g @ g.T, target, order=order)
    scaled = g.clone()
    scaled[2] *= 7
    d, _, _ = gradvac_coefficients(scaled @ scaled.T, target, order=order)
    assert torch.allclose(c[0] @ g, d[0] @ scaled, atol=1e-12)
    e, other, _ = gradvac_coefficients(25 * g @ g.T, target, order=order)
    assert torch.allclose(e.sum(0) @ (5 * g), 5 * c.sum(0) @ g, atol=1e-11)
    assert torch.allclose(new, other, atol=1e-14)


def test_zero_gradients_are_skipped():
    g = gradients(2)
    g[1] = 0.0
    c, new, phi = gradvac_coefficients(g @ g.T, torch.full((4, 4), 0.5))
    assert torch.isfinite(torch.stack([c, new, phi])).all()
    assert bool((new[1] == 0.5).all())
    assert bool((new[:, 1] == 0.5).all())
    assert float(c[0, 1]) == 0.0


def test_groups_are_independent_and_bounds_hold():
    g = gradients(6, groups=3)
    gram = g @ g.mT
    target = torch.zeros(3, 4, 4)
    order = torch.tensor([[1, 2, 3], [0, 2, 3], [0, 1, 3], [0, 1, 2]])
    whole = gradvac_coefficients(gram, target, order=order, floor=0.6)
    for k in range(3):
        one = gradvac_coefficients(gram[k], target[k], order=order, floor=0.6)
        for a, b in zip(whole, one, strict=True):
            assert torch.allclose(a[k], b, atol=1e-12)
    high = gradvac_coefficients(gram, torch.ones(3, 4, 4), max_target=0.9, order=order)
    capped = gradvac_coefficients(gram, torch.full((3, 4, 4), 0.9), order=order)
    assert torch.allclose(high[0], capped[0])


def test_same_generator_same_run_and_other_orders_differ():
    g = gradients(8) - 0.4
    one, two = (gradvac_coefficients(g @ g.T, torch.full((4, 4), 0.3), generator=rng(3))[0] for _ in range(2))
    assert torch.equal(one, two)
    found = [gradvac_coefficients(g @ g.T, torch.full((4, 4), 0.3), generator=rng(seed))[0] for seed in range(5)]
    assert any(not torch.allclose(one, other) for other in found)


def test_noise_free_norms_feed_the_average():
    gram = torch.tensor([[2.0, 0.5], [0.5, 2.0]], dtype=torch.float64)
    _, naive, _ = gradvac_coefficients(gram, torch.zeros(2, 2), beta=1.0)
    _, clean, _ = gradvac_coefficients(gram[None], torch.zeros(1, 2, 2), beta=1.0, debiased=torch.tensor([[1.0, 1.0]]))
    assert float(naive[0, 1]) == pytest.approx(0.25)
    assert float(clean[0, 0, 1]) == pytest.approx(0.5)
    _, floor, _ = gradvac_coefficients(gram[None], torch.zeros(1, 2, 2), beta=1.0, debiased=torch.tensor([[-1.0, 1.0]]))
    assert float(floor[0, 0, 1]) == 1.0  # not trusted below a thousandth of the naive square, and a cosine stays one


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gram": torch.zeros(3)}, "gram must have shape"),
        ({"target": torch.zeros(3, 3)}, "shape of gram"),
        ({"beta": 1.5}, "beta must be"),
        ({"beta": -0.1}, "beta must be"),
        ({"max_target": 1.0}, "max_target must be"),
        ({"max_target": 0.0}, "max_target must be"),
        ({"floor": 2.0}, "floor must be"),
        ({"gram": torch.full((2, 2), float("nan"))}, "finite"),
        ({"vaccinate": torch.tensor([True])}, "vaccinate must be"),
        ({"order": torch.tensor([[0], [0]])}, "every other task once"),
        ({"order": torch.tensor([[1]])}, "order must have shape"),
    ],
)
def test_wrong_arguments_are_refused(changes, message):
    arguments = {"gram": torch.eye(2), "target": torch.zeros(2, 2), **changes}
    with pytest.raises(ValueError, match=message):
        inspect.unwrap(gradvac_coefficients)(arguments.pop("gram"), arguments.pop("target"), **arguments)
