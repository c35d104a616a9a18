"""Kills a training run in a forked process, which starts at once: ``python killed_run.py FOLDER moments|lines N``."""

import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

from interrupts import count_lines, interrupted
from training_run import main as train

from sparsekit.runs import read_status

EPOCHS = {"moments": 4, "lines": 1}
PAUSE = 0.01  # seconds between two steps, so that a kill finds the run at work


def start(act):
    """Calls ``act`` in a forked process and returns its id."""
    process = os.fork()
    if process == 0:
        try:
            act()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return process


def assert_ends(process):
    _, status = os.waitpid(process, 0)
    assert os.waitstatus_to_exitcode(status) == 0


def contents(folder):
    last = max((folder / "state").glob("step-*"), key=lambda path: int(path.name[5:]))
    files = [folder / "metrics.jsonl", folder / "config.json", folder / "result.json", *sorted(last.iterdir())]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def assert_same(folder, epochs, whole):
    assert_ends(start(lambda: train(folder, epochs, 0)))
    assert contents(folder) == whole, folder
    assert read_status(folder).state == "finished"
    assert not list(folder.rglob(".sk-*")), "what a kill left is removed"


def kill_at_moments(folder, epochs, count, whole):
    """Kills one run again and again, each time within the steps between two states or so."""
    clock = random.Random(count)
    killed = 0
    while killed < count:
        process = start(lambda: train(folder, epochs, PAUSE))
        time.sleep(clock.uniform(0, 0.15))
        os.kill(process, signal.SIGKILL)
        _, status = os.waitpid(process, 0)
        killed += os.WIFSIGNALED(status)
        if (known := read_status(folder)) is not None:
            assert not known.is_alive()
        if not os.WIFSIGNALED(status):
            break
    assert killed, "it was never killed"
    assert_same(folder, epochs, whole)


def kill_at_lines(folder, epochs, count, whole):
    """Kills runs at lines of the package that are evenly spread over the whole run.

    A run writes its status now and then, by the clock, so that one may end before the last line of another.
    """
    lines = count_lines(lambda: train(folder / "counted", epochs, 0))
    killed = 0
    for point in range(count):
        line = point * (lines - 1) // max(1, count - 1)
        one = folder / str(line)
        process = start(lambda one=one, line=line: interrupted(lambda: train(one, epochs, 0), line, kill))
        _, status = os.waitpid(process, 0)
        killed += os.WIFSIGNALED(status)
        assert os.WIFSIGNALED(status) or os.waitstatus_to_exitcode(status) == 0, line
        assert_same(one, epochs, whole)
    assert killed >= 0.9 * count, f"{killed} of {count} were killed"


def kill(message):
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    folder, where, epochs = Path(sys.argv[1]), sys.argv[2], EPOCHS[sys.argv[2]]
    assert_ends(start(lambda: train(folder / "whole", epochs, 0)))
    act = kill_at_moments if where == "moments" else kill_at_lines
    act(folder / "killed", epochs, int(sys.argv[3]), contents(folder / "whole"))
