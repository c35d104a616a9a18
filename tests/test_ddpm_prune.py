"""The pruning part of the diffusion example: it runs whole, goes on after a kill, and its figures belong together."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

for package in ("diffusers", "matplotlib", "PIL", "torchmetrics", "tqdm", "tyro"):
    pytest.importorskip(package)

FOLDER = Path(__file__).parent.parent / "examples" / "ddpm"
TINY = "--data shapes --img-size 16 --channel 8 --channel-mult 1 2 --held-out 0.9 --batch-size 32 --precision no"

pytestmark = pytest.mark.slow


def start(script, *arguments):
    command = [sys.executable, FOLDER / script, *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "SPARSEKIT_TUNE_CACHE": "0"}
    return subprocess.Popen(
        [*map(str, command)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def run(script, *arguments):
    process = start(script, *arguments)
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said
    return said


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ddpm") / "train"
    run("train.py", *TINY.split(), "--save-dir", folder, "--epoch", 4, "--sample-every", 0, "--probe-every", 4)
    return folder


def test_all_methods_are_compared_and_the_best_one_is_compressed(trained):
    said = run("prune.py", "--save-dir", trained, "--short")
    out = trained / "prune"
    found = json.loads((out / "result.json").read_text())
    methods = found["methods"]
    assert list(methods) == ["dense", "random", "magnitude", "wanda", "taylor", "diff-pruning", "sparsegpt"]
    for name, row in methods.items():
        for which in ("pruned", "tuned"):
            low, high = row[which]["interval"]
            assert low <= row[which]["more_than_dense"] <= high and f"{row[which]['loss']:.4f}" in said
        assert name == "dense" or row["sparsity"] == 0.5
    dense = methods.pop("dense")["pruned"]["loss"]
    losses = {name: row["pruned"]["loss"] for name, row in methods.items()}
    assert dense < losses["sparsegpt"] < min(losses["random"], losses["magnitude"])
    assert min(methods, key=lambda name: methods[name]["tuned"]["loss"]) == found["best"]

    weights = load_file(out / "model" / "diffusion_pytorch_model.safetensors")
    layer = weights["mid_block.resnets.0.conv1.weight"]
    assert (layer.unflatten(1, (-1, 4)).count_nonzero(2) <= 2).all()
    images = found["images"]
    assert list(images) == ["trained", found["best"]] and all(
        row["generated"]["fid"]["n"] == 20 for row in images.values()
    )
    first, second = (load_file(out / "samples" / name / "samples.safetensors")["images"] for name in images)
    assert first.shape == second.shape and not torch.equal(first, second)
    latency = found["latency"]
    assert latency["milliseconds"].keys() == {"dense", "best dense", "pruned"}
    assert latency["given_back"] == (latency["times_faster"]["pruned"] < 1)
    assert (out / "compressed.safetensors").exists()


def test_a_run_that_was_killed_is_the_one_that_was_not(trained, tmp_path):
    sizes = "--calibration 32 --steps 60 --held-out 64 --count 20 --resamples 2 --classifier-epochs 1 --seconds 0.1"
    options = ("--save-dir", trained, "--methods", "magnitude", "taylor", *sizes.split())
    run("prune.py", *options, "--out", tmp_path / "whole")
    out = tmp_path / "killed"
    process = start("prune.py", *options, "--out", out)
    while not (out / "taylor" / "state" / "step-50").exists():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert (out / "magnitude" / "result.json").exists() and not (out / "taylor" / "result.json").exists()
    run("prune.py", *options, "--out", out)
    one, other = (json.loads((each / "result.json").read_text())["methods"] for each in (tmp_path / "whole", out))
    for row in (*one.values(), *other.values()):
        row.pop("seconds", None)
    assert one == other
    for name in one:
        one_model, other_model = (load_file(each / name / "model.safetensors") for each in (tmp_path / "whole", out))
        assert all(torch.equal(one_model[key], other_model[key]) for key in one_model)
