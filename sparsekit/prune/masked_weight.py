"""The masked weights of a model that an optimizer trains; they may be sharded or replaced, or get another mask."""

import torch
from torch import Tensor, nn

from .._optimizers import has_plain_data, is_sharded, local_part, local_part_of, sharding
from ..masks import check_masks, get_mask, get_mask_bits, masked_parameters
from ..nn import Compressed


class MaskedWeight:
    """A parameter and its mask, both looked up again at every step, because users and wrappers may replace them."""

    def __init__(self, module: nn.Module, key: str, layer: str) -> None:
        self.module, self.key = module, key
        self.name = f"layer {layer!r}" if key == "weight" else f"{key!r} of {layer!r}"
        self.parameter: nn.Parameter = module._parameters[key]  # type: ignore[assignment]
        self.hooked: nn.Parameter | None = None  # the parameter whose gradients are masked
        self.is_grad_masked = False  # since the last step
        self.bits: Tensor | None = None  # the mask that ``dropped`` was unpacked from
        self.dropped = torch.empty(0)

    @property
    def current(self) -> nn.Parameter | None:
        """The parameter of the module; while FSDP has gathered it for a pass, the sharded parameter instead."""
        found = self.module._parameters.get(self.key)
        return self.parameter if is_sharded(self.parameter) and not is_sharded(found) else found

    def update(self) -> bool:
        """Looks up the mask of the module again; returns whether it is another one than before."""
        bits = get_mask_bits(self.module, self.key)
        if bits is None:
            raise ValueError(f"{self.name} has lost its mask since keep_masks was called: call remove() before that")
        if bits is self.bits and self.dropped.device == local_part(self.parameter).device:
            return False
        mask = get_mask(self.module, self.key)
        assert mask is not None
        self.dropped, self.bits = local_part_of(~mask, self.parameter), bits
        return True

    def broken(self) -> Tensor:
        """Returns whether a dropped weight is not zero, as a tensor, so that the call does not wait for a GPU."""
        return local_part(self.parameter).ne(0).logical_and_(self.dropped).any()

    def drop(self, tensor: Tensor) -> None:
        """Zeroes the dropped entries of a tensor."""
        local_part(tensor).masked_fill_(self.dropped, 0)

    def drop_grad(self) -> None:
        """Zeroes the dropped entries of the gradient."""
        # Filled, because multiplying by 0 would turn infinities into NaN, in a step that a gradient scaler will skip.
        if self.parameter.grad is not None:
            self.drop(self.parameter.grad)

    def count(self) -> tuple[int, int]:
        """Counts the dropped weights that are not zero, and all dropped weights."""
        broken = local_part(self.parameter).ne(0).logical_and_(self.dropped)
        return int(broken.sum()), int(self.dropped.sum())


def masked_weights(model: nn.Module, held: set[Tensor]) -> list[MaskedWeight]:
    """Returns the masked weights of a model, of which the optimizer holds the parameters ``held``."""
    kind = sharding(model)
    masked = [(layer, module, key) for layer, module in model.named_modules() for key in masked_parameters(module)]
    for layer, module, _ in masked:
        if isinstance(module, Compressed):
            raise ValueError(f"layer {layer!r} is compressed: call decompress_ first, then make the optimizer")
        if kind == "FullyShardedDataParallel":
            raise ValueError("the model is flattened by FullyShardedDataParallel (FSDP1): use fully_shard (FSDP2)")
    check_masks(model)
    for module in model.modules():
        if kind == "fully_shard" and hasattr(module, "reshard"):
            module.reshard()  # type: ignore[operator]  # after a pass the outermost module still has its gathered weights
    weights = []
    for layer, module, key in masked:
        parameter = module.get_parameter(key)
        if parameter.is_meta:
            raise ValueError(f"layer {layer!r} is on the meta device: load its weights first")
        if has_plain_data(parameter):
            weights.append(MaskedWeight(module, key, layer))
        elif parameter in held:
            name = type(parameter.data).__name__
            raise ValueError(f"the {key} of layer {layer!r} is a {name}, in which a mask cannot be kept")
    return weights
