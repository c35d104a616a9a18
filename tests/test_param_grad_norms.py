"""Norms of the gradients of parameters: the true ones, whatever became of the gradients, by one norm of all."""

import math

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import sparsekit as sk


class Odd(nn.Module):
    """Tied, unused, frozen, sparse, complex, 16-bit and 64-bit parameters beside a plain one."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(5, 3, sparse=True)
        self.plain = nn.Linear(3, 3)
        self.again = self.plain
        self.unused, self.frozen = nn.Linear(2, 2), nn.Parameter(torch.ones(3), requires_grad=False)
        self.turn = nn.Parameter(torch.tensor([3 + 4j]))
        self.small = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
        self.large = nn.Parameter(torch.ones(3, dtype=torch.float64))

    def forward(self, ids):
        x = self.again(self.plain(self.embed(ids)) + self.frozen) * self.small * self.large
        return (x * self.turn.abs()).sum()


def test_by_hand():
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 1))
    for parameter, grad in zip(model.parameters(), ([[1.0, 2.0], [2.0, 4.0]], [[3.0, 4.0]], None), strict=True):
        parameter.grad = None if grad is None else torch.tensor(grad)
    assert sk.param_grad_norms(model) == {"0.weight": 5.0, "1.weight": 5.0, "1.bias": None}


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")  # where a test before has printed a sparse tensor
def test_odd_parameters():
    model = Odd()
    model(torch.tensor([0, 3, 3])).backward()
    norms = sk.param_grad_norms(model)
    assert list(norms) == [name for name, _ in model.named_parameters()]
    assert {name for name, norm in norms.items() if norm is None} == {"frozen", "unused.weight", "unused.bias"}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            dense = parameter.grad.to_dense() if parameter.grad.is_sparse else parameter.grad
            assert norms[name] == pytest.approx(dense.abs().double().norm().item(), rel=1e-5), name


def test_the_whole_is_the_total_norm():
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4)))
    for _ in range(3):  # accumulated
        model(torch.randn(5, 8)).square().sum().backward()
    total = torch.nn.utils.get_total_norm([parameter.grad for parameter in model.parameters()])
    norms = sk.param_grad_norms(model)
    assert math.sqrt(sum(norm**2 for norm in norms.values())) == pytest.approx(total.item(), rel=1e-6)


def test_a_scale_is_divided_out_and_infinities_are_shown():
    model, scaler = nn.Linear(4, 4), torch.amp.GradScaler("cpu", init_scale=1024.0)
    x = torch.randn(3, 4)
    model(x).sum().backward()
    expected = sk.param_grad_norms(model)
    model.zero_grad()
    scaler.scale(model(x).sum()).backward()
    assert sk.param_grad_norms(model, scaler=scaler) == pytest.approx(expected)
    optimizer = torch.optim.SGD(model.parameters())
    scaler.unscale_(optimizer)
    assert sk.param_grad_norms(model) == pytest.approx(expected)
    model.bias.grad[0] = math.inf
    model.weight.grad[0, 0] = math.nan
    norms = sk.param_grad_norms(model)
    assert norms["bias"] == math.inf and math.isnan(norms["weight"])


def test_a_model_without_gradients():
    assert sk.param_grad_norms(nn.Linear(2, 2)) == {"weight": None, "bias": None}
    assert sk.param_grad_norms(nn.ReLU(), scaler=torch.amp.GradScaler("cpu")) == {}
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got list"):
        sk.param_grad_norms([])


class Counts(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.ops = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.ops.append(str(op.overloadpacket).removeprefix("aten."))
        return op(*args, **(kwargs or {}))


def test_one_norm_of_all_and_no_read_for_each():
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(10)))
    model(torch.ones(1, 4)).sum().backward()
    with Counts() as counts:
        sk.param_grad_norms(model)
    assert counts.ops.count("_foreach_norm") == 1
    assert not {"_local_scalar_dense", "item", "linalg_vector_norm"} & set(counts.ops)
    assert {op for op in counts.ops if counts.ops.count(op) > 2} == {"detach"}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_is_waited_for_once():
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(10))).cuda()
    model(torch.ones(1, 4, device="cuda")).sum().backward()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with pytest.warns(UserWarning, match="synchronizing") as warned:
            sk.param_grad_norms(model)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(warned) == 1
