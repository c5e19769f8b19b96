"""GPM and GradVac in two gloo processes: replicated and sharded models equal one process."""

from __future__ import annotations

import pytest
import torch
from helpers import gpm_run, gpm_sharded_run, gradvac_run, gradvac_sharded_run, in_processes, same

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without distributed")


def assert_close(left, right, tolerance):
    for a, b in zip(left, right, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


def test_memory_of_two_processes_is_that_of_one(tmp_path):
    alone = gpm_run(0, 1)
    first, second = in_processes(gpm_run, tmp_path)
    assert same(first["weights"], second["weights"])
    assert first["ranks"] == second["ranks"] == alone["ranks"]
    assert_close(first["weights"], alone["weights"], 1e-5)
    assert "nothing to consolidate" in first["refused"]
    assert "nothing to consolidate" in second["refused"]


def test_memory_on_a_sharded_model_is_that_of_one_process_and_travels(tmp_path):
    alone = gpm_sharded_run(0, 1)
    assert same(alone["weights"], alone["resumed"])
    for rank in in_processes(gpm_sharded_run, tmp_path):
        assert rank["ranks"] == alone["ranks"]
        assert_close(rank["weights"], alone["weights"], 1e-5)
        assert same(rank["weights"], rank["resumed"])
        assert {name: value.shape for name, value in rank["state"].items()} == {name: value.shape for name, value in alone["state"].items()}
        assert rank["anchor"].shape == alone["anchor"].shape


def test_vaccine_of_two_processes_is_that_of_one(tmp_path):
    alone = gradvac_run(0, 1)
    first, second = in_processes(gradvac_run, tmp_path)
    for engine in ("loop", "layer"):
        assert same(first[engine], second[engine])
        assert_close(first[engine], alone[engine], 1e-5)
        assert torch.equal(first[f"{engine} targets"], second[f"{engine} targets"])
        torch.testing.assert_close(first[f"{engine} targets"], alone[f"{engine} targets"], rtol=0, atol=1e-6)


def test_vaccine_on_a_sharded_model_is_that_of_one_process(tmp_path):
    alone = gradvac_sharded_run(0, 1)
    for rank in in_processes(gradvac_sharded_run, tmp_path):
        assert_close(rank["weights"], alone["weights"], 1e-5)
        torch.testing.assert_close(rank["targets"], alone["targets"], rtol=0, atol=1e-6)
