"""Renders a result file as the table of the README: `python -m bench.report [results/<device>.json]`."""

import json
import platform
import re
import sys
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


def cpu_name() -> str:
    """The processor's model, as the system names it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def slug(report: dict) -> str:
    """The result file's name: processor and SIMD level."""
    return re.sub(r"[^a-z0-9]+", "-", f"{report['device']} {report['simd']}".lower()).strip("-")


def render(report: dict) -> str:
    """Both tables as markdown, with the machine named."""
    memory = [row for row in report["rows"] if "tokens" not in row]
    linear = [row for row in report["rows"] if "tokens" in row]
    machine = (
        f"{report['device']}, {report['simd']}, {report['threads']} threads, torch {report['torch']}, "
        f"commit {report['commit']}, {report['date']}; medians over {report['processes']} processes."
    )
    parts = [machine]
    if memory:
        parts.append(
            _table(["op", "size", "dtype", "ms", "GB/s", "of `copy_`", "over `topk`", "goal"], map(_memory, memory))
        )
    if linear:
        header = [
            "`linear24`",
            "dtype",
            "tokens",
            "ms",
            "GFLOP/s",
            "over `F.linear`",
            "over best dense",
            "limit",
            "goal",
        ]
        parts.append(_table(header, map(_linear, linear)))
    return "\n\n".join(parts) + "\n"


def _memory(row: dict) -> list[str]:
    seconds, ratios = row["seconds"]["own"], row["ratios"]
    over = f"{ratios['topk']:.0f}x" if "topk" in ratios else ""
    rate = f"{row['bytes'] / seconds / 1e9:.1f}"
    return [
        f"`{row['op']}`",
        row["shape"],
        row["dtype"],
        f"{seconds * 1e3:.2f}",
        rate,
        f"{ratios['copy_']:.0%}",
        over,
        _goal(row),
    ]


def _linear(row: dict) -> list[str]:
    seconds, ratios = row["seconds"]["own"], row["ratios"]
    best = min((key for key in row["seconds"] if key != "own"), key=lambda key: row["seconds"][key])
    return [
        row["shape"],
        row["dtype"],
        str(row["tokens"]),
        f"{seconds * 1e3:.2f}",
        f"{row['flops'] / seconds / 1e9:.0f}",
        f"{ratios['F.linear']:.2f}x",
        f"{ratios['best dense']:.2f}x ({best})",
        f"{row['limit']:.2f}x",
        _goal(row),
    ]


def _goal(row: dict) -> str:
    """Every goal of a row, and whether it is reached."""
    goals = []
    for key, wanted in row["goal"].items():
        text = f"{wanted:.0%}" if key == "copy_" else f"{wanted:g}x"
        goals.append(f"{text} {'yes' if row['ratios'][key] >= wanted else 'no'}")
    return ", ".join(goals)


def _table(header: list[str], rows) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> None:
    paths = [Path(path) for path in sys.argv[1:]] or sorted(RESULTS.glob("*.json"))
    if not paths:
        raise SystemExit("bench.report: no results yet; run `make bench`")
    print("\n".join(render(json.loads(path.read_text())) for path in paths), end="")


if __name__ == "__main__":
    main()
