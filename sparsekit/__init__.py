"""Kernels for sparse neural networks: fast to make sparse, never slower to run."""

from . import _installed as _installed
from . import nn as nn
from . import ops as ops
from . import tiers as tiers
from ._config import show_config as show_config
from ._version import VERSION as _VERSION
from .checkpoint import load as load
from .checkpoint import save as save
from .compress import CompressReport as CompressReport
from .compress import Measure as Measure
from .compress import compress_ as compress_
from .compress import decompress_ as decompress_
from .ops import Packed24 as Packed24
from .ops import TieredWeight as TieredWeight
from .ops import block_scores as block_scores
from .ops import block_topk_mask as block_topk_mask
from .ops import linear24 as linear24
from .ops import linear_tiered as linear_tiered
from .ops import nm_mask as nm_mask
from .ops import nm_mask_bits as nm_mask_bits
from .ops import nm_prune as nm_prune
from .ops import nm_prune_ as nm_prune_
from .ops import pack24 as pack24
from .ops import pack_tiered as pack_tiered
from .ops import prune_pack24 as prune_pack24
from .ops import tier_prune as tier_prune
from .ops import tier_scores as tier_scores
from .ops import transposable_mask24 as transposable_mask24
from .prune import ADMM as ADMM
from .prune import RIA as RIA
from .prune import Calibration as Calibration
from .prune import LeastSquares as LeastSquares
from .prune import Magnitude as Magnitude
from .prune import PruneReport as PruneReport
from .prune import SparseGPT as SparseGPT
from .prune import Swaps as Swaps
from .prune import Wanda as Wanda
from .prune import keep_masks as keep_masks
from .prune import prune_ as prune_
from .prune import reestimate_batchnorm_ as reestimate_batchnorm_
from .semi_structured import from_sparse_semi_structured as from_sparse_semi_structured
from .semi_structured import to_sparse_semi_structured as to_sparse_semi_structured
from .train import SparseTraining as SparseTraining
from .train import sparse_training_ as sparse_training_

__version__ = _VERSION
