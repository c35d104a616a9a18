"""``sparsekit monitor``: what it reads of runs, the table that it prints, and its panel."""

import asyncio
import json
import sys
import time
import types
from dataclasses import replace

import pytest
from commands import call, refusal
from running import CONFIG

from sparsekit.cli.watch import Watch, WatchedRun, averaged, sparkline
from sparsekit.runs import Run, Status, read_status

for package in ("tyro", "rich", "textual", "pynvml"):
    pytest.importorskip(package)


def write_run(folder, steps=4, **changes):
    """A run that has made some of 10 steps, with a status as if its process had done otherwise."""
    with Run.open(folder, CONFIG, steps=10) as run:
        run.restore()
        for step in range(1, steps + 1):
            run.step = step
            run.record(lr=0.1, loss=1 / step)
        run.log("the last line")
        if changes.get("state") == "finished":
            run.finish({"loss": 0.25, "test": {"accuracy": 0.5, "all": [1]}})
    replace(read_status(folder), **changes).write(folder)


@pytest.fixture
def runs(tmp_path):
    write_run(tmp_path / "sweep" / "a", state="finished")
    write_run(tmp_path / "sweep" / "b", state="running", rate=2.0, left=3.0)
    write_run(tmp_path / "c", state="running", process_started=1)
    write_run(tmp_path / "d", state="running", host="node7", heartbeat=time.time() - 900)  # it evaluates
    write_run(tmp_path / "e", state="running", host="node7", heartbeat=time.time() - 4000)
    write_run(tmp_path / "f", state="failed")
    (tmp_path / "f" / "samples" / "status.json").touch()  # a run holds no other
    write_run(tmp_path / "g")
    (tmp_path / "g" / "status.json").write_text("{}")
    return tmp_path


STATES = {
    "c": "killed",
    "d": "running",
    "e": "silent",
    "f": "failed",
    "g": "unreadable",
    "sweep/a": "finished",
    "sweep/b": "running",
}


def test_the_state_of_every_run_below_a_folder(runs):
    assert {run.name: run.state for run in Watch(runs).read()} == STATES
    (only,) = Watch(runs / "f").read()
    assert (only.name, only.loss) == ("f", "loss")
    assert only.log().endswith(" the last line\n")


def test_only_what_is_new_is_read(tmp_path):
    write_run(tmp_path)
    watch = Watch(tmp_path)
    (run,) = watch.read()
    curve = [(step, 1 / step) for step in (1, 2, 3, 4)]
    assert run.curve.points == curve
    path = tmp_path / "metrics.jsonl"
    with open(path, "a") as file:
        file.write('{"step": 5, "loss": null}\n{"step": 5, "loss": 1' + 400 * "0" + "}\\n")
        file.write('not JSON\n[]\n{"loss": 1}\n{"step": 6, "loss": 0.5}\n{"step": 7, "lo')
    assert watch.read() == [run] and run.curve.points == [*curve, (6, 0.5)]
    with open(path, "a") as file:
        file.write('ss": 2}\n')
    watch.read()
    assert run.curve.points == [*curve, (6, 0.5), (7, 2)]
    path.write_text('{"step": 1, "loss": 9.0}\n')
    watch.read()
    assert run.curve.points == [(1, 9.0)]
    path.unlink()
    watch.read()
    assert run.curve.points == []


def test_a_long_curve_is_thinned_evenly(tmp_path):
    with open(tmp_path / "metrics.jsonl", "w") as file:
        file.writelines(f'{{"step": {step}, "val": {step}}}\n' for step in range(1, 100_001))
    run = WatchedRun(tmp_path, "x")
    run.read()
    assert run.loss == "val" and run.curve.last == 100_000
    assert run.curve.points == [(step, step) for step in range(1, 100_001, 32)]
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 50001, "val": 0}\n{"step": 50002, "val": -1}\n')
    run.read()
    assert run.curve.last == -1
    assert run.curve.points == [(step, step) for step in range(1, 50_000, 32)] + [(50_001, 0)]


def test_means_and_bars_of_a_curve():
    assert averaged([(step, step) for step in range(5000)], 5) == [499.5, 1499.5, 2499.5, 3499.5, 4499.5]
    assert averaged([(3, 1.0)], 4) == [1.0] and averaged([], 4) == []
    assert sparkline([0, 1, 2, 3]) == "▁▃▆█" and sparkline([2.0]) == "▁" and sparkline([]) == ""


def test_the_loss_is_shown_though_a_probe_has_recorded_first(tmp_path):
    path = tmp_path / "metrics.jsonl"
    run = WatchedRun(tmp_path, "x")
    seen = []
    for text in ('{"step": 1, "norm": 3.0}', '{"step": 1, "eval_loss": 2.0}', '{"step": 2, "lr": 1, "loss": 0.5}'):
        with open(path, "a") as file:
            file.write(text + "\n")
        run.read()
        seen.append((run.loss, run.curve.points))
    assert seen == [("norm", [(1, 3.0)]), ("eval_loss", [(1, 2.0)]), ("loss", [(2, 0.5)])]
    path.write_text('{"step": 1, "norm": 4.0}\n')
    run.read()
    assert (run.loss, run.curve.points) == ("norm", [(1, 4.0)])


def test_the_table(runs, capsys, monkeypatch):
    code, out, _ = call(["monitor", runs, "--once"], capsys)
    lines = [line.split() for line in out.splitlines()]
    assert code == 0 and lines[:2] == [["no", "GPU"], "run state step loss curve rate left result".split()]
    assert [(line[0], line[1]) for line in lines[2:]] == list(STATES.items())
    assert lines[-2] == "sweep/a finished 4/10 0.25 █▃▂▁ loss 0.25, test.accuracy 0.5".split()
    assert lines[-1] == "sweep/b running 4/10 0.25 █▃▂▁ 2/s 0:00:03".split()
    assert call(["monitor", runs], capsys)[1] == out  # as stdout is no terminal
    found = json.loads(call(["monitor", runs, "--json"], capsys)[1])
    assert {run["run"]: run["state"] for run in found} == STATES
    assert found[-2]["status"]["steps"] == 10 and found[-2]["loss"] == found[-2]["result"]["loss"] == 0.25


def test_no_run_and_no_folder(tmp_path, capsys, monkeypatch):
    assert call(["monitor", tmp_path], capsys)[1].splitlines()[-1] == f"no run below {tmp_path}"
    assert refusal(["monitor", tmp_path / "x"], capsys) == (2, f"sparsekit: there is no folder {tmp_path / 'x'}")
    monkeypatch.setattr("sparsekit.cli.errors.find_spec", lambda name: None)
    line = "sparsekit: the table needs nvidia-ml-py: pip install 'sparsekit-kernels[systems]'"
    assert refusal(["monitor", tmp_path], capsys) == (1, line)
    assert call(["monitor", tmp_path, "--json"], capsys)[:2] == (0, "[]\n")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    line = "sparsekit: the panel needs textual, nvidia-ml-py: pip install 'sparsekit-kernels[systems]'"
    assert refusal(["monitor", tmp_path], capsys) == (1, line)


def test_the_gpus(tmp_path, capsys, monkeypatch):
    class NVMLError(Exception):
        pass

    def nvmlDeviceGetUtilizationRates(gpu):
        if gpu:
            raise NVMLError("not supported")
        return types.SimpleNamespace(gpu=93)

    fake = types.ModuleType("pynvml")
    vars(fake).update(NVMLError=NVMLError, NVML_TEMPERATURE_GPU=0, nvmlInit=lambda: None, nvmlShutdown=lambda: None)
    vars(fake).update(nvmlDeviceGetCount=lambda: 2, nvmlDeviceGetHandleByIndex=lambda index: index)
    vars(fake).update(nvmlDeviceGetName=lambda gpu: "H200", nvmlDeviceGetTemperature=lambda gpu, kind: 61)
    vars(fake).update(nvmlDeviceGetMemoryInfo=lambda gpu: types.SimpleNamespace(used=3 << 30, total=139 << 30))
    vars(fake).update(nvmlDeviceGetUtilizationRates=nvmlDeviceGetUtilizationRates)
    fake.__spec__ = object()  # find_spec asks for it
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    first, second, _ = call(["monitor", tmp_path], capsys)[1].splitlines()
    assert first == "H200   93 % in use  3.00 GiB of 139.00 GiB  61 °C"
    assert second == "H200  3.00 GiB of 139.00 GiB  61 °C"


@pytest.mark.slow
def test_the_panel_shows_runs_and_stops_the_chosen_one(runs, monkeypatch):
    from textual.widgets import DataTable, Log, Sparkline, Static

    from sparsekit.cli.panel import Panel

    stopped, said = [], []
    monkeypatch.setattr(Status, "stop", lambda status: stopped.append(status.process_started))

    async def drive():
        app = Panel(runs)
        monkeypatch.setattr(app, "notify", lambda text, **options: said.append(text))
        async with app.run_test(size=(120, 40)) as pilot:
            table = app.query_one("#runs", DataTable)
            await pilot.pause()
            shown = {str(table.get_row_at(row)[0]): str(table.get_row_at(row)[1]) for row in range(table.row_count)}
            assert shown == STATES
            await pilot.press("s")  # the first one was killed
            assert said == ["this run does not run"] and not stopped
            await pilot.press("end", "down", "down", "down", "down", "down", "down")
            await pilot.pause()
            assert str(app.query_one("#about", Static).render()) == "sweep/b: loss"
            assert app.query_one("#curve", Sparkline).data == [1, 1 / 2, 1 / 3, 1 / 4]
            assert "the last line" in "".join(app.query_one("#log", Log).lines)
            await pilot.press("s", "n")
            assert not stopped
            await pilot.press("s")
            write_run(runs / "sweep" / "new", steps=1)
            app.look()
            await pilot.press("y")
            assert stopped == [read_status(runs / "sweep" / "b").process_started]
            assert said[1:] == ["asked sweep/b to stop"] and table.row_count == len(STATES) + 1
            await pilot.press("q")

    asyncio.run(drive())
