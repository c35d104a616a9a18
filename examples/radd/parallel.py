"""Several processes: joins those that torchrun has started, and makes a model one that they train together."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from config import device_of
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel


@contextmanager
def processes(device: str) -> Iterator[tuple[int, int]]:
    """Joins the processes that the environment speaks of; yields the rank of this one and their number."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield 0, 1
        return
    where = device_of(device)
    if where.type == "cuda":
        torch.cuda.set_device(where)
    dist.init_process_group("nccl" if where.type == "cuda" else "gloo")
    try:
        yield dist.get_rank(), dist.get_world_size()
    finally:
        dist.destroy_process_group()


def parallel(model: nn.Module, average: nn.Module, kind: str, device: torch.device) -> nn.Module:
    """Returns the model to compute the loss with; FSDP2 also shards the average of the weights, as the model."""
    if kind == "ddp":
        return DistributedDataParallel(model)
    mesh = dist.device_mesh.init_device_mesh(device.type, (dist.get_world_size(),))
    for whole in (model, average):
        for block in whole.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(whole, mesh=mesh)
    return model


def set_gradient_sync(model: nn.Module, on: bool) -> None:
    """Says whether the next backward pass adds up the gradients of all processes."""
    if isinstance(model, DistributedDataParallel):
        model.require_backward_grad_sync = on
    elif isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(on)
