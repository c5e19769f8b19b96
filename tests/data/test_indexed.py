"""Data sets whose items carry their number."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from outlast.data import Indexed


def test_items_end_in_their_number():
    rows, labels = torch.arange(6.0)[:, None], torch.arange(6) * 10
    pairs = Indexed(TensorDataset(rows, labels))
    assert [int(part) for part in pairs[2]] == [2, 20, 2]
    assert int(pairs[-1][2]) == 5
    plain = Indexed(list("abc"), ids=[7, 8, 9])
    assert plain[1] == ("b", 8)
    assert plain[-1] == ("c", 9)
    x, y, number = next(iter(DataLoader(pairs, 6, shuffle=True)))
    assert torch.equal(x[:, 0].long(), number)
    assert torch.equal(y, number * 10)


def test_wrong_numbers_are_refused():
    with pytest.raises(ValueError, match="each of the 3 samples"):
        Indexed("abc", ids=[1, 2])
    with pytest.raises(ValueError, match="id 4 is given"):
        Indexed("abc", ids=[4, 1, 4])
    with pytest.raises(TypeError, match="integers"):
        Indexed("abc", ids=[0.5, 1.0, 2.0])
    with pytest.raises(TypeError, match="map-style"):
        Indexed(iter("abc"))
