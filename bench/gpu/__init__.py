"""The bench on a GPU: `python -m bench.gpu`, or `make gpu`."""

from importlib.util import find_spec
from pathlib import Path

import sparsekit

# A checkout that pip could not install has the Triton kernels elsewhere. As a pytest plugin, this serves its tests.
if find_spec("sparsekit.triton_kernels") is None:
    sparsekit.__path__.append(str(Path(__file__).parents[2]))
