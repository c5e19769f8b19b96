"""The network that STARTUP trains, and the two views that it sees of a target image."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from outlast._core import _checks

BatchNormPolicy = Literal["separate", "joint", "target"]


class ProjectionHead(nn.Module):
    """Linear, ReLU, Linear, without normalisation: from features to the space of the contrastive loss.

    Args:
        in_features: width of the features.
        out_features: width of the projections.
        hidden_features: width between; None for ``in_features``.
    """

    def __init__(self, in_features: int, out_features: int = 128, hidden_features: int | None = None) -> None:
        super().__init__()
        hidden = in_features if hidden_features is None else hidden_features
        self.layers = nn.Sequential(nn.Linear(in_features, hidden), nn.ReLU(), nn.Linear(hidden, out_features))

    def forward(self, features: Tensor) -> Tensor:
        """Projections ``(..., out_features)`` of features ``(..., in_features)``."""
        return self.layers(features)


class TwoViews:
    """Two random views of an image or of a batch of images.

    As a transform of single samples ``x -> (first(x), second(x))``; a batch, which has as many dimensions as ``batch_ndim``,
    becomes one tensor ``(2, B, ...)``. torchvision's v2 transforms draw once for a whole batch; for draws of each image, put
    the transform into the data set.

    Args:
        first: transform of the one view.
        second: of the other; None for the same transform, drawn anew.
        batch_ndim: dimensions of a batch: 4 for images.

    Raises:
        ValueError, TypeError: ``batch_ndim`` below 1, or no integer.
    """

    def __init__(self, first: Callable[[Any], Any], second: Callable[[Any], Any] | None = None, *, batch_ndim: int = 4) -> None:
        self.first = first
        self.second = first if second is None else second
        self.batch_ndim = _checks.integer("batch_ndim", batch_ndim, low=1)

    def __call__(self, x: Any) -> Any:
        pair = self.first(x), self.second(x)
        if isinstance(x, Tensor) and x.ndim == self.batch_ndim:
            return torch.stack(pair)
        return pair

    def __repr__(self) -> str:
        return f"TwoViews({self.first!r}, {self.second!r})"


class StartupStudent(nn.Module):
    """Backbone, a linear head over the source classes and a projector.

    Phoo, Hariharan, "Self-training for Few-shot Transfer Across Extreme Task Differences", ICLR 2021.

    Args:
        backbone: gives features ``(B, d)`` (more dimensions are flattened).
        head: logits of the source classes from features; it serves the source labels and the pseudo-labels.
        projector: projections from features; None for "no SS".
        batchnorm: ``"separate"`` runs source and each view through the backbone on its own, so that BatchNorm normalises each
            with its own statistics (the authors' form); ``"joint"`` runs all of them at once; ``"target"`` is separate, and
            ``adapt_representation`` estimates running statistics on target data anew at the end.

    Raises:
        ValueError, TypeError: an unknown ``batchnorm``.
    """

    def __init__(
        self, backbone: nn.Module, head: nn.Module, projector: nn.Module | None = None, *, batchnorm: BatchNormPolicy = "separate"
    ) -> None:
        super().__init__()
        _checks.choice("batchnorm", batchnorm, ("separate", "joint", "target"))
        self.backbone = backbone
        self.head = head
        self.projector = projector
        self.batchnorm: BatchNormPolicy = batchnorm

    @classmethod
    def from_teacher(
        cls,
        backbone: nn.Module,
        num_source_classes: int,
        feature_dim: int | None = None,
        projection_dim: int | None = 128,
        *,
        copy_backbone: bool = True,
        copy_head: nn.Module | None = None,
        batchnorm: BatchNormPolicy = "separate",
    ) -> StartupStudent:
        """A student as the paper starts it: the teacher's backbone, a random head, a random projector.

        Args:
            backbone: of the teacher; it is copied, never changed.
            num_source_classes: outputs of the head.
            feature_dim: width of the features; None reads it off the last layer that states one.
            projection_dim: width of the projections; None for no projector ("no SS").
            copy_backbone: start from the teacher's weights, not from new ones (then every layer needs ``reset_parameters``).
            copy_head: a head to copy instead of a random one.
            batchnorm: as in the constructor.

        Raises:
            ValueError: no parameter of the backbone requires a gradient; its width cannot be read off; layers without
                ``reset_parameters``.
        """
        if not any(parameter.requires_grad for parameter in backbone.parameters()):
            raise ValueError("no parameter of the backbone requires a gradient: there is nothing to train; call requires_grad_() on it")
        own = copy.deepcopy(backbone)
        if not copy_backbone:
            _reset(own)
        width = feature_width(own) if feature_dim is None else _checks.integer("feature_dim", feature_dim, low=1)
        like = next(own.parameters())
        if copy_head is not None:
            head = copy.deepcopy(copy_head)
        else:
            head = nn.Linear(width, _checks.integer("num_source_classes", num_source_classes, low=1)).to(like.device, like.dtype)
        projector = None if projection_dim is None else ProjectionHead(width, projection_dim).to(like.device, like.dtype)
        return cls(own, head, projector, batchnorm=batchnorm)

    def forward(self, source: Any, target_views: Tensor | Sequence[Tensor]) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Logits of the source ``(Bs, K)``, logits ``(V, B, K)`` and projections ``(V, B, p)`` of the V target views.

        ``source`` may be None; ``target_views`` is ``(V, B, ...)`` or a sequence of V batches, which may be empty (then both
        outputs of the target are None).
        """
        views = list(target_views)
        inputs = views if source is None else [source, *views]
        if self.batchnorm == "joint":
            features = list(self._features(torch.cat(inputs)).split([len(part) for part in inputs]))
        else:
            features = [self._features(part) for part in inputs]
        source_logits = None if source is None else self.head(features.pop(0))
        if not features:
            return source_logits, None, None
        stacked = torch.stack(features)
        return source_logits, self.head(stacked), None if self.projector is None else self.projector(stacked)

    def _features(self, x: Tensor) -> Tensor:
        return self.backbone(x).flatten(1)

    def extra_repr(self) -> str:
        return f"batchnorm={self.batchnorm!r}"


def split_classifier(teacher: nn.Module | tuple[nn.Module, nn.Module]) -> tuple[nn.Module, nn.Module]:
    """Backbone and head of a classifier, as copies.

    Taken as given where ``teacher`` is a pair or has both as attributes; else the last linear layer is the head, and the rest
    with that layer replaced by the identity is the backbone.

    Raises:
        ValueError: no linear layer.
    """
    if isinstance(teacher, tuple):
        return copy.deepcopy(teacher[0]), copy.deepcopy(teacher[1])
    backbone, head = getattr(teacher, "backbone", None), getattr(teacher, "head", None)
    if isinstance(backbone, nn.Module) and isinstance(head, nn.Module):
        return copy.deepcopy(backbone), copy.deepcopy(head)
    own = copy.deepcopy(teacher)
    name = next((name for name, module in reversed(list(own.named_modules())) if isinstance(module, nn.Linear)), None)
    if not name:
        raise ValueError("the teacher has no linear layer inside to take for its head; give (backbone, head)")
    last = own.get_submodule(name)
    owner, _, attribute = name.rpartition(".")
    setattr(own.get_submodule(owner), attribute, nn.Identity())
    return own, last


def feature_width(backbone: nn.Module) -> int:
    """Width of the features that a backbone puts out, read off the last layer that states one."""
    for module in reversed(list(backbone.modules())):
        for attribute in ("out_features", "num_features", "num_channels", "out_channels"):
            value = getattr(module, attribute, None)
            if isinstance(value, int):
                return value
    raise ValueError("the width of the backbone's features cannot be read off its layers; give feature_dim=")


def _reset(module: nn.Module) -> None:
    for name, part in module.named_modules():
        reset = getattr(part, "reset_parameters", None)
        if callable(reset):
            cast("Callable[[], None]", reset)()
        elif next(iter(part.parameters(recurse=False)), None) is not None:
            raise ValueError(f"layer {name!r} has parameters and no reset_parameters(), so that it cannot start anew")
