"""A stand-in for a GPU: the whole program on the CPU, with tiny shapes that mean nothing.

It is for trying the program where there is no GPU, so that the first run on one does not die of a slip.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsekit.ops.hardware24 import from_hardware24_reference, to_hardware24_reference
from sparsekit.ops.sparse24 import pack24_reference, unpack24_reference

from .clock import HostClock
from .in_tree import find_kernels
from .lab import Lab, Sizes, reference, registered
from .vendor import Algorithm

LAYOUT = "cusparselt_sm90"
TINY = Sizes(
    masks=((64, 64), (16, 32)),
    both_ways=((128, 128),),
    linear=((64, 32),),
    tokens=(1, 96),
    layout_rows=(64, 96),
    layout_cols=(64, 96),
    probes=((64, 64), (96, 32)),
    copy_bytes=2**16,
    product=(64,),
    compress_seconds=0.001,
)


class Emulated:
    """What cuSPARSELt does, in plain PyTorch; of its algorithms 1 is wrong and others than 0, 2 and 3 raise."""

    def version(self) -> str:
        return "emulated"

    def compress(self, weight: Tensor) -> Tensor:
        """The rows padded to what the layout needs; the values of the padding are left out, its metadata is not."""
        rows, cols = weight.shape
        padded = F.pad(weight, (0, 0, 0, -rows % 64))
        packed = to_hardware24_reference(*pack24_reference(padded, None, False), cols, LAYOUT)
        return torch.cat([packed[: rows * cols // 2], packed[padded.numel() // 2 :]])

    def semi_structured(self, weight: Tensor) -> Tensor:
        return weight

    def tile(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        dense = torch.where(reference("transposable_mask")(weight), weight, 0)
        return dense, dense

    def linear(self, x: Tensor, packed: Tensor, bias: Tensor | None, rows: int, algorithm: Algorithm) -> Tensor:
        if algorithm.id > 3:
            raise RuntimeError("CUDA error: operation not supported when calling `cusparseLtMatmulPlanInit`")
        cols = packed.numel() * 16 // 9 // rows
        weight = unpack24_reference(*from_hardware24_reference(packed, rows, cols, LAYOUT), cols)
        out = F.linear(x.float(), weight.float(), None if bias is None else bias.float()).to(x.dtype)
        return out + 1 if algorithm.id == 1 else out

    def suggest(self, x: Tensor, packed: Tensor, bias: Tensor | None, rows: int) -> Algorithm:
        return Algorithm(3)


def rehearsal_lab() -> Lab:
    """The CPU in a GPU's place; its own kernels answer the ops."""
    find_kernels()
    torch.manual_seed(0)
    return Lab(torch.device("cpu"), HostClock(), Emulated(), TINY, LAYOUT, registered, "eager")
