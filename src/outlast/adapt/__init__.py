"""After deployment: models that adapt to the inputs that they meet."""

from outlast._core._norm import recalibrate_batchnorm
from outlast.adapt._adapter import TestTimeAdapter
from outlast.adapt._entropy import Entropy, entropy
from outlast.adapt._guards import (
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
from outlast.adapt._report import AdaptReport
from outlast.adapt._tent import Norm, Tent

__all__ = [
    "AdaptReport",
    "Anchor",
    "CollapseAlarm",
    "Diversity",
    "DriftLimit",
    "Entropy",
    "EntropyFilter",
    "Guard",
    "Norm",
    "PeriodicReset",
    "Recovery",
    "RedundancyFilter",
    "RingBuffer",
    "StochasticRestore",
    "Tent",
    "TestTimeAdapter",
    "entropy",
    "norm_affine_except",
    "recalibrate_batchnorm",
]
