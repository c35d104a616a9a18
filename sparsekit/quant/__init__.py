"""Quantizes the layers of a model to 4 or 8 bits without calibration and without measuring: the smallest files."""

from .quantize import QuantizedLayer, QuantizeReport, fits_bitsandbytes, quantize_

__all__ = ["QuantizeReport", "QuantizedLayer", "fits_bitsandbytes", "quantize_"]
