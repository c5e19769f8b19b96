"""The equivariance test.

Z. Li, Zhang, Arora, "Why Are Convolutional Nets More Sample-Efficient than Fully-Connected Nets?", ICLR 2021: table 1 says which
ways of training are blind to which transformations; here that is measured.
"""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from outlast._core._checks import choice, integer, real
from outlast._core._norm import eval_mode
from outlast._core._random import derived_seed, own_stream, seeded
from outlast._core._random import generator as stream_of
from outlast.diagnose.equivariance._groups import MATRIX_GROUPS, Transformation, draw, from_matrix
from outlast.diagnose.equivariance._initialisation import SymmetryResult, initialisation_symmetry
from outlast.diagnose.equivariance._layers import InputLayer, check_own_weights, input_layers
from outlast.diagnose.equivariance._results import EquivarianceResult, GroupVerdict, Verdict, interpret
from outlast.errors import DivergedError, OutlastWarning, StateError

Train = Callable[[nn.Module, Tensor, Tensor], Any]
Group = str | Tensor | Callable[[Tensor], Tensor]
PERMUTATIONS = 9999
MIN_SEEDS = 8


def equivariance_test(
    make_model: Callable[[], nn.Module],
    train: Train,
    inputs: Tensor,
    targets: Tensor,
    *,
    probes: Tensor | None = None,
    groups: Sequence[Group] = ("orthogonal", "signed_permutation", "permutation"),
    draws: int = 3,
    input_layer: InputLayer = None,
    method: Literal["coupled", "distributional"] = "coupled",
    seeds: int = MIN_SEEDS,
    dtype: torch.dtype = torch.float64,
    tolerance: float = 1e-8,
    generator: torch.Generator | None = None,
) -> EquivarianceResult:
    """Test whether a way of training is blind to transformations of its input.

    It is blind to g if training on transformed data gives the transformed model. If that holds for shuffled pixels, nothing that makes
    an image an image is used.

    ``"coupled"``: one model is trained on the data, a copy whose first layer follows g on the transformed data, with the same seeds;
    their outputs must be equal up to rounding. That proves that architecture and updates commute with g; whether the initial weights
    are drawn symmetrically is tested beside it. ``"distributional"``, for models without such a layer and pretrained ones: ``seeds``
    models are trained on either data, and a permutation test compares how much their decisions disagree across and within. The copies
    run on the CPU in ``dtype``.

    Example:
        ```python
        train = train_with(lambda p: torch.optim.SGD(p, lr=0.1), loss=torch.nn.functional.cross_entropy, steps=100)
        print(equivariance_test(lambda: torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.ReLU(), torch.nn.Linear(32, 2)), train, X, y))
        ```

    Args:
        make_model: builds a freshly initialised model. Called with torch's, numpy's and Python's global generators seeded; they are
            restored, as around ``train``.
        train: ``train(model, inputs, targets)`` changes the model: your own function with preprocessing, optimizer, schedule, or
            ``train_with``. The transformation acts before your preprocessing if that happens inside.
        inputs: ``(n, ...)``.
        targets: ``(n, ...)``, handed on as they are (floating ones in ``dtype``).
        probes: inputs on which outputs are compared; ``inputs`` otherwise.
        groups: names (``"orthogonal"``, ``"signed_permutation"``, ``"permutation"``, ``"sign_flip"`` on flattened inputs; ``"shift"``,
            ``"rotation90"``, ``"reflection"`` on the last axes), orthogonal matrices, or callables ``g(inputs)``, which are not coupled.
        draws: of g for each group.
        input_layer: name, module or several of them, where the layer that receives the input cannot be told.
        method: see above.
        seeds: trainings on each side of the distributional test, 8 or more.
        dtype: of the computation; float32 drifts too much for a verdict.
        tolerance: largest relative difference that counts as rounding.
        generator: of seeds and transformations; a fixed one otherwise.

    Returns:
        Verdicts, their meaning in words, and the symmetry of the initial weights (coupled method).

    Raises:
        TypeError: no module, output that is no tensor, integer inputs for a group of matrices.
        ValueError: a training that is not repeatable under its seed, a model without parameters or with constant outputs, a matrix that
            is not orthogonal, no or several layers that receive the input, arguments out of range.
        DivergedError: outputs are not finite after training.
    """
    choice("method", method, ("coupled", "distributional"))
    integer("draws", draws, low=1)
    integer("seeds", seeds, low=MIN_SEEDS)
    real("tolerance", tolerance, low=0.0, low_open=True)
    if len(inputs) == 0 or len(inputs) != len(targets):
        raise ValueError(f"inputs and targets must be as many and not empty, got {len(inputs)} and {len(targets)}")
    if not groups:
        raise ValueError("groups is empty: there is nothing to test")
    seed = int(torch.randint(2**31 - 1, (), generator=own_stream(generator, "equivariance test")))
    probes = inputs if probes is None else probes
    shape = tuple(inputs.shape[1:])
    if tuple(probes.shape[1:]) != shape:
        raise ValueError(f"probes must have the shape of inputs, {shape} behind the first axis, got {tuple(probes.shape[1:])}")
    chosen: list[tuple[str, list[Transformation]]] = []
    for number, group in enumerate(groups):
        name, elements = _named(group, number, shape, inputs, seed, draws, dtype)
        taken = any(name == other for other, _ in chosen)
        chosen.append((f"{name} {number + 1}" if taken else name, elements))
    targets = targets.detach().cpu()
    test = _Test(
        make_model=make_model,
        train=train,
        inputs=_cast(inputs, dtype),
        targets=targets.to(dtype) if targets.is_floating_point() else targets,
        probes=_cast(probes, dtype),
        dtype=dtype,
        tolerance=tolerance,
        seed=seed,
    )
    with seeded(derived_seed(seed, "model")):
        model = make_model()
    if not isinstance(model, nn.Module):
        raise TypeError(f"make_model must give a torch.nn.Module, got {type(model).__name__}")
    model = copy.deepcopy(model).to("cpu", dtype)
    if not any(True for _ in model.parameters()):
        raise ValueError(f"{type(model).__name__} has no parameters: there is nothing to train and to compare")
    if method == "coupled":
        return test.coupled(model, chosen, input_layer)
    return test.distributional(chosen, seeds)


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    tensor = tensor.detach().cpu()
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def _named(
    group: Group, number: int, shape: tuple[int, ...], inputs: Tensor, seed: int, draws: int, dtype: torch.dtype
) -> tuple[str, list[Transformation]]:
    if not inputs.is_floating_point() and (isinstance(group, Tensor) or group in MATRIX_GROUPS):
        raise TypeError(
            f"inputs are of type {inputs.dtype}: matrices act on numbers; pass a callable that permutes features, or embed tokens first"
        )
    if isinstance(group, Tensor):
        name = f"matrix {number + 1}"
        size = 1
        for axis in shape:
            size *= axis
        return name, [from_matrix(group, size, dtype, name)]
    if isinstance(group, str):
        elements = [draw(group, shape, stream_of(seed, group, index), dtype) for index in range(draws)]
        return elements[0].group, elements
    if not callable(group):
        raise TypeError(f"groups holds names, matrices or callables, got {type(group).__name__}")
    name = getattr(group, "__name__", f"callable {number + 1}")
    return name, [Transformation(name, group, orthogonal=False)]


@dataclass
class _Test:
    """One call of the test."""

    make_model: Callable[[], nn.Module]
    train: Train
    inputs: Tensor
    targets: Tensor
    probes: Tensor
    dtype: torch.dtype
    tolerance: float
    seed: int
    autocast: bool = False

    def coupled(self, model: nn.Module, chosen: list[tuple[str, list[Transformation]]], input_layer: InputLayer) -> EquivarianceResult:
        layers = input_layers(model, input_layer, self.probes[:2])
        modules = [model.get_submodule(name) for name in layers]
        dims = self.inputs[0].numel()
        dense = all(isinstance(module, nn.Linear) for module in modules)
        follows_any = any(g.orthogonal for _, elements in chosen for g in elements)
        if follows_any:
            check_own_weights(model, layers)
        for module, name in zip(modules, layers, strict=True):
            if follows_any and isinstance(module, nn.Linear) and module.in_features != dims:
                raise ValueError(
                    f"layer {name!r} sees {module.in_features} features of inputs that have {dims}: its weights cannot follow a "
                    "transformation of the whole input; use method='distributional'"
                )
        untrained = self._outputs(model, self.probes)
        trained, changed = self._trained(model, self.inputs)
        plain = self._outputs(trained, self.probes)
        again = self._outputs(self._trained(model, self.inputs)[0], self.probes)
        spread = float(plain.std())
        if not spread >= 1e-12:
            raise ValueError("the trained model gives the same output for every probe: there is nothing to compare")
        off = float((plain - again).abs().max()) / spread
        if off > self.tolerance:
            raise ValueError(
                f"two trainings on the same data with the same seeds differ by {off:.2g} standard deviations of the output: make train "
                "repeatable (seed its generators, no nondeterministic kernels)"
            )
        notes: list[str] = []
        if not changed:
            warnings.warn("train does not change the model's parameters: the test is vacuous", OutlastWarning, stacklevel=3)
            notes.append("train does not change the parameters: nothing was tested")
        verdicts: list[GroupVerdict] = []
        for name, elements in chosen:
            if not changed:
                verdicts.append(GroupVerdict(name, "untested", (), 0.0, coupled=False))
                continue
            found: list[float] = []
            flips = 0.0
            follows = early = False
            for g in elements:
                twin = copy.deepcopy(model)
                follows = _follow(twin, layers, g, tuple(self.inputs.shape[1:]), dense=dense)
                apart = float((self._outputs(twin, g.apply(self.probes)) - untrained).abs().max()) / max(float(untrained.std()), 1e-300)
                early |= follows and apart > self.tolerance
                outputs = self._outputs(self._trained(twin, g.apply(self.inputs))[0], g.apply(self.probes))
                found.append(float((outputs - plain).abs().max()) / spread)
                flips = max(flips, float((_decisions(outputs) != _decisions(plain)).double().mean()))
            if early:
                notes.append(
                    f"{name}: the models differ before training already: features are normalised, a dense layer reads a flattened map, "
                    f"or the input reaches other layers than {', '.join(layers)} (then name them all in input_layer=)"
                )
            if not follows and name != "shift":
                notes.append(f"{name}: no change of the first layer's weights undoes it, so both models began with the same weights")
            verdict: Verdict = "equivariant" if max(found) <= self.tolerance else "not equivariant"
            verdicts.append(GroupVerdict(name, verdict, tuple(found), flips, coupled=follows))
        law: SymmetryResult | None = None
        if changed and any(each.verdict == "equivariant" for each in verdicts):
            law = initialisation_symmetry(self.make_model, input_layer=layers[0], generator=stream_of(self.seed, "initialisation"))
        notes += self._warnings()
        return EquivarianceResult(
            tuple(verdicts),
            "coupled",
            self.tolerance,
            law,
            dims,
            interpret(tuple(verdicts), law, dims, dense=dense),
            tuple(notes),
        )

    def distributional(self, chosen: list[tuple[str, list[Transformation]]], seeds: int) -> EquivarianceResult:
        def runs(side: str, apply: Callable[[Tensor], Tensor]) -> Tensor:
            found: list[Tensor] = []
            for index in range(seeds):
                run_seed = derived_seed(self.seed, side, index)
                with seeded(run_seed):
                    model = copy.deepcopy(self.make_model()).to("cpu", self.dtype)
                found.append(self._outputs(self._trained(model, apply(self.inputs), run_seed)[0], apply(self.probes)))
            return torch.stack(found)

        regression = self.targets.is_floating_point()
        plain = runs("plain", lambda x: x)
        repeat = derived_seed(self.seed, "plain", 0)
        with seeded(repeat):
            model = copy.deepcopy(self.make_model()).to("cpu", self.dtype)
        trained, changed = self._trained(model, self.inputs, repeat)
        off = float((self._outputs(trained, self.probes) - plain[0]).abs().max())
        spread = float(plain.std(1).mean())
        if not spread >= 1e-12:
            raise ValueError("the trained models give the same output for every probe: there is nothing to compare")
        if off > self.tolerance * spread:
            raise ValueError("two trainings on the same data with the same seeds differ: make make_model and train repeatable")
        notes = [f"{seeds} trainings on each side; what is not found may still be there"]
        if not changed:
            warnings.warn("train does not change the model's parameters: the test is vacuous", OutlastWarning, stacklevel=3)
        verdicts: list[GroupVerdict] = []
        for name, elements in chosen:
            if not changed:
                verdicts.append(GroupVerdict(name, "untested", (), 0.0, coupled=False))
                continue
            gaps: list[float] = []
            apart: list[float] = []
            values: list[float] = []
            for index, g in enumerate(elements):
                both = torch.cat([plain, runs(f"{name} {index}", g.apply)])
                distances = _disagreement(both, regression=regression)
                gap, p_value = _permutation_test(distances, seeds, stream_of(self.seed, name, index))
                gaps.append(gap)
                apart.append(float(distances[:seeds, seeds:].mean()))
                values.append(p_value)
            p_value = min(1.0, len(values) * min(values))
            verdict: Verdict = "not equivariant" if p_value < 0.05 else "no difference found"
            verdicts.append(GroupVerdict(name, verdict, tuple(gaps), max(apart), coupled=False, p_value=p_value))
        found = tuple(verdicts)
        notes += self._warnings()
        return EquivarianceResult(
            found, "distributional", self.tolerance, None, self.inputs[0].numel(), interpret(found, None, 0, dense=False), tuple(notes)
        )

    def _trained(self, model: nn.Module, inputs: Tensor, seed: int | None = None) -> tuple[nn.Module, bool]:
        """A trained copy, and whether training changed it."""
        model = copy.deepcopy(model)
        before = [parameter.detach().clone() for parameter in model.parameters()]

        def watch(module: nn.Module, _: Any) -> None:
            self.autocast |= torch.is_autocast_enabled("cpu")

        handle = model.register_forward_pre_hook(watch)
        try:
            with seeded(derived_seed(self.seed if seed is None else seed, "training")):
                self.train(model, inputs, self.targets)
        finally:
            handle.remove()
        after = list(model.parameters())
        if len(after) != len(before):
            raise StateError("train changed which parameters the model has; it must train the model that it is given, in place")
        return model, any(not torch.equal(old, new.detach()) for old, new in zip(before, after, strict=True))

    def _outputs(self, model: nn.Module, probes: Tensor) -> Tensor:
        with torch.no_grad(), eval_mode(model):
            outputs = model(probes)
        if not isinstance(outputs, Tensor):
            raise TypeError(f"the model's output must be a tensor, got {type(outputs).__name__}; wrap it to return its logits")
        if not bool(outputs.isfinite().all()):
            raise DivergedError("outputs are not finite after training")
        return outputs.detach().double()

    def _warnings(self) -> list[str]:
        if not self.autocast:
            return []
        warnings.warn("train runs under autocast: rounding hides equivariance, so the verdict is unreliable", OutlastWarning, stacklevel=4)
        return ["train runs under autocast: the verdict is unreliable"]


def _follow(model: nn.Module, layers: Sequence[str], g: Transformation, shape: tuple[int, ...], *, dense: bool) -> bool:
    """Let the weights of the input layers follow g, where they can; whether they did."""
    with torch.no_grad():
        if dense and g.orthogonal:
            for name in layers:
                weight: Tensor = model.get_submodule(name).weight  # pyright: ignore[reportAssignmentType]
                weight.copy_(g.apply(weight.view(len(weight), *shape)).reshape(weight.shape))
            return True
        if not dense and g.on_kernels is not None:
            for module in model.modules():  # every convolution moves along the same axes
                if isinstance(module, _ConvNd):
                    moved = g.on_kernels(module.weight)
                    if moved.shape != module.weight.shape:
                        raise ValueError(f"{g.group} needs square kernels, got one of shape {tuple(module.weight.shape[2:])}")
                    module.weight.copy_(moved)
            return True
    return False


def _decisions(outputs: Tensor) -> Tensor:
    flat = outputs.flatten(1) if outputs.ndim > 1 else outputs[:, None]
    return flat.argmax(1) if flat.shape[1] > 1 else flat[:, 0] > 0.0


def _disagreement(outputs: Tensor, *, regression: bool) -> Tensor:
    """Mean disagreement of every pair of runs, ``(runs, runs)``: of decisions, or of outputs in standard deviations."""
    if regression:
        flat = outputs.flatten(1)
        return torch.cdist(flat, flat, p=1.0) / flat.shape[1] / outputs.std()
    decisions = torch.stack([_decisions(each) for each in outputs])
    return (decisions[:, None] != decisions[None]).double().mean(2)


def _permutation_test(distances: Tensor, seeds: int, stream: torch.Generator) -> tuple[float, float]:
    """Disagreement across minus within two halves, and its p-value over all (or many random) ways to halve the runs."""
    count = 2 * seeds
    if seeds == MIN_SEEDS:
        halves = [(0, *rest) for rest in itertools.combinations(range(1, count), seeds - 1)]
        sides = torch.zeros(len(halves), count, dtype=torch.float64).scatter_(1, torch.tensor(halves), 1.0)
    else:
        order = torch.rand(PERMUTATIONS, count, generator=stream).argsort(1)
        sides = (order < seeds).double()
        sides = torch.cat([(torch.arange(count) < seeds).double()[None], sides])
    other = 1.0 - sides
    across = ((sides @ distances) * other).sum(1) / seeds**2
    within = (((sides @ distances) * sides).sum(1) + ((other @ distances) * other).sum(1)) / (2 * seeds * (seeds - 1))
    gaps = across - within
    observed = float(gaps[0])  # both lists begin with the true halves
    return observed, float((gaps >= observed - 1e-12).double().mean())
