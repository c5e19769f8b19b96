"""Robust optimisation: training that holds under noise, shift and attack."""

from outlast.robust._mixed_target import MixedTarget, MixupLoss, mixup_accuracy, mixup_loss
from outlast.robust._mixup import CutMix, MixUp, mix_hidden
from outlast.robust._sam import SAM, SAMStats
from outlast.robust._sam_gradient import sam_gradient
from outlast.robust._sam_trainer import SAMTrainerMixin

__all__ = [
    "SAM",
    "CutMix",
    "MixUp",
    "MixedTarget",
    "MixupLoss",
    "SAMStats",
    "SAMTrainerMixin",
    "mix_hidden",
    "mixup_accuracy",
    "mixup_loss",
    "sam_gradient",
]
