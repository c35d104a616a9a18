"""The comparison of the rules that learn masks for images, and what its commands say to settings that do not fit."""

import json

import pytest
from mask_example import PACKAGES, example_modules, first_steps, save_pipeline

for package in PACKAGES:
    pytest.importorskip(package)


@pytest.fixture(scope="module")
def modules():
    with example_modules() as found:
        yield found


@pytest.fixture(scope="module")
def steps(modules, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline")
    save_pipeline(modules, folder)
    return first_steps(modules, folder, tmp_path_factory.mktemp("steps"))


def test_rules_get_the_same_passes(modules, steps, tmp_path):
    rules = ("published: lr 50, logits 10", "ours")
    sizes = {"passes": 20, "dataset_size": 64, "held_out": 16, "rules": rules}
    result = modules.compare.main(
        modules.compare.Comparison(
            **steps.source, **sizes, initial_mask_path=steps.out / "initial", output_dir=tmp_path
        )
    )
    assert json.loads((tmp_path / "comparison.json").read_text()) == result
    for rule in rules:
        (run,) = result["rules"][rule]
        assert 20 <= run["passes"] <= 26, rule  # a step is never cut
        assert run["kept"] or run["loss"] == pytest.approx(result["initial"], rel=1e-6)
        assert run["interval"][0] <= run["above"] <= run["interval"][1]


def test_published_presets_are_rules(modules):
    rules = [modules.compare.RULES[name] for name in modules.compare.RULES if name.startswith("published")]
    assert [rule.get("lr") for rule in rules] == [None, 0.5, 1.0, 2.0, 1.5, 0.8]
    assert [rule.get("batch_size") for rule in rules] == [None, 16, 64, 32, 128, 32]
    assert all(rule["parity"] for rule in rules) and modules.compare.RULES["ours"] == {}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda m: m.compare.Comparison(rules=("mine",)), "--rules must be of .*, got mine"),
        (lambda m: m.compare.Comparison(passes=0), "--passes must be at least 1, got 0"),
        (lambda m: m.train_diffusion.Training(max_batches=-3), "--max_batches must be at least 1, got -3"),
        (lambda m: m.finetune.Finetuning(mask_path=m.settings.OUT, max_step=0), "--max_step must be at least 1, got 0"),
        (lambda m: m.weight_prune.Pruning(calibration=0), "--calibration must be at least 1, got 0"),
    ],
)
def test_counts_are_checked_at_once(modules, make, message):
    with pytest.raises(SystemExit, match=message):
        make(modules)


def test_what_is_missing_is_named_with_what_writes_it(modules, steps, tmp_path):
    dense = modules.models.load_denoiser(steps.source["original_model"]).unet
    with pytest.raises(SystemExit, match=r"is missing: train_diffusion.py --out .* writes it"):
        modules.mask_files.masked_copy(dense, tmp_path / "learned_mask", learned=True)
    with pytest.raises(SystemExit, match=r"is missing: get_mask_diffusion.py --output_dir .* writes it"):
        modules.mask_files.masked_copy(dense, tmp_path / "initial")
    baseline = modules.inference_loss_diffusion.Baseline(
        **steps.sizes, initial_mask_path=steps.out / "initial", num_timesteps=7
    )
    with pytest.raises(SystemExit, match="trained with 100 timesteps, got --num_timesteps 7"):
        modules.inference_loss_diffusion.main(baseline)


def test_data_sets_that_are_none_or_too_small_are_one_sentence(modules, steps, tmp_path):
    from PIL import Image

    denoiser = modules.models.load_denoiser(steps.source["original_model"])
    with pytest.raises(SystemExit, match="name other data by --dataset"):
        denoiser.images(str(tmp_path / "none"))
    for name in ("a", "b"):
        (tmp_path / "few" / name).mkdir(parents=True)
        Image.new("L", (16, 16)).save(tmp_path / "few" / name / "0.png")
    with pytest.raises(SystemExit, match=r"has . held-out images, and 4 are needed"):
        modules.settings.judged_on(denoiser, str(tmp_path / "few"))
