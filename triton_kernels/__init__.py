"""GPU kernels in Triton, imported as ``sparsekit.triton_kernels``; they import torch and triton only."""
