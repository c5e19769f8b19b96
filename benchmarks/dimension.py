"""Neighbour search and maximum-likelihood dimension, against faiss and scikit-dimension."""

from __future__ import annotations

import subprocess
import sys
import warnings

import torch

from benchmarks._harness import Row, medians, write
from outlast.data import load
from outlast.diagnose import dimension

_CHILD = """
import pathlib, time, torch
from outlast.diagnose import dimension
torch.set_num_threads(1)
status = lambda name: int(pathlib.Path("/proc/self/status").read_text().split(name)[1].split()[0])
torch.rand(500, 500) @ torch.rand(500, 500)  # libraries that load at the first product
base = status("VmRSS:")
x = torch.rand({n}, 784, generator=torch.Generator().manual_seed(0))
start = time.perf_counter()
dimension.estimate(x, k=20, anchors={n})
print(time.perf_counter() - start, base, status("VmHWM:"))  # the peak of this program alone, unlike getrusage's
"""


def _peers() -> list[Row]:
    import faiss
    import skdim

    faiss.omp_set_num_threads(1)
    x = load("fashion-mnist", "test", variant="small").images.flatten(1).float() / 255
    array = x.numpy()

    def run_faiss() -> object:
        index = faiss.IndexFlatL2(array.shape[1])
        index.add(array)
        return index.search(array, 21)

    def run_skdim() -> object:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return skdim.id.MLE(K=20).fit(array)

    found = medians(
        {
            "knn": lambda: dimension.knn(x, 20),
            "mle": lambda: dimension.estimate(x, k=20),
            "faiss": run_faiss,
            "skdim": run_skdim,
        },
        repeats=7,
        warmup=1,
    )
    distances, _ = dimension.knn(x, 20)
    exact = torch.cdist(x[:500].double(), x.double(), compute_mode="donot_use_mm_for_euclid_dist")
    exact[torch.arange(500), torch.arange(500)] = torch.inf
    truth = exact.topk(20, largest=False).values
    error = float(((distances[:500] - truth) / truth).abs().max())
    name = "Fashion-MNIST test, 10,000 x 784, k = 20"
    knn, mle = found["knn"] / found["faiss"], found["mle"] / found["skdim"]
    both = found["mle"] / found["faiss"]
    return [
        Row(name, "faiss-cpu IndexFlatL2", found["faiss"]),
        Row(name, "scikit-dimension MLE", found["skdim"]),
        Row(name, "outlast knn", found["knn"], knn, "<= 0.8 of faiss", knn <= 0.8),
        Row(name, "outlast estimate, against faiss", found["mle"], both, "<= 0.8 of faiss", both <= 0.8),
        Row(name, "outlast estimate, against scikit-dimension", found["mle"], mle, "<= 0.4 of scikit-dimension", mle <= 0.4),
        Row(f"largest relative error of a distance: {error:.1e}", "outlast knn", 0.0, None, "<= 1e-6", error <= 1e-6),
    ]


def _growth() -> list[Row]:
    rows: list[Row] = []
    for n in (5_000, 10_000, 20_000, 40_000, 60_000):
        done = subprocess.run([sys.executable, "-c", _CHILD.format(n=n)], capture_output=True, text=True, check=True)
        seconds, base, peak = map(float, done.stdout.split())
        last = n == 60_000
        text = f"{n:,} x 784, all rows, peak {(peak - base) / 1024:.0f} MiB (the data among them) over {base / 1024:.0f} for torch"
        target = "peak < 600 MB over torch" if last else ""
        rows.append(Row(text, "outlast estimate", 1e3 * seconds, None, target, (peak - base) * 1024 < 600e6 if last else None))
    return rows


def main() -> None:
    """Measure and write the table."""
    torch.set_num_threads(1)
    write("dimension", [*_peers(), *_growth()])
