"""What fails in one of several processes that prune a model together ends it in all of them."""

import copy

import pytest
import torch.distributed as dist
from interrupts import model_state
from pruning import stack
from test_prune_ranks import WANDA, assert_unchanged, data
from torch import nn

import sparsekit as sk
from sparsekit.prune.calibration.ranks import RankFailed


def failing(where):
    """A forward that fails in the second rank: in its n-th pass."""
    passes = {0: 0, 1: 0}

    def forward(model, x):
        rank = dist.get_rank()
        passes[rank] += 1
        if rank == 1 and passes[1] == where:
            raise KeyError("my own")
        return model(x)

    return forward


@pytest.mark.parametrize("sequential", [True, False])
@pytest.mark.parametrize("where", [1, 2, 3])
def test_a_failure_in_one_rank_ends_all(ranks, where, sequential):
    model, x = nn.Sequential(nn.Linear(16, 8), nn.BatchNorm1d(8), nn.Linear(8, 8)), data()
    models = [copy.deepcopy(model) for _ in range(2)]
    before = [model_state(each) for each in models]
    forward = failing(where)
    first, second = ranks(
        lambda rank: sk.prune_(
            models[rank],
            WANDA,
            [*x[rank].split(20)],
            calibration=sk.Calibration(forward=forward, sequential=sequential),
        )
    )
    assert isinstance(second, KeyError)
    assert isinstance(first, RankFailed) and "rank 1 failed with KeyError: 'my own'" in str(first)
    for each, was in zip(models, before, strict=True):
        assert_unchanged(each, was)
    reports = ranks(lambda rank: sk.prune_(models[rank], WANDA, x[rank]))  # nothing is left of it
    assert reports[0].layers == reports[1].layers


def test_a_failure_in_the_last_step_of_one_rank(ranks):
    model, x = stack(16, 16, 8), data()
    models = [copy.deepcopy(model) for _ in range(2)]
    before = [model_state(each) for each in models]

    def progress(items):
        yield from items
        if dist.get_rank():
            raise KeyboardInterrupt

    first, second = ranks(lambda rank: sk.prune_(models[rank], WANDA, x[rank], progress=progress))
    assert isinstance(second, KeyboardInterrupt) and isinstance(first, RankFailed)
    assert_unchanged(models[0], before[0])
    assert_unchanged(models[1], before[1])


def changed(model, rank):
    if rank:
        model[0].weight.data[0, 0] += 1
    return model


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda model, rank, x: sk.prune_(changed(model, rank), WANDA, x), "differ in layer '0'"),
        (lambda model, rank, x: sk.prune_(model, sk.Wanda("1:4" if rank else "2:4"), x), "differ in method"),
        (lambda model, rank, x: sk.prune_(model, WANDA, x, where=lambda name, _: rank or name == "0"), "in layer '2'"),
    ],
    ids=["weights", "method", "where"],
)
def test_different_models_are_refused(ranks, call, message):
    model, x = stack(16, 16, 8), data()
    models = [copy.deepcopy(model) for _ in range(2)]
    for error in ranks(lambda rank: call(models[rank], rank, x[rank])):
        assert isinstance(error, ValueError) and message in str(error) and 'group="alone"' in str(error)


def test_a_statistic_that_cannot_be_added_up(ranks):
    class Last:
        def __init__(self, layer):
            pass

        def update(self, x):
            pass

    class Mine(sk.Magnitude):
        statistic = Last

    for error in ranks(lambda rank: sk.prune_(nn.Linear(16, 8), Mine("2:4"), data()[rank])):
        assert isinstance(error, TypeError) and 'Last has no method "reduce"' in str(error)
    sk.prune_(nn.Linear(16, 8), Mine("2:4"), data()[0])


@pytest.mark.parametrize("group", ["all", None, 3])
def test_what_is_no_group(group):
    with pytest.raises(TypeError, match='group must be "world", "alone" or a process group, got'):
        sk.prune_(nn.Linear(16, 8), WANDA, data()[0], calibration=sk.Calibration(group=group))
