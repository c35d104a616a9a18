from itertools import combinations, permutations

import pytest
import torch
from helpers import LAYOUTS, dtype_id, opcheck, pattern_id, poison, shape_id

import sparsekit as sk
from sparsekit.ops import _counter_random, unpack_bits
from sparsekit.ops.bits import pack_bits
from sparsekit.ops.sample import nm_policy_step_inplace_reference, nm_sample_reference

INF, NAN = float("inf"), float("nan")
OPS = torch.ops.sparsekit
PATTERNS = [(2, 4), (1, 4), (3, 4), (4, 4), (1, 1), (2, 2), (2, 7), (4, 8), (8, 16), (17, 32)]
SHAPES = [(0,), (3,), (4,), (37,), (3, 0), (0, 8), (1, 1), (7, 33), (2, 3, 12), (2, 2048 + 40)]
DTYPES = [torch.float32, torch.bfloat16]


def hostile_logits(shape, dtype):
    logits = (3 * torch.randn(shape)).to(dtype)
    special = torch.tensor([INF, -INF, NAN, 0.0, -0.0, 3e38, -3e38, 1e-42], dtype=dtype)
    return torch.where(torch.rand(shape) < 0.05, special[torch.randint(len(special), shape)], logits)


def assert_same_bits(got, expected):
    """All NaNs count as equal."""
    integer = torch.int32 if got.dtype == torch.float32 else torch.int16
    both_nan = got.isnan() & expected.isnan()
    assert torch.equal(torch.where(both_nan, 0, got.view(integer)), torch.where(both_nan, 0, expected.view(integer)))


def log_probability(logits, kept):
    """Of a set of entries, over all orders in which they can be drawn."""
    p, total = logits.softmax(0), 0.0
    for order in permutations(kept):
        once, left = 1.0, 1.0
        for entry in order:
            once, left = once * p[entry] / left, left - p[entry]
        total = total + once
    return total.log()


def gradient(logits, kept):
    logits = logits.double().requires_grad_()
    return torch.autograd.grad(log_probability(logits, kept), logits)[0]


def test_random_words_are_philox():
    """The known answers of Random123 for Philox4x32-10."""
    words = _counter_random.random_words(1, 0, 0, torch.device("cpu"))
    assert words.tolist() == [[0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]]


def test_exp_and_log():
    x = torch.linspace(-28, 0, 100_001)
    assert torch.allclose(_counter_random.exp(x).double(), x.double().exp(), rtol=2e-7, atol=0)
    x = torch.cat([torch.linspace(1e-7, 17, 100_001), 1 - torch.arange(1, 99) * 2**-24])
    expected = x.double().log()
    assert ((_counter_random.log(x).double() - expected).abs() <= 2e-7 * expected.abs().clamp(min=0.01)).all()


def test_literal(simd):
    logits = torch.tensor([[5.0, -INF, 0.0, -INF, 0.0, 0.0, 0.0, 0.0, 7.0, 7.0]])
    bits = [sk.nm_sample(logits, 2, 4, seed=3, offset=offset).tolist()[0] for offset in range(3)]
    assert [byte & 15 for byte, _ in bits] == [0b0101] * 3  # the only entries that can be drawn
    assert [byte for _, byte in bits] == [0b11] * 3  # the tail
    assert [byte >> 4 for byte, _ in bits] == [0b1010, 0b0011, 0b0110]


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("pattern", PATTERNS, ids=pattern_id)
@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
def test_every_level_equals_reference(simd, dtype, pattern, shape):
    logits, advantage = hostile_logits(shape, dtype), torch.tensor(-0.7)
    expected = nm_sample_reference(logits, *pattern, -5, 2**40)
    poison(expected)
    bits = sk.nm_sample(logits, *pattern, seed=-5, offset=2**40)
    assert torch.equal(bits, expected)
    stepped, reference = logits.clone(), logits.clone()
    after = nm_policy_step_inplace_reference(reference, expected, advantage, 0.3, *pattern, -5, 2**40)
    poison(after)
    assert torch.equal(sk.nm_policy_step_(stepped, bits, advantage, 0.3, *pattern, seed=-5, offset=2**40), after)
    assert_same_bits(stepped, reference)


@pytest.mark.parametrize("seed", [-(2**63), 2**63 - 1])
def test_the_ends_of_the_ranges(simd, seed):
    logits, last = torch.randn(5, 20, dtype=torch.bfloat16), 2**63 - 2
    bits, reference = sk.nm_sample(logits, 2, 4, seed=seed, offset=last), logits.clone()
    assert torch.equal(bits, nm_sample_reference(logits, 2, 4, seed, last))
    after = nm_policy_step_inplace_reference(reference, bits, torch.tensor(0.5), 0.3, 2, 4, seed, last)
    assert torch.equal(sk.nm_policy_step_(logits, bits, 0.5, 0.3, 2, 4, seed=seed, offset=last), after)
    assert_same_bits(logits, reference)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_any_strides(simd, layout):
    base = torch.randn(24, 40)
    bits = sk.nm_sample(base, 2, 4, seed=1)
    expected = base.clone()
    after = sk.nm_policy_step_(expected, bits, 2.0, 0.5, 2, 4, seed=1)
    logits = layout(base)
    assert torch.equal(sk.nm_sample(logits, 2, 4, seed=1), bits)
    assert torch.equal(sk.nm_policy_step_(logits, bits, 2.0, 0.5, 2, 4, seed=1), after)
    assert torch.equal(logits, expected)


def test_the_same_for_any_number_of_threads(simd):
    logits = torch.randn(3, 40_000)
    one, two = logits.clone(), logits.clone()
    bits = sk.nm_sample(logits, 2, 4, seed=1)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        first = sk.nm_policy_step_(one, bits, 1.0, 0.1, 2, 4, seed=1)
        torch.set_num_threads(2)
        second = sk.nm_policy_step_(two, bits, 1.0, 0.1, 2, 4, seed=1)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(first, second)
    assert torch.equal(one, two)


def test_inclusion_frequencies():
    logits = torch.tensor([1, 0.3, -0.5, 0]).repeat(200_000, 1)
    mask = unpack_bits(sk.nm_sample(logits, 2, 4, seed=0), 4)
    assert (mask.sum(-1) == 2).all()
    expected = torch.tensor([0.7887, 0.5355, 0.2610, 0.4148])
    assert torch.allclose(mask.float().mean(0), expected, atol=3e-3)


@pytest.mark.parametrize("pattern", [(1, 4), (3, 4), (4, 8)], ids=pattern_id)
def test_frequencies_of_sets(pattern):
    n, m = pattern
    logits = torch.randn(m)
    mask = unpack_bits(sk.nm_sample(logits.repeat(100_000, 1), n, m, seed=1), m)
    for kept in list(combinations(range(m), n))[:5]:
        chance = log_probability(logits.double(), kept).exp()
        share = mask[:, list(kept)].all(-1).double().mean()
        assert abs(share - chance) < 4 * (chance * (1 - chance) / 100_000).sqrt() + 1e-5


def test_draws_are_independent():
    """Of neighbors, of offsets and of seeds: no pair of draws agrees more often than chance has it."""
    flat = torch.zeros(400_000)
    draws = {key: sk.nm_sample(flat, 2, 4, seed=key[0], offset=key[1]) for key in ((0, 0), (0, 1), (1, 0), (2**32, 0))}
    nibbles = [torch.stack([bits & 15, bits >> 4], -1).flatten() for bits in draws.values()]
    pairs = [*combinations(nibbles, 2), *((each[1:], each[:-1]) for each in nibbles)]
    for one, other in pairs:
        assert abs((one == other).double().mean() - 1 / 6) < 5 * (5 / 36 / 100_000) ** 0.5


@pytest.mark.parametrize("m", [2, 3, 4, 8])
@pytest.mark.parametrize("n", [1, 2])
def test_gradient_of_every_set(simd, n, m):
    """A step is the gradient of the set's log-probability."""
    logits = 2 * torch.randn(m)
    for kept in combinations(range(m), n):
        mask = torch.zeros(m, dtype=torch.bool)
        mask[list(kept)] = True
        stepped = logits.clone()
        sk.nm_policy_step_(stepped, pack_bits(mask), -1.0, 0.5, n, m, seed=0)
        expected = logits + 0.5 * gradient(logits, kept).float()
        assert torch.allclose(stepped, expected, atol=2e-6)


@pytest.mark.parametrize("pattern", [(3, 4), (4, 8)], ids=pattern_id)
def test_gradient_in_order_has_the_mean_of_the_set(pattern):
    n, m = pattern
    logits = torch.randn(m)
    many = logits.repeat(200_000, 1)
    bits = sk.nm_sample(many, n, m, seed=2)
    sk.nm_policy_step_(many, bits, -1.0, 1.0, n, m, seed=2)
    mask, steps = unpack_bits(bits, m), many - logits
    counts = {kept: mask[:, list(kept)].all(-1) for kept in combinations(range(m), n)}
    for kept, drawn in sorted(counts.items(), key=lambda each: -int(each[1].sum()))[:3]:
        error = steps[drawn].double().mean(0) - gradient(logits, kept)
        assert (error.abs() < 5 * steps[drawn].double().std(0) / drawn.sum() ** 0.5 + 1e-6).all()


@pytest.mark.parametrize("pattern", PATTERNS, ids=pattern_id)
def test_a_step_sums_to_zero(simd, pattern):
    n, m = pattern
    logits = 4 * torch.randn(500, m)
    before = logits.clone()
    sk.nm_policy_step_(logits, sk.nm_sample(logits, n, m, seed=4), 1.0, 1.0, n, m, seed=4)
    assert (logits - before).sum(-1).abs().max() < 1e-4


def test_unbiased_against_enumeration():
    """The mean step for a loss is its gradient by enumeration of all masks of three groups."""
    logits = torch.randn(3, 4)
    loss = torch.randn(12)
    sets = [set(kept) for kept in combinations(range(4), 2)]

    def value(mask):
        return (loss * mask).sum(-1) ** 2

    exact, wanted = logits.double().requires_grad_(), 0.0
    for a in sets:
        for b in sets:
            for c in sets:
                mask = torch.tensor([[i in kept for i in range(4)] for kept in (a, b, c)]).double().flatten()
                chance = sum(log_probability(exact[i], kept) for i, kept in enumerate((a, b, c))).exp()
                wanted = wanted + chance * value(mask)
    (expected,) = torch.autograd.grad(wanted, exact)
    samples = 40_000
    many = logits.repeat(samples, 1, 1).flatten(1)
    bits = sk.nm_sample(many, 2, 4, seed=9)
    steps = many.clone()
    sk.nm_policy_step_(steps, bits, -1.0, 1.0, 2, 4, seed=9)  # the gradients of the log-probabilities
    losses = value(unpack_bits(bits, 12).double())
    estimates = losses[:, None] * (steps - many).double()
    error = (estimates.mean(0) - expected.flatten()).abs()
    assert (error < 5 * estimates.std(0) / samples**0.5).all()


def test_learns_the_mask_of_least_loss(simd):
    target = torch.tensor([False, True, False, True]).repeat(16, 1)
    logits, offset = torch.zeros(16, 4), 0
    bits, tracker = sk.nm_sample(logits, 2, 4, seed=0), 0.0
    for offset in range(3000):
        loss = (unpack_bits(bits, 4) != target).float().mean()
        tracker = 0.9 * tracker + 0.1 * loss if offset else loss
        bits = sk.nm_policy_step_(logits, bits, loss - tracker, 2.0, 2, 4, seed=0, offset=offset)
    assert torch.equal(sk.nm_mask(logits - logits.min() + 1, 2, 4), target)


def test_small_steps_of_bfloat16_are_not_lost(simd):
    """A hundredth of the last place, a thousand times: the mean moves by ten places."""
    logits = torch.full((4000, 4), 4.0, dtype=torch.bfloat16)
    mask = torch.tensor([True, True, False, False]).repeat(4000, 1)
    place, start = 2.0**-5, logits.float()
    for offset in range(100):
        sk.nm_policy_step_(logits, pack_bits(mask), -1.0, place / 100, 2, 4, seed=1, offset=offset)
    moved = (logits.float() - start).mean(0) / place
    slope = gradient(torch.zeros(4), (0, 1)).float()
    assert torch.allclose(moved, slope, rtol=0.25, atol=0.05)


def test_saturated_logits_stay_finite(simd):
    logits = torch.tensor([[1e30, -1e30, 0, -1e30], [200, 100, 0, -100], [-INF, -INF, -INF, -INF]])
    bits = sk.nm_sample(logits, 2, 4, seed=0)
    for offset in range(20):
        bits = sk.nm_policy_step_(logits, bits, 10.0, 100.0, 2, 4, seed=0, offset=offset)
    assert not logits.isnan().any()
    assert logits[:2].isfinite().all()


def test_advantage_may_be_a_number_or_a_tensor():
    one, other = torch.zeros(2, 8), torch.zeros(2, 8)
    bits = sk.nm_sample(one, 2, 4, seed=0)
    sk.nm_policy_step_(one, bits, 0.25, 2, 2, 4, seed=0)
    sk.nm_policy_step_(other, bits, torch.tensor(0.25), 2, 2, 4, seed=0)
    assert torch.equal(one, other)
    assert one.any()


def test_opcheck():
    logits = torch.randn(3, 20)
    bits = sk.nm_sample(logits, 2, 4, seed=0)
    opcheck(OPS.nm_sample, (logits, 2, 4, 0, 0))
    opcheck(OPS.nm_policy_step_, (logits, bits, torch.tensor(0.1), 0.5, 2, 4, 0, 0))


@pytest.mark.parametrize(
    "change, error, match",
    [
        ({"logits": torch.zeros(4, dtype=torch.float16)}, TypeError, "logits must be float32 or bfloat16"),
        ({"logits": torch.zeros(4, dtype=torch.int8)}, TypeError, "logits must be float32"),
        ({"logits": torch.zeros(())}, ValueError, "logits must have at least one dimension"),
        ({"n": 5}, ValueError, "0 < n <= m <= 32, got 5:4"),
        ({"seed": 2**63}, ValueError, "seed must be an integer of 64 bits"),
        ({"seed": -(2**63) - 1}, ValueError, "seed must be an integer of 64 bits"),
        ({"offset": 2**63 - 1}, ValueError, r"offset must be from 0 to 2\^63 - 2, got 9223372036854775807"),
        ({"offset": -1}, ValueError, "offset must be from 0 to"),
        ({"offset": 0.5}, TypeError, "offset must be an int, got 0.5"),
        ({"bits": torch.zeros(2, dtype=torch.uint8)}, ValueError, r"bits must have shape \(1,\), got \(2,\)"),
        ({"bits": torch.zeros(1)}, TypeError, "bits must be torch.uint8"),
        ({"advantage": torch.zeros(1)}, ValueError, "advantage must have shape"),
        ({"advantage": torch.zeros((), dtype=torch.float64)}, TypeError, "advantage must be torch.float32"),
    ],
)
def test_rejects(change, error, match):
    call = {"logits": torch.zeros(4), "bits": torch.zeros(1, dtype=torch.uint8), "advantage": 1.0, "lr": 1.0}
    call |= {"n": 2, "m": 4, "seed": 0, "offset": 0} | change
    before = call["logits"].clone()
    with pytest.raises(error, match=match):
        sk.nm_policy_step_(**call)
    assert torch.equal(call["logits"], before)
    if not change.keys() & {"bits", "advantage"}:
        with pytest.raises(error, match=match):
            sk.nm_sample(call["logits"], call["n"], call["m"], seed=call["seed"], offset=call["offset"])
