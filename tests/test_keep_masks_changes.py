"""What else writes the weights is found out, and what is replaced under keep_masks is followed or refused."""

import copy
import gc
import io
import logging

import pytest
import torch
from torch import nn

import sparsekit as sk
from sparsekit.masks import MaskInfo, Pattern, get_mask, remove_mask, set_mask
from tests.interrupts import assert_all_or_nothing, model_state
from tests.keeping import Codes, Slow, X, adamw, kept, pruned, train


@pytest.fixture
def model():
    return pruned()


def test_a_wrapper_that_moves_weights_is_found_out_at_the_next_step(model):
    wrapped = Slow(adamw(model))
    keeper = sk.keep_masks(model, wrapped)
    train(model, wrapped, 2)
    before = model[0].weight.detach().clone()
    with pytest.raises(ValueError, match=r"64 of 64 dropped weights of layer '0' are not zero .* call apply\(\)"):
        train(model, wrapped, 1)
    assert torch.equal(model[0].weight, before)
    for _ in range(4):
        keeper.apply()
        train(model, wrapped, 1)
    keeper.apply()
    assert kept(model)


def test_and_at_the_end(model):
    wrapped = Slow(adamw(model))
    with pytest.raises(ValueError, match="dropped weights of layer '0' are not zero"), sk.keep_masks(model, wrapped):
        train(model, wrapped, 2)
    with pytest.raises(KeyError, match="mine"), sk.keep_masks(model, wrapped):  # no other error hides the caller's
        train(model, wrapped, 2)
        raise KeyError("mine")
    assert not wrapped.inner._optimizer_step_post_hooks and not wrapped.inner._optimizer_step_pre_hooks


@pytest.mark.parametrize("write", ["data", "swap", "load", "other"])
def test_whatever_else_writes_is_found_out(model, write):
    dense = {name: torch.ones_like(tensor) for name, tensor in model.state_dict().items()}
    optimizer, other = adamw(model), torch.optim.SGD(model[2].parameters(), lr=0.1, momentum=0.9)
    with (
        pytest.raises(ValueError, match=r"of 64 dropped weights|of 16 dropped weights"),
        sk.keep_masks(model, optimizer),
    ):
        if write == "data":
            model[0].weight.data.add_(1)
        elif write == "swap":
            model[0].weight.data = dense["0.weight"]
        elif write == "load":
            model.load_state_dict(dense)
        else:
            model(X).sum().backward()
            model[2].weight.grad.add_(1)
            other.step()
        train(model, optimizer, 1)


def test_a_step_that_failed_is_tried_again(model):
    optimizer = adamw(model)
    with sk.keep_masks(model, optimizer):
        with pytest.raises(KeyError, match="closure"):
            optimizer.step(lambda: {}["closure"])
        train(model, optimizer)
        assert kept(model)
        model[0].weight.data.add_(1)
        with pytest.raises(ValueError, match="64 of 64"):
            optimizer.step()
        model[0].weight.data.mul_(get_mask(model[0]))


def test_a_quantized_weight(model):
    weight = Codes(torch.randn(4, 8))
    model[2].weight = nn.Parameter(weight)
    with pytest.raises(ValueError, match="the weight of layer '2' is a Codes, in which a mask cannot be kept"):
        sk.keep_masks(model, adamw(model))
    model[2].weight.requires_grad_(False)
    optimizer = torch.optim.AdamW(model[0].parameters(), lr=0.1)
    with sk.keep_masks(model, optimizer):
        train(model, optimizer)
    assert torch.equal(model[0].weight != 0, get_mask(model[0]))


def test_a_parameter_replaced(model):
    optimizer = adamw(model)
    with pytest.raises(ValueError, match="layer '2' has another parameter"), sk.keep_masks(model, optimizer):
        model[2].weight = nn.Parameter(torch.randn(4, 8))
        train(model, optimizer, 1)
    with (
        pytest.raises(ValueError, match="layer '2' has another parameter"),
        sk.keep_masks(model, adamw(model)) as keeper,
    ):
        del model[2].weight
        keeper._optimizers[0].step()


def test_a_mask_replaced_is_followed(model):
    optimizer = adamw(model)
    with sk.keep_masks(model, optimizer):
        train(model, optimizer)
        sk.prune_(model, sk.Magnitude("1:4"))
        train(model, optimizer)
        assert kept(model) and get_mask(model[0]).float().mean() == 0.25
        assert not optimizer.state[model[0].weight]["exp_avg"][~get_mask(model[0])].any()
    with sk.keep_masks(model, optimizer) as keeper:
        model[0].weight.data.uniform_(1, 2)
        sk.prune_(model[0], sk.Magnitude("2:4"))  # keeps others
        keeper.apply()
        assert torch.equal(model[0].weight != 0, get_mask(model[0]))
    with pytest.raises(ValueError, match="layer '0' has lost its mask"), sk.keep_masks(model, optimizer):
        remove_mask(model[0])
        train(model, optimizer, 1)


def test_gradients_that_no_backward_pass_makes(model):
    """They are masked before the step: an optimizer that mixes entries would carry them to those that are kept."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    with sk.keep_masks(model, optimizer):
        gradients = torch.autograd.grad(model(X).square().mean(), list(model.parameters()))
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            parameter.grad = gradient.clone()
        optimizer.step()
    for layer in (model[0], model[2]):
        buffer = optimizer.state[layer.weight]["momentum_buffer"]
        assert torch.equal(buffer != 0, get_mask(layer)) and torch.equal(layer.weight != 0, get_mask(layer))


def test_a_move_is_followed(model):
    optimizer = adamw(model)
    with sk.keep_masks(model, optimizer):
        model.double()  # parameters stay the objects they are, masks do not
        for module in model:
            for name, buffer in module.named_buffers():
                module._buffers[name] = buffer.clone()
        optimizer.zero_grad()
        model(X.double()).sum().backward()
        optimizer.step()
        assert kept(model)


def test_a_parameter_of_two_layers_obeys_both(model):
    twin = nn.Linear(16, 8)
    twin.weight = model[0].weight
    set_mask(twin, torch.rand(8, 16) > 0.3, MaskInfo(Pattern.parse("50%"), 1))
    both = nn.ModuleList([model, twin])
    optimizer = adamw(both)
    with sk.keep_masks(both, optimizer):
        train(model, optimizer)
    assert torch.equal(twin.weight != 0, get_mask(twin) & get_mask(model[0]))


def test_a_mask_of_another_parameter():
    module = nn.Module()
    module.experts = nn.Parameter(torch.randn(2, 4, 8))
    mask = torch.rand(2, 4, 8) > 0.5
    set_mask(module, mask, MaskInfo(Pattern.parse("50%"), 2), "experts")
    optimizer = adamw(module)
    with sk.keep_masks(module, optimizer):
        module.experts.square().sum().backward()
        optimizer.step()
    assert torch.equal(module.experts != 0, mask)
    module.experts.data.add_(1)
    keeper = sk.keep_masks(module, optimizer)
    module.experts.data.add_(1)
    with pytest.raises(ValueError, match="dropped weights of 'experts' of '' are not zero"):
        keeper.remove()


def test_two_keepers(model):
    optimizer, other = adamw(model), torch.optim.SGD(model.parameters(), lr=0.1)
    with sk.keep_masks(model, optimizer), sk.keep_masks(model, optimizer), sk.keep_masks(model, other):
        train(model, optimizer)
        train(model, other)
        train(model, optimizer)
    assert kept(model)


def test_copies_know_nothing_of_it(model):
    optimizer = adamw(model)
    with sk.keep_masks(model, optimizer):
        train(model, optimizer)
        file = io.BytesIO()
        torch.save((model, optimizer), file)
        file.seek(0)
        twins = [(copy.deepcopy(model), None), torch.load(file, weights_only=False)]
        for twin, its in twins:
            train(twin, its or adamw(twin))
            assert not torch.equal(twin[0].weight != 0, get_mask(twin[0]))
        train(model, optimizer)
        assert kept(model)


def test_nothing_is_left_when_the_optimizer_is_gone(model):
    sk.keep_masks(model, adamw(model))
    gc.collect()
    assert not model[0].weight._post_accumulate_grad_hooks


def test_says_what_it_zeroed(model, caplog):
    with caplog.at_level(logging.WARNING, "sparsekit"):
        sk.keep_masks(model, adamw(model)).remove()
        assert not caplog.records
        train(model, adamw(model), 1)
        sk.keep_masks(model, adamw(model))
    assert [record.getMessage() for record in caplog.records] == [
        "keep_masks zeroed 80 weights that the stored masks drop: they were trained or merged without it"
    ]


def test_rejects(model):
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got list"):
        sk.keep_masks([model], adamw(model))
    with pytest.raises(TypeError, match=r"optimizer must be .* got list"):
        sk.keep_masks(model, [])
    model.requires_grad_(False)
    with pytest.raises(
        ValueError, match=r"none of the masked weights, which are all frozen \(requires_grad is False\)"
    ):
        sk.keep_masks(model, torch.optim.SGD([nn.Parameter(torch.zeros(2))]))
    model.requires_grad_(True)
    nn.utils.parametrizations.weight_norm(model[2])
    with pytest.raises(
        ValueError, match="layer '2': its weight has a stored mask and is computed from other parameters"
    ):
        sk.keep_masks(model, adamw(model))
    with torch.device("meta"):
        meta = nn.Linear(8, 8)
        set_mask(meta, torch.ones(8, 8, dtype=torch.bool), MaskInfo(Pattern.parse("50%"), 1))
    with pytest.raises(ValueError, match="layer '' is on the meta device: load its weights first"):
        sk.keep_masks(meta, adamw(meta))


def test_an_interrupted_call_changes_nothing():
    def trained():
        model = pruned()
        optimizer = adamw(model)
        train(model, optimizer, 1)
        return model, optimizer

    def look(model, optimizer):
        states = {
            f"{index}.{key}": value.clone()
            for index, state in enumerate(optimizer.state.values())
            for key, value in state.items()
        }
        hooks = len(optimizer._optimizer_step_pre_hooks) + len(optimizer._optimizer_step_post_hooks)
        grads = [len(parameter._post_accumulate_grad_hooks or {}) for parameter in model.parameters()]
        return model_state(model) | states | {"hooks": [hooks, grads]}

    assert_all_or_nothing(trained, sk.keep_masks, look, runs=60)
