"""The runs below a folder as another process sees them: their status, their loss, and their log."""

import json
import math
import os
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .._json import parse_json
from ..runs import Status, read_status

SILENT = 60.0  # seconds without a heartbeat after which a run on another machine is called silent
POINTS = 4096  # points of a curve that are kept; of more, every other one
LOG_BYTES = 16384
BARS = "▁▂▃▄▅▆▇█"


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
        curve: steps and values.
    """

    folder: Path
    name: str
    status: Status | None = None
    state: str = "unreadable"
    result: Any = None
    loss: str | None = None
    curve: list[tuple[int, float]] = field(default_factory=list)
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
            self.curve, self._read = [], 0

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
                self.curve, self._read = [], 0
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
        others = [name for name in values if name != "step"]
        if self.loss is None and others:
            self.loss = min(others, key=lambda name: (name != "loss", "loss" not in name))
        if is_number(step) and self.loss in values:
            if self.curve and step < self.curve[-1][0]:  # cut off and written again between two looks
                self.curve = [point for point in self.curve if point[0] < step]
            self.curve.append((step, values[self.loss]))
            if len(self.curve) > POINTS:
                del self.curve[::2]


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
    """Returns whether a value is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


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
