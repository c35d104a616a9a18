"""Callbacks for the Trainer of transformers that keep masks, or train with 2:4 weights."""

from pathlib import Path
from typing import Any, Literal

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .._layers import Where
from .._optimizers import sharding
from ..checkpoint import load, save
from ..masks import masked_parameters
from ..prune import MaskKeeper, keep_masks
from ..train import SparseTraining, sparse_training_

MASKS = "masks.safetensors"


class MaskCallback(TrainerCallback):
    """A callback that keeps the stored masks of a pruned model while a Trainer trains it, as ``keep_masks`` does::

        sk.prune_(model, sk.Wanda("2:4"), batches)
        Trainer(model, arguments, callbacks=[MaskCallback()], train_dataset=texts).train()

    Without it, a Trainer fills the zeros and gives no warning. Gradient accumulation, DDP, accelerate and
    ``fully_shard`` work as with ``keep_masks``. Every checkpoint has the zeros, and the masks in
    ``masks.safetensors``: if training is resumed with a model without masks, they are read from there.
    """

    def __init__(self) -> None:
        self.keeper: MaskKeeper | None = None

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Begins to keep the masks.

        Raises:
            ValueError: for the reasons of ``keep_masks``.
        """
        self.keeper = None  # a keeper left by a training that failed belongs to the old optimizer
        masks = _checkpoint(args, state) / MASKS
        if not any(masked_parameters(module) for module in model.modules()) and masks.is_file():
            load(model, masks)
        self.keeper = keep_masks(model, optimizer)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Writes the masks beside the weights of a checkpoint."""
        folder = _checkpoint(args, state)
        if args.should_save and folder.is_dir():
            save(model, folder / MASKS, format="masks")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stops keeping the masks.

        Raises:
            ValueError: a dropped weight is not zero, because the Trainer has loaded a best checkpoint that was written
                without the masks.
        """
        keeper, self.keeper = self.keeper, None
        if keeper is not None:
            keeper.remove()


class SparseTrainingCallback(TrainerCallback, ExportableState):
    """A callback that makes a Trainer train with 2:4 weights, as ``sparse_training_`` does, and finishes the model.

    Checkpoints hold the dense weights, so a resumed training continues as if it had not stopped; evaluation uses the
    2:4 weights. After the training the weights are 2:4 and have stored masks: save the model then. If training fails,
    the layers go on computing with 2:4 weights: another ``train()`` continues, and ``training.undo()`` makes them plain
    layers.

    Args:
        backward, where: as in ``sparse_training_``. If the Trainer restores the callback from a checkpoint
            (``restore_callback_states_from_checkpoint``), the layers are selected by their names.
        decay: as in ``sparse_training_``, for each update of the optimizer: if gradients are accumulated over several
            passes, each adds its part. With a gradient scaler (``fp16``) it is scaled down with the gradients.
    """

    def __init__(
        self,
        backward: Literal["straight_through", "transposable"] = "straight_through",
        decay: float = 0.0,
        where: Where | None = None,
    ) -> None:
        self.backward: Literal["straight_through", "transposable"] = backward
        self.decay, self.where = decay, where
        self.layers: list[str] | None = None  # their names, once the training has begun
        self.training: SparseTraining | None = None

    def state(self) -> dict[str, Any]:
        """Returns the state of the callback that a checkpoint stores as JSON."""
        return {
            "args": {"backward": self.backward, "decay": self.decay},
            "attributes": {"layers": self.layers},
        }

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Makes the layers compute with 2:4 weights.

        Raises:
            ValueError: for the reasons of ``sparse_training_``, or FSDP has sharded the model, so that it cannot be
                finished in place.
        """
        if sharding(model):
            raise ValueError(
                "the model is sharded by FSDP: call sparse_training_ yourself, and finish a plain copy that has loaded "
                "the full state dict"
            )
        decay = self.decay / args.gradient_accumulation_steps
        self.training = sparse_training_(model, backward=self.backward, decay=decay, where=self._where)
        self.layers = [layer.name for layer in self.training.layers if layer.product != "plain"]

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Makes the weights 2:4.

        Raises:
            ValueError: for the reasons of ``SparseTraining.finish``.
        """
        if self.training is not None:
            self.training.finish()

    def _where(self, name: str, module: nn.Module) -> bool:
        if self.layers is not None:
            return name in self.layers
        return self.where is None or bool(self.where(name, module))


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    """Returns the folder of the checkpoint of this step."""
    return Path(args.output_dir or "") / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
