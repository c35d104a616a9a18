"""Which hardware layout a weight trains in, if any."""

from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

from ..ops import hardware_layouts
from ..ops.hardware24 import MULTIPLES

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def traced_as_constant(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Makes ``torch.compile`` call a function once and keep what it returns.

    It does what ``torch.compiler.assume_constant_result`` does, which imports the compiler: three seconds for a mark.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def hardware_layout(
    device: torch.device, dtype: torch.dtype, shape: torch.Size, transposable: bool
) -> tuple[str | None, str]:
    """The packed 2:4 layout in which this device multiplies such a weight; None where it has none, and the reason.

    Without one a layer multiplies densely by its masked weight: a dense layer, and one pass over the weight.

    Args:
        device, dtype: where and in what the product runs.
        shape: that of the weight, ``[rows, cols]``.
        transposable: whether its transpose is multiplied too.
    """
    names, remark = _layouts(device)
    rows, cols = shape
    if dtype not in (torch.float16, torch.bfloat16):
        return None, f"it computes in {dtype}, not float16 or bfloat16" if names else remark
    for name in names:
        high, wide = MULTIPLES[name]
        if transposable:
            high = wide = max(high, wide)
        if rows % high == 0 and cols % wide == 0:
            return name, ""
        remark = f"{rows} x {cols} is no multiple of the {high} x {wide} of {name}"
    return None, remark


@traced_as_constant
def _layouts(device: torch.device) -> tuple[tuple[str, ...], str]:
    """The device's layouts that an op packs a weight in at every step; and why there is none."""
    names, remark = hardware_layouts(device)
    return tuple(name for name in names if name in MULTIPLES), remark
