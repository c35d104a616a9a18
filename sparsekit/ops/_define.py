"""Declares an op: schema, reference, fake and gradient, under the ``sparsekit`` namespace."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

LIBRARY = torch.library.Library("sparsekit", "FRAGMENT")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_REFERENCES: dict[Any, Callable[..., Any]] = {}


def define(schema: str, reference: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Declares an op that answers with ``reference`` on every device that has no kernel of its own.

    An argument that the schema writes to, ``Tensor(a!)``, has its version raised, so that autograd sees the change.
    Returns the op's overload, ready to be called. ``Library.define`` costs 2.6 us a call, ``custom_op`` 7.3.
    """
    name = schema[: schema.index("(")]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    reference = without_autocast(reference)
    LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"sparsekit::{name}", fake, lib=LIBRARY)
    op = getattr(torch.ops.sparsekit, name).default
    written = [i for i, each in enumerate(op._schema.arguments) if each.alias_info and each.alias_info.is_write]
    if written:
        LIBRARY.impl(name, _raising_versions(op, written), "ADInplaceOrView", with_keyset=True)
    _REFERENCES[op] = reference
    return op


def reference_of(op: Any) -> Callable[..., Any]:
    """What an op computes in plain PyTorch."""
    return _REFERENCES[op]


def is_jit_tracing() -> bool:
    """Whether ``torch.jit.trace`` runs, to which sizes are tensors and a comparison of them is a warning."""
    return torch._C._get_tracing_state() is not None


def define_gradient(name: str, setup: Callable[..., None], backward: Callable[..., Any]) -> None:
    """Gives an op its gradient, which is computed in the dtypes of its tensors, under autocast as well.

    Args:
        name: of the op.
        setup: ``setup(ctx, inputs, output)`` saves what ``backward`` needs.
        backward: ``backward(ctx, *grads)`` returns a gradient or None for every input.
    """
    register = torch.library.register_autograd
    register(f"sparsekit::{name}", without_autocast(backward), setup_context=setup, lib=LIBRARY)


def without_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
    """Keeps autocast out of a function: what runs inside an op has chosen its dtypes already."""

    @wraps(function)
    def run(*args: Any) -> Any:
        with torch._C._DisableAutocast():
            return function(*args)

    return run


def no_autocast(tensor: Tensor) -> AbstractContextManager[object]:
    """The same for a part of a function, on the device of ``tensor``; ``torch.compile`` traces it."""
    device = tensor.device.type
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()


def _raising_versions(op: Any, written: list[int]) -> Callable[..., Any]:
    def run(keys: torch._C.DispatchKeySet, *args: Any) -> Any:
        for i in written:
            torch.autograd.graph.increment_version(args[i])
        with torch._C._AutoDispatchBelowADInplaceOrView():
            return op.redispatch(keys & torch._C._after_ADInplaceOrView_keyset, *args)

    return run


def linear_fp32(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``F.linear`` whose factors and sums have at least fp32's digits, rounded once to the dtype of ``x``.

    Where PyTorch is set to multiply float32 in TF32 or bfloat16, and that is for all threads, it is float64 that does.
    """
    cuda, mkldnn = torch.backends.cuda, torch.backends.mkldnn
    settings: tuple[Any, ...] = (cuda.matmul, mkldnn.matmul, mkldnn, torch.backends)  # type: ignore[attr-defined]
    exact = all(each.fp32_precision in ("none", "ieee") for each in settings)
    dtype = torch.float32 if exact else torch.float64
    return F.linear(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)).to(x.dtype)


def call_op(op: Callable[..., Tensor], *args: Any) -> Tensor:
    """Calls a differentiable op whose arguments are known to be right.

    ``torch.func`` cannot transform an op that has a gradient of its own: there its reference answers.
    """
    if torch._C._are_functorch_transforms_active():
        return reference_of(op)(*args)
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
