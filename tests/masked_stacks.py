"""What two processes of one training run do with a model of masked tokens: cells of ``stacks``."""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from sparsekit.diffusion import LogLinearNoise, evaluate_bound, k_dce_loss, lambda_dce_loss, t_dce_loss, t_dse_loss
from sparsekit.models import RADD


def ddp_masked_tokens() -> None:
    assert_trains_and_measures(DistributedDataParallel(make_radd()))


def fsdp_masked_tokens() -> None:
    model = make_radd()
    for block in model.blocks:
        fully_shard(block)
    assert_trains_and_measures(fully_shard(model))


def make_radd() -> RADD:
    torch.manual_seed(0)
    model = RADD(tokens=7, hidden_size=16, n_blocks=2, n_heads=2, dropout=0.0)
    nn.init.normal_(model.head.weight)
    return model


def assert_trains_and_measures(model: nn.Module) -> None:
    """Losses, gradients and the bound are those of one process, of which each here has every other row."""
    generator, alone = torch.Generator().manual_seed(1), make_radd()
    tokens = torch.randint(7, (6, 5), generator=generator)
    masked = torch.rand(6, 5, generator=generator) < 0.5
    masked[:, 0] = True
    t, own = torch.rand(6, generator=generator, dtype=torch.float64), slice(dist.get_rank(), None, 2)

    def losses(net: nn.Module, rows: slice) -> Tensor:
        given = {"masked": masked[rows]}
        timed = {"noise": LogLinearNoise(), "t": t[rows], **given}
        return torch.stack(
            [
                t_dse_loss(net, tokens[rows], 7, **timed),
                t_dce_loss(net, tokens[rows], 7, **timed),
                lambda_dce_loss(net, tokens[rows], 7, probability=t[rows], **given),
                k_dce_loss(net, tokens[rows], 7, **given),
            ]
        )

    expected, found = losses(alone, slice(None)), losses(model, own)
    torch.testing.assert_close(found, expected[:, own], atol=1e-5, rtol=1e-5)
    expected.mean().backward()
    found.mean().backward()
    for one, other in zip(alone.parameters(), model.parameters(), strict=True):
        grad = other.grad.full_tensor() if hasattr(other.grad, "full_tensor") else other.grad
        torch.testing.assert_close(grad, one.grad, atol=1e-5, rtol=1e-5)
    for rows, batch_size in ((tokens[:3], 3), (tokens[:1], 1)):  # 3 predictions in each process, and 1
        bound = evaluate_bound(model, rows, 7, draws=2, batch_size=batch_size)
        own_bound = evaluate_bound(alone, rows, 7, draws=2, group="alone")
        torch.testing.assert_close(bound.row_nats, own_bound.row_nats, atol=1e-5, rtol=1e-5)
