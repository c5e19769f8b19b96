"""Intrinsic dimension of data, as functions."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from outlast._core import _checks, _distributed
from outlast._core._features import Pool, layer_features
from outlast._core._linalg import eigh_descending
from outlast._core._neighbours import nearest
from outlast._core._random import generator
from outlast.diagnose.dimension._likelihood import (
    BIASED,
    LEAST_K,
    METHODS,
    Method,
    gride_ml,
    log_ratio_sums,
    twonn_fit,
    twonn_ml,
    value_and_error,
)
from outlast.diagnose.dimension._results import ComparisonResult, DimensionResult, Estimate, LocalPCAResult, ScaleCurve
from outlast.diagnose.dimension._rows import BLOCK, Duplicates, Rows, as_rows
from outlast.errors import OutlastWarning

Anchors = int | Sequence[int] | Tensor | None
_MANY = 20_000
_FEW = 2_000


def estimate(
    data: Any,
    method: Method = "mackay",
    k: int | Sequence[int] = (3, 5, 10, 20),
    *,
    anchors: Anchors = None,
    duplicates: Duplicates = "drop",
    metric: Literal["euclidean"] = "euclidean",
    device: torch.device | str | None = None,
    seed: int = 0,
    bootstrap: int = 0,
) -> DimensionResult:
    """Intrinsic dimension by maximum likelihood on the distances to the ``k`` nearest neighbours.

    ```python
    print(dimension.estimate(images))  # intrinsic dimension by mackay: k=3: 15.06 (se 0.31), ...
    ```

    Args:
        data: rows as ``(N, ...)``: a tensor, array, memory map, Dataset or loader (of inputs, or tuples that start with
            them), or a folder of images. Integers are taken as floats. Scale, offset and rotation of the data do not matter.
        method: ``"mackay"`` (the inverse of the mean inverse; consistent for every k), ``"levina_bickel"`` (mean of local
            estimates), ``"levina_bickel_unbiased"``, or ``"pope2021"``, which reproduces published figures and is too low
            by (k-2)/(k-1).
        k: neighbours, counted to the farthest; several at once cost no more than the largest.
        anchors: rows whose neighbourhoods are used: a number drawn at random, or their indices; None takes all up to
            20,000 rows, else 2,000. Neighbours are always searched in all rows.
        duplicates: what to do with exact copies: ``"drop"``, ``"error"``, or ``"keep"`` (anchors with a neighbour at
            distance 0 are then left out and counted).
        metric: ``"euclidean"``.
        device: where to compute; None for where the data are.
        seed: of the anchors and the bootstrap.
        bootstrap: resamples of the anchors for a 95 % interval; 0 for none, 200 is usual.

    Under ``torch.distributed`` the processes share the anchors among them: all must call this, with the same data (each its own part:
    ``Metric``, ``by_layer``).

    Returns:
        The estimates by ``k`` with standard errors; ``value`` is that of the largest ``k``. Compare sets at equal N and k
        only (``compare``).

    Raises:
        ValueError: ``k`` too small for the method, fewer than ``k + 1`` distinct rows, NaN or infinity (with the row),
            anchors out of range, more than half of the anchors excluded, unknown method or metric, processes with different data.
        TypeError: complex or text data.
    """
    _checks.choice("method", method, METHODS)
    _checks.choice("metric", metric, ("euclidean",))
    ks = _sizes(k, method)
    bootstrap = _checks.integer("bootstrap", bootstrap, low=0)
    rows = as_rows(data, duplicates=duplicates, device=device, least=max(ks) + 1)
    chosen = _anchors(rows, anchors, seed)
    distances = _distances(rows.values, max(ks), chosen)
    return _from_sorted(
        distances,
        ks,
        method,
        n=len(rows.values),
        n_duplicates=rows.num_duplicates,
        notes=rows.notes,
        bootstrap=bootstrap,
        seed=seed,
    )


def from_distances(
    distances: Any,
    method: Method = "mackay",
    k: int | Sequence[int] | None = None,
    *,
    n: int | None = None,
    bootstrap: int = 0,
    seed: int = 0,
) -> DimensionResult:
    """The same from distances that were computed elsewhere.

    Args:
        distances: shape ``(m, K)``, to other rows only, ascending along each row.
        method: as in ``estimate``.
        k: up to ``K``; None for ``K``.
        n: rows that were searched, for the reliability flag; None for ``m``.
        bootstrap: as in ``estimate``.
        seed: of the bootstrap.

    Raises:
        ValueError: distances that are negative, not finite or not ascending; ``k`` above ``K``.
    """
    _checks.choice("method", method, METHODS)
    table = torch.as_tensor(distances)
    if table.is_complex():
        raise TypeError("distances are complex")
    if table.ndim != 2 or not table.numel():
        raise ValueError(f"distances must have shape (m, K) with m and K at least 1, got {tuple(table.shape)}")
    table = table.to(torch.float64)
    if not bool(torch.isfinite(table).all()):
        raise ValueError("distances hold NaN or infinity")
    if bool((table < 0).any()):
        raise ValueError("distances hold a negative value")
    if bool((table.diff(dim=1) < 0).any()):
        raise ValueError(f"distances are not ascending, first in row {int((table.diff(dim=1) < 0).any(1).nonzero()[0])}")
    ks = _sizes(table.shape[1] if k is None else k, method)
    if max(ks) > table.shape[1]:
        raise ValueError(f"k={max(ks)} needs that many distances a row, got {table.shape[1]}")
    searched = len(table) if n is None else _checks.integer("n", n, low=1)
    return _from_sorted(table, ks, method, n=searched, n_duplicates=0, notes=(), bootstrap=bootstrap, seed=seed)


def local(data: Any, k: int = 20, queries: Any = None, *, duplicates: Duplicates = "drop") -> Tensor:
    """Dimension around each point, ``(k - 1) / S_k(x)``, for maps and outliers; single values scatter widely.

    Args:
        data: as in ``estimate``.
        k: neighbours.
        queries: points to look at, shape ``(m, ...)``, which need not be rows of the data (a row of the data counts as its
            own neighbour then); None for all rows of the data.
        duplicates: as in ``estimate``; copies under ``"drop"`` get the value of their first.

    Returns:
        float64, shape ``(m,)``; infinite where all ``k`` distances are equal, NaN where one is 0.
    """
    k = _sizes(k, "mackay")[0]
    rows = as_rows(data, duplicates=duplicates, least=k + 1)
    if queries is not None:
        points = as_query(queries, rows)
        distances, _ = nearest(rows.values, k, queries=points)
        return _local(distances, k)
    return _local(_distances(rows.values, k, None), k)[rows.leader]


def as_query(queries: Any, rows: Rows) -> Tensor:
    """Query points in the form of the rows."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", OutlastWarning)  # few points, or alike, are nothing unusual for queries
        points = as_rows(queries, duplicates="keep", least=1).values.to(rows.values)
    if points.shape[1] != rows.values.shape[1]:
        raise ValueError(f"queries have {points.shape[1]} values a row, the data have {rows.values.shape[1]}")
    return points


def knn(
    data: Any,
    k: int,
    queries: Any = None,
    *,
    exclude_self: bool = True,
    block: tuple[int, int] | None = None,
    exact: bool = True,
) -> tuple[Tensor, Tensor]:
    """Exact nearest neighbours, in blocks: memory ``O(block x D + N x k)``, no distance matrix.

    Args:
        data: rows as in ``estimate``; copies are kept.
        k: neighbours.
        queries: new points; None searches for the rows of the data themselves.
        exclude_self: whether a row is left out of its own neighbours (by its index; ignored with ``queries``).
        block: rows searched for, and rows searched in, at a time; None chooses by the size. The result does not depend on it.
        exact: must be True; approximate search biases dimension without warning and is not offered.

    Returns:
        ``(distances, indices)``, float64 and int64, both ``(m, k)``, nearest first.

    Raises:
        ValueError: ``k`` below 1 or above what the data hold, NaN or infinity, ``exact=False``, a block below 1.
    """
    k = _checks.integer("k", k, low=1)
    for length in block or ():
        _checks.integer("block", length, low=1)
    if not exact:
        raise ValueError("exact must be True: an approximate search biases dimension without a warning")
    own = queries is None and exclude_self
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", OutlastWarning)
        rows = as_rows(data, duplicates="keep", least=1)
    if k > len(rows.values) - own:
        raise ValueError(f"k={k} neighbours need at least {k + own} rows, got {len(rows.values)}")
    if queries is None and exclude_self:
        return nearest(rows.values, k, block=block)
    return nearest(rows.values, k, queries=rows.values if queries is None else as_query(queries, rows), block=block)


def twonn(
    data: Any,
    variant: Literal["fit", "ml"] = "fit",
    discard: float = 0.1,
    *,
    anchors: Anchors = None,
    duplicates: Duplicates = "drop",
    seed: int = 0,
) -> DimensionResult:
    """TwoNN: dimension from the ratio of the distances to the second and the first neighbour.

    Facco, d'Errico, Rodriguez, Laio, Scientific Reports 2017.

    Args:
        data: as in ``estimate``.
        variant: ``"fit"`` (a line through the distribution of the ratios) or ``"ml"``. Where the two differ, the data mix
            dimensions.
        discard: share of the largest ratios that the fit leaves out, in [0, 1).
        anchors: as in ``estimate``.
        duplicates: as in ``estimate``.
        seed: of the anchors.

    Raises:
        ValueError, TypeError: as ``estimate``, or an argument outside of its range.
    """
    _checks.choice("variant", variant, ("fit", "ml"))
    discard = _checks.real("discard", discard, low=0.0)
    if discard >= 1.0:
        raise ValueError(f"discard must be a number in [0, 1), got {discard!r}")
    rows = as_rows(data, duplicates=duplicates, least=3)
    distances = _distances(rows.values, 2, _anchors(rows, anchors, seed))
    kept, excluded = _without_zeros(distances)
    ratios = kept[:, 1] / kept[:, 0]
    if variant == "fit" and math.floor((1.0 - discard) * len(ratios)) < 2:
        raise ValueError(f"discard={discard:g} leaves fewer than 2 of the {len(ratios)} ratios to fit")
    value = twonn_fit(ratios, discard) if variant == "fit" else twonn_ml(ratios)
    if math.isinf(value):
        _warn_ties(int((ratios == 1).sum()), len(ratios))
    se = value / math.sqrt(len(ratios))
    found = Estimate(value, se, 2, float(kept[:, 1].mean()))
    return DimensionResult(
        value=value,
        se=se,
        k=2,
        radius=found.radius,
        by_k={2: found},
        method=f"twonn ({variant})",
        biased="",
        n=len(rows.values),
        n_anchors=len(kept),
        n_duplicates=rows.num_duplicates,
        n_excluded=excluded,
        near_duplicates=_near(kept),
        reliable=value < 2.0 * math.log2(len(rows.values)),
        notes=rows.notes,
    )


def gride(data: Any, max_rank: int = 64, *, anchors: Anchors = None, duplicates: Duplicates = "drop", seed: int = 0) -> ScaleCurve:
    """Gride: TwoNN's likelihood at the ranks 1 and 2, 2 and 4, ... up to ``max_rank``: dimension against scale.

    Denti, Doimo, Laio, Mira, Scientific Reports 2022, equation 7.

    Args:
        data: as in ``estimate``.
        max_rank: the farthest neighbour used, at least 2.
        anchors: as in ``estimate``.
        duplicates: as in ``estimate``.
        seed: of the anchors.

    Raises:
        ValueError, TypeError: as ``estimate``, or an argument outside of its range.
    """
    max_rank = _checks.integer("max_rank", max_rank, low=2)
    rows = as_rows(data, duplicates=duplicates, least=max_rank + 1)
    distances, _ = _without_zeros(_distances(rows.values, max_rank, _anchors(rows, anchors, seed)))
    ranks = [1 << power for power in range(int(math.log2(max_rank / 2)) + 1)]
    found = [gride_ml((distances[:, 2 * n - 1] / distances[:, n - 1]).log(), n) for n in ranks]
    radius = np.asarray([float(distances[:, 2 * n - 1].mean()) for n in ranks])
    values, errors = (np.asarray(column) for column in zip(*found, strict=True))
    return ScaleCurve("gride", "rank", tuple(2 * n for n in ranks), values, errors, radius, plateau(radius, values), len(rows.values))


def scales(
    data: Any,
    by: Literal["k", "decimation"] = "k",
    *,
    max_k: int = 64,
    least: int = 100,
    anchors: Anchors = None,
    duplicates: Duplicates = "drop",
    seed: int = 0,
) -> ScaleCurve:
    """Dimension against scale.

    Args:
        data: as in ``estimate``.
        by: ``"k"`` (``estimate`` with k = 2, 4, 8, ... ``max_k``) or ``"decimation"`` (TwoNN on disjoint random blocks of
            N, N/2, N/4, ... rows, the mean over blocks and its standard error).
        max_k: the largest ``k``.
        least: rows of the smallest blocks.
        anchors: as in ``estimate``, for ``"k"``.
        duplicates: as in ``estimate``.
        seed: of anchors and blocks.

    Raises:
        ValueError, TypeError: as ``estimate``, or an argument outside of its range.
    """
    _checks.choice("by", by, ("k", "decimation"))
    max_k = _checks.integer("max_k", max_k, low=2)
    least = _checks.integer("least", least, low=3)
    rows = as_rows(data, duplicates=duplicates, least=max_k + 1 if by == "k" else least)
    if by == "k":
        ks = [1 << power for power in range(1, int(math.log2(max_k)) + 1)]
        distances, _ = _without_zeros(_distances(rows.values, max(ks), _anchors(rows, anchors, seed)))
        found = [value_and_error(log_ratio_sums(distances, k), k, "mackay") for k in ks]
        radius = np.asarray([float(distances[:, k - 1].mean()) for k in ks])
        values, errors = (np.asarray(column) for column in zip(*found, strict=True))
        return ScaleCurve("mackay", "k", tuple(ks), values, errors, radius, plateau(radius, values), len(rows.values))
    n = len(rows.values)
    order = torch.randperm(n, generator=generator(seed, "dimension.decimation")).to(rows.values.device)
    sizes, means, errors, radii = [], [], [], []
    blocks = 1
    while n // blocks >= least:
        size = n // blocks
        pairs: list[tuple[float, float]] = []
        for number in range(blocks):
            part = rows.values[order[number * size : (number + 1) * size]]
            distances, _ = _without_zeros(nearest(part, 2)[0])
            ratios = distances[:, 1] / distances[:, 0]
            pairs.append((twonn_ml(ratios), float(distances[:, 1].mean())))
        found = np.asarray(pairs)
        sizes.append(size)
        means.append(float(found[:, 0].mean()))
        errors.append(float(found[:, 0].std(ddof=1) / math.sqrt(blocks)) if blocks > 1 else means[-1] / math.sqrt(size))
        radii.append(float(found[:, 1].mean()))
        blocks *= 2
    radius, values = np.asarray(radii), np.asarray(means)
    return ScaleCurve("decimation", "rows", tuple(sizes), values, np.asarray(errors), radius, plateau(radius, values), n)


def local_pca(
    data: Any,
    k: int = 100,
    rule: Literal["fo", "ratio", "participation"] = "fo",
    *,
    threshold: float | None = None,
    anchors: Anchors = None,
    duplicates: Duplicates = "drop",
    seed: int = 0,
) -> LocalPCAResult:
    """Dimension by the spectrum of each neighbourhood.

    Args:
        data: as in ``estimate``.
        k: neighbours, centred on their mean.
        rule: ``"fo"`` counts eigenvalues above ``threshold`` (0.05) of the largest, ``"ratio"`` the smallest number that
            reaches ``threshold`` (0.95) of the trace, ``"participation"`` is ``(sum l)^2 / sum l^2``.
        threshold: of the rule; the result depends on it.
        anchors: as in ``estimate``.
        duplicates: as in ``estimate``.
        seed: of the anchors.

    Raises:
        ValueError, TypeError: as ``estimate``, or an argument outside of its range.
    """
    _checks.choice("rule", rule, ("fo", "ratio", "participation"))
    k = _checks.integer("k", k, low=2)
    bar = {"fo": 0.05, "ratio": 0.95, "participation": None}[rule]
    if threshold is not None:
        if rule == "participation":
            raise ValueError("rule='participation' has no threshold")
        bar = _checks.real("threshold", threshold, low=0.0, high=1.0, low_open=True)
    rows = as_rows(data, duplicates=duplicates, least=k + 1)
    chosen = _anchors(rows, anchors, seed)
    _, index = nearest(rows.values, k, rows=chosen)
    values: list[Tensor] = []
    step = max(1, (1 << 24) // (k * rows.values.shape[1]))
    for start in range(0, len(index), step):
        here = index[start : start + step]
        x = rows.values[here.reshape(-1)].view(*here.shape, -1).to(torch.float64)
        x = x - x.mean(1, keepdim=True)
        spectra, _ = eigh_descending(x @ x.transpose(1, 2), vectors=False)
        if rule == "fo":
            values.append((spectra > (bar or 0.0) * spectra[:, :1]).sum(1).double())
        elif rule == "ratio":
            reached = spectra.cumsum(1) >= (bar or 0.0) * spectra.sum(1, keepdim=True) * (1.0 - 1e-12)
            values.append(reached.double().argmax(1).double() + 1.0)
        else:
            values.append(spectra.sum(1).square() / spectra.square().sum(1))
    found = torch.cat(values).cpu().numpy()
    error = float(found.std(ddof=1) / math.sqrt(len(found))) if len(found) > 1 else math.nan
    return LocalPCAResult(float(found.mean()), float(np.median(found)), error, found, rule, bar, k, len(rows.values), len(found))


def by_class(data: Any, labels: Any, *, match_n: bool = True, seed: int = 0, **settings: Any) -> dict[Any, DimensionResult]:
    """``estimate`` for each class.

    Args:
        data: as in ``estimate``, held in memory.
        labels: one for each row.
        match_n: draw as many rows of each class as the smallest has, since the estimate depends on their number.
        seed: of that draw and of the anchors.
        **settings: of ``estimate``.

    Raises:
        ValueError, TypeError: as ``estimate``, or an argument outside of its range.
    """
    whole = as_rows(data, duplicates="keep")
    names = np.asarray(labels.cpu() if isinstance(labels, Tensor) else labels)
    if names.shape != (len(whole.values),):
        raise ValueError(f"labels must have shape ({len(whole.values)},), got {names.shape}")
    sets = {
        name.item() if isinstance(name, np.generic) else name: whole.values[torch.from_numpy((names == name).nonzero()[0])]
        for name in np.unique(names)
    }
    return {
        name: dataclasses.replace(result, notes=(*whole.notes, *result.notes))
        for name, result in _matched(sets, "dimension.by_class", match_n=match_n, seed=seed, **settings).items()
    }


def by_layer(
    model: nn.Module,
    loader: Iterable[object],
    layers: Sequence[str],
    pool: Pool = "flatten",
    *,
    max_rows: int | None = None,
    **settings: Any,
) -> dict[str, DimensionResult]:
    """``estimate`` for the features of each layer: where a network expands and compresses.

    Args:
        model: run in eval mode, unchanged.
        loader: batches, as in ``model(batch)`` or ``model(batch[0])``; under ``torch.distributed`` each process's own part, since the
            features of all are put together.
        layers: names of submodules; ``""`` is the model's output.
        pool: ``"flatten"`` or ``"mean"`` over positions.
        max_rows: rows to use, of each process.
        **settings: of ``estimate``.

    Raises:
        ValueError, TypeError: as ``estimate``, or an argument outside of its range.
    """
    _checks.choice("pool", pool, ("flatten", "mean"))
    features = layer_features(model, loader, layers, pool=pool, max_rows=max_rows)
    return {name: estimate(torch.cat(_distributed.gather(rows.cpu())).to(rows.device), **settings) for name, rows in features.items()}


def compare(sets: Mapping[str, Any], *, match_n: bool = True, seed: int = 0, **settings: Any) -> ComparisonResult:
    """Dimensions of several sets at one number of rows, ranked.

    Args:
        sets: data by name, as in ``estimate``.
        match_n: draw as many rows of each set as the smallest has. Without it there is no ranking unless the sets are of
            one size: the estimate grows with N.
        seed: of that draw and of the anchors.
        **settings: of ``estimate``.

    Raises:
        ValueError: fewer than two sets.
    """
    if len(sets) < 2:
        raise ValueError(f"compare needs at least two sets, got {len(sets)}")
    results = _matched(sets, "dimension.compare", match_n=match_n, seed=seed, **settings)
    sizes = {result.n for result in results.values()}
    size = min(sizes)
    if not match_n and len(sizes) > 1:
        return ComparisonResult(results, None, None, ())
    ranking = tuple(sorted(results, key=lambda name: results[name].value))
    separated = tuple(
        (low, high)
        for position, low in enumerate(ranking)
        for high in ranking[position + 1 :]
        if results[high].value - results[low].value > 1.96 * math.hypot(results[high].se, results[low].se)
    )
    return ComparisonResult(results, size, ranking, separated)


# ---- pieces ------------------------------------------------------------------------------------------------------------


def _matched(sets: Mapping[Any, Any], draw: str, *, match_n: bool, seed: int, **settings: Any) -> dict[Any, DimensionResult]:
    """``estimate`` for several sets, each cut to as many distinct rows as the smallest has."""
    duplicates: Duplicates = settings.get("duplicates", "drop")
    rows = {name: as_rows(data, duplicates=duplicates) for name, data in sets.items()}
    size = min(len(part.values) for part in rows.values())
    results: dict[Any, DimensionResult] = {}
    for number, (name, part) in enumerate(rows.items()):
        values = part.values
        if match_n and len(values) > size:
            order = torch.randperm(len(values), generator=generator(seed, draw, number))
            values = values[order[:size].sort().values.to(values.device)]
        result = estimate(values, seed=seed, **settings)
        results[name] = dataclasses.replace(result, n_duplicates=part.num_duplicates, notes=part.notes)
    return results


def _from_sorted(
    distances: Tensor,
    ks: tuple[int, ...],
    method: Method,
    *,
    n: int,
    n_duplicates: int,
    notes: tuple[str, ...],
    bootstrap: int,
    seed: int,
) -> DimensionResult:
    kept, excluded = _without_zeros(distances)
    by_k: dict[int, Estimate] = {}
    for k in ks:
        sums = log_ratio_sums(kept, k)
        value, error = value_and_error(sums, k, method)
        if math.isinf(value):
            _warn_ties(int((sums == 0).sum()), len(sums))
        low, high = _bootstrap(sums, k, method, bootstrap, seed) if bootstrap else (None, None)
        by_k[k] = Estimate(value, error, k, float(kept[:, k - 1].mean()), low, high)
    last = by_k[max(ks)]
    return DimensionResult(
        value=last.value,
        se=last.se,
        k=last.k,
        radius=last.radius,
        by_k=by_k,
        method=method,
        biased=BIASED[method],
        n=n,
        n_anchors=len(kept),
        n_duplicates=n_duplicates,
        n_excluded=excluded,
        near_duplicates=_near(kept),
        reliable=last.value < 2.0 * math.log2(max(n, 2)),
        notes=notes,
    )


def _distances(values: Tensor, k: int, chosen: Tensor | None) -> Tensor:
    """Distances of the anchors, which the processes of ``torch.distributed`` share among them."""
    world = _distributed.world_size()
    if world == 1:
        return nearest(values, k, rows=chosen)[0]
    sums = torch.cat([part.sum(1, dtype=torch.float64) for part in values.split(BLOCK)]).cpu()
    near = 1e-5 * float(sums.abs().max())  # features that each process computed may differ in the last digits
    known = _distributed.gather((tuple(values.shape), k, None if chosen is None else chosen.tolist(), sums))
    if any(each[:3] != known[0][:3] or not torch.allclose(each[3], known[0][3], rtol=0.0, atol=near) for each in known):
        raise ValueError(
            "the processes hold different rows or ask for different things: give all of them the same data, or stream each one's own part "
            "into dimension.Metric"
        )
    everyone = torch.arange(len(values), device=values.device) if chosen is None else chosen
    mine, _ = nearest(values, k, rows=everyone[_distributed.rank() :: world])
    result = torch.empty(len(everyone), k, dtype=torch.float64)
    for number, part in enumerate(_distributed.gather(mine.cpu())):
        result[number::world] = part
    return result.to(values.device)


def _sizes(k: int | Sequence[int], method: Method) -> tuple[int, ...]:
    given = [k] if isinstance(k, int | np.integer) and not isinstance(k, bool) else k
    if not isinstance(given, Sequence) or isinstance(given, str) or not given:
        raise TypeError(f"k must be an integer or a sequence of integers, got {k!r}")
    found = tuple(_checks.integer("k", item, low=LEAST_K[method]) for item in given)
    return tuple(sorted(set(found)))


def _anchors(rows: Rows, anchors: Anchors, seed: int) -> Tensor | None:
    """Indices into the distinct rows; None for all of them."""
    n = len(rows.values)
    if anchors is None:
        if n <= _MANY:
            return None
        anchors = _FEW
    if isinstance(anchors, int | np.integer) and not isinstance(anchors, bool):
        count = _checks.integer("anchors", anchors, low=1)
        if count >= n:
            return None
        order = torch.randperm(n, generator=generator(seed, "dimension.anchors"))
        return order[:count].sort().values.to(rows.values.device)
    if isinstance(anchors, str):
        raise TypeError(f"anchors must be a number or a list of row numbers, got {anchors!r}")
    index = torch.as_tensor(anchors)
    if index.ndim != 1 or index.is_floating_point() or index.dtype == torch.bool or not len(index):
        raise TypeError(f"anchors must be a number or a list of row numbers, got {anchors!r}")
    given = len(rows.leader)
    if int(index.min()) < 0 or int(index.max()) >= given:
        raise ValueError(f"anchors must be row numbers from 0 to {given - 1}, got {int(index.min())} to {int(index.max())}")
    return rows.leader[index.long().to(rows.leader.device)].unique()  # a copy is the first of its kind, and once is enough


def _without_zeros(distances: Tensor) -> tuple[Tensor, int]:
    """Rows without a distance of 0, and how many had one."""
    positive = distances[:, 0] > 0
    excluded = int((~positive).sum())
    if 2 * excluded > len(distances):
        raise ValueError(f"{excluded} of {len(distances)} anchors have a neighbour at distance 0; duplicates='drop' removes exact copies")
    return distances[positive], excluded


def _local(distances: Tensor, k: int) -> Tensor:
    sums = log_ratio_sums(distances, k)
    return torch.where(distances[:, 0] > 0, (k - 1) / sums, math.nan)


def _near(distances: Tensor) -> int:
    return int((distances[:, 0] < 0.2 * distances[:, 1]).sum()) if distances.shape[1] > 1 else 0


def _bootstrap(sums: Tensor, k: int, method: Method, count: int, seed: int) -> tuple[float, float]:
    rng = generator(seed, "dimension.bootstrap")
    host = sums.cpu()
    values = [value_and_error(host[torch.randint(0, len(host), (len(host),), generator=rng)], k, method)[0] for _ in range(count)]
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)


def plateau(radius: np.ndarray[Any, Any], values: np.ndarray[Any, Any]) -> bool:
    """Whether dimension changes by less than 0.05 in ``ln d`` for each ``ln radius`` over some octave of the radius."""
    order = np.argsort(radius)
    x, y = np.log(radius[order]), np.log(values[order])
    for start in range(len(x)):
        for stop in range(start + 1, len(x)):
            if x[stop] - x[start] >= math.log(2.0) - 1e-9:
                slope = np.polyfit(x[start : stop + 1], y[start : stop + 1], 1)[0]
                if abs(slope) < 0.05:
                    return True
                break
    return False


def _warn_ties(tied: int, total: int) -> None:
    warnings.warn(
        f"ties: {tied} of {total} anchors have neighbours at one distance only (a grid, or one-hot data), so the estimate is infinite",
        OutlastWarning,
        stacklevel=4,
    )
