"""Intrinsic dimension: identities, known distributions, known values, bad input."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from outlast.data import load
from outlast.diagnose import dimension as dim
from outlast.diagnose.dimension._estimate import plateau
from outlast.diagnose.dimension._likelihood import gride_ml, value_and_error
from outlast.diagnose.dimension._rows import as_rows
from outlast.errors import DamagedFileError, MissingDataError, OutlastWarning


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def gaussian(n, d, seed=0):
    return torch.randn(n, d, generator=rng(seed))


@pytest.fixture(scope="module")
def fashion():
    return load("fashion-mnist", "test", variant="small").images


@pytest.fixture(scope="module")
def found(fashion):
    return dim.estimate(fashion)


# ---- the formulas ------------------------------------------------------------------------------------------------------


def test_hand_case():
    distances = torch.tensor([[1.0, 2.0, 4.0]])
    assert dim.from_distances(distances).value == pytest.approx(2 / (3 * math.log(2)), rel=1e-12)
    assert dim.from_distances(distances, "pope2021").value == pytest.approx(1 / (3 * math.log(2)), rel=1e-12)


@pytest.mark.parametrize("k", [3, 4, 10, 20])
def test_released_formula_is_a_factor_off(k):
    data = gaussian(500, 6)
    right, published = dim.estimate(data, k=k), dim.estimate(data, "pope2021", k=k)
    assert published.value * (k - 1) == pytest.approx(right.value * (k - 2), rel=1e-12)
    assert "down by" in published.biased
    assert right.biased == ""


def test_two_neighbours_are_twonn():
    distances, _ = dim.knn(gaussian(400, 5), 2)
    expected = 400 / float((distances[:, 1] / distances[:, 0]).log().sum())
    assert dim.estimate(gaussian(400, 5), k=2).value == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("d", [2, 10, 50])
@pytest.mark.parametrize("k", [2, 3, 10])
def test_gamma_sums_give_their_rate(d, k):
    sums = torch.from_numpy(np.random.default_rng(d + k).gamma(k - 1, 1 / d, 20_000))
    value, error = value_and_error(sums, k, "mackay")
    assert abs(value - d) < 4 * error
    assert error == pytest.approx(d / math.sqrt(20_000 * (k - 1)), rel=0.05)
    if k >= 5:
        assert value_and_error(sums, k, "levina_bickel")[0] == pytest.approx(d * (k - 1) / (k - 2), rel=0.02)
        assert value_and_error(sums, k, "levina_bickel_unbiased")[0] == pytest.approx(d, rel=0.02)


def test_gride_at_rank_one_is_twonn_and_recovers_a_gaussian():
    data = gaussian(5000, 5)
    curve = dim.gride(data, 32)
    assert curve.scales == (2, 4, 8, 16, 32)
    assert curve.values[0] == pytest.approx(dim.twonn(data, "ml").value * 5000 / 4999, rel=1e-9)
    mean = np.mean([dim.gride(gaussian(5000, 5, seed), 32).values for seed in range(4)], 0)  # one draw scatters by 1.5 %
    assert np.allclose(mean, 5, rtol=0.03)


def test_gride_solves_its_likelihood_equation():
    rng_ = np.random.default_rng(0)
    # the power of the ratio is a Beta variable
    for n1 in (2, 5):
        log_mu = torch.from_numpy(-np.log(rng_.beta(n1, n1, 20_000)) / 7.0)
        value, error = gride_ml(log_mu, n1)
        assert abs(value - 7.0) < 4 * error
        assert 0 < error < 0.2


# ---- known values ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("d", "expected"), [(2, (2.04, 2.04, 2.02, 2.02)), (5, (5.07, 4.97, 4.98, 4.95)), (10, (9.28, 9.30, 9.24, 9.05))])
def test_gaussian_clouds(d, expected):
    results = [dim.estimate(gaussian(2000, d, seed)) for seed in range(4)]  # one draw scatters by 2 %
    assert [np.mean([r.by_k[k].value for r in results]) for k in (3, 5, 10, 20)] == pytest.approx(expected, rel=0.06)
    cube = dim.estimate(torch.rand(2000, d, generator=rng()))
    assert cube.value < results[0].value


def test_fashion_mnist(fashion, found):
    assert found.by_k[20].value == pytest.approx(12.78698, rel=1e-6)
    assert dim.twonn(fashion).value == pytest.approx(15.6867, rel=1e-5)
    assert dim.twonn(fashion, "ml").value == pytest.approx(14.9321, rel=1e-5)
    assert found.n == found.n_anchors == 10_000
    assert found.n_duplicates == 0
    assert found.reliable


@pytest.mark.peer
def test_equals_scikit_dimension(fashion):
    skdim = pytest.importorskip("skdim", reason="scikit-dimension (extra peers) is not installed")
    rows = fashion[:2000].flatten(1).double() / 255
    distances, index = dim.knn(rows, 20)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peer = skdim.id.MLE(K=20).fit(rows.numpy(), precomputed_knn_arrays=(distances.numpy(), index.numpy()))
        two = skdim.id.TwoNN().fit(rows.numpy())
    pointwise = dim.local(rows, 20)
    assert np.allclose(np.asarray(peer.dimension_pw_), pointwise.numpy(), rtol=1e-6)
    assert two.dimension_ == pytest.approx(dim.twonn(rows).value, rel=1e-5)


def test_ladder_of_generated_images():
    values = {d: dim.estimate(dim.synthetic_images(d, 2000)).by_k for d in (1, 2, 4, 8, 16, 32, 64)}
    for d in (1, 2, 4, 8):
        assert all(e.value == pytest.approx(d, rel=0.05) for e in values[d].values())
    assert all(e.value == pytest.approx(16, rel=0.10) for e in values[16].values())
    for k in (3, 5, 10, 20):
        column = [by_k[k].value for by_k in values.values()]
        assert column == sorted(column)
    assert all(16 < e.value < 64 for e in values[64].values())
    assert not dim.estimate(dim.synthetic_images(64, 2000)).reliable
    assert torch.equal(dim.synthetic_images(3, 5, (1, 4, 4), seed=2), dim.synthetic_images(3, 5, (1, 4, 4), seed=2))
    assert dim.synthetic_images(3, 5, (1, 4, 4)).shape == (5, 1, 4, 4)


# ---- invariances -------------------------------------------------------------------------------------------------------


def test_nothing_but_shape_matters():
    data = gaussian(600, 8) @ gaussian(8, 30, 1)
    base = dim.estimate(data).value
    turn = torch.linalg.qr(gaussian(30, 30, 2))[0]
    for other in (
        3.7 * data,
        data + 100.0,
        data @ turn,
        torch.cat([data, torch.zeros(600, 5)], 1),
        data[torch.randperm(600, generator=rng())],
        data.view(600, 5, 6),
        data.double(),
    ):
        assert dim.estimate(other).value == pytest.approx(base, rel=1e-5)


def test_an_offset_changes_nothing(fashion):
    images = fashion[:3000].float() / 255
    assert dim.estimate(images + 100.0).value == pytest.approx(dim.estimate(images).value, rel=1e-4)


def test_doubling_the_data_changes_nothing_but_the_count():
    data = gaussian(300, 4)
    once, twice = dim.estimate(data), dim.estimate(torch.cat([data, data]))
    assert twice.by_k == once.by_k
    assert twice.n_duplicates == 300
    assert dim.twonn(torch.cat([data, data])).value == dim.twonn(data).value
    assert torch.equal(dim.local(torch.cat([data, data]), 5), dim.local(data, 5).repeat(2))


def test_negative_zero_is_zero():
    data = gaussian(200, 3)
    data[0], data[1] = torch.tensor([0.0, 1.0, 2.0]), torch.tensor([-0.0, 1.0, 2.0])
    assert as_rows(data).num_duplicates == 1


def test_all_rows_as_anchors_are_the_full_estimate_and_draws_scatter_as_stated():
    data = gaussian(1500, 6)
    full = dim.estimate(data)
    assert dim.estimate(data, anchors=1500) == full
    assert dim.estimate(data, anchors=torch.arange(1500)).by_k == full.by_k
    found = [dim.estimate(data, k=10, anchors=100, seed=seed) for seed in range(200)]
    values, errors = np.asarray([r.value for r in found]), np.asarray([r.se for r in found])
    assert values.mean() == pytest.approx(full.by_k[10].value, rel=0.01)
    # anchors are drawn without replacement
    assert values.std(ddof=1) == pytest.approx(errors.mean() * math.sqrt(1 - 100 / 1500), rel=0.3)
    assert dim.estimate(data, anchors=[5, 7, 9]).n_anchors == 3


def test_bootstrap_interval_holds_the_value_and_repeats():
    data = gaussian(400, 4)
    first = dim.estimate(data, k=10, bootstrap=200)
    estimate = first.by_k[10]
    assert estimate.low < estimate.value < estimate.high
    assert estimate.high - estimate.low == pytest.approx(2 * 1.96 * estimate.se, rel=0.25)
    assert dim.estimate(data, k=10, bootstrap=200) == first


# ---- other estimators --------------------------------------------------------------------------------------------------


def test_local_pca_counts_a_subspace():
    data = gaussian(800, 7) @ torch.linalg.qr(gaussian(30, 7, 1))[0].T + 1e-6 * gaussian(800, 30, 2)
    assert dim.local_pca(data, anchors=100).value == 7
    ratio = dim.local_pca(data, rule="ratio", anchors=100)
    assert ratio.value <= 7
    assert ratio.threshold == 0.95
    assert 4 < dim.local_pca(data, rule="participation", anchors=100).value <= 7
    assert dim.local_pca(data, anchors=100, threshold=0.9).value < 7


def test_scales_find_a_plateau_where_there_is_one():
    line = torch.rand(4000, 1, generator=rng()) @ torch.ones(1, 5)
    assert dim.scales(line).plateau
    assert dim.scales(line, by="decimation").plateau
    assert not dim.scales(gaussian(1000, 20)).plateau
    assert plateau(np.array([1.0, 2.0, 4.0]), np.array([3.0, 3.01, 3.0]))
    assert not plateau(np.array([1.0, 2.0, 4.0]), np.array([3.0, 3.5, 4.0]))
    curve = dim.scales(gaussian(1600, 3), by="decimation")
    assert curve.scales == (1600, 800, 400, 200, 100)
    assert np.allclose(curve.values, 3, rtol=0.15)


def test_local_values_and_new_points():
    data = torch.cat([gaussian(500, 2) @ torch.eye(2, 10), 20 + gaussian(500, 8, 1) @ torch.eye(8, 10)])
    values = dim.local(data, 20)
    assert float(values[:500].mean()) == pytest.approx(2, rel=0.15)
    assert float(values[500:].mean()) > 5
    queries = gaussian(20, 2, 5) @ torch.eye(2, 10)
    assert dim.local(data, 20, queries).shape == (20,)
    assert float(dim.local(data, 20, queries).mean()) == pytest.approx(2, rel=0.35)


def test_classes_and_layers():
    data = torch.cat([gaussian(400, 2) @ gaussian(2, 12, 3), gaussian(300, 6, 1) @ gaussian(6, 12, 4)])
    labels = torch.cat([torch.zeros(400), torch.ones(300)]).long()
    classes = dim.by_class(data, labels, k=10)
    assert classes[0].n == classes[1].n == 300
    assert classes[0].value < 3 < classes[1].value
    assert dim.by_class(data, labels.numpy(), k=10, match_n=False)[0].n == 400
    with pytest.raises(ValueError, match="labels"):
        dim.by_class(data, labels[:5])
    model = nn.Sequential(nn.Identity(), nn.Linear(12, 3))
    model.train()
    loader = [(part, 0) for part in data.split(100)]
    layers = dim.by_layer(model, loader, ["0", "1"], k=10)
    assert layers["0"] == dim.estimate(data, k=10)
    assert model.training
    with pytest.raises(ValueError, match="no layer 'x'"):
        dim.by_layer(model, loader, ["x"])


def test_two_processes_give_what_one_does(tmp_path):
    from helpers import dimension_run, in_processes

    data = gaussian(400, 6)
    one = dim.estimate(data, k=(5, 10), anchors=101)
    net = nn.Linear(6, 4)
    torch.nn.init.eye_(net.weight)
    layers = dim.by_layer(net, data.split(50), [""], k=(5, 10))
    ranks = in_processes(dimension_run, tmp_path)
    assert ranks[0]["few"] == ranks[1]["few"]
    for rank in ranks:
        assert rank["estimate"] == pytest.approx(one.value, rel=1e-12)
        assert rank["se"] == pytest.approx(one.se, rel=1e-12)
        assert rank["metric"] == pytest.approx(dim.estimate(data, k=(5, 10)).value, rel=1e-12)
        assert rank["layer"] == pytest.approx(layers[""].value, rel=1e-6)  # batches of another size round differently
        assert rank["alone"] == pytest.approx(dim.estimate(data, k=(5, 10)).value, rel=1e-12)
        assert [text.split(" or ")[0] for text in rank["refused"]] == ["the processes hold different rows"] * 2
        assert rank["few"][0] == 100


def test_sets_are_ranked_at_equal_size_only():
    sets = {"flat": gaussian(300, 2) @ gaussian(2, 9, 1), "full": gaussian(700, 8)}
    result = dim.compare(sets, k=10)
    assert result.n == 300
    assert result.ranking == ("flat", "full")
    assert result.separated == (("flat", "full"),)
    loose = dim.compare(sets, match_n=False, k=10)
    assert loose.ranking is None
    assert loose.results["full"].n == 700
    with pytest.raises(ValueError, match="two sets"):
        dim.compare({"one": sets["flat"]})


def test_regularizer_is_the_estimate_and_has_its_gradient():
    features = gaussian(60, 5).double().requires_grad_()
    assert dim.regularizer(features, 10).item() == pytest.approx(_quiet(features, 10), rel=1e-9)
    assert torch.autograd.gradcheck(lambda x: dim.regularizer(x, 3), gaussian(12, 3, 4).double().requires_grad_())
    optimizer = torch.optim.Adam([x := gaussian(200, 10).requires_grad_()], lr=0.02)
    before = dim.regularizer(x).item()
    for _ in range(30):
        optimizer.zero_grad()
        dim.Regularizer(10)(x).backward()
        optimizer.step()
    assert dim.regularizer(x).item() < before - 0.5
    with pytest.raises(ValueError, match="more than 10 rows"):
        dim.regularizer(torch.zeros(10, 3))
    with pytest.raises(ValueError, match="exact copy"):
        dim.regularizer(torch.ones(20, 3))


def _quiet(data, k):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", OutlastWarning)
        return dim.estimate(data.detach(), k=k).value


def test_metric_streams_an_epoch():
    data = gaussian(900, 6)
    metric = dim.Metric(max_samples=2000, k=10)
    for part in data.split(128):
        metric.update(part)
    assert metric.compute() == dim.estimate(data, k=10)
    small = dim.Metric(max_samples=300, k=10)
    for part in data.split(128):
        small.update(part)
    first = small.compute()
    assert first.n == 300
    small.reset()
    for part in data.split(128):
        small.update(part)
    assert small.compute() == first
    with pytest.raises(ValueError, match="had 6"):
        small.update(torch.zeros(3, 5))
    with pytest.raises(ValueError, match="update"):
        dim.Metric().compute()


def test_reservoir_is_uniform():
    metric = dim.Metric(max_samples=200)
    for start in range(0, 2000, 50):
        metric.update(torch.arange(start, start + 50, dtype=torch.float32)[:, None])
    assert float(metric._rows.mean()) == pytest.approx(1000, abs=150)


def test_scikit_learn_accepts_the_estimator():
    checks = pytest.importorskip("sklearn.utils.estimator_checks", reason="scikit-learn (extra vision) is not installed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its data sets are tiny, and it clones estimators that warn
        checks.check_estimator(dim.Estimator())
    data = gaussian(300, 4).numpy()
    estimator = dim.Estimator(k=10).fit(data)
    assert estimator.dimension_ == dim.estimate(data, k=10).value
    assert estimator.dimension_pw_.shape == (300,)


# ---- what data may be --------------------------------------------------------------------------------------------------


def test_loaders_data_sets_and_arrays_give_the_same(fashion):
    images = fashion[:400]
    expected = dim.estimate(images.float() / 255, k=10)
    assert dim.estimate(images.numpy().astype(np.float32) / 255, k=10) == expected
    as_bytes = dim.estimate(images, k=10)
    assert as_bytes.value == pytest.approx(expected.value, rel=1e-6)
    assert as_bytes.radius == pytest.approx(255 * expected.radius, rel=1e-6)
    assert as_bytes.notes == ("uint8 values taken as float32",)
    pairs = TensorDataset(images.float() / 255, torch.zeros(400))
    assert dim.estimate(pairs, k=10) == expected
    assert dim.estimate(DataLoader(pairs, 64), k=10) == expected
    assert dim.estimate(DataLoader(pairs, 64, shuffle=True), k=10).value == pytest.approx(expected.value, rel=1e-9)
    assert dim.estimate((images.float() / 255).to(torch.float16), k=10).value == pytest.approx(expected.value, rel=1e-2)


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: dim.estimate(gaussian(200, 3), k=1), ValueError, "k must be at least 2"),
        (lambda: dim.estimate(gaussian(200, 3), "pope2021", k=2), ValueError, "at least 3"),
        (lambda: dim.estimate(gaussian(200, 3), "levina_bickel", k=2), ValueError, "at least 3"),
        (lambda: dim.estimate(gaussian(200, 3), k=[]), TypeError, "k must"),
        (lambda: dim.estimate(gaussian(200, 3), k=2.5), TypeError, "k must"),
        (lambda: dim.estimate(gaussian(20, 3), k=20), ValueError, "20 distinct rows"),
        (lambda: dim.estimate(torch.cat([gaussian(15, 3)] * 3), k=20), ValueError, "15 distinct rows"),
        (lambda: dim.estimate(torch.ones(200, 3)), ValueError, "identical"),
        (lambda: dim.estimate(torch.zeros(0, 3)), ValueError, "empty"),
        (lambda: dim.estimate(torch.tensor(3.0)), ValueError, "single number"),
        (lambda: dim.estimate(_with(gaussian(200, 3), 17, math.nan)), ValueError, "row 17"),
        (lambda: dim.estimate(_with(gaussian(200, 3), 3, math.inf)), ValueError, "row 3"),
        (lambda: dim.estimate(gaussian(200, 3).to(torch.complex64)), TypeError, "complex"),
        (lambda: dim.estimate(np.array([["a", "b"]] * 200)), TypeError, "real numbers"),
        (lambda: dim.estimate("images"), TypeError, "str"),
        (lambda: dim.estimate(7), TypeError, "int"),
        (lambda: dim.estimate(iter([])), ValueError, "empty"),
        (lambda: dim.estimate(gaussian(200, 3), "geomle"), ValueError, "method"),
        (lambda: dim.estimate(gaussian(200, 3), metric="cosine"), ValueError, "metric"),
        (lambda: dim.estimate(gaussian(200, 3), duplicates="maybe"), ValueError, "duplicates"),
        (lambda: dim.estimate(gaussian(200, 3), anchors=[0, 200]), ValueError, "0 to 199"),
        (lambda: dim.estimate(gaussian(200, 3), anchors=0), ValueError, "anchors"),
        (lambda: dim.estimate(gaussian(200, 3), anchors=[0.5]), TypeError, "anchors"),
        (lambda: dim.estimate(torch.cat([gaussian(200, 3)] * 2), duplicates="error"), ValueError, "200 exact copies.*row 200"),
        (lambda: dim.estimate(torch.cat([gaussian(200, 3)] * 2), duplicates="keep"), ValueError, "distance 0"),
        (lambda: dim.twonn(gaussian(200, 3), discard=1.0), ValueError, "discard"),
        (lambda: dim.twonn(gaussian(200, 3), discard=-0.1), ValueError, "discard"),
        (lambda: dim.twonn(gaussian(200, 3), "best"), ValueError, "variant"),
        (lambda: dim.local_pca(gaussian(200, 3), rule="eye"), ValueError, "rule"),
        (lambda: dim.local_pca(gaussian(200, 3), rule="participation", threshold=0.5), ValueError, "no threshold"),
        (lambda: dim.scales(gaussian(200, 3), by="luck"), ValueError, "by"),
        (lambda: dim.from_distances([[2.0, 1.0, 3.0]]), ValueError, "ascending.*row 0"),
        (lambda: dim.from_distances([[-1.0, 1.0, 3.0]]), ValueError, "negative"),
        (lambda: dim.from_distances([[1.0, math.nan, 3.0]]), ValueError, "NaN"),
        (lambda: dim.from_distances([1.0, 2.0]), ValueError, "shape"),
        (lambda: dim.from_distances([[1.0, 2.0, 3.0]], k=4), ValueError, "k=4"),
        (lambda: dim.synthetic_images(0, 5), ValueError, "d must"),
        (lambda: dim.nothing, AttributeError, "nothing"),
    ],
)
def test_mistakes_are_named(call, error, says):
    with pytest.raises(error, match=says):
        call()


def _with(data, row, value):
    data[row, 1] = value
    return data


def test_kept_copies_are_left_out_and_counted():
    data = torch.cat([gaussian(300, 4), gaussian(300, 4)[:20]])
    result = dim.estimate(data, k=10, duplicates="keep")
    assert result.n_excluded == 40
    assert result.n_anchors == 280
    assert result.n_duplicates == 20


def test_near_duplicates_are_counted():
    data = gaussian(300, 10)
    data[1] = data[0] + 1e-3
    assert dim.estimate(data).near_duplicates == 2


def test_doubts_are_said_once_each():
    with pytest.warns(OutlastWarning, match="too few"):
        dim.estimate(gaussian(60, 3), k=5)
    bits = (torch.rand(300, 40, generator=rng()) < 0.5).float()
    with pytest.warns(OutlastWarning, match="binary"):
        dim.estimate(bits, k=5)
    with pytest.warns(OutlastWarning) as caught:
        result = dim.estimate(torch.eye(200), k=5)
    assert math.isinf(result.value)
    assert any("ties" in str(w.message) for w in caught)


def test_one_column_is_allowed():
    assert dim.estimate(gaussian(500, 1)).value == pytest.approx(1, rel=0.1)


def test_results_print_draw_and_become_json(found):
    matplotlib = pytest.importorskip("matplotlib", reason="matplotlib (extra report) is not installed")
    assert "k=20: 12.79" in str(found)
    content = found.to_dict()
    assert content["kind"] == "DimensionResult"
    assert content["by_k"]["20"]["kind"] == "Estimate"
    data = gaussian(300, 3)
    for result in (found, dim.gride(data, 16), dim.local_pca(data, 20), dim.compare({"a": data, "b": data * 2}, k=5)):
        assert result.plot() is not None
        assert result.to_dict()["version"] == 1
    matplotlib.pyplot.close("all")


# ---- defects that were found -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1e-30, 1e-22, 1e-3, 1e16, 1e19, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_units_do_not_matter(scale, dtype):
    data = gaussian(203, 5).to(dtype)
    expected = dim.estimate(data, k=5)
    assert dim.estimate(data * scale, k=5).value == pytest.approx(expected.value, rel=1e-4)
    assert dim.knn(data * scale, 5)[0] / scale == pytest.approx(dim.knn(data, 5)[0], rel=1e-5)


def test_one_far_row_does_not_spoil_the_others():
    data = gaussian(203, 5)
    data[0] = 1e17
    assert dim.knn(data, 3)[1][1:].max() < 203
    exact = torch.cdist(data.double(), data.double(), compute_mode="donot_use_mm_for_euclid_dist").fill_diagonal_(math.inf)
    torch.testing.assert_close(dim.knn(data, 3)[0], exact.topk(3, largest=False).values, rtol=1e-6, atol=0)


def test_gride_bears_ties():
    data = torch.unique(torch.round(gaussian(1000, 3) * 20), dim=0)
    assert np.allclose(dim.gride(data, 16).values, 3, rtol=0.1)


def test_integers_and_their_queries_stay_together():
    data = torch.unique(torch.randint(0, 1000, (200, 3), generator=rng()), dim=0)
    assert (dim.knn(data, 1, queries=data[:20])[0] == 0).all()
    stamps = torch.unique(1_700_000_000 + torch.randint(0, 60, (300, 2), generator=rng()), dim=0)
    assert dim.estimate(stamps, k=5).value == pytest.approx(dim.estimate(stamps.double(), k=5).value)
    assert "int64" in dim.estimate(stamps, k=5).notes[0]


def test_streams_keep_their_precision():
    data = gaussian(300, 3).double() + 1e8
    assert dim.estimate(DataLoader(TensorDataset(data), 50), k=5) == dim.estimate(data, k=5)


def test_regularizer_bears_an_offset():
    features = gaussian(256, 8)
    values = [dim.regularizer(features + offset).item() for offset in (0.0, 100.0, 1000.0)]
    assert values == pytest.approx([values[0]] * 3, rel=1e-3)


def test_anchors_may_be_copies_and_repeat():
    data = gaussian(203, 5)
    doubled = torch.cat([data, data[:50]])
    assert dim.estimate(doubled, k=5, anchors=[203, 204]).by_k == dim.estimate(data, k=5, anchors=[0, 1]).by_k
    assert dim.estimate(data, k=5, anchors=[7, 8, 9] * 50) == dim.estimate(data, k=5, anchors=[7, 8, 9])
    with pytest.raises(ValueError, match="0 to 252"):
        dim.estimate(doubled, k=5, duplicates="keep", anchors=[253])


def test_matching_counts_distinct_rows_and_keeps_the_facts():
    data = gaussian(250, 5)
    doubled = torch.cat([data[:200], data[:50]])
    labels = np.array(["a"] * 250 + ["b"] * 250, dtype=object)
    classes = dim.by_class(torch.cat([doubled, gaussian(250, 5, 1)]), labels, k=5)
    assert {name: (r.n, r.n_duplicates) for name, r in classes.items()} == {"a": (200, 50), "b": (200, 0)}
    result = dim.compare({"a": doubled, "b": (20 * data).to(torch.int16)}, k=5)
    assert result.results["a"].n_duplicates == 50
    assert "int16" in result.results["b"].notes[0]


def test_streams_of_every_kind():
    images = torch.rand(200, 3, 4, 4, generator=rng())

    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(images)

    expected = dim.estimate(images, k=5)
    assert dim.estimate(Stream(), k=5) == expected
    assert dim.estimate([(image, 0) for image in images], k=5) == expected
    assert dim.estimate([(part, torch.zeros(len(part))) for part in images.split(64)], k=5) == expected
    with pytest.raises(TypeError, match="mappings"):
        dim.estimate([{"x": images}], k=5)


def test_ties_are_exact_and_counted():
    with pytest.warns(OutlastWarning, match="100 of 100"):
        result = dim.from_distances(np.full((100, 20), 1.7), k=[2, 3, 7, 20])
    assert all(math.isinf(e.value) for e in result.by_k.values())
    with pytest.warns(OutlastWarning, match="1 of 200"):
        dim.from_distances([[1.0, 1.0, 1.0]] + [[1.0, 2.0, 3.0]] * 199, "levina_bickel")


def test_layers_that_run_twice_are_refused():
    shared = nn.ReLU()
    with pytest.raises(ValueError, match="more than once"):
        dim.by_layer(nn.Sequential(shared, nn.Linear(5, 5), shared), [gaussian(200, 5)], ["0"])


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: dim.estimate([]), ValueError, "empty"),
        (lambda: dim.estimate(gaussian(200, 3), anchors="all"), TypeError, "anchors"),
        (lambda: dim.from_distances(np.ones((3, 3), complex)), TypeError, "complex"),
        (lambda: dim.twonn(gaussian(150, 3), discard=0.99), ValueError, "leaves fewer than 2"),
    ],
)
def test_more_mistakes_are_named(call, error, says):
    with pytest.raises(error, match=says):
        call()


def test_bits_are_rows_too():
    with pytest.warns(OutlastWarning, match="binary"):
        assert dim.estimate(torch.rand(300, 20, generator=rng()) > 0.5, k=5).n > 290


def test_folder_of_images(tmp_path):
    image_module = pytest.importorskip("PIL.Image", reason="pillow (extra vision) is not installed")
    values = np.random.default_rng(0).integers(0, 255, (120, 4, 4, 3), np.uint8)
    for number, image in enumerate(values):
        image_module.fromarray(image).save(tmp_path / f"{number:03d}.png")
    expected = dim.estimate(values, k=5).by_k
    assert dim.estimate(tmp_path, k=5).by_k == expected
    assert dim.estimate(str(tmp_path), k=5).by_k == expected
    image_module.fromarray(values[0, :2]).save(tmp_path / "x.png")
    with pytest.raises(ValueError, match=r"one size: 000.png is 4x4, x.png is not"):
        dim.estimate(tmp_path, k=5)
    (tmp_path / "x.png").write_bytes(b"no image")
    with pytest.raises(DamagedFileError, match=r"x.png cannot be read"):
        dim.estimate(tmp_path, k=5)
    with pytest.raises(MissingDataError, match="no images"):
        dim.estimate(tmp_path / "nowhere", k=5)
