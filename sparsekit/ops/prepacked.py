"""Dense linear on a weight that oneDNN has reordered once: the fastest dense that PyTorch has on a CPU."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ._define import call_op, define, define_gradient

# Why torch's own ops are wrapped. Inductor compiles torch's product only if the weight is a constant of the graph, and
# that product has no gradient: `prepacked_linear` has neither limit. A traced `to_dense` is lost, because tracing takes
# the reordered weight for a plain one: `prepacked_dense` is kept.


def prepacked_linear_reference(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    if not packed.is_mkldnn or torch._C._are_functorch_transforms_active():
        return F.linear(x, _prepacked_dense(packed), bias)
    return torch.ops.mkldnn._linear_pointwise.default(x, packed, bias, "none", [], "")


def prepacked_dense_reference(packed: Tensor) -> Tensor:
    return packed.to_dense() if packed.is_mkldnn else packed.clone()


def _linear_fake(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], packed.shape[0])


_prepacked_linear = define(prepacked_linear_reference, _linear_fake, compiled=False)
_prepacked_dense = define(
    prepacked_dense_reference,
    lambda packed: torch.empty(packed.shape, dtype=packed.dtype, device=packed.device),
    compiled=False,
)


def _linear_setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(inputs[1] if ctx.needs_input_grad[0] else None)


def _linear_backward(ctx, grad):  # type: ignore[no-untyped-def]
    (packed,) = ctx.saved_tensors
    grad_x = grad @ _prepacked_dense(packed) if ctx.needs_input_grad[0] else None
    grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0) if ctx.needs_input_grad[2] else None
    return grad_x, None, grad_bias


define_gradient(_prepacked_linear, _linear_setup, _linear_backward)


def prepack(weight: Tensor, tokens: int) -> Tensor:
    """Reorders a dense weight for oneDNN, or returns it as it is where oneDNN has no reordered form for it.

    Args:
        weight: ``[rows, cols]``. oneDNN takes float32 on every CPU, bfloat16 and float16 on those that compute in them.
        tokens: how many rows of ``x`` the layout is chosen for.

    Returns:
        An opaque tensor (``is_mkldnn``) with ``weight``'s shape and dtype, or ``weight``, contiguous.
    """
    weight = weight.detach().contiguous()
    if weight.device.type != "cpu" or weight.numel() == 0 or not torch.backends.mkldnn.is_available():
        return weight
    try:
        return torch.ops.mkldnn._reorder_linear_weight(weight, tokens)
    except RuntimeError:  # how oneDNN refuses a dtype that the CPU lacks
        return weight


def prepacked_dense(packed: Tensor) -> Tensor:
    """Returns the plain dense weight of a reordered one, bit for bit."""
    return _prepacked_dense(packed)


def prepacked_linear(x: Tensor, packed: Tensor, bias: Tensor | None = None) -> Tensor:
    """Computes ``x @ W.T + bias`` from the opaque form of ``W``; differentiable in ``x`` and ``bias``, not in ``W``.

    Args:
        x: ``[..., cols]`` of the weight's dtype, any strides, or sparse as ``F.linear`` takes it.
        packed: what ``prepack`` returned, reordered.
        bias: ``[rows]`` or None.

    Raises:
        TypeError: ``x`` has another dtype.
        ValueError: ``x`` has another number of columns.
    """
    if x.dtype != packed.dtype:
        raise TypeError(f"x must be {packed.dtype} as the weight is, got {x.dtype}")
    if x.dim() == 0 or x.shape[-1] != packed.shape[1]:
        raise ValueError(f"x must have {packed.shape[1]} columns, got shape {tuple(x.shape)}")
    if x.layout is not torch.strided:
        return F.linear(x, prepacked_dense(packed), bias)
    grad = torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad))
    if grad or torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return call_op(_prepacked_linear, x, packed, bias)
    return torch.ops.mkldnn._linear_pointwise.default(x, packed, bias, "none", [], "")
