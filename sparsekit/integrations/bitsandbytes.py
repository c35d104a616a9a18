"""Layers of bitsandbytes on a CPU: that they compute any shape, and are saved as they were quantized."""

from bitsandbytes.nn import Linear4bit  # type: ignore[import-not-found, unused-ignore]
from torch import nn

from .._layers import check_model
from .._state import set_attribute


def keep_unpacked_(model: nn.Module) -> tuple[str, ...]:
    """Keeps the 4-bit layers of bitsandbytes from rewriting their weights at their first pass on a CPU.

    On a CPU with AVX-512 BF16, bitsandbytes 0.50.2 turns the weight of a layer into another order with scales rounded
    to bfloat16. It refuses layers whose outputs are no multiple of 32, and without double quantization it then saves
    scales in the wrong order: a model that is saved after it has run is another one. Call this once after loading::

        model = AutoModelForSequenceClassification.from_pretrained(name, quantization_config=BitsAndBytesConfig(...))
        keep_unpacked_(model)

    ``sparsekit.quantize_`` and ``sparsekit.save(model, folder, format="bitsandbytes")`` write the same files without
    bitsandbytes.

    Args:
        model: any module; it may hold no such layer.

    Returns:
        The names of the layers.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: a layer was rewritten already; nothing is changed.
    """
    check_model(model)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, Linear4bit)}
    for name, layer in layers.items():
        if getattr(layer.weight.quant_state, "packing_format_for_cpu", False):
            raise ValueError(f"layer {name!r} has run already, and its scales are rounded: load the model again")
    for layer in layers.values():
        set_attribute(layer, "support_avx512bf16_for_cpu", False)
    return tuple(layers)
