"""The norms of the gradients of parameters, the same in every process."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .._layers import check_model
from .._optimizers import is_sharded, local_part, sharding
from .values import local_values, sum_dtype, to_cpu


def param_grad_norms(model: nn.Module, *, scaler: Any = None, run: Any = None) -> dict[str, float | None]:
    """Returns the Euclidean norm of the gradient of every parameter, by the parameter's name.

    It is called after ``backward()`` has returned, once for all accumulated passes: only then are the gradients under
    DistributedDataParallel the averages of all processes. Of a parameter of ``fully_shard`` it is the norm of the
    whole, for which every process must call this function. The norms are computed in one batch and read at once, so
    that a GPU is waited for once.

    Args:
        model: any module, also a compiled one; a tied parameter counts once, under its first name.
        scaler: the GradScaler that has scaled the gradients, if ``scaler.unscale_(optimizer)`` was not called.
        run: gets the norms under ``grad/NAME``, by ``run.record(**values)``.

    Returns:
        The norms; None for a parameter without a gradient.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: it is in FullyShardedDataParallel, whose flat gradients each belong to several parameters.
    """
    check_model(model)
    if sharding(model) == "FullyShardedDataParallel":
        raise ValueError(
            "FullyShardedDataParallel flattens the gradients of several parameters into one: use fully_shard"
        )
    norms: dict[str, float | None] = {}
    groups: dict[Any, dict[str, Any]] = {}
    parameter: Any
    for name, parameter in model.named_parameters():
        norms[name] = None
        key = (parameter.device_mesh, parameter.placements) if is_sharded(parameter) else parameter.device
        if parameter.grad is not None or is_sharded(parameter):  # all sharded ones, as another process may have it
            groups.setdefault(key, {})[name] = parameter
    with torch.no_grad():
        found = [_norms(list(members.values())) for members in groups.values()]
        if scaler is not None and found:
            found.append(scaler.scale(torch.ones(1, dtype=torch.float32, device=found[0].device)))
        found = to_cpu(found)
        scale = found.pop().item() if len(found) > len(groups) else 1.0
    for members, (values, used) in zip(groups.values(), found, strict=True):
        for name, value, is_used in zip(members, (values / scale).tolist(), used.tolist(), strict=True):
            norms[name] = value if is_used else None
    if run is not None:
        run.record(**{f"grad/{name}": norm for name, norm in norms.items()})
    return norms


def _norms(parameters: list[Any]) -> Tensor:
    """Returns ``[2, parameters]``: the norm of each gradient, and whether there is one in any process."""
    gradients = [parameter.grad for parameter in parameters]
    first = parameters[0]
    if is_sharded(first):
        gradients = [
            None if each is None else local_part(each.redistribute(placements=first.placements)) for each in gradients
        ]
    device = local_part(first).device
    values = [torch.zeros(0, device=device) if each is None else local_values(each) for each in gradients]
    norms = torch.stack(torch._foreach_norm(values, 2, dtype=sum_dtype(*values))).float()
    used = torch.ones_like(norms)
    if not is_sharded(first):
        return torch.stack([norms, used])
    for index, each in enumerate(gradients):
        if each is None:
            used[index] = 0
    sums = torch.stack([norms.double().square(), used.double()])
    for index, placement in enumerate(first.placements):
        if not placement.is_replicate():
            dist.all_reduce(sums, group=first.device_mesh.get_group(index))
    return torch.stack([sums[0].sqrt(), sums[1]]).float()
