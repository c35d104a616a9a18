"""What pip knows of this package: the distributions of a name, and the command that installs this one anew."""

import json
import shlex
from importlib.metadata import Distribution, distributions
from pathlib import Path
from urllib.parse import urlparse
from urllib.request import url2pathname

from ._version import DISTRIBUTION

SUMMARY = "Kernels for sparse neural networks"  # how the summary of this project begins


def installed(name: str = DISTRIBUTION) -> list[Distribution]:
    """Returns every distribution of a name on the path, the first one first.

    More than one is usual: a build leaves its metadata in the checkout, which comes first for who starts there.
    """
    return list(distributions(name=name))


def reinstall_command() -> str:
    """Returns the command that builds the package anew from where pip had it, and leaves torch as it is."""
    return f"pip install --no-build-isolation --no-deps --force-reinstall {shlex.quote(_source())}"


def _source() -> str:
    """The folder that pip installed from, where it recorded one that is still there; else the distribution's name."""
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
    """Raises ImportError where a distribution called ``sparsekit`` that is not this project is installed."""
    for found in installed(name):
        described = found.read_text("METADATA") or found.read_text("PKG-INFO")
        if described and f"\nSummary: {SUMMARY}" not in described:  # what an uninstall left behind describes nothing
            raise ImportError(
                f"The distribution {name} {found.version} in {found.locate_file('')} is another project, imported by "
                f"the same name as {DISTRIBUTION}. Keep one: `pip uninstall {name}`, then `{reinstall_command()}`"
            )


refuse_foreign()
