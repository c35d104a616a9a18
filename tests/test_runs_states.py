"""The states of a run: what they hold, and that one which is torn, hostile or of another run changes nothing."""

import json
import shutil
from collections import Counter

import pytest
import torch
from interrupts import count_lines, interrupted
from running import CONFIG, Part, describe, records, run_steps
from torch import nn

from sparsekit._json import write_record
from sparsekit._safetensors import seal, write_tensors
from sparsekit.runs import Position, Run
from sparsekit.runs.parts import set_states
from sparsekit.runs.random_states import get_random_states, set_random_states
from sparsekit.runs.values import KEY, read_values, write_values


def spoil(folder, how):
    last = folder / "state" / "step-4"
    if how == "missing":
        (last / "part.safetensors").unlink()
    elif how == "empty":
        shutil.rmtree(last)
        last.mkdir()
    elif how == "altered":
        (last / "part.safetensors").write_bytes((last / "part.safetensors").read_bytes().replace(b"value", b"other"))
    else:
        path = last / how
        path.write_bytes(path.read_bytes()[:-9])


@pytest.mark.parametrize("how", ["missing", "empty", "altered", "state.json", "random-0.safetensors"])
def test_the_state_before_a_torn_one_is_used(tmp_path, how):
    run_steps(tmp_path, 5, save=(2, 4))
    spoil(tmp_path, how)
    run, part = run_steps(tmp_path, 2)
    assert (run.step, part.value, len(records(tmp_path))) == (2, 3, 2)
    assert "step-4 cannot be read, and is unreadable-step-4 now: " in (tmp_path / "log.txt").read_text()
    assert {path.name for path in (tmp_path / "state").iterdir()} == {"step-2", "unreadable-step-4"}


def hostile(folder, data, tensors=None):
    state = folder / "state" / "step-4"
    text = data if isinstance(data, str) else json.dumps({"version": 1, "shared": {}, "values": data})
    write_tensors(state / "part.safetensors", tensors or {}, seal(text, tensors or {}, KEY))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"tensor": "weight"}, "'weight'"),
        ({"pickle": "cos\nsystem"}, "a 'pickle' in its header is of no known kind"),
        ({"dict": [], "tuple": []}, "an object in its header is of no known kind"),
        ({"dict": [[[], 1]]}, "unhashable"),
        ({"float": {}}, "float"),
        ("[" * 10**5, "nested too deeply"),
        ('{"version": 2}', "it is not of version 1"),
    ],
)
def test_a_hostile_state_is_refused(tmp_path, data, message):
    run_steps(tmp_path, 4, save=(4,))
    hostile(tmp_path, data)
    part = Part(7)
    with pytest.raises(
        ValueError, match=r"no stored state can be read: .*part\.safetensors holds no state: "
    ) as caught:
        run_steps(tmp_path, 5, part=part)
    assert message in str(caught.value) and part.value == 7


def test_a_state_cannot_name_files_elsewhere(tmp_path):
    run_steps(tmp_path, 4, save=(4,))
    record = {"step": 4, "metrics": 0, "parts": ["../../secret"], "ranks": 1, "position": {"epoch": 0, "batch": 0}}
    write_record(tmp_path / "state" / "step-4" / "state.json", record)
    with pytest.raises(ValueError, match=r"state\.json is not the record of a state: its parts are"):
        run_steps(tmp_path, 5)


def test_other_parts_are_refused(tmp_path):
    run_steps(tmp_path, 2, save=(2,))
    with Run.open(tmp_path, CONFIG) as run, pytest.raises(ValueError, match="holds part, and this run has model"):
        run.restore(model=Part())
    with Run.open(tmp_path, CONFIG) as run, pytest.raises(RuntimeError, match=r"call restore\(model"):
        run.save()
    with pytest.raises(ValueError, match=r"must be an identifier, .* got '\.\./model'"):
        run.restore(**{"../model": Part()})


def test_optimizer_states_stay_what_they_are(tmp_path):
    layer = nn.Linear(3, 2, dtype=torch.bfloat16)
    groups = [{"params": [layer.weight], "lr": 0.1}, {"params": [layer.bias], "betas": (0.8, 0.9)}]
    optimizer = torch.optim.AdamW(groups)
    layer(torch.ones(1, 3, dtype=torch.bfloat16)).sum().backward()
    optimizer.step()
    shared = torch.ones(2)
    state = {"optimizer": optimizer.state_dict(), 1: "a", "1": float("inf"), (1, None): [True, 1, 1.0, ()]}
    state |= {"counter": Counter([5, 5]), "tied": [shared, shared], "view": shared[1:], "int": torch.tensor(3)}
    write_values(tmp_path / "x.safetensors", state)
    read = read_values(tmp_path / "x.safetensors")
    assert describe(read) == describe(state)
    assert type(read["counter"]) is Counter
    optimizer.load_state_dict(read["optimizer"])


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.Adam, torch.optim.Adagrad, torch.optim.LBFGS])
def test_an_optimizer_goes_on_exactly(tmp_path, make):
    def steps(layer, optimizer):
        for _ in range(3):
            optimizer.zero_grad()
            layer(torch.ones(1, 3)).square().sum().backward()
            optimizer.step(lambda: layer(torch.ones(1, 3)).square().sum())

    first, second = nn.Linear(3, 2), nn.Linear(3, 2)
    optimizers = [make(layer.parameters(), lr=0.1) for layer in (first, second)]
    steps(first, optimizers[0])
    for name, here, there in (("a", first, second), ("b", *optimizers)):
        write_values(tmp_path / name, here.state_dict())
        there.load_state_dict(read_values(tmp_path / name))
    for layer, optimizer in zip((first, second), optimizers, strict=True):
        steps(layer, optimizer)
    assert torch.equal(first.weight, second.weight) and torch.equal(first.bias, second.bias)


def test_what_cannot_be_stored_is_named(tmp_path):
    with pytest.raises(TypeError, match=r"x\.a\.0 must hold tensors, .*, got set"):
        write_values(tmp_path / "x.safetensors", {"a": [{1}]})
    assert not list(tmp_path.iterdir())


def test_random_states():
    states = get_random_states()
    first = torch.rand(3)
    set_random_states(states)
    assert torch.equal(torch.rand(3), first)
    with pytest.raises(ValueError, match="the random states are not those of a process"):
        set_random_states({"torch": torch.zeros(3)})


class Versioned(nn.Module):
    """A module that reads the states of its second version only."""

    _version = 2

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *rest):
        assert local_metadata == {"version": 2}


def test_the_versions_of_modules_are_kept(tmp_path):
    model = nn.Sequential(Versioned(), nn.BatchNorm1d(2))
    write_values(tmp_path / "x", {"model": model.state_dict()})
    read = read_values(tmp_path / "x")["model"]
    assert read._metadata == model.state_dict()._metadata and read._metadata["1"] == {"version": 2}
    model.load_state_dict(read)


@pytest.mark.parametrize("stride", [5, pytest.param(1, marks=pytest.mark.slow)])
def test_an_interrupt_sets_all_parts_or_none(stride):
    def make():
        layers = [nn.Linear(2, 2) for _ in range(2)]
        return {"first": layers[0], "average": layers[1], "last": Part(3)}

    def look(parts):
        return describe([*(part.state_dict() for part in parts.values()), torch.get_rng_state()])

    other, random = make(), get_random_states()
    states = {name: part.state_dict() for name, part in other.items()}
    torch.rand(1)
    parts = make()
    before = get_random_states()
    lines = count_lines(lambda: set_states(parts, states, random))
    after = look(parts)
    for line in range(0, lines, stride):
        parts = make()
        set_random_states(before)
        unset = look(parts)
        interrupted(lambda parts=parts: set_states(parts, states, random), line)
        assert look(parts) in (unset, after), line


class Fragile(Part):
    """A part that takes no state but its own."""

    def load_state_dict(self, state):
        if state != self.state_dict():
            raise IndexError("there is no such value")


def weights(layer, optimizer):
    moments = [state["momentum_buffer"] for state in optimizer.state.values()]
    return [each.tolist() for each in (layer.weight, layer.bias, *moments)]


@pytest.mark.parametrize("wrong", ["layer", "optimizer", "last", "random"])
def test_a_state_that_does_not_fit_changes_nothing(tmp_path, wrong):
    def parts():
        layer = nn.Linear(3, 2)
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
        layer(torch.ones(1, 3)).sum().backward()
        optimizer.step()
        return {"layer": layer, "optimizer": optimizer, "last": Part(3)}

    first = parts()
    with Run.open(tmp_path, CONFIG) as run:
        run.restore(**first)
        run.step = 1
        run.record(value=1)
        run.save()
    second = parts()
    if wrong == "layer":
        second["layer"].bias = nn.Parameter(torch.ones(3))  # the weight fits and would be loaded
    elif wrong == "optimizer":
        second["optimizer"].add_param_group({"params": [nn.Parameter(torch.ones(1))]})
    elif wrong == "last":
        second["last"] = Fragile()
    before, random = weights(second["layer"], second["optimizer"]), torch.get_rng_state()
    if wrong == "random":
        path = tmp_path / "state/step-1/random-0.safetensors"
        write_values(path, {**read_values(path), "python": "no state"})
    message = "the random states are not" if wrong == "random" else f"the state of {wrong} does not fit: "
    with Run.open(tmp_path, CONFIG) as run:
        with pytest.raises(ValueError, match=rf"cannot go on with .*step-1: {message}"):
            run.restore(**second)
        assert (run.step, run.position) == (0, Position()) and records(tmp_path) == [{"step": 1, "value": 1}]
        with pytest.raises(RuntimeError, match="call restore"):
            run.save()
    assert weights(second["layer"], second["optimizer"]) == before and torch.equal(torch.get_rng_state(), random)
