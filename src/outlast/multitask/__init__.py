"""Many tasks, one model: combining gradients, and measuring which tasks belong together."""

from outlast.multitask._coefficients import gradvac_coefficients
from outlast.multitask._gradvac import GradVac, pcgrad
from outlast.multitask._report import GradVacReport
from outlast.multitask._similarity import SimilarityResult, gradient_similarity

__all__ = ["GradVac", "GradVacReport", "SimilarityResult", "gradient_similarity", "gradvac_coefficients", "pcgrad"]
