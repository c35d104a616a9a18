"""Builds, checks and measures on the GPU of this machine, and writes one JSON and a table."""

import argparse
import datetime
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench.report import RESULTS, slug

from . import parts
from .log import read
from .parts import PARTS, TUNE, Part
from .table import details, render

RESERVE = 10 + parts.GRACE  # seconds at the end, for a part that ends late and for writing
Run = Callable[[Part, Path, float, bool], dict[str, Any]]


def main(arguments: Sequence[str] | None = None, run: Run = parts.run) -> int:
    options = parse(arguments)
    out = options.out or parts.ROOT / "build" / ("rehearsal" if options.rehearse else "gpu")
    chosen = {part.name: part for part in (*PARTS, TUNE)}
    if options.part:
        parts.measure(chosen[options.part], out.resolve(), options.seconds, options.rehearse)
        return 0
    if not options.rehearse and not has_gpu():
        print(
            "bench.gpu: this needs a GPU that PyTorch can use (`--rehearse` tries the program on the CPU)",
            file=sys.stderr,
        )
        return 2
    names = options.only or [part.name for part in PARTS[:2] + ((TUNE,) if options.tune else ()) + PARTS[2:]]
    report = {"kind": "gpu", "device": device(options.rehearse), "date": datetime.date.today().isoformat()}
    report |= {"commit": commit(), "parts": {}}
    measure(report, [chosen[name] for name in names], out.resolve(), options.minutes, options.rehearse, run)
    print(details(report))
    if not (options.out or options.only or options.rehearse):
        path = RESULTS / f"{slug(report)}.json"
        path.write_text(json.dumps(report, indent=1) + "\n")
        print(f"written to {path}")
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    names = [part.name for part in (*PARTS, TUNE)]
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    parser.add_argument("--out", type=Path, help="folder for the results; default build/gpu, and bench/results/")
    parser.add_argument("--minutes", type=float, default=8, help="for all together (8)")
    parser.add_argument("--only", nargs="+", choices=names, metavar="PART", help=f"only these: {', '.join(names)}")
    parser.add_argument("--tune", action="store_true", help="choose the configurations of the Triton kernels first")
    parser.add_argument("--rehearse", action="store_true", help="try the program on the CPU; the figures mean nothing")
    parser.add_argument("--part", choices=names, help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=60, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def device(rehearse: bool) -> str:
    import torch

    return "rehearsal" if rehearse else torch.cuda.get_device_name(0)


def measure(
    report: dict[str, Any], chosen: Sequence[Part], out: Path, minutes: float, rehearse: bool, run: Run
) -> None:
    """Runs the parts one after the other; after each, all that is known so far is written."""
    end = time.monotonic() + 60 * minutes - RESERVE
    for part in chosen:
        ended = run(part, out, min(part.seconds, end - time.monotonic()), rehearse)
        report["parts"][part.name] = {**ended, "rows": read(parts.rows_path(out, part))}
        print(
            f"{part.name}: {ended['status']}, {ended['seconds']:.0f} s {ended.get('reason', '')}".rstrip(), flush=True
        )
        write(out / f"{slug(report)}.json", json.dumps(report, indent=1))
        write(out / "table.md", render(report) + "\n" + details(report))


def write(path: Path, text: str) -> None:
    """Replaces a file, whole or not at all."""
    partial = path.with_suffix(".partial")
    partial.write_text(text + "\n", encoding="utf-8")
    os.replace(partial, path)


def commit() -> str:
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty"], cwd=parts.ROOT, capture_output=True, text=True
        )
    except OSError:
        return "unknown"
    return done.stdout.strip() or "unknown"


if __name__ == "__main__":
    sys.exit(main())
