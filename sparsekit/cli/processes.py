"""The processes of a sweep: so many at once, each on a GPU of its own where there are as many, stopped together."""

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from .gpus import read_gpus

POLL = 0.05  # seconds between two looks at the processes
PATIENCE = 60.0  # seconds that processes have to stop in before they are killed


def run_commands(commands: Mapping[str, Sequence[str]], logs: Path, *, jobs: int, say: Callable[[str], None]) -> None:
    """Runs named commands; one that fails does not stop the others.

    Args:
        commands: the program and arguments of each, by its name.
        logs: the folder of the files ``NAME.txt``, to which their output is appended.
        jobs: how many run at once.
        say: is told what begins and what ends.

    Raises:
        KeyboardInterrupt: at Ctrl-C or SIGTERM, after all were asked to stop by SIGTERM, and killed if they did not do
            so within a minute, or at a second signal.
    """
    waiting, free = list(commands.items()), list(range(jobs))
    running: dict[int, tuple[str, subprocess.Popen[bytes]]] = {}
    gpus = visible_gpus()
    with counted_signals() as signals:
        try:
            while (waiting or running) and not signals:
                while waiting and free:
                    name, command = waiting.pop(0)
                    slot = free.pop(0)
                    gpu = gpus[slot % len(gpus)] if gpus else None
                    say(f"{name}: begins{'' if gpu is None else f' on GPU {gpu}'}")
                    try:
                        running[slot] = name, start(command, logs / f"{name}.txt", gpu)
                    except OSError as error:
                        free.append(slot)
                        say(f"{name}: cannot be started: {error}")
                for slot, (name, process) in list(running.items()):
                    if (code := process.poll()) is not None:
                        del running[slot]
                        free.append(slot)
                        say(f"{name}: {'ends' if code == 0 else f'fails with exit code {code}'}")
                time.sleep(POLL)
        finally:
            stop([process for _, process in running.values()], signals)
    if signals:
        raise KeyboardInterrupt


def start(command: Sequence[str], log: Path, gpu: str | None) -> subprocess.Popen[bytes]:
    """Starts a command in a process group of its own, which Ctrl-C in the terminal does not reach."""
    environment = {**os.environ, **({} if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu})}
    with open(log, "ab") as file:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )


def stop(processes: Sequence[subprocess.Popen[bytes]], signals: Sequence[int]) -> None:
    """Asks processes to stop, and kills those that do not, with all that they have started.

    Only what a process leaves running when it ends, as a shell does, is asked after it: torchrun and the like pass the
    signal on themselves.
    """
    for process in processes:
        process.terminate()
    end, known = time.monotonic() + PATIENCE, len(signals)
    first, rest = list(processes), set[int]()
    while (first or rest) and time.monotonic() < end and len(signals) == known:
        for process in [each for each in first if each.poll() is not None]:
            first.remove(process)
            rest.add(process.pid)
            signal_group(process.pid, signal.SIGTERM)
        rest = {group for group in rest if group_runs(group)}
        time.sleep(POLL)
    for process in processes:
        signal_group(process.pid, signal.SIGKILL)
        process.wait()


def signal_group(group: int, number: int) -> None:
    """Sends a signal to all processes of a group, if any is left."""
    with suppress(ProcessLookupError, PermissionError):  # which macOS raises where all have ended
        os.killpg(group, number)


def group_runs(group: int) -> bool:
    """Returns whether a process of a group runs; on Linux, one that nobody asks for its exit status has ended."""
    try:
        os.killpg(group, 0)
    except (ProcessLookupError, PermissionError):
        return False
    known = list(Path("/proc").glob("[0-9]*/stat"))
    return not known or any(is_of_group(path, group) for path in known)


def is_of_group(stat: Path, group: int) -> bool:
    """Returns whether the process of a ``/proc/ID/stat`` runs and is of a group."""
    try:
        text = stat.read_text(encoding="utf-8", errors="replace")
    except OSError:  # it has ended since
        return False
    state, _, of, *_ = text.rpartition(")")[2].split()  # the name before it, in parentheses, may hold anything
    return int(of) == group and state not in "ZX"


@contextmanager
def counted_signals() -> Iterator[list[int]]:
    """Yields a list to which SIGINT and SIGTERM are added, instead of interrupting at a point that loses a process."""
    signals: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield signals
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        for number in before:
            signal.signal(number, lambda number, frame: signals.append(number))
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def visible_gpus() -> list[str]:
    """Returns the GPUs that processes may use, as ``CUDA_VISIBLE_DEVICES`` names them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [each.strip() for each in named.split(",") if each.strip()]
    return [str(index) for index in range(len(read_gpus()))]
