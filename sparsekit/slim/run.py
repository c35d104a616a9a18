"""Runs a model on a batch in its own precision."""

from typing import Any

import torch
from torch import nn

from .._batches import Forward, run_batch


def run_plainly(model: nn.Module, batch: Any, forward: Forward | None) -> Any:
    """Calls a model on one batch without the caller's autocast, which would round what is compared or folded."""
    where = next((each.device.type for each in model.parameters() if not each.is_meta), "cpu")
    with torch.autocast(where, enabled=False):
        return run_batch(model, batch, forward)
