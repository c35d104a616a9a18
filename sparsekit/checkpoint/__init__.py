"""Checkpoints: one safetensors file with weights, packed weights and masks, and in its metadata their structure."""

from .checkpoint import load as load
from .checkpoint import save as save
