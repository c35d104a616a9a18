"""What two processes of one training run do with a model; each cell returns nothing, or says what is wrong."""

import os
import tempfile
import traceback
import warnings
from pathlib import Path

import masked_stacks
import torch
import torch.distributed as dist
from accelerate import Accelerator
from running import leave_group
from surroundings import inputs, make
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import sparsekit as sk

SHAPES = [(32, 32), (4, 32)]


def shard() -> Tensor:
    """The inputs that this rank calibrates on: not those of the other, and not as many."""
    return inputs(10 + dist.get_rank())[: 48 - 16 * dist.get_rank()]


def everything() -> list[Tensor]:
    """The inputs of both ranks, as one process would be given them."""
    return [inputs(10), inputs(11)[:32]]


def full(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def assert_equal_on_ranks(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        own = full(parameter.detach()).contiguous()
        gathered = [torch.empty_like(own) for _ in range(dist.get_world_size())]
        dist.all_gather(gathered, own)
        assert torch.equal(*gathered), f"{name} differs between the ranks"


def assert_sparse(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if name.endswith("weight"):
            weight = full(parameter.detach())
            assert ((weight != 0).unflatten(1, (-1, 4)).sum(-1) <= 2).all(), f"{name} is not 2:4"


def assert_keeps_masks(trained: nn.Module, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Trains under ``keep_masks``: the weights of ``model`` stay 2:4, and the same on both ranks."""
    with sk.keep_masks(trained, optimizer):
        train(trained, optimizer)
    assert_sparse(model)
    assert_equal_on_ranks(model)


def refused(model: nn.Module, call, *words: str) -> None:
    """The call raises one sentence with one of the words, and the model is as it was."""
    before = {name: full(parameter.detach()).clone() for name, parameter in model.named_parameters()}
    hooks = [
        sum(len(v) for k, v in vars(m).items() if k.endswith("_hooks") and isinstance(v, dict)) for m in model.modules()
    ]
    try:
        call()
    except (ValueError, TypeError, RuntimeError) as error:
        assert any(word in str(error) for word in words), f"{type(error).__name__}: {error}"
    else:
        raise AssertionError("nothing was raised")
    for name, parameter in model.named_parameters():
        assert torch.equal(full(parameter.detach()), before[name]), name
    after = [
        sum(len(v) for k, v in vars(m).items() if k.endswith("_hooks") and isinstance(v, dict)) for m in model.modules()
    ]
    assert after == hooks


def train(model: nn.Module, optimizer: torch.optim.Optimizer, backward=Tensor.backward, steps: int = 2) -> None:
    for step in range(steps):
        optimizer.zero_grad()
        backward(model(inputs(20 + 2 * step + dist.get_rank())).square().mean())
        optimizer.step()


def ddp_prune(method) -> None:
    model = DistributedDataParallel(make())
    report = sk.prune_(model, method, [shard()])
    assert_equal_on_ranks(model)
    assert_sparse(model.module)
    alone = make()
    expected = sk.prune_(alone, method, everything(), **SINGLE)
    for (name, found), want in zip(model.module.named_parameters(), alone.parameters(), strict=True):
        assert ((found != 0) == (want != 0)).float().mean() > 0.99, f"{name} is not what one process gives"
    assert len(report.layers) == len(expected.layers) == 5


SINGLE: dict[str, object] = {}  # arguments that make a call one of this process alone


def ddp_wanda() -> None:
    ddp_prune(sk.Wanda("2:4"))


def ddp_sparsegpt() -> None:
    ddp_prune(sk.SparseGPT("2:4"))


def ddp_tiers() -> None:
    model = DistributedDataParallel(make())
    sk.tiers.tier_iteration(model, sk.tiers.Step(1, sk.tiers.Ratios(0.5, 0.5, 0.0), 0.5, 0.0, 0.0), [shard()])
    assert_equal_on_ranks(model)


def ddp_keep_masks() -> None:
    model = make().train()
    sk.prune_(model, sk.Magnitude("2:4"))
    wrapped = DistributedDataParallel(model)
    assert_keeps_masks(wrapped, model, torch.optim.AdamW(wrapped.parameters(), lr=0.1))


def ddp_sparse_training() -> None:
    model = make().train()
    wrapped = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(wrapped.parameters(), lr=0.1)
    with sk.sparse_training_(wrapped) as training:
        train(wrapped, optimizer)
        training.finish()
    assert_sparse(model)
    assert_equal_on_ranks(model)


def ddp_save_load() -> None:
    model = DistributedDataParallel(make())
    sk.prune_(model, sk.Magnitude("2:4"))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.safetensors")
        sk.save(model.module, path)
        other = make(5)
        sk.load(other, path)
    assert_sparse(other)


def fsdp_keep_masks_after() -> None:
    model = make().train()
    sk.prune_(model, sk.Magnitude("2:4"))
    fully_shard(model)
    assert_keeps_masks(model, model, torch.optim.AdamW(model.parameters(), lr=0.1))


def fsdp_keep_masks_of_blocks() -> None:
    model = make().train()
    sk.prune_(model, sk.Magnitude("2:4"))
    for block in model:
        fully_shard(block)
    fully_shard(model)
    assert_keeps_masks(model, model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))


def sharded() -> nn.Module:
    return fully_shard(make())


def fsdp_prune() -> None:
    model = sharded()
    refused(model, lambda: sk.prune_(model, sk.Wanda("2:4"), [shard()]), "shard", "FSDP", "DTensor")


def fsdp_compress() -> None:
    model = sharded()
    report = sk.compress_(model, inputs())
    assert not report.swapped
    assert all("shard" in layer.reason or "DTensor" in layer.reason for layer in report.layers), str(report)


def fsdp_save() -> None:
    model = sharded()
    with tempfile.TemporaryDirectory() as folder:
        refused(model, lambda: sk.save(model, Path(folder, "model.safetensors")), "shard", "FSDP", "DTensor")
        assert not os.listdir(folder)


def fsdp_load() -> None:
    model = sharded()
    with tempfile.TemporaryDirectory() as folder:
        sk.save(make(), Path(folder, "model.safetensors"))
        refused(model, lambda: sk.load(model, Path(folder, "model.safetensors")), "shard", "FSDP", "DTensor")


def fsdp_sparse_training() -> None:
    model = sharded().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    training = sk.sparse_training_(model)
    train(model, optimizer)
    refused(model, training.finish, "FSDP")
    training.undo()


def fsdp_tiers() -> None:
    model = sharded()
    step = sk.tiers.Step(1, sk.tiers.Ratios(0.5, 0.5, 0.0), 0.5, 0.0, 0.0)
    refused(model, lambda: sk.tiers.tier_iteration(model, step, [shard()]), "shard", "FSDP", "DTensor")


def assert_norms(model: nn.Module, named: nn.Module) -> None:
    """The gradients of a step of both ranks have the norms of one process, and a probe sees the rank's own."""
    together = make().train()
    together(torch.cat([inputs(20), inputs(21)])).square().mean().backward()
    with sk.GradProbe(model, "*2") as probe:
        model(inputs(20 + dist.get_rank())).square().mean().backward()
    norms = sk.param_grad_norms(named)
    for name, parameter in together.named_parameters():
        torch.testing.assert_close(norms[name], parameter.grad.norm().item(), rtol=1e-5, atol=0)
    own = make().train()
    with sk.GradProbe(own, "2") as mine:
        own(inputs(20 + dist.get_rank())).square().mean().backward()
    (found,), (expected,) = probe.records, mine.records
    torch.testing.assert_close(list(found.values()), list(expected.values()))


def ddp_gradients() -> None:
    model = DistributedDataParallel(make().train())
    assert_norms(model, model.module)


def fsdp_gradients() -> None:
    model = make().train()
    for block in model:
        fully_shard(block)
    fully_shard(model)
    assert_norms(model, model)
    total = torch.nn.utils.get_total_norm([parameter.grad for parameter in model.parameters()])
    norms = sk.param_grad_norms(model)
    torch.testing.assert_close(sum(norm**2 for norm in norms.values()) ** 0.5, full(total).item(), rtol=1e-5, atol=0)
    if dist.get_rank() == 0:
        model[0].up.weight.grad = None  # its rows on the other rank have one
        model[2].bias.grad = None
    else:
        model[2].bias.grad = None
    missing = sk.param_grad_norms(model)
    assert missing["2.bias"] is None and 0 < missing["0.up.weight"] < norms["0.up.weight"]
    assert missing["1.up.weight"] == norms["1.up.weight"]


def fsdp_gradients_of_replicas() -> None:
    """Every rank holds a replica: a mesh of 2 replicas of 1 shard."""
    model = fully_shard(make().train(), mesh=init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicas", "shards")))
    assert_norms(model, model)


def fsdp_scores() -> None:
    model = sharded()
    refused(model, lambda: sk.taylor_scores(model, mean_square, [shard()]), "sharded")


def ddp_scores() -> None:
    """Scores of this rank's batches, which prune_ with batches refuses until they are added up."""
    model = DistributedDataParallel(make())
    scores = sk.taylor_scores(model, mean_square, [shard(), shard()])
    own = sk.taylor_scores(make(), mean_square, [shard(), shard()])
    for name, expected in own.items():
        torch.testing.assert_close(scores[f"module.{name}"], expected)
    refused(model, lambda: sk.prune_(model, sk.Scores("2:4", scores), [shard()]), "differ")
    for each in scores.values():
        dist.all_reduce(each)
    sk.prune_(model, sk.Scores("2:4", scores))
    assert_sparse(model.module)
    assert_equal_on_ranks(model)


def mean_square(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch).square().mean()


def accelerate_keep_masks() -> None:
    model = make().train()
    sk.prune_(model, sk.Magnitude("2:4"))
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    wrapped, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=0.1))
    with sk.keep_masks(wrapped, optimizer):
        train(wrapped, optimizer, accelerator.backward)
    assert_sparse(model)
    assert_equal_on_ranks(model)


def accelerate_prune() -> None:
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    model = accelerator.prepare(make())
    sk.prune_(model, sk.Wanda("2:4"), [shard()])
    assert_equal_on_ranks(model)
    assert_sparse(model)


CELLS = {
    name: cell
    for name, cell in [*globals().items(), *vars(masked_stacks).items()]
    if name.startswith(("ddp_", "fsdp_", "accelerate_")) and name != "ddp_prune"
}


def run(rank: int, port: int, results: str) -> None:
    """Runs every cell in this rank, and writes down what failed."""
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", message=".*(No device id|Guessing device|using all.*device).*")
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank)
    )
    os.environ["OMP_NUM_THREADS"] = "1"  # accelerate warns without it
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    for name, cell in CELLS.items():
        try:
            cell()
            said = ""
        except BaseException:
            said = traceback.format_exc()
        Path(results, f"{name}-{rank}").write_text(said)
        dist.barrier()
    leave_group()
