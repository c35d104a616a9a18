"""Another project of the same import name is told apart: which of both ``import sparsekit`` finds is a matter of luck.

Imported before all else, it raises ImportError.
"""

from ._installed import installed, reinstall_command
from ._version import DISTRIBUTION

SUMMARY = "Kernels for sparse neural networks"  # how the summary of this project begins


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
