"""Refinements: swaps end where no swap helps, and least squares solves every row."""

import pytest
import torch
from pruning import correlated, gram_of, layer_error, linear

import sparsekit as sk
from sparsekit.masks import get_mask
from sparsekit.prune import second_order

WANDA = sk.Wanda("2:4")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("pattern", "group"), [("2:4", 4), ("1:4", 4), ("3:8", 8), ("50%", 32), ("50% layer", 32)])
def test_swaps_end_where_no_swap_helps(pattern, group, dtype):
    """Every swap that is left is tried; with a row of zeros, a dead input and zeros among the weights."""
    weight, x = torch.randn(5, 72, dtype=dtype), correlated(300, 72)
    weight[0], weight[1, ::3], x[:, 7] = 0, 0, 0
    layer, wanda = linear(weight), linear(weight)
    sk.prune_(layer, sk.Swaps(sk.Wanda(pattern)), [x.to(dtype)])
    sk.prune_(wanda, sk.Wanda(pattern), [x.to(dtype)])
    mask, gram = get_mask(layer), gram_of(layer, x.to(dtype)).matrix.double()
    assert torch.equal(layer.weight, torch.where(mask, weight, 0)) and layer.weight.dtype == dtype
    full = 72 // group * group
    counts = [each[:, :full].reshape(5, -1, group).sum(-1) for each in (mask, get_mask(wanda))]
    assert torch.equal(*counts) and torch.equal(mask[:, full:], get_mask(wanda)[:, full:])

    lost = torch.where(mask, 0, weight).double()
    pull, loss = lost @ gram, ((lost @ gram) * lost).sum(1)
    before = torch.where(get_mask(wanda), 0, weight).double()
    before = ((before @ gram) * before).sum(1)
    assert (loss <= before).all() and loss.sum() < 0.99 * before.sum()
    for start in range(0, full, group):
        for i in range(start, start + group):
            for j in range(start, start + group):
                rows = mask[:, i] & ~mask[:, j]  # swaps i out and j in
                out, back = weight[:, i].double(), weight[:, j].double()
                change = 2 * (out * pull[:, i] - back * pull[:, j]) - 2 * out * back * gram[i, j]
                change = change + out**2 * gram[i, i] + back**2 * gram[j, j]
                assert (change >= -1e-5 * loss)[rows].all()


@pytest.mark.parametrize("pattern", ["1:1", "4:4", "2:8"])
def test_swaps_leave_what_cannot_swap(pattern):
    """Groups of one, groups kept whole, and inputs that do not matter."""
    weight, x = torch.randn(3, 16), torch.zeros(5, 16)
    layer, before = linear(weight), linear(weight)
    sk.prune_(layer, sk.Swaps(sk.Magnitude(pattern)), [x])
    sk.prune_(before, sk.Magnitude(pattern), [x])
    assert torch.equal(layer.weight, before.weight)


@pytest.mark.parametrize("rows", [1, 16])
def test_every_pass_of_swaps_lowers_the_error(rows):
    weight, x = torch.randn(rows, 256), correlated(100, 256)  # fewer tokens than inputs
    gram, errors, masks = x.t() @ x, [], []
    for method in (WANDA, *(sk.Swaps(WANDA, passes=passes) for passes in (1, 2, 3, 20))):
        layer = linear(weight)
        sk.prune_(layer, method, [x])
        errors.append(layer_error(weight, layer.weight, gram))
        masks.append(get_mask(layer))
    assert errors == sorted(errors, reverse=True) and errors[1] < 0.7 * errors[0] and errors[-1] < errors[1]
    again = linear(weight)
    sk.prune_(again, method, [x])
    assert torch.equal(get_mask(again), masks[-1])


@pytest.mark.parametrize("pattern", ["2:4", "1:8", "50%", "50% layer", "50% 2x4"])
def test_least_squares_solves_every_row(pattern):
    weight, x = torch.randn(6, 24), correlated(200, 24)
    weight[0] = 0
    gram = second_order.damped(x.t() @ x / 200, 0.02)
    errors = []
    for tolerance in (0, 3e-4):
        layer = linear(weight)
        sk.prune_(layer, sk.LeastSquares(sk.Wanda(pattern), damp=0.02, iterations=200, tolerance=tolerance), [x])
        errors.append(layer_error(weight, layer.weight, gram))
        if tolerance == 0:
            for row, kept in enumerate(get_mask(layer)):
                exact = torch.linalg.solve(gram[kept][:, kept].double(), (gram[kept] @ weight[row]).double())
                torch.testing.assert_close(layer.weight[row, kept].double(), exact, rtol=1e-3, atol=1e-3)
    assert errors[0] <= errors[1] * (1 + 1e-6) and errors[1] < 1.002 * errors[0]


def test_refinements_print_and_compare_as_they_are_written():
    method = sk.LeastSquares(sk.Swaps(WANDA), damp=0.5)
    assert (
        repr(method)
        == "LeastSquares(Swaps(Wanda(pattern='2:4'), passes=20), iterations=100, damp=0.5, tolerance=0.0003)"
    )
    assert method == sk.LeastSquares(sk.Swaps(WANDA), damp=0.5) != sk.LeastSquares(WANDA, damp=0.5)
    assert method.pattern == "2:4"


def test_rejects_what_is_no_method():
    with pytest.raises(TypeError, match=r'method must be a Method such as Wanda\("2:4"\), got \'2:4\''):
        sk.Swaps("2:4")
