"""Interrupts a call at its n-th line, for every n, and checks that nothing has changed."""

import sys
import threading
from pathlib import Path

import torch
from process_state import process_state

PACKAGE = str(Path(__file__).parents[1] / "sparsekit")


class Interrupt(BaseException):
    """An interrupt that no other code raises."""


def interrupted(act, line, error=Interrupt):
    """Runs ``act()`` and raises ``error`` before the ``line``-th line, from 0, that it executes in sparsekit.

    Returns:
        Whether the error came out: False where ``act`` ended before that line.
    """
    left = line

    def local(frame, event, _):
        nonlocal left
        if event == "line":
            if left == 0:
                sys.settrace(None)
                left = -1
                raise error(f"at {Path(frame.f_code.co_filename).name}:{frame.f_lineno}")
            left -= 1
        return local

    def enter(frame, event, _):
        return local if left >= 0 and frame.f_code.co_filename.startswith(PACKAGE) else None

    before = sys.gettrace()
    sys.settrace(enter)
    try:
        act()
    except error:
        if left >= 0:
            raise
        return True
    finally:
        sys.settrace(before)
    assert left >= 0, "the error was swallowed"
    return False


def count_lines(act):
    """Returns the number of lines of sparsekit that ``act()`` executes."""
    lines = 0

    def local(frame, event, _):
        nonlocal lines
        lines += event == "line"
        return local

    before = sys.gettrace()
    sys.settrace(lambda frame, *_: local if frame.f_code.co_filename.startswith(PACKAGE) else None)
    try:
        act()
    finally:
        sys.settrace(before)
    return lines


def assert_all_or_nothing(make, act, look=None, *, runs=None, error=Interrupt, last=30):
    """Interrupts ``act(*make())`` at every line; the result must be the whole change, or none.

    Args:
        make: returns the arguments anew, the same ones every time; the first is the model.
        act: the call under test.
        look: ``look(*arguments)`` sees what must not change; None looks at the model alone.
        runs: at how many lines, evenly spread; None takes every one.
        error: what is raised.
        last: an interrupt in this many lines at the end may come too late to take anything back.
    """
    look = look or (lambda model, *_: model_state(model))
    act(*make())  # a first call, for the work that is done once per process
    arguments = make()
    around = surroundings()
    lines = count_lines(lambda: act(*arguments))
    after = look(*arguments)
    points = range(lines) if runs is None else sorted({round(i * (lines - 1) / (runs - 1)) for i in range(runs)})
    for line in points:
        arguments = make()
        before = look(*arguments)
        where = f"interrupted at line {line} of {lines}"
        ended = not interrupted(lambda arguments=arguments: act(*arguments), line, error)
        assert surroundings() == around, where
        assert not ended or line >= lines - last, f"{where}: it has become shorter"
        seen = look(*arguments)
        if line < lines - last or difference(seen, after, identity=False):
            assert not (found := difference(seen, before)), f"{where}: {found}"


def surroundings():
    """Returns the state of torch and of this process that a call must not change."""
    return {"threads": threading.active_count(), **process_state()}


def model_state(model):
    """Returns all that a model holds: tensors as bits, and the attributes, hooks and flags of every module."""
    state = {}
    for name, module in model.named_modules():
        tensors = {**module._parameters, **module._buffers}
        for key, tensor in tensors.items():
            state[f"{name}.{key}"] = None if tensor is None else (tensor.requires_grad, _bits(tensor))
            state[f"{name}.{key}:identity"] = id(tensor)
            if tensor is not None and tensor.is_leaf and tensor.grad is not None:
                state[f"{name}.{key}.grad"] = _bits(tensor.grad)
        state[f"{name}:attributes"] = sorted(module.__dict__)
        state[f"{name}:class"] = type(module)
        state[f"{name}:training"] = module.training
        hooks = {
            key: list(value.values()) for key, value in module.__dict__.items() if key.endswith("_hooks") and value
        }
        state[f"{name}:hooks"] = {key: len(value) for key, value in hooks.items()}
        state[f"{name}:hooks:identity"] = hooks
        state[f"{name}:children"] = list(module._modules)
        state[f"{name}:children:identity"] = [id(child) for child in module._modules.values()]
        state[f"{name}:buffers"] = sorted(module._non_persistent_buffers_set)
    return state


def _bits(tensor):
    raw = tensor.detach().contiguous().flatten()
    return tuple(tensor.shape), tensor.dtype, raw.view(torch.uint8).clone() if raw.numel() else raw


def difference(one, other, identity=True):
    """Returns the first entry in which two states differ, or None; with ``identity`` objects must be the same."""
    for key in sorted({*one, *other}):
        if key.endswith(":identity") and not identity:
            continue
        if key not in one or key not in other or not _equal(one[key], other[key]):
            return f"{key} is {one.get(key, 'missing')}, was {other.get(key, 'missing')}"
    return None


def _equal(one, other):
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and torch.equal(one, other)
    if isinstance(one, tuple | list):
        return type(one) is type(other) and len(one) == len(other) and all(map(_equal, one, other))
    return one == other
