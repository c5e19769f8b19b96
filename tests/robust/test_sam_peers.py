from __future__ import annotations

import pytest
import torch
from helpers import batches, closure_of, cross_entropy, farthest, mlp

from outlast.robust import SAM

SETTINGS = {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4}


def ours(steps, **options):
    model = mlp(norm=True)
    optimizer = SAM(torch.optim.SGD(model.parameters(), **SETTINGS), rho=0.3, buffers="update", same_rng=False, **options)
    for batch in steps:
        optimizer.step(closure_of(optimizer, model, batch))
    return model


def davda54(steps):
    """The loop of davda54/sam: first_step, second_step, and nothing kept still between them."""
    model = mlp(norm=True)
    base = torch.optim.SGD(model.parameters(), **SETTINGS)
    for batch in steps:
        base.zero_grad()
        cross_entropy(model, batch).backward()
        parameters = list(model.parameters())
        size = torch.stack([p.grad.norm() for p in parameters]).norm()
        old = [p.detach().clone() for p in parameters]
        with torch.no_grad():
            for p in parameters:
                p.add_(p.grad * (0.3 / (size + 1e-12)))
        base.zero_grad()
        cross_entropy(model, batch).backward()
        with torch.no_grad():
            for p, value in zip(parameters, old, strict=True):
                p.copy_(value)
        base.step()
    return model


def test_equals_the_loop_of_davda54():
    steps = batches(5, size=16)
    model, other = ours(steps), davda54(steps)
    assert farthest(model, other) < 1e-6
    for mine, theirs in zip(model.buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_conformance_sees_a_different_radius():
    steps = batches(5, size=16)
    model = mlp(norm=True)
    optimizer = SAM(torch.optim.SGD(model.parameters(), **SETTINGS), rho=0.29, buffers="update", same_rng=False)
    for batch in steps:
        optimizer.step(closure_of(optimizer, model, batch))
    assert farthest(model, davda54(steps)) > 1e-5


@pytest.mark.peer
@pytest.mark.filterwarnings("ignore")
def test_equals_pytorch_optimizer():
    peer = pytest.importorskip("pytorch_optimizer", reason="pytorch-optimizer (extra peers) is not installed")
    steps, model = batches(5, size=16), mlp(norm=True)
    optimizer = peer.SAM(model.parameters(), torch.optim.SGD, rho=0.3, **SETTINGS)
    for batch in steps:
        closure = closure_of(optimizer, model, batch)
        closure()
        optimizer.step(closure)
    assert farthest(ours(steps), model) < 1e-6
