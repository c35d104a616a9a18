"""The run frame: a folder for each training run, which goes on exactly where it was killed."""

from .position import Position, epoch_batches
from .run import Run
from .status import Status, read_status
from .trackers import RunTracker, open_tracker

__all__ = ["Position", "Run", "RunTracker", "Status", "epoch_batches", "open_tracker", "read_status"]
