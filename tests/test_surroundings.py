"""Every verb in every surrounding: the outcome is that of the bare call, and the model is usable afterwards."""

import itertools
import threading

import pytest
import torch
from surroundings import (
    METHODS,
    SETTING,
    SURROUNDINGS,
    VERBS,
    ambient,
    assert_usable,
    inputs,
    masks,
    packed,
    pruned,
    run,
    state_of,
    weights,
)

import sparsekit as sk
from sparsekit.nn import Compressed

LOOSE = {"autocast-bf16": 0.9, "autocast-fp16": 0.97}  # the share of mask bits that rounded inputs leave as they are


@pytest.fixture
def folder(tmp_path):
    sk.save(packed(), tmp_path / "saved.safetensors")
    return tmp_path


@pytest.mark.parametrize("surrounding", SURROUNDINGS)
@pytest.mark.parametrize("name", VERBS)
def test_the_outcome_is_that_of_the_bare_call(name, surrounding, folder, ratios):
    ratios |= {"prepacked": 1.0, "int8": 2.0, "2:4 int8": 5.0, "2:4 int8, float inputs": 4.0}
    verb = VERBS[name]
    if name.startswith("compress") and surrounding.startswith("autocast"):
        model, report = run(verb, surrounding, folder)
        assert {layer.decision for layer in report.layers} == {"plain"}  # fp32 weights, products in 16 bits
        assert all("its weight is torch.float32" in layer.reason for layer in report.layers)
        return
    bare, _ = run(verb, "", folder)
    model, _ = run(verb, surrounding, folder)
    assert [type(module) for module in model.modules()] == [type(module) for module in bare.modules()]
    assert not any(tensor.is_inference() for tensor in (*model.parameters(), *model.buffers()))
    expected, found = masks(bare), masks(model)
    assert found.keys() == expected.keys()
    share = 1.0 if verb.exact else LOOSE.get(surrounding, 1.0)
    for key in expected:
        assert (found[key] == expected[key]).float().mean() >= share, key
    if share == 1.0:
        tolerance = {"rtol": 0, "atol": 0} if verb.exact else {"rtol": 1e-4, "atol": 1e-5}
        torch.testing.assert_close(weights(model), weights(bare), **tolerance)
    if not any(isinstance(module, Compressed) for module in model.modules()):
        assert_usable(model)


@pytest.mark.parametrize("surrounding", ["contextvar", "default-float64", "autocast-bf16", "deterministic"])
@pytest.mark.parametrize("name", ["prune-magnitude", "prune-wanda", "tiers", "compress", "compress-conv"])
def test_passes_see_what_their_caller_set(name, surrounding, folder, ratios):
    verb = VERBS[name]
    with SURROUNDINGS[surrounding]():
        here = ambient()
        model = verb.start()
        verb.act(model, folder)
    assert {seen for block in (model[0], model[1]) for seen in block.seen} == {here}
    assert SETTING.get() == "lost"


@pytest.mark.parametrize(
    "surrounding", ["autocast-bf16", "autocast-fp16", "inference_mode", "default-float64", "thread"]
)
def test_a_packed_model_computes_there_as_a_dense_one(surrounding):
    dense, x, results = pruned(), inputs(), []
    for model in (dense, packed()):
        with SURROUNDINGS[surrounding](), torch.no_grad():
            results.append(model(x))
    assert results[0].dtype == results[1].dtype
    assert (results[0] - results[1]).norm() < 0.02 * results[0].norm()  # two thirds of its layers round weights


def calls_back(name, model, folder, fault):
    """Runs a verb whose every call back into the caller's code asks ``fault`` first."""

    def forward(model, batch):
        fault()
        return model(batch)

    def where(name, module):
        fault()
        return True

    def progress(items):
        for item in items:
            fault()
            yield item
            fault()

    def batches():
        for seed in (1, 2):
            fault()
            yield inputs(seed)

    class Batches:
        def __iter__(self):
            return batches()

    handles = [block.up.register_forward_hook(lambda *_: fault()) for block in (model[0], model[1])]
    handles.append(model[1].register_forward_pre_hook(lambda *_: fault()))
    try:
        if name.startswith("prune"):
            sk.prune_(
                model,
                METHODS[name.removeprefix("prune-")],
                Batches(),
                where=where,
                calibration=sk.Calibration(forward=forward),
                progress=progress,
            )
        elif name == "compress":
            sk.compress_(model, Batches(), where=where, forward=forward, progress=progress)
        elif name == "sparse_training":
            sk.sparse_training_(model, where=where)
        else:
            step = sk.tiers.Step(1, sk.tiers.Ratios(0.5, 0.5, 0.0), 0.5, 0.0, 0.0)
            options = sk.tiers.TierOptions(where=where, calibration=sk.Calibration(forward=forward))
            sk.tiers.tier_iteration(model, step, Batches(), options=options, progress=progress)
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("name", ["prune-wanda", "prune-swaps", "compress", "sparse_training", "tiers"])
def test_a_caller_that_raises_at_any_call_finds_the_model_as_it_was(name, error, folder, ratios):
    ratios["prepacked"] = 1.0
    verb, threads = VERBS[name], threading.active_count()
    for last in itertools.count(1):
        count = itertools.count(1)

        def fault(last=last, count=count):
            if next(count) == last:
                raise error("from the caller")

        model = verb.start()
        before, process = state_of(model), (ambient(), torch.is_grad_enabled())
        try:
            calls_back(name, model, folder, fault)
        except error as raised:
            assert str(raised) == "from the caller"
            assert state_of(model) == before, last
            assert (ambient(), torch.is_grad_enabled()) == process
            assert threading.active_count() == threads, last
        else:
            break
    assert last > 3  # it did call back
