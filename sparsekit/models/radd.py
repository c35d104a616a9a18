"""RADD: a transformer that predicts masked tokens from visible ones, without being told how many are masked.

Source: Ou et al., 2024, https://arxiv.org/abs/2406.03736.
"""

import math
import os
import re
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

try:
    from huggingface_hub import PyTorchModelHubMixin
except ImportError as error:
    raise ImportError("sparsekit.models needs huggingface_hub: pip install 'sparsekit-kernels[systems]'") from error

from .published import read_published

PUBLISHED_NAMES = {
    r"vocab_embed\.embedding": "embedding.weight",
    r"(blocks\.\d+)\.attn_qkv\.": r"\1.qkv.",
    r"(blocks\.\d+)\.attn_out\.": r"\1.out.",
    r"(blocks\.\d+)\.mlp\.0\.": r"\1.up.",
    r"(blocks\.\d+)\.mlp\.2\.": r"\1.down.",
    r"output_layer\.norm_final\.": "norm.",
    r"output_layer\.linear\.": "head.",
}
HEAD_SIZE = 64  # of all published models


class RADD(nn.Module, PyTorchModelHubMixin, library_name="sparsekit"):
    """A time-free diffusion transformer: bidirectional attention with rotary positions, for any length of rows.

    As published, the head is zero at first, so that all tokens are equally likely, and the biases of the layer norms
    are one. Other than published, the mask token has probability 0. ``save_pretrained`` writes a folder with
    ``model.safetensors``, which ``from_pretrained`` reads.

    Args:
        tokens: the size of the vocabulary without the mask token; GPT-2's by default.
        hidden_size: the width of the residual stream.
        n_blocks: the number of transformer blocks.
        n_heads: the number of attention heads in each; must divide ``hidden_size`` into even parts.
        dropout: the probability with which an output of a block is zero in training.

    Raises:
        ValueError: the sizes do not fit together.
    """

    def __init__(
        self,
        tokens: int = 50257,
        hidden_size: int = 768,
        n_blocks: int = 12,
        n_heads: int = 12,
        dropout: float = 0.02,
    ) -> None:
        super().__init__()
        if hidden_size % (2 * n_heads):
            raise ValueError(f"hidden_size must be a multiple of 2 * n_heads, got {hidden_size} and {n_heads}")
        self.mask_token = tokens
        self.head_size = hidden_size // n_heads
        self.embedding = nn.Embedding(tokens + 1, hidden_size)
        self.blocks = nn.ModuleList(Block(hidden_size, self.head_size, dropout) for _ in range(n_blocks))
        self.norm = _norm(hidden_size)
        self.head = nn.Linear(hidden_size, tokens + 1)
        nn.init.kaiming_uniform_(self.embedding.weight, a=math.sqrt(5))
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    @classmethod
    def small(cls) -> "RADD":
        """Returns the published small model, of 162,265,682 parameters."""
        return cls()

    @classmethod
    def medium(cls) -> "RADD":
        """Returns the published medium model, of 405,191,762 parameters."""
        return cls(hidden_size=1024, n_blocks=24, n_heads=16)

    @classmethod
    def from_published(
        cls,
        source: Mapping[str, Tensor] | str | os.PathLike[str],
        *,
        n_heads: int | None = None,
        dropout: float = 0.02,
    ) -> "RADD":
        """Returns a model with published weights, whose sizes are those of the tensors.

        Args:
            source: where they are, as for ``read_published``, or the tensors by their published names, which the model
                keeps without a copy.
            n_heads: the number of heads; None is that of the published models, whose heads have 64 numbers.
            dropout: as for a new model.

        Raises:
            ValueError: names or shapes are not those of such a model.
        """
        state = source if isinstance(source, Mapping) else read_published(source)
        renamed = {_renamed(name): tensor for name, tensor in state.items() if name != "rotary_emb.inv_freq"}
        if "embedding.weight" not in renamed:
            raise ValueError("state must have the published names, such as vocab_embed.embedding, which it lacks")
        rows, hidden_size = renamed["embedding.weight"].shape
        n_blocks = len({name.split(".")[1] for name in renamed if name.startswith("blocks.")})
        with torch.device("meta"):
            model = cls(rows - 1, hidden_size, n_blocks, n_heads or max(1, hidden_size // HEAD_SIZE), dropout)
        try:
            model.load_state_dict(renamed, assign=True)
        except RuntimeError as error:
            raise ValueError(f"state is not that of a published model: {error}") from error
        return model

    def forward(self, tokens: Tensor, asked: Tensor | None = None) -> Tensor:
        """Computes the log probabilities of masked tokens.

        Args:
            tokens: int64 ``[rows, length]``, with ``mask_token`` at masked positions.
            asked: bool like ``tokens``, the positions to predict, for which alone the head is computed; None is all.

        Returns:
            ``[asked positions, vocabulary]``, or ``[rows, length, vocabulary]`` for all, in float32 or the wider dtype
            of the weights. The vocabulary ends with the mask token, at minus infinity.
        """
        x = self.embedding(tokens)  # [rows, length, hidden]
        rotation = _rotation(tokens.shape[1], self.head_size, tokens.device)
        for block in self.blocks:
            x = block(x, rotation)
        if asked is not None:
            x = x[asked]
        logits = self.head(self.norm(x))
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        logits[..., self.mask_token] = -math.inf
        return logits.log_softmax(-1)


class Block(nn.Module):
    """A transformer block: attention among all positions, and a feed-forward network, each added to its input."""

    def __init__(self, hidden_size: int, head_size: int, dropout: float) -> None:
        super().__init__()
        self.head_size = head_size
        self.norm1 = _norm(hidden_size)
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size, bias=False)
        self.out = nn.Linear(hidden_size, hidden_size, bias=False)
        self.norm2 = _norm(hidden_size)
        self.up = nn.Linear(hidden_size, 4 * hidden_size)
        self.down = nn.Linear(4 * hidden_size, hidden_size)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        """Computes ``[rows, length, hidden]``."""
        qkv = self.qkv(self.norm1(x)).unflatten(-1, (3, -1, self.head_size))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # [rows, heads, length, head size]
        attended = F.scaled_dot_product_attention(_rotated(q, rotation), _rotated(k, rotation), v)
        x = x + self.dropout(self.out(attended.transpose(1, 2).flatten(2)))
        return x + self.dropout(self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh")))


def _norm(size: int) -> nn.LayerNorm:
    norm = nn.LayerNorm(size)
    nn.init.ones_(norm.bias)
    return norm


def _rotation(length: int, head_size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Returns cosines and sines of the angle by which each pair of numbers is turned at each position."""
    pair = torch.arange(0, head_size, 2, dtype=torch.float32, device=device)
    position = torch.arange(length, dtype=torch.float32, device=device)
    angle = position[:, None] / 10_000 ** (pair / head_size)  # [length, head size / 2]
    return angle.cos(), angle.sin()


def _rotated(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    cos, sin = (part.to(x.dtype) for part in rotation)
    first, second = x.chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


def _renamed(name: str) -> str:
    for pattern, ours in PUBLISHED_NAMES.items():
        if (found := re.match(pattern, name)) is not None:
            return found.expand(ours) + name[found.end() :]
    return name
