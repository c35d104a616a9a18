"""The status of a run, which another process can read at any time, and by which it can stop the run."""

import os
import signal
import socket
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal, get_args

from .._json import parse_json, write_json

State = Literal["running", "finished", "stopped", "failed"]
HEARTBEAT = 1.0  # seconds between two writes of status.json, while steps are made
SILENT = 3600.0  # seconds without one, longer than most evaluations, after which a run on another machine seems killed


@dataclass
class Status:
    """The content of ``status.json``.

    Args:
        state: ``"running"`` (also after a kill: see ``is_alive``), ``"finished"``, ``"stopped"`` before ``finish``, or
            ``"failed"``.
        step: the steps that were begun.
        steps: of how many, or None if that is not known.
        rate: steps a second since this process began or went on, or None before its first step.
        left: seconds that the other steps take at this rate, or None.
        host: the name of the machine.
        process: the id of the process that writes this.
        process_started: when that process started, in clock ticks after the boot of the machine; it tells the process
            from a later one with the same id. None where the system does not say.
        heartbeat: when this was written, in seconds since 1970.
    """

    state: State
    step: int
    steps: int | None
    rate: float | None
    left: float | None
    host: str
    process: int
    process_started: int | None
    heartbeat: float

    def is_alive(self) -> bool:
        """Returns whether the process that wrote this runs on this machine, and is not a later one with its id.

        Where the system does not say when a process started, a later one is not told from it; on Windows, where nothing
        is known of other processes, it counts as running for an hour after the last heartbeat.
        """
        if self.host != socket.gethostname():
            return False
        if self.process_started is not None:
            return process_started(self.process) == self.process_started
        if os.name != "posix":
            return self.process == os.getpid() or time.time() - self.heartbeat < SILENT
        try:
            os.kill(self.process, 0)
        except PermissionError:  # it is another user's
            return True
        except (OSError, OverflowError):
            return False
        return True

    def write(self, folder: Path) -> None:
        """Writes ``status.json``, whole or not at all."""
        write_json(folder / "status.json", asdict(self))

    def stop(self) -> None:
        """Asks the process for a gentle stop, by SIGTERM; the run then writes ``"stopped"`` and can go on later.

        Raises:
            RuntimeError: the process that wrote this does not run, or not on this machine; or the system does not say
                when it started, so that it may be another one. No other gets the signal.
            PermissionError: the process is another user's.
        """
        opened = None
        with suppress(AttributeError, OSError):  # not Linux, or there is no such process
            opened = os.pidfd_open(self.process)  # of one process, so that no later one with its id gets the signal
        try:
            if self.state != "running" or not self.is_alive():
                raise RuntimeError(f"process {self.process} on {self.host} does not run here: there is nothing to stop")
            if self.process_started is None:
                raise RuntimeError(f"process {self.process} may be another one by now: stop the run where it was begun")
            if opened is None:
                os.kill(self.process, signal.SIGTERM)
            else:
                signal.pidfd_send_signal(opened, signal.SIGTERM)
        finally:
            if opened is not None:
                os.close(opened)


class StatusWriter:
    """The writer of ``status.json``, which measures the rate of the run.

    Args:
        folder: the folder of the run.
        steps: the steps that the run will have, or None.
    """

    def __init__(self, folder: Path, steps: int | None) -> None:
        self._folder, self._steps = folder, steps
        self._written = 0.0
        self._since = time.monotonic(), 0

    def begin(self, step: int) -> None:
        """Measures the rate from now on, and writes that the run is running."""
        self._since = time.monotonic(), step
        self.write("running", step)

    def beat(self, step: int) -> None:
        """Writes that the run is running, if that was not written within the last second."""
        if time.monotonic() - self._written >= HEARTBEAT:
            self.write("running", step)

    def write(self, state: State, step: int) -> None:
        """Writes ``status.json``, whole or not at all."""
        now = self._written = time.monotonic()
        took, made = now - self._since[0], step - self._since[1]
        rate = made / took if made > 0 and took > 0 else None
        others = None if self._steps is None else max(0, self._steps - step)
        left = 0.0 if others == 0 else others / rate if others and rate else None
        process = os.getpid()
        started = process_started(process)
        Status(state, step, self._steps, rate, left, socket.gethostname(), process, started, time.time()).write(
            self._folder
        )


def read_status(folder: str | os.PathLike[str]) -> Status | None:
    """Reads the status of the run in a folder; returns None if there is none.

    Raises:
        ValueError: ``status.json`` is something else; the message names it.
    """
    path = Path(folder) / "status.json"
    try:
        data = parse_json(path.read_text(encoding="utf-8"))
        if not isinstance(data, dict) or data.keys() != {each.name for each in fields(Status)}:
            raise ValueError("it does not have the keys of a status")
        if data["state"] not in get_args(State) or type(data["process"]) is not int:
            raise ValueError(f"its state is {data['state']!r} and its process {data['process']!r}")
        return Status(**data)
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ValueError(f"{path} is not the status of a run: {error}") from error


def process_started(process: int) -> int | None:
    """Returns when a process started, in clock ticks after the boot; None if it does not run, or is not known.

    A process that has ended and whose parent has not asked for its exit status does not run.
    """
    try:
        text = Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    state, *rest = text.rpartition(")")[2].split()  # the name before it, in parentheses, may hold anything
    return None if state in "ZX" else int(rest[18])
