"""Gradient projection memory: learn task after task without touching what earlier tasks compute.

Saha, Garg, Roy, "Gradient Projection Memory for Continual Learning", ICLR 2021 (arXiv 2103.09762). Constraining the
weight itself instead of its gradient makes the method exact for every optimizer (the same idea for Adam's update: Wang et
al., CVPR 2021). Option: scaled projection (Saha, Roy, AAAI 2023, arXiv 2302.01386).
"""

from __future__ import annotations

import functools
import re
import time
import warnings
from collections import OrderedDict
from collections.abc import Callable, Generator, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from outlast._core import _checks, _distributed, _foreach
from outlast._core._batches import call_with, device_of, rows_of, some_rows
from outlast._core._calls import eager
from outlast._core._distributed import gathered, part_of, unwrapped
from outlast._core._foreach import is_sharded, local, whole
from outlast._core._norm import eval_mode
from outlast._core._once import Once
from outlast._core._precision import full_precision
from outlast.continual._basis import Rows
from outlast.continual._collector import collecting
from outlast.continual._layers import Layers, Pattern
from outlast.continual._report import ConsolidationReport, LayerReport
from outlast.continual._sites import Adapter, EmbeddingSite, LinearSite, Site, total_of
from outlast.errors import OutlastWarning, StateError

Threshold = float | Mapping[str, float] | Callable[[str, int], float]
Mode = Literal["step", "gradient", "both"]
Forward = Callable[[nn.Module, Any], Any]
DEFAULT_THRESHOLD = 0.97


class _Attachment(RemovableHandle):
    """Hooks on optimizers that come off together."""

    def __init__(self, registry: OrderedDict[int, Any], optimizers: Sequence[Optimizer], *, reset_state: bool) -> None:
        super().__init__(registry)
        self.optimizers = optimizers
        self.reset_state = reset_state
        self.hooks: list[RemovableHandle] = []
        registry[self.id] = self

    def remove(self) -> None:
        super().remove()
        for hook in self.hooks:
            hook.remove()


@dataclass
class _Seen:
    """What collection saw since the last consolidation."""

    rows: dict[str, Rows] = field(default_factory=dict)
    counts: dict[str, Tensor] = field(default_factory=dict)
    samples: int = 0


class GradientProjectionMemory:
    """Stores what tasks need of each layer's input space, and keeps later training orthogonal to it.

    ```python
    memory = GradientProjectionMemory(model, threshold=0.97)
    memory.attach(optimizer)  # any torch optimizer; the training loop does not change
    for task in tasks:
        train(model, optimizer, task)
        memory.consolidate(task.loader)  # store the directions that this task needs
    ```

    Layers: ``Linear``, ``Conv1d/2d/3d`` and their transposed forms with groups, transformers' ``Conv1D``, ``Embedding`` and
    ``EmbeddingBag``, tied heads, ``MultiheadAttention``, and any parameter that a module gives to the functional forms.

    The trap that it takes care of: projecting the gradient, as the paper does, protects only in part with Adam, weight decay
    or a kept momentum buffer, because the step leaves the subspace. The default ``mode="step"`` of ``attach`` restores
    each layer's anchor after the step, whatever made it.

    Args:
        model: its wrappers (``torch.compile``, DistributedDataParallel, Fabric) are looked through. Shard it (FSDP2) first.
        threshold: share of each layer's input energy to hold, in (0, 1]: one number, a mapping from layer (or parameter)
            names (others take 0.97), or ``threshold(name, task_index)``. Higher forgets less and fills sooner.
        threshold_step: added for each task, ``min(1, threshold + threshold_step * task_index)``.
        include: names of modules or parameters (with all below them) or compiled patterns searched in parameter names.
            None takes all; what is not included trains freely.
        exclude: likewise, to leave out: task heads.
        bias: ``"augment"`` holds weight and bias together as one map (exact); ``"freeze"`` after the first task; ``"free"``.
            Biases of transposed convolutions have no joint form and are frozen with ``"augment"``.
        norm: BatchNorm (and InstanceNorm) from the first consolidation on: ``"freeze"`` affine and running statistics;
            ``"paper"`` learns affine in the first task and always normalises by the batch; ``"per_task"`` one set for each
            task and any kind of norm layer, chosen by ``set_task``; ``"free"``.
        other: everything else that is no linear map (LayerNorm, position embeddings, ...): ``"freeze"`` after the first task,
            ``"free"``, or ``"error"``.
        max_rank: cap of a layer's directions, a share of its width or a number.
        rank_rule: ``"official"`` stores one direction fewer in the first task, as the authors' code does.
        importance_scale: scaled projection (SGP) with this alpha: directions of little importance stay partly free.
        keep_reference: keep a copy of constrained weights at each consolidation, which ``interference`` needs.

    Raises:
        ValueError: a threshold or cap out of range, a pattern or name that matches nothing, no constrained layer, or with
            ``other="error"`` a parameter that is no linear map.
        TypeError: complex, sparse or quantised weights.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        threshold: Threshold = DEFAULT_THRESHOLD,
        threshold_step: float = 0.0,
        include: Iterable[Pattern] | None = None,
        exclude: Iterable[Pattern] = (),
        bias: Literal["augment", "freeze", "free"] = "augment",
        norm: Literal["freeze", "paper", "per_task", "free"] = "freeze",
        other: Literal["freeze", "free", "error"] = "freeze",
        max_rank: float | int = 1.0,
        rank_rule: Literal["paper", "official"] = "paper",
        importance_scale: float | None = None,
        keep_reference: bool = True,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        self._model = unwrapped(model)
        self._threshold = threshold
        self._threshold_step = _checks.real("threshold_step", threshold_step)
        self._bias = _checks.choice("bias", bias, ("augment", "freeze", "free"))
        self._norm = _checks.choice("norm", norm, ("freeze", "paper", "per_task", "free"))
        self._other = _checks.choice("other", other, ("freeze", "free", "error"))
        self._max_rank = _check_max_rank(max_rank)
        self._official = _checks.choice("rank_rule", rank_rule, ("paper", "official")) == "official"
        self._alpha = None if importance_scale is None else _checks.real("importance_scale", importance_scale, low=0.0)
        self._keep_reference = bool(keep_reference)
        self._layers = Layers(self._model, include, exclude, bias=self._bias, norm=self._norm, other=self._other)
        self._check_thresholds()
        self._keys: list[Hashable] = []
        self._held: dict[str, Tensor] = {}
        self._asked: set[str] = set()  # names that freeze() holds
        self._norm_states: dict[Hashable, dict[str, Tensor]] = {}
        self._live_norms: dict[str, Tensor] | None = None  # set aside while an old task's are in place
        self._norms_frozen = False
        self._adapters: dict[str, Adapter] = {}
        self._attached: OrderedDict[int, _Attachment] = OrderedDict()  # torch's handles take nothing else
        self._seen = _Seen()
        self._last_thresholds: dict[str, float] = {}
        self._once = Once(3)
        self._steps = 0
        self._behind = False  # steps were made since the anchors were restored last
        if self._norm == "paper":
            for layer in self._layers.batch_norms():
                layer.track_running_stats = False
                layer.running_mean = layer.running_var = layer.num_batches_tracked = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_attached": OrderedDict()}  # hooks belong to the original's optimizers

    # ---- thresholds ----------------------------------------------------------------------------------------------------

    def _check_thresholds(self) -> None:
        threshold = self._threshold
        if isinstance(threshold, Mapping):
            table = cast("Mapping[str, float]", threshold)
            for name, value in table.items():
                if not self._layers.known(name):
                    raise ValueError(f"threshold names {name!r}, which is no layer or weight of the model; {self._layers.near(name)}")
                _check_threshold(f"threshold of {name!r}", value)
        elif not callable(threshold):
            _check_threshold("threshold", threshold)

    def _threshold_of(self, site: Site, index: int) -> float:
        threshold = self._threshold
        if isinstance(threshold, Mapping):
            table = cast("Mapping[str, float]", threshold)
            value = table.get(site.name, table.get(self._layers.weight_name(site), DEFAULT_THRESHOLD))
        elif callable(threshold):
            value = min(1.0, _checks.real(f"threshold of {site.name!r}", threshold(site.name, index), low=0.0, low_open=True))
        else:
            value = threshold
        return _check_threshold(f"threshold of {site.name!r} for task {index}", min(1.0, value + self._threshold_step * index))

    # ---- optimizers ----------------------------------------------------------------------------------------------------

    def attach(
        self,
        optimizer: Optimizer | Sequence[Optimizer],
        *,
        mode: Mode = "step",
        every: int = 1,
        force: bool = False,
        reset_state: bool = True,
    ) -> RemovableHandle:
        """Constrain an optimizer's steps; nothing happens before the first ``consolidate``.

        Args:
            optimizer: any ``torch.optim`` optimizer, or several that share the parameters among them. SAM, Lightning's,
                Fabric's and Accelerate's wrappers are looked through.
            mode: ``"step"`` restores the anchors after each step: exact for every optimizer. ``"gradient"`` is the paper's
                projection of ``.grad``, right for plain SGD alone. ``"both"``: norms, momentum and second moments see only
                what is allowed; with Adam a little more plastic and a little less stable.
            every: restore the anchors at every so many steps (and before consolidating); what happens between is undone.
            force: allow ``"gradient"`` where it does not protect.
            reset_state: clear the optimizer's state at each consolidation, so that no momentum crosses a task's border.

        Returns:
            A handle whose ``remove()`` takes the hooks off.

        Raises:
            ValueError: ``"gradient"`` with an adaptive optimizer or weight decay; a trainable constrained parameter that
                none of the optimizers has.
            TypeError: no optimizer.
        """
        _checks.choice("mode", mode, ("step", "gradient", "both"))
        if mode == "both" and self._alpha is not None:
            raise ValueError("importance_scale scales each step once: use mode='step' or 'gradient', 'both' would scale it twice")
        self._layers.scan()
        _checks.integer("every", every, low=1)
        given = [optimizer] if not isinstance(optimizer, Sequence) else list(optimizer)
        inner = [_inner(each) for each in given]
        owned = {id(p) for each in inner for group in each.param_groups for p in group["params"]}
        for site in self._sites.values():
            for parameter in (site.weight, getattr(site, "bias", None)):
                if parameter is not None and parameter.requires_grad and id(parameter) not in owned:
                    raise ValueError(
                        f"the optimizer does not have {self._layers.name_of(parameter)!r}, which trains and is constrained; give all "
                        "optimizers as a list, or exclude the parameter, or set its requires_grad to False"
                    )
        if mode == "gradient" and not force:
            for each in inner:
                _refuse_gradient_mode(each)
        if self._keys and reset_state and mode != "step":
            for each in inner:
                each.state.clear()  # a momentum buffer of the last task would leave the subspace
        attachment = _Attachment(self._attached, inner, reset_state=bool(reset_state))
        grads = mode in ("gradient", "both")
        last = inner[-1]
        for each in inner:
            strict = mode == "gradient" and not force
            before = each.register_step_pre_hook(functools.partial(self._before_step, grads=grads, strict=strict))
            attachment.hooks.append(before)
            if mode != "gradient":
                hook = functools.partial(self._after_step, every=every, counts=each is last)
                attachment.hooks.append(each.register_step_post_hook(hook))
            else:
                attachment.hooks.append(each.register_step_post_hook(self._after_gradient_step))
        return attachment

    def _before_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any], *, grads: bool, strict: bool
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if not self._keys:
            return None
        if self._live_norms is not None:
            raise StateError("an old task's norm layers are in place, and training them would be lost: call set_task(None) first")
        if strict:
            _refuse_gradient_mode(optimizer)
        # register_step_pre_hook hands on the optimizer itself among args
        position = next((i for i, value in enumerate(args) if callable(value) and not isinstance(value, Optimizer)), None)
        closure = kwargs.get("closure") if position is None else args[position]
        if closure is None:
            self._clear_grads(grads=grads)
            return None

        def wrapped() -> Any:
            with torch.enable_grad():
                loss = closure()
            self._clear_grads(grads=grads)
            return loss

        if position is None:
            return args, {**kwargs, "closure": wrapped}
        return (*args[:position], wrapped, *args[position + 1 :]), kwargs

    def _clear_grads(self, *, grads: bool) -> None:
        for name in self._held:
            self._layers.parameters[name].grad = None
        if grads:
            self.project_gradients_()

    def _after_step(self, _optimizer: Optimizer, _args: object, _kwargs: object, *, every: int, counts: bool) -> None:
        if not self._keys:
            return
        self._steps += counts
        self._behind = self._steps % every != 0
        if not self._behind:
            self.project_()

    def _after_gradient_step(self, _optimizer: Optimizer, _args: object, _kwargs: object) -> None:
        self._restore_held()

    @torch.no_grad()
    def project_(self) -> None:
        """Restore all anchors and held parameters now, with the least change of the weights."""
        if not self._keys:
            return
        with full_precision(device_of(self._model)):
            for site in self._sites.values():
                site.project_()
            for adapter in self._adapters.values():
                adapter.project_()
        self._restore_held()

    def project_gradients_(self) -> None:
        """Take what would change protected outputs out of all ``.grad`` (the paper's equations 6 and 7)."""
        with full_precision(device_of(self._model)):
            for site in self._sites.values():
                site.project_grad_()

    @torch.no_grad()
    def _restore_held(self) -> None:
        if self._held:
            places = [local(self._layers.parameters[name].detach()) for name in self._held]
            if any(place.device != value.device for place, value in zip(places, self._held.values(), strict=True)):
                self._held = {name: value.to(place.device) for (name, value), place in zip(self._held.items(), places, strict=True)}
            _foreach.copy_(places, list(self._held.values()))

    # ---- consolidation -------------------------------------------------------------------------------------------------

    def consolidate(
        self,
        batches: Iterable[Any] | None = None,
        *,
        max_samples: int | None = 1000,
        forward: Forward | None = None,
        task: Hashable | None = None,
    ) -> ConsolidationReport:
        """End a task: store the directions that its inputs use, and anchor the weights where they are now.

        One forward pass in eval mode without gradient. All or nothing: after an error the memory is as it was. With
        ``torch.distributed`` initialised every process gives its own batches, and the result is that of one process with all.

        Args:
            batches: of the task just learned: tensors, tuples or lists with the input first, or mappings of keyword
                arguments (``"labels"`` left out). None uses what ``collect`` saw.
            max_samples: stop after so many samples (over all processes); None takes all.
            forward: ``forward(model, batch)`` instead.
            task: key of the task; its number by default. A key seen before is no new task for ``set_task``.

        Raises:
            ValueError: no batches, or a layer's inputs are not finite.
            StateError: an old task's norm layers are in place.
        """
        start = time.perf_counter()
        if max_samples is not None:
            _checks.integer("max_samples", max_samples, low=1)
        if self._live_norms is not None:
            raise StateError("an old task's norm layers are in place: call set_task(None) before consolidating")
        self._layers.scan()
        for site in self._layers.sites.values():
            site.follow()
        if self._behind:
            self.project_()
        if batches is not None:
            self._seen = _Seen()
            try:
                self._run(batches, max_samples, forward or _forward)
            except BaseException:
                self._seen = _Seen()
                raise
        seen, self._seen = self._seen, _Seen()
        if sum(_distributed.gather(seen.samples)) == 0:
            raise ValueError("there is nothing to consolidate: batches is empty, or nothing ran inside collect()")
        key = len(self._keys) if task is None else task
        self._agree()
        if not self._layers.sites:
            raise ValueError("no constrained layer: nothing that the model ran is a linear map of its own parameters")
        self._check_others()
        with full_precision(device_of(self._model)):  # bases and anchors keep their width, wherever this is called
            reports = self._commit(seen, len(self._keys))
        self._keys.append(key)
        self._end_of_task(key)
        return ConsolidationReport(key, tuple(reports), self.capacity, time.perf_counter() - start)

    def collect(self) -> AbstractContextManager[None]:
        """Collect during an ordinary forward pass of the user's, for a ``consolidate`` without batches.

        Modes and gradients stay as the user has them: put the model in eval mode for the rows that it will see in use.
        """
        return self._collecting(_Taker(self, self._seen, count_calls=True))

    @contextmanager
    def _collecting(self, taker: Any) -> Generator[None]:
        find = functools.partial(self._layers.find, discover=not isinstance(taker, _Meter))
        with eager(), collecting(find, taker, self._layers.used_otherwise):
            yield

    def _run(self, batches: Iterable[Any], max_samples: int | None, forward: Forward) -> None:
        seen = self._seen
        limit = None if max_samples is None else -(-max_samples // _distributed.world_size())
        with self._collecting(_Taker(self, seen)), eval_mode(self._model), torch.no_grad():
            for batch, size in _limited(batches, limit):
                forward(self._model, batch)
                seen.samples += size

    def _rows_for(self, seen: _Seen, site: LinearSite) -> Rows:
        if site.name not in seen.rows:
            seen.rows[site.name] = Rows(site.wide_basis(), self._threshold_of(site, len(self._keys)))
        if seen.rows[site.name].groups != site.groups:  # query, key and value turned out to differ
            seen.rows[site.name].expand(site.groups)
        return seen.rows[site.name]

    def _agree(self) -> None:
        """Have on every process the layers that any of them saw in use."""
        if _distributed.world_size() > 1:
            for own in _distributed.gather(self._layers.description()):
                for label, kind, weight, bias, groups, shared in own:
                    self._layers.take_up(label, kind, weight, bias, groups, shared=shared)

    def _commit(self, seen: _Seen, index: int) -> list[LayerReport]:
        chosen: list[tuple[Site, Any, LayerReport]] = []
        idle: list[str] = []
        for name, site in self._sites.items():
            threshold = self._last_thresholds[name] = self._threshold_of(site, index)
            limit = self._limit(site.dim)
            if isinstance(site, EmbeddingSite):
                counts = _distributed.sum_(seen.counts.get(name, torch.zeros(site.dim, dtype=torch.float64, device=site.protected.device)))
                rows = int(counts.sum())
                tokens, before, after = site.select(counts, threshold, limit)
                total = max(float(rows), 1.0)
                choice: Any = tokens
                report = LayerReport(
                    name,
                    site.kind,
                    site.dim,
                    1,
                    site.rank,
                    len(tokens),
                    site.rank + len(tokens),
                    before / total,
                    after / total,
                    threshold,
                    rows,
                )
            else:
                held = self._rows_for(seen, site)
                held.merge_processes()
                if not held.finite:
                    raise ValueError(
                        f"{name}: its inputs are not finite, so nothing was stored; look for NaN or infinity in the data or the weights"
                    )
                rows = int(held.count.max())
                choice = held.select(threshold, official=self._official and index == 0, limit=limit, ranks=site.ranks)
                if _distributed.world_size() > 1:  # eigenvectors may differ in the last digits between machines
                    choice = _distributed.from_first(choice.to("cpu")).to(held.total.device)
                report = _layer_report(site, choice, threshold, rows)
            if rows == 0 and self._layers.weight_name(site) not in self._layers.odd:
                idle.append(name)
            elif rows and report.energy_after < threshold - 1e-6 and report.rank >= limit < site.dim:
                self._once.warn(
                    f"{name}: max_rank={self._max_rank} ends at {100 * report.energy_after:.1f} % of the energy, asked {threshold}",
                    key=f"max_rank {name}",
                )
            chosen.append((site, choice, report))
        if idle:
            warnings.warn(
                f"constrained layers that did not run during consolidate, whose weights are not protected for this task: {', '.join(idle)}",
                OutlastWarning,
                stacklevel=3,
            )
        for site, choice, _ in chosen:  # from here on nothing fails
            if isinstance(site, EmbeddingSite):
                site.store(choice)
            else:
                site.store(choice, None if self._alpha is None else _importance(self._alpha, site, choice))
            site.drop_anchor(keep_reference=self._keep_reference)
            if site.rank >= site.dim and self._alpha is None:
                self._once.warn(
                    f"{site.name}: its memory is full ({site.dim} of {site.dim} directions), so the layer is frozen from now on"
                )
        return [report for _, _, report in chosen]

    def _limit(self, dim: int) -> int:
        return min(dim, self._max_rank if isinstance(self._max_rank, int) else max(1, int(self._max_rank * dim)))

    def _end_of_task(self, key: Hashable) -> None:
        if self._other == "freeze":
            bare, odd = self._layers.bare(), self._layers.odd
            for name, calls in odd.items():
                self._once.warn(
                    f"{name} is also used by {', '.join(sorted(calls))}, which is no linear map known here, so it is held as it is",
                    key=f"odd {name}",
                )
            wide = [name for name in bare if self._layers.parameters[name].ndim >= 2 and self._layers.parameters[name].requires_grad]
            recurrent = [name for name in wide if re.search(r"weight_(ih|hh|hr)_l\d", name)]
            if recurrent:
                self._once.warn(f"recurrent weights have no projection here and are held as they are: {', '.join(recurrent)}")
            self._layers.frozen |= {*bare, *odd, *self._layers.biases_of(odd)}
        if self._norm == "freeze":
            self._freeze_norms()
        if self._norm == "per_task":
            self._norm_states[key] = self._norm_values()
        self._hold(self._layers.frozen | self._asked)
        self._adapters.clear()
        for attachment in self._attached.values():
            if attachment.reset_state:
                for optimizer in attachment.optimizers:
                    optimizer.state.clear()

    def _check_others(self) -> None:
        names = [name for name in (*self._layers.bare(), *self._layers.odd) if self._layers.parameters[name].requires_grad]
        if self._other == "error" and names:
            raise ValueError(f"no linear map, and other='error': {', '.join(names)}; exclude them, or use other='freeze' or 'free'")

    def _hold(self, names: Iterable[str]) -> None:
        for name in sorted(names):  # also what does not train now: it may be unfrozen later
            self._held[name] = local(self._layers.parameters[name].detach()).clone()

    def _freeze_norms(self) -> None:
        self._norms_frozen = True
        for layer in self._layers.batch_norms():
            layer.train = functools.partial(_stay_in_eval, layer)
            layer.eval()

    def _thaw_norms(self) -> None:
        if self._norms_frozen:
            for layer in self._layers.batch_norms():
                layer.__dict__.pop("train", None)
                layer.train(self._model.training)
        self._norms_frozen = False

    # ---- tasks ---------------------------------------------------------------------------------------------------------

    def freeze(self, *names: Pattern) -> None:
        """Hold parameters as they are from now on, whatever an optimizer does: heads of finished tasks.

        A zero gradient does not hold a parameter: weight decay and old momentum still move it.

        Raises:
            ValueError: a name that no parameter matches.
        """
        self._layers.scan()
        chosen = self._layers.matching("freeze", names)
        if not self._keys:
            raise StateError("freeze() before the first consolidate() has no task to hold anything for")
        self._asked |= chosen
        self._hold(chosen)

    def set_task(self, task: Hashable | None) -> None:
        """With ``norm="per_task"``: put a finished task's norm layers in place; None goes back to those in training.

        Raises:
            StateError: another ``norm`` policy.
            ValueError: a task that was not consolidated.
        """
        if self._norm != "per_task":
            raise StateError(f"set_task() needs norm='per_task', this memory has norm={self._norm!r}")
        if task is not None and task not in self._norm_states:
            raise ValueError(f"task {task!r} was not consolidated; known: {', '.join(map(repr, self._norm_states))}")
        if task is None:
            if self._live_norms is not None:
                self._put_norms(self._live_norms)
                self._live_norms = None
            return
        if self._live_norms is None:
            self._live_norms = self._norm_values()
        self._put_norms(self._norm_states[task])

    def _norm_values(self) -> dict[str, Tensor]:
        return {
            f"{path}.{name}": whole(value.detach()).clone()
            for path, layer in self._layers.norm_layers.items()
            for name, value in [*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False)]
        }

    @torch.no_grad()
    def _put_norms(self, values: Mapping[str, Tensor]) -> None:
        for path, layer in self._layers.norm_layers.items():
            for name, value in [*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False)]:
                kept = values[f"{path}.{name}"]
                local(value.detach()).copy_(part_of(kept, value) if is_sharded(value) else kept)

    def constrain_adapter(self, layer: str, down: nn.Parameter) -> None:
        """Learn the next task in a low-rank adapter ``W + B A`` of a protected layer (LoRA), B free.

        ``down`` is A, shape ``(r, in_features)``. It is projected now and after each step, so that ``B A x = 0`` on every
        protected x, for every B. Attach the optimizer that trains it. At the end of the task merge the adapter into the
        weight before ``consolidate``, and constrain a fresh one.

        Args:
            layer: name of a linear layer, as in ``ranks``.
            down: the adapter's first matrix.

        Raises:
            ValueError: no such linear layer, or another width.
            StateError: nothing is protected yet.
        """
        site = self._sites.get(layer)
        if not isinstance(site, LinearSite) or site.kind not in ("linear", "addmm"):
            known = [name for name, each in self._sites.items() if isinstance(each, LinearSite) and each.kind in ("linear", "addmm")]
            raise ValueError(f"no linear layer {layer!r}; known: {', '.join(known)}")
        if down.ndim != 2 or down.shape[1] != site.inputs:
            raise ValueError(f"the adapter of {layer!r} must have shape (r, {site.inputs}), got {tuple(down.shape)}")
        if not self._keys:
            raise StateError("nothing is protected yet: consolidate() on the data of the pretrained model first")
        self._layers.scan()
        self._layers.drop(down)  # where it is a Linear inside the model
        self._adapters[layer] = Adapter(site, down)
        self._adapters[layer].project_()

    def release(self) -> None:
        """Forget everything: no layer is constrained, norm layers train again, hooks stay and do nothing."""
        if self._live_norms is not None:
            self._put_norms(self._live_norms)
            self._live_norms = None
        self._thaw_norms()
        self._behind = False
        self._seen = _Seen()
        self._keys.clear()
        self._held.clear()
        self._asked.clear()
        self._norm_states.clear()
        self._adapters.clear()
        for site in self._sites.values():
            site.clear()

    @property
    def _sites(self) -> dict[str, Site]:
        return self._layers.sites

    # ---- measuring -----------------------------------------------------------------------------------------------------

    def interference(self, batches: Iterable[Any], *, max_samples: int | None = 1000, forward: Forward | None = None) -> dict[str, float]:
        """How much each layer's output on old inputs has changed since the last consolidation.

        ``||(W - W_anchor) x|| / ||W x||`` over all rows (the paper's interference activation): 0 where nothing is forgotten.

        Args:
            batches: inputs of old tasks.
            max_samples: stop after so many samples.
            forward: ``forward(model, batch)`` instead of the default of ``consolidate``.

        Raises:
            StateError: nothing consolidated, or built with ``keep_reference=False``.
            ValueError: no batches.
        """
        if not self._keys:
            raise StateError("nothing was consolidated, so there is nothing to compare with")
        if not self._keep_reference:
            raise StateError(
                "interference() compares with the weights at the last consolidation: build the memory with keep_reference=True"
            )
        if max_samples is not None:
            _checks.integer("max_samples", max_samples, low=1)
        meter = _Meter()
        samples = 0
        with self._collecting(meter), eval_mode(self._model), torch.no_grad():
            for batch, size in _limited(batches, max_samples):
                (forward or _forward)(self._model, batch)
                samples += size
        if not samples:
            raise ValueError("batches is empty: there are no inputs to compare on")
        return {name: meter.ratio(name) for name in self._sites if name in meter.sums}

    @property
    def ranks(self) -> dict[str, tuple[int, int]]:
        """Directions held and width of each layer (the largest of a convolution's groups)."""
        return {name: (site.rank, site.dim) for name, site in self._sites.items()}

    @property
    def capacity(self) -> float:
        """Share of the constrained weights' degrees of freedom that is taken."""
        sites = list(self._sites.values())
        total = total_of(sites, "freedom")
        return total_of(sites, "constrained") / total if total else 0.0

    @property
    def nbytes(self) -> int:
        """Bytes held beside the model, references included."""
        held = [*self._held.values(), *(value for state in self._norm_states.values() for value in state.values())]
        return sum(site.nbytes for site in self._sites.values()) + sum(value.numel() * value.element_size() for value in held)

    @property
    def tasks(self) -> tuple[Hashable, ...]:
        """Keys of the consolidated tasks, in order."""
        return tuple(self._keys)

    def __repr__(self) -> str:
        layers = ", ".join(f"{name} {rank}/{dim}" for name, (rank, dim) in self.ranks.items())
        held = sorted(self._layers.frozen | self._asked)
        frozen = f"; held after the first task: {', '.join(held)}" if held else ""
        return f"GradientProjectionMemory({len(self._keys)} tasks; {layers}{frozen})"

    # ---- state ---------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything that a run needs to go on: tensors and plain values only. Under FSDP2 all processes must call it."""
        return {
            "version": 1,
            "tasks": list(self._keys),
            "thresholds": dict(self._last_thresholds),
            "steps": self._steps,
            "behind": self._behind,
            "layers": {
                label: {"parameter": weight, "bias": bias, **self._sites[label].state_dict()}
                for label, _, weight, bias, _, _ in self._layers.description()
            },
            "adapters": {layer: self._layers.name_of(adapter.parameter) for layer, adapter in self._adapters.items()},
            "held": {name: gathered(value, self._layers.parameters[name]) for name, value in self._held.items()},
            "frozen": sorted(self._layers.frozen),
            "asked": sorted(self._asked),
            "norm_states": [(key, dict(values)) for key, values in self._norm_states.items()],
            "live_norms": self._live_norms,
            "norms_frozen": self._norms_frozen,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the state of a memory on a model with the same layers; attach the optimizer as before.

        An adapter outside the model has no name in the state: a warning says that ``constrain_adapter`` must be called again.

        Raises:
            ValueError: layers that differ in name, kind or shape, each named.
        """
        layers: Mapping[str, Any] = state["layers"]
        self._layers.scan()
        adapters: Mapping[str, str | None] = state["adapters"]
        for name in adapters.values():
            if name in self._layers.parameters:
                self._layers.drop(self._layers.parameters[name])
        for name, entry in layers.items():  # also what was a bare parameter until it was seen in use
            self._layers.take_up(name, entry["kind"], entry["parameter"], entry["bias"], entry.get("groups", 1), shared=True)
            site = self._sites.get(name)
            if isinstance(site, LinearSite) and not self._keys:
                self._layers.have_bias(site, entry["bias"])
        missing = [name for name in layers if name not in self._sites]
        extra = [name for name in self._sites if name not in layers]
        if missing or extra:
            raise ValueError(
                f"the state does not fit the model: layers that the model lacks: {', '.join(missing) or 'none'}; "
                f"layers that the state lacks: {', '.join(extra) or 'none'}"
            )
        for name, site in self._sites.items():
            entry = layers[name]
            shape, dim = list(site.weight.shape), site.dim
            if entry["kind"] != site.kind or list(entry["shape"]) != shape or entry.get("dim", dim) != dim:
                raise ValueError(
                    f"{name}: the state has a {entry['kind']} weight of shape {tuple(entry['shape'])} (rows of {entry.get('dim', dim)}), "
                    f"the model a {site.kind} weight of shape {tuple(shape)} (rows of {dim})"
                )
        unknown = [name for name in [*state["held"], *state["frozen"]] if name not in self._layers.parameters]
        if unknown:
            raise ValueError(f"the state holds parameters that the model lacks: {', '.join(unknown)}")
        for name, site in self._sites.items():
            site.load_state_dict(layers[name])
        self._keys = list(state["tasks"])
        self._last_thresholds = dict(state["thresholds"])
        self._steps = int(state["steps"])
        self._behind = bool(state["behind"])
        self._layers.frozen = set(state["frozen"])
        self._asked = set(state["asked"])
        self._held = {}
        for name, value in state["held"].items():
            parameter = self._layers.parameters[name]
            self._held[name] = part_of(value.to(local(parameter).device, parameter.dtype), parameter).clone()
        self._norm_states = {key: dict(values) for key, values in state["norm_states"]}
        self._live_norms = None if state["live_norms"] is None else dict(state["live_norms"])
        if state["norms_frozen"]:
            self._freeze_norms()
        else:
            self._thaw_norms()
        self._adapters = {}
        for layer, name in adapters.items():
            if name is None:
                self._once.warn(f"the adapter of {layer!r} is outside the model and is not constrained now: call constrain_adapter() again")
                continue
            site = self._sites[layer]
            assert isinstance(site, LinearSite)
            self._adapters[layer] = Adapter(site, self._layers.parameters[name])


class _Taker:
    """Puts what the collector sees into the memory's accumulators."""

    def __init__(self, memory: GradientProjectionMemory, seen: _Seen, *, count_calls: bool = False) -> None:
        self._memory = memory
        self._seen = seen
        self._count = count_calls

    def rows(self, site: LinearSite, rows: Tensor, groups: slice) -> None:
        self._seen.samples += self._count
        with full_precision(rows.device):
            self._memory._rows_for(self._seen, site).add(rows, groups)

    def tokens(self, site: EmbeddingSite, tokens: Tensor) -> None:
        self._seen.samples += self._count
        flat = tokens.reshape(-1).to(site.protected.device)
        counts = torch.bincount(flat, minlength=site.dim).double()
        held = self._seen.counts.get(site.name)
        self._seen.counts[site.name] = counts if held is None else held + counts


class _Meter:
    """Sums up what changed on the rows that the collector sees."""

    def __init__(self) -> None:
        self.sums: dict[str, tuple[Tensor, Tensor]] = {}

    def rows(self, site: LinearSite, rows: Tensor, groups: slice) -> None:
        with full_precision(rows.device):
            self._add(site.name, site.interference(rows, groups))

    def tokens(self, site: EmbeddingSite, tokens: Tensor) -> None:
        self._add(site.name, site.interference(tokens))

    def _add(self, name: str, found: tuple[Tensor, Tensor]) -> None:
        old = self.sums.get(name)
        self.sums[name] = found if old is None else (old[0] + found[0], old[1] + found[1])

    def ratio(self, name: str) -> float:
        changed, whole_output = (float(value) for value in self.sums[name])
        return (changed / whole_output) ** 0.5 if whole_output else 0.0


def _stay_in_eval(layer: nn.Module, _mode: bool = True) -> nn.Module:
    """What ``train()`` does on a frozen norm layer."""
    layer.training = False
    return layer


def _forward(model: nn.Module, batch: Any) -> Any:
    if isinstance(batch, Mapping):
        table = cast("Mapping[str, Any]", batch)
        batch = {name: value for name, value in table.items() if name != "labels"}
    return call_with(model, batch)


def _limited(batches: Iterable[Any], limit: int | None) -> Iterator[tuple[Any, int]]:
    """Batches with their numbers of rows, the last one cut so that no more than ``limit`` come in all."""
    left = limit
    for batch in batches:
        rows = rows_of(batch)
        size = 1 if rows is None else rows
        if left is not None and size > left:
            batch, size = some_rows(batch, slice(left)), left
        if size:
            yield batch, size
        if left is not None:
            left -= size
            if left == 0:
                return


def _check_threshold(name: str, value: object) -> float:
    return _checks.real(name, value, low=0.0, high=1.0, low_open=True)


def _check_max_rank(value: object) -> float | int:
    if isinstance(value, int) and not isinstance(value, bool):
        return _checks.integer("max_rank", value, low=1)
    return _checks.real("max_rank", value, low=0.0, high=1.0, low_open=True)


def _inner(optimizer: Any) -> Optimizer:
    """The optimizer that makes the step, below wrappers."""
    seen: set[int] = set()
    while id(optimizer) not in seen:
        seen.add(id(optimizer))
        for name in ("base", "optimizer", "_optimizer"):
            below = getattr(optimizer, name, None)
            if isinstance(below, Optimizer) and below is not optimizer:
                optimizer = below
                break
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"attach() needs a torch.optim.Optimizer (or a sequence of such), got {type(optimizer).__name__}")
    return optimizer


def _refuse_gradient_mode(optimizer: Optimizer) -> None:
    if not isinstance(optimizer, torch.optim.SGD):
        raise ValueError(
            f"mode='gradient' does not protect with {type(optimizer).__name__}: it rescales the projected gradient element by element, "
            "and the step leaves the allowed subspace. Use mode='step' (or 'both'); force=True overrides"
        )
    if any(group.get("weight_decay", 0.0) for group in optimizer.param_groups):
        raise ValueError(
            "mode='gradient' does not protect with weight decay: decay moves the weights inside the protected subspace. Use mode='step' "
            "(or 'both'); force=True overrides"
        )


def _layer_report(site: LinearSite, choice: Any, threshold: float, rows: int) -> LayerReport:
    added: list[int] = choice.added.tolist()
    seen = choice.total > 0
    share = lambda energy: float((energy[seen] / choice.total[seen]).mean()) if bool(seen.any()) else 0.0  # noqa: E731
    after = max(old + new for old, new in zip(site.ranks, added, strict=True))
    return LayerReport(
        site.name,
        site.kind,
        site.dim,
        site.groups,
        site.rank,
        after - site.rank,
        after,
        share(choice.before),
        share(choice.after),
        threshold,
        rows,
    )


def _importance(alpha: float, site: LinearSite, choice: Any) -> tuple[Tensor, Tensor]:
    """SGP's importances of old and new directions: (alpha + 1) s / (alpha s + max s), old ones added to what they had."""
    both = torch.cat([choice.old_strength, choice.strength], 1)
    largest = both.amax(1, keepdim=True).clamp(min=1e-300) if both.shape[1] else both.new_ones(len(both), 1)
    fresh = (alpha + 1.0) * both / (alpha * both + largest)
    old = choice.old_strength.shape[1]
    before = torch.zeros_like(fresh[:, :old]) if site.scale is None else site.scale.double()
    return (before + fresh[:, :old]).clamp(max=1.0), fresh[:, old:].clamp(max=1.0)
