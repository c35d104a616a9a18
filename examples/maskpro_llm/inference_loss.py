"""Measures the loss of the initial masks on every batch that train.py will learn from.

    python examples/maskpro_llm/inference_loss.py --dataset_size 512 --batchsize 32         # after get_mask.py

It writes one number for each batch to ``inference_loss_DATA_SIZE_bsBATCHSIZE_sqlSQLEN_unshuffled.npy`` in ``--out``.
"""

import numpy as np
from baseline import Batched
from config import load_model, run_command
from losses import all_losses
from masks import apply_masks, read_masks
from texts import read


def main(settings: Batched) -> np.ndarray:
    """Writes the losses and returns them; the loss has no noise, so every epoch has the same."""
    model, tokenizer = load_model(settings)
    apply_masks(model, read_masks(settings.masks, model, settings.targets))
    batches = settings.batches(read(settings, tokenizer, settings.dataset_size).learn)
    passes = [rows for batch in batches for rows in batch.split(settings.texts_in_pass)]
    losses = all_losses(model, passes, "initial masks").view(len(batches), -1).mean(1)
    found = np.tile(losses.numpy(), settings.epoch)
    np.save(settings.baseline, found)
    print(f"{len(found)} losses, {found.mean():.4f} in the mean, in {settings.baseline}")
    return found


if __name__ == "__main__":
    run_command(main, Batched, __doc__)
