"""GradVac's engines against the plain sum, separate gradients and TorchJD."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks._harness import Row, medians, write
from outlast.multitask import GradVac, gradvac_coefficients

TASKS = [f"task {number}" for number in range(8)]


def _network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(512, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 100))


def _loop(rows: int) -> list[Row]:
    """The loop engine against the gradients that it cannot do without."""
    torch.manual_seed(0)
    x, y = torch.randn(8 * rows, 512), torch.randint(0, 100, (8 * rows,))
    models = [_network() for _ in range(2)]
    vaccine = GradVac(torch.optim.SGD(models[0].parameters(), lr=0.1), TASKS, model=models[0])

    def losses(model: nn.Module) -> list[torch.Tensor]:
        return [F.cross_entropy(model(a), b) for a, b in zip(x.split(rows), y.split(rows), strict=True)]

    def ours() -> None:
        models[0].zero_grad()
        vaccine.backward(dict(zip(TASKS, losses(models[0]), strict=True)))

    def separate() -> None:
        parameters = list(models[1].parameters())
        for loss in losses(models[1]):
            torch.autograd.grad(loss, parameters)

    found = medians({"ours": ours, "separate": separate}, repeats=9, warmup=2)
    name = f"the same network, 8 tasks x {rows} rows, a pass for each task"
    ratio = found["ours"] / found["separate"]
    return [
        Row(name, "8 separate autograd.grad", found["separate"]),
        Row(name, "outlast, loop engine", found["ours"], ratio, "<= 1.15 separate", ratio <= 1.15),
    ]


def _step() -> list[Row]:
    from torchjd.aggregation import GradVac as PeerGradVac
    from torchjd.autojac import backward, jac_to_grad

    x, y = torch.randn(256, 512), torch.randint(0, 100, (256,))
    ids = torch.arange(8).repeat_interleave(32)
    models = [_network() for _ in range(3)]
    layer = GradVac(torch.optim.SGD(models[1].parameters(), lr=0.1), TASKS, model=models[1])

    def losses(model: nn.Module) -> list[torch.Tensor]:
        return [F.cross_entropy(model(a), b) for a, b in zip(x.split(32), y.split(32), strict=True)]

    def plain() -> None:
        models[0].zero_grad()
        F.cross_entropy(models[0](x), y).backward()

    def ours_layer() -> None:
        models[1].zero_grad()
        with layer.rows(ids):
            loss = F.cross_entropy(models[1](x), y)
        loss.backward()

    peer = PeerGradVac()

    def torchjd() -> None:
        models[2].zero_grad()
        backward(losses(models[2]), parallel_chunk_size=1)
        jac_to_grad(models[2].parameters(), peer)

    found = medians({"plain": plain, "layer": ours_layer, "torchjd": torchjd}, repeats=9, warmup=2)
    name = "MLP 512-1024-1024-100, 8 tasks x 32 rows, forward and backward"
    layer_ratio, peer_ratio = found["layer"] / found["plain"], found["torchjd"] / found["layer"]
    return [
        Row(name, "plain sum", found["plain"]),
        Row(name, "outlast, layer engine", found["layer"], layer_ratio, "<= 2.0 plain", layer_ratio <= 2.0),
        Row(name, "TorchJD 0.18.0, parallel_chunk_size=1", found["torchjd"], peer_ratio, ">= 4 layer engine", peer_ratio >= 4),
    ]


def _coefficients() -> list[Row]:
    g = torch.randn(100, 16, 64, dtype=torch.float64)
    gram, target = g @ g.mT, torch.full((100, 16, 16), 0.1)
    stream = torch.Generator().manual_seed(0)
    found = medians({"ours": lambda: gradvac_coefficients(gram, target, generator=stream)}, repeats=25)
    return [Row("coefficients, K = 100, T = 16", "outlast", found["ours"], None, "<= 10 ms", found["ours"] <= 10)]


def _peak() -> list[Row]:
    """Largest memory above the plain backward pass, by torch's own allocation record (megabytes in the column of milliseconds)."""
    from torch.profiler import ProfilerActivity, profile

    x, y, ids = torch.randn(256, 512), torch.randint(0, 100, (256,)), torch.arange(8).repeat_interleave(32)

    def peak(run: object) -> float:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorder:
            run()  # type: ignore[operator]
        total = highest = 0
        for event in recorder.profiler.kineto_results.events():
            if event.name() == "[memory]":
                total += event.nbytes()
                highest = max(highest, total)
        return highest / 1e6

    plain_model = _network()
    labelled = copy.deepcopy(plain_model)
    vaccine = GradVac(torch.optim.SGD(labelled.parameters(), lr=0.1), TASKS, model=labelled)

    def plain() -> None:
        F.cross_entropy(plain_model(x), y).backward()

    def ours() -> None:
        with vaccine.rows(ids):
            loss = F.cross_entropy(labelled(x), y)
        loss.backward()

    extra = peak(ours) - peak(plain)
    limit = 9 * 4 * 1024 * 1024 / 1e6
    return [
        Row(
            "extra memory of the layer engine (MB instead of ms)", "outlast", extra, extra / limit, "<= 1 of (T + 1) layers", extra <= limit
        )
    ]


def main() -> None:
    """Measure and write the table."""
    torch.set_num_threads(1)
    write("gradvac", [*_step(), *_loop(32), *_loop(256), *_coefficients(), *_peak()])
