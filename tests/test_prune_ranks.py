"""Processes that prune one model together: each has batches of its own, all get the same."""

import copy

import pytest
import torch
import torch.distributed as dist
from interrupts import difference, model_state
from pruning import stack
from running import leave_group
from torch import nn

import sparsekit as sk
from sparsekit.tiers import Ratios, Step, progressive_tiers, tier_iteration

WANDA = sk.Wanda("2:4")
METHODS = [sk.Magnitude("2:4"), WANDA, sk.SparseGPT("2:4"), sk.LeastSquares(sk.Swaps(WANDA))]


def assert_unchanged(model, state):
    assert not difference(model_state(model), state, identity=False)


def data():
    x = torch.randn(2, 40, 16, generator=torch.Generator().manual_seed(5))
    return x * torch.rand(2, 1, 16, generator=torch.Generator().manual_seed(6)).exp()


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_all_see_all_batches(ranks, method):
    model, x = stack(16, 16, 8), data()
    models = [copy.deepcopy(model) for _ in range(2)]
    first, second = ranks(lambda rank: sk.prune_(models[rank], method, list(x[rank].split(20 if rank else 40))))
    assert_unchanged(models[0], model_state(models[1]))
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
        lambda rank: sk.prune_(
            models[rank],
            sk.SparseGPT("2:4"),
            x[rank],
            calibration=sk.Calibration(forward=forward, sequential=sequential),
        )
    )
    assert [layer.name for layer in reports[0].layers] == ["0", "1"]
    assert reports[0].layers == reports[1].layers and "2" in {each.name for each in reports[1].skipped}
    assert_unchanged(models[0], model_state(models[1]))


def test_tiers_agree(ranks):
    model, x, step = stack(32, 32, 32), data().repeat(1, 1, 2), Step(1, Ratios(0.25, 0.5, 0.25), 0.75, 0.25, 0.0)
    models = [copy.deepcopy(model) for _ in range(2)]
    (maps, report), (other, expected) = ranks(
        lambda rank: tier_iteration(models[rank], step, x[rank], options=sk.tiers.TierOptions(reconstruct=True))
    )
    assert_unchanged(models[0], model_state(models[1]))
    assert all(torch.equal(maps[name].tiers, other[name].tiers) for name in maps) and report == expected


def test_a_run_is_gone_on_with_by_all(ranks, tmp_path):
    model, x = stack(32, 32, 32), data().repeat(1, 1, 2)

    def prune(rank, x=x):
        own = copy.deepcopy(model)
        sk.prune_(own, WANDA, x[rank], resume=tmp_path / "run")
        return own

    first, again = ranks(prune), ranks(prune)
    assert_unchanged(first[0], model_state(again[1]))
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
    assert_unchanged(first[0], model_state(again[1]))
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


@pytest.mark.parametrize("group", ["world", "alone"])
def test_iterations_are_kept_once(ranks, tmp_path, group):
    x, step = data().repeat(1, 1, 2), Step(1, Ratios(0.25, 0.5, 0.25), 0.75, 0.25, 0.0)
    model = stack(32, 32, 32)
    folders = [tmp_path / "one", tmp_path / ("one" if group == "world" else "two")]
    found = []
    for finetune in (lambda *_: None, pytest.fail):  # the second time from the folder
        models = [copy.deepcopy(model) for _ in range(2)]
        done = ranks(
            lambda rank, models=models, finetune=finetune: progressive_tiers(
                models[rank],
                [step],
                x[rank],
                finetune,
                folder=folders[rank],
                options=sk.tiers.TierOptions(calibration=sk.Calibration(group=group)),
            )
        )
        assert all(isinstance(each, tuple) for each in done), done
        found.append([model_state(each) for each in models])
    for rank in range(2):
        assert not difference(found[0][rank], found[1][rank], identity=False)
    assert bool(difference(found[0][0], found[0][1], identity=False)) == (group == "alone")


def test_batchnorm_averages_over_all(ranks):
    model, x = nn.Sequential(nn.Linear(16, 8), nn.BatchNorm1d(8)), data()
    models = [copy.deepcopy(model) for _ in range(2)]
    batches = [[x[0]], [*x[1].split(10)]]
    reports = ranks(lambda rank: sk.prune_(models[rank], WANDA, batches[rank]))
    assert_unchanged(models[0], model_state(models[1]))
    assert reports[0].batchnorm == ("1",) and models[0][1].num_batches_tracked == 5
    y = [models[0][0](each) for each in (*batches[0], *batches[1])]
    torch.testing.assert_close(models[0][1].running_mean, torch.stack([each.mean(0) for each in y]).mean(0).detach())


def test_alone(ranks):
    model, x = stack(16, 16, 8), data()
    models = [copy.deepcopy(model) for _ in range(2)]
    ranks(lambda rank: rank or sk.prune_(models[0], WANDA, x[0], calibration=sk.Calibration(group="alone")))
    ranks(lambda rank: rank or sk.prune_(models[1], sk.Magnitude("2:4")))  # nothing to add up
    sk.prune_(model, WANDA, x[0])
    assert_unchanged(model, model_state(models[0]))


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
    leave_group()


@pytest.mark.slow
def test_two_processes(tmp_path):
    torch.multiprocessing.spawn(_wrapped, (str(tmp_path),), nprocs=2)
    (report, state), (other, expected) = (torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(2))
    assert report == other
    for rank in range(2):
        after = torch.load(tmp_path / f"{rank}-after.pt")
        assert all(torch.equal(state[key], after[key]) and torch.equal(state[key], expected[key]) for key in state)
