"""Builds the package into the interpreter that runs this, from what is there: no network, no environment."""

import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

from .log import Log, last_error

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
            raise RuntimeError(f"{last_error(done.stdout)} (with setuptools {version('setuptools')})")
    code = "from sparsekit.ops import simd_level; print(simd_level())"
    with log.guard("import"):
        tried = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
        if tried.returncode:
            raise RuntimeError(last_error(tried.stderr))
        log.write(name="build", cpu_kernels=tried.stdout.strip())
