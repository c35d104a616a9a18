"""What this example takes from examples/ddpm: data sets, pictures, the classifier of images, and timing."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "ddpm"))

from classifier import predicted, trained_classifier
from config import Config, config_of, device_of
from data import LOCAL, Images, Part, as_bytes, load, scaled
from model import Eps
from show import read_records, save_grid
from speed import compress_and_time

__all__ = [
    "LOCAL",
    "Config",
    "Eps",
    "Images",
    "Part",
    "as_bytes",
    "compress_and_time",
    "config_of",
    "device_of",
    "load",
    "predicted",
    "read_records",
    "save_grid",
    "scaled",
    "trained_classifier",
]
