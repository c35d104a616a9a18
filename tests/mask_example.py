"""The example that learns masks for diffusion models, for its tests."""

import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import torch

PACKAGES = ("diffusers", "matplotlib", "PIL", "torchmetrics", "tqdm", "tyro")
FOLDER = Path(__file__).parent.parent / "examples" / "maskpro_ddpm"


@contextmanager
def example_modules():
    """The modules, imported as the scripts find their neighbors, until the end."""
    names = (
        "baseline compare ddpm_parts finetune get_mask_diffusion inference_loss_diffusion judge mask_files mnist_unet "
        "models noisy settings test_ddpm_maskpro train_diffusion weight_prune"
    ).split()
    known, path = {*sys.modules}, [*sys.path]
    sys.path.insert(0, str(FOLDER))
    try:
        yield SimpleNamespace(**{name: __import__(name) for name in names})
    finally:
        sys.path[:] = path
        for name in sys.modules.keys() - known:
            if str(getattr(sys.modules[name], "__file__", "")).startswith(str(FOLDER.parent)):
                del sys.modules[name]


def save_pipeline(modules, folder):
    """Writes a pipeline of diffusers with a tiny UNet that draws gray images of ten classes."""
    from diffusers import UNet2DModel

    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=16,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        num_class_embeds=11,
    )
    modules.models.Denoiser(unet, modules.models.GaussianDiffusion(100, 1e-4, 0.1), "shapes").save(unet, folder)


def first_steps(modules, pipeline, out):
    """Makes the first three steps; returns their folder and results, and the options of the others."""
    source = {"original_model": str(pipeline), "dataset": "shapes", "device": "cpu"}
    sizes = {**source, "dataset_size": 64, "batch_size": 16}
    stats = modules.weight_prune.main(
        modules.weight_prune.Pruning(**source, save_path=out / "pruned", calibration=32, batch_size=16)
    )
    summary = modules.get_mask_diffusion.main(
        modules.get_mask_diffusion.Extraction(**source, model_path=out / "pruned", output_dir=out / "initial")
    )
    path = modules.inference_loss_diffusion.main(
        modules.inference_loss_diffusion.Baseline(
            **sizes, initial_mask_path=out / "initial", output_dir=out / "baselines"
        )
    )
    return SimpleNamespace(out=out, source=source, sizes=sizes, stats=stats, summary=summary, path=path)


def training(modules, steps, out, **options):
    options = {"initial_mask_path": steps.out / "initial", "baseline_path": steps.out / "baselines", **options}
    return modules.train_diffusion.Training(**{**steps.sizes, "out": out, "max_step": 6, **options})
