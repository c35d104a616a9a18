"""Draws texts between a given beginning and a given end, which stay as they are.

python examples/radd/run_sample_cond.py --model_path examples/radd/out/train --length 128 --prefix "Once upon a time"
"""

from dataclasses import dataclass

import tyro
from sampling import Sampling, draw, show
from train import run_command


@dataclass
class Conditional(Sampling):
    """What run_sample_cond.py takes."""

    prefix: str = "I have a"
    suffix: str = " in a joint framework."


def main() -> None:
    settings = tyro.cli(Conditional, description=__doc__)
    show(*draw(settings, settings.prefix, settings.suffix))


if __name__ == "__main__":
    run_command(main)
