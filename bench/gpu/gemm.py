"""One 2:4 product for a profiler to look at: `python -m bench.gpu.gemm ROWS COLS TOKENS ID SPLIT MODE`."""

import sys

import torch

from .lab import gpu_lab
from .linear import layers
from .vendor import Algorithm


def main(rows: int, cols: int, tokens: int, *algorithm: int) -> None:
    lab = gpu_lab()
    layer, x = layers(lab, (rows, cols))[0], lab.randn(tokens, cols)
    packed, chosen = lab.vendor.compress(layer.dense), Algorithm(*algorithm)
    lab.vendor.linear(x, packed, layer.bias, rows, chosen)
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    lab.vendor.linear(x, packed, layer.bias, rows, chosen)
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
