"""Padding: window arithmetic against brute force, audits of known networks, maps, modes, kernels, the probe."""

from __future__ import annotations

import copy
import functools
import math
import warnings
from itertools import pairwise

import numpy as np
import pytest
import torch
from helpers import drawn, rng
from torch import nn
from torch.nn import functional as F

from outlast.diagnose import padding
from outlast.diagnose.padding._arithmetic import transposed, window
from outlast.diagnose.padding._probe import _grid
from outlast.errors import OutlastWarning, UnsupportedError


@functools.lru_cache(maxsize=2)
def built(name):
    models = pytest.importorskip("torchvision.models", reason="torchvision (extra vision) is not installed")
    torch.manual_seed(0)
    return getattr(models, name)(weights=None)


def backbone(name):
    """A network of torchvision, untrained; built once where tests of one follow each other."""
    return copy.deepcopy(built(name))


# ---- 1: arithmetic --------------------------------------------------------------------------------------------------------


def enumerated(n, k, s, d, left, right):
    """Windows by listing them: output length, padding read, real columns never read, lean of the grid."""
    extent = d * (k - 1) + 1
    starts = list(range(-left, n + right - extent + 1, s))
    covered = set()
    for start in starts:
        covered |= set(range(start, start + extent))  # a dilated window spans the columns between its taps
    reach = max(covered)
    used_left = -min(covered)
    dropped = len([i for i in range(n) if i > reach])
    centres = (starts[0] + starts[-1]) / 2 + (extent - 1) / 2
    return len(starts), used_left, max(reach - (n - 1), 0), dropped, round(2 * centres - (n - 1))


def test_windows_equal_their_enumeration():
    count = 0
    for n in range(1, 41):
        for k in range(1, 8):
            for s in range(1, 5):
                for d in range(1, 4):
                    for left in range(4):
                        for right in range(4):
                            if n + left + right < d * (k - 1) + 1:
                                continue
                            assert tuple(window(n, k, s, d, left, right)) == enumerated(n, k, s, d, left, right)
                            count += 1
    assert count > 40_000


def test_output_lengths_are_torchs():
    for n in range(1, 25):
        for k in range(1, 6):
            for s in range(1, 5):
                for p in range(k // 2 + 1):
                    if n + 2 * p < k:
                        continue
                    x = torch.zeros(1, 1, n)
                    assert window(n, k, s, 1, p, p).out == F.conv1d(x, torch.zeros(1, 1, k), stride=s, padding=p).shape[-1]
                    assert window(n, k, s, 1, p, p, ceil_mode=True).out == F.max_pool1d(x, k, s, p, ceil_mode=True).shape[-1]
                    for extra in range(s):
                        found = transposed(n, k, s, 1, p, extra)
                        if found.out > 0:
                            y = F.conv_transpose1d(x, torch.zeros(1, 1, k), stride=s, padding=p, output_padding=extra)
                            assert found.out == y.shape[-1]


def test_padding_as_tensorflow_does_leans_the_other_way():
    for n in range(4, 40):
        total = max((-(-n // 2) - 1) * 2 + 3 - n, 0)  # as much as ceil(n / 2) windows need, the odd one on the right
        left, right = total // 2, total - total // 2
        assert window(n, 3, 2, 1, left, right).skew in (0, 1)
        assert window(n, 3, 2, 1, left, right).out == math.ceil(n / 2)


def test_a_window_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="does not fit"):
        window(3, 7, 1, 1, 0, 0)


# ---- 3, 4: audits of known networks ---------------------------------------------------------------------------------------

TABLE = {  # strided layers; uneven and dropping ones at 224 and at 225; clean sizes near 224
    "resnet18": (8, 5, 3, 0, 0, [193, 225, 257, 289]),
    "resnet50": (8, 5, 3, 0, 0, [193, 225, 257, 289]),
    "mobilenet_v2": (5, 5, 0, 0, 0, [193, 225, 257, 289]),
    "efficientnet_b0": (5, 5, 0, 0, 0, [193, 225, 257, 289]),
    "mnasnet1_0": (5, 5, 0, 0, 0, [193, 225, 257, 289]),
    "shufflenet_v2_x1_0": (8, 8, 0, 0, 0, [193, 225, 257, 289]),
    "regnet_y_400mf": (9, 5, 4, 0, 0, [193, 225, 257, 289]),
    "densenet121": (5, 2, 0, 0, 1, [189, 221, 253, 285]),
    "vgg16": (5, 0, 0, 0, 1, [192, 224, 256, 288]),
    "alexnet": (4, 1, 0, 1, 0, [191, 223, 255, 287]),
    "convnext_tiny": (4, 0, 0, 0, 1, [192, 224, 256, 288]),
    "swin_t": (1, 0, 0, 0, 1, None),
}


@pytest.mark.parametrize("name", list(TABLE))
def test_known_networks(name):
    strided, *expected, clean = TABLE[name]
    model = backbone(name)
    found = []
    for size in (224, 225):
        report = padding.audit(model, (3, size, size))
        rows = [row for row in report.layers if row.axis == "height" and row.stride > 1]
        assert len(rows) == strided
        found += [sum(row.uneven for row in rows), sum(row.dropped > 0 for row in rows)]
        wide = [row for row in report.layers if row.axis == "width" and row.stride > 1]
        assert [row.skew for row in wide] == [row.skew for row in rows]
    assert found == expected
    sizes = padding.suggest_sizes(model, near=224)
    assert all(each.residual_skew == 0 for each in sizes)
    if clean is not None:
        assert sorted(each.size[0] for each in sizes) == clean
    if name in ("resnet18", "densenet121", "vgg16"):
        assert sizes[0].size[0] == {"resnet18": 225, "densenet121": 221, "vgg16": 224}[name]
        assert sizes[0].relative_cost == pytest.approx((sizes[0].size[0] / 224) ** 2)


def test_lean_of_the_grid_is_the_sum_of_the_layers():
    model = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.ReLU(), nn.Conv2d(4, 4, 3, 2, 1), nn.Conv2d(4, 4, 3, 2, 1))
    report = padding.audit(model, (3, 64, 65))
    assert report.grid_skew_px == (-7.0, 0.0)
    assert report.total_stride == 8.0
    assert sum(row.skew_input_px for row in report.layers if row.axis == "height") == -7.0
    assert [(row.name, row.axis) for row in report.skewed] == [("0", "height"), ("2", "height"), ("3", "height")]
    assert not report.is_even
    assert "height -7" in str(report)
    assert report.to_dict()["kind"] == "PaddingReport"


def test_cleanliness_is_periodic():
    model = backbone("resnet18")
    for n in (40, 57, 65, 90):
        a, b = (padding.audit(model, (3, size, size)) for size in (n, n + 32))
        assert [row.skew for row in a.layers] == [row.skew for row in b.layers]


def test_functional_pools_pads_and_ceil_mode_are_seen():
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(1, 2, 3, 2)

        def forward(self, x):
            x = F.pad(x, (0, 1, 0, 1))
            x = F.relu(self.conv(x))
            return F.max_pool2d(x, 3, 2, ceil_mode=True)

    report = padding.audit(Functional(), (1, 32, 32))
    conv, pool = (row for row in report.layers if row.axis == "width")
    assert (conv.pad_left, conv.pad_right, conv.n, conv.skew) == (0, 1, 32, 1)  # the pad is folded into its convolution
    assert (pool.op, pool.ceil_mode, pool.n, pool.out, pool.skew) == ("max_pool", True, 16, 8, 1)


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular", "symmetric"])
def test_modes_of_convolutions_are_read(mode):
    layer = nn.Conv2d(1, 2, 3, 2, 1, padding_mode=mode) if mode != "symmetric" else padding.Conv2d(1, 2, 3, 2, 1, padding_mode=mode)
    row = padding.audit(nn.Sequential(nn.Identity(), layer), (1, 16, 16)).layers[0]
    shown = "replicate" if mode == "symmetric" else mode  # one and the same up to one pixel
    assert (row.pad_left, row.pad_right, row.n, row.skew, row.mode) == (1, 1, 16, -1, shown)


def test_transposed_convolutions_and_joins_are_reported():
    class Joined(nn.Module):
        def __init__(self):
            super().__init__()
            self.down, self.other = nn.Conv2d(1, 2, 3, 2, 1), nn.Conv2d(1, 2, 2, 2)
            self.up = nn.ConvTranspose2d(2, 1, 3, 2, 1, output_padding=1)

        def forward(self, x):
            return self.up(self.down(x) + self.other(x))

    report = padding.audit(Joined(), (1, 16, 16))
    assert any("branch_offset_mismatch" in note for note in report.notes)
    up = next(row for row in report.layers if row.op == "conv_transpose")
    assert (up.skew, up.out, up.checkerboard) == (1, 16, True)


@pytest.mark.parametrize("rank", [1, 3])
def test_other_ranks(rank):
    conv = (None, nn.Conv1d, None, nn.Conv3d)[rank]
    model = nn.Sequential(conv(2, 3, 3, 2, 1), nn.ReLU(), conv(3, 3, 3, 2, 1))
    report = padding.audit(model, (2, *[17] * rank))
    assert report.is_even
    assert len(report.layers) == 2 * rank
    assert not padding.audit(model, (2, *[16] * rank)).is_even


def test_wrapped_models_and_their_state_are_left_alone():
    model = backbone("resnet18").train()
    model.layer1.eval()
    flags = [module.training for module in model.modules()]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.random.get_rng_state()

    found = padding.audit(nn.DataParallel(model), (3, 64, 64))
    assert [row.name for row in found.layers][:2] == ["conv1", "conv1"]
    assert padding.audit(torch.compile(model), (3, 64, 64)).grid_skew_px == found.grid_skew_px
    assert flags == [module.training for module in model.modules()]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(state, torch.random.get_rng_state())


def test_sharded_models_are_audited_as_whole_ones(tmp_path):
    from helpers import in_processes, padding_run

    assert in_processes(padding_run, tmp_path) == [{"resnet18": True, "looking": True}] * 2


def test_flags_come_back_after_a_failure():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 9)).train()
    model[1].eval()
    with pytest.raises(ValueError, match="smaller than a window"):
        padding.audit(model, (3, 8, 8))
    assert [module.training for module in model.modules()] == [True, True, False, True]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.filterwarnings("ignore")  # torch speaks of leaving quantised tensors
def test_quantised_convolutions_are_refused():
    from torch.ao.nn.quantized import Conv2d

    with pytest.raises(UnsupportedError, match="layer '0' is a quantised convolution"):
        padding.convert(nn.Sequential(Conv2d(3, 4, 3, padding=1)), "symmetric")


def test_models_that_need_data_run_on_zeros():
    class Looks(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(1, 1, 3, 2, 1)

        def forward(self, x):
            return self.conv(x) if float(x.sum()) == 0.0 else x

    with pytest.warns(OutlastWarning, match="without data"):
        assert not padding.audit(Looks(), (1, 8, 8)).is_even

    class Broken(nn.Module):
        def forward(self, x):
            raise RuntimeError("never")

    with pytest.raises(UnsupportedError, match="never"), pytest.warns(OutlastWarning):
        padding.audit(Broken(), (1, 8, 8))


def test_audits_of_bad_input():
    model = nn.Sequential(nn.Conv2d(1, 1, 3), nn.Conv2d(1, 1, 9))
    with pytest.raises(ValueError, match="smaller than a window"):
        padding.audit(model, (1, 8, 8))
    with pytest.raises(ValueError, match="input_size"):
        padding.audit(model, (1, 0, 8))
    with pytest.raises(ValueError, match="one to three spatial sizes"):
        padding.audit(model, (8,))
    with pytest.raises(TypeError, match="Module"):
        padding.audit(lambda x: x, (1, 8, 8))
    empty = padding.audit(nn.Sequential(nn.Flatten(), nn.Linear(64, 2)), (1, 8, 8))
    assert (empty.layers, empty.is_even) == ((), True)
    assert "no convolution" in empty.notes[-1]
    with pytest.raises(ValueError, match="n must be"):
        padding.suggest_sizes(model, near=32, n=0)


def test_rectangles_and_sizes_without_a_solution():
    model = backbone("resnet18")
    found = padding.suggest_sizes(model, near=(224, 320), n=3)
    assert found[0].size == (225, 321)
    assert all(each.residual_skew == 0 for each in found)

    class Mixed(nn.Module):  # an odd window with padding and an even one without read the same map: one of them always leans
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 3, 2, 1), nn.Conv2d(3, 4, 2, 2)

        def forward(self, x):
            return self.a(x).mean((-1, -2)) + self.b(x).mean((-1, -2))

    assert all(each.residual_skew == 2.0 for each in padding.suggest_sizes(Mixed(), near=32))


def test_sizes_are_replayed_and_not_run(monkeypatch):
    from outlast.diagnose.padding import _audit

    traced = []
    original = _audit.trace
    monkeypatch.setattr(_audit, "trace", lambda *args, **kwargs: traced.append(args) or original(*args, **kwargs))
    suggested = padding.suggest_sizes(backbone("resnet18"), near=224)
    assert [args[1] for args in traced] == [(3, 224, 224), *((3, *each.size) for each in suggested)]  # only what is returned is run


# ---- what is not followed is said ------------------------------------------------------------------------------------------


class Called(nn.Module):
    """Layers with a function of the map and of them."""

    def __init__(self, function, *layers):
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.function = function

    def forward(self, x):
        return self.function(x, *self.layers)


def conv(i=3, o=4, k=3, s=2, p=1):
    return nn.Conv2d(i, o, k, s, p)


@pytest.mark.parametrize(
    ("model", "unread"),
    [
        (nn.Sequential(conv(), nn.PixelUnshuffle(2), conv(16)), ("2",)),
        (Called(lambda x, c, d: d(c(x)[:, :, 1:-1, 1:-1]), conv(), conv(4)), ("layers.1",)),
        (Called(lambda x, c: c(torch.cat([x[..., ::2, ::2], x[..., 1::2, 1::2]], 1)), conv(6)), ("layers.0",)),
        (nn.Sequential(conv(), nn.FractionalMaxPool2d(2, output_ratio=0.5), conv(4)), ("2",)),
        (Called(lambda x, c: c(torch.zeros(1, 3, 32, 32, device=x.device).copy_(x[..., :32, :32])), conv()), ("layers.0",)),
    ],
)
def test_layers_behind_what_moves_pixels_are_not_called_clean(model, unread):
    found = padding.audit(model, (3, 64, 64))
    assert found.unread == unread
    assert not found.is_even
    assert "not judged: layer" in found.notes[-1]


def test_gates_and_heads_of_known_networks_leave_nothing_unread():
    for name in ("efficientnet_b0", "mobilenet_v3_large", "shufflenet_v2_x1_0", "swin_t", "squeezenet1_0", "convnext_tiny"):
        assert padding.audit(backbone(name), (3, 224, 224)).unread == ()
    timm = pytest.importorskip("timm")
    for name in ("tf_efficientnet_b0", "seresnet18" if "seresnet18" in timm.list_models() else "seresnet50", "regnety_002"):
        assert padding.audit(timm.create_model(name), (3, 224, 224)).unread == ()


def test_explicit_circular_and_gathered_pads_are_followed():
    one = nn.Sequential(nn.CircularPad2d(1), conv(p=0), conv(4))
    two = Called(lambda x, c, d: d(c(padding.pad(x, (1, 1, 1, 1), "circular"))), conv(p=0), conv(4))
    three = Called(lambda x, c, d: d(c(padding.pad(x, (1, 1, 1, 1), "symmetric"))), conv(p=0), conv(4))
    four = Called(lambda x, c, d: d(c(padding.pad(x, (2, 2, 2, 2), "symmetric"))), conv(k=5, p=0), conv(4))
    for model in (one, two, three, four):
        found = padding.audit(model, (3, 64, 64))
        assert found.unread == ()
        assert found.grid_skew_px == (-3.0, -3.0)
        assert found.layers[0].mode in ("circular", "symmetric", "replicate")


def test_joins_with_a_global_branch_go_on_whatever_the_order():
    def context(first):
        def function(x, c, d):
            y = c(x)
            pooled = F.interpolate(F.adaptive_avg_pool2d(y, 1), size=y.shape[-2:])
            return d(torch.cat([pooled, y] if first else [y, pooled], 1))

        return function

    for first in (True, False):
        found = padding.audit(Called(context(first), conv(), conv(8)), (3, 64, 64))
        assert len(found.layers) == 4
        assert found.grid_skew_px == (-3.0, -3.0)


def test_pools_to_a_fixed_size_keep_the_centre():
    model = nn.Sequential(conv(), nn.AdaptiveAvgPool2d(8), conv(4))
    found = padding.audit(model, (3, 64, 64))
    assert [row.name for row in found.layers] == ["0", "0", "2", "2"]
    assert found.layers[2].skew == -1
    assert padding.foveation(model, (3, 64, 64), layer="2").map.shape == (64, 64)
    with pytest.raises(ValueError, match="global mean"):
        padding.foveation(nn.Sequential(conv(), nn.AdaptiveAvgPool2d(1), nn.Conv2d(4, 2, 1)), (3, 64, 64), layer="2")


def test_a_users_module_with_a_child_named_module_is_run():
    class Stem(nn.Module):
        def __init__(self):
            super().__init__()
            self.module = conv()

        def forward(self, x):
            return self.module(F.max_pool2d(x, 3, 2, 1))

    assert padding.audit(Stem(), (3, 64, 64)).grid_skew_px == (-3.0, -3.0)


def test_sizes_are_what_the_model_takes_and_what_they_say():
    def pyramid(x, a, b, c, d):
        fine = a(x)
        coarse = c(b(fine))
        return d(fine + F.interpolate(coarse, size=fine.shape[-2:]))

    model = Called(pyramid, conv(), conv(4), nn.Conv2d(4, 4, 1), conv(4))
    for each in padding.suggest_sizes(model, near=64):
        found = padding.audit(model, (3, *each.size))
        assert sum(abs(row.skew_input_px) for row in found.layers) == each.residual_skew
    dense = nn.Sequential(conv(), conv(4), nn.Flatten(), nn.Linear(256, 10))
    assert [each.size for each in padding.suggest_sizes(dense, near=32)] == [(29, 29)]  # 33 has another number of features
    sizes = padding.suggest_sizes(nn.Conv2d(3, 4, (3, 2), 2, (1, 0)), near=224)
    assert sizes[0].size in ((225, 224), (223, 224))
    assert sizes[0].residual_skew == 0.0


def test_clean_sizes_are_periodic():
    model = backbone("resnet18")
    from outlast.diagnose.padding._audit import replay
    from outlast.diagnose.padding._trace import trace

    graph = trace(model, (3, 224, 224))
    skews = {n: [row.skew for row in replay(graph, 0, n)[0]] for n in range(32, 160)}
    assert all(skews[n] == skews[n + 32] for n in range(32, 128))


def test_one_more_column_only_mirrors_the_lean():
    """Padding the starved side until no column is left over does not make a layer even: it leans the other way."""
    for n in range(4, 40, 2):
        before = window(n, 3, 2, 1, 1, 1)
        after = window(n, 3, 2, 1, 1, 1 + 2 - 1)
        assert (before.skew, after.skew) == (-1, 1)
        assert after.out == before.out + 1


# ---- 2, 3.4: foveation ----------------------------------------------------------------------------------------------------

FIRST_ROW = {  # one layer, stride 1, from a corner: k = 3; k = 5; k = 3 dilated
    "zeros": ([4, 6, 6, 6], [9, 12, 15, 15], [4, 4, 6, 6]),
    "symmetric": ([9, 9, 9, 9], [25, 25, 25, 25], [9, 9, 9, 9]),
    "reflect": ([4, 8, 6, 6], [9, 18, 18, 15], [4, 6, 8, 6]),
    "replicate": ([9, 9, 9, 9], [36, 24, 30, 30], [16, 8, 12, 12]),
    "circular": ([9, 9, 9, 9], [25, 25, 25, 25], [9, 9, 9, 9]),
    "partial": ([6.25, 8.75, 7.5, 7.5], [15.34, 19.26, 23.17, 20.56], [6.25, 6.25, 8.75, 8.75]),
}


@pytest.mark.parametrize("mode", list(FIRST_ROW))
def test_maps_of_one_layer(mode):
    for (k, p, d), expected in zip(((3, 1, 1), (5, 2, 1), (3, 2, 2)), FIRST_ROW[mode], strict=True):
        found = padding.foveation(nn.Conv2d(1, 1, k, padding=p, dilation=d), (1, 20, 20), mode=mode).map
        row = found[0, :4] / found[10, 10] * k * k
        assert row.tolist() == pytest.approx(expected, abs=0.006)


@pytest.mark.parametrize("mode", ["symmetric", "reflect", "replicate", "circular", "partial", "zeros"])
def test_paths_of_one_layer_are_conserved(mode):
    n, k = 12, 5
    found = padding.foveation(nn.Conv1d(1, 1, k, padding=2), (1, n), mode=mode).map
    paths = float(found.sum() / found[n // 2]) * k
    on_padding = 6 if mode == "zeros" else 0  # taps beyond the ends: 2 + 1 on each side
    assert paths == pytest.approx(n * k - on_padding)


MAPS = {  # left and right band, top-left and bottom-right corner, asymmetry
    ("resnet18", 224, None): (0.363, 0.070, 0.227, 0.009, 0.367),
    ("resnet18", 225, None): (0.392, 0.392, 0.223, 0.223, 0.0),
    ("resnet18", 224, "symmetric"): (1.908, 0.260, 3.795, 0.082, 0.442),
    ("resnet18", 225, "symmetric"): (2.146, 2.146, 3.795, 3.795, 0.0),
    ("resnet18", 224, "circular"): (0.962, 0.866, 0.962, 0.774, 0.286),
    ("vgg19", 224, None): (0.167, 0.167, 0.040, 0.040, 0.0),
    ("vgg19", 224, "symmetric"): (1.0, 1.0, 1.0, 1.0, 0.0),
    ("vgg19", 224, "reflect"): (0.613, 0.613, 0.377, 0.377, 0.0),
    ("vgg19", 127, None): (0.166, 0.033, 0.060, 0.002, 0.41),
    ("vgg19", 127, "symmetric"): (1.007, 0.133, 1.331, 0.023, 0.56),
}


@pytest.mark.parametrize("case", list(MAPS))
def test_maps_of_known_networks(case):
    name, size, mode = case
    found = padding.foveation(backbone(name), (3, size, size), mode=mode)
    top, bottom, left, right = found.bands
    assert (left, right) == pytest.approx(MAPS[case][:2], abs=6e-4)
    assert (top, bottom) == pytest.approx((left, right), abs=1e-9)
    assert (found.corner_ratio[0], found.corner_ratio[3]) == pytest.approx(MAPS[case][2:4], abs=6e-4)
    assert found.asym_lr == pytest.approx(MAPS[case][4], abs=4e-3 if name == "vgg19" else 6e-4)
    if size == 225:
        assert found.asym_lr < 1e-12


@pytest.mark.parametrize("size", [63, 64, 65, 66])
def test_a_map_is_symmetric_exactly_where_no_layer_leans(size):
    model = nn.Sequential(nn.Conv2d(1, 2, 3, 2, 1), nn.Conv2d(2, 2, 5, 2, 2), nn.MaxPool2d(3, 2, 1))
    even = padding.audit(model, (1, size, size)).is_even
    assert (padding.foveation(model, (1, size, size)).asym_lr < 1e-12) == even


def test_a_map_equals_the_gradient_of_the_uniform_network():
    """Against the network itself, its weights replaced: residual branches, concatenation, ceil mode and a layer in between."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(1, 2, 3, 2, 1), nn.Conv2d(2, 2, 3, 1, 1), nn.Conv2d(4, 2, 3, 2, 1)

        def forward(self, x):
            x = self.a(x)
            x = torch.cat([x + self.b(x), x], 1)
            return F.avg_pool2d(self.c(x), 2, 2, ceil_mode=True, count_include_pad=True)

    model = Net().double()
    x = torch.ones(1, 1, 30, 30, dtype=torch.float64, requires_grad=True)
    found = padding.foveation(model, (1, 30, 30), layer="c")
    for layer in (model.a, model.b, model.c):
        nn.init.constant_(layer.weight, 1.0 / (9 * layer.in_channels))
        nn.init.zeros_(layer.bias)
    caught = []
    model.c.register_forward_hook(lambda module, args, out: caught.append(out))
    model(x)
    reach = torch.autograd.grad(caught[0].sum(), x)[0][0, 0]
    assert torch.allclose(found.map, reach / reach[7:22, 7:22].mean())
    assert found.layer == "c"


def test_maps_of_bad_input():
    model = nn.Sequential(nn.Conv2d(1, 1, 3))
    with pytest.raises(ValueError, match="some that have one: 0"):
        padding.foveation(model, (1, 8, 8), layer="00")
    with pytest.raises(ValueError, match="mode must be one of"):
        padding.foveation(model, (1, 8, 8), mode="mirror")
    with pytest.raises(TypeError, match="Module"):
        padding.foveation(None, (1, 8, 8))


# ---- 5 to 7: padding ------------------------------------------------------------------------------------------------------

NUMPY = {"symmetric": "symmetric", "reflect": "reflect", "replicate": "edge", "circular": "wrap"}


@pytest.mark.parametrize("mode", list(NUMPY))
def test_padding_is_numpys(mode):
    for n in range(1, 7):
        for p in range(1, 3 * n + 1):
            if mode == "reflect" and n == 1:
                continue  # numpy's own way
            x = np.arange(n * 4.0).reshape(1, 1, 4, n)
            found = padding.pad(torch.from_numpy(x), (p, p - 1), mode)
            assert np.array_equal(found.numpy(), np.pad(x, ((0, 0), (0, 0), (0, 0), (p, p - 1)), NUMPY[mode]))
    assert padding.pad(torch.tensor([[[5.0]]]), (3, 2), "reflect").tolist() == [[[5.0] * 6]]


def test_padding_in_two_dimensions_and_of_other_shapes():
    x = torch.randn(2, 3, 5, 4, generator=rng(), dtype=torch.float64)
    for mode, name in NUMPY.items():
        found = padding.pad(x, (3, 2, 1, 4), mode)
        assert np.array_equal(found.numpy(), np.pad(x.numpy(), ((0, 0), (0, 0), (1, 4), (3, 2)), name))
        assert torch.equal(padding.pad(x[0, 0], (3, 2, 1, 4), mode), found[0, 0])
    assert torch.equal(padding.pad(x, (1, 1, 1, 1), "symmetric"), padding.pad(x, (1, 1, 1, 1), "replicate"))
    assert torch.equal(padding.pad(x, (1, 2), "zeros"), F.pad(x, (1, 2)))
    small = torch.randn(1, 1, 3, 2, generator=rng(), dtype=torch.float64, requires_grad=True)
    for mode in NUMPY:
        assert torch.autograd.gradcheck(lambda t, mode=mode: padding.pad(t, (3, 2, 4, 1), mode), (small,))
    compiled = torch.compile(lambda t: padding.pad(t, (2, 2, 2, 2), "symmetric"), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), padding.pad(x, (2, 2, 2, 2), "symmetric"))


def test_padding_of_bad_input():
    x = torch.zeros(1, 1, 4)
    for amounts, mode, message in (
        ((-1, 0), "zeros", "must not be negative"),
        ((1,), "zeros", "pairs"),
        ((1, 1), "mirror", "mode must be one of"),
        ((1, 1) * 4, "zeros", "at most 3 axes"),
    ):
        with pytest.raises(ValueError, match=message):
            padding.pad(x, amounts, mode)
    with pytest.raises(ValueError, match="nothing to take"):
        padding.pad(torch.zeros(1, 0), (1, 1), "symmetric")


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("mode", ["zeros", "symmetric", "reflect", "replicate", "circular"])
def test_convolutions_pad_first(rank, mode):
    kind = (padding.Conv1d, padding.Conv2d, padding.Conv3d)[rank - 1]
    layer = kind(2, 4, 3, padding=2, dilation=2, groups=2, padding_mode=mode).double()
    x = torch.randn(2, 2, *[6] * rank, generator=rng(), dtype=torch.float64)
    plain = (F.conv1d, F.conv2d, F.conv3d)[rank - 1]
    expected = plain(padding.pad(x, (2, 2) * rank, mode), layer.weight, layer.bias, dilation=2, groups=2)
    assert torch.allclose(layer(x), expected)
    assert f"padding_mode={mode}" in repr(layer) or mode == "zeros"
    with pytest.raises(ValueError, match="padding_mode must be one of"):
        kind(1, 1, 3, padding_mode="mirror")


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_partial_convolutions_have_no_dark_border(rank):
    plain = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[rank - 1]
    layer = (padding.PartialConv1d, padding.PartialConv2d, padding.PartialConv3d)[rank - 1](1, 1, 3, padding=1).double()
    reference = plain(1, 1, 3, padding=1).double()
    reference.load_state_dict(layer.state_dict())
    nn.init.constant_(layer.weight, 0.3)
    constant = layer(torch.ones(1, 1, *[7] * rank, dtype=torch.float64))
    assert torch.allclose(constant, torch.full_like(constant, 0.3 * 3**rank + layer.bias.item()))
    layer.load_state_dict(reference.state_dict())
    x = torch.randn(2, 1, *[7] * rank, generator=rng(), dtype=torch.float64)
    inside = (slice(None), slice(None), *[slice(1, -1)] * rank)
    assert torch.allclose(layer(x)[inside], reference(x)[inside])
    # Windows that see padding alone give the bias.
    wide = (padding.PartialConv1d, padding.PartialConv2d, padding.PartialConv3d)[rank - 1](1, 1, 1, padding=2).double()
    assert torch.allclose(wide(x)[(slice(None), slice(None), *[0] * rank)], wide.bias.expand(2, 1))
    with torch.autocast("cpu", torch.bfloat16):
        assert layer.float()(x.float()).dtype == torch.bfloat16


def test_conversion_keeps_names_and_weights():
    model = backbone("resnet18").eval()
    x = torch.randn(1, 3, 40, 40, generator=rng())
    with torch.no_grad():
        expected = model(x)
        for mode in ("symmetric", "partial", "circular"):
            changed = padding.convert(model, mode)
            assert list(changed.state_dict()) == list(model.state_dict())
            assert isinstance(changed.conv1, nn.Conv2d)
            assert not torch.equal(changed(x), expected)
            back = padding.convert(changed, "zeros")
            assert torch.equal(back(x), expected)
            assert type(back.conv1) is nn.Conv2d
        assert torch.equal(model(x), expected)
        with pytest.warns(OutlastWarning, match="changed=0"):
            assert torch.equal(padding.convert(model, "zeros")(x), expected)
        same = padding.convert(model, "reflect", where=["conv1"], inplace=True)
    assert same is model
    assert [module.padding_mode for module in (model.conv1, model.layer1[0].conv1)] == ["reflect", "zeros"]
    names = []
    padding.convert(model, "circular", where=lambda name, module: bool(names.append(name)) or name == "conv1")
    assert "layer4.1.conv2" in names


def test_conversion_of_what_pads_in_its_own_way():
    class Same(nn.Conv2d):
        pass

    model = nn.Sequential(Same(1, 1, 3, padding=1), nn.AvgPool2d(3, 1, 1), nn.Conv2d(1, 1, 3))
    with pytest.warns(OutlastWarning, match="pads in its own way"):
        changed = padding.convert(model, "symmetric")
    assert not changed[1].count_include_pad
    assert type(changed[2]) is nn.Conv2d
    with pytest.raises(ValueError, match="no layer conv9"):
        padding.convert(model, "symmetric", where=["conv9"])
    with pytest.raises(ValueError, match="mode must be one of"):
        padding.convert(model, "mirror")
    with pytest.raises(TypeError, match="Module"):
        padding.convert(None, "zeros")


def test_circular_convolutions_commute_with_shifts():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 1, 5, padding=2)).double()
    x = torch.randn(1, 1, 12, 12, generator=rng(), dtype=torch.float64)

    def error(net):
        return (net(x.roll((3, 5), (2, 3))) - net(x).roll((3, 5), (2, 3))).abs().max().item()

    assert error(padding.convert(model, "circular")) < 1e-12
    assert error(model) > 1e-3


# ---- 9: kernels and feature maps
# ----------------------------------------------------------------------------------------------------------


def test_asymmetry_of_known_kernels():
    sobel = torch.tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]])
    layer = nn.Conv2d(2, 3, 3, 2)
    with torch.no_grad():
        layer.weight.copy_(sobel.expand_as(layer.weight))
    row = padding.kernel_asymmetry(nn.Sequential(layer, nn.Conv2d(3, 3, 1))).layers
    assert len(row) == 1  # kernels of size 1 have no sides
    assert (row[0].asym_h, row[0].asym_v) == (pytest.approx(2.0), 0.0)
    assert row[0].strided
    flipped = nn.Sequential(nn.Conv2d(2, 3, 3))
    torch.manual_seed(0)
    nn.init.normal_(flipped[0].weight)
    one = padding.kernel_asymmetry(flipped).layers[0]
    with torch.no_grad():
        flipped[0].weight.copy_(flipped[0].weight.flip(-1))
    two = padding.kernel_asymmetry(flipped).layers[0]
    assert (one.asym_h, one.p_h) == pytest.approx((two.asym_h, two.p_h))
    nn.init.zeros_(flipped[0].weight)
    zero = padding.kernel_asymmetry(flipped).layers[0]
    assert (zero.asym_h, zero.p_h) == (0.0, 1.0)
    with pytest.raises(ValueError, match="num_permutations"):
        padding.kernel_asymmetry(flipped, 0)


def test_p_values_of_random_kernels_are_uniform():
    stats = pytest.importorskip("scipy.stats")
    stream = rng(1)
    values = []
    for _ in range(200):
        layer = nn.Conv2d(4, 4, 3)
        with torch.no_grad():
            layer.weight.copy_(torch.randn(layer.weight.shape, generator=stream))
        values.append(padding.kernel_asymmetry(layer).layers[0].p_h)
    assert stats.kstest(values, "uniform").pvalue > 0.01


def test_bias_of_feature_maps():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 1, 3, padding=1, bias=False), nn.ReLU(), nn.Conv2d(1, 1, 3, 2, 1, bias=False))
    for layer in (model[0], model[2]):
        nn.init.constant_(layer.weight, 1 / 9)
    images = torch.rand(64, 1, 32, 32, generator=rng()) + 0.5
    images[:, :, :16] += 1.0  # bright on top, as photographs are
    found = padding.feature_bias(model, images.split(20))
    assert found.items == 64
    first, second = found.layers
    assert first.border_ratio < 0.8  # zeros darken the border
    assert first.constant_border_ratio == pytest.approx(first.border_ratio, abs=0.1)
    assert abs(first.tb) < 0.1  # what photographs have on top cancels
    assert abs(padding.feature_bias(model, images.split(20), flips=False).layers[0].tb) > 0.2
    assert second.constant_lr < -0.001  # the last column of windows never reads the zeros on the right
    assert padding.feature_bias(model, [(images, None)], ["0"], max_items=10).items == 10
    clean = padding.convert(model, "symmetric")
    assert padding.feature_bias(clean, [images]).layers[0].constant_border_ratio == pytest.approx(1.0)
    for loader, layers, message in (([], None, "no images"), ([images], ["9"], "no layer 9")):
        with pytest.raises(ValueError, match=message):
            padding.feature_bias(model, loader, layers)
    with pytest.raises(TypeError, match="images"):
        padding.feature_bias(model, [torch.zeros(3)])


# ---- the probe
# ----------------------------------------------------------------------------------------------------------------------------


class Blind(nn.Module):
    """Finds white pixels, except in the last eight columns."""

    def forward(self, x):
        x = x.clone()
        x[..., -8:] = 0.0
        return x


def test_probe_finds_a_blind_edge():
    stimulus, scenes = torch.ones(1, 4, 4), torch.zeros(2, 1, 32, 40)
    found = padding.probe(Blind(), stimulus, scenes, padding.heat_map(0, 1.0, 2.0), stride=5, batch_size=7)
    assert found.rows[-1] == 28
    assert found.columns[-1] == 36  # the far edge is always among the places
    assert found.columns == (0, 5, 10, 15, 18, 21, 26, 31, 36)  # the same from both sides
    assert found.centre == 1.0
    top, bottom, left, right = found.bands
    assert (left, right) == (1.0, 0.5)  # one of the two last columns begins before the blind ones
    assert top == bottom < 1.0
    assert found.argmin[1] >= 32
    assert found.blind == pytest.approx(float((found.scores < 0.5).double().mean()))
    half = padding.probe(nn.Identity(), stimulus, scenes[0], padding.heat_map(0, 1.0, 2.0), alpha=torch.full((4, 4), 0.25))
    assert torch.allclose(half.scores, torch.full_like(half.scores, 0.25))


def test_places_of_the_probe_mirror_and_leave_no_gap():
    for last in range(70):
        for stride in range(1, 9):
            places = _grid(last, stride)
            assert places == [last - place for place in reversed(places)]
            assert places[0] == 0
            assert max((b - a for a, b in pairwise(places)), default=0) <= stride


def test_ready_made_scores():
    classifier = nn.Sequential(nn.Flatten(), nn.Linear(16 * 16, 3))
    found = padding.probe(classifier, torch.ones(1, 2, 2), torch.zeros(1, 16, 16), padding.class_logit(1), stride=7)
    weight = classifier[1].weight[1].detach().view(16, 16)
    assert float(found.scores[0, 0]) == pytest.approx((weight[:2, :2].sum() + classifier[1].bias[1]).item(), abs=1e-5)

    class Detector(nn.Module):
        def forward(self, images):
            out = []
            for image in images:
                hits = image[0].nonzero()
                if not len(hits) or hits[:, 1].max() > 12:
                    out.append({"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.long), "scores": torch.zeros(0)})
                    continue
                (top, left), (bottom, right) = hits.min(0).values, hits.max(0).values + 1
                box = torch.tensor([[left, top, right, bottom]]).float()
                out.append({"boxes": box, "labels": torch.tensor([2]), "scores": torch.tensor([0.9])})
            return out

    seen = padding.probe(Detector(), torch.ones(1, 3, 2), torch.zeros(1, 16, 16), padding.detection(2, (3, 2)), stride=3)
    assert seen.centre == pytest.approx(0.9)
    assert float(seen.scores[0, -1]) == 0.0
    assert float(padding.probe(Detector(), torch.ones(1, 3, 2), torch.zeros(1, 16, 16), padding.detection(1, (3, 2))).scores.max()) == 0.0


def test_probe_of_bad_input():
    scenes = torch.zeros(1, 1, 8, 8)
    for stimulus, message in ((torch.ones(1, 9, 2), "does not fit"), (torch.ones(2, 2, 2), "channels"), (torch.ones(2, 2), "channels")):
        with pytest.raises(ValueError, match=message):
            padding.probe(nn.Identity(), stimulus, scenes, padding.heat_map(0, 1.0, 1.0))
    with pytest.raises(TypeError, match="one number for each image"):
        padding.probe(nn.Identity(), torch.ones(1, 2, 2), scenes, lambda output, places: output.sum())
    with pytest.raises(ValueError, match="stride"):
        padding.probe(nn.Identity(), torch.ones(1, 2, 2), scenes, padding.class_logit(0), stride=0)


def test_results_draw():
    pytest.importorskip("matplotlib")
    model = nn.Sequential(nn.Conv2d(1, 2, 3, 2, 1), nn.Conv2d(2, 1, 3, 2, 1))
    assert drawn(padding.audit(model, (1, 16, 16)))
    assert drawn(padding.foveation(model, (1, 16, 16)))
    assert drawn(padding.kernel_asymmetry(model))
    bias = padding.feature_bias(model, [torch.rand(4, 1, 16, 16)])
    assert drawn(bias)
    assert drawn(bias.layers[0])
    assert drawn(padding.probe(Blind(), torch.ones(1, 4, 4), torch.zeros(1, 32, 32), padding.heat_map(0, 1.0, 2.0)))


# ---- regressions of modes, maps and the probe ------------------------------------------------------------------------------


def test_padding_in_inference_mode_or_under_a_tracer_spoils_nothing():
    from torch._subclasses.fake_tensor import FakeTensorMode

    for kind, settings in ((padding.Conv2d, {"padding_mode": "symmetric"}), (padding.PartialConv2d, {})):
        layer = kind(1, 1, 5, padding=2, **settings)
        x = torch.randn(1, 1, 11, 13)
        with torch.inference_mode():
            layer(x)
        with FakeTensorMode(allow_non_fake_inputs=True):
            layer(torch.empty(1, 1, 9, 7))
        layer(x.requires_grad_()).sum().backward()
        assert type(layer(torch.randn(1, 1, 9, 7))) is torch.Tensor


def test_indices_that_a_tracer_makes_from_plain_tensors_are_not_kept():
    from torch._subclasses.fake_tensor import FakeTensorMode

    x = torch.arange(3.0).view(1, 1, 3)
    with FakeTensorMode(allow_non_fake_inputs=True):
        padding.pad(x, (5, 4), "symmetric")  # more than the size, so by gathering
    assert padding.pad(x, (5, 4), "symmetric").flatten().tolist() == [1.0, 2.0, 2.0, 1.0, 0.0, 0.0, 1.0, 2.0, 2.0, 1.0, 0.0, 0.0]


def test_converted_models_are_exported_as_operators():
    import io

    model = padding.convert(nn.Sequential(nn.Conv2d(1, 2, 5, padding=2), nn.Conv2d(2, 1, 5, padding=2)), "symmetric")
    x = torch.randn(1, 1, 9, 9)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, of deprecation and of sizes that become constants
        traced = torch.jit.trace(model, x)
        file = io.BytesIO()
        torch.jit.save(traced, file)
        file.seek(0)
        assert torch.allclose(torch.jit.load(file)(x), model(x), atol=1e-6)
        assert torch.allclose(torch.export.export(model, (x,)).module()(x), model(x), atol=1e-6)


def test_partial_models_are_seen_as_such():
    model = nn.Sequential(conv(), nn.ReLU(), conv(4))
    partial = padding.convert(model, "partial")
    found = padding.audit(partial, (3, 33, 33))  # a warning (real zeros) would be an error
    assert {row.mode for row in found.layers} == {"partial"}
    assert torch.equal(padding.foveation(partial, (3, 33, 33)).map, padding.foveation(model, (3, 33, 33), mode="partial").map)
    assert not torch.allclose(padding.foveation(partial, (3, 33, 33)).map, padding.foveation(model, (3, 33, 33)).map)


def test_spatial_gates_count_as_one():
    gated = Called(lambda x, a, g, b: b(a(x) * g(a(x)).sigmoid()), conv(), conv(4, 4, 7, 1, 3), conv(4))
    plain = nn.Sequential(conv(), conv(4))
    assert torch.allclose(padding.foveation(gated, (3, 33, 33)).map, padding.foveation(plain, (3, 33, 33)).map)


def test_layers_take_torchs_positional_arguments():
    layer = padding.Conv2d(1, 1, 3, 1, 1, 1, 1, True, "symmetric")
    assert layer.padding_mode == "symmetric"
    assert layer(torch.ones(1, 4, 4)).shape == (1, 4, 4)
    assert padding.PartialConv2d(1, 1, 3, padding=1)(torch.ones(1, 4, 4)).shape == (1, 4, 4)
    with pytest.raises(ValueError, match="of its own"):
        padding.PartialConv2d(1, 1, 3, padding=1, padding_mode="circular")
    with pytest.raises(ValueError, match="padding_mode"):
        padding.Conv1d(1, 1, 3, padding_mode="wrap")


def test_conversion_goes_back_and_says_what_it_leaves():
    pool = nn.AvgPool2d(3, 1, 1)
    there = padding.convert(nn.Sequential(pool, conv()), "symmetric")
    back = padding.convert(there, "zeros")
    assert (there[0].count_include_pad, back[0].count_include_pad) == (False, True)

    class Same(nn.Conv2d):
        def forward(self, x):
            return super().forward(F.pad(x, (0, 1, 0, 1)))

    with pytest.warns(OutlastWarning) as caught:
        padding.convert(nn.Sequential(Same(3, 3, 3, 2), nn.ZeroPad2d(1), conv()), "symmetric")
    assert ["'0' is a Same" in str(each.message) or "'1' pads by itself" in str(each.message) for each in caught] == [True, True]


def test_scores_below_zero_and_odd_opacities():
    classifier = nn.Sequential(nn.Flatten(), nn.Linear(256, 2))
    nn.init.zeros_(classifier[1].weight)
    nn.init.constant_(classifier[1].bias, -4.0)
    stimulus, scene = torch.ones(1, 4, 4), torch.zeros(1, 16, 16)
    assert padding.probe(classifier, stimulus, scene, padding.class_logit(0)).blind == 0.0
    for alpha in (torch.ones(3, 4), torch.full((4, 4), 2.0)):
        with pytest.raises(ValueError, match="alpha must be"):
            padding.probe(classifier, stimulus, scene, padding.class_logit(0), alpha=alpha)
    with pytest.raises(ValueError, match="NaN"):
        padding.probe(classifier, stimulus, scene, lambda output, places: output[:, 0] * math.nan)
    found = padding.probe(nn.AvgPool2d(8), stimulus, torch.zeros(1, 64, 64), padding.heat_map(0, 8.0, 0.25))
    assert bool(found.scores.isfinite().all())  # the nearest cell counts, however small the radius


def test_single_bad_lines_and_half_precision_in_feature_maps():
    class Dead(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 1, 1)

        def forward(self, x):
            return self.conv(x)

    model = Dead()
    model.conv.register_forward_hook(lambda module, args, out: out.clone().index_fill_(3, torch.tensor([5]), 0.0))
    nn.init.constant_(model.conv.weight, 1.0)
    found = padding.feature_bias(model, [torch.ones(8, 3, 16, 16)], ["conv"], flips=False).layers[0]
    assert found.line > 5.0
    assert found.constant_line > 5.0
    half = padding.feature_bias(nn.Sequential(conv()).half(), [torch.rand(40, 3, 64, 64).half()]).layers[0]
    assert math.isfinite(half.constant_border_ratio)
    with pytest.raises(ValueError, match="one size"):
        padding.feature_bias(nn.Sequential(conv()), [torch.rand(2, 3, 16, 16), torch.rand(2, 3, 18, 18)])


def test_the_probe_takes_a_real_detector():
    torch.manual_seed(0)
    build = pytest.importorskip("torchvision").models.detection.fasterrcnn_mobilenet_v3_large_320_fpn
    detector = build(weights=None, weights_backbone=None, min_size=64, max_size=64)
    detector.eval()
    found = padding.probe(detector, torch.ones(3, 8, 8), torch.rand(1, 3, 64, 64), padding.detection(1, (8, 8)), stride=28, batch_size=4)
    assert found.scores.shape == (3, 3)
    assert bool(((found.scores >= 0.0) & (found.scores <= 1.0)).all())
