"""``from_pretrained`` of transformers and diffusers loads what ``sparsekit.save`` and ``save_pretrained`` write."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from slimming import SIZES, logits, tiny
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import sparsekit as sk
from sparsekit._replace import guard_saving
from sparsekit.masks import get_mask
from sparsekit.nn import Compressed
from sparsekit.slim import SlimPlan, find_units, slim_

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore:.*unauthenticated")


def named(*ends):
    return lambda name, module: name.endswith(ends)


def packed(model, names):
    """Puts the named layers in their packed form."""
    for name, form in names.items():
        model.set_submodule(name, form(model.get_submodule(name)))
    guard_saving(model)
    return model


def mixture():
    """A slim classifier with layers of every linear form, and pruned dense ones."""
    model, batch = tiny("distilbert", torch.float32, dim=64, hidden_dim=64)
    units = find_units(model, batch)
    kept = {branch: tuple(range(0, branch.units, 2)) for branch in units.branches}
    slim_(model, SlimPlan(kept))
    sk.prune_(model, sk.Magnitude("2:4"), where=lambda name, _: "classifier" not in name)
    first, second = (f"distilbert.transformer.layer.{index}" for index in range(2))
    sk.quantize_(model, "nf4", where=named("0.ffn.lin1"))
    sk.quantize_(model, "2:4 int4", where=named("1.ffn.lin1"), inputs="int8")
    forms = {
        f"{first}.attention.q_lin": sk.nn.Linear24.from_linear,
        f"{first}.attention.k_lin": sk.nn.Int8Linear.from_linear,
        f"{first}.attention.v_lin": lambda layer: sk.nn.PrepackedLinear.from_linear(layer, tokens=4),
        f"{second}.attention.q_lin": lambda layer: sk.nn.TieredLinear.from_linear(layer, k=4, block=(8, 8)),
        f"{second}.attention.k_lin": lambda layer: sk.nn.ArrangedLinear24.from_linear(layer, layout="row pairs"),
    }
    return packed(model, forms), batch


def conv1d():
    """A language model with layers of transformers' own class, whose weight is transposed, and a tied head."""
    model, batch = tiny("gpt2", torch.float32)
    sk.prune_(model, sk.Magnitude("2:4"))
    sk.quantize_(model, "nf4", where=named("0.mlp.c_fc"))
    sk.quantize_(model, "2:4 nf4", where=named("1.mlp.c_fc"))
    name = "transformer.h.0.attn.c_attn"
    return packed(model, {name: lambda layer: sk.nn.Linear24.from_linear(layer, transposed=True)}), batch


def pruned():
    model, batch = tiny("bert", torch.float32)
    sk.prune_(model, sk.Magnitude("2:4"))
    return model, batch


MODELS = {"mixture": mixture, "conv1d": conv1d, "pruned": pruned}


def unet():
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    model = diffusers.UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8,
    ).eval()
    sk.prune_(model, sk.Magnitude("2:4"))
    sk.quantize_(model, "nf4", where=named("to_k"))
    sk.quantize_(model, "2:4 int8", where=named("to_q"))
    block = "down_blocks.0.resnets.0"
    forms = {f"{block}.conv1": sk.nn.Conv2d24.from_conv2d, f"{block}.conv2": sk.nn.PrepackedConv2d.from_conv2d}
    return packed(model, forms)


def state(model):
    """Returns everything that a folder must restore, as plain comparable values."""
    tensors = {name: (tensor.dtype, tensor.flatten().tolist()) for name, tensor in model.state_dict().items()}
    masks = {name: get_mask(module) for name, module in model.named_modules()}
    kinds = {name: type(module) for name, module in model.named_modules()}
    return tensors, {name: mask.tolist() for name, mask in masks.items() if mask is not None}, kinds


class Allocations(TorchDispatchMode):
    """Records the floating-point tensors that are made on a real device, by shape."""

    def __init__(self):
        super().__init__()
        self.shapes = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and not result.is_meta and result.is_floating_point():
            self.shapes.add(tuple(result.shape))
        return result


@pytest.mark.parametrize("name", MODELS)
def test_a_folder_brings_back_everything(name, tmp_path):
    model, batch = MODELS[name]()
    sk.save(model, tmp_path / "saved", format="transformers")
    loaded, told = type(model).from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not any(told.values()) and state(loaded) == state(model)
    assert torch.equal(logits(loaded, batch), logits(model, batch))
    plans = [sk.slim.slim_plan(each) for each in (loaded, model)]
    assert plans == [None, None] or plans[0].to_json() == plans[1].to_json()
    assert not hasattr(loaded.config, "quantization_config") and not loaded.is_quantized
    if any(isinstance(module, Compressed) for module in loaded.modules()):
        loaded.save_pretrained(tmp_path / "again")
        for file in ("config.json", "model.safetensors"):
            assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "saved" / file).read_bytes()
        fresh = type(model)(model.config) if name == "conv1d" else type(model).from_pretrained(tmp_path / "again")
        sk.load(fresh, tmp_path / "saved")
        assert state(fresh) == state(model)


def test_nothing_dense_is_allocated(tmp_path):
    model, _ = tiny("distilbert", torch.float32, dim=64, hidden_dim=192, vocab_size=20)
    sk.prune_(model, sk.Magnitude("2:4"), where=named("lin1", "lin2"))
    sk.quantize_(model, "2:4 int4", where=named("lin2"), inputs="int8")
    sk.quantize_(model, "nf4", where=named("q_lin"))
    packed(model, {f"distilbert.transformer.layer.{i}.ffn.lin1": sk.nn.Linear24.from_linear for i in range(2)})
    model.save_pretrained(tmp_path)
    with Allocations() as seen:
        loaded = type(model).from_pretrained(tmp_path)
    assert (1, 192, 32) in seen.shapes or (192, 32) in seen.shapes  # values of lin1: the mode sees what is made
    assert not seen.shapes & {(192, 64), (64, 192)} and state(loaded) == state(model)
    with Allocations() as seen:
        loaded.distilbert.transformer.layer[0].ffn.lin1.weight.clone()
    assert (192, 64) in seen.shapes


def test_a_model_of_diffusers(tmp_path):
    model, x = unet(), torch.randn(2, 1, 8, 8)
    model.save_pretrained(tmp_path / "saved")
    loaded, told = type(model).from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not any(told.values()) and state(loaded) == state(model)
    with torch.no_grad():
        assert torch.equal(loaded(x, 3).sample, model(x, 3).sample)
    loaded.save_pretrained(tmp_path / "again")
    assert state(type(model).from_pretrained(tmp_path / "again")) == state(model)
    sk.decompress_(loaded)
    loaded.save_pretrained(tmp_path / "dense")
    assert "quantization_config" not in json.loads((tmp_path / "dense/config.json").read_text())
    assert not any(isinstance(each, Compressed) for each in type(model).from_pretrained(tmp_path / "dense").modules())


def test_a_dtype_can_be_asked_for(tmp_path):
    model, batch = mixture()
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16)
    expected = copy.deepcopy(model).to(torch.bfloat16)
    assert state(loaded) == state(expected) and loaded.dtype == torch.bfloat16
    torch.testing.assert_close(logits(loaded, batch).float(), logits(model, batch), rtol=0.2, atol=0.2)


def test_a_base_model_takes_its_part_of_a_folder(tmp_path):
    model, batch = mixture()
    model.save_pretrained(tmp_path / "head")
    base = transformers.DistilBertModel.from_pretrained(tmp_path / "head")
    assert torch.equal(base(**batch)[0], model.distilbert(**batch)[0])
    base.save_pretrained(tmp_path / "base")
    whole, told = type(model).from_pretrained(tmp_path / "base", output_loading_info=True)
    assert {name.split(".")[0] for name in told["missing_keys"]} == {"pre_classifier", "classifier"}
    assert torch.equal(whole.distilbert(**batch)[0], base(**batch)[0])


FRESH = """
import sys, warnings
def load(): return transformers.AutoModelForSequenceClassification.from_pretrained(sys.argv[1])
first = sys.argv[2]
if first == "sparsekit":
    import sparsekit
    assert not {"transformers", "diffusers"} & sys.modules.keys()
import transformers, diffusers
if first != "sparsekit":
    for make in (load, lambda: diffusers.UNet2DModel.from_pretrained(sys.argv[3])):
        try:
            make()
        except (RuntimeError, ValueError) as error:
            print("refused", type(error).__name__)
    import sparsekit
import torch
logits = load()(torch.arange(8)[None]).logits
x = torch.ones(1, 1, 8, 8)
with torch.no_grad():
    sample = diffusers.UNet2DModel.from_pretrained(sys.argv[3])(x, 3).sample
torch.save((logits.detach(), sample), sys.argv[4])
"""


@pytest.mark.parametrize(
    ("first", "said"),
    [
        ("transformers", "refused RuntimeError\nrefused ValueError\n"),
        pytest.param("sparsekit", "", marks=pytest.mark.slow),
    ],
    ids=["transformers first", "sparsekit first"],
)
def test_fresh_processes(tmp_path, first, said):
    """Either order of imports loads; without sparsekit both libraries refuse."""
    (model, _), images = mixture(), unet()
    model.save_pretrained(tmp_path / "text")
    images.save_pretrained(tmp_path / "images")
    with torch.no_grad():
        expected = logits(model, {"input_ids": torch.arange(8)[None]}), images(torch.ones(1, 1, 8, 8), 3).sample
    args = [sys.executable, "-c", FRESH, tmp_path / "text", first, tmp_path / "images", tmp_path / "out"]
    done = subprocess.run(args, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout == said
    assert all(map(torch.equal, torch.load(tmp_path / "out", weights_only=True), expected))


def flips(path, offsets):
    """Yields the path once for each offset, with one bit of that byte changed."""
    data = path.read_bytes()
    for offset in offsets:
        path.write_bytes(data[:offset] + bytes([data[offset] ^ 1 << offset % 7]) + data[offset + 1 :])
        yield offset
    path.write_bytes(data)


def test_every_flipped_byte_is_an_error(tmp_path):
    model, _ = pruned()
    packed(model, {"bert.encoder.layer.0.intermediate.dense": sk.nn.Linear24.from_linear})
    model.save_pretrained(tmp_path)
    weights, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    header = 8 + int.from_bytes(weights.read_bytes()[:8], "little")
    somewhere = [*range(0, header, 97), *range(header - 8, header), *range(header, weights.stat().st_size, 4001)]
    for path, offsets in ((weights, somewhere), (config, range(0, config.stat().st_size, 61))):
        for offset in flips(path, offsets):
            with pytest.raises((ValueError, OSError, RuntimeError, KeyError, AttributeError, TypeError)):
                type(model).from_pretrained(tmp_path)
                pytest.fail(f"byte {offset} of {path.name} was changed, and nobody noticed")
    for offset in flips(weights, [weights.stat().st_size - 1]):
        with pytest.raises(ValueError, match=r"cannot load .*model\.safetensors: it was altered: its digest"):
            type(model).from_pretrained(tmp_path)
        assert offset
    text = config.read_text()
    config.write_text(text.replace('"hidden_size": 32', '"hidden_size":  32'))
    with pytest.raises(ValueError, match=r"cannot load .*config\.json: it was altered, or belongs to other weights"):
        type(model).from_pretrained(tmp_path)
    config.write_text(text)
    type(model).from_pretrained(tmp_path)


def rewrite(folder, change):
    """Changes the configuration of a folder, and writes the digest that fits."""
    from sparsekit.checkpoint import pretrained
    from sparsekit.checkpoint.shards import Shards

    config = json.loads((folder / "config.json").read_text())
    change(config["quantization_config"])
    about = type("About", (), {"generation_config": None})()
    pretrained.write_folder(about, Path(folder), config, "model.safetensors", dict(Shards(folder)))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda about: about.update(version=2), "has version 2, this sparsekit reads version 1"),
        (lambda about: about.update(code="os.system"), "has an unknown entry 'code'"),
        (lambda about: about.pop("layers"), "has no 'layers' of type dict"),
        (lambda about: next(iter(about["layers"].values())).update(kind="os.system"), "is 'os.system', known are"),
        (lambda about: next(iter(about["layers"].values())).update(shape=[8, 8]), "has shape"),
        (lambda about: about.update(slim={"format": "x"}), "this is no slim plan"),
    ],
)
def test_a_configuration_that_nobody_wrote_is_refused(tmp_path, change, match):
    model, _ = mixture()
    model.save_pretrained(tmp_path)
    rewrite(tmp_path, change)
    with pytest.raises(ValueError, match=match):
        type(model).from_pretrained(tmp_path)


def test_what_cannot_be_saved_or_loaded_is_said(tmp_path):
    model, _ = mixture()
    model.save_pretrained(tmp_path)
    about = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    del about["slim"]
    other = transformers.GPT2Config(**SIZES["gpt2"], quantization_config=about)
    with pytest.raises(ValueError, match=r"it does not fit the model: there is no layer 'distilbert\."):
        transformers.GPT2LMHeadModel.from_pretrained(tmp_path, config=other)
    with pytest.raises(
        TypeError, match="only a model of transformers or diffusers is saved as a folder, got Sequential"
    ):
        sk.save(nn.Sequential(nn.Linear(4, 4)), tmp_path / "other", format="transformers")
    with pytest.raises(ValueError, match=r"call model\.push_to_hub"):
        model.save_pretrained(tmp_path, push_to_hub=True)
    with pytest.raises(ValueError, match="state_dict must have the names of model"):
        model.save_pretrained(tmp_path, state_dict={})
    model.save_pretrained(tmp_path / "none", is_main_process=False)
    assert not (tmp_path / "none").exists()
    halved = {
        name: tensor // 2 if tensor.dtype == torch.int8 else tensor for name, tensor in model.state_dict().items()
    }
    model.save_pretrained(tmp_path / "given", state_dict=halved)
    given = type(model).from_pretrained(tmp_path / "given").state_dict()
    assert all(torch.equal(given[name], tensor) for name, tensor in halved.items())


def test_one_device_is_needed(tmp_path):
    model, batch = mixture()
    model.save_pretrained(tmp_path / "saved")
    loaded = type(model).from_pretrained(tmp_path / "saved", device_map={"": "cpu"})
    assert torch.equal(logits(loaded, batch), logits(model, batch))
    spread = {"distilbert": "disk", "pre_classifier": "cpu", "classifier": "cpu"}
    with pytest.raises(
        ValueError, match=r"layer '.*' would move between devices or to the disk, .* give device_map one"
    ):
        type(model).from_pretrained(tmp_path / "saved", device_map=spread, offload_folder=tmp_path / "disk")
