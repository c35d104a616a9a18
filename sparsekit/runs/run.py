"""The run frame itself: opens the folder of a run, records, stores states, and goes on from the last one."""

import json
import os
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, suppress
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from .._json import parse_json, to_json, write_json
from .folder import cut_records, prepare_folder
from .lock import lock_folder, unlock_folder
from .parts import Stateful, check_parts, get_states, set_states
from .position import Position, epoch_batches, load_batches
from .random_states import get_random_states
from .ranks import from_first, gather, in_each, rank_and_size
from .signals import stopping
from .state import StoredState, last_state, write_state
from .status import State, StatusWriter, read_status
from .trackers import RunTracker


class Tracker(Protocol):
    """The receiver of a copy of all records, such as an ``Accelerator`` of accelerate."""

    def log(self, values: dict[str, Any], *, step: int) -> Any: ...


class Run:
    """A training run in a folder of its own; killed anywhere and started again, it goes on exactly.

    ::

        with Run.open("output/first", config, steps=1000) as run:
            run.restore(model=model, optimizer=optimizer)
            for indices in run.batches(len(data), 32, epochs=10):
                ...
                run.record(loss=loss.item())
                if run.step % 100 == 0:
                    run.save()
            run.finish({"loss": loss.item()})

    In one process on a CPU, losses and weights are bit for bit those of a run that was never killed. All processes of
    torch.distributed call the same methods; the first one writes. The folder holds ``config.json``, ``metrics.jsonl``,
    ``status.json``, ``log.txt``, ``state/step-N/``, ``samples/`` and, after ``finish``, ``result.json``; nothing in it
    is unpickled. An exception in the block sets the state ``"failed"``, is written to the log and raised again; Ctrl-C,
    SIGTERM and a block that ends without ``finish`` set ``"stopped"``. What is finished stays finished, whatever ends
    the block: it can be read and logged to, and goes on only after ``restore``.
    """

    def __init__(self, folder: Path, steps: int | None, tracker: Tracker | None) -> None:
        self.folder = folder
        self.step = 0
        self.position = Position()
        self._tracker = tracker
        self._rank, self._size = rank_and_size()
        self._status = StatusWriter(folder, steps)
        self._parts: dict[str, Stateful] | None = None
        self._finished = (folder / "result.json").exists()
        self._exit = ExitStack()
        if self._rank == 0:
            self._exit.callback(unlock_folder, folder)

    @classmethod
    def open(
        cls,
        folder: str | os.PathLike[str] | None,
        config: Mapping[str, Any],
        *,
        steps: int | None = None,
        tracker: Tracker | None = None,
    ) -> "Run":
        """Opens the folder of a run, or makes it.

        Args:
            folder: the folder; None makes a new one, ``output/DATE/TIME``, that the first process chooses for all.
            config: all that the run depends on, as JSON has it. A folder goes on only with the same.
            steps: the steps that the run will have, for the time left.
            tracker: what also gets each record, by ``log(values, step=step)``: of ``open_tracker``, which the end of
                the block ends, or accelerate's ``Accelerator``.

        Raises:
            TypeError: the config holds what JSON does not have.
            ValueError: the folder holds a run of another config (the message names the keys that differ), or no run.
            RuntimeError: another process runs it.
        """
        try:
            plain = json.loads(json.dumps(config, allow_nan=False))
        except (TypeError, ValueError) as error:
            raise TypeError(f"config must hold what JSON has: {error}") from error
        if not isinstance(plain, dict):
            raise TypeError(f"config must be a mapping, got {type(config).__name__}")
        path = from_first(lambda: prepare_folder(None if folder is None else Path(folder), plain))
        run = cls(path, steps, tracker)
        if not run._finished:  # else it is opened to be read, unless it is restored
            run._write_status("running")
        if run._rank == 0 and isinstance(tracker, RunTracker):
            tracker.attach(path, plain)
            run._exit.callback(tracker.finish)
        return run

    @property
    def result(self) -> Any:
        """What ``finish`` was given, also by an earlier process; None before that."""
        path = self.folder / "result.json"
        try:
            return parse_json(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise ValueError(f"{path} is not the result of a run: {error}") from error

    def restore(self, **parts: Stateful) -> bool:
        """Sets the parts of the run to the last stored state; is called once, before the first step.

        A state that cannot be read gives way to the one before it and is renamed to ``unreadable-step-N``, and the log
        says so. Records after the state are cut off.

        Args:
            parts: the model, optimizer, schedule and so on, by names that are the names of their files.

        Returns:
            Whether there was a state; if not, the parts are unchanged.

        Raises:
            ValueError: there are states but none can be read, or the last one is of other parts or another number of
                processes, or does not fit a part; then all parts are unchanged.
            RuntimeError: the run was finished, and another process goes on with it.
        """
        in_each(lambda: check_parts(parts))
        from_first(lambda: lock_folder(self.folder))
        path, state = last_state(self.folder / "state", parts, self.log)
        if state is not None:
            try:
                set_states(parts, state.parts, state.random[self._rank])
            except ValueError as error:
                raise ValueError(f"cannot go on with {path}: {error}") from error
            self.step, self.position = state.step, state.position
        self._parts, self._finished = dict(parts), False
        if self._rank == 0:
            cut_records(self.folder / "metrics.jsonl", 0 if state is None else state.metrics)
            if state is not None:
                self.log(f"goes on after step {self.step}")
            self._status.begin(self.step)
        return state is not None

    def save(self) -> None:
        """Stores the state after the step that was just made, whole or not at all; the last two are kept.

        It comes last in a step: a run that goes on from it has the records before it, and makes those of later steps.

        Raises:
            RuntimeError: ``restore`` was not called, so that it is not known what the state consists of; or the run is
                finished.
            OSError: it cannot be written.
        """
        self._check_unfinished()
        if self._parts is None:
            raise RuntimeError("call restore(model=..., ...) before save(): it names what the state consists of")
        random = gather(get_random_states())
        parts = get_states(self._parts)

        def write() -> None:
            metrics = self.folder / "metrics.jsonl"
            with open(metrics, "ab") as file:  # what the state counts on is on the disk before it
                os.fsync(file.fileno())
            state = StoredState(self.step, self.position, metrics.stat().st_size, parts, random)
            write_state(self.folder / "state", state)

        from_first(write)
        self._write_status("running")

    def record(self, **values: Any) -> None:
        """Appends one line to ``metrics.jsonl``, the step first, and gives the same to the tracker.

        Values are as JSON has them, so a tensor is given as ``loss.item()``; NaN and infinities become null.

        Raises:
            ValueError: a value is called ``step``, which is ``run.step``.
            TypeError: a value is not as JSON has them.
            RuntimeError: the run is finished.
        """
        self._check_unfinished()
        if "step" in values:
            raise ValueError(f"the step of a record is run.step, {self.step}: give {values['step']!r} another name")
        if self._rank == 0:
            line = to_json({"step": self.step, **values}, indent=None)
            with open(self.folder / "metrics.jsonl", "a", encoding="utf-8") as file:
                file.write(line + "\n")
            if self._tracker is not None:
                self._tracker.log(values, step=self.step)
            self._status.beat(self.step)

    def log(self, text: str) -> None:
        """Appends lines to ``log.txt``, with the time and, where there are several processes, the rank."""
        who = f" rank {self._rank}" if self._size > 1 else ""
        with open(self.folder / "log.txt", "a", encoding="utf-8") as file:
            file.write(f"{datetime.now():%Y-%m-%d %H:%M:%S}{who} {text.rstrip()}\n")

    def batches(
        self,
        count: int,
        batch_size: int,
        *,
        epochs: int,
        seed: int = 0,
        load: Callable[[list[list[int]]], Iterable[Any]] = iter,
    ) -> Iterator[Any]:
        """Yields the batches from the position of the run on, and counts a step for each.

        Args:
            count: the number of samples.
            batch_size: samples of a batch of all processes together; see ``epoch_batches``.
            epochs: the epochs of the whole run.
            seed: chooses the order, together with the epoch.
            load: makes batches of lists of indices, such as
                ``lambda order: DataLoader(data, batch_sampler=order, num_workers=2)``. Random changes to samples that
                worker processes make are exact after a kill only if they depend on the sample and the epoch alone.

        Raises:
            ValueError: the sizes do not fit together; ``load`` gives more or fewer batches than it got lists; or the
                run was begun with another ``count``, ``batch_size`` or ``seed``.
            RuntimeError: there is a step to make, and the run is finished.
        """
        self.position = self.position.of_data(count=count, batch_size=batch_size, seed=seed)
        while self.position.epoch < epochs:
            epoch = self.position.epoch
            order = epoch_batches(count, batch_size, seed=seed, epoch=epoch, rank=self._rank, ranks=self._size)
            for batch in load_batches(load, order[self.position.batch :], seed, epoch):
                self._check_unfinished()
                if self.position.epoch != epoch:
                    raise ValueError(f"load must give a batch for each list of indices, got more than {len(order)}")
                self.position = self.position.after_batch(len(order))
                self.step += 1
                if self._rank == 0:
                    self._status.beat(self.step)
                yield batch
            if self.position.epoch == epoch:
                raise ValueError(f"load must give a batch for each list of indices, got fewer than {len(order)}")

    def finish(self, result: Mapping[str, Any] | None = None) -> None:
        """Writes ``result.json``, whole or not at all, and sets the state ``"finished"``.

        Raises:
            TypeError: the result is not as JSON has it.
            RuntimeError: the run is finished already.
        """
        self._check_unfinished()
        if self._rank == 0:
            write_json(self.folder / "result.json", dict(result or {}))
        self._write_status("finished")
        self._finished = True

    def __enter__(self) -> "Run":
        self._exit.enter_context(stopping())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._exit:
            if self._finished:
                return
            if not isinstance(error, Exception):
                self._write_status("stopped")
                return
            # The error itself is raised, not that the disk is full.
            with suppress(OSError, ValueError):
                self.log("".join(traceback.format_exception(kind, error, trace)))
            with suppress(OSError, ValueError):
                # Any process says that the run failed, unless the first one has ended, which others fail of.
                if self._rank == 0 or (known := read_status(self.folder)) is None or known.state == "running":
                    self._status.write("failed", self.step)

    def _check_unfinished(self) -> None:
        if self._finished:
            raise RuntimeError(f"the run in {self.folder} is finished: call restore(...) first to go on with it")

    def _write_status(self, state: State) -> None:
        if self._rank == 0:
            self._status.write(state, self.step)
