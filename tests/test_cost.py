"""FLOPs against counts by hand, and bytes, times and memory against what they must be."""

import copy
import json
import time
from functools import partial

import pytest
import torch
from slimming import tiny
from torch import nn

import sparsekit as sk
from sparsekit.evaluate import count_flops, disk_bytes, measure_latency, measure_process

MEGABYTES = 64


def test_flops_of_distilbert():
    transformers = pytest.importorskip("transformers")
    with torch.device("meta"):
        model = transformers.DistilBertForSequenceClassification(transformers.DistilBertConfig())
    batch = {"input_ids": torch.zeros(1, 128, dtype=torch.int64, device="meta")}
    assert count_flops(model, batch).executed == 11_174_808_576


def test_flops_by_hand():
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    sk.prune_(model, sk.Magnitude("2:4"), where=lambda name, module: name == "0")
    count = count_flops(model, torch.randn(3, 5, 8))
    dense = 2 * 15 * (8 * 16 + 16 * 4)
    assert (count.dense, count.executed, count.macs) == (dense, dense, dense // 2)
    assert count.effective == 2 * 15 * (8 * 16 // 2 + 16 * 4)


@pytest.mark.parametrize("kind", ("2:4", "tiered", "prepacked", "int8"))
def test_flops_of_compressed_layers(kind):
    model = nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 4)).eval()
    sk.prune_(model, sk.Magnitude("2:4"), where=lambda name, module: name == "0")
    make = {
        "2:4": sk.nn.Linear24,
        "tiered": sk.nn.TieredLinear,
        "prepacked": sk.nn.PrepackedLinear,
        "int8": sk.nn.Int8Linear,
    }
    model[0] = make[kind].from_linear(model[0])
    count = count_flops(model, torch.randn(3, 32))
    first, second = 2 * 3 * 32 * 48, 2 * 3 * 48 * 4
    assert count.dense == first + second
    assert count.executed == (first // 2 if kind in ("2:4", "tiered") else first) + second
    assert abs(count.effective - (first // 2 + second)) <= (
        2 * 3 * 8 if kind == "int8" else 0
    )  # small codes round to 0


def test_flops_of_a_convolution_and_of_its_24_form():
    conv = nn.Conv2d(8, 6, 3, padding=1).eval()
    sk.prune_(conv, sk.Magnitude("2:4"))
    batch, whole = torch.randn(2, 8, 5, 4), 2 * 2 * 20 * 6 * 8 * 9
    plain = count_flops(conv, batch)
    assert (plain.dense, plain.effective, plain.executed) == (whole, whole // 2, whole)
    packed = count_flops(nn.Sequential(sk.nn.Conv2d24.from_conv2d(conv)), batch)
    assert (packed.dense, packed.effective, packed.executed) == (whole, whole // 2, whole // 2)


def analytic(heads, neurons, tokens=7, batch=2, hidden=32, width=8):
    """The operations of a BERT-like encoder with this many heads and neurons in each layer, and 2 classes."""
    rows = batch * tokens
    total = 0
    for head, neuron in zip(heads, neurons, strict=True):
        total += 4 * 2 * rows * hidden * head * width + 2 * 2 * batch * head * tokens * tokens * width
        total += 2 * 2 * rows * hidden * neuron
    return total + 2 * batch * hidden * (hidden + 2)


def test_flops_after_slimming_are_the_analytic_count():
    model, batch = tiny("distilbert", torch.float32)
    assert count_flops(model, batch).executed == analytic([4, 4], [24, 24])
    masked = copy.deepcopy(model)
    units = sk.find_units(model, batch)
    (one, two, three, four) = [each.reader for each in units.branches]
    plan = units.keep({one: [0, 2], two: range(10), three: [1, 2, 3], four: range(5, 24)})
    sk.mask_units_(masked, plan)
    sk.slim_(model, plan)
    found = count_flops(model, batch)
    assert found.executed == found.dense == found.effective == analytic([2, 3], [10, 19])
    kept = count_flops(masked, batch)
    assert kept.executed == kept.dense == analytic([4, 4], [24, 24]) > kept.effective > found.executed


def test_bytes_on_disk_add_up(tmp_path):
    from safetensors.torch import save_file

    file = tmp_path / "model.safetensors"
    tensors = {"bert.embeddings.word.weight": torch.zeros(10, 4), "bert.encoder.layer.0.a.weight": torch.zeros(2, 2)}
    save_file({**tensors, "bert.encoder.layer.1.a.weight": torch.zeros(3).half(), "head": torch.zeros(1)}, file)
    (tmp_path / "config.json").write_text(json.dumps({}))
    found = disk_bytes(tmp_path)
    assert found.pop("other") == file.stat().st_size - 160 - 16 - 6 - 4 + 2
    assert found == {"bert.embeddings": 160, "bert.encoder": 16 + 6, "head": 4}
    assert disk_bytes(file, depth=1)["bert"] == 160 + 16 + 6
    file.write_bytes(b"\xff" * 20)
    with pytest.raises(ValueError, match="is not a safetensors file: its header would have"):
        disk_bytes(file)
    with pytest.raises(FileNotFoundError, match="no file or folder"):
        disk_bytes(tmp_path / "nothing")


class Sleeps(nn.Module):
    def __init__(self, seconds):
        super().__init__()
        self.seconds = seconds

    def forward(self, x):
        time.sleep(self.seconds * len(x))
        return x


def test_latency_is_measured_for_every_size():
    models = {"fast": Sleeps(0.001), "slow": Sleeps(0.004)}
    found = measure_latency(models, lambda batch, length: torch.zeros(batch, length), [(1, 4), (2, 4)], runs=6)
    assert [(each.model, each.batch, each.length, each.runs) for each in found] == [
        ("fast", 1, 4, 6),
        ("slow", 1, 4, 6),
        ("fast", 2, 4, 6),
        ("slow", 2, 4, 6),
    ]
    for each in found:
        assert each.p95 >= each.p50 >= models[each.model].seconds * each.batch
        assert each.threads == torch.get_num_threads() and each.device == "cpu"
    assert found[1].p50 > found[0].p50 and models["fast"].training
    with pytest.raises(ValueError, match="at least 5 runs, got 2 and 1"):
        measure_latency(models, None, runs=1)


@pytest.mark.slow
def test_a_process_is_measured():
    cost = measure_process(partial(bytearray, MEGABYTES * 2**20))
    assert cost.seconds > 0 and cost.gpu_bytes == 0
    grown = (cost.peak_bytes - cost.before_bytes) / 2**20
    assert MEGABYTES * 0.9 < grown < MEGABYTES * 1.5
    with pytest.raises(RuntimeError, match="failed in its process: ValueError: invalid literal"):
        measure_process(partial(int, "x"))
