"""The vendor's sparse matrix product, through what torch exposes of it."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.sparse import SparseSemiStructuredTensorCUSPARSELT, to_sparse_semi_structured

FEWEST = 8  # tokens; fewer are padded, as torch does
ALGORITHMS = 64  # tried where the library does not say how many it has
SPLITS = (2, 4, 8)
ONE_KERNEL, TWO_KERNELS = 1, 2


@dataclass(frozen=True)
class Algorithm:
    """A choice of cuSPARSELt: its algorithm, and into how many parts, reduced how, the inner dimension is split."""

    id: int = 0
    split_k: int = 1
    mode: int = -1

    def __str__(self) -> str:
        return f"{self.id}" if self.split_k == 1 else f"{self.id}, split-k {self.split_k} mode {self.mode}"


class CuSparseLt:
    """cuSPARSELt on this GPU."""

    def version(self) -> str:
        return str(torch.backends.cusparselt.version())

    def compress(self, weight: Tensor) -> Tensor:
        """The vendor's own packing of a 2:4 weight, as one flat tensor."""
        return torch._cslt_compress(weight).flatten()

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
        out = torch._cslt_sparse_mm(
            packed.view(rows, -1), _padded(x).t(), bias=bias, transpose_result=True, **self._arguments(algorithm)
        )
        return out[: x.shape[0]]

    def _arguments(self, algorithm: Algorithm) -> dict[str, Any]:
        if algorithm.split_k == 1:
            return {"alg_id": algorithm.id}
        known = {argument.name for argument in torch.ops.aten._cslt_sparse_mm.default._schema.arguments}
        if "split_k_mode" in known:
            mode: dict[str, Any] = {"split_k_mode": algorithm.mode}
        else:  # older releases of torch
            mode = {"split_k_one_kernel": algorithm.mode == ONE_KERNEL}
        return {"alg_id": algorithm.id, "split_k": algorithm.split_k, **mode}

    def offers(self, x: Tensor, packed: Tensor, bias: Tensor | None, rows: int) -> tuple[list[Algorithm], Algorithm]:
        """All algorithms for a product, without splitting, and the one that the library's own search picks."""
        id_, split_k, mode, *highest = torch._C._cusparselt.mm_search(
            packed.view(rows, -1), _padded(x).t(), bias, None, None, True
        )
        if isinstance(mode, bool):  # whether one kernel reduces the parts, in older releases of torch
            mode = ONE_KERNEL if mode else TWO_KERNELS
        own = Algorithm(int(id_)) if split_k == 1 else Algorithm(int(id_), int(split_k), int(mode))
        count = min(int(highest[0]), ALGORITHMS) if highest else ALGORITHMS
        return [Algorithm(index) for index in range(max(count, 0) + 1)], own


def _padded(x: Tensor) -> Tensor:
    """More rows, where there are too few; a padding of nothing would copy."""
    missing = -x.shape[0] % FEWEST
    return F.pad(x, (0, 0, 0, missing)) if missing else x
