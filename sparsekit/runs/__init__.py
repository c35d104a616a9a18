"""The run frame: a folder for each training run, which goes on exactly where it was killed."""

from .position import Position, epoch_batches
from .run import Run
from .status import Status, read_status

__all__ = ["Position", "Run", "Status", "epoch_batches", "read_status"]
