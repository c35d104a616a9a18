"""The public names, with their arguments, methods and properties, are those in ``api.txt``.

After a change that is meant, ``python -m tests.test_api`` in the repository's root writes that file again.
"""

import functools
import importlib
import inspect
import re
from pathlib import Path
from types import ModuleType

import pytest

import sparsekit as sk

SNAPSHOT = Path(__file__).with_name("api.txt")
NAMED = "ops nn prune train compress tiers slim quant runs diffusion evaluate models probes"
PACKAGES = ("sparsekit", *(f"sparsekit.{name}" for name in NAMED.split()))
METHODS = (staticmethod, classmethod, type(lambda: None))
PROPERTIES = (property, functools.cached_property)


def public_names():
    """Yields the package, the name and the object of everything public but packages and plain values."""
    for package in PACKAGES:
        module = importlib.import_module(package)
        for name in module.__all__:
            value = getattr(module, name)
            if not isinstance(value, ModuleType | str):
                yield package, name, value


def is_class(value):
    return issubclass(type(value), type)  # inspect.isclass takes tuple[int] for one before Python 3.11


def is_ours(value):
    return value.__module__.split(".")[0] == "sparsekit"


def arguments(value):
    """Returns the arguments of a function or a class without annotations, and without ``self``."""
    if is_class(value):
        if not any({"__init__", "__new__"} & vars(base).keys() for base in value.__mro__ if is_ours(base)):
            return ""
    elif not inspect.isroutine(value) or isinstance(value, PROPERTIES):
        return ""
    signature = inspect.signature(value)
    plain = [each.replace(annotation=each.empty) for each in signature.parameters.values() if each.name != "self"]
    return str(signature.replace(parameters=plain, return_annotation=signature.empty))


def members(cls):
    """Yields the name and the value of each public method and property that a class has from sparsekit."""
    for name in sorted({name for base in cls.__mro__ if is_ours(base) for name in vars(base) if name[0] != "_"}):
        if isinstance(inspect.getattr_static(cls, name), METHODS + PROPERTIES):
            yield name, getattr(cls, name)


def snapshot():
    """Yields the lines of ``api.txt``; a name that is public in two packages is described at the first one."""
    first = {}
    for package, name, value in public_names():
        path = f"{package}.{name}"
        if id(value) in first:
            yield f"{path} is {first[id(value)]}"
            continue
        first[id(value)] = path
        yield f"{path}{arguments(value)}"
        if is_class(value) and is_ours(value):
            yield from (f"    {name}{arguments(member)}" for name, member in members(value))


def test_nothing_public_changed():
    assert [*snapshot()] == SNAPSHOT.read_text("utf-8").splitlines(), "if meant: python -m tests.test_api"


def test_a_signature_is_read():
    assert arguments(sk.nm_prune) == "(weight, n, m, *, scale=None)"
    assert arguments(sk.Measure) == "(tokens=None, budget=0.5, graphs=False)"
    assert arguments(sk.ops.SlowKernelsWarning) == ""
    assert {name: arguments(member) for name, member in members(sk.Packed24)} == {
        "nbytes": "",
        "to": "(device)",
        "to_dense": "()",
    }


def test_the_index_has_every_name():
    names = re.findall(r"^ {4}(\w+) {2,}\S.*\.$", sk.__doc__, re.M)
    assert sorted(names) == sorted(sk.__all__)


@pytest.mark.parametrize("package", PACKAGES)
def test_public_is_what_a_package_lists(package):
    module = importlib.import_module(package)
    own = {name for name, value in vars(module).items() if name[0] != "_" and not isinstance(value, ModuleType)}
    assert own <= {*module.__all__} and all(hasattr(module, name) for name in module.__all__)


NAMES = {f"{package}.{name}": value for package, name, value in public_names()}


@pytest.mark.parametrize("name", [name for name, value in NAMES.items() if is_class(value) or inspect.isroutine(value)])
def test_is_documented(name):
    value = NAMES[name]
    assert value.__doc__ and not value.__doc__.startswith(f"{value.__name__}("), "dataclasses write one themselves"


if __name__ == "__main__":
    SNAPSHOT.write_text("\n".join(snapshot()) + "\n", "utf-8")
