"""Makes models fast: measures what every layer could become, swaps it for the fastest, and undoes that exactly.

How ``compress_`` works, in the order of its steps:

1. ``sites`` finds the linear layers and convolutions; a ``LayerSite`` is one. ``must_stay_reason`` says which must stay
   as they are, because a hook, a subclass or a shared weight means that another module would compute something else.
2. ``watch`` runs the batches, and counts the ``sizes`` of the inputs that each layer gets: tokens, or images.
3. ``candidates``, ``convolutions`` and ``gpu`` have a ``Candidate`` for each form that a layer can take: 2:4, tiered,
   prepacked. Its ``unsupported_reason`` says why a layer cannot take it, or that measuring it is not worth while.
4. ``tune`` times the candidates, once for all layers of one ``Kind``, and ``cache`` remembers the times.
5. ``choose`` makes the ``Choice`` for each layer, by what a ``Trial`` says of each candidate.
6. ``swap`` puts the new modules in place, and ``whole`` times the whole model: what does not pay there is given back.
   ``forms`` tries one form for all layers there.
7. ``report`` says for every layer what it became and why.

**Why did a layer stay dense?** ``print(report)`` says so in its last column, ``report.layers[i].reason`` at length, and
``report.layers[i].timings`` has the numbers. A reason alone comes from step 1 or 2: the layer was not measured. A
reason that begins with the name of a candidate, ``"2:4: ..."``, says why that is unsupported (step 3), or what it was
measured at (step 5), as in ``"0.50x, 0% won at 128 tokens"``. ``"given back: ..."`` and ``"a pass of the whole model
..."`` are about step 6.
"""

from .._packages import name_functions as _name_functions
from .._timing import Timing
from .compress_model import compress_, decompress_
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
