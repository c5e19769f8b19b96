"""Equivariance of training: the table of optimizers, couplings, initial laws, the ready-made trainer."""

from __future__ import annotations

import inspect
import random

import numpy as np
import pytest
import torch
from helpers import drawn, rng
from torch import nn
from torch.nn import functional as F

from outlast._core._random import haar_orthogonal
from outlast.diagnose.equivariance import equivariance_test, initialisation_symmetry, train_with
from outlast.diagnose.equivariance._coupled import _permutation_test
from outlast.diagnose.equivariance._groups import draw
from outlast.diagnose.equivariance._initialisation import symmetry_of
from outlast.diagnose.sample_efficiency import local_texture
from outlast.errors import DivergedError, OutlastWarning, StateError, UnsupportedError
from outlast.studies._models import SumLast

D = 16
OPTIM = torch.optim
bare_test = inspect.unwrap(equivariance_test)


def data(n=64, seed=0):
    x = torch.randn(n, D, generator=rng(seed))
    return x, (x[:, 0] * x[:, 1] + 0.5 * x[:, 2] > 0.0).long()


def logistic(outputs, labels):
    return F.binary_cross_entropy_with_logits(outputs[:, 0], labels.to(outputs.dtype))


def dense(*before):
    first = nn.Linear(D, 32)
    nn.init.normal_(first.weight, std=D**-0.5)
    return nn.Sequential(*before, first, nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 1))


class Circular(nn.Module):
    def __init__(self, mode="circular"):
        super().__init__()
        self.first = nn.Conv1d(1, 8, 3, padding=1, padding_mode=mode)
        self.second = nn.Conv1d(8, 8, 3, padding=1, padding_mode=mode)
        self.head = nn.Linear(8, 1)

    def forward(self, x):
        return self.head(self.second(self.first(x[:, None]).relu()).relu().mean(-1))


def sgd(p):
    return OPTIM.SGD(p, lr=0.1, momentum=0.9)


def run(make_model, train, **settings):
    x, y = data()
    return equivariance_test(make_model, train, x, y, **{"generator": rng(1), "draws": 2, **settings})


def trainer(make=sgd, steps=150, **settings):
    return train_with(make, loss=logistic, steps=steps, **settings)


# ---- the table of optimizers ------------------------------------------------------------------------------------------------------

BLIND = {
    "sgd": trainer(),
    "nesterov": trainer(lambda p: OPTIM.SGD(p, lr=0.1, momentum=0.9, nesterov=True)),
    "weight decay": trainer(lambda p: OPTIM.SGD(p, lr=0.1, weight_decay=1e-2)),
    "clipped by norm": trainer(clip_norm=0.1),
    "batches": trainer(batch_size=20, schedule="cosine"),
}
NOT_BLIND = {
    "adam": trainer(lambda p: OPTIM.Adam(p, lr=0.01)),
    "adamw": trainer(lambda p: OPTIM.AdamW(p, lr=0.01)),
    "adagrad": trainer(lambda p: OPTIM.Adagrad(p, lr=0.05)),
    "rmsprop": trainer(lambda p: OPTIM.RMSprop(p, lr=0.01)),
    "adafactor": trainer(lambda p: OPTIM.Adafactor(p, lr=0.01)),
    "clipped by value": trainer(clip_value=1e-3),
    "l1": trainer(penalty=lambda model: 1e-3 * sum(p.abs().sum() for p in model.parameters())),
}


@pytest.mark.parametrize("name", BLIND)
def test_sgd_is_blind_to_rotations(name):
    found = run(dense, BLIND[name], draws=1)
    for group in ("orthogonal", "signed_permutation", "permutation"):
        assert max(found[group].r) < 1e-10
        assert found[group].verdict == "equivariant"
        assert found[group].flips == 0.0
    assert found.initialisation.law == "orthogonal"
    assert "D^2 = 256" in found.meaning[0]


@pytest.mark.parametrize("name", NOT_BLIND)
def test_others_are_blind_to_the_order_of_features_only(name):
    found = run(dense, NOT_BLIND[name], draws=1)
    assert max(found["orthogonal"].r) > 1e-2
    assert found["orthogonal"].verdict == "not equivariant"
    assert max(found["signed_permutation"].r + found["permutation"].r) < 1e-10
    assert "pixel order unused" in found.meaning[0]
    assert "D^2" not in found.meaning[0]


def test_lbfgs_scales_its_first_step_by_the_l1_norm():
    found = run(dense, trainer(lambda p: OPTIM.LBFGS(p, lr=0.1, max_iter=5), steps=3), draws=1)
    assert max(found["orthogonal"].r) > 1e-6
    assert max(found["permutation"].r) < 1e-10


def test_normalising_features_breaks_more():
    batch = run(lambda: dense(nn.BatchNorm1d(D)), trainer(), draws=1)
    assert max(batch["orthogonal"].r) > 1e-2
    assert max(batch["signed_permutation"].r) < 1e-10
    layer = run(lambda: dense(nn.LayerNorm(D)), trainer(), draws=1)
    assert max(layer["signed_permutation"].r) > 1e-2
    assert max(layer["permutation"].r) < 1e-10


def test_convolutions_use_translation():
    groups = ("permutation", "shift", "reflection")
    found = run(Circular, trainer(), groups=groups)
    assert max(found["shift"].r) < 1e-10
    assert max(found["reflection"].r) < 1e-10  # the kernels follow
    assert max(found["permutation"].r) > 1e-2
    assert not found["permutation"].coupled
    assert found.meaning == ("uses translation: shifted data are learned as the data themselves",)
    zeros = run(lambda: Circular("zeros"), trainer(), groups=groups)
    assert max(zeros["shift"].r) > 1e-2
    assert max(zeros["reflection"].r) < 1e-10


def test_images_turn_with_their_kernels():
    x = torch.randn(20, 2, 6, 6, generator=rng(0))
    y = (x[:, 0].sum((1, 2)) > 0.0).long()

    def conv():
        body = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 3, 3, 1, 1))
        return nn.Sequential(body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 1))

    def flat():
        return nn.Sequential(nn.Flatten(), nn.Linear(72, 8), nn.Tanh(), nn.Linear(8, 1))

    groups = ("rotation90", "reflection", "shift")
    found = equivariance_test(conv, trainer(lambda p: OPTIM.Adam(p, lr=0.01), steps=30), x, y, groups=groups, generator=rng(0))
    assert [each.verdict for each in found.groups] == ["equivariant", "equivariant", "not equivariant"]
    dense_one = equivariance_test(flat, trainer(steps=30), x, y, groups=(*groups, "orthogonal"))
    assert all(each.verdict == "equivariant" for each in dense_one.groups)  # all of them are permutations of the flattened pixels
    assert "uses translation" not in " ".join(dense_one.meaning)


def test_uncoupled_trainings_differ():
    """Guards against a vacuous test: without the coupling even SGD fails."""
    order = torch.randperm(D, generator=rng(5))
    found = run(dense, trainer(), groups=(lambda x: x[:, order],), probes=data(200, seed=9)[0])
    assert max(found.groups[0].r) > 0.1
    assert found.groups[0].verdict == "not equivariant"
    assert found.groups[0].flips > 0.0


def test_training_that_does_nothing_is_untested():
    with pytest.warns(OutlastWarning, match="vacuous"):
        found = run(dense, lambda model, x, y: None)
    assert {each.verdict for each in found.groups} == {"untested"}
    assert found.meaning == ()


def test_an_initialisation_that_is_not_gaussian_is_said():
    def default():
        return nn.Sequential(nn.Linear(D, 32), nn.ReLU(), nn.Linear(32, 1))

    found = run(default, trainer(), draws=1)
    assert found["orthogonal"].verdict == "equivariant"
    assert found.initialisation.law != "orthogonal"
    assert "initial weights are not drawn rotation symmetric" in found.meaning[0]


def test_users_matrices_and_repeatability():
    U = haar_orthogonal(D, D, generator=rng(3))
    first, second = (run(dense, trainer(steps=20), groups=(U, "sign_flip")) for _ in range(2))
    assert first.to_dict() == second.to_dict()
    assert max(first["matrix 1"].r + first["sign_flip"].r) < 1e-10
    assert first.to_dict()["kind"] == "EquivarianceResult"
    with pytest.raises(KeyError):
        first["orthogonal"]
    pytest.importorskip("matplotlib")
    assert drawn(first)


def reseed():
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    torch.manual_seed(1)


def test_generators_and_models_are_left_as_they_were():
    kept = dense()
    before = [parameter.clone() for parameter in kept.parameters()]
    reseed()
    expected = random.random(), np.random.rand(), torch.rand(())  # noqa: NPY002
    reseed()

    def noisy(model, x, y):
        scale = 1.0 + 0.01 * (random.random() + np.random.rand() + torch.rand(()).item())  # noqa: NPY002
        trainer(lambda p: OPTIM.SGD(p, lr=0.05 * scale), steps=5)(model, x, y)

    found = run(lambda: kept, noisy, draws=1)
    assert max(found["orthogonal"].r) < 1e-10
    assert (random.random(), np.random.rand(), torch.rand(())) == expected  # noqa: NPY002
    assert all(torch.equal(old, new) for old, new in zip(before, kept.parameters(), strict=True))
    assert found.initialisation.law == "none"  # one fixed model is no law


def test_dropout_has_the_same_masks():
    found = run(lambda: nn.Sequential(dense()[0], nn.Dropout(0.5), nn.ReLU(), nn.Linear(32, 1)), trainer(steps=30), draws=1)
    assert max(found["orthogonal"].r) < 1e-10


# ---- closed forms -----------------------------------------------------------------------------------------------------------------


def test_least_squares_by_gradient_descent():
    """From zero it ends at the pseudo-inverse, which does not see rotations; nor does the ridge of a radial kernel."""
    x = torch.randn(8, 12, generator=rng(0), dtype=torch.float64)
    y = torch.randn(8, generator=rng(1), dtype=torch.float64)
    probes = torch.randn(5, 12, generator=rng(2), dtype=torch.float64)

    def linear():
        layer = nn.Linear(12, 1, bias=False)
        nn.init.zeros_(layer.weight)
        return layer

    train = train_with(lambda p: OPTIM.SGD(p, lr=0.1, momentum=0.9), loss=lambda out, t: (out[:, 0] - t).square().mean(), steps=20_000)
    model = linear().double()
    train(model, x, y)
    assert torch.allclose(model(probes)[:, 0], probes @ (torch.linalg.pinv(x) @ y), atol=1e-10)
    U = haar_orthogonal(12, 12, generator=rng(3))
    turned = linear().double()
    train(turned, x @ U.T, y)
    assert torch.allclose(turned(probes @ U.T), model(probes), atol=1e-10)

    def ridge(inputs, at):
        def kernel(a, b):
            return (-torch.cdist(a, b).square() / 12.0).exp()

        return kernel(at, inputs) @ torch.linalg.solve(kernel(inputs, inputs) + 0.1 * torch.eye(8, dtype=torch.float64), y)

    assert torch.allclose(ridge(x, probes), ridge(x @ U.T, probes @ U.T), atol=1e-10)


def test_haar_draws():
    U = haar_orthogonal(4000, 3, 3, generator=rng(0))
    eye = torch.eye(3, dtype=torch.float64)
    assert float((U @ U.mT - eye).abs().max()) < 1e-12
    assert torch.allclose(U.square().mean(0), torch.full((3, 3), 1.0 / 3.0, dtype=torch.float64), atol=0.02)
    assert float((torch.linalg.det(U) > 0.0).double().mean()) == pytest.approx(0.5, abs=0.03)
    assert float(U[:, 0, 0].mean()) == pytest.approx(0.0, abs=4 * (1.0 / 3.0 / 4000) ** 0.5)
    raw = torch.linalg.qr(torch.randn(4000, 3, 3, generator=rng(0), dtype=torch.float64))[0]
    assert abs(float(raw[:, 0, 0].mean())) > 0.2  # LAPACK's signs are not uniform
    frames = haar_orthogonal(500, 6, 2, generator=rng(1))
    assert float((frames.mT @ frames - torch.eye(2, dtype=torch.float64)).abs().max()) < 1e-12


def test_large_rotations_are_products_of_reflections():
    g = draw("orthogonal", (3, 40, 40), rng(0), torch.float64)
    assert g.group == "orthogonal (32 reflections)"  # labelled as such
    assert draw("orthogonal", (8,), rng(0), torch.float64).group == "orthogonal"
    x, z = torch.randn(2, 2, 3, 40, 40, generator=rng(1), dtype=torch.float64)
    assert torch.allclose((g.apply(x) * g.apply(z)).sum((1, 2, 3)), (x * z).sum((1, 2, 3)))
    assert not torch.allclose(g.apply(x), x, atol=0.1)


# ---- the distributional method ----------------------------------------------------------------------------------------------------


def test_distributional_method_finds_what_a_convolution_uses():
    x, y = local_texture(32).sample(12, rng(0))
    probes = local_texture(32).sample(200, rng(1))[0]
    train = train_with(lambda p: OPTIM.Adam(p, lr=0.02), loss=logistic, steps=150)
    settings = {"method": "distributional", "groups": ("permutation",), "draws": 1, "probes": probes, "generator": rng(2)}

    def conv():
        return nn.Sequential(
            nn.Unflatten(1, (1, 32)),
            nn.Conv1d(1, 8, 3, padding=1, padding_mode="circular"),
            nn.ReLU(),
            SumLast(1),
            nn.Linear(8, 1),
        )

    found = equivariance_test(conv, train, x, y, **settings)
    assert found["permutation"].verdict == "not equivariant"
    assert found["permutation"].p_value < 0.01
    assert found["permutation"].r[0] > 0.1
    same = equivariance_test(lambda: nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 1)), train, x, y, **settings)
    assert same["permutation"].verdict == "no difference found"
    assert same["permutation"].p_value > 0.05
    assert same.initialisation is None


def test_permutation_test_is_exact():
    """P-values of exchangeable runs are uniform: at level a at most a of them fall below."""
    values = []
    for seed in range(200):
        points = torch.randn(16, 3, generator=rng(seed), dtype=torch.float64)
        values.append(_permutation_test(torch.cdist(points, points), 8, rng(seed))[1])
    for level in (0.1, 0.5):
        assert np.mean(np.array(values) <= level) == pytest.approx(level, abs=0.09)
    points = torch.randn(20, 3, generator=rng(0), dtype=torch.float64)
    points[10:] += 3.0
    gap, p_value = _permutation_test(torch.cdist(points, points), 10, rng(0))
    assert gap > 1.0
    assert p_value == pytest.approx(1e-4, rel=0.5)


# ---- the law of initial weights ---------------------------------------------------------------------------------------------------


def linear_with(fill, inputs=D):
    def make():
        layer = nn.Linear(inputs, 32)
        with torch.no_grad():
            fill(layer.weight)
        return layer

    return make


def test_laws_of_initial_weights():
    laws = {
        "orthogonal": (nn.init.normal_, nn.init.orthogonal_, nn.init.zeros_),
        "signed_permutation": (lambda w: None, lambda w: nn.init.uniform_(w, -1.0, 1.0)),
        "permutation": (lambda w: nn.init.uniform_(w, 0.0, 1.0),),
        "none": (lambda w: w.copy_(torch.arange(w.numel()).view_as(w)),),
    }
    for law, fills in laws.items():
        for fill in fills:
            found = initialisation_symmetry(linear_with(fill), generator=rng(2))
            assert found.law == law, (law, found)
    assert initialisation_symmetry(linear_with(nn.init.normal_), generator=rng(2)).kurtosis == pytest.approx(0.0, abs=0.2)
    assert initialisation_symmetry(linear_with(nn.init.uniform_), generator=rng(2)).kurtosis == pytest.approx(-1.2, abs=0.1)

    def smooth(w):
        w.copy_(F.avg_pool1d(torch.randn(len(w), 1, D + 4), 5, 1)[:, 0])

    assert initialisation_symmetry(linear_with(smooth), generator=rng(2)).law in ("none", "sign_flip")  # neighbours are alike
    assert initialisation_symmetry(lambda: nn.Conv2d(3, 8, 3), generator=rng(2)).law == "signed_permutation"


def test_false_alarms_of_the_symmetry_test():
    weights = (torch.randn(8, 8, 8, generator=rng(seed), dtype=torch.float64) for seed in range(200))
    alarms = sum(symmetry_of(each, "", seed).p_orthogonal <= 0.05 for seed, each in enumerate(weights))
    assert 2 <= alarms <= 20


# ---- the trainer ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [sgd, lambda p: OPTIM.Adam(p, lr=0.01), lambda p: OPTIM.RMSprop(p, lr=0.01)])
def test_batched_training_equals_the_loop(make):
    x = torch.randn(3, 40, D, generator=rng(0), dtype=torch.float64)
    y = torch.randint(2, (3, 40), generator=rng(1))
    torch.manual_seed(0)
    models, twins = [], []
    for _ in range(3):
        models.append(dense().double())
        twins.append(dense().double())
        twins[-1].load_state_dict(models[-1].state_dict())
        models[-1][2].bias.requires_grad_(False)
        twins[-1][2].bias.requires_grad_(False)
    train = trainer(make, steps=30, batch_size=16, schedule="cosine", clip_norm=0.2)
    train.batched(models, x, y)
    for number, twin in enumerate(twins):
        before = twin[2].bias.clone()
        train(twin, x[number], y[number])
        for ours, theirs in zip(models[number].parameters(), twin.parameters(), strict=True):
            assert torch.allclose(ours, theirs, atol=1e-10)
            assert ours.is_leaf
        assert torch.equal(models[number][2].bias, before)


def test_batched_training_refuses_what_it_cannot_do():
    x, y = torch.randn(2, 8, D), torch.zeros(2, 8, dtype=torch.long)
    for make_model, train, message in (
        (dense, trainer(lambda p: OPTIM.LBFGS(p)), "LBFGS"),
        (lambda: dense(nn.BatchNorm1d(D)), trainer(), "buffers"),
        (lambda: nn.Sequential(nn.Dropout(0.1), nn.Linear(D, 1)), trainer(), "dropout"),
        (dense, trainer(penalty=lambda model: 0.0), "penalty"),
    ):
        with pytest.raises(UnsupportedError, match=message):
            train.batched([make_model(), make_model()], x, y)
    with pytest.raises(ValueError, match="as many sets"):
        trainer().batched([dense()], x, y)
    with pytest.raises(DivergedError, match="learning rate"):
        trainer(lambda p: OPTIM.SGD(p, lr=1e30)).batched([dense(), dense()], x, y)


def test_trainer_of_bad_input():
    for settings, kind, message in (
        ({"steps": 0}, ValueError, "steps"),
        ({"batch_size": 0}, ValueError, "batch_size"),
        ({"clip_norm": 0.0}, ValueError, "clip_norm"),
        ({"schedule": "step"}, ValueError, "schedule"),
    ):
        with pytest.raises(kind, match=message):
            trainer(**settings)
    with pytest.raises(TypeError, match="optimizer"):
        train_with(None, loss=logistic, steps=1)
    with pytest.raises(ValueError, match="no examples"):
        trainer()(dense(), torch.zeros(0, D), torch.zeros(0))


# ---- bad input --------------------------------------------------------------------------------------------------------------------


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.up, self.out = dense()[0], dense()[0], nn.Linear(32, 1)

    def forward(self, x):
        return self.out(self.gate(x).sigmoid() * self.up(x))


def test_several_input_layers_must_be_named():
    with pytest.raises(ValueError, match=r"gate, up.*input_layer=\['gate', 'up'\]"):
        run(Gated, trainer())
    found = run(Gated, trainer(steps=30), input_layer=["gate", "up"], draws=1)
    assert max(found["orthogonal"].r) < 1e-10
    half = run(Gated, trainer(steps=30), input_layer="gate", draws=1)
    assert max(half["orthogonal"].r) > 1e-3


def test_bad_input():
    x, y = data(8)
    train = trainer(steps=2)
    stretched = torch.eye(D) * 2.0
    for settings, kind, message in (
        ({"groups": (stretched,)}, ValueError, r"max \|U U\^T - I\| = 3"),
        ({"groups": (torch.ones(2, 3),)}, ValueError, "square"),
        ({"groups": (torch.eye(4),)}, ValueError, "inputs have 16"),
        ({"groups": ("affine",)}, ValueError, "must be one of"),
        ({"groups": ()}, ValueError, "nothing to test"),
        ({"groups": ("rotation90",)}, ValueError, "equal"),
        ({"groups": (3,)}, TypeError, "callables"),
        ({"draws": 0}, ValueError, "draws"),
        ({"seeds": 4, "method": "distributional"}, ValueError, "seeds"),
        ({"method": "exact"}, ValueError, "method"),
        ({"probes": torch.zeros(3, 4)}, ValueError, "probes"),
        ({"input_layer": "head"}, ValueError, "no Linear or Conv layer 'head'"),
    ):
        with pytest.raises(kind, match=message):
            bare_test(dense, train, x, y, **settings)
    with pytest.raises(ValueError, match="no parameters"):
        bare_test(nn.Flatten, train, x, y)
    with pytest.raises(ValueError, match="no Linear or Conv"):
        bare_test(lambda: nn.LayerNorm(D), train, x, y)
    with pytest.raises(ValueError, match="same output"):
        bare_test(lambda: nn.Sequential(nn.Linear(D, 1), nn.Threshold(1e9, 0.0)), train, x, y)
    with pytest.raises(TypeError, match="embed tokens"):
        bare_test(lambda: nn.Embedding(4, 2), train, torch.zeros(3, 4, dtype=torch.long), torch.zeros(3))
    with pytest.raises(TypeError, match=r"torch\.nn\.Module"):
        bare_test(lambda: 3, train, x, y)
    with pytest.raises(ValueError, match="not empty"):
        bare_test(dense, train, x[:0], y[:0])
    with pytest.raises(ValueError, match="sees 4 features of inputs that have 16"):
        bare_test(lambda: nn.Sequential(nn.Unflatten(1, (4, 4)), nn.Linear(4, 1)), lambda m, a, b: None, x, y)
    with pytest.raises(TypeError, match="must be a tensor"):
        bare_test(lambda: TwoOutputs(), lambda m, a, b: None, x, y)


class TwoOutputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(D, 2)

    def forward(self, x):
        return {"logits": self.layer(x)}


def test_training_must_be_repeatable():
    x, y = data(8)
    count = iter(range(1000))

    def drifting(model, inputs, targets):
        train_with(lambda p: OPTIM.SGD(p, lr=0.01 * (1 + next(count))), loss=logistic, steps=2)(model, inputs, targets)

    for method in ("coupled", "distributional"):
        with pytest.raises(ValueError, match="two trainings on the same data"):
            bare_test(dense, drifting, x, y, method=method)

    def broken(model, inputs, targets):
        model[0].bias.data.fill_(torch.nan)

    with pytest.raises(DivergedError, match="not finite"):
        bare_test(dense, broken, x, y)

    def pruned(model, inputs, targets):
        del model[-1]

    with pytest.raises(StateError, match="in place"):
        bare_test(dense, pruned, x, y)


def test_autocast_is_said():
    def mixed(model, inputs, targets):
        optimizer = sgd(model.parameters())
        with torch.autocast("cpu", torch.bfloat16):
            loss = logistic(model(inputs), targets)
        loss.backward()
        optimizer.step()

    with pytest.warns(OutlastWarning, match="autocast"):
        found = run(dense, mixed, draws=1, tolerance=1.0)
    assert "unreliable" in found.notes[-1]


# ---- regressions ------------------------------------------------------------------------------------------------------------------


def test_untested_results_print():
    with pytest.warns(OutlastWarning, match="vacuous"):
        assert "orthogonal untested" in repr(run(dense, lambda model, x, y: None))
    with pytest.warns(OutlastWarning, match="vacuous"):
        assert "orthogonal untested" in repr(run(dense, lambda model, x, y: None, method="distributional", draws=1))


class Views(nn.Module):
    """Two layers read the same numbers as different tensors."""

    def __init__(self, kind):
        super().__init__()
        self.a, self.b, self.out, self.kind = dense()[0], dense()[0], nn.Linear(32, 1), kind

    def forward(self, x):
        second = x.flatten(1) if self.kind == "view" else x * 1.0
        return self.out(self.a(x.view(len(x), -1)) * self.b(second).sigmoid())


@pytest.mark.parametrize("kind", ["view", "copy"])
def test_views_and_copies_of_the_input_count_as_the_input(kind):
    with pytest.raises(ValueError, match="several layers receive the input"):
        run(lambda: Views(kind), trainer())


def test_inputs_that_go_round_the_first_layer_are_said():
    class Skip(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.out = dense()[0], nn.Linear(32 + D, 1)

        def forward(self, x):
            return self.out(torch.cat([self.first(x).relu(), x], 1))

    found = run(Skip, trainer(steps=10), draws=1)
    assert found["orthogonal"].verdict == "not equivariant"
    assert "differ before training already" in found.notes[0]
    assert not any("before training" in note for note in run(dense, NOT_BLIND["adam"], draws=1).notes)


def test_weights_that_are_computed_are_refused():
    def normalised():
        return nn.Sequential(torch.nn.utils.parametrizations.weight_norm(nn.Linear(D, 8)), nn.ReLU(), nn.Linear(8, 1))

    with pytest.raises(ValueError, match="parametrisation"):
        run(normalised, trainer())


def test_one_feature_and_kernels_that_cannot_turn():
    x, y = torch.randn(12, 1, generator=rng(0)), torch.randint(2, (12,), generator=rng(1))
    found = equivariance_test(lambda: nn.Sequential(nn.Linear(1, 16), nn.Tanh(), nn.Linear(16, 1)), trainer(steps=5), x, y)
    assert found["orthogonal"].verdict == "equivariant"
    images = torch.randn(12, 1, 6, 6, generator=rng(2))

    def flat():
        return nn.Sequential(nn.Conv2d(1, 4, (1, 3)), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 1))

    with pytest.raises(ValueError, match="square kernels"):
        bare_test(flat, trainer(steps=2), images, y, groups=("rotation90",))


def test_tokens_are_permuted_by_a_callable():
    tokens = torch.randint(5, (20, 6), generator=rng(0))
    y = torch.randint(2, (20,), generator=rng(1))
    order = torch.randperm(6, generator=rng(2))

    def swap(x):
        return x[:, order]

    def bag():
        return nn.Sequential(nn.Embedding(5, 4), SumTokens(), nn.Linear(4, 1))

    found = equivariance_test(bag, trainer(steps=10), tokens, y, groups=(swap,))
    assert found["swap"].verdict == "equivariant"


class SumTokens(nn.Module):
    def forward(self, x):
        return x.sum(1)


def test_two_callables_of_one_name_are_told_apart():
    found = run(dense, trainer(steps=2), groups=(lambda x: x, lambda x: -x))
    assert [each.group for each in found.groups] == ["<lambda>", "<lambda> 2"]
    assert found["<lambda>"].verdict == "equivariant"
    assert found["<lambda> 2"].verdict == "not equivariant"


def test_no_generator_means_a_fixed_one():
    state = torch.random.get_rng_state()
    x, y = data()
    first, second = (equivariance_test(dense, trainer(steps=5), x, y, draws=1) for _ in range(2))
    assert first.to_dict() == second.to_dict()
    assert torch.equal(torch.random.get_rng_state(), state)


def test_batched_training_refuses_what_only_looks_entrywise():
    class Scaled(OPTIM.SGD):
        pass

    x, y = torch.randn(2, 8, D), torch.zeros(2, 8, dtype=torch.long)

    def decay_matrices(parameters):
        parameters = list(parameters)
        matrices = [p for p in parameters if p.ndim > 1]
        rest = [p for p in parameters if p.ndim <= 1]
        return OPTIM.AdamW([{"params": matrices, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}], lr=0.01)

    class Dropped(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(D, 1)

        def forward(self, x):
            return self.layer(F.dropout(x, 0.5, self.training))

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(D, D)
            self.b = nn.Linear(D, D)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.b(self.a(x))

    for make_model, train, message in (
        (dense, trainer(lambda p: Scaled(p, lr=0.1)), "Scaled"),
        (dense, trainer(decay_matrices), "by their shape"),
        (Dropped, trainer(), "dropout"),
        (Tied, trainer(), "tied"),
    ):
        with pytest.raises(UnsupportedError, match=message):
            train.batched([make_model(), make_model()], x, y)
    with pytest.raises(ValueError, match="0 models"):
        trainer().batched([], x[:0], y[:0])


def test_constant_buffers_may_be_batched_and_flags_come_back():
    class Shifted(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(D, 1)
            self.register_buffer("shift", torch.ones(D))

        def forward(self, x):
            return self.layer(x + self.shift)

    x, y = torch.randn(2, 8, D), torch.zeros(2, 8, dtype=torch.long)
    models = [Shifted(), Shifted()]
    twins = [Shifted(), Shifted()]
    for model, twin in zip(models, twins, strict=True):
        twin.load_state_dict(model.state_dict())
    trainer(steps=5).batched(models, x, y)
    for number, twin in enumerate(twins):
        trainer(steps=5)(twin, x[number], y[number])
        assert torch.allclose(twin.layer.weight, models[number].layer.weight, atol=1e-6)
    model = dense().eval()
    with pytest.raises(RuntimeError):
        trainer()(model, x[0, :, :3], y[0])
    assert not model.training
