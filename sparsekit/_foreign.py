"""Another project of the same import name is told apart: which of both ``import sparsekit`` finds is a matter of luck.

Imported before all else, it raises ImportError.
"""

from importlib.metadata import PackageNotFoundError, distribution

from ._version import DISTRIBUTION

SUMMARY = "Kernels for sparse neural networks"  # how the summary of this project begins


def refuse_foreign(name: str = "sparsekit") -> None:
    """Raises ImportError where a distribution called ``sparsekit`` that is not this project is installed."""
    try:
        found = distribution(name)
    except PackageNotFoundError:
        return
    described = found.read_text("METADATA") or found.read_text("PKG-INFO")
    if not described or f"\nSummary: {SUMMARY}" in described:  # what an uninstall left behind describes nothing
        return
    raise ImportError(
        f"The distribution {name} {found.version} in {found.locate_file('')} is another project, imported by the same "
        f"name as {DISTRIBUTION}. Keep one: `pip uninstall {name}`, then "
        f"`pip install --no-build-isolation --force-reinstall --no-deps {DISTRIBUTION}`"
    )


refuse_foreign()
