"""A mode that finds the products with the matrices of experts, however a module computes them."""

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


class Product(NamedTuple):
    """A product of an input with one matrix of a parameter.

    Args:
        key: the name of the parameter.
        along: the dimension of the parameter that is summed over, 1 or 2.
        expert: the index of the matrix.
        x: the input, ``[rows, inputs]``.
        tokens: int64 ``[rows]``: the row of the module's input that each row of ``x`` comes from.
        of: the number of rows of the module's input, as far as it is known.
    """

    key: str
    along: int
    expert: int
    x: Tensor
    tokens: Tensor
    of: int


COPIES = frozenset("to type type_as float half bfloat16 contiguous clone".split())
PICKS = frozenset(("__getitem__", "index_select"))
PRODUCTS = frozenset("matmul __matmul__ mm bmm mv".split())
SUMS = frozenset("addmm baddbmm addmv".split())  # they add the product to their first argument
GROUPED = frozenset("grouped_mm _grouped_mm grouped_mm_fallback".split())
RECENT = 16  # how many of the latest copies of matrices are recognized


@dataclass(frozen=True)
class _Found:
    """The matrices that a tensor is a view of.

    Args:
        key: the name of the parameter.
        experts: the indices of the matrices: one per entry of the tensor's first dimension, or the only one.
        dims: for each of the tensor's last two dimensions, the dimension of the parameter that it runs along.
    """

    key: str
    experts: list[int]
    dims: tuple[int, int]


class _Stack:
    """A tensor ``[experts, rows, cols]``: a parameter, or a copy of some of its matrices."""

    def __init__(self, key: str, tensor: Tensor, experts: Sequence[int]) -> None:
        self.key, self.tensor, self.experts = key, tensor, list(experts)
        self.address, self.start = _address(tensor), tensor.storage_offset()
        self.strides = tensor.stride()
        # The first stride of a single matrix means nothing; with a huge step every offset belongs to matrix 0.
        self.step = self.strides[0] if len(tensor) > 1 else 1 << 62

    def find(self, tensor: Tensor) -> _Found | None:
        """Returns the matrices that a tensor is a view of; None if it is a view of none, or of parts of them."""
        if _address(tensor) != self.address or tensor.dtype != self.tensor.dtype:
            return None
        while tensor.dim() > 3 and len(tensor) == 1:
            tensor = tensor[0]
        if tensor.dim() not in (2, 3):
            return None
        first = (tensor.storage_offset() - self.start) // self.step
        steps = [0] if tensor.dim() == 2 else [index * tensor.stride(0) // self.step for index in range(len(tensor))]
        if first < 0 or first + max(steps, default=0) >= len(self.experts):
            return None
        if not (dims := self._dims(tensor)):
            return None
        return _Found(self.key, [self.experts[first + step] for step in steps], dims)

    def _dims(self, tensor: Tensor) -> tuple[int, int] | None:
        last = list(zip(tensor.shape[-2:], tensor.stride()[-2:], strict=True))
        for dims in ((1, 2), (2, 1)):
            if all(size == 1 or stride == self.strides[dim] for (size, stride), dim in zip(last, dims, strict=True)):
                return dims
        return None


class Products(TorchFunctionMode):
    """A mode that calls ``see`` with every product with a matrix of the parameters.

    It recognizes ``F.linear``, ``@``, ``torch.mm``, ``bmm``, ``mv``, ``addmm`` and the like, ``einsum`` of two
    operands, and grouped products, with the matrix on either side. The matrix may be a view of the parameter,
    transposed or not, a copy in another dtype, or one of several that were picked by index.
    """

    def __init__(self, parameters: Mapping[str, Tensor], see: Callable[[Product], None]) -> None:
        super().__init__()
        self._stacks = [_Stack(key, tensor.detach(), range(len(tensor))) for key, tensor in parameters.items()]
        self._copies: deque[_Stack] = deque(maxlen=RECENT)
        self._see = see
        self._picked: tuple[Tensor, int] | None = None  # the rows that were picked last, and how many there were

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        given = [*args, *kwargs.values()]
        if name in COPIES or name in PICKS:
            self._follow(given, result, picked=name in PICKS)
            self._follow_rows(given, result)
        elif name == "repeat_interleave":
            self._follow_rows(given, result)
        elif name == "linear":
            self._product(given[0], given[1].mT)
        elif name in PRODUCTS:
            self._product(given[0], given[1])
        elif name == "__rmatmul__":
            self._product(given[1], given[0])
        elif name in SUMS:
            self._product(given[1], given[2])
        elif name in GROUPED:
            self._grouped(given[0], given[1], kwargs["offs"] if "offs" in kwargs else (*args, None, None)[2])
        elif name == "einsum":
            self._einsum(*given)
        return result

    def _find(self, tensor: Any) -> _Found | None:
        if not isinstance(tensor, Tensor) or not 2 <= tensor.dim():
            return None
        return next((found for stack in (*self._stacks, *self._copies) if (found := stack.find(tensor))), None)

    def _follow(self, given: Sequence[Any], result: Any, *, picked: bool) -> None:
        """Records that ``result`` is a copy of known matrices, or of some of them, which were picked by index."""
        found = self._find(given[0])
        if found is None or not isinstance(result, Tensor) or self._find(result) is not None:
            return
        experts = found.experts
        if picked:
            index = given[-1]
            if not isinstance(index, Tensor) or index.dim() != 1 or given[0].dim() != 3 or result.dim() != 3:
                return
            chosen = index.nonzero().flatten() if index.dtype == torch.bool else index
            experts = [experts[each] for each in chosen.tolist()]
        matrices = result if result.dim() == 3 else result.unsqueeze(0)
        if matrices.dim() == 3 and len(matrices) == len(experts):
            straight = matrices if found.dims == (1, 2) else matrices.transpose(1, 2)
            self._copies.append(_Stack(found.key, straight.detach(), experts))

    def _follow_rows(self, given: Sequence[Any], result: Any) -> None:
        """Records which rows of a matrix of inputs were picked, or how often each is repeated."""
        source, index = given[0], given[-1]
        if not isinstance(source, Tensor) or source.dim() != 2 or not isinstance(result, Tensor) or result.dim() != 2:
            return
        if isinstance(source, nn.Parameter):  # the biases of the experts that were chosen
            return
        every = torch.arange(len(source), device=source.device)
        if isinstance(index, Tensor) and index.dim() == 1 and source.is_floating_point():
            self._picked = (every[index], len(source))
        elif isinstance(index, int) and len(result) > len(source) and len(result) % len(source) == 0:
            self._picked = (every.repeat_interleave(len(result) // len(source)), len(source))

    def _tokens(self, x: Tensor) -> tuple[Tensor, int]:
        """Returns the row of the module's input that each row of ``x`` comes from, and how many rows the input has."""
        rows = x.shape[:-1].numel()
        if self._picked is not None and len(self._picked[0]) == rows:
            return self._picked[0].view(x.shape[:-1]), self._picked[1]
        return torch.arange(rows, device=x.device).view(x.shape[:-1]), rows

    def _product(self, left: Any, right: Any) -> None:
        if found := self._find(right):
            self._note(found, found.dims[0], left, -3)
        elif (found := self._find(left)) and isinstance(right, Tensor):
            self._note(found, found.dims[1], right.mT if right.dim() > 1 else right, -3)

    def _note(self, found: _Found, along: int, x: Tensor, experts_at: int | None) -> None:
        """Calls ``see`` with the product of ``x``, ``[..., inputs]``, and each of the matrices found.

        If ``x`` has a separate part for each matrix, they are along the dimension ``experts_at``.
        """
        tokens, of = self._tokens(x)
        each: Iterable[tuple[Tensor, Tensor]] = [(x, tokens)] * len(found.experts)
        if experts_at is not None and len(found.experts) > 1 and x.dim() >= -experts_at and x.shape[experts_at] > 1:
            each = zip(x.movedim(experts_at, 0), tokens.movedim(experts_at + 1, 0), strict=True)
        parts: dict[int, list[tuple[Tensor, Tensor]]] = {}
        for expert, (part, own) in zip(found.experts, each, strict=True):
            parts.setdefault(expert, []).append((part.reshape(-1, part.shape[-1]), own.flatten()))
        for expert, pairs in parts.items():
            rows, numbers = (torch.cat(side) if len(side) > 1 else side[0] for side in zip(*pairs, strict=True))
            if rows.numel():
                self._see(Product(found.key, along, expert, rows, numbers, of))

    def _grouped(self, x: Tensor, matrices: Tensor, ends: Tensor | None) -> None:
        found = self._find(matrices)
        if found is None or ends is None or x.dim() != 2:
            return self._product(x, matrices)
        (tokens, of), start = self._tokens(x), 0
        for expert, end in zip(found.experts, ends.tolist(), strict=True):
            if end > start:
                self._see(Product(found.key, found.dims[0], expert, x[start:end], tokens[start:end], of))
            start = end

    def _einsum(self, equation: Any, *operands: Any) -> None:
        operands = tuple(operands[0]) if len(operands) == 1 and isinstance(operands[0], list | tuple) else operands
        if not isinstance(equation, str) or len(operands) != 2 or "." in equation:
            return
        left, _, out = equation.replace(" ", "").partition("->")
        names = left.split(",")
        if "->" not in equation:
            out = "".join(letter for letter in left if left.count(letter) == 1)
        for own, other in ((1, 0), (0, 1)):
            summed = [letter for letter in names[own] if letter in names[other] and letter not in out]
            if (found := self._find(operands[own])) and len(summed) == 1:
                at = names[own].index(summed[0]) - len(names[own])
                if at in (-1, -2):
                    x = operands[other].movedim(names[other].index(summed[0]), -1)
                    rest = names[other].replace(summed[0], "")
                    expert = rest.find(names[own][0]) if len(names[own]) == 3 else -1
                    self._note(found, found.dims[at], x, expert - x.dim() if expert >= 0 else None)
                return


def _address(tensor: Tensor) -> int:
    try:
        return tensor.untyped_storage().data_ptr()
    except (NotImplementedError, RuntimeError):  # a wrapper without memory of its own
        return -id(tensor)
