"""Which hardware layout a weight trains in, if any."""

import torch

from ..ops import hardware_multiple


def hardware_layout(
    device: torch.device, dtype: torch.dtype, rows: int, cols: int, transposable: bool
) -> tuple[str | None, str]:
    """The packed 2:4 layout in which this device multiplies such a weight; None where it has none, and the reason.

    Without one a layer multiplies densely with its masked weight, which is a dense layer and one pass over the weight.

    Args:
        device, dtype: where and in what the product runs.
        rows, cols: the shape of the weight.
        transposable: whether its transpose is multiplied too.
    """
    if device.type != "cuda":
        return None, f"no 2:4 tensor cores on {device.type}"
    if dtype not in (torch.float16, torch.bfloat16):
        return None, f"it computes in {dtype}, not float16 or bfloat16"
    layouts = _layouts(device)
    for layout in layouts:
        high, wide = hardware_multiple(layout)
        if transposable:
            high = wide = max(high, wide)
        if rows % high == 0 and cols % wide == 0:
            return layout, ""
    if not layouts:
        return None, "no 2:4 product of this torch runs on this GPU"
    return None, f"{rows} x {cols} fits no 2:4 layout"


def _layouts(device: torch.device) -> tuple[str, ...]:
    """The layouts that a GPU multiplies, the best first."""
    if torch.version.hip:
        return ()
    major, minor = torch.cuda.get_device_capability(device)
    cusparselt = torch.backends.cusparselt.is_available()
    if major == 8:
        return ("cusparselt_sm80", "cutlass_sm80") if cusparselt else ("cutlass_sm80",)
    return ("cusparselt_sm90",) if cusparselt and (major, minor) == (9, 0) else ()
