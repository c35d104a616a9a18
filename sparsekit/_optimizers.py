"""Helpers for training: the torch optimizers behind a wrapper, and the local parts of sharded parameters."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


def stepping_optimizers(optimizer: Any) -> tuple[Optimizer, ...]:
    """Returns the torch optimizers that call step hooks: ``optimizer`` itself, and those that it wraps.

    A wrapper is any object that has an optimizer, or a list of optimizers, as an attribute: those of accelerate,
    Lightning and apex, and optimizers that change the weights of another one.

    Raises:
        TypeError: there is none.
    """
    found: list[Optimizer] = []
    seen: set[int] = set()
    todo = [optimizer]
    while todo:
        one = todo.pop(0)
        if id(one) in seen:
            continue
        seen.add(id(one))
        # A wrapper may subclass Optimizer and still have neither hooks nor a step that would call them.
        if (
            isinstance(one, Optimizer)
            and "_optimizer_step_post_hooks" in vars(one)
            and hasattr(type(one).step, "hooked")
        ):
            found.append(one)
        todo.extend(_wrapped(one))
    if not found:
        raise TypeError(
            "optimizer must be a torch.optim.Optimizer, or a wrapper that holds one as an attribute, "
            f"got {type(optimizer).__name__}"
        )
    return tuple(found)


def _wrapped(optimizer: Any) -> Iterator[Any]:
    attributes = list(getattr(optimizer, "__dict__", {}).values())
    for value in (getattr(optimizer, "optimizer", None), *attributes):  # a property, too
        for each in value if isinstance(value, list | tuple) else (value,):
            # A wrapper within a wrapper need not be an Optimizer itself.
            if isinstance(each, Optimizer) or (hasattr(each, "param_groups") and hasattr(each, "step")):
                yield each


def trained_parameters(optimizers: tuple[Optimizer, ...]) -> set[Tensor]:
    """Returns all parameters that the optimizers hold."""
    return {parameter for each in optimizers for group in each.param_groups for parameter in group["params"]}


def is_sharded(tensor: Any) -> bool:
    """Returns whether the tensor is a DTensor, of which every process holds a part, without importing that class."""
    return hasattr(tensor, "to_local") and hasattr(tensor, "device_mesh")


def local_part(tensor: Any) -> Tensor:
    """Returns the part of a tensor that this process holds, in the same memory; the whole if it is not sharded."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def local_part_of(full: Tensor, parameter: Any) -> Tensor:
    """Returns the part of ``full``, which every process has whole, that belongs to the local part of a parameter."""
    if not is_sharded(parameter):
        return full.to(parameter.device)
    from torch.distributed.tensor import distribute_tensor

    # Without a source rank, every process takes its part from its own copy.
    shard: Any = distribute_tensor(full, parameter.device_mesh, parameter.placements, src_data_rank=None)
    return shard.to_local().clone()


def has_plain_data(parameter: nn.Parameter) -> bool:
    """Returns whether a parameter holds plain floating-point numbers, and is no quantized or wrapped tensor."""
    return is_sharded(parameter) or (parameter.is_floating_point() and type(parameter.data) is torch.Tensor)


def sharding(model: nn.Module) -> str | None:
    """Returns how FSDP shards a model: ``"fully_shard"``, ``"FullyShardedDataParallel"``, or None."""
    names = {base.__name__ for module in model.modules() for base in type(module).__mro__}
    if "FullyShardedDataParallel" in names:
        return "FullyShardedDataParallel"
    return "fully_shard" if "FSDPModule" in names else None
