"""Equivariance: is a way of training blind to rotations, permutations, sign flips or shifts of its input?

Z. Li, Zhang, Arora, "Why Are Convolutional Nets More Sample-Efficient than Fully-Connected Nets?", ICLR 2021.
"""

from outlast.diagnose.equivariance._coupled import equivariance_test
from outlast.diagnose.equivariance._initialisation import SymmetryResult, initialisation_symmetry
from outlast.diagnose.equivariance._results import EquivarianceResult, GroupVerdict
from outlast.diagnose.equivariance._train import Trainer, train_with

__all__ = [
    "EquivarianceResult",
    "GroupVerdict",
    "SymmetryResult",
    "Trainer",
    "equivariance_test",
    "initialisation_symmetry",
    "train_with",
]
