"""A small reference trainer: soft actor-critic on pixels, with an auxiliary task on the encoder that actor and critic share.

Haarnoja et al., "Soft Actor-Critic", ICML 2018, with the shared encoder of Yarats et al., "Improving Sample Efficiency in Model-Free
Reinforcement Learning from Images", AAAI 2021, and the joint training of Hansen et al., ICLR 2021.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from outlast._core._checks import choice, integer, real
from outlast._core._random import derived_seed, seeded
from outlast._core._random import generator as stream_of
from outlast.adapt import AuxTask, InverseDynamics, RandomCrop
from outlast.rl._stack import FrameReplay

_LOG_STD = (-10.0, 2.0)


def _branch(features: int, width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(features, width), nn.LayerNorm(width), nn.Tanh())


def _mlp(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, outputs))


def _projected(features: int, width: int | None) -> list[nn.Module]:
    """A projection of one's own, or none where the encoder has it."""
    return [] if width is None else [_branch(features, width)]


class PixelEncoder(nn.Module):
    """Three 3x3 convolutions with strides 2, 2, 1 and ReLU, flattened; the part that policy, critic and auxiliary task share.

    With ``width`` they also share a projection to so many features: ``Linear``, ``LayerNorm``, ``tanh``.
    """

    def __init__(self, channels: int, size: int, filters: int = 16, width: int | None = None) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, stride in ((channels, 2), (filters, 2), (filters, 1)):
            layers += [nn.Conv2d(before, filters, 3, stride), nn.ReLU()]
        self.layers = nn.Sequential(*layers, nn.Flatten())
        with torch.no_grad():
            self.features = int(self.layers(torch.zeros(1, channels, size, size)).shape[1])
        if width is not None:
            self.layers.extend(_branch(self.features, width))
            self.features = width

    def forward(self, x: Tensor) -> Tensor:
        """Features ``(N, features)`` of images in [0, 1]."""
        return self.layers(x)


class PixelPolicy(nn.Module):
    """Of features to the mean action; ``sample`` draws one."""

    def __init__(self, features: int, action_dim: int, width: int | None = 50, hidden: int = 128) -> None:
        super().__init__()
        self.body = nn.Sequential(*_projected(features, width), _mlp(width or features, hidden, 2 * action_dim))

    def forward(self, features: Tensor) -> Tensor:
        """Mean action ``(N, A)`` in [-1, 1]."""
        return torch.tanh(self.body(features).chunk(2, 1)[0])

    def sample(self, features: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """An action and the logarithm of its density ``(N,)``."""
        mean, raw = self.body(features).chunk(2, 1)
        low, high = _LOG_STD
        log_std = low + 0.5 * (high - low) * (torch.tanh(raw) + 1.0)
        noise = torch.randn(mean.shape, generator=generator).to(mean)
        before = mean + log_std.exp() * noise
        density = -0.5 * noise.square() - log_std - 0.5 * math.log(2.0 * math.pi)
        # log(1 - tanh(x)^2), in a form that does not cancel
        density = density - 2.0 * (math.log(2.0) - before - F.softplus(-2.0 * before))
        return torch.tanh(before), density.sum(1)


class _Critic(nn.Module):
    def __init__(self, features: int, action_dim: int, width: int | None, hidden: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(*_projected(features, width))
        self.heads = nn.ModuleList([_mlp((width or features) + action_dim, hidden, 1) for _ in range(2)])

    def forward(self, features: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.cat([self.branch(features), action], 1)
        first, second = (head(x)[:, 0] for head in self.heads)
        return first, second


@dataclass(frozen=True)
class SACSettings:
    """Hyperparameters of ``PixelSAC``; the defaults are those of the study on ``PixelReach``.

    Attributes:
        crop: pixels a side that the networks see.
        gamma: discount.
        batch: transitions an update.
        lr: of encoder, critic, actor, auxiliary task and temperature.
        tau: share of the online networks in the target ones, every second update.
        random_steps: steps of uniformly random actions before the first update.
        temperature: at the start.
        reward_offset: added to every reward.
        capacity: frames in the replay memory.
        aux_every: updates between two steps of the auxiliary task; None for none.
        share: what policy, critic and auxiliary task share: the ``"convolutions"``, or the ``"features"`` that are projected from them.
    """

    crop: int = 24
    gamma: float = 0.9
    batch: int = 64
    lr: float = 1e-3
    tau: float = 0.02
    random_steps: int = 400
    temperature: float = 0.1
    reward_offset: float = -0.5
    capacity: int = 20_000
    aux_every: int | None = 2
    share: Literal["convolutions", "features"] = "convolutions"

    def __post_init__(self) -> None:
        for name in ("crop", "batch"):
            integer(name, getattr(self, name), low=1)
        integer("random_steps", self.random_steps, low=0)
        integer("capacity", self.capacity, low=2)
        if self.aux_every is not None:
            integer("aux_every", self.aux_every, low=1)
        real("gamma", self.gamma, low=0.0, high=1.0)
        real("tau", self.tau, low=0.0, high=1.0)
        for name in ("lr", "temperature"):
            real(name, getattr(self, name), low=0.0, low_open=True)
        choice("share", self.share, ("convolutions", "features"))


class PixelSAC:
    """Soft actor-critic whose encoder is trained by the critic and by an auxiliary task, one update a step.

    ``sac.encoder``, ``sac.policy`` and ``sac.aux`` are what ``PolicyAdapter`` takes.

    Args:
        env: image observations ``(stack * channels, S, S)`` in uint8, actions in [-1, 1]; ``PixelReach`` or the like.
        stack: frames in an observation.
        aux: the auxiliary task, of features of the encoder; None takes inverse dynamics.
        augment: changes cropped images in [0, 1] before the networks see them, ``augment(images, generator)``: colour jitter, say. It is
            given both observations of a transition as one longer stack of frames.
        settings: hyperparameters.
        seed: of everything that is drawn.
        device: of the networks.

    Raises:
        ValueError: observations or actions of another form, settings out of range.
    """

    def __init__(
        self,
        env: Any,
        *,
        stack: int = 3,
        aux: AuxTask | None = None,
        augment: Callable[[Tensor, torch.Generator], Tensor] | None = None,
        settings: SACSettings | None = None,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        self.settings = SACSettings() if settings is None else settings
        shape, actions = env.observation_space.shape, env.action_space
        if shape is None or len(shape) != 3 or shape[0] % stack or env.observation_space.dtype != np.uint8:
            raise ValueError(f"observations must be ({stack} frames' channels, S, S) in uint8, got {env.observation_space}")
        if len(actions.shape or ()) != 1 or not (np.allclose(actions.low, -1.0) and np.allclose(actions.high, 1.0)):
            raise ValueError(f"actions must be vectors in [-1, 1], got {actions}")
        s = self.settings
        self.env, self.seed = env, seed
        self._stack, self._channels, self._action_dim = stack, int(shape[0]) // stack, int(actions.shape[0])
        self._device = torch.device(device)
        self._augment = augment
        self._crop = RandomCrop(s.crop)
        shared, width, hidden = (50, None, 128) if s.share == "features" else (None, 50, 128)
        with seeded(derived_seed(seed, "sac networks")):
            self.encoder = PixelEncoder(int(shape[0]), s.crop, width=shared).to(device)
            self.policy = PixelPolicy(self.encoder.features, self._action_dim, width, hidden).to(device)
            self._critic = _Critic(self.encoder.features, self._action_dim, width, hidden).to(device)
            projection = nn.Sequential(*_projected(self.encoder.features, width))
            task = InverseDynamics(50, self._action_dim, hidden, projection=projection) if aux is None else aux
            self.aux = task.to(device)
        self._target_encoder, self._target = copy.deepcopy((self.encoder, self._critic))
        self._log_temperature = torch.tensor(math.log(s.temperature), device=self._device, requires_grad=True)
        adam = torch.optim.Adam
        self._of_critic = adam([*self.encoder.parameters(), *self._critic.parameters()], lr=s.lr)
        self._of_actor = adam(self.policy.parameters(), lr=s.lr)
        self._of_aux = adam([*self.encoder.parameters(), *self.aux.parameters()], lr=s.lr)
        self._of_temperature = adam([self._log_temperature], lr=s.lr)
        self._replay = FrameReplay(s.capacity, (self._channels, *shape[1:]), (self._action_dim,), stack)
        self._draws = stream_of(seed, "sac draws")
        self._episodes = 0
        self._obs: Any = None
        self.steps = 0
        self.returns: list[float] = []
        self.aux_loss = math.nan
        self._return = 0.0

    def learn(self, steps: int, report: Callable[[int, int, float], None] | None = None) -> PixelSAC:
        """Go on for a number of environment steps.

        Args:
            steps: of the environment, one update each after the random ones.
            report: called now and then with (step, steps, the last episode's return).
        """
        for step in range(integer("steps", steps, low=1)):
            if self._obs is None:
                self._begin()
            if self.steps < self.settings.random_steps:
                action = 2.0 * torch.rand(self._action_dim, generator=self._draws) - 1.0
            else:
                with torch.no_grad():
                    action = self.policy.sample(self.encoder(self._seen(self._obs[None])), self._draws)[0][0].cpu()
            executed = action.numpy().astype(np.float32)
            obs, reward, terminated, truncated, _ = self.env.step(executed)
            self._replay.add(executed, float(reward), obs[-self._channels :], terminated=bool(terminated))
            self._return += float(reward)
            self._obs, self.steps = obs, self.steps + 1
            if terminated or truncated:
                self.returns.append(self._return)
                self._obs = None
            if self.steps >= self.settings.random_steps:
                self._update()
            if report is not None and (step + 1) % 250 == 0:
                report(step + 1, steps, self.returns[-1] if self.returns else math.nan)
        return self

    @torch.no_grad()
    def act(self, obs: Any) -> Any:
        """The mean action on an observation, as an array."""
        return self.policy(self.encoder(self._seen(obs[None])))[0].cpu().numpy()

    def evaluate(self, env: Any, episodes: int, seed: int) -> list[float]:
        """Returns of the mean action; the first episode has ``seed``, the others follow."""
        found: list[float] = []
        for episode in range(integer("episodes", episodes, low=1)):
            obs, _ = env.reset(seed=seed + episode)
            total, over = 0.0, False
            while not over:
                obs, reward, terminated, truncated, _ = env.step(self.act(obs))
                total, over = total + float(reward), bool(terminated or truncated)
            found.append(total)
        if env is self.env:
            self._obs = None  # the training's episode is over
        return found

    def _begin(self) -> None:
        self._obs, _ = self.env.reset(seed=derived_seed(self.seed, "sac episode", self._episodes) % 2**31)
        self._replay.begin(self._obs[-self._channels :])
        self._episodes += 1
        self._return = 0.0

    def _seen(self, obs: Any) -> Tensor:
        """The middle crop, in [0, 1]."""
        return self._crop.centre(torch.as_tensor(obs)).to(self._device).float() / 255.0

    def _cropped(self, obs: Tensor, following: Tensor) -> tuple[Tensor, Tensor]:
        """Crops of both as the task wants them, changed alike: a look lasts longer than a step."""
        places = [self._crop.places(images, self._draws) for images in (obs, following)]
        if self.aux.same_crop:
            places[1] = places[0]
        before, after = (
            self._crop.at(images, *place).to(self._device) / 255.0 for images, place in zip((obs, following), places, strict=True)
        )
        if self._augment is None:
            return before, after
        changed = self._augment(torch.cat([before, after], 1), self._draws)
        return changed[:, : before.shape[1]], changed[:, before.shape[1] :]

    def _update(self) -> None:
        s = self.settings
        obs, action, reward, following, terminated = self._replay.sample(s.batch, self._draws)
        before, after = self._cropped(obs, following)
        action, goes_on = action.to(self._device), 1.0 - terminated.to(self._device).float()
        reward = reward.to(self._device) + s.reward_offset
        temperature = self._log_temperature.exp().detach()
        with torch.no_grad():
            next_action, density = self.policy.sample(self.encoder(after), self._draws)
            values = torch.minimum(*self._target(self._target_encoder(after), next_action))
            goal = reward + s.gamma * goes_on * (values - temperature * density)
        features = self.encoder(before)
        first, second = self._critic(features, action)
        _step(self._of_critic, F.mse_loss(first, goal) + F.mse_loss(second, goal))
        features = features.detach()  # the actor does not move the encoder
        drawn, density = self.policy.sample(features, self._draws)
        _step(self._of_actor, (temperature * density - torch.minimum(*self._critic(features, drawn))).mean())
        _step(self._of_temperature, -(self._log_temperature.exp() * (density.detach() - self._action_dim)).mean())
        number = self.steps - s.random_steps
        if s.aux_every is not None and number % s.aux_every == 0:
            loss = self.aux.compare(self.encoder, *self.aux.draw(before, action, after, self._draws))
            _step(self._of_aux, loss)
            self.aux_loss = float(loss.detach())
        if number % 2 == 0:
            with torch.no_grad():
                for target, online in ((self._target_encoder, self.encoder), (self._target, self._critic)):
                    pairs = zip(target.parameters(), online.parameters(), strict=True)
                    for old, new in pairs:
                        old.lerp_(new, s.tau)


def _step(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
