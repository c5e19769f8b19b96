"""Transitions: what arrives of each environment, where it stands in its episode, and the batches that are made of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from outlast.adapt._auxiliary import AuxTask, InverseDynamics, RandomCrop, as_floats, prepared
from outlast.adapt._crop_sharing import CropSharing
from outlast.errors import StateError

Rows = tuple[Tensor, Tensor, Tensor]
"""Observations, actions, next observations."""
_USUAL = InverseDynamics.predict, InverseDynamics.loss, InverseDynamics.draw


@dataclass(frozen=True)
class Arrived:
    """One transition of each of ``n`` environments."""

    before: Tensor
    action: Tensor
    after: Tensor
    ends: Tensor  # whether the episode ended there
    counted: Tensor  # whether the pair is one


class Episodes:
    """How far each environment is in its episode."""

    def __init__(self) -> None:
        self.steps: Tensor | None = None
        self.ended: Tensor | None = None

    def clear(self) -> None:
        """New episodes everywhere, of any number of environments."""
        self.steps = self.ended = None

    def begin(self, mask: Any) -> bool:
        """New episodes everywhere, or in the environments of a mask; whether it was everywhere.

        Raises:
            ValueError: a mask for another number of environments.
        """
        chosen = None if mask is None else torch.as_tensor(mask, dtype=torch.bool).flatten()
        known = None if self.ended is None else len(self.ended)
        if chosen is not None and (not len(chosen) or known not in (None, len(chosen))):
            raise ValueError(f"mask must have one entry for each of {known or 'the'} environments, got {len(chosen)}")
        if chosen is None or bool(chosen.all()):
            self.clear()
            return True
        if self.steps is not None and self.ended is not None:
            self.steps[chosen], self.ended[chosen] = 0, False
        return False

    def advance(self, arrived: Arrived) -> Tensor:
        """The step numbers of these transitions, ``(n,)``; the counters go on.

        Raises:
            ValueError: another number of environments than before.
            StateError: an episode that has ended goes on.
        """
        n = len(arrived.before)
        if self.steps is None or self.ended is None:
            self.steps, self.ended = torch.zeros(n, dtype=torch.long), torch.zeros(n, dtype=torch.bool)
        if len(self.ended) != n:
            raise ValueError(f"the episodes of {len(self.ended)} environments go on, got {n}: call begin_episode() first")
        self.check(arrived.counted)
        steps = self.steps.clone()
        self.steps += arrived.counted
        self.ended |= arrived.ends
        return steps

    def check(self, counted: Tensor) -> None:
        """Refuse a pair whose episode has ended before it."""
        if self.ended is not None and bool((self.ended & counted).any()):
            raise StateError("this pair crosses an episode boundary: the episode has ended, call begin_episode() before the next one")


class Batches:
    """Batches of the newest transitions, filled up from a buffer of recent ones, with their crops.

    Args:
        size: transitions in a batch.
        buffer: recent transitions that are kept; 0 for batches of the newest alone.
        newest: copies of the newest in a batch that a buffer fills up.
        augment: crops, as of ``PolicyAdapter``.
        generator: of all draws.
    """

    def __init__(self, size: int, *, buffer: int, newest: int, augment: Callable[..., Tensor] | None, generator: torch.Generator) -> None:
        self.size, self.buffer, self.newest, self._augment = size, buffer, newest, augment
        self.generator = generator
        self.recent: list[Rows] = []
        self._turn = 0  # where the next batch begins among more environments than it has copies
        self._sharing: CropSharing | Literal[False] | None = None  # how crops share convolutions, once it is known

    def remember(self, rows: Rows) -> None:
        """Put transitions into the buffer, which forgets its oldest ones."""
        if self.buffer:
            obs, action, next_obs = rows
            kept = [(obs[row].clone(), action[row].clone(), next_obs[row].clone()) for row in range(len(obs))]
            self.recent = [*self.recent, *kept][-self.buffer :]

    def forget(self) -> None:
        """Empty the buffer."""
        self.recent = []

    def reset(self) -> None:
        """Back to the start, draws excepted."""
        self.forget()
        self._turn = 0

    def rows_of(self, aux: AuxTask, n: int) -> int:
        """Transitions in a batch for ``n`` environments: without crops and draws, equal copies have the gradient of one."""
        equal = self._augment is None and not self.buffer and type(aux).draw is AuxTask.draw
        return min(self.size, n) if equal else self.size

    def drawn(self, aux: AuxTask, rows: Rows, width: torch.dtype) -> Rows:
        """A batch for the newest transitions with their crops, of a type of numbers, and whatever else the task draws."""
        (before, done, after), _ = self._rows(aux, *rows)
        before, after = (x.to(width) for x in prepared(aux, before, after, self._augment, self.generator))
        return aux.draw(before, done, after, self.generator)

    def loss(self, encoder: nn.Module, aux: AuxTask, rows: Rows, width: torch.dtype) -> Tensor:
        """The loss of a batch drawn for these transitions; crops of one frame share their convolutions where that is worth it."""
        crop = cast("RandomCrop", self._augment)
        usual = isinstance(aux, InverseDynamics) and (type(aux).predict, type(aux).loss, type(aux).draw) == _USUAL
        if not usual or type(crop) is not RandomCrop or aux.same_crop:
            return aux.compare(encoder, *self.drawn(aux, rows, width))
        if self._sharing is None:
            self._sharing = CropSharing.of(encoder, crop) or False
        if self._sharing is False or not self._sharing.possible(self.size):
            return aux.compare(encoder, *self.drawn(aux, rows, width))
        (before, done, after), sources = self._rows(aux, *rows)
        places = [crop.places(images, self.generator) for images in (before, after)]
        tops, lefts = (torch.cat([place[side] for place in places]) for side in range(2))
        groups = self._sharing.groups(torch.cat([sources, sources + int(sources.max()) + 1]), tops, lefts)
        if not self._sharing.worth(groups):
            images = (as_floats(crop.at(x, *place)).to(width) for x, place in zip((before, after), places, strict=True))
            first, second = images
            return aux.compare(encoder, first, done, second)
        features = self._sharing(torch.cat([before, after]), tops, lefts, groups, width)
        empty = features.new_empty(len(done), 0)  # the task asks for the features of both, once, and looks at nothing else
        return aux.compare(lambda _: features, empty, done, empty)

    def _rows(self, aux: AuxTask, obs: Tensor, action: Tensor, next_obs: Tensor) -> tuple[Rows, Tensor]:
        """Copies of the newest transitions, and older ones from the buffer; and numbers that tell copies of one from another."""
        n = len(obs)
        copies = self.newest if self.buffer else self.rows_of(aux, n)
        index = (torch.arange(copies, device=obs.device) + self._turn) % n
        self._turn = (self._turn + copies) % n if n > copies else 0  # more environments than copies take turns
        sources = index.cpu()
        # One frame's copies are views: only their crops are copied.
        first = tuple(side.expand(copies, *side.shape[1:]) if n == 1 else side[index] for side in (obs, action, next_obs))
        rest = self.size - copies if self.buffer else 0
        if not rest:
            return cast("Rows", first), sources
        drawn = torch.randint(len(self.recent), (rest,), generator=self.generator).tolist()
        old = [torch.stack([self.recent[place][side] for place in drawn]) for side in range(3)]
        both = tuple(torch.cat(pair) for pair in zip(first, old, strict=True))
        return cast("Rows", both), torch.cat([sources, n + torch.tensor(drawn)])

    # ---- state ----------------------------------------------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_sharing": None}

    def apply(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Move the buffer as ``nn.Module.to`` does."""
        self.recent = [cast("Rows", tuple(fn(part) for part in entry)) for entry in self.recent]

    def get_state(self) -> dict[str, Any]:
        """Tensors and plain values."""
        return {"generator": self.generator.get_state(), "recent": [list(entry) for entry in self.recent], "turn": self._turn}

    def set_state(self, state: dict[str, Any], device: torch.device) -> None:
        """What ``get_state`` gave."""
        self.generator.set_state(state["generator"])
        self.recent = [cast("Rows", tuple(part.to(device, copy=True) for part in entry)) for entry in state["recent"]]
        self._turn = int(state["turn"])
