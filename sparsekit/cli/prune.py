"""``sparsekit prune``: prunes a model and writes it to a folder."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from .. import ADMM, RIA, LeastSquares, Magnitude, PruneReport, SparseGPT, Swaps, Wanda, prune_, save
from .._json import write_json
from .._layers import Where, output_head, shared_weight_reasons
from ..masks import get_mask, get_mask_info, grouped
from ..prune import Method
from ..prune.report import summary
from . import terminal, text
from .errors import UsageError, regex, usage
from .folders import MASKS, REPORT, check_out, new_folder
from .models import Dtype, batch_of, copy_tokenizer, load_dense, load_tokenizer, longest, without_cache
from .page import write_page
from .patterns import packed_bytes

README = """A model that sparsekit has pruned by {method}: {sparsity:.2%} of the weights in {layers} layers are zero.

    import sparsekit, transformers
    model = transformers.{architecture}.from_pretrained(FOLDER)
    sparsekit.load(model, FOLDER + "/{masks}")  # for sparsekit.keep_masks; the zeros are there without it

`sparsekit inspect FOLDER` says what is in it, `sparsekit compress FOLDER --out OTHER` packs it for one machine.
"""
METHODS: dict[str, type[Method]] = {cls.__name__.lower(): cls for cls in (Magnitude, Wanda, RIA, SparseGPT, ADMM)}


@dataclass(frozen=True, kw_only=True)
class Prune:
    """Make a transformers model sparse, and write it with its masks and a report.

    The folder has the model as transformers writes it, dense with zeros; masks.safetensors, which sparsekit.load gives
    back to that model, for fine-tuning with the masks kept; report.json; and a README.md.

    Args:
        model: a folder, or an id of the Hugging Face hub; safetensors only.
        out: the folder to write; it appears when all is done.
        method: wanda and ria are fast and good, sparsegpt and admm are better and slower, magnitude needs no text.
        pattern: n:m as 2:4 or 4:8, 50% of every row, "50% layer", or "50% 16x16" for whole blocks.
        swaps: then swap weights within their groups while that lowers the error.
        least_squares: then solve for the kept weights.
        calibration: UTF-8 text with documents split by <|endoftext|>; builtin is Python's documentation; none is for
            magnitude alone.
        nsamples: windows of the calibration text.
        window: tokens in a window; a model that reads fewer gets as many as it reads.
        eval: held-out text, for the perplexity before and after, over as many windows.
        only: only layers whose name has a match of this regular expression.
        head: prune the output head too, where its weight is its own.
        seed: which windows are drawn.
        device: auto is the GPU where there is one.
        dtype: auto is the checkpoint's own.
        resume: a folder where finished blocks are kept; the same command goes on after a kill.
        overwrite: replace what sparsekit wrote there before.
        report: write report.html, which needs nothing else to be read.
        json: print the results as JSON on stdout, and nothing else there.
        debug: show where an error comes from.
    """

    model: str
    out: Path
    method: Literal["magnitude", "wanda", "ria", "sparsegpt", "admm"] = "wanda"
    pattern: str = "2:4"
    swaps: bool = False
    least_squares: bool = False
    calibration: str = "builtin"
    nsamples: int = 128
    window: int = 512
    eval: Path | None = None
    only: str = ""
    head: bool = False
    seed: int = 0
    device: str = "auto"
    dtype: Dtype = "auto"
    resume: Path | None = None
    overwrite: bool = False
    report: bool = False
    json: bool = False
    debug: bool = False

    def run(self) -> int:
        method = self.checked()
        model: Any = load_dense(self.model, self.device, self.dtype)
        window, calibration, held_out = self.texts(model)
        where, head = self.where(model)
        with without_cache(model):
            before = quality(model, held_out, "perplexity, dense")
            bar = terminal.progress("prune")
            report = prune_(model, method, calibration, where=where, progress=bar, resume=self.resume)
            after = quality(model, held_out, "perplexity, pruned")
        found = report_of(model, report) | {
            "model": self.model,
            "architecture": type(model).__name__,
            "pattern": self.pattern,
            "calibration": {"text": self.calibration, "windows": self.nsamples, "window": window, "seed": self.seed},
            "perplexity": None if before is None else {"dense": before, "pruned": after, "text": str(self.eval)},
        }
        found["skipped"] = [*found["skipped"], *head]
        with new_folder(self.out) as folder:
            model.save_pretrained(folder)
            copy_tokenizer(self.model, model.config, folder)
            save(model, folder / MASKS, format="masks")
            write_json(folder / REPORT, found)
            (folder / "README.md").write_text(
                README.format_map({**found, "layers": len(found["layers"]), "masks": MASKS}), encoding="utf-8"
            )
            if self.report:
                write_page(folder)
        if self.json:
            terminal.print_json(found)
        else:
            show(found, self.out)
        return 0

    def texts(self, model: Any) -> tuple[int, list[dict[str, Tensor]] | None, Tensor | None]:
        """Returns the tokens in a window, the calibration batches and the held-out windows; None if not wanted."""
        tokenizer = load_tokenizer(self.model, model.config) if self.calibration != "none" or self.eval else None
        window = min(self.window, longest(model, tokenizer) or self.window)
        calibration = held_out = None
        if self.calibration != "none":
            tokens = text.windows(tokenizer, self.calibration, window, self.nsamples)
            calibration = [batch_of(model, batch) for batch in text.draw_batches(tokens, self.nsamples, self.seed)]
        if self.eval is not None:
            text.check_causal(model)
            held_out = text.windows(tokenizer, str(self.eval), window, 1)[: self.nsamples]
        return window, calibration, held_out

    def where(self, model: nn.Module) -> tuple[Where, list[dict[str, str]]]:
        """Returns the function that selects layers, and the entry of the report if the output head stays dense."""
        only, head = regex(self.only), None if self.head else output_head(model)
        if head is not None and (head, "weight") in shared_weight_reasons(model, fast_paths=False):
            head = None
        names = [name for name, module in model.named_modules() if module is head]
        reason = "the output head stays dense without --head"
        return (
            lambda name, module: module is not head and only.search(name) is not None,
            [{"name": name, "reason": reason} for name in names],
        )

    def checked(self) -> Method:
        """Checks all arguments, as far as that needs no model, and returns the pruning method.

        Raises:
            UsageError: an argument is wrong.
        """
        check_out(self.out, overwrite=self.overwrite)
        if self.nsamples < 1 or self.window < 2:
            raise UsageError(f"--nsamples must be at least 1 and --window 2, got {self.nsamples} and {self.window}")
        if self.eval is not None and self.eval.resolve() == Path(self.calibration).resolve():
            raise UsageError(f"--eval must be held out, {self.eval} is the calibration text")
        regex(self.only)
        with usage():
            method = METHODS[self.method](self.pattern)
            method = Swaps(method) if self.swaps else method
            method = LeastSquares(method) if self.least_squares else method
        if self.calibration == "none" and method.statistic is not None:
            raise UsageError(f"{method!r} needs a calibration text, --calibration is none")
        for source in (self.calibration, self.eval):
            if source not in ("builtin", "none", None):
                text.read_text(str(source))
        return method


def quality(model: nn.Module, held_out: Tensor | None, what: str) -> float | None:
    """Returns the perplexity on the held-out text; None without one."""
    return None if held_out is None else text.perplexity(model, held_out, terminal.progress(what))


def report_of(model: Any, report: PruneReport) -> dict[str, Any]:
    """Returns the report of ``prune_`` as JSON, with the bytes of every layer added."""
    found, modules = report.to_json(), dict(model.named_modules())
    for layer in found["layers"]:
        name, key = layer["name"], "weight"
        if name not in modules:  # experts are a parameter
            name, _, key = name.rpartition(".")
        module = modules[name]
        mask, info, weight = get_mask(module, key), get_mask_info(module, key), module.get_parameter(key).detach()
        assert mask is not None and info is not None
        rows, kept = grouped(weight, info.axis), grouped(mask, info.axis)
        layer |= {"dense_bytes": weight.nbytes, "packed_bytes": packed_bytes(rows, kept, info.pattern)}
    return found


def show(found: dict[str, Any], out: Path) -> None:
    """Prints a table of the layers, what was left dense, and the perplexity."""
    rows = [
        (
            layer["name"],
            "x".join(map(str, layer["shape"])),
            f"{layer['sparsity']:.2%}",
            "-" if layer["error"] is None else f"{layer['error']:.4f}",
            f"{layer['seconds']:.2f}",
        )
        for layer in found["layers"]
    ]
    error = "-" if found["error"] is None else f"{found['error']:.4f}"
    rows.append(
        (f"{len(rows)} layers", f"{found['weights']:,}", f"{found['sparsity']:.2%}", error, f"{found['seconds']:.1f}")
    )
    share = f"{found['model_sparsity']:.2%}"
    rows.append(("the whole model", f"{found['model_weights']:,}", share, "", ""))
    terminal.table(("layer", "shape", "sparsity", "error", "seconds"), rows)
    for line in summary((each["reason"], each["name"]) for each in found["skipped"]):
        terminal.write(f"left dense: {line}")
    for line in summary((layer["remark"], layer["name"]) for layer in found["layers"] if layer["remark"]):
        terminal.write(line)
    if perplexity := found["perplexity"]:
        terminal.write(f"perplexity {perplexity['dense']:.4f} dense, {perplexity['pruned']:.4f} pruned")
    terminal.write(f"{found['method']}, written to {out}")
