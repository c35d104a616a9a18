"""What the parts measure with: the device, its clock, the ops and their references, and the shapes."""

import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

import sparsekit.ops
from bench import shapes

from .clock import DeviceClock, HostClock
from .in_tree import find_kernels
from .vendor import CuSparseLt

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
Shape = tuple[int, int]


@dataclass(frozen=True)
class Sizes:
    """The shapes that are measured, the important ones first."""

    masks: tuple[Shape, ...] = (shapes.SQUARE, shapes.WIDE, shapes.BERT_DOWN)
    both_ways: tuple[Shape, ...] = masks  # multiples of 128, which torch's own pruner needs
    linear: tuple[Shape, ...] = shapes.GPU_LINEAR
    tokens: tuple[int, ...] = shapes.GPU_TOKENS
    layout_rows: tuple[int, ...] = (64, 96, 128, 768, 3072)
    layout_cols: tuple[int, ...] = (64, 768, 3072, 4096)
    probes: tuple[Shape, ...] = ((64, 64), (128, 128), (96, 64), (192, 256))
    copy_bytes: int = 2**31
    product: tuple[int, ...] = (8192, 16384)
    compress_seconds: float = 0.2  # that `compress_` may measure one shape at one token count


@dataclass(frozen=True)
class Lab:
    """One device with everything that is asked of it; a rehearsal replaces some of it."""

    device: torch.device
    clock: HostClock
    vendor: Any
    sizes: Sizes
    layout: str | None  # of the vendor's packed weights on this GPU
    op: Callable[[str], Callable[..., Any]]
    backend: str = "inductor"  # of torch.compile

    def randn(self, *shape: int, dtype: str = "bf16") -> Tensor:
        return torch.randn(shape, device=self.device).to(DTYPES[dtype])

    def sets(self, make: Callable[[], Any], nbytes: int) -> Sequence[Any]:
        """As many inputs as a round needs to find none of them in the cache."""
        return [make() for _ in range(self.clock.sets(nbytes))]

    def healthy(self) -> None:
        """Raises where an earlier fault has lost the device to this process."""
        self.clock.synchronize()
        torch.ones(1, device=self.device).sum()
        self.clock.synchronize()


def gpu_lab() -> Lab:
    """The first GPU of this machine."""
    find_kernels()
    device = torch.device("cuda", 0)
    torch.cuda.set_device(device)
    torch.manual_seed(0)
    return Lab(device, DeviceClock(device), CuSparseLt(), Sizes(), _layout(device), registered)


def _layout(device: torch.device) -> str | None:
    major, _ = torch.cuda.get_device_capability(device)
    return None if torch.version.hip else {8: "cusparselt_sm80", 9: "cusparselt_sm90"}.get(major)


def registered(name: str) -> Callable[..., Any]:
    op: Callable[..., Any] = getattr(torch.ops.sparsekit, name).default
    return op


def reference(name: str) -> Callable[..., Any]:
    """The plain PyTorch that defines an op."""
    for module in pkgutil.iter_modules(sparsekit.ops.__path__):
        found: Callable[..., Any] | None = getattr(
            import_module(f"sparsekit.ops.{module.name}"), f"{name}_reference", None
        )
        if found is not None:
            return found
    raise LookupError(f"no op is called {name}")


def tensors(value: Any) -> list[Tensor]:
    """The tensors among an op's arguments or results."""
    return [each for each in (value if isinstance(value, tuple | list) else (value,)) if isinstance(each, Tensor)]


def total_bytes(*values: Any) -> int:
    return sum(tensor.nbytes for value in values for tensor in tensors(value))


def check_same(got: Any, expected: Any) -> None:
    """No figure on a wrong result: every tensor equals the reference's."""
    pairs = list(zip(tensors(got), tensors(expected), strict=True))
    for index, (own, right) in enumerate(pairs):
        if own.shape != right.shape or own.dtype != right.dtype:
            raise ValueError(
                f"result {index} is {own.dtype} {tuple(own.shape)}, not {right.dtype} {tuple(right.shape)}"
            )
        if not torch.equal(own, right):
            wrong = (own != right).sum().item()
            raise ValueError(f"wrong: {wrong} of {own.numel()} entries of result {index} differ from the reference")


def relative_error(got: Tensor, expected: Tensor) -> float:
    """The norm of the difference over the norm of what is expected, which is of a higher precision."""
    return ((got.to(expected.dtype) - expected).norm() / expected.norm()).item()
