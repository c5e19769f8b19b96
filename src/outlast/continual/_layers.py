"""Which parameters of a model multiply rows, which normalise, and which do neither; by name, by identity, in use."""

from __future__ import annotations

import difflib
import re
import warnings
from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.parameter import is_lazy

from outlast._core._norm import is_norm_layer
from outlast.continual._sites import EmbeddingSite, LinearSite, Site
from outlast.errors import OutlastWarning

Pattern = str | re.Pattern[str]
_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


class Layers:
    """The constrained places of a model, found by its modules and by what its forward pass calls.

    Attributes:
        sites: by label, in the order in which they were found.
        parameters: by first name; every name of a tied parameter leads to its first one.
        norm_layers: normalisation layers by path.
        frozen: names of what is held from the first consolidation on.
        odd: constrained parameters that were seen in calls that are no linear map, with the calls' names.
    """

    def __init__(
        self, model: nn.Module, include: Iterable[Pattern] | None, exclude: Iterable[Pattern], *, bias: str, norm: str, other: str
    ) -> None:
        self.model = model
        self._include = None if include is None else _as_list(include)
        self._exclude = _as_list(exclude)
        self._bias, self._norm, self._other = bias, norm, other
        self.parameters: dict[str, nn.Parameter] = {}
        self.sites: dict[str, Site] = {}
        self.norm_layers: dict[str, nn.Module] = {}
        self.frozen: set[str] = set()
        self.odd: dict[str, set[str]] = {}
        self._canonical: dict[str, str] = {}
        self._by_id: dict[int, str] = {}
        self._chosen: set[str] = set()
        self._of_weight: dict[str, list[Site]] = {}
        self._mapped: set[str] = set()  # names that a layer or a policy of its own decides on
        self._joint: dict[str, LinearSite] = {}  # biases that belong to a map
        self.scan()
        for argument, patterns in (("include", self._include or []), ("exclude", self._exclude)):
            for pattern in patterns:
                self.matching(argument, [pattern])
        self._warn_of_shared_exclusions()
        raw = [n for n, p in self.parameters.items() if n in self._chosen and p.ndim >= 2 and n not in self._mapped]
        if not self.sites and not raw:
            raise ValueError("no layer to constrain: the included parameters hold no Linear, convolution, embedding or attention layer")
        if other == "error":
            for path, layer in self.norm_layers.items():
                for name, _ in layer.named_parameters(recurse=False):
                    full = self._canonical[f"{path}.{name}" if path else name]
                    if full in self.frozen and not isinstance(layer, _NormBase):
                        raise ValueError(f"{full} is no linear map and other='error'; exclude it, or use other='freeze' or 'free'")

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_by_id": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._by_id = {id(parameter): name for name, parameter in self.parameters.items()}

    # ---- names ---------------------------------------------------------------------------------------------------------

    def scan(self) -> None:
        """Take up what the model has that is not known yet; what is known keeps its name."""
        present = {id(parameter) for parameter in self.model.parameters()}
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            if id(parameter) not in self._by_id:
                self._take(name, parameter, present)
            self._canonical[name] = self._by_id[id(parameter)]
        for name, first in self._canonical.items():  # a tied parameter is left out by any of its names
            if _matches(name, self._exclude):
                self._chosen.discard(first)
        for path, module in self.model.named_modules():
            if isinstance(module, nn.MultiheadAttention):
                self._add_attention(path, module)
            kind, groups = _kind_of(module)
            if kind is not None:
                weight = module._parameters.get("weight")
                if weight is not None:  # else it is computed (weight normalisation and the like)
                    self._add(kind, weight, module._parameters.get("bias"), groups, path)
            elif is_norm_layer(module) and path not in self.norm_layers:
                self._add_norm(path, module)

    def _take(self, name: str, parameter: nn.Parameter, present: set[int]) -> None:
        """A parameter that is not known: a new one, or one in the place of another that is gone."""
        key, old = name, self.parameters.get(name)
        if old is not None and id(old) not in present:
            if old.shape != parameter.shape and any(site.rank for site in self._of_weight.get(name, [])):
                raise ValueError(
                    f"{name} was replaced by one of another shape ({tuple(old.shape)}, now {tuple(parameter.shape)}), so that what the "
                    "memory holds for it has no place; exclude it, or build the memory again"
                )
            self._by_id.pop(id(old), None)
            for site in self.sites.values():
                site.replace(old, parameter)
        else:
            while key in self.parameters:  # modules were moved: the name now means another parameter
                key += "'"
        self._by_id[id(parameter)] = key
        self.parameters[key] = parameter
        if self._takes(name):
            _check_parameter(name, parameter)
            self._chosen.add(key)

    def _takes(self, name: str) -> bool:
        return (self._include is None or _matches(name, self._include)) and not _matches(name, self._exclude)

    def matching(self, argument: str, patterns: Iterable[Pattern]) -> set[str]:
        """Parameters (by first names) that patterns name.

        Raises:
            ValueError: a pattern that names none; the message lists near names.
        """
        found: set[str] = set()
        for pattern in _as_list(patterns):
            names = {name for name in self._canonical if _matches(name, [pattern])}
            paths = [path for path, module in self.model.named_modules() if path == pattern and not list(module.parameters())]
            if not names and not paths:
                shown = pattern.pattern if isinstance(pattern, re.Pattern) else pattern
                raise ValueError(f"{argument} names {shown!r}, which no parameter of the model matches; {self.near(str(shown))}")
            found |= {self._canonical[name] for name in names}
        return found

    def near(self, name: str) -> str:
        """Names like a wrong one, for its message."""
        modules = {path for path, _ in self.model.named_modules() if path}
        near = difflib.get_close_matches(name, [*modules, *self._canonical], n=3, cutoff=0.5)
        return f"near: {', '.join(near)}" if near else f"some names: {', '.join(list(self._canonical)[:6])}"

    def _warn_of_shared_exclusions(self) -> None:
        for name, first in self._canonical.items():
            others = [other for other, same in self._canonical.items() if same == first and other != name]
            if others and _matches(name, self._exclude) and not all(_matches(other, self._exclude) for other in others):
                warnings.warn(
                    f"exclude leaves out {name}, which is also {', '.join(others)}: a tied parameter is left out everywhere",
                    OutlastWarning,
                    stacklevel=5,
                )

    def known(self, name: str) -> bool:
        """Whether a threshold may be given for a name: a layer's, or that of a weight."""
        if name in self.sites:
            return True
        first = self._canonical.get(name)
        if first is None or self.parameters[first].ndim < 2:
            return False
        return first in self._of_weight or first not in self._mapped

    def name_of(self, tensor: object) -> str | None:
        """The first name of a parameter of the model."""
        name = self._by_id.get(id(tensor))
        if name is None and isinstance(tensor, nn.Parameter):
            # FSDP2 puts unsharded parameters in place for the time of a module's forward pass.
            for own, parameter in self.model.named_parameters(remove_duplicate=False):
                if parameter is tensor:
                    return self._canonical.get(own)
        return name

    def weight_name(self, site: Site) -> str:
        """The first name of a site's weight."""
        return self._by_id[id(site.weight)]

    def biases_of(self, weights: Iterable[str]) -> set[str]:
        """Names of the biases that are held together with some weights."""
        biases = [getattr(site, "bias", None) for name in weights for site in self._of_weight.get(name, [])]
        return {self._by_id[id(bias)] for bias in biases if bias is not None}

    def bare(self) -> list[str]:
        """Names of parameters that belong to no linear map and no norm layer, as far as is known."""
        return [name for name in self.parameters if name in self._chosen and name not in self._mapped and name not in self._of_weight]

    # ---- sites ---------------------------------------------------------------------------------------------------------

    def _add(
        self, kind: str, weight: nn.Parameter, bias: nn.Parameter | None, groups: int, path: str, part: int | None = None
    ) -> Site | None:
        """A site for a weight, unless there is one or it is left out."""
        name = self._by_id.get(id(weight))
        if name is None or name not in self._chosen:
            return None
        own = self._of_weight.setdefault(name, [])
        for site in own:
            if site.kind == kind:
                if bias is not None and bias is not getattr(site, "bias", None):
                    self._set_aside(bias)  # one weight with several biases is not one map with a constant
                return site
        label = path or name
        while label in self.sites:
            label += f".{kind}"
        site: Site
        if kind == "embedding":
            site = EmbeddingSite(label, weight)
            for other in own:  # protecting whole rows and [W b] together do not commute
                self._separate(other)
        else:
            joint = self._joint_bias(kind, weight, bias, tied=any(other.kind == "embedding" for other in own))
            site = LinearSite(label, cast("Any", kind), weight, joint, groups, part if joint is not None else None)
            if joint is not None:
                self._joint[self._by_id[id(joint)]] = site
        self.sites[label] = site
        own.append(site)
        return site

    def _joint_bias(self, kind: str, weight: nn.Parameter, bias: nn.Parameter | None, *, tied: bool) -> nn.Parameter | None:
        """The bias if it belongs to the map; else it is noted where it is to be held."""
        name = self._by_id.get(id(bias)) if bias is not None else None
        if bias is None or name is None or name not in self._chosen:
            return None
        self._mapped.add(name)
        if self._bias == "free":
            return None
        parts = weight.shape[0] * 3 == bias.shape[0]  # three weights share the stacked bias of an attention layer
        if self._bias == "augment" and kind != "conv_transpose" and not tied and (name not in self._joint or parts):
            return bias
        self._set_aside(bias)
        return None

    def _set_aside(self, bias: nn.Parameter) -> None:
        """Hold a bias that is no part of one map alone."""
        name = self._by_id.get(id(bias))
        if name is None or name not in self._chosen or self._bias == "free":
            return
        self._mapped.add(name)
        self.frozen.add(name)
        if name in self._joint:
            self._separate(self._joint[name])

    def _separate(self, site: Site) -> None:
        """Take the bias out of a map that holds nothing yet."""
        if isinstance(site, LinearSite) and site.bias is not None and site.rank == 0:
            name = self._by_id[id(site.bias)]
            site.leave_bias()
            self._joint.pop(name, None)
            self.frozen.add(name)

    def _add_attention(self, path: str, module: nn.MultiheadAttention) -> None:
        prefix = f"{path}." if path else ""
        bias: Any = module.in_proj_bias
        stacked = module._parameters["in_proj_weight"]
        if stacked is not None:
            self._add("attention", stacked, bias, 3, f"{prefix}in_proj")
        else:
            for part, letter in enumerate("qkv"):
                weight = module._parameters[f"{letter}_proj_weight"]
                assert weight is not None
                self._add("linear", weight, bias, 1, f"{prefix}{letter}_proj", part)

    def _add_norm(self, path: str, module: nn.Module) -> None:
        names = [self._canonical[f"{path}.{name}" if path else name] for name, _ in module.named_parameters(recurse=False)]
        taken = any(name in self._chosen for name in names) if names else self._takes(path)
        if not taken:
            return
        self.norm_layers[path] = module
        self._mapped |= set(names)
        if isinstance(module, _NormBase):
            if self._norm in ("freeze", "paper"):
                self.frozen |= set(names)
            if self._norm == "freeze" and isinstance(module, _BatchNorm) and module.running_mean is None:
                warnings.warn(
                    f"{path or 'the model'}: a BatchNorm without running statistics normalises by the batch, so that old outputs "
                    "depend on what is in it and cannot be preserved",
                    OutlastWarning,
                    stacklevel=6,
                )
        elif self._norm != "per_task" and self._other != "free":
            self.frozen |= set(names)

    def batch_norms(self) -> list[Any]:
        """BatchNorm and InstanceNorm layers."""
        return [layer for layer in self.norm_layers.values() if isinstance(layer, _NormBase)]

    # ---- in use --------------------------------------------------------------------------------------------------------

    def find(self, kind: str, weight: Tensor, bias: Tensor | None, groups: int, *, discover: bool) -> list[tuple[Site, bool]]:
        """The sites of a weight as it stands in a functional call, and whether the call adds the site's bias.

        A bare parameter of the model becomes a site with ``discover``.
        """
        name = self.name_of(weight)
        if name is None or name not in self._chosen:
            return []
        bias_name = None if bias is None else self.name_of(bias)
        found = [site for site in self._of_weight.get(name, []) if site.kind == kind]
        if not found and discover:
            own_bias = None if bias_name is None else self.parameters[bias_name]
            site = self._add(kind, self.parameters[name], own_bias, groups, name.removesuffix(".weight"))
            found = [] if site is None else [site]
        result: list[tuple[Site, bool]] = []
        for site in found:
            own = getattr(site, "bias", None)
            joint = own is not None and bias_name == self._by_id[id(own)]
            if bias_name is not None and own is not None and not joint and discover:
                self._set_aside(self.parameters[bias_name])
            result.append((site, joint))
        return result

    def used_otherwise(self, tensor: object, call: str) -> None:
        """Note a constrained parameter in a call that is no linear map known here."""
        name = self.name_of(tensor)
        if name is not None and name in self._of_weight:
            self.odd.setdefault(name, set()).add(call)

    def description(self) -> list[tuple[str, str, str, str | None, int, bool]]:
        """What another process needs to have the same sites: label, kind, weight, bias, groups, shared basis."""
        found: list[tuple[str, str, str, str | None, int, bool]] = []
        for label, site in self.sites.items():
            bias = getattr(site, "bias", None)
            shared = not isinstance(site, LinearSite) or site.shared
            found.append((label, site.kind, self.weight_name(site), self._by_id.get(id(bias)), site.groups, shared))
        return found

    def take_up(self, label: str, kind: str, weight: str, bias: str | None, groups: int, *, shared: bool) -> None:
        """Have a site that another process or a saved state has."""
        if label not in self.sites and weight in self.parameters:
            self._add(kind, self.parameters[weight], self.parameters.get(bias) if bias else None, groups, label)
        site = self.sites.get(label)
        if isinstance(site, LinearSite) and site.shared and not shared:
            site.split()

    def have_bias(self, site: LinearSite, bias: str | None) -> None:
        """Bring a site that holds nothing into the form of a saved one, with its bias in the map or without."""
        if self._bias != "augment" or site.rank:
            return
        if bias is None:
            self._separate(site)
        elif site.bias is None and bias in self.parameters:
            site.take_bias(self.parameters[bias])
            self._joint[bias] = site
            self._mapped.add(bias)

    def drop(self, parameter: nn.Parameter) -> None:
        """Forget the sites of a parameter."""
        for label, site in list(self.sites.items()):
            if site.weight is parameter:
                del self.sites[label]
                self._of_weight.pop(self.weight_name(site), None)
                self._mapped.add(self.weight_name(site))


def _as_list(patterns: Iterable[Pattern]) -> list[Pattern]:
    return [patterns] if isinstance(patterns, str | re.Pattern) else list(patterns)


def _matches(name: str, patterns: Iterable[Pattern]) -> bool:
    return any(
        pattern.search(name) is not None if isinstance(pattern, re.Pattern) else name == pattern or name.startswith(f"{pattern}.")
        for pattern in patterns
    )


def _kind_of(module: nn.Module) -> tuple[str | None, int]:
    if isinstance(module, nn.Linear):
        return "linear", 1
    if isinstance(module, _CONVS):
        return "conv", module.groups
    if isinstance(module, _TRANSPOSED):
        return "conv_transpose", module.groups
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return "embedding", 1
    if type(module).__name__ == "Conv1D" and isinstance(getattr(module, "nf", None), int):  # transformers', weight (d, o)
        return "addmm", 1
    return None, 1


def _check_parameter(name: str, parameter: nn.Parameter) -> None:
    if is_lazy(parameter):
        raise ValueError(f"{name} is lazy and has no shape yet: run the model once before building the memory")
    if parameter.layout != torch.strided:
        raise TypeError(f"{name} is sparse ({parameter.layout}); only dense weights can be constrained: exclude it")
    if parameter.is_complex() or not parameter.is_floating_point() or parameter.is_quantized:
        raise TypeError(f"{name} has dtype {parameter.dtype}; only real floating-point weights can be constrained: exclude it")
