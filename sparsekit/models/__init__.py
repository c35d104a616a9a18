"""Models that other projects have published, with their sizes, initial weights and stored weights."""

from .published import read_published
from .radd import RADD

__all__ = ["RADD", "read_published"]
