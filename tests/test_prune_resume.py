"""A killed run goes on where it was."""

import copy
import json
import random

import pytest
import torch
from experts import HIDDEN, stacked_and_separate
from pruning import Killed, assert_restored, snapshot, stack

import sparsekit as sk
from sparsekit._json import write_record
from sparsekit.masks import get_mask


def run(model, x, folder, die_at=None, method=None):
    count = 0

    def progress(stages):
        nonlocal count
        for stage in stages:
            if count == die_at:
                raise Killed
            count += 1
            yield stage

    report = sk.prune_(model, method or sk.SparseGPT("2:4"), x, resume=folder, progress=progress)
    return report, count


@pytest.mark.parametrize("die_at", [0, 1, 3])
def test_goes_on_after_the_last_finished_stage(tmp_path, die_at):
    dense, x = stack(16, 16, 16, 16, 16), [torch.randn(30, 16), torch.randn(20, 16)]
    expected, killed = copy.deepcopy(dense), copy.deepcopy(dense)
    whole, _ = run(expected, x, None)
    before = snapshot(killed)
    with pytest.raises(Killed):
        run(killed, x, tmp_path / "run", die_at)
    assert all(torch.equal(before[0][name], bits) for name, bits in snapshot(killed)[0].items())
    resumed = copy.deepcopy(dense)
    report, stages = run(resumed, x, tmp_path / "run")
    assert stages == 4 - die_at
    assert report.layers == whole.layers
    for one, other in zip(resumed[::2], expected[::2], strict=True):
        assert torch.equal(one.weight, other.weight) and torch.equal(get_mask(one), get_mask(other))


def test_a_finished_run_is_read_back(tmp_path):
    dense, x = stack(16, 16, 16), [torch.randn(30, 16)]
    first, again = copy.deepcopy(dense), copy.deepcopy(dense)
    run(first, x, tmp_path)
    _, stages = run(again, x, tmp_path)
    assert stages == 0 and torch.equal(first[2].weight, again[2].weight)


def test_refuses_the_folder_of_another_run(tmp_path):
    dense, x = stack(16, 16, 16), [torch.randn(30, 16)]
    model = copy.deepcopy(dense)
    run(model, x, tmp_path)
    with pytest.raises(ValueError, match="belongs to another run: it differs in method; name another folder"):
        run(copy.deepcopy(dense), x, tmp_path, method=sk.Wanda("2:4"))
    with pytest.raises(ValueError, match="it differs in layers"):
        run(model, x, tmp_path)  # pruned already
    (tmp_path / "run.json").write_text(json.dumps({"stages": 3}))
    with pytest.raises(ValueError, match=r"run.json is not the record of a pruning run"):
        run(copy.deepcopy(dense), x, tmp_path)


def test_needs_stages_to_go_on_with(tmp_path):
    with pytest.raises(ValueError, match="resume goes on stage by stage: it needs batches and sequential calibration"):
        sk.prune_(stack(8, 8), sk.Magnitude("2:4"), resume=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def other_batches(x):
    return [torch.cat([x[0][1:], x[0][:1]]), *x[1:]]


def transposed(model):
    model[2].weight.data = model[2].weight.data.t().contiguous()  # the same bits in another order


CHANGES = {
    "batches": lambda model, x: (model, other_batches(x), {}),
    "batches-order": lambda model, x: (model, x[::-1], {}),
    "batches-fewer": lambda model, x: (model, x[:1], {}),
    r"layers \(2\)": lambda model, x: (transposed(model) or model, x, {}),
    r"other weights \(0.bias\)": lambda model, x: (model[0].bias.data.add_(1) is None or model, x, {}),
    "modules": lambda model, x: (model.__setitem__(1, torch.nn.ReLU()) or model, x, {}),
    "axis": lambda model, x: (model, x, {"axis": "flatten"}),
    "forward": lambda model, x: (model, x, {"calibration": sk.Calibration(forward=lambda model, batch: model(batch))}),
    "method": lambda model, x: (model, x, {"method": sk.SparseGPT("1:4")}),
    "layers": lambda model, x: (model, x, {"where": lambda name, module: name != "0"}),
}


@pytest.mark.parametrize("what", CHANGES)
def test_refuses_what_differs_in_anything(tmp_path, what):
    dense, x = stack(16, 16, 16), [torch.randn(30, 16), torch.randn(20, 16)]
    sk.prune_(copy.deepcopy(dense), sk.SparseGPT("2:4"), x, resume=tmp_path)
    model, batches, options = CHANGES[what](copy.deepcopy(dense), x)
    method, before = options.pop("method", sk.SparseGPT("2:4")), snapshot(model)
    with pytest.raises(ValueError, match=rf"run\.json belongs to another run: it differs in .*{what.split('-')[0]}"):
        sk.prune_(model, method, batches, resume=tmp_path, **options)
    assert_restored(model, before)


def test_a_run_that_has_finished_nothing_is_nobodys(tmp_path):
    model, x = stack(16, 16), [torch.randn(30, 16)]
    with pytest.raises(Killed):
        run(model, x, tmp_path, die_at=0)
    run(model, other_batches(x), tmp_path)


def test_the_folder_is_tried_before_the_work(tmp_path):
    (tmp_path / "file").touch()
    seen = []
    for folder in (tmp_path / "file", tmp_path / "file" / "below", "/proc/below"):
        with pytest.raises(OSError, match=r"file|/proc/below"):
            sk.prune_(
                stack(8, 8),
                sk.Wanda("2:4"),
                [torch.randn(3, 8)],
                resume=folder,
                calibration=sk.Calibration(forward=lambda *_: seen.append(1)),
            )
    assert not seen


@pytest.mark.parametrize("name", ["run.json", "stage-0000.safetensors", "stage-0001.safetensors"])
def test_any_damage_is_refused_by_name(tmp_path, name):
    dense, x = stack(8, 8, 8), [torch.randn(9, 8)]
    sk.prune_(copy.deepcopy(dense), sk.Wanda("2:4"), x, resume=tmp_path)
    path, draw = tmp_path / name, random.Random(0)
    whole = path.read_bytes()
    places = [0, 7, 8, len(whole) - 2, *draw.sample(range(len(whole)), 25)]
    damaged = [whole[:at] + bytes([whole[at] ^ draw.randrange(1, 256)]) + whole[at + 1 :] for at in places]
    cut = [whole[:at] for at in (0, 1, 9, len(whole) // 2)]
    for content in (*damaged, *cut, b"[]", b"{}", b"[" * 100_000, b'{"call": NaN}'):
        path.write_bytes(content)
        model = copy.deepcopy(dense)
        before = snapshot(model)
        with pytest.raises(ValueError, match=name):
            sk.prune_(model, sk.Wanda("2:4"), x, resume=tmp_path)
        assert_restored(model, before)
    path.unlink()
    if name != "run.json":
        with pytest.raises(ValueError, match=rf"{name} is missing, and run\.json counts it as finished"):
            sk.prune_(copy.deepcopy(dense), sk.Wanda("2:4"), x, resume=tmp_path)


def test_stages_of_other_places_and_runs_are_refused(tmp_path):
    dense, x = stack(8, 8, 8), [torch.randn(9, 8)]
    one, other = tmp_path / "one", tmp_path / "other"
    sk.prune_(copy.deepcopy(dense), sk.Wanda("2:4"), x, resume=one)
    sk.prune_(copy.deepcopy(dense), sk.Wanda("1:4"), x, resume=other)
    first, second = (one / f"stage-000{index}.safetensors" for index in range(2))
    for source in (second, other / first.name):
        content = first.read_bytes()
        first.write_bytes(source.read_bytes())
        with pytest.raises(ValueError, match=r"stage-0000\.safetensors: it belongs to another run or place"):
            sk.prune_(copy.deepcopy(dense), sk.Wanda("2:4"), x, resume=one)
        first.write_bytes(content)


def test_a_loader_that_shuffles_needs_a_seed(tmp_path):
    dense, rows = stack(8, 8), torch.randn(16, 8)

    def loader(seed):
        order = torch.Generator().manual_seed(seed)
        data = torch.utils.data.TensorDataset(rows)
        return torch.utils.data.DataLoader(data, 4, shuffle=True, generator=order)

    sk.prune_(copy.deepcopy(dense), sk.Wanda("2:4"), loader(0), resume=tmp_path)
    sk.prune_(copy.deepcopy(dense), sk.Wanda("2:4"), loader(0), resume=tmp_path)
    with pytest.raises(ValueError, match="it differs in batches"):
        sk.prune_(copy.deepcopy(dense), sk.Wanda("2:4"), loader(1), resume=tmp_path)


def test_experts_are_gone_on_with(tmp_path):
    x = [torch.randn(32, HIDDEN)]
    whole, _ = stacked_and_separate()
    first, second = copy.deepcopy(whole), copy.deepcopy(whole)
    sk.prune_(first, sk.Wanda("2:4"), x, resume=tmp_path)
    report = sk.prune_(second, sk.Wanda("2:4"), x, resume=tmp_path)
    assert [layer.name for layer in report.layers] == ["0.experts.gate_up_proj", "0.experts.down_proj"]
    for key in ("gate_up_proj", "down_proj"):
        one, other = first[0].experts, second[0].experts
        assert torch.equal(getattr(one, key), getattr(other, key))
        assert torch.equal(get_mask(one, key), get_mask(other, key))


WRONG = {
    "name": "9",
    "shape": [8, 9],
    "pattern": "9:4",
    "error": [],
    "strange": 1,
}


@pytest.mark.parametrize("key", WRONG)
def test_records_of_wrong_types_are_refused(tmp_path, key):
    dense, x = stack(8, 8), [torch.randn(9, 8)]
    sk.prune_(copy.deepcopy(dense), sk.Wanda("2:4"), x, resume=tmp_path)
    data = json.loads((tmp_path / "run.json").read_text())
    del data["sha256"]
    for stages in ([[{**data["stages"][0][0], key: WRONG[key]}]], {"a": 1}, [3], [[3]]):
        write_record(tmp_path / "run.json", {**data, "stages": stages})
        with pytest.raises(ValueError, match=r"run\.json is not the record of a pruning run"):
            sk.prune_(copy.deepcopy(dense), sk.Wanda("2:4"), x, resume=tmp_path)
