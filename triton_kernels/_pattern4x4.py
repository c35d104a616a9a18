"""Search for the best pattern of 4x4 tiles that is 2:4 along rows and along columns.

Once the kept columns of rows 0 and 1 are chosen, there are one, two or six ways to complete the pattern with rows 2 and
3. Rounding never reverses the order of two sums, so the best total comes from the best completion, and 36 totals are
compared instead of 90. Ties are settled afterwards, row by row. The cost is in comparisons, maxima and selections: a
GPU adds at twice their rate.
"""

import triton
import triton.language as tl

from ._select import widen

# The pairs of columns that a row can keep, as bits, in the order of the patterns; 5 - i is the complement of pair i.
PAIRS = tl.constexpr((0b0011, 0b0101, 0b1001, 0b0110, 0b1010, 0b1100))


def _completion(top: int, bottom: int) -> tuple[int, int]:
    """Returns the pairs of rows 2 and 3 in the first pattern whose rows 0 and 1 keep ``top`` and ``bottom``.

    Where there is a second such pattern, it has the two pairs exchanged.
    """
    once, twice = top ^ bottom, 15 & ~(top | bottom)
    first = twice | once & -once
    return PAIRS.value.index(first), PAIRS.value.index(first ^ once)


# Indexed by the pairs of rows 0 and 1. Empty where these are complements: any complementary pairs then complete them.
COMPLETIONS = tl.constexpr(
    tuple(() if top ^ bottom == 15 else _completion(top, bottom) for top in PAIRS.value for bottom in PAIRS.value)
)


@triton.jit
def magnitudes(x):
    """Returns the magnitudes in fp32, with Inf for NaN."""
    bits = widen(x).to(tl.int32, bitcast=True) & 0x7FFFFFFF
    return tl.minimum(bits, 0x7F800000).to(tl.float32, bitcast=True)


@triton.jit
def _pair_sums(row):
    """Returns the sums of the six pairs of columns of a row."""
    return row[0] + row[1], row[0] + row[2], row[0] + row[3], row[1] + row[2], row[1] + row[3], row[2] + row[3]


@triton.jit
def _kept_sum(row, kept):
    """Returns the sum of the columns whose bit is set in ``kept``: exactly that of ``_pair_sums``, plus zeros."""
    low = tl.where(kept & 1 != 0, row[0], 0.0) + tl.where(kept & 2 != 0, row[1], 0.0)
    return low + tl.where(kept & 4 != 0, row[2], 0.0) + tl.where(kept & 8 != 0, row[3], 0.0)


@triton.jit
def _completed(sums2, sums3, FIRST: tl.constexpr, SECOND: tl.constexpr):
    """Returns the larger sum of rows 2 and 3 where one keeps pair ``FIRST`` and the other pair ``SECOND``."""
    total = sums2[FIRST] + sums3[SECOND]
    if FIRST != SECOND:
        total = tl.maximum(total, sums2[SECOND] + sums3[FIRST])
    return total


@triton.jit
def _bits(total):
    """Returns the bits of sums, which order like the sums as none is negative; some GPUs compare three at a time."""
    return total.to(tl.int32, bitcast=True)


@triton.jit
def best_pattern(row0, row1, row2, row3):
    """Returns the best pattern of each tile as 16 bits, row 0 in the lowest four; the first of equally good ones.

    Each row is given as the ``magnitudes`` of its four columns, tensors of one shape.
    """
    sums0, sums1, sums2, sums3 = _pair_sums(row0), _pair_sums(row1), _pair_sums(row2), _pair_sums(row3)
    any_pairs = sums2[0] + sums3[5]
    for pair in tl.static_range(1, 6):
        any_pairs = tl.maximum(any_pairs, sums2[pair] + sums3[5 - pair])

    best = tl.full(row0[0].shape, -1, tl.int32)
    kept0 = tl.zeros(row0[0].shape, tl.int32)
    sum0 = sums0[0]
    of_row1 = (best, best, best, best, best, best)  # for the best pair of row 0 so far: the totals by pair of row 1
    for top in tl.static_range(6):
        totals = ()
        for pair in tl.static_range(6):
            if top + pair == 5:
                below = any_pairs
            else:
                below = _completed(sums2, sums3, COMPLETIONS[6 * top + pair][0], COMPLETIONS[6 * top + pair][1])
            totals += (_bits((sums0[top] + sums1[pair]) + below),)
        highest = tl.maximum(tl.maximum(totals[0], totals[1]), totals[2])
        highest = tl.maximum(tl.maximum(highest, totals[3]), tl.maximum(totals[4], totals[5]))
        better = highest > best
        best = tl.maximum(highest, best)
        kept0 = tl.where(better, PAIRS[top], kept0)
        sum0 = tl.where(better, sums0[top], sum0)
        before = of_row1
        of_row1 = ()
        for pair in tl.static_range(6):
            of_row1 += (tl.where(better, totals[pair], before[pair]),)

    kept1 = tl.full(best.shape, PAIRS[5], tl.int32)
    sum1 = sums1[5]
    for i in tl.static_range(1, 6):
        found = of_row1[5 - i] == best
        kept1 = tl.where(found, PAIRS[5 - i], kept1)
        sum1 = tl.where(found, sums1[5 - i], sum1)

    above = sum0 + sum1
    once = kept0 ^ kept1  # the columns that rows 2 and 3 keep once
    kept2 = ((kept0 | kept1) ^ 15) | (once & -once)
    total = above + (_kept_sum(row2, kept2) + _kept_sum(row3, kept2 ^ once))
    kept2 = tl.where(_bits(total) == best, kept2, kept2 ^ once)
    any_kept2 = tl.full(best.shape, PAIRS[5], tl.int32)
    for i in tl.static_range(1, 6):
        found = _bits(above + (sums2[5 - i] + sums3[i])) == best
        any_kept2 = tl.where(found, PAIRS[5 - i], any_kept2)
    kept2 = tl.where(once == 15, any_kept2, kept2)
    return kept0 | kept1 << 4 | kept2 << 8 | (kept2 ^ once) << 12
