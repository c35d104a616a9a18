"""The schedule of progressive pruning, which a CSV file holds with one iteration per line."""

import csv
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from .tier_map import Ratios

COLUMNS = ("iteration", "dense", "mid_2_4", "topk", "dense_to_2_4", "mid_2_4_to_topk", "epochs")
TOLERANCE = 1e-6


@dataclass(frozen=True)
class Step:
    """One iteration: the shares of blocks to reach, and how long to fine-tune afterwards.

    Args:
        iteration: the number of the iteration, from 1.
        ratios: the dense, 2:4 and top-k shares after the iteration.
        dense_to_2_4, mid_2_4_to_topk: the shares that the iteration demotes; they follow from the ratios.
        epochs: epochs of fine-tuning; may be a fraction.
    """

    iteration: int
    ratios: Ratios
    dense_to_2_4: float
    mid_2_4_to_topk: float
    epochs: float


def read_schedule(path: str | os.PathLike[str]) -> tuple[Step, ...]:
    """Reads a schedule from a CSV file: a header line, and one line per iteration.

    The columns are ``iteration,dense,mid_2_4,topk,dense_to_2_4,mid_2_4_to_topk,epochs``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a column is missing or unknown, a cell is not a number, iterations do not count up from 1, shares do
            not add up to 1 or go back up, or the demotions do not agree with them; the message names file and line.
    """
    with open(path, encoding="utf-8", newline="") as file:
        return parse_schedule(file, Path(path).name)


def parse_schedule(lines: Iterable[str], name: str) -> tuple[Step, ...]:
    """Parses the lines of a schedule; ``name`` is the file's name in error messages."""
    reader = csv.reader(lines)
    header = tuple(cell.strip() for cell in next(reader, []))
    if header != COLUMNS:
        raise ValueError(f"{name}, line 1: the columns must be {','.join(COLUMNS)}, got {','.join(header)}")
    steps: list[Step] = []
    for row in reader:
        if not any(cell.strip() for cell in row):
            continue
        try:
            steps.append(_step(row, steps[-1] if steps else None))
        except ValueError as error:
            raise ValueError(f"{name}, line {reader.line_num}: {error}") from None
    if not steps:
        raise ValueError(f"{name}: there is no iteration in it")
    return tuple(steps)


def _step(row: list[str], before: Step | None) -> Step:
    if len(row) != len(COLUMNS):
        raise ValueError(f"{len(COLUMNS)} values are needed, got {len(row)}")
    number = {column: _number(column, cell) for column, cell in zip(COLUMNS, row, strict=True)}
    step = Step(
        iteration=int(number["iteration"]),
        ratios=Ratios(number["dense"], number["mid_2_4"], number["topk"]),
        dense_to_2_4=number["dense_to_2_4"],
        mid_2_4_to_topk=number["mid_2_4_to_topk"],
        epochs=number["epochs"],
    )
    last = before.ratios if before else Ratios(1.0, 0.0, 0.0)
    expected = before.iteration + 1 if before else 1
    if number["iteration"] != expected:
        raise ValueError(f"iteration must be {expected}, got {row[0].strip()}")
    for column in ("dense", "mid_2_4", "topk"):
        if number[column] > 1:
            raise ValueError(f"{column} must be a share from 0 to 1, got {number[column]:g}")
    if abs(sum(step.ratios) - 1) > TOLERANCE:
        raise ValueError(f"dense, mid_2_4 and topk must add up to 1, got {sum(step.ratios):g}")
    if step.ratios.dense > last.dense + TOLERANCE or step.ratios.topk < last.topk - TOLERANCE:
        raise ValueError("blocks are only ever demoted: dense cannot grow, nor topk shrink")
    for column, moved in (
        ("dense_to_2_4", last.dense - step.ratios.dense),
        ("mid_2_4_to_topk", step.ratios.topk - last.topk),
    ):
        if abs(number[column] - moved) > TOLERANCE:
            raise ValueError(f"{column} must be {moved:g}, what the shares move by, got {number[column]:g}")
    return step


def _number(column: str, cell: str) -> float:
    try:
        value = float(cell)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise ValueError(f"{column} must be a number from 0 on, got {cell.strip()!r}")
    return value
