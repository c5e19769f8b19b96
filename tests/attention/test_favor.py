"""FAVOR+: the estimator's moments, its random vectors, and attention in every form against the quadratic one."""

from __future__ import annotations

import inspect
import io
import math

import pytest
import torch
from helpers import in_processes, rng
from quadratic_attention import quadratic
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import outlast.attention
from outlast._core._random import haar_orthogonal, orthogonal_blocks
from outlast.attention import FavorAttention, FavorState, attention_error, draw_projection, redraw_after_steps
from outlast.attention._backward import backward
from outlast.attention._chunks import LARGEST_RISE, Call
from outlast.attention._forward import forward
from outlast.attention._linear import _operator
from outlast.attention._maps import MAPS
from outlast.errors import OutlastWarning, UnsupportedError

favor_attention = inspect.unwrap(outlast.attention.favor_attention)  # shapes are checked by the function itself in the tests of bad input
KINDS = ("positive", "hyperbolic", "trig", "relu", "elu1")
POSITIVE = ("positive", "hyperbolic", "relu", "elu1")


def problem(B=2, H=2, L=20, d=4, Dv=5, M=12, *, seed=0, dtype=torch.float64, requires_grad=False):
    stream = rng(seed)
    shapes = (B, H, L, d), (B, H, L, d), (B, H, L, Dv), (H, M, d)
    return [torch.randn(shape, generator=stream, dtype=dtype).requires_grad_(requires_grad) for shape in shapes]


def own_features(x, W, kind):
    """The engine's features of one vector under many matrices (as of keys, so no common factor is left out)."""
    value, log = MAPS[kind].features(x[None, None].expand(len(W), 1, -1), W, 1.0, query=False)
    return (1.0 if value is None else value[:, 0]) * (1.0 if log is None else log[:, 0].exp())


# ---- the estimator --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["positive", "hyperbolic", "trig"])
def test_mean_and_variance_are_those_of_the_closed_forms(kind):
    d, m, trials = 8, 4, 40_000
    x, y = (0.4 * torch.randn(d, generator=rng(seed), dtype=torch.float64) for seed in (1, 2))
    W = torch.randn(trials, m, d, generator=rng(3), dtype=torch.float64)
    fx, fy = (own_features(t, W, kind) for t in (x, y))
    estimate = (fx * fy).sum(-1) / (fx.shape[-1] if kind == "hyperbolic" else m)
    SM, z, D = torch.exp(x @ y), (x + y).square().sum(), (x - y).square().sum()
    expected = {
        "positive": z.exp() * SM**2 * (1 - torch.exp(-z)) / m,
        "hyperbolic": 0.5 * z.exp() * SM**2 * (1 - torch.exp(-z)) ** 2 / m,
        "trig": z.exp() * SM**-2 * (1 - torch.exp(-D)) ** 2 / (2 * m),
    }[kind]
    assert estimate.mean() / SM == pytest.approx(1.0, abs=0.02)
    assert estimate.var() / expected == pytest.approx(1.0, abs=0.1)


def test_orthogonal_rows_have_the_smaller_error_that_theorem_2_promises():
    d, m, trials = 8, 8, 40_000
    x, y = (0.5 * torch.randn(d, generator=rng(seed), dtype=torch.float64) for seed in (1, 2))
    SM, h = torch.exp(x @ y), torch.exp(-(x.square().sum() + y.square().sum()) / 2)
    errors = []
    for orthogonal in (True, False):
        W = draw_projection(m, d, num_heads=trials, orthogonal=orthogonal, generator=rng(4), dtype=torch.float64)
        estimate = (own_features(x, W, "positive") * own_features(y, W, "positive")).mean(-1)
        errors.append((estimate - SM).square().mean())
    assert errors[0] <= errors[1] - 2 * (m - 1) / (m * (d + 2)) * (SM - h) ** 2


@pytest.mark.parametrize(("d", "expected"), [(8, 0.920786), (64, 0.985518)])
def test_regularised_kernel_is_below_softmax_by_the_known_ratio(d, expected):
    z = torch.zeros(d, dtype=torch.float64)
    z[0] = math.sqrt(2.0)
    W = draw_projection(d, d, num_heads=40_000 if d == 8 else 4000, norms="sqrt_d", generator=rng(), dtype=torch.float64)
    ratio = torch.exp(W @ z).mean() / math.exp(1.0)
    assert ratio == pytest.approx(expected, abs=0.006)


# ---- random vectors -------------------------------------------------------------------------------------------------------


def test_orthogonal_draws_are_haar_where_raw_qr_is_biased():
    """The mean of exp(w.u - |u|^2/2) is 1 for normal rows; QR's sign convention moves it (seen: 0.86)."""
    d, trials = 16, 8000
    u = torch.full((d,), 0.25, dtype=torch.float64)
    norms = torch.randn(trials, d, d, generator=rng(1), dtype=torch.float64).norm(dim=-1)

    def mean(q):
        return float(torch.exp(norms * (q @ u) - 0.5).mean())

    raw = torch.linalg.qr(torch.randn(trials, d, d, generator=rng(2), dtype=torch.float64))[0].mT
    assert mean(haar_orthogonal(trials, d, d, generator=rng(2)).mT) == pytest.approx(1.0, abs=0.015)
    assert abs(mean(raw) - 1.0) > 0.05


def test_rows_are_orthogonal_inside_blocks_and_blocks_differ():
    W = draw_projection(20, 8, num_heads=3, generator=rng(), dtype=torch.float64)
    assert W.shape == (3, 20, 8)
    for start in (0, 8, 16):
        block = W[:, start : start + 8]
        gram = block @ block.mT
        assert (gram - torch.diag_embed(gram.diagonal(dim1=-2, dim2=-1))).abs().max() < 1e-10
    assert (W[:, :8] @ W[:, 8:16].mT).abs().max() > 0.1
    assert orthogonal_blocks(5, 4, generator=rng()).norm(dim=-1) == pytest.approx(torch.ones(5).tolist())


def test_norms_of_rows():
    chi = draw_projection(16, 16, num_heads=2000, generator=rng(), dtype=torch.float64)
    assert chi.square().sum(-1).mean() == pytest.approx(16.0, rel=0.02)
    assert chi.square().sum(-1).var() == pytest.approx(32.0, rel=0.1)
    for orthogonal in (True, False):
        fixed = draw_projection(20, 16, norms="sqrt_d", orthogonal=orthogonal, generator=rng(), dtype=torch.float64)
        assert torch.allclose(fixed.norm(dim=-1), torch.tensor(4.0, dtype=torch.float64))


def test_draws_repeat_and_take_device_and_dtype():
    draws = [draw_projection(5, 4, generator=rng(1), dtype=torch.bfloat16) for _ in range(2)]
    assert torch.equal(*draws)
    assert draws[0].dtype == torch.bfloat16
    assert draw_projection(5, 4, device="meta").is_meta


# ---- attention in every form ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_chunks_equal_the_quadratic_form_with_gradients(kind, causal):
    inputs = problem(requires_grad=True)
    q, k, v, W = inputs
    wanted = inputs if kind != "elu1" else inputs[:3]
    scale = 0.7
    expected = quadratic(q, k, v, W * 1.0, kind, causal=causal, scale=scale)
    up = torch.randn(expected.shape, generator=rng(9), dtype=torch.float64)
    gradients = torch.autograd.grad((expected * up).sum(), wanted)
    for chunk in (1, 7, 64, 20):
        found = favor_attention(q, k, v, is_causal=causal, scale=scale, projection=W, feature_map=kind, chunk_size=chunk)
        assert torch.allclose(found, expected, rtol=1e-10, atol=1e-12 * float(expected.detach().abs().max()))
        for grad, reference in zip(torch.autograd.grad((found * up).sum(), wanted), gradients, strict=True):
            assert torch.allclose(grad, reference, rtol=1e-8, atol=1e-11 * float(reference.abs().max()))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind, causal):
    q, k, v, W = problem(1, 2, 6, 3, 2, 4, requires_grad=True)

    def run(q, k, v, W):
        return favor_attention(q, k, v, is_causal=causal, projection=W, feature_map=kind, chunk_size=4)

    inputs = (q, k, v, W if kind != "elu1" else W.detach())
    assert torch.autograd.gradcheck(run, inputs)


@pytest.mark.parametrize("per_head", ["shared", "key heads", "query heads"])
@pytest.mark.parametrize("causal", [False, True])
def test_grouped_queries_share_a_key_head(per_head, causal):
    q, _, _, _ = problem(2, 6, 10)
    _, k, v, _ = problem(2, 2, 10, seed=1)
    W = torch.randn({"shared": 1, "key heads": 2, "query heads": 6}[per_head], 12, 4, generator=rng(3), dtype=torch.float64)
    found = favor_attention(q, k, v, is_causal=causal, enable_gqa=True, projection=W, scale=1.0, chunk_size=4)
    full = W.repeat_interleave(6 // len(W), 0)
    repeated = (x.repeat_interleave(3, 1) for x in (k, v))
    assert torch.allclose(found, quadratic(q, *repeated, full, "positive", causal=causal))


@pytest.mark.parametrize("lead", [(), (3,), (2, 3), (2, 2, 3)])
def test_any_leading_shape(lead):
    q, k, v = (torch.randn(*lead, 6, 4, generator=rng(i), dtype=torch.float64) for i in range(3))
    W = torch.randn(9, 4, generator=rng(4), dtype=torch.float64)
    found = favor_attention(q, k, v, is_causal=True, projection=W)
    flat = [x.reshape(1, -1, 6, 4) for x in (q, k, v)]
    assert torch.allclose(found, favor_attention(*flat, is_causal=True, projection=W).reshape(*lead, 6, 4))


def test_cross_attention_takes_any_number_of_queries():
    q, _, _, W = problem(L=3)
    _, k, v, _ = problem(L=11, seed=5)
    found = favor_attention(q, k, v, projection=W, scale=1.0, chunk_size=2)
    assert torch.allclose(found, quadratic(q, k, v, W, "positive"))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_padding_equals_absence(kind, causal):
    q, k, v, W = problem(L=12)
    keep = torch.ones(2, 12, dtype=torch.bool)
    keep[0, 9:] = False
    keep[1, [2, 3, 7]] = False
    dirty_k, dirty_v = (x.masked_fill(~keep[:, None, :, None], math.nan).requires_grad_() for x in (k, v))
    found = favor_attention(q, dirty_k, dirty_v, keep, is_causal=causal, projection=W, feature_map=kind, chunk_size=5)
    for row in range(2):
        kept = keep[row]
        queries = q[row, :, kept] if causal else q[row]
        expected = favor_attention(
            queries[None], k[row : row + 1, :, kept], v[row : row + 1, :, kept], is_causal=causal, projection=W, feature_map=kind
        )
        got = found[row : row + 1, :, kept] if causal else found[row : row + 1]
        assert torch.allclose(got, expected, atol=1e-6)
    found.sum().backward()
    for grad in (dirty_k.grad, dirty_v.grad):
        assert grad.isfinite().all()
        assert not grad.masked_select(~keep[:, None, :, None]).any()
    assert torch.equal(
        found, favor_attention(q, dirty_k, dirty_v, keep[:, None, None], is_causal=causal, projection=W, feature_map=kind, chunk_size=5)
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("causal", [False, True])
def test_rows_that_see_no_key_are_zero(kind, causal):
    q, k, v, W = problem(L=6, requires_grad=True)
    keep = torch.ones(2, 6, dtype=torch.bool)
    keep[0] = False
    keep[1, :2] = False  # left padding: the first two causal rows see nothing
    out = favor_attention(q, k, v, keep, is_causal=causal, projection=W, feature_map=kind, chunk_size=4)
    assert not out[0].any()
    if causal:
        assert not out[1, :, :2].any()
    out.sum().backward()
    assert not q.grad[0].any()
    assert all(x.grad.isfinite().all() for x in (q, k, v))


def test_no_keys_give_zeros():
    q, k, v, W = problem()
    assert not favor_attention(q, k[:, :, :0], v[:, :, :0], projection=W).any()
    empty = favor_attention(q[:, :, :0], k[:, :, :0], v[:, :, :0], is_causal=True, projection=W)
    assert empty.shape == (2, 2, 0, 5)


@pytest.mark.parametrize("kind", KINDS)
def test_one_position_is_its_value(kind):
    q, k, v, W = problem(L=1)
    assert torch.allclose(favor_attention(q, k, v, is_causal=True, projection=W, feature_map=kind), v)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_constant_values_stay(kind, causal):
    q, k, _, W = problem(dtype=torch.float32)
    v = torch.full((2, 2, 20, 3), 1.7)
    out = favor_attention(q, k, v, is_causal=causal, projection=W, feature_map=kind)
    assert torch.allclose(out, torch.full_like(out, 1.7), atol=2e-3 if kind == "trig" else 1e-5)


@pytest.mark.parametrize("kind", POSITIVE)
def test_outputs_lie_within_the_range_of_values(kind):
    q, k, v, W = problem()
    out = favor_attention(q, k, v, projection=W, feature_map=kind)
    low, high = v.amin(2, keepdim=True), v.amax(2, keepdim=True)
    assert ((out >= low - 1e-9) & (out <= high + 1e-9)).all()


def test_order_of_keys_does_not_matter_without_a_causal_mask():
    q, k, v, W = problem()
    order = torch.randperm(20, generator=rng(1))
    assert torch.allclose(favor_attention(q, k, v, projection=W), favor_attention(q, k[:, :, order], v[:, :, order], projection=W))


def test_more_features_are_nearer_to_softmax():
    q, k, v = (0.5 * torch.randn(1, 4, 128, 16, generator=rng(i)) for i in range(3))
    exact = F.scaled_dot_product_attention(q, k, v)

    def error(M):
        found = favor_attention(q, k, v, projection=draw_projection(M, 16, num_heads=4, generator=rng(5)))
        return float((found - exact).norm() / exact.norm())

    errors = [error(M) for M in (64, 256, 1024, 4096)]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] / errors[-1] > 4.0  # a rate of M^-1/2 gives 8


# ---- causality ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [1.0, 10.0])
@pytest.mark.parametrize("t", [5, 100, 299])
def test_later_keys_do_not_move_earlier_outputs(t, factor):
    q, k, v = (torch.randn(1, 2, 300, 64, generator=rng(i)) for i in range(3))
    W = draw_projection(128, 64, num_heads=2, generator=rng(4))
    before = favor_attention(q, k, v, is_causal=True, projection=W, chunk_size=64)
    k2, v2 = k.clone(), v.clone()
    k2[:, :, t] = factor * torch.randn(64, generator=rng(8))
    v2[:, :, t] *= 5.0
    after = favor_attention(q, k2, v2, is_causal=True, projection=W, chunk_size=64)
    assert (after - before)[:, :, :t].abs().max() < 1e-5
    assert not torch.equal(after[:, :, t:], before[:, :, t:])


def test_an_aligned_key_in_a_later_chunk_leaves_no_trace():
    """One maximum over the sequence is causal only up to underflow: long keys and one aligned later key show it."""
    q, k, v = (torch.randn(1, 1, 256, 64, generator=rng(i)) for i in range(3))
    k = 6.0 * k
    W = draw_projection(64, 64, num_heads=1, generator=rng(4))
    later = k.clone()
    later[:, :, -1] = W[0, 0] * 64**0.25
    runs = [favor_attention(q, x, v, is_causal=True, projection=W, chunk_size=64)[:, :, :192] for x in (k, later)]
    assert torch.equal(*runs)
    # Inside one chunk the room of the exponents does not suffice: the chunk is cut.
    q, k, later, v = (x.requires_grad_() for x in (q, k, later, v))
    for chunk in (256, 128, 1):
        inside = [favor_attention(q, x, v, is_causal=True, projection=W, chunk_size=chunk)[:, :, :255] for x in (k, later)]
        assert torch.allclose(*inside, atol=1e-5)  # rounding
        grads = [torch.autograd.grad(out.square().sum(), [q, v]) for out in inside]
        assert all((a - b).norm() < 1e-4 * b.norm() for a, b in zip(*grads, strict=True))


class Largest(torch.utils._python_dispatch.TorchDispatchMode):
    """Size of the largest tensor that any operation makes."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for each in out if isinstance(out, tuple | list) else (out,):
            if isinstance(each, torch.Tensor):
                self.numel = max(self.numel, each.untyped_storage().nbytes() // each.element_size())
        return out


@pytest.mark.parametrize("causal", [False, True])
def test_nothing_of_size_length_times_features_is_made(causal):
    """Inside the operators, which hide their allocations from the outside: neither L x R x D nor L x R."""
    q, k, v = (torch.randn(1, 2048, 8, generator=rng(i)) for i in range(3))
    W = draw_projection(64, 8, num_heads=1, generator=rng(4))
    with Largest() as forwards:
        run = forward(Call(q[:, None], k, v, W, None, None, "positive", causal, 1.0, 64), None, None, None, None, "plain", 0.0)
    call = Call(q[:, None], k, v, W, None, None, "positive", causal, 1.0, 64)
    with Largest() as backwards:
        backward(call, torch.ones_like(run.out_NGLD), None, None, None, None, None, run, False)
    assert forwards.numel <= 2048 * 8
    assert backwards.numel <= 2048 * 9


# ---- decoding -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_steps_equal_the_causal_form(kind):
    module = FavorAttention(8, 4, 16, kind, num_kv_heads=2)
    q = 0.5 * torch.randn(3, 4, 10, 8, generator=rng(0))
    k, v = (torch.randn(3, 2, 10, 8, generator=rng(i)) for i in (1, 2))
    whole, final = module(q, k, v, is_causal=True, return_state=True)
    state = module.init_state(3)
    outs = []
    for t in range(10):
        out, state = module.step(q[:, :, t], k[:, :, t], v[:, :, t], state)
        outs.append(out)
    # Denominators of trigonometric features come near zero, where rounding counts.
    assert torch.allclose(torch.stack(outs, 2), whole, atol=1e-5, rtol=1e-3 if kind == "trig" else 1e-5)
    assert torch.allclose(state.S, final.S, atol=1e-5)
    assert torch.equal(state.n, torch.full((3, 2), 10.0))
    assert state.S.dtype == torch.float32
    four = module.step(q[:, :, :1], k[:, :, :1], v[:, :, :1], module.init_state(3))[0]
    assert torch.equal(four[:, :, 0], outs[0])


@pytest.mark.parametrize("kind", POSITIVE)
def test_two_halves_with_gradients_through_the_state_equal_one_pass(kind):
    q, k, v, W = problem(requires_grad=True)
    whole = favor_attention(q, k, v, is_causal=True, projection=W, feature_map=kind, chunk_size=4)
    wanted = [q, k, v]
    expected = torch.autograd.grad(whole.square().sum(), wanted)
    first, state = favor_attention(
        q[:, :, :9], k[:, :, :9], v[:, :, :9], is_causal=True, projection=W, feature_map=kind, chunk_size=4, return_state=True
    )
    second = favor_attention(
        q[:, :, 9:], k[:, :, 9:], v[:, :, 9:], is_causal=True, projection=W, feature_map=kind, chunk_size=4, state=state
    )
    both = torch.cat([first, second], 2)
    assert torch.allclose(both, whole)
    for grad, reference in zip(torch.autograd.grad(both.square().sum(), wanted), expected, strict=True):
        assert torch.allclose(grad, reference)


def test_a_summary_answers_queries_later():
    q, k, v, W = problem(requires_grad=True)
    whole = favor_attention(q, k, v, projection=W)
    _, state = favor_attention(q[:, :, :0], k, v, projection=W, return_state=True)
    assert isinstance(state, FavorState)
    later = favor_attention(q, k[:, :, :0], v[:, :, :0], projection=W, state=state)
    assert torch.allclose(later, whole)
    for one, other in zip(
        torch.autograd.grad(later.square().sum(), [q, k, v]), torch.autograd.grad(whole.square().sum(), [q, k, v]), strict=True
    ):
        assert torch.allclose(one, other)


def test_beams_can_be_reordered():
    q, k, v, W = problem()
    _, state = favor_attention(q, k, v, is_causal=True, projection=W, return_state=True)
    swapped = state.index_select(torch.tensor([1, 0]))
    new = [x[:, :, :1] for x in (q, k, v)]
    one = favor_attention(*(x.flip(0) for x in new), is_causal=True, projection=W, state=state.detach())
    two = favor_attention(*new, is_causal=True, projection=W, state=swapped.to(torch.float64))
    assert torch.allclose(one.flip(0), two)


# ---- precision, compilation, checkpointing, vectors in training -----------------------------------------------------------


@pytest.mark.parametrize(("dtype", "limit"), [(torch.bfloat16, 5e-3), (torch.float16, 7e-4)])
def test_half_precision_keeps_a_float32_state(dtype, limit):
    q, k, v = (0.5 * torch.randn(1, 2, 4096, 64, generator=rng(i)) for i in range(3))
    W = draw_projection(256, 64, num_heads=2, generator=rng(4))
    low = [x.to(dtype) for x in (q, k, v)]
    found, state = favor_attention(*low, is_causal=True, projection=W, return_state=True)
    exact = favor_attention(*(x.float() for x in low), is_causal=True, projection=W)
    assert found.dtype == dtype
    assert state.S.dtype == torch.float32
    assert (found.float() - exact).norm() / exact.norm() < limit


@pytest.mark.parametrize("stabilizer", ["per_feature", "official"])
def test_autocast_leaves_the_estimate_in_float32(stabilizer):
    q, k, v, W = problem(dtype=torch.float32, requires_grad=True)
    settings = {"is_causal": True, "projection": W, "stabilizer": stabilizer}
    with torch.autocast("cpu", torch.bfloat16):
        found = favor_attention(q, k, v, **settings)
        found.sum().backward()
        error = attention_error(*(x.detach() for x in (q, k, v, W)), is_causal=True, warn_above=math.inf)
    assert found.dtype == torch.float32
    assert torch.equal(found, favor_attention(q, k, v, **settings))
    assert error == attention_error(*(x.detach() for x in (q, k, v, W)), is_causal=True, warn_above=math.inf)


@pytest.mark.parametrize("causal", [False, True])
def test_compiles_into_one_graph(causal):
    q, k, v, W = problem(dtype=torch.float32, requires_grad=True)
    keep = torch.ones(2, 20, dtype=torch.bool)
    keep[0, 15:] = False

    def run(q, k, v, W):
        return favor_attention(q, k, v, keep, is_causal=causal, projection=W, chunk_size=8).sin().sum()

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    grads = [torch.autograd.grad(f(q, k, v, W), [q, k, v, W]) for f in (run, compiled)]
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*grads, strict=True))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # of the checks themselves
@pytest.mark.parametrize("form", ["causal", "gate, mask and state", "bidirectional with state", "elu1"])
def test_operators_pass_torchs_own_checks(form):
    q, k, v, W = problem(1, 2, 6, 3, 2, 4)
    q, k, v, W = (x.clone().requires_grad_() for x in (q[:, :1], k[:, 0], v[:, 0], W[:1]))
    kind = "elu1" if form == "elu1" else "positive"
    keep = gate = S = z = c = n = None
    if form == "gate, mask and state":
        keep = torch.tensor([[True, False, True, True, True, False]])
        gate = torch.full((1, 6), -0.3, dtype=torch.float64, requires_grad=True)
    if "state" in form:
        S, z = (torch.rand(shape, generator=rng(3), dtype=torch.float64).requires_grad_() for shape in ((1, 4, 2), (1, 4)))
        c, n = torch.zeros(1, 4, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    causal = form != "bidirectional with state"
    torch.library.opcheck(_operator, (q, k, v, W, keep, gate, S, z, c, n, kind, "plain", causal, 1.0, 4, 1e-3))


def test_lengths_may_change_under_compilation():
    W = draw_projection(8, 4, num_heads=2, generator=rng(1))

    def run(q, k, v):
        return favor_attention(q, k, v, is_causal=True, projection=W)

    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend="aot_eager")
    for length in (9, 14, 150):
        inputs = [torch.randn(2, 2, length, 4, generator=rng(i)) for i in range(3)]
        assert torch.allclose(compiled(*inputs), run(*inputs), atol=1e-6)


def test_checkpointing_replays_the_same_vectors():
    module = FavorAttention(4, 2, 8)
    q, k, v, _ = problem(dtype=torch.float32, Dv=4, requires_grad=True)

    def run(q, k, v):
        return module(q, k, v, is_causal=True)

    one = torch.autograd.grad(run(q, k, v).square().sum(), [q, k, v])
    two = torch.autograd.grad(checkpoint(run, q, k, v, use_reentrant=False).square().sum(), [q, k, v])
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_vectors_are_a_function_of_seed_layer_and_draw():
    modules = [FavorAttention(4, 2, 8, seed=1, layer=layer) for layer in (0, 0, 1)]
    assert torch.equal(modules[0].projection, modules[1].projection)
    assert not torch.equal(modules[0].projection, modules[2].projection)
    first = modules[0].projection.clone()
    modules[0].redraw()
    assert not torch.equal(first, modules[0].projection)
    modules[1].redraw()
    assert torch.equal(modules[0].projection, modules[1].projection)
    assert not list(modules[0].parameters())


def test_redraws_follow_the_optimizer_and_resume():
    module = FavorAttention(4, 2, 8, redraw_interval=3)
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    handle = redraw_after_steps(module, optimizer)
    drawn = []
    for _ in range(7):
        weight.grad = torch.ones(1)
        optimizer.step()
        drawn.append(int(module.draws))
    assert drawn == [0, 0, 1, 1, 1, 2, 2]
    buffer = io.BytesIO()
    torch.save(module.state_dict(), buffer)
    buffer.seek(0)
    resumed = FavorAttention(4, 2, 8, redraw_interval=3)
    resumed.load_state_dict(torch.load(buffer, weights_only=True))
    again = redraw_after_steps(resumed, optimizer)
    for _ in range(2):
        optimizer.step()
    assert int(resumed.draws) == int(module.draws) == 3
    assert torch.equal(resumed.projection, module.projection)
    module.eval()
    handle.remove()
    resumed.eval()
    for _ in range(3):
        optimizer.step()
    assert int(resumed.draws) == 3
    again.remove()
    with pytest.raises(ValueError, match="no attention with random vectors"):
        redraw_after_steps(torch.nn.Linear(2, 2), optimizer)


def _drawn(rank, count):
    module = FavorAttention(4, 2, 8, layer=2)
    for _ in range(2):
        module.redraw()
    return module.projection


def test_processes_agree_without_communication(tmp_path):
    one, two = in_processes(_drawn, tmp_path)
    assert torch.equal(one, two)


# ---- the official stabiliser ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("causal", [False, True])
def test_official_stabiliser_is_near_ours_where_nothing_underflows(causal):
    q, k, v, W = problem()
    ours, official = (favor_attention(q, k, v, is_causal=causal, projection=W, stabilizer=name) for name in ("per_feature", "official"))
    assert torch.allclose(ours, official, atol=1e-3)
    assert not torch.equal(ours, official)


@pytest.mark.parametrize("causal", [False, True])
def test_official_stabiliser_keeps_padding_and_emptiness_apart(causal):
    q, k, v, W = problem(L=6)
    keep = torch.ones(2, 6, dtype=torch.bool)
    keep[0, 4:] = False
    keep[1] = False
    k = k.masked_fill(~keep[:, None, :, None], math.nan).requires_grad_()
    out = favor_attention(q, k, v, keep, is_causal=causal, projection=W, stabilizer="official")
    assert not out[1].any()
    out.sum().backward()
    assert k.grad.isfinite().all()
    assert not favor_attention(q, k[:, :, :0], v[:, :, :0], projection=W, stabilizer="official").any()


# ---- regressions ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [30.0, 1000.0])
def test_masked_rows_before_the_first_key_of_a_chunk_see_the_state(scale):
    q, k, v, W = problem(1, 1, 3, 8, 2, 32, dtype=torch.float32)
    k[:, :, 0] *= scale
    k[:, :, 2] *= 0.1
    q.requires_grad_()
    keep = torch.tensor([[True, False, True]])
    whole = favor_attention(q, k, v, keep, is_causal=True, projection=W, chunk_size=1)
    _, state = favor_attention(q[:, :, :1], k[:, :, :1], v[:, :, :1], is_causal=True, projection=W, return_state=True)
    later = favor_attention(q[:, :, 1:], k[:, :, 1:], v[:, :, 1:], keep[:, 1:], is_causal=True, projection=W, state=state)
    assert torch.allclose(later, whole[:, :, 1:], atol=1e-5)
    later[:, :, 1].sum().backward()
    assert q.grad.isfinite().all()


@pytest.mark.parametrize("scale", [5.0, 30.0, 1000.0])
def test_long_keys_and_holes_in_the_mask_stay_finite(scale):
    q, k, v = (torch.randn(1, 1, 300, 16, generator=rng(i)).requires_grad_() for i in range(3))
    keep = torch.rand(1, 300, generator=rng(7)) > 0.3
    W = draw_projection(32, 16, generator=rng(4))
    whole = favor_attention(q, scale * k, v, keep, is_causal=True, projection=W)
    single = favor_attention(q, scale * k, v, keep, is_causal=True, projection=W, chunk_size=1)
    assert torch.allclose(whole, single, atol=1e-4)
    whole.sum().backward()
    assert all(x.grad.isfinite().all() for x in (q, k, v))


def test_a_rise_just_inside_the_limit_has_finite_gradients():
    q, k, v, W = problem(1, 1, 16, 2, 2, 1, dtype=torch.float32)
    W = torch.tensor([[[1.0, 0.0]]])
    k = torch.zeros_like(k)
    k[:, :, 0, 1] = math.sqrt(2.0 * (LARGEST_RISE - 0.5))  # log feature -|k|^2/2, the later ones 0
    inputs = [x.requires_grad_() for x in (q, k, v)]
    favor_attention(*inputs, is_causal=True, projection=W, scale=1.0).square().sum().backward()
    assert all(x.grad.isfinite().all() for x in inputs)


@pytest.mark.parametrize("causal", [False, True])
def test_an_empty_batch_gives_an_empty_output(causal):
    q, k, v, W = problem(B=0)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    out = favor_attention(*inputs, is_causal=causal, projection=W)
    assert out.shape == (0, 2, 20, 5)
    out.sum().backward()


def test_elu_features_keep_digits_of_very_negative_inputs():
    q, k, v, W = problem()
    shifted = [(q - 50.0), k, v]
    double = favor_attention(*shifted, projection=W, feature_map="elu1")
    single = favor_attention(*(x.float() for x in shifted), projection=W.float(), feature_map="elu1")
    assert torch.allclose(single.double(), double, atol=1e-5)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")  # of torch's own forward mode
def test_unsupported_derivatives_are_refused():
    q, k, v, W = problem(requires_grad=True)
    grad = torch.autograd.grad(favor_attention(q, k, v, projection=W).sum(), q, create_graph=True)[0]
    with pytest.raises(UnsupportedError, match="first derivatives only"):
        grad.sum().backward()
    with pytest.raises(UnsupportedError, match="forward-mode"):
        torch.func.jvp(lambda x: favor_attention(x, k.detach(), v.detach(), projection=W.detach()), (q.detach(),), (torch.ones_like(q),))


def test_autocast_takes_mixed_precisions_as_sdpa_does():
    q, k, v, W = problem(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = favor_attention(q, k, v.bfloat16(), is_causal=True, projection=W)
    assert torch.allclose(found, favor_attention(q, k, v.bfloat16().float(), is_causal=True, projection=W))


def test_a_state_in_half_precision_can_go_on():
    module = FavorAttention(4, 2, 8)
    q, k, v = (torch.randn(2, 2, 1, 4, generator=rng(i)) for i in range(3))
    state = module.init_state(2).to(torch.float16)
    out, after = module(q, k, v, torch.zeros(2, 1, dtype=torch.bool), is_causal=True, state=state, return_state=True)
    assert not out.any()
    assert module.step(q, k, v, after)[0].isfinite().all()


def test_steps_that_a_scaler_skips_do_not_count():
    for fused in (False, True):
        weight = torch.nn.Parameter(torch.ones(1))
        module = FavorAttention(4, 2, 8, redraw_interval=1)
        optimizer = torch.optim.AdamW([weight], fused=fused)
        redraw_after_steps(module, optimizer)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
        for loss in (weight * math.inf, weight * 1.0):
            optimizer.zero_grad()
            scaler.scale(loss.sum()).backward()
            scaler.step(optimizer)
            scaler.update()
        assert int(module.steps) == int(module.draws) == 1


def test_modules_can_be_made_on_meta_and_filled_later():
    with torch.device("meta"):
        module = FavorAttention(4, 2, 8, seed=3)
    assert module.projection.is_meta
    assert "on meta" in repr(module)
    module.to_empty(device="cpu").reset_parameters()
    assert torch.equal(module.projection, FavorAttention(4, 2, 8, seed=3).projection)


def test_a_loaded_seed_goes_on():
    one, two = FavorAttention(4, 2, 8, seed=1), FavorAttention(4, 2, 8, seed=2)
    two.load_state_dict(one.state_dict())
    one.redraw()
    two.redraw()
    assert torch.equal(one.projection, two.projection)


# ---- the error report -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_error_report_measures_the_distance_from_softmax(kind, causal):
    q, k, v, W = problem(L=30, d=8, Dv=8, M=64)
    keep = torch.ones(2, 30, dtype=torch.bool)
    keep[0, 20:] = False
    report = attention_error(q, k, v, W, keep, is_causal=causal, feature_map=kind, warn_above=math.inf)
    mask = keep[:, None, None] & (torch.ones(30, 30, dtype=torch.bool).tril() if causal else True)
    exact = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    found = favor_attention(q, k, v, keep, is_causal=causal, projection=W, feature_map=kind)
    assert report.rel_error == pytest.approx(float((found - exact).norm() / exact.norm()))
    assert len(report.rel_error_per_head) == 2
    if kind in ("positive", "hyperbolic") and not causal:
        assert report.min_denominator >= 1.0
    if kind == "trig":
        assert report.effective_features is None
    else:
        assert 1.0 <= report.effective_features <= report.num_features
    assert report.to_dict()["kind"] == "AttentionErrorResult"


def test_error_report_warns_of_long_queries_and_keys():
    q, k, v, W = problem(L=64, d=16, Dv=16, M=64)
    assert attention_error(0.3 * q, 0.3 * k, v, W, warn_above=0.5).rel_error < 0.5
    with pytest.warns(OutlastWarning, match="away from exact attention"):
        report = attention_error(4.0 * q, 4.0 * k, v, W)
    assert report.effective_features < 10
    with pytest.raises(ValueError, match="nothing to compare"):
        attention_error(q, k[:, :, :0], v[:, :, :0], W)
    with pytest.raises(ValueError, match="hides every key"):
        attention_error(q, k, v, W, torch.zeros(2, 64, dtype=torch.bool))
    v[:, 0] = 0.0
    assert attention_error(0.3 * q, 0.3 * k, v, W, warn_above=0.5).rel_error_per_head[0] == 0.0
    padded = k.masked_fill(torch.arange(64)[:, None] > 40, math.nan)
    assert attention_error(0.3 * q, padded, v, W, torch.arange(64).expand(2, 1, 1, 64) <= 40, warn_above=0.5).key_norm < 2.0


def test_error_report_draws():
    pytest.importorskip("matplotlib")
    q, k, v, W = problem()
    axes = attention_error(q, k, v, W, warn_above=math.inf).plot()
    assert len(axes.patches) == 2


# ---- bad input ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"key": torch.zeros(2, 2, 20, 3)}, ValueError, "one head size"),
        ({"projection": torch.zeros(12, 3)}, ValueError, "projection must have shape"),
        ({"projection": torch.zeros(0, 4)}, ValueError, "at least one random vector"),
        ({"projection": torch.zeros(3, 12, 4)}, ValueError, "projection has 3 heads"),
        ({"value": torch.zeros(2, 2, 19, 5)}, ValueError, "key and value must agree"),
        ({"query": torch.zeros(3, 2, 20, 4)}, ValueError, "one batch size"),
        ({"query": torch.zeros(20, 4)}, ValueError, "same number of dimensions"),
        ({"query": torch.zeros(2, 4, 20, 4)}, ValueError, "enable_gqa"),
        ({"query": torch.zeros(2, 3, 20, 4), "enable_gqa": True}, ValueError, "number must divide"),
        ({"query": torch.zeros(2, 2, 3, 4), "is_causal": True}, ValueError, "one query for each key"),
        ({"chunk_size": 0}, ValueError, "chunk_size"),
        ({"feature_map": "cosine"}, ValueError, "feature_map must be one of"),
        ({"stabilizer": "none"}, ValueError, "stabilizer must be one of"),
        ({"scale": 0.0}, ValueError, "scale"),
        ({"attn_mask": torch.ones(20, 20, dtype=torch.bool)}, ValueError, "scaled_dot_product_attention"),
        ({"attn_mask": torch.ones(2, 1, 20, 20, dtype=torch.bool)}, ValueError, "is_causal"),
        ({"attn_mask": torch.ones(2, 19, dtype=torch.bool)}, ValueError, "does not fit"),
        (
            dict.fromkeys(("query", "key", "value"), torch.zeros(4, 2, 4, 4)) | {"attn_mask": torch.ones(4, 4, dtype=torch.bool)},
            ValueError,
            "pairs",
        ),
        (
            {"query": torch.zeros(2, 0, 20, 4), "key": torch.zeros(2, 0, 20, 4), "value": torch.zeros(2, 0, 20, 4)},
            ValueError,
            "at least one head",
        ),
        ({"attn_mask": torch.zeros(2, 20)}, ValueError, "additive bias"),
        ({"attn_mask": torch.ones(2, 20, dtype=torch.int64)}, TypeError, "mask.bool"),
        ({"query": torch.zeros(2, 2, 20, 4, dtype=torch.int64)}, TypeError, "floating point"),
        ({"key": torch.zeros(2, 2, 20, 4, dtype=torch.float64)}, TypeError, "one dtype"),
        ({"dropout_p": 0.1}, UnsupportedError, "dropout"),
        ({"stabilizer": "official", "return_state": True}, UnsupportedError, "official"),
        ({"stabilizer": "official", "feature_map": "relu"}, UnsupportedError, "official"),
    ],
)
def test_bad_input_is_refused(change, error, message):
    given = dict(zip(("query", "key", "value", "projection"), problem(dtype=torch.float32), strict=True)) | change
    with pytest.raises(error, match=message):
        favor_attention(**given)


def test_state_of_another_projection_or_batch_is_refused():
    q, k, v, W = problem()
    _, state = favor_attention(q, k, v, is_causal=True, projection=W, return_state=True)
    with pytest.raises(ValueError, match="another batch, projection"):
        favor_attention(q, k, v, is_causal=True, projection=W[:, :6], state=state)
    with pytest.raises(ValueError, match="another batch, projection"):
        favor_attention(q[:1], k[:1], v[:1], is_causal=True, projection=W, state=state)
    with pytest.raises(TypeError, match="must be a FavorState"):
        favor_attention(q, k, v, is_causal=True, projection=W, state=tuple(state))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: draw_projection(0, 4), "num_features"),
        (lambda: draw_projection(4, 4, norms="unit"), "norms must be one of"),
        (lambda: FavorAttention(4, 3, num_kv_heads=2), "must divide"),
        (lambda: FavorAttention(4, 2, feature_map="gaussian"), "feature_map must be one of"),
        (lambda: FavorAttention(4, 2, redraw_interval=0), "redraw_interval"),
        (
            lambda: FavorAttention(4, 2).step(torch.zeros(1, 2, 2, 4), torch.zeros(1, 2, 2, 4), torch.zeros(1, 2, 2, 4), None),
            "one position",
        ),
    ],
)
def test_bad_settings_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_what_is_not_finite_goes_on():
    q, k, v, W = problem()
    v[0, 0, 3] = math.inf
    out = favor_attention(q, k, v, projection=W)
    assert not out[0, 0].isfinite().any()
    assert out[1].isfinite().all()
