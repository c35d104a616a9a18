"""Checkpoints: one safetensors file with weights, packed weights and masks, and their structure in its metadata."""

from .._packages import name_functions as _name_functions
from .._pretrained import WRITERS as _WRITERS
from .pretrained import save_folder as _save_folder
from .save_load import load, save

__all__ = [
    "load",
    "save",
]

_WRITERS[:] = [_save_folder]
_name_functions(__name__, "sk.save(model, path) or sk.load(model, path)")
