"""Makes models fast: measures what every linear layer could be, swaps what wins, and undoes it exactly."""

from .._packages import name_functions as _name_functions
from .._timing import Timing as Timing
from .compress import compress_ as compress_
from .compress import decompress_ as decompress_
from .measure import Measure as Measure
from .report import CompressLayerReport as CompressLayerReport
from .report import CompressReport as CompressReport

_name_functions(__name__, "sk.compress_(model, batches)")
