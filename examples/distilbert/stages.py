"""Stages that are skipped when what they depend on has not changed, by the digests of files."""

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import PartialState


def digest_files(path: Path) -> str | None:
    """Returns the digest of a file, or of all files of a folder; None if there is none."""
    files = [path] if path.is_file() else sorted(each for each in path.rglob("*") if each.is_file())
    sha = hashlib.sha256()
    for file in files:
        sha.update(f"{file.relative_to(path)}\0{hashlib.sha256(file.read_bytes()).hexdigest()}\0".encode())
    return sha.hexdigest()[:16] if files else None


@dataclass(frozen=True)
class Stage:
    """A part of the pipeline.

    Args:
        name: its name.
        work: does it, and returns figures as JSON has them.
        settings: what it depends on, besides files.
        reads: the folders and files that earlier stages wrote.
        writes: those that it writes.
    """

    name: str
    work: Callable[[], dict[str, Any]]
    settings: dict[str, Any]
    reads: Sequence[Path]
    writes: Sequence[Path]

    def inputs(self) -> dict[str, Any]:
        """Returns what the stage depends on, with the digests of the files.

        Raises:
            ValueError: a file is missing, because an earlier stage has not been run.
        """
        digests = {path.name: digest_files(path) for path in self.reads}
        if missing := [name for name, digest in digests.items() if digest is None]:
            raise ValueError(f"the stage {self.name} needs {missing[0]}, which is not there: run the stages before it")
        return {"settings": self.settings, "files": digests}

    def outputs(self) -> dict[str, Any]:
        return {path.name: digest_files(path) for path in self.writes}


def run_stage(stage: Stage, out: Path, state: PartialState) -> dict[str, Any]:
    """Runs a stage, in all processes, or returns the figures of the last time if nothing has changed since."""
    say = print if state.is_main_process else lambda text: None
    record = out / "stages" / f"{stage.name}.json"
    inputs = json.loads(json.dumps(stage.inputs()))
    known = json.loads(record.read_text("utf-8")) if record.exists() else {}
    same = known.get("inputs") == inputs and known["outputs"] == stage.outputs()
    state.wait_for_everyone()  # all have read before anyone writes
    if same:
        say(f"{stage.name}: nothing has changed, so it is skipped")
        return {**known["result"], "seconds": known["seconds"]}
    say(f"{stage.name} ...")
    start = time.monotonic()
    result = stage.work()
    seconds = round(time.monotonic() - start, 1)
    if state.is_main_process:
        record.parent.mkdir(parents=True, exist_ok=True)
        known = {"inputs": inputs, "outputs": stage.outputs(), "seconds": seconds, "result": result}
        part = record.with_suffix(".part")
        part.write_text(json.dumps(known, indent=2) + "\n", "utf-8")
        part.replace(record)
    state.wait_for_everyone()
    say(f"  {seconds:.0f} s")
    return {**result, "seconds": seconds}
