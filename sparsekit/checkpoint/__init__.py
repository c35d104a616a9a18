"""Checkpoints: one safetensors file with weights, packed weights and masks, and their structure in its metadata."""

from .checkpoint import load as load
from .checkpoint import save as save
