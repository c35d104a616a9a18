"""What a model costs: bytes on disk by component, latency by batch and length, time and memory to load it."""

import gc
import json
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .._batches import Forward, evaluating, run_batch
from .._timing import PassClock, take_turns

LARGEST_HEADER = 100_000_000  # bytes, as safetensors allows


@dataclass(frozen=True)
class Latency:
    """The time of a pass of one model at one size.

    Args:
        model: the name of the model.
        batch, length: the size.
        p50, p95: the median and the 95th percentile, in seconds.
        runs: how many passes were timed.
        threads: torch's threads on the CPU.
        device: where the model computed, such as ``"cpu"``.
    """

    model: str
    batch: int
    length: int
    p50: float
    p95: float
    runs: int
    threads: int
    device: str


@dataclass(frozen=True)
class ProcessCost:
    """What a function took in a process of its own.

    Args:
        seconds: the time of the call.
        peak_bytes: the most memory that the process held, all in all.
        before_bytes: the most memory before the call, with Python, torch and what the function's module imports.
        gpu_bytes: the most memory that torch's tensors took on the GPU; 0 without one.
    """

    seconds: float
    peak_bytes: int
    before_bytes: int
    gpu_bytes: int


def disk_bytes(path: str | os.PathLike[str], *, depth: int = 2) -> dict[str, int]:
    """Returns the bytes of a file or folder by component, which add up to its size.

    Args:
        path: a safetensors file, or a folder; what is not a tensor of a safetensors file counts as ``"other"``.
        depth: how many parts of a tensor's name make its component: at 2, ``distilbert.embeddings``.

    Raises:
        FileNotFoundError: there is no such file or folder.
        ValueError: a safetensors file is damaged, or ``depth`` is below 1.
    """
    if depth < 1:
        raise ValueError(f"depth must be at least 1, got {depth}")
    root = Path(path)
    if not root.exists():
        raise FileNotFoundError(f"there is no file or folder {root}")
    files = [root] if root.is_file() else sorted(each for each in root.rglob("*") if each.is_file())
    found: dict[str, int] = {}
    for file in files:
        rest = file.stat().st_size
        for name, size in (_tensor_bytes(file) if file.suffix == ".safetensors" else {}).items():
            component = ".".join(name.split(".")[:-1][:depth]) or name
            found[component] = found.get(component, 0) + size
            rest -= size
        found["other"] = found.get("other", 0) + rest
    return found


def measure_latency(
    models: Mapping[str, nn.Module],
    make_batch: Callable[[int, int], Any],
    grid: Sequence[tuple[int, int]] = ((1, 128), (8, 128), (32, 128)),
    *,
    runs: int = 30,
    budget: float = 30.0,
    forward: Forward | None = None,
) -> tuple[Latency, ...]:
    """Times passes of several models in turns, so that a disturbance of the machine affects all of them alike.

    Args:
        models: the models by name, each on its device.
        make_batch: ``make_batch(batch, length)`` returns a batch of that size for all models.
        grid: the sizes.
        runs: passes of each model at each size, after one that is not timed.
        budget: seconds for each size, after which no further round begins, but not before 5 rounds.
        forward: ``forward(model, batch)`` replaces how a model is called.

    Raises:
        ValueError: there is no model, or ``runs`` is below 5.
    """
    if not models or runs < 5:
        raise ValueError(f"there must be models and at least 5 runs, got {len(models)} and {runs}")
    found = []
    for size in grid:
        batch = make_batch(*size)
        calls = {name: partial(_seconds, model, batch, forward) for name, model in models.items()}
        for call in calls.values():
            call()
        for name, times in take_turns(calls, budget, 5, runs).items():
            p95 = statistics.quantiles(times, n=20, method="inclusive")[-1]
            where = next((each.device.type for each in models[name].parameters()), "cpu")
            found.append(
                Latency(name, *size, statistics.median(times), p95, len(times), torch.get_num_threads(), where)
            )
    return tuple(found)


def measure_process(work: Callable[[], object]) -> ProcessCost:
    """Calls a function in a new process, and returns the time and the memory that it took.

    A process of its own has nothing in memory from before, and a model that was loaded here would be found there.

    Args:
        work: a function of a module, or a ``functools.partial`` of one, which can be sent to a process: for example
            ``partial(AutoModel.from_pretrained, folder)``.

    Raises:
        RuntimeError: the function failed; the message has its error.
    """
    context = multiprocessing.get_context("spawn")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=_measured, args=(work, send))
    process.start()
    send.close()
    try:
        found = receive.recv()
    except EOFError:
        found = "it ended without a result"
    process.join()
    if isinstance(found, str):
        raise RuntimeError(f"the function failed in its process: {found}")
    return ProcessCost(*found)


def _measured(work: Callable[[], object], send: Any) -> None:
    """Sends the seconds and bytes of a call, or the text of its error."""
    try:
        gc.collect()
        before, begin = _peak_memory(), time.perf_counter()
        kept = work()
        seconds = time.perf_counter() - begin
        gpu = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
        send.send((seconds, _peak_memory(), before, gpu))
        del kept
    except BaseException as error:
        send.send(f"{type(error).__name__}: {error}")


def _peak_memory() -> int:
    """Returns the most memory, in bytes, that this process has held."""
    try:  # of this program alone; what getrusage says begins with that of the process that started it
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        import resource  # of Unix alone

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if os.uname().sysname == "Darwin" else peak * 1024


def _seconds(model: nn.Module, batch: Any, forward: Forward | None) -> float:
    gpus = {each.device for each in model.parameters() if each.is_cuda}
    with evaluating(model):
        return PassClock(gpus).seconds(lambda x: partial(run_batch, model, x, forward), batch)


def _tensor_bytes(file: Path) -> dict[str, int]:
    """Returns the bytes of every tensor in a safetensors file."""
    try:
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            if length > LARGEST_HEADER:
                raise ValueError(f"its header would have {length} bytes")
            header = json.loads(opened.read(length))
        spans = {name: each["data_offsets"] for name, each in header.items() if name != "__metadata__"}
        return {name: end - start for name, (start, end) in spans.items()}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{file} is not a safetensors file: {error}") from error
