"""Times every configuration of the Triton kernels, and keeps the fastest by shape class for this architecture."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

from bench.timing import medians
from sparsekit.triton_kernels import _launch

from .clock import Call, KernelClock
from .rows import Rows, one_line

Asked = tuple[_launch.Table, str, str]  # a table, for an architecture and a shape class


def tune(
    clock: KernelClock, rows: Rows, known: set[Asked], calls: Sequence[Call], check: Callable[[Any], None]
) -> None:
    """Chooses a configuration for every table that the calls of an op look up, except the ``known`` ones.

    The choices are written to the user's table, so that all later calls use them. ``check`` raises if the result of a
    call is wrong.
    """
    with watch() as asked:
        check(calls[0]())
    for table, arch, shape_class in sorted(asked - known, key=lambda each: (each[0].kernel, each[2])):
        right, wrong = {}, {}
        for config in table.configs:
            try:
                with table.force(config):
                    check(calls[0]())
                right[config] = [partial(_forced, table, config, calls)]
            except Exception as error:  # too much shared memory, say
                wrong[config] = one_line(error)
        if not right:
            raise ValueError(f"no configuration of {table.kernel} is right: {wrong}")
        seconds = {key: each / len(calls) for key, each in medians(clock.time_in_turns(right).device).items()}
        row = {"kernel": table.kernel, "class": shape_class, "before": table.name(arch, shape_class)}
        row["best"] = min(seconds, key=seconds.__getitem__)
        keep(arch, table.kernel, shape_class, row["best"])
        known.add((table, arch, shape_class))
        rows.write(**row, seconds=seconds, wrong=wrong)


def _forced(table: _launch.Table, config: str, calls: Sequence[Call]) -> object:
    with table.force(config):
        return [call() for call in calls]


@contextmanager
def watch() -> Iterator[set[Asked]]:
    """Collects the tables that are looked up meanwhile, each with the architecture and shape class."""
    asked: set[Asked] = set()
    answer = _launch.Table.name

    def name_and_note(self: _launch.Table, arch: str, shape_class: str) -> str:
        asked.add((self, arch, shape_class))
        return answer(self, arch, shape_class)

    _launch.Table.name = name_and_note
    try:
        yield asked
    finally:
        _launch.Table.name = answer


def keep(arch: str, kernel: str, shape_class: str, config: str) -> None:
    """Adds a choice to the user's table: ``{architecture: {kernel: {shape class: configuration}}}``."""
    path, choices = _launch.user_table(), {}
    with suppress(OSError, ValueError):
        choices = json.loads(path.read_text(encoding="utf-8"))
    choices.setdefault(arch, {}).setdefault(kernel, {})[shape_class] = config
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(choices, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    _launch._measured.cache_clear()
