"""Trackers: swanlab, wandb, tensorboard and trackio, opened through accelerate for one run."""

import secrets
import string
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, get_args

from .._json import parse_json, to_json, write_json
from .._version import DISTRIBUTION

TrackerName = Literal["swanlab", "wandb", "tensorboard", "trackio", "none"]
LETTERS = string.ascii_lowercase + string.digits


class RunTracker:
    """A tracker that a run begins at its first record and ends with its block; after a kill it goes on.

    wandb and swanlab go on by an id that ``tracker.json`` in the run's folder holds, trackio by the names, and
    tensorboard, whose files are in ``tensorboard/`` there, hides what was recorded after the last state. wandb and
    swanlab keep a record that they have for a step, and trackio then shows both.

    Args:
        tracker: the name of the tracker.
        project_name: the project that the tracker lists the run under.
        experiment_name: the name of the run there; None is the name of its folder.
    """

    def __init__(self, tracker: TrackerName, project_name: str, experiment_name: str | None) -> None:
        self._name, self._project, self._experiment = tracker, project_name, experiment_name
        self._folder, self._config = Path(), dict[str, Any]()
        self._opened: Any = None

    def attach(self, folder: Path, config: Mapping[str, Any]) -> None:
        """Binds the tracker to the run whose records it will get."""
        self._folder, self._config = folder, dict(config)

    def log(self, values: dict[str, Any], *, step: int) -> None:
        """Gives the values of one step to the tracker, which the first call opens."""
        if self._opened is None:
            self._opened = self._open(step)
        self._opened.log(values, step=step)

    def finish(self) -> None:
        """Ends the tracker, if it was opened."""
        if self._opened is not None:
            self._opened.finish()
            self._opened = None

    def _open(self, step: int) -> Any:
        from accelerate import PartialState  # type: ignore[import-untyped]
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS  # type: ignore[import-untyped]

        PartialState()  # accelerate's own log asks for it
        experiment = self._experiment or self._folder.resolve().name
        project, begun = self._project, (self._folder / "tensorboard").exists()
        options: dict[str, Any]
        if self._name == "tensorboard":
            project = f"{project}/{experiment}"
            options = {"logging_dir": self._folder / "tensorboard", "purge_step": step}
        elif self._name == "trackio":
            options = {"name": experiment, "resume": "allow", "config": self._config}
        else:
            name = "name" if self._name == "wandb" else "experiment_name"
            options = {name: experiment, "id": self._id(), "resume": "allow", "config": self._config}
        opened: Any = LOGGER_TYPE_TO_CLASS[self._name](project, **options)
        opened.start()
        if self._name == "tensorboard" and not begun:
            opened.tracker.add_text("config", f"```\n{to_json(self._config)}\n```")
        return opened

    def _id(self) -> str:
        """Returns the id of the run in the tracker: that of before a kill, or a new one of 21 letters and digits."""
        path = self._folder / "tracker.json"
        known: dict[str, str] = {}
        if path.exists():
            try:
                known = dict(parse_json(path.read_text(encoding="utf-8")))
            except (ValueError, TypeError) as error:
                raise ValueError(f"{path} does not hold the ids of trackers: {error}") from error
        if self._name not in known:
            known[self._name] = "".join(secrets.choice(LETTERS) for _ in range(21))
            write_json(path, known)
        return known[self._name]


def open_tracker(
    tracker: TrackerName, *, project_name: str = "sparsekit", experiment_name: str | None = None
) -> RunTracker | None:
    """Returns the tracker of a run, for ``Run.open(tracker=...)``; None for ``"none"``.

    Args:
        tracker: the name of the tracker; nothing is opened before the first record.
        project_name: the project that the tracker lists the run under.
        experiment_name: the name of the run there; None is the name of its folder.

    Raises:
        ValueError: the name is of none of these trackers.
        ImportError: its package, or accelerate, is not installed.
    """
    if tracker not in get_args(TrackerName):
        raise ValueError(f"tracker must be one of {', '.join(get_args(TrackerName))}, got {tracker!r}")
    if tracker == "none":
        return None
    if find_spec("accelerate") is None:
        raise ImportError(f"a tracker needs accelerate: pip install '{DISTRIBUTION}[systems]'")
    if find_spec(tracker) is None:
        raise ImportError(f"the tracker {tracker} is not installed: pip install {tracker}")
    return RunTracker(tracker, project_name, experiment_name)
