"""What a person sees: tables on stdout; progress, remarks and errors on stderr. With ``--json``, JSON on stdout."""

import sys
from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from .._batches import Progress as Wrapper
from .._json import to_json

WIDE = 10_000  # a file or a pipe gets every table in full


def progress(what: str) -> Wrapper:
    """Wraps a loop with a bar on stderr, where that is a terminal."""

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
    """A line of results on stdout."""
    sys.stdout.write(printable(text) + "\n")


def write_json(data: Any) -> None:
    """The results on stdout, for a program to read."""
    sys.stdout.write(to_json(data) + "\n")


def say(text: str) -> None:
    """A remark on stderr."""
    sys.stderr.write(text.rstrip("\n") + "\n")


def fail(text: str) -> None:
    """The one line that says why there is no result."""
    say(f"sparsekit: {printable(text)}")


def printable(text: str) -> str:
    """Without control characters: a name in a file may hold any, and a terminal obeys them."""
    return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text)


def size(count: float) -> str:
    """Bytes for a person."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"
