from __future__ import annotations

import pytest
import torch
from helpers import batches, closure_of, ddp_run, farthest, flat, fsdp_run, in_processes, mlp, same, snapshot, train_by_hand

from outlast.robust import SAM

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without distributed")


def alone(**options):
    model = mlp()
    optimizer = SAM(torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9), rho=0.3, **options)
    for batch in batches(3):
        optimizer.step(closure_of(optimizer, model, batch))
    return model, optimizer


def halves(**options):
    model = mlp()
    optimizer = SAM(torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9), rho=0.3, **options)
    for x, y in batches(3):
        optimizer.step([closure_of(optimizer, model, part, 0.5) for part in zip(x.chunk(2), y.chunk(2), strict=True)])
    return model


def in_chunks(count):
    return [list(zip(x.chunk(count), y.chunk(count), strict=True)) for x, y in batches(3)]


def loaded(weights):
    model = mlp()
    model.load_state_dict(dict(zip(model.state_dict(), weights, strict=True)))
    return model


def test_data_parallel_ranks_agree_and_equal_one_process(tmp_path):
    first, second = in_processes(ddp_run, tmp_path)
    for name in first:
        assert same(first[name], second[name]), name
    in_parts = mlp()
    train_by_hand(in_parts, in_chunks(2), rho=0.3, lr=0.5, momentum=0.9)
    assert farthest(in_parts, alone()[0]) > 1e-4  # or the test could not tell
    assert farthest(loaded(first["local"]), in_parts) < 1e-6
    assert farthest(loaded(first["local two-call"]), in_parts) < 1e-6
    assert farthest(loaded(first["local inner"]), halves(inner_steps=2)) < 1e-6
    assert farthest(loaded(first["global"]), alone()[0]) < 1e-6
    look = {"every": 2, "reuse": "looksam"}
    assert farthest(loaded(first["local looksam"]), halves(**look)) < 1e-6
    assert farthest(loaded(first["global looksam"]), alone(**look)[0]) < 1e-6
    assert farthest(halves(**look), halves()) > 1e-4
    assert farthest(loaded(first["accumulate global"]), alone()[0]) < 1e-6
    quarters = mlp()
    train_by_hand(quarters, in_chunks(4), rho=0.3, lr=0.5, momentum=0.9)
    assert farthest(loaded(first["trainer"]), quarters) < 1e-6
    # Of the two processes' first micro-batches one perturbation is made, and of their second ones another.
    pairs = mlp()
    crossed = [[tuple(torch.cat([a, b]) for a, b in zip(parts[i], parts[i + 2], strict=True)) for i in range(2)] for parts in in_chunks(4)]
    train_by_hand(pairs, crossed, rho=0.3, lr=0.5, momentum=0.9)
    assert farthest(loaded(first["accumulate micro"]), pairs) < 1e-6


def test_sharded_parameters_train_as_in_one_process_and_refuse_local(tmp_path):
    ranks = in_processes(fsdp_run, tmp_path)
    model, optimizer = alone()
    for rank in ranks:
        assert rank["refused"]
        assert rank["norm"] == pytest.approx(float(optimizer.last.grad_norm), rel=1e-5)
        torch.testing.assert_close(flat(rank["weights"]), flat(snapshot(model)), rtol=0, atol=1e-6)
