"""What the law of a layer's initial weights is symmetric to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from outlast._core._checks import integer
from outlast._core._random import derived_seed, haar_orthogonal, own_stream, seeded
from outlast._core._random import generator as stream_of
from outlast._core._result import Result
from outlast.diagnose.equivariance._layers import InputLayer, input_layers

Law = Literal["orthogonal", "signed_permutation", "permutation", "sign_flip", "none"]
RANDOMISATIONS = 199
LEVEL = 0.05


@dataclass(frozen=True, repr=False)
class SymmetryResult(Result):
    """Symmetry of the law of initial weights under maps of the inputs, at the 5 % level.

    Attributes:
        law: largest group that was not refuted: ``"orthogonal"``, ``"signed_permutation"``, ``"permutation"``, ``"sign_flip"`` or
            ``"none"``.
        p_orthogonal: p-value of the symmetry under all rotations.
        p_permutation: under permutations of the inputs.
        p_sign: under changes of their signs.
        kurtosis: excess kurtosis of the entries; 0 for Gaussian, -1.2 for uniform ones.
        layer: name of the layer.
        rows: rows of weights that were looked at, over all draws.
    """

    law: Law
    p_orthogonal: float
    p_permutation: float
    p_sign: float
    kurtosis: float
    layer: str
    rows: int


def initialisation_symmetry(
    make_model: Callable[[], nn.Module],
    *,
    input_layer: InputLayer = None,
    draws: int = 16,
    generator: torch.Generator | None = None,
) -> SymmetryResult:
    """Test whether the initial weights of the input layer are drawn symmetrically.

    A training whose updates commute with rotations is blind to them only if its initial weights are as well: torch's default for
    Linear is uniform, hence symmetric under permutations and signs but not under rotations.

    Randomisation tests: under a symmetry the weights of every draw may be replaced by a random image of themselves. Compared are the
    column means, the second moments, the fourth moments along the axes (the kurtosis), and the energy distance to a random image;
    p-values are those of the smallest of the four, times four.

    Args:
        make_model: builds a freshly initialised model from torch's, numpy's and Python's global generators, which are restored.
        input_layer: name of the layer; the model's first Linear or Conv layer otherwise. Of several the first is looked at. Kernels of a
            convolution are taken as rows.
        draws: models that are built.
        generator: of seeds and images; a fixed one otherwise.

    Raises:
        ValueError: fewer than two draws, or no such layer.
    """
    integer("draws", draws, low=2)
    seed = int(torch.randint(2**31 - 1, (), generator=own_stream(generator, "initialisation symmetry")))
    weights: list[Tensor] = []
    name = ""
    for index in range(draws):
        with seeded(derived_seed(seed, "initialisation", index)):
            model = make_model()
        name = input_layers(model, input_layer, None)[0]
        weight: Tensor = model.get_submodule(name).weight  # pyright: ignore[reportAssignmentType]
        weights.append(weight.detach().cpu().double().flatten(1))
    return symmetry_of(torch.stack(weights), name, seed)


def symmetry_of(weights: Tensor, name: str, seed: int) -> SymmetryResult:
    """The tests on weights ``(draws, rows, dims)``."""
    draws, rows, dims = weights.shape
    kept = min(rows, dims, max(2, min(8192 // dims + 1, 128 // draws + 1)))
    weights = weights[:, :kept]
    scale = float(weights.square().mean().sqrt())
    if scale == 0.0:  # zeros are symmetric to everything
        return SymmetryResult("orthogonal", 1.0, 1.0, 1.0, 0.0, name, weights.shape[0] * weights.shape[1])
    weights = weights / scale
    entries = weights - weights.mean()
    kurtosis = float(entries.pow(4).mean() / entries.square().mean().square() - 3.0) if float(entries.abs().max()) > 0.0 else 0.0
    found = {
        group: _p_value(weights, images, stream_of(seed, group))
        for group, images in (("orthogonal", _rotated), ("permutation", _permuted), ("sign", _flipped))
    }
    law: Law = "none"
    if found["orthogonal"] > LEVEL:
        law = "orthogonal"
    elif found["permutation"] > LEVEL:
        law = "signed_permutation" if found["sign"] > LEVEL else "permutation"
    elif found["sign"] > LEVEL:
        law = "sign_flip"
    return SymmetryResult(
        law, found["orthogonal"], found["permutation"], found["sign"], kurtosis, name, weights.shape[0] * weights.shape[1]
    )


def _p_value(weights: Tensor, images: Callable[[Tensor, int, torch.Generator], Tensor], stream: torch.Generator) -> float:
    """Smallest p-value over the statistics, times their number."""
    reference = images(weights, 1, stream)[0].flatten(0, 1)
    observed = _statistics(weights.flatten(0, 1)[None], reference)[0]
    drawn: list[Tensor] = []
    chunk = max(1, min(RANDOMISATIONS, 2_000_000 // weights.numel()))
    for start in range(0, RANDOMISATIONS, chunk):
        made = images(weights, min(chunk, RANDOMISATIONS - start), stream)
        drawn.append(_statistics(made.flatten(1, 2), reference))
    null = torch.cat(drawn)
    tolerance = 1e-9 * observed.abs()  # where a statistic is the same for all images, rounding must not decide
    above = (1.0 + (null >= observed - tolerance).sum(0)) / (RANDOMISATIONS + 1.0)
    below = (1.0 + (null <= observed + tolerance).sum(0)) / (RANDOMISATIONS + 1.0)
    above[2] = 2.0 * torch.minimum(above[2], below[2])  # fourth moments may be too large or too small
    return min(1.0, float(above.min()) * len(above))


def _statistics(samples: Tensor, reference: Tensor) -> Tensor:
    """Four statistics of rows ``(images, n, dims)``: means, second moments, fourth moments, energy distance to the reference."""
    n, dims = samples.shape[1:]
    means = samples.mean(1).square().sum(-1)
    gram = samples @ samples.mT
    second = gram.square().sum((1, 2)) / n**2  # the squared norm of the matrix of second moments
    norms = samples.square().sum(-1)
    fourth = (samples.pow(4).sum(-1) / norms.square().clamp_min(1e-300)).mean(-1) * dims
    across = torch.cdist(samples, reference[None]).mean((1, 2))
    diagonal = gram.diagonal(dim1=1, dim2=2)
    within = (diagonal[:, :, None] + diagonal[:, None] - 2.0 * gram).clamp_min(0.0).sqrt().mean((1, 2))
    return torch.stack([means, second, fourth, 2.0 * across - within], 1)


def _rotated(weights: Tensor, count: int, stream: torch.Generator) -> Tensor:
    """Images under independent rotations, one for each draw.

    Rows W = L V0 with orthonormal V0 become L V with V uniform on the frames of that many rows, so no matrix of dims x dims is needed.
    """
    draws, rows, dims = weights.shape
    values, vectors = torch.linalg.eigh(weights @ weights.mT)
    root = vectors * values.clamp_min(0.0).sqrt()[:, None]
    frames = haar_orthogonal(count, draws, dims, rows, generator=stream).mT
    return root @ frames


def _permuted(weights: Tensor, count: int, stream: torch.Generator) -> Tensor:
    draws, rows, dims = weights.shape
    order = torch.rand(count, draws, dims, generator=stream).argsort(-1)
    return weights.expand(count, -1, -1, -1).gather(3, order[:, :, None].expand(-1, -1, rows, -1))


def _flipped(weights: Tensor, count: int, stream: torch.Generator) -> Tensor:
    draws, _, dims = weights.shape
    signs = 2.0 * torch.randint(2, (count, draws, 1, dims), generator=stream).double() - 1.0
    return weights * signs
