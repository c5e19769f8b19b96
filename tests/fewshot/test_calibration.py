"""Distribution calibration: statistics, calibrated Gaussians, sampling, the classifier."""

from __future__ import annotations

import inspect
import math

import numpy as np
import pytest
import torch
from helpers import families

from outlast.errors import DamagedFileError, NotFittedError, OutlastWarning
from outlast.fewshot import (
    BaseStatistics,
    DistributionCalibration,
    LogisticClassifier,
    NearestMean,
    calibrate,
    evaluate_episodes,
    fewshot_baselines,
    tukey_transform,
)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def known_base():
    base = BaseStatistics(2, dtype=torch.float64)
    base.labels = ["a", "b", "c"]
    base.counts = torch.tensor([9, 9, 9])
    base.means = torch.tensor([[0.0, 0.0], [4.0, 0.0], [0.0, 10.0]], dtype=torch.float64)
    base.factors = [torch.eye(2, dtype=torch.float64) * variance**0.5 for variance in (1, 2, 3)]
    return base


# ---- transform ----------------------------------------------------------------------------------------------------------


def test_powers():
    x = torch.tensor([0.0, 1.0, 4.0])
    assert tukey_transform(x, 1.0) is x
    assert tukey_transform(x, 0.5).tolist() == [0.0, 1.0, 2.0]
    assert torch.allclose(tukey_transform(x + 1, 0.0), (x + 1).log())
    assert tukey_transform(torch.tensor([-4.0, 9.0]), negative="signed").tolist() == [-2.0, 3.0]
    assert tukey_transform(torch.tensor([-4.0, 9.0]), negative="relu").tolist() == [0.0, 3.0]
    assert tukey_transform(torch.tensor([-2.0]), 2.0).tolist() == [4.0]
    assert isinstance(tukey_transform(np.array([4.0])), np.ndarray)
    with pytest.raises(ValueError, match=r"1 features are negative \(the smallest -3\).*signed"):
        tukey_transform(torch.tensor([-3.0, 1.0]))
    with pytest.raises(ValueError, match="are zero"):
        tukey_transform(x, 0.0)
    assert torch.isfinite(tukey_transform(x, 0.0, eps=1e-3)).all()
    with pytest.raises(ValueError, match="NaN"):
        tukey_transform(torch.tensor([float("inf")]))


# ---- base statistics ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("each", [4, 30])
def test_factors_are_those_of_numpy_s_covariance(dtype, tolerance, each):
    x = torch.randn(3 * each, 8, generator=rng(), dtype=torch.float64)
    base = BaseStatistics.from_features(x, torch.arange(3).repeat_interleave(each), dtype=dtype)
    for number in range(3):
        own = x[number * each : (number + 1) * each].numpy()
        assert np.abs(base.covariance(number).numpy() - np.cov(own.T)).max() < tolerance
        assert len(base.factors[number]) <= 8
        assert np.linalg.matrix_rank(base.covariance(number).double().numpy(), tol=1e-5) <= each - 1


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_any_division_gives_the_same_statistics(dtype, tolerance):
    x = torch.randn(90, 6, generator=rng(), dtype=torch.float64)
    y = torch.randint(0, 3, (90,), generator=rng(1))
    whole = BaseStatistics.from_features(x, y, dtype=dtype)
    parts = BaseStatistics(6, dtype=dtype)
    for chunk in torch.arange(90).split(13):
        parts.partial_fit(x[chunk], y[chunk])
    left = BaseStatistics(6, dtype=dtype).partial_fit(x[:40], y[:40])
    left.merge(BaseStatistics(6, dtype=dtype).partial_fit(x[40:], y[40:]))
    for other in (parts, left):
        assert sorted(other.labels) == whole.labels
        for number, name in enumerate(whole.labels):
            place = other.labels.index(name)
            assert int(other.counts[place]) == int(whole.counts[number])
            assert float((other.means[place] - whole.means[number]).abs().max()) < tolerance
            assert float((other.covariance(place) - whole.covariance(number)).abs().max()) < 3 * tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_files_are_exact_and_need_no_unpickling(tmp_path, dtype):
    x = torch.randn(40, 6, generator=rng())
    base = BaseStatistics.from_features(x.abs(), ["x", "y"] * 20, tukey=0.5, dtype=dtype)
    base.save(tmp_path / "base.npz")
    again = BaseStatistics.load(tmp_path / "base.npz")
    assert again.labels == ["x", "y"]
    assert again.tukey == 0.5
    assert torch.equal(again.means, base.means)
    assert all(torch.equal(a, b) for a, b in zip(again.factors, base.factors, strict=True))
    with np.load(tmp_path / "base.npz", allow_pickle=False) as file:
        assert "counts" in file
    (tmp_path / "bad.npz").write_bytes((tmp_path / "base.npz").read_bytes()[:200])
    with pytest.raises(DamagedFileError):
        BaseStatistics.load(tmp_path / "bad.npz")
    with pytest.raises(FileNotFoundError):
        BaseStatistics.load(tmp_path / "none.npz")


def test_a_power_is_not_mixed_with_none():
    x, y = torch.rand(40, 6, generator=rng()), torch.arange(4).repeat(10)
    whole = BaseStatistics.from_features(x, y, tukey=0.5)
    for second, transformed in ((x[20:], False), (x[20:].sqrt(), True)):
        parts = BaseStatistics.from_features(x[:20], y[:20], tukey=0.5).partial_fit(second, y[20:], transformed=transformed)
        torch.testing.assert_close(parts.means, whole.means, rtol=0, atol=1e-6)
        for number in range(4):
            torch.testing.assert_close(parts.covariance(number), whole.covariance(number), rtol=0, atol=1e-6)


def test_statistics_that_overflow_are_refused(tmp_path):
    rows, names = 1e6 * torch.rand(10, 3, generator=rng()), [7] * 5 + [8] * 5
    with pytest.raises(ValueError, match=r"base class 7 hold NaN or infinity in torch\.float16"):
        BaseStatistics.from_features(rows, names, dtype=torch.float16)
    grown = BaseStatistics.from_features(rows / 1e6, names, dtype=torch.float16)
    kept = (list(grown.labels), grown.counts.clone(), grown.means.clone())
    large = BaseStatistics.from_features(rows, names)
    for take in (lambda: grown.partial_fit(torch.cat([rows[:5] / 1e6, rows[5:]]), names), lambda: grown.merge(large)):
        with pytest.raises(ValueError, match="NaN or infinity"):
            take()
        assert grown.labels == kept[0]  # nothing of it was taken in
        assert torch.equal(grown.counts, kept[1])
        assert torch.equal(grown.means, kept[2])
    with pytest.raises(ValueError, match="base class 7"):
        large.to(dtype=torch.float16)
    large.means[0, 0] = math.nan
    large.save(tmp_path / "large.npz")
    with pytest.raises(ValueError, match="base class 7"):
        BaseStatistics.load(tmp_path / "large.npz")


def test_small_classes_ranks_and_limits():
    x = torch.randn(21, 6, generator=rng())
    y = [0] * 10 + [1] * 10 + [2]
    with pytest.raises(ValueError, match="class 2 has one feature"):
        BaseStatistics.from_features(x, y)
    with pytest.warns(OutlastWarning, match="left out: 2"):
        base = BaseStatistics.from_features(x, y, min_count=2)
    assert base.labels == [0, 1]
    low = BaseStatistics.from_features(x[:20], y[:20], rank=2)
    assert [len(factor) for factor in low.factors] == [2, 2]
    values = torch.linalg.eigvalsh(base.covariance(0)).flip(0)[:2]
    assert torch.allclose(torch.linalg.eigvalsh(low.covariance(0)).flip(0)[:2], values, atol=1e-4)
    with pytest.raises(ValueError, match=r"max_bytes is 200; rank=3 fits"):
        BaseStatistics.from_features(x[:20], y[:20], max_bytes=200)
    with pytest.raises(ValueError, match="NaN"):
        BaseStatistics.from_features(x * float("nan"), y)
    with pytest.raises(ValueError, match="21 rows and labels 3"):
        BaseStatistics.from_features(x, [0, 1, 2])
    with pytest.raises(ValueError, match="width 5, the statistics 6"):
        BaseStatistics(6).partial_fit(torch.zeros(2, 5), [0, 0])
    with pytest.raises(ValueError, match="2 rows and labels 3"):
        BaseStatistics(6).partial_fit(torch.zeros(2, 6), [0, 0, 1])
    with pytest.raises(ValueError, match="cannot merge"):
        BaseStatistics(6).merge(BaseStatistics(6, tukey=0.5))
    with pytest.raises(ValueError, match="say transformed=True or False"):
        BaseStatistics(6, tukey=0.5).partial_fit(torch.zeros(2, 6), [0, 0])
    assert base.without([0]).labels == [1]
    assert base.to(dtype=torch.float64).means.dtype == torch.float64
    assert "2 classes" in repr(base)


# ---- calibrated distributions ----------------------------------------------------------------------------------------------


def test_known_calibration():
    support = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    found = calibrate(support, known_base())
    assert found.neighbours.tolist() == [[0, 1]]
    assert found.distances.tolist() == [[1.0, 3.0]]
    assert torch.allclose(found.means, torch.tensor([[5 / 3, 0.0]], dtype=torch.float64))
    assert torch.allclose(found.covariance()[0], torch.tensor([[1.71, 0.21], [0.21, 1.71]], dtype=torch.float64))
    diagonal = calibrate(support, known_base(), dispersion="identity").covariance()[0]
    assert torch.allclose(diagonal, torch.tensor([[1.71, 0.0], [0.0, 1.71]], dtype=torch.float64))
    assert found.to_dict()["neighbours"] == [["a", "b"]]
    axes = pytest.importorskip("matplotlib.pyplot", reason="matplotlib (extra report) is not installed").figure().subplots()
    assert found.plot(axes) is axes


def test_all_and_no_neighbours():
    support = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    everyone = calibrate(support, known_base(), k=3)
    assert torch.allclose(everyone.means, torch.tensor([[5 / 4, 10 / 4]], dtype=torch.float64))
    alone = calibrate(support, known_base(), k=0)
    assert torch.equal(alone.means, support)
    assert torch.allclose(alone.covariance()[0], torch.full((2, 2), 0.21, dtype=torch.float64))


def test_draws_have_the_calibrated_moments():
    x = torch.randn(60, 12, generator=rng(), dtype=torch.float64) * torch.linspace(0.2, 2, 12, dtype=torch.float64)
    base = BaseStatistics.from_features(x, torch.arange(6).repeat_interleave(10), dtype=torch.float64)  # singular: 10 rows of width 12
    found = calibrate(torch.randn(1, 12, generator=rng(1), dtype=torch.float64), base)
    rows = found.sample(200_000, generator=rng(2))[0]
    covariance = found.covariance()[0]
    error = (rows.mean(0) - found.means[0]).abs()
    assert bool((error < 5 * (covariance.diagonal() / 200_000).sqrt()).all())
    assert float((rows.T.cov() - covariance).norm() / covariance.norm()) < 0.02
    plain = (covariance - 0.21).sum() / 144
    assert float(rows.mean(1).var()) == pytest.approx(float(plain) + 0.21, rel=0.02)


def test_draws_are_those_of_numpy_in_law():
    """Energy distance between our draws and multivariate_normal's is no larger than between shuffled halves."""
    base = known_base()
    found = calibrate(torch.tensor([[1.0, 0.0]], dtype=torch.float64), base)
    ours = found.sample(400, generator=rng(3))[0]
    theirs = torch.from_numpy(np.random.default_rng(0).multivariate_normal(found.means[0].numpy(), found.covariance()[0].numpy(), 400))
    both = torch.cat([ours, theirs])
    between = torch.cdist(both, both)

    def energy(order):
        a, b = order[:400], order[400:]
        return float(2 * between[a][:, b].mean() - between[a][:, a].mean() - between[b][:, b].mean())

    seen = energy(torch.arange(800))
    null = [energy(torch.randperm(800, generator=rng(seed))) for seed in range(300)]
    assert sum(value >= seen for value in null) / 300 > 0.01


def test_constant_base_classes_are_defined():
    base = BaseStatistics.from_features(torch.ones(6, 3), [0] * 3 + [1] * 3)
    rows = calibrate(torch.zeros(1, 3), base, alpha=0.0).sample(4)
    assert torch.allclose(rows, torch.full((1, 4, 3), 2 / 3))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": 4}, "k=4 is more than the 3 base classes"),
        ({"k": -1}, "k must be at least 0"),
        ({"alpha": -0.1}, "alpha must be"),
        ({"dispersion": "diag"}, "dispersion must be"),
        ({"support": torch.zeros(1, 5)}, r"shape \(..., S, 2\)"),
        ({"support": torch.full((1, 2), float("nan"))}, "NaN"),
    ],
)
def test_wrong_calibrations_are_refused(changes, message):
    arguments = {"support": torch.zeros(1, 2), "base": known_base(), **changes}
    with pytest.raises(ValueError, match=message):
        inspect.unwrap(calibrate)(**arguments)


# ---- the classifier --------------------------------------------------------------------------------------------------------


def test_it_wins_where_its_assumption_holds_and_not_elsewhere():
    gains = {}
    for unrelated in (False, True):
        (bx, by), (nx, ny) = families(unrelated=unrelated)
        base = BaseStatistics.from_features(bx, by)
        ours = evaluate_episodes(DistributionCalibration(base, tukey=1.0, n_samples=100, random_state=0), nx, ny, episodes=150)
        gains[unrelated] = ours.minus(evaluate_episodes(NearestMean(), nx, ny, episodes=150))
    assert gains[False].accuracy > 2 * gains[False].ci95 / 1.96
    assert gains[False].accuracy > 0.02
    assert gains[True].accuracy < gains[False].accuracy - 0.02


def test_batches_never_change_a_result():
    (bx, by), (nx, ny) = families()
    base = BaseStatistics.from_features(bx, by)
    found = []
    for batch_size, inner in ((12, "auto"), (5, 2), (1, 1)):
        model = DistributionCalibration(base, tukey=1.0, n_samples=30, random_state=3, batch_size=inner)
        found.append(evaluate_episodes(model, nx, ny, shot=2, query=10, episodes=12, batch_size=batch_size).per_episode)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize("settings", [{}, {"sampler": "bank"}, {"head": "lda"}, {"pool_support": True}, {"normalize": "l2"}])
def test_forms_of_the_classifier_learn(settings):
    (bx, by), (nx, ny) = families()
    base = BaseStatistics.from_features(bx.abs(), by, tukey=0.5)
    model = DistributionCalibration(base, base_tukey=True, n_samples=60, random_state=0, **settings)
    found = evaluate_episodes(model, nx.abs(), ny, shot=3, episodes=40)
    assert found.accuracy > 0.5


def test_without_samples_it_is_logistic_regression_on_transformed_supports():
    X, y = torch.rand(12, 5, generator=rng(), dtype=torch.float64), torch.arange(3).repeat_interleave(4)
    ours = DistributionCalibration(n_samples=0, tol=1e-9).fit(X, y)
    plain = LogisticClassifier(tukey=0.5, tol=1e-9).fit(X, y)
    assert torch.allclose(ours.coef_, plain.coef_, atol=1e-9)
    assert ours.calibrated_ is None


def test_lda_with_identity_covariances_is_the_nearest_calibrated_mean():
    base = known_base()
    base.factors = [torch.eye(2, dtype=torch.float64)] * 3
    X = torch.tensor([[1.0, 0.0], [0.0, 8.0]], dtype=torch.float64)
    model = DistributionCalibration(base, tukey=1.0, alpha=0.0, head="lda").fit(X, torch.tensor([0, 1]))
    queries = torch.randn(50, 2, generator=rng(), dtype=torch.float64) * 6
    means = model.calibrated_.means[0]
    assert torch.equal(model.predict(queries), torch.cdist(queries, means).argmin(1))


def test_shifting_everything_and_permuting_labels():
    (bx, by), (nx, _) = families()
    X, y, queries = nx[::60][:6].double(), torch.tensor([0, 0, 1, 1, 2, 2]), nx[5:200:7].double()
    scores = []
    for shift in (0.0, 3.0):
        base = BaseStatistics.from_features(bx.double() + shift, by, dtype=torch.float64)
        model = DistributionCalibration(base, tukey=1.0, n_samples=40, tol=1e-10).fit(X + shift, y)
        logits = model.decision_function(queries + shift)
        scores.append(logits - logits.mean(1, keepdim=True))
    assert torch.allclose(*scores, atol=1e-4)
    base = BaseStatistics.from_features(bx.double(), by, dtype=torch.float64)
    one = DistributionCalibration(base, tukey=1.0, head="lda").fit(X, y)
    two = DistributionCalibration(base, tukey=1.0, head="lda").fit(X, torch.tensor([2, 2, 0, 0, 1, 1]))
    assert torch.allclose(one.coef_, two.coef_[[2, 0, 1]], atol=1e-9)


def test_samples_are_divided_among_shots():
    base = known_base()
    X = torch.rand(8, 2, generator=rng(), dtype=torch.float64)
    model = DistributionCalibration(base, tukey=1.0, n_samples=750)
    model._check(2)
    y = torch.tensor([[0] * 4 + [1] * 4])
    calibrated = calibrate(X[None], base)
    draws = torch.div(750, torch.tensor([[4, 4]]), rounding_mode="floor")
    rows, labels = model._augmented(0, X[None], y, calibrated, y, draws, None)
    assert len(rows) == 8 + 8 * 187
    assert labels.bincount().tolist() == [4 + 748, 4 + 748]
    uneven = DistributionCalibration(base, tukey=1.0, n_samples=10).fit(X, [0] * 7 + [1])
    assert bool(uneven.converged_.all())


def test_arrays_and_names_and_clones():
    sklearn_base = pytest.importorskip("sklearn.base", reason="scikit-learn (extra vision) is not installed")
    base = known_base()
    X = np.array([[1.0, 0.0], [0.0, 8.0]])
    model = sklearn_base.clone(DistributionCalibration(base, tukey=1.0, n_samples=20, random_state=1))
    assert model.base is base or model.get_params()["n_samples"] == 20
    found = model.fit(X, ["x", "y"]).predict(X)
    assert isinstance(found, np.ndarray)
    assert found.tolist() == ["x", "y"]
    assert "n_samples=20" in repr(model)
    assert sklearn_base.is_classifier(model)
    with pytest.raises(ValueError, match="invalid parameter 'shots'"):
        model.set_params(shots=1)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", [LogisticClassifier, NearestMean, lambda: DistributionCalibration(tukey=1.0, n_samples=0)])
def test_scikit_learn_s_own_checks(make):
    checks = pytest.importorskip("sklearn.utils.estimator_checks", reason="scikit-learn (extra vision) is not installed")
    failed = [record for record in checks.check_estimator(make(), on_fail=None) if record["status"] == "failed"]
    assert not failed, [(record["check_name"], repr(record["exception"])[:200]) for record in failed]


def test_wrong_classifiers_are_refused():
    base = known_base()
    X, y = torch.rand(4, 2, dtype=torch.float64), [0, 0, 1, 1]
    for settings, message in (
        ({"base": None}, "BaseStatistics.from_features"),
        ({"base": None, "head": "lda", "n_samples": 0}, "BaseStatistics.from_features"),
        ({"base": base, "base_tukey": True}, "computed with lam=1"),
        ({"base": base, "n_samples": -1}, "n_samples"),
        ({"base": base, "C": 0.0}, "C must be"),
        ({"base": base, "head": "svm"}, "head must be"),
        ({"base": base, "sampler": "svd"}, "sampler must be"),
        ({"base": base, "k": 9}, "k=9 is more"),
    ):
        with pytest.raises(ValueError, match=message):
            DistributionCalibration(**settings).fit(X, y)
    with pytest.raises(ValueError, match="X has width 3, the base statistics 2"):
        DistributionCalibration(base).fit(torch.rand(4, 3), y)
    with pytest.raises(ValueError, match="negative"):
        DistributionCalibration(base).fit(-X, y)
    with pytest.raises(ValueError, match="one class alone"):
        DistributionCalibration(base).fit(X, [0, 0, 0, 0])
    with pytest.raises(ValueError, match="episode 1 has 3 classes, the ones before it 2"):
        DistributionCalibration(base).fit(X.expand(2, 4, 2), torch.tensor([[0, 0, 1, 1], [0, 1, 2, 2]]))
    with pytest.raises(NotFittedError, match="not fitted"):
        DistributionCalibration(base).predict(X)
    fitted = DistributionCalibration(base, tukey=1.0, n_samples=5).fit(X, y)
    with pytest.raises(ValueError, match="expecting 2 features"):
        fitted.predict(torch.rand(3, 5))


def test_episodes_that_do_not_converge_and_spaces_that_do_not_fit_are_said():
    (bx, by), (nx, _ny) = families()
    base = BaseStatistics.from_features(bx.abs() * 10, by)
    with pytest.warns(OutlastWarning, match="base_tukey=True"):
        DistributionCalibration(base, n_samples=5).fit(nx[::60][:4].abs() * 10, [0, 1, 2, 3])
    close = BaseStatistics.from_features(bx, by)
    with pytest.warns(OutlastWarning, match="1 of 1 episodes did not reach"):
        model = DistributionCalibration(close, tukey=1.0, n_samples=20, max_iter=1).fit(nx[::60][:4], [0, 1, 2, 3])
    assert not model.converged_.any()


def test_baselines_see_the_same_episodes():
    (_, _), (nx, _ny) = families()
    X, y = nx[::30][:8].abs(), torch.arange(4).repeat_interleave(2)
    found = fewshot_baselines(X, y, nx[:20].abs())
    assert set(found) == {"nearest mean", "logistic", "logistic, Tukey", "logistic, L2", "logistic, Tukey and L2"}
    assert all(len(values) == 20 for values in found.values())
    batched = fewshot_baselines(X[None], y[None], nx[None, :20].abs())
    assert torch.equal(batched["logistic"][0], found["logistic"])


# ---- defects that were found once -------------------------------------------------------------------------------------


def test_normalised_samples_do_not_spoil_the_calibration():
    stream = rng(1)
    means = torch.rand(30, 24, generator=stream) * 10
    rows = means.repeat_interleave(30, 0) + 0.5 * torch.randn(900, 24, generator=stream)
    labels = torch.arange(30).repeat_interleave(30)
    base = BaseStatistics.from_features(rows[:600], labels[:600])
    model = DistributionCalibration(base, tukey=1.0, n_samples=50, normalize="l2")
    assert evaluate_episodes(model, rows[600:], labels[600:], episodes=30).accuracy > 0.95
    with pytest.raises(ValueError, match="head='lda' works with"):
        DistributionCalibration(base, tukey=1.0, head="lda", normalize="l2").fit(rows[600::30][:4], [0, 1, 2, 3])


def test_whole_numbers_are_supports_too():
    base = known_base()
    base.means = base.means + 0.25
    whole, real = (inspect.unwrap(calibrate)(torch.tensor([[1, 0]], dtype=dtype), base) for dtype in (torch.int64, torch.float64))
    assert torch.equal(whole.means, real.means)
    assert torch.equal(whole.distances, real.distances)


def test_unequal_shots_do_not_depend_on_the_batch():
    (bx, by), (nx, _) = families()
    base = BaseStatistics.from_features(bx, by)
    X = nx[torch.randperm(len(nx), generator=rng(3))[:24]].view(6, 4, -1)
    y = torch.tensor([[0, 0, 1, 1], [0, 1, 1, 1]] * 3)
    found = [DistributionCalibration(base, tukey=1.0, n_samples=10, batch_size=size).fit(X, y).coef_ for size in (1, 6)]
    assert torch.equal(*found)
    plain = [LogisticClassifier().fit(x, t).coef_ for x, t in ((X.repeat(5, 1, 1), y.repeat(5, 1)), (X[1, None], y[1, None]))]
    assert torch.allclose(plain[0][1], plain[1][0], atol=1e-6)


def test_copies_of_statistics_are_on_their_own():
    base = BaseStatistics.from_features(torch.randn(20, 3, generator=rng()), [0, 1] * 10)
    kept = base.means.clone()
    import copy

    for other in (base.to(), copy.deepcopy(base)):
        other.partial_fit(torch.randn(10, 3, generator=rng(1)) + 5, [0] * 10)
        assert torch.equal(base.means, kept)
        assert base.counts.tolist() == [10, 10]
    base.partial_fit(torch.randn(10, 3, generator=rng(1)) + 5, [0] * 10)
    assert not torch.equal(base.means, kept)


def test_classes_of_one_feature_do_not_calibrate():
    base = BaseStatistics(3).partial_fit(torch.rand(3, 3), [0, 1, 2])
    with pytest.raises(ValueError, match="base class 0 has one feature"):
        calibrate(torch.rand(2, 3), base)
    assert calibrate(torch.rand(2, 3), base, k=0).means.shape == (2, 3)


def test_logarithms_do_not_trip_over_base_classes():
    rows = torch.rand(20, 3, generator=rng()) + 0.1
    rows[:, 0] = 0.0
    base = BaseStatistics.from_features(rows, [0, 1] * 10)
    model = DistributionCalibration(base, tukey=0.0, n_samples=10).fit(rows[:4] + 0.5, [0, 0, 1, 1])
    assert torch.isfinite(model.coef_).all()


def test_bank_uses_no_row_twice_in_an_episode():
    from outlast.fewshot._calibration import _Bank

    base = known_base()
    bank = _Bank(base, 50, 0, base.means)
    bank.begin()
    stream = rng(1)
    drawn = torch.cat([bank._next(0, 50, stream) for _ in range(2)])
    assert len(drawn.unique()) == 100
    bank.begin()
    assert len(bank._next(0, 500, stream)) == 500


def test_fits_share_a_bank_until_features_come_in():
    from outlast.fewshot._calibration import _Bank

    base = known_base()
    kept = _Bank(base, 50, 0, base.means)._of(0)
    assert _Bank(base, 50, 0, base.means)._of(0) is kept
    assert _Bank(base, 50, 1, base.means)._of(0) is not kept
    kept = _Bank(base, 50, 0, base.means)._of(0)
    base.partial_fit(10.0 + base.means[:1].repeat(2, 1) + torch.randn(2, base.dim, generator=rng()), [base.labels[0]] * 2)
    assert not torch.equal(_Bank(base, 50, 0, base.means)._of(0), kept)


def test_signed_features_and_wrong_bounds():
    rows = torch.randn(20, 3, generator=rng())
    assert BaseStatistics.from_features(rows, [0, 1] * 10, tukey=0.5, negative="signed").tukey == 0.5
    for settings in ({"k": -1}, {"alpha": -1.0}):
        with pytest.raises(ValueError, match="must be"):
            DistributionCalibration(n_samples=0, tukey=1.0, **settings).fit(rows[:4], [0, 0, 1, 1])
    fitted = LogisticClassifier().fit(rows[:4][None], torch.tensor([[0, 0, 1, 1]]))
    with pytest.raises(ValueError, match="3 episodes, fit saw 1"):
        fitted.predict(rows[:12].view(3, 4, 3))
    with pytest.raises(ValueError, match="inconsistent"):
        LogisticClassifier().fit(rows[:4], [0, 0, 1, 1]).score(rows[:4], [0])
    big = np.array([[0.0, 1.0], [3.0, 4.0]], dtype=">f8")
    assert LogisticClassifier().fit(big, [0, 1]).predict(big).tolist() == [0, 1]


def test_a_changed_byte_is_damage_or_harmless(tmp_path):
    """Wherever it lies, also where the archive says its version, its password or its places."""
    from outlast.fewshot import PseudoLabels

    statistics = BaseStatistics.from_features(torch.rand(6, 3), torch.arange(3).repeat(2))
    labels = PseudoLabels(torch.full((3, 2), 0.5), torch.arange(3))
    for made, kind in ((statistics, BaseStatistics), (labels, PseudoLabels)):
        path = tmp_path / "file.npz"
        made.save(path)
        whole = path.read_bytes()
        refused = 0
        for place in range(len(whole) - 300, len(whole)):  # the directory at the end, where most of it is told
            for bit in (0, 3, 7):
                path.write_bytes(whole[:place] + bytes([whole[place] ^ (1 << bit)]) + whole[place + 1 :])
                try:
                    kind.load(path)
                except DamagedFileError:
                    refused += 1
        assert refused > 100


def test_a_base_of_another_kind_is_refused():
    with pytest.raises(TypeError, match="base must be BaseStatistics, got str"):
        DistributionCalibration("base").fit(torch.rand(4, 3), torch.tensor([0, 0, 1, 1]))
