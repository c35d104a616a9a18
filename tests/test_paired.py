"""How the losses of two models differ on the same examples, against values by hand."""

import math

import pytest
import torch

from sparsekit.evaluate import paired_difference


def test_paired_difference_by_hand():
    found = paired_difference(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2.0, 2.0, 5.0]))  # -1, 0 and -2
    half = 1.959964 / math.sqrt(3)
    assert (found.mean, found.n) == (-1, 3)
    assert found.interval == pytest.approx((-1 - half, -1 + half), abs=1e-6)
    assert found.p == pytest.approx(0.0833, abs=1e-4)  # of a normal value beyond 1.732


def test_equal_differences_are_chance_only_if_they_are_0():
    values = torch.tensor([1.0, 2.0, 3.0])
    assert paired_difference(values, values).p == 1
    assert paired_difference(values + 1, values).p == 0


@pytest.mark.parametrize("others", [torch.zeros(2), torch.tensor([0.0, 0.0, math.nan])])
def test_what_cannot_be_compared_is_refused(others):
    with pytest.raises(ValueError, match=r"one value for each example, of at least 2, got|must be finite"):
        paired_difference(torch.zeros(3), others)
