"""Training in two processes: sparse, with the masks and gradients of one process; and with kept masks."""

import os
import traceback
from datetime import timedelta
from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from running import leave_group
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard
from torch.nn.parallel import DistributedDataParallel

import sparsekit as sk
from sparsekit.masks import get_mask

RANKS = 2
LIMIT = timedelta(seconds=60)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 8))


def train(model, optimizer, x, steps=3):
    for _ in range(steps):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


def data_parallel(rank, x, expected):
    """Each rank trains on its half of the batch, and both choose the same masks."""
    model = network()
    training = sk.sparse_training_(model, decay=0.01)
    parallel = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(parallel.parameters(), lr=0.1)
    train(parallel, optimizer, x.chunk(RANKS)[rank])
    for one, other in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(one, other)
    training.finish()
    masks = [torch.empty(32, 16, dtype=torch.uint8) for _ in range(RANKS)]
    dist.all_gather(masks, get_mask(model[0]).to(torch.uint8))
    assert torch.equal(*masks)


def fully_sharded(rank, x, expected):
    """Sharding comes before or after; each step gathers the weights again, in place and without a new version."""
    for first in (True, False):
        model = network()
        if first:
            training = sk.sparse_training_(model, decay=0.01)
        for module in (model[0], model[2], model) if first else (model,):
            fully_shard(module, mesh=dist.device_mesh.init_device_mesh("cpu", (RANKS,)))
        if not first:
            training = sk.sparse_training_(model, decay=0.01)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        train(model, optimizer, x.chunk(RANKS)[rank])
        with pytest.raises(ValueError, match="the model is sharded by FSDP"):
            training.finish()
        state = {name: tensor.full_tensor() for name, tensor in _sharded_state(model).items()}
        for name, tensor in expected.state_dict().items():
            torch.testing.assert_close(state[name], tensor)


def _cut(dim, parameter):
    return Shard(min(dim, parameter.dim() - 1))


def masks_kept(rank, x):
    """Masks are sharded as the weights are: by rows, even if these do not divide evenly, or by columns."""
    for cut in (0, 1):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(16, 33 + cut), nn.Tanh(), nn.Linear(33 + cut, 8))
        sk.prune_(model, sk.Magnitude("2:4"))
        masks = [get_mask(model[0]), get_mask(model[2])]
        mesh = dist.device_mesh.init_device_mesh("cpu", (RANKS,))
        for module in (model[0], model):
            fully_shard(module, mesh=mesh, shard_placement_fn=partial(_cut, cut))
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        with sk.keep_masks(model, optimizer):
            train(model, optimizer, x.chunk(RANKS)[rank])
        for layer, mask in zip((model[0], model[2]), masks, strict=True):
            layer.reshard() if hasattr(layer, "reshard") else model.reshard()
            assert torch.equal(layer.weight.full_tensor() != 0, mask)


def _sharded_state(model):
    for module in model.modules():
        if hasattr(module, "reshard"):
            module.reshard()
    return model.state_dict()


def _work(rank, rendezvous, x, expected, errors):
    try:
        dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=RANKS, timeout=LIMIT)
        data_parallel(rank, x, expected)
        fully_sharded(rank, x, expected)
        masks_kept(rank, x)
        leave_group()
    except BaseException:
        errors.put(traceback.format_exc())


@pytest.mark.slow
@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch without gloo")
def test_two_processes(tmp_path):
    x = torch.randn(12, 16)
    expected = network()
    sk.sparse_training_(expected, decay=0.01)
    train(expected, torch.optim.SGD(expected.parameters(), lr=0.1), x)
    context = mp.get_context("spawn")
    errors = context.Queue()
    arguments = (os.fspath(tmp_path / "rendezvous"), x, expected, errors)
    workers = [context.Process(target=_work, args=(rank, *arguments)) for rank in range(RANKS)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(2 * LIMIT.total_seconds())
        if worker.is_alive():
            worker.kill()
    assert errors.empty(), errors.get()
    assert [worker.exitcode for worker in workers] == [0, 0]
