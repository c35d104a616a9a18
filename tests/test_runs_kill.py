"""A run that is killed at random moments ends with the records and the weights of one that never was."""

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import training_run

from sparsekit.runs import read_status

SCRIPT = Path(training_run.__file__)


def start(folder, epochs, pause=0.01):
    command = [sys.executable, SCRIPT, folder, str(epochs), str(pause)]
    environment = {**os.environ, "PYTHONPATH": str(SCRIPT.parents[1])}
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


def assert_ends(process):
    _, error = process.communicate(timeout=60)
    assert process.returncode == 0, error


def contents(folder):
    last = sorted((folder / "state").glob("step-*"), key=lambda path: int(path.name[5:]))[-1]
    files = [folder / "metrics.jsonl", folder / "config.json", folder / "result.json", *sorted(last.iterdir())]
    return {path.relative_to(folder): path.read_bytes() for path in files}


def kill_and_compare(folder, epochs, kills, seed):
    clock = random.Random(seed)
    assert_ends(start(folder / "whole", epochs, 0))
    killed = 0
    for _ in range(20 * kills):
        process = start(folder / "killed", epochs)
        if killed < kills:
            end = time.monotonic() + 60
            while not is_running(folder / "killed", process) and process.poll() is None and time.monotonic() < end:
                time.sleep(0.005)
            time.sleep(clock.uniform(0, 0.15))
            killed += process.poll() is None
            process.kill()
            process.communicate()
            assert not read_status(folder / "killed").is_alive()
        else:
            assert_ends(process)
            break
    assert killed == kills
    assert contents(folder / "killed") == contents(folder / "whole")
    assert read_status(folder / "killed").state == "finished"


def is_running(folder, process):
    status = read_status(folder)
    return status is not None and status.process == process.pid


def test_killed_once_or_never(tmp_path):
    kill_and_compare(tmp_path, 5, 1, 0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_killed_many_times(tmp_path, seed):
    kill_and_compare(tmp_path, 10, 8, seed + 1)
