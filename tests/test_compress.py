"""compress_ and decompress_: what is swapped, why not, exact undo, failure, and never slower."""

import copy
import json
import pickle
import statistics
import time

import pytest
import torch
from torch import nn

import sparsekit as sk
from sparsekit.compress import Timing, providers, swap, tune
from sparsekit.masks import MaskInfo, Pattern, get_mask, get_mask_info, set_mask
from sparsekit.nn import Linear24, PrepackedLinear
from sparsekit.ops import backends

compiles = pytest.mark.filterwarnings("ignore::DeprecationWarning")
FAST, SLOW = 2.0, 0.9


@pytest.fixture
def ratios(monkeypatch):
    """Replaces the measurement: provider -> ratio, or a function of the token count; records what was asked."""
    table = {"2:4": 3.0, "prepacked": FAST}

    def measure(modules, x, *, dense, cold, budget):
        measured.append((tuple(modules), tuple(x.shape), cold))
        timings = {}
        for name in modules:
            ratio = 1.0 if name == "plain" else table[name]
            ratio = ratio(len(x)) if callable(ratio) else ratio
            timings[name] = ratio and Timing(len(x) / ratio, ratio, float(ratio > 1), ratio, 0.0)
        return timings

    measured = table["measured"] = []
    monkeypatch.setattr(tune, "measure", measure)
    monkeypatch.setattr(providers, "backends", lambda: {"linear24": {"cpu": "avx2"}})
    return table


class Block(nn.Module):
    def __init__(self, dim=16):
        super().__init__()
        self.up, self.down = nn.Linear(dim, 2 * dim), nn.Linear(2 * dim, dim, bias=False)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(x)))


def blocks(count=2, pruned=True):
    model = nn.Sequential(*[Block() for _ in range(count)]).eval()
    if pruned:
        sk.prune_(model, sk.Magnitude("2:4"))
    return model


def snapshot(model):
    """Everything that compress_ must not change: objects, tensors and flags."""
    return (
        [(name, id(module), type(module), module.training) for name, module in model.named_modules()],
        [(name, id(p), p.requires_grad, p.dtype, p.detach().clone()) for name, p in model.named_parameters()],
        [(name, buffer.clone()) for name, buffer in model.named_buffers()],
        list(model.state_dict()),
        [get_mask_info(module) for module in model.modules()],
        "save_pretrained" in vars(model),
    )


def assert_same(one, other):
    assert len(one) == len(other)
    for left, right in zip(one, other, strict=True):
        if isinstance(left, torch.Tensor):
            assert left.dtype == right.dtype
            assert torch.equal(left, right)
        elif isinstance(left, tuple | list):
            assert_same(left, right)
        else:
            assert left == right


def decisions(report):
    return {layer.name: layer.decision for layer in report.layers}


def reasons(report):
    return {layer.name: layer.reason for layer in report.layers}


def test_literal(ratios):
    model = nn.Sequential(nn.Linear(4, 1, bias=False), nn.Linear(1, 1, bias=False)).eval()
    model[0].weight.data = torch.tensor([[1.0, 0.0, 3.0, 0.0]])
    model[1].weight.data = torch.tensor([[2.0]])
    report = sk.compress_(model, torch.ones(1, 4), where=lambda name, module: name == "0")
    assert decisions(report) == {"0": "2:4"}
    assert type(model[0]) is Linear24 and type(model[1]) is nn.Linear
    assert model(torch.ones(1, 4)).tolist() == [[8.0]]
    assert report.bytes_before == (4 + 1) * 4
    assert report.bytes_after == (2 + 1) * 4 + 1
    assert sk.decompress_(model) == ("0",)
    assert model[0].weight.tolist() == [[1.0, 0.0, 3.0, 0.0]]


@pytest.mark.parametrize("pruned", [True, False], ids=["sparse", "dense"])
def test_round_trip_is_exact(ratios, pruned):
    model = blocks(pruned=pruned)
    model[0].up.weight.requires_grad_(False)
    model[1].down.train()
    model[1].down.weight.requires_grad_(False)
    before, x = snapshot(model), torch.randn(3, 16)
    expected = model(x)
    report = sk.compress_(model, x)
    assert set(decisions(report).values()) == {"2:4" if pruned else "prepacked"}
    assert not any(type(module) is nn.Linear for module in model.modules())
    torch.testing.assert_close(model(x), expected)
    assert sk.decompress_(model) == ("0.up", "0.down", "1.up", "1.down")
    assert_same(snapshot(model), before)
    assert torch.equal(model(x), expected)


def test_compressed_twice_changes_nothing_more(ratios):
    model = blocks()
    sk.compress_(model)
    modules = list(model.modules())
    report = sk.compress_(model)
    assert report.layers == () and list(model.modules()) == modules
    sk.decompress_(model)
    assert sk.decompress_(model) == ()


def test_one_resident_form(ratios):
    model = blocks(pruned=False)
    dense = sum(p.numel() * 4 for p in model.parameters())
    weights = [module.weight for module in model.modules() if type(module) is nn.Linear]
    report = sk.compress_(model)
    assert report.bytes_before == report.bytes_after == dense
    assert all(weight.numel() == 0 and weight.untyped_storage().nbytes() == 0 for weight in weights)


def test_sample_decides_the_token_counts(ratios):
    model = blocks(1)
    batches = [torch.randn(3, 16), torch.randn(2, 2, 16), torch.randn(16), torch.randn(700, 16), torch.randn(0, 16)]
    report = sk.compress_(model, batches)
    assert [layer.calls for layer in report.layers] == [{1: 1, 4: 2, 512: 1}] * 2
    assert sorted({shape[0] for _, shape, _ in ratios["measured"]}) == [1, 4, 512]


def test_without_a_sample_three_counts_are_measured(ratios):
    report = sk.compress_(blocks(1))
    assert [set(layer.timings) for layer in report.layers] == [{1, 16, 128}] * 2


def test_layers_of_one_kind_are_measured_once(ratios):
    sk.compress_(blocks(5), torch.randn(4, 16))
    assert len(ratios["measured"]) == 2


@pytest.mark.parametrize(
    ("sample", "forward"),
    [
        (torch.ones(2, 4), None),
        ({"a": torch.ones(2, 4), "b": torch.ones(2, 4)}, None),
        ((torch.ones(2, 4), torch.ones(2, 4)), None),
        ([(torch.ones(2, 4),), {"a": torch.ones(2, 4)}, torch.ones(2, 4)], None),
        (iter([torch.ones(2, 4)]), None),
        (["text"], lambda model, batch: model(torch.ones(2, 4))),
    ],
    ids=["tensor", "mapping", "tuple", "list", "iterator", "forward"],
)
def test_batch_conventions(ratios, sample, forward):
    class Adds(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, a, b=0):
            return self.layer(input=a) + b

    report = sk.compress_(Adds().eval(), sample, forward=forward)
    assert decisions(report) == {"layer": "prepacked"}
    assert set(report.layers[0].calls) == {2}


def test_the_sample_leaves_no_trace(ratios):
    model = nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16), nn.Dropout()).train()
    model[2].eval()
    before, state = snapshot(model), torch.get_rng_state()
    sk.compress_(model, torch.randn(8, 16))
    torch.set_rng_state(state)
    ratios |= {"prepacked": SLOW}
    x = torch.randn(8, 16)
    after = torch.get_rng_state()
    report = sk.compress_(model, x)
    assert torch.equal(torch.get_rng_state(), after)
    assert "call model.eval() first" in reasons(report)["0"]
    assert_same(snapshot(model), before)


@pytest.mark.parametrize(
    ("two_four", "prepacked", "decision"),
    [
        (1.05, 0.5, "2:4"),
        (1.04, 1.04, "plain"),
        (1.2, 1.3, "prepacked"),
        (1.3, 1.2, "2:4"),
        (None, 1.3, "prepacked"),
        (None, None, "plain"),
        (lambda tokens: 3.0 if tokens == 1 else 1.0, 0.5, "plain"),
        (lambda tokens: 3.0 if tokens == 1 else 1.1, 1.5, "prepacked"),
        (lambda tokens: 3.0 if tokens == 1 else 0.5, lambda tokens: 1.1, "prepacked"),
    ],
)
def test_the_rule(ratios, two_four, prepacked, decision):
    ratios |= {"2:4": two_four, "prepacked": prepacked}
    report = sk.compress_(blocks(1), [torch.randn(1, 16), torch.randn(64, 16)])
    assert set(decisions(report).values()) == {decision}
    if two_four is None:
        assert "2:4: a wrong result at 1 tokens" in report.layers[0].reason
    if two_four == 1.04:
        assert "2:4: 1.04x" in report.layers[0].reason


def test_a_fast_median_that_loses_a_quarter_stays(ratios, monkeypatch):
    quick = Timing(0.5, 2.0, 0.75, 2.0, 0.0)
    monkeypatch.setattr(tune, "measure", lambda modules, x, **_: {name: quick for name in modules})
    report = sk.compress_(blocks(1))
    assert set(decisions(report).values()) == {"plain"}
    assert "75% won" in report.layers[0].reason


def test_cold_where_the_model_exceeds_the_cache(ratios, monkeypatch):
    for size, cold in ((2**20, False), (100, True)):
        monkeypatch.setattr(tune, "last_level_cache", lambda size=size: size)
        ratios["measured"].clear()
        sk.compress_(blocks(1))
        assert {asked[2] for asked in ratios["measured"]} == {cold}


class Hostile(nn.Module):
    """One layer of every kind that must stay, by the reason why."""

    def __init__(self):
        super().__init__()

        class MyLinear(nn.Linear):
            pass

        self.embedding = nn.Embedding(8, 8)
        self.tied = nn.Linear(8, 8, bias=False)
        self.tied.weight = self.embedding.weight
        self.subclass = MyLinear(8, 8)
        self.hooked = nn.Linear(8, 8)
        self.hooked.register_forward_hook(lambda module, args, output: None)
        self.parametrized = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))
        self.replaced_forward = nn.Linear(8, 8)
        self.replaced_forward.forward = lambda x: x
        self.extra = nn.Linear(8, 8)
        self.extra.lora = nn.Linear(8, 8)
        self.double = nn.Linear(8, 8, dtype=torch.float64)
        self.meta = nn.Linear(8, 8, device="meta")
        self.empty = nn.Linear(8, 8)
        self.empty.weight = nn.Parameter(torch.zeros(0, 8))
        self.attention = nn.MultiheadAttention(8, 2)
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16)
        self.lonely = nn.Linear(8, 8)
        self.good = nn.Linear(8, 8)

    def forward(self, x):
        return self.good(x)


def test_hostile_layers_stay(ratios):
    model = Hostile().eval()
    modules = list(model.modules())
    found = reasons(sk.compress_(model, torch.randn(4, 8)))
    for name, reason in {
        "tied": "tied to embedding.weight",
        "subclass": "MyLinear may compute something else",
        "hooked": "hooks",
        "parametrized": "Parametrized",
        "replaced_forward": "forward is replaced",
        "extra": "also holds lora",
        "double": "float64",
        "meta": "meta device",
        "empty": "empty",
        "attention.out_proj": "may compute something else|reads its weight",
        "encoder.linear1": "TransformerEncoderLayer reads its weight",
        "encoder.linear2": "TransformerEncoderLayer reads its weight",
        "lonely": "sample does not run it",
    }.items():
        assert any(part in found[name] for part in reason.split("|")), (name, found[name])
    assert [old for old, new in zip(modules, model.modules(), strict=True) if old is not new] == [
        swap.get_original(model.good)
    ]


def test_other_dtypes_than_the_weight_stay(ratios):
    model = blocks(1)
    with torch.autocast("cpu", torch.bfloat16):
        report = sk.compress_(model, torch.randn(4, 16))
    assert all("runs in torch.bfloat16, its weight is torch.float32" in reason for reason in reasons(report).values())


def test_the_model_itself_stays(ratios):
    report = sk.compress_(nn.Linear(8, 8).eval())
    assert "model itself" in report.layers[0].reason


def test_not_24_and_masks_that_lie(ratios):
    model = blocks(1)
    model[0].up.weight.data[0] = 1
    report = sk.compress_(model)
    assert "2:4: its weight is not zero where its mask drops it" in report.layers[0].reason
    assert decisions(report) == {"0.up": "prepacked", "0.down": "2:4"}
    report = sk.compress_(blocks(1, pruned=False))
    assert "2:4: not 2:4" in report.layers[0].reason


def test_without_a_compiled_kernel_24_is_not_offered(ratios, monkeypatch):
    monkeypatch.setattr(providers, "backends", lambda: {"linear24": {"cpu": "reference"}})
    report = sk.compress_(blocks(1))
    assert set(decisions(report).values()) == {"prepacked"}
    assert "no compiled 2:4 kernel" in report.layers[0].reason


def test_16_bit_goes_where_onednn_computes_in_it(ratios):
    model = blocks(1, pruned=False).bfloat16()
    report = sk.compress_(model, torch.randn(4, 16, dtype=torch.bfloat16))
    expected = "prepacked" if torch.ops.mkldnn._is_mkldnn_bf16_supported() else "plain"
    assert set(decisions(report).values()) == {expected}


def test_a_shared_module_is_swapped_everywhere(ratios):
    model = blocks(2)
    model[1].up = model[0].up
    before, x = snapshot(model), torch.randn(4, 16)
    expected = model(x)
    report = sk.compress_(model, x)
    assert report.layers[0].calls == {4: 2}
    assert model[0].up is model[1].up and type(model[0].up) is Linear24
    torch.testing.assert_close(model(x), expected)
    sk.decompress_(model)
    assert_same(snapshot(model), before)


def test_conv1d_is_a_transposed_linear(ratios, monkeypatch):
    class Conv1D(nn.Module):
        def __init__(self, outputs, inputs):
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.randn(inputs, outputs)), nn.Parameter(torch.randn(outputs))

        def forward(self, x):
            return torch.addmm(self.bias, x.view(-1, x.shape[-1]), self.weight).view(*x.shape[:-1], -1)

    Conv1D.__module__ = "transformers.pytorch_utils"
    model = nn.Sequential(Conv1D(24, 16), Conv1D(8, 24)).eval()
    model[0].weight.data = sk.nm_prune(model[0].weight.data.t(), 2, 4)[0].t().contiguous()
    set_mask(model[0], model[0].weight != 0, MaskInfo(Pattern.parse("2:4"), 0))
    before, x = snapshot(model), torch.randn(4, 16)
    expected = model(x)
    report = sk.compress_(model, x)
    assert decisions(report) == {"0": "2:4", "1": "prepacked"}
    assert [layer.shape for layer in report.layers] == [(24, 16), (8, 24)]
    torch.testing.assert_close(model(x), expected)
    sk.decompress_(model)
    assert_same(snapshot(model), before)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, MemoryError])
@pytest.mark.parametrize("stage", ["sample", "measure", "build", "last build", "guard"])
def test_failure_leaves_the_model_as_it_was(ratios, monkeypatch, error, stage):
    def fail(*args, **kwargs):
        raise error("injected")

    def forward(model, batch):
        model(batch)
        if stage == "sample":
            fail()

    model = blocks(2).train()
    model[0].up.eval()
    model(torch.randn(3, 16)).sum().backward()
    if stage == "measure":
        monkeypatch.setattr(tune, "measure", fail)
    elif stage == "guard":
        monkeypatch.setattr(swap, "guard_saving", fail)
    elif "build" in stage:
        turns = iter(range({"build": 3, "last build": 5}[stage]))  # two are built to be measured, then four to stay
        build = Linear24.from_linear
        monkeypatch.setattr(
            Linear24, "from_linear", lambda *a, **k: build(*a, **k) if next(turns, None) is not None else fail()
        )
    before, gradients = snapshot(model), [p.grad.clone() for p in model.parameters()]
    with pytest.raises(error, match="injected"):
        sk.compress_(model, [torch.randn(3, 16)], forward=forward)
    assert_same(snapshot(model), before)
    assert_same([p.grad for p in model.parameters()], gradients)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_failing_decompress_leaves_the_model_compressed(ratios, monkeypatch):
    model, x = blocks(2), torch.randn(3, 16)
    sk.compress_(model, x)
    modules, expected = list(model.modules()), model(x)
    original, calls = Linear24.to_linear, []

    def to_linear(self):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt("injected")
        return original(self)

    with monkeypatch.context() as patch:
        patch.setattr(Linear24, "to_linear", to_linear)
        with pytest.raises(KeyboardInterrupt, match="injected"):
            sk.decompress_(model)
    assert list(model.modules()) == modules
    assert torch.equal(model(x), expected)
    assert len(sk.decompress_(model)) == 4


def test_rejects():
    model = blocks(1)
    with pytest.raises(ValueError, match="budget must be a positive number of seconds, got 0"):
        sk.compress_(model, budget=0)
    with pytest.raises(ValueError, match="at least one batch, got none"):
        sk.compress_(model, [])
    with pytest.raises(TypeError, match="iterable of batches, got int"):
        sk.compress_(model, 3)


@pytest.mark.parametrize("pruned", [True, False], ids=["sparse", "dense"])
@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_work_and_decompress(ratios, pruned, clone):
    model, x = blocks(pruned=pruned), torch.randn(3, 16)
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    sk.compress_(model, x)
    twin = clone(model)
    assert torch.equal(twin(x), model(x))
    sk.decompress_(twin)
    assert list(twin.state_dict()) == list(state)
    assert all(torch.equal(tensor, state[key]) for key, tensor in twin.state_dict().items())
    assert not any(type(module) is nn.Linear for module in model.modules())


@pytest.mark.parametrize("pruned", [True, False], ids=["sparse", "dense"])
def test_what_happens_while_compressed_is_kept(ratios, pruned):
    model = blocks(pruned=pruned)
    other = blocks(pruned=pruned)
    sk.compress_(model)
    sk.compress_(other)
    model.load_state_dict(other.state_dict())
    model.to(torch.bfloat16)
    model.train()
    sk.decompress_(model)
    sk.decompress_(other)
    assert all(module.training for module in model.modules())
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, theirs.to(torch.bfloat16))
    assert model(torch.randn(3, 16, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_state_dict_of_prepacked_is_that_of_the_model(ratios):
    model = blocks(pruned=False)
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    sk.compress_(model)
    assert {key: tensor.tolist() for key, tensor in model.state_dict().items()} == {
        key: tensor.tolist() for key, tensor in state.items()
    }


def test_masks_stay_with_their_layers(ratios):
    model = blocks()
    masks = {name: get_mask(module) for name, module in model.named_modules() if type(module) is nn.Linear}
    sk.compress_(model)
    for name, mask in masks.items():
        assert torch.equal(get_mask(model.get_submodule(name)), mask)


@compiles
@pytest.mark.parametrize("pruned", [True, False], ids=["sparse", "dense"])
def test_compressed_model_compiles_whole(ratios, pruned):
    torch._dynamo.reset()
    model, x = blocks(1, pruned), torch.randn(3, 16)
    sk.compress_(model, x)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, fullgraph=True)(x), model(x))


class Pretrained(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = blocks(1)
        self.saved = False

    def save_pretrained(self, path):
        self.saved = True


def test_save_pretrained_is_refused_while_compressed(ratios):
    model = nn.ModuleDict({"lm": Pretrained(), "other": nn.Linear(3, 3)}).eval()
    sk.compress_(model, where=lambda name, module: name.startswith("lm"))
    for each in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with pytest.raises(RuntimeError, match=r"use sparsekit\.save, or call sparsekit\.decompress_ first"):
            each["lm"].save_pretrained("folder")
        sk.decompress_(each)
        each["lm"].save_pretrained("folder")
        assert each["lm"].saved and "save_pretrained" not in vars(each["lm"])


def test_a_model_that_stays_can_be_saved(ratios):
    ratios |= {"2:4": SLOW, "prepacked": SLOW}
    model = Pretrained().eval()
    sk.compress_(model)
    model.save_pretrained("folder")
    assert model.saved


def test_decompress_takes_layers_from_elsewhere():
    linear = nn.Linear(8, 8)
    sk.nm_prune_(linear.weight.data, 2, 4)
    model = nn.Sequential(Linear24.from_linear(linear), PrepackedLinear.from_linear(nn.Linear(8, 8)))
    assert sk.decompress_(model) == ("0", "1")
    assert torch.equal(model[0].weight, linear.weight) and type(model[1]) is nn.Linear
    foreign = nn.Sequential(PrepackedLinear(torch.zeros(8, 4), transposed=True))
    with pytest.raises(ValueError, match="'0' stands for a layer of an unknown class"):
        sk.decompress_(foreign)


def test_optimizer_keeps_its_parameters(ratios):
    model, x = blocks(1), torch.randn(3, 16)
    optimizer = torch.optim.Adam(model.parameters(), 0.1)
    model(x).sum().backward()
    optimizer.step()
    sk.compress_(model, x)
    optimizer.step()
    sk.decompress_(model)
    before = model[0].up.weight.detach().clone()
    model(x).sum().backward()
    optimizer.step()
    assert not torch.equal(model[0].up.weight, before)


def test_report_reads_and_saves(ratios, tmp_path):
    steps = []
    report = sk.compress_(blocks(1), torch.randn(3, 16), progress=lambda *step: steps.append(step))
    assert steps == [(0, 2, "32x16 at 4 tokens"), (1, 2, "16x32 at 4 tokens"), (2, 2, "done")]
    lines = str(report).splitlines()
    assert lines[0].split() == ["layer", "shape", "now", "4", "tokens", "reason"]
    assert lines[1].startswith("0.up    32x16  2:4  3.00x (3.00x)  fastest")
    assert lines[-1].startswith("2 of 2 layers swapped, 0.0 MiB -> 0.0 MiB, measured in")
    assert report.swapped == ("0.up", "0.down")
    path = tmp_path / "report.json"
    report.save(path)
    entry = json.loads(path.read_text())["layers"][0]
    assert entry["name"] == "0.up" and entry["timings"]["4"]["2:4"]["ratio"] == 3
    assert [file.name for file in tmp_path.iterdir()] == ["report.json"]
    with pytest.raises(FileNotFoundError, match="nowhere"):
        report.save(tmp_path / "nowhere" / "report.json")


def test_report_shows_what_was_turned_down(ratios):
    ratios |= {"2:4": 0.97, "prepacked": 1.02}
    text = str(sk.compress_(blocks(1), torch.randn(3, 16)))
    assert "1.02x" in text and "2:4: 0.97x, 0% won at 4 tokens" in text


def test_measured_for_real_on_small_layers():
    model, x = blocks(1), torch.randn(3, 16)
    expected = model(x)
    report = sk.compress_(model, x, budget=0.01)
    offered = {"plain", "prepacked"} | ({"2:4"} if backends()["linear24"]["cpu"] != "reference" else set())
    for layer in report.layers:
        assert layer.timings[4].keys() == offered
        assert None not in layer.timings[4].values()  # every provider gave the right result
    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_never_slower_than_dense(dtype):
    """Measures again what was swapped: model against model, in turns; the best of three tries, for a noisy machine."""
    model = nn.Sequential(nn.Linear(768, 3072), nn.ReLU(), nn.Linear(3072, 768)).eval().to(dtype)
    sk.prune_(model, sk.Magnitude("2:4"))
    x = torch.randn(64 if dtype == torch.float32 else 8, 768, dtype=dtype)
    dense = copy.deepcopy(model)
    report = sk.compress_(model, x, budget=0.3)
    with torch.no_grad():
        torch.testing.assert_close(model(x), dense(x), rtol=5e-2, atol=5e-2)
        if not report.swapped:
            pytest.skip(f"nothing was faster than dense in {dtype}: {report.layers[0].reason}")
        assert max(_paired_ratio(dense, model, x) for _ in range(3)) >= 0.97


def _paired_ratio(dense, model, x):
    ratios = []
    for _ in range(15):
        begin = time.perf_counter()
        dense(x)
        middle = time.perf_counter()
        model(x)
        ratios.append((middle - begin) / (time.perf_counter() - middle))
    return statistics.median(ratios)
