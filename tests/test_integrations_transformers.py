"""The Trainer of transformers keeps masks and trains with 2:4 weights, also resumed."""

import json

import pytest
import torch

import sparsekit as sk
from sparsekit.masks import get_mask, masked_parameters

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
from sparsekit.integrations.transformers import MaskCallback, SparseTrainingCallback  # noqa: E402

TOKENS = torch.randint(0, 32, (16, 8), generator=torch.Generator().manual_seed(0))
TEXTS = [{"input_ids": row, "labels": row} for row in TOKENS]
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")


def llama():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "vocab_size": 32}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 16}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads, use_cache=False))


def pruned():
    model = llama()
    sk.prune_(model, sk.Magnitude("2:4"))
    return model


def trainer(model, folder, *callbacks, steps=3, **arguments):
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=2,
        learning_rate=0.05,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        **{"save_strategy": "no", **arguments},
    )
    return transformers.Trainer(model, arguments, train_dataset=TEXTS, callbacks=list(callbacks))


def masked(model):
    return [module for module in model.modules() if masked_parameters(module)]


def filled(model):
    """Returns the number of dropped weights that are not zero."""
    assert len(masked(model)) > 6
    return sum(int((layer.weight[~get_mask(layer)] != 0).sum()) for layer in masked(model))


def test_masks_are_kept_with_accumulated_gradients(tmp_path):
    model, callback = pruned(), MaskCallback()
    before = model.model.layers[0].mlp.up_proj.weight.detach().clone()
    trainer(model, tmp_path, callback, gradient_accumulation_steps=2).train()
    assert filled(model) == 0 and not torch.equal(model.model.layers[0].mlp.up_proj.weight, before)
    assert callback.keeper is None
    assert not any(parameter._post_accumulate_grad_hooks for parameter in model.parameters())
    trainer(model, tmp_path).train()
    assert filled(model) > 100  # a plain Trainer fills them


@pytest.mark.slow
def test_masks_are_kept_from_a_checkpoint_on(tmp_path):
    whole = pruned()
    trainer(whole, tmp_path / "whole", MaskCallback(), steps=4).train()
    trainer(pruned(), tmp_path, MaskCallback(), steps=4, save_strategy="steps", save_steps=2).train()
    stored = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "checkpoint-2")
    sk.load(stored, tmp_path / "checkpoint-2" / "masks.safetensors")
    assert filled(stored) == 0
    resumed = llama()  # not pruned: the masks come from the checkpoint
    trainer(resumed, tmp_path, MaskCallback(), steps=4).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert filled(resumed) == 0
    torch.testing.assert_close(dict(resumed.named_parameters()), dict(whole.named_parameters()))


def test_a_training_without_masks_says_so(tmp_path):
    with pytest.raises(ValueError, match="no layer of the model has a stored mask"):
        trainer(llama(), tmp_path, MaskCallback()).train()


def test_a_training_that_fails_leaves_no_hooks(tmp_path):
    class Fails(transformers.TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            raise KeyError("mine")

    model, callback = pruned(), MaskCallback()
    failing = trainer(model, tmp_path, callback, Fails())
    with pytest.raises(KeyError, match="mine"):
        failing.train()
    assert filled(model) == 0
    trainer(model, tmp_path, callback).train()  # a second training with the same callback
    assert filled(model) == 0


def test_sparse_training_finishes_the_model(tmp_path):
    model, callback = llama(), SparseTrainingCallback(decay=0.1, where=lambda name, _: name != "lm_head")
    trainer(model, tmp_path, callback, gradient_accumulation_steps=2).train()
    assert filled(model) == 0 and get_mask(model.lm_head) is None
    assert all((get_mask(layer).view(-1, 4).sum(1) == 2).all() for layer in masked(model))
    assert "lm_head" not in callback.layers and len(callback.layers) == 7


@pytest.mark.slow
@pytest.mark.parametrize("restore", [False, True], ids=["", "restored"])
def test_sparse_training_is_resumed(tmp_path, restore):
    def callback():
        return SparseTrainingCallback(
            "transposable", where=None if restore and started else lambda name, _: "mlp" in name
        )

    started = False
    whole = llama()
    trainer(whole, tmp_path / "whole", callback(), steps=4).train()
    trainer(llama(), tmp_path, callback(), steps=4, save_strategy="steps", save_steps=2).train()
    started = True
    state = json.loads((tmp_path / "checkpoint-2" / "trainer_state.json").read_text())
    stored = state["stateful_callbacks"]["SparseTrainingCallback"]
    assert stored["args"] == {"backward": "transposable", "decay": 0.0} and len(stored["attributes"]["layers"]) == 3
    resumed = llama()
    again = trainer(resumed, tmp_path, callback(), steps=4, restore_callback_states_from_checkpoint=restore)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert len(masked(resumed)) == 3
    torch.testing.assert_close(dict(resumed.named_parameters()), dict(whole.named_parameters()))
