"""The optional CUDA backend, as far as a processor can test it: wiring, agreement, refusal. No kernel runs here."""

from __future__ import annotations

import pytest
import torch
from helpers import rng
from torch.nn import functional as F

from outlast.attention import _kernels, _linear, rfa_attention
from outlast.errors import OutlastWarning


def reference(q, k, v, *, g, scale, initial_state, output_final_state):
    """What fla documents for its simple_gla: S = exp(g) S + k v^T, o = scale q S, layout (batch, length, heads, size)."""
    assert output_final_state
    state = torch.zeros(q.shape[0], q.shape[2], q.shape[3], v.shape[3], dtype=q.dtype) if initial_state is None else initial_state
    out = []
    for t in range(q.shape[1]):
        state = g[:, t, :, None, None].exp() * state + k[:, t, :, :, None] * v[:, t, :, None]
        out.append(scale * (q[:, t, :, None] @ state)[:, :, 0])
    return torch.stack(out, 1), state


@pytest.fixture
def kernel(monkeypatch):
    """A processor that takes itself for a GPU with a kernel."""

    def install(function):
        monkeypatch.setattr(_kernels, "_agreed", {})
        monkeypatch.setattr(_linear, "find_kernel", lambda: function)
        monkeypatch.setattr(_linear, "applies", lambda q, *, feature_map, causal: causal and feature_map != "positive")

    return install


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("feature_map", ["gaussian", "arccos"])
def test_the_kernels_route_equals_the_engine(kernel, feature_map, gated):
    stream = rng(0)
    q = torch.randn(2, 4, 11, 6, generator=stream, dtype=torch.float64)
    k, v = (torch.randn(2, 2, 11, 6, generator=stream, dtype=torch.float64) for _ in range(2))
    W = torch.randn(2, 32, 6, generator=stream, dtype=torch.float64)
    log_gate = F.logsigmoid(torch.randn(2, 2, 11, generator=stream, dtype=torch.float64)) if gated else None
    keep = torch.rand(2, 1, 1, 11, generator=stream) > 0.2
    inputs = [x.requires_grad_() for x in (q, k, v, W, *([log_gate] if gated else []))]

    def run():
        settings = {"is_causal": True, "enable_gqa": True, "projection": W, "feature_map": feature_map}
        out, state = rfa_attention(q, k, v, keep, log_gate=log_gate, return_state=True, **settings)
        more = rfa_attention(q, k, v, keep, log_gate=log_gate, state=state, **settings)
        return torch.cat([out, more], 2), state

    expected, state = run()
    gradients = torch.autograd.grad(expected.square().sum(), inputs)
    kernel(reference)
    found, after = run()
    assert _kernels._agreed
    assert all(_kernels._agreed.values())
    assert torch.allclose(found, expected)
    for name in ("S", "z", "n"):
        assert torch.allclose(getattr(after, name), getattr(state, name))
    for one, other in zip(torch.autograd.grad(found.square().sum(), inputs), gradients, strict=True):
        assert torch.allclose(one, other)


def test_a_kernel_that_disagrees_or_breaks_is_said_and_not_used(kernel):
    q, k, v = (torch.randn(1, 2, 9, 6, generator=rng(i)) for i in range(3))
    W = torch.randn(2, 16, 6, generator=rng(4))
    expected = rfa_attention(q, k, v, is_causal=True, projection=W)

    def wrong(*args, **kwargs):
        out, state = reference(*args, **kwargs)
        return 1.1 * out + 0.3, state

    def broken(*args, **kwargs):
        raise RuntimeError("no compiler")

    for function, message in ((wrong, "differs from our own"), (broken, "no compiler")):
        kernel(function)
        with pytest.warns(OutlastWarning, match=message):
            assert torch.equal(rfa_attention(q, k, v, is_causal=True, projection=W), expected)
        assert torch.equal(rfa_attention(q, k, v, is_causal=True, projection=W), expected)  # said once


def test_processors_and_stabilised_maps_never_ask_for_a_kernel(monkeypatch):
    q = torch.zeros(1, 1, 4, 4)
    assert not _kernels.applies(q, feature_map="gaussian", causal=True)

    class Cuda:
        is_cuda = True

    assert _kernels.applies(Cuda(), feature_map="gaussian", causal=True)
    assert not _kernels.applies(Cuda(), feature_map="positive", causal=True)
    assert not _kernels.applies(Cuda(), feature_map="gaussian", causal=False)
    monkeypatch.setitem(__import__("sys").modules, "fla.ops.simple_gla", None)
    assert _kernels.find_kernel() is None
