"""Processes that prune one model together: each has batches of its own, all get the same."""

import copy
import threading

import pytest
import torch
import torch.distributed as dist
from interrupts import difference, model_state
from pruning import stack
from torch import nn
from torch.testing._internal.distributed.multi_threaded_pg import (
    _install_threaded_pg,
    _uninstall_threaded_pg,
)

import sparsekit as sk
from sparsekit.prune.ranks import RankFailed
from sparsekit.tiers import Ratios, Step, progressive_tiers, tier_iteration

WANDA = sk.Wanda("2:4")
METHODS = [sk.Magnitude("2:4"), WANDA, sk.SparseGPT("2:4"), sk.LeastSquares(sk.Swaps(WANDA))]


@pytest.fixture
def ranks():
    """Runs ``act(rank)`` in two threads that are ranks to torch.distributed; returns what they gave or raised."""

    def run(act):
        results, store = [None, None], dist.HashStore()

        def one(rank):
            try:
                dist.init_process_group("threaded", rank=rank, world_size=2, store=store)
                results[rank] = act(rank)
            except BaseException as error:
                results[rank] = error
            finally:
                if dist.is_initialized():
                    dist.destroy_process_group()

        threads = [threading.Thread(target=one, args=(rank,), daemon=True) for rank in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        assert not any(thread.is_alive() for thread in threads), "they wait for each other"
        return results

    torch._C._distributed_c10d._set_thread_isolation_mode(True)
    _install_threaded_pg()
    yield run
    torch._C._distributed_c10d._set_thread_isolation_mode(False)
    _uninstall_threaded_pg()


def assert_same(model, state):
    assert not difference(model_state(model), state, identity=False)


def data():
    x = torch.randn(2, 40, 16, generator=torch.Generator().manual_seed(5))
    return x * torch.rand(2, 1, 16, generator=torch.Generator().manual_seed(6)).exp()


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_all_see_all_batches(ranks, method):
    model, x = stack(16, 16, 8), data()
    models = [copy.deepcopy(model) for _ in range(2)]
    first, second = ranks(lambda rank: sk.prune_(models[rank], method, list(x[rank].split(20 if rank else 40))))
    assert_same(models[0], model_state(models[1]))
    assert first.layers == second.layers
    report = sk.prune_(model, method, list(x))
    for one, other in zip(model.parameters(), models[0].parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
    assert [layer.error for layer in first.layers] == pytest.approx([layer.error for layer in report.layers], rel=0.2)


def test_statistics_add_up(ranks):
    """By hand: sums over both ranks, whatever each has seen; the mask is that of all inputs."""
    norms = []

    class Wanda(sk.Wanda):
        def prune(self, weight, statistic):
            norms.append(statistic.norm)
            return super().prune(weight, statistic)

    x = [torch.tensor([[3.0, 0.0, 1.0, 1.0]]), torch.tensor([[4.0, 2.0, 1.0, 1.0], [5.0, 0.0, 1.0, 1.0]])]
    models = [nn.Linear(4, 2) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    ranks(lambda rank: sk.prune_(models[rank], Wanda("2:4"), [x[rank]]))
    expected = torch.tensor([50 / 3, 4 / 3, 1.0, 1.0]).sqrt()
    assert all(torch.allclose(norm, expected) for norm in norms) and len(norms) == 2


@pytest.mark.parametrize("sequential", [True, False])
def test_a_layer_that_one_rank_alone_reaches(ranks, sequential):
    model, x = nn.ModuleList([nn.Linear(16, 16) for _ in range(3)]), data()
    models = [copy.deepcopy(model) for _ in range(2)]

    def forward(model, batch):
        return model[1](batch) if dist.get_rank() else model[0](batch)

    reports = ranks(
        lambda rank: sk.prune_(models[rank], sk.SparseGPT("2:4"), x[rank], forward=forward, sequential=sequential)
    )
    assert [layer.name for layer in reports[0].layers] == ["0", "1"]
    assert reports[0].layers == reports[1].layers and "2" in {each.name for each in reports[1].skipped}
    assert_same(models[0], model_state(models[1]))


def test_tiers_agree(ranks):
    model, x, step = stack(32, 32, 32), data().repeat(1, 1, 2), Step(1, Ratios(0.25, 0.5, 0.25), 0.75, 0.25, 0.0)
    models = [copy.deepcopy(model) for _ in range(2)]
    (maps, report), (other, expected) = ranks(
        lambda rank: tier_iteration(models[rank], step, x[rank], reconstruct=True)
    )
    assert_same(models[0], model_state(models[1]))
    assert all(torch.equal(maps[name].tiers, other[name].tiers) for name in maps) and report == expected


def test_a_run_is_gone_on_with_by_all(ranks, tmp_path):
    model, x = stack(32, 32, 32), data().repeat(1, 1, 2)

    def prune(rank, x=x):
        own = copy.deepcopy(model)
        sk.prune_(own, WANDA, x[rank], resume=tmp_path / "run")
        return own

    first, again = ranks(prune), ranks(prune)
    assert_same(first[0], model_state(again[1]))
    other = x.flip(0)  # each rank has batches, and those of the other one
    for error in ranks(lambda rank: prune(rank, other)):
        assert "run.json belongs to another run: it differs in batches" in str(error)


def test_iterations_are_gone_on_with_by_all(ranks, tmp_path):
    model, x, steps = stack(32, 32, 32), data().repeat(1, 1, 2), [Step(1, Ratios(0.5, 0.5, 0.0), 0.5, 0.0, 0.0)]

    def prune(rank, x=x):
        own = copy.deepcopy(model)
        progressive_tiers(own, steps, x[rank], lambda *_: None, folder=tmp_path / "run")
        return own

    first, again = ranks(prune), ranks(prune)
    assert_same(first[0], model_state(again[1]))
    other = x.flip(0)
    for error in ranks(lambda rank: prune(rank, other)):
        assert "call.json belongs to another run: it differs in batches" in str(error)
    (tmp_path / "run" / "iteration-1" / "report.json").unlink()

    def full(rank):
        if rank == 0:
            (tmp_path / "run" / "iteration-1" / "call.json").unlink()
            (tmp_path / "run" / "iteration-1" / "call.json").mkdir()
        return prune(rank)

    zero, one = ranks(full)
    assert isinstance(zero, IsADirectoryError) and "rank 0 failed with IsADirectoryError" in str(one)


def test_batchnorm_averages_over_all(ranks):
    model, x = nn.Sequential(nn.Linear(16, 8), nn.BatchNorm1d(8)), data()
    models = [copy.deepcopy(model) for _ in range(2)]
    batches = [[x[0]], [*x[1].split(10)]]
    reports = ranks(lambda rank: sk.prune_(models[rank], WANDA, batches[rank]))
    assert_same(models[0], model_state(models[1]))
    assert reports[0].batchnorm == ("1",) and models[0][1].num_batches_tracked == 5
    y = [models[0][0](each) for each in (*batches[0], *batches[1])]
    torch.testing.assert_close(models[0][1].running_mean, torch.stack([each.mean(0) for each in y]).mean(0).detach())


def test_alone(ranks):
    model, x = stack(16, 16, 8), data()
    models = [copy.deepcopy(model) for _ in range(2)]
    ranks(lambda rank: rank or sk.prune_(models[0], WANDA, x[0], group="alone"))
    ranks(lambda rank: rank or sk.prune_(models[1], sk.Magnitude("2:4")))  # nothing to add up
    sk.prune_(model, WANDA, x[0])
    assert_same(model, model_state(models[0]))


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
        lambda rank: sk.prune_(models[rank], WANDA, [*x[rank].split(20)], forward=forward, sequential=sequential)
    )
    assert isinstance(second, KeyError)
    assert isinstance(first, RankFailed) and "rank 1 failed with KeyError: 'my own'" in str(first)
    for each, was in zip(models, before, strict=True):
        assert_same(each, was)
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
    assert_same(models[0], before[0])
    assert_same(models[1], before[1])


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
        sk.prune_(nn.Linear(16, 8), WANDA, data()[0], group=group)


def _wrapped(rank, folder):
    """One of two real processes: a wrapped model with buffers, and batches of another number in each."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16), nn.Linear(16, 8))
    model = nn.parallel.DistributedDataParallel(net)
    batches = list(data()[rank].split(10 if rank else 20))
    report = sk.prune_(model, sk.SparseGPT("2:4"), batches)
    assert [layer.name for layer in report.layers] == ["module.0", "module.2"]
    torch.save((report.layers, net.state_dict()), f"{folder}/{rank}.pt")
    if rank:
        batches[1][0, 0] = float("inf")
    try:
        sk.prune_(model, sk.Wanda("1:4"), batches)
    except ValueError:
        torch.save(net.state_dict(), f"{folder}/{rank}-after.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes(tmp_path):
    torch.multiprocessing.spawn(_wrapped, (str(tmp_path),), nprocs=2)
    (report, state), (other, expected) = (torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(2))
    assert report == other
    for rank in range(2):
        after = torch.load(tmp_path / f"{rank}-after.pt")
        assert all(torch.equal(state[key], after[key]) and torch.equal(state[key], expected[key]) for key in state)
