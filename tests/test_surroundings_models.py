"""Every verb on models with a part that it cannot or must not change: the part is named, and stays as it was."""

import pytest
import torch
import torch.nn.functional as F
from surroundings import TOKENS, WIDTH, Block, bits, inputs, state_of
from torch import nn
from torch.nn.utils import parametrizations, prune

import sparsekit as sk
from sparsekit.masks import masked_parameters
from sparsekit.nn import Compressed


class Net(nn.Module):
    """Blocks around one odd part; ``call`` says what the forward pass does with it."""

    def __init__(self, odd: nn.Module, call=lambda odd, x: odd(x)) -> None:
        super().__init__()
        self.first, self.odd, self.last, self.call = Block(), odd, Block(), call

    def forward(self, x):
        return self.last(self.call(self.odd, self.first(x)))


class Scaled(nn.Linear):
    def forward(self, input):
        return F.linear(input, 2 * self.weight, self.bias)


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.matrices = nn.Parameter(torch.randn(3, WIDTH, WIDTH) / 6)

    def forward(self, x):
        return torch.stack([F.linear(x, self.matrices[index]) for index in range(3)]).mean(0)


class Views(nn.Module):
    """q, k and v as views of one weight."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.q, self.v = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.q.weight.data, self.v.weight.data = self.qkv.weight.data[:WIDTH], self.qkv.weight.data[2 * WIDTH :]

    def forward(self, x):
        return self.q(x) + self.v(x) + self.qkv(x)[..., WIDTH : 2 * WIDTH]


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Embedding(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH, bias=False)
        self.head.weight = self.table.weight

    def forward(self, x):
        return self.head(x) + self.table(torch.arange(len(x)) % WIDTH)


def replaced():
    layer = nn.Linear(WIDTH, WIDTH)
    layer.forward = lambda input: F.linear(input, 2 * layer.weight, layer.bias)
    return layer


def torch_pruned():
    return prune.l1_unstructured(nn.Linear(WIDTH, WIDTH), "weight", amount=0.3)


def linear():
    return nn.Linear(WIDTH, WIDTH)


def skip(odd, x):
    return x


ODD = {
    "unused": lambda: Net(linear(), skip),
    "subclass": lambda: Net(Scaled(WIDTH, WIDTH)),
    "forward-replaced": lambda: Net(replaced()),
    "read": lambda: Net(linear(), lambda odd, x: F.linear(x, odd.weight, odd.bias)),
    "lazy": lambda: Net(nn.LazyLinear(WIDTH), skip),
    "meta": lambda: Net(nn.Linear(WIDTH, WIDTH, device="meta"), skip),
    "spectral-norm": lambda: Net(parametrizations.spectral_norm(linear())),
    "weight-norm": lambda: Net(parametrizations.weight_norm(linear())),
    "torch-prune": lambda: Net(torch_pruned()),
    "tied": lambda: Net(Tied()),
    "views": lambda: Net(Views()),
    "double": lambda: Net(nn.Linear(WIDTH, WIDTH, dtype=torch.float64), lambda odd, x: odd(x.double()).float()),
    "lstm": lambda: Net(nn.LSTM(WIDTH, WIDTH), lambda odd, x: odd(x)[0]),
    "attention": lambda: Net(nn.MultiheadAttention(WIDTH, 2), lambda odd, x: odd(x, x, x)[0]),
    "conv1d": lambda: Net(nn.Conv1d(TOKENS, TOKENS, 3, padding=1), lambda odd, x: odd(x[None])[0]),
    "bilinear": lambda: Net(nn.Bilinear(WIDTH, WIDTH, 8), lambda odd, x: x + odd(x, x).mean()),
}
PRUNING = ("prune-magnitude", "prune-wanda", "prune-sparsegpt", "tiers")
VERBS = {
    "prune-magnitude": lambda model: sk.prune_(model, sk.Magnitude("2:4")),
    "prune-wanda": lambda model: sk.prune_(model, sk.Wanda("2:4"), [inputs()]),
    "prune-sparsegpt": lambda model: sk.prune_(model, sk.SparseGPT("2:4"), [inputs()]),
    "compress": lambda model: sk.compress_(model, inputs()),
    "sparse_training": lambda model: sk.sparse_training_(model),
    "tiers": lambda model: sk.tiers.tier_iteration(
        model, sk.tiers.Step(1, sk.tiers.Ratios(0.5, 0.5, 0.0), 0.5, 0.0, 0.0), [inputs()]
    ),
}
# Without a pass over a batch nobody can know that a layer is not called; the zeros are right where it is read.
WITHOUT_A_PASS = {("unused", "prune-magnitude"), ("read", "prune-magnitude")}
PREPARED = {("meta", "sparse_training")}  # changes no weight, so it can wait for the weights to be loaded
TRAINED = {"unused", "read"}  # what sparse training leaves dense when it ends


@pytest.mark.parametrize("name", VERBS)
@pytest.mark.parametrize("odd", ODD)
def test_what_cannot_be_changed_is_named_and_left(odd, name, ratios):
    if (odd, name) in WITHOUT_A_PASS | PREPARED:
        pytest.skip("right as it is")
    ratios["prepacked"] = 1.0
    model = ODD[odd]().eval()
    if name == "compress":
        sk.prune_(model, sk.Magnitude("2:4"), where=lambda name, _: not name.startswith("odd"))
    before = state_of(model)
    report = VERBS[name](model)
    after = state_of(model)
    assert {key: value for key, value in after.items() if key.startswith("odd") and odd not in TRAINED} == {
        key: value for key, value in before.items() if key.startswith("odd") and odd not in TRAINED
    }
    changed = {
        key for key in before if before[key][:2] + before[key][3:4] != after.get(key, (0,) * 4)[:2] + after[key][3:4]
    }
    assert {"first.up", "last.down"} <= changed
    if name in PRUNING[:3]:
        assert any(each.name.startswith("odd") and each.reason for each in report.skipped), str(report)
        assert report.model_weights == sum(
            p.numel() for p in model.parameters() if not isinstance(p, nn.UninitializedParameter)
        )
    elif name in ("compress", "sparse_training") and odd not in TRAINED:
        rows = [each for each in report.layers if each.name.startswith("odd")]
        assert all(each.reason for each in rows)


@pytest.mark.parametrize("odd", ODD)
def test_a_failure_leaves_the_odd_part_too(odd):
    model = ODD[odd]().eval()
    before = state_of(model)
    with pytest.raises(ValueError, match="NaN"):
        sk.prune_(model, sk.Wanda("2:4"), [inputs(), inputs() * torch.nan])
    assert state_of(model) == before


@pytest.mark.parametrize("odd", sorted(ODD.keys() - {"lazy", "meta"}))
def test_what_is_saved_is_loaded(odd, tmp_path):
    model, other = ODD[odd]().eval(), ODD[odd]().eval()
    sk.prune_(model, sk.Wanda("2:4"), [inputs()])
    sk.save(model, tmp_path / "model.safetensors")
    sk.load(other, tmp_path / "model.safetensors")
    state = model.state_dict()
    assert all(bits(tensor) == bits(state[key]) for key, tensor in other.state_dict().items())
    assert [masked_parameters(module) for module in other.modules()] == [masked_parameters(m) for m in model.modules()]
    torch.testing.assert_close(other(inputs()), model(inputs()))


def test_experts_are_pruned_each_on_what_it_is_shown():
    model = Net(Experts()).eval()
    report = sk.prune_(model, sk.Wanda("2:4"), [inputs()])
    assert any(layer.name.startswith("odd") for layer in report.layers)
    assert ((model.odd.matrices != 0).unflatten(-1, (-1, 4)).sum(-1) == 2).all()
    assert masked_parameters(model.odd) == ("matrices",)


def test_frozen_parts_stay_frozen(ratios):
    ratios["prepacked"] = 1.0
    model = Net(linear())
    model.odd.requires_grad_(False)
    model.odd.eval()
    for verb in (VERBS["prune-wanda"], VERBS["compress"], sk.decompress_):
        verb(model)
        assert [module.training for module in (model, model.first, model.odd, model.last)] == [True, True, False, True]
        assert not any(parameter.requires_grad for parameter in model.odd.parameters())
        assert all(parameter.requires_grad for parameter in model.first.parameters())
    assert not any(isinstance(module, Compressed) for module in model.modules())
