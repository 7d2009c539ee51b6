"""Distances and scores between sets of features. Importing this registers the metrics."""

from imm_scale.evaluation.metrics.base import Measure, Metric
from imm_scale.evaluation.metrics.built_in import FrechetDistance

__all__ = ["FrechetDistance", "Measure", "Metric"]
