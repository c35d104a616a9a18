"""Calibration: runs the model on batches and collects, for every layer, what a method needs to know of its inputs.

One stage is calibrated at a time, and pruned before the next one is calibrated:

1. ``stages`` splits the model into stages, and ``order`` finds, in one run of every batch, an order that suits all.
2. ``replay`` runs every batch as far as the next stage. Finished stages are not computed again where ``lineage`` can
   tell which of their outputs are still needed: ``partial_pass`` gives what ``output_store`` has kept of them.
3. ``observe`` gives the inputs of the stage's layers to their ``LayerInputs`` (``inputs``), which leave ``padding``
   out, add up the method's statistic (``statistics``), and draw a sample to measure the layer's error on. Matrices of
   experts, which share a parameter, are told apart by ``experts`` and ``expert_products``.
4. ``ranks`` adds up what several processes have collected.
5. ``prune_`` prunes the layers of the stage, and asks ``calibrate`` for the next.
"""

from .calibrate import Calibration as Calibration
from .calibrate import calibrate as calibrate
