"""compress_ and the whole model: what does not pay there is given back."""

import time

import pytest
import torch
from compressing import assert_same, blocks, decisions, snapshot
from torch import nn

import sparsekit as sk
from sparsekit.compress import whole
from sparsekit.nn import Linear24

REAL = whole.compare_passes


def test_a_slower_model_gets_its_layers_back(ratios):
    ratios["whole"] = 0.5
    model = blocks().train()
    model[0].up.weight.data[model[0].up.weight == 0] = -0.0
    before = snapshot(model)
    report = sk.compress_(model, torch.randn(3, 16))
    assert_same(snapshot(model), before)
    assert torch.signbit(model[0].up.weight[model[0].up.weight == 0]).all()
    assert report.swapped == () and report.passes == () and report.bytes_after == report.bytes_before
    why = "given back: with it a pass takes 2.00 times as long"
    for layer in report.layers:
        assert layer.why == why and layer.reason.startswith(f"{why}; 2:4: fastest")
        assert layer.kernels == {} and layer.timings and layer.bytes_after == layer.bytes_before
    assert why in str(report)


def test_only_the_kind_that_makes_it_slower_is_given_back(ratios):
    ratios["whole"] = lambda shown, over: 0.4 if "0.down" in shown - over else 1.2
    model = blocks()
    report = sk.compress_(model, torch.randn(3, 16))
    assert decisions(report) == {"0.up": "2:4", "0.down": "plain", "1.up": "2:4", "1.down": "plain"}
    assert type(model[0].up) is Linear24 and type(model[1].down) is nn.Linear
    assert [timing.ratio for timing in report.passes] == [1.2]
    assert "2.50 times as long" in report.layers[1].why
    assert sk.decompress_(model) == ("0.up", "1.up")


def test_kinds_that_pay_alone_but_not_together_are_all_given_back(ratios):
    ratios["whole"] = lambda shown, over: 1.0 if over or len(shown) == 1 else 0.9
    model = blocks(1)
    assert sk.compress_(model, torch.randn(3, 16)).swapped == ()


@pytest.mark.parametrize(("ratio", "stays"), [(0.97, True), (0.96, False)])
def test_noise_is_no_reason(ratios, ratio, stays):
    ratios["whole"] = ratio
    assert bool(sk.compress_(blocks(1), torch.randn(3, 16)).swapped) is stays


def test_a_disturbed_try_is_made_again(ratios, monkeypatch):
    tries = iter([0.5, 1.3])
    ratios["whole"] = lambda shown, over: next(tries)
    report = sk.compress_(blocks(1), torch.randn(3, 16))
    assert len(report.swapped) == 2 and report.passes[0].ratio == 1.3


def test_it_is_really_timed(ratios, monkeypatch, threads):
    """Layers that measure well alone, and are slow in the model."""
    threads(1)  # with more, a busy core makes any pass wait for milliseconds
    monkeypatch.setattr(whole, "compare_passes", REAL)
    forward = Linear24.forward

    def slow(self, input):
        time.sleep(0.002)
        return forward(self, input)

    monkeypatch.setattr(Linear24, "forward", slow)
    model, x = blocks(1), torch.randn(3, 16)
    report = sk.compress_(model, x, measure=sk.Measure(budget=1e-9))
    assert report.swapped == () and "given back" in report.layers[0].why
    monkeypatch.setattr(nn.Linear, "forward", lambda self, input: (time.sleep(0.01), input @ self.weight.t())[1])
    report = sk.compress_(model, x, measure=sk.Measure(budget=1e-9))
    assert len(report.swapped) == 2 and report.passes[0].ratio > 1.5
    assert "whole model:" in str(report)


class Peeks(nn.Module):
    """Reads what only a plain layer has."""

    def __init__(self):
        super().__init__()
        self.body, self.head = blocks(1)[0], nn.Linear(16, 16)

    def forward(self, x):
        assert isinstance(self.head, nn.Linear), "a plain head is needed"
        return self.head(self.body(x))


def test_layers_with_which_a_pass_fails_are_given_back(ratios, monkeypatch):
    monkeypatch.setattr(whole, "compare_passes", REAL)
    monkeypatch.setattr(whole, "PARITY_RATIO", 0.0)
    model, x = Peeks().eval(), torch.randn(3, 16)
    sk.prune_(model.body, sk.Magnitude("2:4"))
    report = sk.compress_(model, x, measure=sk.Measure(budget=1e-9))
    assert decisions(report) == {"body.up": "2:4", "body.down": "2:4", "head": "plain"}
    assert report.layers[2].why == "given back: with it a pass fails: AssertionError: a plain head is needed"
    model(x)


def test_a_pass_that_cannot_be_repeated_is_not_timed(ratios):
    once = iter([1])
    report = sk.compress_(blocks(1), torch.randn(3, 16), forward=lambda model, x: model(x) * next(once))
    assert len(report.swapped) == 2
    assert report.remark == "not timed, since a second pass of it fails: StopIteration"


def test_slow_passes_are_timed_on_fewer_batches(ratios, monkeypatch):
    monkeypatch.setattr(whole, "compare_passes", REAL)
    monkeypatch.setattr(whole, "PARITY_RATIO", 0.0)
    batches, runs = [torch.randn(size, 16) for size in (1, 4, 16)], []
    report = sk.compress_(
        blocks(1), batches, forward=lambda model, x: (model(x), runs.append(1)), measure=sk.Measure(budget=1e-9)
    )
    assert len(report.passes) == 1 and len(runs) == 3 + 2 + 1 + 2 * 3  # to see, to try, to warm up, and three rounds


def test_every_kind_of_batch_is_timed(ratios):
    batches = [torch.randn(size, 16) for size in (1, 1, 4, 4, 16, 64, 256)]
    assert len(sk.compress_(blocks(1), batches).passes) == 4


@pytest.mark.parametrize(
    ("arguments", "remark"),
    [
        ({}, "not timed, since there are no batches to run it on"),
        ({"measure": sk.Measure(tokens=(1, 4))}, "not timed, since there are no batches to run it on"),
        (
            {"batches": torch.ones(3, 16), "measure": sk.Measure(graphs=True)},
            "not timed, since it will run under CUDA graphs",
        ),
    ],
    ids=["usual tokens", "tokens", "graphs"],
)
def test_why_it_is_not_timed(ratios, arguments, remark):
    report = sk.compress_(blocks(1), **arguments)
    assert len(report.swapped) == 2 and report.remark == remark
    assert f"whole model: {remark}" in str(report)


class Writes(nn.Module):
    """Draws numbers, and writes into its argument."""

    def __init__(self):
        super().__init__()
        self.block = blocks(1)[0]

    def forward(self, x):
        return self.block(x.mul_(2) + torch.rand(1))


def test_passes_leave_no_trace(ratios, monkeypatch):
    monkeypatch.setattr(whole, "compare_passes", REAL)
    monkeypatch.setattr(whole, "PARITY_RATIO", 0.0)
    model, x, state = Writes().train(), torch.ones(3, 16), torch.get_rng_state()
    report = sk.compress_(model, x, measure=sk.Measure(budget=1e-9))
    assert report.swapped and torch.equal(x, torch.ones(3, 16))
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training and model.block.up.training


@pytest.mark.parametrize("how", ["wrapper", "in place", "a part"])
def test_a_compiled_model_that_has_run(ratios, how):
    torch._dynamo.reset()
    model, x = blocks(1), torch.randn(3, 16)
    expected = model(x)
    compiled = torch.compile(model, backend="eager") if how == "wrapper" else model
    if how != "wrapper":
        (model if how == "in place" else model[0]).compile(backend="eager")
    with torch.no_grad():
        compiled(x)
        report = sk.compress_(compiled, x)
        assert [layer.calls for layer in report.layers] == [{4: 1}] * 2 and len(report.swapped) == 2
        assert report.remark == "not timed, since it is compiled"
        torch.testing.assert_close(compiled(x), expected)
    assert torch._dynamo.eval_frame._stance.stance == "default"


def test_a_hook_that_a_pass_registers_keeps_its_layer(ratios):
    class Late(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(16, 16)

        def forward(self, x):
            if not self.linear._forward_hooks:
                self.linear.register_forward_hook(lambda module, args, output: output + 1)
            return self.linear(x)

    model = Late().eval()
    report = sk.compress_(model, torch.randn(3, 16))
    assert report.layers[0].reason == "it has hooks" and len(model.linear._forward_hooks) == 1
    assert not model.linear._forward_pre_hooks
