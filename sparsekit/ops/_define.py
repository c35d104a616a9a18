"""Declares ops in torch's namespace ``sparsekit``: their schema, reference, fake and gradient; checks arguments."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

LIBRARY = torch.library.Library("sparsekit", "FRAGMENT")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class Declared(NamedTuple):
    """One op, as ``define`` declared it."""

    reference: Callable[..., Any]
    stem: str  # of the file in ``ops/``; a launcher is looked for in the file of this name in ``triton_kernels/``
    compiled: bool


DECLARED: dict[str, Declared] = {}


def define(
    reference: Callable[..., Any], fake: Callable[..., Any], *, mutates: Sequence[str] = (), compiled: bool = True
) -> Any:
    """Declares the op ``x``, whose reference is the function ``x_reference``, and returns its overload.

    The annotations of the reference are the op's schema. The reference runs on every device without a kernel of its
    own. A call of an op of ``Library.define`` costs 2.6 us, of ``torch.library.custom_op`` 7.3 us.

    Args:
        reference: the op in plain PyTorch. Of an op that writes to an argument it is named ``x_inplace_reference``,
            and the op ``x_``.
        fake: takes the same arguments and returns empty tensors of the result's shapes and dtypes.
        mutates: names of the arguments that the op writes to; their version counters go up, so that autograd notices.
        compiled: whether the op has a compiled CPU kernel in ``csrc/``; without one, the reference is all there is.
    """
    name = reference.__name__.removesuffix("_reference")
    name = name.removesuffix("_inplace") + "_" if mutates else name
    # The schema says int, not SymInt: the kernels take plain numbers, and a graph is compiled again for others.
    schema = torch.library.infer_schema(reference, mutates_args=mutates).replace("SymInt", "int")
    LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    stem = reference.__module__.rpartition(".")[2]
    reference = without_autocast(reference)
    LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"sparsekit::{name}", _refusing_real_tensors(fake), lib=LIBRARY)
    op = getattr(torch.ops.sparsekit, name).default
    if mutates:
        written = [i for i, each in enumerate(op._schema.arguments) if each.name in mutates]
        LIBRARY.impl(name, _raising_versions(op, written), "ADInplaceOrView", with_keyset=True)
    DECLARED[name] = Declared(reference, stem, compiled)
    return op


def reference_of(op: Any) -> Callable[..., Any]:
    """Returns what an op computes in plain PyTorch."""
    return DECLARED[op._opname].reference


def is_jit_tracing() -> bool:
    """Returns whether ``torch.jit.trace`` runs; sizes are tensors then, and comparing them gives a warning."""
    return torch._C._get_tracing_state() is not None


def define_gradient(op: Any, setup: Callable[..., None], backward: Callable[..., Any]) -> None:
    """Gives an op its gradient, which is computed without autocast, in the dtypes of its tensors.

    Args:
        op: what ``define`` returned.
        setup: ``setup(ctx, inputs, output)`` saves what ``backward`` needs.
        backward: ``backward(ctx, *grads)`` returns a gradient or None for every input.
    """
    torch.library.register_autograd(op._schema.name, without_autocast(backward), setup_context=setup, lib=LIBRARY)


def without_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps a function so that it runs without autocast: an op computes in the dtypes of its tensors."""

    @wraps(function)
    def run(*args: Any) -> Any:
        with torch._C._DisableAutocast():
            return function(*args)

    return run


def no_autocast(tensor: Tensor) -> AbstractContextManager[object]:
    """Returns a context without autocast on the device of ``tensor``, which ``torch.compile`` can trace."""
    device = tensor.device.type
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()


def _refusing_real_tensors(fake: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps a fake so that it refuses a mix of tensors on the meta device and others, for which it has no data."""

    @wraps(fake)
    def run(*args: Any) -> Any:
        if real := [arg for arg in args if type(arg) in (Tensor, torch.nn.Parameter) and not arg.is_meta]:
            raise ValueError(f"all tensors must be on the meta device where one is, got one on {real[0].device}")
        return fake(*args)

    return run


def _raising_versions(op: Any, written: list[int]) -> Callable[..., Any]:
    def run(keys: torch._C.DispatchKeySet, *args: Any) -> Any:
        for i in written:
            torch.autograd.graph.increment_version(args[i])
        with torch._C._AutoDispatchBelowADInplaceOrView():
            return op.redispatch(keys & torch._C._after_ADInplaceOrView_keyset, *args)

    return run


def linear_fp32(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Computes ``F.linear`` in at least fp32's precision, and rounds the result once, to the dtype of ``x``.

    Computes in float64 if PyTorch is set to multiply float32 in TF32 or bfloat16; that setting holds for all threads.
    """
    cuda, mkldnn = torch.backends.cuda, torch.backends.mkldnn
    dtype = _exact_dtype(cuda.matmul, mkldnn.matmul, mkldnn)  # type: ignore[attr-defined]
    return F.linear(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)).to(x.dtype)


def conv_fp32(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """Computes ``F.conv2d`` as ``linear_fp32`` computes ``F.linear``; the result is contiguous."""
    backend: Any = torch.backends.cudnn if x.is_cuda else torch.backends.mkldnn  # cuDNN is set to TF32 by default
    dtype = _exact_dtype(backend.conv, backend)
    inputs = x.to(dtype).contiguous(), weight.to(dtype), None if bias is None else bias.to(dtype)
    return F.conv2d(*inputs, stride, padding, dilation).to(x.dtype).contiguous()


def _exact_dtype(*settings: Any) -> torch.dtype:
    """Returns float32 if PyTorch multiplies all digits of it, by these settings and the one for all; else float64."""
    exact = all(each.fp32_precision in ("none", "ieee") for each in (*settings, torch.backends))
    return torch.float32 if exact else torch.float64


def call_op(op: Callable[..., Tensor], *args: Any) -> Tensor:
    """Calls a differentiable op whose arguments have been checked.

    ``torch.func`` cannot transform an op that has a gradient of its own, so the reference runs there instead.
    """
    if torch._C._are_functorch_transforms_active():
        return reference_of(op)(*args)
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return op(*args)
    with torch._C._AutoDispatchBelowAutograd():  # the op's autograd layer is Python: 9 us, a third of a small call
        return op(*args)


def straight_through(rounded: Tensor, plain: Tensor) -> Tensor:
    """Returns the values of ``rounded`` with the derivatives of ``plain``, which is the same without rounding."""
    return rounded.detach() + (plain - plain.detach())


def can_call_directly() -> bool:
    """Returns whether torch adds nothing to a call: no gradient, autocast, transform, trace or compilation."""
    return not (
        torch.compiler.is_compiling()
        or torch.is_grad_enabled()
        or torch._C._is_any_autocast_enabled()
        or torch._C._are_functorch_transforms_active()
        or is_jit_tracing()
    )


def check_weight(name: str, tensor: Tensor, dim: int | None = None) -> None:
    """Raises unless ``tensor`` is float32, float16 or bfloat16 with ``dim`` dimensions (None: one or more)."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if tensor.dtype not in DTYPES:
        raise TypeError(f"{name} must be float32, float16 or bfloat16, got {tensor.dtype}")
    if dim is None and tensor.dim() == 0:
        raise ValueError(f"{name} must have at least one dimension, got a scalar")
    if dim is not None and tensor.dim() != dim:
        raise ValueError(f"{name} must have {dim} dimensions, got shape {tuple(tensor.shape)}")


def check_like(name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...], like: Tensor) -> None:
    """Raises unless ``tensor`` has this dtype and shape and is on the device of ``like``."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if tensor.dtype != dtype:
        raise TypeError(f"{name} must be {dtype}, got {tensor.dtype}")
    if tensor.shape != shape:
        raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(tensor.shape)}")
    if tensor.device != like.device:
        raise ValueError(f"{name} must be on {like.device}, got {tensor.device}")


def check_ints(**values: int) -> None:
    """Raises unless every value is an int, or a symbol of one while a graph is traced."""
    for name, value in values.items():
        if not isinstance(value, int | torch.SymInt) and not is_jit_tracing():
            raise TypeError(f"{name} must be an int, got {value!r}")
