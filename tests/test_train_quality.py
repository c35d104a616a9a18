"""Sparse training gives a better 2:4 model than one-shot pruning."""

import copy

import pytest
import torch
from torch import nn

import sparsekit as sk
from sparsekit.masks import get_mask

RECIPES = {
    "straight-through": {},
    "decay": {"decay": 0.05},
    "transposable": {"backward": "transposable"},
}
recipes = pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)


def fit(model, steps, batch, loss, lr):
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(model, batch()).backward()
        optimizer.step()
    return optimizer


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """Uses one thread: products this small take far longer if two threads share a core."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def regression():
    """Returns a dense model of 48 inputs that has learned a random function, its loss, and new training data."""
    generator = torch.Generator().manual_seed(1)
    first, second = (torch.randn(*shape, generator=generator) for shape in ((48, 32), (32, 8)))

    def batch(size=128):
        x = torch.randn(size, 48, generator=generator)
        return x, torch.tanh(x @ first / 48**0.5) @ second / 32**0.5

    def loss(model, batch):
        return (model(batch[0]) - batch[1]).square().mean()

    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(48, 96), nn.Tanh(), nn.Linear(96, 96), nn.Tanh(), nn.Linear(96, 8))
    fit(dense, 400, batch, loss, 3e-3)
    return dense, batch, loss


@recipes
def test_better_than_pruning_once(regression, recipe):
    dense, batch, loss = regression
    test = batch(2048)
    losses = {"dense": loss(dense, test).item()}
    once = copy.deepcopy(dense)
    sk.prune_(once, sk.Magnitude("2:4"))
    losses["once"] = loss(once, test).item()
    model = copy.deepcopy(dense)
    with sk.sparse_training_(model, **recipe) as training:
        before = loss(model, test).item()
        fit(model, 200, batch, loss, 1e-3)
        losses["trained"] = loss(model, test).item()
        training.finish()
    if "backward" not in recipe:
        assert before == losses["once"]
    assert loss(model, test).item() == losses["trained"]
    assert losses["dense"] < losses["trained"] < 0.5 * losses["once"]


def test_decay_settles_the_masks(regression):
    """With decay fewer masks flip late in training, which is the claim of SR-STE."""
    dense, batch, loss = regression
    flips = {}
    for decay in (0.0, 0.05):
        model = copy.deepcopy(dense)
        sk.sparse_training_(model, decay=decay)
        fit(model, 100, batch, loss, 1e-3)
        before = sk.nm_mask(model[2].weight, 2, 4)
        fit(model, 20, batch, loss, 1e-3)
        flips[decay] = (sk.nm_mask(model[2].weight, 2, 4) != before).float().mean().item()
    assert 0 < flips[0.05] < 0.5 * flips[0.0]


@pytest.mark.slow
def test_on_a_real_language_model(ratios, data):
    transformers = pytest.importorskip("transformers")
    folder = data / "ckpt_stories260K" / "hf"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    stories = (data / "tinystories" / "tinystories_sample.txt").read_text().split("<|endoftext|>")[:700]
    tokens = [torch.tensor(tokenizer(story.strip(), max_length=128, truncation=True)["input_ids"]) for story in stories]
    rows = torch.stack([story for story in tokens if len(story) == 128])
    test, others = rows[:32], rows[32:]
    model = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)

    def batch():
        return others[torch.randint(len(others), (16,), generator=generator)]

    def loss(model, rows):
        return model(input_ids=rows, labels=rows).loss

    def perplexity():
        with torch.no_grad():
            return loss(model.eval(), test).exp().item()

    dense = perplexity()
    training = sk.sparse_training_(model, decay=0.05)
    assert sum(layer.product == "masked dense" for layer in training.layers) == 35
    once = perplexity()  # before the first step the masks are those of magnitude pruning
    fit(model, 40, batch, loss, 1e-3)
    trained = perplexity()
    training.finish()
    assert perplexity() == trained
    assert dense < trained < 0.2 * once
    assert sum(get_mask(module) is not None for module in model.modules()) == 35
    report = sk.compress_(model, {"input_ids": test[:1, :16]})
    assert len(report.swapped) == 35
