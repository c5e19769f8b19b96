"""NT-Xent, distillation and their sum: closed forms, invariances, bad input, exact accumulation."""

from __future__ import annotations

import copy
import inspect
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from outlast.fewshot import (
    NTXentLoss,
    ProjectionHead,
    SoftDistillationLoss,
    StartupLoss,
    StartupStudent,
    nt_xent,
    soft_distillation,
)
from outlast.robust import SAM


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def views(size=6, width=5, dtype=torch.float64, seed=0):
    return torch.randn(2, size, width, generator=rng(seed), dtype=dtype)


def by_pairs(z1, z2, temperature):
    """The definition, a pair at a time."""
    rows = torch.cat([z1, z2])
    rows = rows / rows.norm(dim=1, keepdim=True)
    count = len(rows)
    total = 0.0
    for i in range(count):
        positive = (i + len(z1)) % count
        others = [torch.exp(rows[i] @ rows[j] / temperature) for j in range(count) if j != i]
        total += -(rows[i] @ rows[positive]) / temperature + torch.log(sum(others))
    return total / count


def test_known_values():
    eye = torch.eye(4)
    assert nt_xent(eye, eye).item() == pytest.approx(1.165422, abs=1e-6)
    for size, temperature in ((2, 0.5), (7, 0.2), (16, 1.0)):
        eye = torch.eye(size, dtype=torch.float64)
        expected = math.log(1 + (2 * size - 2) * math.exp(-1 / temperature))
        assert nt_xent(eye, eye, temperature=temperature).item() == pytest.approx(expected, abs=1e-12)
        same = torch.ones(size, 3, dtype=torch.float64)
        assert nt_xent(same, same, temperature=temperature).item() == pytest.approx(math.log(2 * size - 1), abs=1e-12)
        v = torch.tensor([[1.0, 2.0], [-1.0, -2.0]], dtype=torch.float64)
        assert nt_xent(v, v, temperature=temperature).item() == pytest.approx(math.log(1 + 2 * math.exp(-2 / temperature)), abs=1e-12)


@pytest.mark.parametrize("temperature", [0.1, 0.5, 1.0])
def test_ntxent_is_its_definition_with_its_gradient(temperature):
    z1, z2 = views()
    assert nt_xent(z1, z2, temperature=temperature).item() == pytest.approx(by_pairs(z1, z2, temperature).item(), abs=1e-10)
    left, right = (z.clone().requires_grad_() for z in (z1, z2))
    by_pairs(left, right, temperature).backward()
    z1.requires_grad_()
    z2.requires_grad_()
    nt_xent(z1, z2, temperature=temperature).backward()
    torch.testing.assert_close(z1.grad, left.grad, rtol=0, atol=1e-10)
    torch.testing.assert_close(z2.grad, right.grad, rtol=0, atol=1e-10)
    assert torch.autograd.gradcheck(lambda a, b: nt_xent(a, b, temperature=temperature), (z1, z2))
    rows = nt_xent(z1, z2, temperature=temperature, reduction="none")
    assert rows.shape == (12,)
    assert rows.mean().item() == pytest.approx(nt_xent(z1, z2, temperature=temperature).item())
    assert nt_xent(z1, z2, temperature=temperature, reduction="sum").item() == pytest.approx(rows.sum().item())


def test_ntxent_does_not_care_for_scale_rotation_side_and_order():
    z1, z2 = views()
    expected = nt_xent(z1, z2, temperature=0.5)
    scales = torch.rand(2, 6, 1, generator=rng(1), dtype=torch.float64) + 0.1
    rotation = torch.linalg.qr(torch.randn(5, 5, generator=rng(2), dtype=torch.float64)).Q
    order = torch.randperm(6, generator=rng(3))
    for left, right in ((z1 * scales[0], z2 * scales[1]), (z1 @ rotation, z2 @ rotation), (z2, z1), (z1[order], z2[order])):
        torch.testing.assert_close(nt_xent(left, right, temperature=0.5), expected, rtol=0, atol=1e-12)


def test_a_zero_row_has_cosine_zero_and_no_gradient():
    z1, z2 = views(3)
    z1[1] = 0.0
    z1.requires_grad_()
    loss = nt_xent(z1, z2)
    loss.backward()
    assert math.isfinite(loss.item())
    assert z1.grad[1].abs().max() == 0.0
    assert torch.isfinite(z1.grad).all()
    rows = nt_xent(z1.detach(), z2, reduction="none")
    assert rows[1].item() == pytest.approx(math.log(5), abs=1e-12)


def test_losses_run_in_float32_under_autocast():
    z1, z2 = views(8, dtype=torch.float32)
    logits, probs = torch.randn(8, 4, generator=rng(4)), torch.rand(8, 4, generator=rng(5)).softmax(1)
    expected = nt_xent(z1, z2, temperature=0.01), soft_distillation(logits, probs)
    with torch.autocast("cpu", torch.bfloat16):
        found = nt_xent(z1, z2, temperature=0.01), soft_distillation(logits, probs)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])
    half = nt_xent(z1.half(), z2.half(), temperature=0.001)
    assert half.dtype == torch.float32
    assert math.isfinite(half.item())


def test_distillation_is_cross_entropy_less_entropy():
    logits = torch.randn(7, 5, generator=rng(), dtype=torch.float64, requires_grad=True)
    probs = torch.randn(7, 5, generator=rng(1), dtype=torch.float64).softmax(1)
    loss = soft_distillation(logits, probs)
    loss.backward()
    expected = F.cross_entropy(logits, probs) - torch.distributions.Categorical(probs).entropy().mean()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-12)
    torch.testing.assert_close(logits.grad, (logits.detach().softmax(1) - probs) / 7, rtol=0, atol=1e-12)
    same = probs.log().detach().requires_grad_()
    zero = soft_distillation(same, probs)
    zero.backward()
    assert abs(zero.item()) < 1e-12
    assert same.grad.abs().max() < 1e-12
    classes = torch.tensor([0, 1, 2, 3, 4, 0, 1])
    hard = soft_distillation(logits, F.one_hot(classes, 5).double())
    assert hard.item() == pytest.approx(F.cross_entropy(logits, classes).item(), abs=1e-12)
    uniform = soft_distillation(logits, torch.full((7, 5), 0.2, dtype=torch.float64))
    assert uniform.item() == pytest.approx((logits.logsumexp(1) - logits.mean(1)).mean().item() - math.log(5), abs=1e-12)
    rows = soft_distillation(logits, probs, reduction="none")
    assert rows.mean().item() == pytest.approx(loss.item())
    assert rows.sum().item() == pytest.approx(soft_distillation(logits, probs, reduction="sum").item())
    assert torch.autograd.gradcheck(lambda value: soft_distillation(value, probs), (logits,))
    both = torch.randn(2, 7, 5, generator=rng(2), dtype=torch.float64)
    average = (soft_distillation(both[0], probs) + soft_distillation(both[1], probs)) / 2
    assert soft_distillation(both, probs).item() == pytest.approx(average.item(), abs=1e-12)


def test_the_sum_weighs_its_terms():
    source, target, probs = torch.randn(4, 3), torch.randn(2, 6, 3), torch.randn(6, 3).softmax(1)
    labels, projections = torch.tensor([0, 1, 2, 0]), torch.randn(2, 6, 5)
    losses = StartupLoss(0.5, (1.0, 2.0, 3.0))(source, labels, target, probs, projections)
    values = losses.to_dict()
    assert values["source"] == pytest.approx(F.cross_entropy(source, labels).item())
    assert values["distill"] == pytest.approx(soft_distillation(target, probs).item())
    assert values["contrast"] == pytest.approx(nt_xent(*projections, temperature=0.5).item())
    assert values["total"] == pytest.approx(values["source"] + 2 * values["distill"] + 3 * values["contrast"], rel=1e-6)
    without = StartupLoss()(source, labels, target[0], probs)
    assert without.contrast.item() == 0.0
    assert without.total.item() == pytest.approx((without.source + without.distill).item())
    soft = StartupLoss(weights=(1, 0, 0))(source, F.one_hot(labels, 3).float(), target, None)
    assert soft.total.item() == pytest.approx(values["source"])
    only = StartupLoss(0.5, (0, 0, 1))(None, None, target, None, projections)
    assert only.total.item() == pytest.approx(values["contrast"])
    assert only.source.item() == only.distill.item() == 0.0


def test_modules_are_their_functions():
    z1, z2 = views()
    assert torch.equal(NTXentLoss(0.3)(z1, z2), nt_xent(z1, z2, temperature=0.3))
    logits, probs = torch.randn(4, 3), torch.randn(4, 3).softmax(1)
    assert torch.equal(SoftDistillationLoss("sum")(logits, probs), soft_distillation(logits, probs, reduction="sum"))


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda f: f(torch.zeros(1, 3), torch.zeros(1, 3)), ValueError, "at least 2"),
        (lambda f: f(torch.zeros(2, 3), torch.zeros(3, 3)), ValueError, r"\(2, 3\) and \(3, 3\)"),
        (lambda f: f(torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 3, dtype=torch.int64)), TypeError, "floating"),
        (lambda f: f(torch.zeros(2, 3), torch.zeros(2, 3), temperature=0.0), ValueError, "temperature"),
        (lambda f: f(torch.zeros(2, 3), torch.zeros(2, 3), temperature=math.inf), ValueError, "temperature"),
        (lambda f: f(torch.zeros(2, 3), torch.zeros(2, 3), reduction="max"), ValueError, "reduction"),
        (lambda f: f(torch.zeros(2, 3), torch.zeros(2, 3), gather="yes"), ValueError, "gather"),
    ],
)
def test_wrong_projections_are_refused(call, error, text):
    with pytest.raises(error, match=text):
        call(inspect.unwrap(nt_xent))


@pytest.mark.parametrize(
    ("row", "text"), [([0.5, 0.6, 0.0], "row 1 .* .sum 1.1"), ([1.2, -0.2, 0.0], "least -0.2"), ([math.nan, 1.0, 0.0], "row 1")]
)
def test_rows_that_are_no_distribution_are_refused(row, text):
    with pytest.raises(ValueError, match=text):
        soft_distillation(torch.zeros(2, 3), torch.tensor([[1.0, 0.0, 0.0], row]))


def test_wrong_terms_are_refused():
    source, labels, target, probs = torch.zeros(4, 3), torch.tensor([0, 1, 2, 0]), torch.zeros(5, 3), torch.full((5, 3), 1 / 3)
    loss = StartupLoss()
    with pytest.raises(ValueError, match="pseudo_labels have 4, source_logits 3, target_logits 3"):
        loss(source, labels, target, torch.full((5, 4), 0.25))
    with pytest.raises(ValueError, match=r"\[0, 3\), got -1 to 3"):
        loss(source, torch.tensor([0, 3, -1, 0]), target, probs)
    with pytest.raises(ValueError, match="source has a weight"):
        loss(None, None, target, probs)
    with pytest.raises(ValueError, match="pseudo_labels are needed"):
        loss(source, labels, target, None)
    for targets in (torch.zeros(4), torch.zeros(4, 1), torch.zeros(4, dtype=torch.bool), torch.zeros(4, 3, dtype=torch.int64)):
        with pytest.raises(ValueError, match="source_targets"):
            loss(source, targets, target, probs)
    with pytest.raises(ValueError, match="row 0 of source_targets"):
        loss(source, torch.ones(4, 3), target, probs)
    assert loss(source, labels.int(), target, probs).source == loss(source, labels, target, probs).source
    with pytest.raises(ValueError, match=r"\(2, B, p\)"):
        loss(source, labels, target, probs, torch.zeros(3, 5, 2))
    with pytest.raises(ValueError, match="all zero"):
        StartupLoss(weights=(0, 0, 0))
    with pytest.raises(ValueError, match="weight"):
        StartupLoss(weights=(1, -1, 0))
    with pytest.raises(ValueError, match="three numbers"):
        StartupLoss(weights=(1, 1))
    with pytest.raises(ValueError, match="temperature"):
        StartupLoss(temperature=-1.0)
    with pytest.raises(ValueError, match="do not fit"):
        inspect.unwrap(soft_distillation)(target, torch.full((4, 3), 1 / 3))


def small_student(dropout=0.0, dtype=torch.float64):
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(dropout))
    return StartupStudent(backbone, nn.Linear(8, 3), ProjectionHead(8, 5)).to(dtype)


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (0.5, 2.0, 3.0), (0.0, 1.0, 1.0), (1.0, 1.0, 0.0), (1.0, 0.0, 0.0), (0.0, 0.0, 1.0)])
@pytest.mark.parametrize("size", [1, 3, 7, 20])
def test_accumulation_in_parts_is_exact(weights, size):
    source, labels = torch.randn(6, 4, generator=rng(), dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1, 2])
    target, probs = torch.randn(2, 7, 4, generator=rng(1), dtype=torch.float64), torch.randn(7, 3, generator=rng(2)).double().softmax(1)
    loss = StartupLoss(0.5, weights)
    whole, parts = small_student(), small_student()
    logits, target_logits, projections = whole(source, target)
    expected = loss(logits, labels, target_logits, probs, projections)
    expected.total.backward()
    found = loss.backward_in_parts(parts, source, labels, target, probs, micro_batch=size)
    for name, value in expected.to_dict().items():
        assert found.to_dict()[name] == pytest.approx(value, abs=1e-12)
    for one, other in zip(whole.parameters(), parts.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None)
        if one.grad is not None:
            torch.testing.assert_close(one.grad, other.grad, rtol=0, atol=1e-12)


def test_parts_of_one_sample_are_refused_with_batchnorm():
    torch.manual_seed(0)
    student = StartupStudent(nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8)), nn.Linear(8, 3), ProjectionHead(8, 5))
    loss = StartupLoss(weights=(0, 0, 1))
    before = [value.clone() for value in student.state_dict().values()]
    with pytest.raises(ValueError, match="part of one sample"):
        loss.backward_in_parts(student, None, None, torch.randn(2, 9, 4), None, micro_batch=1)
    assert all(torch.equal(one, other) for one, other in zip(before, student.state_dict().values(), strict=True))
    loss.backward_in_parts(student, None, None, torch.randn(2, 9, 4), None, micro_batch=4)  # 3, 3, 3
    assert int(student.backbone[1].num_batches_tracked) == 3 * 2


def test_both_passes_of_accumulation_draw_the_same_dropout():
    """One part: the surrogate's gradient is that of the plain loss only if the second pass drops what the first did."""
    target = torch.randn(2, 7, 4, generator=rng(1), dtype=torch.float64)
    loss = StartupLoss(0.5, (0, 0, 1))
    whole, parts = small_student(0.5), small_student(0.5)
    torch.manual_seed(3)
    _, logits, projections = whole(None, target)
    loss(None, None, logits, None, projections).total.backward()
    torch.manual_seed(3)
    loss.backward_in_parts(parts, None, None, target, None, micro_batch=7)
    for one, other in zip(whole.parameters(), parts.parameters(), strict=True):
        if one.grad is not None:
            torch.testing.assert_close(one.grad, other.grad, rtol=0, atol=1e-12)


def test_losses_compile_without_breaks():
    z1, z2 = views(dtype=torch.float32)
    probs = torch.randn(6, 5, generator=rng(1)).softmax(1)
    contrast, distill = inspect.unwrap(nt_xent), inspect.unwrap(soft_distillation)  # dynamo cannot trace the shape checker

    def loss(a, b, p):
        return contrast(a, b, temperature=0.5) + distill(a, p)

    torch.testing.assert_close(torch.compile(loss, backend="aot_eager", fullgraph=True)(z1, z2, probs), loss(z1, z2, probs))


# ---- in a loop of one's own -----------------------------------------------------------------------------------------------------


def test_a_loop_with_sam_perturbs_all_three_terms():
    torch.manual_seed(0)
    backbone, head = nn.Sequential(nn.Linear(5, 16), nn.ReLU()), nn.Linear(16, 3)
    x, views = torch.randn(8, 5), torch.randn(2, 8, 5)
    y, probs = torch.randint(0, 3, (8,)), torch.randn(8, 3).softmax(1)
    loss = StartupLoss(0.5)

    def trained(sharp):
        student = StartupStudent.from_teacher(copy.deepcopy(backbone), 3, 16, 8, copy_head=head)
        base = torch.optim.SGD(student.parameters(), lr=0.1)
        optimizer = SAM(base, rho=0.1) if sharp else base

        def closure():
            optimizer.zero_grad()
            logits, target, projections = student(x, views)
            total = loss(logits, y, target, probs, projections).total
            total.backward()
            return total

        start = float(closure().detach())
        optimizer.zero_grad()
        for _ in range(10):
            optimizer.step(closure)
        return student, start, float(closure().detach())

    torch.manual_seed(1)
    student, start, end = trained(sharp=True)
    torch.manual_seed(1)
    plain, _, _ = trained(sharp=False)
    assert end < start
    assert student.projector is not None
    for module in ("backbone", "head", "projector"):
        pairs = zip(getattr(student, module).parameters(), getattr(plain, module).parameters(), strict=True)
        assert any(not torch.equal(a, b) for a, b in pairs), module
