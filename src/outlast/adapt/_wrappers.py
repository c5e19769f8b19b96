"""Environments that feed a policy adapter, and policies of Stable-Baselines3 taken apart for it."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium.vector import AutoresetMode, VectorEnv, VectorWrapper
from torch import Tensor, nn

from outlast.adapt._policy import PolicyAdapter
from outlast.errors import StateError, UnsupportedError


class AdaptedEnv(gymnasium.Wrapper[Any, Any, Any, Any]):
    """An environment whose every step adapts a policy: use ``env.adapter.act(obs)`` as the policy.

    Vector environments are taken, too, with any way of automatic reset: pairs never reach from one episode into the next. Where the adapter
    has no warm-up and the environment stacks frames, the warm-up becomes frames - 1.

    Args:
        env: observations ``(C, H, W)``, uint8 or floats in [0, 1].
        adapter: as ``PolicyAdapter``.

    Attributes:
        adapter: as given.

    Raises:
        TypeError: no adapter.
        ValueError: observations that are no images with channels first.
    """

    def __new__(cls, env: Any = None, adapter: Any = None) -> Any:  # a copy is made without arguments
        return _AdaptedVectorEnv(env, adapter) if isinstance(env, VectorEnv) else super().__new__(cls)

    def __init__(self, env: gymnasium.Env[Any, Any], adapter: PolicyAdapter) -> None:  # pyright: ignore[reportInconsistentConstructor]
        super().__init__(env)
        _check(adapter, env.observation_space)
        self.adapter = adapter
        adapter.default_warmup(_stack_of(env) - 1)
        self._obs: Any = None

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Begin an episode; the adapter does as well."""
        obs, info = self.env.reset(seed=seed, options=options)
        self.adapter.begin_episode()
        self._obs = np.array(obs)  # the environment may write into its own
        return obs, info

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Go on, and let the adapter learn from it.

        Args:
            action: an array or a tensor, such as ``adapter.act(obs)`` gives.

        Raises:
            ValueError: an action outside the environment's space.
            StateError: before ``reset()``.
        """
        executed = _executed(action, self.env.action_space)
        if self._obs is None:
            raise StateError("step() before reset(): there is no observation that the action answers to")
        obs, reward, terminated, truncated, info = self.env.step(executed)
        self.adapter.observe(self._obs, executed, obs, terminated=terminated, truncated=truncated)
        self._obs = np.array(obs)
        return obs, float(reward), terminated, truncated, info


class _AdaptedVectorEnv(VectorWrapper):
    """The same for environments that step together."""

    def __init__(self, env: VectorEnv[Any, Any, Any], adapter: PolicyAdapter) -> None:
        super().__init__(env)
        _check(adapter, env.single_observation_space)
        self.adapter = adapter
        adapter.default_warmup(max(map(_stack_of, getattr(env.unwrapped, "envs", [])), default=1) - 1)
        self._mode = env.metadata.get("autoreset_mode", AutoresetMode.NEXT_STEP)
        self._over = np.zeros(env.num_envs, np.bool_)
        self._obs: Any = None

    def reset(self, *, seed: int | list[int | None] | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Begin episodes: all, or those of ``options["reset_mask"]``."""
        mask = None if options is None else options.get("reset_mask")
        obs, info = self.env.reset(seed=seed, options=options)  # pyright: ignore[reportArgumentType]
        self.adapter.begin_episode(mask)
        self._over = np.zeros(self.num_envs, np.bool_) if mask is None else self._over & ~np.asarray(mask)
        self._obs = np.copy(obs)
        return obs, info

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        """Go on; environments that were over begin anew or have begun anew, as their mode of automatic reset says.

        Raises:
            ValueError: an action outside the environments' space.
            StateError: before ``reset()``.
        """
        actions = _executed(actions, self.env.action_space)
        if self._obs is None:
            raise StateError("step() before reset(): there are no observations that the actions answer to")
        obs, rewards, terminated, truncated, info = self.env.step(actions)
        started = self._over if self._mode == AutoresetMode.NEXT_STEP else np.zeros(self.num_envs, np.bool_)
        if started.any():  # this step gave them the first observation of a new episode
            self.adapter.begin_episode(started)
        over = np.logical_or(terminated, truncated)
        following = np.copy(obs)
        if self._mode == AutoresetMode.SAME_STEP and over.any():
            for place in np.flatnonzero(over):
                following[place] = info["final_obs"][place]
        self.adapter.observe(self._obs, actions, following, terminated=terminated, truncated=truncated, valid=~started)
        if self._mode == AutoresetMode.SAME_STEP and over.any():
            self.adapter.begin_episode(over)
        self._over, self._obs = over, np.copy(obs)
        return obs, rewards, terminated, truncated, info


def _executed(action: Any, space: Any) -> Any:
    """An action as environments take it: an array of the space's type, if it lies in the space."""
    given = np.asarray(action.detach().cpu() if isinstance(action, Tensor) else action)
    same_kind = np.can_cast(given.dtype, space.dtype, "same_kind")
    found = given.astype(space.dtype) if same_kind else given
    if not same_kind or not space.contains(found):
        raise ValueError(f"the action {action!r} is not in {space}")
    return found


def _check(adapter: object, space: Any) -> None:
    if not isinstance(adapter, PolicyAdapter):
        raise TypeError(f"adapter must be a PolicyAdapter, got {type(adapter).__name__}")
    shape = getattr(space, "shape", None)
    if shape is None or len(shape) != 3:
        raise ValueError(f"the policy adapts to images (C, H, W), this environment gives {space}")
    if shape[2] in (1, 3, 4) and shape[0] > 4:
        raise ValueError(f"observations {shape} have their channels last: transpose them to (C, H, W), as the encoder takes them")


def _stack_of(env: Any) -> int:
    """Frames in an observation, as the wrappers around an environment tell."""
    while env is not None:
        kind = type(env).__name__
        field = {"FrameStack": "k", "FrameStackObservation": "stack_size", "PixelReach": "stack"}.get(kind)
        if field is not None and int(getattr(env, field, 1)) > 1:
            return int(getattr(env, field))
        env = getattr(env, "env", None)
    return 1


class _Sac(nn.Module):
    """Latent and mean of an off-policy actor, squashed and scaled to the action space."""

    def __init__(self, actor: Any, space: Any) -> None:
        super().__init__()
        self.latent, self.mean = actor.latent_pi, actor.mu
        self.register_buffer("low", torch.as_tensor(space.low))
        self.register_buffer("high", torch.as_tensor(space.high))

    def forward(self, features: Tensor) -> Tensor:
        squashed = torch.tanh(self.mean(self.latent(features)))
        low, high = self.get_buffer("low"), self.get_buffer("high")
        return (low + 0.5 * (squashed + 1.0) * (high - low)).clamp(low, high)  # rounding may leave the box


class _OnPolicy(nn.Module):
    """Policy network and head of an actor-critic; the mode of its distribution."""

    def __init__(self, policy: Any, space: Any) -> None:
        super().__init__()
        self.latent, self.head = policy.mlp_extractor.policy_net, policy.action_net
        self.discrete = isinstance(space, gymnasium.spaces.Discrete)
        if not self.discrete:
            self.register_buffer("low", torch.as_tensor(space.low))
            self.register_buffer("high", torch.as_tensor(space.high))

    def forward(self, features: Tensor) -> Tensor:
        found = self.head(self.latent(features))
        if self.discrete:
            return found.argmax(1)
        return torch.minimum(torch.maximum(found, self.get_buffer("low")), self.get_buffer("high"))


def from_sb3(model: Any) -> tuple[nn.Module, nn.Module]:
    """Encoder and policy of a Stable-Baselines3 model, as ``PolicyAdapter`` takes them.

    The modules are the model's own; the adapter copies them. Actions equal ``model.predict(obs, deterministic=True)``. The auxiliary task
    must have been trained next to the policy (call ``joint_step`` in a callback).

    Args:
        model: SAC, PPO or A2C with images and ``normalize_images`` (the default).

    Raises:
        UnsupportedError: another algorithm, other observations, actions that are neither vectors nor ``Discrete``, or state-dependent
            exploration (``use_sde``).
    """
    policy, space = getattr(model, "policy", None), getattr(model, "action_space", None)
    if policy is None or not isinstance(space, gymnasium.spaces.Box | gymnasium.spaces.Discrete):
        raise UnsupportedError(f"{type(model).__name__} is no Stable-Baselines3 model with continuous or Discrete actions")
    if len(getattr(model.observation_space, "shape", None) or ()) != 3 or not getattr(policy, "normalize_images", False):
        raise UnsupportedError("the model must take images and divide them by 255 (normalize_images=True)")
    if isinstance(space, gymnasium.spaces.Box) and len(space.shape) != 1:
        raise UnsupportedError(f"actions must be vectors, this model's have the shape {space.shape}")
    actor = getattr(policy, "actor", None)
    if getattr(policy, "use_sde", False) or getattr(actor, "use_sde", False):
        raise UnsupportedError("state-dependent exploration (use_sde, squash_output) changes the mean action and is not supported")
    if actor is not None and hasattr(actor, "latent_pi") and isinstance(actor.mu, nn.Linear):
        return actor.features_extractor, _Sac(actor, space)
    if hasattr(policy, "mlp_extractor") and hasattr(policy, "action_net"):
        extractor = policy.features_extractor if policy.share_features_extractor else policy.pi_features_extractor
        return extractor, _OnPolicy(policy, space)
    raise UnsupportedError(f"{type(model).__name__} is not supported: SAC, PPO and A2C are")
