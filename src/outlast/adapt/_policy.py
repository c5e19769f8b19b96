"""A policy that goes on learning from what it sees after deployment, without a reward.

Hansen et al., "Self-Supervised Policy Adaptation during Deployment", ICLR 2021: at each step the encoder, shared by policy and auxiliary
task, takes one step of the task's loss on the newest transition; the policy's head stays.
"""

from __future__ import annotations

import copy
import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from outlast._core import _checks, _foreach
from outlast._core._batches import device_of
from outlast._core._norm import is_norm_layer
from outlast._core._random import derived_seed, generator
from outlast.adapt._auxiliary import AuxTask, RandomCrop, as_floats
from outlast.adapt._copies import Copies, Found, TaskLoss, background, loss_and_grads
from outlast.adapt._guards import Guard, check_guards, load_guards
from outlast.adapt._report import Counters, PolicyAdaptReport, smoothed, together
from outlast.adapt._sources import Reload, check_factory, move_state
from outlast.adapt._transitions import Arrived, Batches, Episodes, Rows
from outlast.errors import OutlastWarning, StateError, UnsupportedError

_VERSION = 1
_GATE_SMOOTHING = 0.8
_CONSTANT = 1e-6  # variance of actions below which they tell nothing
_LOOK_BACK = 10  # actions that are looked at for it
_RETRY = 20  # steps until an update that was too slow is tried again
_PROBES = 8  # random images, and other weights, that tell whether the policy reads the encoder
_BYTES = 16.0  # floats beyond this are bytes that nobody divided by 255: normalised images stay far below


@dataclass
class _Counters(Counters):
    gate_loss: float = math.nan
    milliseconds: float = math.nan


class PolicyAdapter(nn.Module):
    """Acts with a policy and adapts its encoder to what it sees.

    Hansen et al., "Self-Supervised Policy Adaptation during Deployment", ICLR 2021.

    ```python
    adapter = PolicyAdapter(encoder, policy, aux, augment=RandomCrop(84), warmup=2)
    obs, _ = env.reset()
    adapter.begin_episode()
    over = False
    while not over:
        action = adapter.act(obs)
        next_obs, _, terminated, truncated, _ = env.step(action.cpu().numpy())
        adapter.observe(obs, action, next_obs, terminated=terminated, truncated=truncated)
        obs, over = next_obs, terminated or truncated
    ```

    Encoder, policy and task are copied together, so that what they share stays shared, and run in eval mode throughout; statistics of
    normalisation layers and everything that is not adapted keep their values bit for bit. The task must have been trained next to the
    policy (``joint_step``).

    Args:
        encoder: of observations ``(N, C, H, W)`` in [0, 1] to features, shared with the policy.
        policy: of features to actions, deterministic.
        aux: the task, with its trained head.
        optimizer: a factory such as ``lambda params: torch.optim.SGD(params, lr=1e-3)``; None takes Adam with ``lr``.
        lr: of the default optimizer. The authors' 1e-3 harms small networks where nothing has shifted; see the card.
        batch: transitions in a step, each with crops of its own.
        augment: crops observations for the task, ``augment(images, generator)``; a ``RandomCrop`` also gives the middle crop that the
            policy acts on. None takes observations as they are.
        steps: updates for each transition.
        episodic: every ``begin_episode`` starts again from the trained weights with a fresh optimizer.
        update_aux: whether the task's head learns, too.
        buffer: recent transitions that batches are filled up with; 0 takes the newest alone.
        newest: copies of the newest transition in a batch that a buffer fills up; None for a quarter.
        gate: update only while the moving average (0.8/0.2) of the loss exceeds this; ``"auto"`` for what ``calibrate`` finds.
        warmup: first steps of each episode that are skipped: frames of the stack - 1. None takes 0, or what ``AdaptedEnv`` finds.
        params: ``"all"`` parameters of the encoder, ``"norm_affine"``, or a predicate of name and parameter.
        per_env: one adapted copy for each environment instead of one that all share, computed together by ``torch.func.vmap``;
            each has its own optimizer, buffer, guards, step numbers and draws, and ``begin_episode`` with a mask restores the
            chosen ones.
        max_ms: skip updates while their mean time exceeds this.
        guards: those that need only the loss and the adapted parameters, and ``ActionWatch``.
        act_fn: from the policy's output to the action, such as the most likely one of logits.
        generator: of crops, turns and the buffer's draws; a fixed one otherwise.

    Raises:
        TypeError: no modules, or an optimizer instead of a factory.
        ValueError: settings out of range, guards that do not fit, nothing to adapt.
    """

    def __init__(
        self,
        encoder: nn.Module,
        policy: nn.Module,
        aux: AuxTask,
        *,
        optimizer: Callable[[list[nn.Parameter]], Optimizer] | None = None,
        lr: float = 1e-4,
        batch: int = 32,
        augment: Callable[..., Tensor] | None = None,
        steps: int = 1,
        episodic: bool = True,
        update_aux: bool = True,
        buffer: int = 0,
        newest: int | None = None,
        gate: float | Literal["auto"] | None = None,
        warmup: int | None = None,
        params: Literal["all", "norm_affine"] | Callable[[str, nn.Parameter], bool] = "all",
        per_env: bool = False,
        max_ms: float | None = None,
        guards: Sequence[Guard] = (),
        act_fn: Callable[[Any], Tensor] | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        settings: dict[str, Any] = {
            "optimizer": optimizer,
            "lr": lr,
            "batch": batch,
            "augment": augment,
            "steps": steps,
            "episodic": episodic,
            "update_aux": update_aux,
            "buffer": buffer,
            "newest": newest,
            "gate": gate,
            "warmup": warmup,
            "params": params,
            "max_ms": max_ms,
            "act_fn": act_fn,
        }
        for name, module in (("encoder", encoder), ("policy", policy), ("aux", aux)):
            if not isinstance(module, nn.Module):
                raise TypeError(f"{name} must be a torch.nn.Module, got {type(module).__name__}")
        if not isinstance(aux, AuxTask):
            raise TypeError(f"aux must be an AuxTask trained next to the policy (PAD needs joint training), got {type(aux).__name__}")
        for name, function in (("augment", augment), ("act_fn", act_fn)):
            if function is not None and not callable(function):
                raise TypeError(f"{name} must be a function, got {type(function).__name__}")
        if generator is not None and not isinstance(generator, torch.Generator):
            raise TypeError(f"generator must be a torch.Generator, got {type(generator).__name__}")
        check_factory(optimizer)
        self._lr = _checks.real("lr", lr, low=0.0)
        batch = _checks.integer("batch", batch, low=1)
        self._steps = _checks.integer("steps", steps, low=1)
        buffer = _checks.integer("buffer", buffer, low=0)
        if newest is not None and not buffer:
            raise ValueError("newest counts copies beside those from a buffer: give buffer, too")
        newest = max(1, batch // 4) if newest is None else _checks.integer("newest", newest, low=1)
        if newest > batch:
            raise ValueError(f"newest must be at most batch={batch}, got {newest}")
        own = torch.Generator().manual_seed(0) if generator is None else generator
        self._batches = Batches(batch, buffer=buffer, newest=newest, augment=augment, generator=own)
        self._episodes = Episodes()
        self._warmup = 0 if warmup is None else _checks.integer("warmup", warmup, low=0)
        self._warmup_given = warmup is not None
        self._max_ms = None if max_ms is None else _checks.real("max_ms", max_ms, low=0.0, low_open=True)
        if gate is not None and gate != "auto":
            _checks.real("gate", gate, low=0.0, low_open=True, infinite=True)
        if params not in ("all", "norm_affine") and not callable(params):
            raise ValueError(f"params must be 'all', 'norm_affine' or a predicate of name and parameter, got {params!r}")
        self._factory = optimizer
        self._augment = augment
        self._episodic, self._update_aux = bool(episodic), bool(update_aux)
        self._auto = gate == "auto"
        self._threshold: float | None = None if gate is None or gate == "auto" else float(gate)
        self._act_fn = act_fn
        self.encoder, self.policy, self.aux = copy.deepcopy((encoder, policy, aux))
        self.eval()
        for parameter in self.parameters():
            parameter.requires_grad_(False)
        self._names = self._chosen(params)
        self._adapted: dict[str, nn.Parameter] | None = None  # looked up once, since a step asks for it several times
        self._guards = check_guards(guards, ("parameters", "actions"), adapter=type(self).__name__, keeps_source=True)
        self._optimizer: Optimizer | None = None
        self._counters = _Counters()
        self._form: tuple[tuple[int, ...], torch.dtype] | None = None
        self._last_obs: Tensor | None = None
        self._actions: list[Tensor] = []
        self._waited = 0  # skipped updates since the last try, with a budget of time
        self._degenerate = False
        self._source = [parameter.detach().clone() for parameter in self.adapted.values()]
        self._pending: Future[Found] | None = None  # the gradient that a worker is computing
        self._worker: TaskLoss | None = None
        self._memory: list[tuple[Tensor, Tensor]] = []  # middle crops and their features at the present weights
        self._settings, self._per_env = settings, bool(per_env)
        self._copies: Copies | None = None
        self._loaded: dict[str, Any] | None = None
        for module in (self.encoder, self.policy, self.aux):
            module.register_load_state_dict_post_hook(Reload(self))
        self.register_load_state_dict_post_hook(_take_loaded)

    @classmethod
    def paper(
        cls, encoder: nn.Module, policy: nn.Module, aux: AuxTask, *, augment: Callable[..., Tensor] | None, **settings: Any
    ) -> PolicyAdapter:
        """The authors' settings: Adam at 1e-3, the newest transition alone, no gate, 32 crops. Others may be given.

        ``augment`` must be said, since the size of the crop is the policy's: ``RandomCrop(84)`` for the authors' 100 pixels.
        """
        merged: dict[str, Any] = {"lr": 1e-3, "buffer": 0, "gate": None, "batch": 32, "augment": augment, **settings}
        return cls(encoder, policy, aux, **merged)

    def _chosen(self, params: Literal["all", "norm_affine"] | Callable[[str, nn.Parameter], bool]) -> list[str]:
        norms = {
            f"{name}.{own}" if name else own
            for name, module in self.encoder.named_modules()
            if is_norm_layer(module)
            for own, _ in module.named_parameters(recurse=False)
        }
        names = [
            f"encoder.{name}"
            for name, parameter in self.encoder.named_parameters()
            if (params == "all") or (params == "norm_affine" and name in norms) or (callable(params) and params(name, parameter))
        ]
        if not names:
            raise ValueError(f"params={params!r} chooses no parameter of the encoder: there is nothing to adapt")
        known = {id(parameter) for parameter in self.encoder.parameters()}
        if self._update_aux:
            names += [f"aux.{name}" for name, parameter in self.aux.named_parameters() if id(parameter) not in known]
        return names

    # ---- what users call ------------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def act(self, obs: Any) -> Tensor:
        """The adapted policy's action, without a gradient.

        Args:
            obs: ``(C, H, W)`` or ``(N, C, H, W)``, tensor or array, bytes, or floats in [0, 1] (or normalised), the same at every call.

        Returns:
            ``(A,)`` or ``(N, A)``.

        Raises:
            ValueError: another shape or type than before, or smaller than the crop.
        """
        self._settle(wait=False)
        x, single = self._observation(obs)
        if self._per_env:
            action = self._copies_of(len(x)).act(x)
        else:
            # A gate has looked at this observation as the last transition's second one, and will as the next one's first.
            action = self._policy_of(x, self.encoder if self._threshold is None else self._encoded)
        return action[0] if single else action

    def observe(
        self, obs: Any, action: Any, next_obs: Any, *, terminated: Any = None, truncated: Any = None, valid: Any = None
    ) -> float | None:
        """Learn from one transition (or one of each environment).

        Args:
            obs: what the action answered to.
            action: as executed (after clipping), ``(A,)``, ``(N, A)``, or whole numbers for discrete tasks.
            next_obs: what followed; at an episode's end the last observation of that episode, not the first of the next.
            terminated: whether the episode ended there, one for each environment.
            truncated: likewise, by a time limit.
            valid: environments whose pair is one; others, such as those that were reset in this step, are left out.

        Returns:
            The loss of the last update; None where there was none.

        Raises:
            StateError: an episode has ended and ``begin_episode`` was not called, or ``gate="auto"`` is not calibrated.
            ValueError, TypeError: observations of another form, actions of another shape or type, NaN actions.
        """
        with torch.inference_mode(False):
            self._settle()
            arrived = self._arrived(obs, action, next_obs, terminated, truncated, valid)
            if self._per_env:
                return self._copies_of(len(arrived.before)).observe(arrived)
            rows = self._admitted(arrived)
            found: float | None = None
            for _ in range(self._steps if rows is not None else 0):
                value = self._update(cast("Rows", rows))
                found = found if value is None else value
                if value is None or self._counters.frozen:  # a guard may end it
                    break
            return found

    @torch.no_grad()
    def loss(self, obs: Any, action: Any, next_obs: Any) -> float:
        """The task's loss on a transition (or one of each environment) as a gate looks at it: middle crops, nothing learnt or counted.

        Raises:
            UnsupportedError: with ``per_env``.
            ValueError, TypeError: as ``observe``.
        """
        if self._per_env:
            raise UnsupportedError("with per_env=True the copies have losses of their own: see reports")
        arrived = self._arrived(obs, action, next_obs, None, None, None, check_gate=False)
        return self._watched(arrived.before, arrived.action, arrived.after)

    def observe_async(
        self, obs: Any, action: Any, next_obs: Any, *, terminated: Any = None, truncated: Any = None, valid: Any = None
    ) -> bool:
        """Like ``observe``, without waiting: a worker thread computes the gradient, the next call that finds it ready takes the step.

        Acting goes on meanwhile with the weights as they are, so weights change between two actions only. A transition that arrives while
        the worker is busy enters the buffer and is counted as skipped. When a step lands depends on the machine's speed, so runs do not
        repeat bit for bit; ``finish`` waits.

        Returns:
            Whether an update was begun.

        Raises:
            UnsupportedError: with ``per_env`` or ``steps`` above 1.
            StateError, ValueError, TypeError: as ``observe`` does.
        """
        if self._per_env or self._steps > 1:
            raise UnsupportedError("observe_async() takes one shared encoder and steps=1: use observe()")
        with torch.inference_mode(False):
            return self._begin_update(self._arrived(obs, action, next_obs, terminated, truncated, valid))

    def _begin_update(self, arrived: Arrived) -> bool:
        self._settle(wait=False)
        rows = self._admitted(arrived)
        if rows is None:
            return False
        if self._pending is not None:
            self._counters.skipped += 1
            return False
        start = time.perf_counter()
        before, done, after = self._drawn(rows)
        if self._augment is None:  # then floats are still the caller's arrays, which may change while the worker reads
            before, done, after = before.clone(), done.clone(), after.clone()
        batch = before, done, after
        if self._worker is None:
            self._worker = copy.deepcopy(TaskLoss(self.encoder, self.aux))
        # Weights are written by this thread only, and only while no gradient is being computed: the worker reads them where they lie.
        leaves = {name: parameter.detach().requires_grad_() for name, parameter in self.adapted.items()}
        self._pending = background().submit(loss_and_grads, self._worker, leaves, batch, time.perf_counter() - start)
        return True

    def finish(self) -> float | None:
        """Wait for what ``observe_async`` has begun, and take its step: the loss, or None where nothing was pending."""
        return self._settle()

    def begin_episode(self, mask: Any = None) -> None:
        """A new episode begins: everywhere, or in the environments of a mask.

        With ``episodic`` the trained weights, a fresh optimizer and an empty buffer come back. Environments share one encoder unless
        ``per_env`` is set, so with a mask that leaves some out only the chosen ones' step numbers start again.
        """
        self._settle()
        if self._copies is not None:
            self._copies.begin(mask)
            return
        if not self._episodes.begin(mask):
            return
        self._actions = []
        if self._episodic:
            self._to_source()
            self._batches.forget()
            self._counters.frozen = self._degenerate = False
            self._counters.gate_loss = math.nan
            for guard in self._guards:
                guard.restored()

    def default_warmup(self, steps: int) -> None:
        """Skip so many first steps of each episode, unless ``warmup`` was given."""
        if not self._warmup_given:
            self._warmup = steps
            for each in [] if self._copies is None else self._copies.all:
                each.default_warmup(steps)

    def reset(self) -> None:
        """Back to the start: weights, optimizer, buffer, guards, counters; the gate's threshold stays."""
        self._settle()
        self._copies = None
        self._to_source()
        self._batches.reset()
        self._episodes.clear()
        self._actions, self._last_obs = [], None
        self._degenerate, self._waited = False, 0
        for guard in self._guards:
            guard.reset()
        self._counters = _Counters()

    def calibrate(self, env: Any, episodes: int, seed: int = 0) -> float:
        """Find the gate's threshold: mean + 2 standard deviations of the loss where the policy was trained.

        The policy acts with its trained weights; nothing is updated. One more episode of random actions tells whether the head was trained.
        With ``gate="auto"`` the threshold is set, and kept in the state dict. The gate compares a moving average, which spreads about a
        third as much as single losses: it opens later than two deviations suggest.

        Args:
            env: with Gymnasium's ``reset(seed=)`` and ``step``; one environment, image observations. Of an ``AdaptedEnv`` of this adapter
                the environment inside is taken.
            episodes: to run.
            seed: of the first; the others follow.

        Returns:
            The threshold.

        Raises:
            ValueError: observations that are no images, or no finite loss after the warm-up.
        """
        _checks.integer("episodes", episodes, low=1)
        self._settle()
        while getattr(env, "adapter", None) is self:
            env = env.env
        parameters = list(self.adapted.values())
        now = [parameter.detach().clone() for parameter in parameters]
        self._put(self._source)
        try:
            losses = [loss for each in range(episodes) for loss, _ in self._losses_in(env, seed + each, None)]
            losses = [loss for loss in losses if math.isfinite(loss)]
            if not losses:
                raise ValueError("no transition with a finite loss was left after the warm-up: run longer episodes")
            space = getattr(env, "action_space", None)
            if space is not None:
                space.seed(seed)
                self._check_trained(list(self._losses_in(env, seed + episodes, space)))
        finally:
            self._put(now)
        found = float(np.mean(losses) + 2.0 * np.std(losses))
        if self._auto:
            self._threshold = found
            for each in [] if self._copies is None else self._copies.all:
                each._threshold = found
        return found

    def _losses_in(self, env: Any, seed: int, space: Any) -> Iterator[tuple[float, Tensor]]:
        """Losses and actions of an episode after the warm-up, of the policy or of random actions."""
        obs, _ = env.reset(seed=seed)
        step, over = 0, False
        while not over:
            executed = self._policy_of(self._observation(obs)[0])[0].cpu().numpy() if space is None else space.sample()
            following, _, terminated, truncated, _ = env.step(executed)
            if step >= self._warmup:
                arrived = self._arrived(obs, executed, following, None, None, None, check_gate=False)
                yield self._watched(arrived.before, arrived.action, arrived.after), arrived.action
            obs, step, over = following, step + 1, bool(terminated or truncated)

    def _check_trained(self, found: list[tuple[float, Tensor]]) -> None:
        if found and self.aux.baseline(torch.cat([action.cpu() for _, action in found])) <= float(np.mean([loss for loss, _ in found])):
            warnings.warn(
                "the auxiliary head predicts random actions no better than a constant does: was it trained next to the policy?",
                OutlastWarning,
                stacklevel=3,
            )

    @property
    def report(self) -> PolicyAdaptReport:
        """What has happened since the start or the last ``reset()``; with ``per_env``, of all environments together (see ``reports``)."""
        self._settle()
        if self._copies is not None:
            return together(self.reports)
        source = _foreach.norm(self._source)
        gaps = [parameter.detach() - value for parameter, value in zip(self.adapted.values(), self._source, strict=True)]
        return PolicyAdaptReport(
            **self._counters.reported(),
            drift=float(_foreach.norm(gaps) / source.clamp(min=1e-30)),
            departure=self.departure(),
            threshold=self._threshold,
            gate_loss=self._counters.gate_loss,
            milliseconds=self._counters.milliseconds,
        )

    @property
    def reports(self) -> tuple[PolicyAdaptReport, ...]:
        """With ``per_env`` the report of each environment's copy, otherwise the one report."""
        return (self.report,) if self._copies is None else tuple(each.report for each in self._copies.all)

    @torch.no_grad()
    def departure(self) -> float:
        """Mean absolute difference of the adapted and the source policy's action on the newest observation; NaN before the first.

        Of discrete actions the share of environments in which they differ.
        """
        self._settle()
        if self._copies is not None:
            return sum(each.departure() for each in self._copies.all) / len(self._copies.all)
        if self._last_obs is None:
            return math.nan
        now = [parameter.detach().clone() for parameter in self.adapted.values()]
        adapted = self._policy_of(self._last_obs)
        self._put(self._source)
        source = self._policy_of(self._last_obs)
        self._put(now)
        if not adapted.is_floating_point():
            return float((adapted != source).double().mean())
        return float((adapted.double() - source.double()).abs().mean())

    # ---- what guards call -----------------------------------------------------------------------------------------------------------

    @property
    def adapted(self) -> dict[str, nn.Parameter]:
        """The adapted parameters by name."""
        if self._adapted is None:
            own = dict(self.named_parameters(remove_duplicate=False))
            self._adapted = {name: own[name] for name in self._names}
        return self._adapted

    @property
    def source_values(self) -> Mapping[str, Tensor]:
        """Their trained values."""
        return dict(zip(self._names, self._source, strict=True))

    @property
    def last_loss(self) -> float:
        """Loss of the last update, before penalties; with ``per_env`` the mean of the copies'."""
        if self._copies is not None:
            return sum(each.last_loss for each in self._copies.all) / len(self._copies.all)
        return self._counters.last_loss

    @property
    def loss_scale(self) -> float:
        """1: thresholds on the loss are in its own units."""
        return 1.0

    def restore(self, reason: str) -> None:
        """Return to the trained weights with a fresh optimizer; the episode and the counters go on."""
        self._settle()
        if self._copies is not None:
            for each in self._copies.all:
                each.restore(reason)
            return
        self._to_source()
        self._counters.resets += 1
        self.note(reason)
        for guard in self._guards:
            guard.restored()

    def freeze(self) -> None:
        """Adapt no more until the next episode (``episodic``) or ``reset``."""
        self._settle()
        if self._copies is not None:
            for each in self._copies.all:
                each.freeze()
            return
        self._counters.frozen = True
        self.note("frozen")

    def note(self, event: str) -> None:
        """Record an event with the number of updates so far."""
        self._counters.note(event)

    def all_sum(self, value: Tensor) -> Tensor:
        """The value itself: deployment is one process."""
        return value

    # ---- a transition ---------------------------------------------------------------------------------------------------------------

    def _arrived(
        self, obs: Any, action: Any, next_obs: Any, terminated: Any, truncated: Any, valid: Any, *, check_gate: bool = True
    ) -> Arrived:
        """What was observed, checked."""
        if check_gate and self._auto and self._threshold is None:
            raise StateError("gate='auto' has no threshold yet: call calibrate(env, episodes), or load a calibrated state")
        before, single = self._observation(obs)
        after, _ = self._observation(next_obs)
        if before.shape != after.shape:
            raise ValueError(f"obs and next_obs must have one shape, got {tuple(before.shape)} and {tuple(after.shape)}")
        done = torch.as_tensor(action).to(before.device)
        done = (done[None] if single else done).detach()
        done = done.clone() if done.is_inference() else done
        n = len(before)
        self._check_action(done, before)
        ends = self._ends(terminated, n) | self._ends(truncated, n)
        counted = torch.ones(n, dtype=torch.bool) if valid is None else self._ends(valid, n)
        return Arrived(before, done, after, ends & counted, counted)

    def _admitted(self, arrived: Arrived) -> Rows | None:
        """The transitions that are learnt from, or None, after everything that must be remembered and counted of them."""
        before, done, after = arrived.before, arrived.action, arrived.after
        steps = self._episodes.advance(arrived)
        counters = self._counters
        counters.seen += len(before)
        finite = _finite(before) & _finite(after)
        if bool(finite.all()):
            self._last_obs = after.clone()  # the caller's array may change
        ready = finite & arrived.counted & (steps >= self._warmup)
        if not bool(ready.any()) or counters.frozen:
            counters.skipped += 1
            return None
        chosen = ready.to(before.device)
        rows = before[chosen], done[chosen], after[chosen]
        self._actions = [*self._actions, done.float().cpu()][-_LOOK_BACK:]  # of all environments
        self._batches.remember(rows)
        if self._constant_actions():
            counters.skipped += 1
            if not self._degenerate:
                self.note("degenerate")
            self._degenerate = True
            return None
        self._degenerate = False
        if self._shut(*rows) or self._too_slow():
            counters.skipped += 1
            return None
        return rows

    def _copies_of(self, n: int) -> Copies:
        """The environments' copies, made when their number is known."""
        if self._copies is None:
            seed = self._batches.generator.initial_seed()

            def made(place: int) -> PolicyAdapter:
                own = generator(derived_seed(seed, f"environment {place}"), "adaptation")
                guards = copy.deepcopy(self._guards)
                for guard in guards:
                    guard._owned = False  # pyright: ignore[reportAttributeAccessIssue]
                each = PolicyAdapter(self.encoder, self.policy, self.aux, **self._settings, guards=guards, generator=own)
                each._threshold = self._threshold
                each.default_warmup(self._warmup)  # an environment may have set it
                return each

            self._copies = Copies(made, n)
        if len(self._copies.all) != n:
            raise ValueError(f"per_env=True began with {len(self._copies.all)} environments, got observations of {n}")
        return self._copies

    def _observation(self, obs: Any) -> tuple[Tensor, bool]:
        x = torch.as_tensor(obs).detach()
        x = x.clone() if x.is_inference() else x
        single = x.ndim == 3
        x = x[None] if single else x
        if x.ndim != 4 or not len(x):
            raise ValueError(f"observations are images (C, H, W) or (N, C, H, W), got shape {tuple(x.shape)}")
        if x.dtype != torch.uint8 and not x.is_floating_point():
            raise TypeError(f"observations are bytes (uint8) or floats in [0, 1], got {x.dtype}")
        form = (tuple(x.shape[1:]), x.dtype)
        if self._form is None:
            if isinstance(self._augment, RandomCrop):
                self._augment.centre(x)
            self._check_shared(x)
            self._form = form
        if form != self._form:
            known, was = self._form
            raise ValueError(
                f"observations were {known} of {_range(was)} so far, got {form[0]} of {_range(form[1])}: they must not change between calls"
            )
        if x.is_floating_point():
            largest = float(x.nan_to_num(0.0, 0.0, 0.0).abs().max())
            if largest > _BYTES:
                raise ValueError(f"observations in floats lie in [0, 1] or are normalised, got {largest:.3g}; give bytes as uint8")
            x = x.to(self._width())
        return x.to(device_of(self.encoder)), single

    def _width(self) -> torch.dtype:
        """The type of numbers that the encoder computes with."""
        return next((p.dtype for p in self.encoder.parameters() if p.is_floating_point()), torch.float32)

    @torch.no_grad()
    def _check_shared(self, x: Tensor) -> None:
        """Adapting must reach the action: the policy must read the features, and these must depend on the weights.

        Random images and several other weights are tried, since one picture may give no feature, and the most likely of a few actions,
        or a saturated one, stays the same for many weights.
        """
        weights = [parameter for name, parameter in self.adapted.items() if name.startswith("encoder.")]
        kept, own = [weight.detach().clone() for weight in weights], torch.Generator().manual_seed(0)
        images = torch.rand((_PROBES, *x.shape[1:]), generator=own).to(device_of(self.encoder), self._width())
        if isinstance(self._augment, RandomCrop):
            images = self._augment.centre(images)
        features = self.encoder(images)
        if not isinstance(features, Tensor):
            return
        before = self._out_of(features)
        reads = not torch.equal(before, self._out_of(torch.full_like(features, math.nan)))
        depends = False
        for attempt in range(_PROBES):
            for weight in weights:
                scale = (0.5 * weight.abs().mean() + 0.1) * 2.0**attempt
                weight.add_(scale * torch.randn(weight.shape, generator=own).to(weight))
            other = self.encoder(images)
            depends = depends or not torch.equal(other, features)
            reads = reads or not torch.equal(before, self._out_of(other))
            _foreach.copy_(weights, kept)
            if depends and reads:
                return
        raise ValueError("changing the encoder does not change the action: policy must take the encoder's features, encoder be shared")

    def _out_of(self, features: Tensor) -> Tensor:
        """What the policy gives for features, before ``act_fn`` if that is a tensor."""
        out = self.policy(features.clone())
        return out if isinstance(out, Tensor) or self._act_fn is None else self._act_fn(out)

    def _middle(self, x: Tensor) -> Tensor:
        return as_floats(self._augment.centre(x) if isinstance(self._augment, RandomCrop) else x).to(self._width())

    def _encoded(self, images: Tensor) -> Tensor:
        """The encoder's features of middle crops, remembered for two observations until the weights change."""
        for known, features in self._memory:
            if torch.equal(known, images):
                return features.clone()  # a policy may work in place
        features = self.encoder(images)
        self._memory = [*self._memory[-1:], (images.clone(), features.clone())]  # the caller's array may change
        return features

    def _policy_of(self, x: Tensor, encoder: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        out = self.policy((self.encoder if encoder is None else encoder)(self._middle(x)))
        return out if self._act_fn is None else self._act_fn(out)

    def _check_action(self, action: Tensor, before: Tensor) -> None:
        n = len(before)
        if len(action) != n:
            raise ValueError(f"{n} observations need as many actions, got {len(action)}")
        if bool((~_finite(action) & _finite(before)).any()):  # a policy that sees NaN may answer with it
            raise ValueError("the action holds NaN or infinity: what was executed must be given")
        self.aux.check(action, n)

    def _ends(self, flags: Any, n: int) -> Tensor:
        if flags is None:
            return torch.zeros(n, dtype=torch.bool)
        found = torch.as_tensor(flags, dtype=torch.bool).flatten().cpu()
        if found.shape not in ((1,), (n,)):
            raise ValueError(f"terminated and truncated are one flag for each of {n} environments, got {len(found)}")
        return found.expand(n)

    def _constant_actions(self) -> bool:
        """Whether no environment's last actions vary, so that the head would learn a constant."""
        if not self.aux.uses_action or len(self._actions) < _LOOK_BACK:
            return False
        return float(torch.stack(self._actions).var(0, correction=0).max()) < _CONSTANT

    def _watched(self, obs: Tensor, action: Tensor, next_obs: Tensor) -> float:
        """The loss on middle crops, without a gradient or a draw."""
        with torch.no_grad():
            n = len(obs)
            before, after = self._middle(obs), self._middle(next_obs)

            def encoder(images: Tensor) -> Tensor:
                if len(images) != 2 * n:  # a task that does not look at the pair, such as one that turns images
                    return self.encoder(images)
                return torch.cat([self._encoded(part) for part in images.split(n)])

            return float(self.aux.watch(encoder, before, action, after))

    def _shut(self, obs: Tensor, action: Tensor, next_obs: Tensor) -> bool:
        if self._threshold is None:
            return False
        loss = self._watched(obs, action, next_obs)
        if not math.isfinite(loss):
            return True
        self._counters.gate_loss = smoothed(self._counters.gate_loss, loss, _GATE_SMOOTHING)
        return not self._counters.gate_loss > self._threshold

    def _too_slow(self) -> bool:
        if self._max_ms is None or not self._counters.milliseconds > self._max_ms:
            return False
        self._waited += 1
        if self._waited < _RETRY:
            return True
        self._waited = 0  # one is tried again: the machine may be free now
        return False

    def _drawn(self, rows: Rows) -> Rows:
        """A batch for the newest transitions, as the task's loss takes it."""
        return self._batches.drawn(self.aux, rows, self._width())

    def _penalty(self) -> Tensor | None:
        """What guards add to the loss."""
        found = [extra for guard in self._guards if (extra := guard.penalty(None, self)) is not None]
        return torch.stack(found).sum() if found else None

    def _update(self, rows: Rows) -> float | None:
        start = time.perf_counter()
        parameters = list(self.adapted.values())
        for parameter in parameters:
            parameter.requires_grad_(True)
        try:
            with torch.enable_grad():
                loss = self._batches.loss(self.encoder, self.aux, rows, self._width())
                penalty = self._penalty()
                grads = torch.autograd.grad(loss if penalty is None else loss + penalty, parameters, allow_unused=True)
        finally:
            for parameter in parameters:
                parameter.requires_grad_(False)
        return self._stepped(float(loss.detach()), grads, time.perf_counter() - start, self._batches.rows_of(self.aux, len(rows[0])))

    def _with_penalty(self, grads: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        """Gradients of a loss that was differentiated elsewhere, with those of what guards add."""
        parameters = list(self.adapted.values())
        for parameter in parameters:
            parameter.requires_grad_(True)
        try:
            with torch.enable_grad():
                penalty = self._penalty()
                if penalty is None:
                    return grads
                extra = torch.autograd.grad(penalty, parameters, allow_unused=True)
        finally:
            for parameter in parameters:
                parameter.requires_grad_(False)
        added = cast("tuple[Tensor | None, ...]", extra)
        return [a if b is None else b if a is None else a + b for a, b in zip(grads, added, strict=True)]

    def _stepped(self, value: float, grads: Sequence[Tensor | None], seconds: float, used: int) -> float | None:
        """Take the optimizer's step with gradients of a loss (and penalties), and count it; no step where either is not finite.

        ``seconds`` went into the gradients, of the loss of ``used`` transitions.
        """
        start = time.perf_counter()
        counters, parameters = self._counters, list(self.adapted.values())
        size = float(_foreach.norm([grad for grad in grads if grad is not None])) if math.isfinite(value) else math.nan
        if not math.isfinite(size):
            counters.skipped += 1
            self.note("nonfinite")
            return None
        self._memory = []
        optimizer = self._ready_optimizer(parameters)
        for parameter, grad in zip(parameters, grads, strict=True):
            parameter.grad = grad
        optimizer.step()
        for parameter in parameters:
            parameter.grad = None
        torch.clear_autocast_cache()  # autocast may hold copies of the parameters that just changed
        counters.used += used
        counters.step(value)
        for guard in self._guards:
            guard.after_step(self)
        counters.milliseconds = smoothed(counters.milliseconds, 1e3 * (seconds + time.perf_counter() - start))
        return value

    def _settle(self, *, wait: bool = True) -> float | None:
        """Take the step whose gradient the worker has computed; without ``wait`` only if it is ready."""
        if self._pending is None or not (wait or self._pending.done()):
            return None
        pending, self._pending = self._pending, None
        value, grads, seconds, used = pending.result()
        return self._stepped(value, self._with_penalty(grads), seconds, used)

    def _ready_optimizer(self, parameters: list[nn.Parameter]) -> Optimizer:
        if self._optimizer is None:
            made: Any = self._adam(parameters) if self._factory is None else self._factory(parameters)
            if not isinstance(made, Optimizer):
                raise TypeError(f"the optimizer factory must return an optimizer, got {type(made).__name__}")
            self._optimizer = made
        return self._optimizer

    def _adam(self, parameters: list[nn.Parameter]) -> Optimizer:
        # For weights as small as these the usual Adam is mostly Python; the fused one is a single kernel.
        fused = all(p.device.type in ("cpu", "cuda") and p.is_floating_point() for p in parameters)
        return torch.optim.Adam(parameters, lr=self._lr, fused=fused)

    @torch.no_grad()
    def _put(self, values: Sequence[Tensor]) -> None:
        _foreach.copy_(list(self.adapted.values()), values)
        self._memory = []

    def _to_source(self) -> None:
        self._put(self._source)
        self._optimizer = None

    def _new_source(self) -> None:
        """Weights were loaded into the modules: they are what episodes begin with."""
        self._adapted = None  # with ``assign`` the parameters are others
        self._source = [parameter.detach().clone() for parameter in self.adapted.values()]
        for parameter in self.parameters():
            parameter.requires_grad_(False)
        self._optimizer = self._pending = self._worker = self._copies = None
        self._memory = []

    # ---- state ----------------------------------------------------------------------------------------------------------------------

    def get_extra_state(self) -> dict[str, Any]:
        """Everything beside the modules that the next step depends on: tensors and plain values."""
        self._settle()
        return {
            "version": _VERSION,
            "names": list(self._names),
            "source": list(self._source),
            "threshold": self._threshold,
            "optimizer": None if self._optimizer is None else self._optimizer.state_dict(),
            "guards": [(type(guard).__name__, guard.state_dict()) for guard in self._guards],
            **self._batches.get_state(),
            "counters": self._counters.to_state(),
            "actions": list(self._actions),
            "steps": self._episodes.steps,
            "ended": self._episodes.ended,
            "last": self._last_obs,
            "degenerate": self._degenerate,
            "waited": self._waited,
            "copies": [] if self._copies is None else [each.state_dict() for each in self._copies.all],
        }

    def set_extra_state(self, state: Any) -> None:
        """Take what ``get_extra_state`` gave, as soon as the weights are loaded.

        Raises:
            ValueError: another version, other adapted parameters or other guards.
        """
        state = cast("dict[str, Any]", state)
        if state.get("version") != _VERSION:
            raise ValueError(f"the state has version {state.get('version')!r}; this release reads version {_VERSION}")
        if state["names"] != self._names:
            raise ValueError("the state adapts other parameters than this adapter")
        if state["copies"] and not self._per_env:
            raise ValueError("the state has one copy for each environment: make the adapter with per_env=True")
        self._loaded = state

    def _take_state(self, state: dict[str, Any]) -> None:
        """What ``_take_loaded`` does once the weights are in place."""
        device = device_of(self.encoder)
        load_guards(self._guards, state["guards"], device)
        parameters = list(self.adapted.values())
        self._source = [value.to(p.device, p.dtype, copy=True) for value, p in zip(state["source"], parameters, strict=True)]
        if self._auto:
            self._threshold = state["threshold"]
        if state["optimizer"] is not None:
            self._ready_optimizer(parameters).load_state_dict(state["optimizer"])
        self._batches.set_state(state, device)
        self._counters = _Counters.from_state(state["counters"])
        self._actions = [each.clone() for each in state["actions"]]
        episodes = self._episodes
        episodes.steps, episodes.ended = (None if each is None else each.clone() for each in (state["steps"], state["ended"]))
        self._last_obs = None if state["last"] is None else state["last"].to(device, copy=True)
        self._degenerate, self._waited = bool(state["degenerate"]), int(state["waited"])
        if state["copies"]:
            for each, own in zip(self._copies_of(len(state["copies"])).all, state["copies"], strict=True):
                each.load_state_dict(own)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> PolicyAdapter:
        self._settle()
        super()._apply(fn, recurse)
        with torch.no_grad():
            self._source = [fn(value) for value in self._source]
            self._batches.apply(fn)
            self._last_obs = None if self._last_obs is None else fn(self._last_obs)
            self._memory, self._worker, self._adapted = [], None, None
            for guard in self._guards:
                guard.apply(fn)
            if self._optimizer is not None:
                move_state(self._optimizer, fn)
            if self._copies is not None:
                self._copies.apply(fn)
        return self

    def __getstate__(self) -> dict[str, Any]:
        self._settle()
        return {**self.__dict__, "_worker": None}

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As every module does.

        Raises:
            ValueError: the state has no auxiliary head, such as the checkpoint of a policy alone.
        """
        if strict and any(True for _ in self.aux.parameters()) and not any(name.startswith("aux.") for name in state_dict):
            raise ValueError("the state has no auxiliary head: PAD needs one that was trained jointly with the policy (joint_step)")
        self._settle()
        return super().load_state_dict(state_dict, strict=strict, assign=assign)

    def train(self, mode: bool = True) -> PolicyAdapter:
        """Set the adapter's own flag; encoder, policy and task stay in eval mode."""
        self.training = mode
        for module in (getattr(self, "encoder", None), getattr(self, "policy", None), getattr(self, "aux", None)):
            if module is not None:
                module.eval()
        return self

    def extra_repr(self) -> str:
        """What is adapted and how."""
        own, batches = sum(parameter.numel() for parameter in self.adapted.values()), self._batches
        kind = f"Adam(lr={self._lr:g})" if self._factory is None else "own optimizer"
        parts = [f"adapts {own:,} weights in {len(self._names)} tensors", kind, f"batch={batches.size}"]
        if batches.buffer:
            parts.append(f"buffer={batches.buffer}, newest={batches.newest}")
        if self._auto or self._threshold is not None:
            parts.append(f"gate={'auto' if self._threshold is None else f'{self._threshold:.3g}'}")
        parts += ["episodic"] * self._episodic
        if self._guards:
            parts.append("guards=" + "+".join(type(guard).__name__ for guard in self._guards))
        return ", ".join(parts)


def _take_loaded(adapter: nn.Module, _keys: object) -> None:
    """After every load: the weights are in place, so what belongs to them can be."""
    adapter = cast("PolicyAdapter", adapter)
    state, adapter._loaded = adapter._loaded, None
    if state is not None:
        adapter._new_source()
        adapter._take_state(state)


def _finite(rows: Tensor) -> Tensor:
    """Which rows hold neither NaN nor infinity, ``(N,)`` on the CPU."""
    if not rows.is_floating_point():
        return torch.ones(len(rows), dtype=torch.bool)
    return rows.isfinite().reshape(len(rows), -1).all(1).cpu()


def _range(dtype: torch.dtype) -> str:
    return "bytes in [0, 255]" if dtype == torch.uint8 else f"{dtype} in [0, 1]"
