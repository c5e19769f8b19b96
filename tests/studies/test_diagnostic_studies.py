"""The studies of padding and of sample efficiency at toy size."""

from __future__ import annotations

import math
from dataclasses import asdict

import pytest
import torch
from helpers import rng
from torch import nn

from outlast.diagnose import padding as audit_of
from outlast.diagnose.equivariance import equivariance_test, train_with
from outlast.studies import padding
from outlast.studies import sample_efficiency as efficiency
from outlast.studies._context import Context
from outlast.studies._grid import Launch
from outlast.studies._models import Square, circular_conv, gaussian_dense
from outlast.studies._results import Results

LIGHTS = padding.Lights(
    dataset="fashion-mnist", variant="small", widths=(2,) * 7, train_size=32, epochs=1, batch_size=16, backgrounds=1, stride=20
)


def context(seed=0):
    return Context(seed, asdict(Launch("cpu")), lambda *_: None)


def names(part):
    return {metric.name for metric in part.metrics}


# ---- padding ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arm", [arm.name for arm in padding.STUDY.parts[0].arms])
def test_cells_of_blind_spots_repeat(arm):
    part = padding.STUDY.parts[0]
    config = LIGHTS.model_copy(update=dict(part.arm(arm).changes))
    found = padding.cell(config, 0, context())
    again = padding.cell(config, 0, context())
    assert found.metrics == again.metrics
    assert found.series == again.series
    assert set(found.metrics) == names(part)
    assert len(found.series["recall"]) == len(found.series["rows"]) * len(found.series["columns"])


def test_sizes_of_the_detector_lean_as_the_claims_say():
    """Three strided layers that pad: at 64 each leans by one of its pixels, at 65 none does."""
    for size, lean in ((64, -7.0), (65, 0.0)):
        model = padding.detector(3, (4,) * 7, "zeros")
        report = audit_of.audit(model, (3, size, size))
        assert report.grid_skew_px == (lean, lean)
        assert model(torch.zeros(1, 3, size, size)).shape == (1, 2, -(-size // 8), -(-size // 8))


def test_scenes_hold_a_light_where_their_map_says():
    config = LIGHTS.model_copy(update={"size": 65})
    scenes = padding._Scenes(config, rng(0))
    pictures = torch.zeros(200, 1, 28, 28, dtype=torch.uint8)
    images, maps = scenes.batch(pictures, torch.zeros(200))
    assert images.shape == (200, 1, 65, 65)
    assert maps.shape == (200, 2, 9, 9)
    counts = maps.sum((1, 2, 3))
    assert set(counts.tolist()) == {0.0, 1.0}
    assert float((counts == 0.0).double().mean()) == pytest.approx(1 / 3, abs=0.1)  # distractors
    for image, target in zip(images, maps, strict=True):
        lit = (image[0] > 0.9).nonzero()
        if target.sum() == 0.0 or not len(lit):
            continue
        top, left = lit.min(0).values.tolist()
        channel, row, column = target.nonzero()[0].tolist()
        y = top + 1 + (3 if channel == 0 else -3)  # the middle of the body, from the lamp's first row
        assert abs(8 * row - y) <= 4
        assert abs(8 * column - (left + 1)) <= 4
        assert left - 1 >= 12
        assert left + 4 <= 65 - 12


def test_lights_differ_in_their_lamp_only():
    top, middle, bottom = (padding.light(lamp) for lamp in range(3))
    assert torch.equal(top.flip(1), bottom)
    assert torch.equal(middle.flip(1), middle)
    assert top.shape == (1, 9, 5)
    assert float(top[0, 1, 2]) == 1.0


def test_claims_of_padding_read_what_they_say():
    def record(setting, arm, seed, **metrics):
        values = dict.fromkeys(names(padding.STUDY.parts[0]), 100.0) | metrics
        return {"setting": setting, "arm": arm, "seed": seed, "metrics": values, "series": {}}

    cells = [
        record("interior", "64-zeros", 0, right=40.0, bottom=60.0),
        record("interior", "65-symmetric", 0, right=95.0, centre=98.0),
        record("anywhere", "64-zeros", 0, top=96.0),
    ]
    results = Results(cells, ("interior", "anywhere"), ("64-zeros", "65-symmetric"), (0,))
    found = {claim.name: claim.measure(results, 0) for claim in padding.STUDY.parts[0].claims}
    assert found == {"blind-right": 40.0, "blind-bottom": 60.0, "cured": 95.0, "difference": 55.0, "centre": 98.0, "covered": 96.0}


# ---- sample efficiency ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["dense", "conv"])
def test_cells_of_sample_efficiency_repeat(model):
    cases = [
        (
            "dimension",
            efficiency.dimension_cell,
            efficiency.Dimension(
                model=model, dims=(4, 8), conv_dims=(8, 32), compared=8, trainings=2, steps=30, conv_steps=60, test_size=200
            ),
        ),
        ("images", efficiency.images_cell, efficiency.Images(model=model, side=4, trainings=1, steps=5, test_size=100)),
        ("texture", efficiency.texture_cell, efficiency.Texture(model=model, dim=40, trainings=2, steps=30, test_size=100)),
        ("equivariance", efficiency.triple_cell, efficiency.Triple(model=model, n=16, steps=10, draws=1)),
    ]
    for part, cell, config in cases:
        found = cell(config, 0, context())
        assert found.metrics == cell(config, 0, context()).metrics, part
        assert set(found.metrics) == names(efficiency.STUDY.part(part))
        assert all(math.isfinite(value) for value in found.metrics.values())


def test_cells_of_extrapolation_repeat():
    config = efficiency.Extrapolation(variant="small", smallest=20, doublings=8, trainings=2, hidden=8, steps=20, batch_size=32)
    found = efficiency.extrapolation_cell(config, 0, context())
    assert found.metrics == efficiency.extrapolation_cell(config, 0, context()).metrics
    assert set(found.metrics) == names(efficiency.STUDY.part("extrapolation"))
    assert found.series["sizes"][-1] == 4 * found.series["sizes"][-3]


def test_curves_that_do_not_cross_give_their_bound():
    config = efficiency.Dimension(dims=(4, 8), compared=8, trainings=2, steps=1, threshold=0.99, test_size=100)
    found = efficiency.dimension_cell(config, 0, context())
    assert found.metrics["needed"] == 4 * 8**2  # the largest number that was measured
    assert found.metrics["exponent"] == pytest.approx(2.0)


@pytest.mark.parametrize("arm", [arm.name for arm in efficiency.STUDY.part("equivariance").arms])
def test_every_way_of_training_runs(arm):
    config = efficiency.Triple(n=16, steps=4, draws=1, **efficiency.STUDY.part("equivariance").arm(arm).changes)
    found = efficiency.triple_cell(config, 0, context()).metrics
    assert found["permutation"] < -10.0 or arm == "conv"


def test_the_dense_network_is_what_the_theorem_is_about():
    x = torch.randn(20, 8, generator=rng(0))
    y = (x[:, 0] > 0.0).long()
    train = train_with(lambda p: torch.optim.SGD(p, lr=0.1), loss=efficiency._logistic, steps=20)
    found = equivariance_test(lambda: gaussian_dense(8, 8, Square()), train, x, y, generator=rng(0))
    assert found["orthogonal"].verdict == "equivariant"
    assert found.initialisation.law == "orthogonal"
    conv = equivariance_test(lambda: circular_conv(8, 4, nn.ReLU()), train, x, y, groups=("shift",), generator=rng(0))
    assert conv["shift"].verdict == "equivariant"


def test_the_convolution_can_compute_the_halves():
    """Some weights solve the task: a delta kernel, squared, summed over halves."""
    model = circular_conv(16, 1, Square(), blocks=2, divisor=4.0)
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([[[0.0, 1.0, 0.0]]]))
        model[1].bias.zero_()
        model[4].weight.copy_(torch.tensor([[1.0, -1.0]]))
        model[4].bias.zero_()
    from outlast.diagnose.sample_efficiency import quadratic_halves

    x, y = quadratic_halves(16).sample(500, rng(0))
    assert bool(((model(x)[:, 0] > 0.0) == (y == 1)).all())
