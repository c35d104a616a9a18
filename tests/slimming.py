"""Tiny models of transformers with random weights, and examples for them."""

from contextlib import suppress

import pytest
import torch
from torch import nn

CLASSES = {
    "bert": ("Bert", "ForSequenceClassification"),
    "distilbert": ("DistilBert", "ForSequenceClassification"),
    "roberta": ("Roberta", "ForSequenceClassification"),
    "vit": ("ViT", "ForImageClassification"),
    "gpt2": ("GPT2", "LMHeadModel"),
    "llama": ("Llama", "ForCausalLM"),
}
SIZES = {
    "bert": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24},
    "distilbert": {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 24},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": 24, "n_positions": 16},
}
SIZES["roberta"] = SIZES["bert"] | {"max_position_embeddings": 16}
SIZES["vit"] = SIZES["bert"] | {"image_size": 8, "patch_size": 4}
SIZES["llama"] = SIZES["bert"] | {"num_key_value_heads": 2}


def tiny(name, dtype=torch.float64, **changes):
    """Returns a model whose weights and biases are all random, and an example for it."""
    transformers = pytest.importorskip("transformers")
    prefix, suffix = CLASSES[name]
    words = {} if name == "vit" else {"vocab_size": 40}
    config = getattr(transformers, f"{prefix}Config")(**SIZES[name] | words | changes)
    model = getattr(transformers, prefix + suffix)(config).to(dtype).eval()
    return scatter(model), example(name, dtype)


def scatter(model, scale=0.2):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter) * scale)
    return model


def example(name, dtype=torch.float64):
    if name == "vit":
        return {"pixel_values": torch.randn(2, 3, 8, 8, dtype=dtype)}
    return (
        {"input_ids": torch.randint(0, 40, (2, 7)), "use_cache": False}
        if name in ("gpt2", "llama")
        else {"input_ids": torch.randint(0, 40, (2, 7))}
    )


def logits(model, batch):
    with torch.no_grad():
        result = model(**batch) if isinstance(batch, dict) else model(batch)
    with suppress(AttributeError):
        return result.logits
    return result


def plain():
    """Returns a plain model of linear layers in float64, and an example for it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = nn.Linear(6, 12), nn.Sigmoid(), nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 3)
    model = nn.Sequential(*layers).double()
    return model, torch.randn(5, 6, dtype=torch.float64)


def zero_rows(model, branch, units):
    """Zeroes the rows of the layers that write these units, and keeps their biases, as row-masking does."""
    from sparsekit.slim.resize import channels, sides, weight_dim

    with torch.no_grad():
        for layer, side, width, segments in sides(branch, model):
            if side == "outputs":
                layer.weight.index_fill_(weight_dim(layer, side), channels(units, branch.units, width, segments), 0)
