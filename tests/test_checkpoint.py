import json
import os
import struct
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import sparsekit as sk
from sparsekit import _files
from sparsekit.checkpoint import archive, checkpoint
from sparsekit.masks import MaskInfo, Pattern, get_mask, get_mask_info, set_mask
from sparsekit.nn import Linear24, PrepackedLinear

ROWS, COLS = 12, 10  # a tail of two columns, and a mask row that ends within a byte


class Net(nn.Module):
    """A tied embedding and head, a normalization with buffers, a convolution and three linear layers."""

    def __init__(self, tied: bool = True) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, COLS)
        self.first = nn.Linear(COLS, ROWS)
        self.second = nn.Linear(ROWS, ROWS, bias=False)
        self.third = nn.Linear(ROWS, COLS)
        self.conv = nn.Conv2d(4, 3, 3, padding=1)
        self.norm = nn.BatchNorm2d(3)
        self.head = nn.Linear(COLS, 7, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.third(torch.relu(self.second(torch.relu(self.first(self.embed(tokens))))))
        image = x.flatten()[:64].view(1, 4, 4, 4)
        return self.head(x) + self.norm(self.conv(image)).mean()


TOKENS = torch.arange(7).repeat(2)


def make(seed: int = 0, tied: bool = True) -> Net:
    torch.manual_seed(seed)
    model = Net(tied).eval()
    model.norm.running_mean.normal_()
    return model


def prune(model: Net) -> Net:
    for layer in (model.first, model.second, model.third):
        mask = sk.nm_prune_(layer.weight, 2, 4)
        set_mask(layer, mask, MaskInfo(Pattern.parse("2:4"), 1))
    mask = sk.nm_prune_(model.conv.weight.detach().view(3, -1), 1, 4).view(3, 4, 3, 3)
    set_mask(model.conv, mask, MaskInfo(Pattern.parse("1:4"), "flatten"))
    return model


def mixed(model: Net) -> Net:
    model = prune(model)
    model.first = Linear24.from_linear(model.first)
    model.second = PrepackedLinear.from_linear(model.second, tokens=16)
    return model


MAKERS = {"dense": make, "pruned": lambda: prune(make()), "mixed": lambda: mixed(make())}
TARGETS = {
    "fresh": lambda: make(1),
    "pruned": lambda: prune(make(1)),
    "mixed": lambda: mixed(make(1)),
    "untied": lambda: make(1, tied=False),
}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.safetensors"


def contents(model):
    """Everything that a checkpoint must bring back, as plain comparable values."""
    state = {name: (tensor.dtype, tensor.clone().flatten().tolist()) for name, tensor in model.state_dict().items()}
    masks = {
        name: (get_mask(module).tolist(), get_mask_info(module))
        for name, module in model.named_modules()
        if get_mask_info(module)
    }
    kinds = {name: (type(module), module.training) for name, module in model.named_modules()}
    return state, masks, kinds


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("source", MAKERS)
def test_load_makes_the_model_what_was_saved(path, source, target):
    model = MAKERS[source]()
    sk.save(model, path)
    loaded = TARGETS[target]()
    sk.load(loaded, path)
    assert contents(loaded) == contents(model)
    assert loaded.head.weight is loaded.embed.weight
    assert torch.equal(loaded(TOKENS), model(TOKENS))


def test_untied_tensors_do_not_stay_tied(path):
    sk.save(make(tied=False), path)
    loaded = make(1, tied=True)
    sk.load(loaded, path)
    assert loaded.head.weight is not loaded.embed.weight
    assert contents(loaded) == contents(make(tied=False))


def test_shared_tensors_are_stored_once(path):
    model = make()
    sk.save(model, path)
    tensors = load_file(path)
    assert "embed.weight" in tensors
    assert "head.weight" not in tensors
    assert sorted(tensors) == sorted(set(model.state_dict()) - {"head.weight"})


def test_the_packed_form_is_stored_and_no_dense_copy(path):
    model = mixed(make())
    sk.save(model, path)
    tensors = load_file(path)
    assert tensors["first.values"].shape == (ROWS, 2 * (COLS // 4) + COLS % 4)
    assert tensors["first.bitmask"].shape == (ROWS, 2)
    assert tensors["conv.weight_mask"].shape == (3, 5)  # 36 weights a row, one bit each
    assert not {"first.weight", "first.weight_mask"} & set(tensors)  # the mask is the bitmask, stored once


def test_a_module_used_twice_stays_one_module(path):
    def twice(seed):
        torch.manual_seed(seed)
        layer = nn.Linear(8, 8)
        return nn.Sequential(layer, nn.ReLU(), layer)

    model = twice(0)
    sk.nm_prune_(model[0].weight, 2, 4)
    model[0] = model[2] = Linear24.from_linear(model[0])
    sk.save(model, path)
    loaded = twice(1)
    sk.load(loaded, path)
    assert loaded[0] is loaded[2]
    assert torch.equal(loaded[0].values, model[0].values)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_the_dtype_comes_from_the_file(path, dtype):
    model = mixed(make()).to(dtype)
    sk.save(model, path)
    loaded = make(1)
    sk.load(loaded, path)
    assert loaded.first.values.dtype == loaded.third.weight.dtype == loaded.norm.running_mean.dtype == dtype
    assert loaded.norm.num_batches_tracked.dtype == torch.int64
    assert contents(loaded) == contents(model)


@pytest.mark.parametrize("target", TARGETS)
def test_dense_gives_dense_layers_with_masks(path, target):
    model = mixed(make())
    sk.save(model, path)
    loaded = TARGETS[target]()
    sk.load(loaded, path, dense=True)
    assert type(loaded.first) is type(loaded.second) is nn.Linear
    assert contents(loaded) == contents(prune(make()))


def test_loads_into_the_meta_device(path):
    model = mixed(make())
    sk.save(model, path)
    with torch.device("meta"):
        loaded = Net().eval()
    sk.load(loaded, path)
    assert contents(loaded) == contents(model)


def test_requires_grad_is_that_of_the_model(path):
    sk.save(mixed(make()), path)
    loaded = make(1)
    loaded.first.weight.requires_grad_(False)
    sk.load(loaded, path)
    assert not loaded.first.values.requires_grad
    assert loaded.first.bias.requires_grad and loaded.third.weight.requires_grad


def test_views_of_one_storage_and_empty_tensors(path):
    class Views(nn.Module):
        def __init__(self, fill: float) -> None:
            super().__init__()
            whole = torch.full((4, 4), fill)
            self.register_buffer("top", whole[:2])
            self.register_buffer("left", whole[:, :2])
            self.register_buffer("none", torch.empty(0, 3))
            self.register_buffer("void", torch.empty(0, 3))

    sk.save(Views(1.0), path)
    loaded = Views(2.0)
    sk.load(loaded, path)
    assert loaded.top.eq(1).all() and loaded.left.eq(1).all() and loaded.none.shape == (0, 3)


def test_transposed_layers_keep_their_orientation(path):
    class Conv1D(nn.Module):
        """The layout of transformers' layer of this name: the weight is [inputs, outputs]."""

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8, 6))
            self.bias = nn.Parameter(torch.randn(6))

    model = nn.Sequential(Conv1D())
    mask = sk.nm_mask(model[0].weight.detach().t(), 2, 4).t().contiguous()
    model[0].weight.data.mul_(mask)
    set_mask(model[0], mask, MaskInfo(Pattern.parse("2:4"), 0))
    weight = model[0].weight.detach().clone()
    packed = nn.Sequential(Linear24.from_linear(model[0], transposed=True))
    sk.save(packed, path)

    loaded = nn.Sequential(Conv1D())
    sk.load(loaded, path)
    assert torch.equal(loaded[0].weight, weight) and torch.equal(loaded[0].values, packed[0].values)
    loaded = nn.Sequential(Conv1D())
    sk.load(loaded, path, dense=True)
    assert type(loaded[0]) is Conv1D and torch.equal(loaded[0].weight, weight)
    assert torch.equal(get_mask(loaded[0]), mask) and get_mask_info(loaded[0]).axis == 0

    sk.save(model, path)
    with pytest.raises(ValueError, match="'0' stands for a layer of an unknown class"):
        sk.load(packed, path)


def test_loads_in_a_fresh_process(path, tmp_path):
    model = mixed(make())
    sk.save(model, path)
    save_file({"logits": model(TOKENS)}, tmp_path / "logits")
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import torch, sparsekit as sk; from safetensors.torch import load_file\n"
        "from test_checkpoint import Net, TOKENS\n"
        "model = Net().eval(); sk.load(model, sys.argv[2])\n"
        "assert torch.equal(model(TOKENS), load_file(sys.argv[3])['logits'])\n"
    )
    here = os.path.dirname(__file__)
    subprocess.run([sys.executable, "-c", code, here, path, tmp_path / "logits"], check=True, timeout=120)


# Files that are not what was written. Each must be refused by name, and leave the model alone.


def refuse(path, match, model=None):
    model = mixed(make(1)) if model is None else model
    before, modules = contents(model), list(model.modules())
    with pytest.raises(ValueError, match=match) as caught:
        sk.load(model, path)
    assert str(path) in str(caught.value)
    assert contents(model) == before
    assert all(now is then for now, then in zip(model.modules(), modules, strict=True))


def test_refuses_a_truncated_file(path):
    sk.save(mixed(make()), path)
    whole = path.read_bytes()
    header = 8 + struct.unpack("<Q", whole[:8])[0]
    model = make(1)
    for length in {0, 1, 7, 8, 9, header - 1, header, header + 1, len(whole) - 1, *range(0, len(whole), 97)}:
        path.write_bytes(whole[:length])
        refuse(path, "truncated, or no safetensors file", model)


def test_refuses_a_file_with_any_byte_altered(path):
    sk.save(mixed(make()), path)
    whole = path.read_bytes()
    model = make(1)
    for at in range(0, len(whole), 13):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x15]) + whole[at + 1 :])
        refuse(path, "truncated, or no safetensors file|was altered|not one that sparsekit.save wrote", model)
    path.write_bytes(whole + b"\0")
    refuse(path, "truncated, or no safetensors file", model)


def test_refuses_what_is_no_checkpoint(path, tmp_path):
    refuse(tmp_path, "it is a directory")
    path.write_bytes(os.urandom(5000))
    refuse(path, "truncated, or no safetensors file")
    path.write_bytes(struct.pack("<Q", 1 << 60) + b"{}")
    refuse(path, "truncated, or no safetensors file")
    torch.save({"first.weight": torch.zeros(2)}, path)
    refuse(path, "truncated, or no safetensors file")
    save_file(make(tied=False).state_dict(), path)
    refuse(path, "it is a safetensors file, but not one that sparsekit.save wrote")
    with pytest.raises(FileNotFoundError):
        sk.load(make(), tmp_path / "missing")


def forge(path, change):
    """Rewrites a good checkpoint with a changed structure or tensors, and a digest that fits: a hostile writer's."""
    with safe_open(path, "pt") as file:
        structure = json.loads(file.metadata()["sparsekit"])
    tensors = load_file(path)
    structure = change(structure, tensors) or structure
    text = structure if isinstance(structure, str) else json.dumps(structure)
    archive.write(path, tensors, archive.seal(text, tensors))


def _put(*keys, value):
    def change(structure, tensors):
        *parents, last = keys
        for key in parents:
            structure = structure[key]
        structure[last] = value

    return change


def _bit(name, byte=0, bit=1):
    def change(structure, tensors):
        tensors[name][0, byte] ^= bit

    return change


def _drop(name):
    def change(structure, tensors):
        del tensors[name]

    return change


def _forget(key):
    def change(structure, tensors):
        del structure[key]

    return change


def _ghost(structure, tensors):
    structure["layers"]["ghost"] = structure["layers"]["first"]


def _tensor(name, tensor):
    def change(structure, tensors):
        tensors[name] = tensor

    return change


LAYER = ("layers", "first")
FORGERIES = {
    "version": (_put("version", value=2), "version 2 of the format, this sparsekit reads version 1"),
    "version-type": (_put("version", value="1"), "no 'version' of type int"),
    "not-json": (lambda structure, tensors: "{", "its structure is not JSON"),
    "deep": (lambda structure, tensors: "[" * 100_000, "its structure is not JSON"),
    "list": (lambda structure, tensors: "[]", "no 'version' of type int"),
    "no-layers": (_forget("layers"), "no 'layers' of type dict"),
    "no-shared": (_forget("shared"), "no 'shared' of type dict"),
    "shared-type": (_put("shared", value={"head.weight": 3}), "'shared' must map names to names"),
    "shared-with-nothing": (_put("shared", value={"head.weight": "x"}), "'head.weight' cannot share the tensor 'x'"),
    "shared-twice": (_put("shared", "conv.bias", value="norm.bias"), "'conv.bias' cannot share"),
    "shared-misfit": (_put("shared", "head.weight", value="conv.bias"), r"head.weight has shape \(3,\)"),
    "layer-type": (_put(*LAYER, value=[]), "layer 'first' has no 'kind' of type str"),
    "kind": (_put(*LAYER, "kind", value="linear12"), "layer 'first' is 'linear12', known are"),
    "shape-negative": (_put(*LAYER, "shape", value=[-1, 10]), r"layer 'first' has the shape \[-1, 10\]"),
    "shape-absurd": (_put(*LAYER, "shape", value=[1 << 60, 1 << 60]), "first.values has shape .* its layer needs"),
    "shape-1d": (_put(*LAYER, "shape", value=[12]), r"layer 'first' has the shape \[12\]"),
    "shape-bool": (_put(*LAYER, "shape", value=[True, True]), "layer 'first' has the shape"),
    "transposed": (_put(*LAYER, "transposed", value=True), "first.values has shape"),
    "transposed-type": (_put(*LAYER, "transposed", value=1), "no 'transposed' of type bool"),
    "tokens": (_put("layers", "second", "tokens", value=1 << 40), "tokens, 1 to 1048576 are allowed"),
    "tokens-type": (_put("layers", "second", "tokens", value=1.5), "no 'tokens' of type int"),
    "mask-type": (_put(*LAYER, "mask", value=[]), "mask of layer 'first' has the axis None"),
    "mask-axis": (_put(*LAYER, "mask", "axis", value=2), "the axis 2, for a weight of 2 dimensions"),
    "mask-pattern": (_put(*LAYER, "mask", "pattern", value="9:4"), "a pattern is .* got '9:4'"),
    "mask-dropped": (_put(*LAYER, "mask", value=None), "unexpected first.weight_mask"),
    "no-values": (_drop("first.values"), "'first.values' is missing"),
    "no-bias": (_drop("first.bias"), "missing first.bias"),
    "unknown-layer": (_ghost, "'ghost.values' is missing"),
    "extra-tensor": (_tensor("ghost", torch.zeros(1)), "it does not fit the model: unexpected ghost"),
    "wrong-shape": (_tensor("norm.bias", torch.zeros(4)), r"norm.bias has shape \(4,\), the model's \(3,\)"),
    "values-dtype": (_tensor("first.values", torch.zeros(12, 6, dtype=torch.int32)), "first.values is torch.int32"),
    "bits-dtype": (_tensor("first.bitmask", torch.zeros(12, 2)), "first.bitmask is torch.float32, not uint8"),
    "bits-break-24": (_bit("first.bitmask"), "first.bitmask does not keep exactly two of every four columns"),
    "bits-past-the-end": (
        _bit("conv.weight_mask", byte=4, bit=0x80),
        "conv.weight_mask has bits set past its last column",
    ),
    "tail-dropped": (_bit("first.bitmask", byte=1, bit=2), "does not keep exactly two"),
}


@pytest.mark.parametrize("name", FORGERIES)
def test_refuses_a_forged_file(path, name):
    change, match = FORGERIES[name]
    sk.save(mixed(make()), path)
    forge(path, change)
    refuse(path, match, make(1))


def test_says_which_layers_do_not_fit(path):
    sk.save(make(), path)
    refuse(path, r"missing 0\.bias, 0\.weight; unexpected conv\.bias, .* and \d+ more", nn.Sequential(nn.Linear(2, 2)))
    sk.save(nn.Sequential(Linear24(8, 8)), path)
    refuse(path, r"layer '0' is 'linear24' in the file and Embedding in the model", nn.Sequential(nn.Embedding(8, 8)))
    refuse(path, r"layer '0' has shape \(8, 8\), the model's has \(9, 8\)", nn.Sequential(nn.Linear(8, 9)))
    refuse(path, r"missing 0\.bias|unexpected 0\.bias", nn.Sequential(nn.Linear(8, 8, bias=False)))
    sk.save(Linear24(8, 8), path)
    refuse(path, "put it in a Sequential", nn.Linear(8, 8))


def test_a_failure_while_loading_leaves_the_model_whole(path, monkeypatch):
    sk.save(mixed(make()), path)
    model = mixed(make(1))
    before, modules = contents(model), list(model.modules())

    def fail(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "remove_mask", fail)
    with pytest.raises(KeyboardInterrupt):
        sk.load(model, path)
    assert contents(model) == before
    assert all(now is then for now, then in zip(model.modules(), modules, strict=True))


@pytest.mark.parametrize("step", ["save_file", "_flush", "replace"])
def test_an_interrupted_save_leaves_the_old_checkpoint(path, monkeypatch, step):
    sk.save(make(), path)
    old = path.read_bytes()

    def fail(*args, **kwargs):
        if step == "save_file":
            args[1].write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(os if step == "replace" else archive if step == "save_file" else _files, step, fail)
    with pytest.raises(KeyboardInterrupt):
        sk.save(mixed(make(1)), path)
    assert path.read_bytes() == old
    assert list(path.parent.iterdir()) == [path]


def test_save_replaces_the_file_that_the_model_was_loaded_from(path):
    sk.save(make(), path)
    model = make(1)
    sk.load(model, path)
    with torch.no_grad():
        model.first.bias.add_(1)
    sk.save(model, path)
    loaded = make(2)
    sk.load(loaded, path)
    assert contents(loaded) == contents(model)


def test_rejects_what_cannot_be_saved(path):
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got dict"):
        sk.save({}, path)
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got dict"):
        sk.load({}, path)
    with pytest.raises(ValueError, match=r"weight is on the meta device and has no data to save"):
        sk.save(nn.Linear(2, 2, device="meta"), path)
    assert not path.exists()
