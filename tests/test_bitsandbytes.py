"""nf4 weights under the names of bitsandbytes: written, read, and loaded by transformers with it."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from slimming import logits, tiny
from test_nf4 import golden_weight
from torch import nn

import sparsekit as sk
from sparsekit.nn import Nf4Linear
from sparsekit.ops import quantize_nf4

pytest.importorskip("transformers")
CODEBOOK = torch.linspace(-1, 1, 256)


def classifier():
    model, batch = tiny("distilbert", torch.float32, dim=64, hidden_dim=128, vocab_size=40)
    sk.quantize_(model, where=sk.quant.fits_bitsandbytes)
    return model, batch


def test_a_folder_has_the_names_and_the_bytes_of_bitsandbytes(tmp_path):
    model, batch = classifier()
    sk.save(model, tmp_path, format="bitsandbytes")
    tensors = load_file(tmp_path / "model.safetensors")
    name = "distilbert.transformer.layer.0.ffn.lin1"
    layer = model.get_submodule(name)
    assert tensors[f"{name}.weight"].shape == (64 * 128 // 2, 1) and tensors[f"{name}.weight"].dtype == torch.uint8
    assert torch.equal(tensors[f"{name}.weight"].flatten(), layer.codes)
    assert torch.equal(tensors[f"{name}.weight.absmax"], layer.absmax)
    state = bytes(tensors[f"{name}.weight.quant_state.bitsandbytes__nf4"].tolist())
    assert json.loads(state) == {"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": [128, 64]}
    about = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert about["quant_method"] == "bitsandbytes" and about["bnb_4bit_quant_type"] == "nf4"
    assert about["llm_int8_skip_modules"] == ["^classifier$"]  # not pre_classifier as well
    rest = sum(tensor.nbytes for key, tensor in tensors.items() if not key.startswith(f"{name}.weight"))
    own = sum(tensor.nbytes for tensor in tensors.values()) - rest
    assert own == 64 * 128 / 2 + 4 * 64 * 128 / 64 + 64 + len(state)  # codes, scales, 16 levels, what describes them
    fresh = type(model)(model.config).eval()
    sk.load(fresh, tmp_path)
    assert type(fresh.get_submodule(name)) is Nf4Linear
    assert torch.equal(logits(fresh, batch), logits(model, batch))


LOAD = """
import sys, torch, transformers
model = transformers.DistilBertForSequenceClassification.from_pretrained(sys.argv[1])
from bitsandbytes.nn import Linear4bit
assert sum(isinstance(module, Linear4bit) for module in model.modules()) == 13
with torch.no_grad():
    torch.save(model(torch.arange(8)[None]).logits, sys.argv[2])
assert "sparsekit" not in sys.modules
"""


def test_transformers_loads_it_with_bitsandbytes_alone(tmp_path):
    pytest.importorskip("bitsandbytes")
    model, _ = classifier()
    sk.save(model, tmp_path / "folder", format="bitsandbytes")
    args = [sys.executable, "-c", LOAD, tmp_path / "folder", tmp_path / "logits"]
    done = subprocess.run(args, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = torch.load(tmp_path / "logits", weights_only=True)
    # bitsandbytes rounds scales and inputs to bfloat16 on CPUs that multiply it.
    torch.testing.assert_close(found, logits(model, {"input_ids": torch.arange(8)[None]}), rtol=2e-2, atol=2e-2)


def parts(weight, **changes):
    """Returns what bitsandbytes writes of a weight, with double quantization, computed here."""
    packed = quantize_nf4(weight)
    about = {"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": list(weight.shape)}
    about |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 3.0} | changes
    return {
        "weight": packed.codes[:, None],
        "weight.absmax": torch.tensor([255, 0, 255], dtype=torch.uint8),
        "weight.nested_absmax": torch.tensor([0.125]),
        "weight.nested_quant_map": CODEBOOK,
        "weight.quant_map": torch.tensor(sk.ops.quant24.NF4_LEVELS),
        "weight.quant_state.bitsandbytes__nf4": torch.tensor(list(json.dumps(about).encode()), dtype=torch.uint8),
    }


def file_of(path, tensors):
    save_file({f"0.{name}": tensor for name, tensor in tensors.items()}, path)
    return path


def test_double_quantization_is_read(tmp_path):
    model = nn.Sequential(nn.Linear(50, 3, bias=False))
    sk.load(model, file_of(tmp_path / "model.safetensors", parts(golden_weight())))
    assert model[0].absmax.tolist() == [3.125, 2.875, 3.125]  # a scale of 1/8 times -1 or 1, and the offset of 3
    expected = quantize_nf4(golden_weight())._replace(absmax=torch.tensor([3.125, 2.875, 3.125])).to_dense()
    assert torch.equal(model[0].weight.clone(), expected)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (
            {"weight.absmax": torch.ones(3, dtype=torch.bfloat16)},
            "as bitsandbytes writes them after a pass",
        ),
        ({"weight.quant_map": torch.zeros(16)}, "its 16 levels are not those of nf4"),
        ({"weight": torch.zeros(3, 1, dtype=torch.uint8)}, "is not quantized as quantize_nf4 does"),
        ({"weight.quant_state.bitsandbytes__nf4": torch.zeros(3, dtype=torch.uint8)}, "is none of bitsandbytes"),
        (parts(golden_weight(), shape=[3, 5000000]), "has shape"),
        (parts(golden_weight(), blocksize=7), "group must be a positive multiple of 8"),
    ],
)
def test_what_bitsandbytes_did_not_write_is_refused(tmp_path, change, match):
    tensors = parts(golden_weight()) | change
    if tensors["weight.absmax"].dtype == torch.bfloat16:
        del tensors["weight.nested_absmax"], tensors["weight.nested_quant_map"]
    model = nn.Sequential(nn.Linear(50, 3, bias=False))
    with pytest.raises(ValueError, match=match):
        sk.load(model, file_of(tmp_path / "model.safetensors", tensors))
    assert type(model[0]) is nn.Linear


def test_what_bitsandbytes_would_compute_wrongly_is_not_written(tmp_path):
    model, _ = tiny("distilbert", torch.float32, dim=48, n_heads=4, hidden_dim=96)
    with pytest.raises(ValueError, match=r"has no nf4 layer: call sparsekit\.quantize_ first"):
        sk.save(model, tmp_path, format="bitsandbytes")
    sk.quantize_(model)
    with pytest.raises(ValueError, match=r"has 48 outputs, 48 inputs and .*where=sparsekit\.quant\.fits_"):
        sk.save(model, tmp_path, format="bitsandbytes")
    model, _ = tiny("gpt2", torch.float32)
    sk.quantize_(model)
    with pytest.raises(ValueError, match="stands for a Conv1D, which bitsandbytes stores in another order"):
        sk.save(model, tmp_path, format="bitsandbytes")
    assert not list(tmp_path.iterdir())


def test_a_model_of_bitsandbytes_is_saved_after_a_pass_as_before(tmp_path):
    nn4 = pytest.importorskip("bitsandbytes.nn")
    from sparsekit.integrations.bitsandbytes import keep_unpacked_

    def quantized(cols):
        torch.manual_seed(0)
        layer = nn4.Linear4bit(cols, 2, quant_type="nf4", compress_statistics=False)
        layer.weight.data = torch.randn(2, cols) * torch.tensor([[100.0], [0.01]])
        return nn.Sequential(layer.to("cpu")).eval()

    model, x = quantized(128), torch.randn(3, 128)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert keep_unpacked_(model) == ("0",)
    with torch.no_grad():
        y = model(x)  # of two outputs, which bitsandbytes refuses on some CPUs
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    other = nn.Sequential(nn.Linear(128, 2))
    save_file({name: tensor.contiguous() for name, tensor in before.items()}, tmp_path / "model.safetensors")
    sk.load(other, tmp_path / "model.safetensors")
    torch.testing.assert_close(other.eval()(x), y)
    model[0].weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(ValueError, match="layer '0' has run already, and its scales are rounded"):
        keep_unpacked_(model)
