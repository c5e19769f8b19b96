"""Self-supervised tasks that a policy's encoder is trained on, before and after deployment.

Hansen et al., "Self-Supervised Policy Adaptation during Deployment", ICLR 2021: inverse dynamics and rotation.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from outlast._core import _checks

Encoder = Callable[[Tensor], Tensor]


class RandomCrop(nn.Module):
    """Crop each image at a place of its own, uniform over all places that fit (both ends included).

    Args:
        size: height and width of the crop, or one length for squares.

    Raises:
        ValueError: a size below 1.
    """

    def __init__(self, size: int | tuple[int, int]) -> None:
        super().__init__()
        height, width = (size, size) if isinstance(size, int) else size
        self.size = (_checks.integer("size", height, low=1), _checks.integer("size", width, low=1))

    def forward(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Random crops of ``(N, C, H, W)``.

        Raises:
            ValueError: images smaller than the crop.
        """
        tops, lefts = self.places(images, generator)
        return self.at(images, tops, lefts)

    def places(self, images: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Rows and columns where crops begin, ``(N,)`` each."""
        self._check(images)
        h, w = self.size
        H, W = images.shape[-2:]
        draws = [torch.randint(extent, (len(images),), generator=generator, device="cpu") for extent in (H - h + 1, W - w + 1)]
        return draws[0].to(images.device), draws[1].to(images.device)

    def at(self, images: Tensor, tops: Tensor, lefts: Tensor) -> Tensor:
        """Crops of ``(N, C, H, W)`` that begin at given places."""
        h, w = self.size
        if images.device.type == "cpu":  # copies of slices are up to eight times as fast as indexing there
            places = zip(images, tops.tolist(), lefts.tolist(), strict=True)
            return torch.stack([image[:, top : top + h, left : left + w] for image, top, left in places])
        windows = images.unfold(2, h, 1).unfold(3, w, 1)  # a view: (N, C, rows, columns, h, w)
        return windows[torch.arange(len(images), device=images.device), :, tops, lefts]

    def centre(self, images: Tensor) -> Tensor:
        """The middle of ``(..., H, W)``, as a policy acts on it."""
        self._check(images)
        h, w = self.size
        top, left = ((have - want) // 2 for have, want in zip(images.shape[-2:], self.size, strict=True))
        return images[..., top : top + h, left : left + w]

    def _check(self, images: Tensor) -> None:
        h, w = self.size
        if images.shape[-2] < h or images.shape[-1] < w:
            raise ValueError(f"images of {tuple(images.shape[-2:])} are smaller than the crop of {self.size}")

    def extra_repr(self) -> str:
        """Size."""
        return f"size={self.size}"


class AuxTask(nn.Module):
    """Base of auxiliary tasks: a head whose loss needs no label and no reward.

    Your own task overrides ``loss``, and ``baseline`` if a predictor that ignores the observations has another loss than infinity.
    A task that draws at random overrides ``draw`` and ``compare`` instead, so that it can be mapped over environments.

    Attributes:
        same_crop: whether both observations of a transition are cropped at one place.
        uses_action: whether the loss reads the action: then actions that do not vary teach nothing.
    """

    same_crop: bool = False
    uses_action: bool = True

    def loss(self, encoder: Encoder, obs: Tensor, action: Tensor, next_obs: Tensor) -> Tensor:
        """Mean loss of a batch of transitions, 0-dim.

        Args:
            encoder: of observations to features.
            obs: ``(B, C, H, W)``, as the encoder takes them.
            action: ``(B, A)``, or ``(B,)`` for discrete ones: what was executed.
            next_obs: the observations that followed.
        """
        raise NotImplementedError

    def check(self, action: Tensor, n: int) -> None:
        """Raise where ``n`` actions have a form that the task does not take; nothing by default."""

    def draw(self, obs: Tensor, action: Tensor, next_obs: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor, Tensor]:
        """What ``compare`` takes: the transitions themselves, or what was made of them at random."""
        return obs, action, next_obs

    def compare(self, encoder: Encoder, obs: Tensor, action: Tensor, next_obs: Tensor) -> Tensor:
        """The loss of what ``draw`` gave, a function of its arguments and the weights alone."""
        return self.loss(encoder, obs, action, next_obs)

    def watch(self, encoder: Encoder, obs: Tensor, action: Tensor, next_obs: Tensor) -> Tensor:
        """The loss as a gate looks at it, 0-dim: nothing drawn at random."""
        return self.compare(encoder, obs, action, next_obs)

    def baseline(self, action: Tensor) -> float:
        """Loss of the best constant prediction on these actions: a trained head must be below it."""
        return float("inf")


def _mlp(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, outputs))


class InverseDynamics(AuxTask):
    """Predict the action from the observations before and after it.

    The loss is the mean squared error over batch and entries of an action for continuous actions, the cross entropy for discrete ones.

    Args:
        feature_dim: of the projected features.
        action_dim: entries of an action, or number of discrete ones.
        hidden: units of the two hidden layers.
        discrete: which kind.
        projection: layers of the task's own between the encoder and the head, such as ``Linear`` and ``LayerNorm``.
        same_crop: crop both observations at one place; needed without stacked frames, where motion shows between them only.

    Raises:
        ValueError: a size below 1.
    """

    def __init__(
        self,
        feature_dim: int,
        action_dim: int,
        hidden: int = 1024,
        discrete: bool = False,
        projection: nn.Module | None = None,
        same_crop: bool = False,
    ) -> None:
        super().__init__()
        for name, value in (("feature_dim", feature_dim), ("action_dim", action_dim), ("hidden", hidden)):
            _checks.integer(name, value, low=1)
        self.action_dim, self.discrete, self.same_crop = action_dim, bool(discrete), bool(same_crop)
        self.projection = nn.Identity() if projection is None else projection
        self.head = _mlp(2 * feature_dim, hidden, action_dim)

    def predict(self, encoder: Encoder, obs: Tensor, next_obs: Tensor) -> Tensor:
        """Actions ``(B, A)`` or logits."""
        both = self.projection(encoder(torch.cat([obs, next_obs])))
        before, after = both.chunk(2)
        return self.head(torch.cat([before, after], 1))

    def loss(self, encoder: Encoder, obs: Tensor, action: Tensor, next_obs: Tensor) -> Tensor:
        """Mean squared error, or cross entropy.

        Raises:
            TypeError: floats for discrete actions.
            ValueError: actions of another shape or number.
        """
        self.check(action, len(obs))
        found = self.predict(encoder, obs, next_obs).float()
        return F.cross_entropy(found, action.long()) if self.discrete else F.mse_loss(found, action.to(found.dtype))

    def baseline(self, action: Tensor) -> float:
        """Variance of the actions, or entropy of their shares."""
        if self.discrete:
            shares = torch.bincount(action.long(), minlength=self.action_dim).double() / len(action)
            return float(-(shares * shares.clamp_min(1e-300).log()).sum())
        return float(action.double().var(0, correction=0).mean())

    def check(self, action: Tensor, n: int) -> None:
        """Raise where actions are not ``(n, action_dim)``, or whole numbers ``(n,)`` in the range of discrete ones.

        Raises:
            TypeError, ValueError: they are not.
        """
        if self.discrete:
            if action.is_floating_point():
                raise TypeError(f"discrete actions are whole numbers, got {action.dtype}")
            if action.shape != (n,) or not _all((action >= 0) & (action < self.action_dim)):
                raise ValueError(f"actions must be ({n},) in [0, {self.action_dim}), got shape {tuple(action.shape)}")
        elif action.shape != (n, self.action_dim):
            raise ValueError(f"actions must be ({n}, {self.action_dim}), got shape {tuple(action.shape)}")


class RotationPrediction(AuxTask):
    """Tell by which of 0, 90, 180, 270 degrees the observation was turned; it reads the newest one only.

    All frames of a stack turn alike, counter-clockwise as ``torch.rot90(x, k, (-2, -1))`` does. Scenes that look the same turned give no
    signal.

    Args:
        feature_dim: of the projected features.
        hidden: units of the two hidden layers.
        projection: layers of the task's own between the encoder and the head.

    Raises:
        ValueError: a size below 1.
    """

    uses_action = False

    def __init__(self, feature_dim: int, hidden: int = 1024, projection: nn.Module | None = None) -> None:
        super().__init__()
        for name, value in (("feature_dim", feature_dim), ("hidden", hidden)):
            _checks.integer(name, value, low=1)
        self.projection = nn.Identity() if projection is None else projection
        self.head = _mlp(feature_dim, hidden, 4)

    def loss(
        self,
        encoder: Encoder,
        obs: Tensor,
        action: Tensor,
        next_obs: Tensor,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Mean cross entropy of the turns, drawn for each image.

        Raises:
            ValueError: images that are not square.
        """
        return self.compare(encoder, *self.draw(obs, action, next_obs, generator))

    def draw(self, obs: Tensor, action: Tensor, next_obs: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor, Tensor]:
        """Turned images in place of the second observations, their turns in place of the actions.

        Raises:
            ValueError: images that are not square.
        """
        turns = torch.randint(4, (len(next_obs),), generator=generator, device="cpu").to(next_obs.device)
        return obs, turns, turned(next_obs, turns)

    def compare(self, encoder: Encoder, obs: Tensor, action: Tensor, next_obs: Tensor) -> Tensor:
        """Mean cross entropy of drawn turns."""
        return F.cross_entropy(self.head(self.projection(encoder(next_obs))).float(), action)

    def watch(self, encoder: Encoder, obs: Tensor, action: Tensor, next_obs: Tensor) -> Tensor:
        """Mean cross entropy over all four turns."""
        n = len(next_obs)
        turns = torch.arange(4, device=next_obs.device).repeat_interleave(n)
        return self.compare(encoder, obs, turns, turned(next_obs.repeat(4, 1, 1, 1), turns))

    def baseline(self, action: Tensor) -> float:
        """Ln 4: four turns, none likelier."""
        return float(torch.tensor(4.0).log())


def _all(holds: Tensor) -> bool:
    """Whether all are true; taken for granted inside ``torch.func.vmap``, where values cannot be looked at."""
    try:
        return bool(holds.all())
    except RuntimeError:
        return True


def turned(images: Tensor, turns: Tensor) -> Tensor:
    """Each of ``(N, C, H, W)`` turned counter-clockwise by its number of quarter turns.

    Raises:
        ValueError: images that are not square.
    """
    if images.shape[-1] != images.shape[-2]:
        raise ValueError(f"rotation needs square images, got {tuple(images.shape[-2:])}")
    found = images.clone()
    for k in (1, 2, 3):
        rows = turns == k
        if bool(rows.any()):
            found[rows] = images[rows].rot90(k, (-2, -1))
    return found


def joint_step(
    encoder: nn.Module,
    aux: AuxTask,
    optimizer: torch.optim.Optimizer,
    obs: Tensor,
    action: Tensor,
    next_obs: Tensor,
    *,
    augment: Callable[..., Tensor] | None = None,
    scale: float = 1.0,
    generator: torch.Generator | None = None,
) -> float:
    """One step of the auxiliary task on a batch of replayed transitions, to be called inside any RL loop.

    Args:
        encoder: shared with the policy.
        aux: the task; its head learns, too.
        optimizer: of the encoder's and the task's parameters.
        obs: ``(B, C, H, W)``, uint8 or floats in [0, 1]; bytes are divided by 255.
        action: as executed.
        next_obs: what followed.
        augment: a ``RandomCrop`` crops both, at places of their own unless the task says otherwise; or any function of images and
            generator.
        scale: weight of the loss.
        generator: of crops and turns.

    Returns:
        The loss; where it is not finite no step is taken.

    Raises:
        ValueError, TypeError: as the task's loss raises.
    """
    _checks.real("scale", scale, low=0.0)
    before, after = prepared(aux, obs, next_obs, augment, generator)
    optimizer.zero_grad()
    loss = loss_of(aux, encoder, before, action, after, generator)
    value = float(loss.detach())
    if math.isfinite(value):
        (scale * loss).backward()
        optimizer.step()
    return value


def as_floats(obs: Tensor) -> Tensor:
    """Bytes in [0, 1]; floats as they are."""
    return obs / 255.0 if obs.dtype == torch.uint8 else obs


def prepared(aux: AuxTask, obs: Tensor, next_obs: Tensor, augment: Any, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """Both observations of transitions as floats, cropped as the task wants."""
    if augment is None:
        return as_floats(obs), as_floats(next_obs)
    if aux.same_crop and isinstance(augment, RandomCrop):
        tops, lefts = augment.places(obs, generator)
        return as_floats(augment.at(obs, tops, lefts)), as_floats(augment.at(next_obs, tops, lefts))
    return as_floats(augment(obs, generator)), as_floats(augment(next_obs, generator))


def loss_of(aux: AuxTask, encoder: Encoder, obs: Tensor, action: Tensor, next_obs: Tensor, generator: torch.Generator | None) -> Tensor:
    """The task's loss, with the generator for tasks that draw."""
    return aux.compare(encoder, *aux.draw(obs, action, next_obs, generator))
