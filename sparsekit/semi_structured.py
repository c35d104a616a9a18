"""Converts packed 2:4 weights to the 2:4 tensors of ``torch.sparse`` and back."""

import torch
from torch.sparse import (
    SparseSemiStructuredTensor,
    SparseSemiStructuredTensorCUSPARSELT,
    SparseSemiStructuredTensorCUTLASS,
)

from .ops import Packed24, from_hardware24, hardware_layouts, pack_hardware24
from .ops.hardware_linear24 import UNKNOWN, padded_shape


def to_sparse_semi_structured(
    packed: Packed24, *, layout: str | None = None, alg_id: int = 0
) -> SparseSemiStructuredTensor:
    """Converts a packed weight to the tensor that ``torch.sparse.to_sparse_semi_structured`` makes of a dense one.

    This runs one kernel; torch itself runs about thirty for CUTLASS, and reads the dense weight for cuSPARSELt.

    Args:
        packed: a 2:4 weight as ``pack24`` returns it, or the ``packed`` of a ``Linear24``; float16 or bfloat16.
        layout: a layout of ``ops.to_hardware24``; None takes the first of ``ops.hardware_layouts`` of its device.
        alg_id: the algorithm by which cuSPARSELt multiplies.

    Returns:
        A ``SparseSemiStructuredTensorCUTLASS`` for ``"cutlass_sm80"``, else a ``SparseSemiStructuredTensorCUSPARSELT``.

    Raises:
        TypeError: a wrong dtype.
        ValueError: the device has no layout, or rows and columns are not multiples of
            ``ops.hardware_multiple(layout)``.
    """
    if layout is None:
        names, remark = hardware_layouts(packed.values.device)
        if not names:
            raise ValueError(f"layout must be given: {remark}")
        layout = names[0]
    rows, cols = packed.shape
    if (needed := padded_shape(rows, cols, layout)) != (rows, cols):
        raise ValueError(f"a weight of {rows} x {cols} must be padded to {needed[0]} x {needed[1]} for {layout}")
    data = pack_hardware24(packed._replace(values=packed.values.detach()), layout)
    shape = torch.Size((rows, cols))
    if layout.startswith("cutlass"):
        kept, meta = data.split([rows * cols // 2, rows * cols // 16])
        kept, meta = kept.view(rows, cols // 2), meta.view(torch.int16).view(rows, cols // 16)
        return SparseSemiStructuredTensorCUTLASS(shape, kept, meta, None, None, None)
    return SparseSemiStructuredTensorCUSPARSELT(
        shape, data.view(rows, -1), None, None, None, None, alg_id_cusparselt=alg_id
    )


def from_sparse_semi_structured(tensor: SparseSemiStructuredTensor, *, layout: str | None = None) -> Packed24:
    """Converts a 2:4 tensor of ``torch.sparse`` to a packed weight.

    ``torch.sparse`` itself can only multiply it by an identity matrix.

    Args:
        tensor: float16 or bfloat16, not transposed.
        layout: the layout of the tensor; None means ``"cutlass_sm80"`` for CUTLASS, and the layout of its device for
            cuSPARSELt.

    Returns:
        The weight as ``pack24`` packs it.

    Raises:
        TypeError: a wrong dtype.
        ValueError: the tensor is transposed, or its layout is unknown.
    """
    if tensor.packed is None:
        raise ValueError("tensor must not be transposed")
    rows, cols = tensor.shape
    packed = tensor.packed.flatten()
    if isinstance(tensor, SparseSemiStructuredTensorCUTLASS) and tensor.meta is not None:
        meta = tensor.meta.as_strided(
            (tensor.meta.numel(),), (1,)
        )  # torch shows it permuted if torch pruned the weight
        packed = torch.cat([packed, meta.view(packed.dtype)])
        layout = layout or "cutlass_sm80"
    if layout is None:
        names, remark = hardware_layouts(packed.device)
        layout = next((name for name in names if name.startswith("cusparselt_")), None)
        if layout is None:
            raise ValueError(f"layout must be given: {remark or 'this device has only ' + UNKNOWN}")
    return from_hardware24(packed, (rows, cols), layout)
