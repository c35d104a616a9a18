"""Partial passes in which finished stages give what they gave before."""

import copy

import pytest
import torch
from pruning import stack
from torch import nn

import sparsekit as sk
from sparsekit.masks import get_mask
from sparsekit.prune.calibration.replay import Replay


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


def plain(monkeypatch):
    """Every pass runs all that comes before its stage."""
    monkeypatch.setattr(Replay, "_can_be_replayed", lambda *_: False)


def replayed(monkeypatch):
    """Even few stages and batches are replayed; returns what the trials found."""
    found, try_it = [], Replay._can_be_replayed

    def note(*args):
        found.append(try_it(*args))
        return found[-1]

    monkeypatch.setattr(Replay, "_pays", lambda *_: True)
    monkeypatch.setattr(Replay, "_can_be_replayed", note)
    return found


@pytest.mark.parametrize("method", [sk.Wanda("2:4"), sk.SparseGPT("2:4")], ids=["wanda", "sparsegpt"])
def test_replayed_passes_give_what_plain_ones_give(monkeypatch, method):
    dense = Unet()
    batches = [{"x": torch.randn(size, 4, 8, 8), "t": torch.randn(size, 4)} for size in (1, 3, 2)]
    streamed, repeated = copy.deepcopy(dense), copy.deepcopy(dense)
    tried = replayed(monkeypatch)
    report = sk.prune_(streamed, method, batches)
    assert tried == [True]
    plain(monkeypatch)
    assert sk.prune_(repeated, method, batches).error == report.error
    assert [layer.name for layer in report.layers] == ["down.0", "time", "down.1", "middle.0", "middle.2", "up.1"]
    for name, weight in streamed.named_parameters():
        assert torch.equal(weight, repeated.get_parameter(name)), name
    assert not torch.equal(streamed.up[1].weight, dense.up[1].weight)


def test_every_stage_runs_twice_after_a_look(monkeypatch):
    model, forward = stack(*[8] * 9), nn.Linear.forward
    runs = []
    monkeypatch.setattr(nn.Linear, "forward", lambda self, input: runs.append(self) or forward(self, input))
    sk.prune_(model, sk.Wanda("2:4"), [torch.randn(3, 8)] * 20)
    counts = [runs.count(layer) for layer in model[::2]]
    look, trial = 20, 1 + 3
    assert counts == [look + trial + 2 * 20] * 7 + [look + trial - 2 + 20]  # nothing comes after the last one


def test_a_cache_is_filled_once(monkeypatch):
    """A decoder's cache, to which every stage adds once in a pass."""

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
    tried = replayed(monkeypatch)
    sk.prune_(
        model, sk.Wanda("2:4"), [torch.randn(3, 8)] * 2, calibration=sk.Calibration(forward=lambda m, x: m.head(m(x)))
    )
    assert set(model.lengths[:2]) == {3}
    assert tried == [False]  # a stage sees what those before it added: none may be left out


@pytest.mark.parametrize("kind", ["attribute", "number", "buffer"])
def test_what_a_stage_leaves_on_a_module_is_of_this_batch(monkeypatch, kind):
    class Leaving(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(8, 8)
            self.register_buffer("state", torch.zeros(3, 8))

        def forward(self, x):
            y = self.linear(x)
            if kind == "attribute":
                self.left = y
            elif kind == "number":
                self.left = y.std().item()
            else:
                self.left = self.state.copy_(y)
            return y

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([Leaving() for _ in range(4)])

        def forward(self, x):
            for index, layer in enumerate(self.layers):
                x = torch.tanh(layer(x) * (self.layers[index - 2].left if index > 1 else 1))
            return x

    tried, models = replayed(monkeypatch), [Model()]
    models.append(copy.deepcopy(models[0]))
    batches = [torch.randn(3, 8), torch.randn(3, 8) ** 3]
    sk.prune_(models[0], sk.Wanda("2:4"), batches)
    assert tried == [False]
    plain(monkeypatch)
    sk.prune_(models[1], sk.Wanda("2:4"), batches)
    assert all(map(torch.equal, models[0].parameters(), models[1].parameters()))


def test_the_callers_modes_hold_in_the_passes():
    dtypes, grad = set(), set()
    model = stack(8, 8, 8)
    model[1].register_forward_hook(lambda _, __, y: dtypes.add(y.dtype) or grad.add(torch.is_grad_enabled()))
    with torch.autocast("cpu", torch.bfloat16):
        sk.prune_(model, sk.Wanda("2:4"), [torch.randn(3, 8)])
    assert dtypes == {torch.bfloat16} and grad == {False}


def test_a_real_decoder_with_its_cache(monkeypatch, data):
    transformers = pytest.importorskip("transformers")
    folder = data / "ckpt_stories260K" / "hf"
    dense = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert dense.config.use_cache
    batches = [{"input_ids": torch.randint(3, 500, (2, 20))} for _ in range(2)]
    masks, tried = [], replayed(monkeypatch)
    for partial in (False, True):
        model = copy.deepcopy(dense)
        if partial:
            assert tried == [True]
            plain(monkeypatch)
        sk.prune_(model, sk.Wanda("2:4"), batches)
        masks.append([get_mask(layer) for layer in model.modules() if get_mask(layer) is not None])
    assert len(masks[0]) == 35 and all(map(torch.equal, *masks))
