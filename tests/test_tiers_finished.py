"""The folder of finished iterations: only the same call goes on from it, and only from files that are whole."""

import copy
import json
import random

import pytest
import torch
from pruning import assert_restored, snapshot, stack

from sparsekit import Calibration
from sparsekit._json import write_record
from sparsekit.tiers import Ratios, Step, TierMap, TierOptions, load_tier_maps, progressive_tiers, save_tier_maps

STEPS = (Step(1, Ratios(0.5, 0.5, 0.0), 0.5, 0.0, 1), Step(2, Ratios(0.5, 0.25, 0.25), 0.0, 0.25, 1))
X = [torch.randn(9, 32, generator=torch.Generator().manual_seed(1)), torch.ones(3, 32)]


def run(model, folder, batches=X, schedule=STEPS, **options):
    return progressive_tiers(model, schedule, batches, lambda model, step: None, folder=folder, **options)


@pytest.fixture(scope="module")
def dense():
    return stack(32, 32, 32)


@pytest.fixture
def kept(dense, tmp_path):
    run(copy.deepcopy(dense), tmp_path)
    return tmp_path


def start(model):
    tiers = torch.tensor([[0, 0], [0, 1]], dtype=torch.uint8)
    return {name: TierMap(tiers, (32, 32)) for name in ("0", "2")}


def permuted(model):
    model[2].weight.data = model[2].weight.data.flip(0)
    return model


CHANGES = {
    "k": {"options": TierOptions(k=9)},
    "block": {"options": TierOptions(block=(16, 32))},
    "criterion": {"options": TierOptions(criterion="published")},
    "allocation": {"options": TierOptions(allocation="model")},
    "reconstruct": {"options": TierOptions(reconstruct=True)},
    "goal": {"options": TierOptions(goal=STEPS[1].ratios)},
    "layers": {"options": TierOptions(where=lambda name, module: name == "0")},
    "forward": {"options": TierOptions(calibration=Calibration(forward=lambda model, batch: model(batch)))},
    "batches": {"batches": X[::-1]},
    r"weights \(2.weight\)": {"model": permuted},
    "tier_maps": {"tier_maps": start},
}


@pytest.mark.parametrize("what", CHANGES)
def test_another_call_is_refused(dense, kept, what):
    options = dict(CHANGES[what])
    model = options.pop("model", lambda model: model)(copy.deepcopy(dense))
    if "tier_maps" in options:
        options["tier_maps"] = start(model)
    before = snapshot(model)
    with pytest.raises(ValueError, match=rf"call\.json belongs to another run: it differs in {what}; name another"):
        run(model, kept, **options)
    assert_restored(model, before)


def test_the_same_call_and_a_longer_schedule_go_on(dense, tmp_path):
    model, again = copy.deepcopy(dense), copy.deepcopy(dense)
    run(copy.deepcopy(dense), tmp_path, schedule=STEPS[:1])
    maps, reports = run(model, tmp_path)
    assert [report.step for report in reports] == list(STEPS)
    found, told = run(again, tmp_path)
    assert told == reports and all(torch.equal(found[name].tiers, maps[name].tiers) for name in maps)
    assert torch.equal(again[2].weight, model[2].weight)


def test_numbers_that_json_has_not_come_back(dense, tmp_path):
    metrics = iter([float("inf"), float("nan")])
    run(copy.deepcopy(dense), tmp_path, evaluate=lambda model: next(metrics))
    assert json.loads((tmp_path / "iteration-1" / "report.json").read_text())["metric"] == "inf"
    _, (first, second) = run(copy.deepcopy(dense), tmp_path)
    assert first.metric == float("inf") and second.metric != second.metric


@pytest.mark.parametrize("name", ["report.json", "call.json", "model.safetensors", "tier_maps.safetensors"])
def test_damage_is_refused_by_name(dense, kept, name):
    path, draw = kept / "iteration-2" / name, random.Random(0)
    whole = path.read_bytes()
    places = [0, 8, len(whole) - 2, *draw.sample(range(len(whole)), 12)]
    damaged = [whole[:at] + bytes([whole[at] ^ draw.randrange(1, 256)]) + whole[at + 1 :] for at in places]
    for content in (*damaged, b"", whole[:-9], b"[]", b'{"k": NaN}', b"[" * 100_000):
        path.write_bytes(content)
        model = copy.deepcopy(dense)
        before = snapshot(model)
        with pytest.raises(ValueError, match=name):
            run(model, kept)
        assert_restored(model, before)
    path.unlink()
    if name != "report.json":
        with pytest.raises(ValueError, match=name):
            run(copy.deepcopy(dense), kept)


WRONG = {
    "step": 3,
    "ratios": [1, 2],
    "sparsity": None,
    "demoted": [],
    "error": "much",
    "metric": [],
    "seconds": [1.0],
}


@pytest.mark.parametrize("key", WRONG)
def test_reports_of_wrong_types_are_refused(dense, kept, key):
    path = kept / "iteration-1" / "report.json"
    data = json.loads(path.read_text())
    del data["sha256"]
    write_record(path, {**data, key: WRONG[key]})
    with pytest.raises(ValueError, match=r"report\.json is not the report of an iteration"):
        run(copy.deepcopy(dense), kept)


def test_the_folder_is_tried_before_the_work(dense, tmp_path):
    (tmp_path / "file").touch()
    seen = []
    for folder in (tmp_path / "file", "/proc/below"):
        with pytest.raises(OSError, match=r"file|/proc/below"):
            run(
                copy.deepcopy(dense),
                folder,
                options=TierOptions(calibration=Calibration(forward=lambda *_: seen.append(1))),
            )
    assert not seen


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"layers": []}, "its layers are not those of its tensors"),
        ({"layers": {"a": []}}, "layer 'a' needs shape, block and k, got \\[\\]"),
        ({"layers": {"b": {}}}, "its layers are not those of its tensors"),
        ({"version": 1}, "it is of version 1, this release reads 2"),
        ([], "it is of version None"),
        ({"k": 2.5}, "layer 'a': k must be an integer, got 2.5"),
        ({"k": True}, "layer 'a': k must be an integer, got True"),
        ({"k": -1}, "layer 'a': k must be from 0 to 256"),
        ({"shape": [16, True]}, "layer 'a': shape must be a tuple of two integers"),
        ({"shape": [1 << 60, 1 << 60]}, "tiers must have shape"),
        ({"shape": [-5, 16]}, "shape must not be negative"),
        ({"shape": 16}, "shape must be a tuple of two integers, rows and columns, got 16"),
        ({"block": [16, 16, 16]}, "block must be a tuple of two integers"),
        ({"block": [0, 16]}, "block must have rows"),
        ({"block": "16x16"}, "block must be a tuple of two integers"),
    ],
)
def test_forged_tier_maps_are_refused(tmp_path, change, match):
    from sparsekit._safetensors import seal, write_tensors
    from sparsekit.tiers.files import KEY

    tensors = {"a": torch.zeros(1, 1, dtype=torch.uint8)}
    layer = {"shape": [16, 16], "block": [16, 16], "k": 10}
    if isinstance(change, dict) and not change.keys() & {"layers", "version"}:
        change = {"layers": {"a": layer | change}}
    structure = {"version": 2, "layers": {"a": layer}} | change if isinstance(change, dict) else change
    write_tensors(tmp_path / "maps", tensors, seal(json.dumps(structure), tensors, KEY))
    with pytest.raises(ValueError, match=match) as caught:
        load_tier_maps(tmp_path / "maps")
    assert str(tmp_path / "maps") in str(caught.value)


def test_tier_maps_with_any_byte_altered_are_refused(tmp_path):
    path = tmp_path / "maps.safetensors"
    save_tier_maps(start(None), path)
    whole = path.read_bytes()
    for at in range(0, len(whole), 3):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x15]) + whole[at + 1 :])
        with pytest.raises(ValueError, match=r"maps\.safetensors holds no tier maps"):
            load_tier_maps(path)
    for length in (0, 7, 8, 9, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"maps\.safetensors holds no tier maps"):
            load_tier_maps(path)


@pytest.mark.parametrize(
    "stored",
    [
        {"a": torch.zeros(1, 1).byte().expand(1 << 20, 1 << 20)},
        {"a": torch.zeros(2, 2, device="meta").byte()},
        {3: torch.zeros(2, 2).byte()},
        {"a": torch.zeros(2).byte()},
        {"a": torch.zeros(2, 2)},
        {"a": torch.zeros(2, 2).byte().to_sparse()},
        {"a": torch.full((2, 2), 300)},
        [torch.zeros(2, 2).byte()],
    ],
    ids=["expanded", "meta", "name", "vector", "float", "sparse", "value", "list"],
)
def test_foreign_tier_maps_of_other_kinds_are_refused(tmp_path, stored):
    torch.save(stored, tmp_path / "maps.pt")
    with pytest.raises(ValueError, match=r"maps\.pt holds no tier maps"):
        load_tier_maps(tmp_path / "maps.pt")


def test_foreign_tier_maps_that_are_damaged_are_refused(tmp_path):
    path = tmp_path / "maps.pt"
    torch.save({"a": torch.zeros(2, 2).byte()}, path)
    whole, draw = path.read_bytes(), random.Random(0)
    for at in draw.sample(range(len(whole)), 60):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ draw.randrange(1, 256)]) + whole[at + 1 :])
        try:
            load_tier_maps(path)  # most bytes of a .pt are padding, or checked by nobody
        except ValueError as error:
            assert "maps.pt holds no tier maps" in str(error)
    for length in (0, 1, 100, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"maps\.pt holds no tier maps"):
            load_tier_maps(path)
