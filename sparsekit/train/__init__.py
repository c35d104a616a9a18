"""Training with 2:4 weights: the forward pass is sparse, and gradients reach the dense weights."""

from .report import TrainLayerReport as TrainLayerReport
from .training import SparseTraining as SparseTraining
from .training import sparse_training_ as sparse_training_
