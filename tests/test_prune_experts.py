"""Experts in one parameter are pruned like layers of their own, each on the tokens that are routed to it."""

import copy
import importlib

import pytest
import torch
from experts import EXPERTS, HIDDEN, INNER, Stacked, stacked_and_separate
from interrupts import assert_all_or_nothing
from pruning import assert_restored, snapshot
from torch import nn

import sparsekit as sk
from sparsekit._layers import expert_axes
from sparsekit.compress import sites
from sparsekit.masks import get_mask, get_mask_info, masked_parameters

METHODS = [sk.Wanda("2:4"), sk.RIA("2:4"), sk.SparseGPT("2:4"), sk.Swaps(sk.Wanda("50%")), sk.ADMM("1:4")]
KEYS = ("gate_up_proj", "down_proj")


def batches(count=3, tokens=32):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(tokens, HIDDEN, generator=generator) for _ in range(count)]


def assert_alike(stacked, separate):
    """The same weights and masks, expert by expert; the last one, which no token reached, is left out."""
    for key in KEYS:
        mask = get_mask(stacked, key)
        for expert in range(EXPERTS - 1):
            layer = getattr(separate, key)[expert]
            turn = torch.t if stacked.is_transposed else lambda matrix: matrix
            assert torch.equal(turn(mask[expert]), get_mask(layer)), (key, expert)
            torch.testing.assert_close(stacked.matrix(key, expert), layer.weight, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("transposed", [False, True], ids=["outputs first", "inputs first"])
def test_every_expert_is_pruned_as_a_layer_of_its_own(method, transposed):
    stacked, separate = stacked_and_separate(transposed=transposed)
    report = sk.prune_(stacked, method, batches())
    alike = sk.prune_(separate, method, batches())
    assert [layer.name for layer in report.layers] == [f"0.experts.{key}" for key in KEYS] and report.skipped == ()
    assert len(alike.layers) == 2 * (EXPERTS - 1) and len(alike.skipped) == 2
    assert_alike(stacked[0].experts, separate[0].experts)
    errors = [layer.error for layer in alike.layers if "gate_up_proj" in layer.name]
    assert report.layers[0].error == pytest.approx(sum(errors) / len(errors), rel=1e-3)
    for layer, key in zip(report.layers, KEYS, strict=True):
        assert layer.shape == tuple(getattr(stacked[0].experts, key).shape)
        assert layer.remark == f"1 of {EXPERTS} experts got no token and are pruned by magnitude"
        last = Stacked(transposed=transposed).matrix(key, -1)
        expected = sk.masks.Pattern.parse(method.pattern).prune(last.detach())[0]
        assert torch.equal(stacked[0].experts.matrix(key, -1), expected)
        assert get_mask_info(stacked[0].experts, key).axis == (1 if transposed else 2)
    assert "0.experts.gate_up_proj, 0.experts.down_proj: 1 of 4 experts got no token" in str(report)


@pytest.mark.parametrize("sequential", [True, False])
@pytest.mark.parametrize("how", ["picked", "grouped"])
@pytest.mark.parametrize("transposed", [False, True])
def test_however_the_products_are_written(how, transposed, sequential):
    stacked, separate = stacked_and_separate(how=how, transposed=transposed)
    sk.prune_(stacked, sk.Wanda("2:4"), batches(), calibration=sk.Calibration(sequential=sequential))
    sk.prune_(separate, sk.Wanda("2:4"), batches(), calibration=sk.Calibration(sequential=sequential))
    assert_alike(stacked[0].experts, separate[0].experts)


def test_masks_are_kept_and_magnitude_needs_no_batches():
    model, _ = stacked_and_separate()
    report = sk.prune_(model, sk.Magnitude("2:4"))
    experts = model[0].experts
    assert report.weights == report.model_weights == EXPERTS * 3 * HIDDEN * INNER and report.model_sparsity == 0.5
    assert masked_parameters(experts) == KEYS
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    with sk.keep_masks(model, optimizer):
        for x in batches():
            model(x).square().sum().backward()
            optimizer.step()
    for key in KEYS:
        mask, weight = get_mask(experts, key), getattr(experts, key)
        assert not weight[~mask].any() and weight[mask].all() and mask.unflatten(-1, (-1, 4)).sum(-1).eq(2).all()


class Unknown(nn.Module):
    """One parameter of three dimensions, which nothing tells of."""

    def __init__(self, shape, product):
        super().__init__()
        self.table = nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(0)))
        self.product = product

    def forward(self, x):
        return self.product(x, self.table)


WAYS = {
    "inputs last": ((3, 5, 8), 2, lambda x, table: torch.stack([x @ matrix.T for matrix in table])),
    "inputs first": ((3, 8, 5), 1, lambda x, table: torch.einsum("td,hdk->htk", x, table)),
    "every token": ((3, 8, 5), 1, lambda x, table: x @ table),
}


@pytest.mark.parametrize(("shape", "axis", "product"), WAYS.values(), ids=WAYS)
def test_batches_show_which_dimension_the_inputs_run_along(shape, axis, product):
    model, x = nn.Sequential(Unknown(shape, product)), batches(1)[0]
    with pytest.raises(ValueError, match=r"0\.table: it belongs to a Unknown, and no batch has shown that it is"):
        sk.prune_(model, sk.Magnitude("2:4"))
    table = model[0].table.detach().clone().movedim(axis, -1)
    report = sk.prune_(model, sk.Wanda("2:4"), iter([x]), calibration=sk.Calibration(sequential=False))
    assert [layer.name for layer in report.layers] == ["0.table"] and get_mask_info(model[0], "table").axis == axis
    expected = sk.nm_mask(table.abs() * x.square().mean(0).sqrt(), 2, 4)
    assert torch.equal(get_mask(model[0], "table").movedim(axis, -1), expected)


def test_what_is_added_or_convolved_is_no_expert():
    model = nn.Sequential(Unknown((2, 32, 8), lambda x, table: x + table[0]), nn.Linear(8, 8))
    report = sk.prune_(model, sk.Wanda("2:4"), batches())
    assert [layer.name for layer in report.layers] == ["1"] and [layer.name for layer in report.skipped] == ["0.table"]
    assert expert_axes(nn.Conv1d(8, 8, 3)) == expert_axes(nn.Bilinear(8, 8, 8)) == {}


def test_what_a_pass_has_shown_is_known_from_its_mask_afterwards(tmp_path, ratios):
    shape, axis, product = WAYS["inputs first"]
    model = nn.Sequential(Unknown(shape, product))
    sk.prune_(model, sk.Wanda("2:4"), batches())
    assert expert_axes(model[0]) == {"table": axis} and sk.prune_(model, sk.Magnitude("1:4")).sparsity == 0.75
    assert [layer.name for layer in sk.compress_(model).layers] == ["0.table"]


def test_gated_shapes_fit_one_way_only():
    class Held(nn.Module):
        def __init__(self, *shapes):
            super().__init__()
            self.first, self.second = (nn.Parameter(torch.empty(shape)) for shape in shapes)

    assert expert_axes(Held((4, 24, 8), (4, 8, 12))) == {"first": 2, "second": 2}
    assert expert_axes(Held((4, 12, 8), (4, 8, 24))) == {"first": 1, "second": 1}
    assert expert_axes(Held((4, 8, 8), (4, 8, 8))) == expert_axes(Held((4, 12, 8), (4, 8, 12))) == {}


def test_a_failure_brings_every_expert_back():
    model, _ = stacked_and_separate()
    model.append(nn.Linear(8, 8))
    before = snapshot(model)
    with pytest.raises(ValueError, match="NaN or infinite"):
        sk.prune_(model, sk.Wanda("2:4"), [*batches(), torch.full((4, 8), torch.inf)])
    assert_restored(model, before)
    assert not masked_parameters(model[0].experts) and "forward" not in vars(model[0].experts)


def test_experts_stay_dense_when_the_rest_is_compressed(ratios):
    model, _ = stacked_and_separate()
    model.append(nn.Linear(8, 8))
    sk.prune_(model, sk.Magnitude("2:4"))
    found = {layer.name: (layer.decision, layer.reason) for layer in sk.compress_(model.eval(), batches(1)[0]).layers}
    for key in KEYS:
        assert found[f"0.experts.{key}"] == (
            "plain",
            sites.EXPERTS,
        )
    assert found["1"][0] != "plain"


def test_a_run_goes_on_after_experts(tmp_path):
    whole = nn.Sequential(*stacked_and_separate()[0], nn.Linear(8, 8))
    stopped = copy.deepcopy(whole)
    sk.prune_(whole, sk.Wanda("2:4"), batches())

    def once(stages):
        yield next(iter(stages))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sk.prune_(stopped, sk.Wanda("2:4"), batches(), progress=once, resume=tmp_path)
    sk.prune_(stopped, sk.Wanda("2:4"), batches(), resume=tmp_path)
    for name, parameter in whole.named_parameters():
        assert torch.equal(parameter, stopped.get_parameter(name))
    assert torch.equal(get_mask(whole[0].experts, "down_proj"), get_mask(stopped[0].experts, "down_proj"))


class Sentences(nn.Module):
    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, x, attention_mask=None):
        return self.block(x.flatten(0, 1)).view(x.shape)


@pytest.mark.parametrize("how", ["loop", "picked", "grouped"])
def test_padding_is_no_token_that_an_expert_saw(how):
    short, long = (
        torch.randn(1, tokens, HIDDEN, generator=torch.Generator().manual_seed(tokens)) for tokens in (9, 14)
    )
    padded = torch.cat([torch.cat([torch.full((1, 5, HIDDEN), 9.0), short], 1), long])
    mask = torch.ones(2, 14, dtype=torch.int64)
    mask[0, :5] = 0
    found = []
    for given in ([{"x": padded, "attention_mask": mask}], [{"x": short}, {"x": long}]):
        model = Sentences(stacked_and_separate(how=how)[0][0])
        report = sk.prune_(model, sk.Wanda("2:4"), given)
        found.append([get_mask(model.block.experts, key) for key in KEYS])
        assert report.layers[0].remark.startswith("1 of 4")
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


@pytest.mark.parametrize("how", ["eager", "grouped_mm", "batched_mm"])
def test_a_bias_that_is_picked_is_no_token(how):
    gpt_oss = pytest.importorskip("transformers.models.gpt_oss")
    config = gpt_oss.GptOssConfig(hidden_size=HIDDEN, intermediate_size=INNER, num_local_experts=EXPERTS)
    config._experts_implementation = how
    x, found = torch.randn(2, 14, HIDDEN), []
    mask = (torch.arange(28).view(2, 14) % 3 > 0).long()
    for given in ({"x": x, "attention_mask": mask}, {"x": x[mask.bool()][None]}):
        model = Sentences(Routed(gpt_oss.modeling_gpt_oss.GptOssExperts, config))
        sk.prune_(model, sk.Wanda("2:4"), given)
        found.append([get_mask(model.block.experts, key) for key in KEYS])
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


class Routed(nn.Module):
    """Two of transformers' experts for every token."""

    def __init__(self, kind, config):
        super().__init__()
        self.experts = kind(config)
        for seed, parameter in enumerate(self.experts.parameters()):
            nn.init.normal_(parameter, generator=torch.Generator().manual_seed(seed))

    def forward(self, x):
        weights, chosen = x[:, :EXPERTS].softmax(1).topk(2)
        return self.experts(x, chosen, weights)


@pytest.mark.parametrize("name", ["mixtral.MixtralExperts", "gpt_oss.GptOssExperts", "qwen3_moe.Qwen3MoeExperts"])
def test_experts_of_transformers_are_the_same_by_all_of_its_implementations(name):
    transformers = pytest.importorskip("transformers")
    folder, _, kind = name.partition(".")
    sizes = {"hidden_size": HIDDEN, "intermediate_size": INNER, "moe_intermediate_size": INNER}
    modeling = importlib.import_module(f"transformers.models.{folder}.modeling_{folder}")
    sizes |= {"num_local_experts": EXPERTS, "num_experts": EXPERTS}
    config = getattr(transformers, kind.replace("Experts", "Config"))(**sizes)
    found = []
    for how in ("eager", "grouped_mm", "batched_mm"):
        config._experts_implementation = how
        model = Routed(getattr(modeling, kind), config)
        report = sk.prune_(model, sk.Wanda("2:4"), batches())
        assert [layer.name for layer in report.layers] == [f"experts.{key}" for key in KEYS] and report.error > 0
        found.append([get_mask(model.experts, key) for key in KEYS])
    along = 1 if folder == "gpt_oss" else 2
    for key, *masks in zip(KEYS, *found, strict=True):
        assert torch.equal(masks[0], masks[1]) and torch.equal(masks[0], masks[2])
        assert get_mask_info(model.experts, key).axis == along
        assert masks[0].movedim(along, -1).unflatten(-1, (-1, 4)).sum(-1).eq(2).all()


def test_an_interrupt_at_any_line_leaves_all_experts_pruned_or_none():
    make = lambda: (stacked_and_separate()[0],)  # noqa: E731
    assert_all_or_nothing(make, lambda model: sk.prune_(model, sk.Wanda("2:4"), batches(1)), runs=10)
