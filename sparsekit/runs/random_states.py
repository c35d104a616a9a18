"""The random states of a process: torch on the CPU and on GPUs, Python's ``random``, NumPy's global one."""

import random
import sys
from collections.abc import Mapping
from typing import Any

import torch


def get_random_states() -> dict[str, Any]:
    """Returns the random states of this process as tensors and plain values."""
    states: dict[str, Any] = {"torch": torch.get_rng_state(), "python": random.getstate()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state_all()
    if (numpy := sys.modules.get("numpy")) is not None:
        name, keys, *rest = numpy.random.get_state()
        states["numpy"] = (name, keys.tolist(), *rest)
    return states


def set_random_states(states: Mapping[str, Any]) -> None:
    """Sets the random states that ``get_random_states`` returned, of the GPUs as far as there are as many.

    Raises:
        ValueError: they are something else; then some may have been set.
    """
    try:
        torch.set_rng_state(states["torch"])
        random.setstate(states["python"])
        if "numpy" in states:
            import numpy

            numpy.random.set_state(states["numpy"])
        if torch.cuda.is_available():
            for device, state in enumerate(states.get("cuda", [])[: torch.cuda.device_count()]):
                torch.cuda.set_rng_state(state, device)
    except (KeyError, TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise ValueError(f"the random states are not those of a process: {error}") from error
