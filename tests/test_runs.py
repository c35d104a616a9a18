"""The folder of a run: what it holds, what it refuses, and when it goes on."""

import json
import os
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from running import CONFIG, Part, records, run_steps

from sparsekit.runs import Position, Run, epoch_batches, lock, read_status


def test_what_a_folder_holds(tmp_path):
    with Run.open(tmp_path / "run", CONFIG, steps=2) as run:
        run.restore(part=Part())
        for indices in run.batches(4, 2, epochs=1):
            run.record(loss=0.5 if run.step == 1 else float("nan"), count=len(indices))
        run.save()
        run.finish({"loss": 0.5})
    files = {path.relative_to(run.folder).as_posix() for path in run.folder.rglob("*") if path.name != ".lock"}
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


def start(code):
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, "-c", code], env=environment, text=True, **pipes)


def test_a_running_folder_is_refused_until_its_process_is_killed(tmp_path):
    code = f"""
import os
from sparsekit.runs import Run
Run.open({str(tmp_path)!r}, {{}})
if os.fork() == 0:
    try:
        Run.open({str(tmp_path)!r}, {{}})
    except RuntimeError as error:
        print(error)
    print(flush=True)
    input()
    os._exit(0)
input()"""
    with start(code) as process:
        message = f"is being run by process {process.pid} on {socket.gethostname()}: wait for it, or name another"
        assert message in process.stdout.readline()
        with pytest.raises(RuntimeError, match=message):
            Run.open(tmp_path, {})
        process.kill()
        process.wait()
        with Run.open(tmp_path, {}):  # though the forked process still runs
            pass


def test_a_gentle_stop(tmp_path):
    code = (
        f"from sparsekit.runs import Run\nwith Run.open({str(tmp_path)!r}, {{}}):\n    print(flush=True)\n    input()"
    )
    with start(code) as process:
        process.stdout.readline()
        status = read_status(tmp_path)
        with pytest.raises(RuntimeError, match=f"process {process.pid} on .* does not run here"):
            replace(status, process_started=status.process_started - 1).stop()  # the id is another process's now
        assert process.poll() is None
        status.stop()
        assert process.wait(20) == 128 + signal.SIGTERM
    assert read_status(tmp_path).state == "stopped"
    with pytest.raises(RuntimeError, match="there is nothing to stop"):
        status.stop()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@pytest.mark.parametrize(
    ("changes", "refused"),
    [
        ({}, None),
        ({"host": "node7"}, "process 12 on node7"),
        ({"host": "node7", "state": "failed"}, None),
        ({"host": "node7", "heartbeat": 0.0}, None),
    ],
)
def test_without_locks_the_status_decides(tmp_path, monkeypatch, changes, refused):
    monkeypatch.setattr(lock, "_lock", lambda descriptor: None)
    with Run.open(tmp_path, {}):
        pass
    status = replace(read_status(tmp_path), state="running", process=12, process_started=0)
    replace(status, **changes).write(tmp_path)
    if refused:
        with pytest.raises(RuntimeError, match=f"is being run by {refused}: wait for it"):
            Run.open(tmp_path, {})
    else:
        with Run.open(tmp_path, {}):
            pass


def test_a_process_whose_start_is_unknown(tmp_path, monkeypatch):
    with Run.open(tmp_path, {}), start("input()") as process:
        known = replace(read_status(tmp_path), process=process.pid, process_started=None)
        assert known.is_alive()
        with pytest.raises(RuntimeError, match=f"process {process.pid} may be another one by now"):
            known.stop()
        process.kill()
        process.wait()
        assert not known.is_alive()
    monkeypatch.setattr("sparsekit.runs.status.os", SimpleNamespace(name="nt", getpid=os.getpid))
    assert known.is_alive() and not replace(known, heartbeat=known.heartbeat - 4000).is_alive()


def test_a_crash_is_told(tmp_path):
    code = f"from sparsekit.runs import Run\nwith Run.open({str(tmp_path)!r}, {{}}): raise OSError('no more data')"
    with start(code) as done:
        _, error = done.communicate()
    assert done.returncode == 1 and "no more data" in error
    assert read_status(tmp_path).state == "failed" and not read_status(tmp_path).is_alive()
    assert "OSError: no more data" in (tmp_path / "log.txt").read_text()


def test_a_wrong_record_leaves_no_line(tmp_path):
    run = Run.open(tmp_path, {})
    with pytest.raises(ValueError, match=r"the step of a record is run\.step, 0: give 7 another name"):
        run.record(step=7)
    with pytest.raises(TypeError, match="Tensor"):
        run.record(loss=torch.ones(()))
    assert records(tmp_path) == []


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
    with pytest.raises(ValueError, match="data must be a mapping or None, got 3"):
        Position(0, 0, 3)


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


@pytest.mark.parametrize("steps", [None, 3])
def test_only_finish_finishes(tmp_path, steps):
    with Run.open(tmp_path, {}, steps=steps) as run:
        run.step = 3
    assert read_status(tmp_path).state == "stopped"
    with Run.open(tmp_path, {}, steps=steps) as run:
        run.finish()
        run.log("and something is said")
    assert read_status(tmp_path).state == "finished"


def test_other_data_are_refused(tmp_path):
    with Run.open(tmp_path, {}) as run:
        run.restore()
        for _ in run.batches(6, 2, epochs=1):
            run.save()
    assert run.position == Position(1, 0, {"count": 6, "batch_size": 2, "seed": 0})
    with Run.open(tmp_path, {}) as run:
        assert run.restore()
        assert len(list(run.batches(6, 2, epochs=2))) == 3
        before, now = "count=6, seed=0", "count=7, seed=1"
        with pytest.raises(ValueError, match=f"was begun with {before} and cannot go on with {now}: that is another"):
            list(run.batches(7, 2, epochs=3, seed=1))


def test_a_finished_run_is_opened_to_read_its_result(tmp_path):
    with pytest.raises(KeyError, match="after the end"), Run.open(tmp_path, {"a": 1}, steps=3) as run:
        run.step = 3
        run.finish({"loss": 0.5})
        raise KeyError("after the end")
    with pytest.raises(KeyError, match="plot"), Run.open(tmp_path, {"a": 1}, steps=3) as run:
        assert run.result == {"loss": 0.5}
        raise KeyError("plot")
    assert (read_status(tmp_path).state, read_status(tmp_path).step) == ("finished", 3)


def test_a_finished_run_goes_on_only_after_restore(tmp_path):
    with Run.open(tmp_path, {}) as run:
        run.restore()
        for _ in run.batches(4, 2, epochs=1):
            run.record(loss=0.5)
        run.save()
        run.finish()
        assert not list(run.batches(4, 2, epochs=1))
        for act in (run.save, run.record, run.finish, lambda: list(run.batches(4, 2, epochs=2))):
            with pytest.raises(RuntimeError, match=r"is finished: call restore\(\.\.\.\) first to go on with it"):
                act()
    assert read_status(tmp_path).state == "finished" and len(records(tmp_path)) == run.step == 2
    with Run.open(tmp_path, {}) as run:
        run.restore()
        assert len(list(run.batches(4, 2, epochs=2))) == 2
    assert read_status(tmp_path).state == "stopped"


def test_a_full_disk_does_not_hide_that_a_run_failed(tmp_path, monkeypatch):
    def full(run, text):
        raise OSError("no space left")

    monkeypatch.setattr(Run, "log", full)
    with pytest.raises(KeyError, match="lr"), Run.open(tmp_path, {}):
        (tmp_path / "status.json").write_text("torn")  # which the first process does not ask
        raise KeyError("lr")
    assert read_status(tmp_path).state == "failed"


def test_the_rate_is_measured_without_restore_too(tmp_path):
    with Run.open(tmp_path, {}, steps=4) as run:
        for _ in run.batches(2, 1, epochs=1):
            pass
    status = read_status(tmp_path)
    assert status.rate > 0 and status.left == pytest.approx(2 / status.rate)
