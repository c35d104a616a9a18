"""What all commands share."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of every command.

    Args:
        json: print the results as JSON on stdout, and nothing else there.
        debug: show where an error comes from.
    """

    json: bool = False
    debug: bool = False
