"""GPM's consolidation, step and memory against a reference loop after the authors' code, and whole trainings against plain SGD.

The authors' code is no package; the loop below follows its description: representation matrices kept, two full singular value
decompositions a layer in numpy, a dense projector of the gradient.
"""

from __future__ import annotations

import time

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks._harness import Row, medians, write
from outlast.continual import GradientProjectionMemory
from outlast.continual._basis import Rows


def _official_update(rows: np.ndarray, basis: np.ndarray, threshold: float) -> np.ndarray:
    """One layer's new basis by two decompositions of the d x n matrix, as the scripts do from the second task on."""
    _, all_values, _ = np.linalg.svd(rows, full_matrices=False)
    total = (all_values**2).sum()
    rest = rows - basis @ (basis.T @ rows)
    left, values, _ = np.linalg.svd(rest, full_matrices=False)
    reached = (total - (values**2).sum()) / total
    count = 0
    for share in values**2 / total:
        if reached >= threshold:
            break
        reached += share
        count += 1
    return np.hstack([basis, left[:, :count]])


def _consolidation() -> list[Row]:
    d, n, held = 576, 14_400, 60
    rng = torch.Generator().manual_seed(0)
    mixing = torch.linalg.qr(torch.randn(d, d, generator=rng)).Q * torch.logspace(0, -1.6, d)
    rows = torch.randn(n, d, generator=rng) @ mixing.T
    basis = torch.linalg.qr(torch.randn(d, held, generator=rng, dtype=torch.float64)).Q

    def ours() -> int:
        seen = Rows(basis[None], 0.97)
        seen.add(rows[None])
        return int(seen.select(0.97, official=False, limit=d, ranks=[held]).added)

    matrix, numpy_basis = rows.T.double().numpy(), basis.numpy()
    found = medians({"ours": ours, "official": lambda: _official_update(matrix, numpy_basis, 0.97)}, repeats=3, warmup=0)
    assert ours() == _official_update(matrix, numpy_basis, 0.97).shape[1] - held
    name = "consolidation, d = 576, n = 14,400, 60 held"
    ratio = found["official"] / found["ours"]
    return [
        Row(name, "reference loop after the authors' code", found["official"]),
        Row(name, "outlast", found["ours"], ratio, ">= 10 x faster", ratio >= 10),
    ]


def _step() -> list[Row]:
    rows: list[Row] = []
    for o, d, ks in ((2048, 1024, (100, 300, 700)), (100, 784, (100, 340))):
        for k in ks:
            torch.manual_seed(0)
            model = nn.Linear(d, o, bias=False)
            memory = GradientProjectionMemory(model, threshold=1.0)
            memory.consolidate([torch.randn(k, d)])
            site = memory._sites["weight"]
            dense = (site.wide_basis()[0] @ site.wide_basis()[0].T).float()
            model.weight.grad = torch.randn(o, d)

            def official(grad: Tensor = model.weight.grad, projector: Tensor = dense) -> None:
                grad.sub_(grad @ projector)

            found = medians({"ours": memory.project_, "official": official}, repeats=15)
            name = f"step, weight {o} x {d}, rank {k}"
            ratio = found["ours"] / found["official"]
            target, met = ("<= 0.25 dense", ratio <= 0.25) if (o, k) == (2048, 100) else ("<= 1.1 dense", ratio <= 1.1)
            rows += [Row(name, "dense projector", found["official"]), Row(name, "outlast", found["ours"], ratio, target, met)]
    return rows


def _memory() -> list[Row]:
    """Bytes held for the three layers of the permuted study: no time, so the column of milliseconds holds kilobytes."""
    model = nn.Sequential(
        nn.Linear(784, 100, bias=False), nn.ReLU(), nn.Linear(100, 100, bias=False), nn.ReLU(), nn.Linear(100, 10, bias=False)
    )
    ranks = {"0": 338, "2": 92, "4": 60}
    rows: list[Row] = []
    for keep in (False, True):
        memory = GradientProjectionMemory(model, threshold=1.0, keep_reference=keep)
        for name, rank in ranks.items():
            site = memory._sites[name]
            basis = torch.linalg.qr(torch.randn(site.dim, rank)).Q[None]
            site.basis, site.ranks = basis, [rank]
            site.drop_anchor(keep_reference=keep)
        official = sum(8 * memory._sites[name].dim * rank + 4 * memory._sites[name].dim ** 2 for name, rank in ranks.items())
        ratio = memory.nbytes / official
        name = "memory after 5 permuted tasks (kB instead of ms)"
        if not keep:
            rows.append(Row(name, "float64 bases and dense projectors", official / 1e3))
        rows.append(Row(name, f"outlast, keep_reference={keep}", memory.nbytes / 1e3, ratio, "<= 0.6", ratio <= 0.6))
    return rows


def _training() -> list[Row]:
    from outlast.data import load

    data = load("mnist", variant="small")
    images = data.images.flatten(1).float() / 255.0
    orders = [torch.randperm(784, generator=torch.Generator().manual_seed(task)) for task in range(5)]

    def run(batch: int, every: int | None) -> None:
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Linear(784, 100, bias=False), nn.ReLU(), nn.Linear(100, 100, bias=False), nn.ReLU(), nn.Linear(100, 10, bias=False)
        )
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        memory = None
        if every is not None:
            memory = GradientProjectionMemory(model, threshold={"0": 0.95, "2": 0.99, "4": 0.99}, keep_reference=False)
            memory.attach(optimizer, every=every)
        for order in orders:
            x = images[:, order]
            for index in torch.arange(8000).split(batch) * 3:
                optimizer.zero_grad()
                F.cross_entropy(model(x[index]), data.labels[index]).backward()
                optimizer.step()
            if memory is not None:
                memory.consolidate([x[:300]])

    rows: list[Row] = []
    for batch, limit in ((10, 2.5), (256, 1.3)):
        rivals = {"plain": lambda b=batch: run(b, None), "every": lambda b=batch: run(b, 1), "fourth": lambda b=batch: run(b, 4)}
        found = medians(rivals, repeats=3, warmup=1)
        name = f"5 permuted tasks of 8,000, 3 epochs, batch {batch}"
        rows.append(Row(name, "plain SGD", found["plain"]))
        for kind, title in (("every", "outlast"), ("fourth", "outlast, every=4")):
            ratio = found[kind] / found["plain"]
            rows.append(Row(name, title, found[kind], ratio, f"<= {limit} plain", ratio <= limit))
    return rows


def main() -> None:
    """Measure and write the table."""
    torch.set_num_threads(1)
    start = time.perf_counter()
    write("gpm", [*_consolidation(), *_step(), *_memory(), *_training()])
    print(f"{time.perf_counter() - start:.0f} s")
