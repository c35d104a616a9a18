"""Hostile files with digests that fit are refused by name, or load as something that a model can be."""

import random

import pytest
import torch
from checkpoints import contents, forge, lossy, make, mixed, tiered
from safetensors.torch import load_file, save_file
from test_checkpoint_interrupts import Experts, experts
from torch import nn

import sparsekit as sk

VALUES = [
    None,
    True,
    False,
    -1,
    0,
    1,
    2.5,
    1 << 62,
    10**400,
    "",
    "weight",
    "2:4",
    "tiers 16x16 k=10",
    "flatten",
    [],
    {},
]
VALUES += [[1], [12, 10], [[]], {"kind": "dense"}, "\ud800", "x" * 1000, "٢:٤", "1e999", [0] * 40]


def places(data, above=()):
    """Yields every place in nested JSON as the keys that lead there."""
    if above:
        yield above
    for key, value in data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ():
        yield from places(value, (*above, key))


def put(data, path, value):
    *parents, last = path
    for key in parents:
        data = data[key]
    data[last] = value


def damage(draw, structure, tensors):
    """Changes one thing in the structure or the tensors of a file."""
    kind = draw.randrange(6)
    name = draw.choice(sorted(tensors))
    tensor = tensors[name]
    if kind <= 2:
        put(structure, draw.choice(list(places(structure))), draw.choice(VALUES))
    elif kind == 3:
        del tensors[name]
    elif kind == 4:
        dtype = draw.choice([torch.uint8, torch.int64, torch.float16, torch.float64, torch.bool, torch.complex64])
        tensors[name] = torch.zeros_like(tensor, dtype=dtype)
    else:
        shape = draw.choice([(), (0,), (1,), (3, 5), (12, 2), tuple(tensor.shape)[::-1], (*tensor.shape, 1)])
        tensors[name] = torch.zeros(shape, dtype=tensor.dtype)


MODELS = {
    "mixed": (lambda: mixed(make()), lambda: make(1)),
    "tiered": (lambda: tiered(make()), lambda: mixed(make(1))),
    "lossy": (lambda: lossy(make()), lambda: tiered(make(1))),
    "experts": (experts, lambda: nn.Sequential(Experts(1))),
}


@pytest.mark.parametrize("form", ["sparsekit", "masks"])
@pytest.mark.parametrize("name", MODELS)
def test_forged_files_never_raise_anything_but_a_named_value_error(name, form, tmp_path):
    source, target = MODELS[name]
    path, good = tmp_path / "model.safetensors", source()
    sk.save(good, path, format=form)
    whole, draw = path.read_bytes(), random.Random(f"{name} {form}")
    model = target()
    if form == "masks":
        sk.save(good, tmp_path / "whole")
        sk.load(model, tmp_path / "whole", dense=True)
    refused = 0
    for _ in range(30):
        path.write_bytes(whole)
        try:
            forge(path, lambda structure, tensors: damage(draw, structure, tensors))
        except (UnicodeEncodeError, ValueError):
            continue  # cannot be written at all
        before = contents(model)
        try:
            sk.load(model, path)
        except ValueError as error:
            assert str(path) in str(error)
            assert contents(model) == before
            refused += 1
        else:
            sk.save(model, tmp_path / "again")
            sk.load(target(), tmp_path / "again")
    assert refused > 12


def test_packed_files_of_others_never_raise_anything_but_a_named_value_error(tmp_path):
    path, draw = tmp_path / "model.safetensors", random.Random(0)
    model = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 4))
    sk.prune_(model, sk.Magnitude("2:4"))
    model[0] = sk.nn.Linear24.from_linear(model[0])
    sk.save(model, path, format="sparse-24-bitmask")
    whole = load_file(path)
    for _ in range(80):
        tensors = dict(whole)
        damage(draw, {"a": 1}, tensors)
        save_file(tensors, path)
        other = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 4))
        before = contents(other)
        try:
            sk.load(other, path)
        except ValueError as error:
            assert str(path) in str(error) and contents(other) == before
