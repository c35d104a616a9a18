"""The script and the sweep of ``docs/runs.md`` do what the page says."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.slow


def test_the_page(tmp_path):
    for package in ("tyro", "rich", "matplotlib", "pynvml"):
        pytest.importorskip(package)
    text = (ROOT / "docs" / "runs.md").read_text(encoding="utf-8")
    for language, name in (("python", "train.py"), ("toml", "lr.toml")):
        (found,) = re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)
        (tmp_path / name).write_text(found)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    (command,) = re.findall(r"^sparsekit (sweep .*?) +#", text, re.MULTILINE)
    for arguments in (command, "monitor lr --json"):
        done = subprocess.run(
            [sys.executable, "-m", "sparsekit", *arguments.split()],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
    runs = {run["run"]: run for run in json.loads(done.stdout)}
    assert {name: run["state"] for name, run in runs.items()} == {"small": "finished", "large": "finished"}
    assert runs["large"]["status"]["step"] == runs["large"]["status"]["steps"] == 930
    assert 0 < runs["large"]["result"]["loss"] < runs["small"]["result"]["loss"]
