"""A killed run goes on where it was."""

import copy
import json

import pytest
import torch
from pruning import snapshot, stack

import sparsekit as sk
from sparsekit.masks import get_mask


class Killed(BaseException):
    pass


def run(model, x, folder, die_at=None, method=None):
    count = 0

    def progress(blocks):
        nonlocal count
        for block in blocks:
            if count == die_at:
                raise Killed
            count += 1
            yield block

    report = sk.prune_(model, method or sk.SparseGPT("2:4"), x, resume=folder, progress=progress)
    return report, count


@pytest.mark.parametrize("die_at", [0, 1, 3])
def test_goes_on_after_the_last_finished_block(tmp_path, die_at):
    dense, x = stack(16, 16, 16, 16, 16), [torch.randn(30, 16), torch.randn(20, 16)]
    expected, killed = copy.deepcopy(dense), copy.deepcopy(dense)
    whole, _ = run(expected, x, None)
    before = snapshot(killed)
    with pytest.raises(Killed):
        run(killed, x, tmp_path / "run", die_at)
    assert all(torch.equal(before[0][name], bits) for name, bits in snapshot(killed)[0].items())
    resumed = copy.deepcopy(dense)
    report, blocks = run(resumed, x, tmp_path / "run")
    assert blocks == 4 - die_at
    assert report.layers == whole.layers
    for one, other in zip(resumed[::2], expected[::2], strict=True):
        assert torch.equal(one.weight, other.weight) and torch.equal(get_mask(one), get_mask(other))


def test_a_finished_run_is_read_back(tmp_path):
    dense, x = stack(16, 16, 16), [torch.randn(30, 16)]
    first, again = copy.deepcopy(dense), copy.deepcopy(dense)
    run(first, x, tmp_path)
    _, blocks = run(again, x, tmp_path)
    assert blocks == 0 and torch.equal(first[2].weight, again[2].weight)


def test_refuses_the_folder_of_another_run(tmp_path):
    dense, x = stack(16, 16, 16), [torch.randn(30, 16)]
    model = copy.deepcopy(dense)
    run(model, x, tmp_path)
    with pytest.raises(ValueError, match="belongs to another run: it differs in method; name another folder"):
        run(copy.deepcopy(dense), x, tmp_path, method=sk.Wanda("2:4"))
    with pytest.raises(ValueError, match="it differs in layers"):
        run(model, x, tmp_path)  # pruned already
    (tmp_path / "run.json").write_text(json.dumps({"blocks": 3}))
    with pytest.raises(ValueError, match=r"run.json is not the record of a pruning run"):
        run(copy.deepcopy(dense), x, tmp_path)


def test_needs_blocks_to_go_on_with(tmp_path):
    with pytest.raises(ValueError, match="resume goes on block by block: it needs batches and sequential=True"):
        sk.prune_(stack(8, 8), sk.Magnitude("2:4"), resume=tmp_path / "run")
    assert not (tmp_path / "run").exists()
