"""Corruptions of images at five severities, as batched torch code with explicit random generators.

Hendrycks and Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions and Perturbations", ICLR 2019: the
fifteen corruptions and three held-out ones, with the constants of their 32x32 sets (CIFAR-C), which are gentler than those
for photographs of 224 pixels. Lengths are in pixels of a 32x32 image, except those of ``elastic_transform``, which follow
the image's size.

Three of the fifteen are **procedural stand-ins**: ``frost`` blends in a generated texture where the original blends in
photographs; ``snow`` and ``motion_blur`` use a motion blur of our own where the original calls ImageMagick. The others
follow the original's formulas (``jpeg_compression`` computes the codec's arithmetic, lossless coding aside), but no noise
is equal bit for bit to numpy's.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from outlast._core import _checks
from outlast._core._typing import Shaped

__all__ = ["CORRUPTIONS", "HELD_OUT", "STAND_INS", "corrupt"]

CORRUPTIONS: tuple[str, ...] = (
    "gaussian_noise",
    "shot_noise",
    "impulse_noise",
    "defocus_blur",
    "glass_blur",
    "motion_blur",
    "zoom_blur",
    "snow",
    "frost",
    "fog",
    "brightness",
    "contrast",
    "elastic_transform",
    "pixelate",
    "jpeg_compression",
)
"""The fifteen of the benchmark."""

HELD_OUT: tuple[str, ...] = ("speckle_noise", "gaussian_blur", "saturate")
"""Three on which settings may be chosen."""

STAND_INS: tuple[str, ...] = ("motion_blur", "snow", "frost")
"""Those made here by a procedure of our own, where the benchmark's code needs ImageMagick or photographs."""

_CHUNK = 1000


def corrupt(
    images: Shaped[Tensor, "n c h w"], name: str, severity: int = 5, *, generator: torch.Generator | None = None
) -> Shaped[Tensor, "n c h w"]:
    """Corrupt a batch of images.

    Args:
        images: shape ``(N, C, H, W)`` with ``C`` 1 or 3; floating point in [0, 1], or uint8.
        name: one of ``CORRUPTIONS`` or ``HELD_OUT``.
        severity: 1 (mild) to 5.
        generator: source of all randomness, and needed where there is any: the same seed gives the same images. It may
            live on another device than the images.

    Returns:
        Images of the same shape, type and device; floating-point ones are clamped to [0, 1] and not rounded.

    Raises:
        ValueError: unknown name or severity, wrong shape, values outside [0, 1] or not finite, no generator for a random
            corruption, ``saturate`` on grey images.
        TypeError: images that are neither floating point nor uint8.
    """
    if name not in _TABLE:
        raise ValueError(f"unknown corruption {name!r}; known: {', '.join(_TABLE)}")
    if _checks.integer("severity", severity, low=1) > 5:
        raise ValueError(f"severity must be at most 5, got {severity}")
    _check_images(images)
    function, constants, is_random = _TABLE[name]
    if is_random and generator is None:
        raise ValueError(f"{name} is random: give it a generator, for example torch.Generator().manual_seed(0)")
    if not len(images):
        return images.clone()
    settings = constants[severity - 1]
    parts: list[Tensor] = []
    for part in images.split(_CHUNK):
        x = part.to(torch.float32) / 255.0 if part.dtype == torch.uint8 else part.to(torch.promote_types(part.dtype, torch.float32))
        y = (function(x, *settings, _Draw(generator, x)) if is_random else function(x, *settings)).clamp(0.0, 1.0)
        parts.append((255.0 * y).round().to(torch.uint8) if part.dtype == torch.uint8 else y.to(part.dtype))
    return torch.cat(parts)


class _Draw:
    """Random tensors beside an image batch."""

    def __init__(self, generator: torch.Generator | None, like: Tensor) -> None:
        assert generator is not None
        self.generator = generator
        self._like = like

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, device=self.generator.device).to(self._like)

    def uniform(self, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        drawn = torch.rand(shape, generator=self.generator, device=self.generator.device)
        return (low + (high - low) * drawn).to(self._like)

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=self.generator, device=self.generator.device).to(self._like.device)

    def poisson(self, rate: Tensor) -> Tensor:
        return torch.poisson(rate.to(self.generator.device), self.generator).to(self._like)


# ---- noise -------------------------------------------------------------------------------------------------------------


def _gaussian_noise(x: Tensor, deviation: float, draw: _Draw) -> Tensor:
    return x + deviation * draw.normal(*x.shape)


def _shot_noise(x: Tensor, photons: float, draw: _Draw) -> Tensor:
    return draw.poisson(x * photons) / photons


def _impulse_noise(x: Tensor, amount: float, draw: _Draw) -> Tensor:
    u = draw.uniform(*x.shape)
    return torch.where(u < amount / 2, 0.0, torch.where(u < amount, 1.0, x))


def _speckle_noise(x: Tensor, deviation: float, draw: _Draw) -> Tensor:
    return x + x * deviation * draw.normal(*x.shape)


# ---- blur --------------------------------------------------------------------------------------------------------------


def _gaussian_blur(x: Tensor, deviation: float) -> Tensor:
    return _separable(x, _gaussian(deviation, 4.0).to(x), "replicate")


def _defocus_blur(x: Tensor, radius: float, deviation: float) -> Tensor:
    """A disk, softened by a small Gaussian against aliasing."""
    reach = max(8, math.ceil(radius))
    grid = torch.arange(-reach, reach + 1, dtype=torch.float64)
    disk = (grid[:, None] ** 2 + grid[None, :] ** 2 <= radius**2).double()
    half = 1 if radius <= 8 else 2
    soft = _gaussian(deviation, half / deviation)
    disk = _separable((disk / disk.sum())[None, None], soft, "reflect")[0, 0]
    filled = disk.abs().amax(0).nonzero()
    low, high = int(filled[0]), int(filled[-1])
    return _filter(x, disk[low : high + 1, low : high + 1].to(x))


def _glass_blur(x: Tensor, deviation: float, reach: int, rounds: int, draw: _Draw) -> Tensor:
    """Pixels change places with near neighbours, one place after the other, between two small blurs."""
    n, channels, height, width = x.shape
    x = _gaussian_blur(x, deviation)
    pixels = x.permute(2, 3, 0, 1).reshape(height * width, n, channels).clone()
    samples = torch.arange(n, device=x.device)
    for _ in range(rounds):
        shift = draw.integers(-reach, reach, 2, height, width, n)
        for row in range(height - reach - 1, reach - 1, -1):
            for column in range(width - reach - 1, reach - 1, -1):
                here = row * width + column
                there = (row + shift[0, row, column]) * width + column + shift[1, row, column]
                kept = pixels[here].clone()
                pixels[here] = pixels[there, samples]
                pixels[there, samples] = kept
    return _gaussian_blur(pixels.reshape(height, width, n, channels).permute(2, 3, 0, 1).contiguous(), deviation)


def _motion_blur(x: Tensor, radius: int, deviation: float, draw: _Draw) -> Tensor:
    return _move(x, radius, deviation, draw.uniform(len(x), low=-45.0, high=45.0))


def _move(x: Tensor, radius: int, deviation: float, degrees: Tensor) -> Tensor:
    """Mean along a direction of each image's own, with one-sided Gaussian weights on whole pixels."""
    n, channels, height, width = x.shape
    angle = degrees * (math.pi / 180.0)
    weights = torch.exp(-0.5 * (torch.arange(2 * radius + 1, dtype=torch.float64) / deviation) ** 2)
    weights = weights[weights > 1e-3]
    weights /= weights.sum()
    rows, columns = torch.arange(height, device=x.device), torch.arange(width, device=x.device)
    flat = x.reshape(n, channels, height * width)
    result = torch.zeros_like(flat)
    for step, weight in enumerate(weights.tolist()):
        down, right = (step * torch.sin(angle)).round().long(), (step * torch.cos(angle)).round().long()
        r = (rows + down[:, None]).clamp(0, height - 1)
        c = (columns + right[:, None]).clamp(0, width - 1)
        index = (r[:, :, None] * width + c[:, None, :]).reshape(n, 1, -1).expand_as(flat)
        result.add_(flat.gather(2, index), alpha=weight)
    return result.reshape(x.shape)


def _zoom_blur(x: Tensor, largest: float) -> Tensor:
    """The mean of the image and of its enlargements by 1, 1.01, ..."""
    total = x.clone()
    steps = round((largest - 1.0) / 0.01) + 1
    for step in range(steps):
        total += _enlarge(x, 1.0 + 0.01 * step)
    return total / (steps + 1)


def _enlarge(x: Tensor, factor: float) -> Tensor:
    """The centre, enlarged bilinearly to the size of the whole."""
    height, width = x.shape[-2:]
    crop = [math.ceil(size / factor) for size in (height, width)]
    top, left = (height - crop[0]) // 2, (width - crop[1]) // 2
    inside = x[..., top : top + crop[0], left : left + crop[1]]
    size = [round(length * factor) for length in crop]
    big = F.interpolate(inside, size=size, mode="bilinear", align_corners=True)
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    return big[..., top : top + height, left : left + width]


# ---- weather -----------------------------------------------------------------------------------------------------------


def _snow(
    x: Tensor, mean: float, deviation: float, zoom: float, threshold: float, radius: int, blur: float, keep: float, draw: _Draw
) -> Tensor:
    n, _, height, width = x.shape
    flakes = _enlarge(mean + deviation * draw.normal(n, 1, height, width), zoom)
    flakes = torch.where(flakes < threshold, 0.0, flakes)
    flakes = _move(flakes, radius, blur, draw.uniform(n, low=-135.0, high=-45.0)).clamp(0.0, 1.0)
    pale = keep * x + (1.0 - keep) * torch.maximum(x, _grey(x) * 1.5 + 0.5)
    return pale + flakes + flakes.rot90(2, (2, 3))


def _frost(x: Tensor, keep: float, amount: float, draw: _Draw) -> Tensor:
    """Bright veins where two rough surfaces cross their middle heights, on a cold ground."""
    n, channels, height, width = x.shape
    ridges = [1.0 - (2.0 * _plasma(n, height, width, decay, draw) - 1.0).abs() for decay in (1.6, 2.2)]
    texture = (0.6 * ridges[0] ** 3 + 0.5 * ridges[1] ** 6).clamp(0.0, 1.0)[:, None]
    tint = x.new_tensor([0.88, 0.95, 1.0] if channels == 3 else [0.94]).view(1, -1, 1, 1)
    return keep * x + amount * (0.25 + 0.75 * texture) * tint


def _fog(x: Tensor, strength: float, decay: float, draw: _Draw) -> Tensor:
    largest = x.amax((1, 2, 3), keepdim=True)
    haze = _plasma(len(x), x.shape[2], x.shape[3], decay, draw)[:, None]
    return (x + strength * haze) * largest / (largest + strength)


def _plasma(n: int, height: int, width: int, decay: float, draw: _Draw) -> Tensor:
    """Random surfaces in [0, 1] by midpoint displacement on a torus, cut to ``height x width``."""
    size = 1 << max(1, math.ceil(math.log2(max(height, width))))
    surface = draw.uniform(n, size, size) * 0.0
    step, rough = size, 100.0
    while step >= 2:
        half = step // 2

        def displaced(total: Tensor, rough: float = rough) -> Tensor:
            return total / 4.0 + rough * draw.uniform(*total.shape, low=-rough, high=rough)

        corners = surface[:, ::step, ::step]
        across = corners + corners.roll(-1, 1)
        surface[:, half::step, half::step] = displaced(across + across.roll(-1, 2))
        corners, middles = surface[:, ::step, ::step], surface[:, half::step, half::step]
        surface[:, ::step, half::step] = displaced(middles + middles.roll(1, 1) + corners + corners.roll(-1, 2))
        surface[:, half::step, ::step] = displaced(middles + middles.roll(1, 2) + corners + corners.roll(-1, 1))
        step, rough = half, rough / decay
    surface -= surface.amin((1, 2), keepdim=True)
    return (surface / surface.amax((1, 2), keepdim=True))[:, :height, :width]


# ---- colour and sampling -----------------------------------------------------------------------------------------------


def _brightness(x: Tensor, amount: float) -> Tensor:
    """A higher value in the hue-saturation-value cone: all channels grow in proportion."""
    value = x.amax(1, keepdim=True)
    brighter = (value + amount).clamp(0.0, 1.0)
    return torch.where(value > 0, x * (brighter / value.clamp(min=1e-12)), brighter)


def _saturate(x: Tensor, factor: float, shift: float) -> Tensor:
    if x.shape[1] != 3:
        raise ValueError("saturate needs colour images (3 channels), got 1 channel")
    value = x.amax(1, keepdim=True)
    gap = value - x
    saturation = gap.amax(1, keepdim=True) / value.clamp(min=1e-12)
    wanted = (saturation * factor + shift).clamp(0.0, 1.0)
    # a grey pixel has no hue; it counts as red
    red = value * (1.0 - wanted * x.new_tensor([0.0, 1.0, 1.0]).view(1, 3, 1, 1))
    return torch.where(saturation > 0, value - gap * (wanted / saturation.clamp(min=1e-12)), red)


def _contrast(x: Tensor, factor: float) -> Tensor:
    means = x.mean((2, 3), keepdim=True)
    return (x - means) * factor + means


def _elastic_transform(x: Tensor, strength: float, deviation: float, affine: float, draw: _Draw) -> Tensor:
    """A random affine map, then a smooth random displacement; lengths in units of the image's width."""
    n, _, height, width = x.shape
    size = float(width)
    centre = torch.tensor([width // 2, height // 2], dtype=torch.float32)
    arm = min(height, width) // 3
    start = (centre + torch.tensor([[arm, arm], [arm, -arm], [-arm, -arm]])).to(x)
    end = start + draw.uniform(n, 3, 2, low=-affine * size, high=affine * size)
    ones = x.new_ones(n, 3, 1)
    # the map from places in the result to places in the image
    matrix = torch.linalg.solve(torch.cat([end, ones], 2), start.expand(n, 3, 2))
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    grid = torch.stack([columns, rows], -1).reshape(-1, 2).to(x)
    x = _sample(x, (grid @ matrix[:, :2] + matrix[:, 2:]).reshape(n, height, width, 2), centred=True)
    noise = draw.uniform(2, n, height, width, low=-1.0, high=1.0)
    if deviation > 0:
        noise = _separable(noise, _gaussian(deviation * size, 3.0).to(x), "symmetric")
    shift = strength * size * torch.stack([noise[0], noise[1]], -1)
    return _sample(x, grid.reshape(height, width, 2) + shift, centred=False)


def _pixelate(x: Tensor, scale: float) -> Tensor:
    height, width = x.shape[-2:]
    small = int(height * scale), int(width * scale)
    for target in (small, (height, width)):
        down, across = (_box(before, after).to(x) for before, after in zip(x.shape[-2:], target, strict=True))
        x = torch.round(255.0 * (down @ x @ across.T)) / 255.0  # the original works on bytes
    return x


def _box(before: int, after: int) -> Tensor:
    """Box resampling as a matrix: each target pixel is the mean of the source pixels whose centres it covers."""
    scale = before / after
    support = 0.5 * max(scale, 1.0)
    matrix = torch.zeros(after, before, dtype=torch.float64)
    for row in range(after):
        centre = (row + 0.5) * scale
        first, last = max(0, int(centre - support + 0.5)), min(before, int(centre + support + 0.5))
        matrix[row, first : max(last, first + 1)] = 1.0
    return matrix / matrix.sum(1, keepdim=True)


_LUMINANCE = (
    16, 11, 10, 16, 24, 40, 51, 61, 12, 12, 14, 19, 26, 58, 60, 55,
    14, 13, 16, 24, 40, 57, 69, 56, 14, 17, 22, 29, 51, 87, 80, 62,
    18, 22, 37, 56, 68, 109, 103, 77, 24, 35, 55, 64, 81, 104, 113, 92,
    49, 64, 78, 87, 103, 121, 120, 101, 72, 92, 95, 98, 112, 100, 103, 99,
)  # fmt: skip
_CHROMINANCE = (
    17, 18, 24, 47, 99, 99, 99, 99, 18, 21, 26, 66, 99, 99, 99, 99, 24, 26, 56, 99, 99, 99, 99, 99, 47, 66, 99, 99, 99, 99, 99, 99,
    *([99] * 32),
)  # fmt: skip


def _jpeg_compression(x: Tensor, quality: int) -> Tensor:
    """What a JPEG encoder and decoder (4:2:0, smooth upsampling) make of the images; the lossless stage is left out."""
    x = torch.round(255.0 * x)
    if x.shape[1] == 1:
        return _jpeg_plane(x, _LUMINANCE, quality) / 255.0
    height, width = x.shape[-2:]
    to_ycc = x.new_tensor([[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]])
    planes = torch.round(torch.einsum("ij,njhw->nihw", to_ycc, x) + x.new_tensor([0.0, 128.0, 128.0]).view(1, 3, 1, 1))
    light = _jpeg_plane(planes[:, :1], _LUMINANCE, quality)
    even = F.pad(planes[:, 1:], (0, width % 2, 0, height % 2), mode="replicate")
    colour = _jpeg_plane(torch.round(F.avg_pool2d(even, 2)), _CHROMINANCE, quality)
    colour = torch.round(F.interpolate(colour, scale_factor=2.0, mode="bilinear", align_corners=False))[..., :height, :width] - 128.0
    red, blue = light[:, 0] + 1.402 * colour[:, 1], light[:, 0] + 1.772 * colour[:, 0]
    green = light[:, 0] - 0.344136 * colour[:, 0] - 0.714136 * colour[:, 1]
    return torch.round(torch.stack([red, green, blue], 1)).clamp(0.0, 255.0) / 255.0


def _jpeg_plane(plane: Tensor, table: tuple[int, ...], quality: int) -> Tensor:
    n, channels, height, width = plane.shape
    scale = 5000 // quality if quality < 50 else 200 - 2 * quality
    steps = plane.new_tensor([min(255, max(1, (entry * scale + 50) // 100)) for entry in table]).view(8, 8)
    k = torch.arange(8, dtype=torch.float64)
    transform = 0.5 * torch.cos(math.pi * (2 * k[None, :] + 1) * k[:, None] / 16)
    transform[0] /= math.sqrt(2.0)
    transform = transform.to(plane)
    padded = F.pad(plane, (0, -width % 8, 0, -height % 8), mode="replicate") - 128.0
    rows, columns = padded.shape[2] // 8, padded.shape[3] // 8
    blocks = padded.reshape(n, channels, rows, 8, columns, 8).transpose(3, 4)
    coefficients = torch.round(transform @ blocks @ transform.T / steps) * steps
    blocks = (transform.T @ coefficients @ transform).transpose(3, 4)
    return torch.round(blocks.reshape(padded.shape)[..., :height, :width] + 128.0).clamp(0.0, 255.0)


# ---- small filters -----------------------------------------------------------------------------------------------------


def _grey(x: Tensor) -> Tensor:
    if x.shape[1] == 1:
        return x
    return (x * x.new_tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)).sum(1, keepdim=True)


def _gaussian(deviation: float, truncate: float) -> Tensor:
    reach = int(truncate * deviation + 0.5)
    weights = torch.exp(-0.5 * (torch.arange(-reach, reach + 1, dtype=torch.float64) / deviation) ** 2)
    return weights / weights.sum()


def _separable(x: Tensor, weights: Tensor, border: str) -> Tensor:
    """Rows and columns of each plane filtered with the same symmetric weights."""
    for dim in (2, 3):
        x = _filter(x, weights[:, None] if dim == 2 else weights[None, :], border)
    return x


def _filter(x: Tensor, kernel: Tensor, border: str = "reflect") -> Tensor:
    """Each plane correlated with one kernel of odd sides."""
    n, channels, height, width = x.shape
    down, across = kernel.shape[0] // 2, kernel.shape[1] // 2
    if border == "replicate":
        padded = F.pad(x, (across, across, down, down), mode="replicate")
    else:
        rows, columns = (_mirror(size, reach, border).to(x.device) for size, reach in ((height, down), (width, across)))
        padded = x[:, :, rows][..., columns]
    planes = padded.reshape(n * channels, 1, *padded.shape[2:])
    return F.conv2d(planes, kernel.to(x)[None, None]).reshape(x.shape)


def _mirror(size: int, reach: int, border: str) -> Tensor:
    """Indices that continue a line beyond both ends by mirroring, about the last pixel's centre or (symmetric) its edge."""
    index = torch.arange(-reach, size + reach)
    if border == "symmetric":
        index = index % (2 * size)
        return torch.where(index < size, index, 2 * size - 1 - index)
    period = max(1, 2 * size - 2)
    index = index % period
    return torch.where(index < size, index, period - index)


def _sample(x: Tensor, places: Tensor, *, centred: bool) -> Tensor:
    """Bilinear values at ``places`` (column, row), mirrored about the border's pixel centres or edges."""
    size = places.new_tensor([x.shape[3], x.shape[2]])
    grid = 2.0 * places / (size - 1) - 1.0 if centred else (2.0 * places + 1.0) / size - 1.0
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="reflection", align_corners=centred)


def _check_images(images: Tensor) -> None:
    if images.ndim != 4 or images.shape[1] not in (1, 3) or min(images.shape[2:]) < 2:
        raise ValueError(f"images must have shape (N, 1 or 3, H, W) with sides of at least 2, got {tuple(images.shape)}")
    if images.dtype == torch.uint8 or not images.numel():
        return
    if not images.is_floating_point():
        raise TypeError(f"images must be floating point in [0, 1] or uint8, got {images.dtype}")
    low, high = float(images.min()), float(images.max())
    if not (low >= 0.0 and high <= 1.0):
        raise ValueError(f"floating-point images must lie in [0, 1], got values from {low:g} to {high:g}")


# name: function, constants of severity 1 to 5, whether it draws
_TABLE: dict[str, tuple[Callable[..., Tensor], tuple[tuple[Any, ...], ...], bool]] = {
    "gaussian_noise": (_gaussian_noise, ((0.04,), (0.06,), (0.08,), (0.09,), (0.10,)), True),
    "shot_noise": (_shot_noise, ((500,), (250,), (100,), (75,), (50,)), True),
    "impulse_noise": (_impulse_noise, ((0.01,), (0.02,), (0.03,), (0.05,), (0.07,)), True),
    "defocus_blur": (_defocus_blur, ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1.0, 0.2), (1.5, 0.1)), False),
    "glass_blur": (_glass_blur, ((0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2)), True),
    "motion_blur": (_motion_blur, ((6, 1.0), (6, 1.5), (6, 2.0), (8, 2.0), (9, 2.5)), True),
    "zoom_blur": (_zoom_blur, ((1.06,), (1.11,), (1.16,), (1.21,), (1.26,)), False),
    "snow": (
        _snow,
        (
            (0.1, 0.2, 1.0, 0.6, 8, 3.0, 0.95),
            (0.1, 0.2, 1.0, 0.5, 10, 4.0, 0.9),
            (0.15, 0.3, 1.75, 0.55, 10, 4.0, 0.9),
            (0.25, 0.3, 2.25, 0.6, 12, 6.0, 0.85),
            (0.3, 0.3, 1.25, 0.65, 14, 12.0, 0.8),
        ),
        True,
    ),
    "frost": (_frost, ((1.0, 0.2), (1.0, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45)), True),
    "fog": (_fog, ((0.2, 3.0), (0.5, 3.0), (0.75, 2.5), (1.0, 2.0), (1.5, 1.75)), True),
    "brightness": (_brightness, ((0.05,), (0.1,), (0.15,), (0.2,), (0.3,)), False),
    "contrast": (_contrast, ((0.75,), (0.5,), (0.4,), (0.3,), (0.15,)), False),
    "elastic_transform": (
        _elastic_transform,
        ((0.0, 0.0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05), (0.1, 0.03, 0.03)),
        True,
    ),
    "pixelate": (_pixelate, ((0.95,), (0.9,), (0.85,), (0.75,), (0.65,)), False),
    "jpeg_compression": (_jpeg_compression, ((80,), (65,), (58,), (50,), (40,)), False),
    "speckle_noise": (_speckle_noise, ((0.06,), (0.10,), (0.12,), (0.16,), (0.20,)), True),
    "gaussian_blur": (_gaussian_blur, ((0.4,), (0.6,), (0.7,), (0.8,), (1.0,)), False),
    "saturate": (_saturate, ((0.3, 0.0), (0.1, 0.0), (1.5, 0.0), (2.0, 0.1), (2.5, 0.2)), False),
}
