"""The distillation loss: its value by hand, its gradient, and its schedules."""

import math

import pytest
import torch
from torch import nn

from sparsekit.distill import DistillSchedule, distill_loss, hidden_loss


def test_a_case_by_hand():
    student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[2 * math.log(3.0), 0.0]])
    # At T = 2 the teacher says 3/4 and 1/4, the student 1/2 and 1/2.
    divergence = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    found = distill_loss(student, teacher, torch.tensor([1]), temperature=2, alpha=0.25)
    assert found.item() == pytest.approx(0.25 * 4 * divergence + 0.75 * math.log(2), rel=1e-6)


def test_the_gradient_at_the_teacher_is_zero():
    logits = torch.randn(5, 3, dtype=torch.float64)
    student = logits.clone().requires_grad_()
    distill_loss(student, logits, temperature=3.0, alpha=1.0).backward()
    assert student.grad.abs().max() < 1e-16


def gradient_norm(temperature):
    generator = torch.Generator().manual_seed(0)
    student, teacher = 0.1 * torch.randn(2, 16, 4, dtype=torch.float64, generator=generator)
    student.requires_grad_()
    distill_loss(student, teacher, temperature=temperature, alpha=1.0).backward()
    return student.grad.norm().item()


def test_the_scale_of_the_gradient_stays_where_the_temperature_rises():
    ratios = [gradient_norm(2 * t) / gradient_norm(t) for t in (2.0, 8.0, 32.0, 128.0)]
    distances = [abs(ratio - 1) for ratio in ratios]
    assert distances == sorted(distances, reverse=True) and distances[0] < 0.05 and distances[-1] < 1e-3


def test_ignored_positions_do_not_count():
    student, teacher, labels = torch.randn(2, 3, 4), torch.randn(2, 3, 4), torch.tensor([[1, -100, 2], [-100, 0, 3]])
    kept = labels != -100
    assert torch.equal(distill_loss(student, teacher, labels), distill_loss(student[kept], teacher[kept], labels[kept]))


def test_it_is_computed_in_float32_under_autocast():
    student, teacher, labels = torch.randn(8, 4), torch.randn(8, 4), torch.arange(8) % 4
    with torch.autocast("cpu", torch.bfloat16):
        found = distill_loss(student, teacher, labels)
    assert torch.equal(found, distill_loss(student, teacher, labels))
    assert distill_loss(student.bfloat16(), teacher.bfloat16(), labels).dtype == torch.float32


def test_the_teacher_gets_no_gradient():
    student, teacher = torch.randn(2, 3, requires_grad=True), torch.randn(2, 3, requires_grad=True)
    distill_loss(student, teacher, alpha=1.0).backward()
    assert student.grad is not None and teacher.grad is None


def test_the_schedule_is_linear():
    schedule = DistillSchedule()
    assert [schedule.at(p) for p in (0, 0.5, 1)] == [(10, 0.9), (6, pytest.approx(0.55)), (2, 0.2)]
    with pytest.raises(ValueError, match=r"progress must be from 0 to 1, got 1.5"):
        schedule.at(1.5)


def test_hidden_states_are_compared_evenly():
    teacher = [torch.full((1, 2, 3), float(i)) for i in range(5)]
    student = [torch.zeros(1, 2, 3) for _ in range(3)]
    assert hidden_loss(student, teacher).item() == pytest.approx((0 + 2**2 + 4**2) / 3)


def test_hidden_states_of_masked_tokens_and_other_widths():
    teacher = [torch.ones(1, 2, 4), torch.ones(1, 2, 4)]
    student = [torch.zeros(1, 2, 3), torch.zeros(1, 2, 3)]
    project = nn.Linear(3, 4)
    nn.init.zeros_(project.bias)
    teacher[1][0, 1] = 100.0  # a token that the mask leaves out
    assert hidden_loss(student, teacher, mask=torch.tensor([[1, 0]]), project=project).item() == 1.0


def test_rejects():
    logits = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="logits of one shape"):
        distill_loss(logits, torch.zeros(2, 4))
    with pytest.raises(ValueError, match="pass them or alpha=1"):
        distill_loss(logits, logits)
    with pytest.raises(ValueError, match=r"labels must have the shape \(2,\), got \(3,\)"):
        distill_loss(logits, logits, torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="temperature must be positive, got 0"):
        distill_loss(logits, logits, temperature=0, alpha=1)
    with pytest.raises(ValueError, match="alpha must be from 0 to 1, got 2"):
        DistillSchedule(alpha=(2, 0))
    with pytest.raises(ValueError, match="pass project"):
        hidden_loss([torch.zeros(1, 1, 2)] * 2, [torch.zeros(1, 1, 3)] * 2)
    with pytest.raises(ValueError, match="at least 2 hidden states"):
        hidden_loss([], [])
