"""The bytes that a model holds, including tensors that are no parameters or buffers."""

from collections.abc import Iterable

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..nn import Compressed


def resident_bytes(model: nn.Module) -> int:
    """Returns the bytes of all parameters, buffers and other tensors of compressed layers; shared ones count once."""
    tensors: dict[int, Tensor] = {}
    for module in model.modules():
        if isinstance(module, Compressed):
            held = [*module.resident_tensors(), module.bias, module._buffers.get("weight_mask")]
        else:
            held = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        tensors |= {id(tensor): tensor for tensor in held if tensor is not None}
    return _bytes(tensors.values())


def weight_bytes(layer: nn.Module) -> int:
    """Returns the bytes of a linear layer's weight in its present form, without its bias and its stored mask."""
    if isinstance(layer, Compressed):
        return _bytes(layer.resident_tensors())
    weight = layer._parameters.get("weight")
    return 0 if weight is None else _bytes([weight])


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if not is_lazy(tensor))
