"""The command line: ``sparsekit prune``, ``inspect``, ``compress``, and so on, as ``COMMANDS`` of ``app.py`` lists."""

import os
import sys
from collections.abc import Sequence
from importlib.util import find_spec

from .._version import DISTRIBUTION, VERSION

PACKAGES = {"tyro": "tyro", "rich": "rich", "transformers": "transformers", "PIL": "pillow"}  # the extra ``cli``
OF_RUNS = ("monitor", "sweep")  # commands that need the first two only, which the extra ``systems`` has too


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code: 0 done, 1 the run or a check failed, 2 bad arguments, 130 stopped.

    Args:
        arguments: what follows the program's name; None takes it from the command line.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    if list(arguments) == ["--version"]:
        sys.stdout.write(f"sparsekit {VERSION}\n")
        return 0
    extra, needed = "cli", list(PACKAGES)
    if arguments and arguments[0] in OF_RUNS:
        extra, needed = "systems", needed[:2]
    if missing := [PACKAGES[module] for module in needed if find_spec(module) is None]:
        said = f"the command line needs {', '.join(missing)}: pip install '{DISTRIBUTION}[{extra}]'"
        sys.stderr.write(f"sparsekit: {said}\n")
        return 1
    try:
        from .app import run

        return run(arguments)
    except KeyboardInterrupt:
        sys.stderr.write("sparsekit: interrupted\n")
        return 130
    except BrokenPipeError:  # the program that reads stdout, such as head, has closed it: what is left is discarded
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
