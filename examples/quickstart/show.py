"""What the quickstart prints and draws."""

import os
import platform
import sys
from pathlib import Path

import matplotlib
import torch

import sparsekit as sk
from sparsekit._table import table_lines
from sparsekit.compress import CompressLayerReport

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import Patch

Speeds = dict[int, dict[str, float]]  # tokens per second, by tokens in a forward pass and by model
Reports = dict[int, sk.CompressReport]  # by the tokens in a forward pass that a model was compressed for
Measured = tuple[Reports, Speeds]
COLORS = {"plain dense": "#b8bec9", "best dense": "#6f7a8c", "sparsekit": "#e4572e"}
DECISIONS = {"2:4": "#e4572e", "prepacked": "#6f7a8c", "plain": "#dde1e7"}


def heading(text: str) -> None:
    print(f"\n\033[1m{text}\033[0m" if sys.stdout.isatty() else f"\n{text}")


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    """Prints a table: the first column aligned left, the others, which are numbers, aligned right."""
    for line in table_lines([head, *rows], "<" + ">" * (len(head) - 1)):
        print(f"  {line}")


def mebibytes(count: int) -> str:
    return f"{count / 2**20:.2f} MiB"


def machine() -> str:
    """Returns the CPU, the number of threads, and the SIMD level of the kernels."""
    cpu = platform.processor() or platform.machine()
    if (info := Path("/proc/cpuinfo")).exists():
        cpu = next(
            (line.split(": ")[1] for line in info.read_text().splitlines() if line.startswith("model name")), cpu
        )
    return f"{cpu}, {torch.get_num_threads()} threads of {os.cpu_count()}, {sk.ops.simd_level()} kernels"


def show_speed(speeds: Speeds) -> None:
    """Prints tokens per second of every model, how the last one compares, and where it is slower."""
    *others, ours = next(iter(speeds.values()))
    rows = [
        (
            f"{count} a pass",
            *(f"{speed[name]:,.0f}" for name in [*others, ours]),
            *(f"{speed[ours] / speed[name]:.2f}x" for name in others),
        )
        for count, speed in speeds.items()
    ]
    table(("tokens per second", *others, ours, *(f"vs {name}" for name in others)), rows)
    slower = [
        f"{speed[ours] / speed[name]:.2f}x {name} at {count}"
        for count, speed in speeds.items()
        for name in others
        if speed[ours] < 0.97 * speed[name]
    ]
    print(f"  slower: {', '.join(slower)}" if slower else "  slower than dense: nowhere")


def figure(path: Path, quality: dict[str, float], small: Measured, big: Measured) -> Path:
    """Draws quality, speed, decisions and memory: of the model in the upper row, at realistic size in the lower one."""
    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 10.5})
    fig, ((perplexities, *upper), (memory, *lower)) = plt.subplots(
        2, 3, figsize=(14, 7.6), width_ratios=[1, 1.15, 1.25]
    )
    _perplexities(perplexities, quality)
    _bytes(memory, {"this model": small[0], "realistic size": big[0]})
    for (speeds, decisions), (reports, measured), what in (
        (upper, small, "this model"),
        (lower, big, "realistic size"),
    ):
        _speeds(speeds, measured, f"Speed, {what}")
        _decisions(decisions, reports, f"Layers by tokens a pass, {what}")
    fig.suptitle(f"sparsekit quickstart, {machine()}, torch {torch.__version__}", fontsize=9, color="#555")
    fig.tight_layout(rect=(0, 0, 1, 0.98))
    fig.savefig(path, dpi=130)
    plt.close(fig)
    return path


def _perplexities(axes: plt.Axes, quality: dict[str, float]) -> None:
    colors = ["#6f7a8c" if name.startswith("dense") else "#e4572e" for name in quality]
    bars = axes.bar(list(quality), list(quality.values()), color=colors, width=0.65)
    axes.bar_label(bars, fmt="%.2f", padding=2, fontsize=8)
    axes.axhline(quality["dense"], color="#6f7a8c", linewidth=0.8, linestyle=":")
    axes.tick_params(axis="x", labelrotation=25)
    if max(quality.values()) > 10 * quality["dense"]:
        axes.set_yscale("log")
    axes.set_title("Perplexity on held-out text (lower is better)", loc="left")
    axes.margins(y=0.12)


def _speeds(axes: plt.Axes, speeds: Speeds, title: str) -> None:
    """Draws bars of the speed relative to plain dense, with the tokens per second on them."""
    names = list(next(iter(speeds.values())))
    for index, name in enumerate(names):
        heights = [speed[name] / speed[names[0]] for speed in speeds.values()]
        bars = axes.bar(
            [at + 0.27 * (index - 1) for at in range(len(speeds))], heights, 0.25, color=COLORS[name], label=name
        )
        axes.bar_label(bars, [f"{speed[name]:,.0f}" for speed in speeds.values()], padding=2, fontsize=7.5, rotation=90)
    axes.axhline(1, color="#6f7a8c", linewidth=0.8, linestyle=":")
    axes.set_xticks(range(len(speeds)), [f"{count} token{'s' * (count > 1)} a pass" for count in speeds])
    axes.set_ylabel("speed against plain dense")
    axes.set_title(f"{title} (labels: tokens/s)", loc="left")
    axes.margins(y=0.3)
    axes.legend(frameon=False, ncols=3, loc="upper left", fontsize=8)


def _bytes(axes: plt.Axes, reports: dict[str, Reports]) -> None:
    bars = [(what, count, report) for what, found in reports.items() for count, report in found.items()]
    for at, (_, _, report) in enumerate(bars):
        for offset, size, color in ((-0.2, report.bytes_before, "#6f7a8c"), (0.2, report.bytes_after, "#e4572e")):
            drawn = axes.bar(at + offset, size / report.bytes_before, 0.38, color=color)
            axes.bar_label(drawn, [f"{size / 2**20:.3g}"], padding=2, fontsize=7)
    axes.set_xticks(range(len(bars)), [f"at {count}" for _, count, _ in bars], fontsize=8)
    for index, what in enumerate(reports):
        middle = (index + 0.5) / len(reports)
        axes.text(middle, -0.14, what, transform=axes.transAxes, ha="center", va="top", fontsize=8.5)
    axes.set_ylabel("share of dense")
    axes.set_title("Memory in MiB: dense gray, compressed red", loc="left")
    axes.margins(y=0.12)


def _decisions(axes: plt.Axes, reports: Reports, title: str) -> None:
    """Draws a grid of ratios to plain dense: a row for each block, a column for each kind of layer and token count."""
    rows: dict[str, dict[str, CompressLayerReport]] = {}
    for count, report in reports.items():
        for layer in (layer for layer in report.layers if layer.timings):
            parts = layer.name.split(".")
            number = next((part for part in parts if part.isdigit()), "")
            rows.setdefault(number, {})[f"{parts[-1]} at {count}"] = layer
    columns = list(dict.fromkeys(kind for row in rows.values() for kind in row))
    for y, row in enumerate(rows.values()):
        for kind, layer in row.items():
            x = columns.index(kind)
            axes.add_patch(plt.Rectangle((x, y), 0.94, 0.9, color=DECISIONS[layer.decision]))
            ratios = [timing.ratio for count in layer.timings if (timing := layer.timing(count))]
            if ratios and len(columns) <= 12:  # more would not be legible
                color = "#8a93a3" if layer.decision == "plain" else "white"
                size = 7 if len(columns) < 8 else 5.5
                axes.text(
                    x + 0.47, y + 0.46, f"{min(ratios):.2f}x", ha="center", va="center", color=color, fontsize=size
                )
    axes.set(xlim=(0, len(columns)), ylim=(len(rows), 0))
    axes.set_xticks([x + 0.47 for x in range(len(columns))], columns, rotation=40, ha="right", fontsize=8)
    axes.set_yticks([y + 0.45 for y in range(len(rows))], [f"block {key}" if key else "" for key in rows])
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.set_title(f"{title} (times plain dense)", loc="left")
    axes.legend(
        handles=[Patch(color=color, label=name) for name, color in DECISIONS.items()],
        frameon=False,
        ncols=3,
        loc="upper center",
        bbox_to_anchor=(0.5, -0.24),
        fontsize=8,
    )
