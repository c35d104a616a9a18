"""Passes run in the caller's thread and surroundings, whatever the model carries past its stages."""

import contextvars
import threading

import pytest
import torch
from pruning import stack
from torch import nn
from torch.overrides import TorchFunctionMode

import sparsekit as sk
from sparsekit.prune.calibration.replay import Replay

SETTING = contextvars.ContextVar("setting", default="lost")
LOCAL = threading.local()


class Carries(nn.Module):
    """Stages that note their surroundings, and skip connections past them."""

    def __init__(self, note, depth=4):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(depth))
        for block in self.blocks:
            block.register_forward_pre_hook(lambda *_: note())

    def forward(self, x):
        skips = []
        for block in self.blocks:
            x = block(x)
            skips.append(x)
        return sum(skips)


@pytest.fixture(params=["plain", "replayed"])
def way(request, monkeypatch):
    monkeypatch.setattr(Replay, "_pays", lambda *_: request.param == "replayed")


class Counted(TorchFunctionMode):
    calls = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.calls += 1
        return func(*args, **kwargs or {})


def test_everything_of_the_caller_is_there(way):
    seen = set()

    def note():
        seen.add(
            (
                SETTING.get(),
                LOCAL.__dict__.get("value"),
                threading.get_ident(),
                str(torch.get_default_device()),
                torch.get_default_dtype(),
                torch.is_inference_mode_enabled(),
                torch.is_grad_enabled(),
                torch.is_autocast_enabled("cpu"),
                torch.are_deterministic_algorithms_enabled(),
            )
        )

    model = Carries(note)
    token, LOCAL.value, before = SETTING.set("mine"), "mine", torch.get_default_dtype()
    mode = Counted()
    try:
        torch.set_default_dtype(torch.float64)
        torch.use_deterministic_algorithms(True)
        with torch.device("cpu:0"), torch.inference_mode(), torch.autocast("cpu", torch.bfloat16), mode:
            sk.prune_(model, sk.Wanda("2:4"), [torch.randn(4, 8, dtype=torch.float32)] * 2)
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_default_dtype(before)
        SETTING.reset(token)
        del LOCAL.value
    assert seen == {("mine", "mine", threading.get_ident(), "cpu:0", torch.float64, True, False, True, True)}
    assert mode.calls > 4 * 2 * 2
    model.blocks[0].weight.sum().backward()  # still a parameter that can be trained


def test_no_thread_is_started(way):
    counts = set()
    model = Carries(lambda: counts.add(threading.active_count()), depth=3)
    before = threading.active_count()
    sk.prune_(model, sk.Wanda("2:4"), [torch.randn(4, 8)] * 50)
    assert counts == {before}


def test_autocast_inside_the_model_and_around_it(way):
    dtypes = set()

    class Casts(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

        def forward(self, x):
            for index, block in enumerate(self.blocks):
                with torch.autocast("cpu", torch.bfloat16, enabled=index % 2 == 0):
                    x = block(x.float())
                    dtypes.add((index % 2, x.dtype))
            return x

    sk.prune_(Casts(), sk.Wanda("2:4"), [torch.randn(4, 8)] * 2)
    assert dtypes == {(0, torch.bfloat16), (1, torch.float32)}


def test_later_stages_see_the_pruned_weights_under_autocast(way):
    """Autocast keeps the bfloat16 copy of a weight that requires a gradient."""
    model, x = stack(16, 16, 16, 16), torch.randn(64, 16)
    shown = []

    class Notes(sk.Wanda):
        def prune(self, weight, statistic):
            shown.append(statistic.norm)
            return super().prune(weight, statistic)

    with torch.autocast("cpu", torch.bfloat16):
        sk.prune_(model, Notes("2:4"), x)
        for index in (2, 4):
            with torch.no_grad():
                norm = model[:index](x).float().square().mean(0).sqrt()
            torch.testing.assert_close(shown[index // 2], norm, rtol=1e-6, atol=0)


def test_random_numbers_are_the_same_in_every_pass_and_the_callers_stay(way):
    noise = {}

    def forward(model, batch):
        index, x = batch
        noise.setdefault(index, set()).add(float(torch.rand(())))
        return model(x + torch.randn_like(x))

    model = stack(*[8] * 6)
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    sk.prune_(
        model,
        sk.Wanda("2:4"),
        [(0, torch.ones(4, 8)), (1, torch.ones(4, 8))],
        calibration=sk.Calibration(forward=forward),
    )
    assert torch.equal(torch.rand(3), expected)
    assert [len(values) for values in noise.values()] == [1, 1] and noise[0] != noise[1]
    torch.manual_seed(7)
    sk.prune_(
        model, sk.Wanda("1:4"), [(0, torch.ones(4, 8))], calibration=sk.Calibration(forward=forward, sequential=False)
    )
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("what", ["whole", "in place", "part", "function"])
def test_compiled_models_that_have_run(way, what):
    model, x = stack(8, 8, 8, 8, 8), torch.randn(4, 8)
    eager = "eager"  # the backend does not matter, and this one takes no time
    forward = None
    if what == "whole":
        run = torch.compile(model, backend=eager)
    elif what == "in place":
        model.compile(backend=eager)
        run = model
    elif what == "part":
        model[2].compile(backend=eager)
        run = model = nn.Sequential(*model[:4], torch.compile(model[4], backend=eager), *model[5:])
    else:
        compiled = torch.compile(lambda model, x: model(x), backend=eager)
        run, forward = model, compiled
        compiled(model, x)
    with torch.no_grad():
        run(x)
    report = sk.prune_(run, sk.Wanda("2:4"), [x] * 2, calibration=sk.Calibration(forward=forward))
    assert len(report.layers) == 4 and not report.skipped
    assert all((layer.weight != 0).float().mean() == 0.5 for layer in model.modules() if isinstance(layer, nn.Linear))
    with torch.no_grad():
        torch.testing.assert_close(run(x) if forward is None else forward(run, x), model(x))
