"""The file of a sweep: a command, and for each variant of it a name and arguments."""

import re
import shlex
import sys
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from .._version import DISTRIBUTION
from .errors import UsageError

OUT = "{out}"
NAME = re.compile(r"[\w=+-]([\w.=+-]*[\w=+-])?")
FILES = (".txt", ".json", ".csv", ".md", ".png")  # of the sweep, beside the folders of the variants


@dataclass(frozen=True)
class Variant:
    """A command under a name.

    Args:
        name: that of the folder of its run.
        command: the program and its arguments, with ``{out}`` for that folder.
    """

    name: str
    command: tuple[str, ...]

    def filled(self, folder: Path) -> list[str]:
        """Returns the command that runs in a folder; ``python`` is the one that runs this."""
        program, *arguments = (each.replace(OUT, str(folder)) for each in self.command)
        return [sys.executable if program == "python" else program, *arguments]


def read_variants(path: Path) -> list[Variant]:
    """Reads a TOML file with a ``command``, the ``args`` of all variants, and ``[variants.NAME]`` with its own.

    A command or arguments are a list of strings, or one string that is split as a shell does.

    Raises:
        UsageError: the file is something else; the message says what.
        RuntimeError: Python 3.10, which reads no TOML itself, has no tomli.
    """
    try:
        toml: Any = import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
    except ModuleNotFoundError:
        raise RuntimeError(f"a sweep needs tomli in Python 3.10: pip install '{DISTRIBUTION}[systems]'") from None
    try:
        data = toml.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise UsageError(f"{path} is no TOML: {error}") from error
    _check_keys(path, data, {"command", "args", "variants"})
    common = [*_words(path, data, "command"), *_words(path, data, "args")]
    if not data.get("command"):
        raise UsageError(f"{path} has no command")
    variants = data.get("variants")
    if not isinstance(variants, dict) or not variants:
        raise UsageError(f"{path} has no [variants.NAME]")
    found = []
    for name, each in variants.items():
        if not NAME.fullmatch(name) or name.endswith(FILES):
            raise UsageError(f"{path}: a variant is the name of a folder, of letters, digits and _.=+-, got {name!r}")
        if not isinstance(each, dict):
            raise UsageError(f"{path}: variants.{name} must be a table with args, got {each!r}")
        _check_keys(path, each, {"args"}, f"variants.{name}.")
        command = (*common, *_words(path, each, "args", f"variants.{name}."))
        if not any(OUT in word for word in command):
            raise UsageError(f"{path}: the command of {name} has no {OUT}, which is the folder of its run")
        found.append(Variant(name, command))
    return found


def _check_keys(path: Path, table: dict[str, Any], known: set[str], where: str = "") -> None:
    if strange := sorted(table.keys() - known):
        raise UsageError(f"{path}: {where}{strange[0]} is not known here: {', '.join(sorted(known))}")


def _words(path: Path, table: dict[str, Any], key: str, where: str = "") -> list[str]:
    value = table.get(key, [])
    if isinstance(value, str):
        try:
            return shlex.split(value)
        except ValueError as error:
            raise UsageError(f"{path}: {where}{key} cannot be split: {error}") from error
    if isinstance(value, list) and all(isinstance(each, str) for each in value):
        return value
    raise UsageError(f"{path}: {where}{key} must be a string or a list of strings, got {value!r}")
