"""Corruptions: known results, the formulas of another library at equal constants, determinism, bad input."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from outlast.data import corruptions as module
from outlast.data.corruptions import CORRUPTIONS, HELD_OUT, STAND_INS, corrupt

ALL = (*CORRUPTIONS, *HELD_OUT)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def images(n=8, channels=3, side=32, seed=0):
    """Smooth colour images with structure at several scales."""
    noise = torch.rand(n, channels, side, side, generator=rng(seed))
    coarse = torch.nn.functional.interpolate(noise[..., ::8, ::8], size=(side, side), mode="bilinear", align_corners=False)
    return (0.8 * coarse + 0.2 * noise).clamp(0, 1)


def test_there_are_fifteen_and_three_and_stand_ins_are_named():
    assert len(set(CORRUPTIONS)) == 15
    assert len(set(HELD_OUT)) == 3
    assert not set(CORRUPTIONS) & set(HELD_OUT)
    assert set(STAND_INS) <= set(CORRUPTIONS)


@pytest.mark.parametrize("name", ALL)
def test_same_seed_same_images_in_range_and_of_the_same_kind(name):
    x = images()
    first, again = (corrupt(x, name, 3, generator=rng(5)) for _ in range(2))
    assert torch.equal(first, again)
    assert first.shape == x.shape
    assert first.dtype == x.dtype
    assert float(first.min()) >= 0
    assert float(first.max()) <= 1
    assert not torch.equal(first, x)
    bytes_ = (255 * x).round().to(torch.uint8)
    y = corrupt(bytes_, name, 3, generator=rng(5))
    assert y.dtype == torch.uint8
    assert y.shape == x.shape


@pytest.mark.parametrize("name", ALL)
def test_severity_five_is_worse_than_one(name):
    x = images(64)

    def distance(severity):
        return float((corrupt(x, name, severity, generator=rng(1)) - x).square().mean())

    if name == "saturate":  # 1 and 2 take colour away, 3 to 5 add it
        assert distance(5) > distance(3)
    elif name in ("glass_blur", "elastic_transform"):  # the published constants trade shuffling against blur, affine against elastic
        assert min(distance(5), distance(1)) > 1e-3
    else:
        assert distance(5) > distance(1) > 0


@pytest.mark.parametrize("name", [name for name in ALL if name != "saturate"])
def test_grey_images_and_other_sizes_work(name):
    for shape in ((1, 28, 28), (3, 40, 24)):
        x = images(3, shape[0], 40)[..., : shape[1], : shape[2]]
        assert corrupt(x, name, 5, generator=rng()).shape == x.shape


def test_another_seed_gives_other_noise_and_the_global_generator_is_left_alone():
    x = images()
    before = torch.get_rng_state()
    assert not torch.equal(corrupt(x, "gaussian_noise", generator=rng(0)), corrupt(x, "gaussian_noise", generator=rng(1)))
    assert torch.equal(torch.get_rng_state(), before)


def test_noise_has_the_stated_size():
    x = torch.full((200, 3, 32, 32), 0.5)
    assert float((corrupt(x, "gaussian_noise", 5, generator=rng()) - x).std()) == pytest.approx(0.10, rel=0.01)
    assert float((corrupt(x, "speckle_noise", 5, generator=rng()) - x).std()) == pytest.approx(0.10, rel=0.01)
    assert float((corrupt(x, "shot_noise", 5, generator=rng()) - x).std()) == pytest.approx((0.5 / 50) ** 0.5, rel=0.01)
    y = corrupt(x, "impulse_noise", 5, generator=rng())
    assert float((y == 0).float().mean()) == pytest.approx(0.035, rel=0.05)
    assert float((y == 1).float().mean()) == pytest.approx(0.035, rel=0.05)


def test_contrast_and_brightness_by_hand():
    x = images()
    means = x.mean((2, 3), keepdim=True)
    torch.testing.assert_close(corrupt(x, "contrast", 5), ((x - means) * 0.15 + means).clamp(0, 1))
    y = corrupt(x, "brightness", 3)
    torch.testing.assert_close(y.amax(1), (x.amax(1) + 0.15).clamp(max=1.0))
    grey = torch.full((1, 3, 4, 4), 0.25)
    torch.testing.assert_close(corrupt(grey, "brightness", 5), grey + 0.3)
    torch.testing.assert_close(corrupt(torch.zeros(1, 3, 4, 4), "brightness", 5), torch.full((1, 3, 4, 4), 0.3))


def test_pixels_of_glass_blur_only_change_places():
    x = images(4)
    blurred = module._gaussian_blur(x, 0.05)
    y = module._glass_blur(x, 0.05, 1, 2, module._Draw(rng(), x))
    for before, after in zip(blurred, y, strict=True):
        assert torch.equal(before.flatten(1).sort().values, after.flatten(1).sort().values)


def test_motion_of_a_flat_image_is_no_motion():
    x = torch.full((3, 3, 32, 32), 0.3)
    for name in ("motion_blur", "zoom_blur", "defocus_blur", "gaussian_blur", "elastic_transform", "pixelate"):
        y = corrupt(x, name, 5, generator=rng())
        assert float((y - x).abs().max()) < 3e-3, name


def peer_cases():
    return [
        ("defocus_blur", 1, lambda x: module._defocus_blur(x, 3, 0.1), 1e-5),
        ("defocus_blur", 3, lambda x: module._defocus_blur(x, 6, 0.5), 1e-5),
        ("gaussian_blur", 1, lambda x: module._gaussian_blur(x, 1.0), 1e-5),
        ("zoom_blur", 1, lambda x: module._zoom_blur(x, 1.11), 1e-5),
        ("brightness", 3, lambda x: module._brightness(x, 0.3), 1e-4),
        ("contrast", 2, lambda x: module._contrast(x, 0.3), 1e-5),
        ("saturate", 4, lambda x: module._saturate(x, 5.0, 0.1), 1e-4),
        ("pixelate", 3, lambda x: module._pixelate(x, 0.4), 1.01 / 255),
    ]


@pytest.mark.peer
@pytest.mark.parametrize(("name", "severity", "ours", "tolerance"), peer_cases(), ids=lambda v: v if isinstance(v, str) else "")
def test_equals_corrupt_tta_at_equal_constants(name, severity, ours, tolerance):
    peer = pytest.importorskip("corrupt_tta.corruptions", reason="corrupt-tta (extra dev) is not installed")
    bytes_ = (255 * images(6)).round().to(torch.uint8)
    mine = ours(bytes_.float() / 255).clamp(0, 1)
    for image, result in zip(bytes_, mine, strict=True):
        theirs = np.asarray(getattr(peer, name)(image.permute(1, 2, 0).numpy(), severity), np.float32) / 255
        assert float((torch.from_numpy(theirs).permute(2, 0, 1) - result).abs().max()) <= tolerance


@pytest.mark.peer
@pytest.mark.parametrize(("severity", "quality"), [(1, 25), (5, 7)])
def test_jpeg_is_what_a_codec_gives(severity, quality):
    peer = pytest.importorskip("corrupt_tta.corruptions", reason="corrupt-tta (extra dev) is not installed")
    bytes_ = (255 * images(20)).round().to(torch.uint8)
    mine = module._jpeg_compression(bytes_.float() / 255, quality)
    theirs = torch.stack([torch.from_numpy(np.array(peer.jpeg_compression(image.permute(1, 2, 0).numpy(), severity))) for image in bytes_])
    gap = (theirs.permute(0, 3, 1, 2).float() / 255 - mine).abs()
    assert float(gap.mean()) < 0.75 / 255  # the codec computes in integers, with cosines of its own
    assert float((bytes_.float() / 255 - mine).abs().mean()) > 10 * float(gap.mean())


@pytest.mark.peer
def test_random_ones_have_the_statistics_of_corrupt_tta():
    peer = pytest.importorskip("corrupt_tta.corruptions", reason="corrupt-tta (extra dev) is not installed")
    state = np.random.get_state()  # noqa: NPY002  # the peer draws from the global generator
    try:
        np.random.seed(0)  # noqa: NPY002
        bytes_ = (255 * images(60)).round().to(torch.uint8)
        x = bytes_.float() / 255
        for name, ours in {
            "fog": lambda: module._fog(x, 1.5, 2.0, module._Draw(rng(), x)),
            "shot_noise": lambda: module._shot_noise(x, 60.0, module._Draw(rng(), x)),
            "impulse_noise": lambda: module._impulse_noise(x, 0.03, module._Draw(rng(), x)),
        }.items():
            theirs = np.stack([getattr(peer, name)(image.permute(1, 2, 0).numpy(), 1) for image in bytes_]) / 255
            mine = ours().clamp(0, 1)
            assert float(mine.mean()) == pytest.approx(theirs.mean(), rel=0.03), name
            assert float(mine.std()) == pytest.approx(theirs.std(), rel=0.06), name
    finally:
        np.random.set_state(state)  # noqa: NPY002


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ((images(2), "rain"), ValueError, "gaussian_noise"),
        ((images(2), "contrast", 6), ValueError, "severity"),
        ((images(2), "contrast", 0), ValueError, "severity"),
        ((images(2), "contrast", 2.5), TypeError, "severity"),
        ((images(2)[0], "contrast"), ValueError, "shape"),
        ((images(2)[:, :2], "contrast"), ValueError, "shape"),
        ((images(2) * 255, "contrast"), ValueError, r"\[0, 1\]"),
        ((images(2) - 1, "contrast"), ValueError, r"\[0, 1\]"),
        ((images(2) * float("nan"), "contrast"), ValueError, r"\[0, 1\]"),
        ((torch.zeros(2, 3, 8, 8, dtype=torch.int64), "contrast"), TypeError, "int64"),
        ((images(2), "gaussian_noise"), ValueError, "generator"),
        ((images(2, 1), "saturate"), ValueError, "colour"),
    ],
)
def test_mistakes_are_named(arguments, error, says):
    from inspect import unwrap

    with pytest.raises(error, match=says):
        unwrap(corrupt)(*arguments)  # without the tests' own check of shapes


def test_no_images_are_no_mistake():
    assert corrupt(torch.zeros(0, 3, 8, 8), "contrast").shape == (0, 3, 8, 8)
