"""Damping and Cholesky factors of the Gram matrix, for the methods that update weights."""

import warnings

import torch
from torch import Tensor

MAX_DAMP = 1.0


def damped(gram: Tensor, damp: float) -> Tensor:
    """Returns a copy with ``damp`` times the mean of the diagonal, and 1 where that is 0, added to the diagonal."""
    gram = gram.clone()
    diagonal = gram.diagonal()
    diagonal.add_((diagonal == 0) + damp * diagonal.mean())
    return gram


def cholesky(gram: Tensor, damp: float) -> Tensor:
    """Computes the lower Cholesky factor of the damped matrix.

    If the matrix is not positive definite in fp32 (with fewer tokens than inputs and little damping), the damping grows
    tenfold until it is, and a warning is given.

    Raises:
        ValueError: it is not positive definite even with a damping of 1, so it is not a Gram matrix.
    """
    factor, info = torch.linalg.cholesky_ex(damped(gram, damp))
    used = damp
    while info.item():
        if used >= MAX_DAMP:
            raise ValueError("the Gram matrix of the inputs is not positive definite, however much it is damped")
        used = min(max(10 * used, 1e-6), MAX_DAMP)
        factor, info = torch.linalg.cholesky_ex(damped(gram, used))
    if used != damp:
        warnings.warn(f"the Gram matrix is singular in fp32: damped with {used:g} instead of {damp:g}", stacklevel=2)
    return factor


def upper_factor(gram: Tensor, damp: float) -> Tensor:
    """Computes the upper triangular ``R`` for which ``R R^T`` is the damped matrix.

    ``R`` is the inverse of SparseGPT's factor ``U``, for which ``U^T U`` is the inverse of the matrix. It is computed
    by reversing rows and columns, taking the lower Cholesky factor, and reversing its rows and columns.
    """
    return cholesky(gram.flip(0, 1), damp).flip(0, 1)
