"""Which parameters share a cosine."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

from torch import nn

from outlast._core import _checks

Groups = Literal["model", "layer", "tensor"] | Mapping[str, Sequence[nn.Parameter]] | Callable[[str], Hashable]


@dataclass(frozen=True)
class Group:
    """Parameters whose gradients are one vector."""

    name: str
    members: tuple[int, ...]  # numbers in the list of all parameters


def named(parameters: Sequence[nn.Parameter], names: Mapping[int, str]) -> list[str]:
    """A name for each parameter: the model's or the optimizer's where one is known, else its number."""
    return [names.get(id(parameter), str(number)) for number, parameter in enumerate(parameters)]


def partition(parameters: Sequence[nn.Parameter], names: Sequence[str], groups: Groups, *, known: bool) -> list[Group]:
    """Split parameters into groups.

    ``"layer"`` puts together what one module owns. Where no names are known, a tensor of two or more dimensions opens a
    layer and the vectors behind it (biases) belong to it, as modules register them.
    """
    keys: list[Hashable]
    if isinstance(groups, Mapping):
        keys = _by_mapping(parameters, names, cast("Mapping[str, Sequence[nn.Parameter]]", groups))
    elif callable(groups):
        if not known:
            raise ValueError("groups=callable gets parameter names: give model=, or build the optimizer from model.named_parameters()")
        keys = [groups(name) for name in names]
    else:
        _checks.choice("groups", groups, ("model", "layer", "tensor"))
        if groups == "model":
            keys = ["model"] * len(names)
        elif groups == "tensor":
            keys = list(names)
        elif known:
            keys = [name.rpartition(".")[0] or "root" for name in names]
        else:
            keys = _by_order(parameters)
    found: dict[Hashable, list[int]] = {}
    for number, key in enumerate(keys):
        found.setdefault(key, []).append(number)
    return [Group(str(key), tuple(members)) for key, members in found.items()]


def _by_mapping(parameters: Sequence[nn.Parameter], names: Sequence[str], groups: Mapping[str, Sequence[nn.Parameter]]) -> list[Hashable]:
    key_of: dict[int, str] = {}
    for key, members in groups.items():
        for parameter in members:
            if key_of.setdefault(id(parameter), key) != key:
                raise ValueError(f"a parameter of shape {tuple(parameter.shape)} is in two groups: {key_of[id(parameter)]!r} and {key!r}")
    own = {id(parameter) for parameter in parameters}
    foreign = [key for key, members in groups.items() if any(id(parameter) not in own for parameter in members)]
    if foreign:
        raise ValueError(f"groups {', '.join(map(repr, foreign))} hold parameters that the optimizer does not have")
    return [key_of.get(id(parameter), "rest") for parameter in parameters]


def _by_order(parameters: Sequence[nn.Parameter]) -> list[Hashable]:
    keys: list[Hashable] = []
    number = -1
    for parameter in parameters:
        if parameter.ndim >= 2 or number < 0:
            number += 1
        keys.append(f"layer {number}")
    return keys


def known_names(model: nn.Module | None, groups: Sequence[Mapping[str, Any]]) -> dict[int, str]:
    """Names by parameter identity, from the model or from an optimizer built on named parameters."""
    if model is not None:
        return {id(parameter): name for name, parameter in model.named_parameters()}
    found: dict[int, str] = {}
    for group in groups:
        for name, parameter in zip(group.get("param_names", ()), group["params"], strict=False):
            found[id(parameter)] = name
    return found
