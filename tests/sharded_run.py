"""Runs of two processes, whose model FSDP2 shards or DDP copies, for ``test_runs_ranks.py``."""

import torch
import torch.distributed as dist
from running import leave_group
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from sparsekit.runs import Run

KINDS = ("fsdp", "fsdp sgd", "ddp")


def train(folder, kind, steps, seed):
    """Trains from the last state, if there is one, to a step; then stores the state."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 1))
    model = DistributedDataParallel(model) if kind == "ddp" else fully_shard(model)
    optimizer = (torch.optim.SGD if kind == "fsdp sgd" else torch.optim.AdamW)(model.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    torch.manual_seed(seed + dist.get_rank())
    data = torch.randn(16, 6, generator=torch.Generator().manual_seed(2))
    with Run.open(folder, {"kind": kind}) as run:
        run.restore(model=model, optimizer=optimizer, schedule=schedule)
        for indices in run.batches(16, 4, epochs=1):
            loss = (model(data[indices]) + torch.randn(2, 1)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            run.record(loss=loss.item())
            if run.step == steps:
                break
        run.save()
    return model, optimizer


def refuses(folder):
    """A state that fits in only one of the processes changes nothing in both, and both say so."""
    model, optimizer = train(folder, "fsdp", 1, 3)
    before = [each.to_local().clone() for each in model.parameters()]
    part = model if dist.get_rank() else Fragile()
    with Run.open(folder, {"kind": "fsdp"}) as run:
        try:
            run.restore(model=model, optimizer=optimizer, schedule=part)
        except ValueError as error:
            said = str(error)
    assert "the state of schedule does not fit: " in said, said
    assert all(torch.equal(each.to_local(), other) for each, other in zip(model.parameters(), before, strict=True))


class Fragile:
    """A part that takes any state."""

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


def run(rank, store, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    for kind in KINDS:
        train(f"{folder}/{kind}/whole", kind, 4, 1)
        train(f"{folder}/{kind}/stopped", kind, 2, 1)
        train(f"{folder}/{kind}/stopped", kind, 4, 7)  # the weights and random states of its own are replaced
    refuses(f"{folder}/refused")
    leave_group()
