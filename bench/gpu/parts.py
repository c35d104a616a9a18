"""The parts of a run, each in a process of its own, so that a fault, a hang or a lost device ends one part only."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from .log import Log, last_error, read

ROOT = Path(__file__).parents[2]
GRACE = 15.0  # seconds that a part has to start and to end its last item
LEAST = 5.0  # seconds with which a part is still begun


@dataclass(frozen=True)
class Part:
    """Args:
    name: its name, and that of its module here, whose ``measure(lab, log)`` it is.
    seconds: at most; what earlier parts leave over is not added, what they take too much is taken off.
    lab: whether it needs the device.
    """

    name: str
    seconds: float
    lab: bool = True


BUILD = Part("build", 75, lab=False)
TUNE = Part("tune", 150)
PARTS = (
    BUILD,
    Part("machine", 20),
    Part("layout", 20),
    Part("checks", 15),
    Part("masks", 70),
    Part("linear", 50),
    Part("tiered", 20),
    Part("search", 50),
    Part("runtime", 75),
    Part("suite", 110, lab=False),
    Part("counters", 30),
    Part("compiled", 40),
)


def measure(part: Part, out: Path, seconds: float, rehearse: bool) -> None:
    """Runs a part in this process."""
    lab: Any = None
    if part.lab and rehearse:
        from .rehearsal import rehearsal_lab

        lab = rehearsal_lab()
    elif part.lab:
        from .lab import gpu_lab

        lab = gpu_lab()
    log = Log(rows_path(out, part), seconds, lab.healthy if lab else lambda: None)
    import_module(f"bench.gpu.{part.name}").measure(lab, log)


def rows_path(out: Path, part: Part) -> Path:
    return out / "parts" / f"{part.name}.jsonl"


def run(part: Part, out: Path, seconds: float, rehearse: bool) -> dict[str, Any]:
    """Runs a part in a process of its own; returns how it ended."""
    if seconds < LEAST:
        return {"status": "skipped", "reason": "no time was left", "seconds": 0.0}
    rows_path(out, part).unlink(missing_ok=True)
    said = out / "parts" / f"{part.name}.log"
    said.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "bench.gpu", "--part", part.name, "--seconds", f"{seconds:.0f}"]
    command += ["--out", str(out), *(["--rehearse"] if rehearse else [])]
    environment = os.environ | {"SPARSEKIT_TUNE_CACHE": "0", "PYTHONUNBUFFERED": "1"}
    begin = time.monotonic()
    with said.open("w") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            process.wait(seconds + GRACE)
            ended = {"status": "failed", "reason": _last_words(said, process.returncode)} if process.returncode else {}
        except subprocess.TimeoutExpired:
            ended = {"status": "stopped", "reason": f"it did not end within {seconds + GRACE:.0f} s"}
        finally:
            _end(process)
    return {**finished(read(rows_path(out, part))), **ended, "seconds": round(time.monotonic() - begin, 1)}


def finished(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """How a part ended by its own account: all done, or cut short."""
    cuts = [row["cut"] for row in rows if "cut" in row]
    return {"status": "cut short", "reason": "; ".join(cuts)} if cuts else {"status": "done"}


def _last_words(said: Path, code: int) -> str:
    return f"exit code {code}: {last_error(said.read_text(errors='replace'))}"


def _end(process: "subprocess.Popen[bytes]") -> None:
    """Ends the part's process with all that it started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()
