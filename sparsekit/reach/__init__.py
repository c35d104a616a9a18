"""Prunes to a measured speed: each layer takes the form by which the model gets as fast as asked at the least error.

How ``reach_`` works, in the order of its steps:

1. ``variants`` calibrates the dense model once, and prunes a copy of every layer's weight by each pattern.
2. ``ways`` has ``compress_``'s own measurement time every form of every layer: each ``Way`` saves some time, and
   changes the outputs of the layer by some error.
3. ``assign`` picks one way for each layer: the least error that saves enough time.
4. ``plans`` measures the whole model with them, and plans again by what it measured.
5. ``reach_model`` puts this together, changes the model, and undoes it if anything fails.
"""

from .._packages import name_functions as _name_functions
from .reach_model import reach_
from .report import ReachLayer, ReachReport
from .variants import Form

__all__ = ["Form", "ReachLayer", "ReachReport", "reach_"]

_name_functions(__name__, "sk.reach_(model, batches, sample)")
