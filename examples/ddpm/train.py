"""Trains a diffusion model of images, in one process or many, and goes on where it was killed.

    python examples/ddpm/train.py --save-dir out/train                       # a small UNet on MNIST
    python examples/ddpm/train.py --preset cifar10-conditional               # the published sizes
    python examples/ddpm/train.py --data FOLDER --img-size 64                # images at FOLDER/CLASS/NAME.png
    python examples/ddpm/train.py --spawn 2                                  # two processes, also: --parallel fsdp2
    torchrun --nproc_per_node 4 examples/ddpm/train.py ...                   # or: accelerate launch

The folder holds what every run has (config.json, metrics.jsonl, status.json, log.txt, state/, result.json), pictures in
samples/, and at the end the averaged weights in model/, as diffusers' UNet2DModel.from_pretrained reads them.
"""

import math
import multiprocessing
from contextlib import ExitStack

import sample
import tyro
from config import Config
from data import Batches, Images, load
from launch import launch
from model import new_unet
from show import draw_losses, read_records, save_grid
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.utils.data import DataLoader
from tqdm import tqdm
from trainer import Trainer

from sparsekit.probes import draw_gradients
from sparsekit.runs import Run, open_tracker


def main(config: Config) -> None:
    """Trains, or draws images with ``--state eval``."""
    if config.state == "eval":
        sample.main(config)
    else:
        launch(train, config)


def train(config: Config) -> None:
    images = load(config.data, config.img_size, config.held_out)
    data = Batches(images.train)
    steps = config.epoch * (len(data) // config.batch_size)
    tracker = open_tracker(config.tracker, project_name=config.project_name, experiment_name=config.experiment_name)
    with Run.open(config.save_dir, config.of_run(), steps=steps, tracker=tracker) as run, ExitStack() as stack:
        if run.result is not None:
            return
        trainer = Trainer(config, images, steps)
        run.restore(**trainer.parts())
        hidden = True if trainer.rank else None  # None hides the bar if there is no terminal

        def loader(order: list[list[int]]) -> DataLoader:
            # Workers are forks also of a process that was spawned: new ones would import everything in each epoch.
            context = "fork" if config.num_workers and "fork" in multiprocessing.get_all_start_methods() else None
            return DataLoader(
                data,
                batch_size=None,
                sampler=order,
                num_workers=config.num_workers,
                pin_memory=trainer.device.type == "cuda",
                multiprocessing_context=context,
            )

        batches = run.batches(len(data), config.batch_size, epochs=config.epoch, seed=config.seed, load=loader)
        probe = stack.enter_context(trainer.probe(run))
        for x, labels in tqdm(batches, "train", steps, initial=run.step, disable=hidden):
            trainer.step(x, labels, run, probe)
            if run.step % config.save_every == 0 or run.step == steps:
                run.save()
            epoch, rest = run.position.epoch, run.position.batch
            if config.sample_every and rest == 0 and epoch % config.sample_every == 0:
                drawn = sample.draw(trainer.average.module, config, images, 4 * config.nrow, trainer.device)
                if trainer.rank == 0:
                    save_grid(drawn.images, run.folder / "samples" / f"step-{run.step}.png", config.nrow)
        finish(run, config, images, trainer)


def finish(run: Run, config: Config, images: Images, trainer: Trainer) -> None:
    """Writes the averaged weights, the curve of the loss, and the result."""
    whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = get_model_state_dict(trainer.average.module, options=whole)
    result = {}
    if trainer.rank == 0:
        unet = new_unet(config, images)
        unet.load_state_dict(weights)
        unet.save_pretrained(run.folder / "model")
        records = read_records(run.folder)
        losses = draw_losses(records, run.folder / "loss.png")
        if config.probe_every:
            draw_gradients(records, run.folder / "gradients.png")
        last = losses[-max(1, len(losses) // 20) :]
        result = {
            "steps": run.step,
            "loss": math.fsum(last) / len(last),
            "images": len(images.train[0]),
            "source": images.source,
            "weights": sum(each.numel() for each in unet.parameters()),
        }
    run.finish(result)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
