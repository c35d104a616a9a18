"""Makes models fast: measures what every linear layer could be, swaps what wins, and undoes it exactly."""

from .._packages import name_functions as _name_functions
from .._timing import Timing
from .compress import compress_, decompress_
from .measure import Measure
from .report import CompressLayerReport, CompressReport

__all__ = [
    "CompressLayerReport",
    "CompressReport",
    "Measure",
    "Timing",
    "compress_",
    "decompress_",
]

_name_functions(__name__, "sk.compress_(model, batches)")
