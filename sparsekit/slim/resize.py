"""Changes the sizes of layers: takes outputs or inputs out, and puts zeros in their places again."""

from collections.abc import Callable, Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from .._layers import input_dim
from .._state import get_attribute, set_attribute
from .._undo import Undo
from ..masks import get_mask, get_mask_bits, get_mask_info, remove_mask, set_mask, set_mask_bits
from .plan import Branch

Side = Literal["inputs", "outputs"]
Change = Callable[[Tensor, int], Tensor]  # takes a tensor and the dimension whose size changes
SIZES = {("inputs", 1): "in_features", ("outputs", 1): "out_features", ("inputs", 0): "nx", ("outputs", 0): "nf"}


def channels(units: Sequence[int], count: int, width: int, segments: int = 1) -> Tensor:
    """Returns the indices of the channels of some of ``count`` units, segment by segment."""
    first = torch.tensor(units, dtype=torch.int64, device="cpu")[:, None] * width
    one = (first + torch.arange(width, device="cpu")).flatten()
    return torch.cat([one + segment * count * width for segment in range(segments)])


def sides(branch: Branch, model: nn.Module) -> list[tuple[nn.Module, Side, int, int]]:
    """Returns every layer of a branch with the side that holds its units, the width of a unit and the segments."""
    found: list[tuple[nn.Module, Side, int, int]] = [(model.get_submodule(branch.reader), "inputs", branch.width, 1)]
    for name, segments in branch.writers:
        layer = model.get_submodule(name)
        found.append((layer, "outputs", size(layer, "outputs") // (segments * branch.units), segments))
    return found


def size(layer: nn.Module, side: Side) -> int:
    """Returns the number of inputs or outputs of a layer."""
    return layer.get_parameter("weight").shape[weight_dim(layer, side)]


def weight_dim(layer: nn.Module, side: Side) -> int:
    """Returns the dimension of the weight that its inputs or outputs run along."""
    dim = input_dim(layer)
    assert dim is not None  # it was checked to be a layer
    return dim if side == "inputs" else 1 - dim


def taking(kept: Tensor) -> Change:
    """Returns the change that keeps these indices."""
    return lambda tensor, dim: tensor.index_select(dim, kept.to(tensor.device))


def padding(kept: Tensor, total: int) -> Change:
    """Returns the change that undoes ``taking``, with zeros for what was taken out."""

    def pad(tensor: Tensor, dim: int) -> Tensor:
        shape = [*tensor.shape]
        shape[dim] = total
        return tensor.new_zeros(shape).index_copy_(dim, kept.to(tensor.device), tensor)

    return pad


def resize(layer: nn.Module, side: Side, change: Change, undo: Undo) -> None:
    """Changes the inputs or the outputs of a layer, with its mask; ``undo`` records how to restore it."""
    dim = weight_dim(layer, side)
    _change_parameter(layer, "weight", change, dim, undo)
    if side == "outputs" and layer._parameters.get("bias") is not None:
        _change_parameter(layer, "bias", change, 0, undo)
    attribute = SIZES[side, input_dim(layer) or 0]
    undo.callback(set_attribute, layer, attribute, get_attribute(layer, attribute))
    set_attribute(layer, attribute, size(layer, side))


def replace_parameter(layer: nn.Module, name: str, value: Tensor, undo: Undo) -> None:
    """Gives a layer a new parameter; ``undo`` records how to bring the old one back."""
    old = layer._parameters[name]
    assert old is not None
    undo.callback(layer._parameters.__setitem__, name, old)
    layer._parameters[name] = nn.Parameter(value.contiguous(), requires_grad=old.requires_grad)
    torch.clear_autocast_cache()


def _change_parameter(layer: nn.Module, name: str, change: Change, dim: int, undo: Undo) -> None:
    mask, info = get_mask(layer, name), get_mask_info(layer, name)
    replace_parameter(layer, name, change(layer.get_parameter(name).detach(), dim), undo)
    if mask is not None and info is not None:
        bits = get_mask_bits(layer, name)
        assert bits is not None
        undo.callback(set_mask_bits, layer, bits, info, name)
        set_mask(layer, change(mask, dim), info, name)


def drop_full_masks(layers: Iterable[nn.Module], undo: Undo, *, only: bool = False) -> None:
    """Removes the masks that keep everything, as those of units do once the units are gone.

    Args:
        layers: where the masks are.
        undo: records how to restore them.
        only: whether other masks may stay.

    Raises:
        ValueError: there are others, and they may not.
    """
    for layer in layers:
        for name in ("weight", "bias"):
            mask, bits, info = get_mask(layer, name), get_mask_bits(layer, name), get_mask_info(layer, name)
            if mask is None or bits is None or info is None:
                continue
            if not mask.all():
                if only:
                    continue
                raise ValueError(
                    f"a layer of a slim branch has a {name} mask that drops other weights than those of the units "
                    f"({int((~mask).sum())} of {mask.numel()} are left): slim the model first, then prune it"
                )
            undo.callback(set_mask_bits, layer, bits, info, name)
            remove_mask(layer, name)
