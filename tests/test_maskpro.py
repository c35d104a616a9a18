"""MaskPro: masks learned from losses alone, on one process and two, through kills, failures and bad losses."""

import copy
import math

import pytest
import torch
from digits import DIFFUSION, digits, trained
from experts import Stacked
from interrupts import assert_all_or_nothing, count_lines, difference, interrupted, model_state
from torch import nn

import sparsekit as sk
from sparsekit.masks import Pattern, get_mask
from sparsekit.prune import mask_arena
from sparsekit.prune.advantage import Advantage, flip_probability, lr_for, multiplier_for
from sparsekit.prune.layers import PrunableLayer
from sparsekit.prune.mask_arena import MaskArena

WANDA = sk.Wanda("2:4")


def problem(seed=0, batches=24):
    """A layer, and batches of correlated inputs, some larger than others, with the outputs of the dense layer."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.eye(32) + 0.3 * torch.randn(32, 32, generator=g)
    x = torch.randn(batches, 32, 32, generator=g) @ mix * (torch.rand(32, generator=g) + 0.5)
    x = x * (torch.rand(batches, 1, 1, generator=g) + 0.5)
    layer = nn.Linear(32, 4, bias=False)
    layer.weight.data = torch.randn(4, 32, generator=g)
    return layer, [(each, each @ layer.weight.detach().T) for each in x]


def loss_fn(model, batch):
    return (model(batch[0]) - batch[1]).square().mean()


def make(data=0, loss=loss_fn, **options):
    layer, batches = problem(data)
    options = {"init": WANDA, **options}
    return sk.MaskPro(layer, loss, batches=batches[:16], held_out=batches[16:], **options), layer


class Network(nn.Module):
    """A convolution, a layer whose inputs fill no group at the end, two tied layers, and dropout."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 6, 3)
        self.fc, self.tied, self.other = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.other.weight = self.tied.weight
        self.dropout = nn.Dropout()

    def forward(self, x):
        return self.dropout(self.other(self.tied(self.fc(self.conv(x).mean((2, 3))))))


IMAGES = [torch.randn(3, 4, 5, 5, generator=torch.Generator().manual_seed(i)) for i in range(4)]


def noisy(model, images):
    return (model(images) - torch.randn(len(images), 8)).square().mean()


def test_it_lowers_the_loss_and_stores_the_masks():
    learner, layer = make(data=1)
    dense, seen = layer.weight.detach().clone(), []
    for step in learner.steps(600):
        seen.append(step)
        assert torch.equal(layer.weight, dense) and get_mask(layer) is None
    report = learner.finish()
    mask = get_mask(layer)
    assert [step.step for step in seen] == list(range(1, 601))
    assert report.kept and report.loss < 0.9 * report.initial_loss and 0 < report.flips <= report.groups == 32
    assert torch.equal(layer.weight, dense.masked_fill(~mask, 0)) and (mask.view(-1, 4).sum(1) == 2).all()
    held = [loss_fn(layer, batch).item() for batch in problem(1)[1][16:]]
    assert report.loss == pytest.approx(sum(held) / 8, rel=1e-5)
    assert "the learned mask is in the model" in str(report) and report.to_json()["steps"] == 600
    for act in (learner.finish, lambda: learner.learn(601)):
        with pytest.raises(RuntimeError, match=r"finish\(\)"):
            act()


@pytest.mark.parametrize("scale", [0.01, 100.0])
def test_the_scale_of_the_loss_does_not_matter(scale):
    plain, _ = make(multiplier=2.0)
    scaled, _ = make(multiplier=2.0, loss=lambda *args: scale * loss_fn(*args))
    plain.learn(40)
    scaled.learn(40)
    torch.testing.assert_close(plain.state_dict()["logits"], scaled.state_dict()["logits"], rtol=1e-3, atol=1e-3)


def test_it_is_never_worse_than_the_initial_mask():
    """What is learned is the opposite of what counts on the batches that are held out."""
    layer, batches = problem()
    opposite = [(x, -10 * y) for x, y in batches[:16]]
    learner = sk.MaskPro(layer, loss_fn, batches=opposite, held_out=batches[16:], init=WANDA, lr=1.0, multiplier=2.0)
    pruned, _ = problem()
    sk.prune_(pruned, WANDA, opposite, calibration=sk.Calibration(forward=loss_fn))
    learner.learn(160)
    report = learner.finish()
    assert not report.kept and report.loss > report.initial_loss and report.flips > 0
    assert torch.equal(layer.weight, pruned.weight) and torch.equal(get_mask(layer), get_mask(pruned))
    assert "the initial mask is in the model" in str(report)


def test_advantages_by_hand():
    plain = Advantage(0.75, normalize=False)
    first, plain = plain.after(4.0)  # the mean becomes 1
    second, plain = plain.after(9.0)  # 3
    assert (first, second, plain.mean) == (3.0, 6.0, 3.0)
    even = Advantage(0.75)
    first, even = even.after(4.0)
    second, even = even.after(6.0)  # a mean of 5 and a variance of 1
    assert (first, second, even.mean, even.variance) == (0.0, 2.0, 5.0, 1.0)


def test_the_multiplier_gives_the_number_of_flips():
    assert flip_probability(10, 2, 4) == pytest.approx(1.36e-4, rel=2e-3)  # measured, of the published code
    assert lr_for(10, 2, 4) == 5 and lr_for(3, 2, 4) == pytest.approx(3 * 0.01 / 0.134, rel=2e-2)
    assert flip_probability(0, 2, 4) == pytest.approx(5 / 6) and flip_probability(0, 1, 4) == pytest.approx(3 / 4)
    multiplier = multiplier_for(500, 20_000, 4, 8)
    layer = nn.Linear(400, 400)
    arena = MaskArena([PrunableLayer("", layer, 1)], Pattern.parse("4:8"), torch.float32, torch.device("cpu"))
    bits = arena.pack([torch.arange(8).repeat(400, 50) < 4])
    arena.set_logits(bits, multiplier)
    assert torch.equal(arena.likeliest(), bits) and arena.flips(bits, bits) == 0
    drawn = arena.flips(bits, sk.nm_sample(arena.logits, 4, 8, seed=1))
    assert abs(drawn - 500) < 4 * math.sqrt(500)


def test_convolutions_tails_tied_layers_and_what_where_leaves_out():
    network = Network()
    state = model_state(network)
    learner = sk.MaskPro(network, noisy, batches=IMAGES[:3], held_out=IMAGES[3:], multiplier=1.0, lr=0.5)
    learner.learn(30)
    assert not difference(model_state(network), state)
    report = learner.finish()
    assert report.layers == ("conv", "fc") and report.groups == 6 * 9 + 8
    assert {each.name for each in report.skipped} == {"tied", "other"}
    assert (get_mask(network.conv).sum(1) == 2).all()
    assert (get_mask(network.fc)[:, :4].sum(1) == 2).all() and get_mask(network.fc)[:, 4:].all()
    chosen = sk.MaskPro(Network(), noisy, batches=IMAGES, where=lambda name, _: name == "fc", axis="flatten")
    assert chosen.finish().layers == ("fc",)


@pytest.mark.parametrize("transposed", [False, True])
def test_experts_of_which_one_gets_no_token(transposed):
    experts = Stacked(transposed=transposed)
    state = model_state(experts)
    batches = [(torch.randn(12, 8), torch.tensor([0, 1, 2]).repeat(4)) for _ in range(4)]
    learner = sk.MaskPro(experts, lambda model, batch: model(*batch).square().mean(), batches=batches, multiplier=1.0)
    steps = list(learner.steps(3))
    assert not difference(model_state(experts), state) and len({step.loss for step in steps}) == 3
    assert learner.finish().groups == 4 * (24 * 2 + 8 * 3)
    for key, axis in (("gate_up_proj", 2), ("down_proj", 2)):
        mask = get_mask(experts, key).movedim(axis - transposed, -1)
        assert (mask.unflatten(-1, (-1, 4)).sum(-1) == 2).all()


def test_surroundings():
    """It may be made and used in inference mode and under autocast, and goes on outside; loaders are read once."""
    plain, _ = make(lr=0.3, multiplier=2.0)
    plain.learn(20)
    layer, batches = problem()
    with torch.inference_mode():
        options = {"init": WANDA, "lr": 0.3, "multiplier": 2.0}
        other = sk.MaskPro(layer, loss_fn, batches=batches[:16], held_out=batches[16:], **options)
        other.learn(10)
    other.learn(20)
    assert torch.equal(other.state_dict()["logits"], plain.state_dict()["logits"])
    other.finish()
    assert layer(torch.ones(1, 32)).requires_grad
    network = Network().bfloat16().train()
    loader = torch.utils.data.DataLoader(torch.stack(IMAGES).flatten(0, 1), batch_size=3, shuffle=True)
    with torch.autocast("cpu", torch.bfloat16):
        learner = sk.MaskPro(network, lambda model, x: model(x).float().square().mean(), batches=loader)
        learner.learn(3)
        learner.finish()
    assert learner.state_dict()["logits"].dtype == torch.bfloat16 and network.training


def test_masks_are_unpacked_at_once_or_by_layer(monkeypatch):
    logits = []
    for entries in (mask_arena.UNPACKED, 0):
        monkeypatch.setattr(mask_arena, "UNPACKED", entries)
        torch.manual_seed(0)
        learner = sk.MaskPro(Network(), noisy, batches=IMAGES, init=WANDA, multiplier=1.0)
        learner.learn(5)
        logits.append(learner.state_dict()["logits"])
    assert torch.equal(*logits)


def test_initial_masks():
    layer, batches = problem()
    dense, pruned = layer.weight.detach().clone(), copy.deepcopy(layer)
    sk.prune_(pruned, sk.Magnitude("2:4"))
    mask = get_mask(pruned)
    for init in (sk.Magnitude("2:4"), pruned, {"": mask}):
        learner = sk.MaskPro(layer, loss_fn, batches=batches, init=init)
        assert torch.equal(next(learner._arena.masks(learner._initial))[1], mask)
    assert torch.equal(layer.weight, dense) and get_mask(layer) is None
    pruned.weight.data.copy_(dense)  # it keeps its mask
    assert torch.equal(
        next((kept := sk.MaskPro(pruned, loss_fn, batches=batches))._arena.masks(kept._initial))[1], mask
    )
    layer.weight.data.mul_(mask)
    with pytest.raises(ValueError, match="all zero, so no other mask can be better"):
        sk.MaskPro(layer, loss_fn, batches=batches, init=pruned)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"pattern": "50%"}, 'a pattern "n:m"'),
        ({"pattern": "4:4"}, "n < m"),
        ({"lr": 0.0}, "lr must be positive"),
        ({"flips": 3, "multiplier": 3.0}, "pass one of the two"),
        ({"init": sk.Wanda("1:4")}, "must choose masks of 2:4"),
        ({"init": {"": torch.arange(128).view(4, 32) > 3}}, "exactly 2 of every 4"),
        ({"init": {"": torch.ones(4, 30, dtype=torch.bool)}}, r"bool \(4, 32\)"),
        ({"init": {"body": torch.ones(4, 32, dtype=torch.bool)}}, "'body', which is no layer"),
        ({"init": nn.Linear(32, 4)}, "nothing to learn"),
        ({"axis": "output"}, "axis must be"),
    ],
)
def test_what_is_wrong_is_said(options, match):
    with pytest.raises(ValueError, match=match):
        make(**options)


@pytest.mark.parametrize(
    ("loss", "kind", "match"),
    [
        (lambda model, batch: model(batch[0]), TypeError, r"a tensor \(32, 4\)"),
        (lambda model, batch: math.nan, ValueError, "is nan on batch 0"),
        (lambda model, batch: torch.rand((), generator=NOISE), ValueError, "for the same mask and batch"),
    ],
    ids=["tensor", "nan", "own generator"],
)
def test_losses_that_cannot_be_learned_from(loss, kind, match):
    with pytest.raises(kind, match=match):
        make(loss=loss, init=sk.Magnitude("2:4"))[0].learn(1)
    with pytest.raises(ValueError, match="others to hold out, got 0 and 1"):
        sk.MaskPro(nn.Linear(4, 4), loss_fn, batches=[torch.ones(1, 4)])


NOISE = torch.Generator()


@pytest.mark.parametrize("options", [{}, {"parity": True}, {"dtype": torch.bfloat16}], ids=str)
def test_a_killed_learner_goes_on_exactly(tmp_path, options):
    options = {"multiplier": 2.0, **options, "lr": 0.3}
    whole, _ = make(**options)
    at_zero = copy.deepcopy(whole.state_dict())
    whole.learn(30)
    killed, _ = make(**options)
    killed.learn(13)
    with sk.runs.Run.open(tmp_path / "run", {}) as run:
        run.restore(learner=killed)
        run.step = 13
        run.save()
    with sk.runs.Run.open(tmp_path / "run", {}) as run:
        again, _ = make(**options)
        assert run.restore(learner=again)
    again.learn(30)
    expected = whole.state_dict()
    for key, value in again.state_dict().items():
        assert torch.equal(value, expected[key]) if isinstance(value, torch.Tensor) else value == expected[key], key
    again.load_state_dict(at_zero)
    again.learn(30)
    assert torch.equal(again.state_dict()["logits"], expected["logits"])
    other, _ = make(**{**options, "seed": 1})
    with pytest.raises(ValueError, match="seed 0, and this learner 1"):
        other.load_state_dict(expected)


def test_parity_begins_with_the_initial_mask():
    learner, _ = make(parity=True)
    first = next(learner.steps(1))
    assert first.loss == first.initial_loss and first.advantage == 0
    assert learner.finish().multiplier == 10


def test_ranks_learn_what_one_process_learns(ranks):
    def learn(model, batches, held, microbatches):
        learner = sk.MaskPro(
            model,
            loss_fn,
            batches=batches,
            held_out=held,
            init=sk.Magnitude("2:4"),
            multiplier=2.0,
            lr=0.3,
            microbatches=microbatches,
        )
        steps = list(learner.steps(100))
        return learner.state_dict()["logits"], steps, learner.finish()

    (layer, batches), models = problem(), [problem()[0] for _ in range(2)]
    logits, steps, report = learn(layer, batches[:16], batches[16:], 2)
    for rank, result in enumerate(
        ranks(lambda rank: learn(models[rank], batches[rank:16:2], batches[16 + rank :: 2], 1))
    ):
        assert not isinstance(result, BaseException), result
        assert torch.equal(result[0], logits) and result[1] == steps and result[2] == report
        assert torch.equal(models[rank].weight, layer.weight)


def test_a_failure_in_one_rank_ends_all(ranks):
    def failing(model, batch):
        if batch[0].isnan().any():
            raise ZeroDivisionError("bad batch")
        return loss_fn(model, batch)

    def learn(rank):
        layer, batches = problem()
        if rank == 1:
            batches[3][0].fill_(math.nan)
        sk.MaskPro(layer, failing, batches=batches, held_out=batches[:1], init=sk.Magnitude("2:4")).learn(10)

    first, second = ranks(learn)
    assert isinstance(second, ZeroDivisionError) and "rank 1 failed with ZeroDivisionError" in str(first)


def test_an_interrupt_leaves_the_model_as_it_was():
    def setup():
        torch.manual_seed(0)
        network = Network()
        sk.prune_(network, sk.Magnitude("1:4"), where=lambda name, _: name == "fc")
        return (network,)

    def act(network):
        sk.MaskPro(network, noisy, batches=IMAGES[:3], held_out=IMAGES[3:], init=WANDA).learn(1)

    (network,) = setup()
    before, random = model_state(network), torch.get_rng_state()
    lines = count_lines(lambda: act(network))
    for line in range(0, lines, lines // 20):
        assert interrupted(lambda: act(network), line), line
        assert not difference(model_state(network), before), line
        assert torch.equal(torch.get_rng_state(), random)

    def finishing(network, learner):
        learner.finish()

    def learned():
        (network,) = setup()
        return network, sk.MaskPro(network, noisy, batches=IMAGES[:3], held_out=IMAGES[3:], init=sk.Magnitude("2:4"))

    assert_all_or_nothing(learned, finishing, lambda model, _: model_state(model), runs=15)


def test_the_memory_of_a_large_model():
    """LLaMA-2-7B in bfloat16: model, logits and the mask that was drawn, in GB; 28 hold the next mask as well."""
    layers = [
        PrunableLayer(f"{block}.{i}", nn.Linear(cols, rows, bias=False, device="meta", dtype=torch.bfloat16), 1)
        for block in range(32)
        for i, (rows, cols) in enumerate([(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)])
    ]
    arena = MaskArena(layers, Pattern.parse("2:4"), torch.bfloat16, torch.device("meta"))
    weights = 2 * 6_738_415_616
    bits = sk.nm_sample(arena.logits, 2, 4, seed=0)
    assert arena.groups == 6_476_005_376 // 4 and bits.nbytes == 809_500_672
    assert weights + arena.logits.nbytes + bits.nbytes <= 27.3e9
    assert weights + arena.logits.nbytes + 2 * bits.nbytes <= 28.1e9


KINDS = ("vanilla", "unpaired", "residual", "tracker", "normalized")  # from the worst to the best


def learned(kind, seed):
    """The losses of the initial and of the likeliest mask after learning by advantages of this kind."""
    learner, _ = make(seed, lr=0.05, multiplier=3.0, seed=seed)
    if kind != "normalized":
        learner._advantage = Advantage(0.99 if kind in ("tracker", "unpaired") else 1.0, normalize=False)
    own = learner._of_initial
    if kind == "vanilla":
        learner._of_initial = lambda indices: [0.0] * len(indices)
    if kind == "unpaired":
        learner._of_initial = lambda indices: own([(i + 5) % 16 for i in indices])
    learner._check_every = 10**9
    learner.learn(2000)
    both = learner._initial, learner._arena.likeliest()
    with learner._losses.running():
        return [sum(learner._losses.of(bits, range(16))) / 16 for bits in both]


@pytest.mark.slow
def test_the_published_ablation():
    """The paper's: the loss alone fails, and so do baselines of other batches; each part makes it better."""
    losses = torch.tensor([[learned(kind, seed) for seed in range(3)] for kind in KINDS]).mean(1)
    vanilla, unpaired, residual, tracker, normalized = losses[:, 1].tolist()
    assert vanilla > unpaired > residual > tracker > normalized, losses
    assert vanilla > 2 * losses[0, 0] and normalized < losses[0, 0], losses


@pytest.mark.slow
def test_a_trained_unet_predicts_noise_better(data):
    """By the defaults: from Wanda's mask with swaps, 0.474, to 0.391 in 400 steps, on digits not learned from."""
    model, images = trained(data), digits(data, 2048)
    learner = sk.MaskPro(
        model,
        lambda model, x: DIFFUSION.loss(model, x),
        batches=list(images[:1024].split(32)),
        held_out=list(images[1024:].split(128)),
    )
    learner.learn(400)
    report = learner.finish()
    assert report.kept and report.loss < 0.9 * report.initial_loss
