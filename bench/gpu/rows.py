"""The rows of results of one section, written to a file one by one."""

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")
Row = dict[str, Any]


class Rows:
    """A file of rows, one JSON object a line, and the time until which a section may run.

    Some keys mean the same in every row: ``said`` is a line for people to read, ``error`` and ``wrong`` (a dict) say
    what failed, ``cut`` says what there was no time for.
    """

    def __init__(self, path: Path, seconds: float):
        self.path, self.end = path, time.monotonic() + seconds
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")

    def write(self, **row: Any) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def for_each(self, items: Mapping[str, T], do: Callable[[T], Row | None]) -> None:
        """Writes the row that ``do`` returns for each item; when the time is up, a last row says what was left out."""
        for done, (name, item) in enumerate(items.items()):
            if time.monotonic() >= self.end:
                self.write(cut=f"{done} of {len(items)}, the time was up before {name}")
                return
            with self.guard(name):
                if row := do(item):
                    self.write(**row)

    @contextmanager
    def guard(self, what: str) -> Iterator[None]:
        """Writes an exception as a row, so that the next item still runs."""
        try:
            yield
        except Exception as error:
            self.write(what=what, error=one_line(error))


def one_line(error: BaseException) -> str:
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {text}"[:300]


def read(path: Path) -> list[Row]:
    """Reads the rows of a file, without a last line that was cut off."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows
