"""Packages whose name is a verb, as ``sk.prune``: calling one raises an error that names the function to call."""

import sys
from types import ModuleType
from typing import Any, NoReturn


class VerbPackage(ModuleType):
    """The class of a package that is easily taken for a function: ``sk.prune(model)`` for ``sk.prune_(model)``."""

    _functions: str

    def __call__(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise TypeError(f"{self.__name__} is a package and cannot be called: call {self._functions}")


def name_functions(package: str, functions: str) -> None:
    """Makes a call of ``package`` raise a TypeError that tells the caller to use ``functions``.

    Python looks for ``__call__`` in the class of a module, not in the module, so the class is replaced.
    """
    module = sys.modules[package]
    module.__class__ = VerbPackage
    module._functions = functions  # type: ignore[attr-defined]
