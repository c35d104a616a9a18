"""Starts and joins the processes of a run: alone, with torchrun, with accelerate launch, or with --spawn."""

import os
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from config import Config, device_of
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel


def launch(work: Callable[[Config], None], config: Config) -> None:
    """Calls a function in this process, or in ``config.spawn`` new ones, which it then waits for."""
    if not config.spawn:
        with joined(config):
            work(config)
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(_spawned, (work, config, port), nprocs=config.spawn)


def _spawned(rank: int, work: Callable[[Config], None], config: Config, port: int) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(config.spawn))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(max(1, torch.get_num_threads() // config.spawn))
    with joined(config):
        work(config)
    # DDP keeps gloo's threads in torch 2.13. One that wants the interpreter while it is torn down aborts the process,
    # which is done (https://github.com/pytorch/pytorch/issues/190489).
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


@contextmanager
def joined(config: Config) -> Iterator[None]:
    """Joins the processes that the environment speaks of, if there are several."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    device = device_of(config.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def parallel(model: nn.Module, average: nn.Module, config: Config, ranks: int) -> nn.Module:
    """Returns the model to compute the loss with; FSDP2 also shards the average of the weights, as the model."""
    if ranks == 1:
        return model
    if config.parallel == "ddp":
        return DistributedDataParallel(model)
    device = device_of(config.device)
    mesh = dist.device_mesh.init_device_mesh(device.type, (ranks,))
    for whole in (model, average):
        for block in whole.modules():
            if type(block).__name__.endswith(("DownBlock2D", "UpBlock2D", "MidBlock2D")):
                fully_shard(block, mesh=mesh)
        fully_shard(whole, mesh=mesh)
    return model
