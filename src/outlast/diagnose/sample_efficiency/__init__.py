"""Sample efficiency: learning curves, the laws they follow, how many labels are needed, and how that grows with the input.

Z. Li, Zhang, Arora, "Why Are Convolutional Nets More Sample-Efficient than Fully-Connected Nets?", ICLR 2021.
"""

from outlast.diagnose.sample_efficiency._curve import FailedCell, LearningCurve, learning_curve
from outlast.diagnose.sample_efficiency._dimension import Exponent, SampleCurve, SampleEfficiency, sample_efficiency
from outlast.diagnose.sample_efficiency._law import Interval, Law, LawFit, NeededSamples, fit_law
from outlast.diagnose.sample_efficiency._tasks import Task, channel_norm, local_texture, one_hot_sign, quadratic_bound, quadratic_halves

__all__ = [
    "Exponent",
    "FailedCell",
    "Interval",
    "Law",
    "LawFit",
    "LearningCurve",
    "NeededSamples",
    "SampleCurve",
    "SampleEfficiency",
    "Task",
    "channel_norm",
    "fit_law",
    "learning_curve",
    "local_texture",
    "one_hot_sign",
    "quadratic_bound",
    "quadratic_halves",
    "sample_efficiency",
]
