"""Continual learning: task after task in one network, without keeping old data."""

from outlast.continual._gpm import GradientProjectionMemory
from outlast.continual._metrics import ContinualMetrics, continual_metrics
from outlast.continual._report import ConsolidationReport, LayerReport

__all__ = ["ConsolidationReport", "ContinualMetrics", "GradientProjectionMemory", "LayerReport", "continual_metrics"]
