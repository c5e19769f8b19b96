"""The student and the whole procedure of STARTUP on small vectors."""

from __future__ import annotations

import copy
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset, WeightedRandomSampler

from outlast.adapt import recalibrate_batchnorm
from outlast.data import Indexed
from outlast.errors import DamagedFileError, DivergedError, OutlastWarning, UnsupportedError
from outlast.fewshot import (
    ProjectionHead,
    PseudoLabels,
    StartupLoss,
    StartupStudent,
    TwoViews,
    adapt_representation,
    nt_xent,
    pseudo_label,
)
from outlast.fewshot._adaptation import best_rate
from outlast.fewshot._student import feature_width, split_classifier


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def teacher(seed=0, norm=True, dropout=0.0):
    torch.manual_seed(seed)
    layers = [nn.Linear(4, 8), *([nn.BatchNorm1d(8)] if norm else []), nn.Tanh(), *([nn.Dropout(dropout)] if dropout else [])]
    return nn.Sequential(*layers, nn.Linear(8, 3))


def loaders(source=40, target=33, batch=8):
    x = torch.randn(source, 4, generator=rng(1))
    y = (x[:, 0] > 0).long() + (x[:, 1] > 0).long()
    u = 0.5 + 1.5 * torch.randn(target, 4, generator=rng(2))
    return DataLoader(TensorDataset(x, y), batch), DataLoader(Indexed(TensorDataset(u)), batch)


def jitter(x):
    return x + 0.1 * torch.randn(x.shape)


VIEWS = TwoViews(jitter, batch_ndim=2)


def adapt(model=None, **settings):
    source, target = loaders()
    settings = {"epochs": 3, "lr": 0.05, "views": VIEWS, **settings}
    return adapt_representation(teacher() if model is None else model, source, target, **settings)


def state(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def test_student_starts_as_the_paper_says():
    backbone, head = split_classifier(teacher())
    student = StartupStudent.from_teacher(backbone, 3)
    assert equal(state(student.backbone), state(backbone))
    assert student.head.weight.shape == (3, 8)
    assert not torch.equal(student.head.weight, head.weight)
    assert [layer.out_features for layer in student.projector.layers if isinstance(layer, nn.Linear)] == [8, 128]
    assert StartupStudent.from_teacher(backbone, 3, projection_dim=None).projector is None
    assert torch.equal(StartupStudent.from_teacher(backbone, 3, copy_head=head).head.weight, head.weight)
    torch.manual_seed(5)
    assert not torch.equal(StartupStudent.from_teacher(backbone, 3, copy_backbone=False).backbone[0].weight, backbone[0].weight)
    student.backbone[0].weight.data.zero_()
    assert backbone[0].weight.abs().sum() > 0


def test_a_classifier_is_split_at_its_last_linear_layer():
    model = teacher().eval()
    x = torch.randn(5, 4)
    backbone, head = split_classifier(model)
    assert torch.equal(head(backbone(x)), model(x))

    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone, self.head = nn.Linear(4, 6), nn.Linear(6, 2)

    named = Named()
    backbone, head = split_classifier(named)
    assert torch.equal(backbone.weight, named.backbone.weight)
    assert backbone is not named.backbone
    assert feature_width(nn.Sequential(nn.Conv2d(3, 7, 3), nn.BatchNorm2d(7), nn.ReLU())) == 7
    with pytest.raises(ValueError, match="no linear layer"):
        split_classifier(nn.Sequential(nn.Conv2d(3, 7, 3)))
    with pytest.raises(ValueError, match="feature_dim"):
        feature_width(nn.Sequential(nn.ReLU()))


@pytest.mark.parametrize("policy", ["separate", "joint", "target"])
def test_batchnorm_policies(policy):
    backbone, _ = split_classifier(teacher())
    student = StartupStudent.from_teacher(backbone, 3, batchnorm=policy).train()
    reference = copy.deepcopy(student.backbone)
    source, views = torch.randn(6, 4, generator=rng()), torch.randn(2, 5, 4, generator=rng(1)) * 3
    logits, target, projections = student(source, views)
    assert (logits.shape, target.shape, projections.shape) == ((6, 3), (2, 5, 3), (2, 5, 128))
    if policy == "joint":
        expected = reference(torch.cat([source, *views])).split([6, 5, 5])
    else:
        expected = [reference(part) for part in (source, *views)]
    assert torch.equal(logits, student.head(expected[0]))
    torch.testing.assert_close(target, torch.stack([student.head(part) for part in expected[1:]]))
    assert equal(state(student.backbone), state(reference))  # running statistics too
    assert student(None, views)[0] is None
    assert student(source, [views[0]])[1].shape == (1, 5, 3)
    assert policy in repr(student)


def test_two_views_of_a_sample_and_of_a_batch():
    views = TwoViews(lambda x: x + 1, lambda x: x + 2)
    assert views(1) == (2, 3)
    assert views(torch.zeros(3, 4, 4))[1].shape == (3, 4, 4)
    batch = views(torch.zeros(5, 3, 4, 4))
    assert batch.shape == (2, 5, 3, 4, 4)
    assert batch[1].unique().tolist() == [2.0]
    assert "TwoViews" in repr(views)


def test_the_procedure_gives_an_adapted_backbone_and_leaves_the_teacher_alone():
    model = teacher()
    before = state(model)
    records = []
    found = adapt(model, epochs=5, callbacks=[records.append], controls=True)
    assert equal(state(model), before)
    assert model.training
    assert [record["epoch"] for record in found.history] == [1, 2, 3, 4, 5]
    assert [number for number, record in enumerate(found.history, 1) if "validation" in record] == [1, 2, 4, 5]
    assert records == list(found.history)
    looked = {number: record["validation"] for number, record in enumerate(found.history, 1) if "validation" in record}
    assert found.best_epoch == min(looked, key=looked.get)
    assert found.history[-1]["total"] < found.history[0]["total"]
    assert not found.backbone.training
    assert found.backbone(torch.zeros(2, 4)).shape == (2, 8)
    assert len(found.pseudo_labels) == 33
    expected = pseudo_label(model, loaders()[1])
    assert found.pseudo_labels.digest == expected.digest
    transfer = split_classifier(model)[0].eval()
    assert equal(state(found.controls["transfer"]), state(transfer))
    assert torch.equal(found.controls["batchnorm"][0].weight, transfer[0].weight)
    assert not torch.equal(found.controls["batchnorm"][1].running_mean, transfer[1].running_mean)
    content = json.loads(json.dumps(found.to_dict()))
    assert content["kind"] == "AdaptationResult"
    assert content["controls"] == ["batchnorm", "transfer"]
    assert "5 epochs" in repr(found)


def test_repeatable_and_the_users_generators_are_left_alone():
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    one = adapt(teacher(dropout=0.3).eval())
    torch.manual_seed(9)
    two = adapt(teacher(dropout=0.3).eval())
    assert equal(state(one.student), state(two.student))
    model = teacher()
    torch.manual_seed(7)
    adapt(model)
    assert torch.equal(torch.rand(3), expected)
    assert not equal(state(one.student), state(adapt(teacher(dropout=0.3).eval(), seed=1).student))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"scheduler": "cosine"},
        {"teacher_update": "ema", "ema_momentum": 0.9},
        {"lr": [0.05, 0.01], "batchnorm": "target"},
        {"scheduler": lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5), "optimizer": torch.optim.AdamW},
    ],
    ids=["plain", "cosine", "ema", "rates", "own"],
)
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, settings):
    expected = adapt(epochs=4, **settings)

    class Stop(Exception):
        pass

    def stop(record):
        if record["epoch"] == 2:
            raise Stop

    with pytest.raises(Stop):
        adapt(epochs=4, checkpoint_dir=tmp_path, callbacks=[stop], **settings)
    found = adapt(epochs=4, checkpoint_dir=tmp_path, **settings)
    assert equal(state(found.student), state(expected.student))
    assert found.history == expected.history
    assert found.rates == expected.rates
    again = adapt(epochs=4, checkpoint_dir=tmp_path, **settings)  # finished: nothing is trained
    assert equal(state(again.student), state(expected.student))


def test_a_checkpoint_of_something_else_is_refused(tmp_path):
    model = teacher()
    _, target = loaders()
    adapt(model, checkpoint_dir=tmp_path, epochs=1)
    found = pseudo_label(model, target)
    other = PseudoLabels(found.probs.flip(0), found.ids)
    with pytest.raises(ValueError, match=other.digest) as caught:
        adapt(model, checkpoint_dir=tmp_path, pseudo_labels=other)
    assert found.digest in str(caught.value)
    with pytest.raises(ValueError, match="seed was 0, it is 1"):
        adapt(model, checkpoint_dir=tmp_path, seed=1)
    (tmp_path / "adaptation.pt").write_bytes(b"PK")
    with pytest.raises(DamagedFileError, match="start anew"):
        adapt(model, checkpoint_dir=tmp_path)


def test_source_weight_alone_is_source_training():
    """Against a loop by hand over the same batches, step by step."""
    source, target = loaders()
    model = teacher(norm=False)
    batches = []

    def keep(x):
        batches.append(x.clone())
        return x

    found = adapt_representation(
        model,
        source,
        target,
        epochs=2,
        loss=StartupLoss(weights=(1, 0, 0)),
        views=VIEWS,
        augment=keep,
        lr=0.1,
        scheduler=None,
        validation=None,
    )
    from outlast.fewshot._adaptation import _seeded

    backbone, head = split_classifier(model)
    with _seeded(0, "student", torch.device("cpu")):
        student = StartupStudent.from_teacher(backbone, 3, head.in_features, None)
    plain = nn.Sequential(student.backbone, student.head)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    x, y = source.dataset.tensors
    for batch in batches:
        labels = torch.stack([y[(x == row).all(1)][0] for row in batch])
        optimizer.zero_grad()
        F.cross_entropy(plain(batch), labels).backward()
        optimizer.step()
    assert len(batches) == 2 * 4  # 33 samples are 4 batches of 8 and one sample, which is left out
    for one, other in zip(plain.parameters(), (*found.student.backbone.parameters(), *found.student.head.parameters()), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


def test_contrast_alone_is_simclr_without_a_source():
    _, target = loaders()
    model = teacher(norm=False)
    pairs = []

    def views(x):
        pairs.append((jitter(x), jitter(x)))
        return pairs[-1]

    found = adapt_representation(
        model, None, target, epochs=2, loss=StartupLoss(0.5, weights=(0, 0, 1)), views=views, lr=0.1, scheduler=None, validation=None
    )
    from outlast.fewshot._adaptation import _seeded

    backbone, head = split_classifier(model)
    with _seeded(0, "student", torch.device("cpu")):
        student = StartupStudent.from_teacher(backbone, 3, head.in_features)
    parameters = [*student.backbone.parameters(), *student.projector.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=1e-4)
    for one, two in pairs:
        optimizer.zero_grad()
        nt_xent(*(student.projector(student.backbone(view)) for view in (one, two)), temperature=0.5).backward()
        optimizer.step()
    for one, other in zip(parameters, (*found.student.backbone.parameters(), *found.student.projector.parameters()), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)
    assert found.student.head.weight.grad is None


def test_no_ss_draws_one_view_and_has_no_projector():
    drawn = []

    def once(x):
        drawn.append(len(x))
        return x

    found = adapt(loss=StartupLoss(weights=(1, 1, 0)), views=TwoViews(once, lambda x: 1 / 0, batch_ndim=2), epochs=2)
    assert found.student.projector is None
    assert all(record["contrast"] == 0.0 for record in found.history)
    assert drawn


def test_views_made_in_the_data_set():
    _, plain = loaders()
    model = teacher()
    labels = pseudo_label(model, plain)
    u = plain.dataset.dataset.tensors[0]
    paired = DataLoader(Indexed([(TwoViews(jitter, batch_ndim=9)(row),) for row in u]), 8)
    source, _ = loaders()
    found = adapt_representation(model, source, paired, epochs=2, lr=0.05, pseudo_labels=labels)
    assert math.isfinite(found.history[-1]["validation"])
    with pytest.raises(ValueError, match="give pseudo_labels="):
        adapt_representation(model, source, paired, epochs=2, lr=0.05)
    with pytest.raises(ValueError, match="views="):
        adapt_representation(model, source, paired, epochs=2, lr=0.05, pseudo_labels=labels, teacher_update="ema")


def test_target_policy_ends_with_target_statistics():
    found = adapt(batchnorm="target", validation=None)
    expected = copy.deepcopy(found.backbone)
    u = loaders()[1].dataset.dataset.tensors[0]
    recalibrate_batchnorm(expected, u.split(8)[:4])
    torch.testing.assert_close(found.backbone[1].running_mean, expected[1].running_mean)
    assert found.best_epoch == 3


def test_micro_batches_give_the_same_student_without_batchnorm():
    model = teacher(norm=False).double()
    data = [loader.dataset for loader in loaders()]
    x, y = data[0].tensors
    u = data[1].dataset.tensors[0]
    source, target = DataLoader(TensorDataset(x.double(), y), 8), DataLoader(Indexed(TensorDataset(u.double())), 8)
    found = [
        adapt_representation(
            model, source, target, epochs=2, lr=0.05, views=TwoViews(lambda v: v * 1.5, lambda v: v + 0.3, batch_ndim=2), micro_batch=size
        )
        for size in (None, 3)
    ]
    for one, other in zip(found[0].student.parameters(), found[1].student.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10)


def test_rates_that_diverge_are_never_chosen():
    assert best_rate({0.1: 1.0, 0.05: 0.5, 0.03: math.nan, 0.01: 2.0}) == 0.05
    assert best_rate({0.1: math.nan, 0.05: math.inf, 0.01: 2.0}) == 0.01
    with pytest.raises(DivergedError, match=r"0\.1: nan, 0\.05: inf"):
        best_rate({0.1: math.nan, 0.05: math.inf})
    found = adapt(lr=[1e30, 0.05])
    assert found.lr == 0.05
    assert not math.isfinite(found.rates[1e30]) or found.rates[1e30] > found.rates[0.05]
    assert math.isfinite(found.rates[0.05])
    with pytest.raises(DivergedError):
        adapt(lr=1e30, epochs=5)


def test_auto_tries_the_papers_rates():
    found = adapt(lr="auto", epochs=1)
    assert list(found.rates) == [0.1, 0.05, 0.03, 0.01, 0.005, 0.003, 0.001]
    assert found.lr == min(found.rates, key=found.rates.get)


def test_the_momentum_teacher_changes_the_labels_of_training():
    frozen, moving = adapt(), adapt(teacher_update="ema")
    assert not equal(state(frozen.student), state(moving.student))
    still = adapt(teacher_update="ema", ema_momentum=1.0, epochs=1)
    assert math.isfinite(still.history[0]["distill"])


class Stream(IterableDataset):
    def __iter__(self):
        return iter(())


def test_wrong_loaders_and_arguments_are_refused():
    source, target = loaders()
    model = teacher()

    def run(s=source, t=target, **settings):
        settings = {"epochs": 1, "lr": 0.05, "views": VIEWS, **settings}
        return adapt_representation(settings.pop("model", model), s, t, **settings)

    short = DataLoader(target.dataset, 32, drop_last=True)
    with pytest.raises(ValueError, match=r"target loader yields no batch: 30 training samples .3 held out"):
        run(t=short)
    with pytest.raises(ValueError, match="source_loader"):
        run(s=None)
    with pytest.raises(ValueError, match="source loader is empty"):
        run(s=DataLoader(TensorDataset(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)), 8))
    with pytest.raises(ValueError, match="nothing to train"):
        run(model=teacher().requires_grad_(False))
    with pytest.raises(TypeError, match="DataLoader"):
        run(t=[1, 2])
    with pytest.raises(UnsupportedError, match="map-style"):
        run(t=DataLoader(Stream(), 4))
    with pytest.raises(UnsupportedError, match="sampler"):
        run(s=DataLoader(source.dataset, 4, sampler=WeightedRandomSampler([1.0] * 40, 40)))
    with pytest.raises(ValueError, match="validation="):
        run(validation=None, lr="auto")
    with pytest.raises(ValueError, match=r"\[0, 3\)"):
        run(s=DataLoader(TensorDataset(torch.zeros(8, 4), torch.full((8,), 5)), 4))
    with pytest.raises(ValueError, match="no pseudo-label of the sample"):
        run(pseudo_labels=PseudoLabels(torch.full((33, 3), 1 / 3), torch.arange(100, 133)))
    with pytest.raises(ValueError, match="pseudo_labels have 2 classes, the teacher 3"):
        run(pseudo_labels=PseudoLabels(torch.full((33, 2), 0.5), torch.arange(33)), s=source)
    for settings, text in (
        ({"epochs": 0}, "epochs"),
        ({"scheduler": "linear"}, "scheduler"),
        ({"teacher_update": "hard"}, "teacher_update"),
        ({"lr": "best"}, "lr"),
        ({"lr": 0.0}, "lr"),
        ({"lr": []}, "empty"),
        ({"batchnorm": "all"}, "batchnorm"),
        ({"validation": (0.99, 0.1)}, "validation"),
    ):
        with pytest.raises(ValueError, match=text):
            run(**settings)


def test_projection_head_has_no_normalisation():
    head = ProjectionHead(6, 4, 5)
    assert [type(layer) for layer in head.layers] == [nn.Linear, nn.ReLU, nn.Linear]
    assert head(torch.zeros(2, 3, 6)).shape == (2, 3, 4)


def test_fabric_gives_what_the_plain_loop_gives():
    fabric_module = pytest.importorskip("lightning_fabric")
    expected = adapt()
    fabric = fabric_module.Fabric(accelerator="cpu", devices=1)
    fabric.launch()
    found = adapt(fabric=fabric)
    assert equal(state(found.student), state(expected.student))
    assert found.history == expected.history


def test_terms_without_weight_leave_the_statistics_alone():
    source, target = loaders()
    model = teacher()
    settings = {"epochs": 2, "lr": 0.05, "views": TwoViews(lambda x: 2 * x, batch_ndim=2), "validation": None}
    with_source, without = (
        adapt_representation(model, first, target, loss=StartupLoss(weights=(0, 0, 1)), **settings) for first in (source, None)
    )
    assert equal(state(with_source.backbone), state(without.backbone))
    alone = adapt_representation(model, source, target, loss=StartupLoss(weights=(1, 0, 0)), **settings)
    assert int(alone.backbone[1].num_batches_tracked) == 2 * 4
    logits, none, nothing = alone.student(torch.zeros(3, 4), ())
    assert logits.shape == (3, 3)
    assert none is nothing is None


def test_numbers_that_are_no_sample_numbers_are_refused():
    source, target = loaders()
    model = teacher()
    u = target.dataset.dataset.tensors[0]
    labels = pseudo_label(model, DataLoader(TensorDataset(u), 8), ids=range(33))

    def run(dataset, **settings):
        settings = {"epochs": 1, "lr": 0.05, "views": VIEWS, "pseudo_labels": labels, **settings}
        return adapt_representation(model, source, DataLoader(dataset, 8), **settings)

    with pytest.raises(ValueError, match="comes twice in one pass"):
        run(TensorDataset(u, torch.arange(33) % 5))
    with pytest.raises(ValueError, match="integer number of each sample"):
        run(TensorDataset(u))
    with pytest.raises(ValueError, match="integer number of each sample"):
        run(TensorDataset(u, torch.rand(33)))
    with pytest.raises(ValueError, match="pseudo_labels are of 33 samples, the target data have 66"):
        run(torch.utils.data.ConcatDataset([Indexed(TensorDataset(u))] * 2))
    with pytest.raises(ValueError, match="here the first entry is one tensor"):
        run(Indexed([(row, row) for row in u]), views=None)
    with pytest.warns(OutlastWarning, match="another teacher"):
        adapt_representation(teacher(3), source, target, epochs=1, lr=0.05, views=VIEWS, pseudo_labels=labels)


class HeadFirst(nn.Module):
    def __init__(self):
        super().__init__()
        self.head, self.backbone = nn.Linear(8, 3), nn.Sequential(nn.Linear(4, 8), nn.Tanh())

    def forward(self, x):
        return self.head(self.backbone(x))


def test_labels_of_this_teacher_are_known_as_such_whatever_the_order_of_its_layers():
    source, target = loaders()
    torch.manual_seed(0)
    model = HeadFirst()
    labels = pseudo_label(model, target)
    found = adapt_representation(model, source, target, epochs=1, lr=0.05, views=VIEWS, pseudo_labels=labels)  # no warning
    assert found.pseudo_labels is labels


class Neck(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone, self.neck, self.head = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.neck(self.backbone(x)).relu())


@pytest.mark.parametrize("model", [Neck(), nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3), nn.LogSoftmax(1))])
def test_a_teacher_that_is_not_backbone_and_head_is_refused(model):
    with pytest.raises(ValueError, match=r"give it as \(backbone, head\)"):
        adapt(model)


def test_validation_must_hold_something_out():
    for shares in ((0.0, 0.0), (0.05, 0.0), (0.0, 0.1)):
        with pytest.raises(ValueError, match="validation=None"):
            adapt(validation=shares)
    with pytest.raises(TypeError, match="pair of shares"):
        adapt(validation=0.1)
    assert adapt(loss=StartupLoss(weights=(0, 1, 1)), validation=(0.0, 0.1)).best_epoch > 0


def test_the_momentum_teacher_survives_a_rate_that_diverges():
    found = adapt(teacher_update="ema", lr=[1e30, 0.05])
    assert found.lr == 0.05
    assert math.isnan(found.rates[1e30])
    with pytest.raises(DivergedError):
        adapt(teacher_update="ema", lr=1e30)


def test_checkpoints_take_numpy_numbers_and_refuse_other_settings(tmp_path):
    adapt(lr=np.float64(0.05), seed=np.int64(3), epochs=2, checkpoint_dir=tmp_path)
    found = adapt(lr=0.05, seed=3, epochs=3, checkpoint_dir=tmp_path)
    assert len(found.history) == 3
    for settings, text in (
        ({"epochs": 2}, "3 epochs already"),
        ({"epochs": 3, "optimizer": torch.optim.AdamW}, "optimizer was 'SGD'"),
        ({"epochs": 3, "micro_batch": 4}, "micro_batch"),
        ({"epochs": 3, "projection_dim": 16}, "projection_dim"),
    ):
        with pytest.raises(ValueError, match=text):
            adapt(lr=0.05, seed=3, checkpoint_dir=tmp_path, **settings)
    assert list(adapt(lr=np.array([0.05, 0.01]), epochs=1).rates) == [0.05, 0.01]


def test_statistics_from_random_views_are_repeatable():
    _, plain = loaders()
    model = teacher()
    labels = pseudo_label(model, plain)

    class Views:
        def __len__(self):
            return 33

        def __getitem__(self, number):
            row = plain.dataset.dataset.tensors[0][number]
            return (jitter(row), jitter(row)), number

    def run():
        return adapt_representation(
            model, loaders()[0], DataLoader(Views(), 8), epochs=1, lr=0.05, pseudo_labels=labels, batchnorm="target", controls=True
        )

    torch.manual_seed(0)
    one = run()
    torch.manual_seed(1)
    expected = torch.rand(2)
    torch.manual_seed(1)
    two = run()
    assert torch.equal(torch.rand(2), expected)
    assert equal(state(one.backbone), state(two.backbone))
    assert equal(state(one.controls["batchnorm"]), state(two.controls["batchnorm"]))


def test_half_precision_through_fabric():
    fabric_module = pytest.importorskip("lightning_fabric")
    for precision in ("bf16-mixed", "bf16-true"):
        fabric = fabric_module.Fabric(accelerator="cpu", devices=1, precision=precision)
        fabric.launch()
        found = adapt(fabric=fabric, teacher_update="ema", batchnorm="target")
        assert math.isfinite(found.history[-1]["validation"])
