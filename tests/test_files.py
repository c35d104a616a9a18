"""Files are written whole or not at all: through links, on full disks, beside killed and running writers."""

import errno
import fcntl
import os
import resource
import signal
import stat
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from torch import nn

import sparsekit as sk
from sparsekit import _files
from sparsekit._files import replacing
from sparsekit._json import parse_json, write_json
from sparsekit.tiers import TierMap, save_tier_maps

MODEL = nn.Sequential(nn.Linear(8, 8))
WRITERS = {
    "save": lambda path: sk.save(MODEL, path),
    "tier-maps": lambda path: save_tier_maps({"0": TierMap(torch.zeros(1, 1, dtype=torch.uint8), (8, 8))}, path),
    "json": lambda path: write_json(path, {"a": 1}),
}


@pytest.fixture(params=WRITERS)
def write(request):
    return WRITERS[request.param]


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_a_new_file_has_the_permissions_of_the_umask_and_a_replaced_one_its_own(write, umask, tmp_path):
    path, before = tmp_path / "file", os.umask(umask)
    try:
        write(path)
        assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask
        path.chmod(0o640)
        write(path)
        assert stat.S_IMODE(path.stat().st_mode) == 0o640
    finally:
        os.umask(before)


def test_a_link_stays_and_what_it_leads_to_is_replaced(write, tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "real").write_bytes(b"old")
    (tmp_path / "middle").symlink_to(Path("disk") / "real")
    for link, target in (("link", "middle"), ("dangling", tmp_path / "disk" / "new")):
        (tmp_path / link).symlink_to(target)
        write(tmp_path / link)
        assert (tmp_path / link).is_symlink()
    assert (tmp_path / "middle").is_symlink()
    assert (tmp_path / "disk" / "real").read_bytes() == (tmp_path / "disk" / "new").read_bytes() != b"old"
    assert names(tmp_path / "disk") == ["new", "real"]


@pytest.mark.parametrize("length", [200, 234, 255])
def test_names_may_be_as_long_as_the_file_system_has_them(write, length, tmp_path):
    write(tmp_path / ("n" * length))
    assert names(tmp_path) == ["n" * length]


def test_what_cannot_be_written_is_an_os_error_with_the_name(write, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    os.mkfifo(tmp_path / "pipe")
    wrong = {
        "folder": errno.EISDIR,
        "loop": errno.ELOOP,
        "pipe": errno.EINVAL,
        "file/below": errno.ENOTDIR,
        "missing/file": errno.ENOENT,
        "n" * 256: errno.ENAMETOOLONG,
    }
    before = names(tmp_path)
    for name, number in wrong.items():
        with pytest.raises(OSError) as caught:
            write(tmp_path / name)
        assert (caught.value.errno, caught.value.filename) == (number, str(tmp_path / name))
    for path in ("/dev/null", "/proc/new"):
        with pytest.raises(OSError) as caught:
            write(path)
        assert caught.value.filename == path
    assert names(tmp_path) == before and stat.S_ISCHR(os.stat("/dev/null").st_mode)


def test_a_full_disk_is_an_os_error_with_the_name(write, tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4, limits[1]))
    try:
        with pytest.raises(OSError) as caught:
            write(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert (caught.value.errno, caught.value.filename) == (errno.EFBIG, str(path))
    assert path.read_bytes() == b"old" and names(tmp_path) == ["file"]


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.EACCES, errno.EBADF, errno.EIO])
def test_only_the_folder_may_refuse_to_be_flushed(write, number, tmp_path, monkeypatch):
    """Network shares cannot flush folders, Windows no file that is open for reading; the file is complete anyway."""
    real = os.fsync

    def fsync(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, "refused")
        assert fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDONLY
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    if number == errno.EIO:
        with pytest.raises(OSError, match="refused"):
            write(tmp_path / "file")
    else:
        write(tmp_path / "file")
    assert names(tmp_path) == ["file"]


def test_a_killed_writer_leaves_what_the_next_one_removes(write, tmp_path):
    code = (
        "import sys, types; package = types.ModuleType('sparsekit'); package.__path__ = [sys.argv[1]]\n"
        "sys.modules['sparsekit'] = package  # without torch, which takes seconds\n"
        "from sparsekit._files import replacing\n"
        "with replacing(sys.argv[2]) as file: file.write(b'half'); file.flush(); print(flush=True); input()"
    )
    path = tmp_path / "file"
    command = [sys.executable, "-IS", "-c", code, Path(_files.__file__).parent, path]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as living:
        living.stdout.readline()
        (left,) = names(tmp_path)
        write(path)
        assert names(tmp_path) == [left, "file"]  # its writer is still running
        living.kill()
    write(tmp_path / "other")
    assert names(tmp_path) == ["file", "other"]


def test_threads_write_beside_each_other(tmp_path):
    failed = []

    def work():
        try:
            for _ in range(10):
                sk.save(MODEL, tmp_path / "file")
                sk.load(nn.Sequential(nn.Linear(8, 8)), tmp_path / "file")
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed and names(tmp_path) == ["file"]


def test_without_locks_age_tells_what_was_left(tmp_path, monkeypatch):
    monkeypatch.setattr(_files, "lock", lambda descriptor: None)
    for name, age in ((".sk-0.tmp", 7200), (".sk-1.tmp", 60)):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    write_json(tmp_path / "file", {})
    assert names(tmp_path) == [".sk-1.tmp", "file"]


def test_what_is_called_alike_but_no_file_is_left_alone(tmp_path):
    (tmp_path / ".sk-folder.tmp").mkdir()
    (tmp_path / "mine").write_text("mine")
    (tmp_path / ".sk-link.tmp").symlink_to(tmp_path / "mine")
    os.mkfifo(tmp_path / ".sk-pipe.tmp")
    write_json(tmp_path / "file", {})
    assert {".sk-folder.tmp", ".sk-link.tmp", "file", "mine"} <= set(names(tmp_path))


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, GeneratorExit])
def test_a_failing_block_leaves_the_old_file(error, tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with suppress(error), replacing(path) as file:
        file.write(b"new")
        raise error
    assert path.read_bytes() == b"old" and names(tmp_path) == ["file"]


def test_the_folder_of_the_process_may_change(tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    with replacing(Path("file")) as file:
        monkeypatch.chdir("elsewhere")
        file.write(b"new")
    assert (tmp_path / "file").read_bytes() == b"new"


@pytest.mark.parametrize("text", ["NaN", "[-Infinity]", "[1e999]", '{"a": 1, "a": 1}', "[" * 100_000, "{", ""])
def test_json_is_what_its_standard_says(text):
    with pytest.raises(ValueError):
        parse_json(text)


def test_numbers_that_json_has_not_are_null(tmp_path):
    write_json(tmp_path / "file", {"a": [float("nan"), (1.5, -float("inf"))], 3: None})
    assert parse_json((tmp_path / "file").read_text()) == {"a": [None, [1.5, None]], "3": None}
