"""A pytest plugin: writes the outcome of every test as soon as it is known, and runs from an uninstalled checkout."""

import os
from pathlib import Path

import pytest

from .in_tree import find_kernels
from .log import Log

PATH = "SPARSEKIT_TEST_ROWS"


def pytest_configure(config: pytest.Config) -> None:
    find_kernels()
    if not hasattr(config, "workerinput"):  # with xdist the controller alone writes
        config.pluginmanager.register(Recorder(Path(os.environ[PATH])), "sparsekit rows")


class Recorder:
    def __init__(self, path: Path):
        self.log = Log(path, 0)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            row = {"test": report.nodeid, "outcome": report.outcome, "seconds": round(report.duration, 3)}
            self.log.write(**row, **({"error": _last_line(report)} if report.failed else {}))

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.log.write(test=report.nodeid, outcome="failed", error=_last_line(report))


def _last_line(report: pytest.TestReport | pytest.CollectReport) -> str:
    """What was raised, from pytest's lines that begin with an E."""
    lines = [line[1:].strip() for line in report.longreprtext.splitlines() if line.startswith("E ")]
    return next(filter(None, lines), report.longreprtext.strip().splitlines()[-1] if report.longreprtext else "?")[:300]
