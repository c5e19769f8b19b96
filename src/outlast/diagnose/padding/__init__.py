"""Padding: which layers treat the sides of an image unequally, what that does, and how to rewrite the model.

Alsallakh, Kokhlikyan, Miglani, Yuan, Reblitz-Richardson, "Mind the Pad - CNNs Can Develop Blind Spots", ICLR 2021.
"""

from outlast.diagnose.padding._audit import LayerRow, PaddingReport, SizeSuggestion, audit, suggest_sizes
from outlast.diagnose.padding._bias import FeatureBias, KernelAsymmetry, KernelRow, MapBias, feature_bias, kernel_asymmetry
from outlast.diagnose.padding._foveation import FoveationMap, foveation
from outlast.diagnose.padding._pad import Conv1d, Conv2d, Conv3d, PartialConv1d, PartialConv2d, PartialConv3d, convert, pad
from outlast.diagnose.padding._probe import BlindSpotMap, class_logit, detection, heat_map, probe

__all__ = [
    "BlindSpotMap",
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "FeatureBias",
    "FoveationMap",
    "KernelAsymmetry",
    "KernelRow",
    "LayerRow",
    "MapBias",
    "PaddingReport",
    "PartialConv1d",
    "PartialConv2d",
    "PartialConv3d",
    "SizeSuggestion",
    "audit",
    "class_logit",
    "convert",
    "detection",
    "feature_bias",
    "foveation",
    "heat_map",
    "kernel_asymmetry",
    "pad",
    "probe",
    "suggest_sizes",
]
