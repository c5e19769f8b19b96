"""Exact nearest neighbours in blocks, with a certificate for each row.

Squared distances come from one matrix product a block (columns for the norms are appended, so that the product is the
squared distance), of which only the best few are kept: groups of entries whose minimum is no better than the worst that is
kept are never looked at. The kept candidates are measured again by direct differences of the original values. A row whose
k-th distance is not below everything that was left out, by more than the product can be wrong, is searched again with
more candidates; so the result is exact, not probable.
"""

from __future__ import annotations

import math
from collections.abc import Generator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

_GROUP = 16
_EXTRA = 3
_FAR = 1e30  # squared norm of the rows that fill up the last group: finite, so that no product is NaN
_SMALL = 1 << 24  # numbers
_WHOLE = 1 << 31  # bytes up to which a centred copy of all data is kept


def nearest(
    data: Tensor, k: int, *, queries: Tensor | None = None, rows: Tensor | None = None, block: tuple[int, int] | None = None
) -> tuple[Tensor, Tensor]:
    """The ``k`` nearest rows of ``data``, in Euclidean distance.

    Args:
        data: floating point, shape ``(n, d)``; may be a memory map. Values are finite.
        k: at most ``n``, or ``n - 1`` where a row itself does not count.
        queries: new points, shape ``(m, d)``; None searches for rows of ``data`` themselves, which do not count as their
            own neighbours (told by index, so that exact copies do count).
        rows: which rows of ``data`` to search for; None for all. Not with ``queries``.
        block: rows searched for, and rows searched in, at a time; None takes larger blocks for small data (a little faster)
            and smaller ones for large data (less memory).

    Returns:
        Distances in float64 and indices, both ``(m, k)``, nearest first; ties in the order of the index.
    """
    block = block or ((1000, 4096) if data.numel() <= _SMALL else (512, 2048))
    size = tuple(max(_GROUP, -(-length // _GROUP) * _GROUP) for length in block)
    with torch.no_grad(), _true_float32(data.device):
        search = _Search(data, k, (size[0], size[1]))
        if queries is None and rows is None and data.numel() * 4 <= _WHOLE:
            return search.all_pairs()
        if queries is not None:
            return search.of(queries, None, _EXTRA)
        own = torch.arange(len(data), device=data.device) if rows is None else rows
        return search.of(data, own, _EXTRA)


class _Search:
    def __init__(self, data: Tensor, k: int, block: tuple[int, int]) -> None:
        self.data = data
        self.k = k
        self.block = block
        self.n, self.d = data.shape
        total = torch.zeros(self.d, dtype=torch.float64, device=data.device)
        for part in data.split(block[1]):
            total += part.sum(0, dtype=torch.float64)
        self.centre = total / self.n
        largest = 0.0
        for part in data.split(block[1]):
            low, high = torch.aminmax(part, dim=0)
            largest = max(largest, float((high.double() - self.centre).max()), float((self.centre - low.double()).max()))
        # Squares must neither over- nor underflow, whatever the units: a power of two brings extreme values to about 1, exactly.
        self.scale = 1.0 if largest == 0.0 or 1e-6 < largest < 1e6 else 2.0 ** -math.frexp(largest)[1]
        self.longest = 0.0
        self.copy: Tensor | None = None

    def centred(self, values: Tensor) -> Tensor:
        """Scaled float32 values around the data's mean: an offset would cost the product its digits."""
        return self.scaled(values - self.centre.to(values.dtype)).to(torch.float32)

    def scaled(self, values: Tensor) -> Tensor:
        """Values in units in which their squares are ordinary numbers."""
        return values if self.scale == 1.0 else values * self.scale

    def augmented(self, values: Tensor) -> Tensor:
        """``[y, |y|^2, 1]``, filled up with rows that are far from everything."""
        full = -(-len(values) // _GROUP) * _GROUP
        out = torch.zeros(full, self.d + 2, dtype=torch.float32, device=values.device)
        out[: len(values), : self.d] = self.centred(values)
        own = out[: len(values), : self.d]
        norms = torch.linalg.vecdot(own, own)
        self.longest = max(self.longest, float(norms.max()))
        out[:, self.d] = _FAR
        out[: len(values), self.d] = norms
        out[:, self.d + 1] = 1.0
        return out

    def left(self, block: Tensor) -> Tensor:
        """``[-2 x, 1, |x|^2]`` from ``[x, |x|^2, 1]``."""
        out = block.clone()
        out[:, : self.d] *= -2.0
        out[:, self.d], out[:, self.d + 1] = block[:, self.d + 1], block[:, self.d]
        return out

    # ---- all rows against all rows: each product serves both sides --------------------------------------------------

    def all_pairs(self) -> tuple[Tensor, Tensor]:
        copy = torch.empty(-(-self.n // _GROUP) * _GROUP, self.d + 2, dtype=torch.float32, device=self.data.device)
        for start in range(0, self.n, self.block[1]):
            part = self.augmented(self.data[start : start + self.block[1]])
            copy[start : start + len(part)] = part
        count = min(self.k + 1 + _EXTRA, self.n)
        best = _Best(len(copy), count, copy.device)
        for top in range(0, len(copy), self.block[0]):
            bottom = min(top + self.block[0], len(copy))
            left = self.left(copy[top:bottom])
            for start in range(top, len(copy), self.block[1]):
                stop = min(start + self.block[1], len(copy))
                squares = _product(left, copy[start:stop])
                best.offer_rows(squares, top, start)
                first = max(start, bottom)
                if first < stop:
                    best.offer_columns(squares[:, first - start :], top, first)
        norms = copy[: self.n, self.d].clone()
        del copy
        everyone = torch.arange(self.n, device=self.data.device)
        return self.refined(self.data, everyone, norms, best.values[: self.n], best.index[: self.n], _EXTRA)

    # ---- some points against all rows -------------------------------------------------------------------------------

    def of(self, source: Tensor, own: Tensor | None, extra: int) -> tuple[Tensor, Tensor]:
        """Neighbours of the rows ``own`` of the data, or of all rows of ``source`` where ``own`` is None."""
        total = len(source) if own is None else len(own)
        distances: list[Tensor] = []
        indices: list[Tensor] = []
        count = min(self.k + (own is not None) + extra, self.n)
        group = 4 * self.block[0]  # each pass over the data serves that many points
        for begin in range(0, total, group):
            stop = min(begin + group, total)
            points = source[begin:stop] if own is None else source[own[begin:stop]]
            held = self.augmented(points)
            left = self.left(held)
            best = _Best(len(held), count, held.device)
            for start in range(0, self.n, self.block[1]):
                right = self.augmented(self.data[start : start + self.block[1]])
                for top in range(0, len(left), self.block[0]):
                    best.offer_rows(_product(left[top : top + self.block[0]], right), top, start)
            size = stop - begin
            mine = None if own is None else own[begin:stop]
            found = self.refined(points, mine, held[:size, self.d], best.values[:size], best.index[:size], extra)
            distances.append(found[0])
            indices.append(found[1])
        if not distances:
            empty = torch.empty(0, self.k, device=self.data.device)
            return empty.double(), empty.long()
        return torch.cat(distances), torch.cat(indices)

    # ---- measuring the candidates ------------------------------------------------------------------------------------

    def refined(
        self, points: Tensor, own: Tensor | None, norms: Tensor, squares: Tensor, index: Tensor, extra: int
    ) -> tuple[Tensor, Tensor]:
        """Exact distances of the candidates, the best ``k`` of them, and another search where those are not certain."""
        m, count = index.shape
        index = index.sort(1).values  # ties then come in the order of the index
        distances = torch.empty(m, count, dtype=torch.float64, device=points.device)
        step = max(1, (1 << 21) // max(1, count * self.d))
        for begin in range(0, m, step):
            here = index[begin : begin + step]
            gaps = self.data[here.reshape(-1)].view(*here.shape, self.d)
            gaps = self.scaled(_wide(gaps) - _wide(points[begin : begin + step, None]))
            distances[begin : begin + step] = torch.linalg.vector_norm(gaps, dim=2).double()
        if own is not None:
            distances.masked_fill_(index == own[:, None], math.inf)
        distances, places = distances.sort(dim=1, stable=True)
        index = index.gather(1, places)
        distances, index = distances[:, : self.k], index[:, : self.k]
        if count >= self.n:
            return distances / self.scale, index
        error = 8.0 * torch.finfo(torch.float32).eps * math.sqrt(self.d) * (norms.double() + self.longest)
        sure = distances[:, -1] ** 2 <= squares.double().amax(1) - error
        distances = distances / self.scale
        unsure = (~sure).nonzero()[:, 0]
        if len(unsure):
            source, mine = (self.data, own[unsure]) if own is not None else (points[unsure], None)
            distances[unsure], index[unsure] = self.of(source, mine, 2 * extra + 1)
        return distances, index


class _Best:
    """The smallest ``count`` squared distances of each row so far, in no order."""

    def __init__(self, rows: int, count: int, device: torch.device) -> None:
        self.values = torch.full((rows, count), math.inf, device=device)
        self.index = torch.zeros(rows, count, dtype=torch.int64, device=device)
        self.worst = torch.full((rows,), math.inf, device=device)
        self.count = count

    def offer_rows(self, squares: Tensor, top: int, start: int) -> None:
        """Distances of the rows from ``top`` on (along dim 0) to the data from ``start`` on."""
        rows, columns = squares.shape
        if not self._started(top, rows):
            self._merge(top, *squares.topk(min(self.count, columns), dim=1, largest=False, sorted=False), start)
            return
        groups = squares.view(rows, columns // _GROUP, _GROUP)
        hits = (groups.amin(2) < self.worst[top : top + rows, None]).nonzero()
        self._merge_hits(groups[hits[:, 0], hits[:, 1]], hits, top, rows, start)

    def offer_columns(self, squares: Tensor, top: int, first: int) -> None:
        """The same distances seen from the rows from ``first`` on (along dim 1) to the data from ``top`` on."""
        rows, columns = squares.shape
        if not self._started(first, columns):
            turned = squares.t().contiguous()
            self._merge(first, *turned.topk(min(self.count, rows), dim=1, largest=False, sorted=False), top)
            return
        smallest = squares.unflatten(0, (rows // _GROUP, _GROUP)).amin(1)
        hits = (smallest < self.worst[None, first : first + columns]).t().nonzero()
        lines = hits[:, 1, None] * _GROUP + torch.arange(_GROUP, device=squares.device)
        self._merge_hits(squares[lines, hits[:, :1]], hits, first, columns, top)

    def _started(self, top: int, rows: int) -> bool:
        return bool(torch.isfinite(self.worst[top : top + rows]).all())

    def _merge_hits(self, values: Tensor, hits: Tensor, top: int, rows: int, start: int) -> None:
        """Entries of the groups in ``hits`` (row, group; in the order of the rows) that beat the worst kept."""
        inside = (values < self.worst[top + hits[:, 0], None]).nonzero()
        row = hits[inside[:, 0], 0]
        column = hits[inside[:, 0], 1] * _GROUP + inside[:, 1]
        counts = torch.bincount(row, minlength=rows)
        most = int(counts.max()) if len(row) else 0
        if most == 0:
            return
        place = torch.arange(len(row), device=row.device) - (counts.cumsum(0) - counts)[row]
        found = torch.full((rows, most), math.inf, device=values.device)
        where = torch.zeros(rows, most, dtype=torch.int64, device=values.device)
        found[row, place] = values[inside[:, 0], inside[:, 1]]
        where[row, place] = column
        self._merge(top, found, where, start)

    def _merge(self, top: int, values: Tensor, columns: Tensor, start: int) -> None:
        here = slice(top, top + len(values))
        joined = torch.cat([self.values[here], values], 1)
        places = torch.cat([self.index[here], columns + start], 1)
        kept, order = joined.topk(self.count, dim=1, largest=False, sorted=False)
        self.values[here] = kept
        self.index[here] = places.gather(1, order)
        self.worst[here] = kept.amax(1)


def _product(left: Tensor, right: Tensor) -> Tensor:
    """``left @ right.T``; on a processor through oneDNN, whose single-precision kernels are the faster ones."""
    if left.device.type == "cpu" and torch.backends.mkldnn.is_available():
        return F.linear(left.to_mkldnn(), right).to_dense()
    return left @ right.T


def _wide(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))


@contextmanager
def _true_float32(device: torch.device) -> Generator[None]:
    """No TensorFloat-32 inside."""
    if device.type != "cuda":
        yield
        return
    allowed = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = allowed
