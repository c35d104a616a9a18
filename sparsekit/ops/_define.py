"""Declares an op: schema, reference and fake, under the ``sparsekit`` namespace."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

LIBRARY = torch.library.Library("sparsekit", "FRAGMENT")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_REFERENCES: dict[Any, Callable[..., Any]] = {}


def define(schema: str, reference: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Declares an op that answers with ``reference`` on every device that has no kernel of its own.

    Returns the op's overload, ready to be called. ``Library.define`` costs 2.6 us a call, ``custom_op`` 7.3.
    """
    name = schema[: schema.index("(")]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"sparsekit::{name}", fake, lib=LIBRARY)
    op = getattr(torch.ops.sparsekit, name).default
    _REFERENCES[op] = reference
    return op


def is_jit_tracing() -> bool:
    """Whether ``torch.jit.trace`` runs, to which sizes are tensors and a comparison of them is a warning."""
    return torch._C._get_tracing_state() is not None


def call_op(op: Callable[..., Tensor], *args: Any) -> Tensor:
    """Calls a differentiable op whose arguments are known to be right.

    ``torch.func`` cannot transform an op that has a gradient of its own: there its reference answers.
    """
    if torch._C._are_functorch_transforms_active():
        return _REFERENCES[op](*args)
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return op(*args)
    with torch._C._AutoDispatchBelowAutograd():  # the op's autograd layer is Python: 9 us, a third of a small call
        return op(*args)


def check_weight(name: str, tensor: Tensor, dim: int | None = None) -> None:
    """Rejects what is not a float32, float16 or bfloat16 tensor, or has not ``dim`` dimensions (None: one or more)."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if tensor.dtype not in DTYPES:
        raise TypeError(f"{name} must be float32, float16 or bfloat16, got {tensor.dtype}")
    if dim is None and tensor.dim() == 0:
        raise ValueError(f"{name} must have at least one dimension, got a scalar")
    if dim is not None and tensor.dim() != dim:
        raise ValueError(f"{name} must have {dim} dimensions, got shape {tuple(tensor.shape)}")


def check_like(name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...], like: Tensor) -> None:
    """Rejects what is not a tensor of this dtype and shape on the device of ``like``."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if tensor.dtype != dtype:
        raise TypeError(f"{name} must be {dtype}, got {tensor.dtype}")
    if tensor.shape != shape:
        raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(tensor.shape)}")
    if tensor.device != like.device:
        raise ValueError(f"{name} must be on {like.device}, got {tensor.device}")


def check_ints(**values: int) -> None:
    """Rejects what is not an int, or what stands for one while a graph is traced."""
    for name, value in values.items():
        if not isinstance(value, int | torch.SymInt) and not is_jit_tracing():
            raise TypeError(f"{name} must be an int, got {value!r}")
