"""STARTUP's parts against the authors' way: NT-Xent by broadcasting, evaluation that embeds each episode anew.

The authors' code does not run on current PyTorch; the loops below follow its description.
"""

from __future__ import annotations

import copy
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks._harness import Row, medians, write
from outlast.fewshot import (
    EpisodeSampler,
    ProjectionHead,
    SGDLinearClassifier,
    StartupLoss,
    StartupStudent,
    embed,
    evaluate_episodes,
    nt_xent,
)
from outlast.studies._models import conv4


def _broadcast(z1: torch.Tensor, z2: torch.Tensor, temperature: float) -> torch.Tensor:
    rows = torch.cat([z1, z2])
    similarity = F.cosine_similarity(rows[:, None], rows[None], dim=2) / temperature
    count = len(z1)
    positive = torch.cat([similarity.diagonal(count), similarity.diagonal(-count)])[:, None]
    mask = ~torch.eye(2 * count, dtype=torch.bool)
    mask &= ~torch.eye(2 * count, dtype=torch.bool).roll(count, 1)
    negative = similarity[mask].view(2 * count, -1)
    return F.cross_entropy(torch.cat([positive, negative], 1), torch.zeros(2 * count, dtype=torch.int64))


def _contrast() -> list[Row]:
    z = torch.randn(2, 128, 128, generator=torch.Generator().manual_seed(0)).requires_grad_()
    assert torch.allclose(_broadcast(z[0], z[1], 0.5), nt_xent(z[0], z[1], temperature=0.5), atol=1e-5)

    def run(loss: torch.Tensor) -> None:
        torch.autograd.grad(loss, z)

    found = medians(
        {"peer": lambda: run(_broadcast(z[0], z[1], 0.5)), "ours": lambda: run(nt_xent(z[0], z[1], temperature=0.5))}, repeats=15
    )
    name, ratio = "NT-Xent with gradient, 128 samples, 128 wide", found["peer"] / found["ours"]
    with torch.profiler.profile(profile_memory=True) as record:
        run(nt_xent(z[0], z[1], temperature=0.5))
    level = peak = 0
    for event in record.profiler.kineto_results.events():  # pyright: ignore[reportOptionalMemberAccess]
        if event.name() == "[memory]":
            level += event.nbytes()
            peak = max(peak, level)
    squares = peak / (4 * 256**2)
    return [
        Row(name, "broadcast over (2B, 2B, p)", found["peer"]),
        Row(name, "outlast", found["ours"], ratio, ">= 100 x faster", ratio >= 100),
        Row(name, f"outlast, peak memory in units of (2B)^2 floats: {squares:.2f}", found["ours"], None, "<= 4", squares <= 4),
    ]


def _evaluation(each: int, network: Literal["four convolutions, 28x28", "ResNet-18, 84x84"]) -> list[Row]:
    stream = torch.Generator().manual_seed(0)
    labels = torch.arange(20).repeat_interleave(each)
    torch.manual_seed(0)
    if network == "ResNet-18, 84x84":
        from torchvision.models import resnet18

        backbone, width, images = resnet18(), 512, torch.rand(20 * each, 3, 84, 84, generator=stream)
        backbone.fc = nn.Identity()
    else:
        backbone, width, images = conv4(1, 64), 256, torch.rand(20 * each, 1, 28, 28, generator=stream)
    backbone.eval()
    episodes, few = 600, 3
    sampler = EpisodeSampler(labels, 5, 5, 15, episodes=few)

    def official() -> None:
        for support, query in sampler:
            own = copy.deepcopy(backbone)
            with torch.no_grad():
                rows, tests = own(images[support]), own(images[query])
            layer = nn.Linear(width, 5)
            optimizer = torch.optim.SGD(layer.parameters(), lr=0.01, momentum=0.9, dampening=0.9, weight_decay=1e-3)
            for _ in range(100):
                for index in torch.randperm(25).split(4):
                    optimizer.zero_grad()
                    F.cross_entropy(layer(rows[index]), sampler.support_labels[index]).backward()
                    optimizer.step()
            layer(tests).argmax(1)

    def ours() -> None:
        features, classes = embed(backbone, zip(images.split(64), labels.split(64), strict=True))
        evaluate_episodes(SGDLinearClassifier(), features, classes, way=5, shot=5, query=15, episodes=episodes)

    found = medians({"peer": official, "ours": ours}, repeats=3, warmup=1)
    peer, ours_ms = found["peer"] * episodes / few, found["ours"]
    name = f"evaluation, 600 5-way 5-shot episodes of {20 * each:,} images, {network}"
    return [
        Row(name, f"each episode embedded anew, one by one (from {few} episodes)", peer),
        Row(name, "outlast, all", ours_ms, peer / ours_ms, ">= 50 x faster", peer / ours_ms >= 50),
    ]


def _step() -> list[Row]:
    stream = torch.Generator().manual_seed(0)
    source, views = torch.rand(64, 1, 28, 28, generator=stream), torch.rand(2, 64, 1, 28, 28, generator=stream)
    labels, probs = torch.randint(0, 64, (64,), generator=stream), torch.randn(64, 64, generator=stream).softmax(1)
    loss = StartupLoss(0.5)

    def student(policy: str) -> StartupStudent:
        torch.manual_seed(0)
        return StartupStudent(conv4(1, 32), nn.Linear(128, 64), ProjectionHead(128), batchnorm=policy)  # pyright: ignore[reportArgumentType]

    students = {policy: student(policy) for policy in ("separate", "joint")}
    bare = student("separate")

    def ours(policy: str) -> None:
        students[policy].zero_grad()
        logits, target, projections = students[policy](source, views)
        loss(logits, labels, target, probs, projections).total.backward()

    def by_hand() -> None:
        bare.zero_grad()
        assert bare.projector is not None
        features = [bare.backbone(part) for part in (source, *views)]
        first, second = (F.normalize(bare.projector(part)) for part in features[1:])
        rows = torch.cat([first, second])
        similarity = (rows @ rows.T / 0.5).masked_fill(torch.eye(128, dtype=torch.bool), -torch.inf)
        total = F.cross_entropy(bare.head(features[0]), labels) + F.cross_entropy(similarity, torch.arange(128).roll(64))
        for part in features[1:]:
            total = total + 0.5 * F.kl_div(bare.head(part).log_softmax(1), probs, reduction="batchmean")
        total.backward()

    found = medians({"bare": by_hand, "separate": lambda: ours("separate"), "joint": lambda: ours("joint")}, repeats=15)
    name = "a step without the optimizer, batch 64, four convolutions on 28x28"
    ratios = {policy: found[policy] / found["bare"] for policy in ("separate", "joint")}
    return [
        Row(name, "three passes by hand", found["bare"]),
        Row(name, "outlast, separate", found["separate"], ratios["separate"], "<= 1.05 of by hand", ratios["separate"] <= 1.05),
        Row(
            name,
            "outlast, joint",
            found["joint"],
            found["joint"] / found["separate"],
            "<= 1 of separate",
            found["joint"] <= found["separate"],
        ),
    ]


def main() -> None:
    """Measure and write the table."""
    torch.set_num_threads(1)
    write(
        "startup",
        [
            *_contrast(),
            *_evaluation(30, "ResNet-18, 84x84"),
            *_evaluation(30, "four convolutions, 28x28"),
            *_evaluation(250, "four convolutions, 28x28"),
            *_step(),
        ],
    )
