"""Mixup and CutMix: draws, forms of labels, structures of batches, losses."""

from __future__ import annotations

import functools
import io
import math
import pickle
import warnings

import pytest
import torch
from helpers import in_processes, mixup_draws, rng
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset, default_collate

from outlast._core._beta import sample_lambda
from outlast.errors import OutlastWarning
from outlast.robust import SAM, CutMix, MixedTarget, MixUp, MixupLoss, mix_hidden, mixup_accuracy, mixup_loss
from outlast.robust._mixup import Mix, _interpolate

KINDS = pytest.mark.parametrize("kind", [MixUp, CutMix])


def images(n=6, *, seed=0, dtype=torch.float32):
    return torch.rand(n, 3, 8, 8, generator=rng(seed), dtype=dtype)


def classes(n=6, *, seed=1, count=4):
    return torch.randint(0, count, (n,), generator=rng(seed))


# ---- O11: draws -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [1e-4, 1e-3, 0.01, 0.2, 1.0, 32.0])
def test_weights_have_the_moments_of_their_law(alpha):
    n = 100_000
    lam = sample_lambda(alpha, None, (n,), generator=rng())
    variance = 1 / (4 * (2 * alpha + 1))
    assert abs(float(lam.mean()) - 0.5) < 4 * math.sqrt(variance / n)
    fourth = float((lam - 0.5).pow(4).mean())
    assert abs(float(lam.var()) - variance) < 4 * math.sqrt(max(fourth - variance**2, 1e-12) / n) + 1e-6
    tilde = 1 - sample_lambda(alpha, None, (n,), law="tilde", generator=rng(1))
    assert abs(float(tilde.mean()) - alpha / (2 * alpha + 1)) < 4 * float(tilde.std()) / math.sqrt(n)
    assert float((lam == 0.5).double().mean()) < 0.01


def test_asymmetric_law_that_keeps_labels():
    a, b, n = 0.7, 2.5, 200_000
    away = 1 - sample_lambda(a, b, (n,), law="tilde", generator=rng())
    m1 = 2 * a * b / ((a + b) * (a + b + 1))
    assert abs(float(away.mean()) - m1) < 4 * float(away.std()) / math.sqrt(n)
    assert abs(float(away.square().mean()) - m1 / 2) < 4 * float(away.square().std()) / math.sqrt(n)


@KINDS
def test_same_seed_same_batch_and_resume_is_exact(kind):
    x, y = images(), classes()
    first, second = (kind(num_classes=4, generator=rng(3)) for _ in range(2))
    for _ in range(3):
        for one, two in zip(first(x, y), second(x, y), strict=True):
            assert torch.equal(one, two)
    buffer = io.BytesIO()
    torch.save(first.state_dict(), buffer)
    expected = first(x, y)
    buffer.seek(0)
    fresh = kind(num_classes=4, generator=rng(99))
    fresh.load_state_dict(torch.load(buffer, weights_only=True))
    for one, two in zip(expected, fresh(x, y), strict=True):
        assert torch.equal(one, two)
    with pytest.raises(ValueError, match="'seed' and 'step'"):
        fresh.set_extra_state({"seed": 1})


def test_global_generators_are_left_alone():
    before = torch.get_rng_state()
    MixUp(num_classes=4)(images(), classes())
    assert torch.equal(before, torch.get_rng_state())


def test_every_process_draws_its_own_and_resumes_from_the_first(tmp_path):
    first, second = in_processes(mixup_draws, tmp_path)
    assert not torch.equal(first["lam"], second["lam"])
    for result in (first, second):
        assert torch.equal(result["next"], result["resumed"])


class Collate:
    def __init__(self):
        self.mixup = MixUp(num_classes=4, per_sample=True, labels="pair", generator=rng(0))

    def __call__(self, samples):
        return self.mixup(*default_collate(samples))


def test_workers_of_a_loader_draw_their_own():
    data = TensorDataset(images(16), classes(16))
    loader = DataLoader(data, 8, num_workers=2, collate_fn=Collate(), generator=rng(5))
    one, two = (target.lam for _, target in loader)
    assert not torch.equal(one, two)
    assert not torch.equal(one, next(iter(loader))[1].lam)  # nor does the next epoch repeat them


# ---- O9, O10: mixing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(7,), (5, 9), (6, 3, 8, 8), (3, 2, 4, 4, 4), (1, 3)])
@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("pairing", ["permute", "roll", "flip"])
def test_mixed_rows_are_the_formula_for_any_rank(shape, per_sample, pairing):
    x = torch.rand(shape, generator=rng())
    mixup = MixUp(per_sample=per_sample, pairing=pairing, labels="pair", generator=rng(1))
    state = mixup.state_dict()
    mix = mixup.draw(len(x))
    mixup.load_state_dict(state)
    y = torch.arange(len(x))
    out, target = mixup(x, y)
    lam = mix.lam.expand(len(x)).reshape(-1, *[1] * (x.ndim - 1)).float()
    torch.testing.assert_close(out, lam * x + (1 - lam) * x[mix.partner])
    assert torch.equal(target.b, y[mix.partner])
    assert torch.equal(target.lam, mix.lam.float())
    assert sorted(mix.partner.tolist()) == y.tolist()


@pytest.mark.peer
def test_equals_torchvision_and_timm_for_given_weights():
    timm = pytest.importorskip("timm.data.mixup")
    v2 = pytest.importorskip("torchvision.transforms.v2")
    x, y = images(), classes()
    torch.manual_seed(0)
    expected, labels = v2.MixUp(alpha=1.0, num_classes=4)(x, y)
    lam = _weight_of(expected, x, x.roll(1, 0))
    mix = Mix(torch.tensor(lam, dtype=torch.float64), torch.arange(6).roll(1))
    torch.testing.assert_close(_interpolate(x, mix, "roll", inplace=False), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(MixUp(num_classes=4).mix_targets(y, mix), labels, rtol=0, atol=1e-6)
    their = timm.Mixup(mixup_alpha=1.0, label_smoothing=0.0, num_classes=4, mode="batch")
    copied, soft = their(x.clone(), y)
    mix = Mix(torch.tensor(_weight_of(copied, x, x.flip(0)), dtype=torch.float64), torch.arange(6).flip(0))
    torch.testing.assert_close(_interpolate(x, mix, "flip", inplace=False), copied, rtol=0, atol=1e-6)
    torch.testing.assert_close(MixUp(num_classes=4).mix_targets(y, mix), soft, rtol=0, atol=1e-6)


def _weight_of(mixed, own, other):
    gap = (own - other).double()
    return float(((mixed - other).double() * gap).sum() / gap.square().sum())


@KINDS
@pytest.mark.parametrize("per_sample", [False, True])
def test_soft_labels_are_probabilities_and_the_input_is_untouched(kind, per_sample):
    x, y = images(), classes()
    kept = x.clone()
    out, soft = kind(num_classes=4, per_sample=per_sample, label_smoothing=0.1, generator=rng())(x, y)
    assert torch.equal(x, kept)
    assert soft.dtype == torch.float32
    torch.testing.assert_close(soft.sum(1), torch.ones(6))
    assert float(soft.min()) >= 0.1 / 4 - 1e-6
    again = kind(num_classes=4, per_sample=per_sample, inplace=True, generator=rng())(x, y)[0]
    assert again is x
    torch.testing.assert_close(x, out)


@KINDS
def test_alpha_zero_and_p_zero_do_not_mix(kind):
    x, y = images(), classes()
    for transform in (kind(0.0, num_classes=4), kind(num_classes=4, p=0.0), kind(num_classes=4, p=0.0, per_sample=True)):
        out, soft = transform(x, y)
        assert torch.equal(out, x)
        assert torch.equal(soft, F.one_hot(y, 4).float())
    x, soft = kind(num_classes=4)(images(1), classes(1))
    assert torch.equal(x, images(1))
    assert torch.equal(soft, F.one_hot(classes(1), 4).float())


def test_probability_is_that_of_a_sample_or_a_batch():
    x, y = images(2000), classes(2000)
    lam = MixUp(p=0.3, per_sample=True, labels="pair", generator=rng())(x, y)[1].lam
    assert abs(float((lam < 1).float().mean()) - 0.3) < 0.05


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("inplace", [False, True])
def test_other_precisions(dtype, inplace):
    x = images(dtype=torch.float64)
    mix = Mix(torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9, 1.0], dtype=torch.float64), torch.arange(6).roll(1))
    expected = mix.lam[:, None, None, None] * x + (1 - mix.lam[:, None, None, None]) * x.roll(1, 0)
    out = _interpolate(x.to(dtype), mix, "permute", inplace=inplace)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=3 * torch.finfo(dtype).eps)


def test_gradients_reach_both_samples():
    x = images().requires_grad_()
    for pairing in ("permute", "roll", "flip"):
        for per_sample in (False, True):
            out = MixUp(pairing=pairing, per_sample=per_sample, labels="hard")(x, classes())[0]
            (grad,) = torch.autograd.grad(out.sum(), x)
            torch.testing.assert_close(grad.sum(), torch.tensor(float(x.numel())))


def test_nan_is_handed_on():
    x = images()
    x[0] = math.nan
    assert bool(MixUp(num_classes=4, generator=rng())(x, classes())[0].isnan().any())


# ---- CutMix -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(9,), (3, 12), (3, 8, 10), (2, 6, 6, 6)])
@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("minmax", [None, (0.3, 0.6)])
def test_cutmix_weight_is_the_share_of_the_pixels(shape, per_sample, minmax):
    n = 7
    x = torch.arange(n, dtype=torch.float32).reshape(-1, *[1] * len(shape)).expand(n, *shape).clone()
    cutmix = CutMix(labels="pair", per_sample=per_sample, minmax=minmax, generator=rng(2))
    for _ in range(20):
        out, (a, b, lam) = cutmix(x, torch.arange(n))
        lam = lam.expand(n)
        for row in range(n):
            own = (out[row] == float(a[row])).float().mean() if a[row] != b[row] else lam[row]
            assert float(own) == pytest.approx(float(lam[row]), abs=1e-6)
            assert set(out[row].flatten().tolist()) <= {float(a[row]), float(b[row])}
        if minmax is not None and len(shape) == 3:
            sides = math.sqrt(1 - float(lam[0]))
            assert 0.2 < sides < 0.65


@pytest.mark.parametrize("per_sample", [False, True])
def test_hard_cutmix_keeps_labels_and_the_expected_loss(per_sample):
    x, y = torch.randn(6, 1, 6, 6, generator=rng()), classes(count=3)
    net = nn.Sequential(nn.Flatten(), nn.Linear(36, 3))
    values = {}
    for labels in ("pair", "hard"):
        cutmix = CutMix(labels=labels, per_sample=per_sample, generator=rng(1))
        losses = []
        for _ in range(4000):
            out, target = cutmix(x, y)
            losses.append(float(mixup_loss(F.cross_entropy, net(out), target).detach()))
        values[labels] = torch.tensor(losses)
    gap = values["pair"].mean() - values["hard"].mean()
    assert abs(float(gap)) < 4 * math.sqrt(sum(float(v.var()) for v in values.values()) / 4000)


def test_cutmix_cuts_one_box_out_of_all_inputs():
    v2 = pytest.importorskip("torchvision.tv_tensors")
    image = v2.Image(torch.arange(4.0).reshape(4, 1, 1, 1).expand(4, 3, 8, 8).clone())
    depth = v2.Image(torch.arange(4.0).reshape(4, 1, 1, 1).expand(4, 1, 8, 8).clone())
    out = CutMix(labels="hard", per_sample=True)({"image": image, "depth": depth, "label": torch.arange(4)})
    assert torch.equal(out["image"][:, :1], out["depth"])
    with pytest.raises(ValueError, match="one box"):
        CutMix(labels="hard")({"image": image, "depth": v2.Image(torch.zeros(4, 1, 4, 4)), "label": torch.arange(4)})


# ---- labels -----------------------------------------------------------------------------------------------------------------


def test_multi_hot_and_regression_targets_are_mixed():
    x = images()
    hot = (torch.rand(6, 5, generator=rng()) < 0.4).long()
    state = (mixup := MixUp(generator=rng(4))).state_dict()
    mix = mixup.draw(6)
    mixup.load_state_dict(state)
    soft = mixup(x, hot)[1]
    lam = float(mix.lam)
    torch.testing.assert_close(soft, lam * hot + (1 - lam) * hot[mix.partner])
    values = torch.rand(6, generator=rng(2), dtype=torch.float64)
    mixed = MixUp(generator=rng(4))(x, values)[1]
    torch.testing.assert_close(mixed, lam * values + (1 - lam) * values[mix.partner])


@KINDS
@pytest.mark.parametrize("per_sample", [False, True])
def test_samples_without_a_label_are_not_mixed(kind, per_sample):
    x, y = images(), classes()
    y[2] = -100
    out, soft = kind(num_classes=4, per_sample=per_sample, generator=rng(1))(x, y)
    assert torch.equal(out[2], x[2])
    assert float(soft[2].sum()) == 0.0
    out, pair = kind(labels="pair", per_sample=per_sample, generator=rng(1))(x, y)
    unmixed = (pair.a == -100) | (pair.b == -100)
    assert int(unmixed.sum()) in (1, 2)
    assert torch.equal(pair.lam[unmixed], torch.ones(int(unmixed.sum())))
    assert torch.equal(out[unmixed], x[unmixed])
    logits = torch.randn(6, 4, generator=rng(7))
    one, two = mixup_loss(F.cross_entropy, logits, soft), mixup_loss(nn.CrossEntropyLoss(), logits, pair)
    torch.testing.assert_close(one, two)
    known = y != -100  # the mean is that over the samples with a label
    alone = mixup_loss(F.cross_entropy, logits, MixedTarget(y, y, torch.ones(6)))
    torch.testing.assert_close(alone, F.cross_entropy(logits[known], y[known]))


def test_dense_labels_go_in_pairs():
    x, y = images(), torch.randint(0, 3, (6, 8, 8), generator=rng())
    _, pair = MixUp(labels="pair", per_sample=True)(x, y)
    loss = mixup_loss(nn.CrossEntropyLoss(), torch.randn(6, 3, 8, 8, generator=rng()), pair)
    assert loss.ndim == 0
    assert bool(loss > 0)


# ---- structures -------------------------------------------------------------------------------------------------------------


def test_structures_of_batches():
    x, y = images(), classes()
    out = MixUp(num_classes=4)({"pixel_values": x, "labels": y, "id": torch.arange(6)})
    assert out["labels"].shape == (6, 4)
    assert torch.equal(out["id"], torch.arange(6))
    (image, rest), own = MixUp(num_classes=4, labels_getter=lambda batch: batch[1])(((x, "name"), y))
    assert rest == "name"
    assert own.shape == (6, 4)
    assert not torch.equal(image, x)
    three = MixUp(labels="hard")(x, y, torch.arange(6))
    assert torch.equal(three[1], y)
    assert torch.equal(three[2], torch.arange(6))


def test_beside_torchvision_and_its_tensors():
    v2 = pytest.importorskip("torchvision.transforms.v2")
    tv = pytest.importorskip("torchvision.tv_tensors")
    choice = v2.RandomChoice([MixUp(num_classes=4), CutMix(num_classes=4)])
    out, soft = choice(tv.Image(images()), classes())
    assert isinstance(out, tv.Image)
    assert soft.shape == (6, 4)
    with pytest.raises(TypeError, match="Mask cannot be mixed"):
        MixUp(num_classes=4)({"image": tv.Image(images()), "mask": tv.Mask(torch.zeros(6, 8, 8)), "label": classes()})


def test_what_is_no_batch_of_numbers_is_refused():
    tv = pytest.importorskip("torchvision.tv_tensors")
    pictures = pytest.importorskip("PIL.Image")
    boxes = tv.BoundingBoxes(torch.zeros(6, 4), format="XYXY", canvas_size=(8, 8))
    for entry in (pictures.new("L", (8, 8)), boxes):
        with pytest.raises(TypeError, match="cannot be mixed"):
            CutMix(num_classes=4)({"image": images(), "other": entry, "label": classes()})


def test_transform_travels():
    mixup = pickle.loads(pickle.dumps(MixUp(0.3, num_classes=4, generator=rng(0))))
    assert mixup.alpha == 0.3
    assert repr(mixup) == "MixUp(alpha=0.3, labels='soft', per_sample=False, pairing='permute', p=1)"


# ---- O12: losses ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("weight", [None, torch.tensor([0.5, 1.0, 3.0, 2.0])])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_soft_and_pair_losses_agree(per_sample, weight, reduction, smoothing):
    mix = MixUp(per_sample=per_sample, num_classes=4, generator=rng(3)).draw(6)
    y, logits = classes(), torch.randn(6, 4, generator=rng())
    criterion = nn.CrossEntropyLoss(weight, reduction=reduction, label_smoothing=smoothing)
    soft = MixUp(num_classes=4).mix_targets(y, mix)
    pair = MixUp(labels="pair").mix_targets(y, mix)
    one, two = mixup_loss(criterion, logits, soft), MixupLoss(criterion)(logits, pair)
    torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(one, criterion(logits, soft), rtol=1e-6, atol=1e-6)
    assert criterion.reduction == reduction


def test_squared_error_of_pairs_differs_by_a_constant():
    mix = MixUp(generator=rng(3)).draw(6)
    y = torch.rand(6, generator=rng())
    soft, pair = MixUp().mix_targets(y, mix), MixUp(labels="pair").mix_targets(y, mix)
    lam = float(mix.lam)
    expected = lam * (1 - lam) * (y - y[mix.partner]).square().mean()
    for seed in range(2):
        out = torch.rand(6, generator=rng(seed), requires_grad=True)
        gap = mixup_loss(F.mse_loss, out, pair) - mixup_loss(F.mse_loss, out, soft)
        torch.testing.assert_close(gap, expected)
        (grad,) = torch.autograd.grad(gap, out)
        torch.testing.assert_close(grad, torch.zeros(6), rtol=0, atol=1e-6)


class FocalLoss(nn.Module):
    def forward(self, logits, target):
        nll = F.cross_entropy(logits, target)
        return (1 - (-nll).exp()) ** 2 * nll


def test_criteria_that_are_not_affine_are_told():
    logits, y = torch.randn(6, 4, generator=rng()), classes()
    mix = MixUp(generator=rng()).draw(6)
    with pytest.warns(OutlastWarning, match="not affine"):
        mixup_loss(FocalLoss(), logits, MixUp(num_classes=4).mix_targets(y, mix))
    pair = MixUp(labels="pair").mix_targets(y, mix)
    lam = mix.lam.float()
    expected = lam * FocalLoss()(logits, y) + (1 - lam) * FocalLoss()(logits, y[mix.partner])
    torch.testing.assert_close(mixup_loss(FocalLoss(), logits, pair), expected)
    with pytest.raises(ValueError, match="gives shape"):
        mixup_loss(FocalLoss(), logits, MixUp(labels="pair", per_sample=True).mix_targets(y, MixUp(per_sample=True).draw(6)))
    torch.testing.assert_close(mixup_loss(FocalLoss(), logits, y), FocalLoss()(logits, y))


def test_accuracy_is_weighted():
    output = F.one_hot(torch.tensor([0, 1, 2, 2]), 3).float()
    a, b = torch.tensor([0, 0, 2, 1]), torch.tensor([1, 1, 2, 0])
    assert float(mixup_accuracy(output, MixedTarget(a, b, torch.tensor(0.7)))) == pytest.approx((0.7 + 0.3 + 1 + 0) / 4)
    soft = 0.7 * F.one_hot(a, 3) + 0.3 * F.one_hot(b, 3)
    assert float(mixup_accuracy(output, soft)) == pytest.approx(0.5)
    assert float(mixup_accuracy(output, a)) == pytest.approx(0.5)
    with pytest.raises(ValueError, match="output must be"):
        mixup_accuracy(output[0], a)


# ---- O13, O14: training -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("per_sample", [False, True])
def test_label_preserving_form_has_the_same_average_gradient(per_sample):
    x, y = torch.randn(8, 5, generator=rng()), classes(8, count=3)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))
    found = {}
    for labels in ("soft", "hard"):
        mixup = MixUp(0.6, num_classes=3, labels=labels, per_sample=per_sample, generator=rng(2))
        grads = []
        for _ in range(4000):
            out, target = mixup(x, y)
            grads.append(torch.cat([g.flatten() for g in torch.autograd.grad(F.cross_entropy(net(out), target), list(net.parameters()))]))
        found[labels] = torch.stack(grads)
    gap = found["soft"].mean(0) - found["hard"].mean(0)
    error = sum(value.var(0) for value in found.values()).div(4000).sqrt()
    assert float((gap.abs() / error).max()) < 4.0


def test_both_passes_of_sam_see_one_draw():
    torch.manual_seed(0)
    net = nn.Linear(192, 4)
    optimizer = SAM(torch.optim.SGD(net.parameters(), lr=0.1))
    mixup = MixUp(num_classes=4, generator=rng())
    x, soft = mixup(images(), classes())
    seen = []

    def closure():
        optimizer.zero_grad()
        seen.append((x.clone(), soft.clone()))
        loss = mixup_loss(F.cross_entropy, net(x.flatten(1)), soft)
        loss.backward()
        return loss

    optimizer.step(closure)
    assert len(seen) == 2
    assert all(torch.equal(one, two) for one, two in zip(*seen, strict=True))


def test_hidden_layers_are_mixed():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(10, 4), nn.Flatten(), nn.Linear(12, 3))
    tokens = torch.randint(0, 10, (5, 3), generator=rng())
    mixup = MixUp(per_sample=True, num_classes=3, generator=rng(1))
    mix = mixup.draw(5)
    with mix_hidden(net, "0", *mix):
        out = net(tokens)
    table = net[0](tokens)
    lam = mix.lam.float()[:, None, None]
    torch.testing.assert_close(out, net[2]((lam * table + (1 - lam) * table[mix.partner]).flatten(1)))
    assert not net[0]._forward_hooks
    with mix_hidden(net, net[1], 0.25, mix.partner):
        torch.testing.assert_close(net(tokens), net[2](0.25 * table.flatten(1) + 0.75 * table.flatten(1)[mix.partner]))


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda net, x: mix_hidden(net, "nothing", 0.5, torch.arange(5)), "has no layer 'nothing'"),
        (lambda net, x: mix_hidden(net, nn.Linear(2, 2), 0.5, torch.arange(5)), "no part of the model"),
        (lambda net, x: mix_hidden(net, "0", 0.5, torch.arange(4)), "index has 4"),
    ],
)
def test_hidden_layers_that_cannot_be_mixed(call, text):
    net, x = nn.Sequential(nn.Linear(3, 3)), torch.zeros(5, 3)
    with pytest.raises(ValueError, match=text), call(net, x):
        net(x)
    with pytest.raises(ValueError, match="did not run"), mix_hidden(net, "0", 0.5, torch.arange(5)):
        pass


# ---- section 7 --------------------------------------------------------------------------------------------------------------


@KINDS
@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"alpha": -0.1}, "alpha"),
        ({"alpha": math.inf}, "alpha"),
        ({"alpha": 0.0, "beta": 1.0}, "no mixing"),
        ({"beta": 0.0}, "beta"),
        ({"p": 1.5}, r"p must be"),
        ({"labels": "hot"}, "labels"),
        ({"pairing": "random"}, "pairing"),
        ({"num_classes": 0}, "num_classes"),
        ({"label_smoothing": 0.1}, "label_smoothing"),
        ({"label_smoothing": 0.1, "labels": "pair", "num_classes": 3}, "label_smoothing"),
        ({"labels_getter": "second"}, "labels_getter"),
    ],
)
def test_bad_arguments(kind, options, text):
    with pytest.raises(ValueError, match=text):
        kind(**options)


def test_bad_box():
    with pytest.raises(ValueError, match="minmax"):
        CutMix(minmax=(0.6, 0.3))


@KINDS
@pytest.mark.parametrize(
    ("x", "y", "options", "error", "text"),
    [
        (images(), classes(5), {"num_classes": 4}, ValueError, "6 inputs and labels"),
        (images(), classes(), {}, ValueError, "needs num_classes"),
        (images(), classes() + 1, {"num_classes": 4}, ValueError, "outside"),
        (images(0), classes(0), {"num_classes": 4}, ValueError, "empty"),
        (images().mul(255).byte(), classes(), {"num_classes": 4}, TypeError, "ToDtype"),
        (images(), classes().float(), {"num_classes": 4}, TypeError, "class ids must be integers"),
        (images(), torch.rand(6, 3), {"num_classes": 4}, ValueError, "3 columns"),
        (images(), torch.zeros(6, 8, 8, dtype=torch.int64), {"num_classes": 4}, ValueError, "soft labels"),
        (images(), torch.rand(6, 4), {"num_classes": 4, "label_smoothing": 0.1}, ValueError, "label_smoothing"),
        (images(), "label", {"num_classes": 4}, TypeError, "must be a tensor"),
    ],
)
def test_bad_batches(kind, x, y, options, error, text):
    with pytest.raises(error, match=text):
        kind(**options)(x, y)


def test_batches_without_labels():
    for batch in (images(), (images(),), {"x": images()}):
        with pytest.raises(ValueError, match="labels"):
            MixUp(num_classes=4)(batch)
    with pytest.raises(ValueError, match="not an entry"):
        MixUp(num_classes=4, labels_getter=lambda batch: classes())(images(), classes())


def test_no_warning_in_ordinary_use():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mixup_loss(F.cross_entropy, torch.randn(6, 4), MixUp(num_classes=4)(images(), classes())[1])


# ---- defects that were found ------------------------------------------------------------------------------------------------


def test_one_ignored_label_leaves_the_draw_of_the_batch_alone():
    x, y = images(), classes()
    for kind in (MixUp, CutMix):
        plain = kind(num_classes=4, pairing="roll", generator=rng(1))(x, y)[0]
        some = y.clone()
        some[3] = -100
        out, soft = kind(num_classes=4, pairing="roll", generator=rng(1))(x, some)
        others = [0, 1, 2, 5]  # 3 has no label, 4 is mixed with it
        torch.testing.assert_close(out[others], plain[others])
        assert torch.equal(out[[3, 4]], x[[3, 4]])
        assert soft[others].max(1).values.unique().numel() <= 2


def test_an_ignored_sample_that_is_not_finite_stays_by_itself():
    x = torch.ones(4, 2)
    x[0] = math.inf
    for per_sample in (False, True):
        out, _ = MixUp(num_classes=3, pairing="roll", per_sample=per_sample, generator=rng())(x, torch.tensor([-100, 1, 2, 0]))
        assert torch.equal(out, x)


def test_batches_off_the_processor_are_cut_by_one_box():
    x, y = torch.zeros(4, 3, 8, 8, device="meta"), torch.zeros(4, dtype=torch.int64, device="meta")
    assert MixUp(labels="pair")(x, y)[1].lam.shape == (4,)
    assert MixUp(labels="pair", ignore_index=None)(x, y)[1].lam.shape == ()
    for per_sample in (False, True):
        assert CutMix(labels="pair", per_sample=per_sample)(x, y)[0].device.type == "meta"


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_soft_and_pair_losses_agree_with_ignored_samples_and_partials(reduction, smoothing):
    y = torch.tensor([0, 1, 2, -100, -100, 1])
    logits = torch.randn(6, 4, generator=rng())
    values = []
    for labels in ("soft", "pair"):
        target = MixUp(num_classes=4, labels=labels, generator=rng(3))(images(), y)[1]
        whole = nn.CrossEntropyLoss(reduction=reduction, label_smoothing=smoothing)
        part = functools.partial(F.cross_entropy, reduction=reduction, label_smoothing=smoothing)
        values += [mixup_loss(criterion, logits, target) for criterion in (whole, part)]
    for value in values[1:]:
        torch.testing.assert_close(value, values[0])
    alone = MixedTarget(y, y, torch.ones(6))
    torch.testing.assert_close(mixup_loss(nn.NLLLoss(), logits.log_softmax(1), alone), F.cross_entropy(logits, y))
    hits = F.one_hot(torch.tensor([0, 1, 2, 0, 0, 0]), 4).float()
    assert float(mixup_accuracy(hits, alone)) == pytest.approx(0.75)


@pytest.mark.parametrize("per_sample", [False, True])
def test_own_mixing_leaves_ignored_samples_and_their_partners_alone(per_sample):
    y = torch.tensor([0, 1, 2, -100, 3, 1])
    logits, found = torch.randn(6, 4, generator=rng()), []
    for labels in ("soft", "pair"):
        mixup = MixUp(num_classes=4, labels=labels, per_sample=per_sample, pairing="roll", generator=rng(3))
        with pytest.raises(ValueError, match="give the labels to draw"):
            mixup.mix_targets(y, mixup.draw(6))
        mix = mixup.draw(6, y)
        assert mix.lam[[3, 4]].tolist() == [1.0, 1.0]  # 4's partner is 3
        assert (mix.lam[[0, 1, 2, 5]] < 1.0).all()
        found.append(mixup_loss(F.cross_entropy, logits, mixup.mix_targets(y, mix)))
    torch.testing.assert_close(*found)
    assert mixup.draw(6, classes()).lam.shape == ((6,) if per_sample else ())
    with pytest.raises(ValueError, match="each of 5 samples"):
        mixup.draw(5, y)


def test_default_device_and_dtype_do_not_matter():
    expected = MixUp(num_classes=4, per_sample=True, generator=rng(2))(images(), classes())
    x, y = images(), classes()
    try:
        torch.set_default_device("meta")
        torch.set_default_dtype(torch.float64)
        out = MixUp(num_classes=4, per_sample=True, generator=torch.Generator("cpu").manual_seed(2))(x, y)
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
    for one, two in zip(out, expected, strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("labels", ["pair", "hard"])
def test_class_ids_are_checked_in_every_form(labels):
    with pytest.raises(ValueError, match="outside"):
        MixUp(num_classes=3, labels=labels)(images(), classes() + 1)
    with pytest.raises(TypeError, match="class ids"):
        MixUp(num_classes=3, labels=labels)(images(), classes().float())


def test_hidden_layers_of_compiled_models_are_mixed():
    torch._dynamo.reset()
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh())
    compiled = torch.compile(net, backend="eager")
    x, index = torch.randn(5, 3, generator=rng()), torch.arange(5).roll(1)
    plain = compiled(x)
    with mix_hidden(compiled, net[0], 0.3, index):
        mixed = compiled(x)
    hidden = net[0](x)
    torch.testing.assert_close(mixed, torch.tanh(0.3 * hidden + 0.7 * hidden[index]))
    torch.testing.assert_close(compiled(x), plain)
    with pytest.raises(ValueError, match=r"lam must be in \[0, 1\]"), mix_hidden(net, "0", -0.1, index):
        pass
