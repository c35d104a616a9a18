"""The ops and their references by name, and checks of results, which come before every measurement."""

import pkgutil
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

import sparsekit.ops

TOLERANCE = 1e-2  # relative error of a bf16 product, against the same product in fp32


def op(name: str) -> Any:
    """Returns a registered op."""
    return getattr(torch.ops.sparsekit, name).default


def reference(name: str) -> Any:
    """Returns the reference of an op."""
    for module in pkgutil.iter_modules(sparsekit.ops.__path__):
        found = getattr(import_module(f"sparsekit.ops.{module.name}"), f"{name}_reference", None)
        if found is not None:
            return found
    raise LookupError(f"no op is called {name}")


def tensors(value: Any) -> list[Tensor]:
    """Lists the tensors among an op's arguments or results."""
    return [each for each in (value if isinstance(value, tuple | list) else (value,)) if isinstance(each, Tensor)]


def total_bytes(*values: Any) -> int:
    return sum(tensor.nbytes for value in values for tensor in tensors(value))


def check_same(got: Any, expected: Any) -> None:
    """Raises unless every tensor equals the reference's."""
    for index, (own, right) in enumerate(zip(tensors(got), tensors(expected), strict=True)):
        if own.shape != right.shape or own.dtype != right.dtype:
            raise ValueError(
                f"result {index} is {own.dtype} {tuple(own.shape)}, not {right.dtype} {tuple(right.shape)}"
            )
        if not torch.equal(own, right):
            wrong = (own != right).sum().item()
            raise ValueError(f"wrong: {wrong} of {own.numel()} entries of result {index} differ from the reference")


def check_close(got: Tensor, expected: Tensor) -> None:
    """Raises unless a product is close to ``expected``, which is of a higher precision."""
    if got.shape != expected.shape:
        raise ValueError(f"the result has shape {tuple(got.shape)}, not {tuple(expected.shape)}")
    error = ((got.to(expected.dtype) - expected).norm() / expected.norm()).item()
    if not error <= TOLERANCE:
        raise ValueError(f"wrong: a relative error of {error:.2g}, {TOLERANCE:g} is allowed")
