"""Layers that compress_ leaves alone, and the reasons it gives."""

from functools import partial

import pytest
import torch
from compressing import blocks, decisions, reasons
from torch import nn

import sparsekit as sk
from sparsekit._state import get_original
from sparsekit.compress import candidates


class Hostile(nn.Module):
    """One layer of every kind that must stay, by the reason why."""

    def __init__(self):
        super().__init__()

        class MyLinear(nn.Linear):
            pass

        self.embedding = nn.Embedding(8, 8)
        self.tied = nn.Linear(8, 8, bias=False)
        self.tied.weight = self.embedding.weight
        self.subclass = MyLinear(8, 8)
        self.hooked = nn.Linear(8, 8)
        self.hooked.register_forward_hook(lambda module, args, output: None)
        self.parametrized = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))
        self.replaced_forward = nn.Linear(8, 8)
        self.replaced_forward.forward = lambda x: x
        self.extra = nn.Linear(8, 8)
        self.extra.lora = nn.Linear(8, 8)
        self.double = nn.Linear(8, 8, dtype=torch.float64)
        self.meta = nn.Linear(8, 8, device="meta")
        self.empty = nn.Linear(8, 8)
        self.empty.weight = nn.Parameter(torch.zeros(0, 8))
        self.attention = nn.MultiheadAttention(8, 2)
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16)
        self.lonely = nn.Linear(8, 8)
        self.good = nn.Linear(8, 8)

    def forward(self, x):
        return self.good(x)


def test_hostile_layers_stay(ratios):
    model = Hostile().eval()
    modules = list(model.modules())
    found = reasons(sk.compress_(model, torch.randn(4, 8)))
    for name, reason in {
        "tied": "tied to embedding.weight",
        "subclass": "MyLinear may compute something else",
        "hooked": "hooks",
        "parametrized": "Parametrized",
        "replaced_forward": "forward is replaced",
        "extra": "also holds lora",
        "double": "float64",
        "meta": "meta device",
        "empty": "empty",
        "attention.out_proj": "may compute something else|reads its weight",
        "encoder.linear1": "TransformerEncoderLayer reads its weight",
        "encoder.linear2": "TransformerEncoderLayer reads its weight",
        "lonely": "the batches do not run it",
    }.items():
        assert any(part in found[name] for part in reason.split("|")), (name, found[name])
    assert [old for old, new in zip(modules, model.modules(), strict=True) if old is not new] == [
        get_original(model.good)
    ]


@pytest.mark.parametrize("register", ["register_hook", "register_post_accumulate_grad_hook"])
def test_hooks_of_a_weight_that_is_trained_are_not_lost(ratios, register):
    model, seen = blocks(1).train(), []
    handle = getattr(model[0].up.weight, register)(lambda _: seen.append(True))
    report = sk.compress_(model)
    assert reasons(report)["0.up"] == "its weight has hooks, and is trained" and report.swapped == ("0.down",)
    model(torch.randn(3, 16)).sum().backward()
    assert seen == [True]
    assert "0.up" in sk.compress_(model.eval()).swapped  # where nothing calls them
    handle.remove()


def test_other_dtypes_than_the_weight_stay(ratios):
    model = blocks(1)
    with torch.autocast("cpu", torch.bfloat16):
        report = sk.compress_(model, torch.randn(4, 16))
    assert all("runs in torch.bfloat16, its weight is torch.float32" in reason for reason in reasons(report).values())


def test_the_model_itself_stays(ratios):
    report = sk.compress_(nn.Linear(8, 8).eval())
    assert "model itself" in report.layers[0].reason


def test_not_24_and_masks_that_lie(ratios):
    model = blocks(1)
    model[0].up.weight.data[0] = 1
    report = sk.compress_(model)
    assert "2:4: its weight is not zero where its mask drops it" in report.layers[0].reason
    assert decisions(report) == {"0.up": "prepacked", "0.down": "2:4"}
    assert (
        "tiered: its weight is not zero where its mask drops it (8 of 256): it was trained" in report.layers[0].reason
    )
    assert "\n1 with a stored mask whose weight is not zero where its mask drops it: it was trained or" in str(report)
    report = sk.compress_(blocks(1, pruned=False))
    assert "2:4: not 2:4" in report.layers[0].reason


def test_what_is_24_only_by_chance(ratios):
    model = nn.Sequential(nn.Linear(3, 8, bias=False), nn.Linear(8, 8, bias=False)).eval()
    model[1].weight.data.zero_()
    report = sk.compress_(model)
    assert set(decisions(report).values()) == {"prepacked"}
    assert "2:4: 3 inputs are less than a group of four" in report.layers[0].reason
    assert "2:4: all zeros, and has no mask that says so" in report.layers[1].reason


class Holds(nn.Module):
    """Holds its layers in other ways besides."""

    def __init__(self):
        super().__init__()
        self.listed, self.bound, self.wrapped, self.closed, self.good = (nn.Linear(8, 8) for _ in range(5))
        self.extra = {"layers": [(self.listed,)]}
        self.call = self.bound.forward
        self.later = partial(self.wrapped, input=torch.ones(2, 8))
        self.closure = lambda x, layer=self.closed: layer(x)

    def forward(self, x):
        x = self.call(self.extra["layers"][0][0](x)) + self.later()
        return self.good(self.closure(x))


def test_layers_that_are_held_elsewhere_too(ratios):
    model, x = Holds().eval(), torch.randn(2, 8)
    expected = model(x)
    report = sk.compress_(model, x)
    assert reasons(report) == {
        "listed": "Holds.extra holds it outside of its modules",
        "bound": "Holds.call holds it outside of its modules",
        "wrapped": "Holds.later holds it outside of its modules",
        "closed": reasons(report)["closed"],
        "good": reasons(report)["good"],
    }
    assert report.swapped == ("good",) and report.layers[3].why.startswith("given back: a pass calls the plain layer")
    torch.testing.assert_close(model(x), expected)
    assert not vars(model.closed).keys() & {"forward"}


def test_what_a_pass_calls_plain_stays_given_back_when_others_return(ratios):
    model, asked = nn.Sequential(Holds(), nn.Linear(8, 4)).eval(), []
    ratios["whole"] = lambda shown, over: asked.append(shown) or (0.5 if "1" in shown - over else 1.2)
    report = sk.compress_(model, torch.randn(2, 8))
    assert report.swapped == ("0.good",) and not any("0.closed" in shown for shown in asked)
    assert [layer.why for layer in report.layers if layer.name == "1"] == [
        "given back: with it a pass takes 2.00 times as long"
    ]


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace:DeprecationWarning")
def test_a_model_with_a_scripted_part(ratios):
    x = torch.ones(2, 8)
    model = nn.Sequential(torch.jit.trace(nn.Linear(8, 8), x), nn.Linear(8, 8)).eval()
    expected = model(x)
    assert sk.compress_(model, x).swapped == ("1",)
    torch.testing.assert_close(model(x), expected)
    assert sk.decompress_(model) == ("1",)


def test_nested_inputs_are_counted(ratios):
    model = nn.Sequential(nn.Linear(8, 8)).eval()
    x = torch.nested.nested_tensor([torch.randn(3, 8), torch.randn(4, 8)], layout=torch.jagged)
    report = sk.compress_(model, x)
    assert report.layers[0].calls == {8: 1} and report.swapped == ("0",)


def test_without_a_compiled_kernel_24_is_not_offered(ratios, monkeypatch):
    none = {"cpu": "reference"}
    monkeypatch.setattr(candidates, "backends", lambda: {"linear24": none, "linear_tiered": none})
    report = sk.compress_(blocks(1))
    assert set(decisions(report).values()) == {"prepacked"}
    assert "no compiled 2:4 kernel" in report.layers[0].reason


def test_16_bit_goes_where_onednn_computes_in_it(ratios):
    model = blocks(1, pruned=False).bfloat16()
    report = sk.compress_(model, torch.randn(4, 16, dtype=torch.bfloat16))
    expected = "prepacked" if torch.ops.mkldnn._is_mkldnn_bf16_supported() else "plain"
    assert set(decisions(report).values()) == {expected}
