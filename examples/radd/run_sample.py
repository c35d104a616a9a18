"""Draws texts.

python examples/radd/run_sample.py --model_path examples/radd/out/train --length 128 --steps 256
python examples/radd/run_sample.py --method forward --strategy top_p --strategy_para 0.9
"""

import tyro
from sampling import Sampling, draw, show
from train import run_command

if __name__ == "__main__":
    run_command(lambda: show(*draw(tyro.cli(Sampling, description=__doc__))))
