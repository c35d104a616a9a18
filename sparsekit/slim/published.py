"""The published row-masking, for comparison: it removes nothing, and makes nothing faster."""

import torch
from torch import Tensor, nn

from .._layers import Where, check_model, check_where, input_dim, selects, unsupported_reason
from .._undo import Undo, change
from .check import check_whole
from .masking import write_mask


def mask_rows_(model: nn.Module, sparsity: float, *, where: Where | None = None) -> dict[str, int]:
    """Writes zeros into the weight rows with the smallest L2 norms, and stores masks, which ``keep_masks`` keeps.

    One threshold holds for all rows of all selected layers, and biases stay. That is how the published pipeline prunes,
    and is here to be compared with. No row can be removed by itself, so the model computes as much as before. And norms
    of rows grow with their length, so that rows of short layers go first.

    Args:
        model: any model.
        sparsity: the share of all rows that become zero, from 0 to 1.
        where: ``where(name, module)`` selects layers; None selects all linear layers. The published pipeline leaves out
            the classifier.

    Returns:
        The number of zero rows of each layer by its name.

    Raises:
        TypeError: an argument has a wrong type.
        ValueError: ``sparsity`` is out of range, the model is sharded or wrapped, no layer is selected, or a layer
            cannot be masked. The model is as it was.
        RuntimeError: the model is being changed already.
    """
    check_model(model)
    check_where(where)
    check_whole(model)
    if not 0 <= sparsity <= 1:
        raise ValueError(f"sparsity must be from 0 to 1, got {sparsity}")
    layers = {
        name: module
        for name, module in model.named_modules()
        if input_dim(module) is not None and not isinstance(module, nn.Conv2d) and selects(where, name, module)
    }
    if not layers:
        raise ValueError("there is no linear layer whose rows could be masked")
    for name, layer in layers.items():
        if reason := unsupported_reason(layer):
            raise ValueError(f"the rows of layer {name!r} cannot be masked: {reason}; leave it out by where=...")

    def work(undo: Undo) -> dict[str, int]:
        with torch.inference_mode(False), torch.no_grad():
            norms = {name: _rows(layer).float().norm(dim=1).cpu() for name, layer in layers.items()}
            every = torch.cat([*norms.values()])
            kept = torch.ones(len(every), dtype=torch.bool, device="cpu")
            kept[every.argsort(stable=True)[: int(sparsity * len(every) + 1e-6)]] = False
            counts = {}
            for (name, layer), own in zip(layers.items(), kept.split([*map(len, norms.values())]), strict=True):
                rows = own.to(layer.get_parameter("weight").device)[:, None].expand(_rows(layer).shape)
                write_mask(layer, "weight", (rows if input_dim(layer) == 1 else rows.t()).contiguous(), undo)
                counts[name] = int((~own).sum())
            return counts

    return change(model, "masked", work)


def _rows(layer: nn.Module) -> Tensor:
    """Returns the weight as ``[outputs, inputs]``."""
    weight = layer.get_parameter("weight").detach()
    return weight if input_dim(layer) == 1 else weight.t()
