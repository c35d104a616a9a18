"""The files that commands write, and the checks of the folders that they read and write."""

import os
from pathlib import Path

from .._folders import new_folder as new_folder
from .._folders import try_new_folder
from .errors import UsageError
from .stored import is_ours

MASKS, COMPRESSED = "masks.safetensors", "compressed.safetensors"  # as sparsekit.save writes them
REPORT, COMPRESS_REPORT, BENCH_REPORT, PAGE = "report.json", "compress.json", "bench.json", "report.html"
OWN = {MASKS, COMPRESSED}
# The names of the other files that commands write: configurations, reports, weights, and the files of a tokenizer.
SUFFIXES, NAMES = {".json", ".safetensors", ".jinja", ".model"}, {"vocab.txt", "merges.txt", "README.md", PAGE}


def model_files(folder: Path) -> list[Path]:
    """Returns the safetensors files with the dense weights, as transformers writes them."""
    return sorted(path for path in folder.glob("*.safetensors") if path.name not in OWN)


def is_written(path: Path) -> bool:
    """Returns whether a file has a name that sparsekit's commands or transformers give to the files they write."""
    return path.suffix in SUFFIXES or path.name in NAMES


def check_folder(folder: Path) -> None:
    """Rejects a folder that does not exist or has no safetensors file.

    Raises:
        UsageError: says why.
    """
    if not folder.is_dir():
        raise UsageError(f"there is no folder {folder}")
    if model_files(folder) or (folder / COMPRESSED).exists():
        return
    if pickles := sorted(path.name for end in ("bin", "pt", "pth", "ckpt") for path in folder.glob(f"*.{end}")):
        raise UsageError(f"{folder} has only pickled weights ({pickles[0]}), which are never read: save safetensors")
    raise UsageError(f"{folder} has no safetensors file")


def check_out(out: Path, *, overwrite: bool) -> None:
    """Rejects an output folder that cannot be made, or whose content must not be replaced.

    With ``overwrite``, a folder in which sparsekit wrote everything may be replaced, and no other.

    Raises:
        UsageError: says why.
    """
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out} is a file, a folder is needed")
    parent = next((path for path in Path(os.path.realpath(out)).parents if path.exists()), out)
    if not (parent.is_dir() and os.access(parent, os.W_OK)):
        raise UsageError(f"{out} cannot be made: {parent} is no folder that can be written to")
    try:  # some folders, /proc for one, say that they can be written to, and cannot
        try_new_folder(out)
    except OSError as error:
        raise UsageError(f"{out} cannot be made: {error.filename}: {error.strerror}") from error
    if not out.exists() or not any(out.iterdir()):
        return
    if not overwrite:
        raise UsageError(f"{out} is not empty: name another folder, or --overwrite")
    pruned = (out / MASKS).exists() and is_ours(out / MASKS)
    # compress adds its file to any folder, so beside dense weights it does not prove that sparsekit wrote those
    packed = (out / COMPRESSED).exists() and is_ours(out / COMPRESSED) and not model_files(out)
    strange = [path for path in out.iterdir() if path.is_dir() or not is_written(path)]
    if strange or not (pruned or packed):
        what = min(strange, default=out)
        raise UsageError(f"{what} was not written by sparsekit, which overwrites nothing else")
