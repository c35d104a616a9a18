"""One run: a model on a number of threads, all rivals in turns, every figure written as soon as it is there."""

import json
import multiprocessing
import os
import statistics
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from ..report import commit, today
from .libraries import RIVALS, Missing
from .models import Size
from .worker import PAUSE, serve

Line = dict[str, Any]


def read(path: Path) -> list[Line]:
    """Returns what a run has written so far."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def forget(path: Path, rivals: Iterable[str]) -> None:
    """Removes what a run has written about some rivals."""
    kept = [line for line in read(path) if line["rival"] not in rivals]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in kept))


def run(
    path: Path, size: Size, token_counts: tuple[int, ...], threads: int, rivals: Iterable[str], rounds: int
) -> None:
    """Times rivals in turns, and appends lines to a file; figures that are there already are not measured again."""
    path.parent.mkdir(parents=True, exist_ok=True)
    done = {(line["rival"], line["tokens"], line["round"]) for line in read(path) if "round" in line}
    wanted = [(number, tokens, name) for number in range(rounds) for tokens in token_counts for name in rivals]
    wanted = [(number, tokens, name) for number, tokens, name in wanted if (name, tokens, number) not in done]
    os.environ["OMP_NUM_THREADS"] = str(threads)  # of the processes that are started
    workers = {}
    with path.open("a", encoding="utf-8") as file:

        def write(line: Line) -> None:
            print(json.dumps(line), file=file, flush=True)

        try:
            for name in dict.fromkeys(name for _, _, name in wanted):
                try:
                    versions = RIVALS[name].versions()
                    worker = Worker(name, size, token_counts, threads, path.parent / "files" / path.stem.split("-")[0])
                    facts = {"versions": versions, **worker.ask()}
                    if "missing" not in facts:
                        workers[name] = worker
                except Missing as reason:
                    facts = {"missing": str(reason)}
                print(f"{path.stem}: {name}: {facts}", flush=True)
                write({"rival": name, "commit": commit(), "date": today(), **facts})
            for number, tokens, name in wanted:
                if name in workers:
                    gflops = calibrate(threads)
                    time.sleep(PAUSE)
                    answer = workers[name].ask(tokens)
                    if "missing" in answer:
                        workers.pop(name)
                        write({"rival": name, "commit": commit(), "date": today(), **answer})
                    else:
                        write({"rival": name, "tokens": tokens, "round": number, "gflops": gflops, **answer})
        finally:
            for worker in workers.values():
                worker.stop()


class Worker:
    """A rival's process."""

    def __init__(self, name: str, size: Size, token_counts: tuple[int, ...], threads: int, folder: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, other = context.Pipe()
        self._process = context.Process(target=serve, args=(other, name, size, token_counts, threads, folder))
        self._process.daemon = True
        self._process.start()
        other.close()

    def ask(self, tokens: int | None = None) -> Line:
        """Returns the answer for a number of tokens, or without one the facts that the process begins with."""
        try:
            if tokens is not None:
                self._pipe.send(tokens)
            return self._pipe.recv()
        except (EOFError, OSError):
            self._process.join()
            return {"missing": f"failed: its process ended with status {self._process.exitcode}"}

    def stop(self) -> None:
        """Ends the process."""
        if self._process.is_alive():
            self._pipe.send(None)
        self._process.join()


def calibrate(threads: int) -> float:
    """Returns the GFLOP/s of a fixed dense product, which tells in what mood the machine is."""
    torch.set_num_threads(threads)
    a = torch.ones(384, 384)
    seconds = []
    for _ in range(5):
        begin = time.perf_counter()
        a @ a
        seconds.append(time.perf_counter() - begin)
    return 2 * 384**3 / min(seconds) / 1e9


def summary(lines: list[Line]) -> dict[str, Line]:
    """Returns the facts and, by number of tokens, the best and the median seconds of each rival, in their order."""
    rows: dict[str, Line] = {}
    for name, rival in RIVALS.items():
        own = [line for line in lines if line["rival"] == name]
        facts = [line for line in own if "commit" in line]
        if not facts:
            rows[name] = {"kind": rival.kind, "missing": "not measured"}
            continue
        known = {key: value for key, value in facts[-1].items() if key not in ("rival", "errors")}
        rows[name] = {"kind": rival.kind, **known, "tokens": {}}
        errors = {tokens: error for line in facts for tokens, error in line.get("errors", {}).items()}
        for tokens, error in errors.items():
            timed = [line for line in own if line.get("tokens") == int(tokens)]
            seconds = [each for line in timed for each in line["seconds"]]
            if seconds:
                rows[name]["tokens"][tokens] = {
                    "error": error,
                    "best": min(seconds),
                    "median": statistics.median(seconds),
                    "gflops": statistics.median(line["gflops"] for line in timed),
                    "real_time": all(line["real_time"] for line in timed),
                }
    return rows
