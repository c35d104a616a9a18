"""The states of a run: one folder for each, written whole or not at all, of which the last two are kept."""

import re
import shutil
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .._folders import new_folder
from .._json import read_record, write_record
from .position import Position
from .ranks import from_first, in_each, rank_and_size
from .values import read_values, write_values

KEPT = 2


@dataclass(frozen=True)
class StoredState:
    """All that a run goes on from.

    Args:
        step: the steps that are complete.
        position: the position in the data.
        metrics: the bytes of ``metrics.jsonl`` that were written before.
        parts: the state dicts of the model, the optimizer and so on, by name.
        random: the random states of each process.
    """

    step: int
    position: Position
    metrics: int
    parts: Mapping[str, Any]
    random: list[dict[str, Any]]


def write_state(folder: Path, state: StoredState) -> None:
    """Writes a state to ``step-N`` in a folder, whole or not at all, and removes all but the last two.

    Raises:
        TypeError, ValueError: a part holds what cannot be stored; the message names it.
        OSError: it cannot be written.
    """
    with new_folder(folder / f"step-{state.step}") as new:
        for name, part in state.parts.items():
            write_values(new / f"{name}.safetensors", part)
        for rank, random in enumerate(state.random):
            write_values(new / f"random-{rank}.safetensors", random)
        about = {"step": state.step, "position": asdict(state.position), "metrics": state.metrics}
        write_record(new / "state.json", {**about, "parts": list(state.parts), "ranks": len(state.random)})
    for old in stored_states(folder)[KEPT:]:
        shutil.rmtree(old, ignore_errors=True)


def stored_states(folder: Path) -> list[Path]:
    """Returns the folders of the stored states, the last one first."""
    found = {path: re.fullmatch(r"step-(\d{1,18})", path.name) for path in folder.glob("step-*")}
    return sorted((path for path, match in found.items() if match), key=lambda path: -int(path.name[5:]))


def read_state(path: Path) -> StoredState:
    """Reads the folder of one state; nothing is unpickled.

    Raises:
        ValueError: a file is missing, was altered, or is of another kind; the message names it.
        OSError: a file is there and cannot be read now.
    """
    what = "the record of a state"
    try:
        record = read_record(path / "state.json", what)
        step, metrics, parts, ranks = (record[key] for key in ("step", "metrics", "parts", "ranks"))
        if any(type(each) is not int or each < 0 for each in (step, metrics, ranks)) or not isinstance(parts, list):
            raise TypeError("its step, metrics, ranks or parts are of another kind")
        if any(not isinstance(name, str) or not name.isidentifier() for name in parts):
            raise TypeError(f"its parts are {parts!r}")
        position = Position(**record["position"])
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ValueError(f"{path} has no state.json that can be read") from error
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path / 'state.json'} is not {what}: {error}") from error
    values = {name: read_values(path / f"{name}.safetensors") for name in parts}
    random = [read_values(path / f"random-{rank}.safetensors") for rank in range(ranks)]
    return StoredState(step, position, metrics, values, random)


def last_state(
    folder: Path, parts: Collection[str], log: Callable[[str], None]
) -> tuple[Path, StoredState] | tuple[None, None]:
    """Returns the last state in a folder that can be read, after its path; None for both if there is none at all.

    All processes call it, and it raises in all of them or in none. The first one chooses the state: later ones that it
    cannot read are renamed to ``unreadable-step-N``, as they would count as the last ones again.

    Raises:
        ValueError: there are states, and none can be read; or the last one is of other parts or another number of
            processes.
        OSError: a file is there and cannot be read now.
    """
    state: StoredState | None = None

    def choose() -> Path | None:
        nonlocal state
        path, state = _last_readable(folder, log)
        return path

    def read() -> None:
        nonlocal state
        if path is None:
            return
        state = state or read_state(path)  # the first process has read it already
        if state.parts.keys() != set(parts):
            raise ValueError(f"{path} holds {', '.join(state.parts)}, and this run has {', '.join(parts)}")
        if len(state.random) != (size := rank_and_size()[1]):
            raise ValueError(f"{path} is of {len(state.random)} processes, and this run has {size}")

    path = from_first(choose)
    in_each(read)
    return (None, None) if path is None or state is None else (path, state)


def _last_readable(folder: Path, log: Callable[[str], None]) -> tuple[Path, StoredState] | tuple[None, None]:
    unreadable: dict[Path, ValueError] = {}
    for path in stored_states(folder):
        try:
            state = read_state(path)
        except ValueError as error:
            unreadable[path] = error
            continue
        for other, reason in unreadable.items():
            aside = other.with_name(f"unreadable-{other.name}")
            shutil.rmtree(aside, ignore_errors=True)
            other.rename(aside)
            log(f"{other.name} cannot be read, and is {aside.name} now: {reason}")
        return path, state
    for reason in unreadable.values():
        raise ValueError(f"cannot go on with {folder.parent}: no stored state can be read: {reason}")
    return None, None
