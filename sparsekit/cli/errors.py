"""Errors in the arguments of a command, which are reported before the command does anything."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

from .._version import DISTRIBUTION


class UsageError(ValueError):
    """An argument that the command cannot accept; the exit code is 2."""


@contextmanager
def usage() -> Iterator[None]:
    """Turns an error of the library inside the ``with`` into a ``UsageError``, where only arguments can be wrong."""
    try:
        yield
    except (ValueError, TypeError) as error:
        raise UsageError(str(error)) from error


def check_positive(**options: float) -> None:
    """Rejects numbers that are not above zero; the names are those of the options."""
    for name, value in options.items():
        if not value > 0:
            raise UsageError(f"--{name} must be positive, got {value}")


def regex(text: str) -> re.Pattern[str]:
    """Compiles the regular expression that an option gives.

    Raises:
        UsageError: it is not a regular expression.
    """
    try:
        return re.compile(text)
    except re.error as error:
        raise UsageError(f"{text!r} is no regular expression: {error}") from error


def check_installed(what: str, **packages: str) -> None:
    """Checks that the packages of a command are installed.

    Args:
        what: what needs them.
        packages: by the name of a module, the package that has it; all are of the extra ``systems``.

    Raises:
        RuntimeError: says which ones are missing.
    """
    if missing := [package for module, package in packages.items() if find_spec(module) is None]:
        raise RuntimeError(f"{what} needs {', '.join(missing)}: pip install '{DISTRIBUTION}[systems]'")
