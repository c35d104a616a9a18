"""Finds the installed distributions of a name, and refuses to run beside another project of the same import name."""

import json
import shlex
from importlib.metadata import Distribution, distributions
from pathlib import Path
from urllib.parse import urlparse
from urllib.request import url2pathname

from ._version import DISTRIBUTION

SUMMARY = "Kernels for sparse neural networks"  # the beginning of this project's summary


def installed(name: str = DISTRIBUTION) -> list[Distribution]:
    """Returns every distribution of a name on the path, the first one first.

    There is often more than one: a build leaves its metadata in the checkout, which comes first if Python starts there.
    """
    return list(distributions(name=name))


def reinstall_command() -> str:
    """Returns the command that rebuilds the package from the source that pip installed, without touching torch."""
    return f"pip install --no-build-isolation --no-deps --force-reinstall {shlex.quote(_source())}"


def _source() -> str:
    """Returns the folder that pip installed from, if that is recorded and exists; else the distribution's name."""
    for found in installed():
        try:
            record = json.loads(found.read_text("direct_url.json") or "{}")
            folder = Path(url2pathname(urlparse(str(record["url"])).path)) if "dir_info" in record else None
        except (ValueError, KeyError, TypeError):
            continue
        if folder and (folder / "setup.py").exists():
            return str(folder)
    return DISTRIBUTION


def refuse_foreign(name: str = "sparsekit") -> None:
    """Raises an ImportError if a distribution of that name is installed that is another project.

    Both have the same import name, so it would be a matter of chance which one ``import sparsekit`` finds.
    """
    for found in installed(name):
        described = found.read_text("METADATA") or found.read_text("PKG-INFO")
        if described and f"\nSummary: {SUMMARY}" not in described:  # an uninstall may leave a folder without metadata
            raise ImportError(
                f"The distribution {name} {found.version} in {found.locate_file('')} is another project, imported by "
                f"the same name as {DISTRIBUTION}. Keep one: `pip uninstall {name}`, then `{reinstall_command()}`"
            )


refuse_foreign()
