"""GPU kernels, imported as ``sparsekit.triton_kernels``; leaves that import torch and triton only."""
