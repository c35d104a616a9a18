"""What is computed of a gradient, where it is, and what becomes of several parts at the end of a step."""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from .._optimizers import is_sharded

Reduce = Literal["norm", "mean_abs", "hist", "full"]
LOW, HIGH = -40, 10  # the powers of two that the bins of a histogram go from and to


class Reduction(NamedTuple):
    """The two halves of a reduction: ``take`` of each gradient, on its device, and ``join`` of all, on the CPU."""

    take: Callable[[Tensor], Tensor]
    join: Callable[[Sequence[Tensor]], Any]


def real_values(gradient: Any) -> Tensor:
    """Returns all numbers of a gradient as a plain real tensor; every process calls it if the gradient is sharded."""
    if is_sharded(gradient):
        gradient = gradient.full_tensor()
    return local_values(gradient)


def local_values(gradient: Tensor) -> Tensor:
    """Returns the numbers that a tensor stores as a plain real tensor: those of a sparse one, and complex as pairs."""
    gradient = gradient.detach()
    if gradient.layout is torch.sparse_coo:
        gradient = gradient.coalesce().values()
    elif gradient.is_nested:
        gradient = torch.cat([each.flatten() for each in gradient.unbind()])
    return torch.view_as_real(gradient) if gradient.is_complex() else gradient


def sum_dtype(*gradients: Tensor) -> torch.dtype:
    """Returns the dtype that norms are summed in: float32, or float64 where a gradient has that."""
    return torch.float64 if any(each.dtype == torch.float64 for each in gradients) else torch.float32


def norm(gradient: Tensor) -> Tensor:
    """Returns the Euclidean norm as a float32 tensor of one number."""
    return torch.linalg.vector_norm(gradient, dtype=sum_dtype(gradient)).float()[None]


def sample_norms(gradient: Tensor) -> Tensor:
    """Returns the float32 norm of each entry along the first dimension."""
    return torch.linalg.vector_norm(gradient.flatten(1), dim=1, dtype=sum_dtype(gradient)).float()


def _mean_abs(gradient: Tensor) -> Tensor:
    total = torch.linalg.vector_norm(gradient, 1, dtype=sum_dtype(gradient)).float()
    return torch.stack([total, torch.full_like(total, gradient.numel())])


def _histogram(gradient: Tensor) -> Tensor:
    power = gradient.float().abs().log2().floor().clamp(LOW, HIGH).nan_to_num(HIGH)
    return torch.bincount(power.flatten().long() - LOW, minlength=HIGH - LOW + 1).float()


def _copy(gradient: Tensor) -> Tensor:
    return gradient.to("cpu", copy=True)


REDUCTIONS: dict[Reduce, Reduction] = {
    "norm": Reduction(norm, lambda parts: torch.cat(list(parts)).norm().item()),
    "mean_abs": Reduction(
        _mean_abs, lambda parts: (sum(total for total, _ in parts) / sum(n for _, n in parts)).item()
    ),
    "hist": Reduction(_histogram, lambda parts: torch.stack(list(parts)).sum(0).long().tolist()),
    "full": Reduction(_copy, list),
}


def to_cpu(parts: Sequence[Tensor]) -> list[Tensor]:
    """Returns tensors on the CPU, which takes one transfer, and so one synchronization, for all of them."""
    if not parts or all(part.device.type == "cpu" for part in parts):
        return list(parts)
    device = parts[0].device
    flat = torch.cat([part.flatten().to(device) for part in parts]).cpu()
    return [
        each.view(part.shape) for each, part in zip(flat.split([part.numel() for part in parts]), parts, strict=True)
    ]
