"""Prunes the student of run.py's first stage, recovers its accuracy and removes what was masked.

python examples/distilbert/prune_finetune.py --sparsity 0.4       # after run.py --stages distill
python examples/distilbert/prune_finetune.py --criterion taylor
"""

from typing import Any

import run
from config import Settings, run_command, shared


def main(settings: Settings) -> dict[str, Any]:
    """Runs the stages prune, recover and slim."""
    return run.main(run.Run(**shared(settings), stages=("prune", "recover", "slim")))


if __name__ == "__main__":
    run_command(main, Settings, __doc__)
