"""Parses the arguments of the command line with tyro, and reports wrong ones in one line."""

import io
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr
from typing import Any

import tyro

from .errors import UsageError

HELP = 8  # columns by which tyro indents the help of an option that is named in an error
REPEATED = ("For full helptext", "Argument helptext", "Arguments are applied", "Perhaps you meant")
OPTIONS = (tyro.conf.FlagCreatePairsOff, tyro.conf.PositionalMetavarFromFieldName, tyro.conf.DisallowNone)


def parse(commands: Mapping[str, Any], description: str, arguments: Sequence[str]) -> Any:
    """Returns the command that the arguments name, as an object of its class.

    Raises:
        UsageError: the arguments cannot be parsed.
        SystemExit: the arguments ask for help, which has been printed.
    """
    said = io.StringIO()
    try:
        with redirect_stderr(said):
            return tyro.extras.subcommand_cli_from_dict(
                dict(commands), prog="sparsekit", description=description, args=arguments, config=OPTIONS
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        name = next((f" {each}" for each in arguments[:1] if each in commands), "")
        raise UsageError(f"{unframed(said.getvalue())} (sparsekit{name} --help)") from None


def unframed(box: str) -> str:
    """Returns the errors in a box that tyro prints, in one line and without the help that it repeats."""
    parts: list[list[str]] = [[]]
    for line in box.strip("\n").splitlines():
        text = line.strip("│")
        if not text.strip(" ─-") or text[0] in "╭╰":
            parts.append([])  # a rule or an empty line ends a part; rules are ASCII in a terminal without Unicode
        elif len(text) - len(text.lstrip()) <= HELP:
            parts[-1].append(text.strip())
    said = []
    for first, *others in filter(None, parts[1:]):  # the first part is the title
        if not first.startswith(REPEATED):
            joined = (", " if first.endswith(":") else " ").join(others)
            said.append(f"{first[0].lower()}{first[1:]} {joined}".strip())
    return "; ".join(said)
