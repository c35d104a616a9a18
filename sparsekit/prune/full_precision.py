"""A context in which statistics and methods compute in full fp32, whatever modes the caller has set."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from .._undo import restoring

_DEVICES = ("cpu", "cuda")
_SETTINGS = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
_FULL = ("none", "ieee")  # the settings of full fp32; "none" is the default


@contextmanager
def full_precision() -> Iterator[None]:
    """Turns off autocast, gradients, inference mode, and products in TF32 or bfloat16 inside the ``with``.

    Tensors made inside are ordinary ones, which can be trained and changed later. All settings are restored at the end.
    """
    grad, casting = torch.is_grad_enabled(), [device for device in _DEVICES if torch.is_autocast_enabled(device)]
    inference = torch.inference_mode(False) if torch.is_inference_mode_enabled() else None
    user = object()

    def restore() -> None:
        _lower_products(user)
        if inference is not None and not torch.is_inference_mode_enabled():
            inference.__exit__(None, None, None)
        torch.set_grad_enabled(grad)
        for device in casting:
            torch.set_autocast_enabled(device, True)

    with restoring(restore):
        for device in casting:
            torch.set_autocast_enabled(device, False)
        if inference is not None:
            inference.__enter__()
        torch.set_grad_enabled(False)
        _raise_products(user)
        yield


# The settings of products hold for all threads: the first user raises the precision, and the last one restores it.
_lock = threading.RLock()
_users: set[object] = set()
_before: list[str] = []


def _raise_products(user: object) -> None:
    global _before
    if not _users and all(each.fp32_precision in _FULL for each in _SETTINGS):
        return
    with _lock:
        if not _users:
            _before = [each.fp32_precision for each in _SETTINGS]
        _users.add(user)
        for each in _SETTINGS:
            if each.fp32_precision not in _FULL:
                each.fp32_precision = "ieee"


def _lower_products(user: object) -> None:
    if user not in _users:
        return
    with _lock:
        if _users == {user}:
            for each, before in zip(_SETTINGS, _before, strict=True):
                if each.fp32_precision != before:
                    each.fp32_precision = "none"  # if it took its value from a general setting, it does so again
                if each.fp32_precision != before:
                    each.fp32_precision = before
        _users.discard(user)
