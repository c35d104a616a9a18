"""The diffusion example: its data, its schedule, and runs that are killed, spread over processes, and whole."""

import dataclasses
import gzip
import json
import multiprocessing
import os
import random
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

for package in ("diffusers", "matplotlib", "PIL", "torchmetrics", "tqdm", "tyro"):
    pytest.importorskip(package)

FOLDER = Path(__file__).parent.parent / "examples" / "ddpm"
TINY = (
    "--data shapes --img-size 16 --channel 8 --channel-mult 1 2 --held-out 0.9 --batch-size 32 --precision no".split()
)
gloo = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch without gloo")


@pytest.fixture(scope="module")
def modules():
    """The example's modules, imported as ``python train.py`` finds its neighbors."""
    names = ("config", "data", "show", "trainer")
    known = {*sys.modules}
    sys.path.insert(0, str(FOLDER))
    try:
        yield SimpleNamespace(**{name: __import__(name) for name in names})
    finally:
        sys.path.remove(str(FOLDER))
        for name in sys.modules.keys() - known:
            if str(getattr(sys.modules[name], "__file__", "")).startswith(str(FOLDER)):
                del sys.modules[name]


def start(script, *arguments, launcher=()):
    command = [sys.executable, *launcher, FOLDER / script, *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    return subprocess.Popen(
        [*map(str, command)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def run(script, *arguments, launcher=()):
    process = start(script, *arguments, launcher=launcher)
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said
    return said


def records(folder):
    path = folder / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_all_settings_of_the_published_code_are_there(modules):
    names = (
        "state epoch batch_size T channel channel_mult attn num_res_blocks dropout lr multiplier beta_1 beta_T "
        "img_size grad_clip device w save_dir training_load_weight test_load_weight sampled_dir sampledNoisyImgName "
        "sampledImgName nrow"
    )
    config = modules.config.Config(preset="cifar10-conditional")
    assert {*names.split()} <= {each.name for each in dataclasses.fields(config)}
    assert (config.epoch, config.batch_size, config.T, config.channel, config.w) == (70, 80, 500, 128, 1.8)
    assert (config.beta_1, config.beta_T, config.multiplier, config.lr) == (1e-4, 0.028, 2.5, 1e-4)
    plain = modules.config.Config(preset="cifar10-unconditional", epoch=3)
    assert (plain.epoch, plain.T, plain.beta_T, plain.channel_mult) == (3, 1000, 0.02, (1, 2, 3, 4))
    assert "num_workers" not in config.of_run() and config.of_run()["seed"] == 0


@pytest.mark.filterwarnings("error")
def test_the_learning_rate_is_the_published_curve(modules):
    def curve(steps):
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], 2.5e-4)
        schedule, rates = modules.trainer.warm_up_and_cosine(optimizer, steps, 2.5), []
        for _ in range(steps):
            rates.append(schedule.get_last_lr()[0])
            optimizer.step()
            schedule.step()
        return rates

    rates = curve(100)
    assert [rates[step] for step in (0, 5, 10, 55)] == pytest.approx([1e-4, 1.75e-4, 2.5e-4, 1.25e-4])
    assert 0 < rates[99] < 1e-6 and max(rates) == pytest.approx(2.5e-4)
    assert len(curve(5)) == 5 and len(curve(1)) == 1, "with 5 epochs the published one divides by zero"


def test_what_a_step_draws_depends_on_its_number_alone(modules):
    config = modules.config.Config(batch_size=4000, label_dropout=0.1)
    t, noise, kept = modules.trainer.draw(config, 7, (1, 2, 2))
    for one, other in zip(modules.trainer.draw(config, 7, (1, 2, 2)), (t, noise, kept), strict=True):
        assert torch.equal(one, other)
    assert not torch.equal(modules.trainer.draw(config, 8, (1, 2, 2))[1], noise)
    assert kept.float().mean().item() == pytest.approx(0.9, abs=3 * (0.09 / 4000) ** 0.5)
    assert t.min() == 0 and t.max() == config.T - 1


def test_shapes_are_split_and_differ_by_class(modules):
    images = modules.data.load("shapes", 16, 0.25)
    assert (len(images.train[0]), len(images.held_out[0]), images.channels, len(images.classes)) == (4500, 1500, 1, 10)
    pixels, labels = images.train
    means = torch.stack([pixels[labels == each].float().mean(0) for each in range(10)]).flatten(1)
    assert torch.cdist(means, means)[~torch.eye(10, dtype=torch.bool)].min() > 60
    assert modules.data.load("shapes", 16, 0.25) is images
    batch, labels = modules.data.Batches(images.train)[[3, 1]]
    assert (batch.min(), batch.max()) == (-1, 1) and torch.equal(labels, images.train[1][[3, 1]] + 1)
    assert torch.equal(modules.data.as_bytes(batch), images.train[0][[3, 1]])


def test_folders_and_files_of_digits_are_read(modules, tmp_path, monkeypatch):
    from PIL import Image

    for part, name, color in (("train", "cat", 10), ("train", "dog", 200), ("test", "dog", 100)):
        (tmp_path / part / name).mkdir(parents=True)
        Image.new("RGB", (9, 9), (color, 0, 0)).save(tmp_path / part / name / "1.png")
    images = modules.data.load(str(tmp_path), 8, 0.5)
    assert images.classes == ("cat", "dog") and images.train[0].shape == (2, 3, 8, 8)
    assert dict(zip(images.train[0][:, 0, 0, 0].tolist(), images.train[1].tolist(), strict=True)) == {10: 0, 200: 1}
    assert images.held_out[1].tolist() == [1]

    digits = tmp_path / "mnist"
    digits.mkdir()
    for kind, content in (
        ("images-idx3", bytes(16) + bytes(range(10)) * 784),
        ("labels-idx1", bytes(8) + bytes(range(10))),
    ):
        (digits / f"t10k-{kind}-ubyte.gz").write_bytes(gzip.compress(content))
    monkeypatch.setattr(modules.data, "LOCAL", tmp_path)
    images = modules.data.load("mnist", 28, 0.3)
    assert [len(images.train[0]), len(images.held_out[0])] == [7, 3]
    assert sorted([*images.train[1].tolist(), *images.held_out[1].tolist()]) == [*range(10)]
    with pytest.raises(FileNotFoundError, match=r"data must be auto, shapes, mnist, .* or a folder, got nothing"):
        modules.data.load("nothing", 28, 0.3)


def test_a_grid_has_the_images_in_rows(modules, tmp_path):
    from PIL import Image

    modules.show.save_grid(torch.tensor([10, 20, 30], dtype=torch.uint8).view(3, 1, 1, 1), tmp_path / "grid.png", 2)
    picture = Image.open(tmp_path / "grid.png").resize((2, 2), Image.Resampling.NEAREST)
    assert [*picture.tobytes()] == [10, 20, 30, 0]


def train_here(arguments):
    """Runs train.py in this process; it takes its arguments as the command does."""
    sys.argv = ["train.py", *map(str, arguments)]
    torch.set_num_threads(1)
    runpy.run_path(str(FOLDER / "train.py"), run_name="__main__")


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_run_that_was_killed_five_times_is_the_one_that_was_not(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join((str(FOLDER), str(Path(__file__).parent))))
    context = multiprocessing.get_context("forkserver")  # each process is a fork of one that has imported all
    context.set_forkserver_preload(["train"])
    arguments = [*TINY, "--epoch", 2, "--save-every", 5, "--sample-every", 2, "--num-workers", 1]

    def started(folder):
        process = context.Process(target=train_here, args=([*arguments, "--save-dir", folder],))
        process.start()
        return process

    def ended(process):
        process.join(300)
        return process.exitcode

    assert ended(started(tmp_path / "whole")) == 0
    clock = random.Random(0)
    for kill in range(5):
        process, end = started(tmp_path / "killed"), time.monotonic() + 120
        while len(records(tmp_path / "killed")) < 6 * (kill + 1) and process.is_alive() and time.monotonic() < end:
            time.sleep(0.005)
        time.sleep(clock.uniform(0, 0.05))
        assert process.is_alive(), "it ended before it was killed"
        process.kill()
        assert ended(process) == -signal.SIGKILL
    assert ended(started(tmp_path / "killed")) == 0
    for name in ("metrics.jsonl", "result.json", "model/diffusion_pytorch_model.safetensors", "samples/step-36.png"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ddpm") / "alone"
    run("train.py", *TINY, "--epoch", 1, "--sample-every", 0, "--save-dir", folder)
    return folder


@gloo
@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "options"),
    [
        ((), ("--spawn", 2, "--num-workers", 1)),
        (("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"), ("--parallel", "fsdp2")),
    ],
    ids=["spawn", "torchrun, sharded"],
)
def test_two_processes_train_as_one(alone, tmp_path, launcher, options):
    run(
        "train.py",
        *TINY,
        "--epoch",
        1,
        "--sample-every",
        0,
        "--save-dir",
        tmp_path / "two",
        *options,
        launcher=launcher,
    )
    for one, other in zip(records(alone), records(tmp_path / "two"), strict=True):
        assert other == pytest.approx(one, rel=1e-4)
    one, other = (
        load_file(each / "model" / "diffusion_pytorch_model.safetensors") for each in (alone, tmp_path / "two")
    )
    torch.testing.assert_close(other, one, atol=1e-4, rtol=0)


@pytest.mark.slow
def test_images_without_labels_are_drawn_by_the_original_sampler(tmp_path):
    folder = tmp_path / "run"
    options = [
        "--conditional",
        "False",
        "--T",
        20,
        "--precision",
        "bf16",
        "--attn",
        1,
        "--sample-every",
        0,
        "--num-workers",
        2,
        "--probe-every",
        9,
    ]
    run("train.py", *TINY, *options, "--epoch", 1, "--save-dir", folder)
    run("train.py", "--state", "eval", "--save-dir", folder, "--sampler", "ancestral", "--count", 6)
    assert (folder / "gradients.png").exists() and any("grad/conv_in.weight" in each for each in records(folder))
    drawn = load_file(folder / "samples" / "samples.safetensors")
    assert drawn["images"].shape == (6, 1, 16, 16) and drawn["images"].float().std() > 10
    assert (folder / "samples" / "noise.png").exists()


@pytest.mark.slow
def test_the_short_run_ends_with_all_figures(tmp_path):
    said = run("run.py", "--short", "--data", "shapes", "--out", tmp_path)
    result = json.loads((tmp_path / "result.json").read_text())
    found = result["evaluate"]
    assert 0 <= found["recognized_as_asked"] <= 1 and found["classifier_accuracy_on_real"] > 0.3
    for who in ("generated", "real"):
        for metric in ("fid", "kid"):
            score = found[who][metric]
            assert score["n"] == score["n_real"] == 100 and len(score["digest"]) == 32
            assert score["interval"][0] < score["value"] < score["interval"][1]
    assert found["generated"]["fid"]["value"] > found["real"]["fid"]["value"], "it has learned little"
    assert "recognized as asked" in said
    assert result["prune"]["best"] in result["prune"]["images"]
