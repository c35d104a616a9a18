"""The models of the example that learns masks for diffusion models, and their noisy batches."""

import json

import pytest
import torch
from mask_example import PACKAGES, example_modules, save_pipeline

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


def test_the_mnist_unet_is_the_trained_one_and_can_be_stored(modules, data, tmp_path):
    denoiser = modules.models.load_denoiser("mnist")
    assert (denoiser.shape, denoiser.classes) == ((1, 28, 28), 0)
    held_out = tuple(each[:256] for each in denoiser.images().held_out)
    batches = modules.noisy.NoisyBatches(denoiser, held_out, 128, 0)
    losses = modules.noisy.image_losses(denoiser.unet, batches, "")
    assert losses.shape == (256,) and 0.025 < losses.mean() < 0.035 and batches[0][0]["class_labels"] is None
    denoiser.save(denoiser.unet, tmp_path)
    again = modules.models.load_denoiser(str(tmp_path))
    assert type(again.unet) is type(denoiser.unet) and again.diffusion == denoiser.diffusion
    for one, other in zip(again.unet.parameters(), denoiser.unet.parameters(), strict=True):
        assert torch.equal(one, other)


def test_pipelines_and_folders_of_a_unet_are_read(modules, pipeline, tmp_path):
    from diffusers import DDPMPipeline

    DDPMPipeline.from_pretrained(pipeline)
    whole = modules.models.load_denoiser(str(pipeline))
    bare = modules.models.load_denoiser(str(pipeline / "unet"))
    assert whole.diffusion == modules.models.GaussianDiffusion(100, 1e-4, 0.1)
    assert (bare.shape, bare.classes) == ((1, 16, 16), 10)
    assert bare.diffusion == modules.models.GaussianDiffusion() and bare.data == "auto"
    assert all(not each.requires_grad for each in whole.unet.parameters())
    run = tmp_path / "run"
    (run / "model").parent.mkdir()
    bare.unet.save_pretrained(run / "model")
    (run / "config.json").write_text(json.dumps({"T": 50, "beta_T": 0.2, "data": "shapes", "held_out": 0.5}))
    trained = modules.models.load_denoiser(str(run))
    assert (trained.diffusion.steps, trained.diffusion.beta_end) == (50, 0.2)
    assert (trained.data, trained.held_out) == ("shapes", 0.5)


def test_rejects_other_models(modules, pipeline, tmp_path):
    def rejects(source, match):
        with pytest.raises(SystemExit, match=match):
            modules.models.load_denoiser(str(source))

    rejects(tmp_path, r"has neither unet/config.json nor config.json: pass --original_model the folder of a DDPM")
    (tmp_path / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    rejects(tmp_path, "holds a FluxPipeline, which has no UNet2DModel: pass --original_model")
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "config.json").write_text('{"_class_name": "UNet2DConditionModel"}')
    rejects(tmp_path, "holds a UNet2DConditionModel, and masks are learned here for a UNet2DModel that predicts noise")
    scheduler = tmp_path / "other" / "scheduler"
    scheduler.mkdir(parents=True)
    (scheduler / "scheduler_config.json").write_text('{"prediction_type": "v_prediction"}')
    (tmp_path / "other" / "unet").symlink_to(pipeline / "unet")
    rejects(tmp_path / "other", "predicts 'v_prediction': pass --original_model a model with linear betas that")


def test_noise_depends_on_the_number_of_the_batch_alone(modules, pipeline):
    denoiser = modules.models.load_denoiser(str(pipeline))
    part = tuple(each[:20] for each in denoiser.images("shapes").train)
    batches, again = (modules.noisy.NoisyBatches(denoiser, part, 8, 3) for _ in range(2))
    assert [len(noise) for _, noise in batches] == [8, 8, 4]
    (one, noise), (other, same) = again[1], batches[1]
    assert torch.equal(noise, same) and all(torch.equal(one[key], other[key]) for key in ("sample", "timestep"))
    assert torch.equal(one["class_labels"], part[1][8:16] + 1)
    assert not torch.equal(batches[0][1], noise)
