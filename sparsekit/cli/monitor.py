"""``sparsekit monitor``: all training runs below a folder, in a panel or a table."""

import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import tyro

from . import terminal
from .errors import UsageError, check_installed
from .gpus import read_gpus
from .results import flat
from .watch import Watch, WatchedRun, averaged, sparkline

COLUMNS = ("run", "state", "step", "loss", "curve", "rate", "left", "result")
CURVE = 16  # characters of a curve in the table


@dataclass(frozen=True, kw_only=True)
class Monitor:
    """Watch the training runs below a folder, and stop them.

    The panel shows the GPUs and every run that sparsekit.runs keeps below the folder: its state, steps, loss, rate, the
    time left, its result and its log. s stops the chosen run, which can go on later; q leaves the panel.

    Args:
        folder: the folder of one run, or any folder above runs.
        once: print a table and end, as is done where the output is no terminal.
        json: print the runs as JSON on stdout and end.
        debug: show where an error comes from.
    """

    folder: Annotated[Path, tyro.conf.Positional]
    once: bool = False
    json: bool = False
    debug: bool = False

    def run(self) -> int:
        if not self.folder.is_dir():
            raise UsageError(f"there is no folder {self.folder}")
        if self.json:
            terminal.print_json(to_json(Watch(self.folder).read()))
        elif self.once or not sys.stdout.isatty():
            check_installed("the table", pynvml="nvidia-ml-py")
            show(self.folder)
        else:
            check_installed("the panel", textual="textual", pynvml="nvidia-ml-py")
            from .panel import Panel

            Panel(self.folder).run()
        return 0


def show(folder: Path) -> None:
    """Prints the GPUs and the runs."""
    for line in gpu_lines():
        terminal.write(line)
    if runs := Watch(folder).read():
        terminal.table(COLUMNS, [list(cells(run).values()) for run in runs], left=("state", "curve", "result"))
    else:
        terminal.write(f"no run below {folder}")


def gpu_lines() -> list[str]:
    """Returns a line for each GPU, or one that says that there is none."""
    return [gpu.line() for gpu in read_gpus()] or ["no GPU"]


def cells(run: WatchedRun) -> dict[str, str]:
    """Returns what the table shows of a run, by column."""
    status, steps = run.status, ""
    if status is not None:
        steps = f"{status.step}" if status.steps is None else f"{status.step}/{status.steps}"
    rate = status.rate if status and run.state == "running" else None
    left = status.left if status and run.state == "running" else None
    said = [f"{name} {each:.4g}" if isinstance(each, float) else f"{name} {each}" for name, each in flat(run.result)]
    shown = (
        run.name,
        run.state,
        steps,
        "" if run.curve.last is None else f"{run.curve.last:.4g}",
        sparkline(averaged(run.curve.points, CURVE)),
        "" if rate is None else f"{rate:.3g}/s",
        "" if left is None else f"{left // 3600:.0f}:{left // 60 % 60:02.0f}:{left % 60 // 1:02.0f}",
        ", ".join(said),
    )
    return dict(zip(COLUMNS, shown, strict=True))


def to_json(runs: list[WatchedRun]) -> list[dict[str, object]]:
    """Returns the runs as JSON has them."""
    return [
        {
            "run": run.name,
            "state": run.state,
            "status": None if run.status is None else asdict(run.status),
            "loss": run.curve.last,
            "result": run.result,
        }
        for run in runs
    ]
