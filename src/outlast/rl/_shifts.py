"""How a small scene may look another way after training: colours, moving distractors, texture, camera gain, video."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from outlast._core._checks import integer, real

Frame = npt.NDArray[np.float32]
"""Pixels in [0, 1], ``(3, height, width)``."""


@dataclass(frozen=True)
class Colours:
    """Red, green and blue in [0, 1] of what a scene shows."""

    background: Frame
    agent: Frame
    target: Frame


class Look(Protocol):
    """How one episode looks. The base does nothing."""

    def colours(self, usual: Colours) -> Colours:
        """The colours of the episode."""
        ...

    def behind(self, frame: Frame, step: int) -> None:
        """Change the background in place, before anything is drawn on it."""
        ...

    def over(self, frame: Frame, step: int) -> None:
        """Change the finished frame in place; it is cut to [0, 1] afterwards."""
        ...


class Shift(Protocol):
    """Draws the look of an episode."""

    def draw(self, rng: np.random.Generator, size: int) -> Look:
        """A look for frames of ``size`` pixels a side, a function of the generator's state alone."""
        ...


class _Plain:
    """Nothing changes."""

    def colours(self, usual: Colours) -> Colours:
        return usual

    def behind(self, frame: Frame, step: int) -> None:
        return None

    def over(self, frame: Frame, step: int) -> None:
        return None


PLAIN: Look = _Plain()


@dataclass(frozen=True)
class ColorShift:
    """Background, agent and target take other colours: each channel moves by a uniform amount up to ``strength``, then is cut to [0, 1].

    Args:
        strength: 0.15 is easy, 0.35 hard.

    Raises:
        ValueError: not in (0, 1].
    """

    strength: float = 0.15

    def __post_init__(self) -> None:
        real("strength", self.strength, low=0.0, high=1.0, low_open=True)

    def draw(self, rng: np.random.Generator, size: int) -> Look:
        """Three amounts for each of three colours."""
        return _Coloured(rng.uniform(-self.strength, self.strength, (3, 3)).astype(np.float32))


@dataclass(frozen=True)
class _Coloured(_Plain):
    amounts: Frame

    def colours(self, usual: Colours) -> Colours:
        found = np.clip(np.stack([usual.background, usual.agent, usual.target]) + self.amounts, 0.0, 1.0)
        return Colours(*found)


@dataclass(frozen=True)
class DistractorShift:
    """Discs of random colours move behind the scene and bounce off its edges.

    Args:
        count: of discs.
        radius: in pixels.
        speed: most pixels a step along each axis.

    Raises:
        ValueError: out of range.
    """

    count: int = 3
    radius: float = 2.0
    speed: float = 1.0

    def __post_init__(self) -> None:
        integer("count", self.count, low=1)
        real("radius", self.radius, low=0.0, low_open=True)
        real("speed", self.speed, low=0.0)

    def draw(self, rng: np.random.Generator, size: int) -> Look:
        """Where the discs begin, how they move, and their colours."""
        return _Distracted(
            radius=self.radius,
            span=float(size - 1),
            start=rng.uniform(0.0, size - 1, (self.count, 2)),
            velocity=rng.uniform(-self.speed, self.speed, (self.count, 2)),
            colour=rng.uniform(0.0, 1.0, (self.count, 3)).astype(np.float32),
        )


@dataclass(frozen=True)
class _Distracted(_Plain):
    radius: float
    span: float
    start: npt.NDArray[np.float64]
    velocity: npt.NDArray[np.float64]
    colour: Frame

    def behind(self, frame: Frame, step: int) -> None:
        way = np.mod(self.start + self.velocity * step, 2.0 * self.span)
        places = np.where(way > self.span, 2.0 * self.span - way, way)  # bounced
        for (y, x), colour in zip(places, self.colour, strict=True):
            disc(frame, float(y), float(x), self.radius, colour)


@dataclass(frozen=True)
class TextureShift:
    """A sine pattern of random direction and wavelength lies over the background.

    Args:
        amplitude: added to and taken from every channel.

    Raises:
        ValueError: not in (0, 1].
    """

    amplitude: float = 0.15

    def __post_init__(self) -> None:
        real("amplitude", self.amplitude, low=0.0, high=1.0, low_open=True)

    def draw(self, rng: np.random.Generator, size: int) -> Look:
        """Direction, wavelength (4 pixels to half of the frame) and phase."""
        angle, phase = rng.uniform(0.0, np.pi), rng.uniform(0.0, 2.0 * np.pi)
        length = rng.uniform(4.0, max(size / 2.0, 5.0))
        y, x = np.mgrid[:size, :size]
        wave = np.sin(2.0 * np.pi * (np.cos(angle) * x + np.sin(angle) * y) / length + phase)
        return _Textured((self.amplitude * wave).astype(np.float32))


@dataclass(frozen=True)
class _Textured(_Plain):
    pattern: Frame

    def behind(self, frame: Frame, step: int) -> None:
        frame += self.pattern


@dataclass(frozen=True)
class GainShift:
    """The camera's gain and offset change: every pixel x becomes ``gain x + offset``, cut to [0, 1].

    Args:
        gain: largest relative change of the gain.
        offset: largest offset.

    Raises:
        ValueError: out of range.
    """

    gain: float = 0.4
    offset: float = 0.1

    def __post_init__(self) -> None:
        real("gain", self.gain, low=0.0, high=1.0)
        real("offset", self.offset, low=0.0, high=1.0)

    def draw(self, rng: np.random.Generator, size: int) -> Look:
        """One gain and one offset."""
        return _Gained(1.0 + float(rng.uniform(-self.gain, self.gain)), float(rng.uniform(-self.offset, self.offset)))


@dataclass(frozen=True)
class _Gained(_Plain):
    gain: float
    offset: float

    def over(self, frame: Frame, step: int) -> None:
        frame *= self.gain
        frame += self.offset


class VideoBackground:
    """A film plays in the background, from a random frame on, around and around.

    Args:
        frames: ``(n, 3, height, width)`` or ``(n, height, width, 3)``, uint8 or floats in [0, 1], of the scene's size.

    Raises:
        TypeError: no array of such numbers.
        ValueError: another shape, floats outside [0, 1], no frames.
    """

    def __init__(self, frames: npt.NDArray[Any]) -> None:
        values = np.asarray(frames)
        if values.dtype != np.uint8 and not np.issubdtype(values.dtype, np.floating):
            raise TypeError(f"frames must be uint8 or floats, got {values.dtype}")
        if values.ndim != 4 or 3 not in (values.shape[1], values.shape[3]) or len(values) == 0:
            raise ValueError(f"frames must be (n, 3, height, width) or (n, height, width, 3), got shape {values.shape}")
        if values.shape[1] != 3:
            values = values.transpose(0, 3, 1, 2)
        scaled = values.astype(np.float32) / (255.0 if values.dtype == np.uint8 else 1.0)
        if not (scaled.min() >= 0.0 and scaled.max() <= 1.0):
            raise ValueError(f"floats must lie in [0, 1], got {scaled.min():g} to {scaled.max():g}")
        self._frames = np.ascontiguousarray(scaled)

    def draw(self, rng: np.random.Generator, size: int) -> Look:
        """The frame that the episode begins with.

        Raises:
            ValueError: frames of another size than the scene.
        """
        if self._frames.shape[2:] != (size, size):
            raise ValueError(f"the film has frames of {self._frames.shape[2:]}, the scene is {size}x{size}")
        return _Filmed(self._frames, int(rng.integers(len(self._frames))))


@dataclass(frozen=True)
class _Filmed(_Plain):
    frames: Frame
    first: int

    def behind(self, frame: Frame, step: int) -> None:
        frame[:] = self.frames[(self.first + step) % len(self.frames)]


SHIFTS: dict[str, Shift | None] = {
    "train": None,
    "color_easy": ColorShift(0.15),
    "color_hard": ColorShift(0.35),
    "distract": DistractorShift(),
    "texture": TextureShift(),
    "gain": GainShift(),
}


def disc(frame: Frame, y: float, x: float, radius: float, colour: Frame) -> None:
    """Draw a disc with a soft edge: its opacity at distance d is ``radius + 0.5 - d``, between 0 and 1. In place."""
    reach = int(radius + 1.5)
    height, width = frame.shape[1:]
    top, left = max(int(y) - reach, 0), max(int(x) - reach, 0)
    bottom, right = min(int(y) + reach + 2, height), min(int(x) + reach + 2, width)
    rows = np.arange(top, bottom, dtype=np.float32) - np.float32(y)
    columns = np.arange(left, right, dtype=np.float32) - np.float32(x)
    distance = np.sqrt(rows[:, None] ** 2 + columns[None] ** 2)
    opacity = np.clip(radius + 0.5 - distance, 0.0, 1.0)
    patch = frame[:, top:bottom, left:right]
    patch += opacity * (colour[:, None, None] - patch)
