"""Pruning: methods, calibration, ``prune_``, and fine-tuning that keeps the masks."""

from .._packages import name_functions as _name_functions
from .admm import ADMM
from .batchnorm import reestimate_batchnorm_
from .calibration import Calibration
from .calibration.statistics import Gram, InputNorm, Statistic
from .mask_keeper import MaskKeeper, keep_masks
from .maskpro import MaskPro
from .maskpro_report import MaskProReport, MaskProStep
from .methods import RIA, Magnitude, Method, Wanda
from .prune_model import prune_
from .refinements import LeastSquares, Swaps
from .report import PruneLayerReport, PruneReport, Skipped
from .scores import Scores
from .sparsegpt import SparseGPT
from .taylor import diff_pruning_scores, taylor_scores

__all__ = [
    "ADMM",
    "RIA",
    "Calibration",
    "Gram",
    "InputNorm",
    "LeastSquares",
    "Magnitude",
    "MaskKeeper",
    "MaskPro",
    "MaskProReport",
    "MaskProStep",
    "Method",
    "PruneLayerReport",
    "PruneReport",
    "Scores",
    "Skipped",
    "SparseGPT",
    "Statistic",
    "Swaps",
    "Wanda",
    "diff_pruning_scores",
    "keep_masks",
    "prune_",
    "reestimate_batchnorm_",
    "taylor_scores",
]

_name_functions(__name__, "sk.prune_(model, method, batches)")
