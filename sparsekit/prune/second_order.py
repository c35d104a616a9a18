"""What the methods that know the Gram matrix share: damping, factors, and the layer error that they lower."""

import warnings

import torch
from torch import Tensor

MAX_DAMP = 1.0


def damped(gram: Tensor, damp: float) -> Tensor:
    """``gram`` with ``damp`` times its mean diagonal added to the diagonal; an input that is always 0 counts as 1."""
    diagonal = gram.diagonal()
    extra = torch.where(diagonal == 0, 1.0, 0.0) + damp * diagonal.mean()
    return gram + extra.diag()


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


def inverse_factor(gram: Tensor, damp: float) -> Tensor:
    """The upper ``U`` with ``U^T U`` the inverse of the damped matrix: row i is what dropping input i asks of the rest.

    From the Cholesky factor of the matrix read backwards, which saves the explicit inverse: if ``J H J = L L^T`` then
    ``U = (J L J)^-1``.
    """
    return _inverse(cholesky(gram.flip(0, 1), damp).flip(0, 1))


def _inverse(upper: Tensor) -> Tensor:
    """The inverse of an upper triangular matrix by halves: two thirds of what solving for the identity computes, and
    nearly all of it matrix products; twice as fast from 1024 columns on.
    """
    half = len(upper) // 2
    if half < 64:
        return torch.linalg.solve_triangular(upper, torch.eye(len(upper)).to(upper), upper=True)
    inverse = torch.zeros_like(upper)
    first, second = inverse[:half, :half], inverse[half:, half:]
    first.copy_(_inverse(upper[:half, :half]))
    second.copy_(_inverse(upper[half:, half:]))
    inverse[:half, half:] = -first @ (upper[:half, half:] @ second)
    return inverse
