"""Selecting directions: the paper's rule in Gram form, row form and streamed form."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from outlast.continual import _basis
from outlast.continual._basis import Rows, complement, joined, orthonormal


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def with_spectrum(values, d=6, seed=0):
    """Rows whose Gram matrix has these eigenvalues."""
    q = torch.linalg.qr(torch.randn(d, d, generator=rng(seed), dtype=torch.float64)).Q
    return torch.tensor(values, dtype=torch.float64).sqrt()[:, None] * q[: len(values)]


def select(rows, threshold, basis=None, *, official=False, ranks=None, limit=None):
    d = rows.shape[-1]
    basis = torch.zeros(1, d, 0, dtype=torch.float64) if basis is None else basis
    held = Rows(basis, threshold)
    held.add(rows[None] if rows.ndim == 2 else rows)
    return held.select(threshold, official=official, limit=limit or d, ranks=ranks or [basis.shape[2]] * len(basis))


@pytest.mark.parametrize(
    ("threshold", "official", "expected"), [(0.9, False, 3), (0.9, True, 2), (0.8, False, 2), (0.5, False, 1), (1.0, False, 4)]
)
def test_known_spectrum_gives_the_known_rank(threshold, official, expected):
    found = select(with_spectrum([0.5, 0.3, 0.15, 0.05]), threshold, official=official)
    assert found.added.tolist() == [expected]


def test_official_rule_is_the_paper_s_in_later_tasks():
    basis = torch.zeros(1, 6, 1, dtype=torch.float64)
    basis[0, 0, 0] = 1.0
    rows = with_spectrum([0.5, 0.3, 0.15, 0.05], seed=3)
    assert torch.equal(select(rows, 0.9, basis, official=True).added, select(rows, 0.9, basis).added)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 40), st.floats(0.3, 1.0), st.integers(0, 10_000), st.integers(0, 5))
def test_energy_reaches_the_threshold_with_the_fewest_directions(count, threshold, seed, old):
    d = 12
    rows = torch.randn(count, d, generator=rng(seed), dtype=torch.float64) * torch.linspace(1, 0.05, d, dtype=torch.float64)
    basis = torch.linalg.qr(torch.randn(d, old, generator=rng(seed + 1), dtype=torch.float64)).Q[None]
    found = select(rows, threshold, basis)
    whole = torch.cat([basis, found.vectors], 2)[0]
    identity = torch.eye(whole.shape[1], dtype=torch.float64)
    assert torch.allclose(whole.T @ whole, identity, atol=1e-10)
    total = float(rows.square().sum())
    assert float((rows @ whole).square().sum()) >= (threshold - 1e-6) * total
    assert float(found.after) == pytest.approx(float((rows @ whole).square().sum()), rel=1e-8)
    if found.added.item():
        without = whole[:, :-1]
        assert float((rows @ without).square().sum()) < threshold * total


def test_gram_and_rows_and_svd_give_one_projector():
    rows = torch.randn(50, 20, generator=rng(), dtype=torch.float64) * torch.logspace(0, -2, 20, dtype=torch.float64)
    from_gram = select(rows, 0.95).vectors[0]  # 50 rows of width 20 are folded
    few = rows[:15]
    from_rows = select(few, 0.95).vectors[0]
    for data, found in ((rows, from_gram), (few, from_rows)):
        right = torch.linalg.svd(data, full_matrices=False).Vh[: found.shape[1]].T
        assert float((found @ found.T - right @ right.T).norm()) <= 1e-6


def test_streamed_form_keeps_its_promise(monkeypatch):
    monkeypatch.setattr(_basis, "GRAM_LIMIT", 100)
    rows = torch.randn(3000, 300, generator=rng(), dtype=torch.float64) * torch.logspace(0, -3, 300, dtype=torch.float64)
    basis = torch.linalg.qr(torch.randn(300, 4, generator=rng(1), dtype=torch.float64)).Q[None]
    held = Rows(basis, 0.95)
    for chunk in rows.split(130):
        held.add(chunk[None])
    assert sum(map(len, held._rows[0])) < 1000
    streamed = held.select(0.95, official=False, limit=300, ranks=[4])
    monkeypatch.setattr(_basis, "GRAM_LIMIT", 8192)
    exact = select(rows, 0.95, basis)
    whole = torch.cat([basis, streamed.vectors], 2)[0]
    assert float((rows @ whole).square().sum()) >= 0.95 * float(rows.square().sum())
    assert float(streamed.before) == pytest.approx(float(exact.before), rel=1e-9)
    assert 0 <= int(streamed.added) - int(exact.added) <= 2


def test_numerical_rank_at_threshold_one():
    low = torch.randn(40, 3, generator=rng(), dtype=torch.float64) @ torch.randn(3, 15, generator=rng(1), dtype=torch.float64)
    assert select(low, 1.0).added.tolist() == [3]
    assert select(low[:8], 1.0).added.tolist() == [3]


def test_zero_rows_and_no_rows_add_nothing():
    assert select(torch.zeros(5, 4, dtype=torch.float64), 0.9).added.tolist() == [0]
    held = Rows(torch.zeros(2, 4, 0, dtype=torch.float64), 0.9)
    assert held.select(0.9, official=False, limit=4, ranks=[0, 0]).added.tolist() == [0, 0]


def test_groups_choose_for_themselves_and_cap_holds():
    rows = torch.stack([with_spectrum([0.9, 0.1, 0.0, 0.0]), with_spectrum([0.25, 0.25, 0.25, 0.25], seed=1)])
    found = select(rows, 0.9, torch.zeros(2, 6, 0, dtype=torch.float64))
    assert found.added.tolist() == [1, 4]
    assert float(found.vectors[0, :, 1:].abs().max()) == 0.0
    capped = select(rows, 0.9, torch.zeros(2, 6, 0, dtype=torch.float64), limit=3)
    assert capped.added.tolist() == [1, 3]


def test_joined_moves_padding_behind():
    old = torch.zeros(2, 3, 2)
    old[0, 0, 0] = old[1, 0, 0] = old[1, 1, 1] = 1.0
    new = torch.zeros(2, 3, 1)
    new[0, 2, 0] = 1.0
    both = joined(old, new, [1, 2], [1, 0])
    assert both.shape == (2, 3, 2)
    assert both[0].T.tolist() == [[1, 0, 0], [0, 0, 1]]
    assert both[1].T.tolist() == [[1, 0, 0], [0, 1, 0]]


def test_stored_basis_is_made_orthonormal_again_and_completed():
    q = torch.linalg.qr(torch.randn(30, 9, generator=rng())).Q[None]
    wide = orthonormal(q, [9])
    assert float((wide[0].T @ wide[0] - torch.eye(9, dtype=torch.float64)).abs().max()) < 1e-14
    assert float((wide - q.double()).abs().max()) < 1e-6  # columns stay where they were
    rest = complement(q, [9])[0]
    assert rest.shape == (30, 21)
    assert float((rest.T @ wide[0]).abs().max()) < 1e-12
