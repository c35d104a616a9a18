"""A GPU with its libraries, acted on the CPU: they pack, check and multiply as cuSPARSELt and CUTLASS do."""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsekit.ops import pack24
from sparsekit.ops.hardware24 import MULTIPLES, from_hardware24_reference, to_hardware24_reference
from sparsekit.ops.sparse24 import unpack24_reference

OWN_ORDER = "own order"  # of metadata, that no closed form describes
OWN_VALUES = "own values"


@dataclass
class Vendor:
    """What the libraries of one GPU do.

    Args:
        layout: the layout that cuSPARSELt's compressor writes, or one of the above.
        algorithms: how many algorithms it has; others are refused.
        wrong: the algorithms that multiply wrongly.
        calls: what was multiplied: ``(tokens, alg_id, split_k, split_k_mode)``.
    """

    layout: str = "cusparselt_sm90"
    algorithms: int = 4
    wrong: tuple[int, ...] = ()
    calls: list[tuple[int, int, int, int]] = field(default_factory=list)

    def compress(self, dense: Tensor) -> Tensor:
        assert dense.is_contiguous() and dense.dtype in (torch.float16, torch.bfloat16)
        rows, cols = dense.shape
        values, bitmask, _ = pack24(dense, check=True)
        if self.layout == OWN_VALUES:
            values = values.flip(1)
        packed = to_hardware24_reference(values, bitmask, cols, self._known)
        if self.layout == OWN_ORDER:
            packed[values.numel() :] = packed[values.numel() :].flip(0)
        return packed.view(rows, -1)

    @property
    def _known(self) -> str:
        return "cusparselt_sm80" if self.layout in (OWN_ORDER, OWN_VALUES) else self.layout

    def _dense(self, packed: Tensor, rows: int, cols: int) -> Tensor:
        packed = packed.clone()
        if self.layout == OWN_ORDER:
            packed[rows * cols // 2 :] = packed[rows * cols // 2 :].flip(0)
        return unpack24_reference(*from_hardware24_reference(packed, rows, cols, self._known), cols)

    def sparse_mm(
        self, compressed, dense, bias=None, alpha=None, out_dtype=None, transpose_result=False,
        alg_id=0, split_k=1, split_k_mode=-1,
    ):  # fmt: skip
        (rows, width), (cols, tokens) = compressed.shape, dense.shape
        if not 0 <= alg_id < self.algorithms or (split_k > 1 and split_k_mode not in (1, 2)):
            raise RuntimeError("CUDA error: invalid value when calling `cusparseLtMatmulAlgSetAttribute(...)`")
        assert width * 16 == cols * 9 and tokens % 8 == 0 and compressed.is_contiguous()
        assert compressed.dtype == dense.dtype and (bias is None or (bias.dtype == dense.dtype and len(bias) == rows))
        assert all(tensor.data_ptr() % 16 == 0 for tensor in (compressed, dense, bias) if tensor is not None)
        assert dense.is_contiguous() or dense.t().is_contiguous()
        self.calls.append((tokens, alg_id, split_k, split_k_mode))
        y = self._dense(compressed.flatten(), rows, cols).float() @ dense.float()
        y = y if bias is None else y + bias.float().unsqueeze(1)
        y = (y * (1.5 if alg_id in self.wrong else 1)).to(dense.dtype)
        return y.t().contiguous() if transpose_result else y

    def cutlass_mm(self, values, meta, dense):
        return self.cutlass_addmm(values.new_zeros(len(values)), values, meta, dense)

    def cutlass_addmm(self, bias, values, meta, dense):
        rows, cols = len(values), 2 * values.shape[1]
        assert meta.dtype == torch.int16 and meta.shape == (rows, cols // 16)
        assert dense.shape[0] == cols and dense.shape[1] % 8 == 0
        packed = torch.cat([values.flatten(), meta.flatten().view(values.dtype)])
        weight = unpack24_reference(*from_hardware24_reference(packed, rows, cols, "cutlass_sm80"), cols)
        self.calls.append((dense.shape[1], -1, 1, -1))
        return (weight.float() @ dense.float() + bias.float().unsqueeze(1)).to(dense.dtype)


class PaddingVendor(Vendor):
    """Pads the rows of a weight to what the layout needs; the padding has metadata, but no values."""

    def compress(self, dense: Tensor) -> Tensor:
        padded = F.pad(dense, (0, 0, 0, -len(dense) % MULTIPLES[self.layout][0]))
        packed = super().compress(padded).flatten()
        return torch.cat([packed[: dense.numel() // 2], packed[padded.numel() // 2 :]])


def install(monkeypatch, vendor: Vendor, capability: tuple[int, int] = (9, 0)) -> Vendor:
    """Makes the CPU that GPU, for everything that asks."""
    from sparsekit import _timing
    from sparsekit.nn import routed, routed24
    from sparsekit.ops import _vendor, layouts

    monkeypatch.setattr(layouts, "_found", {})  # of this GPU, and forgotten with it
    monkeypatch.setattr(layouts, "_capability", lambda device: capability)
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: True)
    monkeypatch.setattr(torch, "_cslt_compress", vendor.compress)
    monkeypatch.setattr(torch, "_cslt_sparse_mm", vendor.sparse_mm)
    monkeypatch.setattr(torch, "_sparse_semi_structured_mm", vendor.cutlass_mm)
    monkeypatch.setattr(torch, "_sparse_semi_structured_addmm", vendor.cutlass_addmm)
    monkeypatch.setattr(_timing, "is_gpu", lambda device: True)
    monkeypatch.setattr(routed, "prepack", lambda weight, tokens: weight)  # as it returns weights on a GPU
    monkeypatch.setattr(routed24, "HARDWARE", _vendor.hardware_linear24)
    return vendor
