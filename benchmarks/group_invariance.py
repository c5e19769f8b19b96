"""The invariance penalty and the inference of groups, against loops over classes and iterated EIIL."""

from __future__ import annotations

import time
import warnings

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks._harness import Row, medians, write
from outlast.robust import GroupInvariance, infer_groups, invariance_penalty
from outlast.studies._models import pooled_conv


def _looped(logits: Tensor, labels: Tensor, groups: Tensor) -> Tensor:
    """Class by class, with lists of the groups' rows on the host, as the specification describes occam-nets-v1's penalty."""
    p = logits.softmax(1)
    total = logits.new_zeros(())
    names, sides = labels.tolist(), groups.tolist()
    for c in range(logits.shape[1]):
        rows = [[i for i, (label, side) in enumerate(zip(names, sides, strict=True)) if label == c and side == g] for g in (0, 1)]
        if rows[0] and rows[1]:
            m0, m1 = (p[torch.tensor(own)].mean(0).clamp(1e-12, 1.0) for own in rows)
            total = total + (m1 * (m1.log() - m0.log())).sum()
    return total / logits.shape[1]


def _penalty() -> list[Row]:
    rows: list[Row] = []
    for K, target in ((9, 3.0), (100, 20.0), (1000, 10.0)):
        stream = torch.Generator().manual_seed(K)
        logits = torch.randn(512, K, generator=stream).requires_grad_()
        labels, groups = torch.randint(0, K, (512,), generator=stream), (torch.rand(512, generator=stream) < 0.2).long()
        assert abs(float((invariance_penalty(logits, labels, groups) - _looped(logits, labels, groups)).detach())) < 1e-6
        found = medians(
            {
                "loop": lambda z=logits, y=labels, g=groups: torch.autograd.grad(_looped(z, y, g), z),
                "ours": lambda z=logits, y=labels, g=groups: torch.autograd.grad(invariance_penalty(z, y, g), z),
            },
            repeats=30,
        )
        ratio = found["loop"] / found["ours"]
        name = f"penalty, forward and backward, 512 x {K}"
        rows += [
            Row(name, "reference loop over classes", found["loop"]),
            Row(name, "outlast", found["ours"], ratio, f">= {target:g} x faster", ratio >= target),
        ]
    return rows


def _inference() -> list[Row]:
    stream = torch.Generator().manual_seed(0)
    n = 6299
    features, logits = torch.randn(n, 64, generator=stream).relu(), 3.0 * torch.randn(n, 9, generator=stream)
    labels = torch.randint(0, 9, (n,), generator=stream)
    slopes = ((logits.softmax(1) - F.one_hot(labels, 9)) * logits).sum(1)

    def value(w: Tensor) -> Tensor:
        return (w * slopes).mean().square() + ((1.0 - w) * slopes).mean().square()

    def iterated(steps: int) -> Tensor:
        raw = torch.randn(n, generator=stream).requires_grad_()
        optimizer = torch.optim.Adam([raw], lr=1e-3)
        for _ in range(steps):
            optimizer.zero_grad()
            (-value(raw.sigmoid())).backward()
            optimizer.step()
        return raw.detach().sigmoid()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        start = time.perf_counter()
        soft = iterated(20_000)
        slow = 1e3 * (time.perf_counter() - start)
        found = medians(
            {
                "eiil": lambda: infer_groups(features, logits, labels, method="eiil"),
                "one": lambda: infer_groups(features, logits, labels, restarts=1),
                "three": lambda: infer_groups(features, logits, labels),
            },
            repeats=5,
            warmup=1,
        )
        assert float(value(infer_groups(features, logits, labels, method="eiil").scores)) >= float(value(soft)) - 1e-6
    ratio = slow / found["eiil"]
    return [
        Row("EIIL, 6,299 examples", "reference loop, 20,000 steps of Adam", slow),
        Row("EIIL, 6,299 examples", "outlast, closed form", found["eiil"], ratio, ">= 1000 x faster", ratio >= 1000.0),
        Row("partition, 6,299 x 64, 9 classes", "outlast, 1 restart", found["one"], None, "<= 300 ms", found["one"] <= 300.0),
        Row("partition, 6,299 x 64, 9 classes", "outlast, 3 restarts", found["three"]),
    ]


def _step() -> list[Row]:
    stream = torch.Generator().manual_seed(0)
    x, y = torch.randn(128, 3, 14, 14, generator=stream), torch.randint(0, 9, (128,), generator=stream)
    groups = (torch.rand(128, generator=stream) < 0.2).long()
    torch.manual_seed(0)
    models: list[nn.Module] = [pooled_conv(16, last_pool=False, num_classes=9) for _ in range(2)]
    optimizers = [torch.optim.SGD(model.parameters(), lr=1e-6) for model in models]
    method = GroupInvariance(models[1], head="head", ramp_steps=1)
    method.set_groups(groups)
    index = torch.arange(128)

    def plain() -> None:
        optimizers[0].zero_grad()
        F.cross_entropy(models[0](x), y).backward()
        optimizers[0].step()

    def ours() -> None:
        optimizers[1].zero_grad()
        method.loss(x, y, index).total.backward()
        optimizers[1].step()

    found = medians({"plain": plain, "ours": ours}, repeats=60)
    ratio = found["ours"] / found["plain"]
    name = "training step of the study, 128 images of 14x14"
    return [Row(name, "cross-entropy", found["plain"]), Row(name, "GroupInvariance", found["ours"], ratio, "<= 1.10 plain", ratio <= 1.10)]


def main() -> None:
    """Measure and write the table."""
    torch.set_num_threads(1)
    write("group_invariance", [*_penalty(), *_inference(), *_step()])
