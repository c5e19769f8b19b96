"""Few labels: representations adapted to unlabelled data, and classifiers from one to a few labelled samples of each class."""

from outlast.fewshot._adaptation import AdaptationResult, adapt_representation
from outlast.fewshot._base_statistics import BaseStatistics
from outlast.fewshot._baselines import LogisticClassifier, NearestMean, fewshot_baselines
from outlast.fewshot._calibrate import Calibrated, calibrate
from outlast.fewshot._calibration import DistributionCalibration
from outlast.fewshot._episodes import EpisodeSampler, FewShotResult, embed, evaluate_episodes
from outlast.fewshot._linear import SGDLinearClassifier
from outlast.fewshot._logistic import LogisticFit, batched_logistic_regression
from outlast.fewshot._pseudo_labels import PseudoLabels, PseudoLabelSummary, pseudo_label
from outlast.fewshot._startup_losses import (
    NTXentLoss,
    SoftDistillationLoss,
    StartupLoss,
    StartupLosses,
    nt_xent,
    soft_distillation,
)
from outlast.fewshot._student import ProjectionHead, StartupStudent, TwoViews
from outlast.fewshot._transform import tukey_transform
from outlast.fewshot._tune import CalibrationReport, TuningResult, calibration_report, tune_calibration

__all__ = [
    "AdaptationResult",
    "BaseStatistics",
    "Calibrated",
    "CalibrationReport",
    "DistributionCalibration",
    "EpisodeSampler",
    "FewShotResult",
    "LogisticClassifier",
    "LogisticFit",
    "NTXentLoss",
    "NearestMean",
    "ProjectionHead",
    "PseudoLabelSummary",
    "PseudoLabels",
    "SGDLinearClassifier",
    "SoftDistillationLoss",
    "StartupLoss",
    "StartupLosses",
    "StartupStudent",
    "TuningResult",
    "TwoViews",
    "adapt_representation",
    "batched_logistic_regression",
    "calibrate",
    "calibration_report",
    "embed",
    "evaluate_episodes",
    "fewshot_baselines",
    "nt_xent",
    "pseudo_label",
    "soft_distillation",
    "tukey_transform",
    "tune_calibration",
]
