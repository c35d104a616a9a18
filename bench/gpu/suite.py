"""The tests that a GPU can run, with the outcome of each on disk at once."""

import os
import subprocess
import sys
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

from .log import Log, read
from .recorder import PATH

ROOT = Path(__file__).parents[2]
MARKED = ("mark.triton", "mark.gpu")
WORKERS = 8  # compiling kernels is what takes the time


def measure(lab: object, log: Log) -> None:
    """Runs `pytest -m "triton or gpu"` on the files that have such tests, on several cores where xdist is there."""
    rows = log.path.with_name("outcomes.jsonl")
    command = [sys.executable, "-m", "pytest", "-q", "-m", "triton or gpu", "-p", "no:cacheprovider"]
    command += ["-p", "bench.gpu.recorder", "--continue-on-collection-errors", "-o", "filterwarnings=default"]
    workers = min(WORKERS, (os.cpu_count() or 1) // 2)
    if workers > 1 and find_spec("xdist"):
        command += ["-p", "xdist.plugin", "-n", str(workers)]
    environment = os.environ | {PATH: str(rows), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    timeout = max(log.left(), 1)
    try:
        done = subprocess.run([*command, *files()], cwd=ROOT, env=environment, timeout=timeout)
        log.write(name="exit code", value=done.returncode)
    except subprocess.TimeoutExpired:
        log.write(cut=f"the tests were stopped after {timeout:.0f} s")
    outcomes = read(rows)
    log.write(name="tests", **Counter(row["outcome"] for row in outcomes))
    for row in outcomes:
        if row["outcome"] == "failed":
            log.write(what=row["test"], error=row["error"])


def files() -> list[str]:
    """The test files that have GPU tests: importing the others takes time and may need packages that are not here."""
    found = sorted((ROOT / "tests").glob("test_*.py"))
    return [str(path) for path in found if any(mark in path.read_text(encoding="utf-8") for mark in MARKED)]
