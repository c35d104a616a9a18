"""What every section measures with: the device, its clock, and the shapes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench import shapes

from .clock import Call, KernelClock
from .rows import Rows
from .tune import Asked, tune

Shape = tuple[int, int]
MAX_SETS = 64


@dataclass(frozen=True)
class Sizes:
    """The shapes that are measured, the important ones first."""

    memory: tuple[Shape, ...] = (shapes.SQUARE, shapes.WIDE, shapes.BERT_DOWN)
    linear: tuple[Shape, ...] = shapes.GPU_LINEAR
    tokens: tuple[int, ...] = shapes.GPU_TOKENS
    copy_bytes: int = 2**31
    product: tuple[int, ...] = (8192, 16384)
    compress_seconds: float = 0.2  # that `compress_` may measure one shape at one token count


@dataclass(frozen=True)
class Lab:
    """A device with its clock, the shapes, and the settings of a run."""

    device: torch.device
    sizes: Sizes
    layout: str | None  # of cuSPARSELt's packed weights on this GPU
    clock: KernelClock
    backend: str = "inductor"  # of torch.compile
    tuned: set[Asked] | None = None  # the tables chosen so far, if this run chooses configurations

    def randn(self, *shape: int, dtype: str = "bf16") -> Tensor:
        return torch.randn(shape, device=self.device).to(shapes.DTYPES[dtype])

    def sets(self, make: Callable[[], Any], nbytes: int) -> Sequence[Any]:
        """Makes so many inputs of ``nbytes`` that they fill the cache three times, so that none is found in it."""
        return [make() for _ in range(max(1, min(MAX_SETS, -(-3 * self.clock.cache // nbytes))))]

    def tune(self, rows: Rows, calls: Sequence[Call], check: Callable[[Any], None]) -> None:
        """Chooses the configurations of the kernels that the calls launch, if this run chooses any."""
        if self.tuned is None:
            return
        with rows.guard("tune"):
            tune(self.clock, rows, self.tuned, calls, check)


def gpu_lab(tune: bool = False) -> Lab:
    """Returns the lab of the first GPU of this machine."""
    device = torch.device("cuda", 0)
    torch.cuda.set_device(device)
    torch.manual_seed(0)
    major, _ = torch.cuda.get_device_capability(device)
    layout = None if torch.version.hip else {8: "cusparselt_sm80", 9: "cusparselt_sm90"}.get(major)
    return Lab(device, Sizes(), layout, KernelClock(device), tuned=set() if tune else None)
