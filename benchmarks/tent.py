"""Tent and Norm on ResNet-20, against short loops written after the descriptions of other implementations."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from benchmarks._harness import Row, medians, write
from outlast.adapt import (
    CollapseAlarm,
    Diversity,
    DriftLimit,
    EntropyFilter,
    Norm,
    PeriodicReset,
    Recovery,
    RedundancyFilter,
    StochasticRestore,
    Tent,
)
from outlast.data import load_weights
from outlast.studies._models import CifarResNet


def _model() -> nn.Module:
    model = CifarResNet(20)
    model.load_state_dict(load_weights("cifar10-resnet20"))
    return model.eval()


class _Official(nn.Module):
    """The original's way: training mode, statistics deleted, entropy of softmax, Adam on scales and shifts."""

    def __init__(self, model: nn.Module, *, copies: bool = False) -> None:
        super().__init__()
        self.model = model.train().requires_grad_(False)
        self.copies = copies
        own: list[nn.Parameter] = []
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.requires_grad_(True)
                module.track_running_stats = False
                module.running_mean = module.running_var = None
                own += [module.weight, module.bias]
        self.optimizer = torch.optim.Adam(own, lr=1e-3)
        self.kept: object = None

    @torch.enable_grad()
    def forward(self, x: Tensor) -> Tensor:
        if self.copies:  # ttab keeps a checkpoint of model and optimizer at every step, to select one later
            self.kept = copy.deepcopy(self.model), copy.deepcopy(self.optimizer.state_dict())
        z = self.model(x)
        loss = -(z.softmax(1) * z.log_softmax(1)).sum(1).mean(0)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return z


def _batch_statistics(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.training, module.track_running_stats = True, False
    return model


def main() -> None:
    """Measure and write the table."""
    torch.set_num_threads(1)
    x = torch.randn(200, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    source, official, copying = _model(), _Official(_model()), _Official(_model(), copies=True)
    hand, norm, tent = _batch_statistics(_model()), Norm(_model()), Tent(_model())
    every = [
        EntropyFilter(1.0),
        RedundancyFilter(1.0),
        Recovery(0.0),
        PeriodicReset(10**6),
        Diversity(0.1),
        StochasticRestore(0.01),
        DriftLimit(10.0),
        CollapseAlarm(max_drop=1.0),
    ]
    guarded = Tent(_model(), guards=every)

    def no_grad(module: nn.Module) -> None:
        with torch.no_grad():
            module(x)

    found = medians(
        {
            "source": lambda: no_grad(source),
            "hand": lambda: no_grad(hand),
            "norm": lambda: no_grad(norm),
            "official": lambda: official(x),
            "copies": lambda: copying(x),
            "tent": lambda: tent(x),
            "guarded": lambda: guarded(x),
        },
        repeats=25,
    )
    reset = medians({"reset": tent.reset}, repeats=25)["reset"]
    state = tent.get_extra_state()
    adapted = sum(value.numel() * value.element_size() for value in state["source"])
    whole = sum(value.numel() * value.element_size() for value in tent.model.parameters())
    name = "ResNet-20, 200 images of 32x32"
    ratios = {
        "norm": found["norm"] / found["hand"],
        "tent": found["tent"] / found["official"],
        "copies": found["copies"] / found["tent"],
        "guarded": found["guarded"] / found["tent"],
    }
    write(
        "tent",
        [
            Row(name, "source, eval mode", found["source"]),
            Row(name, "batch statistics by hand", found["hand"]),
            Row(name, "outlast Norm", found["norm"], ratios["norm"], "<= 1.02 of by hand", ratios["norm"] <= 1.02),
            Row(name, "loop after DequanWang/tent", found["official"]),
            Row(name, "outlast Tent", found["tent"], ratios["tent"], "<= 1.02 of that loop", ratios["tent"] <= 1.02),
            Row(
                name,
                "loop after ttab (copies each step)",
                found["copies"],
                ratios["copies"],
                ">= 1.5 of outlast Tent",
                ratios["copies"] >= 1.5,
            ),
            Row(
                name,
                "outlast Tent, eight guards",
                found["guarded"],
                ratios["guarded"],
                "<= 1.05 of outlast Tent",
                ratios["guarded"] <= 1.05,
            ),
            Row(name, "reset()", reset, None, "< 2 ms", reset < 2.0),
            Row(
                f"kept for reset, buffers aside: {adapted:,} of {whole:,} bytes",
                "outlast Tent",
                0.0,
                adapted / whole,
                "<= 0.02",
                adapted / whole <= 0.02,
            ),
        ],
    )
