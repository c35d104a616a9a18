"""Runs of a few steps, for the tests of the run frame, and the end of processes that were a group."""

import json
import os
import sys

import torch
import torch.distributed as dist

from sparsekit.runs import Run

CONFIG = {"lr": 0.1, "sizes": (4, 2), "data": {"name": "digits", "seed": 3}}


class Part:
    """A part whose state is one number."""

    def __init__(self, value=0):
        self.value = value

    def state_dict(self):
        return {"value": self.value}

    def load_state_dict(self, state):
        self.value = state["value"]


def run_steps(folder, steps, save=(), config=CONFIG, part=None):
    part = part or Part()
    with Run.open(folder, config, steps=10) as run:
        run.restore(part=part)
        while run.step < steps:
            run.step += 1
            part.value += run.step
            run.record(value=part.value)
            if run.step in save:
                run.save()
    return run, part


def records(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def describe(value):
    """The values and the types of a state."""
    if isinstance(value, torch.Tensor):
        return value.dtype, value.tolist()
    if isinstance(value, dict):
        return [(describe(key), describe(each)) for key, each in value.items()]
    return (type(value), [describe(each) for each in value]) if isinstance(value, list | tuple) else repr(value)


def leave_group():
    """Leaves the process group and ends the process, with success.

    DDP keeps gloo's threads in torch 2.13, and a thread that wants the interpreter while it is torn down aborts the
    process (https://github.com/pytorch/pytorch/issues/190489).
    """
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
