"""The layer that receives the input."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from outlast._core._norm import eval_mode

InputLayer = str | nn.Module | Sequence[str | nn.Module] | None


def input_layers(model: nn.Module, given: InputLayer, example: Tensor | None) -> tuple[str, ...]:
    """Names of the linear or convolutional layers that receive the input.

    Without ``given`` it is the first such layer that runs on ``example``; normalisation and reshaping may come before it.

    Raises:
        ValueError: none, several that read the same tensor, or a name that is no such layer.
    """
    names = _named_layers(model)
    if given is not None:
        wanted = [given] if isinstance(given, str | nn.Module) else list(given)
        return tuple(_resolve(model, names, each) for each in wanted)
    if example is None:
        first = next(iter(names.values()), None)
        if first is None:
            raise ValueError(_no_layer(model))
        return (first,)
    seen: list[tuple[str, Tensor]] = []

    def note(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if inputs and isinstance(inputs[0], Tensor):
            seen.append((names_of_copy[module], inputs[0]))

    twin = copy.deepcopy(model)  # a forward pass may change buffers
    names_of_copy = _named_layers(twin)
    handles = [module.register_forward_pre_hook(note) for module in names_of_copy]
    try:
        with torch.no_grad(), eval_mode(twin):
            twin(example)
    finally:
        for handle in handles:
            handle.remove()
    if not seen:
        raise ValueError(_no_layer(model))
    # The same numbers count as the same input, whether as one tensor, a view or a copy.
    first = seen[0][1].flatten()
    same = dict.fromkeys(name for name, tensor in seen if tensor.numel() == first.numel() and torch.equal(tensor.flatten(), first))
    if len(same) > 1:
        raise ValueError(
            f"several layers receive the input ({', '.join(same)}): name those that the coupling must change, "
            f"input_layer={list(same)!r}, or use method='distributional'"
        )
    return tuple(same)


def check_own_weights(model: nn.Module, layers: Sequence[str]) -> None:
    """The coupling writes into weights, so they must be parameters.

    Raises:
        ValueError: a weight is computed from others (weight normalisation and other parametrisations).
    """
    for name in layers:
        module = model.get_submodule(name)
        if "weight" not in dict(module.named_parameters(recurse=False)):
            raise ValueError(
                f"the weight of layer {name!r} is computed from other parameters (a parametrisation), so it cannot follow a "
                "transformation; remove the parametrisation for the test, or use method='distributional'"
            )


def _named_layers(model: nn.Module) -> dict[nn.Module, str]:
    return {module: name for name, module in model.named_modules() if isinstance(module, nn.Linear | _ConvNd)}


def _no_layer(model: nn.Module) -> str:
    return (
        f"{type(model).__name__} has no Linear or Conv layer that receives the input: name one with input_layer=, or use "
        "method='distributional', which needs none"
    )


def _resolve(model: nn.Module, names: dict[nn.Module, str], wanted: str | nn.Module) -> str:
    if isinstance(wanted, nn.Module):
        if wanted not in names:
            raise ValueError("input_layer is no Linear or Conv layer of the model that make_model gives; pass its name")
        return names[wanted]
    if wanted not in names.values():
        raise ValueError(f"the model has no Linear or Conv layer {wanted!r}; it has: {', '.join(names.values())}")
    return wanted
