"""Mixup and CutMix as batch transforms, and mixing of hidden layers.

Zhang, Cisse, Dauphin, Lopez-Paz, "mixup: Beyond Empirical Risk Minimization", ICLR 2018; Yun et al., "CutMix", ICCV 2019;
Verma et al., "Manifold Mixup", ICML 2019. The label-preserving form rests on an exact identity of the expected losses
(``outlast.diagnose.mixup_theory.BetaMoments``), which Zhang, Deng, Kawaguchi, Ghorbani, Zou, "How Does Mixup Help With
Robustness and Generalization?", ICLR 2021, start from.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Generator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.data import get_worker_info

from outlast._core import _checks
from outlast._core._beta import sample_lambda
from outlast._core._calls import eager
from outlast._core._distributed import rank, world_size
from outlast._core._random import derived_seed
from outlast._core._random import generator as derived_generator
from outlast.robust._mixed_target import MixedTarget

Labels = Literal["soft", "pair", "hard"]
Pairing = Literal["permute", "roll", "flip"]
LabelsGetter = Callable[[Any], Any] | Literal["default"]


class Mix(NamedTuple):
    """One draw: weights of the samples themselves, and their partners.

    Attributes:
        lam: weight of a sample, shape ``()`` for the whole batch or ``(B,)``, float64 on the CPU.
        partner: number of each sample's partner, shape ``(B,)``, on the CPU.
    """

    lam: Tensor
    partner: Tensor


class _BatchMix(nn.Module):
    """What mixup and CutMix share: arguments, draws, labels, the structure of a batch."""

    def __init__(
        self,
        alpha: float = 1.0,
        beta: float | None = None,
        *,
        num_classes: int | None = None,
        per_sample: bool = False,
        labels: Labels = "soft",
        pairing: Pairing = "permute",
        p: float = 1.0,
        label_smoothing: float = 0.0,
        labels_getter: LabelsGetter = "default",
        ignore_index: int | None = -100,
        generator: torch.Generator | None = None,
        inplace: bool = False,
    ) -> None:
        super().__init__()
        self.alpha = _checks.real("alpha", alpha, low=0.0)
        self.beta = None if beta is None else _checks.real("beta", beta, low=0.0, low_open=True)
        if self.alpha == 0.0 and beta is not None:
            raise ValueError(f"alpha=0 means no mixing, so beta={beta!r} has no meaning; leave it out")
        self.num_classes = None if num_classes is None else _checks.integer("num_classes", num_classes, low=1)
        self.per_sample = per_sample
        self.labels = _checks.choice("labels", labels, ("soft", "pair", "hard"))
        self.pairing = _checks.choice("pairing", pairing, ("permute", "roll", "flip"))
        self.p = _checks.real("p", p, low=0.0, high=1.0)
        self.label_smoothing = _checks.real("label_smoothing", label_smoothing, low=0.0, high=1.0)
        if self.label_smoothing and (self.labels != "soft" or self.num_classes is None):
            raise ValueError(
                'label_smoothing is for labels="soft" made of class ids (with num_classes); for the other forms give it to the criterion'
            )
        if not callable(labels_getter) and labels_getter != "default":
            raise ValueError(f'labels_getter must be "default" or a function of the batch, got {labels_getter!r}')
        self.labels_getter: LabelsGetter = labels_getter
        self.ignore_index = ignore_index
        self.inplace = inplace
        start = torch.initial_seed() if generator is None else int(torch.randint(2**63 - 1, (), generator=generator, device="cpu"))
        self._seed = derived_seed(start, type(self).__name__)
        self._step = 0
        self._rank = rank()

    def extra_repr(self) -> str:
        law = f"alpha={self.alpha:g}" + ("" if self.beta is None else f", beta={self.beta:g}")
        return f"{law}, labels={self.labels!r}, per_sample={self.per_sample}, pairing={self.pairing!r}, p={self.p:g}"

    # ---- draws ----------------------------------------------------------------------------------------------------------

    def get_extra_state(self) -> dict[str, int]:
        """The stream of draws and how far it has come, so that ``state_dict`` carries both."""
        return {"seed": self._seed, "step": self._step}

    def set_extra_state(self, state: Any) -> None:
        """Go on where the state was taken.

        Every draw is a function of (seed, step, process), so that a state of one process resumes all of them exactly.

        Raises:
            ValueError: a state of something else.
        """
        if not isinstance(state, Mapping) or set(cast("Mapping[str, Any]", state)) != {"seed", "step"}:
            raise ValueError(f"{type(self).__name__} needs a state with 'seed' and 'step', got {state!r}")
        self._seed, self._step = int(state["seed"]), int(state["step"])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_rank": self._place()}  # worker processes do not know the process that they work for

    def _place(self) -> int:
        return rank() if world_size() > 1 else self._rank

    def _stream(self) -> torch.Generator:
        """The generator of the next draw: every process and every worker of a loader has its own."""
        name = f"process {self._place()}"
        worker = get_worker_info()
        if worker is not None:
            name += f", worker {worker.seed}"
        stream = derived_generator(self._seed, name, self._step)
        self._step += 1
        return stream

    def draw(self, size: int, labels: Tensor | None = None) -> Mix:
        """The weights and partners of the next batch of ``size`` samples, for code that mixes by itself (``mix_hidden``).

        Args:
            size: of the batch.
            labels: class ids ``(B,)``, where some samples may have none (``ignore_index``): those, and their partners, get weight 1.

        Raises:
            ValueError: no samples, or labels of another number.
        """
        mix = self._draw(_checks.integer("size", size, low=1), self._stream())
        if labels is None:
            return mix
        if labels.ndim == 0 or len(labels) != size:
            raise ValueError(f"labels must have one entry for each of {size} samples, got shape {tuple(labels.shape)}")
        return _left_alone(mix, self._alone(mix, labels))

    def _draw(self, size: int, stream: torch.Generator) -> Mix:
        with _on_the_processor():
            return self._draw_here(size, stream)

    def _draw_here(self, size: int, stream: torch.Generator) -> Mix:
        shape = (size,) if self.per_sample else ()
        lam = torch.ones(shape, dtype=torch.float64)
        if self.alpha > 0.0:
            lam = sample_lambda(self.alpha, self.beta, shape, law=self._law(), generator=stream)
            if self.p < 1.0:
                lam = torch.where(torch.rand(shape, generator=stream, dtype=torch.float64) < self.p, lam, 1.0)
        if self.pairing == "roll":
            index = torch.arange(size).roll(1)
        elif self.pairing == "flip":
            index = torch.arange(size).flip(0)
        else:
            index = torch.randperm(size, generator=stream)
        return Mix(lam, index)

    def _law(self) -> Literal["beta", "tilde"]:
        return "tilde" if self.labels == "hard" else "beta"

    # ---- the batch ------------------------------------------------------------------------------------------------------

    def forward(self, *inputs: Any) -> Any:
        """Mix a batch.

        Args:
            inputs: images and labels ``(x, y)``, or one structure that holds them, such as ``{"pixel_values": x, "labels": y}``.
                The input is the first tensor that is not the labels (all tensors that torchvision marks as images or
                videos, where there are such); what else the batch holds is handed on.

        Returns:
            The same structure with mixed inputs, and with labels as ``labels`` says.

        Raises:
            ValueError: an empty batch, labels that do not fit, class ids without ``num_classes`` for soft labels or out
                of their range, dense class ids for soft labels.
            TypeError: integer images, class ids as floating-point numbers, boxes, masks, key points, PIL images.
        """
        batch: Any = inputs[0] if len(inputs) == 1 else inputs
        if isinstance(batch, Mapping):
            batch = dict(cast("Mapping[str, Any]", batch))  # pytree takes other mappings for one leaf
        target = self._find_labels(batch)
        leaves, structure = tree_flatten(batch)
        places = _input_places(leaves, target)
        size = int(leaves[places[0]].shape[0])
        if target.ndim == 0 or target.shape[0] != size:
            raise ValueError(f"the batch has {size} inputs and labels of shape {tuple(target.shape)}")
        if size == 0:
            raise ValueError(f"the batch is empty: labels of shape {tuple(target.shape)}")
        self._check_labels(target)
        stream = self._stream()
        mix = self._draw(size, stream)
        mixed, mix = self._mix([leaves[place] for place in places], mix, self._alone(mix, target), stream)
        for place, x in zip(places, mixed, strict=True):
            leaves[place] = x
        done = self._mix_targets(target, mix)
        return tree_unflatten([done if leaf is target else leaf for leaf in leaves], structure)

    def _mix(self, inputs: list[Tensor], mix: Mix, alone: Tensor | None, stream: torch.Generator) -> tuple[list[Tensor], Mix]:
        """The mixed inputs without those that stay ``alone``, and the draw with the weights that they really have."""
        raise NotImplementedError

    def _find_labels(self, batch: Any) -> Tensor:
        found = _default_labels(batch) if not callable(self.labels_getter) else self.labels_getter(batch)
        if not isinstance(found, Tensor):
            raise TypeError(f"labels must be a tensor, got {type(found).__name__}; give labels_getter= to point at them")
        return found

    def _check_labels(self, y: Tensor) -> None:
        ids = not y.is_floating_point() and not y.is_complex()
        if self.labels != "soft" and (self.num_classes is None or y.ndim != 1):
            return
        if y.ndim == 1 and ids:
            if self.num_classes is None:
                raise ValueError('labels="soft" makes class probabilities out of class ids and needs num_classes')
            if y.device.type == "cpu":  # elsewhere looking would wait for the device
                wrong = (y < 0) | (y >= self.num_classes)
                wrong = wrong if self.ignore_index is None else wrong & (y != self.ignore_index)
                if bool(wrong.any()):
                    raise ValueError(f"class id {int(y[wrong][0])} is outside [0, {self.num_classes})")
        elif y.ndim == 1 and self.num_classes is not None:
            raise TypeError(f"class ids must be integers, got {y.dtype}; leave num_classes out for regression targets")
        elif y.ndim == 2 and self.num_classes is not None and y.shape[1] != self.num_classes:
            raise ValueError(f"labels have {y.shape[1]} columns, num_classes is {self.num_classes}")
        elif y.ndim > 2 and ids:
            raise ValueError(f'class ids of shape {tuple(y.shape)} cannot become soft labels; take labels="pair" or labels="hard"')
        if self.label_smoothing and not (y.ndim == 1 and ids):
            raise ValueError("label_smoothing is for class ids, these labels are probabilities or values already")

    def _alone(self, mix: Mix, y: Tensor) -> Tensor | None:
        """Which samples have no label or a partner without one: they stay as they are. None where it is known that none does."""
        if self.ignore_index is None or y.ndim != 1 or y.is_floating_point():
            return None
        ignored = y == self.ignore_index
        if y.device.type == "cpu" and not bool(ignored.any()):
            return None
        return ignored | ignored[mix.partner.to(y.device, non_blocking=True)]

    def mix_targets(self, y: Tensor, mix: Mix) -> Tensor | MixedTarget:
        """Labels of a mixed batch, in the form that ``labels`` asks for.

        Args:
            y: class ids ``(B,)``, probabilities, multi-hot labels or values ``(B, C)``, values ``(B,)``; any shape for pairs.
            mix: from ``draw``.

        Raises:
            ValueError: as when called, or a sample without a label that was mixed with another (looked for on the CPU only).
            TypeError: class ids as floating-point numbers.
        """
        self._check_labels(y)
        alone = self._alone(mix, y)
        if alone is not None and y.device.type == "cpu" and bool((mix.lam.to(y.device).expand(len(y))[alone] != 1.0).any()):
            raise ValueError(f"samples without a label ({self.ignore_index}) are mixed with others: give the labels to draw(size, labels)")
        return self._mix_targets(y, mix)

    def _mix_targets(self, y: Tensor, mix: Mix) -> Tensor | MixedTarget:
        if self.labels == "hard":
            return y
        dtype = y.dtype if y.is_floating_point() and y.element_size() >= 4 else torch.float32
        lam = mix.lam.to(y.device, dtype, non_blocking=True)
        index = mix.partner.to(y.device, non_blocking=True)
        if self.labels == "pair":
            return MixedTarget(y, y[index], lam)
        soft = self._soft(y, dtype)
        weight = lam.reshape(-1, *[1] * (soft.ndim - 1)) if lam.ndim else lam
        return torch.lerp(soft[index], soft, weight)

    def _soft(self, y: Tensor, dtype: torch.dtype) -> Tensor:
        if y.ndim > 1 or y.is_floating_point():
            return y.to(dtype)
        assert self.num_classes is not None  # _check_labels has refused
        known = torch.ones_like(y, dtype=torch.bool)[:, None] if self.ignore_index is None else (y != self.ignore_index)[:, None]
        rest = self.label_smoothing / self.num_classes
        soft = F.one_hot(torch.where(known[:, 0], y, 0).long(), self.num_classes).to(dtype)
        return (soft * (1.0 - self.label_smoothing) + rest) * known  # a row of zeros has no label


class MixUp(_BatchMix):
    """Train on convex combinations of pairs of samples and of their labels.

    Zhang, Cisse, Dauphin, Lopez-Paz, "mixup: Beyond Empirical Risk Minimization", ICLR 2018.

    ```python
    mixup = MixUp(alpha=0.2, num_classes=10)
    images, targets = mixup(images, labels)
    loss = nn.functional.cross_entropy(model(images), targets)
    ```

    Works after the transfer to a device, in a collate function (each worker draws its own), and beside torchvision's
    transforms (``v2.RandomChoice([MixUp(...), CutMix(...)])``). Weights and partners are functions of (seed, step, process):
    processes of a distributed training mix differently, and, all having been given one seed, a checkpoint of one resumes all exactly
    (in loader workers, which count for themselves, the stream goes by the worker's seed). Nothing is read back from the device.

    Draw once a step and outside of a SAM closure, so that both passes see one batch. Token ids cannot be mixed: mix their
    embeddings by ``mix_hidden``.

    Args:
        alpha: both parameters of the Beta distribution of the weight; 0 for no mixing. 1 on CIFAR, 0.1 to 0.4 on ImageNet,
            8 to 32 against wrong labels.
        beta: its second parameter; None for ``alpha``.
        num_classes: needed to make soft labels out of class ids.
        per_sample: one weight for each sample in place of one for the batch.
        labels: ``"soft"`` mixes labels (class probabilities, multi-hot labels, regression targets); ``"pair"`` gives a
            ``MixedTarget`` for ``mixup_loss``; ``"hard"`` keeps each sample's own label and draws the weight from
            the law under which the expected loss and gradient are those of the other two, for every loss that is affine in
            the label.
        pairing: ``"permute"`` (a fresh permutation), ``"roll"`` (the sample before) or ``"flip"`` (the mirrored place); the
            last two need a loader that shuffles.
        p: probability of mixing the batch (the sample, for ``per_sample``).
        label_smoothing: share of the label's weight that is spread over all classes (soft labels from class ids).
        labels_getter: where the labels are in a batch; ``"default"`` takes the second entry of a tuple or the entry of a
            mapping whose name holds "label".
        ignore_index: class id of samples without a label: they and their partners are not mixed, and soft labels of the
            former are zero; None for none such. Where there may be some (always, if labels are on an accelerator, which is
            not asked), ``lam`` of pairs has an entry for each sample.
        generator: gives the seed of the stream (one number is drawn at once); None derives it from ``torch.initial_seed()``, so
            that two such transforms share their draws.
        inplace: write into the input.

    Raises:
        ValueError: an argument out of its range, or ``beta`` with ``alpha=0``.
    """

    def _mix(self, inputs: list[Tensor], mix: Mix, alone: Tensor | None, stream: torch.Generator) -> tuple[list[Tensor], Mix]:
        if mix.lam.ndim == 0 and float(mix.lam) == 1.0:
            return inputs, mix
        mix = _left_alone(mix, alone)
        return [self._interpolated(x, mix, alone) for x in inputs], mix

    def _interpolated(self, x: Tensor, mix: Mix, alone: Tensor | None) -> Tensor:
        out = _interpolate(x, mix, self.pairing, inplace=self.inplace and alone is None)
        if alone is not None:  # a weight of 0 does not stop NaN and infinity
            out = torch.where(alone.to(x.device).reshape(-1, *[1] * (x.ndim - 1)), x, out)
            out = x.copy_(out) if self.inplace else out
        return _like(out, x)


class CutMix(_BatchMix):
    """Paste a box of another sample into each, and mix labels by the box's share.

    Yun et al., "CutMix: Regularization Strategy to Train Strong Classifiers with Localizable Features", ICCV 2019.

    Arguments as for ``MixUp``. All dimensions after the second are cut (after the first for inputs ``(B, D)``), so
    sequences and volumes work too. The weight is that of the box as it was cut: boxes end at the border. With
    ``labels="hard"`` a sample keeps its label and is the ground with probability ``lam``, else the box, which has the same
    expected loss.

    Args:
        minmax: draw the sides of the box uniformly between these shares of the input's, in place of the Beta distribution.

    Raises:
        ValueError: as for ``MixUp``; ``minmax`` that is not ``0 <= low <= high <= 1``.
    """

    def __init__(
        self,
        alpha: float = 1.0,
        beta: float | None = None,
        *,
        num_classes: int | None = None,
        per_sample: bool = False,
        labels: Labels = "soft",
        pairing: Pairing = "permute",
        p: float = 1.0,
        label_smoothing: float = 0.0,
        labels_getter: LabelsGetter = "default",
        ignore_index: int | None = -100,
        generator: torch.Generator | None = None,
        inplace: bool = False,
        minmax: tuple[float, float] | None = None,
    ) -> None:
        super().__init__(
            alpha,
            beta,
            num_classes=num_classes,
            per_sample=per_sample,
            labels=labels,
            pairing=pairing,
            p=p,
            label_smoothing=label_smoothing,
            labels_getter=labels_getter,
            ignore_index=ignore_index,
            generator=generator,
            inplace=inplace,
        )
        self.minmax = None
        if minmax is not None:
            low, high = (_checks.real("minmax", value, low=0.0, high=1.0) for value in minmax)
            if low > high:
                raise ValueError(f"minmax must be (low, high), got {minmax!r}")
            self.minmax = (low, high)

    def _law(self) -> Literal["beta", "tilde"]:
        return "beta"

    def _mix(self, inputs: list[Tensor], mix: Mix, alone: Tensor | None, stream: torch.Generator) -> tuple[list[Tensor], Mix]:
        if mix.lam.ndim == 0 and float(mix.lam) == 1.0:
            return inputs, mix
        sizes = inputs[0].shape[min(2, inputs[0].ndim - 1) :]
        if not sizes or any(x.shape[min(2, x.ndim - 1) :] != sizes for x in inputs):
            raise ValueError(f"CutMix cuts one box out of all inputs, got shapes {', '.join(str(tuple(x.shape)) for x in inputs)}")
        with _on_the_processor():
            low, high = self._boxes(mix.lam, sizes, stream)
        share = torch.stack([end - begin for begin, end in zip(low, high, strict=True)]).prod(0).double() / math.prod(sizes)
        lam = torch.where(mix.lam == 1.0, 1.0, 1.0 - share)  # 1: not drawn
        swapped = torch.zeros_like(lam, dtype=torch.bool)
        if self.labels == "hard":
            swapped = torch.rand(lam.shape, generator=stream, dtype=torch.float64, device="cpu") >= lam
        mix = _left_alone(Mix(lam, mix.partner), alone)
        if mix.lam.ndim == 0:
            box = tuple(slice(int(begin), int(end)) for begin, end in zip(low, high, strict=True))
            return [_like(self._cut_all(x, mix.partner, (..., *box), swapped=bool(swapped)), x) for x in inputs], mix
        inside = self._masks(low, high, sizes, mix.lam.device)
        swap = swapped.to(mix.lam.device, non_blocking=True).reshape(-1, *[1] * len(sizes))
        partner = (inside ^ swap) & (mix.lam != 1.0).reshape(-1, *[1] * len(sizes))
        return [_like(self._cut_each(x, mix.partner, partner), x) for x in inputs], mix

    def _cut_all(self, x: Tensor, index: Tensor, box: tuple[Any, ...], *, swapped: bool) -> Tensor:
        """Every sample's partner inside the box (or outside of it, if ``swapped``)."""
        index = index.to(x.device, non_blocking=True)
        if swapped:
            out = x.index_select(0, index)
            out[box] = x[box]
            return x.copy_(out) if self.inplace else out
        patch = x[box].index_select(0, index)
        out = x if self.inplace else x.clone()
        out[box] = patch
        return out

    def _cut_each(self, x: Tensor, index: Tensor, partner: Tensor) -> Tensor:
        """Each sample's partner where ``partner``, shape ``(B, *sizes)``, says so."""
        mask = partner.to(x.device, non_blocking=True).reshape(len(x), *[1] * (x.ndim - partner.ndim), *partner.shape[1:])
        out = torch.where(mask, x.index_select(0, index.to(x.device, non_blocking=True)), x)
        return x.copy_(out) if self.inplace else out

    def _boxes(self, lam: Tensor, sizes: torch.Size, stream: torch.Generator) -> tuple[list[Tensor], list[Tensor]]:
        """First and last place (exclusive) of the boxes in each dimension."""
        low: list[Tensor] = []
        high: list[Tensor] = []
        for size in sizes:
            if self.minmax is not None:
                share = self.minmax[0] + (self.minmax[1] - self.minmax[0]) * torch.rand(lam.shape, generator=stream, dtype=torch.float64)
                side = (share * size).long()
                start = (torch.rand(lam.shape, generator=stream, dtype=torch.float64) * (size - side + 1)).long()
                low.append(start)
                high.append(start + side)
            else:
                half = (0.5 * (1.0 - lam) ** (1.0 / len(sizes)) * size).long()
                centre = torch.randint(size, lam.shape, generator=stream)
                low.append((centre - half).clamp(min=0))
                high.append((centre + half).clamp(max=size))
        return low, high

    @staticmethod
    def _masks(low: list[Tensor], high: list[Tensor], sizes: torch.Size, device: torch.device) -> Tensor:
        """Whether a place lies in its sample's box, shape ``(B, *sizes)``, or ``(1, *sizes)`` for one box."""
        inside = torch.ones((low[0].numel(), *sizes), dtype=torch.bool, device=device)
        for axis, size in enumerate(sizes):
            places = torch.arange(size, device=device)
            begin, end = (side[axis].to(device, non_blocking=True).reshape(-1, 1) for side in (low, high))
            one = (places >= begin) & (places < end)
            inside &= one.reshape(len(one), *[1] * axis, size, *[1] * (len(sizes) - axis - 1))
        return inside


@contextmanager
def mix_hidden(model: nn.Module, layer: str | nn.Module, lam: Tensor | float, index: Tensor) -> Generator[None]:
    """Mix what a layer puts out, in the forward passes inside (manifold mixup; embeddings of text).

    ```python
    mix = mixup.draw(len(tokens), labels)
    with mix_hidden(model, "embedding", *mix):
        logits = model(tokens)
    loss = mixup_loss(criterion, logits, mixup.mix_targets(labels, mix))
    ```

    Compiled models run uncompiled inside. With activation checkpointing run the backward pass inside too.

    Args:
        model: holds the layer.
        layer: the layer or its name in ``model.named_modules()``. Of an output that is a tuple, the first tensor is mixed.
        lam: weight of each sample itself, a number or shape ``()`` or ``(B,)``.
        index: each sample's partner, shape ``(B,)``.

    Raises:
        ValueError: a layer that the model does not have, one that did not run inside, an output whose first dimension is not ``B``.
        TypeError: an output without a floating-point tensor.
    """
    names = dict(model.named_modules())
    if isinstance(layer, str) and layer not in names:
        raise ValueError(f"the model has no layer {layer!r}; some of its layers: {', '.join(list(names)[1:9])}")
    module = names[layer] if isinstance(layer, str) else layer
    if module not in names.values():
        raise ValueError(f"the {type(module).__name__} given as layer is no part of the model")
    mix = Mix(torch.as_tensor(lam, dtype=torch.float64), index)
    if mix.lam.device.type == "cpu" and not bool(((mix.lam >= 0.0) & (mix.lam <= 1.0)).all()):
        raise ValueError(f"lam must be in [0, 1], got {lam!r}")
    ran = False

    def hook(_module: nn.Module, _inputs: object, output: Any) -> Any:
        nonlocal ran
        ran = True
        leaves, structure = tree_flatten(output)
        place = next((i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.is_floating_point()), None)
        if place is None:
            raise TypeError(f"layer {layer!r} puts out no floating-point tensor")
        if leaves[place].shape[0] != len(index):
            raise ValueError(f"layer {layer!r} puts out {leaves[place].shape[0]} rows, index has {len(index)}")
        leaves[place] = _interpolate(leaves[place], mix, "permute", inplace=False)
        return tree_unflatten(leaves, structure)

    handle = module.register_forward_hook(hook)
    try:
        with eager():  # a compiled graph would not know of the hook
            yield
    finally:
        handle.remove()
    if not ran:
        raise ValueError(f"layer {layer!r} did not run, so nothing was mixed")


def _interpolate(x: Tensor, mix: Mix, pairing: str, *, inplace: bool) -> Tensor:
    """``lam x + (1 - lam) x[index]`` with one temporary; a neighbour's rows (roll) or mirrored rows (flip) are not gathered first."""
    half = x.is_floating_point() and x.element_size() < 4
    wide = x.float() if half else x  # the weight would lose its digits
    weight: Any = _weight(mix.lam, wide)
    if pairing == "roll" and not inplace and not x.requires_grad and not isinstance(weight, Tensor):
        out = torch.empty_like(wide)
        torch.lerp(wide[:-1], wide[1:], weight, out=out[1:])
        torch.lerp(wide[-1:], wide[:1], weight, out=out[:1])
        return out.to(x.dtype)
    other = wide.flip(0) if pairing == "flip" else wide.index_select(0, mix.partner.to(x.device, non_blocking=True))
    if inplace:
        return x.copy_(other.lerp_(wide, weight)) if half else x.lerp_(other, 1.0 - weight)
    return other.lerp_(wide, weight).to(x.dtype)


def _on_the_processor() -> AbstractContextManager[Any]:
    """Draws are made there, whatever the default device is."""
    return nullcontext() if torch.get_default_device().type == "cpu" else torch.device("cpu")


def _left_alone(mix: Mix, alone: Tensor | None) -> Mix:
    return mix if alone is None else Mix(torch.where(alone, 1.0, mix.lam.to(alone.device, non_blocking=True)), mix.partner)


def _weight(lam: Tensor, x: Tensor) -> Tensor | float:
    if lam.ndim == 0 and lam.device.type == "cpu":
        return float(lam)
    lam = lam.to(x.device, x.dtype, non_blocking=True)
    return lam.reshape(-1, *[1] * (x.ndim - 1)) if lam.ndim else lam


def _default_labels(batch: Any) -> Any:
    if isinstance(batch, tuple | list):
        entries = cast("tuple[Any, ...]", batch)
        if len(entries) < 2:
            raise ValueError("a batch of one entry holds no labels; give labels_getter=")
        return _default_labels(entries[1]) if isinstance(entries[1], Mapping) else entries[1]
    if isinstance(batch, Mapping):
        entries = cast("Mapping[str, Any]", batch)
        names = [name for name in entries if name.lower() in ("label", "labels")] or [name for name in entries if "label" in name.lower()]
        if names:
            return entries[names[0]]
        raise ValueError(f"no entry is named like labels among {', '.join(entries)}; give labels_getter=")
    raise ValueError(f"MixUp and CutMix take images and labels, or a structure that holds both; got one {type(batch).__name__}")


def _input_places(leaves: list[Any], target: Tensor) -> list[int]:
    images: list[int] = []
    plain: list[int] = []
    if not any(leaf is target for leaf in leaves):
        raise ValueError("labels_getter gave a tensor that is not an entry of the batch")
    for place, leaf in enumerate(leaves):
        kind, home = type(leaf).__name__, type(leaf).__module__
        if home.startswith("PIL.") or (home.startswith("torchvision.tv_tensors") and kind not in ("Image", "Video")):
            raise TypeError(f"{kind} cannot be mixed; MixUp and CutMix take batches of floating-point tensors and their labels")
        if leaf is target or not isinstance(leaf, Tensor):
            continue
        (images if home.startswith("torchvision.tv_tensors") else plain).append(place)
    places = images or plain[:1]
    if not places:
        raise TypeError("the batch holds no tensor besides its labels")
    for place in places:
        x = leaves[place]
        if not x.is_floating_point():
            raise TypeError(
                f"inputs are {x.dtype}, which cannot be mixed; convert images to float first "
                "(transforms.v2.ToDtype(torch.float32, scale=True)), mix token ids at their embedding (mix_hidden)"
            )
        if x.ndim == 0 or x.shape[0] != leaves[places[0]].shape[0]:
            raise ValueError(f"inputs of shapes {', '.join(str(tuple(leaves[i].shape)) for i in places)} are no batch")
    return places


def _like(out: Tensor, x: Tensor) -> Tensor:
    """Torchvision's own tensor class where the input had it."""
    if type(x) is Tensor or not type(x).__module__.startswith("torchvision."):
        return out
    return cast("Any", sys.modules["torchvision.tv_tensors"]).wrap(out, like=x)
