"""Random feature attention: kernels, the gate, denominators, decoding, the layer."""

from __future__ import annotations

import inspect
import math

import pytest
import torch
from helpers import in_processes, rng
from quadratic_attention import features, quadratic, recurrent
from torch.nn import functional as F

import outlast.attention
from outlast.attention import RandomFeatureAttention, redraw_after_steps, rfa_parameter_groups
from outlast.attention._maps import MAPS as MAPS_OF
from outlast.errors import OutlastWarning, StateError, UnsupportedError

rfa_attention = inspect.unwrap(outlast.attention.rfa_attention)
layer_forward, layer_step = (inspect.unwrap(method) for method in (RandomFeatureAttention.forward, RandomFeatureAttention.step))
MAPS = ("gaussian", "arccos", "positive")


def problem(B=2, H=3, L=16, d=6, Dv=4, D=10, *, seed=0, dtype=torch.float64, requires_grad=False):
    stream = rng(seed)
    shapes = (B, H, L, d), (B, H, L, d), (B, H, L, Dv), (H, D, d)
    return [torch.randn(shape, generator=stream, dtype=dtype).requires_grad_(requires_grad) for shape in shapes]


def gates(B=2, H=3, L=16, *, seed=5, dtype=torch.float64):
    return F.logsigmoid(2.0 + torch.randn(B, H, L, generator=rng(seed), dtype=dtype))


def unit(x):
    return x / x.norm(dim=-1, keepdim=True)


def padded(mask):
    return RandomFeatureAttention(8, 2)(torch.zeros(1, 5, 8), None, mask)


# ---- 1 to 4: kernels ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("tau", "sigma"), [(1.0, 1.0), (0.5, 1.0), (1.0, 0.7)])
def test_gaussian_features_estimate_the_gaussian_kernel(tau, sigma):
    d, D, trials = 8, 4, 40_000
    x, y = (unit(torch.randn(d, generator=rng(i), dtype=torch.float64)) for i in (1, 2))
    W = torch.randn(trials, D, d, generator=rng(3), dtype=torch.float64) * sigma / tau
    fx, fy = (MAPS_OF["gaussian"].features(t[None, None].expand(trials, 1, d), W, 1.0, query=False).value for t in (x, y))
    estimate = (fx * fy).sum((-1, -2))
    s2 = (tau / sigma) ** 2
    distance = (x - y).square().sum()
    assert estimate.mean() == pytest.approx(float(torch.exp(-distance / (2 * s2))), abs=0.01)
    assert estimate.var() == pytest.approx(float((1 - torch.exp(-distance / s2)) ** 2 / (2 * D)), rel=0.05)


def test_arccos_features_estimate_the_arc_cosine_kernel():
    x, y = torch.tensor([1.0, 0.0, 0.5]).double(), torch.tensor([-0.4, 0.3, 0.0]).double()
    W = torch.randn(1, 400_000, 3, generator=rng(), dtype=torch.float64)
    fx, fy, opposite = (MAPS_OF["arccos"].features(t[None, None], W, 1.0, query=False).value[0, 0] for t in (x, y, -x))
    t = torch.acos(x @ y / (x.norm() * y.norm()))
    expected = x.norm() * y.norm() * (t.sin() + (math.pi - t) * t.cos()) / (2 * math.pi)
    assert fx @ fy == pytest.approx(float(expected), rel=0.03)
    assert fx @ fx == pytest.approx(float(x.square().sum()) / 2, rel=0.02)
    assert fx @ opposite == 0.0


def test_own_kernel_of_gaussian_features_is_one():
    q, _, _, W = problem()
    f = MAPS_OF["gaussian"].features(unit(q[0]), W, 1.0, query=False).value
    assert torch.allclose(f.square().sum(-1), torch.ones(3, 16, dtype=torch.float64))


def test_many_features_give_softmax_of_cosines():
    q, k, v, _ = problem(B=1, H=1, L=40, d=16)
    W = torch.randn(20_000, 16, generator=rng(7), dtype=torch.float64)
    found = rfa_attention(q, k, v, projection=W)
    exact = torch.softmax(unit(q) @ unit(k).mT, -1) @ v
    assert (found - exact).norm() / exact.norm() < 0.02


# ---- 5 to 10: forms -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("feature_map", MAPS)
def test_constant_values_stay(feature_map, gated):
    q, k, _, W = problem(dtype=torch.float32, D=64)
    v = torch.full((2, 3, 16, 2), 1.3)
    log_gate = gates(dtype=torch.float32) if gated else None
    out = rfa_attention(q, k, v, is_causal=True, projection=W, feature_map=feature_map, log_gate=log_gate)
    assert torch.allclose(out, torch.full_like(out, 1.3), atol=1e-5)


@pytest.mark.parametrize("feature_map", MAPS)
@pytest.mark.parametrize("chunk", [1, 7, 32, 16])
def test_gated_chunks_equal_the_recurrence(feature_map, chunk):
    q, k, v, W = problem(D=64)
    log_gate = gates()
    fq, fk = (features(unit(x), W, feature_map) for x in (q, k))
    expected = recurrent(fq, fk, v, log_gate.exp())
    found = rfa_attention(q, k, v, is_causal=True, projection=W, feature_map=feature_map, log_gate=log_gate, chunk_size=chunk)
    assert (found - expected).abs().max() < 1e-12 * max(1.0, float(expected.abs().max()))


@pytest.mark.parametrize("feature_map", MAPS)
@pytest.mark.parametrize("gated", [False, True])
def test_gradcheck_with_the_temperature_and_the_gate(feature_map, gated):
    q, k, v, W = problem(1, 2, 5, 3, 2, 6, requires_grad=True)
    sigma = torch.full((2, 1, 3), 1.2, dtype=torch.float64, requires_grad=True)
    logits = torch.randn(1, 2, 5, generator=rng(4), dtype=torch.float64, requires_grad=True)

    def run(q, k, v, sigma, logits):
        log_gate = F.logsigmoid(logits) if gated else None
        out, state = rfa_attention(
            q,
            k,
            v,
            is_causal=True,
            projection=W.detach() * sigma,
            feature_map=feature_map,
            log_gate=log_gate,
            chunk_size=3,
            return_state=True,
        )
        factor = state.c.exp() if feature_map == "positive" else torch.ones_like(state.c)
        return out, state.S * factor[..., None], state.z * factor

    assert torch.autograd.gradcheck(run, (q, k, v, sigma, logits if gated else logits.detach()))


def test_a_constant_gate_gives_powers():
    q, k, v, W = problem(D=64)
    gamma = 0.8
    log_gate = torch.full((2, 3, 16), math.log(gamma), dtype=torch.float64)
    fq, fk = (features(unit(x), W, "gaussian") for x in (q, k))
    age = torch.arange(16)[:, None] - torch.arange(16)[None]
    weights = (fq @ fk.mT) * ((1 - gamma) * gamma ** age.clamp_min(0)).where(age >= 0, 0.0)
    expected = weights @ v / weights.sum(-1, keepdim=True)
    assert torch.allclose(rfa_attention(q, k, v, is_causal=True, projection=W, log_gate=log_gate), expected)


def test_the_gate_of_a_running_mean_gives_the_plain_form():
    q, k, v, W = problem(D=64)
    t = torch.arange(1, 17, dtype=torch.float64)
    log_gate = ((t - 1) / t).log().expand(2, 3, 16)
    gated, state = rfa_attention(q, k, v, is_causal=True, projection=W, log_gate=log_gate, return_state=True)
    assert torch.allclose(gated, rfa_attention(q, k, v, is_causal=True, projection=W))
    assert torch.allclose(state.n, torch.ones(2, 3, dtype=torch.float64))


@pytest.mark.parametrize("causal", [False, True])
def test_lengths_of_queries_and_keys_do_not_matter(causal):
    q, k, v, W = problem(D=64)
    one, two = (rfa_attention(a * q, b * k, v, is_causal=causal, projection=W) for a, b in ((1, 1), (3.0, 0.2)))
    assert torch.allclose(one, two, atol=1e-5)
    if not causal:
        order = torch.randperm(16, generator=rng())
        assert torch.allclose(one, rfa_attention(q, k[:, :, order], v[:, :, order], projection=W))


@pytest.mark.parametrize("gated", [None, False, True])
@pytest.mark.parametrize("feature_map", MAPS)
def test_padding_equals_absence(feature_map, gated):
    """Causal with and without a gate, and (None) not causal; padding holds NaN."""
    q, k, v, W = problem(D=64)
    causal = gated is not None
    log_gate = gates() if gated else None
    keep = torch.ones(2, 16, dtype=torch.bool)
    keep[0, [3, 4, 9]] = False
    dirty = [x.masked_fill(~keep[:, None, :, None], math.nan).requires_grad_() for x in (k, v)]
    settings = {"is_causal": causal, "projection": W, "feature_map": feature_map}
    found = rfa_attention(q, *dirty, keep, log_gate=log_gate, chunk_size=4, **settings)
    kept = [x[:1, :, keep[0]] for x in (q, k, v)]
    expected = rfa_attention(*kept, log_gate=None if log_gate is None else log_gate[:1, :, keep[0]], **settings)
    assert torch.allclose(found[:1, :, keep[0]], expected)
    found.sum().backward()
    assert all(x.grad.isfinite().all() for x in dirty)


def test_later_keys_do_not_move_earlier_outputs():
    q, k, v, W = problem()
    other = k.clone()
    other[:, :, 9] = 50.0
    one, two = (rfa_attention(q, x, v, is_causal=True, projection=W, chunk_size=16)[:, :, :9] for x in (k, other))
    assert torch.allclose(one, two, atol=1e-12)


# ---- 11: states -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("feature_map", "tau"), [("gaussian", 1.0), ("arccos", 1.0), ("positive", 1.0), ("positive", 0.02)])
@pytest.mark.parametrize("gate", [False, True])
def test_steps_segments_and_the_whole_agree(feature_map, tau, gate):
    torch.manual_seed(0)
    layer = RandomFeatureAttention(12, 3, 32, gate=gate, feature_map=feature_map, tau=tau).eval()
    x = torch.randn(2, 14, 12, generator=rng())
    whole = layer(x, is_causal=True)
    state = layer.init_state(2)
    outs = []
    for t in range(14):
        out, state = layer.step(x[:, t], state)
        outs.append(out)
    assert torch.allclose(torch.stack(outs, 1), whole, atol=1e-5)
    first, carried = layer(x[:, :5], is_causal=True, return_state=True)
    second, end = layer(x[:, 5:], is_causal=True, state=carried.detach())
    assert torch.allclose(torch.cat([first, second], 1), whole, atol=1e-5)
    assert torch.allclose(end.S, state.S, atol=1e-5)
    swapped, _ = layer.step(x[[1, 0], 3], carried.index_select(torch.tensor([1, 0])))
    assert torch.allclose(swapped[[1, 0]], layer.step(x[:, 3], carried.to(torch.float32))[0], atol=1e-6)


def test_a_source_is_summarised_once():
    torch.manual_seed(0)
    layer = RandomFeatureAttention(12, 3, 32)
    x, source = torch.randn(2, 5, 12, generator=rng(1)), torch.randn(2, 9, 12, generator=rng(2))
    padding = torch.zeros(2, 9, dtype=torch.bool)
    padding[1, 6:] = True
    expected = layer(x, source, padding)
    summary = layer.summarize(source, padding)
    assert torch.allclose(layer(x, state=summary), expected, atol=1e-6)
    assert torch.equal(summary.n, torch.tensor([[9.0] * 3, [6.0] * 3]))
    shorter = layer(x[1:], source[1:, :6])
    assert torch.allclose(expected[1:], shorter, atol=1e-6)


# ---- 12, 13: extremes and denominators ------------------------------------------------------------------------------------


def test_extreme_gates_stay_finite():
    q, k, v, W = problem(1, 1, 4096, 8, 4, 32, dtype=torch.float32, requires_grad=True)
    logits = torch.where(torch.rand(1, 1, 4096, generator=rng(3)) < 0.5, -50.0, 50.0).requires_grad_()
    out = rfa_attention(q, k, v, is_causal=True, projection=W, log_gate=F.logsigmoid(logits))
    out.square().sum().backward()
    assert out.isfinite().all()
    assert all(x.grad.isfinite().all() for x in (q, k, v, W, logits))


def test_small_decays_after_large_ones_keep_their_digits():
    """Cumulated gates reach thousands; the differences that matter are small."""
    q, k, v, W = problem(1, 1, 64, 8, 4, 32)
    log_gate = torch.full((1, 1, 64), -0.01, dtype=torch.float64)
    log_gate[..., :32] = -100.0
    double = rfa_attention(q, k, v, is_causal=True, projection=W, log_gate=log_gate)
    single = rfa_attention(q.float(), k.float(), v.float(), is_causal=True, projection=W.float(), log_gate=log_gate.float())
    assert torch.allclose(single.double(), double, atol=2e-5)


def test_gates_at_the_ends():
    q, k, v, W = problem(D=64)
    closed = rfa_attention(q, k, v, is_causal=True, projection=W, log_gate=torch.zeros(2, 3, 16, dtype=torch.float64))
    assert not closed.any()
    present = rfa_attention(q, q, v, is_causal=True, projection=W, log_gate=torch.full((2, 3, 16), -math.inf, dtype=torch.float64))
    assert torch.allclose(present, v)


@pytest.mark.parametrize("logit", [30.0, 38.0, 50.0])
def test_gates_near_1_keep_tiny_weights(logit):
    """All weights are about exp(-logit): their ratio is that of the form without a gate."""
    q, k, v, W = problem(D=64)
    log_gate = F.logsigmoid(torch.full((2, 3, 16), logit, dtype=torch.float64))
    found = rfa_attention(q, k, v, is_causal=True, projection=W, log_gate=log_gate)
    assert torch.allclose(found, rfa_attention(q, k, v, is_causal=True, projection=W), atol=1e-8)


def test_gated_positive_features_have_finite_gradients_where_logs_rise():
    W = torch.tensor([[[30.0, 0.0]]])
    q, k, v = (torch.randn(1, 1, 16, 2, generator=rng(i)) for i in range(3))
    k[:, :, 0] = torch.tensor([-1.0, 0.0])
    inputs = [x.requires_grad_() for x in (q, k, v)]
    out = rfa_attention(*inputs, is_causal=True, projection=W, feature_map="positive", log_gate=torch.full((1, 1, 16), -0.1))
    out.square().sum().backward()
    assert all(x.grad.isfinite().all() for x in inputs)


def test_first_output_is_the_first_value_unless_clamped_as_officially():
    q, k, v, _ = problem(B=4, H=8, d=64)
    W = torch.randn(8, 64, 64, generator=rng(2), dtype=torch.float64)
    safe = rfa_attention(q, k, v, is_causal=True, projection=W)
    assert torch.allclose(safe[:, :, 0], v[:, :, 0], atol=1e-4)
    official = rfa_attention(q, k, v, is_causal=True, projection=W, denominator="official")
    ratio = (official[:, :, 0] / v[:, :, 0]).mean()
    assert ratio == pytest.approx(0.25, abs=0.04)
    fq, fk = (features(unit(x), W, "gaussian") * (0.1 * 8.0) for x in (q, k))
    A = (fq @ fk.mT).tril()
    assert torch.allclose(official, A @ v / A.sum(-1, keepdim=True).clamp_min(1.0))


@pytest.mark.parametrize("feature_map", MAPS)
def test_zero_queries_and_keys_are_finite(feature_map):
    q, k, v, W = problem()
    q[0, 0, 3] = 0.0
    k[0, 0, 3] = 0.0
    inputs = [x.requires_grad_() for x in (q, k, v)]
    out = rfa_attention(*inputs, is_causal=True, projection=W, feature_map=feature_map)
    out.sum().backward()
    assert out.isfinite().all()
    assert all(x.grad.isfinite().all() for x in inputs)


def test_a_sharp_kernel_is_reported():
    torch.manual_seed(0)
    x = torch.randn(2, 200, 64, generator=rng())
    mild = RandomFeatureAttention(64, 1, 64)
    sharp, arccos = (RandomFeatureAttention(64, 1, 64, tau=0.15, feature_map=kind) for kind in ("gaussian", "arccos"))
    assert mild.denominators(x, is_causal=True).clamped_share == 0.0
    with pytest.warns(OutlastWarning, match="negative"):
        report = sharp.denominators(x, is_causal=True)
    assert report.rows == 400
    assert report.negative_share > 0.1
    assert arccos.denominators(x, is_causal=True, warn_above=1.0).negative_share == 0.0
    padding = torch.zeros(2, 200, dtype=torch.bool)
    padding[:, :150] = True  # rows that see nothing are not counted
    padded = mild.denominators(x, None, padding, True)
    assert (padded.rows, padded.clamped_share) == (100, 0.0)
    with pytest.raises(ValueError, match="no query sees a key"):
        mild.denominators(x, None, ~torch.zeros_like(padding))
    closed = RandomFeatureAttention(64, 1, 64, gate=True)
    with torch.no_grad():
        closed.gate_proj.weight.zero_()
        closed.gate_proj.bias.fill_(200.0)
    with pytest.warns(OutlastWarning, match="100.0 %"):
        assert closed.denominators(x, is_causal=True).clamped_share == 1.0


# ---- 14, 15: the layer ----------------------------------------------------------------------------------------------------


def test_layer_trains_its_temperature_and_keeps_it_from_decay():
    layer = RandomFeatureAttention(8, 2, 16, gate=True)
    layer(torch.randn(2, 6, 8, generator=rng()), is_causal=True).square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None
        assert name == "k_proj.bias" or parameter.grad.abs().sum() > 0
    decayed, kept = rfa_parameter_groups(layer, 0.1)
    assert [id(p) for p in kept["params"]] == [id(layer.sigma)]
    assert kept["weight_decay"] == 0.0
    assert len(decayed["params"]) == len(list(layer.parameters())) - 1
    fixed = RandomFeatureAttention(8, 2, learn_sigma=False)
    assert "sigma" in fixed.state_dict()
    assert len(rfa_parameter_groups(fixed, 0.1)) == 1
    reach = 1 / (1 - torch.sigmoid(layer.gate_proj.bias))
    assert torch.allclose(reach, torch.tensor([4.0, 256.0]), rtol=1e-3)


def test_evaluation_keeps_its_vectors_and_training_draws_from_the_pool():
    layer, above = (RandomFeatureAttention(8, 2, 4, pool_size=5, seed=1, layer=index) for index in (0, 1))
    pool = set()
    for _ in range(12):
        heads = [tuple(head.flatten().tolist()) for each in (layer, above) for head in each.projection]
        assert len(set(heads)) == 4  # without replacement over the heads of all layers
        pool |= set(heads)
        layer.redraw()
        above.redraw()
    assert len(pool) == 5
    before = layer.eval()(torch.ones(1, 3, 8))
    layer.redraw()
    assert torch.equal(layer(torch.ones(1, 3, 8)), before)
    fresh = RandomFeatureAttention(8, 2, 4, pool_size=None)
    seen = fresh.projection.clone()
    fresh.redraw()
    assert not torch.equal(seen, fresh.projection)


def _trained(rank, count):
    torch.manual_seed(0)
    layer = RandomFeatureAttention(8, 2, 4, layer=1)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    redraw_after_steps(layer, optimizer)
    drawn = []
    for _ in range(3):
        optimizer.zero_grad()
        layer(torch.ones(1, 4, 8), is_causal=True).sum().backward()
        optimizer.step()
        drawn.append(layer.projection.clone())
    return drawn


def test_processes_draw_the_same(tmp_path):
    one, two = in_processes(_trained, tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert not torch.equal(one[0], one[1])


def test_resumed_layers_go_on_with_the_same_vectors():
    layer, other = (RandomFeatureAttention(8, 2, 4) for _ in range(2))
    for _ in range(5):
        layer.redraw()
    other.load_state_dict(layer.state_dict())
    layer.redraw()
    other.redraw()
    assert torch.equal(layer.projection, other.projection)


def test_a_double_layer_is_double():
    torch.manual_seed(0)
    layer = RandomFeatureAttention(4, 2, 8, gate=True, causal=True).double()
    x = torch.randn(1, 5, 4, generator=rng(), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, (x,))


def test_forward_leaves_no_trace():
    torch.manual_seed(0)
    layer = RandomFeatureAttention(8, 2, 4)
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    layer(torch.randn(2, 9, 8, generator=rng()), is_causal=True)
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())
    assert set(dict(layer.named_buffers())) <= set(before)


@pytest.mark.parametrize("gate", [False, True])
def test_layer_compiles_into_one_graph(gate):
    torch.manual_seed(0)
    layer = RandomFeatureAttention(8, 2, 4, gate=gate)
    x = torch.randn(2, 9, 8, generator=rng())
    forward = inspect.unwrap(RandomFeatureAttention.forward)
    compiled = torch.compile(lambda x: forward(layer, x, is_causal=True), fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(x), layer(x, is_causal=True), atol=1e-6)


def test_autocast_keeps_norms_and_features_in_float32():
    torch.manual_seed(0)
    layer = RandomFeatureAttention(32, 2, 64, gate=True)
    x = torch.randn(2, 50, 32, generator=rng())
    with torch.autocast("cpu", torch.bfloat16):
        out, state = layer(x, is_causal=True, return_state=True)
    assert out.dtype == torch.bfloat16
    assert state.S.dtype == torch.float32
    exact = layer(x, is_causal=True)
    assert (out.float() - exact).norm() / exact.norm() < 0.02


# ---- bad input ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"log_gate": torch.zeros(2, 3, 16), "is_causal": False}, ValueError, "needs is_causal"),
        ({"log_gate": torch.ones(2, 3, 16)}, ValueError, "at most 0"),
        ({"log_gate": torch.zeros(2, 3, 15)}, ValueError, "log_gate must have shape"),
        ({"scale": 0.1}, ValueError, "temperature"),
        ({"projection": torch.zeros(2, 10, 6)}, ValueError, "projection has 2 heads"),
        ({"projection": torch.zeros(10, 5)}, ValueError, "projection must have shape"),
        ({"value": torch.zeros(2, 3, 15, 4)}, ValueError, "key and value must agree"),
        ({"attn_mask": torch.ones(16, 16, dtype=torch.bool)}, ValueError, "does not factor"),
        ({"attn_mask": torch.zeros(2, 1, 1, 16)}, ValueError, "additive bias"),
        ({"query": torch.zeros(2, 3, 4, 6)}, ValueError, "one query for each key"),
        ({"feature_map": "trig"}, ValueError, "feature_map must be one of"),
        ({"denominator": "abs"}, ValueError, "denominator must be one of"),
        ({"denominator": "official", "feature_map": "positive"}, ValueError, "bounded maps"),
        ({"log_gate": torch.zeros(2, 3, 16, dtype=torch.int64)}, TypeError, "log_gate"),
        ({"query": torch.zeros(2, 3, 16, 6, dtype=torch.int64)}, TypeError, "floating point"),
        ({"key": torch.zeros(2, 3, 16, 6, dtype=torch.float64)}, TypeError, "one dtype"),
        ({"dropout_p": 0.5}, UnsupportedError, "dropout"),
    ],
)
def test_bad_input_is_refused(change, error, message):
    given = dict(zip(("query", "key", "value", "projection"), problem(dtype=torch.float32), strict=True)) | {"is_causal": True} | change
    with pytest.raises(error, match=message):
        rfa_attention(**given)


def test_states_of_other_shapes_are_refused():
    q, k, v, W = problem()
    _, state = rfa_attention(q, k, v, is_causal=True, projection=W, return_state=True)
    for change in ({"projection": W[:, :4]}, {"query": q[:1], "key": k[:1], "value": v[:1]}):
        with pytest.raises(ValueError, match="another batch, projection"):
            rfa_attention(**({"query": q, "key": k, "value": v, "projection": W, "is_causal": True, "state": state} | change))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: RandomFeatureAttention(8, 3), ValueError, "must divide embed_dim"),
        (lambda: RandomFeatureAttention(8, 2, tau=0.0), ValueError, "tau"),
        (lambda: RandomFeatureAttention(8, 2, 0), ValueError, "num_features"),
        (lambda: RandomFeatureAttention(8, 4, pool_size=3), ValueError, "pool_size"),
        (lambda: RandomFeatureAttention(8, 4, pool_size=7, layer=1), ValueError, "pool_size must be at least 8"),
        (lambda: layer_forward(RandomFeatureAttention(8, 2), torch.zeros(5, 8)), ValueError, "x must have shape"),
        (
            lambda: RandomFeatureAttention(8, 2)(torch.zeros(1, 5, 8), None, torch.zeros(1, 5, dtype=torch.int64)),
            TypeError,
            "key_padding_mask",
        ),
        (
            lambda: RandomFeatureAttention(8, 2)(torch.zeros(1, 5, 8), None, torch.zeros(1, 4, dtype=torch.bool)),
            ValueError,
            "key_padding_mask",
        ),
        (lambda: layer_step(RandomFeatureAttention(8, 2), torch.zeros(2, 1, 8), None), ValueError, "one position"),
        (lambda: RandomFeatureAttention(8, 2, gate=True, causal=False), ValueError, "causal"),
        (lambda: RandomFeatureAttention(8, 2, gate=True)(torch.zeros(1, 3, 8)), ValueError, "is_causal=True"),
        (lambda: RandomFeatureAttention(8, 2, gate=True).summarize(torch.zeros(1, 3, 8)), ValueError, "is_causal=True"),
        (lambda: RandomFeatureAttention(8, 2, causal=False)(torch.zeros(1, 3, 8), is_causal=True), ValueError, "causal=False"),
        (lambda: RandomFeatureAttention(8, 2)(torch.zeros(1, 3, 8), torch.zeros(1, 3, 8), is_causal=True), ValueError, "context"),
        (lambda: RandomFeatureAttention(8, 2, causal=False).step(torch.zeros(1, 8), None), StateError, "causal=False"),
    ],
)
def test_bad_settings_are_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_bidirectional_form_equals_the_quadratic_one():
    q, k, v, W = problem(D=64)
    assert torch.allclose(rfa_attention(q, k, v, projection=W), quadratic(unit(q), unit(k), v, W, "gaussian"))
