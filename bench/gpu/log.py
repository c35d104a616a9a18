"""The rows of one part, on disk as soon as they are known."""

import json
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")
Row = dict[str, Any]
NOT_MEASURED = "not measured"


class Log:
    """Appends the rows of a part to a file, a JSON object a line, and knows when the part's time is up.

    Args:
        path: the file; what it held is dropped.
        seconds: the part's budget.
        healthy: raises where the device cannot go on; asked after every failure.
    """

    def __init__(self, path: Path, seconds: float, healthy: Callable[[], object] = lambda: None):
        self.path, self.end, self.healthy = path, time.monotonic() + seconds, healthy
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")

    def write(self, **row: Any) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def left(self) -> float:
        return self.end - time.monotonic()

    def each(self, items: Mapping[str, T]) -> Iterator[tuple[str, T]]:
        """The items in their order, the important ones first, until the time is up; a row says what is left out."""
        for done, (name, item) in enumerate(items.items()):
            if self.left() <= 0:
                self.write(cut=f"{done} of {len(items)}, the time was up before {name}")
                return
            yield name, item

    @contextmanager
    def guard(self, what: str) -> Iterator[None]:
        """Turns an exception into a row, so that the next item runs; ends the part where the device is lost."""
        try:
            yield
        except Exception as error:
            self.write(what=what, error=one_line(error))
            self.healthy()


def one_line(error: BaseException) -> str:
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {text}"[:300]


def last_error(text: str) -> str:
    """What ended a process, from all that it printed: the last exception, else the last line."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    raised = [line for line in lines if re.match(r"[\w.]+(Error|Exception|Interrupt|Exit)\b", line)]
    return (raised or lines or ["it said nothing"])[-1][:300]


def read(path: Path) -> list[Row]:
    """The rows of a file; a last line that was cut off is dropped."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def rows(report: Row, part: str, key: str) -> list[Row]:
    """The rows of a part that have a key; none where the part did not run."""
    return [row for row in report["parts"].get(part, {}).get("rows", []) if key in row and "error" not in row]


def named(report: Row, part: str, name: str) -> list[Row]:
    return [row for row in rows(report, part, "name") if row["name"] == name]
