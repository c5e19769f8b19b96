"""Policies that go on learning: auxiliary tasks, the adapter, its gate, guards and state."""

from __future__ import annotations

import copy
import math
import pickle
import threading

import numpy as np
import pytest
import torch
from helpers import drawn, rng
from torch import nn
from torch.nn import functional as F

from outlast._core._random import derived_seed, generator
from outlast.adapt import (
    ActionWatch,
    Anchor,
    AuxTask,
    DriftLimit,
    EntropyFilter,
    InverseDynamics,
    PeriodicReset,
    PolicyAdapter,
    RandomCrop,
    Recovery,
    RotationPrediction,
    StochasticRestore,
    joint_step,
)
from outlast.adapt._auxiliary import turned
from outlast.errors import DivergedError, OutlastWarning, StateError, UnsupportedError

C, SIDE, CROP, A = 3, 10, 8, 2


def parts(seed=0, *, same_crop=False, norm=False):
    torch.manual_seed(seed)
    layers = [nn.Conv2d(C, 4, 3, 2)] + ([nn.BatchNorm2d(4)] if norm else []) + [nn.ReLU(), nn.Flatten(), nn.Linear(36, 8), nn.Tanh()]
    encoder = nn.Sequential(*layers)
    policy = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, A), nn.Tanh())
    return encoder, policy, InverseDynamics(8, A, hidden=16, same_crop=same_crop)


def stream(n=30, seed=0, actions=None):
    obs = torch.randint(256, (n + 1, C, SIDE, SIDE), generator=rng(seed), dtype=torch.uint8)
    done = torch.rand(n, A, generator=rng(seed + 1)) * 2.0 - 1.0 if actions is None else actions
    return [(obs[t], done[t], obs[t + 1]) for t in range(n)]


def adapter(**settings):
    return PolicyAdapter(*parts(), **{"augment": RandomCrop(CROP), "batch": 8, **settings})


def run(made, transitions):
    return [made.observe(*transition) for transition in transitions]


# ---- tasks --------------------------------------------------------------------------------------------------------------------------


class Constant(nn.Module):
    def __init__(self, values):
        super().__init__()
        self.values = values

    def forward(self, x):
        return self.values[None].expand(len(x), -1)


def test_losses_of_known_heads():
    encoder, _, task = parts()
    x = torch.rand(5000, C, CROP, CROP, generator=rng(0))
    action = torch.rand(5000, A, generator=rng(1)) * 2.0 - 1.0
    task.head = Constant(torch.zeros(A))
    assert float(task.loss(encoder, x, action, x)) == pytest.approx(1 / 3, abs=0.01)
    assert task.baseline(action) == pytest.approx(1 / 3, abs=0.01)
    fixed = torch.tensor([0.3, -0.7])
    task.head = Constant(fixed)
    assert float(task.loss(encoder, x, fixed.expand(5000, -1), x)) == 0.0
    discrete = InverseDynamics(8, 5, hidden=4, discrete=True)
    discrete.head = Constant(torch.zeros(5))
    numbers = torch.randint(5, (5000,), generator=rng(2))
    assert float(discrete.loss(encoder, x, numbers, x)) == pytest.approx(math.log(5), abs=1e-5)
    assert discrete.baseline(numbers) == pytest.approx(math.log(5), abs=1e-2)
    rotation = RotationPrediction(8, hidden=4)
    rotation.head = Constant(torch.zeros(4))
    assert float(rotation.loss(encoder, x, action, x, rng(0))) == pytest.approx(1.386294, abs=1e-5)
    assert rotation.baseline(action) == pytest.approx(1.386294, abs=1e-6)


def test_turns():
    x = torch.rand(6, 2, 5, 5, generator=rng(0))
    ones = torch.ones(6, dtype=torch.long)
    there = x
    for _ in range(4):
        there = turned(there, ones)
    assert torch.equal(there, x)
    assert torch.equal(turned(x, 2 * ones), x.flip(-1, -2))
    turns = torch.tensor([0, 1, 2, 3, 1, 0])
    for image, out, k in zip(x, turned(x, turns), turns.tolist(), strict=True):
        assert torch.equal(out, image.rot90(k, (-2, -1)))
    with pytest.raises(ValueError, match="square"):
        turned(x[..., :4], turns)


def test_crops_lie_anywhere_and_are_cut_right():
    crop = RandomCrop((3, 4))
    images = torch.arange(36.0).view(1, 1, 6, 6).expand(10_000, -1, -1, -1)
    out = crop(images, rng(0))
    assert out.shape == (10_000, 1, 3, 4)
    corner = out[:, 0, 0, 0].long()
    counts = torch.bincount(corner // 6 * 3 + corner % 6, minlength=12).double()
    assert len(counts) == 12  # rows 0 to 3, columns 0 to 2
    assert float(((counts - 10_000 / 12).square() / (10_000 / 12)).sum()) < 31.3  # chi-square, 11 degrees of freedom, p > 0.001
    for image in out[:5]:
        assert torch.equal(image[0] - image[0, 0, 0], torch.arange(3.0)[:, None] * 6 + torch.arange(4.0))
    assert float(crop.centre(images)[0, 0, 0, 0]) == 7.0
    with pytest.raises(ValueError, match="smaller than the crop"):
        crop(images[..., :3])


def test_both_observations_are_cropped_apart_unless_told():
    from outlast.adapt._auxiliary import prepared

    x = torch.arange(100, dtype=torch.uint8).view(1, 1, 10, 10).expand(50, 3, -1, -1)
    for same in (False, True):
        task = InverseDynamics(8, 2, same_crop=same)
        before, after = prepared(task, x, x, RandomCrop(8), rng(0))
        assert before.dtype == torch.float32
        assert torch.equal(before, after) == same
        assert len(set(before[:, 0, 0, 0].tolist())) > 3


def test_joint_step_learns_and_reaches_the_encoder():
    encoder, _, task = parts()
    before = copy.deepcopy(encoder.state_dict())
    optimizer = torch.optim.Adam([*encoder.parameters(), *task.parameters()], lr=1e-2)
    obs = torch.randint(256, (16, C, SIDE, SIDE), generator=rng(0), dtype=torch.uint8)
    action = torch.rand(16, A, generator=rng(1)) * 2.0 - 1.0
    losses = [joint_step(encoder, task, optimizer, obs, action, obs.flip(0), augment=RandomCrop(CROP), generator=rng(2)) for _ in range(60)]
    assert losses[-1] < 0.3 * losses[0]
    assert not torch.equal(encoder[0].weight, before["0.weight"])
    rotation = RotationPrediction(8, hidden=8)
    assert joint_step(encoder, rotation, torch.optim.SGD(rotation.parameters(), lr=0.1), obs, action, obs, augment=RandomCrop(CROP)) > 0.0


def test_tasks_of_bad_input():
    encoder, _, task = parts()
    x = torch.zeros(4, C, CROP, CROP)
    for action, message in ((torch.zeros(4, 3), r"\(4, 2\)"), (torch.zeros(3, A), r"\(4, 2\)")):
        with pytest.raises(ValueError, match=message):
            task.loss(encoder, x, action, x)
    discrete = InverseDynamics(8, 5, discrete=True)
    with pytest.raises(TypeError, match="whole numbers"):
        discrete.loss(encoder, x, torch.zeros(4), x)
    with pytest.raises(ValueError, match=r"\[0, 5\)"):
        discrete.loss(encoder, x, torch.full((4,), 5), x)
    for make in (lambda: InverseDynamics(0, 2), lambda: RotationPrediction(8, 0), lambda: RandomCrop(0)):
        with pytest.raises(ValueError, match="must be at least 1"):
            make()


# ---- acting and adapting --------------------------------------------------------------------------------------------------------------


def test_without_updates_it_is_the_frozen_policy():
    encoder, policy, task = parts()
    for settings in ({"lr": 0.0}, {"gate": math.inf}):
        made = PolicyAdapter(encoder, policy, task, augment=RandomCrop(CROP), batch=8, **settings)
        for obs, action, following in stream():
            with torch.no_grad():
                middle = obs[None, :, 1:9, 1:9].float() / 255.0
                assert torch.equal(made.act(obs), policy(encoder(middle))[0])
            made.observe(obs, action, following)
    assert made.report.skipped == 30
    assert made.report.updates == 0


def test_one_step_is_gradient_descent_on_the_same_crops():
    encoder, policy, task = parts()
    made = PolicyAdapter(
        encoder, policy, task, optimizer=lambda p: torch.optim.SGD(p, lr=0.1), augment=RandomCrop(CROP), batch=8, generator=rng(7)
    )
    obs, action, following = stream(1)[0]
    made.observe(obs, action, following)
    crop, draws = RandomCrop(CROP), rng(7)
    before, after = (crop(image.expand(8, -1, -1, -1), draws).float() / 255.0 for image in (obs, following))
    loss = task.loss(encoder, before, action.expand(8, -1), after)
    weights = [*encoder.parameters(), *task.parameters()]
    grads = torch.autograd.grad(loss, weights)
    moved = [*made.encoder.parameters(), *made.aux.parameters()]
    for weight, grad, now in zip(weights, grads, moved, strict=True):
        assert torch.allclose(now, weight - 0.1 * grad, atol=1e-6)
    assert all(torch.equal(a, b) for a, b in zip(policy.parameters(), made.policy.parameters(), strict=True))
    assert made.last_loss == pytest.approx(float(loss.detach()))


class Deep(nn.Module):
    """Two unpadded convolutions with strides 2 and 1, functional parts, a linear layer."""

    def __init__(self, padding=0):
        super().__init__()
        self.one, self.norm, self.two = nn.Conv2d(C, 4, 3, 2), nn.BatchNorm2d(4), nn.Conv2d(4, 5, 3, 1, padding=padding)
        self.out = nn.Linear(5 * (4 if padding == 0 else 6) ** 2, 8)

    def forward(self, x):
        return self.out(torch.relu(self.two(F.relu(self.norm(self.one(x))))).flatten(1))


@pytest.mark.parametrize("buffer", [0, 6])
def test_crops_of_a_frame_share_their_convolutions(buffer):
    """The same losses and weights as from encoding each crop."""
    torch.manual_seed(0)
    encoder, policy, task = Deep(), nn.Linear(8, A), InverseDynamics(8, A, hidden=16)
    settings = {"augment": RandomCrop(13), "batch": 24, "lr": 1e-2, "buffer": buffer, "newest": 20 if buffer else None}
    shared, apart = (PolicyAdapter(encoder, policy, task, **settings, generator=rng(2)) for _ in range(2))
    apart._batches._sharing = False
    obs = torch.randint(256, (7, C, 20, 20), generator=rng(0), dtype=torch.uint8)
    done = torch.rand(6, A, generator=rng(1))
    for t in range(6):
        assert shared.observe(obs[t], done[t], obs[t + 1]) == pytest.approx(apart.observe(obs[t], done[t], obs[t + 1]), abs=1e-6)
    sharing = shared._batches._sharing
    assert sharing._stride == (2, 2)
    assert len(sharing._convolutions) == 5
    for a, b in zip(shared.adapted.values(), apart.adapted.values(), strict=True):
        assert torch.allclose(a, b, atol=1e-5)
    groups = sharing.groups(torch.zeros(24, dtype=torch.long), *RandomCrop(13).places(obs[:1].expand(24, -1, -1, -1), rng(0)))
    assert len(groups) == 4
    assert sharing.worth(groups)
    again = copy.deepcopy(shared)
    assert again.observe(obs[0], done[0], obs[1]) == shared.observe(obs[0], done[0], obs[1])


def test_encoders_that_cannot_share_do_not():
    from outlast.adapt._crop_sharing import CropSharing

    class Branching(Deep):
        def forward(self, x):
            return super().forward(x) + super().forward(x)

    class Choosing(Deep):
        def forward(self, x):
            return super().forward(x if x.sum() > 0 else -x)

    hooked = Deep().eval()
    hooked.one.register_forward_hook(lambda *_: None)
    for encoder in (Branching(), Choosing(), hooked, nn.Sequential(nn.Conv2d(C, 4, 3, 2, padding=1), nn.Flatten()), nn.Flatten()):
        assert CropSharing.of(encoder.eval(), RandomCrop(CROP)) is None
    padded = CropSharing.of(Deep(padding=1).eval(), RandomCrop(13))
    assert len(padded._convolutions) == 3  # up to the padded one
    assert len(padded._rest) == 4
    # dilation and groups are no obstacle
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(4, 4, 3, 3, dilation=2, groups=2), nn.ReLU(), nn.Conv2d(4, 2, 2, 1), nn.Flatten()).eval()
    sharing, crop = CropSharing.of(net, RandomCrop((14, 11))), RandomCrop((14, 11))
    frames = torch.rand(30, 4, 21, 17, generator=rng(0))[:1].expand(30, -1, -1, -1)
    tops, lefts = crop.places(frames, rng(1))
    found = sharing(frames, tops, lefts, sharing.groups(torch.zeros(30, dtype=torch.long), tops, lefts), torch.float32)
    assert torch.allclose(found, net(crop.at(frames, tops, lefts)), atol=1e-6)


def test_what_is_not_adapted_stays_bit_for_bit():
    encoder, policy, task = parts(norm=True)
    made = PolicyAdapter(
        encoder, policy, task, augment=RandomCrop(CROP), batch=8, update_aux=False, params=lambda name, p: name.startswith("4")
    )
    run(made, stream(10))
    for (name, ours), theirs in zip(made.encoder.state_dict().items(), encoder.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs) == (not name.startswith("4")), name
    for kept, source in ((made.policy, policy), (made.aux, task)):
        assert all(torch.equal(a, b) for a, b in zip(kept.state_dict().values(), source.state_dict().values(), strict=True))
    norms = PolicyAdapter(encoder, policy, task, augment=RandomCrop(CROP), params="norm_affine", update_aux=False)
    assert set(norms.adapted) == {"encoder.1.weight", "encoder.1.bias"}
    made.train()
    assert not made.encoder.training


def test_copies_without_crops_have_the_gradient_of_one():
    found = []
    for batch in (1, 8):
        encoder, policy, task = parts()
        made = PolicyAdapter(encoder, policy, task, optimizer=lambda p: torch.optim.SGD(p, lr=0.1), batch=batch)
        small = [(obs[:, :CROP, :CROP], action, following[:, :CROP, :CROP]) for obs, action, following in stream(1)]
        run(made, small)
        found.append([p.clone() for p in made.adapted.values()])
    for one, many in zip(*found, strict=True):
        assert torch.allclose(one, many, atol=1e-6)


def test_episodes_start_again_and_repeat_bit_for_bit():
    made = adapter(lr=1e-2)
    source = [p.clone() for p in made.adapted.values()]
    made.begin_episode()
    first = run(made, stream())
    assert not torch.equal(source[0], next(iter(made.adapted.values())))
    made.begin_episode()
    assert all(torch.equal(a, b) for a, b in zip(source, made.adapted.values(), strict=True))
    other = adapter(lr=1e-2)
    other.begin_episode()
    assert run(other, stream()) == first
    kept = adapter(lr=1e-2, episodic=False)
    run(kept, stream(5))
    moved = [p.clone() for p in kept.adapted.values()]
    kept.begin_episode()
    assert all(torch.equal(a, b) for a, b in zip(moved, kept.adapted.values(), strict=True))
    kept.reset()
    assert all(torch.equal(a, b) for a, b in zip(source, kept.adapted.values(), strict=True))
    assert kept.report.updates == 0


def test_a_state_saved_in_mid_episode_goes_on_bit_for_bit(tmp_path):
    settings = {"buffer": 8, "newest": 2, "lr": 1e-2, "gate": 1e-3, "warmup": 1, "episodic": False}
    guards = lambda: [DriftLimit(0.5), StochasticRestore(0.01), ActionWatch(10.0)]  # noqa: E731
    made = adapter(**settings, guards=guards())
    transitions = stream(20)
    run(made, transitions[:12])
    torch.save(made.state_dict(), tmp_path / "state.pt")
    expected = run(made, transitions[12:])
    other = adapter(**settings, guards=guards())
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert run(other, transitions[12:]) == expected
    assert all(torch.equal(a, b) for a, b in zip(made.adapted.values(), other.adapted.values(), strict=True))
    assert other.report.updates == made.report.updates
    with pytest.raises(ValueError, match="other parameters"):
        adapter(update_aux=False).load_state_dict(made.state_dict())


def test_batches_are_made_of_the_newest_and_the_recent():
    class Recorder(AuxTask):
        def __init__(self):
            super().__init__()
            self.seen = []
            self.weight = nn.Parameter(torch.zeros(()))

        def loss(self, encoder, obs, action, next_obs):
            self.seen.append(action[:, 0].tolist())
            return (encoder(obs) * self.weight).sum()

    encoder, policy, _ = parts()
    made = PolicyAdapter(encoder, policy, Recorder(), augment=RandomCrop(CROP), batch=16, buffer=5, newest=4)
    actions = torch.stack([torch.tensor([float(t), 0.1 * (t % 3)]) for t in range(30)])
    run(made, stream(30, actions=actions))
    seen = [[int(value) for value in row] for row in made.aux.seen]
    assert len(seen) == 30
    for step, numbers in enumerate(seen):
        assert len(numbers) == 16
        assert numbers[:4] == [step] * 4
        assert set(numbers[4:]) <= set(range(max(0, step - 4), step + 1))
    assert len(set(seen[20][4:])) > 2
    made.begin_episode()
    run(made, [stream(30, actions=actions)[29]])
    assert {int(value) for value in made.aux.seen[-1]} == {29}  # nothing of the episode before


def test_episode_ends_warm_up_and_vector_environments():
    made = adapter(warmup=2)
    transitions = stream(10)
    assert run(made, transitions[:2]) == [None, None]
    assert made.observe(*transitions[2], truncated=True) is not None
    with pytest.raises(StateError, match="crosses an episode boundary"):
        made.observe(*transitions[3])
    made.begin_episode()
    assert run(made, transitions[3:6])[:2] == [None, None]
    assert made.report.skipped == 4
    several = adapter(warmup=1, episodic=False)

    def rows(t):
        return tuple(torch.stack([stream(10, seed=s)[t][side] for s in range(3)]) for side in range(3))

    assert several.act(rows(0)[0]).shape == (3, A)
    assert several.observe(*rows(0)) is None
    assert several.observe(*rows(1), terminated=np.array([False, True, False])) is not None
    with pytest.raises(StateError, match="boundary"):
        several.observe(*rows(2))
    several.begin_episode(np.array([False, True, False]))
    assert several.observe(*rows(2)) is not None  # two environments are past their warm-up, one is not
    assert several.report.seen == 9
    with pytest.raises(ValueError, match="one entry for each of 3"):
        several.begin_episode(np.array([True, False]))


def test_adaptation_undoes_a_known_shift():
    """Linear pictures: s' = s + M a. After a permutation and an offset the inverse loss falls tenfold within 200 random steps."""
    torch.manual_seed(0)
    pixels, M = 16, torch.randn(16, A, generator=rng(0))
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(pixels, 6))
    task = InverseDynamics(6, A, hidden=1)
    task.head = nn.Linear(12, A)
    policy = nn.Linear(6, A)

    def transition(x, draws, shift):
        action = torch.rand(A, generator=draws) * 2.0 - 1.0
        following = x + M @ action
        return (shift(x), action, shift(following)), 0.5 * following

    def plain(x):
        return x.view(1, 4, 4)

    order = torch.randperm(pixels, generator=rng(1))

    def shifted(x):
        return (x[order] + 0.5).view(1, 4, 4)

    optimizer = torch.optim.Adam([*encoder.parameters(), *task.parameters()], lr=3e-3)
    x, draws = torch.randn(pixels, generator=rng(2)), rng(3)
    for _ in range(3000):
        batch = []
        for _ in range(8):
            found, x = transition(x, draws, plain)
            batch.append(found)
        loss = joint_step(encoder, task, optimizer, *(torch.stack([entry[side] for entry in batch]) for side in range(3)))
    assert loss < 0.02
    made = PolicyAdapter(encoder, policy, task, optimizer=lambda p: torch.optim.SGD(p, lr=0.03), batch=1)
    losses = []
    for _ in range(200):
        found, x = transition(x, draws, shifted)
        losses.append(made.observe(*found))
    assert np.mean(losses[:5]) > 10 * np.mean(losses[-30:])


def test_constant_actions_are_skipped():
    made = adapter()
    still = torch.zeros(30, A)
    before = None
    for step, transition in enumerate(stream(30, actions=still)):
        made.observe(*transition)
        if step == 9:
            before = [p.clone() for p in made.adapted.values()]
    assert all(torch.equal(a, b) for a, b in zip(before, made.adapted.values(), strict=True))
    assert [kind for _, kind in made.report.events] == ["degenerate"]
    assert made.report.updates == 9


# ---- gate, guards, budget -----------------------------------------------------------------------------------------------------------


class Square:
    """Actions in [-1, 1]."""

    def seed(self, seed):
        self.draws = np.random.default_rng(seed)

    def sample(self):
        return self.draws.uniform(-1.0, 1.0, A).astype(np.float32)


class Dots:
    """A tiny environment: a bright pixel moves as the action says."""

    action_space = Square()

    def __init__(self, shift=0):
        self.shift = shift

    def reset(self, seed):
        self.draws, self.place, self.t = np.random.default_rng(seed), np.array([5.0, 5.0]), 0
        return self._look(), {}

    def step(self, action):
        self.place = np.clip(self.place + np.asarray(action) * 2.0, 0.0, 9.0)
        self.t += 1
        return self._look(), 0.0, False, self.t >= 12, {}

    def _look(self):
        frame = np.full((C, SIDE, SIDE), self.shift, np.uint8)
        frame[:, int(self.place[0]), int(self.place[1])] = 255
        return frame


def test_the_gate_is_calibrated_and_shuts():
    encoder, policy, task = parts()
    made = PolicyAdapter(encoder, policy, task, augment=RandomCrop(CROP), batch=8, gate="auto")
    with pytest.raises(StateError, match="calibrate"):
        made.observe(*stream(1)[0])
    with pytest.warns(OutlastWarning, match="no better than a constant"):
        threshold = made.calibrate(Dots(), 3)
    assert threshold > 0.0
    assert made.report.threshold == threshold
    fresh = PolicyAdapter(encoder, policy, task, augment=RandomCrop(CROP), batch=8, gate="auto")
    fresh.load_state_dict(made.state_dict())
    assert fresh.report.threshold == threshold
    closed = adapter(gate=1e9)
    assert run(closed, stream(5)) == [None] * 5
    assert closed.report.gate_loss > 0.0
    opened = adapter(gate=1e-9)
    assert None not in run(opened, stream(5))


def test_a_trained_head_calibrates_without_a_warning():
    encoder, _, task = parts(same_crop=True)
    optimizer = torch.optim.Adam([*encoder.parameters(), *task.parameters()], lr=1e-2)
    env, draws = Dots(), np.random.default_rng(0)
    rows = []
    for seed in range(40):
        obs, _ = env.reset(seed)
        over = False
        while not over:
            action = draws.uniform(-1.0, 1.0, A).astype(np.float32)
            following, _, _, over, _ = env.step(action)
            rows.append((torch.from_numpy(obs), torch.from_numpy(action), torch.from_numpy(following)))
            obs = following
    for step in range(300):
        index = torch.randint(len(rows), (32,), generator=rng(step)).tolist()
        joint_step(encoder, task, optimizer, *(torch.stack([rows[i][side] for i in index]) for side in range(3)), augment=RandomCrop(CROP))
    chance = rng(9)
    anything = lambda out: torch.rand(out.shape, generator=chance) * 2.0 - 1.0  # noqa: E731
    made = PolicyAdapter(encoder, nn.Linear(8, A), task, augment=RandomCrop(CROP), gate="auto", act_fn=anything)
    assert made.calibrate(Dots(), 4) > 0.0


def test_guards_of_parameters_and_actions():
    limit = adapter(lr=0.05, guards=[DriftLimit(0.01)])
    run(limit, stream())
    assert limit.report.drift <= 0.0101
    periodic = adapter(guards=[PeriodicReset(7)])
    run(periodic, stream())
    assert periodic.report.resets == 4
    anchored, free = adapter(lr=1e-2, guards=[Anchor(10.0)]), adapter(lr=1e-2)
    run(anchored, stream())
    run(free, stream())
    assert anchored.report.drift < free.report.drift
    recovered = adapter(guards=[Recovery(1e9, relative=False)])
    run(recovered, stream(3))
    assert recovered.report.resets == 3
    watched = adapter(lr=0.05, guards=[ActionWatch(1e-4)])
    run(watched, stream(5))
    assert watched.report.resets == 5
    assert watched.report.departure == 0.0
    frozen = adapter(lr=0.05, guards=[ActionWatch(1e-4, "freeze")])
    assert run(frozen, stream(5))[1:] == [None] * 4
    with pytest.raises(DivergedError, match="departs"):
        run(adapter(lr=0.05, guards=[ActionWatch(1e-4, "raise")]), stream(5))
    with pytest.warns(OutlastWarning, match="departs"):
        run(adapter(lr=0.05, guards=[ActionWatch(1e-4, "warn")]), stream(5))
    with pytest.raises(ValueError, match="EntropyFilter needs"):
        adapter(guards=[EntropyFilter()])


def test_a_budget_of_time_skips_updates():
    made = adapter(max_ms=1e-6)
    results = run(made, stream(10))
    assert results[0] is not None
    assert results[1:] == [None] * 9


def test_bad_numbers_are_skipped_and_counted():
    made = adapter()
    floats = [(obs.float() / 255.0, action, following.float() / 255.0) for obs, action, following in stream(4)]
    run(made, floats[:1])
    before = [p.clone() for p in made.adapted.values()]
    bad = floats[1][0].clone()
    bad[0, 0, 0] = math.nan
    assert made.observe(bad, floats[1][1], floats[1][2]) is None
    assert made.report.skipped == 1

    class Bad(InverseDynamics):
        def loss(self, *args):
            return super().loss(*args) * math.inf

    broken = PolicyAdapter(*parts()[:2], Bad(8, A, hidden=16), augment=RandomCrop(CROP))
    untouched = [p.clone() for p in broken.adapted.values()]
    assert run(broken, stream(2)) == [None, None]
    assert {kind for _, kind in broken.report.events} == {"nonfinite"}
    assert all(torch.equal(a, b) for a, b in zip(before, made.adapted.values(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(untouched, broken.adapted.values(), strict=True))


# ---- copies for environments, and a worker --------------------------------------------------------------------------------------------


def columns(n, environments, seed=0):
    obs = torch.randint(256, (n + 1, environments, C, SIDE, SIDE), generator=rng(seed), dtype=torch.uint8)
    done = torch.rand(n, environments, A, generator=rng(seed + 1)) * 2.0 - 1.0
    return [(obs[t], done[t], obs[t + 1]) for t in range(n)]


def single(place, task=None, **settings):
    """What the copy of one environment must equal."""
    own = generator(derived_seed(rng(5).initial_seed(), f"environment {place}"), "adaptation")
    encoder, policy, usual = parts()
    return PolicyAdapter(encoder, policy, usual if task is None else task, **settings, generator=own)


@pytest.mark.parametrize(
    "settings",
    [{}, {"buffer": 6, "newest": 2}, {"update_aux": False, "steps": 2}, {"optimizer": lambda p: torch.optim.SGD(p, lr=0.1)}],
    ids=["newest", "buffer", "encoder", "sgd"],
)
def test_copies_equal_adapters_of_their_own(settings):
    settings = {"augment": RandomCrop(CROP), "batch": 4, "lr": 1e-2, "warmup": 1, **settings}
    both = PolicyAdapter(*parts(), per_env=True, generator=rng(5), guards=[DriftLimit(0.3), Anchor(0.1)], **settings)
    apart = [single(place, guards=[DriftLimit(0.3), Anchor(0.1)], **settings) for place in range(3)]
    for t, (obs, action, following) in enumerate(columns(12, 3)):
        expected = torch.stack([each.act(x) for each, x in zip(apart, obs, strict=True)])
        assert torch.allclose(both.act(obs), expected, atol=1e-5)
        over = torch.tensor([t == 4, False, t == 7])
        valid = torch.tensor([True, t != 3, True])
        both.observe(obs, action, following, truncated=over, valid=valid)
        for place, each in enumerate(apart):
            if valid[place]:
                each.observe(obs[place], action[place], following[place], truncated=over[place])
        if over.any():
            both.begin_episode(over)
            apart[int(over.nonzero())].begin_episode()
    for copied, each in zip(both.reports, apart, strict=True):
        assert copied.updates == each.report.updates > 5
        assert copied.loss == pytest.approx(each.report.loss, abs=1e-5)
        assert copied.events == each.report.events
    assert both.report.updates == sum(each.report.updates for each in apart)
    assert all(torch.equal(a, b) for a, b in zip(both.encoder.parameters(), parts()[0].parameters(), strict=True))
    both.begin_episode()
    frozen = PolicyAdapter(*parts(), augment=RandomCrop(CROP))
    assert torch.allclose(both.act(obs), frozen.act(obs), atol=1e-6)


def test_copies_go_on_from_a_state(tmp_path):
    def fresh():
        return adapter(per_env=True, batch=4, lr=1e-2, buffer=4, generator=rng(3))

    transitions = columns(10, 2)
    whole, half = fresh(), fresh()
    run(whole, transitions)
    run(half, transitions[:5])
    torch.save(half.state_dict(), tmp_path / "state.pt")
    resumed = fresh()
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    run(resumed, transitions[5:])
    assert torch.equal(whole.act(transitions[0][0]), resumed.act(transitions[0][0]))
    assert whole.report.history.tolist() == resumed.report.history.tolist()
    with pytest.raises(ValueError, match="per_env=True"):
        adapter(lr=1e-2).load_state_dict(half.state_dict())


@pytest.mark.parametrize("kind", ["discrete", "rotation"])
def test_copies_of_other_tasks(kind):
    task = InverseDynamics(8, 5, hidden=4, discrete=True) if kind == "discrete" else RotationPrediction(8, hidden=4)
    settings = {"augment": RandomCrop(CROP), "batch": 4, "lr": 1e-2}
    encoder, policy, _ = parts()
    both = PolicyAdapter(encoder, policy, task, per_env=True, generator=rng(5), **settings)
    apart = [single(place, task, **settings) for place in range(2)]
    numbers = torch.randint(5, (6, 2), generator=rng(1))
    for t, (obs, action, following) in enumerate(columns(6, 2)):
        done = numbers[t] if kind == "discrete" else action
        both.observe(obs, done, following)
        for place, each in enumerate(apart):
            each.observe(obs[place][None], done[place][None], following[place][None])
    expected = torch.cat([each.act(x[None]) for each, x in zip(apart, obs, strict=True)])
    assert torch.allclose(both.act(obs), expected, atol=1e-5)
    with pytest.raises(ValueError, match=r"\[0, 5\)" if kind == "discrete" else "as many"):
        both.observe(obs, numbers[0] + 5 if kind == "discrete" else numbers[0][:1], following)


def test_copies_of_bad_input():
    class Looks(nn.Module):
        def forward(self, x):
            return x if float(x.sum()) > 0.0 else -x

    encoder, policy, task = parts()
    made = PolicyAdapter(encoder, nn.Sequential(policy, Looks()), task, per_env=True, augment=RandomCrop(CROP))
    obs = columns(1, 2)[0][0]
    with pytest.raises(UnsupportedError, match="cannot map this policy"):
        made.act(obs)
    both = adapter(per_env=True)
    both.act(obs)
    with pytest.raises(ValueError, match="began with 2"):
        both.act(obs[:1])
    with pytest.raises(ValueError, match="one entry for each of 2"):
        both.begin_episode([True])
    with pytest.raises(UnsupportedError, match=r"use observe\(\)"):
        both.observe_async(*columns(1, 2)[0])


def test_a_worker_computes_the_same_step():
    waiting, working = adapter(lr=1e-2, guards=[Anchor(0.1)]), adapter(lr=1e-2, guards=[Anchor(0.1)])
    for obs, action, following in stream(8):
        expected = waiting.observe(obs, action, following)
        before = working.act(obs)
        assert working.observe_async(obs, action, following)
        assert working.finish() == pytest.approx(expected, rel=1e-5)
        assert not torch.equal(before, working.act(obs))
        assert torch.allclose(waiting.act(obs), working.act(obs), atol=1e-5)
    assert working.finish() is None
    assert working.report.updates == 8


def waiting_task():
    """A task whose loss says that it has started, and waits until it may go on."""
    started, go_on = threading.Event(), threading.Event()

    class Slow(InverseDynamics):
        def loss(self, *args):
            started.set()
            assert go_on.wait(20.0)
            return super().loss(*args)

    return Slow, started, go_on


def test_acting_goes_on_while_a_worker_computes():
    Slow, started, go_on = waiting_task()
    encoder, policy, _ = parts()
    made = PolicyAdapter(encoder, policy, Slow(8, A, hidden=16), augment=RandomCrop(CROP), batch=4, lr=1e-2)
    (obs, action, following), second = stream(2)
    before = made.act(obs)
    assert made.observe_async(obs, action, following)
    assert started.wait(20.0)
    assert torch.equal(made.act(obs), before)  # the old weights, at once
    assert not made.observe_async(*second)  # the worker is busy
    go_on.set()
    made.finish()
    assert not torch.equal(made.act(obs), before)
    assert (made.report.updates, made.report.skipped, made.report.seen) == (1, 1, 2)


def test_without_crops_one_row_is_used_and_the_callers_array_may_change():
    Slow, started, go_on = waiting_task()
    encoder, policy, task = parts()
    x, action, y = stream(1)[0]
    images = [image[None, :, 1:9, 1:9].float() / 255.0 for image in (x, y)]
    plain = PolicyAdapter(encoder, policy, task, batch=8)
    expected = plain.observe(images[0], action[None], images[1])
    assert plain.report.used == 1
    slow = Slow(8, A, hidden=16)
    slow.load_state_dict(task.state_dict())
    made = PolicyAdapter(encoder, policy, slow, batch=8)
    arrays = [image.clone() for image in images]
    assert made.observe_async(arrays[0], action[None], arrays[1])
    assert started.wait(20.0)
    for array in arrays:
        array.zero_()
    go_on.set()
    assert made.finish() == pytest.approx(expected, rel=1e-6)
    assert made.report.used == 1
    assert made.departure() == pytest.approx(plain.departure(), rel=1e-5)
    with pytest.raises(UnsupportedError, match="reports"):
        adapter(per_env=True).loss(x, action, y)


def test_a_policy_without_a_head_is_no_state():
    made = adapter()
    state = {name: value for name, value in made.state_dict().items() if not name.startswith("aux.")}
    with pytest.raises(ValueError, match="joint"):
        made.load_state_dict(state)


# ---- traps that users fall into ----------------------------------------------------------------------------------------------------


def test_a_nan_gradient_of_a_finite_loss_changes_nothing():
    class Steep(InverseDynamics):
        def loss(self, *args):
            return super().loss(*args) + 0.0 * self.head[0].weight.sum().sub(self.head[0].weight.sum()).sqrt()

    encoder, policy, _ = parts()
    for settings in ({}, {"per_env": True}):
        made = PolicyAdapter(encoder, policy, Steep(8, A, hidden=16), augment=RandomCrop(CROP), lr=0.1, **settings)
        obs, action, following = (x[None] for x in stream(1)[0])
        before = made.act(obs)
        assert made.observe(obs, action, following) is None
        assert torch.equal(made.act(obs), before)
        assert made.report.skipped == 1
        assert made.report.events[0][1].endswith("nonfinite")
        if not settings:
            assert made.observe_async(obs, action, following)
            assert made.finish() is None
            assert torch.equal(made.act(obs), before)


def test_a_gate_on_rotation_looks_at_all_turns():
    """A head that always says "not turned" is right once in four times, whatever a gate draws."""
    encoder, policy, _ = parts()
    task = RotationPrediction(8, hidden=4)
    task.head = Constant(torch.tensor([50.0, 0.0, 0.0, 0.0]))
    made = PolicyAdapter(encoder, policy, task, augment=RandomCrop(CROP), gate=40.0)
    transition = stream(1)[0]
    assert made.loss(*transition) == pytest.approx(0.75 * 50.0)
    assert made.observe(*transition) is None
    assert made.report.gate_loss == pytest.approx(0.75 * 50.0)
    still = PolicyAdapter(encoder, policy, RotationPrediction(8, hidden=4), augment=RandomCrop(CROP))
    run(still, stream(15, actions=torch.zeros(15, A)))
    assert still.report.updates == 15  # the task does not read the action


def test_discrete_and_saturated_policies_are_taken():
    encoder, _, _ = parts()
    task = InverseDynamics(8, 4, hidden=4, discrete=True)
    for seed in range(20):
        torch.manual_seed(seed)
        made = PolicyAdapter(encoder, nn.Linear(8, 4), task, augment=RandomCrop(CROP), act_fn=lambda out: out.argmax(1), lr=0.0)
        assert made.act(stream(1)[0][0]).dtype == torch.int64
        made.observe(stream(1)[0][0], torch.tensor(1), stream(1)[0][2])
        assert made.departure() == 0.0
    saturated = nn.Sequential(nn.Linear(8, A), nn.Tanh())
    with torch.no_grad():
        saturated[0].bias += 20.0
    PolicyAdapter(encoder, saturated, parts()[2], augment=RandomCrop(CROP)).act(stream(1)[0][0])
    dark = nn.Sequential(nn.Conv2d(C, 4, 3, 2, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(36, 8, bias=False))
    PolicyAdapter(dark, nn.Linear(8, A), parts()[2], augment=RandomCrop(CROP)).act(torch.zeros(C, SIDE, SIDE, dtype=torch.uint8))

    class Deaf(nn.Module):
        def forward(self, features):
            return torch.zeros(len(features), A)

    with pytest.raises(ValueError, match="does not change the action"):
        PolicyAdapter(encoder, Deaf(), task, augment=RandomCrop(CROP)).act(torch.full((C, SIDE, SIDE), math.nan))


def test_remembered_features_follow_the_callers_array_and_survive_a_policy_in_place():
    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.out = nn.Linear(8, A)

        def forward(self, features):
            return self.out(features.mul_(2.0))

    made = adapter(gate=1e9)
    buffer, other = (x.float() / 255.0 for x in (stream(2)[0][0], stream(2)[1][0]))
    fresh = adapter().act(other)
    made.act(buffer)
    buffer.copy_(other)
    assert torch.equal(made.act(buffer), fresh)
    encoder, _, task = parts()
    changing = PolicyAdapter(encoder, InPlace(), task, augment=RandomCrop(CROP), gate=1e9)
    assert torch.equal(changing.act(other), changing.act(other))


def test_copies_of_an_adapter_go_on_adapting():
    for settings in ({}, {"per_env": True}):
        made = adapter(lr=1e-2, **settings)
        transitions = columns(6, 2) if settings else stream(6)
        made.act(transitions[0][0])
        if not settings:
            made.observe_async(*transitions[0])
        for again in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
            before = again.act(transitions[0][0])
            run(again, transitions[1:])
            assert not torch.equal(again.act(transitions[0][0]), before)
        run(made, transitions[1:])
        assert torch.equal(made.act(transitions[0][0]), again.act(transitions[0][0]))


def test_wide_adapters_move_with_their_source():
    for settings in ({}, {"per_env": True}):
        made = adapter(lr=1e-2, buffer=4, **settings)
        transitions = columns(4, 2) if settings else stream(4)
        run(made, transitions[:2])
        made.double()
        run(made, transitions[2:])
        assert made.report.updates == (8 if settings else 4)
        assert made.act(transitions[0][0]).dtype == torch.float64
        made.begin_episode()
        assert made.report.drift == pytest.approx(0.0, abs=1e-12)


def test_guards_end_a_transitions_steps():
    for settings in ({}, {"per_env": True}):
        made = adapter(lr=1e-2, steps=3, guards=[ActionWatch(1e-9, "freeze", every=2)], **settings)
        transition = columns(1, 1)[0] if settings else stream(1)[0]
        made.observe(*transition)
        assert made.report.updates == 2
        assert made.report.drift == 0.0
        assert made.report.events[-1][1].endswith("frozen")


def test_what_users_call_reaches_the_copies_and_waits_for_the_worker():
    made = adapter(lr=1e-2, per_env=True)
    transitions = columns(3, 2)
    made.observe(*transitions[0])
    assert made.last_loss > 0.0
    made.restore("by hand")
    assert made.report.drift == 0.0
    made.freeze()
    assert made.observe(*transitions[1]) is None
    single_one = adapter(lr=0.1)
    single_one.observe_async(*stream(1)[0])
    single_one.restore("by hand")
    single_one.freeze()
    assert single_one.finish() is None
    assert single_one.report.drift == 0.0


def test_calibration_changes_nothing_else():
    made = adapter(lr=1e-2)
    run(made, stream(3))
    expected = copy.deepcopy(made)
    with pytest.warns(OutlastWarning, match="no better than a constant"):
        assert made.calibrate(Dots(), 2) > 0.0
    assert made.report.threshold is None  # no gate was asked for
    more = stream(3, seed=5)
    assert run(made, more) == run(expected, more)
    gated = adapter(gate="auto")
    with pytest.warns(OutlastWarning):
        gated.calibrate(Dots(), 1)
    plain = adapter(gate=0.7)
    plain.load_state_dict(gated.state_dict())
    assert plain.report.threshold == 0.7


def test_more_environments_than_copies_take_turns():
    losses = []
    for change in (False, True):
        made = adapter(batch=2, lr=0.0)
        for obs, action, following in columns(3, 5):
            action = action.clone()
            if change:
                action[4] = -action[4]
            losses.append(made.observe(obs, action, following))
    assert losses[:2] == losses[3:5]  # environments 0, 1 and 2, 3
    assert losses[2] != losses[5]  # 4, 0


def test_episodes_begin_alike():
    made = adapter(lr=1e-2, gate=1e-9, guards=[ActionWatch(1e-9, "reset", every=2)])
    runs = []
    for _ in range(2):
        made.begin_episode()
        assert math.isnan(made.report.gate_loss)
        made._batches.generator.manual_seed(3)
        runs.append((run(made, stream(3)), made.report.resets))
    assert runs[0][0] == runs[1][0]
    assert [resets for _, resets in runs] == [1, 2]
    still = torch.zeros(12, A)
    for _ in range(2):
        made.begin_episode()
        run(made, stream(12, actions=still))
    assert [kind for _, kind in made.report.events].count("degenerate") == 2


def test_each_environment_must_vary():
    made = adapter()
    for obs, _, following in columns(14, 2):
        made.observe(obs, torch.tensor([[0.5, 0.5], [-0.5, -0.5]]), following)
    assert made.report.updates == 9


def test_weights_loaded_alone_are_the_new_source():
    other = parts(seed=3)
    for load in (
        lambda made: made.encoder.load_state_dict(other[0].state_dict()),
        lambda made: made.load_state_dict({f"encoder.{k}": v for k, v in other[0].state_dict().items()}, strict=False),
        lambda made: made.load_state_dict({**made.state_dict(), "x": 0}, strict=False, assign=True),
    ):
        made = adapter(lr=1e-2, gate=1e-9)
        transitions = stream(3)
        run(made, transitions)
        load(made)
        loaded = made.act(transitions[0][0])
        assert made.observe(*transitions[0]) is not None
        assert not torch.equal(made.act(transitions[0][0]), loaded)
    made = adapter(lr=1e-2)
    made.encoder.load_state_dict(other[0].state_dict())
    loaded = made.act(transitions[0][0])
    run(made, transitions)
    made.begin_episode()
    assert torch.equal(made.act(transitions[0][0]), loaded)


def test_the_time_of_an_update_is_not_the_time_until_it_is_asked_for():
    made = adapter(max_ms=1e-9)
    assert made.observe_async(*stream(1)[0])
    threading.Event().wait(0.3)
    assert made.finish() is not None
    spent = made.report.milliseconds
    assert spent < 250.0
    done = run(made, stream(25))
    assert made.report.updates == 2  # one is tried again after twenty
    assert done[19] is not None


def test_other_observations():
    for obs, kind, message in (
        (np.zeros((C, SIDE, SIDE), np.int64), TypeError, "bytes"),
        (np.full((C, SIDE, SIDE), 200.0, np.float32), ValueError, "as uint8"),
        (np.zeros((0, C, SIDE, SIDE), np.uint8), ValueError, "images"),
    ):
        with pytest.raises(kind, match=message):
            adapter().act(obs)
    made, wide = adapter(), adapter()
    for obs, action, following in stream(2):
        x, y = obs.float() / 255.0, following.float() / 255.0
        assert made.observe(x, action, y) == pytest.approx(wide.observe(x.double().numpy(), action, y.double().numpy()), rel=1e-6)
    bad = torch.full((C, SIDE, SIDE), math.nan)
    assert made.observe(bad, made.act(bad), y) is None  # the policy answered with NaN to NaN
    assert not math.isnan(made.departure())
    inside = adapter()
    with torch.inference_mode():
        x = stream(1)[0][0] + 0
        assert inside.observe(x, inside.act(x), x) is not None
        inside.begin_episode()


def test_episode_bookkeeping_counts_once():
    made = adapter(per_env=True)
    (obs, action, following), *_ = columns(1, 2)
    made.observe(obs, action, following, terminated=[False, True])
    with pytest.raises(StateError, match="boundary"):
        made.observe(obs, action, following)
    assert [each.seen for each in made.reports] == [1, 1]
    shared = adapter()
    shared.observe(obs, action, following)
    with pytest.raises(ValueError, match="begin_episode"):
        shared.observe(obs[:1], action[:1], following[:1])
    for mask in ([], [True] * 7):
        with pytest.raises(ValueError, match="one entry"):
            shared.begin_episode(mask)


def test_compiled_encoders_and_autocast():
    encoder, policy, task = parts()
    plain = PolicyAdapter(encoder, policy, task, augment=RandomCrop(CROP), lr=1e-2)
    compiled = PolicyAdapter(torch.compile(encoder, backend="eager"), policy, task, augment=RandomCrop(CROP), lr=1e-2)
    mixed = PolicyAdapter(encoder, policy, task, augment=RandomCrop(CROP), lr=1e-2)
    for transition in stream(4):
        expected = plain.observe(*transition)
        assert compiled.observe(*transition) == pytest.approx(expected, rel=1e-5)
        with torch.autocast("cpu", torch.bfloat16):
            assert mixed.observe(*transition) == pytest.approx(expected, rel=0.1)
    assert all(p.dtype == torch.float32 for p in mixed.adapted.values())


def test_unused_weights_of_copies_do_not_decay():
    _, policy, task = parts()

    class Spare(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.spare = parts()[0], nn.Parameter(torch.ones(2))

        def forward(self, x):
            return self.body(x)

    made = PolicyAdapter(
        Spare(), policy, task, per_env=True, augment=RandomCrop(CROP), optimizer=lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.5)
    )
    run(made, columns(2, 2))
    assert made.report.updates == 4
    assert torch.equal(made._copies.all[0].encoder.spare, torch.ones(2))


# ---- bad input ----------------------------------------------------------------------------------------------------------------------


def test_settings_are_checked():
    for settings, kind, message in (
        ({"batch": 0}, ValueError, "batch"),
        ({"lr": -1.0}, ValueError, "lr"),
        ({"buffer": -1}, ValueError, "buffer"),
        ({"newest": 9, "buffer": 9}, ValueError, "newest must be at most"),
        ({"newest": 2}, ValueError, "give buffer"),
        ({"augment": 5}, TypeError, "augment must be a function"),
        ({"act_fn": 5}, TypeError, "act_fn must be a function"),
        ({"generator": 5}, TypeError, r"torch\.Generator"),
        ({"guards": DriftLimit(0.1)}, TypeError, "sequence"),
        ({"gate": 0.0}, ValueError, "gate"),
        ({"steps": 0}, ValueError, "steps"),
        ({"params": "biases"}, ValueError, "params"),
        ({"params": lambda name, p: False}, ValueError, "no parameter"),
        ({"optimizer": torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)}, TypeError, "factory"),
    ):
        with pytest.raises(kind, match=message):
            adapter(**settings)
    encoder, policy, _ = parts()
    with pytest.raises(TypeError, match="joint training"):
        PolicyAdapter(encoder, policy, nn.Linear(2, 2))
    with pytest.raises(TypeError, match="encoder must be"):
        PolicyAdapter(lambda x: x, policy, parts()[2])


def test_observations_and_actions_are_checked():
    made = adapter()
    obs, _, following = stream(1)[0]
    made.act(obs)
    for bad, message in (
        (obs.float() / 255.0, r"bytes in \[0, 255\] so far, got .*torch.float32 in \[0, 1\]"),
        (obs[:, :9], "must not change"),
        (obs[0], r"\(C, H, W\)"),
    ):
        with pytest.raises(ValueError, match=message):
            made.act(bad)
    with pytest.raises(ValueError, match="NaN"):
        made.observe(obs, torch.tensor([math.nan, 0.0]), following)
    with pytest.raises(ValueError, match=r"\(1, 2\)"):
        made.observe(obs, torch.zeros(3), following)
    with pytest.raises(ValueError, match="smaller than the crop"):
        adapter().act(obs[:, :4, :4])


def test_a_policy_that_does_not_take_the_features_is_refused():
    encoder, _, task = parts()

    class Deaf(nn.Module):
        def forward(self, features):
            return torch.zeros(len(features), A)

    with pytest.raises(ValueError, match="does not change the action"):
        PolicyAdapter(encoder, Deaf(), task, augment=RandomCrop(CROP)).act(stream(1)[0][0])


def test_paper_settings_and_what_it_prints():
    made = PolicyAdapter.paper(*parts(), augment=RandomCrop(CROP))
    assert "Adam(lr=0.001)" in repr(made)
    assert "batch=32" in repr(made)
    assert "episodic" in repr(made)
    run(made, stream(3))
    report = made.report
    assert report.updates == 3
    assert report.used == 96
    assert report.departure > 0.0
    assert report.to_dict()["kind"] == "PolicyAdaptReport"
    pytest.importorskip("matplotlib")
    assert drawn(report)


def test_what_the_task_shares_is_adapted_once():
    encoder, policy, _ = parts()

    class Shared(InverseDynamics):
        def __init__(self, body):
            super().__init__(8, A, hidden=4)
            self.body = body

    made = PolicyAdapter(encoder, policy, Shared(encoder[4 - 1]), augment=RandomCrop(CROP))
    ids = [id(p) for p in made.adapted.values()]
    assert len(ids) == len(set(ids))
    assert made.aux.body is made.encoder[3]
    run(made, stream(2))
    assert F.mse_loss(made.aux.body.weight, made.encoder[3].weight) == 0.0


# ---- environments and other libraries ---------------------------------------------------------------------------------------------------


def reach_parts(stack=3):
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Conv2d(3 * stack, 4, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 11 * 11, 8))
    return encoder, nn.Sequential(nn.Linear(8, A), nn.Tanh()), InverseDynamics(8, A, hidden=8)


def test_environments_feed_their_adapter():
    gymnasium = pytest.importorskip("gymnasium")
    from outlast.adapt import AdaptedEnv
    from outlast.rl import FrameStack, PixelReach

    made = PolicyAdapter(*reach_parts(), augment=RandomCrop(24), batch=4)
    env = AdaptedEnv(FrameStack(PixelReach(stack=1, steps=8), 3), made)
    for episode in range(2):
        obs, _ = env.reset(seed=episode)
        over = False
        while not over:
            obs, _, _, over, _ = env.step(made.act(obs).numpy())
    assert made.report.seen == 16
    assert made.report.updates == 12  # two of each episode are skipped, since the stack repeats frames
    with pytest.raises(ValueError, match="not in"):
        env.step(np.array([2.0, 0.0], np.float32))
    with pytest.raises(ValueError, match="images"):
        AdaptedEnv(__import__("gymnasium").make("CartPole-v1"), made)
    with pytest.raises(TypeError, match="PolicyAdapter"):
        AdaptedEnv(PixelReach(), None)
    fresh = AdaptedEnv(PixelReach(), made)
    with pytest.raises(StateError, match=r"before reset\(\)"):
        fresh.step(np.zeros(2, np.float32))
    again = copy.deepcopy(env)
    again.reset(seed=0)
    obs, *_ = again.step(torch.zeros(2))  # a tensor, as act() gives it
    assert again.adapter.report.seen == 17
    copies = AdaptedEnv(
        gymnasium.vector.SyncVectorEnv([PixelReach] * 2), PolicyAdapter(*reach_parts(), augment=RandomCrop(24), per_env=True)
    )
    copies.reset(seed=0)
    for _ in range(4):
        copies.step(copies.action_space.sample())
    assert copies.adapter.report.updates == 4  # each of two copies skips the first two of its steps
    given = PolicyAdapter(*reach_parts(), augment=RandomCrop(24), warmup=0)
    assert AdaptedEnv(PixelReach(), given).adapter._warmup == 0
    assert AdaptedEnv(PixelReach(), made).adapter._warmup == 2
    with pytest.warns(OutlastWarning, match="no better than a constant"):
        made.calibrate(env, 1)  # the environment inside
    assert made.report.seen == 16


def test_environments_that_write_into_their_own_observation():
    gymnasium = pytest.importorskip("gymnasium")
    from outlast.adapt import AdaptedEnv

    class Reused(gymnasium.Env):
        observation_space = gymnasium.spaces.Box(0, 255, (C, SIDE, SIDE), np.uint8)
        action_space = gymnasium.spaces.Discrete(3)

        def __init__(self):
            self.obs = np.zeros((C, SIDE, SIDE), np.uint8)

        def reset(self, *, seed=None, options=None):
            super().reset(seed=seed)
            self.obs[:] = 0
            return self.obs, {}

        def step(self, action):
            assert self.action_space.contains(action)
            self.obs += 1
            return self.obs, 0.0, False, False, {}

    seen = []

    class Recorder(AuxTask):
        def loss(self, encoder, obs, action, next_obs):
            seen.append((float(obs.mean() * 255.0), float(next_obs.mean() * 255.0)))
            return encoder(obs).sum()

    encoder, _, _ = parts()
    made = PolicyAdapter(encoder, nn.Linear(8, 3), Recorder(), augment=RandomCrop(CROP), act_fn=lambda out: out.argmax(1))
    env = AdaptedEnv(Reused(), made)
    obs, _ = env.reset(seed=0)
    for _ in range(2):
        obs, *_ = env.step(made.act(obs))
    assert [(round(a), round(b)) for a, b in seen] == [(0, 1), (1, 2)]
    with pytest.raises(ValueError, match="not in"):
        env.step(1.7)


@pytest.mark.parametrize("per_env", [False, True])
@pytest.mark.parametrize("buffer", [0, 6])
@pytest.mark.parametrize("mode", ["NEXT_STEP", "SAME_STEP", "DISABLED"])
def test_vector_environments_never_pair_two_episodes(mode, buffer, per_env):
    gymnasium = pytest.importorskip("gymnasium")
    from gymnasium.vector import AutoresetMode, SyncVectorEnv

    from outlast.adapt import AdaptedEnv

    class Numbered(gymnasium.Env):
        """A picture of 20 times the episode plus the step; episodes of random length."""

        observation_space = gymnasium.spaces.Box(0, 255, (1, 4, 4), np.uint8)
        action_space = gymnasium.spaces.Box(-1.0, 1.0, (A,), np.float32)

        def __init__(self, seed):
            self.draws, self.episode = np.random.default_rng(seed), -1

        def reset(self, *, seed=None, options=None):
            super().reset(seed=seed)
            self.episode, self.t, self.length = self.episode + 1, 0, int(self.draws.integers(2, 7))
            return self._look(), {}

        def step(self, action):
            self.t += 1
            return self._look(), 0.0, False, self.t == self.length, {}

        def _look(self):
            return np.full((1, 4, 4), 20 * self.episode + self.t, np.uint8)

    class Recorder(AuxTask):
        def __init__(self):
            super().__init__()
            self.pairs_seen = []
            self.weight = nn.Parameter(torch.zeros(()))

        def loss(self, encoder, obs, action, next_obs):
            if not per_env:  # inside vmap values cannot be looked at
                numbers = [(255.0 * x[:, 0, 0, 0]).round().long().tolist() for x in (obs, next_obs)]
                self.pairs_seen.append(set(zip(*numbers, strict=True)))
            return (encoder(obs) * self.weight).sum()

    encoder = nn.Sequential(nn.Flatten(), nn.Linear(16, 4))
    made = PolicyAdapter(encoder, nn.Linear(4, A), Recorder(), batch=4, warmup=1, episodic=False, buffer=buffer, per_env=per_env)
    env = AdaptedEnv(SyncVectorEnv([lambda: Numbered(3), lambda: Numbered(5)], autoreset_mode=AutoresetMode[mode]), made)
    env.reset(seed=0)
    draws = np.random.default_rng(0)
    for _ in range(14):
        *_, terminated, truncated, _ = env.step(draws.uniform(-1.0, 1.0, (2, A)).astype(np.float32))
        over = np.logical_or(terminated, truncated)
        if mode == "DISABLED" and over.any():
            env.reset(options={"reset_mask": over})
    with pytest.raises(ValueError, match="not in"):
        env.step(np.full((2, A), 7.0, np.float32))
    assert made.report.updates > 5
    if per_env:
        kept = [entry for each in made._copies.all for entry in each._batches.recent]
        pairs = {(int(before[0, 0, 0]), int(after[0, 0, 0])) for before, _, after in kept}
        assert bool(pairs) == bool(buffer)
        assert all(after == before + 1 and before % 20 for before, after in pairs)
        return
    pairs = set().union(*made.aux.pairs_seen)
    assert len(pairs) > 6
    assert all(after == before + 1 for before, after in pairs)
    assert not any(before % 20 == 0 for before, _ in pairs)  # the warm-up of every episode


@pytest.mark.parametrize("algorithm", ["SAC", "PPO", "A2C"])
def test_policies_of_stable_baselines3(algorithm):
    sb3 = pytest.importorskip("stable_baselines3")
    from outlast.adapt import from_sb3
    from outlast.rl import PixelReach

    env = PixelReach(size=36)
    settings = {"SAC": {"buffer_size": 10}, "PPO": {"n_steps": 8, "batch_size": 8}, "A2C": {"n_steps": 8}}[algorithm]
    model = getattr(sb3, algorithm)("CnnPolicy", env, seed=0, device="cpu", **settings)
    encoder, policy = from_sb3(model)
    task = InverseDynamics(512, A, hidden=8)
    made = PolicyAdapter(encoder, policy, task, batch=2)
    obs, _ = env.reset(seed=0)
    for _ in range(3):
        expected, _ = model.predict(obs, deterministic=True)
        action = made.act(obs).numpy()
        assert np.allclose(action, expected, atol=1e-5)
        following, *_ = env.step(action)
        made.begin_episode()
        assert made.observe(obs, action, following) is not None
        made.begin_episode()
        obs = following
    with pytest.raises(UnsupportedError, match="Stable-Baselines3"):
        from_sb3(encoder)
    with pytest.raises(UnsupportedError, match="exploration"):
        from_sb3(getattr(sb3, algorithm)("CnnPolicy", env, use_sde=True, device="cpu", **settings))


def test_discrete_policies_of_stable_baselines3():
    sb3 = pytest.importorskip("stable_baselines3")
    import gymnasium

    from outlast.adapt import from_sb3
    from outlast.rl import PixelReach

    class Four(gymnasium.ActionWrapper):
        def __init__(self, env):
            super().__init__(env)
            self.action_space = gymnasium.spaces.Discrete(4)

        def action(self, action):
            return np.array([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]], np.float32)[action]

    for seed in range(3):
        env = Four(PixelReach(size=36))
        model = sb3.PPO("CnnPolicy", env, seed=seed, device="cpu", n_steps=8, batch_size=8)
        made = PolicyAdapter(*from_sb3(model), InverseDynamics(512, 4, hidden=8, discrete=True), batch=2)
        obs, _ = env.reset(seed=0)
        action = made.act(obs)
        assert int(action) == int(model.predict(obs, deterministic=True)[0])
        assert made.observe(obs, action, env.step(int(action))[0]) is not None
