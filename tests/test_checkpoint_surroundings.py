"""save and load under every mode and default of torch, in wrappers, and on models that are not all in this process."""

import contextlib

import pytest
import torch
from checkpoints import MAKERS, TARGETS, TOKENS, Net, contents, make, mixed, prune
from safetensors.torch import load_file
from surroundings import default_dtype
from torch import nn

import sparsekit as sk
from sparsekit.nn import Linear24


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.safetensors"


@contextlib.contextmanager
def default_device(device):
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


SURROUNDINGS = {
    "inference": torch.inference_mode,
    "no-grad": torch.no_grad,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "meta": lambda: torch.device("meta"),
    "default-meta": lambda: default_device("meta"),
}


@pytest.mark.parametrize("around", SURROUNDINGS)
@pytest.mark.parametrize("source", MAKERS)
def test_surroundings_change_nothing(path, source, around):
    model, loaded, dense = MAKERS[source](), TARGETS["mixed"](), make(1)
    with SURROUNDINGS[around]():
        sk.save(model, path)
        sk.load(loaded, path)
        sk.load(dense, path, dense=True)
    assert contents(loaded) == contents(model)
    for each in (loaded, dense):
        tensors = [*each.parameters(), *each.buffers()]
        assert not any(tensor.is_inference() or tensor.is_meta for tensor in tensors)
    dense.train()(TOKENS).sum().backward()
    assert dense.first.weight.grad is not None and dense.third.bias.grad is not None


def test_a_packed_checkpoint_is_written_under_another_default_device(path):
    with torch.device("meta"):
        sk.save(nn.Sequential(sk.nn.Linear24(8, 4, device="cpu")), path, format="sparse-24-bitmask")
    assert load_file(path)["0.shape"].flatten().tolist() == [4, 8]


def test_a_model_made_in_inference_mode_can_be_trained_once_it_is_loaded(path):
    sk.save(MAKERS["tiered"](), path)
    with torch.inference_mode():
        loaded = make(1)
        sk.load(loaded, path)
    loaded.train()(TOKENS).sum().backward()
    assert loaded.third.dense.grad is not None and loaded.first.weight.grad is not None


def test_what_is_frozen_stays_frozen(path):
    sk.save(MAKERS["tiered"](), path)
    loaded = make(1)
    loaded.requires_grad_(False)
    loaded.conv.requires_grad_(True)
    before = {name: parameter.requires_grad for name, parameter in loaded.named_parameters()}
    sk.load(loaded, path, dense=True)
    assert {name: parameter.requires_grad for name, parameter in loaded.named_parameters()} == before


@pytest.mark.parametrize("kind", ["buffer", "attribute"])
def test_what_would_stay_on_the_meta_device_is_named(path, kind):
    class Positions(Net):
        def __init__(self):
            super().__init__()
            positions = torch.arange(5)
            if kind == "buffer":
                self.norm.register_buffer("positions", positions, persistent=False)
            else:
                self.norm.positions = positions

    sk.save(Positions(), path)
    with torch.device("meta"):
        loaded = Positions().eval()
    modules, keys = list(loaded.modules()), [sorted(vars(module)) for module in loaded.modules()]
    with pytest.raises(ValueError, match=r"cannot load .*norm\.positions would stay on the meta device"):
        sk.load(loaded, path)
    assert all(tensor.is_meta for tensor in [*loaded.parameters(), *loaded.buffers()])
    assert list(loaded.modules()) == modules and [sorted(vars(module)) for module in modules] == keys
    loaded.norm.positions = torch.arange(5)
    sk.load(loaded, path)
    assert not any(parameter.is_meta for parameter in loaded.parameters())


def holding(tensor):
    model = nn.Module()
    model.register_buffer("odd", tensor)
    return model


WRAPPED = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged)
UNSAVED = {
    "complex128": (
        torch.zeros(2, dtype=torch.complex128),
        "odd is torch.complex128, which safetensors has no name for",
    ),
    "sparse": (torch.eye(2).to_sparse(), r"odd is torch.sparse_coo, only strided tensors are saved"),
    "wrapped": (WRAPPED, "odd is a NestedTensor, which holds other tensors: only plain ones are saved"),
    "meta": (torch.zeros(2, device="meta"), "odd is on the meta device and has no data to save"),
}


@pytest.mark.parametrize("name", UNSAVED)
def test_tensors_that_cannot_be_written_are_named(path, name):
    tensor, match = UNSAVED[name]
    with pytest.raises(ValueError, match=match):
        sk.save(holding(tensor), path)
    assert not list(path.parent.iterdir())


def test_lazy_modules_are_named(path):
    model = nn.Sequential(nn.LazyLinear(3))
    with pytest.raises(ValueError, match=r"0\.weight is not initialized: run the model on an input first"):
        sk.save(model, path)
    sk.save(nn.Sequential(nn.Linear(2, 3)), path)
    with pytest.raises(ValueError, match=r"0\.weight is not initialized: run the model on an input first"):
        sk.load(model, path)


def test_sharded_models_are_refused_by_name(path):
    dist = pytest.importorskip("torch.distributed")
    from torch.distributed.tensor import Replicate, distribute_tensor, init_device_mesh

    plain, sharded = nn.Sequential(nn.Linear(8, 4)), nn.Sequential(nn.Linear(8, 4))
    sk.prune_(sharded, sk.Magnitude("2:4"))
    sk.save(sharded, path)
    sk.save(sharded, path.with_name("masks"), format="masks")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        sharded[0].weight = nn.Parameter(distribute_tensor(sharded[0].weight.detach(), mesh, [Replicate()]))
        with pytest.raises(ValueError, match=r"0\.weight is sharded over processes: gather the model first"):
            sk.save(sharded, path.with_name("other"))
        for name in (path, path.with_name("masks")):
            with pytest.raises(ValueError, match=r"sharded over processes: gather the model first"):
                sk.load(sharded, name)
        assert type(sharded[0].weight).__name__ == "DTensor"
        sk.load(plain, path)
    finally:
        dist.destroy_process_group()


@pytest.mark.slow  # importing torch._dynamo takes seconds
def test_a_compiled_model_is_the_model_in_it(path):
    model, plain, inner = mixed(make()), make(1), make(1)
    sk.save(torch.compile(model, backend="eager"), path)
    sk.load(plain, path)
    sk.load(torch.compile(inner, backend="eager"), path)
    assert contents(plain) == contents(inner) == contents(model)


def test_a_distributed_model_is_saved_without_its_wrapper_and_loaded_before(path):
    dist, plain = pytest.importorskip("torch.distributed"), make(1)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(prune(make(tied=False)))
        sk.save(wrapped, path)
        sk.load(plain, path)
        assert contents(plain) == contents(wrapped.module)
        before = contents(wrapped)
        with pytest.raises(
            ValueError, match=r"the model is wrapped in DistributedDataParallel, .* load the model before"
        ):
            sk.load(wrapped, path)
        assert contents(wrapped) == before
        sk.save(wrapped, path, format="masks")
        sk.load(wrapped, path)  # loading masks replaces no parameters
        assert contents(wrapped) == before
    finally:
        dist.destroy_process_group()


def test_conjugates_are_written_as_they_read(path):
    values = torch.tensor([1 + 2j, 3 - 4j])
    sk.save(holding(values.conj()), path)
    loaded = holding(torch.zeros(2, dtype=torch.complex64))
    sk.load(loaded, path)
    assert loaded.odd.tolist() == [1 - 2j, 3 + 4j]


def test_an_offloaded_model_is_loaded_before(path):
    accelerate = pytest.importorskip("accelerate")
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8, bias=False))
    sk.save(model, path)
    for offload in (accelerate.cpu_offload, accelerate.cpu_offload_with_hook):
        other = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8, bias=False))
        offload(other, execution_device="cpu")
        if offload is accelerate.cpu_offload:  # which would silently continue with the old weights
            with pytest.raises(
                ValueError, match=r"cannot load .*: 0 is offloaded by accelerate, .* load the model before"
            ):
                sk.load(other, path)
        else:  # which moves the current weights
            sk.load(other, path)
            assert contents(other) == contents(model)


def test_a_layer_with_hooks_is_not_replaced(path):
    source = nn.Sequential(Linear24(8, 8))
    sk.save(source, path)
    for model in (nn.Sequential(nn.Linear(8, 8)), nn.Sequential(Linear24(8, 8))):
        handle = model[0].register_forward_hook(lambda *_: None)
        before = contents(model)
        with pytest.raises(ValueError, match=r"cannot load .*: layer '0' cannot be replaced: it has hooks"):
            sk.load(model, path)
        assert contents(model) == before and len(model[0]._forward_hooks) == 1
        if type(model[0]) is nn.Linear:
            sk.load(model, path, dense=True)  # a dense load replaces no layer
            assert len(model[0]._forward_hooks) == 1
        handle.remove()
        sk.load(model, path)
        assert contents(model) == contents(source)
