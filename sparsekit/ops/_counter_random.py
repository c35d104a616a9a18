"""Random numbers by counter, and the exp and log that go with them: the same bits on every device.

Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011) maps a counter of four words and a
key of two to four random words. exp and log are polynomials of float32 products and sums, each rounded once, because
PyTorch's own differ by device in the last place.
"""

from typing import Any

import torch
from torch import Tensor

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
WORD = 0xFFFFFFFF
OTHER_STREAM = 1 << 63  # of an offset: numbers that are independent of those without it

LOG_COEFFICIENTS = (  # of (log(1 + f) - f) / f^2 for f from -1/4 to 1/2, the highest power first
    "-0x1.8deffcp-5", "0x1.b842ecp-4", "-0x1.0d344ep-3", "0x1.27757cp-3", "-0x1.54e0f2p-3", "0x1.9979aap-3",
    "-0x1.0000a4p-2", "0x1.55557ep-2", "-0x1p-1",
)  # fmt: skip
EXP_COEFFICIENTS = (  # of (exp(r) - 1) / r for r from -log(2) / 2 to log(2) / 2, the highest power first
    "0x1.6d7536p-10", "0x1.123d86p-7", "0x1.5554acp-5", "0x1.55547cp-3", "0x1p-1", "0x1p+0",
)  # fmt: skip
LOG2_HIGH, LOG2_LOW = float.fromhex("0x1.62e4p-1"), float.fromhex("0x1.7f7d1cp-20")
ROUNDING = 1.5 * 2**23  # added and subtracted, it rounds a small float32 to an integer


def random_words(count: int, seed: int, offset: int, device: torch.device) -> Tensor:
    """Returns random words of 32 bits: four for each counter from 0 to ``count - 1``, as int64 ``[count, 4]``."""
    counter = torch.arange(count, device=device, dtype=torch.int64)
    return philox([counter & WORD, counter >> 32, *(torch.full_like(counter, part) for part in halves(offset))], seed)


def philox(counter: list[Tensor], seed: int | Tensor) -> Tensor:
    """Returns four random words of 32 bits for each counter, as int64 ``[..., 4]``.

    Args:
        counter: its four words, int64, of shapes that broadcast.
        seed: 64 bits; a tensor has one for each counter, and broadcasts too.
    """
    words, key = [*torch.broadcast_tensors(*counter)], halves(seed)
    for _ in range(10):
        (high0, low0), (high1, low1) = _multiply(words[0], MULTIPLIERS[0]), _multiply(words[2], MULTIPLIERS[1])
        words = [high1 ^ words[1] ^ key[0], low1, high0 ^ words[3] ^ key[1], low0]
        key = ((key[0] + KEY_STEPS[0]) & WORD, (key[1] + KEY_STEPS[1]) & WORD)
    return torch.stack(words, -1)


def halves(number: Any) -> tuple[Any, Any]:
    """Returns the lower and the upper 32 bits of an integer of 64, or of each in a tensor."""
    return number & WORD, number >> 32 & WORD


def _multiply(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """Returns the upper and the lower word of a product of words, by products that fit into 63 bits."""
    upper, lower = a * (b >> 16), a * (b & 0xFFFF)
    return (upper + (lower >> 16)) >> 16, ((upper << 16) + lower) & WORD


def gumbel(words: Tensor) -> Tensor:
    """Returns ``-log(-log(u))`` in float32, ``u`` being the upper 23 bits of each word and one half, over 2^23."""
    uniform = ((words >> 9) * 2 + 1).to(torch.float32) * 2**-24
    return -log(-log(uniform))


def log(x: Tensor) -> Tensor:
    """Returns the logarithm of normal positive float32 numbers, within 2e-7 of it or of 1, whichever is larger."""
    bits = x.view(torch.int32)
    exponent = (bits - 0x3F400000) >> 23  # so that what is left is from 3/4 to 3/2
    f = (bits - (exponent << 23)).view(torch.float32) - 1
    power = exponent.to(torch.float32)
    return power * LOG2_HIGH + (f + (f * f * _polynomial(f, LOG_COEFFICIENTS) + power * LOG2_LOW))


def exp(x: Tensor) -> Tensor:
    """Returns the exponential of float32 numbers from -80 to 80, within 2e-7 of it, relatively."""
    power = x * float.fromhex("0x1.715476p+0") + ROUNDING - ROUNDING
    r = x - power * LOG2_HIGH - power * LOG2_LOW
    factor = ((power.to(torch.int32) + 127) << 23).view(torch.float32)
    return (1 + r * _polynomial(r, EXP_COEFFICIENTS)) * factor


def _polynomial(x: Tensor, coefficients: tuple[str, ...]) -> Tensor:
    value = torch.full_like(x, float.fromhex(coefficients[0]))
    for each in coefficients[1:]:
        value = value * x + float.fromhex(each)
    return value
