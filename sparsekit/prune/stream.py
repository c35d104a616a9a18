"""Forward passes that wait for each other at every block, so that a block runs twice in all: dense, and pruned."""

import copy
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from .._batches import Forward, layer_input, run_batch
from .calibrate import Block, check_count
from .inputs import Gather, Inputs


class _Cancelled(BaseException):
    """Ends a pass that is not needed any more. Not an Exception, so no model swallows it."""


class _Pass:
    """One batch's forward pass in a thread of its own, which runs only while ``resume`` waits for it.

    A thread is what can be stopped in the middle of any model: whatever it carries past the blocks (the skip
    connections of a UNet, an encoder's output) stays in its frames.
    """

    def __init__(self, batch: Any, run: Callable[[], object]) -> None:
        self.batch = batch
        self._go, self._stopped = threading.Semaphore(0), threading.Semaphore(0)
        self._at: Block | None = None
        self._error: BaseException | None = None
        self._cancelled = False
        self.measuring = False
        modes = _modes()
        self._thread = threading.Thread(target=self._main, args=(run, modes), name="forward pass", daemon=True)
        self._thread.start()

    def _main(self, run: Callable[[], object], modes: Callable[[ExitStack], None]) -> None:
        self._go.acquire()
        try:
            with ExitStack() as stack:
                modes(stack)
                _current.running = self
                if not self._cancelled:
                    run()
        except _Cancelled:
            pass
        except BaseException as error:
            self._error = error
        self._at = None
        self._stopped.release()

    def pause(self, block: Block) -> None:
        """Called in the thread: stops until the next ``resume``."""
        self._at = block
        self._stopped.release()
        self._go.acquire()
        if self._cancelled:
            raise _Cancelled

    def resume(self) -> Block | None:
        """Runs on to the next pause and returns where that is; None at the end. Raises what the pass raised."""
        self._go.release()
        self._stopped.acquire()
        if self._error is not None:
            raise self._error
        return self._at

    def cancel(self) -> None:
        self._cancelled = True
        self._go.release()
        self._thread.join()


_current = threading.local()


def _modes() -> Callable[[ExitStack], None]:
    """The caller's modes that torch keeps per thread, to be entered in another."""
    devices = [device for device in ("cpu", "cuda") if torch.is_autocast_enabled(device)]
    dtypes = {device: torch.get_autocast_dtype(device) for device in devices}
    current = torch.cuda.current_device() if torch.cuda.is_available() else -1

    def enter(stack: ExitStack) -> None:
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.cuda.device(current))
        for device, dtype in dtypes.items():
            stack.enter_context(torch.autocast(device, dtype))

    return enter


def stream(
    model: nn.Module,
    blocks: list[Block],
    gather: Gather,
    batches: Iterable[Any],
    forward: Forward | None,
) -> Iterator[tuple[Block, list[Inputs]]]:
    """Yields every block with what its layers were shown, when all batches have come to it.

    The passes stand still meanwhile; the block must be pruned before the next one is asked for, since that runs it
    again on the same inputs, pruned, and carries its output to the next block. In memory at a time: what each batch
    carries from one block to the next. For models that enter every block at most once in a pass.

    Raises:
        ValueError: there is no batch.
    """
    seen = {block.module: [gather(layer) for layer in block.layers] for block in blocks}
    done: set[nn.Module] = set()
    with _hooks(blocks, seen, done), ExitStack() as cleanup:
        waiting: dict[nn.Module, tuple[Block, list[_Pass]]] = {}

        def go_on(each: _Pass) -> None:
            if (at := each.resume()) is not None:
                waiting.setdefault(at.module, (at, []))[1].append(each)

        count = 0
        for count, batch in enumerate(batches, start=1):  # noqa: B007
            each = _Pass(batch, partial(run_batch, model, batch, forward))
            cleanup.callback(each.cancel)
            go_on(each)
        check_count(count)
        while waiting:
            block, passes = waiting.pop(next(iter(waiting)))
            yield block, seen.pop(block.module)
            done.add(block.module)
            if len(done) == len(blocks):
                return
            for each in passes:
                go_on(each)
    for block in blocks:
        if block.module in seen:
            yield block, seen[block.module]


@contextmanager
def _hooks(blocks: list[Block], seen: dict[nn.Module, list[Inputs]], done: set[nn.Module]) -> Iterator[None]:
    def measure(block: Block) -> Callable[..., None]:
        def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
            own: _Pass | None = getattr(_current, "running", None)
            if own is None or own.measuring or module in done:
                return
            own.measuring = True
            module(*copy.deepcopy(args), **copy.deepcopy(kwargs))  # a block may write to its inputs, or add to a cache
            own.measuring = False
            own.pause(block)

        return enter

    def record(inputs: Inputs) -> Callable[..., None]:
        def ran(_: nn.Module, args: Any, kwargs: Any, __: Any) -> None:
            own: _Pass | None = getattr(_current, "running", None)
            if own is not None and own.measuring:
                inputs.update(layer_input(args, kwargs), own.batch)

        return ran

    with ExitStack() as hooks:
        for block in blocks:
            for layer, inputs in zip(block.layers, seen[block.module], strict=True):
                hooks.enter_context(layer.module.register_forward_hook(record(inputs), with_kwargs=True))
            enter = block.module.register_forward_pre_hook(measure(block), with_kwargs=True, prepend=True)
            hooks.enter_context(enter)
        yield
