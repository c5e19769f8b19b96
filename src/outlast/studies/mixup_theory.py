"""Study ``mixup-theory``: does the expansion describe mixup, and does the adversarial bound hold?

Zhang, Deng, Kawaguchi, Ghorbani, Zou, "How Does Mixup Help With Robustness and Generalization?", ICLR 2021: figure 2 (exact and
approximate loss on two moons), figure 3 (R over training), section 3.1 (the bound).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from outlast.studies._design import Arm, Claim, Figure, Metric, Outcome, Part, Scale, Setting, Settings, Study

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from outlast.studies._context import Context
    from outlast.studies._results import Results

_SCALES = ("0.1", "0.3", "1", "3", "10")


class Moons(Settings):
    """Full-batch gradient descent on two moons."""

    objective: Literal["standard", "exact", "approximate"] = "exact"
    model: Literal["logistic", "relu"] = "logistic"
    n: int = Field(default=60, ge=4)
    noise: float = Field(default=0.15, ge=0)
    width: int = Field(default=32, ge=1)
    steps: int = Field(default=300, ge=1)
    lr: float = Field(default=0.5, gt=0)
    alpha: float = Field(default=1.0, gt=0)
    nodes: int = Field(default=8, ge=2)
    checks: int = Field(default=10, ge=1)


def moons_cell(config: Moons, seed: int, context: Context) -> Outcome:
    """Minimise one of the losses; follow the exact and the approximate mixup loss and the angles between gradient and input."""
    import time

    import torch
    import torch.nn.functional as F

    from outlast.diagnose.mixup_theory import adversarial_bound, exact_mixup_loss, mixup_penalty, mixup_terms

    X, y = _two_moons(config.n, config.noise, context.generator("moons"))
    test_X, test_y = _two_moons(2000, config.noise, context.generator("test moons"))
    mean = X.mean(0)
    centred, test_centred = X - mean, test_X - mean
    model = context.initialise(lambda: _model(config))
    optimizer = torch.optim.SGD(model.parameters(), lr=config.lr)
    series: dict[str, list[float]] = {"exact": [], "approximate": [], "R": []}
    terms = None
    seconds = 0.0
    every = max(1, config.steps // config.checks)
    for step in range(config.steps + 1):
        if step % every == 0 or step == config.steps:
            terms = mixup_terms(model, centred, y, config.alpha, loss="bce", exact=True, nodes=32)
            assert terms.exact is not None
            series["exact"].append(terms.exact)
            series["approximate"].append(terms.approx)
            series["R"].append(float(adversarial_bound(model, centred, y, config.alpha).R.mean()))
            context.report(step, config.steps, terms.exact)
        if step == config.steps:
            break
        start = time.perf_counter()
        optimizer.zero_grad()
        if config.objective == "exact":
            loss = exact_mixup_loss(model, centred, y, config.alpha, nodes=config.nodes)
        else:
            loss = F.binary_cross_entropy_with_logits(model(centred)[:, 0], y.double())
            if config.objective == "approximate":
                loss = loss + mixup_penalty(model, centred, y, config.alpha, loss="bce", pairs="all")
        loss.backward()
        optimizer.step()
        seconds += time.perf_counter() - start
    with torch.no_grad():
        hits = (model(test_centred)[:, 0] > 0.0) == (test_y == 1)
    assert terms is not None
    assert terms.exact is not None
    assert terms.rel_error is not None
    return Outcome(
        {
            "accuracy": 100.0 * float(hits.double().mean()),
            "standard": terms.standard,
            "exact": terms.exact,
            "approximate": terms.approx,
            "error": terms.rel_error,
            "R": series["R"][-1],
            "milliseconds": 1e3 * seconds / config.steps,
        },
        series,
    )


def _two_moons(n: int, noise: float, stream: torch.Generator) -> tuple[Tensor, Tensor]:
    """Half circles ``(cos t, sin t)`` and ``(1 - cos t, 0.5 - sin t)``, t uniform on [0, pi], with Gaussian noise."""
    import math

    import torch

    t = math.pi * torch.rand(n, generator=stream, dtype=torch.float64)
    y = torch.arange(n) % 2
    upper, lower = torch.stack([t.cos(), t.sin()], 1), torch.stack([1.0 - t.cos(), 0.5 - t.sin()], 1)
    points = torch.where(y[:, None] == 1, lower, upper)
    return points + noise * torch.randn(n, 2, generator=stream, dtype=torch.float64), y


def _model(config: Moons) -> nn.Module:
    from torch import nn

    if config.model == "logistic":
        return nn.Sequential(nn.Linear(2, 1, bias=False)).double()
    return nn.Sequential(nn.Linear(2, config.width), nn.ReLU(), nn.Linear(config.width, 1)).double()


class Expansion(Settings):
    """Logistic regression whose weights are scaled."""

    scale: float = Field(default=1.0, gt=0)
    certainty: float = Field(default=1.5, gt=0)
    n: int = Field(default=80, ge=4)
    d: int = Field(default=10, ge=1)
    alpha: float = Field(default=1.0, gt=0)
    models: int = Field(default=50, ge=1)


def expansion_cell(config: Expansion, seed: int, context: Context) -> Outcome:
    """Median relative error of the expansion over random problems."""
    import torch

    from outlast.diagnose.mixup_theory import mixup_terms

    errors: list[float] = []
    wrong = 0
    for index in range(config.models):
        theta, X, y = _problem(config, context.generator("problem", index))
        terms = mixup_terms(config.scale * theta, X, y, config.alpha, loss="bce", exact=True)
        assert terms.exact is not None
        assert terms.rel_error is not None
        errors.append(terms.rel_error)
        wrong += (terms.exact - terms.standard) * (terms.approx - terms.standard) < 0.0
    return Outcome({"error": float(torch.tensor(errors).median()), "wrong_sign": 100.0 * wrong / config.models})


def _problem(config: Expansion, stream: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Gaussian inputs, weights whose logits have unit variance, labels drawn from them at ``certainty`` times those logits."""
    import torch

    X = torch.randn(config.n, config.d, generator=stream, dtype=torch.float64)
    theta = torch.randn(config.d, generator=stream, dtype=torch.float64)
    theta = theta / (X @ theta).std()
    y = torch.rand(config.n, generator=stream, dtype=torch.float64) < torch.sigmoid(config.certainty * (X @ theta))
    return theta, X, y.long()


class Bound(Settings):
    """Random models that meet the conditions of the bound, or that break one."""

    model: Literal["linear", "relu"] = "linear"
    broken: Literal["nothing", "labels", "centre"] = "nothing"
    models: int = Field(default=200, ge=1)
    n: int = Field(default=40, ge=2)
    d: int = Field(default=8, ge=1)
    width: int = Field(default=32, ge=1)


def bound_cell(config: Bound, seed: int, context: Context) -> Outcome:
    """How often the four losses are out of order, and how much room the bound leaves."""
    import torch
    from torch import nn

    from outlast.diagnose.mixup_theory import adversarial_bound

    violated = held = 0
    room: list[float] = []
    sizes: list[float] = []
    for index in range(config.models):
        stream = context.generator("model", index)
        x = torch.randn(config.n, config.d, generator=stream, dtype=torch.float64)
        x = x - x.mean(0)
        model: Any = torch.randn(config.d, generator=stream, dtype=torch.float64)
        if config.model == "relu":
            model = nn.Sequential(nn.Linear(config.d, config.width, bias=False), nn.ReLU(), nn.Linear(config.width, 1, bias=False)).double()
            for parameter in model.parameters():
                values = torch.randn(parameter.shape, generator=stream, dtype=torch.float64)
                parameter.data.copy_(values * (2.0 / parameter.shape[1]) ** 0.5)
        if config.broken == "centre":
            x = x + 3.0
        out = x @ model if isinstance(model, torch.Tensor) else model(x).detach()[:, 0]
        y = (out >= 0.0).long()
        if config.broken == "labels":
            y = torch.where(torch.rand(config.n, generator=stream) < 0.5, 1 - y, y)
        found = adversarial_bound(model, x, y, (0.2, 1.0, 4.0)[index % 3])
        violated += "order" in found.violations
        held += found.holds
        room.append(found.mixup_quadratic - found.adv_own)
        sizes.append(found.eps_mix * config.d**0.5)
    return Outcome(
        {
            "violated": 100.0 * violated / config.models,
            "holds": 100.0 * held / config.models,
            "room": float(torch.tensor(room).median()),
            "eps": float(torch.tensor(sizes).median()),
        }
    )


def _nearer(model: str) -> Callable[[Results, int], float]:
    """How much lower the exact mixup loss is after training on the approximate one than after plain training."""
    return lambda results, seed: results.value("standard", "exact", seed, model) - results.value("approximate", "exact", seed, model)


def _largest_distance(results: Results, seed: int) -> float:
    """Largest distance of the approximate from the exact loss while the exact one is minimised, over the exact."""
    exact, approximate = (results.series("exact", name, seed, "logistic") for name in ("exact", "approximate"))
    return max(abs(a - e) / e for a, e in zip(approximate, exact, strict=True))


def _draw_moons(figure: Any, results: Results) -> None:
    axes = figure.subplots(1, 3)
    names = {"exact": "exact", "approximate": "approximate", "standard": "plain"}
    for ax, setting in zip(axes[:2], ("logistic", "relu"), strict=True):
        for arm, title in names.items():
            ax.plot(results.series(arm, "exact", results.seeds[0], setting), label=f"exact loss, {title} minimised")
        ax.plot(results.series("exact", "approximate", results.seeds[0], setting), label="approximate loss, exact minimised")
        axes[2].plot(results.series("exact", "R", results.seeds[0], setting), label=f"angle, {setting}, exact minimised")
        ax.set_title(setting)
        ax.set_xlabel("tenths of training")
        ax.set_ylim(0.2, 1.2)
    axes[2].set_title("mean |cos|")
    axes[2].set_xlabel("tenths of training")
    axes[2].set_ylim(0.0, 1.0)
    lines = [*axes[0].get_lines(), *axes[2].get_lines()]
    figure.legend(lines, [line.get_label() for line in lines], loc="outside lower center", ncols=2, fontsize="small")


def _describe_moons(results: Results) -> str:
    parts: list[str] = []
    for setting in ("logistic", "relu"):
        for arm in ("exact", "approximate", "standard"):
            exact, approximate = (results.series(arm, name, results.seeds[0], setting)[-1] for name in ("exact", "approximate"))
            parts.append(f"{setting}, {arm} loss minimised: exact {exact:.3f}, approximate {approximate:.3f} at the end")
    return "Both losses over training on two moons, seed 0. " + "; ".join(parts) + "."


def _draw_errors(figure: Any, results: Results) -> None:
    axes = figure.subplots()
    axes.loglog([float(s) for s in _SCALES], [_error(results, s) for s in _SCALES], marker="o")
    axes.set_xlabel("standard deviation of the logits")
    axes.set_ylabel("relative error of the expansion")


def _describe_errors(results: Results) -> str:
    values = ", ".join(f"{100.0 * _error(results, scale):.2g} % at logits of size {scale}" for scale in _SCALES)
    return f"Median relative error of R1 + R2 + R3, mean over seeds: {values}."


def _error(results: Results, scale: str) -> float:
    values = results.values(f"scale-{scale}", "error")
    return sum(values) / len(values)


_MOONS = Part(
    name="moons",
    question="Is training on the approximate mixup loss training on mixup?",
    settings_type=Moons,
    cell=moons_cell,
    arms=(
        Arm("exact", "exact mixup loss minimised", "method"),
        Arm("approximate", "approximate mixup loss minimised", "method", {"objective": "approximate"}),
        Arm("standard", "plain loss minimised", "baseline", {"objective": "standard"}),
    ),
    metrics=(
        Metric("accuracy", "Test accuracy", "%", "higher"),
        Metric("standard", "Plain loss", "", None, 4),
        Metric("exact", "Exact mixup loss", "", None, 4),
        Metric("approximate", "Approximate mixup loss", "", None, 4),
        Metric("error", "Relative error of the terms", "", "lower", 3),
        Metric("R", "Mean |cos(gradient, input)|", "", None, 2),
        Metric("milliseconds", "A step", "ms", None, 1),
    ),
    claims=(
        Claim(
            "better-than-plain",
            "Logistic regression trained on the approximate loss ends at a lower exact mixup loss than trained on the plain one",
            _nearer("logistic"),
            0.0,
            digits=4,
        ),
        Claim(
            "curves",
            "While logistic regression minimises the exact loss, the approximate one stays within 5 % of it",
            _largest_distance,
            0.05,
            "at most",
            digits=4,
        ),
        Claim(
            "better-than-plain-relu",
            "So does a ReLU network",
            _nearer("relu"),
            0.0,
            digits=4,
        ),
    ),
    figures=(
        Figure(
            "losses",
            "Exact and approximate mixup loss over training, and the angle between gradient and input",
            _describe_moons,
            _draw_moons,
        ),
    ),
    scales={
        "quick": Scale(
            arms=("exact", "approximate", "standard"),
            settings=(
                Setting("logistic", "logistic regression without bias"),
                Setting("relu", "two layers, ReLU", {"model": "relu"}),
            ),
            dropped="larger sets of points, longer training, finer quadrature",
            minutes=0.5,
        ),
        "standard": Scale(
            arms=("exact", "approximate", "standard"),
            settings=(
                Setting("logistic", "logistic regression without bias"),
                Setting("relu", "two layers, ReLU", {"model": "relu"}),
            ),
            changes={"n": 80, "steps": 600, "nodes": 12},
            minutes=1,
        ),
    },
)

_DRAWN = Setting("drawn", "labels drawn, about a quarter against the model")
_SURE = Setting("sure", "all labels as the model says", {"certainty": 1e9})

_EXPANSION = Part(
    name="expansion",
    question="For which models do the three terms describe mixup?",
    settings_type=Expansion,
    cell=expansion_cell,
    arms=tuple(Arm(f"scale-{s}", f"logits of size {s}", "method", {"scale": float(s)}) for s in _SCALES),
    metrics=(
        Metric("error", "Relative error of the terms (median)", "", "lower", 4),
        Metric("wrong_sign", "Problems where the terms have the wrong sign", "%", "lower", 0),
    ),
    claims=(
        Claim(
            "small",
            "At logits of size 0.3 the terms miss at most 1 % of what mixup adds",
            lambda results, seed: results.value("scale-0.3", "error", seed),
            0.01,
            "at most",
            digits=4,
        ),
        Claim(
            "large",
            "At logits of size 10 they miss at least half of it: the theory does not describe confident models that err",
            lambda results, seed: results.value("scale-10", "error", seed),
            0.5,
            digits=2,
        ),
    ),
    figures=(Figure("errors", "The expansion fails as models grow confident", _describe_errors, _draw_errors),),
    scales={
        "quick": Scale(
            arms=tuple(f"scale-{s}" for s in _SCALES),
            settings=(_DRAWN, _SURE),
            changes={"models": 20},
            dropped="30 of 50 problems, other alphas",
            minutes=0.2,
        ),
        "standard": Scale(
            arms=tuple(f"scale-{s}" for s in _SCALES),
            settings=(
                _DRAWN,
                _SURE,
                Setting("alpha-0.1", "alpha 0.1", {"alpha": 0.1}),
                Setting("alpha-4", "alpha 4", {"alpha": 4.0}),
            ),
            minutes=1,
        ),
    },
)

_BOUND = Part(
    name="bound",
    question="Is the quadratic mixup loss above the quadratic adversarial loss?",
    settings_type=Bound,
    cell=bound_cell,
    arms=(
        Arm("linear", "linear models", "method"),
        Arm("relu", "ReLU networks without bias", "method", {"model": "relu"}),
        Arm("wrong-labels", "linear models, half of the samples misclassified", "ablation", {"broken": "labels"}),
        Arm("not-centred", "linear models, data moved away from 0", "ablation", {"broken": "centre"}),
    ),
    metrics=(
        Metric("violated", "Models above the bound", "%", "lower", 1),
        Metric("holds", "Models that meet all conditions and the bound", "%", None, 1),
        Metric("room", "Median room", "", None, 4),
        Metric("eps", "Median radius", "", None, 4),
    ),
    claims=(
        Claim(
            "linear",
            "No linear model violates the bound",
            lambda results, seed: results.value("linear", "violated", seed),
            0.0,
            "at most",
            "%",
        ),
        Claim("relu", "No ReLU network violates it", lambda results, seed: results.value("relu", "violated", seed), 0.0, "at most", "%"),
        Claim(
            "conditions",
            "With half of the samples misclassified at least 90 % of the models violate it: the condition is needed",
            lambda results, seed: results.value("wrong-labels", "violated", seed),
            90.0,
            unit="%",
        ),
    ),
    scales={
        name: Scale(arms=("linear", "relu", "wrong-labels", "not-centred"), changes=changes, dropped=dropped, minutes=0.5)
        for name, changes, dropped in (("quick", {"models": 100}, "half of the models"), ("standard", {}, ""))
    },  # pyright: ignore[reportArgumentType]
)

STUDY = Study(
    name="mixup-theory",
    title="The theory of mixup",
    question="Does the expansion describe mixup, and does the adversarial bound hold?",
    paper="Zhang, Deng, Kawaguchi, Ghorbani, Zou: How Does Mixup Help With Robustness and Generalization? ICLR 2021",
    follows="Figure 2 (two moons), figure 3 (R over training), section 3.1 (the bound)",
    theme="know your network and your data",
    parts=(_MOONS, _EXPANSION, _BOUND),
    origin="outlast.studies.mixup_theory:STUDY",
)
