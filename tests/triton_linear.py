"""What the tests of the Triton linear layers share."""

import torch

KERNELS = (torch.float32, torch.bfloat16)  # a dtype of each kernel
NAN = float("nan")


def random(gpu, *shape, dtype):
    return torch.randn(shape).to(dtype).to(gpu)


def record_grids(monkeypatch, module, kernel):
    """Returns a list that gets the grid of each launch of a kernel of this module."""
    grids, launched = [], getattr(module, kernel)

    class Recorder:
        def __getitem__(self, grid):
            grids.append(grid)
            return launched[grid]

    monkeypatch.setattr(module, kernel, Recorder())
    return grids
