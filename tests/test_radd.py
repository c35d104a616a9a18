"""RADD: its published sizes and weights, what it computes, and that it can be stored and trained."""

import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

pytest.importorskip("huggingface_hub")

from sparsekit.diffusion import DiffusionSampler, evaluate_bound, k_dce_loss
from sparsekit.models import RADD, read_published

TINY = {"tokens": 11, "hidden_size": 16, "n_blocks": 2, "n_heads": 2}


def published_shapes(tokens, width, blocks):
    """The names and shapes of the published weights."""
    norms = {f"{name}.{part}": [width] for name in ("norm1", "norm2") for part in ("weight", "bias")}
    block = {
        **norms,
        "attn_qkv.weight": [3 * width, width],
        "attn_out.weight": [width, width],
        "mlp.0.weight": [4 * width, width],
        "mlp.0.bias": [4 * width],
        "mlp.2.weight": [width, 4 * width],
        "mlp.2.bias": [width],
    }
    return {
        "vocab_embed.embedding": [tokens + 1, width],
        **{f"blocks.{i}.{name}": shape for i in range(blocks) for name, shape in block.items()},
        "output_layer.norm_final.weight": [width],
        "output_layer.norm_final.bias": [width],
        "output_layer.linear.weight": [tokens + 1, width],
        "output_layer.linear.bias": [tokens + 1],
    }


def random_state(generator_seed=0):
    generator = torch.Generator().manual_seed(generator_seed)
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64) / 3
        for name, shape in published_shapes(11, 16, 2).items()
    }


def by_hand(state, tokens):
    """Computes log probabilities of the tokens without the mask token from published weights, step by step."""
    x = state["vocab_embed.embedding"][tokens]
    length, size = tokens.shape[1], 8
    angle = torch.arange(length)[:, None] / 10_000 ** (torch.arange(0, size, 2) / size)
    turn = torch.polar(torch.ones_like(angle), angle).to(torch.complex128)

    def rotated(heads):  # pairs are one number of the first half and one of the second
        pairs = torch.complex(heads[..., : size // 2], heads[..., size // 2 :]) * turn
        return torch.cat((pairs.real, pairs.imag), -1)

    def norm(x, name):
        spread = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
        return spread * state[f"{name}.weight"] + state[f"{name}.bias"]

    for i in range(2):
        at = f"blocks.{i}"
        qkv = norm(x, f"{at}.norm1") @ state[f"{at}.attn_qkv.weight"].T
        q, k, v = (part.view(-1, length, 2, size).transpose(1, 2) for part in qkv.chunk(3, -1))
        weights = (rotated(q) @ rotated(k).transpose(-1, -2) / size**0.5).softmax(-1)
        x = x + (weights @ v).transpose(1, 2).flatten(2) @ state[f"{at}.attn_out.weight"].T
        wide = norm(x, f"{at}.norm2") @ state[f"{at}.mlp.0.weight"].T + state[f"{at}.mlp.0.bias"]
        x = x + F.gelu(wide, approximate="tanh") @ state[f"{at}.mlp.2.weight"].T + state[f"{at}.mlp.2.bias"]
    x = norm(x, "output_layer.norm_final")
    return (x @ state["output_layer.linear.weight"].T + state["output_layer.linear.bias"])[..., :-1].log_softmax(-1)


@pytest.mark.parametrize(
    ("make", "count", "sizes"),
    [(RADD.small, 162_265_682, (50257, 768, 12)), (RADD.medium, 405_191_762, (50257, 1024, 24))],
    ids=["small", "medium"],
)
def test_published_sizes_and_names(make, count, sizes):
    with torch.device("meta"):
        model = make()
        state = {name: torch.empty(shape) for name, shape in published_shapes(*sizes).items()}
    assert sum(each.numel() for each in model.parameters()) == count
    loaded = RADD.from_published({**state, "rotary_emb.inv_freq": torch.empty(32)}).eval()
    assert [*loaded.state_dict()] == [*model.state_dict()]
    assert len(loaded.state_dict()) == len(state) and loaded.blocks[0].head_size == 64
    assert sum(each.numel() for each in loaded.parameters()) == count


def test_published_weights_compute_what_they_did():
    state, tokens = random_state(), torch.randint(12, (3, 7))
    model = RADD.from_published(state, n_heads=2).eval()
    log_probs = model(tokens)
    assert log_probs.shape == (3, 7, 12) and (log_probs[..., 11] == -math.inf).all()
    torch.testing.assert_close(log_probs[..., :11], by_hand(state, tokens), atol=1e-6, rtol=0)  # float32 angles
    asked = tokens == 11
    torch.testing.assert_close(model(tokens, asked), log_probs[asked], atol=1e-12, rtol=0)


@pytest.fixture
def checkpoint(tmp_path):
    """What the original's training leaves, with averages that are not the weights."""
    state = {"rotary_emb.inv_freq": torch.ones(4), **random_state()}
    averages = [*random_state(1).values()]
    path = tmp_path / "checkpoints-meta" / "checkpoint.pth"
    path.parent.mkdir()
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))]).state_dict()
    stored = {"optimizer": optimizer, "model": state, "step": 7}
    torch.save({**stored, "ema": {"decay": 0.9999, "num_updates": 7, "shadow_params": averages}}, path)
    return path


def test_published_weights_are_read_from_files(tmp_path, checkpoint, monkeypatch):
    def same(source, state):
        model = RADD.from_published(source, n_heads=2)
        expected = RADD.from_published(state, n_heads=2).state_dict()
        assert all(torch.equal(each, expected[name]) for name, each in model.state_dict().items())

    same(checkpoint, random_state(1))
    same(tmp_path, random_state(1))
    same(read_published(checkpoint, ema=False), random_state())
    torch.save({f"module.{name}": each for name, each in random_state(2).items()}, tmp_path / "pytorch_model.bin")
    same(tmp_path, random_state(2))
    save_file(random_state(3), tmp_path / "model.safetensors")
    same(str(tmp_path), random_state(3))
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda name, file: tmp_path / file)
    same("someone/radd", random_state(3))


def test_published_files_are_never_unpickled(tmp_path, checkpoint):
    torch.save({"model": math.sqrt}, tmp_path / "harmful.pth")
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        RADD.from_published(tmp_path / "harmful.pth")
    torch.save([torch.ones(1)], tmp_path / "list.pth")
    with pytest.raises(ValueError, match=r"list\.pth must hold tensors by name, or a checkpoint"):
        RADD.from_published(tmp_path / "list.pth")
    stored = torch.load(checkpoint, weights_only=True)
    stored["ema"]["shadow_params"].pop()
    torch.save(stored, checkpoint)
    with pytest.raises(ValueError, match="averages of the checkpoint do not fit its model: pass ema=False"):
        RADD.from_published(checkpoint)
    checkpoint.unlink()
    with pytest.raises(
        FileNotFoundError, match=r"has none of model\.safetensors, pytorch_model\.bin, checkpoints-meta"
    ):
        RADD.from_published(tmp_path)
    with pytest.raises(FileNotFoundError, match="is no file, no folder and no name on the Hugging Face Hub"):
        RADD.from_published("runs/of/yesterday.pth")


def test_a_new_model_knows_nothing():
    model = RADD(**TINY)
    log_probs = model(torch.randint(12, (2, 5)))
    torch.testing.assert_close(log_probs[..., :11], torch.full((2, 5, 11), -math.log(11)))
    assert all((each == 1).all() for name, each in model.named_parameters() if "norm" in name)
    assert model.embedding.weight.abs().max() <= 16**-0.5 < 1.1 * model.embedding.weight.abs().max()
    bound = evaluate_bound(model, torch.randint(11, (2, 6)), model.mask_token, draws=2)
    assert bound.perplexity == pytest.approx(11, rel=1e-6) and model.training


def test_it_learns_under_autocast():
    torch.manual_seed(0)
    model, tokens = RADD(**TINY, dropout=0.0), torch.arange(6).repeat(16, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    generator, losses = torch.Generator().manual_seed(0), []
    for _ in range(40):
        with torch.autocast("cpu", torch.bfloat16):
            loss = k_dce_loss(model, tokens, model.mask_token, generator=generator).mean()
        assert loss.dtype == torch.float32
        optimizer.zero_grad()
        loss.backward()
        assert all(each.grad.isfinite().all() for each in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(6 * math.log(11), rel=1e-2) and losses[-1] < 0.5 * losses[0]


def test_it_is_stored_as_safetensors(tmp_path, capsys):
    model = RADD.from_published(random_state(), n_heads=2).float().eval()
    model.save_pretrained(tmp_path)
    assert sorted(each.name for each in tmp_path.iterdir() if each.suffix != ".md") == [
        "config.json",
        "model.safetensors",
    ]
    loaded = RADD.from_pretrained(tmp_path)
    tokens = torch.randint(12, (1, 4))
    assert torch.equal(loaded(tokens), model(tokens)) and loaded.mask_token == 11


def test_rejects():
    state = random_state()
    with pytest.raises(ValueError, match=r"multiple of 2 \* n_heads, got 16 and 3"):
        RADD(11, 16, 2, 3)
    with pytest.raises(ValueError, match=r"published names, such as vocab_embed\.embedding"):
        RADD.from_published({"weight": torch.ones(1)})
    with pytest.raises(ValueError, match=r'not that of a published model.*\n.*Missing key.*"blocks\.1\.qkv\.weight"'):
        RADD.from_published({name: each for name, each in state.items() if name != "blocks.1.attn_qkv.weight"})


def test_it_is_sampled_the_same_alone_and_in_a_batch():
    torch.manual_seed(0)
    model, sampler = RADD(**TINY), DiffusionSampler(12)
    for each in model.parameters():
        torch.nn.init.normal_(each, std=0.3)
    start = torch.full((16, 20), model.mask_token)
    start[:, 3] = 7
    batch = sampler.sample(model, start, model.mask_token, range(16))
    assert (batch.tokens < 11).all() and (batch.tokens[:, 3] == 7).all() and len(batch.tokens.unique(dim=0)) == 16
    for i in range(16):
        assert torch.equal(sampler.sample(model, start[:1], model.mask_token, [i]).tokens[0], batch.tokens[i])
