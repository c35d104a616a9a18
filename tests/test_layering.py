"""Imports point down only, optional packages stay optional, and files stay small."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = {"sparsekit": "sparsekit", "triton_kernels": "sparsekit.triton_kernels"}
OPTIONAL = {
    "transformers",
    "diffusers",
    "datasets",
    "bitsandbytes",
    "tqdm",
    "matplotlib",
    "numpy",
    "tyro",
    "rich",
    "PIL",
}
# Light ones that what only the command line imports may import at the top; its entry says what is missing.
LIGHT = {"tyro", "rich"}
ENTRIES = {"sparsekit.cli", "sparsekit.__main__"}
# From the bottom up: a module may import its own layer and those before it. The longest name decides.
LAYERS = [
    ["sparsekit.triton_kernels", "sparsekit._native"],
    ["sparsekit.ops"],
    ["sparsekit.masks", "sparsekit._batches", "sparsekit._files", "sparsekit._layers"],
    ["sparsekit.nn"],
    ["sparsekit.prune", "sparsekit.compress"],
    ["sparsekit.checkpoint", "sparsekit.train"],
    ["sparsekit.tiers"],
    ["sparsekit"],
    ["sparsekit.cli", "sparsekit.__main__"],
]
KERNELS = {"sparsekit._native", "sparsekit.triton_kernels"}


def module_name(path):
    folder, *rest = path.relative_to(ROOT).with_suffix("").parts
    return ".".join([FOLDERS[folder], *rest]).removesuffix(".__init__")


SOURCES = {module_name(path): path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))}


def imports(name, nodes):
    """The absolute names of the modules that these nodes import."""
    package = name if SOURCES[name].name == "__init__.py" else name.rpartition(".")[0]
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")
            base = ".".join(parts[: len(parts) - node.level + 1]) if node.level else ""
            module = ".".join(filter(None, [base, node.module]))
            inner = [f"{module}.{alias.name}" for alias in node.names]
            yield from (each if each in SOURCES else module for each in inner)


def is_within(module, package):
    return module == package or module.startswith(package + ".")


def layer(module):
    matches = [(len(p), level) for level, packages in enumerate(LAYERS) for p in packages if is_within(module, p)]
    return max(matches)[1]


def statements_at_import(tree):
    """Everything that runs when the module is imported: not the bodies of functions, not ``if TYPE_CHECKING``."""
    todo = [tree]
    while todo:
        node = todo.pop()
        yield node
        hidden = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        if not hidden and not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)):
            todo.extend(ast.iter_child_nodes(node))


@pytest.fixture(params=SOURCES, scope="module")
def module(request):
    tree = ast.parse(SOURCES[request.param].read_text(encoding="utf-8"))
    return request.param, tree


def test_the_modules_are_found():
    assert {"sparsekit", "sparsekit.ops.nm", "sparsekit.nn", "sparsekit.triton_kernels"} <= SOURCES.keys()
    names = set(
        imports("sparsekit.ops.nm", ast.walk(ast.parse("from ._define import x\nfrom .. import masks\nimport os")))
    )
    assert names == {"sparsekit.ops._define", "sparsekit.masks", "os"}
    assert [layer(name) for name in ("sparsekit._native", "sparsekit.ops.nm", "sparsekit.prune.prune")] == [0, 1, 4]


def test_methods_stand_beside_each_other(module):
    name, tree = module
    for one, other in (("sparsekit.prune", "sparsekit.compress"), ("sparsekit.compress", "sparsekit.prune")):
        if is_within(name, one):
            assert not [target for target in imports(name, ast.walk(tree)) if is_within(target, other)]


def test_imports_point_down(module):
    name, tree = module
    up = [
        target
        for target in imports(name, ast.walk(tree))
        if is_within(target, "sparsekit") and layer(target) > layer(name)
    ]
    assert not up, f"{name} imports {up} from a layer above it"


def test_only_one_file_joins_ops_to_kernels(module):
    name, tree = module
    if name == "sparsekit.ops._kernels" or is_within(name, "sparsekit.triton_kernels"):
        return
    assert not [target for target in imports(name, ast.walk(tree)) if any(is_within(target, each) for each in KERNELS)]


def test_kernels_are_leaves(module):
    name, tree = module
    if layer(name) > 0:
        return
    allowed = {"torch", *(["triton"] if name != "sparsekit._native" else []), *sys.stdlib_module_names}
    for target in imports(name, ast.walk(tree)):
        assert target.partition(".")[0] in allowed or is_within(target, "sparsekit.triton_kernels"), target


def test_optional_packages_are_imported_where_they_are_used(module):
    name, tree = module
    inside = is_within(name, "sparsekit.cli") and name not in ENTRIES
    found = {target.partition(".")[0] for target in imports(name, statements_at_import(tree))}
    assert not found & (OPTIONAL - LIGHT if inside else OPTIONAL)


def test_only_its_entry_imports_the_command_line(module):
    name, tree = module
    if not is_within(name, "sparsekit.cli") and name not in ENTRIES:
        assert not [target for target in imports(name, ast.walk(tree)) if is_within(target, "sparsekit.cli")]
    if name in ENTRIES:
        at_import = [
            target for target in imports(name, statements_at_import(tree)) if is_within(target, "sparsekit.cli")
        ]
        assert set(at_import) <= ENTRIES


def test_ops_know_no_model_library(module):
    name, tree = module
    if is_within(name, "sparsekit.ops"):
        roots = {target.partition(".")[0] for target in imports(name, ast.walk(tree))}
        assert roots <= {"sparsekit", "torch", *sys.stdlib_module_names}


def test_nothing_is_printed(module):
    name, tree = module
    lines = [node.lineno for node in ast.walk(tree) if isinstance(node, ast.Name) and node.id == "print"]
    assert not lines, f"{name} prints in lines {lines}"


OWN = [
    path for folder in (*FOLDERS, "csrc", "tests", "bench", "examples") for path in sorted((ROOT / folder).rglob("*"))
]


@pytest.mark.parametrize(
    "path", [path for path in OWN if path.suffix in {".py", ".cpp", ".h"}], ids=lambda path: str(path.relative_to(ROOT))
)
def test_files_are_small(path):
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= 300, f"{lines} lines; split it where it does two things"
