"""From arguments to a command, and what is wrong with them in one line."""

import io
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr
from typing import Any

import tyro

from .errors import UsageError

HELP = 8  # columns by which tyro indents the help of an option that it names
REPEATED = ("For full helptext", "Argument helptext", "Arguments are applied", "Perhaps you meant")
OPTIONS = (tyro.conf.FlagCreatePairsOff, tyro.conf.PositionalMetavarFromFieldName, tyro.conf.DisallowNone)


def parse(commands: Mapping[str, Any], description: str, arguments: Sequence[str]) -> Any:
    """The command that the arguments name, as an object of its class.

    Raises:
        UsageError: they cannot be parsed.
        SystemExit: they ask for help, which has been printed.
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
    """What a box of tyro's says in one line, without the help that it repeats."""
    parts: list[list[str]] = [[]]
    for line in box.strip("\n").splitlines():
        text = line.strip("│")
        if not text.strip(" ─-") or text[0] in "╭╰":
            parts.append([])  # after a rule, or an empty line; the lines are of ASCII where the terminal is
        elif len(text) - len(text.lstrip()) <= HELP:
            parts[-1].append(text.strip())
    said = []
    for first, *others in filter(None, parts[1:]):  # after the title
        if not first.startswith(REPEATED):
            joined = (", " if first.endswith(":") else " ").join(others)
            said.append(f"{first[0].lower()}{first[1:]} {joined}".strip())
    return "; ".join(said)
