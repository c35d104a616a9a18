"""The command ``sparsekit``, outside of the package, to print its version and help without importing torch."""

import ast
import sys
import textwrap
from importlib.util import find_spec
from pathlib import Path


def main() -> int:
    """Runs the command that the command line names, and returns the exit code."""
    arguments = sys.argv[1:]
    if arguments == ["--version"]:
        version = _constant(_package() / "_version.py", "VERSION")
        sys.stdout.write(f"sparsekit {ast.literal_eval(version)}\n")
        return 0
    if arguments in (["--help"], ["-h"]):
        sys.stdout.write(_help(_package() / "cli"))
        return 0
    from sparsekit.cli import main as run

    return run(arguments)


def _package() -> Path:
    spec = find_spec("sparsekit")  # imports nothing
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("sparsekit: the package is missing: pip install --force-reinstall sparsekit-kernels")
    return Path(spec.submodule_search_locations[0])


def _help(folder: Path) -> str:
    """Returns the help text, with the docstrings of the commands read from their sources."""
    app = folder / "app.py"
    commands = _constant(app, "COMMANDS")
    assert isinstance(commands, ast.Dict)
    lines = [
        "usage: sparsekit COMMAND ...",
        f"\n{ast.literal_eval(_constant(app, 'DESCRIPTION'))}\n",
        "Commands, each with a --help of its own:",
    ]
    for key, value in zip(commands.keys, commands.values, strict=True):
        name = ast.literal_eval(key) if key else ""
        first = (_docstring(folder / f"{name}.py", ast.unparse(value)) or "").partition("\n\n")[0]
        lines += textwrap.wrap(first, 80, initial_indent=f"  {name:9} ", subsequent_indent=" " * 12)
    return "\n".join(lines) + "\n"


def _constant(path: Path, name: str) -> ast.expr:
    """Returns the expression that a module assigns to a name."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == [name]:
            return node.value
    raise LookupError(f"{path} assigns nothing to {name}")


def _docstring(path: Path, name: str) -> str | None:
    """Returns the docstring of a class in a module."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            return ast.get_docstring(node)
    raise LookupError(f"{path} has no class {name}")


if __name__ == "__main__":
    sys.exit(main())
