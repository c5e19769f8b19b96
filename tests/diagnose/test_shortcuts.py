from __future__ import annotations

import json
import math

import pytest
import torch
from helpers import drawn, rng
from torch import nn

from outlast.diagnose.shortcuts import average_precision, shift_report, shortcut_probe


def pictures(n=300, *, biased=True):
    """Noise whose colour says the class, or says nothing."""
    y = torch.arange(n) % 3
    x = 0.3 * torch.rand(n, 3, 8, 8, generator=rng())
    channel = y if biased else torch.randint(0, 3, (n,), generator=rng(1))
    x[torch.arange(n), channel] += 0.3
    return x, y


def test_probe_finds_what_poor_views_predict():
    found, none = (shortcut_probe(*pictures(biased=biased), steps=200) for biased in (True, False))
    assert found.accuracy["channel_statistics"] > 0.95
    assert none.accuracy["channel_statistics"] < 0.5
    assert set(found.accuracy) == {"channel_statistics", "thumbnail", "border", "frequency"}
    assert found.chance == pytest.approx(1 / 3)
    assert shortcut_probe(*pictures(), steps=20).accuracy == shortcut_probe(*pictures(), steps=20).accuracy
    assert json.dumps(found.to_dict())


def test_own_views():
    x, y = pictures(biased=False)
    found = shortcut_probe(x, y, views={"scanner": y.float()[:, None], "corner": lambda x: x[:, :, 0, 0]}, steps=200)
    assert found.accuracy["scanner"] > 0.95
    assert found.accuracy["corner"] < 0.6
    assert list(shortcut_probe(torch.rand(60, 5), y[:60], views={"row": lambda x: x[:, :1]}, steps=5).accuracy) == ["row"]


class Lookup(nn.Module):
    def forward(self, x):
        return x


def test_report_of_shifts():
    y = torch.tensor([0, 1, 2, 0])
    right, wrong = torch.eye(3)[y] * 5, torch.eye(3)[(y + 1) % 3] * 5
    foreign = [torch.full((6, 3), 0.1)]
    found = shift_report(Lookup(), {"in": [(right, y)], "shifted": [(wrong[:2], y[:2]), (right[2:], y[2:])]}, foreign)
    assert found.accuracy == {"in": 1.0, "shifted": 0.5}
    assert found.drop == {"in": 0.0, "shifted": 0.5}
    assert found.anomaly_ap == {"in": 1.0, "shifted": 1.0}
    assert found.anomaly_chance["in"] == pytest.approx(0.6)
    assert found.n == {"in": 4, "shifted": 4}
    assert shift_report(Lookup(), {"in": [(right, y)]}).anomaly_ap == {}


@pytest.mark.parametrize("ties", [False, True])
def test_average_precision_is_that_of_scikit_learn(ties):
    metrics = pytest.importorskip("sklearn.metrics")
    scores = torch.rand(200, generator=rng())
    scores = (scores * 10).round() if ties else scores
    positive = torch.rand(200, generator=rng(1)) < 0.3
    assert average_precision(scores, positive) == pytest.approx(metrics.average_precision_score(positive.numpy(), scores.numpy()))


def test_bad_input():
    x, y = pictures(60)
    for call, error, text in (
        (lambda: shortcut_probe(x[:10], y[:10]), ValueError, "at least 30"),
        (lambda: shortcut_probe(x, y[:50]), ValueError, "one label"),
        (lambda: shortcut_probe(x, y.float()), TypeError, "integers"),
        (lambda: shortcut_probe(x, y, views=("smell",)), ValueError, "unknown view"),
        (lambda: shortcut_probe(x.flatten(1), y), ValueError, "needs images"),
        (lambda: shortcut_probe(x, y, views={"a": torch.zeros(3)}), ValueError, "a row for each"),
        (lambda: shortcut_probe(x, y, views={"a": torch.full((60,), math.nan)}), ValueError, "not finite"),
        (lambda: shortcut_probe(x, y, views={}), ValueError, "views is empty"),
        (lambda: shift_report(Lookup(), {}), ValueError, "datasets is empty"),
        (lambda: shift_report(Lookup(), {"in": []}), ValueError, "'in' is empty"),
        (lambda: shift_report(Lookup(), {"in": [x]}), ValueError, "batches of 'in'"),
        (lambda: shift_report(Lookup(), {"in": [(torch.eye(3), torch.arange(3))]}, []), ValueError, "anomalies is empty"),
    ):
        with pytest.raises(error, match=text):
            call()


def test_pictures():
    pytest.importorskip("matplotlib")
    assert drawn(shortcut_probe(*pictures(60), steps=2))
    assert drawn(shift_report(Lookup(), {"in": [(torch.eye(3), torch.arange(3))]}))


def test_anomalies_of_a_stream_and_inference_mode():
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            yield from torch.full((6, 3), 0.1)

    loader = torch.utils.data.DataLoader(Stream(), 2)
    assert shift_report(Lookup(), {"in": [(torch.eye(3) * 5, torch.arange(3))]}, loader).anomaly_ap == {"in": 1.0}
    x, y = pictures(60)
    expected = shortcut_probe(x, y, steps=3).accuracy
    with torch.inference_mode():
        assert shortcut_probe(x * 1.0, y, steps=3).accuracy == expected
