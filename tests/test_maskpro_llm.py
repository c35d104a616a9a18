"""The example that learns masks of language models: its files, its flags, its errors, and going on after a kill."""

import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import sparsekit as sk

for package in ("accelerate", "matplotlib", "tqdm", "transformers", "tyro"):
    pytest.importorskip(package)

EXAMPLES = Path(__file__).parent.parent / "examples"
OWN = (
    "baseline",
    "compare",
    "config",
    "evaluate",
    "get_mask",
    "inference_loss",
    "losses",
    "masks",
    "run",
    "texts",
    "train",
)
NEIGHBORS = ("model", "speed", "text")  # of the example three_tier
ALL = {"held_out": 4, "validation": 2, "sqlen": 16, "windows": "all"}
LEARNING = {"dataset_size": 12, "batchsize": 4}


@pytest.fixture(scope="module")
def modules():
    """The example's modules, imported as ``python train.py`` finds its neighbors."""
    path = list(sys.path)
    sys.path[:0] = [str(EXAMPLES / "maskpro_llm"), str(EXAMPLES / "three_tier")]
    for name in (*OWN, *NEIGHBORS):
        sys.modules.pop(name, None)
    try:
        yield SimpleNamespace(**{name: __import__(name) for name in (*OWN, *NEIGHBORS)})
    finally:
        sys.path[:] = path
        for name in (*OWN, *NEIGHBORS):
            sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def folder(modules, tmp_path_factory):
    """A folder with a random Llama whose tokens are bytes, ``dense``, and with documents, ``text.txt``."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("maskpro_llm")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    llama = LlamaForCausalLM(LlamaConfig(vocab_size=256, bos_token_id=None, eos_token_id=None, **sizes))
    with torch.no_grad():
        for weight in llama.parameters():
            weight.mul_(4 if weight.dim() == 2 else 1)  # else all masks have nearly the same loss
    modules.model.save(llama, modules.model.bytes_tokenizer(), folder / "dense")
    documents = [f"{index:02} is the number {index * index:04} and so on" for index in range(40)]
    (folder / "text.txt").write_text("<|endoftext|>".join(documents), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def masked(modules, folder):
    """The settings of all commands, in a folder with initial masks and their losses."""
    settings = {"model": str(folder / "dense"), "data": str(folder / "text.txt"), "out": folder / "out", **ALL}
    modules.get_mask.main(modules.get_mask.Masking(**settings, nsamples=8))
    modules.inference_loss.main(modules.baseline.Batched(**settings, **LEARNING))
    return settings


def load(folder):
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(folder)


def learnable(model):
    return {name: module for name, module in model.named_modules() if "layers" in name and hasattr(module, "weight")}


def test_the_steps_from_masks_to_evaluation(modules, masked, capsys):
    options = {**LEARNING, "epoch": 2, "save": True, "lr": 2.0, "logits": 3.0}
    report = modules.train.main(modules.train.Training(**masked, **options))
    folder = masked["out"] / "results" / "lr2_epoch2_logits3_size12"
    baseline = np.load(masked["out"] / "inference_loss_text_12_bs4_sql16_unshuffled.npy")
    losses, better = (np.load(folder / f"{name}.npy") for name in ("loss_training", "loss_improvements"))
    assert report["steps"] == len(losses) == 24  # 12 texts in 3 batches, four draws for each, twice
    np.testing.assert_allclose(losses + better, np.tile(baseline.repeat(4), 2), rtol=1e-5)
    dense, learned = load(masked["model"]), load(folder / "checkpoint")
    paths = sorted((folder / "learned_mask").glob("*.pt"))
    assert len(paths) == 14 and "lm_head" not in [path.stem for path in paths]
    for path in paths:
        mask = torch.load(path, weights_only=True)
        assert (mask.view(-1, 4).sum(1) == 2).all()
        assert torch.equal(learned.get_submodule(path.stem).weight, dense.get_submodule(path.stem).weight * mask)

    found = modules.evaluate.main(modules.evaluate.Evaluation(**masked, others=("wanda",), nsamples=8, seconds=0))
    assert list(found["models"]) == ["dense", "initial", "wanda", "learned"] and found["texts"] == 4
    tokens = modules.texts.read(modules.config.Shared(**masked), modules.model.bytes_tokenizer()).held_out
    loss = load(folder / "checkpoint")(input_ids=tokens, labels=tokens).loss.item()
    assert found["models"]["learned"]["perplexity"] == pytest.approx(math.exp(loss), rel=1e-5)
    assert json.loads((folder / "evaluation.json").read_text()) == found
    assert "4 texts that were held out" in capsys.readouterr().out


def test_rules_are_compared_on_the_same_texts(modules, masked, capsys):
    settings = modules.compare.Comparison(**masked, **LEARNING, passes=40, seeds=(2,))
    found = modules.compare.main(settings)
    assert list(found) == list(modules.compare.RULES) and found == json.loads(
        (masked["out"] / "comparison.json").read_text()
    )
    ours = found["ours: lr 0.15, logits 5.1"][0]
    for runs in found.values():
        assert [run["seed"] for run in runs] == [2]
        for run in runs:
            assert run["initial"] == ours["initial"] and run["dense"] == ours["dense"]
            assert 40 <= run["passes"] <= 44  # a step and the check after it are whole
            assert (run["flips"] == 0) <= (run["learned"] == run["initial"])
    published, defaults = found["published: lr 50, logits 10"][0], found["defaults"][0]
    assert published["steps"] >= ours["steps"] > defaults["steps"] > 0  # by the likeliest masks, and by choosing logits
    said = capsys.readouterr().out.split("initial masks ")[-1]
    assert f"{ours['learned']['perplexity']:.3f}" in said and all(rule in said for rule in found)


def test_the_baseline_is_the_loss_of_the_masked_model(modules, masked):
    model, settings = load(masked["model"]), modules.baseline.Batched(**masked, **LEARNING)
    for path in settings.masks.glob("*.pt"):
        model.get_submodule(path.stem).weight.data *= torch.load(path, weights_only=True)
    texts = modules.texts.read(settings, modules.model.bytes_tokenizer(), 12).learn
    with torch.no_grad():
        losses = [model(input_ids=batch, labels=batch).loss.item() for batch in texts.split(4)]
    np.testing.assert_allclose(np.load(settings.baseline), losses, rtol=1e-5)


def test_batches_epochs_and_steps(modules, masked):
    """Batches of several passes have the losses of whole ones, and --max_step counts the steps of all epochs."""
    options = {"dataset_size": 12, "batchsize": 6, "microbatch": 3}
    losses = modules.inference_loss.main(modules.baseline.Batched(**masked, **options, epoch=2))
    assert len(losses) == 4 and (losses[:2] == losses[2:]).all()
    whole = np.load(masked["out"] / "inference_loss_text_12_bs4_sql16_unshuffled.npy")
    assert losses[:2].mean() == pytest.approx(whole.mean(), rel=1e-5)
    report = modules.train.main(modules.train.Training(**masked, **options, epoch=5, max_step=3))
    assert report["steps"] == 3


def test_an_epoch_passes_once_over_the_batches(modules, masked):
    def steps(batches, ranks, **options):
        return modules.train.Training(**masked, **options).steps(batches, ranks)

    assert steps(6, 1, epoch=2) == 48 and steps(6, 2, epoch=2) == 24  # four draws for each batch
    assert steps(6, 1, epoch=2, draws=3) == 36 and steps(6, 1, epoch=2, parity=True) == 12
    assert steps(6, 1, epoch=2, parity=True, max_step=5) == 5


def test_targets_are_learned_and_all_else_stays_dense(modules, masked, tmp_path):
    options = {**LEARNING, "targets": ("layers.1", "q_proj")}
    (tmp_path / "initial_mask").symlink_to(masked["out"] / "initial_mask")
    settings = {**masked, "out": tmp_path}
    modules.inference_loss.main(modules.baseline.Batched(**settings, **options))
    training = modules.train.Training(**settings, **options, epoch=1)
    report = modules.train.main(training)
    assert len(report["layers"]) == 8 and "model.layers.0.self_attn.q_proj" in report["layers"]
    for name, module in learnable(load(training.result / "checkpoint")).items():
        if module.weight.dim() == 2:
            assert (module.weight == 0).float().mean().item() == (0.5 if name in report["layers"] else 0)

    found = modules.evaluate.main(modules.evaluate.Evaluation(**settings, seconds=0))["models"]
    model = load(masked["model"])
    for path in (tmp_path / "initial_mask").glob("*.pt"):
        if path.stem in report["layers"]:
            model.get_submodule(path.stem).weight.data *= torch.load(path, weights_only=True)
    tokens = modules.texts.read(modules.config.Shared(**settings), modules.model.bytes_tokenizer()).held_out
    with torch.no_grad():
        loss = model(input_ids=tokens, labels=tokens).loss.item()
    assert found["initial"]["loss"] == pytest.approx(loss, rel=1e-5)


def test_a_run_belongs_to_the_content_of_its_masks(modules, masked, tmp_path, capsys):
    settings = {**masked, "out": tmp_path}
    training = modules.train.Training(**settings, **LEARNING, max_step=1)

    def masks(method):
        modules.get_mask.main(modules.get_mask.Masking(**settings, method=method, nsamples=8))
        modules.inference_loss.main(modules.baseline.Batched(**settings, **LEARNING))

    masks("magnitude")
    report = modules.train.main(training)
    assert modules.train.main(training)["passes"] == report["passes"] > 0
    assert f"the run in {training.result} is finished, and its result is taken" in capsys.readouterr().out
    masks("wanda")
    with pytest.raises(ValueError, match=r"config.json belongs to another run: it differs in masks; name another"):
        modules.train.main(training)
    with pytest.raises(
        ValueError, match=r"was learned from other masks than those in .*: name their folder by --init$"
    ):
        modules.evaluate.main(modules.evaluate.Evaluation(**settings, seconds=0))


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
    ],
)
def test_no_memory_left_is_told_in_one_sentence(modules, monkeypatch, error):
    def main(_):
        raise error

    monkeypatch.setattr(sys, "argv", ["train.py"])
    with pytest.raises(
        SystemExit, match=r"^error: out of memory: lower --microbatch or --sqlen, or try --dtype bfloat16$"
    ):
        modules.config.run_command(main, modules.train.Training, None)


def test_a_folder_that_another_process_runs_in(modules, masked, tmp_path, monkeypatch):
    monkeypatch.setattr(
        modules.train.Run, "open", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("is being run by"))
    )
    with pytest.raises(ValueError, match=r"^is being run by$"):
        modules.train.main(modules.train.Training(**{**masked, **LEARNING, "epoch": 9}))


def test_masks_of_a_model_that_was_pruned_elsewhere(modules, folder, tmp_path):
    model = load(folder / "dense")
    tokens = torch.randint(256, (4, 16), generator=torch.Generator().manual_seed(0))
    sk.prune_(model, sk.SparseGPT("2:4"), tokens, where=lambda name, _: name != "lm_head")
    modules.model.save(model, modules.model.bytes_tokenizer(), tmp_path / "pruned")
    settings = {"model": str(folder / "dense"), "out": tmp_path, "data": "none"}
    masks = modules.get_mask.main(modules.get_mask.Masking(**settings, pruned=str(tmp_path / "pruned")))
    assert len(masks) == 14
    for name, mask in masks.items():
        assert torch.equal(mask, model.get_submodule(name).weight != 0)
        assert torch.equal(torch.load(tmp_path / "initial_mask" / f"{name}.pt", weights_only=True), mask)
    with pytest.raises(ValueError, match=r"--pruned .*dense is not 2:4, model.layers.0.self_attn.q_proj.weight has"):
        modules.get_mask.main(modules.get_mask.Masking(**settings, pruned=str(folder / "dense")))


def test_a_stopped_run_goes_on(modules, masked, monkeypatch):
    options = {**LEARNING, "lr": 3.0, "logits": 2.0, "save_every": 2}
    whole = modules.train.Training(**masked, **options, epoch=3)
    modules.train.main(whole)
    expected = [np.load(whole.result / "loss_training.npy"), load(whole.result / "checkpoint").state_dict()]
    whole.result.rename(whole.result.with_name("whole"))

    def stop(run):
        if run.step == 5:
            raise KeyboardInterrupt

    record = modules.train.Run.record
    with monkeypatch.context() as patch:
        patch.setattr(modules.train.Run, "record", lambda run, **values: (stop(run), record(run, **values)))
        with pytest.raises(KeyboardInterrupt):
            modules.train.main(whole)
    assert not (whole.result / "checkpoint").exists()
    modules.train.main(whole)
    assert (np.load(whole.result / "loss_training.npy") == expected[0]).all()
    for name, weight in load(whole.result / "checkpoint").state_dict().items():
        assert torch.equal(weight, expected[1][name]), name


@pytest.mark.parametrize("spelling", ["_", "-"])
def test_the_published_flags(modules, spelling):
    import tyro

    words = "--dataset_size 64 --max_step 9 --targets layers.0 mlp --lr 50 --logits 10 --epoch 625 --save --parity"
    words = words.replace("_", spelling) + " --batchsize 16"
    settings = tyro.cli(modules.train.Training, args=words.split())
    assert (settings.dataset_size, settings.batchsize, settings.max_step) == (64, 16, 9)
    assert settings.targets == ("layers.0", "mlp") and settings.save and settings.parity
    assert settings.result.name == "lr50_epoch625_logits10_size64_parity"
    words = "--dataset_size 512 --batchsize 32 --sqlen 128 --epoch 1 --data c4".replace("_", spelling)
    path = tyro.cli(modules.baseline.Batched, args=words.split()).baseline
    assert path.name == "inference_loss_c4-en-0000_512_bs32_sql128_unshuffled.npy"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"init": Path("none")}, r"^none has no masks: run get_mask.py first, with the same --model and --out$"),
        (
            {"batchsize": 3},
            r"text_12_bs3_sql16_unshuffled.npy is missing: run inference_loss.py with the same --dataset_size 12 "
            r"--batchsize 3 --sqlen 16 --targets all, --model, --data and --out$",
        ),
        ({"batchsize": 13}, r"--batchsize must be from 1 to --dataset_size 12, got 13"),
        ({"batchsize": 6, "microbatch": 4}, r"--batchsize 6 must be a multiple of --microbatch 4"),
        (
            {"targets": ("conv",)},
            r"--targets conv is no part of the names of the 14 masks: model.layers.0.mlp.down_proj",
        ),
        (
            {"targets": ("layers.0",)},
            r"the initial masks have the loss .* says .*: run inference_loss.py with .*layers.0",
        ),
        ({"dataset_size": 500}, r"has only \d+ texts of 16 tokens left for --dataset_size 500: lower that"),
        ({"model": "/nowhere"}, r"there is no folder /nowhere"),
        ({"data": "nowhere.txt"}, r"--data must be c4, builtin, a UTF-8 file or an id of a data set: .*nowhere.txt"),
        (
            {"validation": 1, "epoch": 4},
            r"config.json belongs to another run: it differs in validation; name another folder$",
        ),
        ({"epoch": 0}, r"^--epoch must be at least 1, got 0$"),
        ({"max_step": 0}, r"^--max_step must be at least 1, got 0$"),
        ({"draws": 0}, r"^--draws must be at least 1, got 0$"),
        ({"held_out": 1}, r"^--held_out must be at least 2, got 1$"),
    ],
)
def test_errors_say_what_to_run(modules, masked, changes, message):
    settings = {**masked, **LEARNING, "epoch": 1, **changes}
    if "validation" in changes:
        modules.train.main(modules.train.Training(**{**settings, "validation": 2}))
    with pytest.raises((ValueError, OSError), match=message):
        modules.train.main(modules.train.Training(**settings))


def test_what_evaluation_needs(modules, masked, tmp_path):
    with pytest.raises(ValueError, match=r"results has no checkpoint: run train.py first"):
        modules.evaluate.main(modules.evaluate.Evaluation(**{**masked, "out": tmp_path}))
    with pytest.raises(ValueError, match="--others are wanda-swaps, wanda, ria, magnitude, sparsegpt, got obs"):
        modules.evaluate.main(modules.evaluate.Evaluation(**masked, others=("obs",)))


def test_a_model_that_predicts_no_next_token_is_refused(modules, tmp_path):
    from transformers import BertConfig, BertModel

    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    BertModel(BertConfig(vocab_size=256, **sizes)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="needs a model that predicts the next token, BertModel does not"):
        modules.get_mask.main(modules.get_mask.Masking(model=str(tmp_path), data="none"))


def test_a_comparison_by_hand(modules):
    losses, initial = torch.tensor([1.0, 2.0, 3.0]).double(), torch.tensor([2.0, 2.0, 5.0]).double()
    row = modules.evaluate.compared(losses, initial)
    assert row["perplexity"] == pytest.approx(math.exp(2)) and row["more_than_initial"] == -1
    error = 1 / math.sqrt(3)  # of the differences -1, 0 and -2
    assert row["standard_error"] == pytest.approx(math.exp(2) * error)
    assert row["interval"] == pytest.approx([-1 - 1.96 * error, -1 + 1.96 * error], abs=1e-4)
    assert row["p"] == pytest.approx(0.0833, abs=1e-4)  # of a normal value beyond 1.732


def test_no_document_is_in_two_parts(modules, tmp_path):
    documents = [f"{index:02}" * 20 for index in range(20)]
    (tmp_path / "text.txt").write_text("<|endoftext|>".join([*documents, *documents]), encoding="utf-8")
    tokenizer = modules.model.bytes_tokenizer()
    options = {"data": str(tmp_path / "text.txt"), "sqlen": 16, "held_out": 3, "validation": 2}

    def read(windows):
        texts = modules.texts.read(modules.config.Shared(model="none", windows=windows, **options), tokenizer)
        return [tokenizer.batch_decode(rows) for rows in (texts.held_out, texts.validation, texts.learn)]

    assert read("first") == [[each[:16] for each in part] for part in (documents[:3], documents[3:5], documents[5:])]
    held_out, validation, learn = read("all")  # two of each document, the second one of 01 is left over
    assert held_out == ["00" * 8, "00" * 8, "01" * 8] and validation == ["02" * 8, "02" * 8] and len(learn) == 34
