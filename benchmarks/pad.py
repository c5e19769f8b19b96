"""Adapting a policy: the step, what surrounds it, the environments and their memory.

The authors' program needs CUDA and is no package; its update is written here anew as a plain loop from its description: copies of the
transition made on the host and cropped one by one, an encoder pass for each observation, two Adams.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks._harness import Row, medians, write
from outlast.adapt import InverseDynamics, PolicyAdapter, RandomCrop
from outlast.errors import MissingExtraError
from outlast.rl import ControlEnv, PixelReach, PixelSAC
from outlast.rl._stack import FrameReplay


class _PlainUpdate:
    """The update as a loop over copies."""

    def __init__(self, encoder: nn.Module, aux: InverseDynamics, crop: int, batch: int) -> None:
        self.encoder, self.aux, self.crop, self.batch = encoder, aux, crop, batch
        self.of_encoder = torch.optim.Adam(encoder.parameters(), lr=1e-3)
        self.of_aux = torch.optim.Adam(aux.parameters(), lr=1e-3)
        self.draws = np.random.default_rng(0)

    def _crops(self, obs: np.ndarray) -> Tensor:
        places = self.draws.integers(0, obs.shape[-1] - self.crop + 1, (self.batch, 2))
        found = np.stack([obs[:, y : y + self.crop, x : x + self.crop] for y, x in places])
        return torch.as_tensor(found).float() / 255.0

    def __call__(self, obs: np.ndarray, action: np.ndarray, following: np.ndarray) -> None:
        before, after = self._crops(obs), self._crops(following)
        done = torch.as_tensor(action).repeat(self.batch, 1)
        features = [self.aux.projection(self.encoder(x)) for x in (before, after)]
        loss = F.mse_loss(self.aux.head(torch.cat(features, 1)), done)
        self.of_encoder.zero_grad()
        self.of_aux.zero_grad()
        loss.backward()
        self.of_encoder.step()
        self.of_aux.step()


def _large() -> tuple[nn.Module, nn.Module, InverseDynamics]:
    """Eleven 3x3 convolutions with 32 filters on 84 pixels, as in the paper."""
    layers: list[nn.Module] = []
    for number in range(11):
        layers += [nn.Conv2d(9 if number == 0 else 32, 32, 3, 2 if number == 0 else 1), nn.ReLU()]
    projection = nn.Sequential(nn.Linear(32 * 21 * 21, 100), nn.LayerNorm(100), nn.Tanh())
    policy = nn.Sequential(nn.Linear(32 * 21 * 21, 100), nn.Tanh(), nn.Linear(100, 2), nn.Tanh())
    return nn.Sequential(*layers, nn.Flatten()), policy, InverseDynamics(100, 2, 1024, projection=projection)


def _steps(name: str, parts: tuple[nn.Module, nn.Module, InverseDynamics], side: int, crop: int, batch: int, repeats: int) -> list[Row]:
    import copy

    draws = np.random.default_rng(1)
    obs, following = (draws.integers(0, 256, (9, side, side), dtype=np.uint8) for _ in range(2))
    action = np.array([0.3, -0.2], np.float32)
    plain = _PlainUpdate(*copy.deepcopy((parts[0], parts[2])), crop, batch)
    ours = PolicyAdapter.paper(*parts, batch=batch, augment=RandomCrop(crop))
    count = [0]

    def observe() -> None:
        count[0] += 1  # other actions, so that the rule for constant ones does not skip
        assert ours.observe(obs, action * (1 if count[0] % 2 else -1), following) is not None

    found = medians({"plain": lambda: plain(obs, action, following), "ours": observe}, repeats=repeats)
    ratio = found["ours"] / found["plain"]
    return [
        Row(f"adaptation step, {name}", "plain loop", found["plain"]),
        Row(f"adaptation step, {name}", "outlast, paper preset", found["ours"], ratio, "<= 0.9", ratio <= 0.9),
    ]


def _around(parts: tuple[nn.Module, nn.Module, InverseDynamics]) -> list[Row]:
    million = nn.Sequential(nn.Flatten(), nn.Linear(9 * 24 * 24, 190), nn.ReLU(), nn.Linear(190, 50))
    adapter = PolicyAdapter(million, nn.Linear(50, 2), InverseDynamics(50, 2, 64), augment=RandomCrop(24))
    draws = np.random.default_rng(2)
    stream = draws.integers(0, 256, (200, 9, 28, 28), dtype=np.uint8)
    actions = draws.uniform(-1.0, 1.0, (200, 2)).astype(np.float32)
    begun: list[float] = []
    for t in range(30):  # each from adapted weights and a built optimizer
        adapter.observe(stream[t], actions[t], stream[t + 1])
        start = time.perf_counter()
        adapter.begin_episode()
        begun.append(1e3 * (time.perf_counter() - start))
    begin = sorted(begun)[15]

    frozen = PolicyAdapter(*parts, lr=0.0, augment=RandomCrop(24))
    gated = PolicyAdapter(*parts, gate=float("inf"), augment=RandomCrop(24))
    places = {"frozen": 0, "gated": 0}

    def step(name: str, adapter: PolicyAdapter, learns: bool) -> None:
        t = places[name] = (places[name] + 1) % 198
        adapter.act(stream[t])
        if learns:
            adapter.observe(stream[t], actions[t], stream[t + 1])

    features = parts[0](torch.rand(2, 9, 24, 24))

    def head() -> None:
        with torch.no_grad():
            before, after = parts[2].projection(features).chunk(2)
            parts[2].head(torch.cat([before, after], 1))

    rivals: dict[str, Callable[[], object]] = {
        "frozen": lambda: step("frozen", frozen, False),
        "gated": lambda: step("gated", gated, True),
        "head": head,
    }
    found = medians(rivals, repeats=300, warmup=20)
    extra = found["gated"] - found["frozen"]
    return [
        Row("begin_episode()", "1,000,000 weights", begin, None, "<= 1 ms", begin <= 1.0),
        Row("a step whose gate is closed", "forward of the head", found["head"]),
        Row("a step whose gate is closed", "act() alone", found["frozen"]),
        Row("a step whose gate is closed", "what observe() adds", extra, extra / found["head"], "<= 1", extra <= found["head"]),
    ]


def _environments(parts: tuple[nn.Module, nn.Module, InverseDynamics]) -> list[Row]:
    env = PixelReach()
    env.reset(seed=0)
    action = np.array([0.1, 0.2], np.float32)

    def thousand() -> None:
        for step in range(1000):
            if step % 50 == 0:
                env.reset()
            env.step(action)

    pace = medians({"steps": thousand}, repeats=5, warmup=1)["steps"]
    replay = FrameReplay(20_000, (3, 28, 28), (2,))
    ratio = replay.nbytes / (20_000 * 3 * 28 * 28)
    n = 8
    draws = torch.Generator().manual_seed(0)
    obs = torch.randint(256, (2, n, 9, 28, 28), generator=draws, dtype=torch.uint8)
    actions = torch.rand(n, 2, generator=draws)
    copies = PolicyAdapter(*parts, per_env=True, batch=16, augment=RandomCrop(24))
    apart = [PolicyAdapter(*parts, batch=16, augment=RandomCrop(24)) for _ in range(n)]
    signs = {"together": 1.0, "apart": 1.0}  # other actions each time, so that the rule for constant ones does not skip

    def together() -> None:
        signs["together"] *= -1.0
        copies.act(obs[0])
        assert copies.observe(obs[0], signs["together"] * actions, obs[1]) is not None

    def one_by_one() -> None:
        signs["apart"] *= -1.0
        for place, each in enumerate(apart):
            each.act(obs[0, place])
            assert each.observe(obs[0, place], signs["apart"] * actions[place], obs[1, place]) is not None

    many = medians({"together": together, "apart": one_by_one}, repeats=15)
    rows = [
        Row("PixelReach, 28 px", "1,000 steps", pace, None, "<= 200 ms", pace <= 200.0),
        Row("replay, bytes over those of its frames", "20,000 frames", 0.0, ratio, "<= 1.1", ratio <= 1.1),
        Row("8 environments, act and observe", "8 adapters", many["apart"]),
        Row("8 environments, act and observe", "per_env=True", many["together"], many["together"] / many["apart"]),
    ]
    return rows + _control()


def _control() -> list[Row]:
    try:
        fast = ControlEnv("cartpole", "swingup", 84)
    except MissingExtraError as error:
        print(f"dm_control is not measured: {error}")
        return []
    from dm_control import suite

    usual = suite.load("cartpole", "swingup", task_kwargs={"random": 0})
    usual.reset()
    fast.reset(seed=0)
    found = medians({"default": lambda: usual.physics.render(84, 84, camera_id=0), "ours": fast.render}, repeats=30)
    default, ours = found["default"], found["ours"]
    usual.physics.free()  # its renderer complains when the interpreter ends before it does
    return [
        Row("a frame of cartpole, 84 px", "dm_control, default flags", default),
        Row("a frame of cartpole, 84 px", "ControlEnv", ours, ours / default, "<= 0.1", ours / default <= 0.1),
    ]


def main() -> None:
    """Measure and write the table."""
    torch.set_num_threads(1)
    sac = PixelSAC(PixelReach())
    small = (sac.encoder, sac.policy, sac.aux)
    rows = _steps("3 convolutions, 28 px, 16 crops", small, 28, 24, 16, 60)
    rows += _steps("11 convolutions, 100 px, 32 crops", _large(), 100, 84, 32, 12)
    write("pad", [*rows, *_around(small), *_environments(small)])
