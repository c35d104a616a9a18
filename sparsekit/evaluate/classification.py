"""Accuracy of classifiers with all that two figures need to be compared: intervals, and a test on the same examples."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .._batches import Forward, as_batches, evaluating, run_batch
from .images import INSTALL

NORMAL_95 = 1.959963984540054  # standard deviations that hold 95 % of a normal distribution


@dataclass(frozen=True)
class ClassificationScore:
    """How well a classifier does on a set of examples.

    Args:
        accuracy: the share that is classified correctly.
        interval: its 95 % Wilson interval, which also holds near 0 and 1.
        f1: the F1 score, of class 1 if there are two classes, else the mean over all classes.
        auc: the area under the ROC curve, likewise; None if a class has no example.
        confusion: how many examples of each class (row) were given each class (column).
        n: the number of examples.
    """

    accuracy: float
    interval: tuple[float, float]
    f1: float
    auc: float | None
    confusion: tuple[tuple[int, ...], ...]
    n: int


@dataclass(frozen=True)
class PairedTest:
    """McNemar's exact test of two classifiers on the same examples.

    Args:
        gained: examples that the second alone classifies correctly.
        lost: examples that the first alone classifies correctly.
        difference: the accuracy of the second less that of the first.
        interval: the 95 % Wald interval of the difference.
        p: the probability of at least as uneven numbers if both were equally good; below 0.05 is called significant.
        n: the number of examples.
    """

    gained: int
    lost: int
    difference: float
    interval: tuple[float, float]
    p: float
    n: int


def predict_logits(model: nn.Module, batches: Any, *, forward: Forward | None = None) -> Tensor:
    """Runs a classifier in evaluation mode and returns its logits, float32 ``[examples, classes]`` on the CPU.

    Args:
        model: returns logits, or an object with ``logits`` as models of transformers do.
        batches: batches as in ``prune_``; what a model of transformers computes from ``labels`` is not used.
        forward: ``forward(model, batch)`` replaces how the model is called.

    Raises:
        TypeError: the model returns something else.
        ValueError: there is no batch.
    """
    found = []
    with evaluating(model):
        for batch in as_batches(batches):
            result = run_batch(model, batch, forward)
            given = result.get("logits") if isinstance(result, Mapping) else getattr(result, "logits", result)
            if not isinstance(given, Tensor):
                raise TypeError(f"the model must return logits, got {type(result).__name__}")
            found.append(given.detach().float().cpu())
    if not found:
        raise ValueError("there is no batch to classify")
    return torch.cat(found)


def classification_score(logits: Tensor, labels: Tensor) -> ClassificationScore:
    """Computes how well logits classify, by torchmetrics.

    Args:
        logits: ``[examples, classes]``, at least two classes.
        labels: the right classes, int64 ``[examples]``.

    Raises:
        ValueError: shapes do not fit, there are no examples, logits are not finite, or a label is no class.
        ImportError: torchmetrics is not installed.
    """
    logits, labels = _checked(logits, labels)
    try:
        from torchmetrics.functional import classification as metrics
    except ImportError as error:
        raise ImportError(f"scores of classifiers need torchmetrics: {INSTALL}") from error
    n, classes = logits.shape
    correct = int((logits.argmax(1) == labels).sum())
    confusion = metrics.multiclass_confusion_matrix(logits, labels, num_classes=classes)
    auc = None
    if len(labels.unique()) == classes:
        chances = logits.double().softmax(1)
        auc = (
            metrics.binary_auroc(chances[:, 1], labels)
            if classes == 2
            else metrics.multiclass_auroc(chances, labels, classes)
        )
    if classes == 2:
        f1 = metrics.binary_f1_score(logits.argmax(1), labels)
    else:
        f1 = metrics.multiclass_f1_score(logits, labels, num_classes=classes, average="macro")
    rows = tuple(tuple(map(int, row)) for row in confusion.tolist())
    return ClassificationScore(correct / n, wilson(correct, n), float(f1), None if auc is None else float(auc), rows, n)


def compare_classifiers(first: Tensor, second: Tensor, labels: Tensor) -> PairedTest:
    """Tests whether a second classifier is better or worse than a first one, on the same examples.

    Args:
        first: logits of the first, ``[examples, classes]``.
        second: logits of the second for the same examples in the same order.
        labels: the right classes, int64 ``[examples]``.

    Raises:
        ValueError: shapes do not fit, there are no examples, logits are not finite, or a label is no class.

    Source: McNemar, 1947, https://doi.org/10.1007/BF02295996, with the exact binomial distribution.
    """
    (one, right), (other, _) = _checked(first, labels), _checked(second, labels)
    before, after = one.argmax(1) == right, other.argmax(1) == right
    n, gained, lost = len(right), int((after & ~before).sum()), int((before & ~after).sum())
    uneven = gained + lost
    tail = sum(math.comb(uneven, k) for k in range(min(gained, lost) + 1))
    difference = (gained - lost) / n
    half = NORMAL_95 * math.sqrt(max(uneven - (gained - lost) ** 2 / n, 0.0)) / n
    return PairedTest(
        gained, lost, difference, (difference - half, difference + half), min(1.0, 2 * tail / 2**uneven), n
    )


def wilson(successes: int, n: int) -> tuple[float, float]:
    """Returns the 95 % Wilson interval of a share.

    Source: Wilson, 1927, https://doi.org/10.1080/01621459.1927.10502953.
    """
    share, z2 = successes / n, NORMAL_95**2
    center = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = NORMAL_95 / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    return max(0.0, center - half), min(1.0, center + half)


def _checked(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    logits, labels = logits.detach().cpu(), labels.detach().cpu()
    if logits.dim() != 2 or logits.shape[1] < 2 or labels.shape != logits.shape[:1] or not len(labels):
        raise ValueError(
            "logits must be [examples, classes] with at least 2 classes and labels [examples], "
            f"got {tuple(logits.shape)} and {tuple(labels.shape)}"
        )
    if not logits.isfinite().all():
        raise ValueError("logits must be finite")
    if labels.is_floating_point() or int(labels.min()) < 0 or int(labels.max()) >= logits.shape[1]:
        raise ValueError(f"labels must be integers from 0 to {logits.shape[1] - 1}, got {labels.unique().tolist()[:8]}")
    return logits, labels.long()
