"""Quantizes the encoder of a classifier, and writes a folder that from_pretrained loads once sparsekit is imported.

python examples/distilbert/quantize.py --source out/student --target out/student-nf4
python examples/distilbert/quantize.py --source out/recovered/2-4 --target out/2-4-int8 --form "2:4 int8"
"""

from dataclasses import dataclass
from pathlib import Path

from config import run_command
from models import in_encoder, load_model, load_tokenizer, save_model

import sparsekit as sk
from sparsekit.quant.quantize import Form


@dataclass
class Quantizing:
    """What quantize.py takes."""

    source: Path  # the folder of a classifier
    target: Path  # the folder to write
    form: Form = "nf4"


def main(settings: Quantizing) -> sk.quant.QuantizeReport:
    """Quantizes a model and prints what became of each layer."""
    report = quantize(settings.source, settings.target, settings.form)
    print(report)
    return report


def quantize(source: Path, target: Path, form: Form) -> sk.quant.QuantizeReport:
    """Reads a folder, quantizes the layers of the encoder, and writes another folder."""
    model = load_model(source)
    report = sk.quantize_(model, form, where=in_encoder(model), inputs="int8" if form == "2:4 int8" else "float")
    save_model(model, load_tokenizer(source), target)
    return report


if __name__ == "__main__":
    run_command(main, Quantizing, __doc__)
