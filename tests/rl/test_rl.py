"""PixelReach, its shifts, frame stacks and the replay memory."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from helpers import rng

gymnasium = pytest.importorskip("gymnasium")
from gymnasium.utils.env_checker import check_env  # noqa: E402

from outlast.errors import StateError  # noqa: E402
from outlast.rl import (  # noqa: E402
    ColorShift,
    DistractorShift,
    FrameStack,
    GainShift,
    PixelReach,
    TextureShift,
    VideoBackground,
)
from outlast.rl._shifts import SHIFTS  # noqa: E402
from outlast.rl._stack import FrameReplay  # noqa: E402


def play(env, act, episodes, seed=0):
    returns = []
    for episode in range(episodes):
        env.reset(seed=seed + episode)
        total, over = 0.0, False
        while not over:
            _, reward, terminated, truncated, _ = env.step(act(env))
            total, over = total + reward, terminated or truncated
        returns.append(total)
    return float(np.mean(returns))


@pytest.mark.parametrize("shift", SHIFTS)
def test_gymnasium_accepts_it(shift):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(PixelReach(shift=shift, render_mode="rgb_array"), skip_render_check=True)


def test_returns_of_random_and_expert_policies():
    draws = np.random.default_rng(0)
    assert play(PixelReach(), lambda env: draws.uniform(-1.0, 1.0, 2), 200) == pytest.approx(26.0, abs=1.5)
    assert play(PixelReach(), lambda env: env.expert(), 200) == pytest.approx(48.9, abs=0.3)


def test_the_scene_is_as_stated():
    env = PixelReach()
    first, info = env.reset(seed=3)
    assert first.shape == (9, 28, 28)
    assert first.dtype == np.uint8
    assert tuple(first[:3, 0, 0]) == (38, 63, 89)
    assert np.array_equal(first[:3], first[6:])  # the first stack repeats one frame
    again, _ = PixelReach(seed=3).reset()
    assert np.array_equal(first, again)
    x, y = (info["target"] / 2.0 + 0.5) * 17.0 + 5.0
    assert tuple(first[6:, round(y), round(x)]) in {(51, 229, 51), (229, 51, 51)}
    following, reward, terminated, truncated, info = env.step(np.array([1.0, -1.0], np.float32))
    assert np.array_equal(following[:6], first[3:])
    assert reward == pytest.approx(1.0 - min(float(np.hypot(*(info["agent"] - info["target"]))), 2.0) / 2.0)
    assert (terminated, truncated) == (False, False)
    for _ in range(49):
        *_, truncated, _ = env.step(np.zeros(2, np.float32))
    assert truncated
    assert env.render().shape == (28, 28, 3)


def test_discs_have_soft_edges_and_the_stated_opacity():
    from outlast.rl._shifts import disc

    frame = np.zeros((3, 20, 20), np.float32)
    disc(frame, 9.3, 10.6, 2.0, np.array([1.0, 0.5, 0.0], np.float32))
    rows, columns = np.mgrid[:20, :20]
    expected = np.clip(2.5 - np.hypot(rows - 9.3, columns - 10.6), 0.0, 1.0)
    assert np.allclose(frame, expected * np.array([1.0, 0.5, 0.0])[:, None, None], atol=1e-5)
    disc(frame, -0.4, 19.4, 2.0, np.ones(3, np.float32))  # at the edge


def test_shifts_change_the_look_and_nothing_else():
    plain = PixelReach()
    base, _ = plain.reset(seed=5)
    for shift in (ColorShift(0.35), DistractorShift(), TextureShift(), GainShift()):
        env = PixelReach(shift=shift)
        first, info = env.reset(seed=5)
        assert not np.array_equal(first, base)
        plain.reset(seed=5)
        for _ in range(5):
            *_, moved = env.step(np.array([0.5, 0.2]))
            *_, expected = plain.step(np.array([0.5, 0.2]))
        assert np.array_equal(moved["agent"], expected["agent"])
        assert np.array_equal(info["target"], moved["target"])
        assert np.array_equal(PixelReach(shift=shift).reset(seed=5)[0], first)
        assert not np.array_equal(env.reset(seed=6)[0], first)
    still = PixelReach(shift="distract")
    first, _ = still.reset(seed=1)
    later = still.step(np.zeros(2))[0]
    assert not np.array_equal(first[6:], later[6:])  # distractors move


def test_colours_move_by_the_strength_at_most():
    env = PixelReach(shift=ColorShift(0.1))
    for seed in range(30):
        corner = env.reset(seed=seed)[0][:3, 0, 0] / 255.0
        assert np.abs(corner - [0.15, 0.25, 0.35]).max() <= 0.1 + 1 / 255


def test_videos_play_behind_the_scene():
    film = np.zeros((4, 28, 28, 3), np.uint8)
    film[:, 0, 0, 0] = [10, 20, 30, 40]
    env = PixelReach(shift=VideoBackground(film))
    observation, _ = env.reset(seed=0)
    seen = [int(observation[6, 0, 0])] + [int(env.step(np.zeros(2))[0][6, 0, 0]) for _ in range(7)]
    start = [10, 20, 30, 40].index(seen[0])
    assert seen == [[10, 20, 30, 40][(start + step) % 4] for step in range(8)]
    for frames, kind, message in (
        (np.zeros((2, 28, 28, 3), np.int64), TypeError, "uint8 or floats"),
        (np.zeros((0, 28, 28, 3), np.uint8), ValueError, "frames must be"),
        (np.full((1, 3, 28, 28), 2.0), ValueError, "must lie in"),
    ):
        with pytest.raises(kind, match=message):
            VideoBackground(frames)
    with pytest.raises(ValueError, match="the scene is 28x28"):
        PixelReach(shift=VideoBackground(np.zeros((1, 3, 20, 20), np.uint8))).reset()


def test_environments_of_bad_input():
    for settings, kind, message in (
        ({"shift": "night"}, ValueError, "color_easy"),
        ({"shift": 3}, TypeError, "draw"),
        ({"size": 4}, ValueError, "size"),
        ({"steps": 0}, ValueError, "steps"),
        ({"render_mode": "human"}, ValueError, "render_mode"),
    ):
        with pytest.raises(kind, match=message):
            PixelReach(**settings)
    env = PixelReach()
    env.reset(seed=0)
    for action in (np.zeros(3), np.array([np.nan, 0.0])):
        with pytest.raises(ValueError, match="two finite numbers"):
            env.step(action)
    for settings in ({"strength": 0.0}, {"strength": 2.0}):
        with pytest.raises(ValueError, match="strength"):
            ColorShift(**settings)
    with pytest.raises(ValueError, match="FrameStack takes images"):
        FrameStack(gymnasium.make("CartPole-v1"))


def test_stacks_are_those_of_the_environment():
    wrapped, own = FrameStack(PixelReach(stack=1), 3), PixelReach(stack=3)
    assert np.array_equal(wrapped.reset(seed=2)[0], own.reset(seed=2)[0])
    for step in range(6):
        action = np.array([0.3, -0.1 * step])
        assert np.array_equal(wrapped.step(action)[0], own.step(action)[0])
    assert wrapped.observation_space == own.observation_space


def test_names_come_with_gymnasium():
    import outlast.rl

    with pytest.raises(AttributeError, match="no attribute 'Cart'"):
        _ = outlast.rl.Cart


# ---- replay -------------------------------------------------------------------------------------------------------------------------


def filled(capacity, lengths, stack=3):
    """Frames whose single pixel is their number; actions likewise."""
    replay = FrameReplay(capacity, (1, 1, 1), (1,), stack)
    number = 0
    for episode, length in enumerate(lengths):
        replay.begin(np.full((1, 1, 1), number, np.uint8))
        for step in range(length):
            action = np.array([number], np.float32)
            number += 1
            replay.add(action, float(episode), np.full((1, 1, 1), number, np.uint8), terminated=step == length - 1 and episode % 2 == 0)
        number += 1
    return replay


@pytest.mark.parametrize("capacity", [12, 40, 200])
def test_transitions_never_cross_an_episode_or_the_end_of_the_memory(capacity):
    lengths = [5, 1, 9, 2, 7, 3]
    replay = filled(capacity, lengths)
    firsts = np.cumsum([0, *[length + 1 for length in lengths]])
    total = int(firsts[-1])
    obs, action, reward, following, ended = replay.sample(500, rng(0))
    assert obs.shape == (500, 3, 1, 1)
    seen = set()
    rows = zip(obs[:, :, 0, 0].tolist(), action[:, 0].tolist(), reward, following[:, :, 0, 0].tolist(), ended, strict=True)
    for stack, act, gain, after, end in rows:
        newest = stack[-1]
        episode = int(np.searchsorted(firsts, newest, side="right")) - 1
        first = int(firsts[episode])
        assert newest - first < lengths[episode]  # the last frame of an episode begins no transition
        assert act == newest
        assert after[-1] == newest + 1
        assert float(gain) == episode
        assert stack == [max(newest - 2, first), max(newest - 1, first), newest]
        assert after == [max(newest - 1, first), newest, newest + 1]
        assert min(stack) >= total - capacity
        assert bool(end) == (newest + 1 - first == lengths[episode] and episode % 2 == 0)
        seen.add(newest)
    if capacity == 200:
        assert len(seen) == sum(lengths)


def test_frames_are_kept_once():
    replay = FrameReplay(2000, (3, 28, 28), (2,))
    assert replay.nbytes <= 1.1 * 2000 * 3 * 28 * 28
    with pytest.raises(StateError, match="before begin"):
        replay.add(np.zeros(2, np.float32), 0.0, np.zeros((3, 28, 28), np.uint8), terminated=False)
    replay.begin(np.zeros((3, 28, 28), np.uint8))
    with pytest.raises(StateError, match="no transition yet"):
        replay.sample(4)
    replay.add(np.ones(2, np.float32), 1.0, np.ones((3, 28, 28), np.uint8), terminated=False)
    first, second = (replay.sample(4, rng(0)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert len(replay) == 2
    with pytest.raises(ValueError, match="capacity"):
        FrameReplay(2, (1, 1, 1), (1,))
    replay.add(np.zeros(1, np.float32), 0.0, np.zeros((1, 1, 1), np.uint8), terminated=True)
    with pytest.raises(StateError, match="terminated"):
        replay.add(np.zeros(1, np.float32), 0.0, np.zeros((1, 1, 1), np.uint8), terminated=False)


# ---- the reference trainer ----------------------------------------------------------------------------------------------------------


def test_soft_actor_critic_learns_and_repeats():
    """1,200 steps: well above the random policy's 27 (5,000 steps are the study's)."""
    from outlast.rl import PixelSAC
    from outlast.rl._sac import SACSettings

    trained = PixelSAC(PixelReach(), seed=0).learn(1200)
    returns = trained.evaluate(PixelReach(), 10, seed=10_000)
    assert np.mean(returns) > 31.0
    assert trained.aux_loss < 0.25  # a constant prediction has 1/3
    assert returns == trained.evaluate(PixelReach(), 10, seed=10_000)
    settings = SACSettings(random_steps=20, batch=8)
    one, two = (PixelSAC(PixelReach(), seed=1, settings=settings).learn(40) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one.policy.parameters(), two.policy.parameters(), strict=True))
    assert one.returns == two.returns
    assert not any(torch.equal(a, b) for a, b in zip(one.encoder.parameters(), one._target_encoder.parameters(), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_soft_actor_critic_reaches_forty_of_fifty_and_its_gate_tells_looks_apart(seed):
    from outlast.adapt import PolicyAdapter, RandomCrop
    from outlast.rl import PixelSAC

    trained = PixelSAC(PixelReach(), seed=seed).learn(5000)
    assert np.mean(trained.evaluate(PixelReach(), 20, seed=10_000)) >= 40.0
    adapter = PolicyAdapter(
        trained.encoder, trained.policy, trained.aux, augment=RandomCrop(24), batch=16, warmup=2, gate="auto", lr=3e-4, buffer=64, newest=4
    )
    adapter.calibrate(PixelReach(), 10, seed=20_000)

    def updates(shift):
        """Share of an episode's steps that learn, over 20 episodes."""
        env, total = PixelReach(shift=shift), 0
        for episode in range(20):
            adapter.reset()
            adapter.begin_episode()
            obs, _ = env.reset(seed=30_000 + episode)
            over = False
            while not over:
                action = adapter.act(obs)
                following, _, terminated, over, _ = env.step(action.numpy())
                adapter.observe(obs, action, following, terminated=terminated, truncated=over)
                obs = following
            total += adapter.report.updates
        return total / (20 * 50)

    assert updates(None) <= 0.10
    assert updates("color_hard") >= 0.15


def test_the_density_of_squashed_actions():
    from outlast.rl._sac import PixelPolicy

    torch.manual_seed(0)
    policy = PixelPolicy(4, 2)
    features = torch.randn(500, 4, generator=rng(1))
    with torch.no_grad():
        action, density = policy.sample(features, rng(0))
        mean, raw = policy.body(features).double().chunk(2, 1)
    normal = torch.distributions.Normal(mean, (-10.0 + 6.0 * (torch.tanh(raw) + 1.0)).exp())
    squashed = torch.distributions.TransformedDistribution(normal, torch.distributions.TanhTransform())
    assert torch.allclose(density.double(), squashed.log_prob(action.double()).sum(1), atol=1e-2)
    assert float(action.abs().max()) < 1.0


def test_the_trainer_takes_other_tasks_and_draws_from_its_own_seed():
    from outlast.adapt import AuxTask, InverseDynamics, RotationPrediction
    from outlast.rl import PixelSAC, SACSettings

    settings = SACSettings(random_steps=10, batch=4, aux_every=1, share="features")

    def trained(task, **changes):
        return PixelSAC(PixelReach(), seed=0, aux=task, settings=settings, **changes).learn(14)

    found = []
    for outside in (1, 2):
        torch.manual_seed(0)
        task = RotationPrediction(50, hidden=8)
        torch.manual_seed(outside)  # nothing is drawn from the global generator
        found.append(trained(task))
    assert all(torch.equal(a, b) for a, b in zip(found[0].encoder.parameters(), found[1].encoder.parameters(), strict=True))

    class Recorder(AuxTask):
        def __init__(self, same_crop):
            super().__init__()
            self.same_crop, self.equal = same_crop, []
            self.weight = torch.nn.Parameter(torch.zeros(()))

        def loss(self, encoder, obs, action, next_obs):
            # the middle frame of the first stack is the oldest one of the second
            self.equal.append(bool(torch.equal(obs[:, 3:6], next_obs[:, :3])))
            return self.weight * encoder(obs).sum()

    for same_crop in (False, True):
        task = Recorder(same_crop)
        trained(task)
        assert task.equal
        assert all(task.equal) is same_crop
    kept = InverseDynamics(50, 2, 8)
    before = [p.clone() for p in kept.parameters()]
    without = PixelSAC(PixelReach(), aux=kept, settings=SACSettings(random_steps=10, batch=4, aux_every=None, share="features")).learn(14)
    assert all(torch.equal(a, b) for a, b in zip(before, without.aux.parameters(), strict=True))


def test_trainers_of_bad_input():
    from outlast.rl import PixelSAC, SACSettings

    for changes in ({"aux_every": 0}, {"temperature": 0.0}, {"tau": 5.0}, {"random_steps": -1}, {"batch": 0}, {"share": "all"}):
        with pytest.raises(ValueError, match=next(iter(changes))):
            SACSettings(**changes)
    with pytest.raises(ValueError, match="channels last"):
        FrameStack(gymnasium.wrappers.TransformObservation(PixelReach(), lambda x: x, gymnasium.spaces.Box(0, 255, (28, 28, 3), np.uint8)))

    with pytest.raises(ValueError, match="vectors in"):
        PixelSAC(gymnasium.wrappers.RescaleAction(PixelReach(), np.float32(-2.0), np.float32(2.0)))
    with pytest.raises(ValueError, match="frames' channels"):
        PixelSAC(PixelReach(stack=2), stack=4)
