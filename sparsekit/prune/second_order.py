"""What the methods that know the Gram matrix share: damping, factors, and the layer error that they lower."""

import warnings

import torch
from torch import Tensor

MAX_DAMP = 1.0


def damped(gram: Tensor, damp: float) -> Tensor:
    """``gram`` with ``damp`` times its mean diagonal added to the diagonal; an input that is always 0 counts as 1."""
    gram = gram.clone()
    diagonal = gram.diagonal()
    diagonal.add_((diagonal == 0) + damp * diagonal.mean())
    return gram


def cholesky(gram: Tensor, damp: float) -> Tensor:
    """The lower Cholesky factor of the damped matrix.

    A matrix that is not positive definite in fp32 (fewer tokens than inputs and little damping) is damped ten times
    more, with a warning, until it is.

    Raises:
        ValueError: it is not even with its mean diagonal added, which no Gram matrix is.
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
    """The upper ``R`` with ``R R^T`` the damped matrix: the inverse of SparseGPT's factor ``U``, whose ``U^T U`` is the
    inverse of the matrix. It is the Cholesky factor of the matrix read backwards, read backwards.
    """
    return cholesky(gram.flip(0, 1), damp).flip(0, 1)
