"""Random vectors that change in training: drawn by an explicit call or after steps of the optimizer, never inside forward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from outlast._core._checks import integer


class Redrawn(nn.Module):
    """A module whose buffer ``projection`` is draw number ``draws`` of (seed, layer).

    Seed and counters are buffers: the state dict resumes them, and every process that counts the same steps has the same vectors.
    """

    seed: Tensor
    draws: Tensor
    """Number of the present draw."""
    steps: Tensor
    """Steps of the optimizer since the beginning."""
    projection: Tensor

    def __init__(self, *, redraw_interval: int | None, seed: int, layer: int) -> None:
        super().__init__()
        self.redraw_interval = None if redraw_interval is None else integer("redraw_interval", redraw_interval, low=1)
        self.layer = integer("layer", layer, low=0)
        self._first_seed = integer("seed", seed, low=0)
        for name, value in (("seed", seed), ("draws", 0), ("steps", 0)):
            self.register_buffer(name, torch.tensor(value, dtype=torch.int64))

    def _draw(self, seed: int, index: int) -> Tensor:
        """The vectors of one draw, on the CPU."""
        raise NotImplementedError

    @torch.no_grad()
    def reset_draws(self) -> None:
        """Go back to the first draw of the seed; also what fills the buffers after ``to_empty()``."""
        self.seed.fill_(self._first_seed)
        self.draws.zero_()
        self.steps.zero_()
        self.projection.copy_(self._draw(self._first_seed, 0))

    @torch.no_grad()
    def redraw(self) -> None:
        """Take the next vectors."""
        self.draws += 1
        self.projection.copy_(self._draw(int(self.seed), int(self.draws)))

    def count_step(self) -> None:
        """Count a step of the optimizer, and redraw when the interval is over; nothing in evaluation mode."""
        if not self.training:
            return
        self.steps += 1
        if self.redraw_interval == 1 or (self.redraw_interval is not None and int(self.steps) % self.redraw_interval == 0):
            self.redraw()

    def _drawn(self) -> str:
        """For ``repr``."""
        return "on meta" if self.draws.is_meta else f"draws={int(self.draws)}"


def redraw_after_steps(model: nn.Module, optimizer: torch.optim.Optimizer) -> RemovableHandle:
    """Let every linear attention inside a model count this optimizer's steps and redraw by its own interval.

    Gradient accumulation counts once, since it steps once; a step that an AMP scaler skips does not count.

    Args:
        model: holds ``FavorAttention`` or ``RandomFeatureAttention`` modules, or is one.
        optimizer: the one whose steps count.

    Returns:
        A handle; ``remove()`` ends it.

    Raises:
        ValueError: the model holds no such module.
    """
    modules = [module for module in model.modules() if isinstance(module, Redrawn)]
    if not modules:
        raise ValueError(f"{type(model).__name__} holds no attention with random vectors")

    def after(optimizer: Any, _args: Any, _kwargs: Any) -> None:
        found_inf = getattr(optimizer, "found_inf", None)  # a fused optimizer is called even where the scaler skips its update
        if found_inf is not None and bool(found_inf):
            return
        for module in modules:
            module.count_step()

    return optimizer.register_step_post_hook(after)
