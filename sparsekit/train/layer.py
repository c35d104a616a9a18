"""The layer that trains sparse: an ``nn.Linear`` in all but its product."""

from torch import Tensor, nn

from .product import Recipe, sparse_linear


class MaskedLinear(nn.Linear):
    """An ``nn.Linear`` that multiplies by what a mask leaves of its weight; every call chooses the mask anew.

    ``sparse_training_`` makes one of an ``nn.Linear`` by changing its class, nothing else: the module, its hooks,
    Parameters and state dict stay what they are, so that an optimizer, DDP or a checkpoint sees no difference.
    Copies and pickles train sparse as well.
    """

    recipe: Recipe

    def forward(self, x: Tensor) -> Tensor:
        return sparse_linear(x, self.weight, self.bias, self.recipe)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, backward={self.recipe.backward}, decay={self.recipe.decay}"


def start(layer: nn.Linear, recipe: Recipe) -> None:
    """Makes a plain layer train sparse; one that does already goes on by the new recipe."""
    layer.__dict__["recipe"] = recipe
    layer.__class__ = MaskedLinear


def stop(layer: nn.Linear) -> None:
    """Makes the layer a plain one again; its weight stays as it is."""
    layer.__class__ = nn.Linear
    del layer.__dict__["recipe"]
