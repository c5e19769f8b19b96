"""Sharpness-aware minimisation as an optimizer around any optimizer.

Foret, Kleiner, Mobahi, Neyshabur, "Sharpness-Aware Minimization for Efficiently Improving Generalization", ICLR 2021
(arXiv 2010.01412), algorithm 1 and equation 2. Options: ASAM (Kwon et al., ICML 2021), LookSAM (Liu et al., CVPR 2022),
the parameter part of ESAM (Du et al., ICLR 2022), the multi-step inner maximisation of appendix C.6.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.utils.weak import TensorWeakRef

from outlast._core import _checks, _foreach
from outlast._core._foreach import is_sharded
from outlast._core._norm import BufferSnapshot, is_norm_layer
from outlast._core._once import Once
from outlast._core._perturbation import (
    TINY,
    ball_step,
    check_p,
    inner_rate,
    is_weight_name,
    project_to_unit_ball_,
    weight_scaling,
)
from outlast._core._random import generator
from outlast.errors import StateError, UnsupportedError
from outlast.robust._passes import FirstPass, LocalGradients

Closure = Callable[[], Tensor]
Group = dict[str, Any]
STATE_KEY = "outlast_sam"
_ENTRIES = ("rho", "adaptive", "eta")


@dataclass(frozen=True)
class SAMStats:
    """What the last two-pass step saw. The tensors stay on their device, so reading them is the only synchronisation.

    Attributes:
        grad_norm: dual norm of the gradient at the weights (of ``T g`` with ``adaptive``), 0-dim.
        loss: loss at the weights, 0-dim; None in the two-call form, where the optimizer sees no loss.
        perturbed_loss: loss at the perturbed weights, 0-dim; None likewise.
    """

    grad_norm: Tensor
    loss: Tensor | None = None
    perturbed_loss: Tensor | None = None

    @property
    def sharpness(self) -> Tensor | None:
        """``perturbed_loss - loss``."""
        if self.loss is None or self.perturbed_loss is None:
            return None
        return self.perturbed_loss - self.loss

    @property
    def skipped(self) -> bool:
        """Whether the gradient was not finite, so that nothing was perturbed."""
        return not bool(torch.isfinite(self.grad_norm))


@dataclass
class _Move:
    """One parameter of a perturbation and how it moves."""

    parameter: nn.Parameter
    grad: Tensor
    radius: float  # negative where the base optimizer maximises: the worst point lies downhill there
    eta: float | None  # of ASAM's scaling; None for the identity


@dataclass
class _Ball:
    """Where projected ascent stands inside the unit ball, in scaled coordinates."""

    moves: list[_Move]
    scalings: list[Tensor | None]
    position: list[Tensor]


@dataclass
class _Progress:
    """Everything that changes from step to step, in one object.

    Wrappers of optimizers (Fabric's, Lightning's) run our methods on themselves and would keep assignments to themselves.
    """

    t: int = 0
    ready: bool = False  # a gradient at perturbed weights waits for the step
    cleared: bool = False  # zero_grad was called during the present pass
    used: dict[nn.Parameter, tuple[TensorWeakRef, int]] = field(default_factory=dict)  # gradients of the last step
    modules: list[nn.Module] = field(default_factory=list)  # found by the first pass, where they are compiled
    local: list[DistributedDataParallel] = field(default_factory=list)  # whose gradients the first pass did not reduce
    moved: list[nn.Parameter] | None = None  # None: not perturbed
    first: FirstPass | None = None
    snapshot: BufferSnapshot | None = None
    ball: _Ball | None = None
    last: SAMStats | None = None
    backups: dict[nn.Parameter, Tensor] = field(default_factory=dict)
    component: dict[nn.Parameter, Tensor] = field(default_factory=dict)
    component_norm: Tensor | None = None
    grads_at_weights: dict[nn.Parameter, Tensor] = field(default_factory=dict)
    once: Once = field(default_factory=lambda: Once(3))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "used": {}, "modules": [], "local": []}  # weak references do not travel, and the model travels by itself


class SAM(Optimizer):
    """Sharpness-aware minimisation around any ``torch.optim`` optimizer.

    ```python
    optimizer = SAM(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), rho=0.05)


    def closure():
        optimizer.zero_grad()
        loss = loss_fn(model(inputs), labels)
        loss.backward()
        return loss


    loss = optimizer.step(closure)  # calls the closure twice, returns the loss at the weights
    ```

    ``param_groups`` and ``state`` are the base optimizer's own objects: schedulers, checkpoints and hooks see one
    optimizer. ``rho``, ``adaptive`` and ``eta`` are entries of the groups; a group with ``rho = 0`` does not move but
    counts in the gradient's norm. With ``rho = 0`` everywhere this is the base optimizer, bit for bit, in one pass.

    The trap that it takes care of: running statistics (BatchNorm) are those of the first pass, and dropout draws the
    same mask in both passes. In the two-call form (``ascend``, ``restore``) that needs ``first_pass``
    around the first pass, or ``model`` for the statistics alone.

    Args:
        base: a built optimizer (not a class). Not ``LBFGS``, nor one whose groups use ``rho``, ``adaptive`` or ``eta``.
        model: needed for ``perturb="norm"``/``"no_norm"``; gives names to ``adaptive`` and buffers to the two-call form.
        rho: radius of the neighbourhood, in the weights' own units; 0.05 is the paper's default.
        p: order of the norm of the ball, in [1, inf].
        adaptive: ASAM: scale the ball by ``|w| + eta`` on parameters named ``...weight...`` (without any names: on those
            of two or more dimensions). Its usual ``rho`` is ten times larger, 0.5 to 2.
        eta: ASAM's floor, so that zero weights can move.
        inner_steps: steps of projected ascent (needs ``p = 2`` if more than one); costs ``inner_steps + 1`` passes.
        every: two passes only on every ``every``-th step, starting with the first.
        reuse: ``"looksam"`` adds the kept sharpness component on the steps between. The component is one for all processes: under
            DistributedDataParallel with ``sync="local"`` a step with two passes averages the first one's gradient once more for it.
        alpha: weight of that component.
        perturb_fraction: perturb each parameter tensor with this probability and by ``1 / perturb_fraction`` (ESAM).
        perturb: which parameters move: ``"all"``, ``"norm"``, ``"no_norm"`` or a predicate. Others count nowhere.
        perturb_weight_decay: add ``weight_decay * w`` to the gradient of the first pass, as the official code does.
        buffers: ``"freeze"`` keeps buffers as the first pass left them, ``"update"`` lets the second change them too.
        same_rng: rewind torch's generators for the second pass, so that dropout masks agree.
        sync: under DistributedDataParallel, ``"local"`` gives each process its own perturbation (the paper's
            recommendation, no extra communication), ``"global"`` one for all.
        accumulate: with a sequence of closures: ``"micro"`` perturbs for each on its own and adds up the gradients,
            ``"global"`` perturbs once for their sum.
        foreach: multi-tensor kernels; None uses them.
        seed: of ``perturb_fraction``; the draw of step t is a function of (seed, t).

    Raises:
        ValueError, TypeError: an argument out of range or of the wrong type; the message says what is accepted.
        UnsupportedError: a base optimizer or a combination that has no meaning.
    """

    def __init__(
        self,
        base: Optimizer,
        model: nn.Module | None = None,
        *,
        rho: float = 0.05,
        p: float = 2.0,
        adaptive: bool = False,
        eta: float = 0.01,
        inner_steps: int = 1,
        every: int = 1,
        reuse: Literal["none", "looksam"] = "none",
        alpha: float = 0.7,
        perturb_fraction: float = 1.0,
        perturb: Callable[[nn.Parameter], bool] | Literal["all", "norm", "no_norm"] = "all",
        perturb_weight_decay: bool = False,
        buffers: Literal["freeze", "update"] = "freeze",
        same_rng: bool = True,
        sync: Literal["local", "global"] = "local",
        accumulate: Literal["micro", "global"] = "micro",
        foreach: bool | None = None,
        seed: int = 0,
    ) -> None:
        _check_base(base)
        self.base = base
        self._p = check_p(p)
        self._inner_steps = _checks.integer("inner_steps", inner_steps, low=1)
        self._every = _checks.integer("every", every, low=1)
        self._looksam = _checks.choice("reuse", reuse, ("none", "looksam")) == "looksam"
        self._alpha = _checks.real("alpha", alpha, low=0.0)
        self._fraction = _checks.real("perturb_fraction", perturb_fraction, low=0.0, high=1.0, low_open=True)
        self._weight_decay = bool(perturb_weight_decay)
        self._freeze = _checks.choice("buffers", buffers, ("freeze", "update")) == "freeze"
        self._same_rng = bool(same_rng)
        self._local = _checks.choice("sync", sync, ("local", "global")) == "local"
        self._micro = _checks.choice("accumulate", accumulate, ("micro", "global")) == "micro"
        self._foreach = foreach is not False
        self._seed = _checks.integer("seed", seed, low=0)
        if self._inner_steps > 1 and self._p != 2.0:
            raise ValueError(f"inner_steps > 1 projects onto a Euclidean ball and needs p=2, got p={p!r}")
        if self._looksam and self._inner_steps > 1:
            raise ValueError("reuse='looksam' keeps the component of a single ascent step; use inner_steps=1")
        if self._looksam and self._every == 1:
            raise ValueError("reuse='looksam' needs every > 1: with every=1 there is no step that could reuse anything")

        self._perturb_choice = perturb if callable(perturb) else _checks.choice("perturb", perturb, ("all", "norm", "no_norm"))
        if model is None and self._perturb_choice in ("norm", "no_norm"):
            raise ValueError(
                f"perturb={perturb!r} needs the model to tell normalisation layers apart: SAM(base, model, perturb={perturb!r})"
            )
        defaults = {
            "rho": _checks.real("rho", rho, low=0.0),
            "adaptive": bool(adaptive),
            "eta": _checks.real("eta", eta, low=0.0),
        }
        self._refuse_sharded(self._parameters())
        super().__init__(base.param_groups, defaults)  # from here on the base's groups hold our entries
        self._model = model
        self._names = {parameter: name for name, parameter in model.named_parameters()} if model is not None else {}
        modules = [] if model is None else [module for module in model.modules() if is_norm_layer(module)]
        self._in_norm = {parameter for module in modules for parameter in module.parameters(recurse=False)}
        self._now = _Progress()
        self._follow_steps()

    # ---- one optimizer with the base -------------------------------------------------------------------------------

    @property
    def param_groups(self) -> list[Group]:
        """The base optimizer's groups: the same list object, always."""
        return self.base.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[Group]) -> None:  # pyright: ignore[reportIncompatibleVariableOverride]
        # torch's constructor starts from an empty list and adds the groups again; those are the base's own dicts.
        if groups:
            self.base.param_groups = groups

    @property
    def state(self) -> Any:
        """The base optimizer's state: the same object, always."""
        return self.base.state

    @state.setter
    def state(self, state: Any) -> None:  # pyright: ignore[reportIncompatibleVariableOverride]
        if state:
            self.base.state = state

    @property
    def last(self) -> SAMStats | None:
        """What the last two-pass step saw; None before the first."""
        return self._now.last

    @property
    def due(self) -> bool:
        """Whether the next step takes a second pass (``every``; never with ``rho = 0`` everywhere)."""
        return self._now.t % self._every == 0 and any(group["rho"] > 0 for group in self.param_groups)

    def add_param_group(self, param_group: Group) -> None:
        """Add a group to the base optimizer; it may carry its own ``rho``, ``adaptive`` and ``eta``."""
        if not any(param_group is group for group in self.param_groups):
            self.base.add_param_group(param_group)
        for name in _ENTRIES:
            param_group.setdefault(name, self.defaults[name])
        _checks.real("rho of a parameter group", param_group["rho"], low=0.0)
        _checks.real("eta of a parameter group", param_group["eta"], low=0.0)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients, as the base optimizer does."""
        self._now.cleared = True
        self.base.zero_grad(set_to_none=set_to_none)

    def _follow_steps(self) -> None:
        # Hooks on the base, since a GradScaler and transformers' Trainer step the base itself.
        self.base._outlast_sam = True  # pyright: ignore[reportAttributeAccessIssue]
        self.base.register_step_pre_hook(self._before_step)
        self.base.register_step_post_hook(self._stepped)

    def _before_step(self, _optimizer: Optimizer, _args: object, _kwargs: object) -> None:
        if self._now.grads_at_weights:
            self._keep_component()
        elif self._looksam and self._now.t % self._every != 0 and any(group["rho"] > 0 for group in self.param_groups):
            self._reuse_component()

    def _stepped(self, _optimizer: Optimizer, _args: object, _kwargs: object) -> None:
        self._now.t += 1
        self._now.ready = False
        self._now.used = {p: (TensorWeakRef(p.grad), p.grad._version) for p in self._parameters() if p.grad is not None}

    def _parameters(self) -> Iterator[nn.Parameter]:
        for group in self.param_groups:
            yield from group["params"]

    # ---- the step --------------------------------------------------------------------------------------------------

    def step(self, closure: Closure | Sequence[Closure] | None = None) -> Tensor | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One update.

        Args:
            closure: clears the gradients, computes the loss, calls ``backward`` and returns the loss. It is called
                ``1 + inner_steps`` times (once when no second pass is due). A sequence of closures is one update over
                micro-batches; each should scale its loss as for plain accumulation. None finishes the two-call form.

        Returns:
            The (detached) loss at the weights, summed over closures; None without a closure.

        Raises:
            StateError: no closure and no ascent before; still perturbed; a closure that leaves no gradient, or keeps
                gradients of earlier passes.
        """
        if self._now.moved is not None:
            raise StateError("the weights are still perturbed: call restore() before step()")
        if closure is None:
            if self.due and not self._now.ready:
                raise StateError(
                    "step() without a closure needs ascend() and restore() before it. If a trainer runs the closure itself and "
                    "then calls step() (Lightning with precision='16-mixed' does), use bf16-mixed or the two-call form"
                )
            loss = None
        else:
            closures = list(closure) if isinstance(closure, Sequence) else [closure]
            if not closures:
                raise ValueError("step() got an empty sequence of closures")
            if getattr(self.base, "grad_scale", None) is not None or getattr(self.base, "found_inf", None) is not None:
                raise UnsupportedError("a fused base optimizer that unscales gradients itself works in the two-call form only")
            loss = self._gradient_of(closures)
        self.base.step()
        return loss

    def _gradient_of(self, closures: list[Closure]) -> Tensor | None:
        """Leave the gradient for the base optimizer in ``.grad`` and return the loss at the weights."""
        if not self.due:
            return self._run(closures)
        if not self._micro or len(closures) == 1:
            self._now.last = self._two_passes(closures)
            return self._now.last.loss
        stats: list[SAMStats] = []
        total = _Sum()
        kept = _Sum()
        for closure in closures:
            stats.append(self._two_passes([closure]))
            total.take(self._parameters())
            kept.add(self._now.grads_at_weights)
        total.leave()
        self._now.grads_at_weights = kept.values
        self._now.last = SAMStats(
            torch.stack([part.grad_norm for part in stats]).mean(),
            torch.stack([part.loss for part in stats if part.loss is not None]).sum(),
            torch.stack([part.perturbed_loss for part in stats if part.perturbed_loss is not None]).sum(),
        )
        return self._now.last.loss

    def _two_passes(self, closures: list[Closure]) -> SAMStats:
        for parameter in self._parameters():  # what the last step left is spent, whether or not the closure clears it
            if parameter.grad is not None and self._is_used(parameter, parameter.grad):
                parameter.grad = None
        with self._first_pass() as first:
            loss = self._run(closures)
        self._remember(first)
        norm = self._perturb()
        perturbed_loss = loss
        try:
            for step in range(self._inner_steps):
                first.begin_second(freeze_buffers=self._freeze, same_rng=self._same_rng)
                last = step + 1 == self._inner_steps
                with LocalGradients(enabled=self._local and not last):
                    perturbed_loss = self._run(closures)
                if not last:
                    self._perturb_further()
        finally:
            self._unperturb()
            first.end_second()
        return SAMStats(norm, loss, perturbed_loss)

    def _first_pass(self) -> FirstPass:
        known = self._now.modules
        if not known and self._model is not None and any(map(_is_compiled, self._model.modules())):
            known = list(self._model.modules())
        return FirstPass(self._parameters(), local=self._local, known=known)

    def _remember(self, first: FirstPass) -> None:
        self._now.local = first.kept_local
        # A global hook that comes and goes makes torch.compile build its graphs again at every step. So the modules of the
        # first step are remembered; one that joins a compiled model later is not watched.
        if any(map(_is_compiled, first.modules)):
            self._now.modules = first.modules

    def _run(self, closures: list[Closure]) -> Tensor:
        """Run closures at the current weights; the sum of their gradients is left in ``.grad``."""
        if len(closures) == 1:
            return self._call(closures[0])
        losses: list[Tensor] = []
        total = _Sum()
        for closure in closures:
            losses.append(self._call(closure))
            total.take(self._parameters())
        total.leave()
        return torch.stack(losses).sum()

    def _call(self, closure: Closure) -> Tensor:
        fresh = [(p, p.grad) for p in self._parameters() if p.grad is not None and not self._is_used(p, p.grad)]
        pending = bool(fresh) and float(_foreach.norm([grad for _, grad in fresh])) != 0.0
        self._now.cleared = False
        with torch.enable_grad():
            loss = cast("Tensor | None", closure())
        if pending and not self._now.cleared and any(p.grad is grad for p, grad in fresh):
            raise StateError(
                "the closure kept gradients of earlier passes, which were not taken at a perturbed point; clear them inside "
                "the closure with optimizer.zero_grad(), and accumulate micro-batches by step([closure_1, closure_2, ...])"
            )
        if loss is None:
            raise TypeError("the closure returned None; it must return the loss")
        if all(p.grad is None for p in self._parameters()):
            raise StateError("the closure left no gradient on any parameter: it must call loss.backward() before it returns the loss")
        return torch.as_tensor(loss).detach()

    def _is_used(self, parameter: nn.Parameter, grad: Tensor) -> bool:
        """Whether a gradient is what the last step left behind, so that losing it loses nothing."""
        reference, version = self._now.used.get(parameter, (None, -1))
        return reference is not None and reference() is grad and grad._version == version

    # ---- the two-call form -----------------------------------------------------------------------------------------

    @contextmanager
    def first_pass(self) -> Generator[None]:
        """Put around the first forward and backward pass of the two-call form.

        It lets the second pass see the same dropout masks and leave running statistics alone, and keeps the first pass
        local under DistributedDataParallel with ``sync="local"``: what ``step(closure)`` does by itself.
        """
        with self._first_pass() as first:
            yield
        self._remember(first)
        self._now.first = first

    def ascend(self) -> Tensor:
        """Move the weights to the worst point of the ball for the gradient in ``.grad``, then clear ``.grad``.

        Returns:
            The gradient's dual norm, 0-dim. If it is not finite the weights stay where they are.

        Raises:
            StateError: already perturbed, or no parameter has a gradient.
        """
        if self._now.moved is not None:
            raise StateError("ascend() twice: the weights are perturbed already; call restore() first")
        if self._inner_steps > 1:
            raise UnsupportedError("inner_steps > 1 goes through the batch several times and needs step(closure)")
        if all(p.grad is None for p in self._parameters()):
            raise StateError("ascend() found no gradient on any parameter: call loss.backward() before it")
        norm = self._perturb()
        if self._now.first is not None:
            self._now.first.begin_second(freeze_buffers=self._freeze, same_rng=self._same_rng)
        elif self._freeze and self._model is not None:
            self._now.snapshot = BufferSnapshot(self._model.modules())
        elif self._freeze:
            self._now.once.warn(
                "ascend() without first_pass() cannot find the model's buffers: running statistics (BatchNorm) will see the "
                "second pass too. Put first_pass() around the first pass, give SAM the model, or say buffers='update'"
            )
        self._now.last = SAMStats(norm)
        return norm

    def restore(self) -> None:
        """Put back the weights, bit for bit; does nothing if they are not perturbed.

        The gradient at the perturbed weights stays in ``.grad``: unscale it, clip it, then call ``step()``.
        """
        if self._now.moved is None:
            return
        self._unperturb()
        if self._now.first is not None:
            self._now.first.end_second()
        if self._now.snapshot is not None:
            self._now.snapshot.restore()
        self._now.first = self._now.snapshot = None
        self._now.ready = True

    @contextmanager
    def perturbed(self) -> Generator[None]:
        """``ascend()`` on entry and ``restore()`` on exit, also when the body raises."""
        self.ascend()
        try:
            yield
        except BaseException:
            self.restore()
            self._now.ready = False
            raise
        self.restore()

    # ---- perturbation ----------------------------------------------------------------------------------------------

    def _is_perturbed(self, parameter: nn.Parameter) -> bool:
        if callable(self._perturb_choice):
            return self._perturb_choice(parameter)
        return self._perturb_choice == "all" or (parameter in self._in_norm) == (self._perturb_choice == "norm")

    def _moves(self) -> list[_Move]:
        """The parameters that the perturbation reaches, in the order of the groups."""
        moves: list[_Move] = []
        draws: list[float] | None = None
        if self._fraction < 1.0:
            count = sum(len(group["params"]) for group in self.param_groups)
            draws = torch.rand(count, generator=generator(self._seed, "sam.perturb_fraction", self._now.t)).tolist()
        number = -1
        for group in self.param_groups:
            sign = -1.0 if group.get("maximize", False) else 1.0
            names: list[str] | None = group.get("param_names")
            for index, parameter in enumerate(group["params"]):
                number += 1
                grad = parameter.grad
                if grad is None:
                    continue
                if grad.is_sparse or grad.layout != torch.strided or grad.is_complex():
                    kind = "complex" if grad.is_complex() else "sparse"
                    raise TypeError(f"SAM needs dense real gradients, got a {kind} one for a parameter of shape {tuple(parameter.shape)}")
                if not self._is_perturbed(parameter):
                    continue
                radius = sign * group["rho"]
                if draws is not None:
                    radius = radius / self._fraction if draws[number] < self._fraction else 0.0
                if self._weight_decay and group.get("weight_decay", 0.0):
                    grad = grad + sign * group["weight_decay"] * parameter.detach()
                name = self._names.get(parameter) or (names[index] if names is not None else None)
                scaled = group["adaptive"] and (is_weight_name(name) if name is not None else parameter.ndim >= 2)
                moves.append(_Move(parameter, grad, radius, group["eta"] if scaled else None))
        return moves

    @torch.no_grad()
    def _perturb(self) -> Tensor:
        moves = self._moves()
        grads = [move.grad for move in moves]
        self._refuse_sharded(move.parameter for move in moves)
        if self._looksam:
            self._keep_grads()
        moving = [move for move in moves if move.radius != 0.0]
        self._warn_low_precision(moving)
        self._back_up([move.parameter for move in moving])
        if self._inner_steps > 1 or self._p != 2.0 or any(move.eta is not None for move in moves):
            norm = self._perturb_generally(moves)
        else:
            norm = _foreach.norm(grads, foreach=self._foreach)
            self._perturb_along_gradient(moving, norm)
        for parameter in self._parameters():
            parameter.grad = None
        return norm

    def _perturb_along_gradient(self, moving: list[_Move], norm: Tensor) -> None:
        """``w += radius * g / ||g||`` without any temporary: the cost of the plain method is memory traffic."""
        by_radius: dict[float, list[_Move]] = {}
        for move in moving:
            by_radius.setdefault(move.radius, []).append(move)
        if norm.device.type == "cpu":
            size = float(norm)
            if not math.isfinite(size):
                return
            for radius, group in by_radius.items():
                weights, grads = [move.parameter for move in group], [move.grad for move in group]
                _foreach.add_(weights, grads, alpha=radius / (size + TINY), foreach=self._foreach)
            return
        # On an accelerator nothing is read back: a non-finite norm gives the factor 0, and what inf * 0 leaves is cleared.
        inverse = torch.where(torch.isfinite(norm), 1.0 / (norm + TINY), torch.zeros_like(norm))
        for radius, group in by_radius.items():
            weights, grads = [move.parameter for move in group], [move.grad for move in group]
            _foreach.mul_(grads, inverse * abs(radius), foreach=self._foreach)
            for grad in grads:
                torch.nan_to_num_(grad, 0.0, 0.0, 0.0)
            _foreach.add_(weights, grads, alpha=math.copysign(1.0, radius), foreach=self._foreach)

    def _perturb_generally(self, moves: list[_Move]) -> Tensor:
        scalings = [None if move.eta is None else weight_scaling(move.parameter, move.eta) for move in moves]
        unit, shift, norm = ball_step([move.grad for move in moves], scalings, self._p)
        rate = inner_rate(self._inner_steps)
        for move, step in zip(moves, shift, strict=True):
            if move.radius != 0.0:
                move.parameter.add_(step.to(move.parameter.dtype), alpha=rate * move.radius)
        if self._inner_steps > 1:
            for step in unit:
                step.mul_(rate)
            self._now.ball = _Ball(moves, scalings, unit)
        return norm

    @torch.no_grad()
    def _perturb_further(self) -> None:
        """The next step of projected ascent, from the gradient at the present point."""
        ball = self._now.ball
        assert ball is not None
        grads = [torch.zeros_like(m.grad) if m.parameter.grad is None else m.parameter.grad for m in ball.moves]
        unit, _, _ = ball_step(grads, ball.scalings, self._p)
        for position, step in zip(ball.position, unit, strict=True):
            position.add_(step, alpha=inner_rate(self._inner_steps))
        project_to_unit_ball_(ball.position)
        for move, scaling, position in zip(ball.moves, ball.scalings, ball.position, strict=True):
            if move.radius != 0.0:
                shift = position if scaling is None else position * scaling
                move.parameter.copy_(self._now.backups[move.parameter])
                move.parameter.add_(shift.to(move.parameter.dtype), alpha=move.radius)
        for parameter in self._parameters():
            parameter.grad = None

    def _back_up(self, parameters: list[nn.Parameter]) -> None:
        # The buffers are kept: allocation is what makes this slow, and CUDA graphs need fixed addresses.
        backups = self._now.backups
        for parameter in parameters:
            kept = backups.get(parameter)
            if kept is None or kept.device != parameter.device or kept.dtype != parameter.dtype or kept.shape != parameter.shape:
                backups[parameter] = torch.empty_like(parameter)
        _foreach.copy_([backups[p] for p in parameters], parameters, foreach=self._foreach)
        self._now.moved = parameters

    @torch.no_grad()
    def _unperturb(self) -> None:
        moved = self._now.moved or []
        _foreach.copy_(moved, [self._now.backups[p] for p in moved], foreach=self._foreach)
        self._now.moved = self._now.ball = None

    # ---- LookSAM ---------------------------------------------------------------------------------------------------

    def _keep_grads(self) -> None:
        # into the place of the old component, which this step replaces: allocation would cost more than the copy
        places, self._now.component = self._now.component, {}
        grads = {p: p.grad for p in self._parameters() if p.grad is not None}
        kept: dict[nn.Parameter, Tensor] = {}
        for p, grad in grads.items():
            place = places.get(p)
            fits = place is not None and place.device == grad.device and place.shape == grad.shape
            kept[p] = place if place is not None and fits else torch.empty_like(grad, dtype=torch.float32)
        _foreach.copy_(list(kept.values()), list(grads.values()), foreach=self._foreach)
        self._now.grads_at_weights = kept

    @torch.no_grad()
    def _keep_component(self) -> None:
        """Keep the part of the SAM gradient orthogonal to the gradient, over the whole vector, in float32 (LookSAM)."""
        plain, self._now.grads_at_weights = self._now.grads_at_weights, {}
        for module in self._now.local:
            self._average(module, plain)
        sharp = {p: p.grad.float() for p in self._parameters() if p.grad is not None and p in plain}
        if not sharp:
            return
        g, s = [plain[p] for p in sharp], list(sharp.values())
        square = _foreach.dot(g, g)
        product = _foreach.dot(s, g)
        finite = torch.isfinite(square) & torch.isfinite(product)
        share = torch.where(finite & (square > 0), product / square, torch.zeros_like(square))
        _foreach.mul_(g, -share, foreach=self._foreach)
        _foreach.add_(g, s, foreach=self._foreach)
        if finite.device.type != "cpu" or not bool(finite):
            for part in g:
                part.masked_fill_(~finite.to(part.device), 0.0)
        self._now.component = dict(zip(sharp, g, strict=True))
        self._now.component_norm = None

    def _average(self, module: DistributedDataParallel, grads: dict[nn.Parameter, Tensor]) -> None:
        """Average gradients over a module's processes, each with those of its own rows: the component must be one for all."""
        own = set(self._parameters())
        reduced = [p for p in module.parameters() if p.requires_grad and p in own]  # the same on all, whatever their rows have reached
        for p in reduced:
            if p not in grads:
                grads[p] = torch.zeros_like(p, dtype=torch.float32)
        group: Any = module.process_group
        works: list[Any] = [torch.distributed.all_reduce(grads[p], group=group, async_op=True) for p in reduced]
        for work in works:
            work.wait()
        for p in reduced:
            grads[p].div_(torch.distributed.get_world_size(group))

    @torch.no_grad()
    def _reuse_component(self) -> None:
        component = self._now.component
        present = [p for p in self._parameters() if p.grad is not None and p in component]
        if not present:
            return
        norm = _foreach.norm([p.grad for p in self._parameters() if p.grad is not None], foreach=self._foreach)
        if self._now.component_norm is None:
            self._now.component_norm = _foreach.norm(list(component.values()), foreach=self._foreach)
        kept = self._now.component_norm
        factor = torch.where(kept > 0, self._alpha * norm / kept, torch.zeros_like(norm))
        if factor.device.type == "cpu":
            grads = [p.grad for p in present if p.grad is not None]
            parts = [component[p].to(grad.dtype) for p, grad in zip(present, grads, strict=True)]
            _foreach.add_(grads, parts, alpha=float(factor), foreach=self._foreach)
            return
        for p in present:
            assert p.grad is not None
            p.grad.add_((component[p] * factor).to(p.grad.dtype))

    # ---- checkpoints -----------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The base optimizer's state dict, with the step count and LookSAM's component under ``"outlast_sam"``.

        Raises:
            StateError: the weights are perturbed, so a checkpoint taken now would hold the wrong ones.
        """
        if self._now.moved is not None:
            raise StateError("state_dict() while the weights are perturbed: call restore() first")
        component = [self._now.component.get(p) for p in self._parameters()] if self._now.component else None
        return {**self.base.state_dict(), STATE_KEY: {"version": 1, "t": self._now.t, "g_v": component}}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Load a checkpoint of SAM, or a plain one of the base optimizer (the step count starts at 0 then)."""
        if self._now.moved is not None:
            raise StateError("load_state_dict() while the weights are perturbed: call restore() first")
        rest = {key: value for key, value in state_dict.items() if key != STATE_KEY}
        own = [{name: group[name] for name in _ENTRIES} for group in self.param_groups]
        self.base.load_state_dict(rest)
        for group, settings in zip(self.param_groups, own, strict=True):
            for name, value in settings.items():
                group.setdefault(name, value)  # a plain checkpoint knows nothing of rho
        extra = cast("Mapping[str, Any]", state_dict.get(STATE_KEY, {"version": 1, "t": 0, "g_v": None}))
        if extra.get("version") != 1:
            raise ValueError(f"the checkpoint's SAM part has version {extra.get('version')!r}; this release reads version 1")
        self._now = _Progress(t=int(extra["t"]))
        for parameter, component in zip(self._parameters(), extra["g_v"] or [], strict=False):
            if component is not None:
                self._now.component[parameter] = component.to(parameter.device, torch.float32)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "step"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._follow_steps()

    def __repr__(self) -> str:
        groups = self.param_groups
        rho = sorted({group["rho"] for group in groups})
        adaptive = any(group["adaptive"] for group in groups)
        shown = f"{rho[0]:g}" if len(rho) == 1 else f"{rho[0]:g} to {rho[-1]:g}"
        return (
            f"SAM({type(self.base).__name__}, rho={shown}, p={self._p:g}, adaptive={adaptive}, every={self._every}, groups={len(groups)})"
        )

    # ---- checks ----------------------------------------------------------------------------------------------------

    def _refuse_sharded(self, parameters: Iterable[nn.Parameter]) -> None:
        for parameter in parameters:
            if is_sharded(parameter):
                if self._local:
                    raise UnsupportedError(
                        "sharded parameters (FSDP2, DTensor) hold parts of averaged gradients, so there is no local "
                        "perturbation; use sync='global'"
                    )
                if self._p != 2.0:
                    raise UnsupportedError(f"sharded parameters (FSDP2, DTensor) are supported with p=2 only, got p={self._p:g}")
                return

    def _warn_low_precision(self, moving: list[_Move]) -> None:
        if any(move.parameter.dtype in (torch.bfloat16, torch.float16) for move in moving):
            self._now.once.warn(
                "SAM perturbs bfloat16 or float16 weights: most steps of the perturbation are below half a unit in the last "
                "place and vanish. Keep float32 weights and use autocast"
            )


def _is_compiled(module: nn.Module) -> bool:
    return type(module).__name__ == "OptimizedModule" or module._compiled_call_impl is not None


class _Sum:
    """Gradients added up over micro-batches."""

    def __init__(self) -> None:
        self.values: dict[nn.Parameter, Tensor] = {}

    def take(self, parameters: Iterable[nn.Parameter]) -> None:
        """Add the gradients of the parameters and clear them."""
        self.add({p: p.grad for p in parameters if p.grad is not None})
        for parameter in self.values:
            parameter.grad = None

    @torch.no_grad()
    def add(self, values: Mapping[nn.Parameter, Tensor]) -> None:
        """Add tensors, keeping the first one of each parameter as the place of the sum."""
        for parameter, value in values.items():
            if parameter in self.values:
                self.values[parameter].add_(value)
            else:
                self.values[parameter] = value

    def leave(self) -> None:
        """Put the sums into ``.grad``."""
        for parameter, value in self.values.items():
            parameter.grad = value


def _check_base(base: object) -> None:
    if isinstance(base, type):
        raise TypeError(f"base must be a built optimizer, got the class {base.__name__}; build it first: SAM(torch.optim.SGD(...))")
    if not isinstance(base, Optimizer):
        raise TypeError(f"base must be a torch.optim.Optimizer, got {type(base).__name__}; build it first: SAM(torch.optim.SGD(...))")
    if getattr(base, "_outlast_sam", False):
        raise StateError("this optimizer is wrapped in a SAM already, whose settings its groups hold; build a new one to wrap")
    if isinstance(base, torch.optim.LBFGS):
        raise UnsupportedError("LBFGS calls its closure many times a step; SAM needs a base that takes one gradient a step")
    taken = sorted({"rho", "adaptive", "eta"} & set(base.defaults))
    if taken:
        raise UnsupportedError(f"{type(base).__name__} has a setting named {', '.join(taken)} in its groups, where SAM keeps its own")
