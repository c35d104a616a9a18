"""What the layers of this package are, taken together."""

from typing import ClassVar

from torch import Tensor, nn

from .shared import carry_mask, oriented


class Compressed(nn.Module):
    """A linear layer that stands for another one and holds its weight in a form that is smaller or faster.

    ``transposed`` says whether the other one keeps its weight as ``[in_features, out_features]``, as the ``Conv1D`` of
    transformers does.
    """

    unsupported_reason: ClassVar[str] = "it is compressed: call decompress_ first"

    in_features: int
    out_features: int
    transposed: bool
    bias: nn.Parameter | None

    @property
    def trainable(self) -> bool:
        """Whether the weight of the layer that this one stands for is trained."""
        raise NotImplementedError

    def _dense(self) -> Tensor:
        """The weight ``[out_features, in_features]``, without a gradient, in memory of its own."""
        raise NotImplementedError

    @property
    def weight(self) -> Tensor:
        """The dense weight, made anew at every access; writing to it changes nothing."""
        return oriented(self._dense(), self.transposed)

    def to_linear(self) -> nn.Linear:
        """The dense ``nn.Linear`` that computes the same, with the same bias Parameter and the stored mask."""
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        linear.weight = nn.Parameter(self._dense(), requires_grad=self.trainable)
        linear.register_parameter("bias", self.bias)
        if not self.transposed:
            carry_mask(self, linear)
        return linear.train(self.training)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


def weight_shape(layer: nn.Module) -> tuple[int, ...]:
    """The shape of ``layer.weight``, of a compressed layer without unpacking it."""
    if isinstance(layer, Compressed):
        shape = (layer.out_features, layer.in_features)
        return shape[::-1] if layer.transposed else shape
    return tuple(layer.weight.shape)  # type: ignore[arg-type]
