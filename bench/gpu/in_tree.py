"""Runs from a checkout that pip could not install: finds the Triton kernels beside the package."""

from importlib.util import find_spec
from pathlib import Path

import sparsekit

ROOT = Path(__file__).parents[2]


def find_kernels() -> None:
    """Makes ``sparsekit.triton_kernels`` importable where no install has mapped it."""
    if find_spec("sparsekit.triton_kernels") is None:
        sparsekit.__path__.append(str(ROOT))
