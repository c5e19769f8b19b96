"""The SAM gradient as a function: m-sharpness and ESAM's sample selection, which need the samples of the batch.

Foret et al., ICLR 2021, section 4.1 (m-sharpness); Du et al., "Efficient Sharpness-aware Minimization", ICLR 2022 (the
fraction ``gamma`` of samples).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from outlast._core import _checks, _foreach
from outlast._core._perturbation import (
    ball_step,
    batch_size,
    check_p,
    is_weight_name,
    select_samples,
    split_batch,
    weight_scaling,
)
from outlast.errors import UnsupportedError
from outlast.robust._passes import FirstPass


def sam_gradient(
    loss_fn: Callable[[nn.Module, Any], Tensor],
    model: nn.Module,
    batch: Any,
    *,
    rho: float,
    p: float = 2.0,
    m: int | None = None,
    adaptive: bool = False,
    eta: float = 0.01,
    gamma: float = 1.0,
) -> tuple[Tensor, list[Tensor]]:
    """The SAM gradient of a batch, each part of ``m`` samples with a perturbation of its own.

    ```python
    loss, gradients = sam_gradient(loss_fn, model, (images, labels), rho=0.1, m=32)
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        parameter.grad = gradient
    optimizer.step()  # the plain optimizer
    ```

    ``.grad`` is neither read nor written, weights are as before afterwards, buffers are those of the passes at the
    unperturbed weights, and both passes of a part draw the same dropout masks.

    Args:
        loss_fn: ``loss_fn(model, batch)``, a mean loss (0-dim) or one loss a sample (shape ``(b,)``).
        model: its parameters with ``requires_grad`` are perturbed.
        batch: tensors in any nesting of tuples, lists and dicts, all with leading dimension ``b``.
        rho: radius; 0 gives the plain gradient.
        p: order of the norm of the ball, in [1, inf].
        m: samples a part; None takes the batch as one part. Smaller parts generalise better and cost the same samples.
        adaptive: ASAM's scaled ball, on parameters with ``weight`` in their name.
        eta: floor of ASAM's scaling.
        gamma: take the second gradient over this fraction of each part's samples, those whose loss rose most. Needs one
            loss a sample, and an extra forward pass without gradient.

    Returns:
        The mean loss at the weights, and one gradient for each parameter of ``model.parameters()`` that requires one
        (zeros where the loss does not depend on it).

    Raises:
        ValueError: a setting out of range; ``m`` above the batch's size; ``gamma < 1`` with a 0-dim loss.
    """
    rho = _checks.real("rho", rho, low=0.0)
    p = check_p(p)
    eta = _checks.real("eta", eta, low=0.0)
    gamma = _checks.real("gamma", gamma, low=0.0, high=1.0, low_open=True)
    if m is not None:
        m = _checks.integer("m", m, low=1)
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    parameters = [parameter for _, parameter in named]
    if any(_foreach.is_sharded(parameter) for parameter in parameters):
        raise UnsupportedError("sam_gradient works on whole parameters; with FSDP2 use SAM(..., sync='global')")
    scaled = [adaptive and is_weight_name(name) for name, _ in named]
    parts = split_batch(batch, m)
    total = sum(size for _, size in parts)
    gradients = [torch.zeros_like(parameter) for parameter in parameters]
    loss = torch.zeros(())
    for part, size in parts:
        part_loss, part_gradients = _one_part(
            loss_fn, model, part, parameters, rho=rho, p=p, etas=[eta if flag else None for flag in scaled], gamma=gamma
        )
        share = size / total
        loss = loss.to(part_loss) + share * part_loss
        _foreach.add_(gradients, part_gradients, alpha=share)
    return loss, gradients


def _one_part(
    loss_fn: Callable[[nn.Module, Any], Tensor],
    model: nn.Module,
    part: Any,
    parameters: list[nn.Parameter],
    *,
    rho: float,
    p: float,
    etas: list[float | None],
    gamma: float,
) -> tuple[Tensor, list[Tensor]]:
    with FirstPass(parameters, local=True) as first, torch.enable_grad():
        losses = loss_fn(model, part)
        if gamma < 1.0 and losses.shape != (batch_size(part),):
            raise ValueError(f"gamma < 1 picks samples and needs one loss a sample, got a loss of shape {tuple(losses.shape)}")
        loss = losses.mean()
        grads = _gradients(loss, parameters)
    losses = losses.detach()
    if rho == 0.0:
        return loss.detach(), grads
    with torch.no_grad():
        scalings = [None if eta is None else weight_scaling(w, eta) for w, eta in zip(parameters, etas, strict=True)]
        _, shift, _ = ball_step(grads, scalings, p)
        backup = [parameter.detach().clone() for parameter in parameters]
        _foreach.add_(parameters, shift, alpha=rho)
    try:
        if gamma < 1.0:
            first.begin_second(freeze_buffers=True, same_rng=True)
            with torch.no_grad():
                rise = loss_fn(model, part) - losses
            count = max(1, math.ceil(gamma * len(rise)))
            part = select_samples(part, rise.topk(count).indices.sort().values)
        first.begin_second(freeze_buffers=True, same_rng=True)
        with torch.enable_grad():
            grads = _gradients(loss_fn(model, part).mean(), parameters)
    finally:
        with torch.no_grad():
            _foreach.copy_(parameters, backup)
        first.end_second()
    return loss.detach(), grads


def _gradients(loss: Tensor, parameters: list[nn.Parameter]) -> list[Tensor]:
    return list(torch.autograd.grad(loss, parameters, materialize_grads=True))
