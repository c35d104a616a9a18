"""The results of runs as a table and a plot."""

from collections.abc import Iterator
from typing import Any


def flat(result: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yields the numbers, strings and so on in a result, with names such as ``test.loss``."""
    if isinstance(result, dict):
        for key, each in result.items():
            yield from flat(each, f"{name}.{key}" if name else key)
    elif result is not None and not isinstance(result, list):
        yield name or "result", result
