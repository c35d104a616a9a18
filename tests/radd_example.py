"""The example of masked diffusion of text, for its tests."""

import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

PACKAGES = ("datasets", "huggingface_hub", "omegaconf", "tqdm", "transformers", "tyro")
FOLDER = Path(__file__).parent.parent / "examples" / "radd"
NAMES = (
    "checkpoints config cost data evaluation_modeling generative_perplexity load_model ngrams parallel prune run "
    "sampling train trainer"
).split()
SMALL = (
    *("model.hidden_size=16", "model.n_blocks=2", "model.n_heads=2", "model.length=16", "optim.warmup=2"),
    *("training.batch_size=4", "training.n_iters=6", "training.eval_freq=3", "training.snapshot_freq=6"),
    *("training.snapshot_freq_for_preemption=3", "training.log_freq=1", "data.held_out=4", "sampling.steps=4"),
)


@contextmanager
def example_modules():
    """The modules, imported as the scripts find their neighbors, until the end."""
    known, path = {*sys.modules}, [*sys.path]
    sys.path.insert(0, str(FOLDER))
    for name in NAMES:
        sys.modules.pop(name, None)
    try:
        yield SimpleNamespace(**{name: __import__(name) for name in NAMES})
    finally:
        sys.path[:] = path
        for name in sys.modules.keys() - known:
            if str(getattr(sys.modules[name], "__file__", "")).startswith(str(FOLDER.parent)):
                del sys.modules[name]


def write_text(folder):
    """Writes documents of words, and returns the settings that train on them."""
    path = folder / "text.txt"
    words = ("once", "upon", "a", "time", "there", "was", "a", "cat", "that", "sat", "and", "ran")
    documents = [" ".join(words[(i * j + i) % len(words)] for j in range(20)) + f" {i}." for i in range(40)]
    path.write_text("<|endoftext|>".join(documents), "utf-8")
    return (f"data.train={path}", f"data.valid={path}")
