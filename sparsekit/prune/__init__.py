"""Makes models sparse: methods, calibration, ``prune_``, and fine-tuning that keeps the masks."""

from .admm import ADMM as ADMM
from .batchnorm import reestimate_batchnorm_ as reestimate_batchnorm_
from .finetune import MaskKeeper as MaskKeeper
from .finetune import keep_masks as keep_masks
from .methods import RIA as RIA
from .methods import Magnitude as Magnitude
from .methods import Method as Method
from .methods import Wanda as Wanda
from .prune import prune_ as prune_
from .refine import LeastSquares as LeastSquares
from .refine import Swaps as Swaps
from .report import LayerReport as LayerReport
from .report import PruneReport as PruneReport
from .report import Skipped as Skipped
from .sparsegpt import SparseGPT as SparseGPT
from .statistics import Gram as Gram
from .statistics import InputNorm as InputNorm
from .statistics import Statistic as Statistic
