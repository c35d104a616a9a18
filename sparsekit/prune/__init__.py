"""Makes models sparse: methods, calibration, ``prune_``, and fine-tuning that keeps the masks."""

from .finetune import MaskKeeper as MaskKeeper
from .finetune import keep_masks as keep_masks
from .methods import Magnitude as Magnitude
from .methods import Method as Method
from .methods import Wanda as Wanda
from .prune import prune_ as prune_
from .report import LayerReport as LayerReport
from .report import PruneReport as PruneReport
from .report import Skipped as Skipped
from .statistics import InputNorm as InputNorm
from .statistics import Statistic as Statistic
