"""Calibration: runs the model on batches and collects the statistic of every layer's inputs that a method needs.

One stage is calibrated at a time, and pruned before the next one is calibrated:

1. ``stages`` splits the model into stages, and ``order`` finds, in one run of every batch, an order that suits all.
2. ``replay`` runs every batch as far as the next stage. Finished stages are not computed again: ``partial_pass``
   returns their outputs from ``output_store``, which keeps those that ``lineage`` finds to be needed still.
3. ``observe`` passes the inputs of the stage's layers to their ``LayerInputs`` (``inputs``), which leave out
   ``padding``, add up the method's statistic (``statistics``), and draw a sample to measure the layer's error on.
   ``experts`` and ``expert_products`` do so for every matrix of experts, which share a parameter.
4. ``ranks`` adds up what several processes have collected.
5. ``prune_`` prunes the layers of the stage, and asks ``calibrate`` for the next.
"""

from .calibrate import Calibration, calibrate

__all__ = [
    "Calibration",
    "calibrate",
]
