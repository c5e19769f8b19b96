"""Mixup's transform against timm and torchvision, and the exact loss of the theory."""

from __future__ import annotations

import time
import warnings

import torch
from torch import Tensor

from benchmarks._harness import Row, medians, write
from outlast.diagnose.mixup_theory import exact_mixup_loss
from outlast.robust import MixUp


def _transform(shape: tuple[int, ...], repeats: int) -> list[Row]:
    from timm.data.mixup import Mixup
    from torchvision.transforms.v2 import MixUp as Peer

    x, y = torch.randn(shape), torch.randint(0, 10, shape[:1])
    timm_batch, timm_each = (Mixup(mixup_alpha=1.0, num_classes=10, label_smoothing=0.0, mode=mode) for mode in ("batch", "elem"))
    peer = Peer(alpha=1.0, num_classes=10)
    ours, each = MixUp(num_classes=10), MixUp(num_classes=10, per_sample=True)
    inplace = MixUp(num_classes=10, pairing="flip", inplace=True)
    work: dict[str, Tensor] = {name: x.clone() for name in ("timm", "timm each", "inplace")}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = medians(
            {
                "timm batch": lambda: timm_batch(work["timm"], y),
                "timm elem": lambda: timm_each(work["timm each"], y),
                "torchvision": lambda: peer(x, y),
                "ours": lambda: ours(x, y),
                "each": lambda: each(x, y),
                "inplace": lambda: inplace(work["inplace"], y),
            },
            repeats=repeats,
        )
    one, two = found["ours"] / found["torchvision"], found["each"] / found["timm elem"]
    limits = (("<= 0.6 of torchvision's", 0.6), ("<= 0.25 of timm elem", 0.25))
    if shape[-1] > 64:
        limits = (("<= 1.3 of torchvision's", 1.3), ("<= 1.3 of the faster peer", 1.3))
        two = found["each"] / min(found["torchvision"], found["timm elem"])
    name = f"transform, {'x'.join(map(str, shape))}"
    return [
        Row(name, "timm 1.0 batch (in place)", found["timm batch"]),
        Row(name, "timm 1.0 elem (in place)", found["timm elem"]),
        Row(name, "torchvision 0.29", found["torchvision"]),
        Row(name, "outlast, one weight a batch", found["ours"], one, limits[0][0], one <= limits[0][1]),
        Row(name, "outlast, one weight a sample", found["each"], two, limits[1][0], two <= limits[1][1]),
        Row(name, "outlast, flip, in place", found["inplace"]),
    ]


def _exact() -> list[Row]:
    stream = torch.Generator().manual_seed(0)
    X, theta = torch.randn(2000, 20, generator=stream), torch.randn(20, generator=stream) / 20**0.5
    y = (X @ theta > 0).long()
    rows: list[Row] = []
    for form in ("mixed", "label_preserving"):
        times: list[float] = []
        for _ in range(5):
            start = time.perf_counter()
            exact_mixup_loss(theta, X, y, 1.0, form=form)
            times.append(time.perf_counter() - start)
        seconds = sorted(times)[2]
        rows.append(Row("exact loss, n = 2000, d = 20, logistic, 64 nodes", form, 1e3 * seconds, None, "<= 10 s", seconds <= 10.0))
    return rows


def main() -> None:
    """Measure and write the table."""
    torch.set_num_threads(1)
    write("mixup", [*_transform((256, 3, 32, 32), 200), *_transform((32, 3, 224, 224), 60), *_exact()])
