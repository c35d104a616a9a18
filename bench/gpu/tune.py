"""Times every configuration of every Triton kernel, and keeps the fastest by shape class for this architecture."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from bench.shapes import name

from . import linear, masks, tiered
from .clock import Call
from .lab import Lab, check_same, reference
from .linear import check_close
from .log import Log, one_line

TOKENS = (1, 4, 8, 16, 32, 64)
Choices = dict[str, dict[str, dict[str, str]]]  # architecture -> kernel -> shape class -> configuration


def measure(lab: Lab, log: Log) -> None:
    """Tunes on the ops of the benches; ``configs.json`` in the folder of the rows grows as choices are made."""
    from sparsekit.triton_kernels import _launch

    choices: Choices = {}
    for what, prepare in log.each(workloads(lab)):
        with log.guard(what):
            for row, choice in tune(lab, prepare, choices):
                log.write(workload=what, **row)
                merge(choices, choice)
                (log.path.parent / "configs.json").write_text(json.dumps(choices, indent=1, sort_keys=True) + "\n")
    if lab.device.type == "cuda":
        keep(choices, _launch.user_table())


# A workload makes its calls, one per buffer, and a check of what such a call returns.
Workload = Callable[[Lab], tuple[list[Call], Callable[[Any], object]]]


def workloads(lab: Lab) -> dict[str, Workload]:
    """The ops in the order of the bench, and decoding."""
    decode: dict[str, Workload] = {
        f"linear24 {name(shape)}, {tokens} tokens": partial(_product, shape=shape, tokens=tokens)
        for shape in lab.sizes.linear[:3]
        for tokens in TOKENS
    }
    decode |= {
        f"linear_tiered {name(shape)}, {tokens} tokens": partial(_tiered, shape=shape, tokens=tokens)
        for shape in (lab.sizes.linear[0], lab.sizes.linear[-1])
        for tokens in (1, 8, 16, 32)
    }
    ops: dict[str, Workload] = {what: partial(_op, case=case) for what, case in masks.cases(lab).items()}
    first = dict(list(ops.items())[: len(masks.WORKS)])
    return first | decode | ops


def _op(lab: Lab, case: tuple[masks.Work, tuple[int, int], str]) -> tuple[list[Call], Callable[[Any], object]]:
    work, shape, dtype = case
    inputs = masks.inputs(lab, shape, dtype)
    arguments = [work.make(lab, *each) for each in inputs]
    expected = reference(work.op)(*arguments[0])
    op = lab.op(work.op)
    return [partial(op, *each) for each in arguments], lambda got: check_same(got, expected)


def _product(lab: Lab, shape: tuple[int, int], tokens: int) -> tuple[list[Call], Callable[[Any], object]]:
    layers, x, op = linear.layers(lab, shape), lab.randn(tokens, shape[1]), lab.op("linear24")
    expected = linear.dense(lab, layers[0])(x).float()
    calls: list[Call] = [partial(op, x, layer.values, layer.bitmask, layer.bias) for layer in layers]
    return calls, lambda got: check_close(got, expected)


def _tiered(lab: Lab, shape: tuple[int, int], tokens: int) -> tuple[list[Call], Callable[[Any], object]]:
    layers, x = tiered.layers(lab, shape), lab.randn(tokens, shape[1])
    expected = linear.dense(lab, layers[0])(x).float()
    return [partial(tiered.product(lab, layer), x) for layer in layers], lambda got: check_close(got, expected)


def tune(lab: Lab, prepare: Workload, known: Choices) -> Iterator[tuple[dict[str, Any], Choices]]:
    """For each table that the workload asks and nothing has tuned: the row of its configurations, and the fastest."""
    calls, check = prepare(lab)
    with watch() as asked:
        check(calls[0]())
    for table, arch, shape_class in sorted(asked, key=lambda each: (each[0].kernel, each[2])):
        if shape_class in known.get(arch, {}).get(table.kernel, {}):
            continue
        right, wrong = [], {}
        for config in table.configs:
            try:
                with table.force(config):
                    check(calls[0]())
                right.append(config)
            except Exception as error:  # too much shared memory, say
                wrong[config] = one_line(error)
        if not right:
            raise ValueError(f"no configuration of {table.kernel} is right: {wrong}")
        raced = lab.clock.race({config: [partial(_forced, table, config, calls)] for config in right})
        seconds = {config: each / len(calls) for config, each in raced.seconds().items()}
        best = min(seconds, key=lambda config: seconds[config])
        row = {"kernel": table.kernel, "class": shape_class, "best": best, "before": table.name(arch, shape_class)}
        yield {**row, "seconds": seconds, "wrong": wrong}, {arch: {table.kernel: {shape_class: best}}}


def _forced(table: Any, config: str, calls: list[Call]) -> object:
    with table.force(config):
        return [call() for call in calls]


@contextmanager
def watch() -> Iterator[set[tuple[Any, str, str]]]:
    """Collects which table is asked, for which architecture and shape class."""
    from sparsekit.triton_kernels._launch import Table

    asked: set[tuple[Any, str, str]] = set()
    answer = Table.name

    def name_and_note(self: Any, arch: str, shape_class: str) -> str:
        asked.add((self, arch, shape_class))
        return answer(self, arch, shape_class)

    Table.name = name_and_note  # type: ignore[method-assign]
    try:
        yield asked
    finally:
        Table.name = answer  # type: ignore[method-assign]


def merge(into: Choices, more: Choices) -> None:
    """Adds choices; the first workload of a shape class decides, as the important ones come first."""
    for arch, kernels in more.items():
        for kernel, classes in kernels.items():
            known = into.setdefault(arch, {}).setdefault(kernel, {})
            for shape_class, config in classes.items():
                known.setdefault(shape_class, config)


def keep(choices: Choices, path: Path) -> None:
    """Writes the choices over those that the user's table has."""
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        known = {}
    merge(choices, known)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(choices, indent=1, sort_keys=True) + "\n", encoding="utf-8")
