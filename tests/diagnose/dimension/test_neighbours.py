"""Exact neighbours: equal to brute force in float64 whatever the block, the offset, the copies."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from outlast._core._neighbours import nearest
from outlast.diagnose import dimension as dim
from outlast.diagnose.dimension import _rows as rows_module


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def brute(data, k, queries=None):
    distances = torch.cdist(
        data.double() if queries is None else queries.double(), data.double(), compute_mode="donot_use_mm_for_euclid_dist"
    )
    if queries is None:
        distances.fill_diagonal_(float("inf"))
    return distances.topk(k, largest=False)


def agrees(found, expected, data, queries=None):
    """Distances agree; where indices differ, both are at that distance (a tie)."""
    torch.testing.assert_close(found[0], expected.values, rtol=1e-6, atol=1e-7)
    points = data if queries is None else queries
    other = (found[1] != expected.indices).nonzero()
    for row, place in other.tolist():
        gap = (points[row].double() - data[found[1][row, place]].double()).norm()
        assert float(gap) == pytest.approx(float(expected.values[row, place]), rel=1e-6)


@pytest.mark.parametrize("block", [(16, 16), (32, 100), (100, 64), (1000, 4096)])
@pytest.mark.parametrize(("n", "d", "k"), [(300, 7, 5), (129, 40, 20), (1203, 3, 8), (17, 2, 16), (40, 1, 3)])
def test_equals_brute_force_for_every_block(block, n, d, k):
    data = torch.randn(n, d, generator=rng())
    agrees(nearest(data, k, block=block), brute(data, k), data)
    queries = torch.randn(37, d, generator=rng(1))
    agrees(nearest(data, k, queries=queries, block=block), brute(data, k, queries), data, queries)
    rows = torch.randperm(n, generator=rng(2))[:11]
    chosen = nearest(data, k, rows=rows, block=block)
    whole = nearest(data, k, block=block)
    assert torch.equal(chosen[0], whole[0][rows])


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(20, 200),
    d=st.integers(1, 12),
    k=st.integers(1, 6),
    seed=st.integers(0, 10**6),
    copies=st.integers(0, 8),
    grid=st.booleans(),
)
def test_equals_brute_force_on_anything(n, d, k, seed, copies, grid):
    data = torch.randn(n, d, generator=rng(seed))
    if grid:
        data = data.round()
    if copies:
        data = torch.cat([data, data[:copies]])
    agrees(nearest(data, k, block=(32, 48)), brute(data, k), data)


@pytest.mark.parametrize("offset", [0.0, 10.0, 1000.0])
def test_planted_near_duplicates_and_offsets(offset):
    data = torch.rand(500, 50, generator=rng()) + offset
    data[1] = data[0] + 1e-4
    data[7] = data[8]
    found = nearest(data, 5)
    agrees(found, brute(data, 5), data)
    assert int(found[1][0, 0]) == 1
    assert float(found[0][7, 0]) == 0


def test_rows_that_are_not_certain_are_searched_again():
    # neighbours far closer together than the matrix product can tell apart
    data = 100.0 * torch.randn(400, 30, generator=rng())
    data[100:] = data[0] + 1e-3 * torch.randn(300, 30, generator=rng(1))
    agrees(nearest(data, 10), brute(data, 10), data)


def test_float64_data_are_measured_in_float64():
    data = torch.randn(100, 5, generator=rng(), dtype=torch.float64)
    data[1] = data[0] + 1e-12
    found = nearest(data, 1)
    assert float(found[0][0, 0]) == pytest.approx(5**0.5 * 1e-12, rel=1e-3)


def test_memory_maps_are_read_in_place(tmp_path):
    values = np.random.default_rng(0).normal(size=(300, 20)).astype(np.float32)
    np.save(tmp_path / "rows.npy", values)
    mapped = np.load(tmp_path / "rows.npy", mmap_mode="r")
    assert torch.equal(dim.knn(mapped, 4)[0], dim.knn(torch.from_numpy(values), 4)[0])


@pytest.mark.parametrize(("kind", "taken"), [(np.uint8, "float32"), (np.uint16, "float64")])
def test_maps_of_whole_numbers_with_copies_never_lie_in_memory_as_a_whole(tmp_path, monkeypatch, kind, taken):
    values = np.random.default_rng(0).integers(0, 256, size=(300, 20), dtype=kind)
    values[[40, 299]] = values[3]
    np.save(tmp_path / "rows.npy", values)
    whole, spooled, real = rows_module.as_rows(values), [], rows_module._spooled

    def spy(parts):
        found = real(parts)
        spooled.append(len(found))
        return found

    monkeypatch.setattr(rows_module, "_spooled", spy)
    monkeypatch.setattr(rows_module, "BLOCK", 64)
    mapped = rows_module.as_rows(np.load(tmp_path / "rows.npy", mmap_mode="r"))
    assert spooled == [300, 298]  # as numbers, and without the copies: both to a file
    assert torch.equal(mapped.values, whole.values)
    assert torch.equal(mapped.leader, whole.leader)
    assert (mapped.num_duplicates, mapped.notes) == (2, (f"{np.dtype(kind).name} values taken as {taken}",))
    streamed = rows_module.as_rows(iter(np.array_split(values, 6)))
    assert torch.equal(streamed.values, whole.values)


def test_public_search_counts_itself_on_request_and_refuses_mistakes():
    data = torch.randn(50, 4, generator=rng())
    distances, index = dim.knn(data, 3, exclude_self=False)
    assert torch.equal(index[:, 0], torch.arange(50))
    assert (distances[:, 0] == 0).all()
    for arguments, says in [((data, 50), "at least 51"), ((data, 0), "k must"), ((data, 3, torch.zeros(2, 5)), "5 values")]:
        with pytest.raises(ValueError, match=says):
            dim.knn(*arguments)
    with pytest.raises(ValueError, match="exact"):
        dim.knn(data, 3, exact=False)
    with pytest.raises(ValueError, match="block"):
        dim.knn(data, 3, block=(0, 5))
