"""Saving and loading 2:4 layers that are arranged for a CPU."""

import json

import pytest
import torch
from checkpoints import TARGETS, contents, forge, make, mixed, prune, put, refuse
from safetensors import safe_open

import sparsekit as sk
from sparsekit.nn import ArrangedLinear24, Linear24, Plan, Route, RoutedLinear24

TOKENS = torch.arange(7).repeat(2)


def arranged(seed=0):
    model = prune(make(seed))
    model.first = ArrangedLinear24.from_linear(model.first, layout="input pairs")
    model.second = ArrangedLinear24.from_linear(model.second, layout="row pairs")
    return model


@pytest.mark.parametrize("target", [*TARGETS.values(), lambda: arranged(1)], ids=[*TARGETS, "same"])
def test_a_file_brings_back_weights_and_layouts(tmp_path, target):
    model, path = arranged(), tmp_path / "model.safetensors"
    sk.save(model, path)
    other = target()
    sk.load(other, path)
    assert contents(other) == contents(model)
    assert (other.first.layout, other.second.layout) == ("input pairs", "row pairs")
    assert torch.equal(other(TOKENS), model(TOKENS))
    assert other.first.trainable and sk.decompress_(other) == ("first", "second")
    assert torch.equal(other.second.weight, model.second.weight.clone())


def test_a_file_holds_the_weight_as_a_linear24_stores_it(tmp_path):
    model, plain, paths = arranged(), prune(make()), [tmp_path / "arranged", tmp_path / "plain"]
    plain.first, plain.second = (Linear24.from_linear(layer) for layer in (plain.first, plain.second))
    layers = []
    for each, path in zip((model, plain), paths, strict=True):
        sk.save(each, path)
        with safe_open(path, "pt") as file:
            layers.append(json.loads(file.metadata()["sparsekit"])["layers"])
    assert layers[0]["second"] == {**layers[1]["second"], "layout": "row pairs"} and "layout" not in layers[1]["second"]
    one, other = (safe_open(path, "pt") for path in paths)
    assert set(one.keys()) >= set(other.keys())
    assert all(torch.equal(one.get_tensor(name), other.get_tensor(name)) for name in other.keys())


def test_a_model_on_the_meta_device_and_a_dense_one(tmp_path):
    path = tmp_path / "model.safetensors"
    sk.save(model := arranged(), path)
    other = make(1).to("meta")
    other.norm = make(1).norm
    sk.load(other, path)
    assert type(other.first) is ArrangedLinear24 and torch.equal(other(TOKENS), model(TOKENS))
    sk.load(dense := make(1), path, dense=True)
    assert torch.equal(dense.first.weight, model.first.weight.clone()) and type(dense.first) is torch.nn.Linear


def test_the_plan_of_the_model_comes_before_the_layout_of_the_file(tmp_path):
    path = tmp_path / "model.safetensors"
    sk.save(arranged(), path)
    other = mixed(make(1))
    plan = Plan((Route(8, "sparse"), Route(16, "dense")))
    other.first = RoutedLinear24.from_linear(other.first).follow(plan)
    sk.load(other, path)
    assert type(other.first) is RoutedLinear24 and other.first.plan == plan


def test_other_formats(tmp_path):
    path = tmp_path / "model.safetensors"
    model = prune(make())
    model.second = ArrangedLinear24.from_linear(model.second, layout="row pairs")  # of 12 inputs
    sk.save(model, path, format="sparse-24-bitmask")
    sk.load(other := make(1), path)
    assert type(other.second) is Linear24 and torch.equal(other.second.weight, model.second.weight.clone())


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (put("layers", "first", "layout", value="rows"), "'rows', allowed is 'input pairs' or 'row pairs'"),
        (put("layers", "third", "layout", value="row pairs"), "is 'dense' in the layout 'row pairs', allowed is none"),
        (put("layers", "first", "layout", value=3), "has no 'layout' of type str"),
        (lambda _, tensors: tensors["first.bitmask"].fill_(1) is None, "does not keep exactly two of every four"),
    ],
)
def test_a_layout_that_there_is_not_is_refused(tmp_path, change, match):
    path = tmp_path / "model.safetensors"
    sk.save(arranged(), path)
    forge(path, change)
    refuse(path, match, arranged(1))
