"""What the studies of few labels share: splits of classes, augmentation, a classifier that standardises by its supports."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from outlast._core._distributed import spread_buffers
from outlast.data import load
from outlast.fewshot import LogisticClassifier, embed
from outlast.studies._context import Context
from outlast.studies._models import conv4

BASE, VALIDATION = 64, 16


def cifar100_classes() -> tuple[list[int], list[int], list[int]]:
    """64 base, 16 validation and 20 novel classes: a fixed permutation of the 100, neither CIFAR-FS nor FC100."""
    order = np.random.default_rng(0).permutation(100).tolist()
    return order[:BASE], order[BASE : BASE + VALIDATION], order[BASE + VALIDATION :]


def cifar100(classes: list[int], per_class: int, *, splits: tuple[str, ...] = ("train",)) -> tuple[Tensor, Tensor]:
    """The first ``per_class`` images in [0, 1] of each class, in the order of ``classes``, which become 0, 1, 2, ..."""
    found = [load("cifar100", split) for split in splits]  # pyright: ignore[reportArgumentType]
    images, labels = torch.cat([data.images for data in found]), torch.cat([data.labels for data in found])
    index = [(labels == name).nonzero()[:, 0][:per_class] for name in classes]
    counts = torch.tensor([len(part) for part in index])
    return images[torch.cat(index)].float() / 255.0, torch.arange(len(classes)).repeat_interleave(counts)


def affine(images: Tensor, scales: tuple[float, float], degrees: float, generator: torch.Generator | None = None) -> Tensor:
    """Each image turned, and cut out of a window of ``scales`` times its side that lies anywhere inside where it fits."""
    draw = torch.rand(4, len(images), generator=generator).to(images.device)
    scale = scales[0] + (scales[1] - scales[0]) * draw[0]
    angle = (2.0 * draw[1] - 1.0) * degrees * torch.pi / 180.0
    room = (1.0 - scale).abs()
    shift = (2.0 * draw[2:] - 1.0) * room
    cos, sin = scale * angle.cos(), scale * angle.sin()
    theta = torch.stack([torch.stack([cos, -sin, shift[0]], 1), torch.stack([sin, cos, shift[1]], 1)], 1)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


def jitter(images: Tensor) -> Tensor:
    """Brightness and contrast of each image by factors of 0.6 to 1.4."""
    draw = 0.6 + 0.8 * torch.rand(2, len(images), 1, 1, 1).to(images.device)
    means = images.mean((1, 2, 3), keepdim=True)
    return draw[0] * (means + draw[1] * (images - means))


def flip(images: Tensor) -> Tensor:
    """Half of the images mirrored."""
    chosen = (torch.rand(len(images)) < 0.5).to(images.device)
    return torch.where(chosen[:, None, None, None], images.flip(3), images)


def train_classifier(
    context: Context, images: Tensor, labels: Tensor, *, width: int, epochs: int, batch_size: int, max_lr: float, mirror: bool
) -> nn.Sequential:
    """Backbone, head: SGD with one-cycle rates and a mild random affine map."""

    def augment(batch: Tensor, generator: torch.Generator) -> Tensor:
        moved = affine(batch, (0.85, 1.1), 10.0, generator)
        chosen = torch.rand(len(batch), generator=generator).to(batch.device) < (0.5 if mirror else 0.0)
        return torch.where(chosen[:, None, None, None], moved.flip(3), moved)

    classes = int(labels.max()) + 1
    model = context.train(
        context.initialise(lambda: nn.Sequential(conv4(images.shape[1], width), nn.Linear(4 * width, classes))),
        lambda module: torch.optim.SGD(module.parameters(), lr=max_lr, momentum=0.9, weight_decay=5e-4),
        images,
        labels,
        loss_fn=F.cross_entropy,
        epochs=epochs,
        batch_size=batch_size,
        augment=augment,
        schedule=lambda optimizer, steps: torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr, total_steps=steps + 1),
        stream="teacher ",
    )
    plain = context.plain(model).eval()
    spread_buffers(plain)
    plain.cpu()
    assert isinstance(plain, nn.Sequential)
    return plain


def features_of(backbone: nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Features of all images, once."""
    return embed(backbone, DataLoader(TensorDataset(images, labels), 1000))


class StandardisedLogistic:
    """Logistic regression after subtracting the supports' mean and dividing by their one standard deviation, by episode."""

    takes_episodes = True

    def fit(self, X: Tensor, y: Tensor) -> Any:
        """Learn from supports ``(E, n, d)``."""
        self._mean = X.mean(1, keepdim=True)
        self._scale = (X - self._mean).std((1, 2), keepdim=True).clamp_min(1e-12)
        self._classifier = LogisticClassifier().fit((X - self._mean) / self._scale, y)
        return self

    def predict(self, X: Tensor) -> Tensor:
        """Classes of queries ``(E, m, d)``."""
        return self._classifier.predict((X - self._mean) / self._scale)
