"""Tasks of the DeepMind Control Suite as images."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest

pytest.importorskip("gymnasium", reason="extra rl")
pytest.importorskip("dm_control", reason="extra rl")

from outlast.errors import MissingExtraError
from outlast.rl import ControlEnv, FrameStack


@pytest.fixture(scope="module")
def env():
    try:
        made = ControlEnv("cartpole", "balance", 48)
    except MissingExtraError as error:
        pytest.skip(str(error))
    yield made
    made.close()


def test_gymnasium_accepts_it(env):
    from gymnasium.utils.env_checker import check_env

    check_env(env, skip_render_check=True)


def test_episodes_are_functions_of_their_seed(env):
    def frames(seed):
        obs, _ = env.reset(seed=seed)
        return np.stack([obs, *(env.step(np.array([0.5], np.float32))[0] for _ in range(5))])

    assert frames(3).shape == (6, 3, 48, 48)
    assert np.array_equal(frames(3), frames(3))
    assert not np.array_equal(frames(3), frames(4))
    stacked = FrameStack(env, 3)
    obs, _ = stacked.reset(seed=3)
    assert np.array_equal(obs[:3], obs[6:])
    assert np.array_equal(stacked.step(np.array([0.5], np.float32))[0][6:], frames(3)[1])


def test_actions_are_scaled_and_repeated(env):
    repeated = ControlEnv("cartpole", "balance", 48, repeat=4)
    env.reset(seed=0)
    repeated.reset(seed=0)
    total = sum(env.step(np.array([1.0], np.float32))[1] for _ in range(4))
    _, reward, terminated, truncated, _ = repeated.step(np.array([1.0], np.float32))
    assert reward == pytest.approx(total)
    assert (terminated, truncated) == (False, False)
    for _ in range(249):
        _, reward, terminated, truncated, _ = repeated.step(np.array([0.0], np.float32))
    assert (terminated, truncated) == (False, True)  # 1,000 steps of the task
    repeated.close()


def test_leaving_out_shadows_keeps_the_geometry(env):
    whole = ControlEnv("cartpole", "balance", 48, fast=False)
    pictures = [each.reset(seed=1)[0].astype(int) for each in (env, whole)]
    warm = [image[0] - image[2] > 20 for image in pictures]  # cart and pole: nothing else has more red than blue
    assert 30 < warm[0].sum() < 500
    assert (warm[0] ^ warm[1]).sum() <= 0.2 * warm[0].sum()  # edges are smoothed in the one
    assert not np.array_equal(*pictures)
    whole.close()


def test_colours_move_and_come_back(env):
    other = ControlEnv("cartpole", "balance", 48, color_shift=0.35)
    plain = env.reset(seed=1)[0].astype(int)
    moved = [other.reset(seed=seed)[0].astype(int) for seed in (1, 2, 1)]
    assert np.abs(moved[0] - plain).mean() > 3.0
    assert np.abs(moved[0] - moved[1]).mean() > 3.0
    assert np.array_equal(moved[0], moved[2])
    other.close()


def test_bad_input(env):
    for settings, message in (
        ({"task": "fly"}, "no task"),
        ({"size": 4}, "size"),
        ({"repeat": 0}, "repeat"),
        ({"color_shift": 2.0}, "color_shift"),
        ({"render_mode": "human"}, "render_mode"),
    ):
        with pytest.raises(ValueError, match=message):
            ControlEnv(**settings)
    for action in (np.zeros(2), np.array([np.nan])):
        with pytest.raises(ValueError, match="1 finite numbers"):
            env.step(action)


def test_without_opengl_it_says_what_to_do():
    code = (
        "from outlast.errors import MissingExtraError\nfrom outlast.rl import ControlEnv\n"
        "try:\n    ControlEnv()\nexcept MissingExtraError as error:\n    print(error)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "MUJOCO_GL": "off"}, capture_output=True, text=True, check=True, timeout=120
    )
    assert "MUJOCO_GL=egl" in run.stdout
    assert "extra rl" in run.stdout
