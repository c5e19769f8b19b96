"""The same numbers as TorchJD's GradVac and PCGrad."""

from __future__ import annotations

import pytest
import torch

from outlast.multitask import gradvac_coefficients

pytestmark = pytest.mark.peer
aggregation = pytest.importorskip("torchjd.aggregation", reason="torchjd (extra peers) is not installed")

ASCENDING = torch.tensor([[1, 2, 3], [0, 2, 3], [0, 1, 3], [0, 1, 2]])


@pytest.fixture
def in_ascending_order(monkeypatch):
    """TorchJD draws its order from the global generator."""
    monkeypatch.setattr(torch, "randperm", lambda count, **_: torch.arange(count))


@pytest.mark.parametrize("beta", [0.01, 0.5])
def test_gradvac_over_many_steps(beta, in_ascending_order):
    peer = aggregation.GradVac(beta=beta, eps=0.0)
    target = torch.zeros(4, 4, dtype=torch.float64)
    stream = torch.Generator().manual_seed(0)
    for _ in range(50):
        g = torch.randn(4, 20, generator=stream, dtype=torch.float64) + 0.3
        theirs = peer(g)
        c, target, _ = gradvac_coefficients(g @ g.T, target, beta=beta, order=ASCENDING)
        torch.testing.assert_close(c.sum(0) @ g, theirs, rtol=0, atol=1e-10)
    off = ~torch.eye(4, dtype=torch.bool)
    torch.testing.assert_close(target[off], peer.gramian_weighting._phi_t[off], rtol=0, atol=1e-12)


def test_pcgrad(in_ascending_order):
    stream = torch.Generator().manual_seed(1)
    for _ in range(20):
        g = torch.randn(4, 20, generator=stream, dtype=torch.float64)
        c, _, _ = gradvac_coefficients(g @ g.T, torch.zeros(4, 4), order=ASCENDING)
        torch.testing.assert_close(c.sum(0) @ g, aggregation.PCGrad()(g), rtol=0, atol=1e-10)
