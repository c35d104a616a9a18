"""``prune_`` and ``tier_iteration``, interrupted anywhere or called twice at once, do all that they do or nothing."""

import threading

import pytest
import torch
from interrupts import assert_all_or_nothing, difference, model_state
from pruning import stack
from torch import nn

import sparsekit as sk
from sparsekit._undo import change, claiming
from sparsekit.masks import get_mask
from sparsekit.ops import unpack_bits
from sparsekit.prune import apply_mask
from sparsekit.tiers import Ratios, Step, tier_iteration


def model():
    torch.manual_seed(0)
    made = stack(16, 16, 16).train()
    sk.prune_(made[2], sk.Magnitude("1:4"))  # a mask that must come back
    return made


X = torch.randn(8, 16, generator=torch.Generator().manual_seed(1))
CALLS = {
    "magnitude": lambda model: sk.prune_(model, sk.Magnitude("2:4")),
    "one pass": lambda model: sk.prune_(model, sk.Wanda("2:4"), X, calibration=sk.Calibration(sequential=False)),
    "sequential": lambda model: sk.prune_(model, sk.SparseGPT("2:4"), [X, X]),
    "tiers": lambda model: tier_iteration(model, STEP, X, options=sk.tiers.TierOptions(goal=Ratios(0.0, 0.0, 1.0))),
}
STEP = Step(1, Ratios(0.0, 1.0, 0.0), 1.0, 0.0, 0.0)


@pytest.mark.parametrize("name", CALLS)
def test_an_interrupt_at_any_line(name):
    assert_all_or_nothing(lambda: (model(),), CALLS[name], runs=40)


def test_another_thread_is_refused():
    made, entered, left = model(), threading.Event(), threading.Event()

    def forward(model, x):
        entered.set()
        assert left.wait(10)
        return model(x)

    def first():
        sk.prune_(made, sk.Wanda("2:4"), X, calibration=sk.Calibration(forward=forward, sequential=False))

    thread = threading.Thread(target=first)
    thread.start()
    assert entered.wait(10)
    try:
        for part in (made, made[0], nn.Sequential(made[0]), nn.ParameterList([made[0].weight])):
            with pytest.raises(RuntimeError, match="the model is being pruned by another thread"):
                sk.prune_(part, sk.Magnitude("1:4"))
        with pytest.raises(RuntimeError, match="the model is being pruned by another thread"):
            tier_iteration(made, STEP, X)
        sk.prune_(model(), sk.Magnitude("2:4"))  # another model is free
    finally:
        left.set()
        thread.join()
    assert torch.equal(get_mask(made[0]), made[0].weight != 0)
    sk.prune_(made, sk.Magnitude("1:4"))


def test_every_verb_refuses_a_model_that_is_being_pruned(tmp_path):
    made, refused = model(), []
    sk.save(made, tmp_path / "model.safetensors")
    training = sk.sparse_training_(trained := model())
    verbs = [
        lambda: sk.prune_(made, sk.Magnitude("1:4")),
        lambda: tier_iteration(made, STEP, X),
        lambda: sk.reestimate_batchnorm_(made, X),
        lambda: sk.compress_(made, X),
        lambda: sk.decompress_(made),
        lambda: sk.load(made, tmp_path / "model.safetensors"),
        lambda: sk.sparse_training_(made),
    ]

    def progress(items):
        for verb in verbs:
            with pytest.raises(RuntimeError, match="the model is being pruned already"):
                verb()
            refused.append(verb)
        return items

    sk.prune_(made, sk.Magnitude("2:4"), progress=progress)
    assert refused == verbs
    with claiming(trained, "changed"):
        for verb in (training.finish, training.undo):
            with pytest.raises(RuntimeError, match="the model is being changed already"):
                verb()
    training.finish()


def test_a_call_within_a_call_is_refused():
    made = model()
    before = model_state(made)

    def forward(inner, x):
        sk.prune_(inner, sk.Magnitude("1:4"))

    with pytest.raises(RuntimeError, match="the model is being pruned already"):
        sk.prune_(made, sk.Wanda("2:4"), X, calibration=sk.Calibration(forward=forward, sequential=False))
    assert not difference(model_state(made), before)
    sk.prune_(made, sk.Magnitude("2:4"))


def test_what_an_interrupt_leaves_of_a_claim_is_free():
    made = model()

    class Lost(BaseException):
        pass

    def work(undo):
        raise Lost

    with pytest.raises(Lost):
        change(made, "pruned", work)
    assert change(made, "pruned", lambda undo: 3) == 3


def test_an_interrupt_while_undoing_loses_nothing(monkeypatch):
    made = model()
    before = model_state(made)
    left = [KeyboardInterrupt(), MemoryError()]

    def interrupted(*arguments):
        if left:
            raise left.pop()
        return unpack_bits(*arguments)

    def progress(items):
        yield from items
        monkeypatch.setattr(apply_mask, "unpack_bits", interrupted)
        raise ValueError("at the end")

    with pytest.raises((ValueError, KeyboardInterrupt, MemoryError)):
        sk.prune_(made, sk.Magnitude("2:4"), progress=progress)
    assert not left and not difference(model_state(made), before)
