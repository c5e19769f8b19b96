"""What a teacher says of unlabelled samples, in the classes that it knows: soft labels, kept by the number of the sample.

Phoo, Hariharan, ICLR 2021, section 3: computed once, never refreshed, neither sharpened nor thresholded.
"""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import RandomSampler

from outlast._core import _checks
from outlast._core._batches import call_with
from outlast._core._files import load_arrays, save_arrays
from outlast._core._norm import eval_mode
from outlast._core._result import Result
from outlast.errors import DamagedFileError, OutlastWarning
from outlast.fewshot._startup_losses import check_distributions

_VERSION = 1


@dataclass(frozen=True, repr=False)
class PseudoLabelSummary(Result):
    """What to look at before a student is trained on pseudo-labels.

    Attributes:
        samples: their number N.
        classes: of the teacher, K.
        entropy: mean over samples, in nats; the most is ``log K``.
        used_classes: effective number of classes, ``exp`` of the entropy of the mean distribution.
        modal_share: share of samples whose likeliest class is the commonest one.
        confidence: mean of the largest probability.
    """

    samples: int
    classes: int
    entropy: float
    used_classes: float
    modal_share: float
    confidence: float

    @property
    def problems(self) -> tuple[str, ...]:
        """Signs that the teacher says nothing of these samples."""
        found: list[str] = []
        if self.used_classes < 2.0:
            found.append(f"the teacher uses {self.used_classes:.2f} classes in effect: it has collapsed")
        if self.confidence > 0.99:
            found.append(f"the mean largest probability is {self.confidence:.3f}: these are hard labels")
        if self.entropy > 0.98 * math.log(self.classes):
            found.append(f"the mean entropy is {self.entropy:.3f} of log {self.classes} = {math.log(self.classes):.3f}: there is no signal")
        return tuple(found)


@dataclass(frozen=True, repr=False)
class PseudoLabels(Result):
    """Soft labels by sample number.

    Attributes:
        probs: ``(N, K)``, float32 or float16; rows sum to 1.
        ids: ``(N,)`` int64, all different.
        teacher_digest: SHA-256 of the teacher's parameters and buffers, ``""`` if unknown.

    Raises:
        ValueError: shapes that do not fit, an id given twice, a row that is no distribution (named).
        TypeError: probabilities that are neither float32 nor float16 (float64 is rounded to float32).
    """

    probs: Tensor
    ids: Tensor
    teacher_digest: str = ""

    def __post_init__(self) -> None:
        probs, ids = self.probs.detach().cpu(), torch.as_tensor(self.ids).cpu()
        if probs.dtype not in (torch.float16, torch.float32, torch.float64):
            raise TypeError(f"probs must be float16, float32 or float64 (bfloat16 is too coarse for rows that sum to 1), got {probs.dtype}")
        if ids.is_floating_point() or ids.dtype == torch.bool:
            raise TypeError(f"ids must be integers, got {ids.dtype}")
        if probs.ndim != 2 or ids.shape != probs.shape[:1]:
            raise ValueError(f"probs must have shape (N, K) and ids (N,), got {tuple(probs.shape)} and {tuple(ids.shape)}")
        if not len(ids):
            raise ValueError(f"probs and ids have no rows: shape {tuple(probs.shape)}")
        check_distributions(probs, "probs")
        ids = ids.to(torch.int64)
        order = ids.argsort(stable=True)
        ordered = ids[order]
        twice = (ordered[1:] == ordered[:-1]).nonzero()
        if len(twice):
            raise ValueError(f"id {int(ordered[twice[0, 0]])} is given more than once")
        object.__setattr__(self, "probs", probs if probs.dtype == torch.float16 else probs.float())
        object.__setattr__(self, "ids", ids)
        object.__setattr__(self, "_order", order)
        object.__setattr__(self, "_ordered", ordered)

    def __len__(self) -> int:
        return len(self.ids)

    def __repr__(self) -> str:
        return f"PseudoLabels({len(self)} samples, {self.probs.shape[1]} classes, {self.digest[:12]})"

    @property
    def digest(self) -> str:
        """SHA-256 of the mapping from numbers to labels, whatever its order, and of the teacher."""
        order: Tensor = object.__getattribute__(self, "_order")
        parts = (self.teacher_digest.encode(), self.ids[order].numpy().tobytes(), self.probs[order].contiguous().numpy().tobytes())
        return hashlib.sha256(b"".join(parts)).hexdigest()

    def lookup(self, ids: Tensor | Sequence[int]) -> Tensor:
        """Probabilities ``(len(ids), K)`` as float32, on the device of ``ids``.

        Raises:
            ValueError: an id that is not there (named), or ids that are no integers.
        """
        wanted = torch.as_tensor(ids)
        if wanted.is_floating_point() or wanted.is_complex() or wanted.dtype == torch.bool or wanted.ndim != 1:
            raise ValueError(f"ids must be integers of shape (n,), got {wanted.dtype} of shape {tuple(wanted.shape)}")
        device, wanted = wanted.device, wanted.cpu().to(torch.int64)
        order: Tensor = object.__getattribute__(self, "_order")
        ordered: Tensor = object.__getattribute__(self, "_ordered")
        place = torch.searchsorted(ordered, wanted).clamp_max(len(ordered) - 1)
        unknown = (ordered[place] != wanted).nonzero()
        if len(unknown):
            raise ValueError(f"there is no pseudo-label of the sample with id {int(wanted[unknown[0, 0]])}")
        found = self.probs[order[place]].float()
        if self.probs.dtype == torch.float16:
            found = found / found.sum(1, keepdim=True)
        return found.to(device)

    def summary(self) -> PseudoLabelSummary:
        """How much the teacher says."""
        probs = self.probs.double()
        mean = probs.mean(0)
        modal = probs.argmax(1).bincount(minlength=probs.shape[1])
        return PseudoLabelSummary(
            samples=len(probs),
            classes=probs.shape[1],
            entropy=float(-torch.xlogy(probs, probs).sum(1).mean()),
            used_classes=float((-torch.xlogy(mean, mean).sum()).exp()),
            modal_share=float(modal.max() / len(probs)),
            confidence=float(probs.max(1).values.mean()),
        )

    def _draw(self, ax: Any) -> None:
        ax.bar(range(self.probs.shape[1]), self.probs.float().mean(0).numpy())
        ax.set_xlabel("class of the teacher")
        ax.set_ylabel("mean probability")

    def save(self, path: str | Path) -> None:
        """Write an ``.npz``, whole or not at all."""
        arrays = {
            "probs": self.probs.numpy(),
            "ids": self.ids.numpy(),
            "teacher": np.frombuffer(self.teacher_digest.encode(), np.uint8),
            "digest": np.frombuffer(self.digest.encode(), np.uint8),
        }
        save_arrays(path, _VERSION, arrays)

    @classmethod
    def load(cls, path: str | Path) -> PseudoLabels:
        """Read what ``save`` wrote; nothing is unpickled.

        Raises:
            DamagedFileError: the file cannot be read whole, or its content is not what its digest says.
        """
        with load_arrays(path, _VERSION, "pseudo-labels") as data:
            teacher, digest = bytes(data["teacher"]).decode(), bytes(data["digest"]).decode()
            found = cls(torch.from_numpy(data["probs"]), torch.from_numpy(data["ids"]), teacher)
        if found.digest != digest:
            raise DamagedFileError(f"{path} is damaged: its digest is {found.digest[:12]}..., the file says {digest[:12]}...")
        return found


def pseudo_label(
    teacher: nn.Module,
    loader: Iterable[Any],
    *,
    ids: Sequence[int] | Tensor | None = None,
    temperature: float = 1.0,
    device: torch.device | str | None = None,
    amp_dtype: torch.dtype | None = None,
    official_eps: float = 0.0,
) -> PseudoLabels:
    """Label every sample of a loader with the teacher's probabilities, once.

    Args:
        teacher: gives logits ``(B, K)``; run in eval mode without gradient, its flags are restored.
        loader: batches whose first entry is the input and whose last is the numbers of the samples
            (``outlast.data.Indexed`` appends them). Give the deterministic test transform, no augmentation.
        ids: the numbers instead, in the order of the loader; then batches need not hold any.
        temperature: of the softmax; the paper has 1.
        device: where inputs go; None for where the teacher's parameters are.
        amp_dtype: run under autocast with this type; probabilities are float32 in any case.
        official_eps: the authors' code adds 1e-6 to every probability without renormalising; for comparisons with it only.

    Raises:
        ValueError: no batches, batches without numbers, numbers given twice, ``ids`` beside a loader that
            shuffles, logits that are not finite.

    Warns:
        OutlastWarning: the teacher has collapsed or says nothing (``PseudoLabelSummary.problems``).
    """
    _checks.real("temperature", temperature, low=0.0, low_open=True)
    _checks.real("official_eps", official_eps, low=0.0)
    if ids is not None and isinstance(getattr(loader, "sampler", None), RandomSampler):
        raise ValueError("ids= are in the order of the loader, and the loader shuffles; let the data set carry them (outlast.data.Indexed)")
    first = next(iter(teacher.parameters()), None)
    place = torch.device(device) if device is not None else (first.device if first is not None else torch.device("cpu"))
    parts: list[Tensor] = []
    numbers: list[Tensor] = []
    with eval_mode(teacher), torch.no_grad():
        for batch in loader:
            entries = batch if isinstance(batch, tuple | list) else (batch,)
            if ids is None:
                if len(entries) < 2:
                    raise ValueError("the loader gives inputs without numbers; wrap its data set in outlast.data.Indexed, or give ids=")
                numbers.append(torch.as_tensor(entries[-1]).cpu())
            inputs: Any = entries[0]
            with torch.autocast(place.type, amp_dtype, enabled=amp_dtype is not None):
                logits = call_with(teacher, inputs.to(place) if isinstance(inputs, Tensor) else inputs)
            if not isinstance(logits, Tensor) or logits.ndim != 2:
                raise ValueError(f"the teacher must give logits (B, K), it gives {getattr(logits, 'shape', type(logits).__name__)}")
            parts.append((logits.float() / temperature).softmax(1).cpu())
    if not parts:
        raise ValueError("the loader gave no batches: there is nothing to label")
    probs = torch.cat(parts)
    bad = (~torch.isfinite(probs).all(1)).nonzero()
    if len(bad):
        raise ValueError(f"the teacher's logits of sample {int(bad[0, 0])} (in the order of the loader) are not finite")
    known = torch.cat(numbers) if ids is None else torch.as_tensor(ids)
    if len(known) != len(probs):
        raise ValueError(f"ids are {len(known)} numbers, the loader gives {len(probs)} samples")
    found = PseudoLabels(probs + official_eps, known, state_digest(teacher))
    for problem in found.summary().problems:
        warnings.warn(f"pseudo-labels: {problem}", OutlastWarning, stacklevel=2)
    return found


def state_digest(module: nn.Module) -> str:
    """SHA-256 of types, shapes and values of a module's parameters and buffers in their order, whatever their names."""
    digest = hashlib.sha256()
    for value in module.state_dict().values():
        if isinstance(value, Tensor):
            digest.update(f"{value.dtype}/{tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
