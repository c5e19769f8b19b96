"""The padding audit, its maps, and padding kernels against torch's."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks._harness import Row, medians, write
from outlast.diagnose import padding
from outlast.diagnose.padding._audit import replay
from outlast.diagnose.padding._trace import trace


def _median(call: Callable[[], object], repeats: int = 5) -> float:
    times: list[float] = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - start))
    return sorted(times)[repeats // 2]


def _audits() -> list[Row]:
    from torchvision.models import resnet18, resnet50

    large, small = resnet50(weights=None), resnet18(weights=None)
    graph = trace(large, (3, 224, 224))
    many = _median(lambda: [padding.audit(large, (3, n, n)) for n in range(209, 241)], 3)
    replayed = _median(lambda: [replay(graph, axis, n) for n in range(209, 241) for axis in (0, 1)])
    suggested = _median(lambda: padding.suggest_sizes(large, 224))
    reach = _median(lambda: padding.foveation(small, (3, 224, 224)))
    return [
        Row("audit of ResNet-50", "32 sizes, one pass each", many, None, "<= 3 s", many <= 3000.0),
        Row("audit of ResNet-50", "32 sizes, both axes, replayed", replayed, None, "< 50 ms", replayed < 50.0),
        Row("audit of ResNet-50", "five sizes suggested and each tried", suggested),
        Row("foveation map", "ResNet-18 at 224", reach, None, "<= 300 ms", reach <= 300.0),
    ]


def _kernels() -> list[Row]:
    x = torch.randn(32, 64, 56, 56, requires_grad=True)
    weight = torch.randn(64, 64, 3, 3, requires_grad=True)

    def both(make: Callable[[], Tensor]) -> None:
        make().sum().backward()

    one = medians(
        {
            "replicate": lambda: both(lambda: F.conv2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), weight)),
            "symmetric": lambda: both(lambda: F.conv2d(padding.pad(x, (1, 1, 1, 1), "symmetric"), weight)),
        },
        repeats=15,
    )
    three = medians(
        {
            "reflect": lambda: both(lambda: F.pad(x, (3, 3, 3, 3), mode="reflect")),
            "symmetric": lambda: both(lambda: padding.pad(x, (3, 3, 3, 3), "symmetric")),
        },
        repeats=25,
    )
    plain, partial = nn.Conv2d(64, 64, 3, padding=1), padding.PartialConv2d(64, 64, 3, padding=1)
    layers = medians({"zeros": lambda: both(lambda: plain(x)), "partial": lambda: both(lambda: partial(x))}, repeats=15)
    ratios = (one["symmetric"] / one["replicate"], three["symmetric"] / three["reflect"], layers["partial"] / layers["zeros"])
    name = "32x64x56x56, forward and backward"
    return [
        Row(f"pad by 1 and convolve, {name}", "torch F.pad(replicate)", one["replicate"]),
        Row(f"pad by 1 and convolve, {name}", "outlast symmetric", one["symmetric"], ratios[0], "<= 1.05", ratios[0] <= 1.05),
        Row(f"pad by 3, {name}", "torch F.pad(reflect)", three["reflect"]),
        Row(f"pad by 3, {name}", "outlast symmetric", three["symmetric"], ratios[1], "<= 1.3", ratios[1] <= 1.3),
        Row(f"convolution, {name}", "torch, zeros", layers["zeros"]),
        Row(f"convolution, {name}", "outlast partial", layers["partial"], ratios[2], "<= 1.15", ratios[2] <= 1.15),
    ]


def main() -> None:
    """Measure and write the table."""
    torch.set_num_threads(1)
    write("padding", [*_audits(), *_kernels()])
