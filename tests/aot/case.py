"""What is compiled ahead of time, and what must hold of the machine code."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

TARGETS = ("sm_90", "gfx942", "sm_80", "sm_100")  # those with the most to compile first: variants too


@dataclass(frozen=True)
class Case:
    """A launcher's call on meta tensors: every kernel that it would launch is compiled.

    Args:
        name: unique within its file.
        call: calls the launcher.
        hot: whether local memory, stack or spilled registers fail the test.
        loads, stores: the width in bytes of the instructions that move most of the bytes (three quarters or more), at
            least. 0 where the kernel is not bound by memory.
        variant: whether another case compiles the same kernel, of which this is one more dtype, tile or shape. It takes
            seconds to compile: a variant is compiled for the first two targets alone.
    """

    name: str
    call: Callable[[], object]
    hot: bool = True
    loads: int = 0
    stores: int = 0
    variant: bool = False

    @property
    def targets(self) -> tuple[str, ...]:
        return TARGETS[:2] if self.variant else TARGETS


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """A tensor without data, whose address and sizes are as aligned as a fresh tensor's on a GPU."""
    return torch.empty(shape, dtype=dtype, device="meta")
