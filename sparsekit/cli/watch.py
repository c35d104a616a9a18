"""The runs below a folder as another process sees them: their status, their loss, and their log."""

import json
import os
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .._json import parse_json
from ..runs import Status, read_status
from ..runs.status import SILENT

POINTS = 4096  # points of a curve that are kept
LOG_BYTES = 16384
BARS = "▁▂▃▄▅▆▇█"


@dataclass
class Curve:
    """A curve over the steps, thinned evenly where it is long.

    Args:
        points: steps and values: every one that was added, or every second, fourth and so on.
        last: the value that was added last, which may not be among the points; None before the first one.
    """

    points: list[tuple[int, float]] = field(default_factory=list)
    last: float | None = None
    _step: int = 0
    _stride: int = 1
    _count: int = 0

    def add(self, step: int, value: float) -> None:
        """Appends a value; one of an earlier step replaces those from there on."""
        if step < self._step:  # the records were cut off and written again between two looks
            self.points = [point for point in self.points if point[0] < step]
            self._count = len(self.points) * self._stride
        self._step, self.last = step, value
        if self._count % self._stride == 0:
            self.points.append((step, value))
        self._count += 1
        if len(self.points) > POINTS:
            del self.points[1::2]
            self._stride *= 2


@dataclass
class WatchedRun:
    """A run, with the curve of its loss as far as it has been read.

    Args:
        folder: its folder.
        name: the path of the folder below the one that is watched.
        status: its status, None where that cannot be read.
        state: that of the status, or ``"killed"`` or ``"silent"`` where no process runs it any more, as far as this
            machine knows; ``"unreadable"`` without a status.
        result: what is in ``result.json``; None before the run is finished.
        loss: the name of the value that the curve shows: ``loss``, else one with that in its name, else the first one.
        curve: its values, from the first record that has it.
    """

    folder: Path
    name: str
    status: Status | None = None
    state: str = "unreadable"
    result: Any = None
    loss: str | None = None
    curve: Curve = field(default_factory=Curve)
    _read: int = 0

    def read(self) -> None:
        """Reads what is new."""
        try:
            self.status = read_status(self.folder)
        except (ValueError, OSError):
            self.status = None
        self.state = "unreadable" if self.status is None else seen_state(self.status)
        try:
            self.result = parse_json((self.folder / "result.json").read_text(encoding="utf-8"))
        except (ValueError, OSError):
            self.result = None
        try:
            self._read_records()
        except OSError:
            self._forget()

    def log(self) -> str:
        """Returns the end of ``log.txt``."""
        try:
            with open(self.folder / "log.txt", "rb") as file:
                start = max(0, file.seek(0, os.SEEK_END) - LOG_BYTES)
                file.seek(start)
                text = file.read().decode("utf-8", "replace")
        except OSError:
            return ""
        return text.partition("\n")[2] if start else text  # without the rest of a line

    def _read_records(self) -> None:
        with open(self.folder / "metrics.jsonl", "rb") as file:
            if file.seek(0, os.SEEK_END) < self._read:  # the run went on from an earlier step
                self._forget()
            file.seek(self._read)
            lines = file.read().rpartition(b"\n")[0]
        self._read += len(lines) + 1 if lines else 0
        for line in lines.splitlines():
            self._add(line)

    def _add(self, line: bytes) -> None:
        try:
            record = json.loads(line)
            step, values = record["step"], {name: each for name, each in record.items() if is_number(each)}
        except (ValueError, KeyError, TypeError, AttributeError):
            return
        names = [name for name in (self.loss, *values) if name is not None and name != "step"]
        best = min(names, key=lambda name: (name != "loss", "loss" not in name), default=None)
        if best != self.loss:  # the first record may have been that of a probe
            self.loss, self.curve = best, Curve()
        if is_number(step) and best in values:
            self.curve.add(step, values[best])

    def _forget(self) -> None:
        self.loss, self.curve, self._read = None, Curve(), 0


class Watch:
    """The runs below a folder, in the order of their names.

    Args:
        top: the folder.
    """

    def __init__(self, top: Path) -> None:
        self._top = top
        self._known: dict[Path, WatchedRun] = {}

    def read(self) -> list[WatchedRun]:
        """Returns all runs that are there now, with what is new of each."""
        found = {}
        for folder in run_folders(self._top):
            name = folder.relative_to(self._top).as_posix() if folder != self._top else folder.resolve().name
            found[folder] = self._known.get(folder) or WatchedRun(folder, name)
            found[folder].read()
        self._known = found
        return list(found.values())


def run_folders(top: Path) -> list[Path]:
    """Returns the folders of runs below a folder, or the folder itself; a run holds no other run."""
    found = []
    for folder, folders, files in os.walk(top):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        if {"config.json", "status.json"} <= set(files):
            found.append(Path(folder))
            folders.clear()
    return found


def seen_state(status: Status) -> str:
    """Returns the state of a run as far as this machine knows it."""
    if status.state != "running" or status.is_alive():
        return status.state
    if status.host == socket.gethostname():
        return "killed"
    return "silent" if time.time() - status.heartbeat > SILENT else "running"


def is_number(value: Any) -> bool:
    """Returns whether a value is a finite number, which a float can hold."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def averaged(curve: Sequence[tuple[int, float]], width: int) -> list[float]:
    """Returns the means of a curve over at most ``width`` equal ranges of its steps."""
    parts: dict[int, list[float]] = {}
    for step, value in curve:
        parts.setdefault((step - curve[0][0]) * width // (curve[-1][0] - curve[0][0] + 1), []).append(value)
    return [sum(each) / len(each) for each in parts.values()]


def sparkline(values: Sequence[float]) -> str:
    """Draws values as bars, the least the lowest."""
    low, high = min(values, default=0.0), max(values, default=0.0)
    return "".join(BARS[int((each - low) / ((high - low) or 1.0) * (len(BARS) - 1) + 0.5)] for each in values)
