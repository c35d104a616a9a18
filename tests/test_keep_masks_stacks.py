"""Masks kept where models and optimizers are wrapped or sharded, and where others write the weights."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import sparsekit as sk
from sparsekit._optimizers import stepping_optimizers
from sparsekit.masks import get_mask
from tests.keeping import Codes, Slow, SlowOptimizer, X, adamw, kept, pruned, train


@pytest.fixture
def model():
    return pruned()


@pytest.fixture
def group():
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.device_mesh.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


class Outer(torch.optim.AdamW):
    """Writes weights before and after the step of its base class, in which hooks are called as well."""

    def step(self, closure=None):
        for parameter in self.param_groups[0]["params"]:
            parameter.data.add_(0.1)
        super().step(closure)
        for parameter in self.param_groups[0]["params"]:
            parameter.data.add_(0.1)


def test_an_accelerated_optimizer(model):
    accelerator = pytest.importorskip("accelerate").Accelerator(cpu=True)
    optimizer = adamw(model)
    prepared, wrapped = accelerator.prepare(model, optimizer)
    assert wrapped is not optimizer
    with sk.keep_masks(prepared, wrapped), accelerator.accumulate(prepared):
        for _ in range(3):
            accelerator.backward(prepared(X).square().mean())
            wrapped.step()
            wrapped.zero_grad()
    assert kept(model) and optimizer.state[model[0].weight]["step"] == 3


def test_data_parallel_and_compiled(model, group):
    for wrapped in (DistributedDataParallel(model), torch.compile(model, backend="eager")):
        optimizer = adamw(model)
        with sk.keep_masks(wrapped, optimizer):
            train(wrapped, optimizer)
        assert kept(model)


def test_fully_sharded(model, group):
    from torch.distributed.fsdp import fully_shard

    fully_shard(model[0], mesh=group)
    fully_shard(model, mesh=group)
    model(X)  # which leaves the outermost module gathered
    model[0].reshard(), model.reshard()
    optimizer = adamw(model)
    train(model, optimizer, 1)  # an optimizer that is older than the masks' keeper
    model(X)
    keeper = sk.keep_masks(model, optimizer)
    train(model, optimizer)
    assert hasattr(model[0].weight, "full_tensor") and kept(model)
    assert all((model[0].weight.grad.full_tensor()[~get_mask(model[0])] == 0).tolist())
    for state in optimizer.state[model[0].weight].values():
        assert state.dim() == 0 or not state.full_tensor()[~get_mask(model[0])].any()
    with torch.no_grad():
        model[2].weight.to_local().fill_(1.0)
    with pytest.raises(ValueError, match="dropped weights of layer '2' are not zero any more"):
        train(model, optimizer, 1)
    keeper.apply()
    train(model, optimizer, 1)
    keeper.remove()


def test_sharded_afterwards_wants_a_new_optimizer(model, group):
    from torch.distributed.fsdp import fully_shard

    optimizer = adamw(model)
    sk.keep_masks(model, optimizer)
    fully_shard(model, mesh=group)
    with pytest.raises(ValueError, match="layer '0' has another parameter than when keep_masks was called"):
        train(model, optimizer, 1)
    optimizer.param_groups[0]["params"] = list(model.parameters())  # as accelerate does
    train(model, optimizer)
    assert kept(model)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_flattened_by_the_old_fsdp(model, group):
    from torch.distributed.fsdp import FullyShardedDataParallel

    for originals in (True, False):
        wrapped = FullyShardedDataParallel(
            copy.deepcopy(model), use_orig_params=originals, device_id=torch.device("cpu")
        )
        with pytest.raises(ValueError, match=r"flattened by FullyShardedDataParallel \(FSDP1\): use fully_shard"):
            sk.keep_masks(wrapped, adamw(wrapped))


@pytest.mark.parametrize("make", [lambda inner: SlowOptimizer(inner), lambda inner: Outer(inner.param_groups)])
def test_a_step_within_a_step(model, make):
    optimizer = make(adamw(model))
    with sk.keep_masks(model, optimizer):
        for _ in range(3):
            train(model, optimizer, 1)
            for layer in (model[0], model[2]):
                assert not layer.weight[~get_mask(layer)].any()


def test_an_optimizer_of_copies_is_refused(model):
    """As DeepSpeed's, which steps on partitions of its own, in float32."""

    class Engine:
        def __init__(self, parameters):
            self.copies = torch.cat([parameter.detach().flatten() for parameter in parameters]).requires_grad_()
            self.param_groups = [{"params": [self.copies]}]
            self.optimizer = torch.optim.SGD([self.copies], lr=0.1)
            self.step, self.zero_grad = self.optimizer.step, self.optimizer.zero_grad

    for optimizer in (Engine(model.parameters()), Slow(Engine(model.parameters()))):
        with pytest.raises(ValueError, match=r"none of the masked weights: .* or holds copies of them, as DeepSpeed's"):
            sk.keep_masks(model, optimizer)
    assert not any(parameter._post_accumulate_grad_hooks for parameter in model.parameters())


def test_the_optimizers_that_call_hooks():
    parameter = nn.Parameter(torch.zeros(2))
    one, two = torch.optim.SGD([parameter]), torch.optim.SGD([parameter])

    class Property:
        __slots__ = ("_inner",)
        optimizer = property(lambda self: self._inner)

    lightning = Property()
    lightning._inner = one
    several = Slow(one)
    several.optimizers = [one, two]
    assert stepping_optimizers(one) == stepping_optimizers(Slow(one)) == stepping_optimizers(lightning) == (one,)
    assert stepping_optimizers(several) == (one, two)
    outer = Slow(one)
    outer.base_optimizer, outer.myself = Slow(two), outer
    assert stepping_optimizers(outer) == (one, two)
    with pytest.raises(TypeError, match=r"optimizer must be a torch\.optim\.Optimizer, or a wrapper .*, got list"):
        stepping_optimizers([parameter])


@pytest.mark.parametrize("variant", ["foreach", "maximize", "lbfgs", "scheduler", "averaged"])
def test_ways_to_step(model, variant):
    if variant == "lbfgs":
        optimizer = torch.optim.LBFGS(model.parameters(), max_iter=3)
    else:
        optimizer = adamw(model, **{variant: True} if variant in ("foreach", "maximize") else {})
    average = torch.optim.swa_utils.AveragedModel(model, use_buffers=True)
    keeper = sk.keep_masks(model, optimizer)
    if variant == "scheduler":
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5)

    def closure():
        optimizer.zero_grad(set_to_none=variant == "maximize")
        loss = model(X).square().mean()
        loss.backward()
        return loss

    for _ in range(3):
        if variant == "lbfgs":
            optimizer.step(closure)
        else:
            closure(), optimizer.step()
        if variant == "scheduler":
            scheduler.step()
        average.update_parameters(model)
    assert kept(model) and kept(average)
    keeper.remove()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.jit, within torch
def test_a_compiled_step(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    with sk.keep_masks(model, optimizer):
        train(model, optimizer, 1)
        torch.compile(optimizer.step, backend="eager")()
    assert kept(model)


def test_quantized_states_are_left_alone(model):
    """They may stay: the weight itself is zeroed after every step."""

    class Quantized(torch.optim.SGD):
        @torch.no_grad()
        def step(self, closure=None):
            for parameter in self.param_groups[0]["params"]:
                state = self.state[parameter].setdefault("buffer", Codes(torch.ones_like(parameter)))
                parameter.sub_(state.as_subclass(torch.Tensor))

    optimizer = Quantized(model.parameters(), lr=0.1)
    with sk.keep_masks(model, optimizer) as keeper:
        train(model, optimizer)
        keeper.apply()
    assert kept(model)


def test_torchao_states(model):
    low_bit = pytest.importorskip("torchao.optim")
    big = nn.Sequential(nn.Linear(128, 64))  # states are quantized from 4096 entries on
    sk.prune_(big, sk.Magnitude("2:4"))
    optimizer = low_bit.AdamW8bit(big.parameters(), lr=0.1)
    with sk.keep_masks(big, optimizer):
        big(torch.randn(4, 128)).sum().backward()
        # Its own step is compiled, for seconds: what follows it is what matters.
        optimizer._new_buffer(big[0].weight, True)
        optimizer.state[big[0].weight]["exp_avg"] = optimizer._new_buffer(big[0].weight, True)
        assert type(optimizer.state[big[0].weight]["exp_avg"]) is not torch.Tensor
        sk.keep_masks(big, optimizer).apply()
