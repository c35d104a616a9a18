"""Digests differ for values that differ in anything, and are the same in every process."""

import collections
import dataclasses
import subprocess
import sys
import threading
import warnings

import pytest
import torch
from torch import nn

from sparsekit._digest import digest, digest_batches, digest_modules, digest_tensors, name_of, without_addresses


@dataclasses.dataclass
class Batch:
    tokens: torch.Tensor
    label: int = 0


class Plain:
    def __init__(self, tokens):
        self.tokens, self.lock, self.me = tokens, threading.Lock(), self


T = torch.arange(6.0)
with warnings.catch_warnings(action="ignore"):  # torch warns that both are prototypes
    CSR = torch.eye(2).to_sparse_csr()
    NESTED = torch.nested.nested_tensor([T[:2], T[2:]], layout=torch.jagged)
VALUES = {
    "tensor": T,
    "shape": T.view(2, 3),
    "dtype": T.double(),
    "order": T.flip(0),
    "minus-zero": torch.tensor([-0.0]),
    "zero": torch.tensor([0.0]),
    "scalar": torch.tensor(0.0),
    "bits-of-zero": torch.tensor([0], dtype=torch.int32),
    "empty": torch.zeros(0, 3),
    "empty-other": torch.zeros(3, 0),
    "conjugate": torch.tensor([1j]).conj(),
    "complex": torch.tensor([1j]),
    "sparse": T.to_sparse(),
    "csr": CSR,
    "nested": NESTED,
    "list": [T, T],
    "longer": [T, T, T],
    "inner": [T, [T]],
    "mapping": {"a": T, "b": 1},
    "other-key": {"a": T, "c": 1},
    "none": None,
    "false": False,
    "int": 0,
    "float": 0.0,
    "text": "0",
    "bytes": b"0",
    "set": {1, 2},
    "dataclass": Batch(T),
    "other-field": Batch(T, 1),
    "object": Plain(T),
    "other-object": Plain(T + 1),
    "array": T.numpy(),
    "function": torch.relu,
    "class": nn.Linear,
    "torch-dtype": torch.float32,
}


def test_whatever_differs_has_another_digest():
    assert len({digest(value) for value in VALUES.values()}) == len(VALUES)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (T, T.clone().requires_grad_()),
        (T.view(2, 3).t(), T.view(2, 3).t().contiguous()),
        ({"a": T, "b": 1}, collections.OrderedDict(b=1, a=T)),
        (Plain(T), Plain(T.clone())),
        ([T, T], (T, T.clone())),
        ({3, 1, 2}, {2, 3, 1}),
    ],
)
def test_equal_values_have_one_digest(one, other):
    assert digest(one) == digest(other)


@pytest.mark.slow
def test_digests_are_those_of_every_process():
    code = (
        "import torch; from sparsekit._digest import digest\n"
        "print(digest([torch.arange(4), {'b': 1, 'a': {'x', 'y', 'z'}}, torch.relu, None]))"
    )
    value = [torch.arange(4), {"b": 1, "a": {"x", "y", "z"}}, torch.relu, None]
    said = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert said.stdout.strip() == digest(value) and len(digest(value)) == 32


def test_batches_count_in_their_order():
    found = [digest_batches(batches) for batches in ([T, T + 1], [T + 1, T], [T], [[T, T + 1]], [])]
    assert [count for count, _ in found] == [2, 2, 1, 1, 0] and len({text for _, text in found}) == 5
    assert digest_batches(iter([T, T + 1])) == found[0]


def test_models_differ_by_tensors_and_by_modules():
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    model[1].register_buffer("hidden", T, persistent=False)
    model.tied = model[0]
    tensors = digest_tensors(model)
    assert tensors.keys() == {"0.weight", "0.bias", "tied.weight", "tied.bias", "1.hidden"}
    assert tensors["tied.weight"] == tensors["0.weight"]
    before = digest_modules(model)
    model[0].weight.data = model[0].weight.data.flip(0)
    assert {name for name, each in digest_tensors(model).items() if each != tensors[name]} == {
        "0.weight",
        "tied.weight",
    }
    assert digest_modules(model) == before
    model[1] = nn.LeakyReLU(0.1)
    one = digest_modules(model)
    model[1] = nn.LeakyReLU(0.2)
    assert len({before, one, digest_modules(model)}) == 3


def test_names_without_addresses():
    assert name_of(None) is None and name_of(nn.Linear.forward) == "torch.nn.modules.linear.Linear.forward"
    assert name_of(nn.ReLU()) == "torch.nn.modules.activation.ReLU"
    assert without_addresses(f"a {object()!r} b") == "a <object object at 0x> b"
