"""Training with 2:4 weights: the forward pass is sparse, and gradients reach the dense weights."""

from .._packages import name_functions as _name_functions
from .report import TrainLayerReport as TrainLayerReport
from .training import SparseTraining as SparseTraining
from .training import sparse_training_ as sparse_training_

_name_functions(__name__, "sk.sparse_training_(model)")
