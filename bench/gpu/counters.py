"""Check 4: what the hardware counters say of the vendor's best large product, by ncu where it is there."""

import csv
import io
import re
import shutil
import subprocess
import sys
from typing import Any

from .lab import Lab
from .log import NOT_MEASURED, Log, read
from .vendor import Algorithm

SHAPE, TOKENS = (4096, 4096), 4096
# How busy the tensor cores, shared memory and device memory were, at what clocks.
WANTED = re.compile(r"throughput|pipe_tensor|mem_shared|bank_conflict|duration|cycles_per_second|per_second|registers")


def measure(lab: Lab, log: Log) -> None:
    """Profiles the algorithm that the search found, with the clocks left alone."""
    tool = shutil.which("ncu")
    if tool is None:
        log.write(name="ncu", result=NOT_MEASURED, reason="ncu is not on the PATH")
        return
    with log.guard("ncu"):
        algorithm = chosen(read(log.path.with_name("search.jsonl")))
        call = [sys.executable, "-m", "bench.gpu.gemm", *map(str, SHAPE), str(TOKENS), *map(str, algorithm)]
        options = ["--clock-control", "none", "--profile-from-start", "off", "--set", "full", "--page", "raw", "--csv"]
        done = subprocess.run([tool, *options, *call], capture_output=True, text=True, timeout=max(log.left(), 1))
        kernels = parse(done.stdout)
        if not kernels:
            said = [line for line in (done.stdout + done.stderr).splitlines() if "==" in line or "rror" in line]
            log.write(name="ncu", result=NOT_MEASURED, reason=(said or ["it printed no kernel"])[-1][:300])
        for kernel in kernels:
            log.write(name="ncu", shape="x".join(map(str, SHAPE)), tokens=TOKENS, algorithm=algorithm, **kernel)


def chosen(rows: list[dict[str, Any]]) -> Algorithm:
    """The algorithm that won at this product; the library's default where nothing was found."""
    wanted = "x".join(map(str, SHAPE)), TOKENS
    won = [row["numbers"] for row in rows if "numbers" in row and (row["shape"], row["tokens"]) == wanted]
    return Algorithm(*won[0]) if won else Algorithm()


def parse(text: str) -> list[dict[str, Any]]:
    """The kernels of ncu's raw page: name, and the counters that were wanted, with their units."""
    start = text.find('"ID"')
    table = list(csv.reader(io.StringIO(text[start:]))) if start >= 0 else []
    if len(table) < 3:
        return []
    header, units, *rows = table
    return [
        {
            "kernel": dict(zip(header, row, strict=True)).get("Kernel Name", "?"),
            "counters": {
                key: f"{value} {unit}".strip()
                for key, unit, value in zip(header, units, row, strict=True)
                if WANTED.search(key)
            },
        }
        for row in rows
        if len(row) == len(header)
    ]
