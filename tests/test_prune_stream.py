"""Sequential calibration in one pass over the model: every batch waits at every block."""

import copy
import os
import threading
from pathlib import Path

import pytest
import torch
from pruning import assert_same, snapshot, stack
from torch import nn

import sparsekit as sk
from sparsekit.masks import get_mask
from sparsekit.prune import calibrate, calibration


class Unet(nn.Module):
    """Carries outputs past blocks, and writes to what it was given."""

    def __init__(self):
        super().__init__()
        self.down = nn.ModuleList([nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(8, 8, 3, stride=2, padding=1)])
        self.middle = nn.Sequential(nn.Conv2d(8, 8, 1), nn.SiLU(inplace=True), nn.Conv2d(8, 8, 1))
        self.up = nn.ModuleList([nn.ConvTranspose2d(8, 8, 2, 2), nn.Conv2d(16, 4, 3, padding=1)])
        self.time = nn.Linear(4, 8)

    def forward(self, x, *, t):
        skip = self.down[0](x) + self.time(t)[:, :, None, None]
        y = self.middle(self.down[1](torch.relu_(skip.clone())))
        return self.up[1](torch.cat([self.up[0](y), skip], 1))


def passes():
    return [thread for thread in threading.enumerate() if thread.name.startswith("forward pass")]


def by_partial_passes(monkeypatch):
    """Calibrates as a model needs that enters a block twice."""
    monkeypatch.setattr(calibration, "execution_order", lambda *args: (calibrate.execution_order(*args)[0], False))


@pytest.mark.parametrize("method", [sk.Wanda("2:4"), sk.SparseGPT("2:4")], ids=["wanda", "sparsegpt"])
def test_one_pass_gives_what_partial_passes_give(monkeypatch, method):
    dense = Unet()
    batches = [{"x": torch.randn(size, 4, 8, 8), "t": torch.randn(size, 4)} for size in (1, 3, 2)]
    streamed, repeated = copy.deepcopy(dense), copy.deepcopy(dense)
    report = sk.prune_(streamed, method, batches)
    by_partial_passes(monkeypatch)
    assert sk.prune_(repeated, method, batches).error == report.error
    assert [layer.name for layer in report.layers] == ["down.0", "time", "down.1", "middle.0", "middle.2", "up.1"]
    for name, weight in streamed.named_parameters():
        assert torch.equal(weight, repeated.get_parameter(name)), name
    assert not torch.equal(streamed.up[1].weight, dense.up[1].weight)
    assert passes() == []


def test_every_block_runs_twice():
    model, runs = stack(8, 8, 8, 8), []
    for layer in model:
        layer.register_forward_pre_hook(lambda module, _: runs.append(module))
    sk.prune_(model, sk.Wanda("2:4"), [torch.randn(3, 8)] * 5)
    look = 1
    assert [runs.count(layer) for layer in model[:4:2]] == [look + 2 * 5] * 2
    assert runs.count(model[4]) == look + 5  # nothing comes after the last one


def test_a_cache_is_filled_once():
    """A decoder's cache that both runs of a block would fill twice."""

    class Cached(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x, *, cache):
            cache.append(self.linear(x))
            return torch.cat(cache).mean(0, keepdim=True).expand_as(x)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([Cached() for _ in range(3)])
            self.lengths = []

        def forward(self, x):
            cache = []
            for layer in self.layers:
                x = layer(x, cache=cache)
            self.lengths.append(len(cache))
            return x

    model = Model()
    model.head = nn.Linear(8, 4)
    sk.prune_(model, sk.Wanda("2:4"), [torch.randn(3, 8)] * 2, forward=lambda m, x: m.head(m(x)))
    assert model.lengths == [3, 3, 3]


def test_an_error_in_the_model_comes_out_and_no_thread_stays():
    model = stack(8, 8, 8, 8)
    before = snapshot(model)
    batches = [torch.randn(3, 8), torch.randn(3, 8), torch.randn(3, 9)]
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        sk.prune_(model, sk.Wanda("2:4"), batches)
    assert_same(model, before)
    assert passes() == []


def test_the_callers_modes_hold_in_the_passes():
    dtypes, grad = set(), set()
    model = stack(8, 8, 8)
    model[1].register_forward_hook(lambda _, __, y: dtypes.add(y.dtype) or grad.add(torch.is_grad_enabled()))
    with torch.autocast("cpu", torch.bfloat16):
        sk.prune_(model, sk.Wanda("2:4"), [torch.randn(3, 8)])
    assert dtypes == {torch.bfloat16} and grad == {False}


def test_a_real_decoder_with_its_cache(monkeypatch):
    data = os.environ.get("SPARSEKIT_DATA")
    if not data:
        pytest.skip("SPARSEKIT_DATA is unset")
    transformers = pytest.importorskip("transformers")
    folder = Path(data) / "ckpt_stories260K" / "hf"
    dense = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert dense.config.use_cache
    batches = [{"input_ids": torch.randint(3, 500, (2, 20))} for _ in range(2)]
    masks = []
    for partial in (False, True):
        model = copy.deepcopy(dense)
        if partial:
            by_partial_passes(monkeypatch)
        sk.prune_(model, sk.Wanda("2:4"), batches)
        masks.append([get_mask(layer) for layer in model.modules() if get_mask(layer) is not None])
    assert len(masks[0]) == 35 and all(map(torch.equal, *masks))
