"""Folders are written whole or not at all, whether or not the system can swap two names in one step."""

import os
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
from interrupts import assert_all_or_nothing

from sparsekit import _files, _folders
from sparsekit._folders import new_folder, try_new_folder


@pytest.fixture(params=["one step", "two steps"])
def steps(request, monkeypatch):
    if request.param == "two steps":
        monkeypatch.setattr(_folders, "_exchange", lambda one, other: False)


@pytest.fixture
def two_steps(monkeypatch):
    monkeypatch.setattr(_folders, "_exchange", lambda one, other: False)


def fill(folder, text):
    folder.mkdir(exist_ok=True)
    (folder / "weights").write_text(text)


def everything(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_a_new_folder_takes_the_place_of_the_old_one(steps, tmp_path):
    out = tmp_path / "deep" / ("n" * 250)
    for text in ("one", "two"):
        with new_folder(out) as folder:
            assert folder.parent == out.parent
            fill(folder, text)
        assert (out / "weights").read_text() == text and len(everything(tmp_path)) == 3


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="renameat2 is Linux's")
def test_linux_exchanges_names_in_one_step(tmp_path):
    for name in ("a", "b"):
        fill(tmp_path / name, name)
    assert _folders._exchange(tmp_path / "a", tmp_path / "b")
    assert [(tmp_path / name / "weights").read_text() for name in ("a", "b")] == ["b", "a"]
    with pytest.raises(FileNotFoundError) as caught:
        _folders._exchange(tmp_path / "a", tmp_path / "c")
    assert caught.value.filename == str(tmp_path / "c")


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_files_have_the_permissions_of_the_umask_whoever_wrote_them(umask, tmp_path):
    before = os.umask(umask)
    try:
        with new_folder(tmp_path / "out") as folder:
            (folder / "deep").mkdir()
            for path in (folder / "one", folder / "deep" / "two"):
                path.touch(0o600)
    finally:
        os.umask(before)
    for name in ("one", "deep/two"):
        assert stat.S_IMODE((tmp_path / "out" / name).stat().st_mode) == 0o666 & ~umask


def test_a_link_stays_a_link(steps, tmp_path):
    fill(tmp_path / "disk", "")
    fill(tmp_path / "disk" / "real", "old")
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "real")
    with new_folder(tmp_path / "link") as folder:
        assert folder.parent == tmp_path / "disk"  # a rename never leaves the disk
        (folder / "new").touch()
    assert (tmp_path / "link").is_symlink()
    assert everything(tmp_path / "disk") == ["real", "real/new", "weights"]


@pytest.mark.parametrize("there", [True, False])
def test_a_failing_block_leaves_what_was_there(steps, there, tmp_path):
    if there:
        fill(tmp_path / "out", "old")
    with pytest.raises(KeyboardInterrupt), new_folder(tmp_path / "out") as folder:
        fill(folder, "new")
        raise KeyboardInterrupt
    assert everything(tmp_path) == (["out", "out/weights"] if there else [])
    assert not there or (tmp_path / "out" / "weights").read_text() == "old"


def test_the_old_folder_outlives_a_failure_to_put_it_back(two_steps, tmp_path, monkeypatch):
    out, rename = tmp_path / "out", Path.rename
    fill(out, "old")

    def fails(path, target):
        if target == out:
            raise OSError("input/output error")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fails)
    with pytest.raises(OSError, match="input/output error"), new_folder(out) as folder:
        fill(folder, "new")
    assert [path.read_text() for path in tmp_path.rglob("weights")] == ["old"]
    monkeypatch.undo()
    with new_folder(tmp_path / "other"):
        assert (out / "weights").read_text() == "old"


@pytest.mark.parametrize("there", [True, False])
def test_a_failed_rename_leaves_what_was_there(two_steps, there, tmp_path, monkeypatch):
    out, rename = tmp_path / "out", Path.rename
    if there:
        fill(out, "old")

    def fails(path, target):
        if path.suffix == ".tmp":
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fails)
    with pytest.raises(KeyboardInterrupt), new_folder(out) as folder:
        fill(folder, "new")
    assert everything(tmp_path) == (["out", "out/weights"] if there else [])
    assert not there or (out / "weights").read_text() == "old"


def test_an_interrupt_anywhere_leaves_the_old_folder_or_the_new_one(steps, tmp_path):
    out = tmp_path / "out"

    def restart():
        fill(out, "old")
        return (out,)

    def replace(out):
        with new_folder(out) as folder:
            fill(folder, "new")

    assert_all_or_nothing(restart, replace, lambda out: {"content": (out / "weights").read_text()}, last=1000)
    with new_folder(out):
        pass
    assert everything(tmp_path) == ["out"]


KILLED = """
import os, sys, types
package = types.ModuleType("sparsekit"); package.__path__ = [sys.argv[1]]
sys.modules["sparsekit"] = package  # without torch, which takes seconds
from pathlib import Path
from sparsekit import _folders
if sys.argv[3] == "between":
    _folders._exchange = lambda one, other: False
    rename, done = Path.rename, []
    def once(path, target):
        if path.suffix == ".tmp":
            os.kill(os.getpid(), 9)
        return rename(path, target)
    Path.rename = once
with _folders.new_folder(sys.argv[2]) as folder:
    (folder / "weights").write_text("new")
    if sys.argv[3] == "within":
        os.kill(os.getpid(), 9)
    if sys.argv[3] == "alive":
        print(flush=True)
        input()
"""


def command(out, when):
    return [sys.executable, "-IS", "-c", KILLED, Path(_folders.__file__).parent, out, when]


@pytest.mark.parametrize("when", ["within", "between"])
def test_what_a_kill_has_left_comes_back_or_goes(when, tmp_path):
    out = tmp_path / "out"
    fill(out, "old")
    assert subprocess.run(command(out, when), check=False).returncode == -9
    assert out.exists() is (when == "within") and len(list(tmp_path.iterdir())) == 2
    with new_folder(tmp_path / "other"):
        assert (out / "weights").read_text() == "old"
    assert everything(tmp_path) == ["other", "out", "out/weights"]


def test_what_a_living_process_writes_stays(tmp_path):
    out = tmp_path / "out"
    with subprocess.Popen(command(out, "alive"), stdin=subprocess.PIPE, stdout=subprocess.PIPE) as living:
        living.stdout.readline()
        with new_folder(tmp_path / "other"):
            pass
        living.communicate(b"\n")
    assert (out / "weights").read_text() == "new" and everything(tmp_path) == ["other", "out", "out/weights"]


def test_without_locks_age_tells_what_was_left(tmp_path, monkeypatch):
    monkeypatch.setattr(_folders, "lock", lambda descriptor: None)
    for name, age in ((".sk-0.tmp", _files.ABANDONED + 60), (".sk-1.tmp", 60)):
        (tmp_path / name).mkdir()
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    with new_folder(tmp_path / "out"):
        pass
    assert everything(tmp_path) == [".sk-1.tmp", "out"]


def test_a_trial_makes_nothing(tmp_path):
    try_new_folder(tmp_path / "deep" / "out")
    assert everything(tmp_path) == []
    for path, named in (("/proc/out", "/proc"), ("/proc/deep/out", "/proc")):
        with pytest.raises(OSError) as caught:
            try_new_folder(path)
        assert caught.value.filename == named
