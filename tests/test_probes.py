"""Gradients of activations: those of ``torch.autograd.grad``, however a model runs."""

import math
from contextlib import nullcontext
from dataclasses import dataclass

import pytest
import torch
from probing import linear, record_of, sgd, train, unet_and_inputs
from torch import nn
from torch.utils.checkpoint import checkpoint

import sparsekit as sk


def test_by_hand():
    model = nn.Sequential(linear([[3.0, 4.0]]), linear([[2.0]]))
    with sk.GradProbe(model, what={"output", "input"}) as probe:
        model(torch.ones(4, 2, requires_grad=True)).sum().backward()
    assert probe.records == [
        {
            "step": 1,
            "grad_output": 2.0,  # 1 for each of 4 samples
            "grad_output/1": 2.0,
            "grad_input/1": 4.0,
            "grad_output/0": 4.0,
            "grad_input": 20.0,  # (6, 8) for each of 4 samples
            "grad_input/0": 20.0,
        }
    ]


def test_reductions_by_hand():
    def take(reduce):
        layer = linear([[1.0, 0.0], [0.0, 1.0]])
        with sk.GradProbe(layer, reduce=reduce) as probe:
            for _ in range(2):
                layer(torch.ones(2, 2)).backward(torch.tensor([[0.5, -2.0], [0.0, 3.0]]))
        return probe.records[0]["grad_output"]

    assert take("norm") == pytest.approx(math.sqrt(2 * 13.25))
    assert take("mean_abs") == pytest.approx(5.5 / 4)
    counts = take("hist")
    assert len(counts) == 51 and {i - 40: n for i, n in enumerate(counts) if n} == {-40: 2, -1: 2, 1: 4}
    assert [each.tolist() for each in take("full")] == [[[0.5, -2.0], [0.0, 3.0]]] * 2


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("reduce", ["norm", "mean_abs", "hist"])
def test_other_dtypes(dtype, reduce):
    """300 gradients of 1024: their squares are beyond float16, and their sum is not exact in 16 bits."""
    layer = linear([[1.0]]).to(dtype)
    with sk.GradProbe(layer, reduce=reduce, timesteps=1 if reduce == "norm" else None) as probe:
        for _ in range(2):
            if reduce == "norm":
                probe.at(torch.zeros(300))
            layer(torch.ones(300, 1, dtype=dtype)).backward(torch.full((300, 1), 1024.0, dtype=dtype))
    expected = {"norm": 1024 * math.sqrt(600), "mean_abs": 1024.0, "hist": [0] * 50 + [600]}[reduce]
    assert probe.records[0]["grad_output"] == pytest.approx(expected)


def test_a_histogram_counts_infinities_and_nan_last():
    layer = linear([[1.0]])
    with sk.GradProbe(layer, reduce="hist") as probe:
        layer(torch.ones(4, 1)).backward(torch.tensor([[math.inf], [-math.inf], [math.nan], [2.0**20]]))
    assert probe.records[0]["grad_output"] == [0] * 50 + [4]


def test_blocks_that_work_in_place():
    """What autograd.grad gives for the same blocks written without that, where backward hooks raise."""
    model, x, t = unet_and_inputs()
    found = record_of(model, x, t, reduce="full", what={"output", "input"})
    for block in model.blocks:
        block.inplace = False
        for module in block.modules():
            if hasattr(module, "inplace"):
                module.inplace = False
    tensors = {}

    def keep(name):
        def hook(_, args, output):
            tensors[f"grad_output/{name}".rstrip("/")], tensors[f"grad_input/{name}"] = output, args[0]

        return hook

    for name, module in model.named_modules():
        module.register_forward_hook(keep(name))
    loss = model(x, t).square().mean()
    assert len(found) == 1 + 28 + 21  # the step; the images, the times and what is made of them alone need no gradient
    for key in found.keys() - {"step"}:
        (expected,) = torch.autograd.grad(loss, tensors[key], retain_graph=True)
        torch.testing.assert_close(found[key], [expected], rtol=1e-5, atol=1e-7)

    hooked, *_ = unet_and_inputs()
    hooked.blocks[0].first.register_full_backward_hook(lambda *_: None)
    with pytest.raises(RuntimeError, match="view and is being modified inplace"):
        train(hooked, x, t)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_counts_each_gradient_once(reentrant):
    model, x, t = unet_and_inputs()
    x.requires_grad_()  # reentrant checkpoints need it
    expected = record_of(model, x, t, modules="blocks.*")
    model.around = lambda block, *inputs: checkpoint(block, *inputs, use_reentrant=reentrant)
    assert record_of(model, x, t, modules="blocks.*") == pytest.approx(expected)


def test_accumulated_passes_and_several_calls_are_one_vector():
    model, x, t = unet_and_inputs()
    expected = record_of(model, x[:4], t[:4])
    with sk.GradProbe(model) as probe:
        for half in (slice(0, 2), slice(2, 4)):
            train(model, x[half], t[half], scale=0.5)
    assert probe.records == [pytest.approx(expected)]
    shared = linear([[2.0]])
    with sk.GradProbe(shared) as probe:
        shared(shared(shared(torch.ones(1, 1)))).backward()
    assert probe.records == [{"step": 1, "grad_output": pytest.approx(math.sqrt(1 + 4 + 16))}]


@dataclass
class Output:
    sample: torch.Tensor
    others: dict


def test_outputs_in_containers():
    class Container(nn.Module):
        def forward(self, x):
            y = 3 * x
            return Output(y, {"twice": (2 * x, [y]), "ids": torch.arange(3), "frozen": x.detach()})

    model = Container()
    with sk.GradProbe(model, what=("input", "output")) as probe:
        out = model(x=nn.Parameter(torch.ones(4)))
        (out.sample.sum() + out.others["twice"][0].sum()).backward()
    assert probe.records == [{"step": 1, "grad_output": pytest.approx(math.sqrt(8)), "grad_input": 10.0}]


@pytest.mark.parametrize("fused", [False, True])
def test_a_scaler_is_divided_out_and_skipped_steps_are_left_out(fused):
    model, x, t = unet_and_inputs()
    expected = record_of(model, x, t)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, backoff_factor=2.0**-100)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, fused=fused)
    with sk.GradProbe(model, scaler=scaler) as probe:
        for _ in range(2):
            optimizer.zero_grad()
            scaler.scale(model(x, t).square().mean() * 64).backward()
            scaler.step(optimizer)
            scaler.update()
    assert scaler.get_scale() == 2.0**27, "the first step was not skipped"
    (record,) = probe.records
    assert record == pytest.approx({key: value if key == "step" else 64 * value for key, value in expected.items()})


@dataclass
class Counting:
    """A run that counts the batches, also those whose step is skipped."""

    step: int = 0

    def record(self, **values):
        pass


@pytest.mark.parametrize("fused", [False, True])
def test_skipped_steps_of_a_run_are_in_no_later_record(fused):
    model, x = linear([[1.0]]), torch.ones(1, 1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    optimizer, run = torch.optim.SGD(model.parameters(), lr=0.0, fused=fused), Counting()
    with sk.GradProbe(model, every=2, scaler=scaler, run=run) as probe:
        for run.step in range(1, 7):
            optimizer.zero_grad()
            scaler.scale(model(x).sum() * (math.inf if run.step in (2, 6) else 1)).backward()
            scaler.step(optimizer)
            scaler.update()
    assert probe.records == [{"step": 4, "grad_output": 1.0}]


@pytest.mark.parametrize("around", [nullcontext, lambda: torch.autograd.set_detect_anomaly(True, check_nan=False)])
def test_autocast_and_default_dtypes(around):
    model, x, t = unet_and_inputs()
    expected = record_of(model, x, t, modules="blocks.*")
    torch.set_default_dtype(torch.float64)
    try:
        with around(), torch.autocast("cpu", torch.bfloat16):
            found = record_of(model, x, t, modules="blocks.*")
    finally:
        torch.set_default_dtype(torch.float32)
    assert found == pytest.approx(expected, rel=0.05) and found != expected


def test_what_needs_no_gradient_is_not_seen():
    model, x, t = unet_and_inputs()
    with sk.GradProbe(model) as probe:
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                model(x, t)
        train(model.requires_grad_(False).blocks[0].second[1].requires_grad_(True), x)
    assert [list(record) for record in probe.records] == [["step", "grad_output/blocks.0.second.1"]]


def test_the_steps_that_are_recorded():
    """One in three; two optimizers of a model step once, that of another model not at all."""
    model, x, t = unet_and_inputs()
    other = nn.Linear(2, 2)
    first, *rest = model.parameters()
    with sk.GradProbe(model, "*.first", every=3) as probe:
        for _ in range(7):
            for optimizer in (torch.optim.SGD([first]), torch.optim.Adam(rest), sgd(other)):
                optimizer.zero_grad()
            train(model, x, t)
            other(torch.ones(1, 2)).sum().backward()
            for optimizer in (torch.optim.SGD([first]), torch.optim.Adam(rest), sgd(other)):
                optimizer.step()
    assert [record["step"] for record in probe.records] == [3, 6]
    assert list(probe.records[0]) == ["step", *(f"grad_output/blocks.{i}.first" for i in (2, 1, 0))]


def test_a_run_gets_the_records_of_its_steps(tmp_path):
    model, x, t = unet_and_inputs()
    optimizer = sgd(model)
    with sk.runs.Run.open(tmp_path / "run", {}) as run:
        run.restore(model=model)
        with sk.GradProbe(model, "blocks.?", every=2, run=run) as probe:
            for _ in run.batches(20, 5, epochs=1):
                train(model, x, t)
                optimizer.step()
                sk.param_grad_norms(model, run=run)
                optimizer.zero_grad()
    lines = [sk.runs.run.parse_json(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 2, 3, 4, 4]
    assert [lines[1], lines[4]] == probe.records and len(probe.records[0]) == 4
    assert lines[0].keys() == {"step", *(f"grad/{name}" for name, _ in model.named_parameters())}


def test_norms_by_timestep():
    """Samples whose gradients are 1, 2, 3 and 4 at the timesteps 0, 40, 49 and 99 of 100."""
    model, weights = linear([[1.0]]), torch.tensor([[1.0], [2.0], [3.0], [4.0]])
    other = linear([[1.0], [1.0]])
    with sk.GradProbe(nn.ModuleList([model, other]), timesteps=100, bins=5) as probe:
        probe.at(torch.tensor([0, 40, 49, 99]))
        model(torch.ones(4, 1)).backward(weights)
        other(torch.ones(3, 1)).sum().backward()
    assert probe.records == [
        {
            "step": 1,
            "grad_output/0": pytest.approx(math.sqrt(30)),
            "grad_output/1": pytest.approx(math.sqrt(6)),
            "grad_output_by_timestep/0": [1.0, None, 2.5, None, 4.0],
        }
    ]


def test_a_picture_of_each_kind(tmp_path):
    pytest.importorskip("matplotlib")
    model, x, t = unet_and_inputs()
    optimizer = sgd(model)
    with sk.GradProbe(model, timesteps=1.0) as probe:
        for _ in range(3):
            probe.at(torch.rand(5))
            train(model, x, t)
            optimizer.step()
    records = [*probe.records, {"step": 9, "loss": 0.1, "grad/x": None, "grad_norm": 2.0, "gradient_penalty": 1.0}]
    sk.probes.draw_gradients(records, tmp_path / "all.png")
    sk.probes.draw_gradients(records[:1], tmp_path / "one.svg")
    assert (tmp_path / "all.png").read_bytes()[:4] == b"\x89PNG"
    assert (tmp_path / "one.svg").read_text().count("timestep, as a share of all") == 1
    with pytest.raises(ValueError, match="hold no norms of gradients"):
        sk.probes.draw_gradients([{"step": 1, "loss": 0.5, "grad_norm": 2.0}], tmp_path / "none.png")
