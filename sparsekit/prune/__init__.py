"""Pruning: methods, calibration, ``prune_``, and fine-tuning that keeps the masks."""

from .._packages import name_functions as _name_functions
from .admm import ADMM as ADMM
from .batchnorm import reestimate_batchnorm_ as reestimate_batchnorm_
from .calibration import Calibration as Calibration
from .calibration.statistics import Gram as Gram
from .calibration.statistics import InputNorm as InputNorm
from .calibration.statistics import Statistic as Statistic
from .mask_keeper import MaskKeeper as MaskKeeper
from .mask_keeper import keep_masks as keep_masks
from .methods import RIA as RIA
from .methods import Magnitude as Magnitude
from .methods import Method as Method
from .methods import Wanda as Wanda
from .prune import prune_ as prune_
from .refinements import LeastSquares as LeastSquares
from .refinements import Swaps as Swaps
from .report import PruneLayerReport as PruneLayerReport
from .report import PruneReport as PruneReport
from .report import Skipped as Skipped
from .sparsegpt import SparseGPT as SparseGPT

_name_functions(__name__, "sk.prune_(model, method, batches)")
