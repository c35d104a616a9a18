"""``python -m sparsekit`` prints what runs where; with arguments it is the command ``sparsekit``."""

import sys

from ._config import show_config
from .cli import main

if __name__ == "__main__":
    if len(sys.argv) > 1:
        sys.exit(main())
    show_config()
