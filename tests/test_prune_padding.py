"""Padding counts nowhere: a padded batch gives what its sentences give."""

import copy

import pytest
import torch
from torch import nn

import sparsekit as sk
from sparsekit.masks import Pattern, get_mask
from sparsekit.prune.calibration.padding import real_tokens
from sparsekit.prune.layers import find_layers
from sparsekit.tiers import Ratios, Step, TierOptions, progressive_tiers, tier_iteration

LENGTHS = (3, 9, 1, 5)


class Tagger(nn.Module):
    """Embeds tokens; padding is embedded far away, so that it would decide every mask."""

    def __init__(self, layout="bt"):
        super().__init__()
        self.layout = layout
        self.embed = nn.Embedding(20, 16)
        self.embed.weight.data[0] = torch.randn(16) * 100
        self.blocks = nn.ModuleList([nn.Linear(16, 16) for _ in range(2)])
        self.head = nn.Linear(16, 8)

    def forward(self, input_ids, attention_mask=None):
        x = self.embed(input_ids)
        x = {"bt": x, "tb": x.transpose(0, 1), "flat": x.flatten(0, 1)}[self.layout]
        for block in self.blocks:
            x = torch.tanh(block(x))
        return self.head(x)


@pytest.fixture
def sentences():
    return [torch.randint(1, 20, (1, length)) for length in LENGTHS]


def padded(sentences, side="right", tokens=11):
    ids, mask = torch.zeros(len(sentences), tokens, dtype=torch.long), torch.zeros(len(sentences), tokens)
    for row, sentence in enumerate(sentences):
        part = slice(tokens - sentence.numel(), None) if side == "left" else slice(sentence.numel())
        ids[row, part], mask[row, part] = sentence[0], 1
    return {"input_ids": ids, "attention_mask": mask.long()}


def assert_same_pruning(one, other):
    (first, report), (second, expected) = one, other
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    for name, module in first.named_modules():
        mask = get_mask(module)
        assert mask is None or torch.equal(mask, get_mask(second.get_submodule(name)))
    for a, b in zip(report.layers, expected.layers, strict=True):
        assert a.error == pytest.approx(b.error, rel=1e-4)


def pruned(model, method, batches, **options):
    model = copy.deepcopy(model)
    return model, sk.prune_(model, method, batches, calibration=sk.Calibration(**options))


@pytest.mark.parametrize("layout", ["bt", "tb", "flat"])
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("method", [sk.Magnitude("2:4"), sk.Wanda("2:4"), sk.SparseGPT("2:4")], ids=str)
def test_padded_sentences_are_sentences(layout, side, method, sentences):
    model = Tagger(layout)
    batch = padded(sentences, side)
    single = [{"input_ids": each} for each in sentences]
    assert_same_pruning(pruned(model, method, [batch]), pruned(model, method, single))
    assert_same_pruning(
        pruned(model, method, [batch], sequential=False), pruned(model, method, single, sequential=False)
    )
    other, _ = pruned(model, sk.Wanda("2:4"), [batch["input_ids"]])  # without a mask the padding decides
    assert not torch.equal(get_mask(other.blocks[0]), get_mask(pruned(model, sk.Wanda("2:4"), single)[0].blocks[0]))


def test_a_function_says_what_counts(sentences):
    model, batch = Tagger(), padded(sentences)
    expected = pruned(model, sk.Wanda("2:4"), [{"input_ids": each} for each in sentences])
    assert_same_pruning(
        pruned(model, sk.Wanda("2:4"), [(batch["input_ids"],)], token_mask=lambda batch: batch[0] != 0), expected
    )
    everything = pruned(model, sk.Wanda("2:4"), [batch["input_ids"]])
    assert_same_pruning(pruned(model, sk.Wanda("2:4"), [batch], token_mask=lambda batch: None), everything)


def test_tiers_leave_padding_out(sentences):
    model, batch, step = Tagger(), padded(sentences), Step(1, Ratios(0.0, 1.0, 0.0), 1.0, 0.0, 0.0)
    masks = []
    for batches, options in (
        ([batch], {}),
        ([{"input_ids": each} for each in sentences], {}),
        ([batch["input_ids"]], {"token_mask": lambda ids: ids != 0}),
        ([batch["input_ids"]], {}),
    ):
        each = copy.deepcopy(model)
        tier_iteration(each, step, batches, options=TierOptions(calibration=sk.Calibration(**options)))
        masks.append(get_mask(each.blocks[0]))
    assert torch.equal(masks[0], masks[1]) and torch.equal(masks[0], masks[2]) and not torch.equal(masks[0], masks[3])
    each = copy.deepcopy(model)
    progressive_tiers(
        each,
        [step],
        batch["input_ids"],
        lambda *_: None,
        options=TierOptions(calibration=sk.Calibration(token_mask=lambda ids: ids != 0)),
    )
    assert torch.equal(get_mask(each.blocks[0]), masks[0])


def test_a_batch_of_padding_alone_counts_nothing(sentences):
    model, batch = Tagger(), padded(sentences)
    nothing = {key: torch.zeros_like(value) for key, value in batch.items()}
    assert_same_pruning(pruned(model, sk.Wanda("2:4"), [nothing, batch]), pruned(model, sk.Wanda("2:4"), [batch]))
    with pytest.raises(ValueError, match="no calibration batch reached any of the selected layers"):
        sk.prune_(model, sk.Wanda("2:4"), [nothing])


def layer_named(name="layer", kind=None):
    return find_layers(nn.ModuleDict({name: kind or nn.Linear(4, 4)}), Pattern.parse("50%"), "input", None)[0][0]


MASK = torch.tensor([[1, 1, 0], [0, 0, 0]])


@pytest.mark.parametrize(
    ("mask", "shape", "kept"),
    [
        (MASK, (2, 3, 4), [0, 1]),
        (MASK.bool(), (2, 3, 4), [0, 1]),
        (MASK * 7, (2, 3, 4), [0, 1]),  # numbers of packed sequences
        (MASK.float() / 2, (2, 3, 4), [0, 1]),
        (MASK, (3, 2, 4), [0, 2]),
        (MASK, (6, 4), [0, 1]),
        (MASK, (2, 4), [0]),  # pooled: the second sentence is none
        (MASK, (2, 5, 4), [0, 1, 2, 3, 4]),  # tokens of another kind, of the first sentence
        (MASK, (7, 4), list(range(7))),
        (MASK[:, None, None], (2, 3, 4), list(range(6))),  # says what attends to what
        (MASK[0], (2, 3, 4), list(range(6))),
        (None, (2, 3, 4), list(range(6))),
        ("no tensor", (2, 3, 4), list(range(6))),
    ],
)
def test_what_a_mask_keeps(mask, shape, kept):
    x = torch.arange(torch.Size(shape).numel()).view(shape).float()
    got = real_tokens(x, layer_named(), {"attention_mask": mask})
    assert got.reshape(-1, 4)[:, 0].tolist() == [4.0 * row for row in kept]


def test_heads_of_a_token_go_with_it():
    x = torch.randn(2, 3, 5, 4)
    assert torch.equal(real_tokens(x, layer_named(), {"attention_mask": MASK}), x[0, :2])


def test_convolutions_count_whole():
    conv = layer_named(kind=nn.Conv2d(4, 4, 1))
    x = torch.randn(2, 3, 4, 4)
    assert real_tokens(x, conv, {"attention_mask": MASK[:1].expand(2, 3)}) is x
    assert torch.equal(real_tokens(x, conv, {"attention_mask": MASK}), x[:1])  # but for what is no sentence


def test_encoder_and_decoder():
    long, short = torch.tensor([[1, 1, 1, 0]]), torch.tensor([[1, 0]])
    batch = {"attention_mask": long, "decoder_attention_mask": short}
    for name in ("encoder", "decoder"):
        layer = layer_named(name)
        assert [len(real_tokens(torch.randn(1, n, 4), layer, batch)) for n in (4, 2)] == [3, 1]
    batch = {"attention_mask": long, "decoder_attention_mask": torch.tensor([[1, 1, 0, 0]])}
    assert [len(real_tokens(torch.randn(1, 4, 4), layer_named(name), batch)) for name in ("encoder", "decoder")] == [
        3,
        2,
    ]
    x = torch.randn(1, 4, 4)
    batch = {"attention_mask": long, "decoder_input_ids": torch.ones(1, 4, dtype=torch.long)}
    assert real_tokens(x, layer_named("decoder"), batch) is x  # the decoder has no padding


@pytest.mark.parametrize(
    ("batch", "token_mask", "error", "message"),
    [
        ({"attention_mask": -MASK.float()}, None, ValueError, "attention_mask has negative entries"),
        ({}, lambda batch: -MASK, ValueError, "token_mask has negative entries"),
        ({}, lambda batch: [1, 0], TypeError, r"token_mask must return a tensor \[batch, tokens\] or None, got list"),
        ({}, lambda batch: MASK[0], TypeError, r"token_mask must return .* got \(3,\)"),
    ],
)
def test_masks_that_say_something_else(batch, token_mask, error, message):
    with pytest.raises(error, match=message):
        real_tokens(torch.randn(2, 3, 4), layer_named(), batch, token_mask)
