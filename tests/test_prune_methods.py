"""All pruning methods: published results, cases solved by hand, and what each method promises."""

import math
from itertools import pairwise, product

import pytest
import torch
from pruning import correlated, gram_of, layer_error, linear
from torch import nn

import sparsekit as sk
from sparsekit.masks import Pattern, get_mask
from sparsekit.ops import sparsegpt_columns
from sparsekit.prune.second_order import upper_factor

WEIGHT = torch.tensor([[math.sin(1 + 16 * i + j) for j in range(16)] for i in range(4)])
X = torch.tensor(
    [
        [(math.cos(0.37 * t * (j + 1)) + 0.5 * math.sin(0.077 * (t + 1) * (j + 2))) * (1 + j % 5) for j in range(16)]
        for t in range(64)
    ]
)
WANDA, RIA = sk.Wanda("2:4"), sk.RIA("2:4")
PATTERNS = ("2:4", "50%", "50% layer", "50% 2x4")
CHOOSING = [
    *(method(pattern) for method in (sk.Magnitude, sk.Wanda, sk.RIA) for pattern in PATTERNS),
    sk.Swaps(WANDA),
    sk.Swaps(sk.Wanda("50%")),
]
UPDATING = [
    *(method(pattern) for method in (sk.SparseGPT, sk.ADMM) for pattern in PATTERNS),
    sk.LeastSquares(WANDA),
    sk.LeastSquares(sk.Swaps(sk.SparseGPT("2:4"))),
]
METHODS = CHOOSING + UPDATING
LADDER = (sk.Magnitude("2:4"), RIA, WANDA, sk.Swaps(WANDA), sk.SparseGPT("2:4"), sk.ADMM("2:4"))  # by layer error


def bits(mask):
    return " ".join(f"{int(''.join(str(int(bit)) for bit in row), 2):04x}" for row in mask.tolist())


@pytest.mark.parametrize(
    ("method", "mask", "total", "squares", "error"),
    [
        (RIA, "5996 5956 396c 36cc", None, None, None),
        (sk.SparseGPT("2:4", columns=16), "59c6 59c6 9acc 3a5c", 2.4604, 18.5587, 0.06611),
        (sk.SparseGPT("2:4", columns=8), "59c6 59c6 9acc 3a5c", 2.4604, 18.5587, 0.06611),
        # The published threshold drops one more than half: 33 of 64.
        (sk.SparseGPT("51.5625% layer", columns=16), "19de 1b4e 1b4c 1acc", 0.5201, 16.9842, 0.05456),
    ],
    ids=["ria", "sparsegpt", "sparsegpt-8", "sparsegpt-unstructured"],
)
def test_golden(method, mask, total, squares, error):
    """What the published implementations give; column 0 is the highest bit."""
    layer = linear(WEIGHT)
    sk.prune_(layer, method, [X[:10], X[10:]])
    assert bits(get_mask(layer)) == mask
    if total:
        assert layer.weight.sum().item() == pytest.approx(total, abs=1e-4)
        assert layer.weight.square().sum().item() == pytest.approx(squares, abs=1e-4)
        assert layer_error(WEIGHT, layer.weight, X.t() @ X) == pytest.approx(error, abs=1e-5)


def test_sparsegpt_by_hand():
    """H = [[2, 1], [1, 2]]: dropping w0 = 3 adds w0 H01 / H11 = 1.5 to w1; dropping w1 changes nothing any more."""
    layer = linear(torch.tensor([[3.0, 5.0]]))
    gram = torch.tensor([[2.0, 1.0], [1.0, 2.0]])
    factor = upper_factor(gram, 0.0).inverse()
    torch.testing.assert_close(factor.t() @ factor, gram.inverse())
    pruned, error, mask = sparsegpt_columns(layer.weight, factor, n=1, m=2)
    torch.testing.assert_close(pruned, torch.tensor([[0.0, 6.5]]))
    assert mask.tolist() == [[False, True]]  # 3 / 0.816 against 5 / 0.707
    torch.testing.assert_close(error, torch.tensor([[3 / factor[0, 0].item(), 0.0]]))
    pruned, _, _ = sparsegpt_columns(layer.weight, factor, mask=torch.tensor([[True, False]]))
    assert pruned.tolist() == [[3.0, 0.0]]


def test_sparsegpt_keeps_a_tail_and_blocks_do_not_matter():
    weight, x = torch.randn(6, 70), correlated(300, 70)
    results = []
    for block in (4, 12, 128):
        layer = linear(weight)
        sk.prune_(layer, sk.SparseGPT("2:4", columns=block), [x])
        results.append(layer.weight)
        assert get_mask(layer)[:, 68:].all() and (get_mask(layer)[:, :68].view(6, 17, 4).sum(-1) == 2).all()
    for other in results[1:]:
        torch.testing.assert_close(results[0], other, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_the_mask_is_the_pattern_and_the_rest_is_zero(method):
    weight = torch.randn(8, 32)
    layer = linear(weight)
    sk.prune_(layer, method, [correlated(200, 32)])
    mask = get_mask(layer)
    assert torch.equal(layer.weight != 0, mask) and mask.sum() == 128
    assert torch.equal(layer.weight, torch.where(mask, weight, 0)) == (method in CHOOSING)
    pattern = Pattern.parse(method.pattern)
    if pattern.m:
        assert (mask.view(8, 8, 4).sum(-1) == 2).all()
    elif pattern.unit == "row":
        assert (mask.sum(1) == 16).all()
    elif pattern.unit != "layer":
        assert set(mask.view(4, 2, 8, 4).sum((1, 3)).flatten().tolist()) == {0, 8}


GRAM = (sk.SparseGPT("2:4"), sk.ADMM("2:4"), sk.LeastSquares(sk.Swaps(sk.Magnitude("2:4"))))


@pytest.mark.parametrize(
    ("axis", "method"), [*product(("input", "flatten"), GRAM), ("flatten", WANDA), ("flatten", RIA)], ids=str
)
def test_a_convolution_is_a_linear_layer_on_its_windows(axis, method):
    conv = nn.Conv2d(8, 5, 3, padding=1, stride=2, bias=False)
    x = torch.randn(6, 8, 9, 9) * torch.rand(8, 1, 1) * 5
    rows = nn.functional.unfold(x, 3, padding=1, stride=2).transpose(1, 2).reshape(-1, 8, 9)
    order = (rows if axis == "flatten" else rows.transpose(1, 2)).flatten(1)
    weight = conv.weight.detach() if axis == "flatten" else conv.weight.detach().permute(0, 2, 3, 1)
    same = linear(weight.flatten(1))
    torch.testing.assert_close(gram_of(conv, x[:2], x[2:], axis=axis).matrix, order.t() @ order / len(order))
    sk.prune_(conv, method, [x[:2], x[2:]], axis=axis)
    sk.prune_(same, method, [order])
    got = conv.weight.detach() if axis == "flatten" else conv.weight.detach().permute(0, 2, 3, 1)
    torch.testing.assert_close(got.flatten(1), same.weight.detach(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("method", "axis", "kept"),
    [
        (sk.Magnitude("2:4"), "input", "1100 0110"),  # of [4, 9, 3, 1] at the left, of [1, 6, 2, 1] at the right
        (WANDA, "input", "1010 0011"),  # of [20, 9, 15, 10] and [5, 6, 10, 10]
        (RIA, "input", "1001 0011"),  # of [2.57, 1.33, 2.48, 3.28] and [2.32, 1.22, 2.40, 3.28]
        (sk.Magnitude("2:4"), "flatten", "0011 1100"),  # of [4, 1, 9, 6] in channels 0 and 1, of [3, 2, 1, 1] in 2, 3
        (WANDA, "flatten", "0110 1001"),  # of [4, 7, 9, 6] and [21, 2, 2, 14]
        (RIA, "flatten", "0110 1001"),  # of [1.15, 2.74, 1.33, 1.22] and [2.94, 1.07, 1.47, 3.88]
    ],
    ids=str,
)
def test_a_convolution_by_hand(method, axis, kept):
    """The input norm is one per channel, here 5, 1, 5 and 10; with "flatten" it is one per channel and position.

    There is one output, so that RIA's score is ``(1 + |w| / 27) * norm ** 0.5``.
    """
    conv = nn.Conv2d(4, 1, (1, 2))
    conv.weight.data = torch.tensor([[[[4.0, 1]], [[9, 6]], [[3, 2]], [[1, 1]]]])
    sk.prune_(conv, method, [torch.tensor([[[[1.0, 7]], [[1, 1]], [[7, 1]], [[2, 14]]]])], axis=axis)
    mask = get_mask(conv)[0, :, 0]  # [channels, positions]
    mask = mask.t() if axis == "input" else mask.reshape(2, 4)
    assert " ".join("".join(str(int(bit)) for bit in group) for group in mask) == kept


def test_groups_start_anew_at_every_kernel_position():
    conv = nn.Conv2d(6, 4, 3)
    sk.prune_(conv, sk.SparseGPT("2:4"), [torch.randn(20, 6, 8, 8)])
    mask = get_mask(conv).permute(0, 2, 3, 1)
    assert mask[..., 4:].all() and (mask[..., :4].sum(-1) == 2).all()


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_fewer_tokens_than_inputs_and_dead_inputs(method):
    x = correlated(5, 32)
    x[:, 7] = 0
    layer = linear(torch.randn(4, 32))
    assert sk.prune_(layer, method, [x]).error < 0.7
    assert torch.isfinite(layer.weight).all()
    if method in (WANDA, RIA):
        assert not get_mask(layer)[:, 7].any()


def test_ria_drops_a_column_of_zeros():
    weight = torch.randn(4, 8)
    weight[0], weight[:, 3] = 0, 0
    layer = linear(weight)
    sk.prune_(layer, RIA, [correlated(200, 8)])
    assert get_mask(layer).view(4, 2, 4).sum(-1).eq(2).all() and not get_mask(layer)[1:, 3].any()


def test_a_gram_matrix_that_is_singular_is_damped_with_a_warning():
    with pytest.warns(UserWarning, match=r"singular in fp32: damped with 1e-06 instead of 0"):
        sk.prune_(linear(torch.randn(4, 32)), sk.SparseGPT("2:4", damp=0.0), [100 * correlated(5, 32)])


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_half_precision_is_computed_in_single(method):
    weight, x = torch.randn(8, 32), correlated(200, 32)
    single, half = linear(weight.bfloat16().float()), linear(weight.bfloat16())
    sk.prune_(single, method, [x.bfloat16().float()])
    sk.prune_(half, method, [x.bfloat16()])
    assert half.weight.dtype == torch.bfloat16 and torch.equal(get_mask(half), get_mask(single))
    tolerance = 0 if method in CHOOSING else 1e-2
    torch.testing.assert_close(half.weight.float(), single.weight, rtol=tolerance, atol=tolerance)


def test_orderings_on_correlated_inputs():
    weight, x = torch.randn(64, 96), correlated(1000, 96)

    def error(method):
        layer = linear(weight)
        sk.prune_(layer, method, [x])
        return layer_error(weight, layer.weight, x.t() @ x)

    for ladder in (LADDER, [sk.SparseGPT(pattern) for pattern in ("1:4", "2:4", "4:8")]):
        errors = [error(method) for method in ladder]
        assert all(better < worse for worse, better in pairwise(errors)), errors


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: sk.SparseGPT("2:4", damp=-1), "damp >= 0 and columns >= 1, got -1 and 128"),
        (lambda: sk.SparseGPT("2:4", columns=0), "columns >= 1, got 0.01 and 0"),
        (lambda: sk.SparseGPT("2:4", damp=math.nan), "damp >= 0 and columns >= 1, got nan and 128"),
        (lambda: sk.ADMM("2:4", damp=math.nan), "damp >= 0, got 15, 20 and nan"),
        (lambda: sk.LeastSquares(WANDA, damp=math.inf), "tolerance >= 0, got 100, inf and 0.0003"),
        (lambda: sk.LeastSquares(WANDA, tolerance=math.nan), "tolerance >= 0, got 100, 0.01 and nan"),
        (lambda: sk.RIA("2:4", power=math.nan), "RIA needs a finite power >= 0, got nan"),
        (lambda: sk.RIA("2:4", power=math.inf), "RIA needs a finite power >= 0, got inf"),
        (lambda: sk.RIA("2:4", power=-1), "RIA needs a finite power >= 0, got -1"),
        (lambda: sk.ADMM("2:4", ramp=30), "0 < ramp <= iterations and damp >= 0, got 30, 20 and 0.1"),
        (lambda: sk.Swaps(WANDA, passes=0), "passes must be at least 1, got 0"),
        (lambda: sk.Swaps(sk.Wanda("50% 16x16")), "pattern of whole blocks, got '50% 16x16'"),
        (lambda: sk.LeastSquares(WANDA, iterations=0), "iterations >= 1, damp >= 0 and tolerance >= 0, got 0, 0.01"),
        (lambda: sk.LeastSquares(WANDA, tolerance=-1), "tolerance >= 0, got 100, 0.01 and -1"),
        (lambda: sk.RIA("50% 0x4"), "a pattern is"),
        (lambda: sk.RIA("tiers 16x16 k=10"), "what progressive_tiers leaves, not a rule to prune by"),
        (lambda: sk.RIA("50% rows"), "a pattern is"),
    ],
)
def test_rejects(make, message):
    with pytest.raises(ValueError, match=message):
        make()
