"""After deployment: models that adapt to the inputs that they meet."""

from typing import TYPE_CHECKING, Any

from outlast._core._norm import recalibrate_batchnorm
from outlast.adapt._adapter import TestTimeAdapter
from outlast.adapt._auxiliary import AuxTask, InverseDynamics, RandomCrop, RotationPrediction, joint_step
from outlast.adapt._entropy import Entropy, entropy
from outlast.adapt._guards import (
    ActionWatch,
    Anchor,
    CollapseAlarm,
    Diversity,
    DriftLimit,
    EntropyFilter,
    Guard,
    PeriodicReset,
    Recovery,
    RedundancyFilter,
    RingBuffer,
    StochasticRestore,
)
from outlast.adapt._parameters import norm_affine_except
from outlast.adapt._policy import PolicyAdapter
from outlast.adapt._report import AdaptReport, PolicyAdaptReport
from outlast.adapt._tent import Norm, Tent

if TYPE_CHECKING:
    from outlast.adapt._wrappers import AdaptedEnv, from_sb3

__all__ = [
    "ActionWatch",
    "AdaptReport",
    "AdaptedEnv",
    "Anchor",
    "AuxTask",
    "CollapseAlarm",
    "Diversity",
    "DriftLimit",
    "Entropy",
    "EntropyFilter",
    "Guard",
    "InverseDynamics",
    "Norm",
    "PeriodicReset",
    "PolicyAdaptReport",
    "PolicyAdapter",
    "RandomCrop",
    "Recovery",
    "RedundancyFilter",
    "RingBuffer",
    "RotationPrediction",
    "StochasticRestore",
    "Tent",
    "TestTimeAdapter",
    "entropy",
    "from_sb3",
    "joint_step",
    "norm_affine_except",
    "recalibrate_batchnorm",
]


def __getattr__(name: str) -> Any:
    if name not in ("AdaptedEnv", "from_sb3"):  # what is built on gymnasium's classes
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from outlast._core._extras import require

    require("gymnasium", extra="rl", purpose=f"outlast.adapt.{name}")
    from outlast.adapt import _wrappers

    return getattr(_wrappers, name)
