"""Every op gives the same bits whatever the caller's surroundings are: modes, defaults, threads."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from helpers import assert_same, sparse24
from torch.utils._pytree import tree_leaves

import sparsekit as sk
from sparsekit.ops import _kernels, arrange24, arrange_conv24, arranged_conv2d24, arranged_linear24, masked_weight
from sparsekit.ops._define import DECLARED
from sparsekit.ops.arranged24 import LAYOUTS
from sparsekit.ops.int8_linear import PackedInt8, int8_linear, quantize_rows
from sparsekit.ops.linear24 import _linear24
from sparsekit.ops.linear24q import _linear24q
from sparsekit.ops.linear24q_int8 import _linear24q_int8
from sparsekit.ops.linear_tiered import _linear_tiered
from sparsekit.ops.prepacked import prepack, prepacked_linear
from sparsekit.ops.prepacked_conv import prepack_conv2d, prepacked_conv2d
from sparsekit.ops.train24 import train_linear24, train_prune24

OPS = torch.ops.sparsekit
REFERENCE = torch._C.DispatchKey.CompositeExplicitAutograd


@contextmanager
def undone(change, back):
    change()
    try:
        yield
    finally:
        back()


@contextmanager
def matmul_precision(precision):
    before = torch.get_float32_matmul_precision()
    with undone(
        lambda: torch.set_float32_matmul_precision(precision), lambda: torch.set_float32_matmul_precision(before)
    ):
        yield


@contextmanager
def thread_count(count):
    before = torch.get_num_threads()
    with undone(lambda: torch.set_num_threads(count), lambda: torch.set_num_threads(before)):
        yield


@contextmanager
def flushed():
    with undone(lambda: torch.set_flush_denormal(True), lambda: torch.set_flush_denormal(False)):
        yield


SURROUNDINGS = {
    "autocast_bfloat16": lambda: torch.autocast("cpu", torch.bfloat16),
    "autocast_float16": lambda: torch.autocast("cpu", torch.float16),
    "inference_mode": torch.inference_mode,
    "no_grad": torch.no_grad,
    "default_float64": lambda: undone(
        lambda: torch.set_default_dtype(torch.float64), lambda: torch.set_default_dtype(torch.float32)
    ),
    "default_bfloat16": lambda: undone(
        lambda: torch.set_default_dtype(torch.bfloat16), lambda: torch.set_default_dtype(torch.float32)
    ),
    "default_meta": lambda: torch.device("meta"),
    "deterministic": lambda: undone(
        lambda: torch.use_deterministic_algorithms(True), lambda: torch.use_deterministic_algorithms(False)
    ),
    "matmul_medium": lambda: matmul_precision("medium"),
    "one_thread": lambda: thread_count(1),
    "four_threads": lambda: thread_count(4),
    "flushed": flushed,
}


def op_calls(dtype):
    """Every op, as a function without arguments whose inputs are made already."""
    weight, (pruned, mask) = torch.randn(9, 20).to(dtype), sparse24(9, 20, dtype)
    x, many, bias = torch.randn(3, 20).to(dtype), torch.randn(40, 20).to(dtype), torch.randn(9).to(dtype)
    scale, tiers = torch.rand(20), torch.tensor([[0, 1, 2]], dtype=torch.uint8)
    values, bits, _ = sk.pack24(pruned, mask)
    forms = {layout: arrange24(sk.pack24(pruned, mask), layout) for layout in LAYOUTS}
    tiered = sk.pack_tiered(torch.randn(20, 20).to(dtype) * (torch.rand(20, 20) < 0.3), block=(8, 8))
    convolution = sk.pack_conv24(
        sk.nm_prune(torch.randn(63, 20).to(dtype), 2, 4)[0].view(7, 3, 3, 20).permute(0, 3, 1, 2)
    )
    image = torch.randn(2, 20, 6, 5).to(dtype)
    quantized = sk.quantize24(sk.Packed24(values, bits, (9, 20)))
    tiled = sk.tile24(quantized)
    single, factor = torch.randn(6, 8), torch.linalg.cholesky(torch.eye(8) + 0.1).t().contiguous()
    nf4 = sk.ops.quantize_nf4(weight)
    int8 = PackedInt8(*quantize_rows(weight))
    logits = weight if weight.dtype != torch.float16 else weight.float()
    calls = {
        "int8_linear": lambda: int8_linear(x, int8, bias),
        "int8_weight": int8.to_dense,
        "round_tokens": lambda: OPS.round_tokens(weight, 127),
        "nm_mask": lambda: sk.nm_mask(weight, 2, 4),
        "nm_mask_bits": lambda: sk.nm_mask_bits(weight, 3, 7),
        "nm_prune": lambda: sk.nm_prune(weight, 2, 4, scale=scale),
        "nm_prune_": lambda: sk.nm_prune_(weight.clone(), 2, 4),
        "nm_sample": lambda: sk.nm_sample(logits, 2, 4, seed=1),
        "nm_policy_step_": lambda: sk.nm_policy_step_(
            logits.clone(), OPS.nm_sample(logits, 2, 4, 1, 0), 0.5, 0.1, 2, 4, seed=1
        ),
        "masked_weight": lambda: masked_weight(weight[..., None], OPS.nm_mask_bits(weight, 2, 4).flatten()[:23], 20),
        "transposable_mask24": lambda: sk.transposable_mask24(weight),
        "block_scores": lambda: sk.block_scores(weight, (4, 4), scale=scale),
        "block_topk_mask": lambda: sk.block_topk_mask(weight, 3, (4, 8)),
        "tier_prune": lambda: sk.tier_prune(weight, tiers, 5, (16, 8), scale=scale),
        "tier_scores": lambda: sk.tier_scores(weight, 5, (16, 8), score_scale=scale),
        "pack24": lambda: sk.pack24(pruned),
        "prune_pack24": lambda: sk.prune_pack24(weight, scale=scale),
        "unpack24": lambda: sk.Packed24(values, bits, (9, 20)).to_dense(),
        "linear24": lambda: sk.linear24(x, sk.Packed24(values, bits, (9, 20)), bias),
        "linear24_many": lambda: sk.linear24(many, sk.Packed24(values, bits, (9, 20)), bias),
        "linear24_reference": lambda: _linear24._op_dk(REFERENCE, x, values, bits, bias),
        "quantize24": lambda: sk.quantize24(sk.Packed24(values, bits, (9, 20)), "nf4"),
        "tile24": lambda: sk.tile24(quantized),
        "dequantized": lambda: tiled.to_dense(),
        "linear24q": lambda: sk.linear24q(x, quantized, bias),
        "linear24q_many": lambda: sk.linear24q(many, quantized, bias),
        "linear24q_reference": lambda: _linear24q._op_dk(REFERENCE, x, *quantized[:3], bias, "int8", 64),
        "linear24q_int8": lambda: sk.linear24q_int8(x, tiled, bias),
        "linear24q_int8_reference": lambda: _linear24q_int8._op_dk(REFERENCE, x, tiled.tiles, bias, 9, "int8", 64),
        "linear_nf4_reference": lambda: sk.ops.linear_nf4(x, nf4, bias),
        "linear_nf4": nf4.to_dense,
        "quantize_nf4": lambda: sk.ops.quantize_nf4(weight)[:2],
        "arrange_input_pairs24": lambda: arrange24(sk.pack24(pruned), "input pairs").data,
        "arrange_row_pairs24": lambda: arrange24(sk.pack24(pruned), "row pairs").data,
        "match_row_pairs24": lambda: OPS.match_row_pairs24(bits, 20),
        "restore_input_pairs24": lambda: forms["input pairs"].to_packed()[:2],
        "restore_row_pairs24": lambda: forms["row pairs"].to_packed()[:2],
        "linear_input_pairs24": lambda: arranged_linear24(x, forms["input pairs"], bias),
        "linear_row_pairs24": lambda: arranged_linear24(many, forms["row pairs"], bias),
        "pack_tiered": lambda: sk.pack_tiered(weight, block=(8, 8)),
        "unpack_tiered": lambda: tiered.to_dense(),
        "linear_tiered": lambda: sk.linear_tiered(x, tiered),
        "linear_tiered_many": lambda: sk.linear_tiered(many, tiered),
        "linear_tiered_reference": lambda: _linear_tiered._op_dk(REFERENCE, x, *tiered.tensors, None, 20),
        "conv2d24": lambda: sk.conv2d24(image, convolution, padding=1),
        "sparsegpt_columns": lambda: sk.ops.sparsegpt_columns(single, factor),
        "train_prune24": lambda: train_prune24(weight, transposable=True),
        "pack_bits": lambda: sk.ops.pack_bits(mask),
        "unpack_bits": lambda: sk.ops.unpack_bits(bits, 20),
    }
    if dtype == torch.float32:
        packed, arranged = prepack(weight, 3), arrange_conv24(convolution)
        reordered = prepack_conv2d(torch.randn(7, 20, 3, 3), image.shape[:1] + image.shape[2:], (1, 1), (1, 1), (1, 1))
        return {
            **calls,
            "prepacked_linear": lambda: prepacked_linear(x, packed, bias),
            "prepacked_dense": lambda: OPS.prepacked_dense(packed),
            "arranged_conv2d24": lambda: arranged_conv2d24(image, arranged, padding=1),
            "prepacked_conv2d": lambda: prepacked_conv2d(image, reordered, None, (1, 1), (1, 1), (1, 1), False),
        }
    wide, (high, _) = torch.randn(2, 64).to(dtype), sparse24(32, 64, dtype)
    hardware, square = sk.ops.prune_to_hardware24(high, "cutlass_sm80"), torch.randn(64, 64).to(dtype)
    return {
        **calls,
        "to_hardware24": lambda: sk.ops.to_hardware24(sk.pack24(high), "cutlass_sm80"),
        "from_hardware24": lambda: sk.ops.from_hardware24(hardware, (32, 64), "cutlass_sm80"),
        "prune_to_hardware24": lambda: sk.ops.prune_to_hardware24(high, "cutlass_sm80"),
        "prune_both_to_hardware24": lambda: sk.ops.prune_both_to_hardware24(square, "cutlass_sm80"),
        "hardware_linear24": lambda: sk.ops.hardware_linear24(wide, hardware, None, 32, "cutlass_sm80"),
        "train_linear24": lambda: train_linear24(wide, high, None, layout="cutlass_sm80"),
    }


def test_every_declared_op_is_called_here():
    called = op_calls(torch.float32).keys() | op_calls(torch.bfloat16).keys()
    assert not (missing := DECLARED.keys() - called), f"op_calls has no entry for {sorted(missing)}"


def results(call):
    return [leaf for leaf in tree_leaves(call()) if isinstance(leaf, torch.Tensor)]


@pytest.mark.parametrize("surroundings", SURROUNDINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_every_op_gives_the_same_bits(surroundings, dtype):
    for name, call in op_calls(dtype).items():
        expected = results(call)
        with SURROUNDINGS[surroundings]():
            got = results(call)
        assert len(got) == len(expected), name
        for mine, plain in zip(got, expected, strict=True):
            assert mine.device.type == "cpu", name
            if name.endswith("_reference"):  # PyTorch's own product rounds as it likes
                torch.testing.assert_close(mine, plain)
            else:
                assert_same(mine, plain)


def test_every_op_gives_the_same_bits_in_another_thread():
    calls = op_calls(torch.float32)
    expected = {name: results(call) for name, call in calls.items()}
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda name: (name, results(calls[name])), [*calls] * 4))
    for name, got in found:
        for mine, plain in zip(got, expected[name], strict=True):
            assert_same(mine, plain)


def with_gradients(call, *inputs):
    inputs = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    y = call(*inputs)
    y.backward(torch.ones_like(y))
    return [y.detach(), *(tensor.grad for tensor in inputs)]


def product_calls(dtype):
    values, bits, _ = sk.pack24(*sparse24(9, 20, dtype))
    tiered = sk.pack_tiered(torch.randn(20, 20).to(dtype) * (torch.rand(20, 20) < 0.3), block=(8, 8))
    x, bias = torch.randn(3, 20).to(dtype), torch.randn(9).to(dtype)

    def linear_tiered(x, dense, values, topk):
        return sk.linear_tiered(x, tiered._replace(dense=dense, values=values, topk=topk))

    yield (
        lambda x, values, bias: sk.linear24(x, sk.Packed24(values, bits, (9, 20)), bias),
        (x, values, bias),
    )
    yield linear_tiered, (x, tiered.dense, tiered.values, tiered.topk)
    yield lambda values: sk.Packed24(values, bits, (9, 20)).to_dense(), (values,)
    if dtype == torch.float32:
        packed = prepack(torch.randn(9, 20), 3)
        yield lambda x, bias: prepacked_linear(x, packed, bias), (x, bias)
    else:
        high, _ = sparse24(64, 64, dtype)
        layout = "cutlass_sm80"
        hardware = sk.ops.prune_to_hardware24(high, layout)
        wide = torch.randn(3, 64).to(dtype)
        yield lambda x: sk.ops.hardware_linear24(x, hardware, None, 64, layout), (wide,)
        for both in (False, True):
            yield lambda x, w, both=both: train_linear24(x, w, None, transposable=both, layout=layout), (wide, high)


@pytest.mark.parametrize("name", ["autocast_bfloat16", "autocast_float16", "default_float64", "default_meta"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_gradients_are_the_same_bits(name, dtype):
    for call, inputs in product_calls(dtype):
        expected = with_gradients(call, *inputs)
        with SURROUNDINGS[name]():
            got = with_gradients(call, *inputs)
        for mine, plain in zip(got, expected, strict=True):
            assert mine.dtype == plain.dtype and torch.equal(mine, plain)


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_references_multiply_all_digits_of_float32(precision):
    """What PyTorch may round float32 factors to; whether it does, depends on the processor."""
    dtypes = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function._schema.name in ("aten::mm", "aten::addmm", "aten::linear"):
                dtypes.append(args[0].dtype)
            return function(*args, **(kwargs or {}))

    values, bits, _ = sk.pack24(*sparse24(9, 20))
    x = torch.randn(3, 20)
    with matmul_precision(precision), Watch():
        got = _linear24._op_dk(REFERENCE, x, values, bits, None)
    assert dtypes == [torch.float64] and got.dtype == torch.float32


def test_a_gpu_kernel_is_launched_outside_of_autocast(monkeypatch):
    """Launchers multiply many tokens by PyTorch's dense product."""
    x, weight = torch.randn(2, 8), torch.randn(3, 8)
    launcher = SimpleNamespace(linear24=torch.nn.functional.linear)
    monkeypatch.setattr(_kernels, "import_module", lambda name: launcher)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.nn.functional.linear(x, weight).dtype == torch.bfloat16
        assert _kernels._launcher("linear24", "linear24")(x, weight).dtype == torch.float32


def saved(output):
    return [tensor for tensor in output.grad_fn.saved_tensors if tensor is not None]


def test_products_save_x_only_for_the_gradient_of_the_weight():
    values, bits, _ = sk.pack24(*sparse24(9, 20))
    tiered = sk.pack_tiered(torch.randn(20, 20) * (torch.rand(20, 20) < 0.3), block=(8, 8))
    x = torch.randn(3, 20)

    def keeps(output, tensor):
        return any(each is tensor or each.data_ptr() == tensor.data_ptr() for each in saved(output))

    frozen = x.clone().requires_grad_()
    assert not keeps(sk.linear24(frozen, sk.Packed24(values, bits, (9, 20))), frozen)
    assert not keeps(sk.linear_tiered(frozen, tiered), frozen)
    trained = values.clone().requires_grad_()
    output = sk.linear24(x, sk.Packed24(trained, bits, (9, 20)))
    assert keeps(output, x) and not keeps(output, trained)
    bias = torch.zeros(9, requires_grad=True)
    assert not saved(sk.linear24(x, sk.Packed24(values, bits, (9, 20)), bias))
    assert keeps(sk.linear_tiered(x, tiered._replace(dense=tiered.dense.clone().requires_grad_())), x)

    weight, wide = sparse24(64, 64, torch.bfloat16)[0], torch.randn(3, 64).bfloat16()
    for both in (False, True):
        frozen = wide.clone().requires_grad_()
        assert not keeps(train_linear24(frozen, weight, None, transposable=both, layout="cutlass_sm80"), frozen)
        trained = weight.clone().requires_grad_()
        output = train_linear24(wide, trained, None, transposable=both, layout="cutlass_sm80")
        assert len(saved(output)) == 1 and keeps(output, wide)


def test_what_is_written_in_place_is_known_to_autograd():
    weight = torch.randn(4, 8, requires_grad=True)
    doubled = weight * 2
    output = (doubled**2).sum()  # saves `doubled`
    before = doubled._version
    sk.nm_prune_(doubled, 2, 4)
    assert doubled._version > before
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.backward()
    strided = torch.randn(8, 4).t()
    before = strided._version
    OPS.nm_prune_(strided, 2, 4, None)
    assert strided._version > before
    with torch.inference_mode():
        sk.nm_prune_(torch.randn(4, 8), 2, 4)  # such tensors have no version


@pytest.mark.slow
@pytest.mark.parametrize("name", ["autocast_bfloat16", "no_grad", "default_float64", "deterministic"])
def test_compiled_ops_give_the_same_bits(name):
    def run(weight, x, packed):
        return sk.nm_mask(weight, 2, 4), sk.linear24(x, packed), sk.block_scores(weight, (4, 4))

    inputs = torch.randn(9, 20), torch.randn(3, 20), sk.pack24(*sparse24(9, 20))
    expected = run(*inputs)
    torch._dynamo.reset()
    with SURROUNDINGS[name]():
        got = torch.compile(run, fullgraph=True, backend="aot_eager")(*inputs)
    for mine, plain in zip(got, expected, strict=True):
        assert_same(mine, plain)
