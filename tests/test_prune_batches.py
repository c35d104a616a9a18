"""Any batches: read once, given as they were in every pass, in bounded memory."""

import copy
import io
import os
import threading
from dataclasses import dataclass

import pytest
import torch
from pruning import assert_restored, snapshot, stack
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

import sparsekit as sk
from sparsekit._trees import copied
from sparsekit.prune.calibration import output_store as stores
from sparsekit.prune.calibration.held_batches import HeldBatches
from sparsekit.prune.calibration.output_store import OutputStore
from sparsekit.prune.calibration.replay import Replay


@pytest.fixture(params=["plain", "replayed"])
def way(request, monkeypatch):
    monkeypatch.setattr(Replay, "_pays", lambda *_: request.param == "replayed")


class Once(IterableDataset):
    """A stream in a dataset: a loader of it looks as if it could be read again."""

    def __init__(self, rows):
        self.rows = iter(rows)

    def __iter__(self):
        return self.rows


@pytest.mark.parametrize("batchnorm", [False, True], ids=["", "batchnorm"])
@pytest.mark.parametrize("sequential", [True, False], ids=["sequential", "one-pass"])
def test_a_stream_in_a_loader_gives_all_its_rows(way, sequential, batchnorm):
    x = torch.randn(32, 8)
    model = stack(8, 8, 8, 8)
    if batchnorm:
        model.insert(4, nn.BatchNorm1d(8))
    expected = copy.deepcopy(model)
    sk.prune_(expected, sk.Wanda("2:4"), list(x.split(4)), calibration=sk.Calibration(sequential=sequential))
    sk.prune_(
        model, sk.Wanda("2:4"), DataLoader(Once(x), batch_size=4), calibration=sk.Calibration(sequential=sequential)
    )
    for name, value in model.state_dict().items():
        assert torch.equal(value, expected.state_dict()[name]), name


def test_a_shuffling_loader_gives_every_pass_the_same_batches(way):
    seen = []
    loader = DataLoader(torch.arange(32.0)[:, None].expand(32, 8).contiguous(), batch_size=8, shuffle=True)

    def forward(model, x):
        seen.append(tuple(x[:, 0].tolist()))
        return model(x)

    sk.prune_(stack(8, 8, 8, 8), sk.Wanda("2:4"), loader, calibration=sk.Calibration(forward=forward))
    assert len(set(seen)) == 4 and len(seen) > 8


def test_an_exhausted_loader_is_an_error():
    loader = DataLoader(Once([torch.randn(8)] * 3), batch_size=1)
    list(loader)
    model = stack(8, 8, 8)
    before = snapshot(model)
    with pytest.raises(ValueError, match="batches gave no batch"):
        sk.prune_(model, sk.Wanda("2:4"), loader)
    assert_restored(model, before)


class Cache:
    def __init__(self):
        self.entries = []


@pytest.mark.parametrize("sequential", [True, False], ids=["sequential", "one-pass"])
def test_batches_stay_as_they_were(way, sequential):
    """A forward that writes to its arguments, and a cache in the batch that every pass fills."""

    class Writes(nn.Sequential):
        def forward(self, x, *, cache, extra):
            sums.append(float(x.sum()))
            lengths.append(len(cache.entries))
            for layer in self:
                x = layer(x.sub_(1))
                cache.entries.append(x)
                extra["list"][0].add_(1)
            return x

    sums, lengths = [], []
    kept = nn.Linear(8, 8)(torch.randn(4, 8))  # has a graph
    batches = [{"x": torch.ones(4, 8), "cache": Cache(), "extra": {"list": [kept.clone()], "graph": kept}}]
    batches[0]["cache"].entries.append(kept)
    before = kept.detach().clone()
    sk.prune_(
        Writes(*(nn.Linear(8, 8) for _ in range(4))),
        sk.Wanda("2:4"),
        batches,
        calibration=sk.Calibration(sequential=sequential),
    )
    assert set(sums) == {32.0} and set(lengths) == {1}
    assert torch.equal(batches[0]["x"], torch.ones(4, 8)) and len(batches[0]["cache"].entries) == 1
    assert torch.equal(batches[0]["extra"]["list"][0], before)


class Locked:
    def __init__(self):
        self.lock, self.tensor = threading.Lock(), torch.ones(2)


HARD_TO_COPY = {
    "graph": lambda: nn.Linear(8, 8)(torch.randn(4, 8)),
    "csr": lambda: torch.eye(4).to_sparse_csr(),
    "sparse": lambda: torch.eye(4).to_sparse(),
    "nested": lambda: torch.nested.nested_tensor([torch.ones(2)]),
    "jagged": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged),
    "lock": Locked,
    "generator": lambda: (i for i in range(3)),
    "file": lambda: io.BytesIO(b"1"),
    "module": lambda: nn.Linear(2, 2),
    "function": lambda: torch.relu,
}


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor", "ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("where", ["batch", "stage"])
@pytest.mark.parametrize("kind", HARD_TO_COPY)
def test_arguments_that_cannot_be_copied(way, where, kind):
    class Stage(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x, extra):
            assert type(extra) is type(held)
            return self.linear(x).relu()

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(Stage() for _ in range(3))

        def forward(self, x, given=None):
            for layer in self.layers:
                x = layer(x, held if where == "stage" else given)
            return x

    held = HARD_TO_COPY[kind]()
    batch = (torch.randn(4, 8), held) if where == "batch" else torch.randn(4, 8)
    assert len(sk.prune_(Model(), sk.Wanda("2:4"), [batch]).layers) == 3


@dataclass(frozen=True)
class Record:
    x: torch.Tensor
    label: str


def test_copies():
    x = torch.arange(6.0).view(2, 3).requires_grad_()
    cache = Cache()
    cache.entries = [x * 2, "text"]
    cache.me, cache.lock = cache.entries, threading.Lock()
    value = {"x": x, "again": x, "record": Record(x * 1, "a"), "nested": [(x.t(), None), {"y": 3}], "cache": cache}
    new = copied(value)
    assert torch.equal(new["x"], x) and new["x"] is not x and new["x"].is_leaf and new["x"].requires_grad
    assert new["again"] is new["x"]
    assert new["record"].label == "a" and new["record"].x is not value["record"].x and new["record"].x.grad_fn is None
    assert torch.equal(new["nested"][0][0], x.t()) and new["nested"][1] == {"y": 3}
    assert new["cache"] is not cache and new["cache"].me is new["cache"].entries and new["cache"].lock is cache.lock
    assert torch.equal(new["cache"].entries[0], x * 2) and new["cache"].entries[0] is not cache.entries[0]
    loop = []
    loop.append(loop)
    assert (new := copied(loop))[0] is new and new is not loop


DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool, torch.complex64)


@pytest.mark.parametrize("memory", [1 << 20, 0], ids=["memory", "file"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_store_gives_back_what_it_was_given(memory, dtype):
    store = OutputStore(memory)
    x = (torch.randn(3, 5, 4) * 3).to(dtype).transpose(0, 1)
    kept = [store.keep({"x": x + 0 if dtype != torch.bool else x.clone(), "more": (x[0], None, 7)}) for _ in range(2)]
    x.zero_()
    for each in kept:
        first, second = each.load(), each.load()
        assert torch.equal(first["x"][0], first["more"][0]) and first["more"][1:] == (None, 7)
        first["x"].zero_()
        assert second["x"].any() and torch.equal(second["x"], each.load()["x"]) and second["x"].dtype == dtype
    kept[0].drop()
    dropped = kept[0].load()
    assert dropped["x"].shape == (5, 3, 4) and dropped["x"].dtype == dtype and kept[0].dropped
    assert (dropped["x"].isnan() if dtype.is_floating_point else dropped["x"] == 0).all()
    end = store._end
    again = store.keep({"x": torch.ones(5, 3, 4).to(dtype), "more": (torch.ones(3, 4).to(dtype),)})
    assert again.load()["x"].all() and store._end == end  # in the place of what was dropped
    store.close()


def test_the_store_refuses_what_it_cannot_write_down(monkeypatch):
    store = OutputStore()
    assert store.keep([torch.ones(2), object()]) is None and store.keep(torch.eye(2).to_sparse()) is None
    assert store.keep(nn.Parameter(torch.ones(2))) is None and store._room == stores.MEMORY
    monkeypatch.setattr(stores, "DISK_SHARE", 1 << 60)
    assert OutputStore(0).keep(torch.ones(1000)) is None  # no room anywhere


def test_held_batches():
    reads = []

    def batches():
        for index in range(3):
            reads.append(index)
            yield torch.full((2,), float(index))

    class Source:
        __iter__ = staticmethod(batches)
        __len__ = staticmethod(lambda: 3)

    held = HeldBatches(Source(), OutputStore(0))
    assert float(held.first()[0][0]) == 0 and reads == [0] and len(held) == 3
    assert [float(x.sub_(1)[0]) for x in held] == [-1, 0, 1] == [float(x.sub_(1)[0]) for x in held]
    assert reads == [0, 1, 2]
    single = HeldBatches(Source(), None)
    assert float(single.first()[0][0]) == 0
    assert [float(x[0]) for x in single] == [0, 1, 2] == [float(x[0]) for x in single]
    assert reads == [0, 1, 2] * 3 and HeldBatches([], None).first() == []


def test_memory_and_threads_do_not_grow_with_the_batches(monkeypatch, way):
    """What lies in memory is counted: no more than the limit, however many batches there are."""
    monkeypatch.setattr(stores, "MEMORY", 40_000)
    most, records = [0, 0], []

    class Counted(stores._Record):
        def __init__(self, *args):
            super().__init__(*args)
            records.append(self)

    monkeypatch.setattr(stores, "_Record", Counted)

    def forward(model, x):
        most[0] = max(most[0], sum(record.held.nbytes for record in records if record.held is not None))
        most[1] = max(most[1], len(os.listdir("/proc/self/task")) if os.path.isdir("/proc/self/task") else 0)
        return model(x)

    class Loader:
        def __iter__(self):
            return (torch.randn(64, 64, generator=torch.Generator().manual_seed(i)) for i in range(40))

    model = stack(64, 64, 64, 64)
    expected = copy.deepcopy(model)
    before = len(os.listdir("/proc/self/task")) if os.path.isdir("/proc/self/task") else 0
    sk.prune_(model, sk.Wanda("2:4"), Loader(), calibration=sk.Calibration(forward=forward))
    assert 16_384 <= most[0] <= 2 * 40_000 and most[1] <= before + 1
    monkeypatch.setattr(stores, "MEMORY", 1 << 30)
    sk.prune_(expected, sk.Wanda("2:4"), list(Loader()))
    assert all(map(torch.equal, model.state_dict().values(), expected.state_dict().values()))


def test_the_temporary_file_is_gone_whatever_happens(monkeypatch, tmp_path):
    monkeypatch.setattr(stores, "MEMORY", 0)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    def progress(stages):
        for stage in stages:
            yield stage
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sk.prune_(stack(8, 8, 8, 8), sk.Wanda("2:4"), DataLoader(torch.randn(8, 8), batch_size=2), progress=progress)
    assert list(tmp_path.iterdir()) == []
