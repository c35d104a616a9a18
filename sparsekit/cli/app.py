"""Runs the command that the arguments name, prints its warnings and errors, and returns the exit code."""

import sys
import traceback
import warnings
from collections.abc import Sequence

from . import terminal
from .arguments import parse
from .bench import Bench
from .compress import Compress
from .convert import Convert
from .errors import UsageError
from .inspect import Inspect
from .monitor import Monitor
from .prune import Prune
from .sweep import Sweep

COMMANDS = {
    "prune": Prune,
    "inspect": Inspect,
    "compress": Compress,
    "bench": Bench,
    "convert": Convert,
    "monitor": Monitor,
    "sweep": Sweep,
}
DESCRIPTION = """Make transformers models sparse, check what they hold, and run them faster than dense.

Exit codes: 0 done, 1 the run or a check failed, 2 bad arguments, 130 interrupted. Nothing is ever half-written."""


def run(arguments: Sequence[str]) -> int:
    """Parses the arguments and runs the command that they name."""
    debug = "--debug" in arguments
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: terminal.say(
            f"warning: {terminal.printable(' '.join(str(message).split()))}"
        )
        try:
            try:
                command: Prune | Inspect | Compress | Bench | Convert | Monitor | Sweep = parse(
                    COMMANDS, DESCRIPTION, arguments
                )
            except SystemExit:
                return 0  # after --help
            code = command.run()
            sys.stdout.flush()
            return code
        except BrokenPipeError:
            raise  # the program that reads stdout, such as head, has closed it
        except Exception as error:
            if debug:
                terminal.say(traceback.format_exc())
            terminal.fail(_line(error))
            return 2 if isinstance(error, UsageError) else 1


def _line(error: Exception) -> str:
    """Returns the first line of an error's message, with the error's class if the message may not be clear alone."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = isinstance(error, ValueError | OSError | RuntimeError) and lines
    return lines[0] if told else ": ".join([type(error).__name__, *lines[:1]])
