"""Errors that are the caller's: found before anything is done."""

import re
from collections.abc import Iterator
from contextlib import contextmanager


class UsageError(ValueError):
    """An argument that cannot be; the exit code is 2."""


@contextmanager
def usage() -> Iterator[None]:
    """Turns what the library says of a value into a ``UsageError``: the block only makes objects of arguments."""
    try:
        yield
    except (ValueError, TypeError) as error:
        raise UsageError(str(error)) from error


def check_positive(**options: float) -> None:
    """Rejects numbers that are not above zero, by the names of their options."""
    for name, value in options.items():
        if not value > 0:
            raise UsageError(f"--{name} must be positive, got {value}")


def regex(text: str) -> re.Pattern[str]:
    """The regular expression of an option."""
    try:
        return re.compile(text)
    except re.error as error:
        raise UsageError(f"{text!r} is no regular expression: {error}") from error
