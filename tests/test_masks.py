"""Patterns, and masks stored with layers."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import sparsekit as sk
from sparsekit.masks import (
    MaskInfo,
    Pattern,
    check_masks,
    get_mask,
    get_mask_info,
    grouped,
    masked_parameters,
    remove_mask,
    set_mask,
    ungrouped,
)


@pytest.mark.parametrize("text", ["2:4", "1:4", "4:8", "32:32", "50%", "0%", "100%", "33.3%", "12.5%", "29%"])
def test_pattern_prints_as_it_was_written(text):
    assert str(Pattern.parse(text)) == text
    assert Pattern.parse(str(Pattern.parse(text))) == Pattern.parse(text)


@pytest.mark.parametrize("text", ["4:2", "0:4", "2:33", "2:4:8", "-1:4", "101%", "50", "%", "", " 2:4", None, 0.5])
def test_pattern_rejects(text):
    with pytest.raises(ValueError, match=r'a pattern is "n:m" .* got '):
        Pattern.parse(text)


@pytest.mark.parametrize("percent", range(0, 101))
def test_percent_drops_exactly_that_share(percent):
    mask = Pattern.parse(f"{percent}%").mask(torch.randn(3, 100))
    assert (~mask).sum(1).tolist() == [percent] * 3


def test_percent_rounds_down_what_it_drops():
    assert Pattern.parse("50%").mask(torch.tensor([[3.0, -1.0, 2.0]])).tolist() == [[True, False, True]]


def test_percent_of_a_convolution_counts_the_whole_output():
    score = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]])
    assert Pattern.parse("75%").mask(score).tolist() == [[[False, False], [False, True]]]


@pytest.mark.parametrize("text", ["2:4", "50%"])
def test_prune_ranks_by_the_product_with_the_scale(text):
    weight = torch.tensor([[1.0, -2.0, 3.0, -4.0]], dtype=torch.bfloat16)
    pruned, mask = Pattern.parse(text).prune(weight, torch.tensor([10.0, 1.0, 1.0, 1.0]))
    assert pruned.tolist() == [[1.0, 0.0, 0.0, -4.0]] and pruned.dtype == torch.bfloat16
    assert mask.tolist() == [[True, False, False, True]]
    assert Pattern.parse(text).prune(weight)[0].tolist() == [[0.0, 0.0, 3.0, -4.0]]


@pytest.mark.parametrize("axis", [0, 1, "flatten"])
def test_ungrouped_undoes_grouped(axis):
    weight = torch.arange(2 * 3 * 5 * 7).view(2, 3, 5, 7)
    groups = grouped(weight, axis)
    assert groups.shape == {0: (3, 5, 7, 2), 1: (2, 5, 7, 3), "flatten": (2, 105)}[axis]
    assert groups.data_ptr() == weight.data_ptr()
    assert torch.equal(ungrouped(groups.contiguous(), axis, weight.shape), weight)


@pytest.mark.parametrize(
    ("shape", "stored"), [((5, 13), 10), ((5, 6, 3, 2), 25), ((1, 1), 1), ((0, 8), 0), ((8, 0), 0)], ids=str
)
def test_stored_mask_comes_back(shape, stored):
    module = nn.Linear(1, 1)
    module.weight = nn.Parameter(torch.randn(shape))
    mask, info = torch.rand(module.weight.shape) > 0.5, MaskInfo(Pattern.parse("50%"), 1)
    assert get_mask(module) is None and get_mask_info(module) is None
    keys = list(module.state_dict())
    set_mask(module, mask, info)
    assert module.weight_mask.numel() == stored
    for held in (module, copy.deepcopy(module), module.double()):
        assert torch.equal(get_mask(held), mask) and get_mask_info(held) == info
    assert list(module.state_dict()) == keys
    remove_mask(module)
    remove_mask(module)
    assert get_mask(module) is None and get_mask_info(module) is None


def test_modules_without_weight_have_no_mask():
    assert get_mask(nn.ReLU()) is None and get_mask_info(nn.ReLU()) is None


@pytest.mark.parametrize("mask", [torch.ones(4, 5, dtype=torch.bool), torch.ones(5, 4)], ids=["shape", "dtype"])
def test_set_mask_rejects(mask):
    with pytest.raises(ValueError, match=r"mask must be bool \(5, 4\), got"):
        set_mask(nn.Linear(4, 5), mask, MaskInfo(Pattern.parse("2:4"), 1))


def masked(columns=8):
    layer = nn.Linear(columns, 4)
    set_mask(layer, torch.arange(columns).remainder(4).lt(2).expand(4, -1), MaskInfo(Pattern.parse("2:4"), 1))
    layer.weight.data.masked_fill_(~get_mask(layer), 0)
    return layer


def narrowed():
    layer = masked(16)
    layer.weight = nn.Parameter(layer.weight.detach()[:, 4:].clone())
    return layer


CHANGED = {
    "narrower": (narrowed, r"its weight has the shape \(4, 12\), and the stored mask has \(4, 16\)"),
    "torch's prune": (lambda: prune.random_unstructured(masked(), "weight", 0.5), "is computed from other"),
    "weight_norm": (lambda: nn.utils.parametrizations.weight_norm(masked()), "is computed from other"),
    "spectral_norm": (lambda: nn.utils.parametrizations.spectral_norm(masked()), "is computed from other"),
}


@pytest.mark.parametrize(("change", "reason"), CHANGED.values(), ids=CHANGED)
def test_a_mask_of_a_weight_that_changed_is_refused_by_all_that_use_it(change, reason, tmp_path):
    model = nn.Sequential(change(), nn.Linear(4, 4))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=reason):
        get_mask(model[0])
    with pytest.raises(ValueError, match=f"layer '0': .*{reason}.*call prune_ again, or forget the mask"):
        sk.keep_masks(model, torch.optim.SGD(model.parameters(), lr=0.1))
    for form in ("sparsekit", "masks"):
        with pytest.raises(ValueError, match=f"layer '0': .*{reason}"):
            sk.save(model, tmp_path / "model.safetensors", format=form)
    assert not list(tmp_path.iterdir())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    remove_mask(model[0])
    sk.save(model, tmp_path / "model.safetensors")


def test_a_weight_that_changed_its_shape_is_masked_anew_and_gets_its_old_mask_back_on_failure():
    model = nn.Sequential(narrowed(), nn.Linear(4, 4))
    bits, info = model[0].weight_mask, get_mask_info(model[0])

    def interrupted(layers):
        yield layers[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sk.prune_(model, sk.Magnitude("2:4"), progress=interrupted)
    assert torch.equal(model[0].weight_mask, bits) and get_mask_info(model[0]).shape == info.shape == (4, 16)
    sk.prune_(model, sk.Magnitude("2:4"))
    assert torch.equal(get_mask(model[0]), sk.nm_mask(model[0].weight, 2, 4))


def test_masks_of_another_parameter_have_its_shape():
    module = nn.Module()
    module.experts = nn.Parameter(torch.randn(3, 4, 8))
    mask = torch.rand(3, 4, 8) > 0.5
    set_mask(module, mask, MaskInfo(Pattern.parse("2:4"), 2), "experts")
    assert torch.equal(get_mask(module, "experts"), mask) and get_mask(module) is None
    assert masked_parameters(module) == ("experts",)
    module.experts = nn.Parameter(torch.randn(3, 8, 4))
    with pytest.raises(ValueError, match=r"layer 'moe': its experts has the shape \(3, 8, 4\)"):
        check_masks(nn.ModuleDict({"moe": module}))
