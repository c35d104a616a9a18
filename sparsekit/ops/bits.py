"""Masks as bits: each byte holds eight entries along the last dimension, the first one in the lowest bit."""

import torch
import torch.nn.functional as F
from torch import Tensor


def pack_bits(mask: Tensor) -> Tensor:
    """Packs a bool mask ``[..., cols]`` into uint8 ``[..., ceil(cols / 8)]``; bits past the last column are 0."""
    weights = 2 ** torch.arange(8, dtype=torch.uint8, device=mask.device)
    padded = F.pad(mask.to(torch.uint8), (0, -mask.shape[-1] % 8))
    return (padded.unflatten(-1, (padded.shape[-1] // 8, 8)) * weights).sum(-1, dtype=torch.uint8)


def nonzero(tensor: Tensor) -> Tensor:
    """Returns a bool mask of the entries of a float tensor that are neither 0.0 nor -0.0.

    Looks at the bits, because a thread that flushes denormals would compare them as equal to 0.
    """
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return tensor.detach().view(integer) & torch.iinfo(integer).max != 0


def unpack_bits(bits: Tensor, cols: int) -> Tensor:
    """Returns the bool mask ``[..., cols]`` that ``pack_bits`` packed."""
    shifts = torch.arange(8, dtype=torch.uint8, device=bits.device)
    return (bits.unsqueeze(-1) >> shifts & 1).flatten(-2)[..., :cols].to(torch.bool)
