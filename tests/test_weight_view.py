"""The weight of a compressed layer: free to ask about, right to compute with, and never written to."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from helpers import sparse_linear
from torch import nn
from torch.nn.utils import prune
from torch.utils._python_dispatch import TorchDispatchMode

from sparsekit.nn import Linear24, PrepackedLinear, TieredLinear, WeightView

KINDS = pytest.mark.parametrize("kind", [Linear24, TieredLinear, PrepackedLinear])
TRAINED = pytest.mark.parametrize("kind", [Linear24, TieredLinear])
GRAD = pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
SHOWN = pytest.mark.parametrize("transposed", [False, True], ids=["", "transposed"])
compiles = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def make(kind, transposed=False):
    """A compressed layer, and the weight that it must show."""
    linear = sparse_linear()
    weight = linear.weight.detach().clone()
    if transposed:
        linear.weight = nn.Parameter(linear.weight.detach().t().contiguous())
        return kind.from_linear(linear, transposed=True), weight.t()
    return kind.from_linear(linear), weight


class Called(TorchDispatchMode):
    """Names the ops that are called on something."""

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.ops.append(str(op))
        return op(*args, **(kwargs or {}))

    def __enter__(self):
        self.ops = []
        return super().__enter__()


@KINDS
@SHOWN
def test_asking_unpacks_nothing(kind, transposed):
    layer, weight = make(kind, transposed)
    with Called() as called:
        shown = layer.weight
        assert (shown.shape, shown.dtype, shown.device) == (weight.shape, weight.dtype, weight.device)
        assert (shown.stride(), shown.storage_offset(), shown.layout) == (weight.stride(), 0, weight.layout)
        assert (shown.ndim, shown.numel(), len(shown), shown.size(0)) == (2, 48 * 40, len(weight), len(weight))
        assert shown.is_contiguous() is not transposed and shown.nbytes == weight.nbytes and not shown.is_cuda
        assert shown.T.shape == weight.T.shape and shown.data[1:, ::2].stride() == weight[1:, ::2].stride()
        assert shown.to(torch.float32) is shown and shown.detach()[None].dtype == torch.float32
        assert isinstance(shown, torch.Tensor) and not isinstance(shown, nn.Parameter)
    assert not [op for op in called.ops if "sparsekit" in op]


READS = {
    "equal": lambda w: torch.equal(w, w.clone()),
    "product": lambda w: torch.ones(2, w.shape[1]) @ w.mT,
    "linear": lambda w: F.linear(torch.ones(2, w.shape[1]), w),
    "half": lambda w: w.half(),
    "data": lambda w: w.data * 2,
    "window": lambda w: w[3:9, 1::3].T,
    "entry": lambda w: w[2, 5],
    "gather": lambda w: w[torch.tensor([3, 1])],
    "chunks": lambda w: torch.cat([part.sum(0) for part in w.chunk(3)]),
    "rows": lambda w: torch.stack(list(w)),
    "bits": lambda w: w.detach().view(torch.int32),
    "bool": lambda w: w.count_nonzero(),
    "numpy": lambda w: torch.from_numpy(w.detach().numpy().copy()),
    "list": lambda w: torch.tensor(w.tolist()),
    "copied": lambda w: torch.zeros(w.shape).copy_(w),
    "vector": lambda w: nn.utils.parameters_to_vector([w.t().t()]) if w.is_contiguous() else w.reshape(-1),
    "vmap": lambda w: torch.vmap(lambda row: row * 2)(w),
    "vmap of x": lambda w: torch.vmap(lambda x: F.linear(x, w))(torch.ones(3, w.shape[1])),
    "jacobian": lambda w: torch.func.jacrev(lambda x: F.linear(x, w.detach()))(torch.ones(w.shape[1])),
    "deepcopy": copy.deepcopy,
    "pickle": lambda w: pickle.loads(pickle.dumps(w)),
}


@KINDS
@SHOWN
@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_reads_as_a_dense_tensor(kind, transposed, read):
    layer, weight = make(kind, transposed)
    for context in (torch.no_grad(), torch.inference_mode(), torch.enable_grad()):
        with context:
            got, expected = read(layer.weight), read(weight)
        if isinstance(expected, bool):
            assert got is expected
        else:
            assert type(got.clone()) is torch.Tensor
            torch.testing.assert_close(got.detach().clone(), expected, rtol=0, atol=0)


@KINDS
def test_copies_are_plain_and_writable(kind):
    layer, weight = make(kind)
    file = io.BytesIO()
    torch.save({"w": layer.weight}, file)
    file.seek(0)
    for copied in (
        layer.weight.clone(),
        copy.deepcopy(layer.weight),
        copy.copy(layer.weight),
        torch.load(file, weights_only=True)["w"],
        layer.weight.to(torch.float32, copy=True),
    ):
        assert type(copied) is torch.Tensor and torch.equal(copied, weight)
        copied.data.zero_()
    assert torch.equal(layer.weight, weight) and repr(layer.weight).startswith("WeightView(tensor([[")
    with torch.autocast("cpu", torch.bfloat16):
        assert F.linear(torch.ones(2, 40), layer.weight).dtype == torch.bfloat16


def add(layer):
    weight = layer.weight
    weight += 1


def add_data(layer):
    layer.weight.data += 1


def set_item(layer):
    layer.weight[0] = 1


def set_data(layer):
    layer.weight.data = torch.zeros(48, 40)


def set_grad(layer):
    layer.weight.grad = torch.zeros(48, 40)


def set_trained(layer):
    layer.weight.requires_grad = not layer.weight.requires_grad


def set_parameter(layer):
    layer.weight = nn.Parameter(torch.zeros(48, 40))


def set_tensor(layer):
    layer.weight = torch.zeros(48, 40)


def set_none(layer):
    layer.weight = None


def delete(layer):
    del layer.weight


WRITES = {function.__name__: function for function in (add, add_data, set_item, set_data, set_grad)}
WRITES |= {function.__name__: function for function in (set_trained, set_parameter, set_tensor, set_none, delete)}
WRITES |= {
    "copy": lambda layer: layer.weight.data.copy_(torch.zeros(48, 40)),
    "zero": lambda layer: layer.weight.zero_(),
    "transposed": lambda layer: layer.weight.T.mul_(2),
    "row": lambda layer: layer.weight.detach()[3].fill_(1),
    "chunk": lambda layer: layer.weight.chunk(2)[1].zero_(),
    "flat": lambda layer: layer.weight.cpu().float().contiguous().view(-1).zero_(),
    "init": lambda layer: nn.init.kaiming_uniform_(layer.weight),
    "normal": lambda layer: nn.init.normal_(layer.weight),
    "out": lambda layer: torch.add(torch.zeros(48, 40), 1, out=layer.weight),
    "outs": lambda layer: torch.max(torch.zeros(48, 40, 2), -1, out=(layer.weight, torch.empty(48, 40).long())),
    "foreach": lambda layer: torch._foreach_add_([torch.zeros(2), layer.weight.detach()], 1),
    "inplace": lambda layer: F.relu(layer.weight, inplace=True),
    "vector": lambda layer: nn.utils.vector_to_parameters(torch.zeros(48 * 40), [layer.weight]),
    "resize": lambda layer: layer.weight.resize_(3),
    "set": lambda layer: layer.weight.set_(torch.zeros(48, 40)),
    "squeeze": lambda layer: layer.weight.squeeze_(),
    "share": lambda layer: layer.weight.share_memory_(),
    "train": lambda layer: layer.weight.requires_grad_(not layer.weight.requires_grad),
    "prune": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
}


@KINDS
@GRAD
@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_a_write_raises_and_names_what_to_do(kind, grad, write):
    layer, _ = make(kind)
    before, attributes = copy.deepcopy(layer.state_dict()), set(vars(layer))
    with torch.set_grad_enabled(grad), pytest.raises(RuntimeError, match=r"sparsekit\.decompress_\(model\) first"):
        write(layer)
    assert all(torch.equal(tensor, before[name]) for name, tensor in layer.state_dict().items())
    assert set(vars(layer)) == attributes and not layer._forward_pre_hooks


@KINDS
def test_memory_cannot_be_written_to_either(kind):
    layer, _ = make(kind)
    with pytest.raises(ValueError, match="read-only"):
        layer.weight.detach().numpy()[0] = 1
    for memory in ("data_ptr", "untyped_storage", "__dlpack__"):
        with pytest.raises(RuntimeError, match=r"not stored dense: weight\.clone\(\) returns one that is"):
            getattr(layer.weight, memory)()
    with pytest.raises(ValueError, match="does not have a parameter"):
        nn.utils.parametrizations.weight_norm(layer)


@TRAINED
@SHOWN
def test_gradients_reach_what_the_layer_holds(kind, transposed):
    layer, _ = make(kind, transposed)
    x = torch.randn(3, 40)
    layer(x).square().sum().backward()
    expected = [parameter.grad.clone() for parameter in layer.parameters()]
    with torch.no_grad():
        shown = layer.weight
    for weight in (layer.weight, shown):  # as of a Parameter, wherever it was read
        layer.zero_grad()
        F.linear(x, weight.t() if transposed else weight, layer.bias).square().sum().backward()
        for parameter, grad in zip(layer.parameters(), expected, strict=True):
            torch.testing.assert_close(parameter.grad, grad)
    assert layer.weight.requires_grad and shown.requires_grad
    layer.requires_grad_(False)
    assert not layer.weight.requires_grad and layer.weight.is_leaf
    assert layer.weight.requires_grad_(False) is not None


@TRAINED
def test_gradients_of_gradients(kind):
    layer, weight = make(kind)
    x = torch.randn(3, 40, requires_grad=True)
    dense = weight.clone().requires_grad_()
    results = []
    for read in (layer.weight, dense):
        (grad,) = torch.autograd.grad(F.linear(x, read).square().sum(), x, create_graph=True)
        grad.square().sum().backward()
        results.append(grad.detach())
    torch.testing.assert_close(*results)
    got = layer._unpack(*(getattr(part, "grad", None) if part.requires_grad else part for part in layer._parts()))
    torch.testing.assert_close(got, dense.grad * (weight != 0))


@TRAINED
def test_a_change_between_forward_and_backward_is_noticed(kind):
    layer, _ = make(kind)
    loss = F.linear(torch.randn(3, 40), layer.weight).sum()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@KINDS
def test_it_keeps_what_it_was_read_as(kind):
    layer, weight = make(kind)
    shown = layer.weight
    layer.to(torch.bfloat16)
    assert shown.dtype == torch.float32 and torch.equal(shown, weight) and layer.weight.dtype == torch.bfloat16
    assert layer.to("meta").weight.is_meta


def test_a_parent_cannot_train_a_weight_that_takes_no_gradient():
    layer = make(PrepackedLinear)[0].train()
    assert layer.weight.shape == (48, 40)
    with pytest.raises(RuntimeError, match=r"cannot train its weight: call model\.eval\(\)"):
        F.linear(torch.randn(3, 40), layer.weight).sum().backward()
    layer.eval()
    x = torch.randn(3, 40, requires_grad=True)
    F.linear(x, layer.weight).sum().backward()
    assert x.grad is not None


@KINDS
@compiles
def test_compiled_code_reads_it(kind):
    torch._dynamo.reset()
    layer, weight = make(kind)
    x = torch.randn(3, 40)
    read = lambda x: F.linear(x, layer.weight) + layer.weight.shape[0]  # noqa: E731
    with torch.no_grad():
        got = torch.compile(read, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(got, F.linear(x, weight) + 48)


def test_only_what_reads_it_holds_it():
    layer, _ = make(Linear24)
    assert not [value for value in vars(layer).values() if isinstance(value, WeightView)]
    assert layer.weight is not layer.weight
