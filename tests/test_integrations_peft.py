"""LoRA adapters of pruned and compressed layers: merging does not change the output, and the zeros stay."""

import copy
import warnings

import pytest
import torch
from torch import nn

import sparsekit as sk
from sparsekit.masks import MaskInfo, Pattern, get_mask, set_mask
from sparsekit.nn import Linear24, PrepackedLinear, TieredLinear

peft = pytest.importorskip("peft")
from sparsekit.integrations.peft import keep_zeros_, lora_config, merge_lora  # noqa: E402

X = torch.randn(6, 32, generator=torch.Generator().manual_seed(1))


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 8))


def pruned(pattern="2:4"):
    model = network()
    sk.prune_(model, sk.Magnitude(pattern))
    return model


def without_masks(layer):
    """Returns a layer that is 2:4 by its zeros, without a mask."""
    plain = nn.Linear(layer.in_features, layer.out_features)
    plain.load_state_dict(layer.state_dict())
    return plain


def tiered(layer):
    return TieredLinear.from_linear(layer, k=10, block=(8, 16))


PACKED = {
    "dense": lambda layer: layer,
    "2:4": Linear24.from_linear,
    "2:4-without-mask": lambda layer: Linear24.from_linear(without_masks(layer)),
    "tiered": tiered,
    "tiered-without-mask": lambda layer: tiered(without_masks(layer)),
    "prepacked": PrepackedLinear.from_linear,
}
forms = pytest.mark.parametrize("pack", PACKED.values(), ids=PACKED)


def config(**arguments):
    return lora_config(**{"r": 4, "target_modules": ["0", "2"], "init_lora_weights": False, **arguments})


def train(model, steps=3):
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        model(X).square().mean().backward()
        optimizer.step()


def zeros(model):
    return [(layer.weight == 0).clone() for layer in (model[0], model[2])]


@forms
@pytest.mark.parametrize("bias", [False, True], ids=["", "lora-bias"])
def test_merging_changes_nothing_and_keeps_the_zeros(pack, bias):
    model = pruned()
    for index in (0, 2):
        model[index] = pack(model[index])
    before, kinds, start = zeros(model), [type(layer) for layer in model], model.eval()(X)
    wrapped = peft.get_peft_model(model, config(lora_bias=bias))
    train(wrapped.train())
    y = wrapped.eval()(X)
    assert not torch.allclose(y, start, atol=1e-2)
    merged = wrapped.merge_and_unload()
    torch.testing.assert_close(merged(X), y)
    assert [type(layer) for layer in merged] == kinds
    assert all(torch.equal(now, then) for now, then in zip(zeros(merged), before, strict=True))


@forms
def test_unmerges(pack):
    model = pruned()
    model[0] = pack(model[0])
    wrapped = peft.get_peft_model(model, config()).eval()
    y = wrapped(X)
    wrapped.merge_adapter()
    torch.testing.assert_close(wrapped(X), y)
    with wrapped.disable_adapter():
        torch.testing.assert_close(wrapped(X), pruned()(X))
    wrapped.unmerge_adapter() if wrapped.base_model.model[0].merged else None
    torch.testing.assert_close(wrapped(X), y)


def test_the_adapter_is_the_masked_product():
    """The expected values are W + scaling * mask * (B @ A), and its gradients."""
    model = pruned()
    mask, weight = get_mask(model[0]), model[0].weight.detach().clone()
    wrapped = peft.get_peft_model(model, config(target_modules=["0"], lora_alpha=8))
    layer = wrapped.base_model.model[0]
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    y = layer(input=X)
    expected = X @ (weight + 2.0 * mask * (b @ a)).t() + model[0].base_layer.bias
    torch.testing.assert_close(y, expected)
    grads = torch.autograd.grad(y.square().sum(), (a, b))
    torch.testing.assert_close(grads, torch.autograd.grad(expected.square().sum(), (a, b)))


def test_keeps_no_dense_copies_for_the_backward_pass():
    model = pruned()
    wrapped = peft.get_peft_model(model, config(target_modules=["0"]))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor.numel()) or tensor, lambda t: t):
        wrapped.base_model.model[0](X)
    assert max(saved, default=0) < 32 * 32


def test_two_adapters_and_dropout():
    wrapped = peft.get_peft_model(pruned(), config(lora_dropout=0.5))
    wrapped.add_adapter("other", config(r=2))
    wrapped.base_model.set_adapter(["default", "other"])
    wrapped.eval()
    y = wrapped(X)
    merged = wrapped.merge_and_unload()
    torch.testing.assert_close(merged(X), y)
    assert all(torch.equal(layer.weight != 0, get_mask(layer)) for layer in (merged[0], merged[2]))


def test_convolutions_and_transposed_layers():
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1, stride=2), nn.Flatten(1), conv1d(16, 32))
    x = torch.randn(3, 4, 4, 4)
    sk.prune_(model, sk.Magnitude("2:4"))
    for compressed in (False, True):
        twin = copy.deepcopy(model)
        if compressed:
            twin[2] = Linear24.from_linear(twin[2], transposed=True)
        wrapped = peft.get_peft_model(twin, config()).eval()
        y = wrapped(x)
        assert not torch.allclose(y, model(x), atol=1e-2)
        merged = wrapped.merge_and_unload()
        torch.testing.assert_close(merged(x), y)
        assert torch.equal(merged[0].weight != 0, get_mask(model[0]))
        assert torch.equal(merged[2].weight != 0, get_mask(model[2]))


def test_fewer_than_two_of_four():
    model = pruned("1:4")
    mask = get_mask(model[0])
    model[0] = Linear24.from_linear(model[0])
    wrapped = peft.get_peft_model(model, config(target_modules=["0"])).eval()
    y = wrapped(X)
    merged = wrapped.merge_and_unload()
    torch.testing.assert_close(merged(X), y)
    assert torch.equal(merged[0].weight != 0, mask)


def test_other_layers_get_plain_adapters():
    wrapped = peft.get_peft_model(network(), config(target_modules=["0"]))
    assert type(wrapped.base_model.model[0]) is peft.tuners.lora.Linear


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_autocast(dtype):
    model = pruned().to(dtype)
    model[0] = Linear24.from_linear(model[0])
    wrapped = peft.get_peft_model(model, config()).eval()
    y = wrapped(X.to(dtype))
    assert y.dtype == dtype and wrapped.base_model.model[0].lora_A["default"].weight.dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        merged = wrapped.merge_and_unload()
    torch.testing.assert_close(merged(X.to(dtype)), y, atol=0.05, rtol=0.05)


def test_saved_and_loaded(tmp_path):
    wrapped = peft.get_peft_model(pruned(), config()).eval()
    y = wrapped(X)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns about a model without a configuration
        wrapped.save_pretrained(tmp_path)
    loaded = lora_config(peft.LoraConfig.from_pretrained(tmp_path))
    again = peft.PeftModel.from_pretrained(pruned(), tmp_path, config=loaded).eval()
    torch.testing.assert_close(again(X), y)
    assert torch.equal(again.merge_and_unload()[0].weight != 0, get_mask(pruned()[0]))


def plain(**arguments):
    arguments = {"r": 4, "target_modules": ["0", "2"], "init_lora_weights": False, **arguments}
    return peft.get_peft_model(pruned(), peft.LoraConfig(**arguments)).eval()


def test_plain_adapters_fill_the_zeros_and_are_made_to_keep_them():
    """A plain adapter fills the zeros, and keep_zeros_ prevents that."""
    filled = plain().merge_and_unload()
    assert not (filled[0].weight == 0).any()
    wrapped = keep_zeros_(plain())
    layer = wrapped.base_model.model[0]
    layer.base_layer = Linear24.from_linear(layer.base_layer)  # as compress_ does
    y = wrapped(X)
    merged = merge_lora(wrapped)
    torch.testing.assert_close(merged(X), y)
    assert torch.equal(merged[0].weight != 0, get_mask(merged[0])) and type(merged[0]) is Linear24
    assert torch.equal(merged[2].weight != 0, get_mask(merged[2]))
    assert type(merge_lora(plain())[0]) is nn.Linear


def test_a_plain_merge_into_a_compressed_layer_raises():
    wrapped = plain()
    layer = wrapped.base_model.model[0]
    layer.base_layer = Linear24.from_linear(layer.base_layer)
    with pytest.raises(RuntimeError, match=r"cannot be written to: .* sparsekit\.integrations\.peft"):
        wrapped.merge_and_unload()


def test_refuses():
    with pytest.raises(ValueError, match=r"0: its adapter is a Linear that is no plain LoRA"):
        keep_zeros_(plain(use_dora=True))
    merged = plain()
    merged.merge_adapter()
    with pytest.raises(ValueError, match=r"0: its adapter is merged already: call unmerge_adapter\(\) first"):
        keep_zeros_(merged)
    with pytest.raises(ValueError, match="Invalid or unsupported variant combination"):
        peft.get_peft_model(pruned(), config(use_dora=True))
    with pytest.raises(ValueError, match=r"init_lora_weights must be one of .* got 'pissa'"):
        peft.get_peft_model(pruned(), config(init_lora_weights="pissa"))
    with pytest.raises(TypeError, match="takes a LoraConfig or its arguments"):
        lora_config(peft.LoraConfig(), r=3)
    broken = peft.get_peft_model(pruned(), config())
    broken.base_model.model[0].lora_B["default"].weight.data[0, 0] = torch.inf
    weight = broken.base_model.model[0].base_layer.weight.clone()
    with pytest.raises(ValueError, match="the adapter 'default' makes a weight NaN or infinite: it was not merged"):
        broken.merge_and_unload()
    assert torch.equal(broken.base_model.model[0].base_layer.weight, weight)
    with pytest.raises(ValueError, match="adapter_names is not supported beside pruned layers"):
        broken.base_model.model[2](torch.randn(2, 32), adapter_names=["default", "default"])


def test_a_merge_that_fails_changes_nothing():
    model = pruned()
    model[2] = Linear24.from_linear(model[2])
    wrapped = peft.get_peft_model(model, config()).eval()
    wrapped.base_model.model[2].lora_B["default"].weight.data[0, 0] = torch.nan
    before, modules = copy.deepcopy(wrapped.state_dict()), list(wrapped.modules())
    with pytest.raises(ValueError, match=r"2: the adapter 'default' makes a weight NaN or infinite: it was not merged"):
        merge_lora(wrapped)
    assert list(wrapped.modules()) == modules and not any(layer.merged for layer in wrapped.base_model.model[::2])
    torch.testing.assert_close(wrapped.state_dict(), before, rtol=0, atol=0, equal_nan=True)
    with pytest.raises(TypeError, match="model must be a PEFT model with LoRA adapters, got Sequential"):
        merge_lora(pruned())


def test_masks_of_other_modules_are_refused():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.Parameter(torch.randn(2, 8, 8))

        def forward(self, x):
            return x @ self.up[0]

    model = nn.Sequential(Experts(), nn.Linear(8, 8))
    set_mask(model[0], torch.rand(2, 8, 8) > 0.5, MaskInfo(Pattern.parse("50%"), 2), "up")
    arguments = {"r": 2, "target_modules": [], "target_parameters": ["0.up"]}
    with pytest.raises(ValueError, match=r"0\.up has a stored mask, and an adapter beside it would fill the"):
        peft.get_peft_model(model, lora_config(**arguments))
    with pytest.raises(ValueError, match="its adapter is a ParamWrapper that is no plain LoRA"):
        merge_lora(peft.get_peft_model(model, peft.LoraConfig(**arguments)))


def test_masks_of_half_the_weight():
    model = network()
    mask = torch.rand(32, 32) > 0.5
    with torch.no_grad():
        model[0].weight.mul_(mask)
    set_mask(model[0], mask, MaskInfo(Pattern.parse("50%"), 1))
    wrapped = peft.get_peft_model(model, config(target_modules=["0"])).eval()
    y = wrapped(X)
    merged = wrapped.merge_and_unload()
    torch.testing.assert_close(merged(X), y)
    assert torch.equal(merged[0].weight != 0, mask)
