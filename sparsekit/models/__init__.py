"""Models that other projects have published, with their sizes, initial weights and stored weights."""

from .radd import RADD

__all__ = ["RADD"]
