"""Robust optimisation: training that holds under noise, shift and attack."""

from outlast.robust._group_inference import ClassSplit, GroupPartition, collect_features, infer_groups
from outlast.robust._group_invariance import GroupInvariance, InvarianceLoss, balanced_sampler
from outlast.robust._invariance import (
    GroupBalancedCrossEntropy,
    InvariancePenalty,
    group_balanced_cross_entropy,
    invariance_penalty,
)
from outlast.robust._mixed_target import MixedTarget, MixupLoss, mixup_accuracy, mixup_loss
from outlast.robust._mixup import CutMix, MixUp, mix_hidden
from outlast.robust._sam import SAM, SAMStats
from outlast.robust._sam_gradient import sam_gradient
from outlast.robust._sam_trainer import SAMTrainerMixin

__all__ = [
    "SAM",
    "ClassSplit",
    "CutMix",
    "GroupBalancedCrossEntropy",
    "GroupInvariance",
    "GroupPartition",
    "InvarianceLoss",
    "InvariancePenalty",
    "MixUp",
    "MixedTarget",
    "MixupLoss",
    "SAMStats",
    "SAMTrainerMixin",
    "balanced_sampler",
    "collect_features",
    "group_balanced_cross_entropy",
    "infer_groups",
    "invariance_penalty",
    "mix_hidden",
    "mixup_accuracy",
    "mixup_loss",
    "sam_gradient",
]
