"""The bytes that a model holds, including tensors that are no parameters or buffers."""

from collections.abc import Iterator

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..nn import Compressed, DenseRoute, PrepackedLinear, RoutedLinear24


def resident_bytes(model: nn.Module) -> int:
    """Returns the bytes of all parameters, buffers and other tensors of compressed layers; shared ones count once."""
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    for module in model.modules():
        if isinstance(module, RoutedLinear24) and module.hardware is not None:
            del tensors[id(module.values)]  # a view of the head of ``hardware``
        tensors |= {id(tensor): tensor for tensor in _unregistered(module)}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values() if not is_lazy(tensor))


def weight_bytes(layer: nn.Module) -> int:
    """Returns the bytes of a linear layer's weight in its present form, without its bias and its stored mask."""
    if not isinstance(layer, Compressed):
        weight = layer._parameters.get("weight")
        return 0 if weight is None or is_lazy(weight) else weight.numel() * weight.element_size()
    other = {"bias", "weight_mask"}
    hidden = {"values"} if isinstance(layer, RoutedLinear24) and layer.hardware is not None else set()
    own = [*layer._parameters.items(), *layer._buffers.items()]
    tensors = [tensor for name, tensor in own if name not in other | hidden and tensor is not None]
    return sum(tensor.numel() * tensor.element_size() for tensor in (*tensors, *_unregistered(layer)))


def _unregistered(module: nn.Module) -> Iterator[Tensor]:
    held: list[Tensor | None] = []
    if isinstance(module, PrepackedLinear):
        held = [module.packed]
    elif isinstance(module, DenseRoute):
        held = [module.copy]
    elif isinstance(module, RoutedLinear24):
        held = [module.hardware, module.dense]
    yield from (tensor for tensor in held if tensor is not None)
