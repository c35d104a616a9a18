"""The folder of a run: what it holds, what it refuses, what it recovers from."""

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import nn

from sparsekit._json import write_record
from sparsekit._safetensors import seal, write_tensors
from sparsekit.runs import Position, Run, epoch_batches, read_status
from sparsekit.runs.random_states import get_random_states, set_random_states
from sparsekit.runs.values import KEY, read_values, write_values

CONFIG = {"lr": 0.1, "sizes": (4, 2), "data": {"name": "digits", "seed": 3}}


class Part:
    """A part whose state is one number."""

    def __init__(self, value=0):
        self.value = value

    def state_dict(self):
        return {"value": self.value}

    def load_state_dict(self, state):
        self.value = state["value"]


def run_steps(folder, steps, save=(), config=CONFIG, part=None):
    part = part or Part()
    with Run.open(folder, config, steps=10) as run:
        run.restore(part=part)
        while run.step < steps:
            run.step += 1
            part.value += run.step
            run.record(value=part.value)
            if run.step in save:
                run.save()
    return run, part


def records(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_what_a_folder_holds(tmp_path):
    with Run.open(tmp_path / "run", CONFIG, steps=2) as run:
        run.restore(part=Part())
        for indices in run.batches(4, 2, epochs=1):
            run.record(loss=0.5 if run.step == 1 else float("nan"), count=len(indices))
        run.save()
        run.finish({"loss": 0.5})
    files = {path.relative_to(run.folder).as_posix() for path in run.folder.rglob("*")}
    state = {f"state/step-2{name}" for name in ("", "/state.json", "/part.safetensors", "/random-0.safetensors")}
    top = {"config.json", "metrics.jsonl", "status.json", "log.txt", "state", "samples", "result.json"}
    assert files == top | state
    assert (run.folder / "metrics.jsonl").read_text() == (
        '{"step": 1, "loss": 0.5, "count": 2}\n{"step": 2, "loss": null, "count": 2}\n'
    )
    assert json.loads((run.folder / "config.json").read_text()) == {**CONFIG, "sizes": [4, 2]}
    assert json.loads((run.folder / "result.json").read_text()) == run.result == {"loss": 0.5}
    status = read_status(run.folder)
    assert (status.state, status.step, status.steps, status.left, status.process) == ("finished", 2, 2, 0, os.getpid())
    assert status.is_alive()


def test_it_goes_on_and_later_records_are_cut_off(tmp_path):
    run_steps(tmp_path, 5, save=(2, 4))
    assert read_status(tmp_path).state == "stopped"
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "va')
    run, part = run_steps(tmp_path, 4)
    assert (run.step, part.value) == (4, 10)
    assert records(tmp_path) == [{"step": step, "value": step * (step + 1) // 2} for step in range(1, 5)]
    assert "goes on after step 4" in (tmp_path / "log.txt").read_text()


def test_records_without_a_state_are_cut_off(tmp_path):
    run_steps(tmp_path, 3)
    run_steps(tmp_path, 2)
    assert [record["step"] for record in records(tmp_path)] == [1, 2]


def test_the_last_two_states_are_kept(tmp_path):
    run_steps(tmp_path, 10, save=(2, 8, 9, 10))
    assert sorted(path.name for path in (tmp_path / "state").iterdir()) == ["step-10", "step-9"]


def test_another_config_is_refused(tmp_path):
    run_steps(tmp_path, 1)
    other = {"lr": 0.2, "sizes": [4, 2], "data": {"name": "digits", "seed": 4}}
    with pytest.raises(ValueError, match=r"it differs in data \(seed\), lr; name another folder"):
        Run.open(tmp_path, other)
    with pytest.raises(TypeError, match="config must hold what JSON has: Object of type Part"):
        Run.open(tmp_path, {"part": Part()})


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(ValueError, match=r"holds no run, but thesis\.tex: name another folder"):
        Run.open(tmp_path, CONFIG)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_running_folder_is_refused(tmp_path):
    code = f"from sparsekit.runs import Run; Run.open({str(tmp_path)!r}, {{}}); print(flush=True); input()"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code], env=environment, **pipes) as process:
        process.stdout.readline()
        with pytest.raises(RuntimeError, match=f"is being run by process {process.pid}"):
            Run.open(tmp_path, {})
        process.kill()
    Run.open(tmp_path, {})


def test_a_crash_is_told(tmp_path):
    code = f"from sparsekit.runs import Run\nwith Run.open({str(tmp_path)!r}, {{}}): raise OSError('no more data')"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 1 and "no more data" in done.stderr
    assert read_status(tmp_path).state == "failed" and not read_status(tmp_path).is_alive()
    assert "OSError: no more data" in (tmp_path / "log.txt").read_text()


def spoil(folder, how):
    last = folder / "state" / "step-4"
    if how == "missing":
        (last / "part.safetensors").unlink()
    elif how == "empty":
        shutil.rmtree(last)
        last.mkdir()
    elif how == "altered":
        (last / "part.safetensors").write_bytes((last / "part.safetensors").read_bytes().replace(b"value", b"other"))
    else:
        path = last / how
        path.write_bytes(path.read_bytes()[:-9])


@pytest.mark.parametrize("how", ["missing", "empty", "altered", "state.json", "random-0.safetensors"])
def test_the_state_before_a_torn_one_is_used(tmp_path, how):
    run_steps(tmp_path, 5, save=(2, 4))
    spoil(tmp_path, how)
    run, part = run_steps(tmp_path, 2)
    assert (run.step, part.value, len(records(tmp_path))) == (2, 3, 2)
    assert "step-4 cannot be read, and is unreadable-step-4 now: " in (tmp_path / "log.txt").read_text()
    assert {path.name for path in (tmp_path / "state").iterdir()} == {"step-2", "unreadable-step-4"}


def hostile(folder, data, tensors=None):
    state = folder / "state" / "step-4"
    text = data if isinstance(data, str) else json.dumps({"version": 1, "shared": {}, "values": data})
    write_tensors(state / "part.safetensors", tensors or {}, seal(text, tensors or {}, KEY))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"tensor": "weight"}, "'weight'"),
        ({"pickle": "cos\nsystem"}, "a 'pickle' in its header is of no known kind"),
        ({"dict": [], "tuple": []}, "an object in its header is of no known kind"),
        ({"dict": [[[], 1]]}, "unhashable"),
        ({"float": {}}, "float"),
        ("[" * 10**5, "nested too deeply"),
        ('{"version": 2}', "it is not of version 1"),
    ],
)
def test_a_hostile_state_is_refused(tmp_path, data, message):
    run_steps(tmp_path, 4, save=(4,))
    hostile(tmp_path, data)
    part = Part(7)
    with pytest.raises(
        ValueError, match=r"no stored state can be read: .*part\.safetensors holds no state: "
    ) as caught:
        run_steps(tmp_path, 5, part=part)
    assert message in str(caught.value) and part.value == 7


def test_a_state_cannot_name_files_elsewhere(tmp_path):
    run_steps(tmp_path, 4, save=(4,))
    record = {"step": 4, "metrics": 0, "parts": ["../../secret"], "ranks": 1, "position": {"epoch": 0, "batch": 0}}
    write_record(tmp_path / "state" / "step-4" / "state.json", record)
    with pytest.raises(ValueError, match=r"state\.json is not the record of a state: its parts are"):
        run_steps(tmp_path, 5)


def test_other_parts_are_refused(tmp_path):
    run_steps(tmp_path, 2, save=(2,))
    with Run.open(tmp_path, CONFIG) as run, pytest.raises(ValueError, match="holds part, and this run has model"):
        run.restore(model=Part())
    with Run.open(tmp_path, CONFIG) as run, pytest.raises(RuntimeError, match=r"call restore\(model"):
        run.save()
    with pytest.raises(ValueError, match=r"must be an identifier, .* got '\.\./model'"):
        run.restore(**{"../model": Part()})


def test_a_wrong_record_leaves_no_line(tmp_path):
    run = Run.open(tmp_path, {})
    with pytest.raises(ValueError, match=r"the step of a record is run\.step, 0: give 7 another name"):
        run.record(step=7)
    with pytest.raises(TypeError, match="Tensor"):
        run.record(loss=torch.ones(()))
    assert records(tmp_path) == []


def test_optimizer_states_stay_what_they_are(tmp_path):
    layer = nn.Linear(3, 2, dtype=torch.bfloat16)
    groups = [{"params": [layer.weight], "lr": 0.1}, {"params": [layer.bias], "betas": (0.8, 0.9)}]
    optimizer = torch.optim.AdamW(groups)
    layer(torch.ones(1, 3, dtype=torch.bfloat16)).sum().backward()
    optimizer.step()
    shared = torch.ones(2)
    state = {"optimizer": optimizer.state_dict(), 1: "a", "1": float("inf"), (1, None): [True, 1, 1.0, ()]}
    state |= {"counter": Counter([5, 5]), "tied": [shared, shared], "view": shared[1:], "int": torch.tensor(3)}
    write_values(tmp_path / "x.safetensors", state)
    read = read_values(tmp_path / "x.safetensors")
    assert describe(read) == describe(state)
    assert type(read["counter"]) is Counter
    optimizer.load_state_dict(read["optimizer"])


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.Adam, torch.optim.Adagrad, torch.optim.LBFGS])
def test_an_optimizer_goes_on_exactly(tmp_path, make):
    def steps(layer, optimizer):
        for _ in range(3):
            optimizer.zero_grad()
            layer(torch.ones(1, 3)).square().sum().backward()
            optimizer.step(lambda: layer(torch.ones(1, 3)).square().sum())

    first, second = nn.Linear(3, 2), nn.Linear(3, 2)
    optimizers = [make(layer.parameters(), lr=0.1) for layer in (first, second)]
    steps(first, optimizers[0])
    for name, here, there in (("a", first, second), ("b", *optimizers)):
        write_values(tmp_path / name, here.state_dict())
        there.load_state_dict(read_values(tmp_path / name))
    for layer, optimizer in zip((first, second), optimizers, strict=True):
        steps(layer, optimizer)
    assert torch.equal(first.weight, second.weight) and torch.equal(first.bias, second.bias)


def describe(value):
    if isinstance(value, torch.Tensor):
        return value.dtype, value.tolist()
    if isinstance(value, dict):
        return [(describe(key), describe(each)) for key, each in value.items()]
    return (type(value), [describe(each) for each in value]) if isinstance(value, list | tuple) else repr(value)


def test_what_cannot_be_stored_is_named(tmp_path):
    with pytest.raises(TypeError, match=r"x\.a\.0 must hold tensors, .*, got set"):
        write_values(tmp_path / "x.safetensors", {"a": [{1}]})
    assert not list(tmp_path.iterdir())


def test_random_states():
    states = get_random_states()
    first = torch.rand(3)
    set_random_states(states)
    assert torch.equal(torch.rand(3), first)
    with pytest.raises(ValueError, match="the random states are not those of a process"):
        set_random_states({"torch": torch.zeros(3)})


def test_batches_of_an_epoch():
    before = torch.get_rng_state()
    batches = epoch_batches(7, 2, seed=1)
    assert [len(batch) for batch in batches] == [2, 2, 2] and len({index for batch in batches for index in batch}) == 6
    assert batches == epoch_batches(7, 2, seed=1) != epoch_batches(7, 2, seed=1, epoch=1)
    both = [epoch_batches(7, 2, seed=1, rank=rank, ranks=2) for rank in range(2)]
    assert [a + b for a, b in zip(*both, strict=True)] == batches
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(ValueError, match="batch_size must be from 1 to the number of samples, 3, got 4"):
        epoch_batches(3, 4)
    with pytest.raises(ValueError, match="batch must be an integer of at least 0, got -1"):
        Position(0, -1)


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


def test_the_loader_gives_a_batch_for_each_list(tmp_path):
    with Run.open(tmp_path, {}) as run, pytest.raises(ValueError, match="got fewer than 3"):
        list(run.batches(6, 2, epochs=1, load=lambda order: order[:-1]))
    run = Run.open(tmp_path, {})
    with pytest.raises(ValueError, match="got more than 3"):
        list(run.batches(6, 2, epochs=1, load=lambda order: order * 2))


def test_a_tracker_gets_each_record(tmp_path):
    class Tracker:
        def log(self, values, *, step):
            got.append((step, values))

    got = []
    run = Run.open(tmp_path, {}, tracker=Tracker())
    for _ in run.batches(2, 1, epochs=1):
        run.record(loss=0.5)
    assert got == [(1, {"loss": 0.5}), (2, {"loss": 0.5})]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"state": "running"}', "\x00" * 9])
def test_a_foreign_status_is_refused(tmp_path, text):
    assert read_status(tmp_path) is None
    (tmp_path / "status.json").write_text(text)
    with pytest.raises(ValueError, match=r"status\.json is not the status of a run: "):
        read_status(tmp_path)


def test_a_finished_run_is_opened_to_read_its_result(tmp_path):
    with Run.open(tmp_path, {"a": 1}, steps=3) as run:
        run.restore()
        run.finish({"loss": 0.5})
    with Run.open(tmp_path, {"a": 1}, steps=3) as run:
        assert run.result == {"loss": 0.5}
    assert read_status(tmp_path).state == "finished"
