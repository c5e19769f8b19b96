"""Robust optimisation: training that holds under noise, shift and attack."""

from outlast.robust._sam import SAM, SAMStats
from outlast.robust._sam_gradient import sam_gradient
from outlast.robust._sam_trainer import SAMTrainerMixin

__all__ = ["SAM", "SAMStats", "SAMTrainerMixin", "sam_gradient"]
