"""The example that distills and prunes classifiers, for its tests."""

import random
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

FOLDER = Path(__file__).parent.parent / "examples" / "distilbert"
NAMES = "compare config data download_model evaluate models pipeline prune_finetune quantize run show stages trainer"
GOOD, BAD = ("fine", "great", "lovely", "warm"), ("awful", "bad", "dull", "weak")
PLAIN = ("a", "film", "the", "plot", "with", "and", "cast", "it", "is", "music")


@contextmanager
def example_modules():
    """The modules, imported as the scripts find their neighbors, until the end."""
    known, path = {*sys.modules}, [*sys.path]
    sys.path.insert(0, str(FOLDER))
    try:
        yield SimpleNamespace(**{name: __import__(name) for name in NAMES.split()})
    finally:
        sys.path[:] = path
        for name in sys.modules.keys() - known:
            if str(getattr(sys.modules[name], "__file__", "")).startswith(str(FOLDER)):
                del sys.modules[name]


def write_reviews(folder):
    """Writes sentences that are good or bad by one word of theirs, and a vocabulary, as the example reads both."""
    draw = random.Random(0)
    sst2, vocabulary = folder / "sst2", folder / "bert_vocab"
    sst2.mkdir(parents=True)
    vocabulary.mkdir()
    for name, count in (("train", 640), ("dev", 96), ("test", 200)):
        lines = ["label\tsentence"]
        for _ in range(count):
            label = draw.randrange(2)
            words = [*draw.choices(PLAIN, k=draw.randint(3, 9)), draw.choice((BAD, GOOD)[label])]
            lines.append(f"{label}\t{' '.join(draw.sample(words, len(words)))}")
        (sst2 / f"{name}.tsv").write_text("\n".join(lines) + "\n", "utf-8")
    pieces = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "never", *GOOD, *BAD, *PLAIN)
    (vocabulary / "vocab.txt").write_text("\n".join(dict.fromkeys(pieces)) + "\n", "utf-8")
