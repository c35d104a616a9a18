"""Training with 2:4 weights: forward sparse, gradients to the dense weights behind."""

from .report import LayerReport as LayerReport
from .training import SparseTraining as SparseTraining
from .training import sparse_training_ as sparse_training_
