"""The vendor's sparse matrix product, through what torch exposes of it."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.sparse import SparseSemiStructuredTensorCUSPARSELT, to_sparse_semi_structured

from sparsekit.ops import _vendor
from sparsekit.ops.hardware_linear24 import UNKNOWN


class Algorithm(NamedTuple):
    """A choice of cuSPARSELt: its algorithm, and into how many parts, reduced how, the inner dimension is split."""

    id: int = 0
    split_k: int = 1
    mode: int = -1

    def __str__(self) -> str:
        return f"{self.id}" if self.split_k == 1 else f"{self.id}, split-k {self.split_k} mode {self.mode}"


class CuSparseLt:
    """cuSPARSELt on this GPU; weights have sides that are multiples of 128."""

    def version(self) -> str:
        return str(torch.backends.cusparselt.version())

    def compress(self, weight: Tensor) -> Tensor:
        """The vendor's own packing of a 2:4 weight, as one flat tensor."""
        return _vendor.compress(weight)

    def semi_structured(self, weight: Tensor) -> Tensor:
        """What ``torch.sparse`` offers its users: a weight that ``F.linear`` takes."""
        return to_sparse_semi_structured(weight)

    def tile(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """torch's pruning in both directions for training: the packed weight, and the dense weight it stands for."""
        sparse = SparseSemiStructuredTensorCUSPARSELT.prune_dense_static_sort(weight, "largest_abs_values_greedy")
        dense = torch._sparse_semi_structured_apply_dense(weight, sparse.compressed_swizzled_bitmask)
        return sparse, dense

    def linear(self, x: Tensor, packed: Tensor, bias: Tensor | None, rows: int, algorithm: Algorithm) -> Tensor:
        """``x @ W.T + bias`` from a packed weight of ``rows`` rows."""
        return _vendor.hardware_linear24(x, packed, bias, rows, UNKNOWN, *algorithm)

    def suggest(self, x: Tensor, packed: Tensor, bias: Tensor | None, rows: int) -> Algorithm | None:
        """The algorithm that the library's own search picks."""
        found = _vendor.suggest(x, packed, bias, rows, UNKNOWN)
        return found and Algorithm(*found)
