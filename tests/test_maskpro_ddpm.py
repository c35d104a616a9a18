"""The example that learns masks for diffusion models: its files and errors, and the steps one after another."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from mask_example import FOLDER, PACKAGES, example_modules, first_steps, save_pipeline, training

for package in PACKAGES:
    pytest.importorskip(package)


@pytest.fixture(scope="module")
def modules():
    with example_modules() as found:
        yield found


@pytest.fixture(scope="module")
def pipeline(modules, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline")
    save_pipeline(modules, folder)
    return folder


@pytest.fixture(scope="module")
def steps(modules, pipeline, tmp_path_factory):
    return first_steps(modules, pipeline, tmp_path_factory.mktemp("steps"))


def test_masks_are_those_of_the_pruned_model(modules, steps):
    from diffusers import DDPMPipeline

    pruned = dict(DDPMPipeline.from_pretrained(steps.out / "pruned").unet.named_parameters())
    dense = modules.models.load_denoiser(steps.source["original_model"]).unet
    masked = modules.mask_files.masked_copy(dense, steps.out / "initial")
    for name, weight in masked.named_parameters():
        assert torch.equal(weight, pruned[name]), name
    masks = modules.mask_files.masks_of(masked)
    assert masks.keys() == steps.stats["layers"].keys() == steps.summary["layers"].keys()
    assert not any(part in name for name in masks for part in modules.settings.PROTECTED)
    assert masks["mid_block.resnets.0.conv1"].unflatten(1, (-1, 4)).sum(2).unique().tolist() == [2]
    assert steps.summary["dropped_nonzeros"] == 0 and steps.summary["sparsity"] == 0.5
    said = (steps.out / "initial" / "extraction_summary.txt").read_text()
    assert "mid_block.resnets.0.conv1: [16, 16, 3, 3], 50.00% dropped" in said


@pytest.mark.parametrize("pruner", ["magnitude", "random"])
def test_masks_without_groups_become_the_nearest_24_masks(modules, steps, tmp_path, pruner, capsys):
    modules.weight_prune.main(
        modules.weight_prune.Pruning(**steps.source, save_path=tmp_path / "pruned", pruner=pruner, pruning_ratio=0.7)
    )
    assert "these masks are not 2:4: get_mask_diffusion.py chooses the 2:4 masks" in capsys.readouterr().out
    summary = modules.get_mask_diffusion.main(
        modules.get_mask_diffusion.Extraction(
            **steps.source, model_path=tmp_path / "pruned", output_dir=tmp_path / "masks"
        )
    )
    dense = modules.models.load_denoiser(steps.source["original_model"]).unet
    mask = modules.mask_files.masks_of(modules.mask_files.masked_copy(dense, tmp_path / "masks"))
    name = "mid_block.resnets.0.conv1"
    kept = modules.models.load_denoiser(str(tmp_path / "pruned")).unet.get_submodule(name).weight != 0
    size = dense.get_submodule(name).weight.abs()
    groups = [each.movedim(1, -1).unflatten(-1, (-1, 4)) for each in (mask[name], kept, size)]
    found, kept, size = (each.reshape(-1, 4) for each in groups)
    assert summary["dropped_nonzeros"] > 0 and 0.29 < kept.float().mean() < 0.31
    for row in range(0, len(found), 7):
        best = sorted(range(4), key=lambda i: (kept[row, i].item(), size[row, i].item()))[2:]
        assert found[row].nonzero().flatten().tolist() == sorted(best)


def test_baselines_are_the_losses_of_the_initial_mask(modules, steps):
    import numpy as np

    assert steps.path.name == "inference_loss_diffusion_shapes_bs16_size4.npy"
    denoiser = modules.models.load_denoiser(steps.source["original_model"])
    masked = modules.mask_files.masked_copy(denoiser.unet, steps.out / "initial")
    part = tuple(each[:64] for each in denoiser.images("shapes").train)
    batches = modules.noisy.NoisyBatches(denoiser, part, 16, 0)
    expected = modules.noisy.image_losses(masked, batches, "").view(4, 16).mean(1)
    assert np.load(steps.path) == pytest.approx(expected.numpy(), rel=1e-5)
    assert steps.path.with_name(f"{steps.path.stem}_summary.txt").read_text().startswith("4 batches: mean ")


@pytest.mark.slow
def test_masks_are_learned_tuned_and_tested(modules, steps, tmp_path, capsys):
    import numpy as np
    from diffusers import DDPMPipeline

    run = tmp_path / "run"
    result = modules.train_diffusion.main(training(modules, steps, run, max_step=8))
    assert result["steps"] == 8 and json.loads((run / "training_summary.json").read_text()) == result
    records = modules.ddpm_parts.read_records(run)
    improvements, losses = np.load(run / "loss_improvements.npy"), np.load(run / "loss_training.npy")
    assert improvements.tolist() == [record["initial_loss"] - record["loss"] for record in records]
    assert losses.tolist() == [record["loss"] for record in records] and (run / "training_curves.png").exists()
    expected = np.load(steps.path)[:2].repeat(4)  # four draws for a batch
    np.testing.assert_allclose([each["initial_loss"] for each in records], expected, rtol=1e-5)
    dense = modules.models.load_denoiser(steps.source["original_model"]).unet
    learned = modules.mask_files.masked_copy(dense, run / "learned_mask")
    stored = DDPMPipeline.from_pretrained(run / "checkpoint").unet
    for name, weight in learned.named_parameters():
        assert torch.equal(weight, stored.get_parameter(name)), name
    again = modules.train_diffusion.main(training(modules, steps, run, max_step=8))
    assert again == result, "a finished run is not run again"
    assert f"{run} holds this run, finished" in capsys.readouterr().out

    tuning = modules.finetune.Finetuning(
        **steps.source, mask_path=run / "learned_mask", out=tmp_path / "tuned", max_step=3, batch_size=16, held_out=32
    )
    tuned = modules.finetune.main(tuning)
    assert tuned["finetuned"]["images"] == 32 and tuned["finetuned"]["loss"] < tuned["masked"]["loss"]
    weights = modules.models.load_denoiser(str(tmp_path / "tuned" / "checkpoint")).unet
    for name, mask in modules.mask_files.masks_of(learned).items():
        assert (weights.get_submodule(name).weight != 0).eq(mask).all(), name

    testing = modules.test_ddpm_maskpro.Testing(
        **steps.source,
        initial_mask_path=steps.out / "initial",
        learned_mask_path=run / "learned_mask",
        finetuned_path=tmp_path / "tuned" / "checkpoint",
        output_dir=tmp_path / "test",
        **{"held_out": 64, "batch_size": 32, "count": 8, "shown": 4, "sampling_steps": 2, "classifier_epochs": 1},
        **{"resamples": 2, "timed_batch": 2, "seconds": 0.01},
    )
    found = modules.test_ddpm_maskpro.main(testing)
    assert json.loads((tmp_path / "test" / "evaluation_results.json").read_text()).keys() == found.keys()
    assert found["sparsity"]["of_masked"] == 0.5 and (found["sparsity"]["exchanged_weights"] > 0) == result["kept"]
    denoiser = modules.models.load_denoiser(steps.source["original_model"])
    judged = tuple(each[:64] for each in modules.settings.judged_on(denoiser, "shapes"))
    noisy = modules.noisy.NoisyBatches(denoiser, judged, 32, 2)
    initial = modules.mask_files.masked_copy(dense, steps.out / "initial")
    losses = [modules.noisy.loss(initial, batch).item() for batch in noisy]
    assert found["loss"]["initial"]["loss"] == pytest.approx(sum(losses) / 2, rel=1e-5)
    assert found["loss"]["finetuned"]["above"] < 0
    assert found["images"].keys() == {"dense", "initial", "learned", "finetuned"}
    assert found["images"]["learned"]["fid"]["n"] == 8 and sum(found["images"]["learned"]["classes"]) == 8
    from PIL import Image

    with Image.open(tmp_path / "test" / "samples.png") as picture:
        assert picture.size == (2 * 4 * 16, 2 * 4 * 16)


def test_runs_depend_on_what_masks_and_weights_are(modules, steps, tmp_path):
    masks, other = tmp_path / "masks", tmp_path / "other"
    shutil.copytree(steps.out / "initial", masks)
    pruning = modules.weight_prune.Pruning(**steps.source, save_path=tmp_path / "pruned", pruner="random")
    modules.weight_prune.main(pruning)
    extraction = {**steps.source, "model_path": tmp_path / "pruned"}
    modules.get_mask_diffusion.main(modules.get_mask_diffusion.Extraction(**extraction, output_dir=other))
    options = {"initial_mask_path": masks, "max_step": 1, "save": False}
    tuning = modules.finetune.Finetuning(
        **steps.source, mask_path=masks, out=tmp_path / "tuned", max_step=1, batch_size=16, held_out=16
    )
    modules.train_diffusion.main(training(modules, steps, tmp_path / "run", **options))
    modules.finetune.main(tuning)
    shutil.copytree(other, masks, dirs_exist_ok=True)
    with pytest.raises(SystemExit, match="masks"):
        modules.train_diffusion.main(training(modules, steps, tmp_path / "run", **options))
    with pytest.raises(SystemExit, match="masks"):
        modules.finetune.main(tuning)


def test_a_file_of_losses_of_other_masks_is_measured_again(modules, steps, tmp_path, capsys):
    import numpy as np

    path = tmp_path / steps.path.name
    np.save(path, 1.1 * np.load(steps.path))
    options = {"baseline_path": tmp_path, "max_step": 1, "save": False}
    with pytest.raises(SystemExit, match=r"another model, mask, seed or --targets: run inference_loss_diffusion.py ag"):
        modules.train_diffusion.main(training(modules, steps, tmp_path / "one", **options))
    modules.train_diffusion.main(training(modules, steps, tmp_path / "two", measure_baseline=True, **options))
    assert "its losses are measured again" in capsys.readouterr().out
    assert np.load(path) == pytest.approx(np.load(steps.path), rel=1e-5)


def test_images_are_learned_on_or_chosen_on_or_judged_on(modules, monkeypatch, tmp_path):
    images = modules.ddpm_parts.Images
    part = [(torch.arange(start, end).view(-1, 1, 1, 1), torch.zeros(end - start)) for start, end in ((0, 8), (8, 13))]
    denoiser = SimpleNamespace(images=lambda _: images(*part, ("only",), "numbers"))
    learned = modules.settings.Sizes(dataset_size=8, batch_size=4).part(denoiser)
    chosen = modules.settings.chosen_on(denoiser, "numbers")
    judged = modules.settings.judged_on(denoiser, "numbers")
    found = [each[0].flatten().tolist() for each in (learned, chosen, judged)]
    assert found == [[*range(8)], [8, 9], [10, 11, 12]]
    given = []

    def judge(part, classes, real, *_):
        given.append(real)
        raise InterruptedError

    monkeypatch.setattr(modules.test_ddpm_maskpro, "ImageJudge", judge)
    testing = modules.test_ddpm_maskpro.Testing(learned_mask_path=tmp_path, output_dir=tmp_path)
    with pytest.raises(InterruptedError):
        modules.test_ddpm_maskpro.compare_images(testing, denoiser, {})
    assert given[0].flatten().tolist() == [10, 11, 12]


def test_steps_are_passes_times_batches_times_draws(modules):
    training = modules.train_diffusion.Training
    assert training(epoch=3, max_step=None).steps(5) == 60
    assert training(epoch=3, max_step=None, draws=2).steps(5) == 30
    assert training(epoch=3, max_step=None, parity=True).steps(5) == 15
    assert training(epoch=3, max_step=7).steps(5) == 7


def test_targets_are_parts_of_the_model(modules, steps, tmp_path, capsys):
    targets = ("down_blocks", "up_blocks.1")
    options = {"targets": targets, "measure_baseline": True, "baseline_path": tmp_path, "max_step": 2, "save": False}
    result = modules.train_diffusion.main(training(modules, steps, tmp_path / "run", **options))
    dense = modules.models.load_denoiser(steps.source["original_model"]).unet
    learned = modules.mask_files.masks_of(modules.mask_files.masked_copy(dense, tmp_path / "run" / "learned_mask"))
    assert len(learned) == result["layers"] and not (tmp_path / "run" / "checkpoint").exists()
    assert {name.split(".")[0] for name in learned} == {"down_blocks", "up_blocks"}
    assert all(name.startswith(("down_blocks.", "up_blocks.1.")) for name in learned)
    paths = {"initial_mask_path": steps.out / "initial", "learned_mask_path": tmp_path / "run" / "learned_mask"}
    settings = modules.test_ddpm_maskpro.Testing(**paths)
    like = modules.mask_files.masked_copy(dense, paths["learned_mask_path"])
    initial = modules.test_ddpm_maskpro.initial_like(like, dense, settings)
    assert modules.mask_files.masks_of(initial).keys() == learned.keys()
    assert torch.equal(initial.mid_block.resnets[0].conv1.weight, dense.mid_block.resnets[0].conv1.weight)
    assert "layers have an initial mask but no learned one: they are dense in both" in capsys.readouterr().out


def test_the_published_rule(modules, steps, tmp_path):
    result = modules.train_diffusion.main(training(modules, steps, tmp_path, parity=True, save=False))
    assert (result["lr"], result["multiplier"]) == (50, 10)
    assert modules.ddpm_parts.read_records(tmp_path)[0]["improvement"] == 0, "the first mask is the initial one"


def test_a_paired_comparison_by_hand(modules):
    found = modules.judge.compared(torch.tensor([1.0, 2.0, 6.0]), torch.tensor([2.0, 4.0, 9.0]))
    assert (found["loss"], found["above"], found["relative"]) == (3, -2, -0.4)
    assert found["interval"] == pytest.approx([-2 - 1.96 / 3**0.5, -2 + 1.96 / 3**0.5])
    assert found["chance"] == pytest.approx(5.32e-4, rel=1e-2)  # of 3.46 deviations
    same = modules.judge.compared(torch.ones(3), torch.ones(3))
    assert (same["above"], same["chance"]) == (0, 1)


def test_rejects_what_does_not_fit(modules, steps, pipeline, tmp_path):
    from PIL import Image

    def rejects(call, match):
        with pytest.raises(SystemExit, match=match):
            call()

    folders = (tmp_path / str(number) for number in range(99))
    (tmp_path / "colors" / "red").mkdir(parents=True)
    for number in range(2):
        Image.new("RGB", (16, 16), (200, number, 0)).save(tmp_path / "colors" / "red" / f"{number}.png")

    def train(**options):
        return lambda: modules.train_diffusion.main(training(modules, steps, next(folders), **options))

    rejects(
        train(initial_mask_path=tmp_path), r"masks.safetensors is missing: get_mask_diffusion.py --output_dir .* wri"
    )
    rejects(
        train(batch_size=8), r"bs8_size8.npy is missing: run inference_loss_diffusion.py with the same .*bs16_size4"
    )
    rejects(
        train(seed=1), r"has the loss .* for batch 0, and the initial mask has .*run inference_loss_diffusion.py ag"
    )
    rejects(
        train(targets=("up_block",)), "up_block names no part of the model: pass all, a part or a layer of .*up_blocks"
    )
    rejects(train(targets=("conv_in",), measure_baseline=True), "no masks in --targets conv_in: pass --targets all")
    rejects(train(batch_size=65), "--batch_size must be from 1 to --dataset_size 64, got 65")
    rejects(train(max_step=0), "--max_step must be at least 1, got 0")
    rejects(train(dataset=str(tmp_path / "colors")), "the model takes images of 1 channels and .* has 3: name the data")
    missing = modules.get_mask_diffusion.Extraction(**steps.source, model_path=tmp_path / "none")
    rejects(lambda: modules.get_mask_diffusion.main(missing), "none is missing: run weight_prune.py --save_path")
    plain = modules.get_mask_diffusion.Extraction(**steps.source, model_path=pipeline)
    rejects(lambda: modules.get_mask_diffusion.main(plain), "has no zeros: prune it by weight_prune.py first")
    rejects(lambda: modules.weight_prune.Pruning(pruning_ratio=30), "--pruning_ratio must be between 0 and 1, got 30")
    rejects(lambda: modules.weight_prune.Pruning(pruning_ratio=0.3), "swaps are for n:m patterns: pass --pruner wanda")
    tuning = modules.finetune.Finetuning(**steps.source, mask_path=steps.out / "initial", batch_size=10**6)
    rejects(lambda: modules.finetune.main(tuning), "--batch_size must be from 1 to 4800 images, got 1000000")

    other = modules.mnist_unet.MnistUNet()
    rejects(
        lambda: modules.mask_files.masked_copy(other, steps.out / "initial"), "it is of another model, so run get_ma"
    )


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA"), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_rejects_a_batch_that_does_not_fit_the_memory(modules, error):
    with (
        pytest.raises(SystemExit, match="out of memory with 32 images in a batch: run it again with --batch_size 16"),
        modules.settings.explained(32),
    ):
        raise error
    with pytest.raises(RuntimeError, match="other"), modules.settings.explained(32):
        raise RuntimeError("other")


def test_presets_are_the_published_values(modules):
    from sparsekit.cli.variants import read_variants

    presets = {each.name: each.filled(Path("OUT")) for each in read_variants(FOLDER / "presets.toml")}
    assert [*presets] == ["1_quick", "2_standard", "3_best", "4_throughput", "5_finetune"]
    values = [("5000", "16", "0.5", "3"), ("20000", "64", "1", "5"), ("50000", "32", "2", "7")]
    values += [("25000", "128", "1.5", "6"), ("30000", "32", "0.8", "10")]
    import tyro

    for command, (size, batch, lr, logits) in zip(presets.values(), values, strict=True):
        assert command[1] == "examples/maskpro_ddpm/train_diffusion.py"
        found = tyro.cli(modules.train_diffusion.Training, args=command[2:])
        sizes = (found.dataset_size, found.batch_size, found.lr, found.logits)
        assert sizes == (int(size), int(batch), float(lr), float(logits)) and found.out == Path("OUT")


def test_the_menu_takes_numbers_and_names_only(modules, tmp_path):
    import tyro

    from sparsekit.cli.variants import read_variants

    script = FOLDER / "quick_start.sh"
    for words, given in (["6"], None), ([], "quick\n"):
        said = subprocess.run(["bash", script, *words], input=given, capture_output=True, text=True, timeout=60)
        assert said.returncode == 2
        assert "the mode must be 1 to 5 or one of 1_quick 2_standard 3_best 4_throughput 5_finetune, got" in said.stderr
    assert "5_finetune     masks, then their weights" in said.stdout
    environment = {**os.environ, "PYTHON": "echo", "OUT": str(tmp_path), "ORIGINAL_MODEL": "google/ddpm-cifar10-32"}
    said = subprocess.run(["bash", script, "5"], env=environment, capture_output=True, text=True, timeout=60)
    prune, extract, sweep, tune = said.stdout.splitlines()
    out, model = tmp_path / "google-ddpm-cifar10-32", "--original_model google/ddpm-cifar10-32"
    assert prune.endswith(f"weight_prune.py {model} --save_path {out}/pruned")
    assert extract.endswith(f"{model} --model_path {out}/pruned --output_dir {out}/initial_mask_diffusion")
    assert sweep == f"-m sparsekit_command sweep {out}/presets.toml --out {out}/presets --only 5_finetune"
    masks = f"--mask_path {out}/presets/5_finetune/learned_mask --out {out}/finetuned"
    assert tune.endswith(f"finetune.py {model} {masks}")
    command = read_variants(out / "presets.toml")[0].filled(Path("RUN"))
    found = tyro.cli(modules.train_diffusion.Training, args=command[2:])
    assert (found.original_model, found.out) == ("google/ddpm-cifar10-32", Path("RUN"))
    assert found.initial_mask_path == out / "initial_mask_diffusion" and found.baseline_path == out / "baseline_losses"
    assert find_spec("sparsekit_command") is not None


@pytest.mark.slow
def test_a_run_that_was_killed_is_the_one_that_was_not(modules, steps, tmp_path):
    options = {"max_step": 60, "save_every": 7}
    whole = modules.train_diffusion.main(training(modules, steps, tmp_path / "whole", **options))
    given = {**steps.sizes, **options, "initial_mask_path": steps.out / "initial"}
    given |= {"baseline_path": steps.out / "baselines", "out": tmp_path / "killed"}
    words = [str(word) for name, value in given.items() for word in (f"--{name}", value)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.Popen([sys.executable, FOLDER / "train_diffusion.py", *words], env=environment)
    while not (tmp_path / "killed" / "state" / "step-14").exists():
        assert process.poll() is None, "it ended before it was killed"
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL and not (tmp_path / "killed" / "result.json").exists()
    assert modules.train_diffusion.main(training(modules, steps, tmp_path / "killed", **options)) == whole
    for name in ("metrics.jsonl", "learned_mask/masks.safetensors", "logits/logits.safetensors", "loss_training.npy"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
