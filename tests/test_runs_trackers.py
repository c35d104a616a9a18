"""Trackers: what they receive, and that they go on with the run."""

import sys

import pytest
from running import CONFIG, Part

from sparsekit.runs import Run, open_tracker


def train(folder, tracker, start, stop, *, crash=False):
    """Makes the steps after ``start`` and stores the state after the first of them."""
    with Run.open(folder, CONFIG, tracker=tracker) as run:
        run.restore(part=Part())
        assert run.step == start
        while run.step < stop:
            run.step += 1
            run.record(loss=1 / run.step)
            if run.step == start + 1:
                run.save()
        if crash:
            raise OSError("no more data")


def test_none_is_no_tracker():
    assert open_tracker("none") is None
    with pytest.raises(ValueError, match="tracker must be one of swanlab, wandb, tensorboard, trackio, none, got 'x'"):
        open_tracker("x")


@pytest.mark.parametrize(("missing", "message"), [("wandb", "pip install wandb"), ("accelerate", r"\[systems\]")])
def test_what_is_not_installed_is_named(monkeypatch, missing, message):
    monkeypatch.setattr("sparsekit.runs.trackers.find_spec", lambda name: None if name == missing else object())
    with pytest.raises(ImportError, match=message):
        open_tracker("wandb")


@pytest.mark.slow
def test_tensorboard_goes_on_with_the_run(tmp_path):
    pytest.importorskip("accelerate")
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def opened():
        return open_tracker("tensorboard", project_name="digits", experiment_name="first")

    with pytest.raises(OSError, match="no more data"):
        train(tmp_path, opened(), 0, 3, crash=True)
    train(tmp_path, opened(), 1, 5)
    assert len(list((tmp_path / "tensorboard/digits/first").iterdir())) == 2
    events = EventAccumulator(str(tmp_path / "tensorboard/digits/first")).Reload()
    assert [(each.step, each.value) for each in events.Scalars("loss")] == [
        (step, pytest.approx(1 / step)) for step in (1, 2, 3, 4, 5)
    ]
    assert b'"lr": 0.1' in events.Tensors("config/text_summary")[0].tensor_proto.string_val[0]


FAKE = """
calls = []
config = {}

def init(**options):
    calls.append(("init", options))
    return Opened()

class Opened:
    def log(self, values, step):
        calls.append(("log", step, values))

    def finish(self):
        calls.append(("finish",))
"""


@pytest.mark.parametrize("name", ["wandb", "swanlab", "trackio"])
def test_what_a_tracker_is_told(tmp_path, monkeypatch, name):
    """The packages are replaced by one that notes how accelerate calls them."""
    pytest.importorskip("accelerate")
    (tmp_path / f"{name}.py").write_text(FAKE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.raises(OSError, match="no more data"):
        train(tmp_path / "run", open_tracker(name, project_name="digits"), 0, 2, crash=True)
    train(tmp_path / "run", open_tracker(name, project_name="digits"), 1, 2)
    first, *logs, end, again, log, last = sys.modules[name].calls
    assert first == again and logs == [("log", 1, {"loss": 1.0}), ("log", 2, {"loss": 0.5})] and log == logs[1]
    assert end == last == ("finish",)
    options = dict(first[1])
    assert options.pop("config") == {**CONFIG, "sizes": [4, 2]}
    if name != "trackio":
        assert len(options.pop("id")) == 21
    key = "experiment_name" if name == "swanlab" else "name"
    assert options == {"project": "digits", "resume": "allow", key: "run"}
    monkeypatch.delitem(sys.modules, name)
