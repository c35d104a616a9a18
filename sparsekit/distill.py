"""Distillation: the loss by which a student model learns from a teacher.

::

    schedule = sk.DistillSchedule()
    for step, batch in enumerate(batches):
        temperature, alpha = schedule.at(step / steps)
        with torch.no_grad():
            taught = teacher(**batch).logits
        loss = sk.distill_loss(
            student(**batch).logits, taught, batch["labels"], temperature=temperature, alpha=alpha
        )
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["DistillSchedule", "distill_loss", "hidden_loss"]

IGNORED = -100  # the label of positions that no loss counts, as in PyTorch


@dataclass(frozen=True)
class DistillSchedule:
    """The temperature and the share of the teacher, which both change linearly with the progress of training.

    Args:
        temperature: that of the first step and that of the last one, positive.
        alpha: the weight of the teacher's term at the first step and at the last one, from 0 to 1.

    Raises:
        ValueError: a value is out of range.
    """

    temperature: tuple[float, float] = (10.0, 2.0)
    alpha: tuple[float, float] = (0.9, 0.2)

    def __post_init__(self) -> None:
        for temperature, alpha in zip(self.temperature, self.alpha, strict=True):
            _check(temperature, alpha)

    def at(self, progress: float) -> tuple[float, float]:
        """Returns temperature and alpha: ``start + progress * (end - start)``.

        Args:
            progress: the share of the training steps that are done, from 0 to 1.

        Raises:
            ValueError: ``progress`` is outside of that range.
        """
        if not 0 <= progress <= 1:
            raise ValueError(f"progress must be from 0 to 1, got {progress}")
        temperature, alpha = ((1 - progress) * start + progress * end for start, end in (self.temperature, self.alpha))
        return temperature, alpha


def distill_loss(
    student: Tensor, teacher: Tensor, labels: Tensor | None = None, *, temperature: float = 2.0, alpha: float = 0.5
) -> Tensor:
    """Returns ``alpha * T^2 * KL(teacher at T || student at T) + (1 - alpha) * cross-entropy``, a tensor of one number.

    The factor ``T^2`` keeps the scale of the first term's gradient where the temperature ``T`` changes. Both terms are
    means over the positions whose label is not -100, computed in float32 (float64 for float64 logits) whatever the
    autocast. The teacher gets no gradient.

    Args:
        student: logits ``[..., classes]``.
        teacher: logits of the same shape.
        labels: int64 ``[...]``; None, if there are none, takes the first term alone, and needs an ``alpha`` of 1.
        temperature: what logits are divided by in the first term, positive.
        alpha: the weight of the teacher's term, from 0 to 1.

    Raises:
        ValueError: a shape or a number does not fit, or ``labels`` is None and ``alpha`` is not 1.

    Source: Hinton et al., 2015, https://arxiv.org/abs/1503.02531.
    """
    _check(temperature, alpha)
    if student.shape != teacher.shape:
        raise ValueError(
            f"student and teacher must have logits of one shape, got {tuple(student.shape)} and {tuple(teacher.shape)}"
        )
    if labels is None and alpha != 1:
        raise ValueError(
            f"labels are needed for the cross-entropy, whose weight is {1 - alpha:g}: pass them or alpha=1"
        )
    if labels is not None and labels.shape != student.shape[:-1]:
        raise ValueError(f"labels must have the shape {tuple(student.shape[:-1])}, got {tuple(labels.shape)}")
    with torch.autocast(student.device.type, enabled=False):
        own, taught = (_precise(logits).flatten(0, -2) for logits in (student, teacher.detach()))
        if labels is None:
            return _divergence(own, taught, temperature)
        counted = labels.flatten() != IGNORED
        own, taught, right = own[counted], taught[counted], labels.flatten()[counted]
        return alpha * _divergence(own, taught, temperature) + (1 - alpha) * F.cross_entropy(own, right)


def hidden_loss(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    *,
    mask: Tensor | None = None,
    project: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Returns the mean squared difference between hidden states of student and teacher, to add to ``distill_loss``.

    State ``i`` of the student's ``n + 1`` (the embeddings are the first) is compared with state ``i * m // n`` of the
    teacher's ``m + 1``: a student of 6 layers with every second state of a teacher of 12. It is computed in float32
    (float64 for float64 states); the teacher gets no gradient.

    Args:
        student: hidden states ``[batch, tokens, width]``, as transformers returns with ``output_hidden_states=True``.
        teacher: the same of the teacher.
        mask: ``[batch, tokens]``, nonzero where a token counts, as an ``attention_mask``; None counts all.
        project: maps the student's width to the teacher's, such as an ``nn.Linear`` that is trained along; None where
            they are equal.

    Raises:
        ValueError: there are fewer than two states of either, or shapes differ.
    """
    if min(len(student), len(teacher)) < 2:
        raise ValueError(f"at least 2 hidden states of each are needed, got {len(student)} and {len(teacher)}")
    own, last = len(student) - 1, len(teacher) - 1
    losses = []
    for index, state in enumerate(student):
        mine, taught = state if project is None else project(state), teacher[index * last // own].detach()
        if mine.shape != taught.shape:
            raise ValueError(
                f"hidden states must have one shape, got {tuple(mine.shape)} and {tuple(taught.shape)}: "
                "pass project=nn.Linear(width, width of the teacher)"
            )
        difference = (_precise(mine) - _precise(taught)).square().mean(-1)
        losses.append(difference.mean() if mask is None else difference[mask != 0].mean())
    return torch.stack(losses).mean()


def _divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    log_student, log_teacher = ((logits / temperature).log_softmax(-1) for logits in (student, teacher))
    return temperature**2 * F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True)


def _precise(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _check(temperature: float, alpha: float) -> None:
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature must be positive, got {temperature}")
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must be from 0 to 1, got {alpha}")
