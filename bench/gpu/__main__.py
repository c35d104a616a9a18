"""Measures on the GPU of this machine: `python -m bench.gpu`. `make gpu` also builds first, and tests afterwards.

Every section runs in a process of its own, so that a fault, a hang or a lost device ends that section only. Its rows
go to OUT/sections/NAME.jsonl as soon as they are known, and its output to NAME.log. After each section, a JSON file and
`table.md` in OUT hold all that is known so far.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from multiprocessing import get_context
from pathlib import Path

import torch

from bench.report import RESULTS, commit, slug, today, write

from . import compress, machine, memory_ops, products
from .lab import Lab, gpu_lab
from .rows import Row, Rows, one_line, read
from .table import details, render

GRACE = 15.0  # seconds that a section has to start and to end its last item
TUNING = 2.5  # times as long for sections that choose configurations, too
# What measures, and the seconds that it may take; the time that it leaves over is not given to others.
SECTIONS: dict[str, tuple[Callable[[Lab, Rows], None], float]] = {
    "machine": (machine.machine, 20),
    "memory": (memory_ops.memory, 75),
    "linear": (products.linear, 90),
    "tiered": (products.tiered, 20),
    "search": (products.search, 50),
    "compress": (compress.compress, 75),
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, help="folder for the results; default build/gpu, and bench/results/")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, help="only these sections")
    parser.add_argument("--tune", action="store_true", help="choose the configurations of the Triton kernels, too")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("bench.gpu: this needs a GPU that PyTorch can use", file=sys.stderr)
        return 2
    out = options.out or Path("build", "gpu")
    report = measure_all(torch.cuda.get_device_name(0), options.only or SECTIONS, out, options.tune)
    if not (options.out or options.only):
        write(RESULTS / f"{slug(report)}.json", report)
    return 0


def measure_all(device: str, names: Iterable[str], out: Path, tune: bool) -> Row:
    """Runs sections one after the other, and writes the report and the tables of all results after each."""
    report: Row = {"kind": "gpu", "device": device, "commit": commit(), "date": today(), "sections": {}}
    for name in names:
        path = out / "sections" / f"{name}.jsonl"
        seconds = SECTIONS[name][1] * (TUNING if tune else 1)
        begin = time.monotonic()
        ended = run(name, path, seconds, tune)
        report["sections"][name] = {"ended": ended, "seconds": time.monotonic() - begin, "rows": read(path)}
        print(f"{name}: {ended}", flush=True)
        (out / "table.md").write_text(render(report) + "\n" + details(report), encoding="utf-8")
        write(out / f"{slug(report)}.json", report)
    print(details(report))
    return report


def run(name: str, path: Path, seconds: float, tune: bool) -> str:
    """Runs a section in a process of its own; returns how it ended."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    process = get_context("spawn").Process(target=_in_process, args=(name, path, seconds, tune))
    process.start()
    process.join(seconds + GRACE)
    if process.exitcode is None:
        process.kill()
        return f"stopped, as it did not end within {seconds + GRACE:.0f} s"
    return f"failed with exit code {process.exitcode}" if process.exitcode else how_it_ended(read(path))


def _in_process(name: str, path: Path, seconds: float, tune: bool) -> None:
    os.environ["SPARSEKIT_TUNE_CACHE"] = "0"
    with path.with_suffix(".log").open("w") as printed:
        os.dup2(printed.fileno(), 1)
        os.dup2(printed.fileno(), 2)
    measure(name, path, seconds, tune)


def measure(name: str, path: Path, seconds: float, tune: bool) -> None:
    """Runs a section in this process."""
    rows = Rows(path, seconds)
    try:
        SECTIONS[name][0](gpu_lab(tune), rows)
    except Exception as error:
        rows.write(what="the end", error=one_line(error))
        raise


def how_it_ended(rows: Sequence[Row]) -> str:
    """Returns how a section ended that ran to its end: ``"done"``, or what it had no time for."""
    cuts = [row["cut"] for row in rows if "cut" in row]
    return f"cut short ({'; '.join(cuts)})" if cuts else "done"


if __name__ == "__main__":
    sys.exit(main())
