import threading

import pytest
import torch
from interrupts import interrupted
from process_state import process_state

from sparsekit._batches import eagerly, evaluating
from sparsekit._settings import SharedSetting


@pytest.fixture
def setting():
    values = ["caller's"]
    return values, SharedSetting(lambda: values[-1], lambda: values.append("changed"), values.append)


def test_the_last_of_overlapping_users_restores_what_the_first_has_found(setting):
    values, shared = setting
    first, second, third = shared.changed(), shared.changed(), shared.changed()
    first.__enter__(), second.__enter__()
    first.__exit__(None, None, None)
    assert values[-1] == "changed"
    third.__enter__()
    second.__exit__(None, None, None)
    assert values[-1] == "changed"
    third.__exit__(None, None, None)
    assert values[-1] == "caller's"
    with shared.changed():
        assert values[-1] == "changed"
    assert values[-1] == "caller's"


def test_an_error_or_an_interrupt_restores_it(setting):
    values, shared = setting
    with pytest.raises(ZeroDivisionError), shared.changed():
        raise ZeroDivisionError
    assert values[-1] == "caller's"

    def use():
        with shared.changed():
            pass

    lines = 0
    while interrupted(use, lines):
        assert values[-1] == "caller's", lines
        other = threading.Thread(target=use, daemon=True)
        other.start(), other.join(timeout=20)
        assert not other.is_alive(), f"the lock is held after an interrupt at line {lines}"
        lines += 1
    assert lines > 10


@pytest.mark.parametrize("use", [eagerly, lambda: evaluating(torch.nn.Linear(2, 2))])
def test_threads_that_overlap_leave_the_process_as_it_was(use):
    torch.compiler.reset()  # imports torch._dynamo, without which there is nothing to switch off
    before, inside, leave = process_state(), threading.Barrier(2), threading.Event()

    def first():
        with use():
            inside.wait()  # the second enters now
            inside.wait()

        leave.set()

    thread = threading.Thread(target=first)
    thread.start()
    inside.wait()
    with use():
        inside.wait()
        leave.wait()
    thread.join()
    assert process_state() == before
