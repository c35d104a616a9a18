"""``sparsekit sweep``: which variants it runs, how it stops them, and what it collects."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import training_run
from commands import call, refusal

from sparsekit.cli.processes import visible_gpus
from sparsekit.cli.results import collect, draw
from sparsekit.cli.variants import read_variants
from sparsekit.runs import Run, read_status

for package in ("tyro", "rich", "matplotlib", "pynvml"):
    pytest.importorskip(package)

PROGRAM = """
import json, os, subprocess, sys, time
from pathlib import Path

CHILD = '''
import os, signal, sys, time
from pathlib import Path

def stop(number, frame):
    time.sleep(0.3)  # while its parent has ended at once, as a shell does
    (folder / "stopped").touch()
    sys.exit()

folder = Path(sys.argv[1])
signal.signal(signal.SIGTERM, stop)
(folder / "child.tmp").write_text(str(os.getpid()))
(folder / "child.tmp").rename(folder / "child")
signal.pause()
'''
folder, act = Path(sys.argv[1]), sys.argv[2]
folder.mkdir(exist_ok=True)
with open(folder / "begun", "a") as file:
    file.write("x")
print("says", *sys.argv[3:], "on", os.environ.get("CUDA_VISIBLE_DEVICES"))
if act == "fail":
    sys.exit(3)
if act == "meet":  # the variants wait for each other
    while len(list(folder.parent.glob("*/begun"))) < 2:
        time.sleep(0.01)
if act == "wait":
    subprocess.Popen([sys.executable, "-c", CHILD, folder])
    time.sleep(60)
(folder / "result.json").write_text(json.dumps({"loss": len(act), "test": {"name": "a|b", "accuracy": 0.25}}))
"""


@pytest.fixture
def sweep(tmp_path, capsys):
    """Writes the file of a sweep of PROGRAM with an act for each variant; returns a call of the command."""
    (tmp_path / "program.py").write_text(PROGRAM)

    def run(*options, **acts):
        if acts:
            text = f'command = "python {tmp_path / "program.py"} {{out}}"\n'
            text += "".join(f'[variants.{name}]\nargs = "{act}"\n' for name, act in acts.items())
            (tmp_path / "sweep.toml").write_text(text)
        return call(["sweep", tmp_path / "sweep.toml", "--out", tmp_path / "out", *options], capsys)

    return run


def test_what_fails_stops_no_other_and_what_is_finished_is_not_run_again(sweep, tmp_path):
    out = tmp_path / "out"
    code, table, said = sweep(a="end --x 1", b="fail", c="end")
    assert code == 1 and said[-1] == f"sparsekit: b did not finish: see {out / 'b.txt'}"
    assert "b: fails with exit code 3" in said
    assert [line.split()[:2] for line in table.splitlines()[1:4]] == [["a", "finished"], ["b", "no"], ["c", "finished"]]
    assert (out / "results.csv").read_text() == (
        "variant,state,loss,test.name,test.accuracy\na,finished,3,a|b,0.25\nb,no run,,,\nc,finished,3,a|b,0.25\n"
    )
    assert (out / "results.md").read_text().splitlines()[2:4] == [
        r"| a | finished | 3 | a\|b | 0.25 |",
        "| b | no run |  |  |  |",
    ]
    assert (out / "results.png").read_bytes().startswith(b"\x89PNG")
    assert (out / "a.txt").read_text() == "says --x 1 on None\n"
    code, table, _ = sweep("--json", "--only", "a", "b")
    assert code == 1 and [row["variant"] for row in json.loads(table)] == ["a", "b", "c"]
    assert {name: len((out / name / "begun").read_text()) for name in "abc"} == {"a": 1, "b": 2, "c": 1}
    code, _, said = sweep(a="end --x 1", b="end", c="end")
    assert code == 2 and said == [
        f"sparsekit: b was run by another command, python {tmp_path / 'program.py'} {{out}} fail: "
        f"remove {out / 'b'}, or name another variant"
    ]


def test_jobs_run_at_once_each_on_its_gpu(sweep, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5, 7")
    assert visible_gpus() == ["5", "7"]
    code, _, said = sweep("--jobs", 2, a="meet", b="meet")
    assert code == 0 and said[:2] == ["a: begins on GPU 5", "b: begins on GPU 7"]
    assert [(tmp_path / f"out/{name}.txt").read_text() for name in "ab"] == ["says on 5\n", "says on 7\n"]


def test_an_interrupt_stops_all_children(sweep, tmp_path):
    children = [tmp_path / f"out/{name}/child" for name in "bc"]

    def interrupt():
        while not all(child.exists() for child in children):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    threading.Thread(target=interrupt, daemon=True).start()
    code, _, said = sweep("--jobs", 2, a="end", b="wait", c="wait", d="end")
    assert code == 130 and said[-1] == "sparsekit: interrupted" and signal.getsignal(signal.SIGINT) is before
    for child in children:
        assert child.with_name("stopped").exists()
        end = time.monotonic() + 10
        while Path(f"/proc/{child.read_text()}/cmdline").exists() and is_running(child.read_text()):
            assert time.monotonic() < end
    states = {row["variant"]: row["state"] for row in collect(tmp_path / "out", "abcd")}
    assert states == {"a": "finished", "b": "no run", "c": "no run", "d": "no run"}
    assert not (tmp_path / "out/d").exists() and (tmp_path / "out/results.csv").exists()


def is_running(process):
    return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"


def test_a_variant_that_still_runs_is_left_alone(sweep, tmp_path):
    with Run.open(tmp_path / "out" / "a", {}):
        (tmp_path / "out" / "sweep.json").write_text("{}")
        code, _, said = sweep(a="end")
    assert code == 1 and said[0] == "a: is still running" and not (tmp_path / "out/a/begun").exists()


def test_a_folder_of_something_else_is_refused(sweep, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").touch()
    code, _, said = sweep(a="end")
    assert (code, said) == (2, [f"sparsekit: {tmp_path / 'out'} holds no sweep, but thesis.tex: name another folder"])


def test_the_command_of_a_variant(tmp_path):
    path = tmp_path / "sweep.toml"
    path.write_text(
        'command = ["python", "a b.py"]\nargs = "--out {out} --name \'c d\'"\n'
        '[variants.x]\n[variants."lr=0.1"]\nargs = ["--set", "{}{out}"]\n'
    )
    first, second = read_variants(path)
    assert (first.name, first.command) == ("x", ("python", "a b.py", "--out", "{out}", "--name", "c d"))
    assert second.filled(Path("o/lr=0.1"))[5:] == ["c d", "--set", "{}o/lr=0.1"] and second.name == "lr=0.1"
    assert first.filled(Path("o/x"))[:4] == [sys.executable, "a b.py", "--out", "o/x"]


VARIANT = "[variants.a]\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("command", "is no TOML: Expected '='"),
        (VARIANT, "has no command"),
        ('command = "x {out}"', "has no [variants.NAME]"),
        ('command = "x"\n' + VARIANT, "the command of a has no {out}, which is the folder of its run"),
        ("command = 3\n" + VARIANT, "command must be a string or a list of strings, got 3"),
        ('command = "x \'{out}"\n' + VARIANT, "command cannot be split: No closing quotation"),
        ('command = "x {out}"\njobs = 2\n' + VARIANT, "jobs is not known here: args, command, variants"),
        ('command = "x {out}"\n' + VARIANT + "lr = 1", "variants.a.lr is not known here: args"),
        ('command = "x {out}"\n[variants]\na = 1', "variants.a must be a table with args, got 1"),
        ('command = "x {out}"\n[variants."../a"]', "a variant is the name of a folder, of letters, digits and _.=+-"),
        ('command = "x {out}"\n[variants."a.txt"]', "a variant is the name of a folder"),
    ],
)
def test_a_file_that_is_no_sweep(tmp_path, capsys, text, message):
    (tmp_path / "x.toml").write_text(text)
    code, line = refusal(["sweep", tmp_path / "x.toml", "--out", tmp_path / "out"], capsys)
    assert code == 2 and message in line and str(tmp_path / "x.toml") in line and not (tmp_path / "out").exists()


def test_python_3_10_needs_tomli(tmp_path, capsys, monkeypatch):
    def missing(name):
        raise ModuleNotFoundError(name)

    monkeypatch.setattr("sparsekit.cli.variants.import_module", missing)
    line = "sparsekit: a sweep needs tomli in Python 3.10: pip install 'sparsekit-kernels[systems]'"
    assert refusal(["sweep", tmp_path / "x.toml", "--out", tmp_path / "out"], capsys) == (1, line)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--only", "b"], "--only b is no variant of "),
        (["--jobs", 0], "--jobs must be positive, got 0"),
        (["--out", "sweep.toml"], "is a file, a folder is needed"),
    ],
)
def test_wrong_options(sweep, tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    code, _, said = sweep(*options, a="end")
    assert code == 2 and message in said[0]


@pytest.mark.parametrize("values", [{}, {"$a_{": 0.5}, {"long": 10**400}])
def test_results_of_any_kind_are_drawn(values):
    assert draw([{"variant": "a", "state": "no run", **values}]).startswith(b"\x89PNG")


def test_what_cannot_be_drawn_is_in_the_tables(sweep, tmp_path, monkeypatch):
    def fail(rows):
        raise ValueError("too large to draw")

    monkeypatch.setattr("sparsekit.cli.results.draw", fail)
    code, table, said = sweep(a="end")
    assert (code, said[-1]) == (1, "sparsekit: too large to draw") and "finished" in table
    assert (tmp_path / "out/results.csv").exists() and (tmp_path / "out/results.md").exists()


@pytest.mark.slow
def test_an_interrupted_sweep_goes_on_exactly(tmp_path):
    program = Path(training_run.__file__)
    environment = {**os.environ, "PYTHONPATH": str(program.parents[1])}
    text = f'command = "python {program} {{out}} 6"\n[variants.whole]\nargs = "0"\n[variants.stopped]\nargs = "0.02"\n'
    (tmp_path / "sweep.toml").write_text(text)
    out = tmp_path / "out"
    command = [sys.executable, "-m", "sparsekit", "sweep", tmp_path / "sweep.toml", "--out", out, "--jobs", "2"]
    with subprocess.Popen(command, env=environment) as first:
        while not list(out.glob("stopped/state/step-*")):
            assert first.poll() is None
            time.sleep(0.01)
        first.send_signal(signal.SIGTERM)
        assert first.wait(60) == 130
    assert read_status(out / "stopped").state == "stopped"
    assert subprocess.run(command, env=environment).returncode == 0
    whole, stopped = ((out / name / "metrics.jsonl").read_text() for name in ("whole", "stopped"))
    assert whole == stopped and len(whole.splitlines()) == 60
