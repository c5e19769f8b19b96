"""Tasks of the DeepMind Control Suite as images, drawn fast enough for two cores."""

from __future__ import annotations

import os
import sys
import weakref
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import gymnasium
import numpy as np
import numpy.typing as npt

from outlast._core._checks import integer, real
from outlast._core._extras import require
from outlast.errors import MissingExtraError

Pixels = npt.NDArray[np.uint8]
_SLOW = ("mjRND_SHADOW", "mjRND_REFLECTION", "mjRND_SKYBOX")  # passes of the renderer that cost most of its time in software
_CHANNELS = 3


class ControlEnv(gymnasium.Env[Pixels, npt.NDArray[np.float32]]):
    """A task of the DeepMind Control Suite (extra ``rl``) that is seen as images; ``FrameStack`` puts some in one observation.

    Shadows, reflections, sky and multisampling are left out, which on a machine without a graphics card is many times faster and leaves the
    geometry alone. Actions in [-1, 1] are scaled to the task's own range. Episodes end by the task's time limit, as ``truncated``, unless
    the task itself ends them.

    Args:
        domain: such as ``"cartpole"``.
        task: such as ``"swingup"``.
        size: pixels a side.
        repeat: how often an action is repeated; rewards are added.
        camera: number of the camera.
        color_shift: how far each material's red, green and blue move at most, drawn for each episode; 0 for the task's own colours.
        seed: of the episodes where ``reset`` is given none.
        fast: False draws shadows, reflections and sky, too.

    Attributes:
        observation_space: ``(3, size, size)``, uint8.
        action_space: in [-1, 1], float32.

    Raises:
        ValueError: an unknown task, or settings out of range.
        MissingExtraError: dm_control is not installed, or MuJoCo finds no OpenGL to draw with (see ``MUJOCO_GL``).
    """

    metadata: dict[str, Any] = {"render_modes": ["rgb_array"], "render_fps": 30}  # noqa: RUF012  as gymnasium declares it

    def __init__(
        self,
        domain: str = "cartpole",
        task: str = "swingup",
        size: int = 84,
        *,
        repeat: int = 1,
        camera: int = 0,
        color_shift: float = 0.0,
        seed: int | None = None,
        fast: bool = True,
        render_mode: str | None = None,
    ) -> None:
        integer("size", size, low=8)
        integer("repeat", repeat, low=1)
        real("color_shift", color_shift, low=0.0, high=1.0)
        if render_mode not in (None, "rgb_array"):
            raise ValueError(f"render_mode must be None or 'rgb_array', got {render_mode!r}")
        suite, self._mujoco = _libraries()
        if (domain, task) not in suite.ALL_TASKS:
            raise ValueError(f"the suite has no task ({domain!r}, {task!r}); those of dm_control.suite.ALL_TASKS are there")
        self._env = suite.load(domain, task, task_kwargs={"random": np.random.RandomState(0)})
        self._spec = self._env.action_spec()
        self.observation_space = gymnasium.spaces.Box(0, 255, (_CHANNELS, size, size), np.uint8)
        self.action_space = gymnasium.spaces.Box(-1.0, 1.0, self._spec.shape, np.float32)
        self.render_mode = render_mode
        self._repeat, self._camera, self._strength, self._seed, self._fast = repeat, camera, color_shift, seed, fast
        self._model, self._data = self._env.physics.model.ptr, self._env.physics.data.ptr
        if fast:
            self._model.vis.quality.offsamples = 0
        view = self._model.vis.global_
        view.offwidth, view.offheight = max(view.offwidth, size), max(view.offheight, size)
        self._colours = self._model.mat_rgba.copy(), self._model.geom_rgba.copy()
        try:
            self._renderer = self._mujoco.Renderer(self._model, size, size)
        except Exception as error:  # each way of reaching OpenGL fails with errors of its own
            raise _no_gl(error) from error
        self._close = weakref.finalize(self, self._renderer.close)  # before the interpreter takes OpenGL away

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Pixels, dict[str, Any]]:
        """Begin an episode, a function of the seed alone: state and colours."""
        if seed is None and self._seed is not None:
            seed, self._seed = self._seed, None
        super().reset(seed=seed)
        self._env.task.random.seed(int(self.np_random.integers(2**31)))
        for colours, usual in zip((self._model.mat_rgba, self._model.geom_rgba), self._colours, strict=True):
            colours[:] = usual
            if self._strength:
                colours[:, :3] = np.clip(
                    usual[:, :3] + self.np_random.uniform(-self._strength, self._strength, usual[:, :3].shape), 0.0, 1.0
                )
        self._env.reset()
        return self._draw(), {}

    def step(self, action: npt.NDArray[np.float32]) -> tuple[Pixels, float, bool, bool, dict[str, Any]]:
        """Repeat an action and look.

        Raises:
            ValueError: an action of another length, or NaN. Values outside [-1, 1] are cut.
        """
        move = np.asarray(action, np.float64)
        if move.shape != self._spec.shape or not np.isfinite(move).all():
            raise ValueError(f"an action is {self._spec.shape[0]} finite numbers in [-1, 1], got {action!r}")
        low, high = self._spec.minimum, self._spec.maximum
        scaled = low + 0.5 * (np.clip(move, -1.0, 1.0) + 1.0) * (high - low)
        reward, terminated, truncated = 0.0, False, False
        for _ in range(self._repeat):
            found = self._env.step(scaled)
            reward += float(found.reward or 0.0)
            if found.last():
                terminated, truncated = found.discount == 0.0, found.discount != 0.0
                break
        return self._draw(), reward, terminated, truncated, {}

    def render(self) -> Any:
        """The newest frame, ``(size, size, 3)``."""
        return self._draw().transpose(1, 2, 0)

    def close(self) -> None:
        """Give back the renderer."""
        self._close()

    def _draw(self) -> Pixels:
        self._renderer.update_scene(self._data, camera=self._camera)
        if self._fast:
            for flag in _SLOW:
                self._renderer.scene.flags[getattr(self._mujoco.mjtRndFlag, flag)] = 0
        return np.ascontiguousarray(self._renderer.render().transpose(2, 0, 1))


def _libraries() -> tuple[Any, Any]:
    """dm_control's suite and mujoco, which choose how to reach OpenGL when they are imported."""
    if sys.platform.startswith("linux") and not os.environ.get("DISPLAY"):
        os.environ.setdefault("MUJOCO_GL", "egl")
    for name in ("mujoco", "dm_control"):
        if find_spec(name) is None:
            require(name, extra="rl", purpose="outlast.rl.ControlEnv")
    if find_spec("triton") is not None:
        # Mesa's software renderer and triton carry LLVM each: triton's import crashes the process when Mesa's was loaded first.
        import_module("triton")
    try:
        import mujoco
        from dm_control import suite
    except Exception as error:  # an OpenGL that is not there fails here already, with errors of several kinds
        raise _no_gl(error) from error
    return suite, mujoco


def _no_gl(error: Exception) -> MissingExtraError:
    return MissingExtraError(
        "outlast.rl.ControlEnv finds no OpenGL to draw with (extra rl): without a screen set MUJOCO_GL=egl and install libegl1 and "
        f"libgl1-mesa-dri, or MUJOCO_GL=osmesa with libosmesa6 ({type(error).__name__}: {error})"
    )
