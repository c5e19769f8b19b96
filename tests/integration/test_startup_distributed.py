"""NT-Xent and the whole of STARTUP in two gloo processes equal one process."""

from __future__ import annotations

import pytest
import torch
from helpers import in_processes, nt_xent_run, same, startup_norm_run, startup_run

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without distributed")


def test_gathered_contrast_of_two_processes_is_that_of_one(tmp_path):
    alone = nt_xent_run(0, 1)
    first, second = in_processes(nt_xent_run, tmp_path)
    assert torch.equal(first["loss"], second["loss"])
    for rank in (first, second):
        torch.testing.assert_close(rank["loss"], alone["loss"], rtol=0, atol=1e-6)
        torch.testing.assert_close(rank["grad"], alone["grad"], rtol=0, atol=1e-6)
        assert abs(float(rank["alone"] - alone["loss"])) > 0.1  # fewer negatives without the gathering


def test_adaptation_of_two_processes_is_that_of_one(tmp_path):
    pytest.importorskip("lightning_fabric")
    alone = startup_run(0, 1)
    first, second = in_processes(startup_run, tmp_path)
    for name in ("whole", "parts"):
        assert same(first[name], second[name])
        for one, other in zip(first[name], alone[name], strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
        torch.testing.assert_close(first[f"{name} loss"], alone[f"{name} loss"], rtol=0, atol=1e-5)


def test_processes_with_batchnorm_take_the_same_decisions(tmp_path):
    pytest.importorskip("lightning_fabric")
    first, second = in_processes(startup_norm_run, tmp_path)
    for name in ("all", "simclr", "source"):
        assert same(first[name]["state"], second[name]["state"])
        for choice in ("lr", "epoch", "rates"):
            assert first[name][choice] == second[name][choice]
