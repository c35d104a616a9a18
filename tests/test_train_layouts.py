"""A hardware layout is used for training only where it was measured to be faster, and right."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import sparsekit as sk
from sparsekit.ops import train24
from sparsekit.train import layouts

CPU, SHAPE, LAYOUT = torch.device("cpu"), torch.Size((128, 128)), "cusparselt_sm90"


class StepClock:
    """A clock that reports given times of dense and sparse steps, by the token count."""

    def __init__(self, seconds):
        self.seconds_of, self.asked = seconds, 0

    def start(self, call, x):
        call(x)

    def seconds(self, call, x):
        before = len(self.products)
        call(x)
        self.asked += 1
        return self.seconds_of(len(x)) if len(self.products) > before else 1.0


@pytest.fixture
def timed(monkeypatch):
    """Makes a sparse step take ``seconds(tokens)`` and a dense one a second: ``timed(seconds)`` returns the clock."""
    monkeypatch.setattr(layouts, "RATIOS", {})
    monkeypatch.setattr(layouts, "ROUNDS", 3)
    monkeypatch.setattr("sparsekit.train.report.RATIOS", layouts.RATIOS)
    monkeypatch.setattr(layouts, "hardware_layouts", lambda device: ((LAYOUT,), ""))
    products, product = [], train24._product
    monkeypatch.setattr(train24, "_product", lambda x, *rest: products.append(len(x)) or product(x, *rest))

    def use(seconds):
        clock = StepClock(seconds)
        clock.products = products
        monkeypatch.setattr(layouts, "clock", lambda device, evict_cache: clock)
        return clock

    return use


def kind(transposable=False, dtype=torch.bfloat16):
    return layouts.StepKind(CPU, dtype, SHAPE, transposable, LAYOUT)


@pytest.mark.parametrize("transposable", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_measures_each_power_of_two_once(timed, transposable, dtype):
    clock = timed(lambda tokens: 0.5 if tokens >= 32 else 0.99)
    one = kind(transposable, dtype)
    assert [layouts.is_faster(one, tokens) for tokens in (1, 2, 31, 32, 17)] == [False, False, True, True, True]
    assert layouts.RATIOS == {one: {1: 1 / 0.99, 2: 1 / 0.99, 32: 2.0}}
    assert clock.asked == 3 * 2 * 3  # token counts, products, rounds


def test_many_tokens_are_measured_as_the_most(timed, monkeypatch):
    monkeypatch.setattr(layouts, "MAX_TOKENS", 64)
    timed(lambda tokens: 0.5)
    assert layouts.is_faster(kind(), 10**6) and list(layouts.RATIOS[kind()]) == [64]


@pytest.mark.parametrize("call", [1, 2], ids=["output", "gradient"])
def test_a_wrong_result_is_never_faster(timed, monkeypatch, call):
    timed(lambda tokens: 0.01)
    product, calls = train24._product, []

    def wrong(x, *rest):
        calls.append(x)
        return product(x, *rest) * (1.1 if len(calls) == call else 1)

    monkeypatch.setattr(train24, "_product", wrong)
    assert not layouts.is_faster(kind(transposable=True), 8) and layouts.RATIOS[kind(True)] == {8: 0.0}


def test_a_product_that_fails_is_never_faster(timed, monkeypatch):
    def fail(*arguments):
        raise RuntimeError("CUSPARSE_STATUS_NOT_SUPPORTED")

    timed(lambda tokens: 0.01)
    monkeypatch.setattr(train24, "_product", fail)
    model = nn.Linear(128, 128).bfloat16()
    training = sk.sparse_training_(model)
    assert model(torch.randn(8, 128).bfloat16()).shape == (8, 128)
    assert training.layers[0].product == "masked dense"
    assert training.layers[0].reason == "cusparselt_sm90 is 0.00x at 8 tokens"


def test_nothing_is_measured_while_a_graph_is_captured(timed, monkeypatch):
    clock = timed(lambda tokens: 0.5)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    one = kind()._replace(device=torch.device("cuda", 0))
    assert not layouts.is_faster(one, 8) and not layouts.RATIOS[one] and clock.asked == 0


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)])
def test_a_layer_is_measured_in_any_mode_and_leaves_the_random_state(timed, mode):
    timed(lambda tokens: 0.5 if tokens > 8 else 2.0)
    model = nn.Sequential(nn.Linear(128, 128)).bfloat16()
    training = sk.sparse_training_(model)
    assert training.layers[0].product == LAYOUT and training.layers[0].reason == ""
    state = torch.get_rng_state()
    x = torch.zeros(2, 8, 128).bfloat16()
    with mode():
        model(x)
        model(x[:, :2])
    assert torch.equal(torch.get_rng_state(), state)
    assert training.layers[0].product == LAYOUT
    assert training.layers[0].reason == "cusparselt_sm90 is 0.50x at 4 tokens, 2.00x at 16 tokens"


@pytest.mark.parametrize("backward", ["straight_through", "transposable"])
def test_a_layer_is_measured_under_activation_checkpointing(timed, backward):
    """Checkpointing counts the saved tensors: a forward pass that measures saves as many as the one after it."""
    timed(lambda tokens: 0.5)
    model = nn.Sequential(nn.Linear(128, 128), nn.Tanh(), nn.Linear(128, 128)).bfloat16()
    sk.sparse_training_(model, backward=backward)
    x = torch.randn(8, 128).bfloat16().requires_grad_()
    checkpoint(model, x, use_reentrant=False).float().square().sum().backward()
    first = x.grad.clone()
    assert [list(ratios) for ratios in layouts.RATIOS.values()] == [[8]]
    x.grad = None
    model(x).float().square().sum().backward()
    assert torch.equal(x.grad, first)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # by torch itself, while it compiles
@pytest.mark.parametrize("backward", ["straight_through", "transposable"])
def test_a_layer_is_measured_while_it_is_compiled(timed, monkeypatch, backward):
    """It is measured at the largest token count, because the graph may be called with any."""
    monkeypatch.setattr(layouts, "MAX_TOKENS", 64)
    clock = timed(lambda tokens: 0.5)
    torch._dynamo.reset()
    model = nn.Linear(128, 128).bfloat16()
    sk.sparse_training_(model, backward=backward)
    x = torch.randn(8, 128).bfloat16()
    y = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
    assert [list(ratios) for ratios in layouts.RATIOS.values()] == [[64]] and clock.asked == 2 * 3
    assert torch.equal(y, model(x))


def test_a_layer_uses_what_was_measured(timed):
    clock = timed(lambda tokens: 0.5 if tokens > 8 else 2.0)
    model = nn.Linear(128, 128).bfloat16()
    sk.sparse_training_(model)
    for tokens in (16, 8):
        model(torch.randn(tokens, 128).bfloat16())
    clock.products.clear()
    for tokens in (16, 8, 9, 5):
        model(torch.randn(tokens, 128).bfloat16())
    assert clock.products == [16, 9]
