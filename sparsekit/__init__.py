"""Kernels for sparse neural networks: fast to make sparse, never slower to run."""

from . import nn as nn
from . import ops as ops
from .checkpoint import load as load
from .checkpoint import save as save
from .compress import CompressReport as CompressReport
from .compress import compress_ as compress_
from .compress import decompress_ as decompress_
from .ops import block_scores as block_scores
from .ops import block_topk_mask as block_topk_mask
from .ops import linear24 as linear24
from .ops import nm_mask as nm_mask
from .ops import nm_mask_bits as nm_mask_bits
from .ops import nm_prune as nm_prune
from .ops import nm_prune_ as nm_prune_
from .ops import pack24 as pack24
from .ops import prune_pack24 as prune_pack24
from .ops import tier_prune as tier_prune
from .ops import transposable_mask as transposable_mask
from .ops import unpack24 as unpack24
from .prune import Magnitude as Magnitude
from .prune import PruneReport as PruneReport
from .prune import Wanda as Wanda
from .prune import keep_masks as keep_masks
from .prune import prune_ as prune_
from .train import SparseTraining as SparseTraining
from .train import sparse_training_ as sparse_training_
