"""What 8-bit weights and inputs cost in perplexity, over what 2:4 costs, on a trained language model."""

import copy

import pytest
import torch
from language import one_thread, stories, story_rows
from torch import nn

import sparsekit as sk
from sparsekit.nn import Int8Linear, QuantizedLinear24


def fine_tuned(data, method, updates=100):
    """The model, pruned and trained for a while with its masks kept."""
    language, rows = stories(data), story_rows(data, 200, 900)
    model = copy.deepcopy(language.model)
    sk.prune_(model, method, language.batches)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    sk.keep_masks(model, optimizer)
    torch.manual_seed(0)
    with one_thread():
        for _ in range(updates):
            batch = rows[torch.randint(len(rows), (8,))]
            optimizer.zero_grad()
            model.train()(input_ids=batch, labels=batch).loss.backward()
            optimizer.step()
    return model.eval()


def rounded(model, form, **options):
    """A copy with all layers of its blocks in a lossy form."""
    model = copy.deepcopy(model)
    for name, layer in list(model.model.layers.named_modules()):
        if isinstance(layer, nn.Linear):
            model.model.layers.set_submodule(name, form.from_linear(layer, **options))
    return model


@pytest.mark.slow
@pytest.mark.parametrize("method", [sk.Wanda("2:4"), sk.SparseGPT("2:4")], ids=["wanda", "sparsegpt"])
def test_int8_costs_less_than_half_a_percent_of_perplexity_over_24(data, method):
    """Rounding moves each logit a little, up or down. Of a model that was only pruned, whose loss is far from its
    minimum, that moves the perplexity either way: by 0.4 % with random rounding, and by nothing on average.
    """
    language, model = stories(data), fine_tuned(data, method)
    sparse = language.perplexity(model)
    for inputs in ("float", "int8"):
        quantized = language.perplexity(rounded(model, QuantizedLinear24, inputs=inputs))
        assert abs(quantized / sparse - 1) < 0.005, inputs
    assert abs(language.perplexity(rounded(model, Int8Linear)) / sparse - 1) < 0.005
    four_bits = language.perplexity(rounded(model, QuantizedLinear24, quant_type="nf4"))
    assert 1.02 < four_bits / sparse < 1.3  # so that the test can tell
