"""Builds the package into the interpreter that runs this, from what is there: no network, no environment."""

import os
import subprocess
import sys
from pathlib import Path

from .log import Log

ROOT = Path(__file__).parents[2]
COMMAND = ["-m", "pip", "install", "-q", "--no-index", "--no-build-isolation", "--no-deps", "-e", "."]


def measure(lab: object, log: Log) -> None:
    """Installs the checkout with pip; where that fails the benches run from the checkout as it is."""
    environment = os.environ | {"PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_ROOT_USER_ACTION": "ignore"}
    with log.guard("pip"):
        done = subprocess.run(
            [sys.executable, *COMMAND],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=max(log.left(), 1),
        )
        if done.returncode:
            print(done.stdout)
            said = [line.strip() for line in done.stdout.splitlines() if "error" in line.lower()]
            raise RuntimeError((said or done.stdout.splitlines() or ["it said nothing"])[-1])
    code = "from sparsekit.ops import simd_level; print(simd_level())"
    with log.guard("import"):
        tried = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
        if tried.returncode:
            raise RuntimeError(tried.stderr.strip().splitlines()[-1])
        log.write(name="build", cpu_kernels=tried.stdout.strip())
