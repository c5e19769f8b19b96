"""What mixup does to a loss, by measurement: exact loss, regularisers, adversarial bound, generalisation bounds.

Zhang, Deng, Kawaguchi, Ghorbani, Zou, "How Does Mixup Help With Robustness and Generalization?", ICLR 2021 (arXiv 2010.04819).
"""

from outlast._core._beta import BetaMoments, beta_moments, sample_lambda
from outlast.diagnose.mixup_theory._adversarial import AdvBound, adversarial_bound, adversarial_loss_logistic, adversarial_loss_quadratic
from outlast.diagnose.mixup_theory._exact import exact_mixup_loss, gauss_jacobi
from outlast.diagnose.mixup_theory._generalisation import (
    glm_penalty,
    rademacher_bound_glm,
    rademacher_bound_two_layer,
    retentivity,
)
from outlast.diagnose.mixup_theory._terms import MixupTerms, mixup_penalty, mixup_terms

__all__ = [
    "AdvBound",
    "BetaMoments",
    "MixupTerms",
    "adversarial_bound",
    "adversarial_loss_logistic",
    "adversarial_loss_quadratic",
    "beta_moments",
    "exact_mixup_loss",
    "gauss_jacobi",
    "glm_penalty",
    "mixup_penalty",
    "mixup_terms",
    "rademacher_bound_glm",
    "rademacher_bound_two_layer",
    "retentivity",
    "sample_lambda",
]
