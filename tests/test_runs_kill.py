"""A run that is killed anywhere ends with the records and the weights of one that never was, bit for bit."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("killed_run.py")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked processes")
@pytest.mark.parametrize(
    ("where", "count"),
    [
        ("moments", 2),
        pytest.param("moments", 12, marks=pytest.mark.slow),
        pytest.param("lines", 40, marks=pytest.mark.slow),
    ],
)
def test_a_killed_run_goes_on_exactly(tmp_path, where, count):
    environment = {**os.environ, "PYTHONPATH": str(SCRIPT.parents[1]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", SCRIPT, tmp_path, where, str(count)]
    done = subprocess.run(command, env=environment, stderr=subprocess.PIPE, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
