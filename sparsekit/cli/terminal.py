"""Output of the commands: results on stdout, as tables or with ``--json`` as JSON; all the rest on stderr."""

import sys
from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from .._batches import Progress as Wrapper
from .._json import to_json

WIDE = 10_000  # columns of a table in a file or a pipe, where nothing is folded


def progress(what: str) -> Wrapper:
    """Returns a function that wraps a loop with a progress bar on stderr, if that is a terminal."""

    def wrap(items: Iterable[Any]) -> Iterable[Any]:
        console = Console(stderr=True)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
            yield from bar.track(items, description=what)

    return wrap


def table(head: Sequence[str], rows: Iterable[Sequence[str]], *, left: Sequence[str] = ()) -> None:
    """Prints aligned columns to stdout: the first and those named in ``left`` to the left, the others to the right."""
    shown = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for index, name in enumerate(head):
        shown.add_column(name, justify="left" if index == 0 or name in left else "right", overflow="fold")
    for row in rows:
        shown.add_row(*(Text(printable(cell)) for cell in row))
    console = Console(width=None if sys.stdout.isatty() else WIDE, highlight=False)
    console.print(shown)


def write(text: str) -> None:
    """Writes a line of results to stdout."""
    sys.stdout.write(printable(text) + "\n")


def print_json(data: Any) -> None:
    """Writes the results to stdout as JSON, for a program to read."""
    sys.stdout.write(to_json(data) + "\n")


def say(text: str) -> None:
    """Writes a remark to stderr."""
    sys.stderr.write(text.rstrip("\n") + "\n")


def fail(text: str) -> None:
    """Writes to stderr, in one line, why the command failed."""
    say(f"sparsekit: {printable(text)}")


def printable(text: str) -> str:
    """Replaces control characters, which a name in a file may hold and a terminal would obey."""
    return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text)


def size(count: float) -> str:
    """Formats a number of bytes in a unit that is easy to read."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"
