"""Tables and pictures of a report."""

import csv
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

COLORS = ("#2f5d9b", "#c9d3e3")


def table(found: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns the figures of each model in one flat row."""
    sizes = [(batch, length) for batch, length in dict.fromkeys((e["batch"], e["length"]) for e in found["latency"])]
    times = {(each["model"], each["batch"], each["length"]): each for each in found["latency"]}
    rows = []
    for name, row in found["rows"].items():
        flat = {
            "model": name,
            "accuracy": row["accuracy"],
            "low": row["interval"][0],
            "high": row["interval"][1],
            "n": row["n"],
            "p_against_student": row["against_student"]["p"],
            "gflops": row["flops"]["executed"] / 1e9,
            "megabytes": sum(row["bytes"].values()) / 1e6,
            "load_seconds": row["load_seconds"],
            "load_megabytes": row["load_bytes"] / 1e6,
        }
        for batch, length in sizes:
            for which in ("p50", "p95"):
                flat[f"{which}_ms_{batch}x{length}"] = 1000 * times[name, batch, length][which]
        rows.append(flat)
    return rows


def write_csv(found: dict[str, Any], path: Path) -> None:
    rows = table(found)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def write_markdown(found: dict[str, Any], path: Path) -> None:
    """Writes a table in Markdown, with the median latency and how many times that of the student it is as fast."""
    rows = table(found)
    timed = [key for key in rows[0] if key.startswith("p50_ms_")]
    student = next(row for row in rows if row["model"] == "student")
    head = ["model", "accuracy (95 %)", "p", "GFLOPs", "MB", "load s", *(f"ms at {key[7:]}" for key in timed)]
    lines = [head, ["---"] + ["---:"] * (len(head) - 1)]
    for row in rows:
        p = "" if row["model"] == "student" else f"{row['p_against_student']:.2g}"
        lines.append(
            [
                row["model"],
                f"{row['accuracy']:.2%} ({row['low']:.1%} to {row['high']:.1%})",
                p,
                f"{row['gflops']:.3f}",
                f"{row['megabytes']:.1f}",
                f"{row['load_seconds']:.2f}",
                *(f"{row[key]:.2f} ({student[key] / row[key]:.2f}x)" for key in timed),
            ]
        )
    path.write_text("".join(f"| {' | '.join(line)} |\n" for line in lines), "utf-8")


def draw_report(found: dict[str, Any], path: Path) -> None:
    """Draws the accuracy of each model over the operations that it executes; equal numbers of these side by side."""
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    rows = table(found)
    step, drawn = 0.012 * max(row["gflops"] for row in rows), list[float]()
    for row in rows:
        place = row["gflops"] + step * drawn.count(row["gflops"])
        drawn.append(row["gflops"])
        below, above = row["accuracy"] - row["low"], row["high"] - row["accuracy"]
        axes.errorbar(place, row["accuracy"], [[below], [above]], fmt="o", capsize=3, label=row["model"])
    batch, length = found["flops_at"]
    axes.set(xlabel=f"GFLOPs executed at {batch} x {length}", ylabel="accuracy, with 95 % intervals")
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def draw_comparison(found: dict[str, Any], path: Path) -> None:
    """Draws accuracy, latency at the first size, time to load and size of the file of each model."""
    rows = table(found)
    timed = next(key for key in rows[0] if key.startswith("p50_ms_"))
    figure = Figure(figsize=(11, 6), layout="constrained")
    names = [row["model"] for row in rows]
    panels = {
        "accuracy": "accuracy",
        timed: f"latency at {timed[7:]}, ms",
        "load_seconds": "time to load, s",
        "megabytes": "file, MB",
    }
    for axes, (key, label) in zip(figure.subplots(2, 2).flat, panels.items(), strict=True):
        bars(axes, names, [row[key] for row in rows], label)
        if key == "accuracy":
            spread = [[row["accuracy"] - row["low"] for row in rows], [row["high"] - row["accuracy"] for row in rows]]
            axes.errorbar(names, [row[key] for row in rows], spread, fmt="none", color="black", capsize=3)
            axes.set_ylim(bottom=max(0.0, min(row["low"] for row in rows) - 0.05))
    figure.savefig(path, dpi=110)


def bars(axes: Axes, names: list[str], values: list[float], label: str) -> None:
    axes.bar(names, values, color=COLORS[0])
    axes.set_title(label, fontsize=10)
    axes.tick_params(axis="x", rotation=40, labelsize=8)
