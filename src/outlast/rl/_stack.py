"""The last frames as one observation, and a replay memory that keeps each frame once."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from outlast._core._checks import integer
from outlast.errors import StateError

Pixels = npt.NDArray[np.uint8]
_TRIES = 8


class FrameStack(gymnasium.Wrapper[Pixels, Any, Pixels, Any]):
    """Observations ``(k channels, height, width)``: the last ``k`` frames, the newest last; the first observation repeats its frame.

    Args:
        env: observations ``(channels, height, width)``, uint8.
        k: frames.

    Attributes:
        k: as given.

    Raises:
        ValueError: observations of another form, or fewer than one frame.
    """

    def __init__(self, env: gymnasium.Env[Pixels, Any], k: int = 3) -> None:
        super().__init__(env)
        space: Any = env.observation_space
        if not isinstance(space, gymnasium.spaces.Box) or len(space.shape) != 3 or space.dtype != np.uint8:
            raise ValueError(f"FrameStack takes images (channels, height, width) of uint8, got the space {space}")
        if space.shape[2] in (1, 3, 4) and space.shape[0] > 4:
            raise ValueError(f"observations {space.shape} have their channels last: transpose them to (channels, height, width)")
        self.k = integer("k", k, low=1)
        self._channels = int(space.shape[0])
        self.observation_space = gymnasium.spaces.Box(np.tile(space.low, (k, 1, 1)), np.tile(space.high, (k, 1, 1)), dtype=np.uint8)
        self._frames: Pixels = np.zeros((k * self._channels, *space.shape[1:]), np.uint8)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Pixels, dict[str, Any]]:
        """Begin an episode."""
        frame, info = self.env.reset(seed=seed, options=options)
        self._frames = np.tile(frame, (self.k, 1, 1))
        return self._frames.copy(), info

    def step(self, action: Any) -> tuple[Pixels, float, bool, bool, dict[str, Any]]:
        """Go on by one frame."""
        frame, reward, terminated, truncated, info = self.env.step(action)
        self._frames[: -self._channels] = self._frames[self._channels :]
        self._frames[-self._channels :] = frame
        return self._frames.copy(), float(reward), terminated, truncated, info


class FrameReplay:
    """Transitions of stacked observations, of which every frame is kept once.

    The oldest frames make room. A stack never reaches over the beginning of its episode: there the first frame is repeated, as
    ``FrameStack`` does.

    Args:
        capacity: frames.
        frame_shape: ``(channels, height, width)`` of one frame.
        action_shape: of one action.
        stack: frames of an observation.

    Raises:
        ValueError: too small to hold a transition.
    """

    def __init__(self, capacity: int, frame_shape: tuple[int, int, int], action_shape: tuple[int, ...], stack: int = 3) -> None:
        integer("stack", stack, low=1)
        integer("capacity", capacity, low=stack + 1)
        self._capacity, self._stack = capacity, stack
        self._frames = np.zeros((capacity, *frame_shape), np.uint8)
        self._actions = np.zeros((capacity, *action_shape), np.float32)
        self._rewards = np.zeros(capacity, np.float32)
        self._ended = np.zeros(capacity, np.bool_)
        self._goes_on = np.zeros(capacity, np.bool_)  # the next frame is of the same episode
        self._first = np.zeros(capacity, np.int64)  # number of the episode's first frame
        self._count = 0
        self._over = False

    def __len__(self) -> int:
        """Frames that are held."""
        return min(self._count, self._capacity)

    @property
    def nbytes(self) -> int:
        """Memory."""
        parts = (self._frames, self._actions, self._rewards, self._ended, self._goes_on, self._first)
        return sum(part.nbytes for part in parts)

    def begin(self, frame: Pixels) -> None:
        """The first frame of an episode."""
        self._over = False
        self._put(frame, self._count)

    def add(self, action: npt.NDArray[np.float32], reward: float, frame: Pixels, *, terminated: bool) -> None:
        """What was done at the newest frame, and the frame that followed.

        Args:
            action: as executed.
            reward: for it.
            frame: the next one.
            terminated: whether the episode ended there for good; a time limit is no such end.

        Raises:
            StateError: no episode has begun, or the last one terminated.
        """
        if self._count == 0:
            raise StateError("add() before begin(): the replay has no frame that the action belongs to")
        if self._over:
            raise StateError("add() after the episode terminated: give the next one's first frame to begin()")
        self._over = terminated
        place = (self._count - 1) % self._capacity
        self._actions[place], self._rewards[place], self._ended[place], self._goes_on[place] = action, reward, terminated, True
        self._put(frame, int(self._first[place]))

    def _put(self, frame: Pixels, first: int) -> None:
        place = self._count % self._capacity
        self._frames[place], self._first[place], self._goes_on[place] = frame, first, False
        self._count += 1

    def _usable(self, numbers: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """Whether the transition at a frame, and all frames that its stacks show, are held."""
        oldest = np.maximum(numbers - self._stack + 1, self._first[numbers % self._capacity])
        return self._goes_on[numbers % self._capacity] & (oldest >= self._count - len(self))

    def sample(self, n: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Random transitions, with replacement.

        Returns:
            Observations ``(n, stack channels, height, width)`` in uint8, actions, rewards ``(n,)``, next observations, and whether the
            episode terminated there ``(n,)``, bool.

        Raises:
            StateError: there is no whole transition.
        """
        low = self._count - len(self)
        parts: list[npt.NDArray[np.int64]] = []
        for _ in range(_TRIES):  # nearly every frame is the beginning of a transition
            drawn = low + torch.randint(len(self), (n,), generator=generator).numpy() if len(self) else np.zeros(0, np.int64)
            parts.append(drawn[self._usable(drawn)])
            if sum(map(len, parts)) >= n:
                break
        chosen = np.concatenate(parts)[:n]
        if len(chosen) < n:
            everything = np.arange(low, self._count)
            usable = everything[self._usable(everything)]
            if len(usable) == 0:
                raise StateError("the replay holds no transition yet")
            chosen = usable[torch.randint(len(usable), (n,), generator=generator).numpy()]
        place = chosen % self._capacity
        return (
            torch.from_numpy(self._stacked(chosen)),
            torch.from_numpy(self._actions[place]),
            torch.from_numpy(self._rewards[place]),
            torch.from_numpy(self._stacked(chosen + 1)),
            torch.from_numpy(self._ended[place]),
        )

    def _stacked(self, numbers: npt.NDArray[np.int64]) -> Pixels:
        back = np.arange(self._stack - 1, -1, -1)
        first = self._first[numbers % self._capacity]
        wanted = np.maximum(numbers[:, None] - back, first[:, None])
        found = self._frames[wanted % self._capacity]
        return found.reshape(len(numbers), -1, *found.shape[3:])
