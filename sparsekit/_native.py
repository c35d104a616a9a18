"""Loads the compiled extension, or says why it is missing and which command builds it.

``SPARSEKIT_NATIVE=1`` makes a missing extension an error, ``0`` never loads it, unset loads it if it is there.
"""

import json
import os
import shlex
from pathlib import Path

import torch

from ._installed import installed, reinstall_command

PACKAGE = Path(__file__).parent
SWITCHED_OFF = "switched off by SPARSEKIT_NATIVE=0"


class SlowKernelsWarning(UserWarning):
    """A warning that the compiled extension is missing, so that plain PyTorch runs on the CPU, many times slower."""


def load() -> str:
    """Loads the extension once; returns ``"loaded"``, or the reason why plain PyTorch is used instead."""
    wanted = os.environ.get("SPARSEKIT_NATIVE", "")
    if wanted not in ("", "0", "1"):
        raise ImportError(f"SPARSEKIT_NATIVE must be 0, 1 or unset, got {wanted!r}")
    if wanted == "0":
        return SWITCHED_OFF
    built = sorted(PACKAGE.glob("_C.*"))
    if not built:
        reason = "not built"
    else:
        try:
            torch.ops.load_library(str(built[0]))
            return "loaded"
        except OSError as error:
            reason = f"built for torch {_record().get('torch', '?')}, not for {torch.__version__}: {error}"
    if wanted == "1":
        why, command = remedy(PACKAGE)
        raise ImportError(
            f"SPARSEKIT_NATIVE=1, but the compiled extension is {reason}. Rebuild it with `{command}`: {why}"
        )
    return reason


def remedy(package: Path) -> tuple[str, str]:
    """Returns why a package has no extension that loads, and the command that mends it.

    The reason distinguishes a source checkout that hides an installed package, one that was not built, and an
    installation whose build continued without the extension and left its reason in ``_build.json``.
    """
    checkout = package.parent
    is_checkout = (checkout / "setup.py").exists() and (checkout / "csrc").is_dir()
    build = f"pip install --no-build-isolation -e {shlex.quote(str(checkout))}" if is_checkout else reinstall_command()
    if any(package.glob("_C.*")):
        return "it has to be built anew for this torch", build
    if is_checkout and (installed := _installed_elsewhere(package)) is not None:
        return f"the source checkout {checkout} hides the package installed in {installed}", build
    told = _record(package).get("reason")
    if told:
        return f"its build said: {told}", build
    return f"{f'the checkout {checkout}' if is_checkout else f'the package in {package}'} was never built", build


def _record(package: Path = PACKAGE) -> dict[str, str]:
    """Returns the record that ``setup.py`` wrote when it built the package."""
    try:
        record = json.loads((package / "_build.json").read_text(encoding="utf-8"))
        return record if isinstance(record, dict) else {}
    except (OSError, ValueError):
        return {}


def _installed_elsewhere(package: Path) -> Path | None:
    """Returns another folder that has the installed package with its extension, if there is one."""
    folders = [Path(str(found.locate_file("sparsekit"))) for found in installed()]
    return next((each for each in folders if each.resolve() != package.resolve() and any(each.glob("_C.*"))), None)
