"""Evaluation: how good a model is, and what it costs."""

from .classification import (
    ClassificationScore,
    PairedTest,
    classification_score,
    compare_classifiers,
    predict_logits,
)
from .cost import Latency, ProcessCost, disk_bytes, measure_latency, measure_process
from .flops import FlopCount, count_flops
from .images import ImageFeatures, ImageScore, fid, image_features, inception, kid
from .paired import PairedDifference, paired_difference

__all__ = [
    "ClassificationScore",
    "FlopCount",
    "ImageFeatures",
    "ImageScore",
    "Latency",
    "PairedDifference",
    "PairedTest",
    "ProcessCost",
    "classification_score",
    "compare_classifiers",
    "count_flops",
    "disk_bytes",
    "fid",
    "image_features",
    "inception",
    "kid",
    "measure_latency",
    "measure_process",
    "paired_difference",
    "predict_logits",
]
