"""compress_ and decompress_ in the modes, wrappers and stacks that callers are in: right, or one sentence."""

import threading

import pytest
import torch
from compressing import assert_same, blocks, decisions, reasons, snapshot
from interrupts import surroundings
from tiering import tiered_linear
from torch import nn

import sparsekit as sk
from sparsekit import _timing
from sparsekit.compress import tune
from sparsekit.nn import Linear24, PrepackedLinear

MEASURE = tune.measure


@pytest.fixture(autouse=True)
def measured_and_told(ratios, monkeypatch):
    """Modules are built, called and checked for real; only the times are told."""
    told = tune.measure

    def measure(calls, plain, x, **kwargs):
        found = MEASURE(calls, plain, x, **{**kwargs, "budget": 1e-9})
        assert None not in found.values()
        return told(calls, plain, x, **kwargs)

    monkeypatch.setattr(tune, "measure", measure)


class DefaultDtype:
    def __init__(self, dtype):
        self.dtype = dtype

    def __enter__(self):
        self.before = torch.get_default_dtype()
        torch.set_default_dtype(self.dtype)

    def __exit__(self, *_):
        torch.set_default_dtype(self.before)


class Deterministic:
    def __enter__(self):
        torch.use_deterministic_algorithms(True)

    def __exit__(self, *_):
        torch.use_deterministic_algorithms(False)


MODES = {
    "inference": torch.inference_mode,
    "no_grad": torch.no_grad,
    "float64": lambda: DefaultDtype(torch.float64),
    "bfloat16": lambda: DefaultDtype(torch.bfloat16),
    "float16": lambda: DefaultDtype(torch.float16),
    "meta": lambda: torch.device("meta"),
    "cpu:0": lambda: torch.device("cpu:0"),
    "deterministic": Deterministic,
    "saved on cpu": lambda: torch.autograd.graph.save_on_cpu(),
    "anomaly": lambda: torch.autograd.detect_anomaly(check_nan=False),
}


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@pytest.mark.parametrize("with_batches", [True, False], ids=["batches", "tokens"])
@pytest.mark.parametrize("pruned", [True, False], ids=["sparse", "dense"])
@pytest.mark.parametrize("mode", MODES)
def test_modes(mode, pruned, with_batches):
    """What is made there is called and trained outside, and undone there again."""
    model, x = blocks(1, pruned), torch.randn(3, 16)
    before, expected = snapshot(model), model(x).detach()
    arguments = {"batches": x} if with_batches else {"measure": sk.Measure(tokens=(1, 3))}
    with MODES[mode]():
        around = surroundings()
        report = sk.compress_(model, **arguments, keep_dense=not pruned)
        assert surroundings() == around
    assert set(decisions(report).values()) == {"2:4" if pruned else "prepacked"}
    torch.testing.assert_close(model(x), expected)
    assert not any(tensor.is_inference() for tensor in model.state_dict().values())
    if pruned:
        model.train()
        model(x).sum().backward()
        assert model[0].up.values.grad is not None
        model.eval()
    else:
        model(x.clone().requires_grad_()).sum().backward()
    with MODES[mode]():
        around = surroundings()
        sk.decompress_(model)
        assert surroundings() == around
    for parameter in model.parameters():
        parameter.grad = None
    assert_same(snapshot(model), before)
    model.train()(x).sum().backward()
    torch.optim.SGD(model.parameters(), 0.1).step()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_what_is_measured_does_not_depend_on_the_default_dtype(dtype, monkeypatch):
    seen = []

    def record(calls, plain, x, **kwargs):
        seen.append((plain.weight.clone(), x.clone(), kwargs["clock"].evicted.nbytes))
        return MEASURE(calls, plain, x, **{**kwargs, "budget": 1e-9})

    monkeypatch.setattr(tune, "measure", record)
    monkeypatch.setattr(_timing, "cache_bytes", lambda device: 0)
    monkeypatch.setattr(_timing, "last_level_cache", lambda: 4096)
    model = nn.Sequential(blocks(1)[0].up, tiered_linear(320, 320)).eval()
    sk.compress_(model, measure=sk.Measure(tokens=(512,)))
    with DefaultDtype(dtype):
        sk.decompress_(model)
        sk.compress_(model, measure=sk.Measure(tokens=(512,)))
    assert_same(seen[: len(seen) // 2], seen[len(seen) // 2 :])


@pytest.mark.parametrize("with_batches", [True, False], ids=["batches", "tokens"])
def test_autocast_to_another_dtype_is_a_reason(with_batches):
    model, x = blocks(1), torch.randn(3, 16)
    before = snapshot(model)
    with torch.autocast("cpu", torch.bfloat16):
        around = surroundings()
        report = sk.compress_(model, x if with_batches else None)
        assert surroundings() == around
    assert all("it runs in torch.bfloat16" in reason for reason in reasons(report).values())
    assert_same(snapshot(model), before)


def test_autocast_to_the_dtype_of_the_weights():
    model, x = blocks(1).bfloat16(), torch.randn(3, 16)
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(x)
        report = sk.compress_(model, x)
        assert set(decisions(report).values()) == {"2:4"}
        torch.testing.assert_close(model(x), expected, rtol=5e-2, atol=5e-2)
        sk.decompress_(model)
        torch.testing.assert_close(model(x), expected)


def test_another_thread_and_several_of_them():
    model, x, seen = blocks(1), torch.randn(3, 16), []
    expected = model(x)
    thread = threading.Thread(target=lambda: seen.append(sk.compress_(model, x)))
    thread.start()
    thread.join()
    assert len(seen[0].swapped) == 2
    with torch.no_grad():
        threads = [threading.Thread(target=lambda: seen.append(model(x))) for _ in range(4)]
        for each in threads:
            each.start()
        for each in threads:
            each.join()
    for y in seen[1:]:
        torch.testing.assert_close(y, expected)


def test_arguments_that_cannot_be_copied():
    class Takes(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = blocks(1)[0]

        def forward(self, x, lock, grown):
            with lock:
                grown.append(1)
                return self.block(x.add_(1)) * len(grown)

    leaf = torch.randn(3, 16, requires_grad=True)
    x, grown = leaf * 2, []
    kept = x.detach().clone()
    report = sk.compress_(Takes().eval(), [(x, threading.Lock(), grown)])
    assert len(report.swapped) == 2 and grown == [] and torch.equal(x, kept)


def test_fx_and_data_parallel():
    for wrap in (torch.fx.symbolic_trace, nn.DataParallel):
        model, x = wrap(blocks(1)), torch.randn(3, 16)
        expected = model(x)
        assert len(sk.compress_(model, x).swapped) == 2
        torch.testing.assert_close(model(x), expected)


def test_offloaded_layers_stay():
    accelerate = pytest.importorskip("accelerate")
    model = blocks(1)
    accelerate.cpu_offload(model, execution_device="cpu")
    report = sk.compress_(model, torch.randn(3, 16))
    assert all("meta device" in reason for reason in reasons(report).values())


@pytest.fixture
def group(tmp_path):
    distributed = torch.distributed
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield distributed
    distributed.destroy_process_group()


def test_ddp_is_refused_around_a_model_and_taken_around_a_compressed_one(group):
    model, x = blocks(1), torch.randn(3, 16)
    wrapped = nn.parallel.DistributedDataParallel(model)
    before = snapshot(wrapped)
    for each in (wrapped, nn.Sequential(wrapped)):
        with pytest.raises(ValueError, match=r"DistributedDataParallel.*compress the module in it, then wrap it anew"):
            sk.compress_(each, x)
    assert_same(snapshot(wrapped), before)
    sk.compress_(model, x)
    nn.parallel.DistributedDataParallel(model).train()(x).sum().backward()
    assert model[0].up.values.grad is not None


def test_sharded_weights_stay(group):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model, mesh = blocks(1), init_device_mesh("cpu", (1,))
    fully_shard(model, mesh=mesh)
    for batches in (torch.randn(3, 16), None):
        report = sk.compress_(model, batches)  # after a pass the weights of the outermost part look like any others
        assert all("DTensor" in reason for reason in reasons(report).values()) and not report.swapped


def test_several_processes_do_not_time_the_whole(group, monkeypatch):
    monkeypatch.setattr(group, "get_world_size", lambda *_: 2)
    report = sk.compress_(blocks(1), torch.randn(3, 16))
    assert report.remark == "not timed, since other processes may take part in a pass" and not report.passes


@pytest.mark.slow
def test_lora_over_a_sparse_model():
    peft = pytest.importorskip("peft")
    model, x = blocks(1), torch.randn(3, 16)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["up"], r=2, init_lora_weights=False)).eval()
    expected = adapted(x)
    before = snapshot(adapted)
    report = sk.compress_(adapted, x)
    assert sorted(decisions(report).values()) == ["2:4", "2:4", "prepacked", "prepacked"]
    up = model[0].up
    assert type(up.base_layer) is Linear24 and type(up.lora_A["default"]) is PrepackedLinear
    torch.testing.assert_close(adapted(x), expected)
    sk.decompress_(adapted)
    assert_same(snapshot(adapted), before)


@pytest.mark.parametrize("kind", ["Llama", "T5", "GPT2"])
def test_models_generate_as_before(kind):
    transformers = pytest.importorskip("transformers")
    small = {"vocab_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32}
    config = {
        "Llama": lambda: transformers.LlamaConfig(**small, intermediate_size=48),
        "GPT2": lambda: transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=32),
        "T5": lambda: transformers.T5Config(
            vocab_size=64, d_model=32, d_ff=64, num_layers=2, num_heads=4, d_kv=8, decoder_start_token_id=0
        ),
    }[kind]()
    name = {"Llama": "LlamaForCausalLM", "T5": "T5ForConditionalGeneration", "GPT2": "GPT2LMHeadModel"}[kind]
    model = getattr(transformers, name)(config).eval()
    sk.prune_(model, sk.Magnitude("2:4"))
    tokens = torch.arange(8)[None]

    def generate(model, batch):
        return model.generate(batch, max_new_tokens=4, do_sample=False, pad_token_id=0)

    expected = generate(model, tokens)
    report = sk.compress_(model, [tokens], forward=generate)
    layer = next(layer for layer in report.layers if layer.decision == "2:4")
    assert {1, 8} & layer.calls.keys()
    assert torch.equal(generate(model, tokens), expected)
    sk.decompress_(model)
    assert torch.equal(generate(model, tokens), expected)
