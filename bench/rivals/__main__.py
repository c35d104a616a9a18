"""Times all rivals, and writes results/rivals-<device>.json: `make rivals`."""

import argparse
from pathlib import Path

import torch

from sparsekit.ops import simd_level

from ..report import RESULTS, cpu_name, slug, write
from . import table
from .libraries import RIVALS
from .models import MODELS, TOKENS, Size
from .run import forget, read, run, summary

FOLDER = Path("build/rivals")
SHORT = {name: Size(2, 64, 2 if size.heads else 0) for name, size in MODELS.items()}


def arguments(parser: argparse.ArgumentParser) -> argparse.Namespace:
    parser.add_argument(
        "--only", nargs="+", choices=RIVALS, metavar="RIVAL", default=list(RIVALS), help=", ".join(RIVALS)
    )
    parser.add_argument("--model", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--threads", nargs="+", type=int, default=[2, 1])
    parser.add_argument("--tokens", nargs="+", type=int, default=TOKENS)
    parser.add_argument("--rounds", type=int, default=5, help="a run that has fewer is continued")
    parser.add_argument("--again", action="store_true", help="forgets what was measured of these rivals")
    parser.add_argument("--short", action="store_true", help="tiny models, one round; no result file is written")
    return parser.parse_args()


def main() -> None:
    options = arguments(argparse.ArgumentParser(prog="python -m bench.rivals", description=__doc__))
    folder = FOLDER / "short" if options.short else FOLDER
    for name in options.model:
        for threads in options.threads:
            path = folder / f"{name}-{threads}.jsonl"
            if options.again or options.short:
                forget(path, options.only)
            size, rounds = (SHORT[name], 1) if options.short else (MODELS[name], options.rounds)
            run(path, size, options.tokens, threads, options.only, rounds)
    report = result(folder)
    print(table.page([report]))
    if not options.short:
        write(RESULTS / f"{slug(report)}.json", report)


def result(folder: Path) -> dict:
    """Returns the report of all runs in a folder."""
    report = {"kind": "rivals", "device": cpu_name(), "simd": simd_level(), "torch": torch.__version__, "runs": []}
    for name in MODELS:
        for path in sorted(folder.glob(f"{name}-*.jsonl"), reverse=True):
            threads = int(path.stem.split("-")[1])
            report["runs"].append({"model": name, "threads": threads, "rows": summary(read(path))})
    for key in ("commit", "date"):
        found = [row[key] for each in report["runs"] for row in each["rows"].values() if key in row]
        report[key] = " and ".join(sorted(set(found)))
    return report


if __name__ == "__main__":
    main()
