"""Finds which layers write what a layer reads, from one pass of the model."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .._batches import Forward, hooking, layer_input, observing
from .._trees import copied, tensors_in
from .check import fixed_reason
from .run import run_plainly


@dataclass
class Trace:
    """What the layers of a model read and wrote in a pass, each output a leaf of the graph of autograd.

    Args:
        inputs: the input of each layer, by name.
        outputs: the leaf that each layer's output was replaced by.
        again: names of layers that were called more than once.
        result: the tensors that the model returned.
    """

    inputs: dict[str, Tensor] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(default_factory=dict)
    again: set[str] = field(default_factory=set)
    result: list[Tensor] = field(default_factory=list)


def trace(model: nn.Module, example: Any, forward: Forward | None) -> Trace:
    """Runs a model on an example and records its layers whose size can be changed."""
    found = Trace()

    def record(name: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor:
            found.again |= {name} & found.inputs.keys()
            found.inputs[name] = layer_input(args, kwargs)
            found.outputs[name] = output.detach().requires_grad_()
            return found.outputs[name]

        return hook

    with hooking() as hooks, torch.inference_mode(False), observing(model), torch.enable_grad():
        for name, module in model.named_modules():
            if fixed_reason(module) is None:
                hooks.append(module.register_forward_hook(record(name), with_kwargs=True))
        found.result = [*tensors_in(run_plainly(model, copied(example), forward))]
    return found


def closed_branches(found: Trace) -> Iterator[tuple[str, list[str]]]:
    """Yields each layer with the layers that write what it reads, if nothing else reads what those write."""
    names = {id(leaf): name for name, leaf in found.outputs.items()}
    written = {reader: _sources(tensor, names) for reader, tensor in found.inputs.items()}
    returned = {name for tensor in found.result for name in _sources(tensor, names)}
    readers: dict[str, set[str]] = {}
    for reader, writers in written.items():
        for writer in writers:
            readers.setdefault(writer, set()).add(reader)
    for reader, writers in written.items():
        alone = all(readers[writer] == {reader} and writer not in returned for writer in writers)
        if writers and alone and reader not in found.again and not writers & found.again:
            yield reader, [name for name in found.outputs if name in writers]


def _sources(tensor: Tensor, names: dict[int, str]) -> set[str]:
    """Returns the layers whose outputs a tensor was computed from, without another recorded layer in between."""
    if id(tensor) in names:
        return {names[id(tensor)]}
    sources, seen, todo = set(), set(), [tensor.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if leaf is not None and id(leaf) in names:
            sources.add(names[id(leaf)])
        todo.extend(parent for parent, _ in node.next_functions)
    return sources
