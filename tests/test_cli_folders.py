"""The folders that the commands write: what may be replaced, and what is there after a failure."""

import errno
import os
import shutil
from pathlib import Path

import pytest
from commands import prune, refusal, results, write_model

from sparsekit.cli.errors import UsageError
from sparsekit.cli.folders import check_out

for package in ("tyro", "rich", "PIL", "transformers"):
    pytest.importorskip(package)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def pruned(model, tmp_path_factory):
    from sparsekit.cli import main

    folder = tmp_path_factory.mktemp("models") / "sparse"
    assert main([str(each) for each in prune(model, folder, "--report")]) == 0
    return folder


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_dense_weights_that_compress_has_added_to_are_kept(model, tmp_path, capsys, ratios):
    mine = tmp_path / "mine"
    shutil.copytree(model, mine, ignore=shutil.ignore_patterns("text.txt"))
    results(["compress", mine, "--tokens", 4, "--report"], capsys)
    before = content(mine)
    assert {"model.safetensors", "compressed.safetensors", "compress.json", "report.html"} <= before.keys()
    for command in (prune(model, mine, "--overwrite"), ["compress", model, "--out", mine, "--overwrite"]):
        code, line = refusal(command, capsys)
        assert code == 2 and line.endswith(f"{mine} was not written by sparsekit, which overwrites nothing else")
    assert content(mine) == before


@pytest.mark.parametrize("name", ["notes.txt", "train.py", ".env", "model.safetensors.bak", "LICENSE"])
def test_a_loose_file_is_kept(name, pruned, model, tmp_path, capsys):
    out = tmp_path / "out"
    shutil.copytree(pruned, out)
    (out / name).write_text("mine")
    code, line = refusal(prune(model, out, "--overwrite"), capsys)
    assert code == 2 and f"{out / name} was not written by sparsekit" in line
    assert content(out) == {**content(pruned), name: b"mine"}


def test_all_that_the_commands_write_is_overwritten(pruned, model, tmp_path, capsys, ratios):
    ratios["compressed"] = 1.5
    out, packed = tmp_path / "out", tmp_path / "packed"
    shutil.copytree(pruned, out)
    results(["compress", out, "--tokens", 4], capsys)
    results(["bench", out, "--tokens", 4, "--seconds", 0.01, "--report"], capsys)
    results(["compress", out, "--out", packed, "--tokens", 4], capsys)
    results(["bench", packed, "--tokens", 4, "--seconds", 0.01, "--report"], capsys)
    results(["compress", out, "--out", packed, "--tokens", 8, "--overwrite"], capsys)
    assert not (packed / "bench.json").exists()
    results(prune(model, out, "--overwrite"), capsys)
    assert not (out / "bench.json").exists() and sorted(tmp_path.iterdir()) == [out, packed]


def test_what_cannot_be_made_is_refused_first(model, tmp_path, capsys, monkeypatch):
    (tmp_path / "file").touch()
    for out in (tmp_path / "file" / "out", tmp_path / "file" / "deep" / "out"):
        code, line = refusal(prune(model, out), capsys)
        assert code == 2 and line.endswith(f"cannot be made: {tmp_path / 'file'} is no folder that can be written to")
    check_out(tmp_path / "deep" / "out", overwrite=False)
    monkeypatch.setattr(os, "access", lambda path, mode: (path, mode) != (tmp_path, os.W_OK))
    for out in (tmp_path / "out", tmp_path / "deep" / "out"):
        with pytest.raises(UsageError, match=f"out cannot be made: {tmp_path} is no folder"):
            check_out(out, overwrite=False)


@pytest.mark.parametrize("out", ["/proc/out", "/proc/deep/out", "/sys/out"])
def test_folders_that_cannot_be_written_to_whatever_they_say_are_refused_first(out, model, capsys):
    code, line = refusal(prune(model, Path(out)), capsys)
    assert code == 2 and f"{out} cannot be made: {out[:4]}" in line
    assert not Path(out).exists()


def test_a_link_that_leads_to_itself_is_refused_first(tmp_path):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(UsageError, match="loop cannot be made"):
        check_out(tmp_path / "loop", overwrite=False)
    check_out(tmp_path / "deep" / "out", overwrite=False)
    assert [path.name for path in tmp_path.iterdir()] == ["loop"]


@pytest.mark.parametrize("arguments", [["compress", "--tokens", 4], ["bench", "--tokens", 4, "--report"]])
def test_a_folder_that_cannot_be_added_to_is_refused_first(arguments, model, capsys, monkeypatch):
    from sparsekit import _files
    from sparsekit.cli import models

    def fail(*_):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(_files, "_temporary", fail)
    monkeypatch.setattr(models, "read_config", lambda *_: pytest.fail("the work began"))
    command, *rest = arguments
    code, line = refusal([command, model, *rest], capsys)
    assert code and f"Permission denied: '{model}'" in line
