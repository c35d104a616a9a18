"""The results of runs as a table and a plot."""

import csv
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from .._files import replacing
from .watch import WatchedRun, is_number

PLOTS = 12  # values that are drawn at most


def flat(result: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yields the numbers, strings and so on in a result, with names such as ``test.loss``; lists are left out."""
    if isinstance(result, dict):
        for key, each in result.items():
            yield from flat(each, f"{name}.{key}" if name else key)
    elif result is not None and not isinstance(result, list):
        yield name or "result", result


def collect(folder: Path, names: Iterable[str]) -> list[dict[str, Any]]:
    """Returns the state and the result of the runs of these names in a folder, one after the other."""
    rows = []
    for name in names:
        run = WatchedRun(folder / name, name)
        run.read()
        state = "finished" if run.result is not None else run.state if run.status else "no run"
        row = {"variant": name, "state": state}
        rows.append(row | {key: value for key, value in flat(run.result) if key not in row})
    return rows


def columns(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Returns the names of all values, in the order in which they first appear."""
    return list(dict.fromkeys(name for row in rows for name in row))


def write_tables(folder: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes ``results.csv`` and ``results.md``, each whole or not at all."""
    names = columns(rows)
    table = io.StringIO()
    writer = csv.DictWriter(table, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    lines = [names, ["---"] * len(names), *([shown(row.get(name)) for name in names] for row in rows)]
    markdown = "".join(f"| {' | '.join(each.replace('|', chr(92) + '|') for each in line)} |\n" for line in lines)
    for name, text in (("csv", table.getvalue()), ("md", markdown)):
        with replacing(folder / f"results.{name}") as file:
            file.write(text.encode())


def write_picture(folder: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes ``results.png``, whole or not at all; it can fail where the tables do not, as of a value near 1e308."""
    data = draw(rows)
    with replacing(folder / "results.png") as file:
        file.write(data)


def shown(value: Any) -> str:
    """Returns a value as the table has it."""
    return "" if value is None else f"{value:.5g}" if isinstance(value, float) else " ".join(str(value).split())


def draw(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """Draws every number of the results as bars, one for each run, and returns the PNG."""
    from matplotlib.figure import Figure  # without pyplot, so that the user's backend does not matter

    names = [name for name in columns(rows) if any(is_number(row.get(name)) for row in rows)][:PLOTS]
    across = min(3, len(names)) or 1
    down = -(-len(names) // across) or 1
    figure = Figure(figsize=(4.5 * across, down * (1 + 0.3 * len(rows))), layout="constrained")
    for index, name in enumerate(names):
        axes = figure.add_subplot(down, across, index + 1)
        values = {row["variant"]: row[name] if is_number(row.get(name)) else None for row in rows}
        bars = axes.barh(list(values), [each or 0.0 for each in values.values()])
        axes.bar_label(bars, [" none" if each is None else f" {shown(each)}" for each in values.values()])
        axes.set_title(name, parse_math=False)  # a name may hold $
        axes.invert_yaxis()
        axes.margins(x=0.35)
        axes.locator_params(axis="x", nbins=4)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()
