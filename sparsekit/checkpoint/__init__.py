"""Checkpoints: one safetensors file with weights, packed weights and masks, and their structure in its metadata."""

from .._packages import name_functions as _name_functions
from .save_load import load, save

__all__ = [
    "load",
    "save",
]

_name_functions(__name__, "sk.save(model, path) or sk.load(model, path)")
