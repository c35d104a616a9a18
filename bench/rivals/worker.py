"""The process of one rival: it prepares the model, checks the results, and then times calls when it is asked to."""

import os
import time
import traceback
import warnings
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from .libraries import RIVALS, Call, Missing
from .models import Size

PAUSE = 0.06  # seconds before each call: by then no thread spins any more, of this library or of another process
ENOUGH = 0.3  # seconds of timed calls in a round
CALLS = 5  # at most in a round
FP32_ERROR = 1e-4


def serve(pipe: Connection, name: str, size: Size, token_counts: tuple[int, ...], threads: int, folder: Path) -> None:
    """Sends the facts about a rival; then, for each number of tokens that it gets, the seconds of some calls.

    The facts are seconds and relative errors, or under ``missing`` why the rival cannot run. The process
    ends when it gets None.
    """
    warnings.simplefilter("ignore")  # of other libraries, about themselves
    torch.set_grad_enabled(False)
    torch.set_num_threads(threads)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    try:
        rival = RIVALS[name]
        model, inputs = size.build(), {tokens: size.input(tokens) for tokens in token_counts}
        expected = {tokens: model(x) for tokens, x in inputs.items()}
        ready = rival.prepare(model, inputs, threads, folder)
        errors = {}
        for tokens, x in inputs.items():
            difference = ready.calls[tokens](x) - expected[tokens]
            errors[tokens] = (difference.norm() / expected[tokens].norm()).item()
            if rival.kind == "fp32" and not errors[tokens] <= FP32_ERROR:
                raise ArithmeticError(f"relative error {errors[tokens]:.1e} at {tokens} tokens, over {FP32_ERROR:.0e}")
    except Missing as reason:
        pipe.send({"missing": str(reason)})
        return
    except Exception as error:
        traceback.print_exc()
        pipe.send({"missing": f"failed: {str(error).splitlines()[0] if str(error) else type(error).__name__}"})
        return
    pipe.send({"convert": ready.seconds, "load": ready.load, "errors": errors})
    while (tokens := pipe.recv()) is not None:
        real_time = _real_time()
        pipe.send({"seconds": _time(ready.calls[tokens], inputs[tokens]), "real_time": real_time})


def _time(call: Call, x: torch.Tensor) -> list[float]:
    """Returns the seconds of up to 5 calls, each after a pause, and after one that is not timed."""
    seconds: list[float] = []
    call(x)
    while len(seconds) < CALLS and sum(seconds) < ENOUGH:
        time.sleep(PAUSE)
        begin = time.perf_counter()
        call(x)
        seconds.append(time.perf_counter() - begin)
    return seconds


def _real_time() -> bool:
    """Gives all threads of this process real-time priority; returns whether that is allowed."""
    try:
        for thread in os.listdir("/proc/self/task"):
            os.sched_setscheduler(int(thread), os.SCHED_FIFO, os.sched_param(1))
    except (AttributeError, OSError):
        return False
    return True
