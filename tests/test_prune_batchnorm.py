"""BatchNorm after pruning: new statistics from the batches, undone with all the rest."""

import copy

import pytest
import torch
from interrupts import assert_all_or_nothing, difference, model_state
from torch import nn
from torch.optim.swa_utils import update_bn

import sparsekit as sk

X = [torch.randn(4, 4, 6, 6, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]


def network():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(4, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3),
        nn.BatchNorm2d(8),
        nn.Dropout(0.5),
        nn.Flatten(),
        nn.Linear(32, 8),
        nn.BatchNorm1d(8),
    )
    model.train()
    with torch.no_grad():
        for x in X:
            model(x + 1)  # statistics of other data
    return model


def statistics(model):
    return {
        name: (module.running_mean.clone(), module.running_var.clone(), int(module.num_batches_tracked))
        for name, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm)
    }


def assert_close(one, other):
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-5, atol=1e-6)


def averaged(model):
    """What torch's own averaging gives, without dropout."""
    expected = copy.deepcopy(model).eval()
    for module in expected.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    update_bn(X, expected)
    return statistics(expected)


def test_the_average_over_all_batches():
    model = network()
    expected = averaged(model)
    assert sk.reestimate_batchnorm_(model, X) == ("1", "4", "8")
    assert_close(statistics(model), expected)
    assert all(module.training for module in model.modules())


def test_by_hand():
    model = nn.BatchNorm1d(1)
    sk.reestimate_batchnorm_(model, [torch.tensor([[1.0], [3.0]]), torch.tensor([[5.0], [5.0], [8.0]])])
    # means 2 and 6, unbiased variances 2 and 3
    assert (model.running_mean.item(), model.running_var.item(), int(model.num_batches_tracked)) == (4.0, 2.5, 2)


@pytest.mark.parametrize("sequential", [True, False])
def test_prune_does_it(sequential):
    model, plain = network(), network()
    report = sk.prune_(model, sk.Wanda("2:4"), X, calibration=sk.Calibration(sequential=sequential))
    other = sk.prune_(plain, sk.Wanda("2:4"), X, calibration=sk.Calibration(sequential=sequential, batchnorm=False))
    assert report.batchnorm == ("1", "4", "8") and other.batchnorm == ()
    assert "re-estimated the statistics of 1, 4, 8" in str(report) and "re-estimated" not in str(other)
    assert report.to_json()["batchnorm"] == ("1", "4", "8")
    assert_close(statistics(plain), statistics(network()))
    assert_close(statistics(model), averaged(plain))


def test_only_after_what_was_pruned():
    model, before = network(), statistics(network())
    report = sk.prune_(model, sk.Magnitude("2:4"), X, where=lambda name, _: name == "3")
    after = statistics(model)
    assert report.batchnorm == ("4", "8")
    assert_close({"1": after["1"]}, {"1": before["1"]})
    assert not torch.equal(after["4"][0], before["4"][0])
    assert sk.prune_(network(), sk.Magnitude("2:4")).batchnorm == ()  # without batches


def test_frozen_and_untracked_are_left():
    model = network()
    model[4].eval()
    model[8] = nn.BatchNorm1d(8, track_running_stats=False)
    before = statistics(nn.Sequential(model[4]))
    assert sk.reestimate_batchnorm_(model, X) == ("1",)
    assert_close(statistics(nn.Sequential(model[4])), before)
    assert not model[4].training and model[1].training
    assert sk.reestimate_batchnorm_(model.eval(), X) == ("1", "4")  # of a model that does not train, none is frozen


def test_one_value_per_channel_does_not_count():
    model = nn.BatchNorm1d(4)
    before = statistics(nn.Sequential(model))
    assert sk.reestimate_batchnorm_(model, [torch.randn(1, 4)]) == ()
    assert_close(statistics(nn.Sequential(model)), before)
    x = torch.randn(5, 4)
    sk.reestimate_batchnorm_(model, [x[:1] * 100, x])
    torch.testing.assert_close(model.running_mean, x.mean(0))


def test_one_that_is_not_reached_is_left():
    model = nn.ModuleDict({"used": nn.BatchNorm1d(4), "unused": nn.BatchNorm1d(4)})
    assert sk.reestimate_batchnorm_(model, [torch.randn(3, 4)], forward=lambda m, x: m["used"](x)) == ("used",)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision(dtype):
    model = network().to(dtype)
    sk.reestimate_batchnorm_(model, [x.to(dtype) for x in X])
    expected = averaged(network())
    for name, (mean, var, _) in statistics(model).items():
        assert mean.dtype == dtype
        torch.testing.assert_close(mean.float(), expected[name][0], rtol=0.1, atol=0.05)
        torch.testing.assert_close(var.float(), expected[name][1], rtol=0.1, atol=0.05)
    with pytest.raises(ValueError, match="an input of the BatchNorm model is NaN, infinite or too large"):
        sk.reestimate_batchnorm_(nn.BatchNorm1d(2).half(), [torch.tensor([[6e4, 1.0], [-6e4, 2.0]]).half()])


def test_failures_leave_the_statistics():
    model = network()
    before = model_state(model)
    with pytest.raises(ValueError, match="an input of the BatchNorm 1 is NaN, infinite or too large"):
        sk.reestimate_batchnorm_(model, [X[0] * float("nan")])
    assert not difference(model_state(model), before)
    with pytest.raises(ValueError, match="batches gave no batch"):
        sk.reestimate_batchnorm_(model, [])
    with pytest.raises(TypeError, match="iterable more than once"):
        sk.prune_(model, sk.Wanda("2:4"), iter(X), calibration=sk.Calibration(sequential=False))
    assert not difference(model_state(model), before)
    calls = []

    def forward(model, x):
        calls.append(model[1].running_mean)
        if len(calls) == 5:  # the second batch of the last pass
            raise KeyboardInterrupt
        return model(x)

    with pytest.raises(KeyboardInterrupt):
        sk.prune_(model, sk.Wanda("2:4"), X, calibration=sk.Calibration(sequential=False, forward=forward))
    assert not difference(model_state(model), before)


def test_an_interrupt_at_any_line():
    assert_all_or_nothing(lambda: (network(),), lambda model: sk.reestimate_batchnorm_(model, X[:2]), runs=40)


def test_made_in_inference_mode_and_under_other_defaults():
    with torch.inference_mode():
        model = network()
    sk.reestimate_batchnorm_(model, X)
    assert_close(statistics(model), averaged(network()))
    model = network()
    with torch.inference_mode(), torch.device("meta"), torch.autocast("cpu", torch.bfloat16, enabled=False):
        sk.reestimate_batchnorm_(model, X)
    assert not any(buffer.is_inference() for buffer in model.buffers())
    assert_close(statistics(model), averaged(network()))


def test_it_normalizes_by_the_batch_meanwhile():
    x, seen = torch.randn(6, 4) * 5 + 3, []
    sk.reestimate_batchnorm_(nn.BatchNorm1d(4), [x], forward=lambda model, x: seen.append(model(x)))
    torch.testing.assert_close(seen[0], nn.BatchNorm1d(4)(x).detach())
