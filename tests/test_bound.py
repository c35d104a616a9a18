"""The bound of a model of masked tokens: exact in the mean, with an honest error, and the same however it is run."""

from itertools import permutations

import pytest
import torch
import torch.distributed as dist
from absorbing import joint, true_table, wrong_table

from sparsekit.diffusion import evaluate_bound, ordered_loss

TABLE = wrong_table()
ROWS = torch.tensor([[2, 0, 3, 1, 1], [0, 0, 1, 2, 3], [3, 3, 3, 3, 3]])


def exact(rows):
    return torch.stack([ordered_loss(TABLE, rows, 4, order) for order in permutations(range(5))]).mean(0)


def test_the_bound_is_the_mean_within_its_error():
    bound = evaluate_bound(TABLE, ROWS, 4, draws=2000, batch_size=3000)
    assert abs(bound.nats - exact(ROWS).sum().item() / 15) < 4 * bound.standard_error < 0.1
    assert bound.tokens == 15 and bound.row_nats.dtype == torch.float64
    assert bound.row_nats.sum().item() / 15 == pytest.approx(bound.nats, rel=1e-12)
    assert bound.perplexity == pytest.approx(2.718281828459045**bound.nats)


def test_the_error_is_that_of_repeated_measurements():
    found = [evaluate_bound(TABLE, ROWS, 4, draws=20, batch_size=60, seed=seed) for seed in range(200)]
    spread = torch.tensor([bound.nats for bound in found]).std().item()
    stated = torch.tensor([bound.standard_error for bound in found]).mean().item()
    assert 0.9 * spread < stated < 1.25 * spread


def test_constant_losses_have_no_error():
    uniform = torch.full((32, 3, 2), 0.5, dtype=torch.float64).log()
    table = true_table(joint())
    table.log_probs = uniform
    bound = evaluate_bound(table, torch.tensor([[0, 1, 1]]), 2, draws=2)
    assert (bound.nats, bound.standard_error) == pytest.approx((torch.tensor(2.0).log().item(), 0), abs=1e-7)


def test_the_bound_is_the_same_for_every_batch_size():
    plain = evaluate_bound(TABLE, ROWS, 4, draws=6)
    for batch_size in (1, 5, 18):
        assert torch.equal(evaluate_bound(TABLE, ROWS, 4, draws=6, batch_size=batch_size).row_nats, plain.row_nats)
    assert not torch.equal(evaluate_bound(TABLE, ROWS, 4, draws=6, seed=1).row_nats, plain.row_nats)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"), torch.inference_mode():
            assert torch.equal(evaluate_bound(TABLE, ROWS, 4, draws=6).row_nats, plain.row_nats)
    finally:
        torch.set_default_dtype(torch.float32)


def test_given_tokens_are_never_masked():
    p = joint(2, 3)
    given = torch.tensor([[True, False, True]])
    tokens = torch.tensor([[1, 0, 1]])
    bound = evaluate_bound(true_table(p), tokens, 2, draws=2, given=given)
    conditional = p[1, 0, 1] / p[1, :, 1].sum()
    assert bound.nats == pytest.approx(-conditional.log().item(), abs=1e-12) and bound.tokens == 1


def test_modules_are_evaluated_without_dropout_and_go_on_training():
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.head = torch.nn.Sequential(torch.nn.Dropout(0.5), torch.nn.Linear(5, 4))

        def forward(self, tokens, asked):
            assert not torch.is_grad_enabled()
            return self.head(torch.nn.functional.one_hot(tokens, 5).float()[asked]).log_softmax(-1)

    net = Net()
    one, two = (evaluate_bound(net, ROWS, 4, draws=2) for _ in range(2))
    assert torch.equal(one.row_nats, two.row_nats) and net.training and net.head[0].training


def test_rejects():
    with pytest.raises(ValueError, match="draws must be an even number of at least 2, got 3"):
        evaluate_bound(TABLE, ROWS, 4, draws=3)
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        evaluate_bound(TABLE, ROWS, 4, batch_size=0)
    with pytest.raises(ValueError, match="leave a token to predict in each"):
        evaluate_bound(TABLE, ROWS, 4, given=ROWS == 3)
    with pytest.raises(ValueError, match="must not contain the mask token, got 3"):
        evaluate_bound(TABLE, ROWS, 3)
    with pytest.raises(ValueError, match="seeds must be integers from 0"):
        evaluate_bound(TABLE, ROWS, 4, seed=-1)


@pytest.mark.parametrize("size", [2, 5, 13])
def test_processes_share_the_work(size, monkeypatch):
    parts = []
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda group: size)
    monkeypatch.setattr(dist, "all_reduce", lambda losses, group: parts.append(losses.clone()))
    for rank in range(size):
        monkeypatch.setattr(dist, "get_rank", lambda group, rank=rank: rank)
        evaluate_bound(TABLE, ROWS, 4, draws=4, batch_size=2)
    alone = evaluate_bound(TABLE, ROWS, 4, draws=4, group="alone")
    assert len(parts) == size and {int((part > 0).sum()) for part in parts} == {-(-12 // size)}, "as often in each"
    monkeypatch.setattr(dist, "all_reduce", lambda losses, group: losses.copy_(sum(parts)))
    assert torch.equal(evaluate_bound(TABLE, ROWS, 4, draws=4).row_nats, alone.row_nats)
