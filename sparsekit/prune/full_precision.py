"""A context in which statistics and methods compute in full fp32, whatever modes the caller has set."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from .._settings import SharedSetting
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

    def restore() -> None:
        if inference is not None and not torch.is_inference_mode_enabled():
            inference.__exit__(None, None, None)
        torch.set_grad_enabled(grad)
        for device in casting:
            torch.set_autocast_enabled(device, True)

    with restoring(restore), _PRODUCTS.changed():
        for device in casting:
            torch.set_autocast_enabled(device, False)
        if inference is not None:
            inference.__enter__()
        torch.set_grad_enabled(False)
        yield


def _raise_products() -> None:
    for each in _SETTINGS:
        if each.fp32_precision not in _FULL:
            each.fp32_precision = "ieee"


def _lower_products(values: list[str]) -> None:
    for each, before in zip(_SETTINGS, values, strict=True):
        if each.fp32_precision != before:
            each.fp32_precision = "none"  # if it took its value from a general setting, it does so again
        if each.fp32_precision != before:
            each.fp32_precision = before


_PRODUCTS = SharedSetting(lambda: [each.fp32_precision for each in _SETTINGS], _raise_products, _lower_products)
