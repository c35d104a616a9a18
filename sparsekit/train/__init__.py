"""Training with 2:4 weights: the forward pass is sparse, and gradients reach the dense weights."""

from .._packages import name_functions as _name_functions
from .report import TrainLayerReport
from .training import SparseTraining, sparse_training_

__all__ = [
    "SparseTraining",
    "TrainLayerReport",
    "sparse_training_",
]

_name_functions(__name__, "sk.sparse_training_(model)")
