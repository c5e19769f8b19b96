"""SAM's optimizer part and whole steps, against pytorch_optimizer and the plain optimizer."""

from __future__ import annotations

import subprocess
import sys
import time

import torch
from torch import nn
from torch.optim import SGD

from benchmarks._harness import Row, medians, write
from outlast.robust import SAM


def _resnet18_parameters() -> list[nn.Parameter]:
    """The shapes of ResNet-18's 62 tensors, 11.7 million weights."""
    from torchvision.models import resnet18

    return list(resnet18().parameters())


def _optimizer_part() -> list[Row]:
    from pytorch_optimizer import SAM as PeerSAM

    torch.manual_seed(0)
    sets = [_resnet18_parameters() for _ in range(3)]
    grads = [torch.randn_like(parameter) for parameter in sets[0]]

    def give(parameters: list[nn.Parameter]) -> None:
        for parameter, grad in zip(parameters, grads, strict=True):
            parameter.grad = grad

    plain = SGD(sets[0], lr=1e-6)
    ours = SAM(SGD(sets[1], lr=1e-6), buffers="update")
    peer = PeerSAM(sets[2], SGD, lr=1e-6)

    def run_plain() -> None:
        give(sets[0])
        plain.step()

    def run_ours() -> None:
        give(sets[1])
        ours.ascend()
        give(sets[1])
        ours.restore()
        ours.step()

    def run_peer() -> None:
        give(sets[2])
        peer.first_step(zero_grad=True)
        give(sets[2])
        peer.second_step()

    found = medians({"SGD": run_plain, "outlast SAM": run_ours, "pytorch_optimizer SAM": run_peer}, repeats=25)
    own, other = found["outlast SAM"] - found["SGD"], found["pytorch_optimizer SAM"] - found["SGD"]
    name = "optimizer part, 62 tensors of ResNet-18"
    return [
        Row(name, "SGD step", found["SGD"]),
        Row(name, "pytorch_optimizer 4.1 overhead", other),
        Row(name, "outlast overhead", own, own / other, "<= 0.4 of the peer's", own / other <= 0.4),
    ]


def _whole_step(batch: int) -> list[Row]:
    from torchvision.models import resnet18

    torch.manual_seed(0)
    models = [resnet18(num_classes=10) for _ in range(3)]
    images, labels = torch.randn(batch, 3, 64, 64), torch.randint(0, 10, (batch,))
    loss_fn = nn.CrossEntropyLoss()
    plain = SGD(models[0].parameters(), lr=1e-6)
    sam = SAM(SGD(models[1].parameters(), lr=1e-6))
    look = SAM(SGD(models[2].parameters(), lr=1e-6), every=5, reuse="looksam")

    def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss = loss_fn(model(images), labels)
            loss.backward()
            return loss

        optimizer.step(closure)

    def five(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        for _ in range(5):
            step(model, optimizer)

    found = medians(
        {"plain": lambda: five(models[0], plain), "sam": lambda: five(models[1], sam), "look": lambda: five(models[2], look)},
        repeats=9,
        warmup=1,
    )
    found = {name: value / 5 for name, value in found.items()}
    name = f"whole step, ResNet-18, {batch} images of 64x64"
    sam_ratio, look_ratio = found["sam"] / found["plain"], found["look"] / found["plain"]
    return [
        Row(name, "SGD", found["plain"]),
        Row(name, "outlast SAM", found["sam"], sam_ratio, "<= 2.05 plain steps", sam_ratio <= 2.05),
        Row(name, "outlast LookSAM, every=5", found["look"], look_ratio, "<= 1.3 plain steps", look_ratio <= 1.3),
    ]


def _start() -> list[Row]:
    def timed(*words: str) -> None:
        subprocess.run([sys.executable, *words], check=True, capture_output=True)

    code = "import time, torch; a = time.perf_counter(); import outlast; print(time.perf_counter() - a)"
    seconds = sorted(
        float(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout) for _ in range(5)
    )[2]
    times = []
    for _ in range(5):
        start = time.perf_counter()
        timed("-m", "outlast", "--help")
        times.append(time.perf_counter() - start)
    help_seconds = sorted(times)[2]
    return [
        Row("start", "import outlast after torch", 1e3 * seconds, None, "<= 300 ms", seconds <= 0.3),
        Row("start", "outlast --help", 1e3 * help_seconds, None, "< 500 ms", help_seconds < 0.5),
    ]


def main() -> None:
    """Measure and write the table."""
    torch.set_num_threads(1)
    write("sam", [*_optimizer_part(), *_whole_step(16), *_whole_step(64), *_start()])
