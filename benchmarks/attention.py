"""Linear attention against exact attention, performer-pytorch, and the recurrent and cumulative forms that others compute.

fla's naive recurrent form is the peer of the gate; its package needs Triton, so the loop below follows its description (one step of
``S = g S + (1 - g) phi(k) v^T`` after another). The cumulative form is the one that the authors of random feature attention compute in
torch.
"""

from __future__ import annotations

import contextlib
import io
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks._harness import Row, medians, write
from outlast.attention import draw_projection, favor_attention, rfa_attention

H, d = 4, 64


def _inputs(length: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    stream = torch.Generator().manual_seed(0)
    return [torch.randn(1, H, length, d, generator=stream).to(dtype).requires_grad_() for _ in range(3)]


def _vectors(count: int) -> Tensor:
    return draw_projection(count, d, num_heads=H, generator=torch.Generator().manual_seed(1))


def _both(attend: Callable[[], Tensor]) -> Callable[[], None]:
    return lambda: attend().sum().backward()


def _without_gradients(attend: Callable[[], Tensor]) -> Callable[[], Tensor]:
    def run() -> Tensor:
        with torch.no_grad():
            return attend()

    return run


def _against_exact(length: int) -> list[Row]:
    q, k, v = _inputs(length)
    few, many, normal = _vectors(64), _vectors(256), torch.randn(H, 64, d, generator=torch.Generator().manual_seed(2))
    rivals: dict[str, Callable[[], Tensor]] = {
        "torch's exact attention": lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True),
        "FAVOR+, 256 features": lambda: favor_attention(q, k, v, is_causal=True, projection=many),
        "FAVOR+, 64 features": lambda: favor_attention(q, k, v, is_causal=True, projection=few),
        "RFA, 64 Gaussian vectors": lambda: rfa_attention(q, k, v, is_causal=True, projection=normal),
    }
    targets = {
        (4096, "FAVOR+, 256 features", "forward"): 1.5,
        (16_384, "FAVOR+, 256 features", "forward"): 2.0,
        (16_384, "FAVOR+, 256 features", "forward and backward"): 4.0,
        (16_384, "FAVOR+, 64 features", "forward"): 5.0,
        (16_384, "FAVOR+, 64 features", "forward and backward"): 5.0,
        (2048, "RFA, 64 Gaussian vectors", "forward"): 1.0,
        (16_384, "RFA, 64 Gaussian vectors", "forward"): 3.0,
    }
    rows: list[Row] = []
    for what, form in (("forward", _without_gradients), ("forward and backward", _both)):
        found = medians({name: form(attend) for name, attend in rivals.items()}, repeats=5, warmup=1)
        exact = found["torch's exact attention"]
        for name, time in found.items():
            ratio, target = exact / time, targets.get((length, name, what))
            rows.append(
                Row(
                    f"causal, L = {length:,}, {what}",
                    name,
                    time,
                    None if time == exact else ratio,
                    "" if target is None else f">= {target:g} x exact",
                    None if target is None else ratio >= target,
                )
            )
    return rows


def _against_performer() -> list[Row]:
    with contextlib.redirect_stdout(io.StringIO()):  # it says that its compiled extension is missing
        from performer_pytorch import performer_pytorch as peer

    q, k, v = _inputs(2048)
    W = draw_projection(256, d, generator=torch.Generator().manual_seed(1))

    def theirs() -> Tensor:
        features = [peer.softmax_kernel(x, projection_matrix=W, is_query=query, device=x.device) for x, query in ((q, True), (k, False))]
        return peer.causal_linear_attention_noncuda(*features, v)

    def ours() -> Tensor:
        return favor_attention(q, k, v, is_causal=True, projection=W)

    rows: list[Row] = []
    for what, form in (("forward", _without_gradients), ("forward and backward", _both)):
        found = medians({"theirs": form(theirs), "ours": form(ours)}, repeats=5, warmup=1)
        ratio = found["theirs"] / found["ours"]
        name = f"causal, L = 2,048, 256 features, {what}"
        rows += [Row(name, "performer-pytorch 1.1.4", found["theirs"]), Row(name, "outlast", found["ours"], ratio, ">= 10 x", ratio >= 10)]
    return rows


def _gaussian(x: Tensor, W: Tensor) -> Tensor:
    p = F.normalize(x, dim=-1) @ W.mT
    return torch.cat([p.sin(), p.cos()], -1) * W.shape[-2] ** -0.5


def _against_recurrence() -> list[Row]:
    q, k, v = _inputs(2048)
    W = torch.randn(H, 64, d, generator=torch.Generator().manual_seed(2))
    log_gate = F.logsigmoid(torch.randn(1, H, 2048, generator=torch.Generator().manual_seed(3)) + 3.0)

    def recurrent() -> Tensor:
        fq, fk, gate = _gaussian(q, W), _gaussian(k, W), log_gate.exp()
        values = torch.cat([v, torch.ones_like(v[..., :1])], -1)
        state = torch.zeros(1, H, fk.shape[-1], d + 1)
        out: list[Tensor] = []
        for t in range(q.shape[2]):
            g = gate[:, :, t, None, None]
            state = g * state + (1.0 - g) * fk[:, :, t, :, None] * values[:, :, t, None]
            out.append((fq[:, :, t, None] @ state)[:, :, 0])
        o = torch.stack(out, 2)
        return o[..., :d] / o[..., d:]

    def cumulative() -> Tensor:
        fq, fk = _gaussian(q, W), _gaussian(k, W)
        S = (fk[..., :, None] * v[..., None, :]).cumsum(2)
        return torch.einsum("bhlr,bhlre->bhle", fq, S) / (fq * fk.cumsum(2)).sum(-1, keepdim=True)

    pairs: tuple[tuple[str, str, Callable[[], Tensor], Callable[[], Tensor], float], ...] = (
        (
            "with gate",
            "recurrent loop",
            recurrent,
            lambda: rfa_attention(q, k, v, is_causal=True, projection=W, log_gate=log_gate),
            5.0,
        ),
        ("without gate", "cumulative sums", cumulative, lambda: rfa_attention(q, k, v, is_causal=True, projection=W), 10.0),
    )
    rows: list[Row] = []
    for form, peer, theirs, ours, target in pairs:
        with torch.no_grad():
            assert torch.allclose(theirs(), ours(), atol=1e-3)
        for what, measure in (("forward", _without_gradients), ("forward and backward", _both)):
            found = medians({"theirs": measure(theirs), "ours": measure(ours)}, repeats=5, warmup=1)
            ratio = found["theirs"] / found["ours"]
            name = f"RFA {form}, L = 2,048, R = 128, {what}"
            rows += [
                Row(name, f"reference: {peer}", found["theirs"]),
                Row(name, "outlast", found["ours"], ratio, f">= {target:g} x", ratio >= target),
            ]
    return rows


def _step(attend: Any, position: int, settings: dict[str, Any]) -> Callable[[], object]:
    """One more position after a prefix."""
    new = [x.detach() for x in _inputs(1)]
    with torch.no_grad():
        _, state = attend(*_inputs(position), is_causal=True, return_state=True, **settings)
    return lambda: attend(*new, is_causal=True, state=state, return_state=True, **settings)


def _decoding() -> list[Row]:
    normal = torch.randn(H, 64, d, generator=torch.Generator().manual_seed(2))
    rows: list[Row] = []
    forms: tuple[tuple[str, Any, dict[str, Any]], ...] = (
        ("FAVOR+, 256 features", favor_attention, {"projection": _vectors(256)}),
        ("RFA, 64 Gaussian vectors", rfa_attention, {"projection": normal}),
    )
    for name, attend, settings in forms:
        rivals = {f"position {position:,}": _step(attend, position, settings) for position in (100, 10_000)}
        found = medians(rivals, repeats=200, warmup=20)
        ratio = found["position 10,000"] / found["position 100"]
        rows += [
            Row(f"a decoding step, {name}", "position 100", found["position 100"]),
            Row(f"a decoding step, {name}", "position 10,000", found["position 10,000"], ratio, "<= 1.1", ratio <= 1.1),
        ]
    return rows


_PROGRAM = """
import sys, torch
torch.set_num_threads(1)
from outlast.attention import draw_projection, favor_attention
form, length = sys.argv[1], int(sys.argv[2])
def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM:"))
W = draw_projection(256, 64, num_heads=4, generator=torch.Generator().manual_seed(0))
def run(length):
    q, k, v = (torch.randn(1, 4, length, 64, requires_grad=True) for _ in range(3))
    if form == "exact":
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    else:
        out = favor_attention(q, k, v, is_causal=True, projection=W)
    out.sum().backward()
run(128)
base = peak()
run(length)
print(base, peak())
"""


def _memory() -> list[Row]:
    rows: list[Row] = []
    for form, name, longest in (("exact", "torch's exact attention", 8192), ("favor", "FAVOR+, 256 features", 65_536)):
        lengths = [length for length in (2048, 8192, 16_384, 32_768, 65_536) if length <= longest]
        first = 0.0
        for length in lengths:
            done = subprocess.run([sys.executable, "-c", _PROGRAM, form, str(length)], check=True, capture_output=True, text=True)
            base, peak = map(float, done.stdout.split())
            each = (peak - base) / length
            if length == 8192:
                first = each
            last = length == 65_536
            text = f"memory, L = {length:,}, forward and backward: {(peak - base) / 1024:.0f} MiB, {each:.1f} KiB a position (q, k, v: 3.0)"
            ratio = each / first if last else None
            target = "a position <= 1.1 of 8,192's" if last else ""
            rows.append(Row(text, name, 0.0, ratio, target, None if ratio is None else ratio <= 1.1))
    return rows


def _precision() -> list[Row]:
    q, k, v = (0.5 * x.detach() for x in _inputs(4096))
    W = _vectors(256)
    exact = favor_attention(q, k, v, is_causal=True, projection=W)
    rows: list[Row] = []
    for dtype, limit in ((torch.bfloat16, 0.5), (torch.float16, 0.07)):
        found = favor_attention(*(x.to(dtype) for x in (q, k, v)), is_causal=True, projection=W).float()
        error = 100.0 * float((found - exact).norm() / exact.norm())
        text = f"error with {str(dtype).removeprefix('torch.')} inputs, L = 4,096: {error:.3f} %"
        rows.append(Row(text, "FAVOR+, 256 features", 0.0, None, f"<= {limit} %", error <= limit))
    return rows


def main() -> None:
    """Measure and write the table."""
    torch.set_num_threads(1)
    rows = _memory()
    for length in (512, 1024, 2048, 4096, 8192, 16_384):
        rows += _against_exact(length)
    write("attention", [*rows, *_against_performer(), *_against_recurrence(), *_decoding(), *_precision()])
