"""The models: random weights, every linear layer 2:4, the same in every process."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sparsekit as sk


class Block(nn.Module):
    """A feed-forward block: LayerNorm, up, GELU, down, and the input added."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(dim), nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class EncoderLayer(nn.Module):
    """A layer of BERT: attention and a feed-forward part, each with the input added and LayerNorm after it."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (nn.Linear(dim, dim) for _ in range(4))
        self.up, self.down = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)  # (B, T, dim)
        x = self.norm1(x + self.out(attended))
        return self.norm2(x + self.down(F.gelu(self.up(x))))


@dataclass(frozen=True)
class Size:
    """The size of a model: its layers, its width, and the heads of its attention, or 0 for blocks without."""

    layers: int
    dim: int
    heads: int = 0

    def build(self) -> nn.Module:
        """Returns the model with random weights that are 2:4 by magnitude, in eval mode."""
        torch.manual_seed(0)
        layers = [EncoderLayer(self.dim, self.heads) if self.heads else Block(self.dim) for _ in range(self.layers)]
        for module in (model := nn.Sequential(*layers).eval()).modules():
            if isinstance(module, nn.Linear):
                sk.nm_prune_(module.weight, 2, 4)
        return model.requires_grad_(False)

    def input(self, tokens: int) -> Tensor:
        """Returns a random input, ``[tokens, dim]``, with attention ``[1, tokens, dim]``."""
        x = torch.randn(tokens, self.dim, generator=torch.Generator().manual_seed(tokens))
        return x[None] if self.heads else x


MODELS = {
    "blocks": Size(layers=6, dim=768),
    "encoder": Size(layers=12, dim=768, heads=12),  # BERT base without its embeddings
}
TOKENS = (1, 8, 16, 128, 512)
