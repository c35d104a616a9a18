"""``SlimPlan``: which units of a model stay, in a form that can be stored and applied to an empty model."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal

FORMAT = "sparsekit slim plan 1"
MAX_COUNT = 2**24  # so that a damaged file cannot ask for more memory than a real one


@dataclass(frozen=True)
class Branch:
    """A feed-forward block or an attention, as the layers that hold its units.

    Every writer has one or more segments of equal size, such as query, key and value, and a segment has the channels of
    one unit after those of another.

    Args:
        reader: the name of the layer that reads the units, each from ``width`` of its inputs.
        units: how many units there are.
        width: the inputs of the reader that belong to a unit: 1 for a neuron.
        writers: the names of the layers whose outputs make the units, each with its number of segments.
        attributes: integers of modules, by their full names, that are multiples of the number of units.
    """

    reader: str
    units: int
    width: int
    writers: tuple[tuple[str, int], ...]
    attributes: tuple[str, ...] = ()

    @property
    def kind(self) -> Literal["neuron", "head"]:
        """What a unit is: a neuron of a feed-forward block, or an attention head."""
        return "neuron" if self.width == 1 else "head"


@dataclass(frozen=True)
class Stages:
    """A list of modules of one class that are called one after the other, such as the layers of an encoder.

    Args:
        name: the name of the ``ModuleList`` that holds them.
        count: how many there are.
    """

    name: str
    count: int


@dataclass(frozen=True)
class SlimPlan:
    """Which units and stages of a model stay. ``slim_`` removes the others.

    It names the layers, so that a slim model can be built again from it. The ``per_layer_config`` of transformers could
    say how many units a layer has, but no model of transformers 5.23 is built by it.

    Args:
        units: the indices of the units that stay, ascending, at least one for each branch.
        stages: the indices of the stages that stay, likewise.

    Raises:
        ValueError: indices are not ascending or out of range, or none is left.
    """

    units: Mapping[Branch, tuple[int, ...]]
    stages: Mapping[Stages, tuple[int, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for branch, kept in self.units.items():
            _check(kept, branch.units, f"units of {branch.reader!r}")
        for stages, kept in self.stages.items():
            _check(kept, stages.count, f"stages of {stages.name!r}")

    def __str__(self) -> str:
        lines = [f"{len(kept)} of {each.units} {each.kind}s stay in {each.reader}" for each, kept in self.units.items()]
        lines += [f"{len(kept)} of {each.count} stages stay in {each.name}" for each, kept in self.dropping_stages()]
        return "\n".join(lines)

    def dropping_units(self) -> Iterator[tuple[Branch, tuple[int, ...]]]:
        """Yields the branches of which units are dropped, with those that stay."""
        return ((branch, kept) for branch, kept in self.units.items() if len(kept) < branch.units)

    def dropping_stages(self) -> Iterator[tuple[Stages, tuple[int, ...]]]:
        """Yields the stages of which some are dropped, with those that stay."""
        return ((stages, kept) for stages, kept in self.stages.items() if len(kept) < stages.count)

    def without_stages(self) -> "SlimPlan":
        """Returns the plan for the units alone, with the names that they have once the dropped stages are gone."""
        renamed = {new: kept for branch, kept in self.units.items() if (new := self._renamed(branch)) is not None}
        return SlimPlan(renamed)

    def after(self, earlier: "SlimPlan") -> "SlimPlan":
        """Returns the plan that does at once what ``earlier`` and then this one do, neither of which drops stages."""
        known = {branch.reader: (branch, kept) for branch, kept in earlier.units.items()}
        units = dict(earlier.units)
        for branch, kept in self.units.items():
            first, before = known.get(branch.reader, (branch, tuple(range(branch.units))))
            units[first] = tuple(before[index] for index in kept)
        return SlimPlan(units)

    def to_json(self) -> dict[str, Any]:
        """Returns the plan as plain values for JSON, with indices as ranges: ``"0-5,7"``."""
        units = {
            branch.reader: {
                "units": branch.units,
                "width": branch.width,
                "kept": _ranges(kept),
                "writers": dict(branch.writers),
                "attributes": list(branch.attributes),
            }
            for branch, kept in self.units.items()
        }
        stages = {each.name: {"count": each.count, "kept": _ranges(kept)} for each, kept in self.stages.items()}
        return {"format": FORMAT, "units": units, "stages": stages}

    @classmethod
    def from_json(cls, data: Any) -> "SlimPlan":
        """Returns the plan that ``to_json`` wrote.

        Raises:
            ValueError: it is something else.
        """
        try:
            if data["format"] != FORMAT:
                raise ValueError(f"its format is {data['format']!r}, not {FORMAT!r}")
            branches = {_branch(name, each): each["kept"] for name, each in data["units"].items()}
            stages = {Stages(_name(name), _count(each["count"])): each["kept"] for name, each in data["stages"].items()}
            return cls(
                {branch: _indices(text, branch.units) for branch, text in branches.items()},
                {each: _indices(text, each.count) for each, text in stages.items()},
            )
        except (TypeError, KeyError, AttributeError, ValueError) as error:
            raise ValueError(f"this is no slim plan: {type(error).__name__}: {error}") from error

    def _renamed(self, branch: Branch) -> Branch | None:
        names = [branch.reader, *(name for name, _ in branch.writers), *branch.attributes]
        for stages, kept in self.dropping_stages():
            prefix = f"{stages.name}."
            if branch.reader.startswith(prefix):
                index = int(branch.reader[len(prefix) :].split(".")[0])
                if index not in kept:
                    return None
                old, new = f"{prefix}{index}.", f"{prefix}{kept.index(index)}."
                names = [new + name.removeprefix(old) if name.startswith(old) else name for name in names]
        reader, *others = names
        count = len(branch.writers)
        writers = tuple((name, of) for name, (_, of) in zip(others[:count], branch.writers, strict=True))
        return Branch(reader, branch.units, branch.width, writers, tuple(others[count:]))


def _branch(name: str, data: Mapping[str, Any]) -> Branch:
    writers = tuple((_name(writer), _count(segments)) for writer, segments in data["writers"].items())
    attributes = tuple(map(_name, data["attributes"]))
    return Branch(_name(name), _count(data["units"]), _count(data["width"]), writers, attributes)


def _name(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"a name must be a string, got {value!r}")
    return value


def _count(value: Any) -> int:
    if type(value) is not int or not 0 < value <= MAX_COUNT:
        raise ValueError(f"a count must be an integer from 1 to {MAX_COUNT}, got {value!r}")
    return value


def _check(kept: tuple[int, ...], count: int, what: str) -> None:
    if not kept:
        raise ValueError(f"at least one of the {what} must stay")
    if kept[0] < 0 or kept[-1] >= count or any(a >= b for a, b in pairwise(kept)):
        raise ValueError(f"the {what} that stay must be ascending indices from 0 to {count - 1}, got {kept[:8]}")


def _ranges(kept: tuple[int, ...]) -> str:
    """Returns ascending indices as text: ``0-5,7``."""
    starts = [each for each, before in zip(kept, (None, *kept), strict=False) if before is None or each != before + 1]
    ends = [each for each, after in zip(kept, (*kept[1:], None), strict=True) if after != each + 1]
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True))


def _indices(text: str, count: int) -> tuple[int, ...]:
    """Returns the indices that ``_ranges`` wrote; none of them is ``count`` or larger."""
    found: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        start, end = int(first), int(last or first)
        if not 0 <= start <= end < count:
            raise ValueError(f"the indices that stay must be from 0 to {count - 1}, got {part!r}")
        found.extend(range(start, end + 1))
    return tuple(found)
