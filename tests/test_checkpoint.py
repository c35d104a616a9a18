"""save and load: every kind of model into every kind of model, tensor by tensor."""

import os
import subprocess
import sys

import pytest
import torch
from checkpoints import COLS, MAKERS, ROWS, TARGETS, TOKENS, Net, contents, make, mixed, prune
from safetensors.torch import load_file, save_file
from torch import nn

import sparsekit as sk
from sparsekit.masks import MaskInfo, Pattern, get_mask, get_mask_info, set_mask
from sparsekit.nn import Linear24


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.safetensors"


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
    assert tensors["conv.weight_mask"].shape == (3, 5)  # 36 weights per row, one bit each
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


class Conv1D(nn.Module):
    """A layer like the Conv1D of transformers: the weight is [inputs, outputs]."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 6))
        self.bias = nn.Parameter(torch.randn(6))

    def forward(self, x):
        return x @ self.weight + self.bias


def conv1d():
    model = nn.Sequential(Conv1D())
    mask = sk.nm_mask(model[0].weight.detach().t(), 2, 4).t().contiguous()
    model[0].weight.data.mul_(mask)
    set_mask(model[0], mask, MaskInfo(Pattern.parse("2:4"), 0))
    return model.eval()


def test_transposed_layers_keep_their_orientation(path):
    model = conv1d()
    weight = model[0].weight.detach().clone()
    packed = nn.Sequential(Linear24.from_linear(model[0], transposed=True))
    sk.save(packed, path)

    loaded = conv1d()
    sk.load(loaded, path)
    assert torch.equal(loaded[0].weight, weight) and torch.equal(loaded[0].values, packed[0].values)
    loaded = conv1d()
    sk.load(loaded, path, dense=True)
    assert type(loaded[0]) is Conv1D and torch.equal(loaded[0].weight, weight)
    assert torch.equal(get_mask(loaded[0]), get_mask(model[0])) and get_mask_info(loaded[0]).axis == 0

    sk.save(model, path)
    with pytest.raises(ValueError, match="'0' stands for a layer of an unknown class"):
        sk.load(packed, path)


# Together with compress_: what load compressed is guarded and undone as what compress_ did.


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("target", ["fresh", "pruned", "untied"])
def test_a_loaded_model_decompresses_to_the_saved_one(path, target, device):
    sk.save(mixed(make()), path)
    loaded = TARGETS[target]().to(device)
    layers = [loaded.first, loaded.second]
    sk.load(loaded, path)
    assert [layer.weight.numel() for layer in layers] == [0, 0] and not any(get_mask_info(layer) for layer in layers)
    assert sk.decompress_(loaded) == ("first", "second")
    assert [loaded.first, loaded.second] == layers
    assert contents(loaded) == contents(prune(make()))


def test_a_loaded_conv1d_decompresses_to_its_own_class(path):
    model = conv1d()
    expected = contents(model)
    sk.save(nn.Sequential(Linear24.from_linear(model[0], transposed=True)).eval(), path)
    loaded, x = conv1d(), torch.randn(3, 8)
    sk.load(loaded, path)
    torch.testing.assert_close(loaded(x), model(x))
    assert sk.decompress_(loaded) == ("0",)
    assert contents(loaded) == expected and torch.equal(loaded(x), model(x))


def test_compress_save_load_decompress(ratios, path):
    model, loaded = prune(make()), prune(make(1))
    dense = contents(model)
    sk.compress_(model)
    sk.save(model, path)
    sk.compress_(loaded)
    sk.load(loaded, path)
    assert contents(loaded) == contents(model)
    assert torch.equal(loaded(TOKENS), model(TOKENS))
    sk.decompress_(loaded)
    assert contents(loaded) == dense


@pytest.mark.parametrize("dense", [False, True])
def test_a_dense_file_undoes_a_compressed_model(ratios, path, dense):
    saved = prune(make()) if dense else mixed(make())
    sk.save(saved, path)
    loaded = prune(make(1))
    modules = list(loaded.modules())
    sk.compress_(loaded)
    sk.load(loaded, path, dense=True)
    assert list(loaded.modules()) == modules
    assert contents(loaded) == contents(prune(make()))


def test_save_pretrained_is_refused_after_load(path):
    class Pretrained(Net):
        def save_pretrained(self, folder):
            return folder

    sk.save(mixed(make()), path)
    loaded = Pretrained().eval()
    sk.load(loaded, path)
    with pytest.raises(RuntimeError, match=r"use sparsekit\.save, or call sparsekit\.decompress_ first"):
        loaded.save_pretrained("folder")
    sk.load(loaded, path, dense=True)
    assert loaded.save_pretrained("folder") == "folder"
    sk.load(loaded, path)
    sk.decompress_(loaded)
    assert loaded.save_pretrained("folder") == "folder"


def test_loads_in_a_fresh_process(path, tmp_path):
    model = mixed(make())
    sk.save(model, path)
    save_file({"logits": model(TOKENS)}, tmp_path / "logits")
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import torch, sparsekit as sk; from safetensors.torch import load_file\n"
        "from checkpoints import Net, TOKENS\n"
        "model = Net().eval(); sk.load(model, sys.argv[2])\n"
        "assert torch.equal(model(TOKENS), load_file(sys.argv[3])['logits'])\n"
    )
    here = os.path.dirname(__file__)
    subprocess.run([sys.executable, "-c", code, here, path, tmp_path / "logits"], check=True, timeout=120)


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
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        sk.save(make(), path / "below")
    with pytest.raises(ValueError, match=r"format must be one of .*, got 'pickle'"):
        sk.save(make(), path, format="pickle")
    with pytest.raises(ValueError, match=r"weight is on the meta device and has no data to save"):
        sk.save(nn.Linear(2, 2, device="meta"), path)
    assert not path.exists()
