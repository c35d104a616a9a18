"""Chooses the initial masks of a language model, or takes those of one that was pruned elsewhere.

    python examples/maskpro_llm/get_mask.py                                   # Wanda, with swaps
    python examples/maskpro_llm/get_mask.py --method sparsegpt                # its masks; the weights stay as they are
    python examples/maskpro_llm/get_mask.py --pruned PATH                     # which weights of a pruned copy are not 0
    python examples/maskpro_llm/get_mask.py --model meta-llama/Llama-2-7b-hf --data c4 --dtype float16

It writes ``initial_mask/NAME.pt`` to ``--out``, a bool mask for every linear layer but the head.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal

import torch
import tyro
from config import Shared, load_model, run_command
from masks import layer_masks, selects, write_masks
from texts import read
from torch import Tensor
from tqdm import tqdm

import sparsekit as sk
from sparsekit.prune import Method

METHODS: dict[str, Method] = {
    "wanda-swaps": sk.Swaps(sk.Wanda("2:4")),
    "wanda": sk.Wanda("2:4"),
    "ria": sk.RIA("2:4"),
    "magnitude": sk.Magnitude("2:4"),
    "sparsegpt": sk.SparseGPT("2:4"),
}


@dataclass
class Masking(Shared):
    """What get_mask.py takes."""

    method: Literal["wanda-swaps", "wanda", "ria", "magnitude", "sparsegpt"] = "wanda-swaps"
    pruned: Annotated[str | None, tyro.conf.arg(aliases=["--path"])] = None
    """A folder or an id of a copy that was pruned to 2:4; no method is run then."""
    nsamples: int = 128  # texts to calibrate on, the first of those that train.py learns from


def prune(model: Any, method: Method, rows: Tensor | None = None, targets: Sequence[str] = ("all",)) -> sk.PruneReport:
    """Prunes the linear layers that targets select, but not the head, calibrated on texts if the method needs them."""
    head = model.get_output_embeddings()
    progress = partial(tqdm, desc="prune", leave=False, disable=None)
    batches = None if rows is None else [{"input_ids": batch.to(model.device)} for batch in rows.split(16)]

    def where(name: str, module: Any) -> bool:
        return module is not head and any(selects(target, name) for target in targets)

    return sk.prune_(model, method, batches, where=where, progress=progress)


def masks_of_pruned(model: Any, source: str) -> dict[str, Tensor]:
    """Returns the masks of weights that are 2:4 already.

    Raises:
        ValueError: a layer is not 2:4.
    """
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    report = prune(model, METHODS["magnitude"])  # which drops zeros alone
    for name, weight in model.named_parameters():
        if not torch.equal(weight, before[name]):
            raise ValueError(f"--pruned {source} is not 2:4, {name} has more than 2 weights that are not 0 in a group")
    return layer_masks(model, [layer.name for layer in report.layers])


def main(settings: Masking) -> dict[str, Tensor]:
    """Writes the masks and returns them."""
    if settings.pruned is not None:
        model, _ = load_model(settings, settings.pruned)
        masks = masks_of_pruned(model, settings.pruned)
    else:
        model, tokenizer = load_model(settings)
        rows = read(settings, tokenizer, settings.nsamples, "--nsamples").learn
        report = prune(model, METHODS[settings.method], rows)
        masks = layer_masks(model, [layer.name for layer in report.layers])
    write_masks(masks, settings.masks)
    kept = sum(int(mask.sum()) for mask in masks.values()) / sum(mask.numel() for mask in masks.values())
    print(f"{len(masks)} masks in {settings.masks}, which keep {kept:.1%} of their weights")
    return masks


if __name__ == "__main__":
    run_command(main, Masking, __doc__)
