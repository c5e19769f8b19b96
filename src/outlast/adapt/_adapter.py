"""A module around a user's model that adapts while it predicts.

The frame of Wang et al., "Tent", ICLR 2021, section 3: normalisation statistics from the test data, and steps of an
unsupervised loss on the scale and shift of the normalisation layers.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.optim import Optimizer
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from outlast._core import _checks, _distributed, _foreach
from outlast._core._batches import arguments_of, rows_of
from outlast._core._distributed import world_size
from outlast._core._norm import is_batch_norm, is_norm_layer, recalibrate_batchnorm
from outlast._core._once import Once
from outlast.adapt._entropy import entropy
from outlast.adapt._guards import (
    CollapseAlarm,
    Feed,
    Guard,
    RingBuffer,
    Window,
    check_guards,
    load_guards,
    row_probabilities,
    source_or_raise,
)
from outlast.adapt._parameters import NormAffineExcept
from outlast.adapt._report import ClassifierReport, Counters, smoothed
from outlast.adapt._sources import Reload, check_factory, move_state
from outlast.adapt._statistics import MODES, Mode, Statistics
from outlast.errors import DivergedError, StateError, UnsupportedError

_VERSION = 1


@dataclasses.dataclass
class _Counters(Counters):
    bad_in_a_row: int = 0
    entropy: float = math.nan


@dataclasses.dataclass
class _Accumulated:
    """Gradients of micro-batches, weighted by their rows."""

    batches: int = 0
    rows: float = 0.0
    loss: float = 0.0
    grads: list[Tensor] = dataclasses.field(default_factory=list)


class TestTimeAdapter(nn.Module):
    """Adapts a classifier (or per-pixel classifier) to the inputs that it predicts, without labels.

    Each call of the module predicts a batch and then takes ``steps`` steps of ``loss`` on ``params``. The model is in
    eval mode throughout (no dropout); only its normalisation layers take their statistics from where ``stats`` says.
    Buffers are neither deleted nor written, so the source's checkpoint always loads into ``adapter.model``. Calls under
    ``no_grad`` and ``inference_mode`` adapt too; returned tensors never require a gradient.

    With ``torch.distributed`` initialised, gradients and the guards' sums are added up over the processes, weighted by
    the rows used, and every process must make the same number of calls. The result on a split batch is that of one
    process where layers do not see the batch (LayerNorm) or share it (SyncBatchNorm; with ``"ema"`` and ``"blend"`` wherever all
    processes mix, not in ``predict`` and beside a process whose batch is too small); local BatchNorm equals it in expectation.

    Args:
        model: gives logits of shape ``(B, C, ...)``; copied unless ``inplace``.
        steps: updates for each batch; 0 for none.
        episodic: go back to the source before each batch, so that no output depends on earlier batches.
        predict: ``"before"`` returns the forward pass that the last update learned from (no further cost), ``"after"``
            makes another one with the updated parameters.
        stats: ``"batch"``, ``"source"``, ``"ema"`` or ``"blend"``.
        stats_prior: weight of the source in ``"blend"``, in rows.
        stats_momentum: share of each batch in ``"ema"``.
        params: ``"norm_affine"`` (scale and shift of all normalisation layers), a predicate of name and parameter, or
            ``norm_affine_except``.
        optimizer: a factory such as ``lambda params: torch.optim.SGD(params, lr=2.5e-4, momentum=0.9)``; None takes Adam
            with ``lr`` and no weight decay. It is built at the first update.
        lr: of the default optimizer.
        loss: from float32 logits to one value a row ``(B,)`` or a position ``(B, ...)``; None takes the entropy.
        output_to_logits: finds the logits in what the model returns, for example ``lambda output: output.logits``.
        guards: see ``outlast.adapt``; they run in the order given.
        min_batch: smaller batches are predicted with the source's statistics (or ``"blend"``) and change nothing.
        accumulate: batches for each update; statistics stay those of each batch.
        keep_source: keep the adapted parameters' source values; without them there is no ``reset()``.
        inplace: adapt the model that was given, instead of a copy; its parameters' ``requires_grad`` changes.

    Raises:
        ValueError: nothing to adapt (the message names the layers found), a setting out of range, a model that is
            adapted already, uninitialised parameters.
        TypeError: ``model`` is no module, ``optimizer`` is an optimizer instead of a factory.
        UnsupportedError: quantised modules, which have no gradient.
    """

    __test__ = False  # not a test, whatever pytest makes of the name

    def __init__(
        self,
        model: nn.Module,
        *,
        steps: int = 1,
        episodic: bool = False,
        predict: Literal["before", "after"] = "before",
        stats: Mode = "batch",
        stats_prior: int = 16,
        stats_momentum: float = 0.1,
        params: Literal["norm_affine"] | Callable[[str, nn.Parameter], bool] = "norm_affine",
        optimizer: Callable[[list[nn.Parameter]], Optimizer] | None = None,
        lr: float = 1e-3,
        loss: Callable[[Tensor], Tensor] | None = None,
        output_to_logits: Callable[[Any], Tensor] | None = None,
        guards: Sequence[Guard] = (),
        min_batch: int | None = None,
        accumulate: int = 1,
        keep_source: bool = True,
        inplace: bool = False,
    ) -> None:
        super().__init__()
        _check_model(model)
        self._steps = _checks.integer("steps", steps, low=0)
        self._episodic = bool(episodic)
        self._after = _checks.choice("predict", predict, ("before", "after")) == "after"
        mode = cast("Mode", _checks.choice("stats", stats, MODES))
        prior = _checks.integer("stats_prior", stats_prior, low=0)
        momentum = _checks.real("stats_momentum", stats_momentum, low=0.0, high=1.0)
        self._lr = _checks.real("lr", lr, low=0.0, low_open=True)
        self._factory = check_factory(optimizer)
        self._min_batch = 0 if min_batch is None else _checks.integer("min_batch", min_batch, low=1)
        self._accumulate = _checks.integer("accumulate", accumulate, low=1)
        if not (params == "norm_affine" or callable(params)):
            raise ValueError(f"params must be 'norm_affine' or a predicate of name and parameter, got {params!r}")
        if self._steps > 1 and self._accumulate > 1:
            raise ValueError("steps > 1 takes its steps on one batch, accumulate > 1 takes one step on several: choose one of them")
        if self._episodic and (self._accumulate > 1 or any(isinstance(guard, RingBuffer) for guard in guards)):
            raise ValueError(
                "episodic=True forgets all before each batch, so neither accumulate > 1 nor a RingBuffer can ever lead to a step"
            )
        if self._episodic and not keep_source:
            raise ValueError("episodic=True goes back to the source before each batch, which keep_source=False does not keep")
        names = _adapted_names(model, params) if self._steps else []
        if not self._steps and not any(is_batch_norm(module) for module in model.modules()):
            raise ValueError(f"the model has no BatchNorm layer, so there are no statistics to re-estimate; {_layers_found(model)}")
        self._guards = check_guards(guards, ("classifier", "parameters"), adapter=type(self).__name__, keeps_source=keep_source)
        self._loss = loss
        self._output_to_logits = output_to_logits
        self._keep = bool(keep_source)
        self._names = names
        self._optimizer: Optimizer | None = None
        self._counters = _Counters()
        self._accumulated = _Accumulated()
        self._window = Window(256)
        self._active = True
        self._at_source = False
        self._checked = False
        self._classes = 0
        self._once = Once(2)
        with torch.inference_mode(False):
            self._take_model(model if inplace else copy.deepcopy(model), mode, prior, momentum)
        self._warn_at_start()

    def _take_model(self, model: nn.Module, mode: Mode, prior: int, momentum: float) -> None:
        self.model = model
        self.model._outlast_adapted = True  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]
        self._flags = {name: parameter.requires_grad for name, parameter in self.model.named_parameters()}
        self.model.eval()
        for parameter in self.model.parameters():
            parameter.requires_grad_(False)
        self._places = [_place(self.model, name) for name in self._names]
        self._params: list[nn.Parameter] = []
        self._statistics = Statistics(self.model, mode, prior=prior, momentum=momentum)
        self._source: list[Tensor] | None = None
        self._source_buffers: list[Tensor] = []
        self._restored = False  # whether a state of the adapter, rather than a new source, is being loaded into the model
        self.model.register_load_state_dict_post_hook(Reload(self))
        self._collect()

    # ---- what users call -------------------------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Predict a batch, and adapt on it.

        Returns:
            What the model returns, detached. An empty batch, or one below ``min_batch``, changes nothing.

        Raises:
            ValueError, TypeError: logits that are not floating point of shape ``(B, C, ...)`` with ``C >= 2``.
            DivergedError: an alarm that was set to raise went off.
        """
        # no_grad is undone by enable_grad, inference_mode is not: leave it, and copy what was made under it
        with torch.inference_mode(False):
            args, kwargs = tree_map(_ordinary, (args, kwargs))
            if not self._active:
                return _detached(self._plain_forward(args, kwargs))
            return _detached(self._predict_and_adapt(args, kwargs))

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """What the adapted model says now: no update, no counters."""
        with torch.inference_mode(False):
            args, kwargs = tree_map(_ordinary, (args, kwargs))
            return _detached(self._plain_forward(args, kwargs))

    def adapt(self, loader: Iterable[object], *, epochs: int = 1) -> ClassifierReport:
        """Offline: go through unlabelled data ``epochs`` times, updating; then ``predict`` with the final model.

        Args:
            loader: batches as tensors, tuples or lists whose first entry is the input, or mappings of keyword arguments.
            epochs: how often.
        """
        for _ in range(_checks.integer("epochs", epochs, low=1)):
            for batch in loader:
                args, kwargs = arguments_of(batch)
                self(*args, **kwargs)
        return self.report

    @contextmanager
    def source(self) -> Generator[None]:
        """For the time of the block the exact source model, adapting nothing."""
        values = list(self.source_values.values())
        now = [parameter.detach().clone() for parameter in self._params]
        active, at_source = self._active, self._at_source
        self._set_parameters(values)
        self._active, self._at_source = False, True
        try:
            yield
        finally:
            self._set_parameters(now)
            self._active, self._at_source = active, at_source

    @contextmanager
    def frozen(self) -> Generator[None]:
        """For the time of the block calls predict with the model as it is, adapting nothing."""
        active, self._active = self._active, False
        try:
            yield
        finally:
            self._active = active

    def reset(self) -> None:
        """Back to the start: parameters, statistics, optimizer, guards, counters.

        Raises:
            StateError: the source was not kept, or inside a ``source`` block.
        """
        self._refuse_at_source("reset()")
        self._to_source()
        for guard in self._guards:
            guard.reset()
        self._counters = _Counters()
        self._window.clear()

    def _new_source(self) -> None:
        """A checkpoint was loaded into the model: it is the source from now on."""
        if self._restored:
            self._restored = False
            return
        self._refuse_at_source("load_state_dict() of the model")
        self._snapshot()
        self._statistics.reset()
        self._optimizer = None
        self._accumulated = _Accumulated()

    def _refuse_at_source(self, call: str) -> None:
        if self._at_source:
            raise StateError(f"{call} inside source(), where the adapted parameters are put aside; leave the block first")

    @property
    def report(self) -> ClassifierReport:
        """What has happened since the start or the last ``reset()``."""
        return ClassifierReport(
            **self._counters.reported(),
            drift=self._drift(),
            entropy=self._counters.entropy,
            marginal_entropy=self._window.marginal_entropy(),
        )

    def merge(self, batches: Iterable[object] | None = None) -> nn.Module:
        """A plain module with the adapted weights, on its own feet.

        Args:
            batches: estimate the running statistics on these. Without them the module predicts as ``predict`` does:
                with the source's or the running statistics, or (``stats="batch"``) with those of each batch.

        Raises:
            ValueError: ``stats="blend"`` without batches, which no plain module can express.
        """
        mode = self._statistics.mode
        if batches is None and mode == "blend" and self._statistics.layers:
            raise ValueError("stats='blend' has no form as a plain module: give merge() batches to estimate statistics from")
        self._refuse_at_source("merge()")
        plain = copy.deepcopy(self.model)
        plain._load_state_dict_post_hooks.clear()
        for module in plain.modules():
            module._forward_pre_hooks = type(module._forward_pre_hooks)(
                (key, hook) for key, hook in module._forward_pre_hooks.items() if type(hook).__name__ != "_Mixing"
            )
        del plain._outlast_adapted
        for name, parameter in plain.named_parameters():
            parameter.requires_grad_(self._flags[name])
        statistics = Statistics(plain, "source", prior=0, momentum=0.0)
        plain.eval()
        if batches is not None:
            recalibrate_batchnorm(plain, batches)
        elif mode == "ema":
            for layer, (mean, var) in zip(statistics.layers, self._statistics.running, strict=True):
                cast("Tensor", layer.running_mean).copy_(mean)
                cast("Tensor", layer.running_var).copy_(var)
        elif mode == "batch":
            for layer in statistics.layers:
                layer.track_running_stats = False
                layer.running_mean = layer.running_var = layer.num_batches_tracked = None
        return plain

    # ---- what guards call ------------------------------------------------------------------------------------------

    @property
    def adapted(self) -> dict[str, nn.Parameter]:
        """The adapted parameters by their names in the model."""
        return dict(zip(self._names, self._params, strict=True))

    @property
    def source_values(self) -> Mapping[str, Tensor]:
        """Their values in the source model.

        Raises:
            StateError: they were not kept.
        """
        kept = None if self._source is None else dict(zip(self._names, self._source, strict=True))
        return source_or_raise(kept)

    @property
    def last_loss(self) -> float:
        """Loss of the rows used by the last update, before penalties."""
        return self._counters.last_loss

    @property
    def loss_scale(self) -> float:
        """``ln C``."""
        return math.log(self._classes)

    def restore(self, reason: str) -> None:
        """Return to the source state; the stream, its window of predictions and the counters go on."""
        self._to_source()
        self._counters.resets += 1
        self.note(reason)
        for guard in self._guards:
            guard.restored()

    def freeze(self) -> None:
        """Adapt no more until ``reset``; calls go on predicting."""
        self._counters.frozen = True
        self.note("frozen")

    def note(self, event: str) -> None:
        """Record an event with the number of updates so far."""
        self._counters.note(event)

    def all_sum(self, value: Tensor) -> Tensor:
        """The sum over processes; the value itself where there is one."""
        return value if world_size() == 1 else _distributed.sum_(value.clone())

    # ---- a batch ---------------------------------------------------------------------------------------------------

    def _predict_and_adapt(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._collect()
        if rows_of((args, kwargs)) is None:
            raise TypeError("the adapter needs a tensor among the model's arguments, to know the batch")
        if self._episodic:
            self._to_source()
            for guard in self._guards:
                guard.reset()
            self._counters.frozen = False
        counters = self._counters
        counters.seen += rows_of((args, kwargs)) or 0
        feed = Feed(args, kwargs)
        if rows_of((args, kwargs)):
            for guard in self._guards:
                feed = guard.before_forward(feed)
        small = (rows_of((feed.args, feed.kwargs)) or 0) < max(1, self._min_batch)
        mode = self._mode_for(feed)
        willing = feed.adapt and feed.settled and not small and self._steps > 0 and not counters.frozen
        # all processes take a step or none: a collective that some skip would never end
        mixing = mode in ("ema", "blend")
        votes = torch.tensor([float(willing), float(small), float(mixing)], device=self._device)
        count, smalls, mixers = self.all_sum(votes).tolist()
        adapting = count == world_size()
        if feed.adapt and not adapting and (self._steps > 0 or small):
            counters.skipped += 1
        output: Any = None
        fine = True
        with self._statistics.together(all_mix=mixers == world_size()):
            for step in range(self._steps if adapting else 1):
                output, logits = self._run(feed, mode, grad=adapting)
                if adapting:
                    fine = self._update(logits, first=step == 0)
                    if not fine:
                        break
                elif not small:
                    fine = self._is_fine(logits)
            if fine and feed.adapt and not small:
                self._statistics.commit()  # once a batch, whatever the steps; of a buffer, once it is new
            if adapting and fine and self._after:
                output, _ = self._run(feed, mode, grad=False)
        self._statistics.discard()
        output = _newest(_detached(output), feed)
        if smalls == 0:
            self._follow(output)
        return output

    @property
    def _device(self) -> torch.device:
        return next((parameter.device for parameter in self.model.parameters()), torch.device("cpu"))

    def _mode_for(self, feed: Feed) -> Mode:
        """The statistics that a batch of this size is predicted with."""
        rows = rows_of((feed.args, feed.kwargs)) or 0
        if self._at_source or rows == 0 or not feed.settled:
            return "source"
        if rows < self._min_batch:
            return "blend" if self._statistics.mode == "blend" else "source"
        if rows == 1 and self._statistics.mode == "batch" and not any(isinstance(guard, RingBuffer) for guard in self._guards):
            self._warn_single_row()
        return self._statistics.mode

    def _run(self, feed: Feed, mode: Mode, *, grad: bool, fixed: bool = False) -> tuple[Any, Tensor]:
        output = self._call(feed, mode, grad=grad, fixed=fixed)
        with torch.set_grad_enabled(grad):
            return output, self._logits(output)

    def _call(self, feed: Feed, mode: Mode, *, grad: bool, fixed: bool) -> Any:
        if self.model.training:
            self.model.eval()
        with self._statistics.using(mode, fixed=fixed), torch.set_grad_enabled(grad):
            try:
                return self.model(*feed.args, **feed.kwargs)
            except ValueError as error:
                if "more than 1 value per channel" not in str(error):
                    raise
                raise ValueError(
                    "a BatchNorm layer has one value a channel in this batch, so there are no batch statistics; use guards="
                    "[RingBuffer()], stats='blend', or larger batches"
                ) from error

    def _plain_forward(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        feed = Feed(args, kwargs)
        if rows_of((args, kwargs)) and not self._at_source:
            for guard in self._guards:
                if isinstance(guard, RingBuffer):
                    feed = guard.preview(feed)
        return _newest(self._call(feed, self._mode_for(feed), grad=False, fixed=True), feed)

    def _is_fine(self, logits: Tensor) -> bool:
        """Whether a batch that leads to no step is finite; one that is not is counted like those that would."""
        if bool(torch.isfinite(logits).all()):
            self._counters.bad_in_a_row = 0
            return True
        self._note_bad_batch(skipped=self._steps == 0)  # of an adapter that could step it is counted already
        return False

    def _logits(self, output: Any) -> Tensor:
        if self._output_to_logits is not None:
            logits = self._output_to_logits(output)
        elif isinstance(output, Tensor):
            logits = output
        else:
            raise TypeError(
                f"the model returns a {type(output).__name__} ({_fields(output)}); say where the logits are, for example "
                "output_to_logits=lambda output: output.logits"
            )
        if not self._checked:
            self._check_logits(logits)
        return logits

    def _check_logits(self, logits: Tensor) -> None:
        if not isinstance(logits, Tensor) or not logits.is_floating_point():
            raise TypeError(f"logits must be a floating-point tensor, got {getattr(logits, 'dtype', type(logits).__name__)}")
        if logits.ndim < 2 or logits.shape[1] < 2:
            hint = (
                "; for one logit a row give the entropy of a Bernoulli variable as loss, on logits of two columns (0, z)"
                if 1 in logits.shape[1:2]
                else ""
            )
            raise ValueError(f"logits must have shape (B, C, ...) with C >= 2, got {tuple(logits.shape)}{hint}")
        self._classes = int(logits.shape[1])
        if not len(logits):
            return
        sums = logits.detach().float().sum(1)
        if bool((logits.detach() >= 0).all()) and bool(((sums - 1).abs() < 1e-4).all()):
            self._once.warn(
                "the model's output looks like probabilities (no negative value, rows sum to 1); the adapter needs logits: "
                "take the softmax off, or give output_to_logits=torch.log"
            )
        self._checked = True

    def _update(self, logits: Tensor, *, first: bool) -> bool:
        """Backward pass, and the optimizer's step where one is due; False ends the batch's steps.

        One transfer from the device for each step. Rows are counted at the first step of a batch.
        """
        counters = self._counters
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        with torch.autocast(wide.device.type, enabled=False):
            objective, loss, used = self._objective(wide)
            grads = self._gradients(objective)
        value, count, size = torch.stack([loss, used, _foreach.norm(grads).to(loss)]).tolist()
        if not (math.isfinite(value) and math.isfinite(size)):
            for guard in self._guards:
                guard.discarded()
            self._note_bad_batch(skipped=True)
            return False
        counters.bad_in_a_row = 0
        if count == 0:
            counters.skipped += first
            return True
        if first:
            counters.used += int(count)
        done = self._take(grads, value, count)
        if done is not None:
            self._step(done)
        return True

    def _step(self, grads: list[Tensor]) -> None:
        for parameter, grad in zip(self._params, grads, strict=True):
            parameter.grad = grad
        self._build_optimizer().step()
        for parameter in self._params:
            parameter.grad = None
        torch.clear_autocast_cache()  # autocast may hold copies of the parameters that just changed
        self._counters.step(self._counters.last_loss)
        for guard in self._guards:
            guard.after_step(self)

    def _objective(self, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What is differentiated, and (over all processes) the loss of the rows used and their number."""
        values = entropy(logits, reduction="none") if self._loss is None else self._loss(logits)
        if values.ndim == 0 or len(values) != len(logits):
            raise ValueError(
                f"loss must give one value a row, shape ({len(logits)},) or ({len(logits)}, ...), got shape {tuple(values.shape)}"
            )
        values = values.reshape(len(values), -1).mean(1)
        kept = torch.ones(len(values), dtype=torch.bool, device=values.device)
        for guard in self._guards:
            kept = guard.select(logits.detach(), kept)
        for guard in self._guards:
            guard.selected(logits.detach(), kept)
        own = torch.where(kept, values, 0.0).sum()
        sums = self.all_sum(torch.stack([own.detach(), kept.sum().to(own)]))
        objective = own / sums[1].clamp(min=1.0)
        for guard in self._guards:
            penalty = guard.penalty(logits, self)
            if penalty is not None:
                objective = objective + penalty
        return objective, sums[0] / sums[1].clamp(min=1.0), sums[1]

    def _gradients(self, objective: Tensor) -> list[Tensor]:
        if not objective.requires_grad:  # the logits do not depend on anything that is adapted
            return [torch.zeros_like(parameter) for parameter in self._params]
        sharded = any(map(_foreach.is_sharded, self._params))
        for parameter in self._params:  # what the user's own training may have left
            parameter.grad = None
        try:
            # FSDP averages over the processes what is a sum here
            (objective * world_size() if sharded else objective).backward()
            grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in self._params]
        finally:
            for parameter in self._params:
                parameter.grad = None
        if world_size() > 1 and not sharded:
            flat = _distributed.sum_(torch.cat([grad.reshape(-1) for grad in grads]))
            grads = [part.view_as(grad) for part, grad in zip(flat.split([grad.numel() for grad in grads]), grads, strict=True)]
        return grads

    def _take(self, grads: list[Tensor], loss: float, rows: float) -> list[Tensor] | None:
        """The gradient of the coming step; None while more micro-batches are to come."""
        if self._accumulate == 1:
            self._counters.last_loss = loss
            return grads
        held = self._accumulated
        if not held.grads:
            held.grads = [torch.zeros_like(grad) for grad in grads]
        _foreach.add_(held.grads, grads, alpha=rows)
        held.batches += 1
        held.rows += rows
        held.loss += rows * loss
        if held.batches < self._accumulate:
            return None
        self._accumulated = _Accumulated()
        self._counters.last_loss = held.loss / held.rows
        return [grad / held.rows for grad in held.grads]

    def _note_bad_batch(self, *, skipped: bool) -> None:
        counters = self._counters
        counters.skipped += skipped
        counters.bad_in_a_row += 1
        self.note("nonfinite")
        if counters.bad_in_a_row == 10:
            message = "ten batches in a row gave a loss or gradient that is not finite; nothing is adapted"
            if any(isinstance(guard, CollapseAlarm) and guard.action == "raise" for guard in self._guards):
                raise DivergedError(message)
            self._once.warn(message)

    @torch.no_grad()
    def _follow(self, output: Any) -> None:
        """The figures of the report, and the guards' look at what is returned."""
        logits = self._logits(output).float()
        p = row_probabilities(logits)
        finite = torch.isfinite(p).all(1)
        if not bool(finite.all()):
            logits, p = logits[finite], p[finite]
        counters = self._counters
        if len(logits):
            counters.entropy = smoothed(counters.entropy, float(entropy(logits)))
            self._window.add(p)
        if not counters.frozen:
            for guard in self._guards:
                guard.after_batch(p, self)

    # ---- parameters and state --------------------------------------------------------------------------------------

    def _collect(self) -> None:
        """Look the adapted parameters up; they may have been replaced (``to_empty``, sharding) since the last batch."""
        current = [cast("nn.Parameter", module._parameters[leaf]) for module, leaf in self._places]
        for parameter in current:
            if not parameter.requires_grad:
                parameter.requires_grad_(True)
        if len(current) == len(self._params) and all(a is b for a, b in zip(current, self._params, strict=True)):
            return
        replaced = bool(self._params)
        before, self._params = self._params, current
        if not replaced or self._counters.updates == 0:
            self._snapshot()
        if self._optimizer is not None:
            positions = {parameter: number for number, parameter in enumerate(before)}
            for group in self._optimizer.param_groups:
                group["params"] = [current[positions[p]] if p in positions else p for p in group["params"]]
            for old, new in zip(before, current, strict=True):
                if old in self._optimizer.state:
                    self._optimizer.state[new] = self._optimizer.state.pop(old)

    def _snapshot(self) -> None:
        """Keep the present values as the source's."""
        if self._keep:
            self._source = [parameter.detach().clone() for parameter in self._params]
            self._source_buffers = [buffer.detach().clone() for buffer in self.model.buffers()]

    def _build_optimizer(self) -> Optimizer:
        if self._optimizer is None:
            params = list(self._params)
            made = torch.optim.Adam(params, lr=self._lr, weight_decay=0.0) if self._factory is None else self._factory(params)
            if not isinstance(made, Optimizer):
                raise TypeError(f"optimizer must return a torch.optim.Optimizer, got {type(made).__name__}")
            self._optimizer = made
        return self._optimizer

    @torch.no_grad()
    def _set_parameters(self, values: list[Tensor]) -> None:
        _foreach.copy_(self._params, values)

    @torch.no_grad()
    def _to_source(self) -> None:
        self._set_parameters(list(self.source_values.values()))
        _foreach.copy_(list(self.model.buffers()), self._source_buffers)
        self._statistics.reset()
        self._optimizer = None
        self._accumulated = _Accumulated()

    def _drift(self) -> float:
        if self._source is None or not self._params:
            return math.nan if self._source is None else 0.0
        with torch.no_grad():
            gaps = [a - b for a, b in zip(self._params, self._source, strict=True)]
            return float(_foreach.norm(gaps) / _foreach.norm(self._source).clamp(min=1e-12))

    def get_extra_state(self) -> dict[str, Any]:
        """Everything beside the model that the next batch depends on: tensors and plain values."""
        self._refuse_at_source("state_dict()")
        return {
            "version": _VERSION,
            "names": list(self._names),
            "source": self._source,
            "buffers": self._source_buffers,
            "optimizer": None if self._optimizer is None else self._optimizer.state_dict(),
            "guards": [(type(guard).__name__, guard.state_dict()) for guard in self._guards],
            "statistics": self._statistics.to_state(),
            "window": self._window.rows,
            "classes": self._classes,
            "counters": self._counters.to_state(),
            "accumulated": dataclasses.asdict(self._accumulated),
        }

    def set_extra_state(self, state: Any) -> None:
        """Take what ``get_extra_state`` gave.

        Raises:
            ValueError: another version, other adapted parameters or other guards.
        """
        state = cast("dict[str, Any]", state)
        if state.get("version") != _VERSION:
            raise ValueError(f"the state has version {state.get('version')!r}; this release reads version {_VERSION}")
        if state["names"] != self._names:
            raise ValueError(f"the state adapts other parameters: {_first_difference(state['names'], self._names)}")
        self._refuse_at_source("load_state_dict()")
        device = self._device
        load_guards(self._guards, state["guards"], device)
        if state["source"] is not None:
            self._source = [value.to(p.device, p.dtype, copy=True) for value, p in zip(state["source"], self._params, strict=True)]
        pairs = zip(state["buffers"], self.model.buffers(), strict=True)
        self._source_buffers = [value.to(b.device, b.dtype, copy=True) for value, b in pairs]
        self._restored = True  # torch loads the model next
        self._optimizer = None
        if state["optimizer"] is not None:
            self._build_optimizer().load_state_dict(state["optimizer"])
        self._statistics.from_state(state["statistics"])
        self._window.rows = None if state["window"] is None else state["window"].to(device, copy=True)
        self._classes = int(state["classes"])
        self._checked = self._classes > 0
        self._counters = _Counters.from_state(state["counters"])
        held = dict(state["accumulated"])
        held["grads"] = [grad.to(p.device, p.dtype, copy=True) for grad, p in zip(held["grads"], self._params, strict=False)]
        self._accumulated = _Accumulated(**held)

    def train(self, mode: bool = True) -> TestTimeAdapter:
        """Set the adapter's own flag; the model stays in eval mode, and statistics stay as ``stats`` says."""
        self.training = mode
        return self

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> TestTimeAdapter:
        super()._apply(fn, recurse)
        with torch.no_grad():
            if self._source is not None:
                self._source = [fn(value) for value in self._source]
            self._source_buffers = [fn(value) for value in self._source_buffers]
            self._statistics.apply(fn)
            self._accumulated.grads = [fn(value) for value in self._accumulated.grads]
            for guard in self._guards:
                guard.apply(fn)
            if self._optimizer is not None:
                move_state(self._optimizer, fn)
        self._window.clear()
        return self

    def extra_repr(self) -> str:
        """What is adapted and how."""
        total = sum(parameter.numel() for parameter in self.model.parameters())
        own = sum(parameter.numel() for parameter in self._params)
        what = f"adapts {own:,} of {total:,} weights in {len(self._params)} tensors" if self._steps else "adapts statistics only"
        optimizer = f"Adam(lr={self._lr:g})" if self._factory is None else "own optimizer"
        parts = [what, f"stats={self._statistics.mode!r} in {len(self._statistics.layers)} layers"]
        if self._steps:
            parts += [f"steps={self._steps}", optimizer]
        if self._episodic:
            parts.append("episodic")
        if self._guards:
            parts.append("guards=" + "+".join(type(guard).__name__ for guard in self._guards))
        return ", ".join(parts)

    # ---- warnings --------------------------------------------------------------------------------------------------

    def _warn_at_start(self) -> None:
        if self._steps and not any(map(is_batch_norm, self.model.modules())):
            self._once.warn(
                "the model has no BatchNorm: there are no statistics to re-estimate and the batch size no longer matters, but "
                "streams of few classes make it collapse all the more; take Tent.recommended or leave the last blocks out with "
                "params=norm_affine_except(last=3)"
            )
        if self._statistics.mode == "source" and not self._steps:
            self._once.warn("stats='source' with no steps adapts nothing")

    def _warn_single_row(self) -> None:
        if any(map(is_batch_norm, self.model.modules())):
            self._once.warn(
                "a batch of one row under stats='batch' normalises each image by itself, which destroys most predictions; use "
                "guards=[RingBuffer()] or stats='blend'"
            )


# ---- checks and small helpers ------------------------------------------------------------------------------------------


def _check_model(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    for module in model.modules():
        if isinstance(module, TestTimeAdapter) or getattr(module, "_outlast_adapted", False):
            raise ValueError("this model is adapted already; wrap the plain model, or take adapter.merge()")
        if ".quantized." in type(module).__module__ or type(module).__module__.startswith("torch.ao.nn.quantized"):
            raise UnsupportedError(f"quantised modules ({type(module).__name__}) have no gradient; adapt the float model")
    for name, parameter in model.named_parameters():
        if isinstance(parameter, UninitializedParameter):
            raise ValueError(f"parameter {name!r} is not initialised yet (a lazy module); run the model once before wrapping it")


def _adapted_names(model: nn.Module, params: Literal["norm_affine"] | Callable[[str, nn.Parameter], bool]) -> list[str]:
    owned = {id(parameter): module for module in model.modules() if is_norm_layer(module) for parameter in module.parameters(recurse=False)}
    affine = [name for name, parameter in model.named_parameters() if id(parameter) in owned]
    if isinstance(params, NormAffineExcept):
        names = params.choose(affine)
    elif callable(params):
        names = [name for name, parameter in model.named_parameters() if params(name, parameter)]
    else:
        names = affine
    parameters = dict(model.named_parameters())
    names = [name for name in names if parameters[name].is_floating_point()]
    if names:
        return names
    if callable(params):
        raise ValueError(f"params selects none of the model's {len(parameters)} parameters; {_layers_found(model)}")
    if any(map(is_norm_layer, model.modules())):
        raise ValueError(f"the normalisation layers have no scale and shift (affine=False) to adapt; {_layers_found(model)}")
    raise ValueError(f"the model has no normalisation layer; {_layers_found(model)}. Give params= a predicate to adapt others")


def _layers_found(model: nn.Module) -> str:
    kinds = sorted({type(module).__name__ for module in model.modules() if not list(module.children())})
    return f"layers found: {', '.join(kinds) or 'none'}"


def _place(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    owner, _, leaf = name.rpartition(".")
    return model.get_submodule(owner), leaf


def _ordinary(leaf: Any) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf
    return leaf.clone() if leaf.is_inference() else leaf.detach()


def _detached(output: Any) -> Any:
    """The same kind of thing with all tensors detached."""
    return _each(output, Tensor.detach)


def _newest(output: Any, feed: Feed) -> Any:
    """The last rows of an output, where a buffer was fed for the sake of a few."""
    total = rows_of((feed.args, feed.kwargs)) or 0
    count = feed.newest
    if count is None or count >= total:
        return output
    return _each(output, lambda leaf: leaf[-count:] if leaf.ndim > 0 and len(leaf) == total else leaf)


def _each(output: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A copy of an output with its tensors changed, whatever holds them: containers, dataclasses, plain objects."""
    if isinstance(output, Tensor):
        return change(output)
    if output is None or isinstance(output, type | str | bytes | int | float | complex | nn.Module):
        return output
    holds = getattr(output, "__dict__", None)
    if holds and not isinstance(output, dict | list | tuple):
        changed = copy.copy(output)
        for name, value in holds.items():
            object.__setattr__(changed, name, _each(value, change))
        return changed
    leaves, form = tree_flatten(output)
    if len(leaves) == 1 and leaves[0] is output:
        return output
    return tree_unflatten([_each(leaf, change) for leaf in leaves], form)


def _fields(output: Any) -> str:
    if isinstance(output, Mapping):
        return f"keys {', '.join(map(str, cast('Mapping[object, object]', output)))}"
    if dataclasses.is_dataclass(output):
        return f"fields {', '.join(field.name for field in dataclasses.fields(output))}"
    if isinstance(output, tuple | list):
        return f"{len(cast('Sequence[object]', output))} entries"
    return f"{len(tree_leaves(output))} leaves"


def _first_difference(left: Sequence[str], right: Sequence[str]) -> str:
    only = sorted(set(left) ^ set(right))
    return f"{only[0]!r} is in one of them alone" if only else "they come in another order"
