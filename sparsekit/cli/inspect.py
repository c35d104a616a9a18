"""``sparsekit inspect``: shows and checks the weights in the files of a model."""

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from torch import Tensor

from ..checkpoint.pretrained import described
from ..checkpoint.shards import Shards
from ..masks import Pattern, grouped
from ..ops.bits import nonzero
from . import terminal
from .errors import UsageError, regex, usage
from .folders import COMPRESSED, MASKS, REPORT, check_folder, model_files
from .models import load_dense
from .patterns import first_break, found_pattern, packed_bytes, tier_shares
from .roles import names_in, roles_of
from .stored import (
    Matrix,
    Role,
    exempt_roles,
    is_ours,
    matrices,
    model_matrices,
    not_understood,
    own_matrices,
    read_masks,
)


@dataclass(frozen=True)
class Inspected:
    """The findings about one layer.

    Args:
        name: the name of the layer.
        shape, dtype: those of its weight.
        zeros: the number of zero weights.
        sparsity: the share of zero weights.
        pattern: the pattern that the weight has.
        exempt: why ``--expect`` does not apply to the layer; None if it does.
        asked: the pattern that the layer must have, by its stored mask or by ``--expect``; None without either.
        problem: where the weight breaks that pattern; None if it does not.
        dense_bytes, stored_bytes: bytes of the dense weight, and of the weight in the file.
        packed_bytes: bytes of the packed weight; None if the library has no packed form for it.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    zeros: int
    sparsity: float
    pattern: str
    exempt: str | None
    asked: str | None
    problem: str | None
    dense_bytes: int
    stored_bytes: int
    packed_bytes: int | None


@dataclass(frozen=True, kw_only=True)
class Inspect:
    """Show the sparsity, the pattern and the bytes of every layer, and check them.

    Reads safetensors only: a transformers folder, one that prune or compress wrote, or a single file. Weights are
    checked against their stored masks, and against --expect; the exit code is 1 where one breaks its pattern.

    Args:
        folder: the folder or the file.
        expect: the pattern that every layer must have, as 2:4. Layers that prune leaves out are not asked; in a file
            without a configuration every matrix is, in one of sparsekit's own every one that is packed or masked.
        only: only layers whose name has a match of this regular expression.
        json: print the results as JSON on stdout, and nothing else there.
        debug: show where an error comes from.
    """

    folder: Annotated[Path, tyro.conf.Positional]
    expect: str | None = None
    only: str = ""
    json: bool = False
    debug: bool = False

    def run(self) -> int:
        expected = None
        if self.expect is not None:
            with usage():
                expected = Pattern.parse(self.expect)
            if expected.tiers:
                raise UsageError(
                    f"--expect {self.expect}: blocks of tiers may be dense, so every weight has that pattern"
                )
        only = regex(self.only)
        found, strange = stored_layers(self.folder)
        layers = [inspected(matrix, expected) for matrix in found if only.search(matrix.name)]
        strange = [name for name in strange if only.search(name)]
        if not layers:
            raise ValueError(f"{self.folder} has no layer{f' that matches {self.only!r}' if self.only else ''}")
        broken = [layer for layer in layers if layer.problem]
        if self.json:
            rows = [asdict(layer) for layer in layers]
            good = not (broken or (expected and strange))
            terminal.print_json({"ok": good, **totals(layers), "not_understood": strange, "layers": rows})
        else:
            _show(layers)
        if strange:
            names = ", ".join(strange[:3]) + (" ..." if len(strange) > 3 else "")
            said = f"inspect does not know the form of {names} ({len(strange)} in all)"
            (terminal.fail if expected else terminal.say)(said)
        spared = [layer.name for layer in layers if layer.exempt and layer.asked is None]
        if expected and spared and not self.json:
            names = ", ".join(spared[:3]) + (f" and {len(spared) - 3} more" if len(spared) > 3 else "")
            terminal.write(f"not asked for {expected}: {names}; why is in brackets above")
        if broken:
            terminal.fail(f"{broken[0].name} breaks {broken[0].asked}: {broken[0].problem}")
        return 1 if broken or (expected and strange) else 0


def stored_layers(path: Path) -> tuple[Iterator[Matrix], list[str]]:
    """Reads the layers of a folder or of a file, and the names of the matrices in it whose form is not known.

    Raises:
        UsageError: there is no such folder or safetensors file.
        ValueError: a file is damaged.
    """
    if path.is_file():
        if path.suffix != ".safetensors":
            raise UsageError(f"{path} is no .safetensors file, and nothing else is read")
        if is_ours(path):
            return own_matrices(path, {}), []
        tensors = Shards(path)
        return matrices(tensors, {}, {}), not_understood(tensors, {})
    check_folder(path)
    files = model_files(path)
    ours = [path] if described(path) is not None else [file for file in files if is_ours(file)]
    ours = ours or ([] if files else [path / COMPRESSED])
    left = _left_out(path)
    roles: dict[str, Role | None] = {**roles_of(path, set() if ours else names_in(files))}
    if ours:
        roles.update(exempt_roles(roles, roles, left or {}))
        return own_matrices(ours[0], roles), []
    masks = read_masks(path / MASKS) if (path / MASKS).exists() else {}
    names = names_in(files)
    if left is None and masks:  # every layer that prune_ prunes has a mask
        left = {name: "no stored mask" for name in names | roles.keys() if name not in masks}
    if masks.keys() - names:  # transformers 5 writes some models, ViT for one, under other names than their modules'
        roles.update(exempt_roles(roles, roles, left or {}))
        return model_matrices(load_dense(str(path), "cpu", masks=False), roles, masks), []
    tensors = Shards(files)
    roles.update(exempt_roles(roles, names | roles.keys(), left or {}))
    return matrices(tensors, roles, masks), not_understood(tensors, roles)


def _left_out(folder: Path) -> dict[str, str] | None:
    """Returns why ``sparsekit prune`` left layers out, by name, as its report says; None if there is no report."""
    try:
        report = json.loads((folder / REPORT).read_text(encoding="utf-8"))
        return {each["name"]: f"left out: {each['reason']}" for each in report["skipped"]}
    except (OSError, ValueError, LookupError, TypeError):
        return None


def inspected(matrix: Matrix, expected: Pattern | None) -> Inspected:
    """Inspects one layer; a stored mask is checked even if no pattern is expected."""
    weight, axis = matrix.weight, matrix.role.axis
    kept = _rows(grouped(_nonzero(weight), axis), matrix.role)
    flat = kept.flatten(1) if weight.dim() > 2 else kept
    dense = grouped(weight, axis)
    pattern, asked, problem = found_pattern(kept), None, None
    stored = matrix.info.pattern if matrix.info else None
    if stored is not None:
        assert matrix.mask is not None
        asked, problem = str(stored), _first_break_of_mask(kept, _rows(grouped(matrix.mask, axis), matrix.role), stored)
        if stored.tiers:
            pattern = tier_shares(flat, stored)[1]
    exempt = matrix.role.exempt
    if expected is not None and expected.m and dense.shape[-1] < expected.m:
        exempt = "too few inputs"
    if expected is not None and not exempt and problem is None:
        asked, problem = str(expected), first_break(kept, expected)
    zeros = weight.numel() - int(kept.sum())
    return Inspected(
        matrix.name,
        tuple(weight.shape),
        str(weight.dtype).removeprefix("torch."),
        zeros,
        zeros / max(weight.numel(), 1),
        pattern + (f" ({exempt})" if exempt else ""),
        exempt or None,
        asked,
        problem,
        weight.nbytes,
        matrix.stored,
        packed_bytes(dense, flat, stored),
    )


def _nonzero(weight: Tensor) -> Tensor:
    if not weight.is_floating_point():
        return weight != 0
    return nonzero(weight.float() if weight.element_size() == 1 else weight)  # float8 is compared as float32


def _rows(kept: Tensor, role: Role) -> Tensor:
    """Joins the matrices of experts to one with the rows of all; leaves another layer's matrix as it is."""
    return kept.flatten(0, 1) if role.experts else kept


def _first_break_of_mask(kept: Tensor, mask: Tensor, stored: Pattern) -> str | None:
    """Returns where a weight first breaks its stored mask, or the mask its pattern; None if neither does."""
    wrong = kept & ~mask
    if not bool(wrong.any()):
        return first_break(mask, stored)
    row, *rest = wrong.nonzero()[0].tolist()
    return f"row {row}, input {rest[-1]} is not zero, and its stored mask drops it"


def totals(layers: list[Inspected]) -> dict[str, Any]:
    """Sums up the sparsity and bytes of all layers; a layer without a packed form counts as dense."""
    weights = sum(math.prod(layer.shape) for layer in layers)
    packed = sum(layer.dense_bytes if layer.packed_bytes is None else layer.packed_bytes for layer in layers)
    return {
        "sparsity": sum(layer.zeros for layer in layers) / max(weights, 1),
        "dense_bytes": sum(layer.dense_bytes for layer in layers),
        "stored_bytes": sum(layer.stored_bytes for layer in layers),
        "packed_bytes": packed,
    }


def _show(layers: list[Inspected]) -> None:
    rows = [
        (
            layer.name,
            "x".join(map(str, layer.shape)),
            layer.dtype,
            f"{layer.sparsity:.2%}",
            layer.pattern,
            terminal.size(layer.dense_bytes),
            "-" if layer.packed_bytes is None else terminal.size(layer.packed_bytes),
            "" if layer.asked is None else f"{layer.asked} {'holds' if layer.problem is None else 'BROKEN'}",
            layer.problem or "",
        )
        for layer in layers
    ]
    sums = totals(layers)
    sizes = terminal.size(sums["dense_bytes"]), terminal.size(sums["packed_bytes"])
    rows.append((f"{len(layers)} layers", "", "", f"{sums['sparsity']:.2%}", "", *sizes, "", ""))
    head = ("layer", "shape", "dtype", "sparsity", "has", "dense", "packed", "asked", "first break")
    terminal.table(head, rows, left=("has", "asked", "first break"))
