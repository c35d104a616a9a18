"""Prints the table of a run, and writes its log and its picture."""

from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import Patch

from sparsekit._table import table_lines
from sparsekit.tiers import IterationReport, TierMap
from sparsekit.tiers.tier_map import COLORS

COLUMNS = ("run", "iteration", "dense", "mid_2_4", "topk", "expected_sparsity", "sparsity", "ppl")


@dataclass
class Run:
    """The reports of one way of pruning; their metric is the perplexity."""

    name: str
    reports: list[IterationReport]


def rows(dense: float, runs: list[Run]) -> list[tuple[str, ...]]:
    """Returns the rows of the table: the dense model, then one row for each iteration."""
    table = [("dense", "0", "1.0000", "0.0000", "0.0000", "0.0000", "0.0000", f"{dense:.4f}")]
    for run in runs:
        for report in run.reports:
            numbers = (*report.ratios, report.expected_sparsity, report.sparsity, report.metric)
            table.append((run.name, str(report.step.iteration), *(f"{number:.4f}" for number in numbers)))
    return table


def print_table(dense: float, runs: list[Run]) -> None:
    print(*table_lines([COLUMNS, *rows(dense, runs)], "<" + ">" * (len(COLUMNS) - 1)), sep="\n")


def write_log(path: Path, dense: float, runs: list[Run]) -> None:
    path.write_text("".join("\t".join(row) + "\n" for row in [COLUMNS, *rows(dense, runs)]), "utf-8")


def draw(path: Path, dense: float, runs: list[Run], tier_maps: dict[str, TierMap]) -> None:
    """Draws perplexity against sparsity on the left, and the tier maps of the last iteration on the right."""
    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    names = [*tier_maps][:: max(1, len(tier_maps) // 12)][:12]
    figure = plt.figure(figsize=(13, 5.6), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1, 1.15))
    axes = left.subplots()
    axes.axhline(dense, color="#6f7a8c", linestyle=":", label="dense")
    for run, style in zip(runs, ("o-", "s--", "D"), strict=False):
        sparsity = [100 * report.sparsity for report in run.reports]
        axes.plot(sparsity, [report.metric for report in run.reports], style, label=run.name)
    axes.set(xlabel="masked in the linear layers, %", ylabel="perplexity, held out", yscale="log")
    axes.yaxis.set_major_formatter("{x:.3g}")
    axes.yaxis.set_minor_formatter("{x:.3g}")
    axes.legend(frameon=False)
    grid = [*right.subplots(3, 4).flat]
    for axes in grid:
        axes.axis("off")
    for axes, name in zip(grid, names, strict=False):
        axes.imshow(tier_maps[name].picture().numpy(), interpolation="nearest")
        axes.set_title(name.removeprefix("model.layers."), fontsize=7)
    patches = [
        Patch(color=[part / 255 for part in color], label=tier)
        for color, tier in zip(COLORS, ("dense", "2:4", "top-k"), strict=True)
    ]
    right.legend(handles=patches, loc="outside lower center", ncols=3, frameon=False)
    right.suptitle("Tiers of the blocks", fontsize=10)
    figure.savefig(path, dpi=120)
    plt.close(figure)
