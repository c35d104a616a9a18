"""Runs of several processes: one folder for all, and what FSDP2 shards is stored whole and goes on exactly."""

import json
import threading

import pytest
import sharded_run
import torch.multiprocessing
from running import CONFIG, Part, describe, records
from torch import nn

from sparsekit.runs import Run, read_status, state
from sparsekit.runs.state import read_state
from sparsekit.runs.values import read_values


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folders that two processes leave, whose start takes most of the time."""
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(sharded_run.run, (str(folder / "store"), str(folder)), nprocs=2)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("kind", sharded_run.KINDS)
def test_two_processes_go_on_exactly(folder, kind):
    whole, stopped = (folder / kind / name for name in ("whole", "stopped"))
    assert records(whole) == records(stopped) and [each["step"] for each in records(whole)] == [1, 2, 3, 4]
    assert read_status(whole).state == "stopped"
    names = {"model", "optimizer", "schedule", "random-0", "random-1"}
    assert {path.stem for path in (whole / "state/step-4").glob("*.safetensors")} == names
    for name in names:
        one, other = (read_values(each / f"state/step-4/{name}.safetensors") for each in (whole, stopped))
        if name == "optimizer":  # the library makes a list of the tuple
            one, other = ({**each, "param_groups": json.dumps(each["param_groups"])} for each in (one, other))
        assert describe(one) == describe(other), name


@pytest.mark.slow
def test_a_sharded_state_is_that_of_a_plain_model(folder):
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 1))
    model.load_state_dict(read_values(folder / "fsdp/whole/state/step-4/model.safetensors"))
    moments = read_values(folder / "fsdp/whole/state/step-4/optimizer.safetensors")["state"]["0.weight"]
    assert moments["exp_avg"].shape == (5, 6) and moments["step"] == 4


def test_processes_agree_on_the_default_folder(tmp_path, monkeypatch, ranks):
    monkeypatch.chdir(tmp_path)

    def act(rank):
        part = Part(rank)
        run = Run.open(None, CONFIG)
        run.restore(part=part)
        run.step = 1
        run.record(rank=rank)
        run.save()
        return run.folder

    first, second = ranks(act)
    assert first == second and first.parts[0] == "output" and len(first.parts) == 3
    assert records(first) == [{"step": 1, "rank": 0}]
    assert {path.name for path in (first / "state" / "step-1").glob("random-*")} == {
        "random-0.safetensors",
        "random-1.safetensors",
    }
    errors = ranks(lambda rank: Run.open(first, {}))
    assert all("it differs in data" in str(error) for error in errors)
    with Run.open(first, CONFIG) as run, pytest.raises(ValueError, match="is of 2 processes, and this run has 1"):
        run.restore(part=Part())


def test_a_state_that_one_process_cannot_read_is_refused_by_all(tmp_path, monkeypatch, ranks):
    def act(rank):
        with Run.open(tmp_path, CONFIG) as run:
            run.restore(part=Part())
            run.save()
            run.restore(part=Part())

    def read_once(path):
        if read:
            raise OSError("stale file handle")
        read.append(path)
        return read_state(path)

    read = []
    monkeypatch.setattr(state, "read_state", read_once)
    for error in ranks(act):
        assert isinstance(error, OSError) and str(error) == "stale file handle"
    assert read == [tmp_path / "state" / "step-0"]


@pytest.mark.parametrize(("first", "state"), [(KeyboardInterrupt, "stopped"), (OSError, "failed")])
def test_the_state_is_that_of_the_first_process_if_it_has_ended(tmp_path, ranks, first, state):
    """The others then fail because they cannot reach it."""
    ended = threading.Event()

    def act(rank):
        try:
            with Run.open(tmp_path, CONFIG, steps=7 + rank):
                if rank == 0:
                    raise first
                assert ended.wait(10)
                raise RuntimeError("connection closed by peer")
        finally:
            ended.set()

    ranks(act)
    assert (read_status(tmp_path).state, read_status(tmp_path).steps) == (state, 7)
    assert "rank 1 Traceback" in (tmp_path / "log.txt").read_text()
