"""What every linear op on a packed weight promises; ``product(x)`` is the op with its weight and bias."""

import math

import torch
from helpers import assert_same


def assert_same_for_any_threads(product, x, threads):
    results = []
    for count in (1, 2):
        threads(count)
        results.append(product(x))
    assert_same(*results)


def assert_same_in_any_batch(product, x, few):
    """A token comes out the same whether it comes with all others or in a batch of ``few``."""
    whole, many = product(x), len(x)
    for start in (0, 1, many // 2, many - few):
        part = slice(start, start + few)
        assert_same(product(x[part]), whole[part])


def assert_nan_stays_in_its_token(product, x, kept, value=float("nan")):
    """The last input of one token is NaN or Inf: what ``kept`` multiplies by it is not finite, other tokens are."""
    token = len(x) // 2
    x[token, -1] = value
    y = product(x)
    hit = y[token][kept[:, -1]]
    assert (hit.isnan() if math.isnan(value) else ~hit.isfinite()).all()
    y[token] = 0
    assert y.isfinite().all()


def assert_equal_gradients(one, other, inputs, grad, rtol, atol):
    """Two functions of the same inputs have the same gradients."""
    gradients = []
    for function in (one, other):
        own = [tensor.detach().clone().requires_grad_() for tensor in inputs]
        function(*own).backward(grad)
        gradients.append([tensor.grad for tensor in own])
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=rtol, atol=atol)
