"""The cache of measurements: damage, other machines, other processes."""

import json
import multiprocessing
import os

import pytest
import torch

from sparsekit._timing import Timing
from sparsekit.compress import cache
from sparsekit.compress.cache import remembered

KEY = {"shape": (4, 8), "candidates": ("prepacked",), "tokens": 1, "evict_cache": False}
ANSWER = {"plain": Timing(1.0, 1.0, 0.0, 1.0, 0.1), "prepacked": Timing(0.5, 2.0, 1.0, 1.0, 0.1), "2:4": None}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("SPARSEKIT_TUNE_CACHE", str(tmp_path / "tune"))
    return tmp_path / "tune"


def never():
    raise AssertionError("measured again")


def test_remembers(folder):
    assert remembered(KEY, lambda: ANSWER) == ANSWER
    assert remembered(KEY, never) == ANSWER
    (file,) = folder.iterdir()
    key = json.loads(file.read_text())["key"]
    assert {
        "device",
        "threads",
        "simd",
        "torch",
        "sparsekit",
        "extension",
        "shape",
        "tokens",
        "evict_cache",
    } <= key.keys()


@pytest.mark.parametrize("other", [{"tokens": 2}, {"evict_cache": True}, {"shape": (8, 4)}], ids=str)
def test_another_key_is_measured(folder, other):
    remembered(KEY, lambda: ANSWER)
    changed = {"plain": ANSWER["plain"]}
    assert remembered({**KEY, **other}, lambda: changed) == changed
    assert remembered(KEY, never) == ANSWER


def test_an_unsteady_measurement_is_not_kept(folder):
    unsteady = {"plain": ANSWER["plain"], "prepacked": Timing(0.5, 2.0, 1.0, 1.0, 0.9)}
    assert remembered(KEY, lambda: unsteady) == unsteady
    assert not folder.exists()


@pytest.mark.parametrize(
    "damage",
    [b"", b"{", b"[]", b"\xff\xfe", b'{"key": 1}', b'{"key": {}, "timings": {}}', b"null"],
    ids=["empty", "cut", "list", "bytes", "foreign", "other key", "null"],
)
def test_a_damaged_file_is_written_anew(folder, damage):
    remembered(KEY, lambda: ANSWER)
    (file,) = folder.iterdir()
    file.write_bytes(damage)
    assert remembered(KEY, lambda: ANSWER) == ANSWER
    assert remembered(KEY, never) == ANSWER


DAMAGES = {
    "a name is missing": lambda timings: timings.pop("prepacked"),
    "a text for a number": lambda timings: timings["plain"].update(seconds="1.0"),
    "none for a number": lambda timings: timings["prepacked"].update(ratio=None),
    "a list for a timing": lambda timings: timings.update(prepacked=[]),
    "another number": lambda timings: timings["prepacked"].update(ratio=20.0),
    "one field more": lambda timings: timings["plain"].update(more=1.0),
    "one timing more": lambda timings: timings.update(tiered=timings["plain"]),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=list(DAMAGES))
def test_a_changed_timing_is_found_by_the_digest(folder, damage):
    remembered(KEY, lambda: ANSWER)
    (file,) = folder.iterdir()
    entry = json.loads(file.read_text())
    damage(entry["timings"])
    file.write_text(json.dumps(entry))
    assert remembered(KEY, lambda: ANSWER) == ANSWER
    assert remembered(KEY, never) == ANSWER  # written anew


@pytest.mark.parametrize("size", [1, 7])
def test_every_damaged_byte_is_survived(folder, size):
    remembered(KEY, lambda: ANSWER)
    (file,) = folder.iterdir()
    whole = file.read_bytes()
    for start in range(0, len(whole), 13):
        file.write_bytes(whole[:start] + bytes([whole[start] ^ 4]) * size + whole[start + size :])
        assert remembered(KEY, lambda: ANSWER) == ANSWER


def test_deep_nesting_and_folders_in_the_way(folder):
    remembered(KEY, lambda: ANSWER)
    (file,) = folder.iterdir()
    file.write_text("[" * 100_000)
    assert remembered(KEY, lambda: ANSWER) == ANSWER
    file.unlink()
    file.mkdir()
    assert remembered(KEY, lambda: ANSWER) == ANSWER
    cache.forget(KEY)


def test_forget(folder):
    remembered(KEY, lambda: ANSWER)
    cache.forget({**KEY, "tokens": 2})
    assert remembered(KEY, never) == ANSWER
    cache.forget(KEY)
    assert not list(folder.iterdir())
    cache.forget(KEY)


def test_a_checkout_that_is_not_installed(folder, monkeypatch):
    def missing(name):
        raise cache.PackageNotFoundError(name)

    monkeypatch.setattr(cache, "version", missing)
    assert remembered(KEY, lambda: ANSWER) == ANSWER
    assert remembered(KEY, never) == ANSWER


def test_nobody_is_at_home(monkeypatch):
    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("SPARSEKIT_TUNE_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(cache.Path, "home", homeless)
    assert remembered(KEY, lambda: ANSWER) == ANSWER


@pytest.mark.parametrize(
    "change",
    [
        lambda patch: patch.setattr(torch, "get_num_threads", lambda: 77),
        lambda patch: patch.setattr(torch, "get_float32_matmul_precision", lambda: "medium"),
        lambda patch: patch.setattr(torch.backends.mkldnn, "enabled", False),
        lambda patch: patch.setattr(os, "sched_getaffinity", lambda process: range(77), raising=False),
        lambda patch: patch.setenv("ONEDNN_MAX_CPU_ISA", "SSE41"),
        lambda patch: patch.setattr(cache, "_digest", lambda folder, patterns: "other files"),
    ],
    ids=["threads", "precision", "onednn", "cores", "isa", "sources"],
)
def test_what_changes_the_time_is_part_of_the_key(folder, monkeypatch, change):
    remembered(KEY, lambda: ANSWER)
    change(monkeypatch)
    with pytest.raises(AssertionError, match="measured again"):
        remembered(KEY, never)


def test_damaged_timings_are_measured_again(folder):
    remembered(KEY, lambda: ANSWER)
    (file,) = folder.iterdir()
    entry = json.loads(file.read_text())
    for timings in ([], {"plain": {}}, {"plain": {"seconds": 1}}, {"plain": 3}):
        file.write_text(json.dumps({**entry, "timings": timings}))
        assert remembered(KEY, lambda: ANSWER) == ANSWER


def test_switched_off(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("SPARSEKIT_TUNE_CACHE", "0")
    assert remembered(KEY, lambda: ANSWER) == ANSWER
    assert not list(tmp_path.iterdir())


def test_default_folder(monkeypatch, tmp_path):
    monkeypatch.delenv("SPARSEKIT_TUNE_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    remembered(KEY, lambda: ANSWER)
    assert len(list((tmp_path / "sparsekit" / "tune").iterdir())) == 1


def test_a_folder_that_cannot_be_made_costs_nothing(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("SPARSEKIT_TUNE_CACHE", str(tmp_path / "file"))
    assert remembered(KEY, lambda: ANSWER) == ANSWER


def test_a_failing_measurement_leaves_nothing(folder):
    with pytest.raises(KeyboardInterrupt):
        remembered(KEY, lambda: (_ for _ in ()).throw(KeyboardInterrupt))
    assert not folder.exists()


def _hammer(folder, process, mistakes):
    os.environ["SPARSEKIT_TUNE_CACHE"] = folder
    for turn in range(150):
        key = {**KEY, "tokens": turn % 5}
        timings = remembered(key, lambda turn=turn: {"plain": Timing(float(turn % 5), 1.0, 0.0, 1.0, 0.0)})
        if timings["plain"].seconds != turn % 5:
            mistakes.put((process, turn))
        if turn % 3 == process:  # a third party that damages what is there
            for file in cache.Path(folder).glob("*.json"):
                file.unlink(missing_ok=True)


@pytest.mark.slow
def test_two_processes_share_a_cache(tmp_path):
    context = multiprocessing.get_context("spawn")
    mistakes = context.Queue()
    processes = [context.Process(target=_hammer, args=(str(tmp_path), number, mistakes)) for number in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    assert mistakes.empty()
    assert not list(tmp_path.glob("*.tmp"))
