"""The HTML report: it needs no other file, runs no script, and shows names as text."""

import base64
import json
import math
from html.parser import HTMLParser

import pytest
import torch
from commands import prune, results, write_model
from torch import nn

import sparsekit as sk
from sparsekit.masks import MaskInfo, Pattern, set_mask

for package in ("tyro", "rich", "PIL", "transformers"):
    pytest.importorskip(package)

HOSTILE = "<script>alert(1)</script>\"'&<img src=x onerror=y>"


class Page(HTMLParser):
    """Its elements, what is text in it, and what it would load."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.loaded, self.words, self.open = [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        assert not [name for name, _ in attributes if name.startswith("on")]
        self.loaded += [value for name, value in attributes if name in ("src", "href", "xlink:href")]
        if tag not in ("meta", "img", "br", "line", "rect"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        if self.open and self.open[-1] == tag:
            self.open.pop()

    def handle_data(self, data):
        self.words.append(data)


def page_of(path):
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    assert all(source.startswith("data:image/png;base64,") for source in page.loaded)
    assert "url(" not in text and "@import" not in text and text.startswith("<!doctype html>")
    return page


def test_a_report_of_everything(tmp_path, capsys, ratios):
    model = write_model(tmp_path / "model")
    (tmp_path / "held_out.txt").write_text("One held-out sentence, and another one. " * 9, encoding="utf-8")
    out = tmp_path / "out"
    found = results(prune(model, out, "--eval", tmp_path / "held_out.txt", "--report"), capsys)
    page = page_of(out / "report.html")
    words = " ".join(page.words)
    assert page.tags.count("svg") == 2 and page.tags.count("rect") == 28 and page.tags.count("img") == 7
    assert not page.open
    assert "Wanda(pattern='2:4')" in words and "50.00%" in words and f"{found['error']:.4f}" in words
    assert f"{found['perplexity']['dense']:.2f} → {found['perplexity']['pruned']:.2f}" in words
    for layer in found["layers"]:
        assert layer["name"] in page.words and f"{layer['error']:.4f}" in page.words
    for source in page.loaded:
        assert base64.b64decode(source.partition(",")[2]).startswith(b"\x89PNG")

    ratios["compressed"] = 1.25
    results(["compress", out, "--tokens", 4], capsys)
    timed = results(["bench", out, "--tokens", 4, "--seconds", 0.01, "--report"], capsys)
    page = page_of(out / "report.html")
    assert json.loads((out / "bench.json").read_text()) == timed
    assert page.tags.count("svg") == 3 and "1.25x (1.25x)" in page.words and "8 of 32x32" in page.words
    assert f"{timed['models']['4']['plain']['tokens_per_second']:,.0f} tokens/s" in page.words


def test_a_hostile_name_is_text(tmp_path):
    from sparsekit.cli.page import write_page

    layer = {"name": HOSTILE, "shape": [2, 4], "pattern": "2:4", "sparsity": 0.5, "error": 0.25, "seconds": 1.0}
    report = {
        "model": HOSTILE,
        "architecture": HOSTILE,
        "method": HOSTILE,
        "pattern": HOSTILE,
        "calibration": {"text": HOSTILE, "windows": 1, "window": 2, "seed": 0},
        "perplexity": None,
        "layers": [{**layer, "dense_bytes": 32, "packed_bytes": None}],
        "skipped": [{"name": HOSTILE, "reason": HOSTILE}],
        "sparsity": 0.5,
        "error": 0.25,
        "seconds": 2.0,
    }
    (tmp_path / "report.json").write_text(json.dumps(report), encoding="utf-8")
    packed = {"shape": [2, 4], "decision": HOSTILE, "reason": HOSTILE}
    machine = {"device": HOSTILE, "torch": HOSTILE}
    sizes = {"bytes_before": 64, "bytes_after": 32, "tokens": [HOSTILE]}
    (tmp_path / "compress.json").write_text(json.dumps({"layers": [packed], "machine": machine, **sizes}))
    write_page(tmp_path)
    page = page_of(tmp_path / "report.html")
    assert page.words.count(HOSTILE) >= 7 and "img" not in page.tags and not page.open
    assert any(word.startswith(f"For passes of {HOSTILE} tokens") for word in page.words)


def test_pictures_of_masks(tmp_path):
    from sparsekit.cli.pictures import thumbnail

    mask = torch.tensor([[True, False], [False, True]])
    picture, what = thumbnail(mask.repeat(100, 100), MaskInfo(Pattern.parse("1:2"), 1))
    assert picture.shape == (64, 64, 3) and what.startswith("1:2, the first 64 rows")
    assert picture[0, 0].tolist() == [24, 45, 92] and picture[0, 1].tolist() == [240, 243, 248]
    transposed = mask.new_zeros(4, 8)
    transposed[:, 0] = True
    assert thumbnail(transposed, MaskInfo(Pattern.parse("2:4"), 0))[0].shape == (8, 4, 3)
    shares, _ = thumbnail(torch.ones(300, 200).bool(), MaskInfo(Pattern.parse("50%"), 1))
    assert shares.shape == (96, 96, 3)

    layer = nn.Linear(32, 16, bias=False)
    kept = torch.ones(16, 32, dtype=torch.bool)
    kept[:, 17:] = False
    kept[1:, 16] = False
    layer.weight.data[~kept] = 0
    set_mask(layer, kept, MaskInfo(Pattern.parse("tiers 16x16 k=10"), 1))
    sk.save(nn.Sequential(layer), tmp_path / "masks.safetensors", format="masks")
    tiers, what = thumbnail(kept, layer.weight_mask_info)
    assert tiers.tolist() == [[[24, 45, 92], [252, 214, 112]]]
    assert what == "every 16x16 block: 50% dense, 0% 2:4, 50% top-10"


def test_bars():
    from sparsekit.cli.charts import bars

    drawn = Page(bars([0.1, None, 0.3], ["a.q", "a.k", "b.q"], "errors"))
    assert drawn.tags.count("rect") == 2 and drawn.words.count("0.3") == 1
    assert {"a.q: 0.1000", "b.q: 0.3000"} <= set(drawn.words)
    assert Page(bars([0.0], ["a"], "zeros", percent=True)).words[-1] == "a: 0.0%"
    assert bars([0.1, math.nan, math.inf], ["a", "b", "c"], "errors") == bars(
        [0.1, None, None], ["a", "b", "c"], "errors"
    )
    assert Page(bars([math.nan], ["a"], "errors")).words == ["0", "0.5", "1"]


@pytest.mark.parametrize(
    ("value", "top"),
    [(0.0, 1), (math.nan, 1), (math.inf, 1), (1.0, 1), (1.2, 1.5), (0.035, 0.04), (7, 8), (9e-5, 1e-4), (1234, 1500)],
)
def test_round_tops(value, top):
    from sparsekit.cli.charts import _round_up

    assert _round_up(value) == pytest.approx(top)
