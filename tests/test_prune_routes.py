"""Batches that take different paths, and stages that are not called as modules: every batch counts everywhere."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import sparsekit as sk
from sparsekit.masks import Pattern
from sparsekit.prune.calibration.batch_runner import BatchRunner
from sparsekit.prune.calibration.held_batches import HeldBatches
from sparsekit.prune.calibration.order import _order, find_order
from sparsekit.prune.calibration.output_store import OutputStore
from sparsekit.prune.calibration.replay import Replay
from sparsekit.prune.calibration.stages import split_stages
from sparsekit.prune.layers import find_layers


class Counts(sk.Wanda):
    """Notes of how many rows each layer was shown."""

    def prune(self, weight, statistic):
        self.seen[statistic._layer.name] = int(statistic._count)
        return super().prune(weight, statistic)


@pytest.fixture
def counts():
    method = Counts("2:4")
    object.__setattr__(method, "seen", {})
    return method


class TwoTowers(nn.Module):
    """An optional first half whose output joins the second one's input."""

    def __init__(self):
        super().__init__()
        self.vision, self.text = (nn.ModuleList(nn.Linear(8, 8) for _ in range(3)) for _ in range(2))

    def forward(self, x, image=None):
        for layer in self.vision if image is not None else ():
            image = layer(image).tanh()
        x = x if image is None else torch.cat([image, x])
        for layer in self.text:
            x = layer(x).tanh()
        return x


@pytest.mark.parametrize("first", ["image", "text"])
def test_a_stage_waits_for_every_batch(counts, first):
    model = TwoTowers()
    image, text = {"x": torch.randn(5, 8), "image": torch.randn(95, 8)}, {"x": torch.randn(5, 8)}
    report = sk.prune_(model, counts, [image, text] if first == "image" else [text, image, text])
    assert [layer.name for layer in report.layers] == [f"{part}.{i}" for part in ("vision", "text") for i in range(3)]
    rows = 105 if first == "image" else 110
    assert counts.seen == {f"vision.{i}": 95 for i in range(3)} | {f"text.{i}": rows for i in range(3)}


def test_the_text_sees_what_pruned_vision_makes():
    model = TwoTowers()
    image, text = (torch.randn(5, 8), torch.randn(9, 8)), (torch.randn(5, 8),)
    sk.prune_(model, sk.Wanda("2:4"), [text, image])
    x = image[1]
    for layer in model.vision:  # pruned now
        x = layer(x).tanh()
    norm = torch.cat([text[0], x, image[0]]).square().mean(0).sqrt().detach()
    other = TwoTowers()
    other.load_state_dict({**model.state_dict(), "text.0.weight": (dense := torch.randn(8, 8))})
    model.text[0].weight.data.copy_(dense)
    sk.prune_(other, sk.Wanda("2:4"), [text, image], where=lambda name, _: name == "text.0")
    assert torch.equal(other.text[0].weight, sk.nm_prune(dense, 2, 4, scale=norm)[0])


def test_early_exits_and_loops_of_different_lengths(counts):
    class Loops(nn.Module):
        def __init__(self):
            super().__init__()
            self.steps = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
            self.head = nn.Linear(8, 4)

        def forward(self, x, steps, turns):
            for _ in range(turns):
                for step in self.steps[:steps]:
                    x = step(x).tanh()
            return self.head(x)

    batches = [(torch.randn(10, 8), 1, 1), (torch.randn(10, 8), 4, 1), (torch.randn(10, 8), 2, 3)]
    report = sk.prune_(Loops(), counts, batches)
    assert counts.seen == {"steps.0": 50, "steps.1": 40, "steps.2": 10, "steps.3": 10, "head": 30}
    assert report.layers[-1].name == "head"


@pytest.mark.parametrize("replayed", [True, False])
def test_an_exit_that_pruning_moves(counts, replayed, monkeypatch):
    class Exit(nn.Module):
        def __init__(self):
            super().__init__()
            self.steps = nn.ModuleList(nn.Linear(8, 8, bias=False) for _ in range(4))
            self.head = nn.Linear(8, 4)
            self.passes = 0

        def forward(self, x):
            self.passes += 1
            for step in self.steps:
                x = step(x)
                if x.mean() > 6:
                    break
            return self.head(x)

    monkeypatch.setattr(Replay, "_pays", lambda *_: replayed)
    model = Exit()
    for step in model.steps:
        nn.init.constant_(step.weight, 1)
    # What is 1 becomes 8 by a dense step and 4 by a pruned one: the second pruned step is the first to bring it over 6.
    sk.prune_(model, counts, [torch.ones(10, 8), torch.full((20, 8), 100.0)])
    assert counts.seen == {"steps.0": 30, "steps.1": 10, "head": 30}
    if not replayed:
        look, steps, head, why_two_are_missed = 2, (2, 2, 1, 0), 2, 1  # nobody is tried where it is known to end
        assert model.passes == look + sum(steps) + head + why_two_are_missed


def test_orders():
    assert _order(3, [(0, 2), (1, 2)]) == [0, 1, 2]
    assert _order(4, [(2,), (0, 1, 2), (2, 2)]) == [0, 1, 2, 3]  # 3 is never entered
    assert _order(2, [(1, 0), (0, 1)]) == [1, 0]  # they contradict each other
    assert _order(3, []) == [0, 1, 2]


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x):
        return x + self.down(self.up(x).relu())

    def other(self, x):
        return x + self.down(self.up(x).relu())


CALLS = {
    "module": lambda block, x: block(x),
    "forward": lambda block, x: block.forward(x),
    "checkpointed": lambda block, x: checkpoint(block.forward, x, use_reentrant=False),
    "method": lambda block, x: block.other(x),
    "namespace": lambda block, x: x + block.down(block.up(x).relu()),
    "layers' forward": lambda block, x: x + block.down.forward(block.up.forward(x).relu()),
}


@pytest.mark.parametrize("way", CALLS)
@pytest.mark.parametrize("sequential", [True, False], ids=["sequential", "one-pass"])
def test_stages_that_are_not_called_as_modules(counts, way, sequential):
    model = nn.Module()
    model.blocks, model.head = nn.ModuleList([Block(), Block(), Block()]), nn.Linear(8, 4)

    def forward(model, x):
        for block in model.blocks:
            x = CALLS[way](block, x)
        return model.head(x)

    report = sk.prune_(
        model, counts, [torch.randn(6, 8)] * 2, calibration=sk.Calibration(forward=forward, sequential=sequential)
    )
    assert len(report.layers) == 7 and not report.skipped
    assert set(counts.seen.values()) == {12}


def test_a_stage_that_only_some_batches_call(counts):
    model = nn.Module()
    model.blocks = nn.ModuleList([Block(), Block()])

    def forward(model, batch):
        x, way = batch
        for block in model.blocks:
            x = CALLS[way](block, x)
        return x

    batches = [(torch.randn(6, 8), way) for way in CALLS]
    assert len(sk.prune_(model, counts, batches, calibration=sk.Calibration(forward=forward)).layers) == 4
    assert set(counts.seen.values()) == {6 * len(CALLS)}


def test_processes_find_the_same_stages_in_the_same_order():
    model = TwoTowers()
    layers = find_layers(model, Pattern.parse("2:4"), "input", None)[0]
    batches = [[{"x": torch.randn(5, 8)}], [{"x": torch.randn(5, 8), "image": torch.randn(5, 8)}]]

    def look(batches, exchange):
        return find_order(
            split_stages(model, layers), BatchRunner(model, HeldBatches(batches, OutputStore()), None), exchange
        )

    said = []
    for own in batches:
        with torch.no_grad():
            look(own, lambda value: said.append(value) or [value])
    found = [look(own, lambda _: said) for own in batches]
    names = [[layer.name for stage in each.stages for layer in stage.layers] for each in found]
    assert names[0] == names[1] == [f"{part}.{i}" for part in ("vision", "text") for i in range(3)]
    assert found[0].paths == [(3, 4, 5)] and found[1].paths == [(0, 1, 2, 3, 4, 5)]


def test_a_stage_within_stages(counts):
    class Inner(Block):
        def forward(self, x):
            return super().forward(self.shared(x))

    class Shares(nn.Module):
        def __init__(self):
            super().__init__()
            self.shared, self.blocks = nn.Linear(8, 8), nn.ModuleList(Inner() for _ in range(3))
            for block in self.blocks:
                block.shared = self.shared

        def forward(self, x):
            for block in self.blocks:
                x = block(self.shared(x))
            return x

    sk.prune_(Shares(), counts, [torch.randn(6, 8)] * 2)
    assert counts.seen["shared"] == 2 * 6 * 6 and counts.seen["blocks.2.down"] == 12


def test_batchnorm_that_is_not_called_as_a_module():
    first, second = (nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 8)) for _ in range(2))
    second.load_state_dict(first.state_dict())

    def forward(model, x):
        for layer in model:
            x = layer.forward(x)
        return x

    x = torch.randn(16, 8)
    assert sk.prune_(first, sk.Wanda("2:4"), x).batchnorm == ("1",)
    assert sk.prune_(second, sk.Wanda("2:4"), x, calibration=sk.Calibration(forward=forward)).batchnorm == ("1",)
    assert torch.equal(first[1].running_mean, second[1].running_mean) and first[1].running_mean.any()
