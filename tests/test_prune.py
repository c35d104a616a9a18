"""``prune_``: which weights it keeps, in every kind of layer."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sparsekit as sk
from sparsekit.masks import MaskInfo, Pattern, get_mask, get_mask_info


def linear(weight, bias=None):
    layer = nn.Linear(len(weight[0]), len(weight), bias=bias is not None)
    layer.weight.data = torch.tensor(weight)
    return layer


def test_wanda_by_hand():
    layer = linear([[1.0, -2.0, 3.0, -4.0], [4.0, 3.0, 2.0, 1.0]])
    x = torch.tensor([[3.0, 1.0, 1.0, 0.5], [-4.0, 1.0, -1.0, 0.5]])  # rms 3.54, 1, 1, 0.5
    report = sk.prune_(layer, sk.Wanda("2:4"), [x])
    # |w| * norm: 3.54 2 3 2 and 14.1 3 2 0.5
    assert layer.weight.tolist() == [[1.0, 0.0, 3.0, 0.0], [4.0, 3.0, 0.0, 0.0]]
    # Outputs (2, 17.5) and (-11, -14.5) become (6, 15) and (-7, -13).
    assert report.layers[0].error == pytest.approx(math.sqrt((16 + 6.25 + 16 + 2.25) / (4 + 306.25 + 121 + 210.25)))


def golden():
    weight = torch.tensor([[math.sin(1 + 16 * i + j) for j in range(16)] for i in range(4)], dtype=torch.float64)
    x = [
        [(math.cos(0.37 * t * (j + 1)) + 0.5 * math.sin(0.077 * (t + 1) * (j + 2))) * (1 + j % 5) for j in range(16)]
        for t in range(64)
    ]
    return linear(weight.float().tolist()), torch.tensor(x, dtype=torch.float64).float()


@pytest.mark.parametrize(
    ("method", "rows", "error"),
    [(sk.Magnitude("2:4"), "c966 936c 936c 9669", None), (sk.Wanda("2:4"), "59c6 5966 396c 3acc", 0.10763)],
    ids=["magnitude", "wanda"],
)
def test_golden_masks(method, rows, error):
    """The masks that the published implementations give; column 0 is the highest bit."""
    layer, x = golden()
    report = sk.prune_(layer, method, [x[:10], x[10:]])
    got = [int("".join(str(int(bit)) for bit in row), 2) for row in get_mask(layer).tolist()]
    assert " ".join(f"{row:04x}" for row in got) == rows
    if error:
        assert report.layers[0].error ** 2 == pytest.approx(error, abs=5e-6)


def test_percent_prunes_every_output_row():
    layer = linear([[1.0, 5.0, -6.0], [-9.0, 8.0, 7.0]])
    sk.prune_(layer, sk.Magnitude("40%"))  # floor(1.2) = 1 of 3
    assert layer.weight.tolist() == [[0.0, 5.0, -6.0], [-9.0, 8.0, 0.0]]


@pytest.mark.parametrize(
    "options", [{}, {"padding": 1}, {"stride": 2, "padding": "valid"}, {"padding": "same"}], ids=str
)
@pytest.mark.parametrize("mode", ["zeros", "reflect"])
@pytest.mark.parametrize("axis", ["input", "flatten"])
def test_conv2d(axis, mode, options):
    torch.manual_seed(0)
    conv = nn.Conv2d(6, 5, (3, 2), dilation=(1, 2), padding_mode=mode, bias=False, **options)
    x = torch.randn(10, 6, 8, 9) * torch.rand(6, 1, 1) * 10
    weight = conv.weight.detach().clone()
    padded = F.pad(x, conv._reversed_padding_repeated_twice, mode="constant" if mode == "zeros" else mode)
    unfolded = F.unfold(padded, (3, 2), dilation=(1, 2), stride=conv.stride)  # [images, in * 6, positions]
    torch.testing.assert_close(weight.flatten(1) @ unfolded, conv(x).flatten(2))
    square = unfolded.double().square().mean((0, 2))
    report = sk.prune_(conv, sk.Wanda("2:4"), [x[:4], x[4], x[5:]], axis=axis)
    if axis == "flatten":
        expected = sk.nm_mask(weight.flatten(1) * square.sqrt().float(), 2, 4).view_as(weight)
    else:
        norm = square.view(6, 6).mean(1).sqrt().float()
        expected = sk.nm_mask(weight.permute(0, 2, 3, 1) * norm, 2, 4).permute(0, 3, 1, 2)
    mask = get_mask(conv)
    assert torch.equal(mask, expected) and torch.equal(conv.weight, weight * mask)
    assert get_mask_info(conv) == MaskInfo(Pattern.parse("2:4"), 1 if axis == "input" else "flatten")
    lost, whole = (((part.flatten(1)) @ unfolded).norm().item() for part in (weight * ~mask, weight))
    assert report.layers[0].error == pytest.approx(lost / whole, rel=0.15)  # from a sample of positions
    assert mask.sum() == 5 * (6 * 4 if axis == "input" else 9 * 2)  # 6 channels: 2 of 4, and a tail of 2


def test_conv2d_percent_counts_the_whole_output():
    conv = nn.Conv2d(8, 3, 3)
    sk.prune_(conv, sk.Wanda("50%"), [torch.randn(2, 8, 5, 5)])
    assert (~get_mask(conv)).flatten(1).sum(1).tolist() == [36] * 3


def test_channels_last_weights():
    conv, x = nn.Conv2d(8, 4, 3), torch.randn(2, 8, 5, 5)
    last = copy.deepcopy(conv).to(memory_format=torch.channels_last)
    for axis in ("input", "flatten"):
        for module in (conv, last):
            sk.prune_(module, sk.Wanda("2:4"), [x], axis=axis)
        assert torch.equal(conv.weight, last.weight) and torch.equal(get_mask(conv), get_mask(last))


def test_conv1d_is_a_transposed_linear():
    pytest.importorskip("transformers")
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    conv, dense, x = Conv1D(6, 8), nn.Linear(8, 6), torch.randn(5, 3, 8)
    dense.weight.data = conv.weight.detach().t().clone()
    for axis in ("input", "flatten"):
        reports = [sk.prune_(module, sk.Wanda("2:4"), [x], axis=axis) for module in (conv, dense)]
        assert torch.equal(conv.weight.t(), dense.weight) and torch.equal(get_mask(conv).t(), get_mask(dense))
        assert get_mask_info(conv).axis == 0 and get_mask_info(dense).axis == 1
        assert reports[0].error == pytest.approx(reports[1].error)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_half_precision_weights(dtype):
    layer = nn.Linear(64, 16, dtype=dtype)
    x = (torch.randn(4, 7, 64) * 100).to(dtype)  # squares beyond float16
    weight = layer.weight.detach().clone()
    sk.prune_(layer, sk.Wanda("2:4"), [x])
    norm = x.float().square().mean((0, 1)).sqrt()
    assert torch.equal(get_mask(layer), sk.nm_prune(weight, 2, 4, scale=norm)[1])
    assert layer.weight.dtype == dtype


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        (("model", sk.Magnitude("2:4")), TypeError, "model must be a torch.nn.Module, got str"),
        ((nn.Linear(8, 8), "2:4"), TypeError, "method must be a Method such as .* got '2:4'"),
        ((nn.Linear(8, 8), sk.Wanda), TypeError, "method must be a Method such as"),
        ((nn.Linear(8, 8), sk.Wanda("2:4")), ValueError, r"Wanda\(pattern='2:4'\) needs calibration batches, got None"),
        ((nn.Linear(8, 8), sk.Wanda("2:4"), 3), TypeError, "batches must be .* got int"),
    ],
    ids=["model", "string", "class", "no-batches", "batches"],
)
def test_rejects(arguments, error, match):
    with pytest.raises(error, match=match):
        sk.prune_(*arguments)


@pytest.mark.parametrize("name", ["forward", "token_mask", "progress"])
def test_rejects_what_is_no_function(name):
    with pytest.raises(TypeError, match=f"{name} must be a function or None, got 3"):
        if name == "progress":
            sk.prune_(nn.Linear(8, 8), sk.Wanda("2:4"), torch.randn(2, 8), progress=3)
        sk.Calibration(**{name: 3})


def test_rejects_an_axis():
    with pytest.raises(ValueError, match='axis must be "input" or "flatten", got 1'):
        sk.prune_(nn.Linear(8, 8), sk.Magnitude("2:4"), axis=1)


def test_rejects_another_calibration():
    with pytest.raises(TypeError, match=r"calibration must be a Calibration such as .* got \{'sequential': False\}"):
        sk.prune_(nn.Linear(8, 8), sk.Magnitude("2:4"), calibration={"sequential": False})


@pytest.mark.parametrize("method", [sk.Magnitude, sk.Wanda])
def test_methods_reject_patterns_when_they_are_made(method):
    with pytest.raises(ValueError, match=r"a pattern is .* got '4:2'"):
        method("4:2")
