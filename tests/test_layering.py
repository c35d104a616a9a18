"""Imports point down only, optional packages stay optional, and files stay small."""

import ast
import sys
from itertools import permutations
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = {"sparsekit": "sparsekit", "triton_kernels": "sparsekit.triton_kernels"}
OPTIONAL = {
    "transformers",
    "diffusers",
    "torchmetrics",
    "torch_fidelity",
    "datasets",
    "accelerate",
    "huggingface_hub",
    "peft",
    "bitsandbytes",
    "lm_eval",
    "tqdm",
    "matplotlib",
    "numpy",
    "tyro",
    "rich",
    "PIL",
    "textual",
    "pynvml",
    "tensorboard",
    "tomli",
}
# Light ones that what only the command line imports may import at the top; its entry says what is missing.
LIGHT = {"tyro", "rich"}
OWN = {
    "sparsekit.cli.panel": {"textual"},
    "sparsekit.models.radd": {"huggingface_hub"},
}  # a module that its command imports once it knows that they are installed
ENTRIES = {"sparsekit.cli", "sparsekit.__main__"}
# From the bottom up: a module may import its own layer and those before it. The longest name decides.
LAYERS = [
    [
        "sparsekit.triton_kernels",
        "sparsekit._version",
        "sparsekit._installed",
        "sparsekit._native",
        "sparsekit._packages",
        "sparsekit._table",
    ],
    ["sparsekit.ops"],
    [
        "sparsekit._state",
        "sparsekit.masks",
        "sparsekit._undo",
        "sparsekit._settings",
        "sparsekit._trees",
        "sparsekit._forwards",
        "sparsekit._batches",
        "sparsekit._safetensors",
        "sparsekit._files",
        "sparsekit._folders",
        "sparsekit._digest",
        "sparsekit._timing",
        "sparsekit._json",
        "sparsekit._layers",
        "sparsekit._optimizers",
    ],
    ["sparsekit.nn", "sparsekit._pretrained", "sparsekit._replace"],
    [
        "sparsekit.diffusion",
        "sparsekit.distill",
        "sparsekit.evaluate",
        "sparsekit.models",
        "sparsekit.probes",
        "sparsekit.runs",
    ],
    ["sparsekit.prune", "sparsekit.compress", "sparsekit.checkpoint", "sparsekit.train"],
    ["sparsekit.tiers", "sparsekit.slim", "sparsekit.quant"],
    ["sparsekit.reach"],
    ["sparsekit"],
    ["sparsekit.integrations"],
    ["sparsekit.cli", "sparsekit.__main__"],
]
SIDE_BY_SIDE = ("sparsekit.prune", "sparsekit.compress", "sparsekit.checkpoint", "sparsekit.train")
NATIVE = {"sparsekit._native"}
KERNELS = {*NATIVE, "sparsekit.triton_kernels"}


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


TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in SOURCES.items()}
NODES = {name: list(ast.walk(tree)) for name, tree in TREES.items()}
IMPORTS = {name: set(imports(name, nodes)) for name, nodes in NODES.items()}


def importing(wrong, names=SOURCES):
    """The modules for which ``wrong`` picks some of their imports, with what it picked."""
    found = {name: sorted(target for target in IMPORTS[name] if wrong(name, target)) for name in names}
    return {name: targets for name, targets in found.items() if targets}


def test_the_modules_are_found():
    assert {"sparsekit", "sparsekit.ops.nm", "sparsekit.nn", "sparsekit.triton_kernels"} <= SOURCES.keys()
    names = set(
        imports("sparsekit.ops.nm", ast.walk(ast.parse("from ._define import x\nfrom .. import masks\nimport os")))
    )
    assert names == {"sparsekit.ops._define", "sparsekit.masks", "os"}
    assert [layer(name) for name in ("sparsekit._native", "sparsekit.ops.nm", "sparsekit.prune.prune_model")] == [
        0,
        1,
        5,
    ]
    assert "sparsekit.ops" in importing(lambda name, target: target == "sparsekit.ops._kernels")


def test_methods_stand_beside_each_other():
    pairs = list(permutations(SIDE_BY_SIDE, 2))
    assert not importing(
        lambda name, target: any(is_within(name, one) and is_within(target, other) for one, other in pairs)
    )


def test_imports_point_down():
    assert not importing(lambda name, target: is_within(target, "sparsekit") and layer(target) > layer(name))


def test_only_one_file_joins_ops_to_kernels():
    others = [name for name in SOURCES if not is_within(name, "sparsekit.triton_kernels")]
    others.remove("sparsekit.ops._kernels")
    assert not importing(lambda name, target: any(is_within(target, each) for each in KERNELS), others)


def test_kernels_are_leaves():
    allowed = {"torch", "triton", *sys.stdlib_module_names}

    def wrong(name, target):
        inside = is_within(target, "sparsekit.triton_kernels") or target in {
            "sparsekit._version",
            "sparsekit._installed",
        }
        return not inside and target.partition(".")[0] not in allowed - ({"triton"} if name in NATIVE else set())

    assert not importing(wrong, [name for name in SOURCES if layer(name) == 0])


def at_import(name):
    return set(imports(name, statements_at_import(TREES[name])))


def test_optional_packages_are_imported_where_they_are_used():
    for name in SOURCES:
        inside = is_within(name, "sparsekit.cli") and name not in ENTRIES
        found = {target.partition(".")[0] for target in at_import(name)}
        own = {name.rpartition(".")[2]} if is_within(name, "sparsekit.integrations") else OWN.get(name, set())
        assert not found & (OPTIONAL - LIGHT if inside else OPTIONAL) - own, name


def test_only_its_entry_imports_the_command_line():
    others = [name for name in SOURCES if not is_within(name, "sparsekit.cli") and name not in ENTRIES]
    assert not importing(lambda name, target: is_within(target, "sparsekit.cli"), others)
    for name in ENTRIES:
        assert {target for target in at_import(name) if is_within(target, "sparsekit.cli")} <= ENTRIES, name


def test_ops_know_no_model_library():
    allowed = {"sparsekit", "torch", *sys.stdlib_module_names}
    ops = [name for name in SOURCES if is_within(name, "sparsekit.ops")]
    assert not importing(lambda name, target: target.partition(".")[0] not in allowed, ops)


def sets_attributes_of_others(node):
    """Returns whether a node assigns to a ``__dict__``, or calls ``setattr`` on another object than ``self``."""
    if isinstance(node, ast.Subscript) and not isinstance(node.ctx, ast.Load):
        return isinstance(node.value, ast.Attribute) and node.value.attr == "__dict__"
    called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
    return called in {"setattr", "delattr"} and ast.unparse(node.args[0]) != "self"


def test_one_file_attaches_attributes_to_modules():
    found = {name: [node.lineno for node in nodes if sets_attributes_of_others(node)] for name, nodes in NODES.items()}
    assert [name for name, lines in found.items() if lines] == ["sparsekit._state"]


def test_nothing_is_printed():
    prints = {
        name: [node.lineno for node in nodes if isinstance(node, ast.Name) and node.id == "print"]
        for name, nodes in NODES.items()
    }
    assert not {name: lines for name, lines in prints.items() if lines}


def test_files_are_small():
    folders = (*FOLDERS, "csrc", "tests", "bench", "examples")
    own = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.suffix in {".py", ".cpp", ".h"}]
    lines = {str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines()) for path in own}
    assert {"tests/test_layering.py", "csrc/cpu/kernels.h", "triton_kernels/nm.py"} <= lines.keys()
    # About 120 lines is the aim and 300 a reason to ask; this is the limit.
    assert not {path: count for path, count in lines.items() if count > 400}, "split it where it does two things"
