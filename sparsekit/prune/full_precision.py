"""Arithmetic of statistics and methods: full fp32, whatever modes the caller is in."""

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

_SETTINGS = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
_FULL = ("none", "ieee")  # "none" asks for nothing else
_lock = threading.Lock()
_users = 0  # the settings belong to the process, so the first user changes them and the last one restores them
_before: list[str] = []


@contextmanager
def full_precision() -> Iterator[None]:
    """Turns off autocast, gradients, inference mode, and products in TF32 or bfloat16, for what runs inside.

    Tensors made inside are ordinary ones, which can be trained and changed later. All of it is restored.
    """
    with ExitStack() as stack:
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        stack.enter_context(_full_products())
        yield


@contextmanager
def _full_products() -> Iterator[None]:
    global _users, _before
    counted = False
    try:
        with _lock:
            if _users == 0:
                _before = [each.fp32_precision for each in _SETTINGS]
                for each, before in zip(_SETTINGS, _before, strict=True):
                    if before not in _FULL:
                        each.fp32_precision = "ieee"
            _users += 1
            counted = True
        yield
    finally:
        if counted:
            with _lock:
                _users -= 1
                if _users == 0:
                    for each, before in zip(_SETTINGS, _before, strict=True):
                        _restore(each, before)


def _restore(setting: object, before: str) -> None:
    """Restores a setting; one that only followed a wider one does so again."""
    if setting.fp32_precision == before:  # type: ignore[attr-defined]
        return
    setting.fp32_precision = "none"  # type: ignore[attr-defined]
    if setting.fp32_precision != before:  # type: ignore[attr-defined]
        setting.fp32_precision = before  # type: ignore[attr-defined]
