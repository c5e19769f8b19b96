"""A small scene for policies that see pixels: move a disc onto another one."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import numpy.typing as npt

from outlast._core._checks import integer
from outlast.rl._shifts import PLAIN, SHIFTS, Colours, Frame, Look, Shift, disc

Observation = npt.NDArray[np.uint8]

_USUAL = Colours(
    background=np.array([0.15, 0.25, 0.35], np.float32),
    agent=np.array([0.9, 0.2, 0.2], np.float32),
    target=np.array([0.2, 0.9, 0.2], np.float32),
)
_START = 0.8  # both begin in the square [-0.8, 0.8]^2
_REACH = 0.15  # how far an action of 1 moves the agent
_RADIUS = 2.0  # of both discs, in pixels
_BORDER = 5  # pixels that centres keep from the edge


class PixelReach(gymnasium.Env[Observation, npt.NDArray[np.float32]]):
    """Move the agent's disc to the target's, in the square [-1, 1]^2, from images.

    An action in [-1, 1]^2 moves the agent by 0.15 times itself; positions are cut at the border. The reward of a step is
    ``1 - min(distance, 2) / 2``. Agent and target begin in the square [-0.8, 0.8]^2; the target stays. Episodes end by their time limit,
    as ``truncated``. Everything an episode draws, its look included, is a function of the seed given to ``reset``, so methods can be
    compared on the same episodes.

    A uniformly random policy gets about 27 of 50, ``expert`` 49.

    Args:
        size: pixels a side.
        shift: how episodes look: None for the training scene, a name (``"color_easy"``, ``"color_hard"``, ``"distract"``, ``"texture"``,
            ``"gain"``), or an object such as ``ColorShift`` or ``VideoBackground``.
        seed: of the episodes where ``reset`` is given none.
        steps: time limit.
        stack: frames in an observation, the newest last; the first observation repeats the first frame.

    Attributes:
        observation_space: ``(3 stack, size, size)``, uint8.
        action_space: ``(2,)``, float32 in [-1, 1].
        stack: as given.

    Raises:
        TypeError, ValueError: an argument of the wrong type or out of range, an unknown shift.
    """

    metadata: dict[str, Any] = {"render_modes": ["rgb_array"], "render_fps": 20}  # noqa: RUF012  as gymnasium declares it

    def __init__(
        self,
        size: int = 28,
        shift: str | Shift | None = None,
        seed: int | None = None,
        *,
        steps: int = 50,
        stack: int = 3,
        render_mode: str | None = None,
    ) -> None:
        integer("size", size, low=12)
        integer("steps", steps, low=1)
        integer("stack", stack, low=1)
        if isinstance(shift, str):
            if shift not in SHIFTS:
                raise ValueError(f"shift must be one of {', '.join(map(repr, SHIFTS))} or an object that draws looks, got {shift!r}")
            shift = SHIFTS[shift]
        if shift is not None and not callable(getattr(shift, "draw", None)):
            raise TypeError(f"shift must be a name or have a method draw(rng, size), got {type(shift).__name__}")
        if render_mode not in (None, "rgb_array"):
            raise ValueError(f"render_mode must be None or 'rgb_array', got {render_mode!r}")
        self.observation_space = gymnasium.spaces.Box(0, 255, (3 * stack, size, size), np.uint8)
        self.action_space = gymnasium.spaces.Box(-1.0, 1.0, (2,), np.float32)
        self.render_mode = render_mode
        self._size, self._shift, self._steps = size, shift, steps
        self.stack = stack
        self._seed = seed
        self._look: Look = PLAIN
        self._colours = _USUAL
        self._agent, self._target = np.zeros(2), np.zeros(2)
        self._done = 0
        self._frames = np.zeros((3 * stack, size, size), np.uint8)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Observation, dict[str, Any]]:
        """Begin an episode.

        Args:
            seed: of everything that it draws.
            options: ``{"places": seed}`` draws agent and target from another seed, and leaves the look as it is.
        """
        if seed is None and self._seed is not None:
            seed, self._seed = self._seed, None  # of the first episode; later ones go on from there
        super().reset(seed=seed)
        self._agent, self._target = self.np_random.uniform(-_START, _START, (2, 2))
        self._look = PLAIN if self._shift is None else self._shift.draw(self.np_random, self._size)
        self._colours = self._look.colours(_USUAL)
        if options is not None and "places" in options:
            self._agent, self._target = np.random.default_rng(options["places"]).uniform(-_START, _START, (2, 2))
        self._done = 0
        self._frames = np.tile(self._draw(), (self.stack, 1, 1))
        return self._frames.copy(), self._info()

    def step(self, action: npt.NDArray[np.float32]) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """Move, and look.

        Raises:
            ValueError: an action of another length, or NaN. Values outside [-1, 1] are cut.
        """
        move = np.asarray(action, np.float64)
        if move.shape != (2,) or not np.isfinite(move).all():
            raise ValueError(f"an action is two finite numbers in [-1, 1], got {action!r}")
        self._agent = np.clip(self._agent + _REACH * np.clip(move, -1.0, 1.0), -1.0, 1.0)
        self._done += 1
        self._frames[:-3] = self._frames[3:]
        self._frames[-3:] = self._draw()
        reward = 1.0 - min(self.distance, 2.0) / 2.0
        return self._frames.copy(), reward, False, self._done >= self._steps, self._info()

    @property
    def distance(self) -> float:
        """From the agent to the target."""
        return float(np.hypot(*(self._agent - self._target)))

    def expert(self) -> npt.NDArray[np.float32]:
        """The action that goes straight to the target."""
        return np.clip((self._target - self._agent) / _REACH, -1.0, 1.0).astype(np.float32)

    def render(self) -> Any:
        """The newest frame, ``(size, size, 3)``."""
        return self._frames[-3:].transpose(1, 2, 0).copy()

    def _info(self) -> dict[str, Any]:
        return {"agent": self._agent.copy(), "target": self._target.copy()}

    def _draw(self) -> Observation:
        size = self._size
        frame: Frame = np.empty((3, size, size), np.float32)
        frame[:] = self._colours.background[:, None, None]
        self._look.behind(frame, self._done)
        for place, colour in ((self._target, self._colours.target), (self._agent, self._colours.agent)):  # the agent on top
            x, y = (place / 2.0 + 0.5) * (size - 2 * _BORDER - 1) + _BORDER
            disc(frame, float(y), float(x), _RADIUS, colour)
        self._look.over(frame, self._done)
        return (np.clip(frame, 0.0, 1.0) * 255.0).astype(np.uint8)
