"""Fading where optimizers are wrapped and weights are sharded."""

import torch
import torch.distributed as dist
from torch import nn

from sparsekit.tiers.fade import fade, fading_of, mark_fading
from tests.interrupts import assert_all_or_nothing


def test_fading_under_wrapped_optimizers():
    """Also where the step of a class ends twice, as one that calls its base class's does."""

    class Twice(torch.optim.SGD):
        def step(self, closure=None):
            return super().step(closure)

    class Wrapper:
        def __init__(self, optimizer):
            self.optimizer = optimizer

    layer = nn.Linear(4, 2)
    weight = layer.weight.detach().clone()
    mark_fading(layer, fading := torch.tensor([[True, False, False, True], [False, True, False, False]]))
    optimizer = Twice(layer.parameters(), lr=0.0)
    with fade(layer, Wrapper(optimizer), 4):
        optimizer.step()
    torch.testing.assert_close(layer.weight.detach(), torch.where(fading, 0.75 * weight, weight))


def test_fading_of_sharded_weights():
    from torch.distributed.fsdp import fully_shard

    layer = nn.Linear(4, 2)
    weight = layer.weight.detach().clone()
    mark_fading(layer, torch.ones(2, 4, dtype=torch.bool))
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        fully_shard(layer, mesh=dist.device_mesh.init_device_mesh("cpu", (1,)))
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
        with fade(layer, optimizer, 2):
            optimizer.step()
        assert fading_of(layer).all()
        torch.testing.assert_close(layer.weight.full_tensor().detach(), weight / 2)
    finally:
        dist.destroy_process_group()


def test_an_interrupted_call_leaves_no_hooks():
    def make():
        layer = nn.Linear(4, 2)
        mark_fading(layer, torch.ones(2, 4, dtype=torch.bool))
        return layer, torch.optim.SGD(layer.parameters(), lr=0.0)

    assert_all_or_nothing(
        make,
        lambda layer, optimizer: fade(layer, optimizer, 2),
        lambda _, optimizer: {
            "hooks": len(optimizer._optimizer_step_pre_hooks) + len(optimizer._optimizer_step_post_hooks)
        },
    )
