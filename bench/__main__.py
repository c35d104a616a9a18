"""Runs every bench in three processes, keeps the median of each figure and writes results/<device>.json."""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

import torch

from sparsekit.ops import simd_level

from .report import RESULTS, commit, cpu_name, render, slug, today, write

FOLDER = Path(__file__).parent
PROCESSES = 3
# A new tensor costs the first touch of every page: on some machines several times what filling it costs, and a `clone`
# pays the same. The processes keep freed memory (glibc), so that kernels are compared and not the allocator.
KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40), "MALLOC_TOP_PAD_": str(2**28)}


def measure(select: str) -> list[dict]:
    """Returns the rows of one fresh process."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "rows.json")
        options = ["-c", str(FOLDER / "pytest.ini"), "--rootdir", str(FOLDER), f"--benchmark-json={path}", "-k", select]
        done = subprocess.run([sys.executable, "-m", "pytest", *options, str(FOLDER)], env=os.environ | KEEP_MEMORY)
        if done.returncode:
            raise SystemExit("bench: a check is red, so nothing is reported")
        return [case["extra_info"] for case in json.loads(path.read_text())["benchmarks"]]


def middle(rows: tuple[dict, ...]) -> dict:
    """Returns the medians of one row over all processes."""
    return {
        **rows[0],
        **{
            part: {key: median(row[part][key] for row in rows) for key in rows[0][part]}
            for part in ("seconds", "ratios")
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("-k", default="", help="only the benches whose name has this; nothing is written then")
    select = parser.parse_args().k
    runs = [measure(select) for _ in range(PROCESSES)]
    report = {
        "device": cpu_name(),
        "simd": simd_level(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "date": today(),
        "commit": commit(),
        "processes": PROCESSES,
        "rows": [middle(rows) for rows in zip(*runs, strict=True)],
    }
    print(render(report))
    if not select:
        RESULTS.mkdir(exist_ok=True)
        write(RESULTS / f"{slug(report)}.json", report)


if __name__ == "__main__":
    main()
