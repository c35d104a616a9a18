"""Check 4: cuSPARSELt's best large product, for ncu to look at: `ncu ... python -m bench.gpu.profile FOLDER`."""

import sys
from pathlib import Path

import torch

from sparsekit.ops import _vendor
from sparsekit.ops.hardware_linear24 import UNKNOWN

from .lab import gpu_lab
from .products import layers24
from .rows import read

SHAPE, TOKENS = (4096, 4096), 4096


def main(folder: Path) -> None:
    """Multiplies twice, the second time under the profiler, by the best algorithm that the search found."""
    lab = gpu_lab(None)
    found = [row["algorithm"] for row in read(folder / "search.jsonl") if row.get("tokens") == TOKENS]
    layer, x = layers24(lab, SHAPE)[0], lab.randn(TOKENS, SHAPE[1])
    packed, algorithm = _vendor.compress(layer.dense), (*found, (0, 1, -1))[0]
    for profiled in (False, True):
        if profiled:
            torch.cuda.profiler.start()
        _vendor.hardware_linear24(x, packed, layer.bias, SHAPE[0], UNKNOWN, *algorithm)
        torch.cuda.synchronize()
    torch.cuda.profiler.stop()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
