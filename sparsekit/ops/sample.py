"""Random N:M masks, drawn from logits, and the step that makes masks of low loss more likely."""

import torch
from torch import Tensor

from ._counter_random import OTHER_STREAM, exp, gumbel, random_words
from ._define import check_ints, check_like, check_weight, define
from .bits import pack_bits, unpack_bits
from .nm import check_pattern

SMALLEST_LOGIT = -28  # below the largest of a group; an entry that far below is as good as never drawn


def nm_sample_reference(logits: Tensor, n: int, m: int, seed: int, offset: int) -> Tensor:
    full = logits.shape[-1] // m * m
    keys = _noisy(logits[..., :full].float().unflatten(-1, (full // m, m)), seed, offset)
    drawn = keys.sort(dim=-1, descending=True, stable=True).indices[..., :n]
    mask = torch.ones(logits.shape, dtype=torch.bool, device=logits.device)
    mask[..., :full] = torch.zeros_like(keys, dtype=torch.bool).scatter_(-1, drawn, True).flatten(-2)
    return pack_bits(mask)


def nm_policy_step_inplace_reference(
    logits: Tensor, bits: Tensor, advantage: Tensor, lr: float, n: int, m: int, seed: int, offset: int
) -> Tensor:
    full = logits.shape[-1] // m * m
    old = logits[..., :full].float().unflatten(-1, (full // m, m))
    kept = unpack_bits(bits, logits.shape[-1])[..., :full].unflatten(-1, (full // m, m))
    gradient = _score_of_two(old, kept) if n == 2 else _score_in_order(old, kept, n, seed, offset)
    new = old - advantage * advantage.new_tensor(lr) * gradient
    if logits.dtype == torch.bfloat16:
        words = random_words(old[..., 0].numel() * _counters(m), seed, offset + 1 ^ OTHER_STREAM, logits.device)
        new = _round_at_random(new, _per_entry(words, old.shape))
    logits[..., :full] = new.flatten(-2).to(logits.dtype)
    return nm_sample_reference(logits, n, m, seed, offset + 1)


def _counters(m: int) -> int:
    return (m + 3) // 4


def _per_entry(words: Tensor, shape: torch.Size) -> Tensor:
    """Gives every group as many counters as it has fours of entries, and every entry one of their words."""
    return words.view(*shape[:-1], 4 * _counters(shape[-1]))[..., : shape[-1]]


def _noisy(logits: Tensor, seed: int, offset: int) -> Tensor:
    """Adds Gumbel noise: the n largest of a group are n entries drawn by their softmax, without replacement."""
    words = random_words(logits[..., 0].numel() * _counters(logits.shape[-1]), seed, offset, logits.device)
    keys = logits + gumbel(_per_entry(words, logits.shape))
    return torch.where(keys == keys, keys, -torch.inf)


def _weights(logits: Tensor) -> Tensor:
    """Returns the softmax of each group times a factor."""
    largest = logits.amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).min)
    below = logits - largest
    return exp(torch.where(below >= SMALLEST_LOGIT, below, SMALLEST_LOGIT))


def _sum(parts: Tensor) -> Tensor:
    """Sums each group from its first entry to its last."""
    total = parts[..., 0]
    for i in range(1, parts.shape[-1]):
        total = total + parts[..., i]
    return total.unsqueeze(-1)


def _score_of_two(logits: Tensor, kept: Tensor) -> Tensor:
    """Returns the gradient of the log-probability that two entries were drawn, whichever was the first.

    If ``a`` was the first, the second was drawn from the others, whose weights sum to ``rest[a]``. ``a`` was the first
    with a probability that is proportional to ``1 / rest[a]``, so it is the other one's rest over both rests.
    """
    weights = _weights(logits)
    others = ~torch.eye(logits.shape[-1], dtype=torch.bool, device=logits.device)
    rest = torch.cat([_sum(torch.where(others[i], weights, 0)) for i in range(logits.shape[-1])], -1)
    of_kept = torch.where(kept, rest, 0)
    both = _sum(of_kept)
    other = torch.cat([_sum(torch.where(others[i], of_kept, 0)) for i in range(logits.shape[-1])], -1)
    after = torch.where(kept, other / (both * rest), 0)  # by the entry that was the first
    share = _sum(weights).reciprocal().expand_as(weights)
    for i in range(logits.shape[-1]):
        share = share + torch.where(others[i], after[..., i : i + 1], 0)
    return kept.float() - weights * share


def _score_in_order(logits: Tensor, kept: Tensor, n: int, seed: int, offset: int) -> Tensor:
    """Returns the gradient of the log-probability of the order in which the entries were drawn at ``offset``.

    Its mean over orders is the gradient for the set (Plackett-Luce); for one entry they are the same.
    """
    weights = _weights(logits)
    keys = _noisy(logits, seed, offset)
    before = torch.zeros_like(keys)
    for i in range(logits.shape[-1]):
        key = keys[..., i : i + 1]
        earlier = torch.arange(logits.shape[-1], device=keys.device) > i
        before = before + ((key > keys) | ((key == keys) & earlier)).float() * kept[..., i : i + 1]
    share = torch.zeros_like(weights)
    for turn in range(n):
        there = ~kept | (before >= turn)  # not drawn before this turn
        share = share + torch.where(there, _sum(torch.where(there, weights, 0)).reciprocal(), 0)
    return kept.float() - weights * share


def _round_at_random(x: Tensor, words: Tensor) -> Tensor:
    """Rounds float32 to a multiple of bfloat16's last place, up with the probability of what is cut off."""
    bits = x.view(torch.int32)
    finite = bits & 0x7F800000 != 0x7F800000
    bits = torch.where(finite, bits + (words & 0xFFFF).to(torch.int32), bits)
    return (bits & -0x10000).view(torch.float32)


def _sample_fake(logits: Tensor, n: int, m: int, seed: int, offset: int) -> Tensor:
    return logits.new_empty((*logits.shape[:-1], (logits.shape[-1] + 7) // 8), dtype=torch.uint8)


_nm_sample = define(nm_sample_reference, _sample_fake)
_nm_policy_step_ = define(
    nm_policy_step_inplace_reference,
    lambda logits, bits, advantage, lr, n, m, seed, offset: torch.empty_like(bits),
    mutates=("logits",),
)


@torch.no_grad()
def nm_sample(logits: Tensor, n: int, m: int, *, seed: int, offset: int = 0) -> Tensor:
    """Draws ``n`` of every ``m`` consecutive entries without replacement, with the probabilities of their softmax.

    The first entry of a group is drawn from the softmax of its logits, each next one from that of the entries that are
    left (Plackett-Luce), by the largest logits after Gumbel noise. The noise of an entry depends on ``seed``,
    ``offset`` and its position alone (Philox4x32-10), so the same arguments give the same mask on every device and in
    every process, and a mask is drawn again rather than stored. A tail shorter than ``m`` is kept.

    Args:
        logits: ``[..., cols]``, float32 or bfloat16, any strides; -Inf or NaN is drawn only where nothing else is left.
        n: entries drawn from each group.
        m: group size; ``0 < n <= m <= 32``.
        seed: chooses the random numbers; any integer of 64 bits, from -2^63 to 2^63 - 1.
        offset: the number of the draw, from 0 to 2^63 - 2; the draws of one seed take one after the other.

    Returns:
        The mask as bits, as ``nm_mask_bits`` returns it: uint8 ``[..., ceil(cols / 8)]``.

    Raises:
        TypeError: ``logits`` is not one of the dtypes above, or a number is not an integer.
        ValueError: ``logits`` is a scalar, or not ``0 < n <= m <= 32``, or ``seed`` or ``offset`` is out of range.
    """
    _check(logits, n, m, seed, offset)
    return _nm_sample(logits, n, m, seed, offset)


@torch.no_grad()
def nm_policy_step_(
    logits: Tensor,
    bits: Tensor,
    advantage: Tensor | float,
    lr: float,
    n: int,
    m: int,
    *,
    seed: int,
    offset: int = 0,
) -> Tensor:
    """Makes the mask that was drawn less likely, or more if ``advantage`` is negative, and draws the next one.

    Subtracts ``lr * advantage`` times the gradient of the mask's log-probability (REINFORCE). With a loss in which the
    mask was used, less a baseline, as ``advantage``, that lowers the expected loss without back-propagation, as in
    MaskPro (https://arxiv.org/abs/2506.12876). Of up to two entries the probability is that of the set, in whatever
    order they were drawn; of more it is that of their order, whose gradient has the same mean and needs n * m
    operations in place of n!. A gradient sums to zero over its group. bfloat16 logits are rounded at random, up as
    often as what is cut off asks for, so that steps smaller than their last place are not lost.

    Logits are read and written once. Both results are the same, bit for bit, on every device.

    Args:
        logits: ``[..., cols]``, float32 or bfloat16, any strides without overlap; changed in place. One that is more
            than 28 below the largest of its group counts as 28 below.
        bits: the mask, as ``nm_sample`` returned it for ``logits`` and the same ``n``, ``m``, ``seed`` and ``offset``;
            any other mask with n entries of every group is taken as drawn too.
        advantage: one number, or a float32 tensor of no dimensions on the device of ``logits``, which is not waited
            for.
        lr: the learning rate.
        n, m: the pattern; ``0 < n <= m <= 32``.
        seed, offset: those of the mask; the next one has the same seed and ``offset + 1``.

    Returns:
        The next mask, as ``nm_sample`` returns it for the new logits, ``seed`` and ``offset + 1``.

    Raises:
        TypeError, ValueError: as ``nm_sample``, and where ``bits`` or ``advantage`` is of another dtype, shape or
            device.
    """
    _check(logits, n, m, seed, offset)
    check_like("bits", bits, torch.uint8, (*logits.shape[:-1], (logits.shape[-1] + 7) // 8), logits)
    if not isinstance(advantage, Tensor):
        advantage = torch.full((), advantage, dtype=torch.float32, device=logits.device)
    check_like("advantage", advantage, torch.float32, (), logits)
    return _nm_policy_step_(logits, bits, advantage, lr, n, m, seed, offset)


def _check(logits: Tensor, n: int, m: int, seed: int, offset: int) -> None:
    check_weight("logits", logits)
    if logits.dtype == torch.float16:
        raise TypeError("logits must be float32 or bfloat16, got torch.float16")
    check_pattern(n, m)
    check_ints(seed=seed, offset=offset)
    if not -(2**63) <= seed < 2**63:
        raise ValueError(f"seed must be an integer of 64 bits, from -2^63 to 2^63 - 1, got {seed}")
    if not 0 <= offset < 2**63 - 1:  # the next one has 64 bits too, and the rounding has the negative ones
        raise ValueError(f"offset must be from 0 to 2^63 - 2, got {offset}")
