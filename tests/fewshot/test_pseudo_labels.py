"""Soft labels by the number of the sample, their file, and the numbers themselves."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from outlast.data import Indexed
from outlast.errors import DamagedFileError, OutlastWarning
from outlast.fewshot import PseudoLabels, pseudo_label


def teacher(seed=0, norm=False):
    torch.manual_seed(seed)
    layers = [nn.Linear(4, 6), *([nn.BatchNorm1d(6)] if norm else []), nn.Tanh(), nn.Dropout(0.5), nn.Linear(6, 3)]
    return nn.Sequential(*layers)


def inputs(count=20, seed=1):
    return torch.randn(count, 4, generator=torch.Generator().manual_seed(seed))


def test_labels_follow_the_sample_under_any_shuffle():
    data = Indexed(TensorDataset(inputs()), ids=range(100, 120))
    model = teacher(norm=True)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = pseudo_label(model, DataLoader(data, 7))
    shuffled = pseudo_label(model, DataLoader(data, 3, shuffle=True, generator=torch.Generator().manual_seed(5)))
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    numbers = torch.tensor([119, 100, 107, 107])
    torch.testing.assert_close(found.lookup(numbers), shuffled.lookup(numbers), rtol=0, atol=1e-7)
    expected = model.eval()(inputs()).softmax(1)
    torch.testing.assert_close(found.lookup(list(range(100, 120))), expected.detach(), rtol=0, atol=1e-6)
    assert (found.probs.sum(1) - 1).abs().max() < 1e-6
    again = PseudoLabels(found.probs.flip(0), found.ids.flip(0), found.teacher_digest)
    assert again.digest == found.digest
    assert found.teacher_digest != pseudo_label(teacher(1), DataLoader(data, 7)).teacher_digest


def test_ids_can_be_given_beside_the_loader():
    loader = DataLoader(TensorDataset(inputs()), 8)
    found = pseudo_label(teacher(), loader, ids=torch.arange(20) * 2)
    assert found.ids.tolist() == list(range(0, 40, 2))
    bare = pseudo_label(teacher(), list(inputs().split(8)), ids=range(20))
    torch.testing.assert_close(bare.probs, found.probs)
    with pytest.raises(ValueError, match="ids are 3 numbers, the loader gives 20"):
        pseudo_label(teacher(), loader, ids=[1, 2, 3])
    with pytest.raises(ValueError, match="Indexed"):
        pseudo_label(teacher(), list(inputs().split(8)))
    with pytest.raises(ValueError, match="no batches"):
        pseudo_label(teacher(), [])
    with pytest.raises(ValueError, match=r"sample 3 .* not finite"):
        pseudo_label(teacher(), [(torch.cat([inputs(3), torch.full((1, 4), torch.nan)]), torch.arange(4))])


def test_temperature_and_the_authors_offset():
    loader = DataLoader(Indexed(TensorDataset(inputs())), 8)
    model = teacher().eval()
    sharp = pseudo_label(model, loader, temperature=0.25)
    torch.testing.assert_close(sharp.probs, (model(inputs()) * 4).softmax(1).detach(), rtol=0, atol=1e-6)
    official = pseudo_label(model, loader, official_eps=1e-6)
    torch.testing.assert_close(official.probs.double().sum(1), torch.full((20,), 1 + 3e-6, dtype=torch.float64), rtol=0, atol=3e-7)
    wide = nn.Linear(4, 1000)
    rows = pseudo_label(wide, loader, official_eps=1e-6).probs.double().sum(1)
    torch.testing.assert_close(rows, torch.full((20,), 1.001, dtype=torch.float64), rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="temperature"):
        pseudo_label(model, loader, temperature=0.0)


def test_half_precision_rows_are_brought_back_to_one():
    probs = torch.randn(50, 300, generator=torch.Generator().manual_seed(0)).softmax(1)
    found = PseudoLabels(probs.half(), torch.arange(50))
    assert found.probs.dtype == torch.float16
    assert (found.lookup(torch.arange(50)).sum(1) - 1).abs().max() < 1e-6
    torch.testing.assert_close(found.lookup(torch.arange(50)), probs, rtol=2e-3, atol=1e-6)


def test_summary_says_what_the_teacher_says():
    def labels(probs):
        return PseudoLabels(probs, torch.arange(len(probs)))

    hard = labels(torch.eye(4).repeat(5, 1)).summary()
    assert hard.used_classes == pytest.approx(4.0)
    assert hard.entropy == 0.0
    assert hard.modal_share == 0.25
    assert "hard labels" in hard.problems[0]
    collapsed = labels(torch.tensor([[0.9, 0.05, 0.05]]).repeat(10, 1)).summary()
    assert "collapsed" in collapsed.problems[0]
    assert collapsed.modal_share == 1.0
    silent = labels(torch.full((10, 3), 1 / 3)).summary()
    assert "no signal" in silent.problems[0]
    fine = labels(torch.cat([torch.eye(3) * 0.7 + 0.1] * 4)).summary()
    assert fine.problems == ()
    silent_teacher = teacher()
    nn.init.zeros_(silent_teacher[-1].weight)
    nn.init.zeros_(silent_teacher[-1].bias)
    with pytest.warns(OutlastWarning, match="no signal"):
        pseudo_label(silent_teacher, DataLoader(Indexed(TensorDataset(inputs())), 8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_file_round_trip_and_damage(tmp_path, dtype):
    found = PseudoLabels(torch.randn(9, 4).softmax(1).to(dtype), torch.randperm(9) + 5, "ab")
    path = tmp_path / "labels.npz"
    found.save(path)
    again = PseudoLabels.load(path)
    assert torch.equal(again.probs, found.probs)
    assert again.probs.dtype == dtype
    assert torch.equal(again.ids, found.ids)
    assert again.teacher_digest == "ab"
    with np.load(path, allow_pickle=False) as data:
        content = {name: data[name] for name in data.files}
    content["ids"] = content["ids"][::-1]
    np.savez(path, **content)
    with pytest.raises(DamagedFileError, match="digest"):
        PseudoLabels.load(path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(DamagedFileError, match="read whole"):
        PseudoLabels.load(path)


def test_wrong_labels_are_refused():
    rows = torch.full((3, 2), 0.5)
    with pytest.raises(ValueError, match="id 7 is given more than once"):
        PseudoLabels(rows, torch.tensor([7, 1, 7]))
    with pytest.raises(ValueError, match="row 2 of probs"):
        PseudoLabels(torch.tensor([[0.5, 0.5], [0.5, 0.5], [0.6, 0.5]]), torch.arange(3))
    with pytest.raises(ValueError, match=r"\(3, 2\) and \(4,\)"):
        PseudoLabels(rows, torch.arange(4))
    with pytest.raises(ValueError, match="probs and ids have no rows"):
        PseudoLabels(torch.zeros(0, 2), torch.zeros(0, dtype=torch.int64))
    with pytest.raises(TypeError, match="integers"):
        PseudoLabels(rows, torch.rand(3))
    with pytest.raises(TypeError, match="float16, float32"):
        PseudoLabels(torch.ones(3, 1, dtype=torch.int64), torch.arange(3))
    with pytest.raises(ValueError, match="id 9"):
        PseudoLabels(rows, torch.arange(3)).lookup([0, 9])
    for ids in ([0.9, 1.2], [[0, 1]], 1):
        with pytest.raises(ValueError, match="ids must be integers of shape"):
            PseudoLabels(rows, torch.arange(3)).lookup(ids)
    with pytest.raises(ValueError, match="the loader shuffles"):
        pseudo_label(teacher(), DataLoader(TensorDataset(inputs()), 8, shuffle=True), ids=range(20))
    with pytest.raises(TypeError, match="bfloat16 is too coarse"):
        PseudoLabels(rows.bfloat16(), torch.arange(3))


def test_results_print_and_serialise():
    found = PseudoLabels(torch.full((3, 2), 0.5), torch.arange(3))
    assert "3 samples, 2 classes" in repr(found)
    assert found.summary().to_dict()["kind"] == "PseudoLabelSummary"
    pytest.importorskip("matplotlib").use("Agg")
    assert found.plot().get_ylabel() == "mean probability"
