"""Reads and writes strict JSON, and records of runs with a digest."""

import hashlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ._files import replacing


def write_json(path: str | os.PathLike[str], data: Any) -> None:
    """Writes ``data`` as indented JSON (see ``to_json``), whole or not at all."""
    text = to_json(data) + "\n"
    with replacing(path) as file:
        file.write(text.encode())


def to_json(data: Any, indent: int | None = 2) -> str:
    """Returns JSON that every reader accepts: NaN and infinities, which JSON does not have, become null.

    Args:
        data: nested dicts, lists and tuples of plain values.
        indent: spaces of each level, or None for one line.
    """

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [plain(item) for item in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(plain(data), indent=indent, allow_nan=False)


def parse_json(text: str) -> Any:
    """Parses strict JSON: no NaN or infinities, and no name twice in an object.

    Raises:
        ValueError: the text is anything else.
    """

    def no_constant(name: str) -> None:
        raise ValueError(f"{name} is no number of JSON")

    def finite(text: str) -> float:
        if math.isinf(value := float(text)):
            raise ValueError(f"{text} is too large")
        return value

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise ValueError("an object has one name twice")
        return found

    try:
        return json.loads(text, parse_constant=no_constant, parse_float=finite, object_pairs_hook=once)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def write_record(path: Path, data: Mapping[str, Any]) -> None:
    """Writes JSON with its SHA-256, whole or not at all. NaN and infinities become strings such as ``"nan"``."""
    plain = json.loads(json.dumps(_words(data)))
    write_json(path, {**plain, "sha256": _digest_json(plain)})


def read_record(path: Path, what: str) -> dict[str, Any]:
    """Reads a file that ``write_record`` wrote.

    Args:
        path: the file.
        what: a description of the expected content, for the message.

    Raises:
        OSError: the file cannot be opened.
        ValueError: the file is something else, or was altered.
    """
    try:
        data = parse_json(path.read_text(encoding="utf-8"))
        if not isinstance(data, dict):
            raise ValueError(f"it holds a {type(data).__name__}")
        if data.pop("sha256", None) != _digest_json(data):
            raise ValueError("it was altered: its digest is not the one that was written")
    except ValueError as error:
        raise ValueError(f"{path} is not {what}: {error}") from error
    return data


def check_call(path: Path, known: Any, call: Mapping[str, Any]) -> None:
    """Checks, before a run is resumed, that it was started with the same arguments.

    Args:
        path: the record of the run.
        known: the arguments that the run was started with, as the record has them.
        call: the arguments of this call.

    Raises:
        ValueError: they differ; the message names the arguments.
    """
    call, known = json.loads(json.dumps(call)), known if isinstance(known, dict) else {}
    different = [
        f"{key}{_which(known.get(key), call.get(key))}"
        for key in sorted(known.keys() | call.keys())
        if known.get(key) != call.get(key)
    ]
    if different:
        raise ValueError(f"{path} belongs to another run: it differs in {', '.join(different)}; name another folder")


def _which(known: Any, now: Any) -> str:
    """Returns, in parentheses, the keys whose values differ if both values are mappings; else an empty string."""
    if not (isinstance(known, dict) and isinstance(now, dict)):
        return ""
    names = sorted(name for name in known.keys() | now.keys() if known.get(name) != now.get(name))
    return f" ({', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''})"


def _words(data: Any) -> Any:
    if isinstance(data, Mapping):
        return {key: _words(item) for key, item in data.items()}
    if isinstance(data, list | tuple):
        return [_words(item) for item in data]
    return repr(data) if isinstance(data, float) and not math.isfinite(data) else data


def _digest_json(data: Any) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()
