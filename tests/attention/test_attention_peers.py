"""Against performer-pytorch: equal in bidirectional form, and without its leak, its padding and its bias."""

from __future__ import annotations

import contextlib
import io
import math

import pytest
import torch
from helpers import rng

from outlast.attention import draw_projection, favor_attention

with contextlib.redirect_stdout(io.StringIO()):  # it prints that its compiled extension is missing
    performer = pytest.importorskip("performer_pytorch.performer_pytorch", reason="needs performer-pytorch (extra peers)")
pytestmark = pytest.mark.peer


def tensors(L=40, d=16, seed=0):
    return [torch.randn(2, 3, L, d, generator=rng(seed + i), dtype=torch.float64) for i in range(3)]


def theirs(q, k, v, W, *, causal=False):
    features = [performer.softmax_kernel(x, projection_matrix=W, is_query=query, device=x.device) for x, query in ((q, True), (k, False))]
    form = performer.causal_linear_attention_noncuda if causal else performer.linear_attention
    return form(*features, v)


def test_bidirectional_form_with_the_official_stabiliser_is_theirs():
    q, k, v = tensors()
    W = draw_projection(32, 16, generator=rng(9), dtype=torch.float64)
    ours = favor_attention(q, k, v, projection=W, stabilizer="official", eps=1e-4)
    assert (ours - theirs(q, k, v, W)).abs().max() < 1e-10


def test_generalised_kernel_is_theirs():
    q, k, v = tensors()
    W = draw_projection(32, 16, generator=rng(9), dtype=torch.float64)
    features = [performer.generalized_kernel(x, projection_matrix=W, kernel_fn=torch.nn.ReLU(), device=x.device) for x in (q, k)]
    ours = favor_attention(q, k, v, projection=W, feature_map="relu")
    assert (ours - performer.linear_attention(*features, v)).abs().max() < 1e-8


def test_a_later_key_reaches_their_earlier_outputs_and_not_ours():
    q, k, v = tensors(L=256, d=64)
    W = draw_projection(128, 64, generator=rng(9), dtype=torch.float64)
    later = k.clone()
    later[:, :, -1] *= 3.0
    moved = [(theirs(q, x, v, W, causal=True))[:, :, :128] for x in (k, later)]
    assert (moved[0] - moved[1]).abs().max() > 0.01
    ours = [favor_attention(q, x, v, is_causal=True, projection=W)[:, :, :128] for x in (k, later)]
    assert torch.equal(*ours)


def test_their_padding_stays_in_the_denominator_and_ours_does_not():
    q, k, v = tensors()
    W = draw_projection(32, 16, generator=rng(9), dtype=torch.float64)
    keep = torch.ones(2, 40, dtype=torch.bool)
    keep[:, 20:] = False
    alone = theirs(q, k[:, :, :20], v[:, :, :20], W)
    padded = theirs(q, k, v.masked_fill(~keep[:, None, :, None], 0.0), W)
    assert (padded - alone).norm() / alone.norm() > 0.2
    ours = [favor_attention(q, k, v, keep, projection=W), favor_attention(q, k[:, :, :20], v[:, :, :20], projection=W)]
    assert torch.allclose(*ours)


def test_their_orthogonal_draw_is_biased_and_ours_is_not():
    """Trap of raw QR: estimate over truth at |x + y| = 1, d = M = 16."""
    d = 16
    u = torch.full((d,), 0.25, dtype=torch.float64)
    torch.manual_seed(0)
    raw = torch.stack([performer.gaussian_orthogonal_random_matrix(d, d, scaling=0) for _ in range(2000)]).double()
    mine = draw_projection(d, d, num_heads=2000, generator=rng(1), dtype=torch.float64)
    bias = [abs(float((W @ u).exp().mean() / math.exp(0.5)) - 1.0) for W in (raw, mine)]
    assert bias[0] > 0.08
    assert bias[1] < 0.03
