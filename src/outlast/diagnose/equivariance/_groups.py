"""Transformations of inputs, and drawing them from groups."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from outlast._core._checks import choice
from outlast._core._random import haar_orthogonal

MATRIX_GROUPS = ("orthogonal", "signed_permutation", "permutation", "sign_flip")
GRID_GROUPS = ("shift", "rotation90", "reflection")
GROUPS = (*MATRIX_GROUPS, *GRID_GROUPS)
DENSE = 4096  # above, an orthogonal draw is a product of reflections
REFLECTIONS = 32


@dataclass(frozen=True)
class Transformation:
    """One g.

    Attributes:
        group: its name.
        apply: of inputs ``(n, ...)``; linear and orthogonal unless it is a user's callable.
        orthogonal: whether weights of a dense first layer may follow it: ``W' g x = W x`` if W' has the rows g w.
        on_kernels: the same for the kernels ``(out, in, ...)`` of convolutions; None where no change of kernels undoes it.
    """

    group: str
    apply: Callable[[Tensor], Tensor]
    orthogonal: bool = True
    on_kernels: Callable[[Tensor], Tensor] | None = None


def draw(group: str, shape: Sequence[int], stream: torch.Generator, dtype: torch.dtype) -> Transformation:
    """A random element of a group that acts on inputs of ``shape`` (without the batch).

    Raises:
        ValueError: an unknown group, or one that inputs of this shape have not.
    """
    choice("groups", group, GROUPS)
    if group in MATRIX_GROUPS:
        if group == "orthogonal" and math.prod(shape) > DENSE:
            group = f"orthogonal ({REFLECTIONS} reflections)"
        return Transformation(group, _flat(_matrix_like(group, math.prod(shape), stream, dtype)))
    axes = max(1, min(len(shape) - 1, 3))
    if group == "shift":
        sizes = shape[-axes:]
        if max(sizes) < 2:
            raise ValueError(f"inputs of shape {tuple(shape)} cannot be shifted: their last axes have one place")
        offsets = [int(torch.randint(1, max(size, 2), (), generator=stream)) % size for size in sizes]
        places = tuple(range(-axes, 0))
        return Transformation(group, lambda x: x.roll(offsets, places), on_kernels=lambda kernel: kernel)
    if group == "rotation90":
        if len(shape) < 2 or shape[-1] != shape[-2]:
            raise ValueError(f"rotation90 needs inputs whose last two axes are equal, got shape {tuple(shape)}")
        turns = int(torch.randint(1, 4, (), generator=stream))
        return Transformation(group, lambda x: x.rot90(turns, (-2, -1)), on_kernels=lambda kernel: kernel.rot90(turns, (-2, -1)))
    axis = -1 - int(torch.randint(axes, (), generator=stream))
    return Transformation(group, lambda x: x.flip(axis), on_kernels=lambda kernel: kernel.flip(axis))


def from_matrix(matrix: Tensor, size: int, dtype: torch.dtype, name: str) -> Transformation:
    """A user's orthogonal matrix, acting on flattened inputs.

    Raises:
        ValueError: not square, of another size, or not orthogonal (the message has max |U U^T - I|).
    """
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        raise ValueError(f"{name} must be square, got shape {tuple(matrix.shape)}; max |U U^T - I| is not defined")
    U = matrix.detach().cpu().double()
    off = float((U @ U.T - torch.eye(len(U), dtype=U.dtype)).abs().max())
    if not off <= 1e-6:
        raise ValueError(f"{name} must be orthogonal, got max |U U^T - I| = {off:.3g}")
    if len(U) != size:
        raise ValueError(f"{name} is of {len(U)} features, inputs have {size}")
    return Transformation(name, _flat(lambda x: x @ U.T.to(dtype)))


def _flat(action: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: action(x.flatten(1)).view_as(x)


def _matrix_like(group: str, size: int, stream: torch.Generator, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """The action of a random matrix on rows ``(n, size)``."""
    if group.startswith("orthogonal"):
        if size <= DENSE:
            U = haar_orthogonal(size, size, generator=stream).to(dtype)
            return lambda x: x @ U.T
        axes = torch.nn.functional.normalize(torch.randn(REFLECTIONS, size, generator=stream, dtype=torch.float64), dim=1).to(dtype)

        def reflect(x: Tensor) -> Tensor:
            for axis in axes:
                x = x - 2.0 * (x @ axis)[:, None] * axis
            return x

        return reflect
    order = torch.randperm(size, generator=stream)
    signs = 2.0 * torch.randint(2, (size,), generator=stream).to(dtype) - 1.0
    if group == "permutation":
        return lambda x: x[:, order]
    if group == "sign_flip":
        return lambda x: x * signs
    return lambda x: x[:, order] * signs
