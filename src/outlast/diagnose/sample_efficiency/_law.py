"""The law of a learning curve, chosen by extrapolation, and how many examples a target error takes."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from outlast._core._checks import integer, real
from outlast._core._random import own_stream
from outlast._core._result import JSON, Result, to_json
from outlast._core._typing import Float
from outlast.errors import OutlastWarning

Law = Literal["power", "power_floor", "broken"]
"""Name of a law of learning curves: a power, one with a floor, or two powers that meet."""

LAWS = ("power", "power_floor", "broken")
_LEAST = {"power": 3, "power_floor": 4, "broken": 6}  # sizes that a law is fitted on
_MODEL_ERROR = 0.02  # relative: laws are told apart by more than this, however small the noise
_LEAST_CHANCE = 0.1  # relative: two held-out sizes do not rule a law out
_FAR = 32.0
_COARSE, _FINE = 40, 9  # floors that are tried, and again around the best


@dataclass(frozen=True, repr=False)
class Interval(Result):
    """A value and its 95 % interval; ``high`` is None where it has no end."""

    value: float
    low: float
    high: float | None

    def __repr__(self) -> str:
        return f"{self.value:.4g} [{self.low:.4g}, {'no end' if self.high is None else f'{self.high:.4g}'}]"


@dataclass(frozen=True, repr=False)
class NeededSamples(Result):
    """How many examples a target error takes.

    Attributes:
        target: the error.
        n: examples; None if the law does not reach the target.
        low: lower end of the 95 % interval; None if fewer than 2.5 % of the draws reach the target.
        high: upper end; None where it has none.
        more: examples beyond the largest measured number; None as ``n``.
        reachable_probability: share of the bootstrap draws whose law reaches the target with any number.
        reachable: at least 95 % do.
        far: ``n`` is more than 32 times the largest measured number: do not rely on it.
        checked_at: how far the law was tested: largest held-out size over the largest that the test was fitted on.
        off_by: relative error there.
        measured: the largest number of examples that was measured.
    """

    target: float
    n: float | None
    low: float | None
    high: float | None
    more: int | None
    reachable_probability: float
    reachable: bool
    far: bool
    checked_at: float
    off_by: float
    measured: int

    def __repr__(self) -> str:
        goal = f"{100.0 * self.target:.3g} % error"
        check = f"checked at {self.checked_at:.2g}x: off by {100.0 * self.off_by:.0f} %"
        if self.n is None:
            return f"{goal} may be unreachable with this model ({100.0 * self.reachable_probability:.0f} % of the draws reach it; {check})"
        if self.more == 0:
            return f"{goal} is reached with {_count(self.n)} examples, no more than were measured ({check})"
        ends = [None if end is None else max(0.0, end - self.measured) for end in (self.low, self.high)]
        spread = f"{'?' if ends[0] is None else _count(ends[0])} to {'no end' if ends[1] is None else _count(ends[1])}"
        doubt = "" if self.reachable else "; may be unreachable with this model"
        far = "; far beyond what was measured" if self.far else ""
        assert self.more is not None
        return f"needs {_count(self.more)} more labelled examples for {goal} (95 %: {spread}; {check}{doubt}{far})"


def _count(n: float) -> str:
    """23k for 23,412."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if n >= size:
            return f"{n / size:.3g}{unit}"
    return f"{n:.0f}"


@dataclass(frozen=True)
class _Curves:
    """Parameters of fitted laws, one a row: ``log e = log(exp(log_a - b log n - steeper max(0, log n - knee)) + floor)``."""

    log_a: Tensor
    b: Tensor
    floor: Tensor
    steeper: Tensor
    knee: Tensor

    def log_error(self, log_n: Tensor) -> Tensor:
        """``(curves, sizes)``."""
        bent = self.steeper[:, None] * (log_n - self.knee[:, None]).clamp_min(0.0)
        return ((self.log_a[:, None] - self.b[:, None] * log_n - bent).exp() + self.floor[:, None]).log()

    def pick(self, rows: Tensor) -> _Curves:
        return _Curves(*(getattr(self, field.name)[rows] for field in dataclasses.fields(self)))

    @staticmethod
    def join(parts: Sequence[_Curves]) -> _Curves:
        return _Curves(*(torch.cat([getattr(part, field.name) for part in parts]) for field in dataclasses.fields(_Curves)))


@dataclass(frozen=True, repr=False)
class LawFit(Result):
    """The law of a learning curve.

    Attributes:
        law: ``"power"`` (a n^-b), ``"power_floor"`` (a n^-b + c), ``"broken"`` (a power law whose slope changes once) or ``"constant"``.
        parameters: ``a``, ``b``, and ``c``, or ``knee`` and ``b_after``, with 95 % intervals of the bootstrap.
        held_out_error: root mean square of the relative errors at the held-out sizes, of the law that was chosen.
        checked_at: largest held-out size over the largest size that this test was fitted on.
        widening: factor by which intervals are wider than the bootstrap's, so that the law's miss at the held-out sizes lies inside; 1 for
            a constant.
        scores: of every law that was tried: half the squared held-out errors in units of their noise.
        reliable: False where the error grows with data, or the chosen law missed the held-out sizes by more than 10 %.
        why: what speaks against it, and what was left out.
        sizes: as given, without those of too few seeds.
        errors: mean error at each size.
        held_out: how many of the largest sizes were held out.
        seed_errors: ``(sizes, seeds)``, NaN where a training failed.
    """

    law: str
    parameters: dict[str, Interval]
    held_out_error: float
    checked_at: float
    widening: float
    scores: dict[str, float]
    reliable: bool
    why: tuple[str, ...]
    sizes: tuple[int, ...]
    errors: tuple[float, ...]
    held_out: int
    seed_errors: Tensor
    _point: _Curves
    _draws: _Curves
    _extra: float

    def to_dict(self) -> dict[str, JSON]:
        """All fields but the bootstrap draws."""
        public = (field.name for field in dataclasses.fields(self) if not field.name.startswith("_"))
        return {"kind": "LawFit", "version": self.version, **{name: to_json(getattr(self, name)) for name in public}}

    def _bands(self, log_n: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Log error at sizes: the law's, and the interval's ends."""
        point = self._point.log_error(log_n)[0]
        off = self._draws.log_error(log_n) - point
        low, high = off.quantile(torch.tensor([0.025, 0.975], dtype=off.dtype), dim=0)
        low, high = low.clamp_max(0.0), high.clamp_min(0.0)
        return point, point + self.widening * low - self._extra, point + self.widening * high + self._extra

    def predict(self, n: float) -> Interval:
        """Error with n examples, and its 95 % interval.

        Raises:
            ValueError: n is not positive.
        """
        value, low, high = (float(each.exp()) for each in self._bands(_log(real("n", n, low=0.0, low_open=True))))
        return Interval(value, low, min(high, 1.0) if value <= 1.0 else high)

    def needed(self, target_error: float) -> NeededSamples:
        """Number of examples for a target error.

        Raises:
            ValueError: not in (0, 1].
        """
        target = real("target_error", target_error, low=0.0, high=1.0, low_open=True)
        largest = self.sizes[-1]
        draws = self._draws
        reach = (draws.floor < target) & ((draws.b + draws.steeper > 0.0) | (draws.log_a.exp() + draws.floor <= target * (1.0 + 1e-6)))
        share = float(reach.double().mean())
        n = self._inverse(target)
        shared: dict[str, Any] = {
            "target": target,
            "reachable_probability": share,
            "checked_at": self.checked_at,
            "off_by": self.held_out_error,
            "measured": largest,
        }
        last = math.log(1e4 * largest) if n is None else max(math.log(1e4 * largest), math.log(n) + math.log(1e3))
        log_n = torch.linspace(0.0, last, 1500, dtype=torch.float64)
        point = self._point.log_error(log_n)[0]
        curves = (point + self.widening * (draws.log_error(log_n) - point)).cummin(1).values
        places = torch.cat([log_n.exp(), torch.tensor([math.inf], dtype=log_n.dtype)])

        def reached(log_goal: float, share: float) -> float:
            """The size at which this share of the draws has reached an error."""
            below = curves <= log_goal
            first = torch.where(below.any(1), below.int().argmax(1), len(log_n))
            return float(places[first].sort().values[round(share * (len(first) - 1))])

        low, high = reached(math.log(target) + self._extra, 0.025), reached(math.log(target) - self._extra, 0.975)
        if n is None:
            low_end = None if math.isinf(low) else low
            return NeededSamples(n=None, low=low_end, high=None, more=None, reachable=False, far=False, **shared)
        low, high = min(low, n), max(high, n)
        return NeededSamples(
            n=n,
            low=low,
            high=None if math.isinf(high) else high,
            more=max(0, math.ceil(n) - largest),
            reachable=share >= 0.95,
            far=n > _FAR * largest,
            **shared,
        )

    def _inverse(self, target: float) -> float | None:
        point = self._point
        log_a, b, floor, steeper, knee = (float(getattr(point, name)[0]) for name in ("log_a", "b", "floor", "steeper", "knee"))
        if self.law == "constant":
            return float(self.sizes[0]) if math.log(target) >= log_a - 1e-6 else None
        if target <= floor:
            return None
        goal = math.log(target - floor)
        log_n = (log_a - goal) / b if b > 0.0 else math.inf
        if steeper and log_n > knee:
            slope = b + steeper
            log_n = (log_a - goal + steeper * knee) / slope if slope > 0.0 else math.inf
        return math.exp(log_n) if log_n < 700.0 else None

    def __repr__(self) -> str:
        terms = {
            "power": "{a} n^-{b}",
            "power_floor": "{a} n^-{b} + {c}",
            "broken": "{a} n^-{b}, n^-{b_after} beyond {knee}",
            "constant": "{a}",
        }[self.law]
        law = terms.format(**{name: f"{value.value:.3g}" for name, value in self.parameters.items()})
        now, doubled = self.predict(self.sizes[-1]), self.predict(2 * self.sizes[-1])
        high = "?" if doubled.high is None else f"{100.0 * doubled.high:.3g}"
        return (
            f"LawFit(error = {law}; checked at {self.checked_at:.2g}x: off by {100.0 * self.held_out_error:.0f} %; doubling the data would "
            f"cut the error from {100.0 * now.value:.3g} % to {100.0 * doubled.value:.3g} % [{100.0 * doubled.low:.3g}, {high}]; "
            f"{'reliable' if self.reliable else 'not reliable'})" + "".join(f"\n  {reason}" for reason in self.why)
        )

    def _draw(self, ax: Any) -> None:
        log_n = torch.linspace(math.log(self.sizes[0]), math.log(8.0 * self.sizes[-1]), 100, dtype=torch.float64)
        n = log_n.exp().numpy()
        value, low, high = (100.0 * each.exp().numpy() for each in self._bands(log_n))
        ax.plot(n, value, label=self.law.replace("_", " "))
        ax.fill_between(n, low, high, alpha=0.2, label="95 %")
        fitted = len(self.sizes) - self.held_out
        percent = [100.0 * error for error in self.errors]
        for column in self.seed_errors.T:
            ax.plot(self.sizes, 100.0 * column.numpy(), ".", color="grey", markersize=3)
        ax.plot(self.sizes[:fitted], percent[:fitted], "o", color="black", label="measured")
        ax.plot(self.sizes[fitted:], percent[fitted:], "o", color="black", fillstyle="none", label="held out for the choice")
        ax.set_xscale("log")
        ax.set_yscale("log")
        ax.set_xlabel("examples")
        ax.set_ylabel("error, %")
        ax.legend()


def fit_law(
    sizes: Sequence[int],
    errors: Float[Tensor, "sizes seeds"],
    *,
    laws: Sequence[Law] = ("power", "power_floor"),
    hold_out: int = 2,
    bootstrap: int = 1000,
    test_size: int | None = None,
    generator: torch.Generator | None = None,
) -> LawFit:
    """Fit the law of a learning curve.

    Laws are compared by how well they extrapolate, not by how well they fit: each is fitted without the largest sizes and scored there,
    the best is fitted again on all. Weighted least squares on ``log(e - c)``; weights from the variance over seeds, drawn towards its mean
    over sizes (two or three seeds say little about one size) and not below that of a count of ``test_size``. Intervals: bootstrap over
    seeds within each size and over laws (by how likely their misses at the held-out sizes are; none counts less than a tenth of the
    likeliest), then widened until the chosen law's own miss lies inside, and by 2 % since no law is exact.

    Args:
        sizes: numbers of examples, increasing.
        errors: in [0, 1]; NaN for a training that failed.
        laws: among ``"power"``, ``"power_floor"``, ``"broken"``; the last takes 8 sizes or more.
        hold_out: largest sizes that are held out, 2 or more; more where these do not span a factor of 4.
        bootstrap: draws, 100 or more.
        test_size: examples that errors were measured on.
        generator: of the bootstrap; a fixed one otherwise.

    Returns:
        The law. A curve that is flat within noise, or rises, gets ``"constant"``.

    Raises:
        ValueError: sizes that do not increase, errors outside [0, 1], too few sizes for every law, unknown laws.
    """
    values = _checked(sizes, errors, laws, hold_out, bootstrap)
    why: list[str] = []
    counts = (~values.isnan()).sum(1)
    if bool((counts < 2).any()):
        gone = [size for size, count in zip(sizes, counts.tolist(), strict=True) if count < 2]
        warnings.warn(f"sizes with fewer than 2 good seeds are left out: {gone}", OutlastWarning, stacklevel=2)
        why.append(f"left out for want of seeds: {', '.join(map(str, gone))}")
        sizes = [size for size, count in zip(sizes, counts.tolist(), strict=True) if count >= 2]
        values = values[counts >= 2]
    n_sizes = len(sizes)
    if n_sizes > hold_out:
        while sizes[-1] < 4 * sizes[n_sizes - hold_out - 1] and hold_out < n_sizes - 1:
            hold_out += 1
    rest = n_sizes - hold_out
    if rest < _LEAST["power"]:
        raise ValueError(
            f"{n_sizes} sizes leave {max(rest, 0)} after {hold_out} are held out (the largest and all within a factor of 4 of it); a "
            "power law takes at least 3, one with a floor 4: measure more sizes, smaller ones in particular"
        )
    possible = [law for law in LAWS if law in laws and rest >= _LEAST[law] and (law != "broken" or n_sizes >= 8)]
    needs = {law: "8 sizes" if law == "broken" else f"{_LEAST[law]} sizes after hold-out" for law in laws}
    why += [f"{law} was not tried: it takes {needs[law]}" for law in laws if law not in possible]
    if not possible:
        raise ValueError(f"{n_sizes} sizes with {hold_out} held out are too few for {', '.join(laws)}")

    given, generator = values, own_stream(generator, "law of a learning curve")
    values, zeros = _positive(values, test_size)
    if zeros:
        why.append(f"an error of exactly 0 counts as {zeros:.2g}")
    mean = values.nanmean(1)
    log_n = torch.tensor([float(size) for size in sizes], dtype=torch.float64).log()
    variance = _variance(values, mean, test_size)
    weights = 1.0 / variance.clamp_min(1e-12)
    resampled = _resample(values, mean, bootstrap, generator)
    both = torch.cat([mean[None], resampled])  # the data themselves first

    slopes = _line(log_n, both.log(), weights[None])[1]
    rising = float(slopes[1:].quantile(0.975)) < -1e-9
    flat = not rising and float(slopes[1:].quantile(0.025)) <= 1e-9
    held = log_n[rest:]
    before = {law: _fit(law, log_n[:rest], both[:, :rest], weights[:rest]) for law in possible}
    misses = {law: before[law].log_error(held)[0] - mean[rest:].log() for law in possible}
    noise = variance[rest:] + _MODEL_ERROR**2
    scores = {law: float(0.5 * (misses[law].square() / noise).sum()) for law in possible}
    best = min(possible, key=lambda law: (round(scores[law], 6), LAWS.index(law)))
    # A law whose extrapolation is uncertain is not refuted by a miss of that size: its draws' spread counts as noise too.
    spread = {law: noise + before[law].log_error(held)[1:].var(0) for law in possible}
    doubt = torch.tensor([float((0.5 * (misses[law].square() / spread[law] + spread[law].log())).sum()) for law in possible])
    chance = (doubt.min() - doubt).exp().clamp_min(_LEAST_CHANCE)
    law_of = torch.multinomial(chance, bootstrap, replacement=True, generator=generator)

    def mixture(fits: dict[str, _Curves]) -> _Curves:
        """The draws, each with a law of its own; grouped by law."""
        return _Curves.join([fits[law].pick(1 + (law_of == place).nonzero()[:, 0]) for place, law in enumerate(possible)])

    miss = float(misses[best].abs().max())
    law: str = best
    widening, extra = 1.0, _MODEL_ERROR
    if flat or rising:
        law = "constant"
        # The slope may be other than 0 within noise: half of the draws keep it.
        after = {best: _constant(both, weights)}
        law_of = torch.arange(bootstrap) % 2
        possible = [best, "slope"]
        after["slope"] = _fit("power", log_n, both, weights)
        misses[best] = _constant(both[:, :rest], weights[:rest]).log_error(held)[0] - mean[rest:].log()
    else:
        after = {name: _fit(name, log_n, both, weights) for name in possible}
    point, draws = after[best].pick(torch.tensor([0])), mixture(after)
    if law != "constant":
        # What the law missed at the held-out sizes it may miss again as far beyond all sizes, where its bootstrap is narrower.
        ends = [(before, held[-1:]), (after, 2.0 * log_n[-1:] - log_n[rest - 1])]
        half = min(_half_width(mixture(fits), fits[best], place) for fits, place in ends)
        widening, extra = (max(1.0, miss / half), extra) if half > 1e-9 else (1.0, miss + extra)
    held_out_error = float((misses[best].exp() - 1.0).square().mean().sqrt())
    reliable = not rising
    if rising:
        why.append("error grows with data: check labels, budget, or drift")
    elif flat:
        why.append("the curve is flat within noise: more data of this kind are not known to help this model")
    if held_out_error > 0.1 and law != "constant":
        reliable = False
        why.append(f"the chosen law missed the held-out sizes by {100.0 * held_out_error:.0f} %")
    return LawFit(
        law=law,
        parameters=_parameters(law, point, after[best]),
        held_out_error=held_out_error,
        checked_at=float(sizes[-1]) / float(sizes[rest - 1]),
        widening=widening,
        scores=scores,
        reliable=reliable,
        why=tuple(why),
        sizes=tuple(int(size) for size in sizes),
        errors=tuple(mean.tolist()),
        held_out=hold_out,
        seed_errors=given,
        _point=point,
        _draws=draws,
        _extra=extra,
    )


def _checked(sizes: Sequence[int], errors: Tensor, laws: Sequence[str], hold_out: int, bootstrap: int) -> Tensor:
    integer("hold_out", hold_out, low=2)
    integer("bootstrap", bootstrap, low=100)
    for law in laws:
        if law not in LAWS:
            raise ValueError(f"laws must be among {', '.join(map(repr, LAWS))}, got {law!r}")
    values = torch.as_tensor(errors).detach().cpu().double()
    values = values[:, None] if values.ndim == 1 else values
    if values.ndim != 2 or len(values) != len(sizes):
        raise ValueError(f"errors must be (sizes, seeds) for {len(sizes)} sizes, got shape {tuple(values.shape)}")
    if any(integer("sizes", size, low=1) >= later for size, later in zip(sizes, [*sizes[1:], math.inf], strict=True)):
        raise ValueError(f"sizes must increase, got {tuple(sizes)}")
    good = values[~values.isnan()]
    if len(good) == 0:
        raise ValueError("errors are all NaN: no training succeeded")
    if not bool(((good >= 0.0) & (good <= 1.0)).all()):
        raise ValueError(
            f"errors must lie in [0, 1], got values from {float(good.min()):g} to {float(good.max()):g}; give shares, not per cent"
        )
    if values.shape[1] < 2:
        raise ValueError("errors of one seed have no spread: measure at least 2 seeds, better 3")
    return values


def _positive(values: Tensor, test_size: int | None) -> tuple[Tensor, float]:
    """Errors of exactly 0 replaced by what a test set cannot tell from it."""
    if not bool((values == 0.0).any()):
        return values, 0.0
    smallest = values[values > 0.0]
    if test_size is None and len(smallest) == 0:
        raise ValueError("all errors are exactly 0: nothing to fit")
    least = 1.0 / (2.0 * test_size) if test_size is not None else float(smallest.min()) / 2.0
    return values.where(values != 0.0, least), least


def _variance(values: Tensor, mean: Tensor, test_size: int | None) -> Tensor:
    """Variance of the log of each mean error."""
    count = (~values.isnan()).sum(1).double()
    logs = values.log()
    squares = (logs - logs.nanmean(1, keepdim=True)).square().nansum(1)
    pooled = float(squares.sum() / (count - 1.0).sum())
    own = 4.0  # prior degrees of freedom: as much as five seeds
    single = (squares + own * pooled) / (count - 1.0 + own)
    if test_size is not None:
        # All seeds are measured on one test set, whose noise does not average out.
        return torch.maximum(single / count, (1.0 - mean) / (mean * test_size))
    return single / count


def _resample(values: Tensor, mean: Tensor, bootstrap: int, generator: torch.Generator | None) -> Tensor:
    """Mean errors ``(bootstrap, sizes)`` of seeds drawn with replacement; deviations as large as an unbiased variance says."""
    order = values.isnan().to(torch.int8).argsort(dim=1, stable=True)
    good = values.gather(1, order)
    count = (~values.isnan()).sum(1)
    picks = (torch.rand(bootstrap, *values.shape, generator=generator, dtype=torch.float64) * count[:, None]).long()
    drawn = good.expand(bootstrap, -1, -1).gather(2, picks)
    used = torch.arange(values.shape[1]) < count[:, None]
    means = (drawn * used).sum(2) / count
    scale = (count / (count - 1.0)).sqrt()
    return torch.maximum(mean + scale * (means - mean), 0.1 * mean)


def _line(log_n: Tensor, log_e: Tensor, weights: Tensor, *, most: float = math.inf) -> tuple[Tensor, Tensor]:
    """Weighted least squares of ``log_e (..., sizes)`` on ``log_a - b log_n``; b in [-inf, most]."""
    total = weights.sum(-1)
    x = (weights * log_n).sum(-1) / total
    y = (weights * log_e).sum(-1) / total
    off = log_n - x.unsqueeze(-1)
    b = -(weights * off * log_e).sum(-1) / (weights * off.square()).sum(-1)
    if most < math.inf:
        b = b.clamp(0.0, most)
    return y + b * x, b


def _fit(law: str, log_n: Tensor, errors: Tensor, weights: Tensor) -> _Curves:
    """Fit a law to every row of ``errors (rows, sizes)``."""
    nothing = torch.zeros(len(errors), dtype=torch.float64)
    if law == "power":
        log_a, b = _line(log_n, errors.log(), weights[None], most=2.0)
        return _Curves(log_a, b, nothing, nothing, nothing)
    if law == "power_floor":
        return _fit_floor(log_n, errors, weights)
    return _fit_broken(log_n, errors.log(), weights)


def _fit_floor(log_n: Tensor, errors: Tensor, weights: Tensor) -> _Curves:
    least = errors.amin(1, keepdim=True)
    candidates = torch.linspace(0.0, 1.0, _COARSE + 1, dtype=torch.float64)[:-1].expand(len(errors), -1)
    step = 1.0 / _COARSE
    log_a = b = floor = torch.zeros(len(errors), dtype=torch.float64)
    for _ in range(4):
        c = (candidates * least)[..., None]
        above = errors[:, None] - c
        log_e = above.log()
        w = weights * (above / errors[:, None]).square()
        a_c, b_c = _line(log_n, log_e, w, most=2.0)
        misfit = (w * (log_e - a_c[..., None] + b_c[..., None] * log_n).square()).sum(-1)
        best = misfit.argmin(1, keepdim=True)
        log_a, b, share = (each.gather(1, best)[:, 0] for each in (a_c, b_c, candidates))
        floor = share * least[:, 0]
        around = torch.linspace(-1.0, 1.0, _FINE, dtype=torch.float64) * step
        candidates = (share[:, None] + around).clamp(0.0, 1.0 - 1e-6)
        step *= 2.0 / (_FINE - 1)
    nothing = torch.zeros_like(floor)
    return _Curves(log_a, b, floor, nothing, nothing)


def _fit_broken(log_n: Tensor, log_e: Tensor, weights: Tensor) -> _Curves:
    """A bent line in logarithms; the bend between the second size and the last but one, by search."""
    knees = torch.linspace(float(log_n[1]), float(log_n[-2]), 17, dtype=torch.float64)
    design = torch.stack(
        [torch.ones_like(log_n).expand(len(knees), -1), -log_n.expand(len(knees), -1), -(log_n - knees[:, None]).clamp_min(0.0)], 2
    )
    root = weights.sqrt()
    solved = torch.linalg.pinv(design * root[:, None]) @ (log_e * root).T  # (knees, 3, rows)
    misfit = ((design @ solved - log_e.T).square() * weights[:, None]).sum(1)
    best = misfit.argmin(0)
    log_a, b, steeper = solved[best, :, torch.arange(log_e.shape[0])].unbind(1)
    b = b.clamp(0.0, 2.0)
    steeper = torch.minimum(torch.maximum(steeper, -b), 2.0 - b)  # never rising, never steeper than 2
    bent = -b[:, None] * log_n - steeper[:, None] * (log_n - knees[best][:, None]).clamp_min(0.0)
    log_a = (weights * (log_e - bent)).sum(1) / weights.sum()
    return _Curves(log_a, b, torch.zeros_like(b), steeper, knees[best])


def _constant(errors: Tensor, weights: Tensor) -> _Curves:
    level = (weights * errors.log()).sum(1) / weights.sum()
    nothing = torch.zeros_like(level)
    return _Curves(level, nothing, nothing, nothing, nothing)


def _half_width(draws: _Curves, fits: _Curves, log_n: Tensor) -> float:
    """Half the 95 % interval of the log error at one size."""
    off = draws.log_error(log_n)[:, 0] - fits.log_error(log_n)[0]
    low, high = off.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return (high - low) / 2.0


def _parameters(law: str, point: _Curves, draws: _Curves) -> dict[str, Interval]:
    def interval(of_point: Tensor, of_draws: Tensor) -> Interval:
        value = float(of_point[0])
        low, high = of_draws[1:].quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
        return Interval(value, min(low, value), max(high, value))

    found = {"a": interval(point.log_a.exp(), draws.log_a.exp())}
    if law != "constant":
        found["b"] = interval(point.b, draws.b)
    if law == "power_floor":
        found["c"] = interval(point.floor, draws.floor)
    if law == "broken":
        found["knee"] = interval(point.knee.exp(), draws.knee.exp())
        found["b_after"] = interval(point.b + point.steeper, draws.b + draws.steeper)
    return found


def _log(n: float) -> Tensor:
    return torch.tensor([n], dtype=torch.float64).log()
