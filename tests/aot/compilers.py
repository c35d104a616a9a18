"""Compiles every case in processes of their own."""

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any

Found = dict[str, Any]  # a case to its kernels, or to the error that it raised


class Compilers:
    """One worker process per target, as many at once as there are cores; they begin at once.

    Args:
        folder: for what they write.
        targets: the GPUs to compile for.
        names: the cases to compile, such as ``"cases_nm/mask24"``; all for none.
    """

    def __init__(self, folder: Path, targets: Iterable[str], names: Iterable[str] = ()) -> None:
        self._names = tuple(names)
        self._folder, self._running, self._closed = folder, set[subprocess.Popen[str]](), Event()
        self._pool = ThreadPoolExecutor(os.cpu_count())
        self._futures = {target: self._pool.submit(self._work, target) for target in targets}

    def found(self) -> dict[str, Found]:
        """Waits; the kernels of every case, by target."""
        return {target: future.result() for target, future in self._futures.items()}

    def close(self) -> None:
        """Ends what still runs, as no test waits for it any more."""
        self._closed.set()
        self._pool.shutdown(wait=False, cancel_futures=True)
        for process in tuple(self._running):
            process.kill()
        self._pool.shutdown()

    def _work(self, target: str) -> Found:
        out = self._folder / f"{target}.json"
        environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
        environment["TRITON_CACHE_DIR"] = str(self._folder / target)
        command = [sys.executable, str(Path(__file__).with_name("worker.py")), target, str(out), *self._names]
        with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
            self._running.add(process)
            if self._closed.is_set():
                process.kill()
            errors = process.communicate()[1]
            self._running.discard(process)
        assert process.returncode == 0, errors
        found: Found = json.loads(out.read_text())
        return found
