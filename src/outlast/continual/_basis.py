"""Which directions of a layer's inputs matter: energy of rows, and the smallest basis that holds enough of it.

Saha, Garg, Roy, ICLR 2021, equations 5, 8 and 9, in Gram form: the eigenvalues of the residual rows' Gram matrix are the
squared singular values that the paper thresholds. Everything here is float64 and batched over the groups of a layer.

Letters: b groups, n rows, d width of a row, k basis vectors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import pairwise

import torch
from torch import Tensor

from outlast._core import _distributed
from outlast._core._linalg import eigh_descending
from outlast._core._typing import Float

GRAM_LIMIT = 8192  # above this width a d x d matrix in float64 takes more than half a GiB
SLACK = 1e-12  # of the total energy, in the comparison with the threshold
_CHUNK = 1 << 22  # entries that are widened to float64 at a time


@dataclass(frozen=True)
class Selection:
    """What a task adds to the basis of a layer.

    Attributes:
        vectors: new orthonormal columns, orthogonal to the old ones, ``(b, d, added)``; zero where a group adds fewer.
        added: number of new columns of each group, ``(b,)``.
        total: energy of the rows, ``(b,)``.
        before: energy inside the old basis, ``(b,)``.
        after: energy inside the basis with the new columns, ``(b,)``.
        old_strength: root of the rows' energy along each old column, ``(b, k)``.
        strength: singular values of the residual rows along the new columns, ``(b, added)``.
    """

    vectors: Tensor
    added: Tensor
    total: Tensor
    before: Tensor
    after: Tensor
    old_strength: Tensor
    strength: Tensor

    def to(self, device: torch.device | str) -> Selection:
        """A copy on another device."""
        return Selection(*(getattr(self, entry.name).to(device) for entry in fields(self)))


class Rows:
    """Rows of one layer, kept in the smallest form: themselves while fewer than ``d``, then their Gram matrix.

    Above ``GRAM_LIMIT`` the residual of the old basis is compressed as it streams: the directions of least energy are
    dropped so long as all that was dropped stays below a twentieth of what the threshold leaves out. Energies of the old
    basis and the total stay exact, and those of new directions are lower bounds, so that the threshold is always met.
    """

    def __init__(self, basis: Float[Tensor, "b d k"], threshold: float) -> None:
        self.basis = basis  # float64, orthonormal columns (zero where padded)
        self.groups, self.dim, _ = basis.shape
        self.count = torch.zeros(self.groups, dtype=torch.int64)
        self.total = basis.new_zeros(self.groups)
        self.finite = True
        self._spare = 1.0 - threshold
        self._rows: list[list[Tensor]] = [[] for _ in range(self.groups)]
        self._kept = 0  # rows of the longest group after the last compression
        self._gram: Tensor | None = None
        self._dropped = basis.new_zeros(self.groups)
        self._inside = basis.new_zeros(basis.shape[0], basis.shape[2])

    def add(self, rows: Float[Tensor, "b n d"], groups: slice = slice(None)) -> None:
        """Take rows of some groups (all by default)."""
        numbers = range(self.groups)[groups]
        step = max(1, _CHUNK // max(1, rows.shape[0] * self.dim))
        for chunk in rows.detach().split(step, 1):
            wide = chunk.to(self.basis.device, torch.float64)
            energy = torch.linalg.vector_norm(wide, dim=(1, 2)).square()
            if not torch.isfinite(energy).all():
                self.finite = False  # said by the caller, on all processes at once
                return
            self.count[groups] += wide.shape[1]
            self.total[groups] += energy
            if self._gram is not None:
                _add_gram(self._gram[groups], wide)
                continue
            kept = self._outside(wide, groups) if self.dim > GRAM_LIMIT else wide
            for number, part in zip(numbers, kept, strict=True):
                self._rows[number].append(part)
            self._shrink()

    def _outside(self, wide: Tensor, groups: slice) -> Tensor:
        inside = wide @ self.basis[groups]
        self._inside[groups] += inside.square().sum(1)
        return wide - inside @ self.basis[groups].mT

    def _shrink(self) -> None:
        held = max(sum(map(len, parts)) for parts in self._rows)
        if self.dim <= GRAM_LIMIT:
            if held > self.dim:
                self._fold()
            return
        if held > max(512, 2 * self._kept + 32):
            for number, parts in enumerate(self._rows):
                self._rows[number] = [self._compress(torch.cat(parts), number)] if parts else []
            self._kept = max((len(parts[0]) for parts in self._rows if parts), default=0)

    def _compress(self, rows: Tensor, number: int) -> Tensor:
        values, vectors = eigh_descending(rows @ rows.mT)
        assert vectors is not None
        budget = 0.05 * self._spare * self.total[number] - self._dropped[number]
        tail = values.flip(0).cumsum(0).flip(0)  # energy from each direction on
        keep = int((tail > torch.clamp(budget, min=1e-15 * float(self.total[number]))).sum())
        self._dropped[number] += values[keep:].sum()
        return vectors[:, :keep].mT @ rows

    def _fold(self) -> None:
        gram = self.basis.new_zeros(self.groups, self.dim, self.dim)
        for number, parts in enumerate(self._rows):
            for part in parts:
                _add_gram(gram[number : number + 1], part[None])
        self._gram, self._rows = gram, [[] for _ in range(self.groups)]

    def expand(self, groups: int) -> None:
        """Go on as several groups that have seen the same rows so far."""
        self.groups = groups
        self.basis = self.basis.expand(groups, -1, -1).contiguous()
        self.count, self.total, self._dropped = (value.repeat(groups) for value in (self.count, self.total, self._dropped))
        self._inside = self._inside.repeat(groups, 1)
        self._rows = [list(self._rows[0]) for _ in range(groups)]
        self._gram = None if self._gram is None else self._gram.repeat(groups, 1, 1)

    def merge_processes(self) -> None:
        """Add up what all processes saw; afterwards each holds the same."""
        if _distributed.world_size() == 1:
            return
        everyone = _distributed.gather((self.finite, self.count, self._gram is not None))
        self.finite = all(finite for finite, _, _ in everyone)
        if not self.finite:
            return
        counts: list[Tensor] = [count for _, count, _ in everyone]
        self.count = torch.stack(counts).sum(0)
        device = self.total.device
        self.total = _distributed.sum_(self.total)
        if self.dim > GRAM_LIMIT:
            self._inside = _distributed.sum_(self._inside)
            self._dropped = _distributed.sum_(self._dropped)
        elif any(folded for _, _, folded in everyone) or int(self.count.max()) > self.dim:
            if self._gram is None:
                self._fold()
            assert self._gram is not None
            self._gram = _distributed.sum_(self._gram)
            return
        mine = [torch.cat(parts).cpu() if parts else self.total.new_zeros(0, self.dim).cpu() for parts in self._rows]
        gathered: list[list[Tensor]] = _distributed.gather(mine)
        self._rows = [[rows[number].to(device) for rows in gathered] for number in range(self.groups)]

    def select(self, threshold: float, *, official: bool, limit: int, ranks: Sequence[int]) -> Selection:
        """The fewest new directions that bring the energy inside the basis to ``threshold`` of the total.

        Args:
            threshold: share of the energy, in (0, 1].
            official: count as the authors' code does in the first task, one direction fewer than equation 5 asks for.
            limit: largest number of columns of a group, old ones included.
            ranks: old columns of each group.
        """
        if self._gram is not None:
            inside, values, vectors = self._from_gram(self._gram)
        else:
            inside, values, vectors = self._from_rows(threshold)
        before = inside.sum(1)
        reached = before[:, None] + values.cumsum(1)
        wanted = threshold * self.total[:, None]
        if official and not any(ranks):
            number = (reached < wanted).sum(1)
        else:
            number = (reached < wanted - SLACK * self.total[:, None]).sum(1) + 1
            number[before >= wanted[:, 0] - SLACK * self.total] = 0
        real = (values > self.dim * torch.finfo(torch.float64).eps * self.total[:, None]).sum(1)
        room = torch.tensor([limit - rank for rank in ranks], device=number.device)
        number = torch.minimum(torch.minimum(number, real), room).clamp(min=0)
        most = int(number.max())
        mask = torch.arange(most, device=number.device) < number[:, None]
        new = torch.where(mask[:, None, :], vectors[..., :most], 0.0)
        for _ in range(2):  # once is not enough where little of a vector is outside the old basis
            new = new - self.basis @ (self.basis.mT @ new)
        if most:
            new = torch.where(mask[:, None, :], torch.linalg.qr(new).Q, 0.0)
        strength = torch.where(mask, values[:, :most], 0.0)
        return Selection(
            vectors=new,
            added=number,
            total=self.total,
            before=before,
            after=before + strength.sum(1),
            old_strength=inside.clamp(min=0.0).sqrt(),
            strength=strength.sqrt(),
        )

    def _from_gram(self, half: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        basis = self.basis
        gram = torch.tril(half) + torch.tril(half, -1).mT
        across = basis.mT @ gram
        core = across @ basis
        rest = gram - basis @ across
        rest = rest - (rest @ basis) @ basis.mT
        values, vectors = eigh_descending((rest + rest.mT) / 2)
        assert vectors is not None
        return core.diagonal(dim1=1, dim2=2), values, vectors

    def _from_rows(self, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
        """Directions only so far as the threshold can ask for them."""
        found: list[tuple[Tensor, Tensor, Tensor]] = []
        for number in range(self.groups):
            basis = self.basis[number]
            parts = self._rows[number]
            rows = torch.cat(parts) if parts else basis.new_zeros(0, self.dim)
            inside = self._inside[number]
            if self.dim <= GRAM_LIMIT:
                along = rows @ basis
                inside = along.square().sum(0)
                rows = rows - along @ basis.mT
            values, left = eigh_descending(rows @ rows.mT)
            assert left is not None
            real = int((values > self.dim * torch.finfo(torch.float64).eps * self.total[number]).sum())
            needed = min(real, int((inside.sum() + values.cumsum(0) < threshold * self.total[number]).sum()) + 1)
            found.append((inside, values[:real], rows.mT @ (left[:, :needed] / values[:needed].sqrt())))
        most = max((len(values) for _, values, _ in found), default=0)
        values = self.total.new_zeros(self.groups, most)
        vectors = self.total.new_zeros(self.groups, self.dim, most)
        for number, (_, own, directions) in enumerate(found):
            values[number, : len(own)] = own
            vectors[number, :, : directions.shape[1]] = directions
        return torch.stack([inside for inside, _, _ in found]), values, vectors


def _add_gram(gram: Tensor, rows: Tensor) -> None:
    """``gram += rows^T rows`` for ``(b, d, d)`` and ``(b, n, d)``; only what lies below the diagonal blocks is kept up."""
    d = rows.shape[2]
    edges = [d * part // 4 for part in range(5)] if d >= 128 else [0, d]
    for start, end in pairwise(edges):
        gram[:, start:, start:end] += rows[:, :, start:].mT @ rows[:, :, start:end]


def joined(old: Float[Tensor, "b d k"], new: Float[Tensor, "b d m"], ranks: Sequence[int], added: Sequence[int]) -> Tensor:
    """Old and new columns side by side for each group, padded with zero columns behind."""
    both = torch.cat([old, new], 2)
    if len(ranks) > 1:  # groups have different numbers of columns: move the padding behind
        numbers = torch.arange(both.shape[2])
        held = [
            (numbers < rank) | ((numbers >= old.shape[2]) & (numbers < old.shape[2] + more))
            for rank, more in zip(ranks, added, strict=True)
        ]
        order = torch.stack([(~own).to(torch.int64).argsort(stable=True) for own in held]).to(both.device)
        both = both.gather(2, order[:, None, :].expand_as(both))
    return both[:, :, : max(rank + more for rank, more in zip(ranks, added, strict=True))]


def orthonormal(basis: Tensor, ranks: Sequence[int]) -> Tensor:
    """A stored basis in float64 with columns that are orthonormal to float64's precision, spanning the same space."""
    wide = basis.double()
    if wide.shape[2] == 0:
        return wide
    mask = torch.arange(wide.shape[2], device=wide.device) < torch.tensor(list(ranks), device=wide.device)[:, None]
    q, r = torch.linalg.qr(wide)
    sign = torch.where(r.diagonal(dim1=1, dim2=2) < 0, -1.0, 1.0)
    return torch.where(mask[:, None, :], q * sign[:, None, :], 0.0)


def complement(basis: Tensor, ranks: Sequence[int]) -> Tensor:
    """An orthonormal basis of what a basis leaves free, ``(b, d, d - smallest rank)``, zero columns where it is smaller."""
    wide = orthonormal(basis, ranks)
    _, vectors = eigh_descending(torch.eye(wide.shape[1], dtype=wide.dtype, device=wide.device) - wide @ wide.mT)
    assert vectors is not None
    width = wide.shape[1] - min(ranks)
    mask = torch.arange(width, device=wide.device) < wide.shape[1] - torch.tensor(list(ranks), device=wide.device)[:, None]
    return torch.where(mask[:, None, :], vectors[..., :width], 0.0)
