"""Registers the plug-ins for other libraries once those are imported, and imports none of them."""

import importlib
import sys
import warnings
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

# The module in which a library looks for its quantizers, and the one here that adds one.
PLUG_INS = {
    "transformers.quantizers.auto": "sparsekit.integrations.plug_in.transformers",
    "diffusers.quantizers.auto": "sparsekit.integrations.plug_in.diffusers",
}


def register_plug_ins() -> None:
    """Registers the plug-in of each library that is imported, and that of any other as soon as it is.

    transformers has no entry points, and in a sorted list of imports it comes after sparsekit, so a finder waits for it
    on ``sys.meta_path``. For all other modules it does nothing.
    """
    for name in PLUG_INS:
        if name in sys.modules:
            _register(name)
    if not any(isinstance(finder, _Waiting) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Waiting())


class _Waiting(MetaPathFinder):
    """A finder that finds nothing itself, and has a plug-in registered when the module that it waits for has run."""

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name not in PLUG_INS:
            return None
        found = (finder.find_spec(name, path, target) for finder in sys.meta_path if finder is not self)
        spec = next((each for each in found if each is not None), None)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def run_and_register(module: ModuleType) -> None:
                run(module)
                _register(name)

            spec.loader.exec_module = run_and_register  # type: ignore[method-assign]
        return spec


def _register(name: str) -> None:
    """Imports the plug-in; a library of a version that it does not know must not fail to be imported for that."""
    try:
        importlib.import_module(PLUG_INS[name])
    except Exception as error:
        library = name.partition(".")[0]
        warnings.warn(
            f"from_pretrained of this {library} cannot load compressed models, as sparsekit's plug-in does not fit it: "
            f"{error!r}",
            stacklevel=2,
        )
