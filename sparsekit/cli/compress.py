"""``sparsekit compress``: the packed model, measured on this machine."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro

from .. import CompressReport, Measure, compress_, save
from .._files import try_folder
from .._json import write_json
from ..compress.cache import machine
from ..compress.lossy import Precision
from ..compress.table import grouped_rows, summary
from ..compress.trial import Objective
from . import terminal
from .errors import UsageError, check_positive
from .folders import COMPRESS_REPORT, COMPRESSED, check_folder, check_out, new_folder
from .models import Dtype, batch_of, copy_tokenizer, load_dense, output_of, without_cache
from .page import write_page
from .speed import check_same, check_tokens, random_tokens

README = """A model that sparsekit has compressed for one machine: {layers} of {all} layers are packed.

    import sparsekit, transformers
    config = transformers.AutoConfig.from_pretrained(FOLDER)
    model = {load}.eval()
    {fill}

`sparsekit inspect FOLDER` says what is in it, `sparsekit bench FOLDER` how fast it is here. On another machine,
`sparsekit compress FOLDER --out OTHER` measures again.
"""


@dataclass(frozen=True, kw_only=True)
class Compress:
    """Swap every layer for what is fastest on this machine, never slower than dense, and write the packed model.

    What a layer could be is timed for every number of tokens, after its result was checked. Writes
    compressed.safetensors, for sparsekit.load, and compress.json with all that was measured.

    Args:
        folder: a transformers folder, or one that prune or compress wrote.
        out: a new folder for the packed model, its configuration and its tokenizer; without it the files are added to
            FOLDER.
        tokens: tokens in a forward pass: a layer is swapped if it is faster at all of them.
        objective: speed takes what is fastest, size the smallest form that is not slower than dense.
        precision: int8 allows weights and inputs of 8 bits, int4 weights of 4 bits too, which change what the model
            computes: the report says by how much. Without it nothing changes by more than rounding.
        budget: seconds to measure one shape at one number of tokens.
        device: auto is the GPU where there is one.
        dtype: auto is the checkpoint's own.
        overwrite: replace what sparsekit wrote there before.
        report: write report.html, which needs nothing else to be read.
        json: print the results as JSON on stdout, and nothing else there.
        debug: show where an error comes from.
    """

    folder: Annotated[Path, tyro.conf.Positional]
    out: Path | None = None
    tokens: tuple[int, ...] = (1, 16, 128)
    objective: Objective = "speed"
    precision: Precision | None = None
    budget: float = 0.5
    device: str = "auto"
    dtype: Dtype = "auto"
    overwrite: bool = False
    report: bool = False
    json: bool = False
    debug: bool = False

    def run(self) -> int:
        check_positive(budget=self.budget)
        check_folder(self.folder)
        if self.out is not None:
            check_out(self.out, overwrite=self.overwrite)
        elif (self.folder / COMPRESSED).exists() and not self.overwrite:
            raise UsageError(f"{self.folder / COMPRESSED} is there: name another folder with --out, or --overwrite")
        else:
            try_folder(self.folder)
        model: Any = load_dense(str(self.folder), self.device, self.dtype)
        check_tokens(model, self.tokens)
        with without_cache(model):
            report = compressed(model, self.tokens, self.budget, self.objective, self.precision)
        found = {"tokens": list(self.tokens), "machine": machine(model.device), **asdict(report)}
        if self.out is None:
            self.write(model, self.folder, found)
        else:
            with new_folder(self.out) as folder:
                self.write(model, folder, found)
                model.config.save_pretrained(folder)
                if model.can_generate():
                    model.generation_config.save_pretrained(folder)
                copy_tokenizer(str(self.folder), model.config, folder)
                (folder / "README.md").write_text(readme(model, report), encoding="utf-8")
        if self.json:
            terminal.print_json(found)
        else:
            show(report)
            terminal.write(f"written to {(self.out or self.folder) / COMPRESSED}")
        return 0

    def write(self, model: Any, folder: Path, found: dict[str, Any]) -> None:
        """Writes the packed model and the measurements."""
        save(model, folder / COMPRESSED)
        write_json(folder / COMPRESS_REPORT, found)
        if self.report:
            write_page(folder)


def readme(model: Any, report: CompressReport) -> str:
    """Returns the text of README.md, which says how to load the folder."""
    load, path = f"transformers.{type(model).__name__}(config)", f'FOLDER + "/{COMPRESSED}"'
    fill = f"sparsekit.load(model, {path})"
    if model.device.type != "cpu":  # a file does not say which kernel is fastest on a GPU
        fill = f"sparsekit.load(model, {path}, dense=True)\n    sparsekit.compress_(model.to({model.device.type!r}))"
    return README.format(layers=len(report.swapped), all=len(report.layers), load=load, fill=fill)


@torch.no_grad()
def compressed(
    model: Any,
    counts: tuple[int, ...],
    budget: float,
    objective: Objective = "speed",
    precision: Precision | None = None,
) -> CompressReport:
    """Compresses a model for passes of these numbers of tokens, and checks what it computes, as ``check_same`` does.

    With a lower precision its outputs change, and the report says by how much.

    Raises:
        RuntimeError: it computes something else.
    """
    tokens = random_tokens(model, max(counts))
    expected = output_of(model, tokens)
    passes = [batch_of(model, random_tokens(model, count)) for count in counts]
    report = compress_(
        model,
        passes,
        objective=objective,
        precision=precision,
        measure=Measure(budget=budget),
        progress=terminal.progress("measure"),
    )
    check_same(model, expected, tokens, "compressed")
    return report


def show(report: CompressReport) -> None:
    """Prints the report."""
    head, rows = grouped_rows(report.layers)
    terminal.table(head, rows, left=("now", "why"))
    for line in summary(report):
        terminal.write(line)
