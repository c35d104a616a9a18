"""A pytest plugin: the benches run on tiny weights, each call once, so that a test can try all of them."""

from bench import shapes, timing

TINY = {"SQUARE": (256, 64), "UP": (64, 64), "LINEAR": ((64, 64),), "MODEL": ((64, 64),), "SPARSEGPT": ((64, 64),)}
TINY |= {
    "GROUPS": (4096, 4),
    "BERT_UP": (96, 64),
    "BERT_DOWN": (64, 96),
    "CONVOLUTIONS": (("unet", 1, 16, 16, 8, 3), ("resnet", 2, 16, 8, 8, 1)),
}


def pytest_configure():
    for key, value in TINY.items():
        setattr(shapes, key, value)
    timing.MAX_ROUNDS = 1
