"""A package named as a verb: a call of it names the function that was meant, and all else works as in any package."""

import importlib
from types import ModuleType

import pytest

import sparsekit as sk


@pytest.mark.parametrize(
    ("package", "function"),
    [("prune", "prune_"), ("compress", "compress_"), ("train", "sparse_training_"), ("checkpoint", "save")],
)
def test_a_call_names_the_function(package, function):
    module = getattr(sk, package)
    with pytest.raises(
        TypeError, match=rf"sparsekit\.{package} is a package and cannot be called: call sk\.{function}\("
    ):
        module("model", "method", batches=[])
    assert callable(getattr(sk, function))
    assert not hasattr(module, package)  # a module of the same name could be taken for the function as well


def test_it_is_a_package_like_any_other():
    module = importlib.import_module("sparsekit.prune")
    assert isinstance(module, ModuleType)
    assert module is sk.prune
    assert module.__name__ == "sparsekit.prune"
    assert importlib.import_module("sparsekit.prune.report").PruneReport is module.PruneReport
