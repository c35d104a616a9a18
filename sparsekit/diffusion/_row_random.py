"""Random numbers of rows of tokens, which depend on nothing but the row's own seed."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..ops._counter_random import halves, philox


def row_seeds(seeds: Sequence[int], device: torch.device) -> Tensor:
    """Returns seeds as int64 ``[rows]``.

    Raises:
        ValueError: a seed does not fit.
    """
    if wrong := [seed for seed in seeds if not 0 <= seed < 1 << 63]:
        raise ValueError(f"seeds must be integers from 0 to 2^63 - 1, got {wrong[0]}")
    return torch.tensor([*seeds], dtype=torch.int64, device=device)


def row_uniforms(seeds: Tensor, length: int, streams: int | Tensor = 0) -> Tensor:
    """Returns two uniform numbers for each position of each row, within 0 and 1, float64 ``[rows, length, 2]``.

    Args:
        seeds: int64 ``[rows]``.
        length: the number of positions.
        streams: int64 ``[rows]`` or one for all: numbers of different streams are independent.
    """
    position = torch.arange(length, dtype=torch.int64, device=seeds.device)[None]
    stream = torch.as_tensor(streams, dtype=torch.int64, device=seeds.device).reshape(-1, 1)
    counter = [position, torch.zeros_like(position), *halves(stream)]
    words = philox(counter, seeds[:, None]).unflatten(-1, (2, 2))
    whole = ((words[..., 0] >> 6) << 26) + (words[..., 1] >> 6)  # 52 bits, so that half a unit more is exact
    return (whole.double() + 0.5) * 2.0**-52
