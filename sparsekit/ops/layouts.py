"""Finds the hardware layouts that a GPU can multiply in, by trying its libraries once."""

from typing import NamedTuple

import torch
from torch import Tensor

from ._vendor import compress
from ._vendor import hardware_linear24 as multiply
from .bits import unpack_bits
from .hardware24 import _to_hardware24
from .hardware_linear24 import UNKNOWN, padded_shape
from .nm import nm_mask
from .sparse24 import Packed24, check_packed24, pack24

_found: dict[torch.device, "Layouts"] = {}
PROBES = ((128, 128), (256, 384), (384, 128))  # more than one tile of every layout, in both directions


class Layouts(NamedTuple):
    """The hardware layouts of one device, the best supported first, and a remark on them."""

    names: tuple[str, ...]
    remark: str


def device_name(device: torch.device) -> str:
    """Returns the model of a GPU, or the type of any other device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def hardware_layouts(device: torch.device) -> Layouts:
    """Returns the layouts that ``hardware_linear24`` computes with on a device.

    cuSPARSELt is tried once per process and device: it must multiply, and its compressor must write some small weights
    byte for byte as ``to_hardware24`` does. If only the order of the metadata differs, the layout is ``"cusparselt"``,
    and ``pack_hardware24`` packs with cuSPARSELt's compressor. cuSPARSELt may work on only one GPU of a process, the
    first one that a thread uses it on (https://github.com/pytorch/pytorch/pull/189048). While a CUDA graph is captured
    nothing can be tried, so a device that has not been tried before has no layouts then.

    Args:
        device: with an index, as ``tensor.device`` has it.

    Returns:
        ``(names, remark)``; the remark says why there is no layout, or what is unusual about it.
    """
    if device not in _found:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return Layouts((), "nothing can be asked of cuSPARSELt while a CUDA graph is captured")
        _found[device] = _layouts(device)
    return _found[device]


def _layouts(device: torch.device) -> Layouts:
    capability = _capability(device)
    if capability is None:
        return Layouts((), f"{device_name(device)} has no 2:4 tensor cores that PyTorch can use")
    cusparselt, remark = _cusparselt_layout(device, capability)
    cutlass = ("cutlass_sm80",) if capability[0] == 8 else ()  # torch's kernels check for it
    return Layouts((*cusparselt, *cutlass), remark)


@torch.no_grad()
def pack_hardware24(packed: Packed24, layout: str) -> Tensor:
    """Rewrites a packed weight in a layout of ``hardware_layouts``, padded with zeros to its multiples.

    Runs outside autograd.

    Args:
        packed: as ``pack24`` returns it, float16 or bfloat16; ``cols % 4`` must not be 3, because a
            hardware group holds only two values.
        layout: a layout of ``to_hardware24``, or ``"cusparselt"``.

    Returns:
        A tensor for ``hardware_linear24``, in the dtype of the weight. It begins with the values, ``[padded rows,
        padded cols / 2]``.

    Raises:
        TypeError: a wrong dtype.
        ValueError: no layout has this name, or the columns end in a group of three.
    """
    check_packed24(packed)
    values, bitmask, (rows, cols) = packed
    if values.dtype not in (torch.float16, torch.bfloat16):
        raise TypeError(f"packed must be float16 or bfloat16, got {values.dtype}")
    if cols % 4 == 3:
        raise ValueError(f"columns must not end in a group of three, got {cols}")
    shape = padded_shape(rows, cols, layout)
    if shape != (rows, cols):
        dense = values.new_zeros(shape)
        dense[:rows, :cols] = packed.to_dense()
        kept = (torch.arange(shape[1], device=values.device) % 4 < 2).repeat(shape[0], 1)
        kept[:rows, :cols] = unpack_bits(bitmask, cols)
        values, bitmask, _ = pack24(dense, kept, check=False)
    if layout != UNKNOWN:
        return _to_hardware24(values, bitmask, shape[1], layout)
    # Packs ones instead of the values, among which the compressor could not tell a kept zero from a dropped entry.
    ones = Packed24(torch.ones_like(values), bitmask, shape)
    data = compress(ones.to_dense())
    data[: values.numel()] = values.flatten()
    return data


def _capability(device: torch.device) -> tuple[int, int] | None:
    nvidia = device.type == "cuda" and torch.version.hip is None
    return torch.cuda.get_device_capability(device) if nvidia else None


def _cusparselt_layout(device: torch.device, capability: tuple[int, int]) -> tuple[tuple[str, ...], str]:
    if not torch.backends.cusparselt.is_available():
        return (), f"torch {torch.__version__} was built without cuSPARSELt"
    known = {8: ("cusparselt_sm80",), 9: ("cusparselt_sm90",)}
    candidates = set(known.get(capability[0], ("cusparselt_sm80", "cusparselt_sm90")))
    heads_agree = True
    for number, (rows, cols) in enumerate(PROBES):
        generator = torch.Generator().manual_seed(number)
        dense = torch.randn(rows, cols, generator=generator, device="cpu").to(device, torch.float16)
        packed = pack24(dense, nm_mask(dense, 2, 4), check=False)
        values, bitmask, _ = packed
        try:
            theirs = compress(packed.to_dense())
            if theirs.numel() != rows * cols // 16 * 9:
                return (), "cuSPARSELt's layout is unknown on this GPU"
            multiply(dense[:8], theirs, None, rows, UNKNOWN, 0, 1, -1)
        except RuntimeError as error:
            return (), f"cuSPARSELt does not work here: {str(error).splitlines()[0]}"
        candidates = {name for name in candidates if _same(theirs, _to_hardware24(values, bitmask, cols, name))}
        heads_agree &= _same(theirs[: values.numel()], values.flatten())
    if candidates:
        return tuple(candidates), ""
    if heads_agree:
        return (UNKNOWN,), "cuSPARSELt's order of metadata is unknown on this GPU: its own compressor packs"
    return (), "cuSPARSELt's layout is unknown on this GPU"


def _same(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.view(torch.int16), other.view(torch.int16))  # as numbers, metadata may be NaN
