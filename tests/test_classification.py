"""Scores of classifiers and the test of two of them, against values by hand and from tables."""

import math

import pytest
import torch
from torch import nn

from sparsekit.evaluate import classification_score, compare_classifiers, predict_logits


@pytest.fixture
def torchmetrics():
    return pytest.importorskip("torchmetrics")


def logits_of(classes, count=2):
    return nn.functional.one_hot(torch.tensor(classes), count).float()


def test_a_score_by_hand(torchmetrics):
    labels = torch.tensor([1, 1, 1, 0, 0, 1, 0, 0])
    score = classification_score(logits_of([1, 1, 0, 0, 0, 1, 1, 0]), labels)
    assert score.accuracy == 6 / 8 and score.n == 8
    assert score.confusion == ((3, 1), (1, 3))
    assert score.f1 == pytest.approx(2 * 3 / (2 * 3 + 1 + 1))
    assert score.auc == pytest.approx(0.75)  # of 16 pairs, 9 are in order, 6 are ties, and 1 is not
    # 6 of 8: center (0.75 + z^2 / 16) / (1 + z^2 / 8)
    assert score.interval == (pytest.approx(0.40928, abs=1e-5), pytest.approx(0.92852, abs=1e-5))


def test_the_interval_of_a_perfect_score_is_no_point(torchmetrics):
    score = classification_score(logits_of([0, 1, 1]), torch.tensor([0, 1, 1]))
    assert score.accuracy == score.interval[1] == score.auc == score.f1 == 1
    assert score.interval[0] == pytest.approx(1 / (1 + 1.959964**2 / 3), abs=1e-6)


def test_several_classes(torchmetrics):
    labels = torch.tensor([0, 1, 2, 2])
    score = classification_score(logits_of([0, 1, 1, 2], 3), labels)
    assert score.confusion == ((1, 0, 0), (0, 1, 0), (0, 1, 1))
    assert score.f1 == pytest.approx((1 + 2 / 3 + 2 / 3) / 3)
    assert 0.5 < score.auc < 1
    assert classification_score(logits_of([0, 1], 3), torch.tensor([0, 1])).auc is None


def test_mcnemar_by_hand():
    labels = torch.zeros(100, dtype=torch.int64)
    first = logits_of([0] * 80 + [1] * 9 + [0] * 1 + [1] * 10)
    second = logits_of([0] * 80 + [0] * 9 + [1] * 1 + [1] * 10)
    test = compare_classifiers(first, second, labels)
    assert (test.gained, test.lost, test.n) == (9, 1, 100)
    assert test.p == 2 * (1 + 10) / 2**10
    assert test.difference == 0.08
    half = 1.959964 * math.sqrt(10 - 64 / 100) / 100
    assert test.interval == (pytest.approx(0.08 - half, abs=1e-7), pytest.approx(0.08 + half, abs=1e-7))


def test_equal_classifiers_do_not_differ():
    logits, labels = torch.randn(50, 2), torch.randint(0, 2, (50,))
    test = compare_classifiers(logits, logits, labels)
    assert (test.p, test.difference, test.interval) == (1.0, 0.0, (0.0, 0.0))


def test_logits_are_collected_in_evaluation_mode():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.dropout, self.head = nn.Dropout(0.9), nn.Linear(3, 2)

        def forward(self, x):
            return {"logits": self.head(self.dropout(x))}

    model, x = Model(), torch.randn(7, 3)
    with torch.autocast("cpu", torch.bfloat16):
        found = predict_logits(model, [{"x": x[:4]}, {"x": x[4:]}])
    assert found.shape == (7, 2) and found.dtype == torch.float32 and model.training and not found.requires_grad
    assert torch.allclose(found, model.head(x), atol=0.05)
    with pytest.raises(ValueError, match="no batch to classify"):
        predict_logits(model, [])
    with pytest.raises(TypeError, match="must return logits, got list"):
        predict_logits(model, x, forward=lambda model, batch: [1])


def test_rejects():
    with pytest.raises(ValueError, match=r"got \(3, 1\) and \(3,\)"):
        classification_score(torch.zeros(3, 1), torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"integers from 0 to 1, got \[0, 2\]"):
        classification_score(torch.zeros(2, 2), torch.tensor([0, 2]))
    with pytest.raises(ValueError, match="logits must be finite"):
        compare_classifiers(torch.full((2, 2), math.nan), torch.zeros(2, 2), torch.tensor([0, 1]))
