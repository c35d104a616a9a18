"""Shows every layer its calibration inputs: by hooks, block after block, for any tree of modules."""

from collections.abc import Callable, Iterable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from .._batches import Forward, layer_input, run_batch
from .inputs import Gather, Inputs
from .layers import Layer


class _BlockDone(BaseException):
    """Ends a forward pass that has shown its block everything. Not an Exception, so no model swallows it."""


@dataclass(frozen=True)
class Block:
    """Layers that are calibrated together, and the module that holds them.

    ``ends_pass``: once the module has run, the rest of a forward pass has nothing to show to its layers.
    """

    module: nn.Module
    layers: tuple[Layer, ...]
    ends_pass: bool = False


def split_blocks(model: nn.Module, layers: Iterable[Layer]) -> list[Block]:
    """Splits layers by the outermost list they are in: each child of a ModuleList or Sequential is a block.

    A layer outside any list is a block of its own. A list that is an item of a list is looked through: only what is
    called can be waited for.
    """
    blocks: dict[nn.Module, list[Layer]] = {}
    for layer in layers:
        blocks.setdefault(_block_module(model, layer.name), []).append(layer)
    return [Block(module, tuple(members)) for module, members in blocks.items()]


def _block_module(model: nn.Module, name: str) -> nn.Module:
    parent = model
    for part in name.split(".") if name else ():
        child = parent.get_submodule(part)
        if isinstance(parent, nn.ModuleList | nn.ModuleDict | nn.Sequential) and not isinstance(
            child, nn.ModuleList | nn.ModuleDict
        ):
            return child
        parent = child
    return parent


def execution_order(
    model: nn.Module, blocks: list[Block], batches: Iterable[Any], forward: Forward | None
) -> tuple[list[Block], bool]:
    """The blocks in the order in which the first batch enters them, those it never enters last; and whether it enters
    each at most once.
    """
    entered: dict[nn.Module, None] = {}
    left: set[nn.Module] = set()
    entered_again: set[nn.Module] = set()

    def enter(block: Block) -> None:
        entered.setdefault(block.module)
        if block.module in left:
            entered_again.add(block.module)

    with ExitStack() as hooks:
        for block in blocks:
            for layer in block.layers:
                hooks.enter_context(layer.module.register_forward_pre_hook(lambda *_, block=block: enter(block)))
            hooks.enter_context(block.module.register_forward_hook(lambda module, *_: left.add(module)))
        for batch in batches:
            run_batch(model, batch, forward)
            break
    rank = {module: index for index, module in enumerate(entered)}
    ordered = sorted(blocks, key=lambda block: rank.get(block.module, len(rank)))
    ends = left - entered_again
    once = not entered_again
    return [replace(block, ends_pass=block.module in rank and block.module in ends) for block in ordered], once


def collect(
    model: nn.Module, block: Block, gather: Gather, batches: Iterable[Any], forward: Forward | None
) -> list[Inputs]:
    """Runs every batch as far as the block needs, and returns what its layers were shown, in their order.

    Raises:
        ValueError: there is no batch.
    """
    inputs = [gather(layer) for layer in block.layers]
    running: Any = None

    def stop(*_: Any) -> None:
        raise _BlockDone

    def record(seen: Inputs) -> Callable[..., None]:
        return lambda _, args, kwargs, __: seen.update(layer_input(args, kwargs), running)

    count = 0
    with ExitStack() as hooks:
        for layer, seen in zip(block.layers, inputs, strict=True):
            hooks.enter_context(layer.module.register_forward_hook(record(seen), with_kwargs=True))
        if block.ends_pass:
            hooks.enter_context(block.module.register_forward_hook(stop))
        for count, running in enumerate(batches, start=1):  # noqa: B007
            with suppress(_BlockDone):
                run_batch(model, running, forward)
    check_count(count)
    return inputs


def check_count(batches: int) -> None:
    """Rejects calibration without any batch."""
    if batches == 0:
        raise ValueError("batches gave no batch: calibration needs at least one, and a generator can be read only once")
