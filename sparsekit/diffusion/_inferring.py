"""The state in which a model of masked tokens is asked, not trained."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from .._batches import evaluating


@contextmanager
def inferring(model: Callable[..., Any]) -> Iterator[None]:
    """Computes no gradients, and puts a module into evaluation mode meanwhile."""
    if isinstance(model, nn.Module):
        with evaluating(model):
            yield
    else:
        with torch.no_grad():
            yield
