from __future__ import annotations

import math

import pytest
import torch
from helpers import batches, by_hand, closure_of, cross_entropy, flat, gradient, mlp, same, snapshot
from torch import nn
from torch.nn import functional as F

from outlast.robust import SAM, sam_gradient


def each(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def setting():
    return mlp(dtype=torch.float64), batches(1, dtype=torch.float64)[0]


def part(batch, index):
    return batch[0][index], batch[1][index]


@pytest.mark.parametrize("options", [{}, {"p": 1.0}, {"p": 3.0}, {"p": math.inf}, {"adaptive": True, "eta": 0.1}])
@pytest.mark.parametrize("m", [None, 8])
def test_whole_batch_equals_the_optimizer(options, m):
    model, batch = setting()
    loss, grads = sam_gradient(cross_entropy, model, batch, rho=0.3, m=m, **options)
    optimizer = SAM(torch.optim.SGD(model.parameters(), lr=0.0), model, rho=0.3, **options)
    expected = optimizer.step(closure_of(optimizer, model, batch))
    torch.testing.assert_close(flat(grads), flat([p.grad for p in model.parameters()]), rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("loss_fn", [cross_entropy, each])
def test_parts_of_one_sample_give_the_mean_of_single_sample_gradients(loss_fn):
    model, batch = setting()
    parameters = list(model.parameters())
    _, grads = sam_gradient(loss_fn, model, batch, rho=0.3, m=1)
    singles = [flat(by_hand(lambda i=i: cross_entropy(model, part(batch, [i])), parameters, 0.3)[1]) for i in range(8)]
    torch.testing.assert_close(flat(grads), torch.stack(singles).mean(0))


def test_smaller_last_part_has_a_smaller_weight():
    model, batch = setting()
    parameters = list(model.parameters())
    loss, grads = sam_gradient(cross_entropy, model, batch, rho=0.3, m=3)
    pieces = [slice(0, 3), slice(3, 6), slice(6, 8)]
    found = [flat(by_hand(lambda s=s: cross_entropy(model, part(batch, s)), parameters, 0.3)[1]) for s in pieces]
    torch.testing.assert_close(flat(grads), (3 * found[0] + 3 * found[1] + 2 * found[2]) / 8)
    torch.testing.assert_close(loss, cross_entropy(model, batch).detach())


def test_radius_zero_gives_the_plain_gradient():
    model, batch = setting()
    _, grads = sam_gradient(cross_entropy, model, batch, rho=0.0, m=2)
    torch.testing.assert_close(flat(grads), flat(gradient(cross_entropy(model, batch), list(model.parameters()))))


@pytest.mark.parametrize(("gamma", "count"), [(0.5, 4), (0.4, 4), (0.01, 1)])
def test_gamma_keeps_the_samples_whose_loss_rose_most(gamma, count):
    model, batch = setting()
    parameters = list(model.parameters())
    before = each(model, batch).detach()
    plain = gradient(cross_entropy(model, batch), parameters)
    kept = [p.detach().clone() for p in parameters]
    with torch.no_grad():
        for p, g in zip(parameters, plain, strict=True):
            p.add_(0.3 * g / flat(plain).norm())
        chosen = (each(model, batch) - before).argsort(descending=True)[:count]
    expected = gradient(cross_entropy(model, part(batch, chosen)), parameters)
    with torch.no_grad():
        for p, w in zip(parameters, kept, strict=True):
            p.copy_(w)
    loss, grads = sam_gradient(each, model, batch, rho=0.3, gamma=gamma)
    torch.testing.assert_close(flat(grads), flat(expected))
    torch.testing.assert_close(loss, before.mean())


def test_gamma_one_takes_every_sample():
    model, batch = setting()
    _, one = sam_gradient(each, model, batch, rho=0.3, gamma=1.0)
    _, plain = sam_gradient(cross_entropy, model, batch, rho=0.3)
    torch.testing.assert_close(flat(one), flat(plain))


@pytest.mark.parametrize("options", [{}, {"m": 4}, {"gamma": 0.5}])
def test_model_gradients_and_generator_are_as_after_plain_passes(options):
    model, other = mlp(norm=True, dropout=0.3), mlp(norm=True, dropout=0.3)
    (batch,) = batches(1)
    weights = [p.detach().clone() for p in model.parameters()]
    model[0].weight.grad = torch.ones_like(model[0].weight)
    torch.manual_seed(4)
    sam_gradient(each, model, batch, rho=0.5, **options)
    after = torch.get_rng_state()
    assert same(weights, list(model.parameters()))
    assert torch.equal(model[0].weight.grad, torch.ones_like(model[0].weight))
    assert model[0].bias.grad is None
    torch.manual_seed(4)
    for index in [slice(0, 4), slice(4, 8)] if "m" in options else [slice(0, 8)]:
        each(other, part(batch, index))
    assert same(list(model.buffers()), list(other.buffers()))
    assert torch.equal(after, torch.get_rng_state())


def test_weights_come_back_when_the_second_pass_fails():
    model, batch = setting()
    before, calls = snapshot(model), []

    def loss_fn(net, data):
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("second pass")
        return cross_entropy(net, data)

    with pytest.raises(RuntimeError, match="second pass"):
        sam_gradient(loss_fn, model, batch, rho=0.5)
    assert same(before, snapshot(model))


def test_frozen_and_unused_parameters():
    model, batch = setting()
    model[0].requires_grad_(False)
    model.extra = nn.Parameter(torch.ones(2, dtype=torch.float64))

    def loss_fn(net, data):
        return F.cross_entropy(net[2](net[1](net[0](data[0]))), data[1])

    _, grads = sam_gradient(loss_fn, model, batch, rho=0.3)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert [g.shape for g in grads] == [p.shape for p in trained]
    assert sum(float(g.norm()) == 0 for g in grads) == 1


def test_works_under_no_grad_with_nested_batches():
    model, batch = setting()
    _, expected = sam_gradient(cross_entropy, model, batch, rho=0.3, m=2)
    with torch.no_grad():
        _, grads = sam_gradient(
            lambda net, data: cross_entropy(net, (data["in"][0], data["y"])),
            model,
            {"in": [batch[0]], "y": batch[1], "id": "x"},
            rho=0.3,
            m=2,
        )
    assert same(expected, grads)


@pytest.mark.parametrize("p", [1.0, 2.0, 3.0, math.inf])
def test_zero_gradient_is_no_division_by_zero(p):
    model, batch = setting()
    _, grads = sam_gradient(lambda net, data: 0.0 * cross_entropy(net, data), model, batch, rho=0.3, p=p)
    assert not flat(grads).any()


@pytest.mark.parametrize(
    "options",
    [{"rho": -1.0}, {"rho": math.nan}, {"rho": math.inf}, {"p": 0.9}, {"m": 0}, {"m": 9}, {"gamma": 0.0}, {"gamma": 1.1}, {"eta": -1.0}],
    ids=str,
)
def test_value_out_of_range_is_refused_by_name(options):
    model, batch = setting()
    with pytest.raises(ValueError, match=next(iter(options))):
        sam_gradient(each, model, batch, **{"rho": 0.1, **options})


def test_gamma_needs_one_loss_a_sample():
    model, batch = setting()
    with pytest.raises(ValueError, match="one loss a sample"):
        sam_gradient(cross_entropy, model, batch, rho=0.1, gamma=0.5)


def test_ragged_batch_is_refused():
    model, batch = setting()
    with pytest.raises(ValueError, match="leading dimension"):
        sam_gradient(cross_entropy, model, (batch[0], batch[1][:3]), rho=0.1, m=2)
