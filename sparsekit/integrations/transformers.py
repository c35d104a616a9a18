"""Callbacks by which the Trainer of transformers keeps masks, or trains with 2:4 weights."""

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
    """Keeps the stored masks of a pruned model while a Trainer trains it, as ``keep_masks`` does::

        sk.prune_(model, sk.Wanda("2:4"), batches)
        Trainer(model, arguments, callbacks=[MaskCallback()], train_dataset=texts).train()

    A plain Trainer fills the zeros without a word. With gradient accumulation, DDP, accelerate and ``fully_shard`` as
    ``keep_masks``. Every checkpoint has its zeros, and the masks beside them in ``masks.safetensors``: a training that
    is resumed on a model without masks reads them there.
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
            ValueError: as ``keep_masks``.
        """
        self.keeper = None  # that of a training which failed goes with its optimizer
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
            ValueError: a dropped weight is not zero: a best checkpoint was loaded that was written without the masks.
        """
        keeper, self.keeper = self.keeper, None
        if keeper is not None:
            keeper.remove()


class SparseTrainingCallback(TrainerCallback, ExportableState):
    """Makes a Trainer train with 2:4 weights, as ``sparse_training_`` does, and finishes the model at the end.

    Checkpoints hold the dense weights behind, so a resumed training goes on as if it had not stopped; evaluation sees
    the 2:4 ones. After the training the model is 2:4 and has its masks: save it then. A training that fails leaves the
    model training sparse: ``training.undo()`` makes its layers plain, another ``train()`` goes on.

    Args:
        backward, where: as in ``sparse_training_``. A resumed callback that the Trainer makes anew
            (``restore_callback_states_from_checkpoint``) selects the layers by their names.
        decay: as in ``sparse_training_``, for one update: it is divided by the passes that are accumulated. Under a
            gradient scaler (``fp16``) it is scaled down with the gradients.
    """

    def __init__(
        self,
        backward: Literal["straight_through", "transposable"] = "straight_through",
        decay: float = 0.0,
        where: Where | None = None,
    ) -> None:
        self.backward: Literal["straight_through", "transposable"] = backward
        self.decay, self.where = decay, where
        self.layers: list[str] | None = None  # by name, once they are known
        self.training: SparseTraining | None = None

    def state(self) -> dict[str, Any]:
        """What a checkpoint's JSON keeps of the callback."""
        return {
            "args": {"backward": self.backward, "decay": self.decay},
            "attributes": {"layers": self.layers},
        }

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Makes the layers train sparse.

        Raises:
            ValueError: as ``sparse_training_``, or FSDP has sharded the model, which cannot be finished in place.
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
            ValueError: as ``SparseTraining.finish``.
        """
        if self.training is not None:
            self.training.finish()

    def _where(self, name: str, module: nn.Module) -> bool:
        if self.layers is not None:
            return name in self.layers
        return self.where is None or bool(self.where(name, module))


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    """The folder of the checkpoint of this step."""
    return Path(args.output_dir or "") / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
