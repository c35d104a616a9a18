"""The bench on a GPU: `python -m bench.gpu`, or `make gpu`.

Importing it makes ``sparsekit.triton_kernels`` importable from a checkout that pip could not install; tests that run
there take it as a pytest plugin.
"""

from importlib.util import find_spec
from pathlib import Path

import sparsekit

if find_spec("sparsekit.triton_kernels") is None:
    sparsekit.__path__.append(str(Path(__file__).parents[2]))
