"""While a model is compressed, and back: exact undo, failures, copies."""

import copy
import pickle

import pytest
import torch
from compressing import Conv1D, assert_same, blocks, decisions, snapshot
from torch import nn

import sparsekit as sk
from sparsekit.compress import swap, tune
from sparsekit.masks import MaskInfo, Pattern, get_mask, set_mask
from sparsekit.nn import Linear24, PrepackedLinear

SLOW = 0.9


@pytest.mark.parametrize("pruned", [True, False], ids=["sparse", "dense"])
def test_round_trip_is_exact(ratios, pruned):
    model = blocks(pruned=pruned)
    model[0].up.weight.requires_grad_(False)
    model[1].down.train()
    model[1].down.weight.requires_grad_(False)
    before, x = snapshot(model), torch.randn(3, 16)
    expected = model(x)
    report = sk.compress_(model, x)
    assert set(decisions(report).values()) == {"2:4" if pruned else "prepacked"}
    assert not any(type(module) is nn.Linear for module in model.modules())
    torch.testing.assert_close(model(x), expected)
    assert sk.decompress_(model) == ("0.up", "0.down", "1.up", "1.down")
    assert_same(snapshot(model), before)
    assert torch.equal(model(x), expected)


def test_compressed_twice_changes_nothing_more(ratios):
    model = blocks()
    sk.compress_(model)
    modules = list(model.modules())
    report = sk.compress_(model)
    assert report.layers == () and list(model.modules()) == modules
    sk.decompress_(model)
    assert sk.decompress_(model) == ()


def test_one_resident_form(ratios):
    model = blocks(pruned=False)
    dense = sum(p.numel() * 4 for p in model.parameters())
    weights = [module.weight for module in model.modules() if type(module) is nn.Linear]
    report = sk.compress_(model)
    assert report.bytes_before == report.bytes_after == dense
    assert all(weight.numel() == 0 and weight.untyped_storage().nbytes() == 0 for weight in weights)


def test_a_shared_module_is_swapped_everywhere(ratios):
    model = blocks(2)
    model[1].up = model[0].up
    before, x = snapshot(model), torch.randn(4, 16)
    expected = model(x)
    report = sk.compress_(model, x)
    assert report.layers[0].calls == {4: 2}
    assert model[0].up is model[1].up and type(model[0].up) is Linear24
    torch.testing.assert_close(model(x), expected)
    sk.decompress_(model)
    assert_same(snapshot(model), before)


def test_conv1d_is_a_transposed_linear(ratios, monkeypatch):
    model = nn.Sequential(Conv1D(24, 16), Conv1D(8, 24)).eval()
    model[0].weight.data = sk.nm_prune(model[0].weight.data.t(), 2, 4)[0].t().contiguous()
    set_mask(model[0], model[0].weight != 0, MaskInfo(Pattern.parse("2:4"), 0))
    before, x = snapshot(model), torch.randn(4, 16)
    expected = model(x)
    report = sk.compress_(model, x)
    assert decisions(report) == {"0": "2:4", "1": "prepacked"}
    assert [layer.shape for layer in report.layers] == [(24, 16), (8, 24)]
    torch.testing.assert_close(model(x), expected)
    sk.decompress_(model)
    assert_same(snapshot(model), before)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, MemoryError])
@pytest.mark.parametrize("stage", ["batches", "measure", "build", "last build", "guard"])
def test_failure_leaves_the_model_as_it_was(ratios, monkeypatch, error, stage):
    def fail(*args, **kwargs):
        raise error("injected")

    def forward(model, batch):
        model(batch)
        if stage == "batches":
            fail()

    model = blocks(2).train()
    model[0].up.eval()
    model(torch.randn(3, 16)).sum().backward()
    if stage == "measure":
        monkeypatch.setattr(tune, "measure", fail)
    elif stage == "guard":
        monkeypatch.setattr(swap, "guard_saving", fail)
    elif "build" in stage:
        turns = iter(range({"build": 3, "last build": 5}[stage]))  # two are built to be measured, then four to stay
        build = Linear24.from_linear
        monkeypatch.setattr(
            Linear24, "from_linear", lambda *a, **k: build(*a, **k) if next(turns, None) is not None else fail()
        )
    before, gradients = snapshot(model), [p.grad.clone() for p in model.parameters()]
    with pytest.raises(error, match="injected"):
        sk.compress_(model, [torch.randn(3, 16)], forward=forward)
    assert_same(snapshot(model), before)
    assert_same([p.grad for p in model.parameters()], gradients)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_failing_decompress_leaves_the_model_compressed(ratios, monkeypatch):
    model, x = blocks(2), torch.randn(3, 16)
    sk.compress_(model, x)
    modules, expected = list(model.modules()), model(x)
    original, calls = Linear24.to_linear, []

    def to_linear(self):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt("injected")
        return original(self)

    with monkeypatch.context() as patch:
        patch.setattr(Linear24, "to_linear", to_linear)
        with pytest.raises(KeyboardInterrupt, match="injected"):
            sk.decompress_(model)
    assert list(model.modules()) == modules
    assert torch.equal(model(x), expected)
    assert len(sk.decompress_(model)) == 4


@pytest.mark.parametrize("pruned", [True, False], ids=["sparse", "dense"])
@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_work_and_decompress(ratios, pruned, clone):
    model, x = blocks(pruned=pruned), torch.randn(3, 16)
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    sk.compress_(model, x)
    twin = clone(model)
    assert torch.equal(twin(x), model(x))
    sk.decompress_(twin)
    assert list(twin.state_dict()) == list(state)
    assert all(torch.equal(tensor, state[key]) for key, tensor in twin.state_dict().items())
    assert not any(type(module) is nn.Linear for module in model.modules())


@pytest.mark.parametrize("pruned", [True, False], ids=["sparse", "dense"])
def test_what_happens_while_compressed_is_kept(ratios, pruned):
    model = blocks(pruned=pruned)
    other = blocks(pruned=pruned)
    sk.compress_(model)
    sk.compress_(other)
    model.load_state_dict(other.state_dict())
    model.to(torch.bfloat16)
    model.train()
    sk.decompress_(model)
    sk.decompress_(other)
    assert all(module.training for module in model.modules())
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, theirs.to(torch.bfloat16))
    assert model(torch.randn(3, 16, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_state_dict_of_prepacked_is_that_of_the_model(ratios):
    model = blocks(pruned=False)
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    sk.compress_(model)
    assert {key: tensor.tolist() for key, tensor in model.state_dict().items()} == {
        key: tensor.tolist() for key, tensor in state.items()
    }


def test_masks_stay_with_their_layers(ratios):
    model = blocks()
    masks = {name: get_mask(module) for name, module in model.named_modules() if type(module) is nn.Linear}
    sk.compress_(model)
    for name, mask in masks.items():
        assert torch.equal(get_mask(model.get_submodule(name)), mask)


class Pretrained(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = blocks(1)
        self.saved = False

    def save_pretrained(self, path):
        self.saved = True


def test_save_pretrained_is_refused_while_compressed(ratios):
    model = nn.ModuleDict({"lm": Pretrained(), "other": nn.Linear(3, 3)}).eval()
    sk.compress_(model, where=lambda name, module: name.startswith("lm"))
    for each in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with pytest.raises(RuntimeError, match=r"use sparsekit\.save, or call sparsekit\.decompress_ first"):
            each["lm"].save_pretrained("folder")
        sk.decompress_(each)
        each["lm"].save_pretrained("folder")
        assert each["lm"].saved and "save_pretrained" not in vars(each["lm"])


def test_a_model_that_stays_can_be_saved(ratios):
    ratios |= {"2:4": SLOW, "prepacked": SLOW}
    model = Pretrained().eval()
    sk.compress_(model)
    model.save_pretrained("folder")
    assert model.saved


def test_decompress_takes_layers_from_elsewhere():
    linear = nn.Linear(8, 8)
    sk.nm_prune_(linear.weight.data, 2, 4)
    model = nn.Sequential(Linear24.from_linear(linear), PrepackedLinear.from_linear(nn.Linear(8, 8)))
    assert sk.decompress_(model) == ("0", "1")
    assert torch.equal(model[0].weight, linear.weight) and type(model[1]) is nn.Linear
    foreign = nn.Sequential(PrepackedLinear(torch.zeros(8, 4), transposed=True))
    with pytest.raises(ValueError, match="'0' stands for a layer of an unknown class"):
        sk.decompress_(foreign)


def test_optimizer_keeps_its_parameters(ratios):
    model, x = blocks(1), torch.randn(3, 16)
    optimizer = torch.optim.Adam(model.parameters(), 0.1)
    model(x).sum().backward()
    optimizer.step()
    sk.compress_(model, x)
    optimizer.step()
    sk.decompress_(model)
    before = model[0].up.weight.detach().clone()
    model(x).sum().backward()
    optimizer.step()
    assert not torch.equal(model[0].up.weight, before)


def test_one_caller_at_a_time(ratios):
    model = blocks(1)
    before = snapshot(model)

    def again(items):
        sk.compress_(model)
        return items

    with pytest.raises(
        RuntimeError, match="the model is being compressed already; it can be changed when that is done"
    ):
        sk.compress_(model, progress=again)
    with pytest.raises(RuntimeError, match="the model is being compressed already"):
        sk.compress_(model, ["text"], forward=lambda model, batch: sk.decompress_(model))
    assert_same(snapshot(model), before)
    assert len(sk.compress_(model).swapped) == len(sk.decompress_(model)) == 2


def test_a_dtype_without_a_kernel_is_refused_before_anything_changes(ratios):
    model = nn.Sequential(nn.Linear(16, 16), blocks(1)).eval()
    sk.compress_(model, where=lambda name, module: name.startswith("1"))
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    for part in (model, model[1], model[1][0]):
        with pytest.raises(TypeError, match=r"is compressed and computes in .* sparsekit\.decompress_\(model\) first"):
            part.double()
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    sk.decompress_(model)
    assert model.double()(torch.randn(2, 16).double()).dtype == torch.float64


def test_hooks_on_compressed_layers_are_not_lost(ratios):
    model = blocks(1)
    sk.compress_(model)
    before = snapshot(model)
    handle = model[0].down.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"layer '0.down' cannot be replaced: it has hooks, which would be lost"):
        sk.decompress_(model)
    assert_same(snapshot(model), before)
    handle.remove()
    model[0].down.forward = model[0].down.forward
    with pytest.raises(ValueError, match=r"layer '0.down' cannot be replaced: its forward is replaced"):
        sk.decompress_(model)
    del model[0].down.forward
    assert sk.decompress_(model) == ("0.up", "0.down")
