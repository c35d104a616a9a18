"""The folder of a run: made with its config, or checked to hold a run of the same config that nobody else runs."""

import sys
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from .._json import check_call, parse_json, write_json
from .lock import lock_folder, unlock_folder


def prepare_folder(folder: Path | None, config: dict[str, Any]) -> Path:
    """Makes the folder of a run with its config, or checks that it holds a run of the same config.

    It is locked for this process, unless the run is finished, so that any number of processes can read its result.
    """
    folder = _new_default() if folder is None else folder
    folder.mkdir(parents=True, exist_ok=True)
    names = {each.name for each in folder.iterdir() if not each.name.startswith(".")}
    if names and "config.json" not in names:
        raise ValueError(f"{folder} holds no run, but {min(names)}: name another folder")
    if "result.json" in names:
        _check_config(folder / "config.json", config)
        return folder
    lock_folder(folder)
    try:
        _fill(folder, config)
    except BaseException:
        unlock_folder(folder)
        raise
    return folder


def _fill(folder: Path, config: dict[str, Any]) -> None:
    path = folder / "config.json"
    if path.exists():
        _check_config(path, config)
    else:
        write_json(path, config)
    for name in ("state", "samples"):
        (folder / name).mkdir(exist_ok=True)
    for name in ("metrics.jsonl", "log.txt"):
        (folder / name).touch()


def _check_config(path: Path, config: dict[str, Any]) -> None:
    try:
        known = parse_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not the config of a run: {error}") from error
    check_call(path, known, config)


def _new_default() -> Path:
    """Makes ``output/DATE/TIME``, with a number at the end if another run has just taken that name."""
    now = datetime.now()
    for number in range(sys.maxsize):
        folder = Path("output", f"{now:%Y-%m-%d}", f"{now:%H-%M-%S}" + (f"-{number}" if number else ""))
        with suppress(FileExistsError):
            folder.mkdir(parents=True)
            return folder
    raise AssertionError


def cut_records(path: Path, size: int) -> None:
    """Cuts the records off that were written after ``size`` bytes, and what a crash of the machine left of a line."""
    with open(path, "r+b") as file:
        known = file.read(size)
        file.truncate(known.rfind(b"\n") + 1)
