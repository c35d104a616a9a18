"""``slim_``: a model without units computes what it does with zeros in their places."""

import copy
import json
import subprocess
import sys

import pytest
import torch
from slimming import SIZES, logits, plain, scatter, tiny, zero_rows
from torch import nn

import sparsekit as sk
from sparsekit.masks import get_mask
from sparsekit.slim import SlimPlan, find_units, mask_units_, slim_, slim_plan, unslim_
from sparsekit.slim.trial import pass_input

MODELS = (*SIZES, "plain")


@pytest.fixture(params=MODELS, scope="module")
def found(request):
    model, batch = plain() if request.param == "plain" else tiny(request.param)
    return model, batch, find_units(model, batch)


def some(units):
    """A plan that drops about a third of the units of every branch, not the same in each."""
    kept = {b.reader: [u for u in range(b.units) if (u + i) % 3] for i, b in enumerate(units.branches)}
    return units.keep(kept)


def test_all_units_are_found(found):
    model, _, units = found
    assert not units.skipped
    counts = sorted((each.kind, each.units) for each in units.branches)
    if isinstance(model, nn.Sequential):
        assert counts == [("neuron", 10), ("neuron", 12)]
    else:
        heads = getattr(model.config, "num_key_value_heads", 4)
        assert counts == [("head", heads)] * 2 + [("neuron", 24)] * 2
        assert [each.count for each in units.stages] == [2]


def test_a_slim_model_equals_the_masked_one(found):
    model, batch, units = found
    masked, slim, plan = copy.deepcopy(model), copy.deepcopy(model), some(units)
    mask_units_(masked, plan)
    report = slim_(slim, plan)
    assert (logits(masked, batch) - logits(slim, batch)).abs().max() < 1e-12
    assert (logits(model, batch) - logits(slim, batch)).abs().max() > 1e-3
    assert report.weights == sum(each.numel() for each in slim.parameters()) < report.weights_before
    again = copy.deepcopy(masked)
    slim_(again, plan)  # the masks go with the units
    assert (logits(masked, batch) - logits(again, batch)).abs().max() < 1e-12
    assert all(get_mask(module) is None for module in again.modules())


def test_biases_of_masked_rows_are_folded(found):
    model, batch, units = found
    plan, masked = some(units), copy.deepcopy(model)
    for branch, kept in plan.units.items():
        zero_rows(masked, branch, sorted({*range(branch.units)} - {*kept}))
    slim = copy.deepcopy(masked)
    if hasattr(model, "config") and model.config.model_type == "llama":  # it has no biases at all
        with pytest.raises(ValueError, match="pass batches"):
            slim_(slim, plan)
        slim_(slim, plan, [batch])
    else:
        with pytest.raises(ValueError, match="pass batches, one is enough"):
            slim_(slim, plan)
        assert torch.equal(logits(masked, batch), logits(slim, batch))
        slim_(slim, plan, [batch])
    assert (logits(masked, batch) - logits(slim, batch)).abs().max() < 1e-12


def test_unslim_brings_the_shapes_back(found):
    model, batch, units = found
    slim = copy.deepcopy(model)
    slim_(slim, some(units))
    padded = copy.deepcopy(slim)
    unslim_(padded)
    assert [each.shape for each in padded.parameters()] == [each.shape for each in model.parameters()]
    assert (logits(padded, batch) - logits(slim, batch)).abs().max() < 1e-12
    assert slim_plan(slim) is not None and slim_plan(padded) is None
    assert "slim_plan" not in json.dumps(getattr(padded, "config", None) and padded.config.to_dict(), default=str)


def test_a_skeleton_gets_the_shapes(found):
    model, batch, units = found
    slim = copy.deepcopy(model)
    slim_(slim, some(units))
    stored = json.loads(json.dumps(slim_plan(slim).to_json()))
    skeleton = copy.deepcopy(model).to("meta")
    slim_(skeleton, SlimPlan.from_json(stored))
    assert all(each.is_meta for each in skeleton.parameters())
    skeleton = skeleton.to_empty(device="cpu")
    skeleton.load_state_dict(slim.state_dict())
    for name, buffer in model.named_buffers():  # not in the state dict
        skeleton.get_buffer(name).copy_(buffer)
    assert torch.equal(logits(skeleton, batch), logits(slim, batch))


def test_slimming_twice_is_one_plan(found):
    model, batch, units = found
    slim = copy.deepcopy(model)
    slim_(slim, some(units))
    again = find_units(slim, batch)
    slim_(slim, again.keep({each.reader: range(1, each.units) for each in again.branches if each.units > 1}))
    at_once = copy.deepcopy(model)
    slim_(at_once, slim_plan(slim))
    assert slim_plan(at_once) == slim_plan(slim)
    assert torch.equal(logits(at_once, batch), logits(slim, batch))


@pytest.mark.parametrize("name", SIZES)
def test_a_dropped_stage_lets_its_input_pass(name):
    changes = {key: 3 for key in ("num_hidden_layers", "n_layers", "n_layer") if key in SIZES[name]}
    model, batch = tiny(name, **changes)
    units = find_units(model, batch)
    (stages,) = units.stages
    passing = copy.deepcopy(model)
    passing.get_submodule(f"{stages.name}.1").register_forward_hook(pass_input, with_kwargs=True)
    plan = SlimPlan(some(units).units, {stages: (0, 2)})
    mask_units_(passing, plan)
    slim_(model, plan)
    assert (logits(model, batch) - logits(passing, batch)).abs().max() < 1e-12
    assert model.config.num_hidden_layers == 2
    assert len(slim_plan(model).units) == 4  # of the two stages that are left, by their new names
    skeleton = type(model)(model.config).double()
    slim_(skeleton, SlimPlan.from_json(model.config.slim_plan))
    skeleton.load_state_dict(model.state_dict())
    assert torch.equal(logits(skeleton.eval(), batch), logits(model, batch))


@pytest.mark.parametrize("name", ("gpt2", "llama"))
def test_slim_models_generate_from_their_cache(name):
    model, batch = tiny(name, **{"n_layer" if name == "gpt2" else "num_hidden_layers": 3})
    units = find_units(model, batch)
    slim_(model, SlimPlan(some(units).units, {units.stages[0]: (1, 2)}))
    ids = batch["input_ids"][:1]
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    cached, plainly = (model.generate(ids, use_cache=cache, **options) for cache in (True, False))
    assert torch.equal(cached, plainly) and cached.shape == (1, 12)


def test_float32_is_as_near_as_it_can_be():
    model, batch = tiny("distilbert", torch.float32)
    masked = copy.deepcopy(model)
    plan = some(find_units(model, batch))
    mask_units_(masked, plan)
    slim_(model, plan)
    assert (logits(masked, batch) - logits(model, batch)).abs().max() < 1e-5


def test_what_units_say_on_average_is_folded():
    model, batch = plain()
    plan = find_units(model, batch).keep({"2": range(3, 12)})
    with torch.no_grad():
        hidden = model[:2](batch)
        expected = model[2].bias + model[2].weight[:, :3] @ hidden[:, :3].mean(0)
    slim_(model, plan, [batch])
    assert torch.allclose(model[2].bias, expected, rtol=0, atol=1e-14)


def test_heads_of_torchs_own_encoder_are_not_supported():
    layer = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True)
    model = scatter(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).double().eval())
    batch = torch.randn(2, 5, 16, dtype=torch.float64)
    units = find_units(model, batch)
    assert "query, key and value in one parameter" in str(units)
    masked, plan = copy.deepcopy(model), some(units)
    mask_units_(masked, plan)
    slim_(model, plan)
    assert (logits(masked, batch) - logits(model, batch)).abs().max() < 1e-12


class Normed(nn.Module):
    """A feed-forward block whose neurons are normed together, so that none can be removed by itself."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, x):
        return self.down(torch.nn.functional.layer_norm(self.up(x), (8,)))


class Sized(nn.Module):
    """A feed-forward block that asks for its size."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, x):
        return self.down(self.up(x).view(-1, 4, 2).flatten(1))


def test_what_cannot_be_slimmed_is_said():
    assert "do not fall into units that up would write" in str(find_units(Normed(), torch.randn(3, 4)))
    assert "the model cannot be run without a part of it: RuntimeError" in str(find_units(Sized(), torch.randn(3, 4)))
    tied = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    tied[2].weight = tied[0].weight
    assert "is tied to" in str(find_units(tied, torch.randn(3, 4)))


def test_nothing_is_changed_by_a_failure():
    model, batch = tiny("bert")
    units = find_units(model, batch)
    last = model.bert.encoder.layer[1].output.dense
    sk.prune_(model.float(), sk.Magnitude("2:4"), where=lambda name, module: module is last)
    before = {name: each.clone() for name, each in model.state_dict().items()}
    parameters = [*model.parameters()]
    with pytest.raises(ValueError, match="drops other weights than those of the units"):
        slim_(model, some(units))
    assert all(torch.equal(each, before[name]) for name, each in model.state_dict().items())
    assert all(one is other for one, other in zip(model.parameters(), parameters, strict=True))
    assert slim_plan(model) is None and not hasattr(model.config, "slim_plan")


def test_rejects():
    model, batch = plain()
    units = find_units(model, batch)
    with pytest.raises(ValueError, match="there are no units of 'head', but of 2, 4"):
        units.keep({"head": [0]})
    with pytest.raises(ValueError, match="at least one of the units of '2' must stay"):
        units.keep({"2": []})
    with pytest.raises(ValueError, match="ascending indices from 0 to 11"):
        units.keep({"2": [3, 1]})
    plan = some(units)
    with pytest.raises(TypeError, match="plan must be a SlimPlan, got dict"):
        slim_(model, plan.to_json())
    slim_(model, plan)
    with pytest.raises(ValueError, match="the plan is of another model, or has been applied already"):
        slim_(model, plan)
    with pytest.raises(ValueError, match="has removed no units"):
        unslim_(plain()[0])
    with pytest.raises(TypeError, match=r"call sk\.slim_\(model, plan, batches\)"):
        sk.slim(model)


@pytest.mark.parametrize(
    ("where", "value"),
    [
        (("format",), "other"),
        (("units", "2", "kept"), "0-99999999"),
        (("units", "2", "kept"), "5-3"),
        (("units", "2", "kept"), 3),
        (("units", "2", "units"), 2**40),
        (("units", "2", "width"), True),
        (("units", "2", "attributes"), [3]),
        (("units",), None),
    ],
)
def test_a_damaged_plan_is_refused(where, value):
    model, batch = plain()
    data = json.loads(json.dumps(some(find_units(model, batch)).to_json()))
    part = data
    for key in where[:-1]:
        part = part[key]
    part[where[-1]] = value
    with pytest.raises(ValueError, match="this is no slim plan"):
        SlimPlan.from_json(data)


def test_a_plan_is_short():
    model, batch = plain()
    plan = find_units(model, batch).keep({"2": [0, 1, 2, 5, 7, 8]})
    assert plan.to_json()["units"]["2"]["kept"] == "0-2,5,7-8"
    assert SlimPlan.from_json(plan.to_json()) == plan


STOCK = """
import sys, torch
from transformers import AutoModelForSequenceClassification as Auto
slim, padded, ids, logits = sys.argv[1:]
model = Auto.from_pretrained(padded).eval()
with torch.no_grad():
    torch.save(model(torch.load(ids)).logits, logits)
try:
    Auto.from_pretrained(slim)
except RuntimeError as error:
    assert "mismatched" in str(error)
else:
    raise AssertionError("a slim model was loaded without its plan")
assert "sparsekit" not in sys.modules
"""


@pytest.mark.slow
def test_stock_transformers_loads_what_is_padded_and_refuses_what_is_slim(tmp_path):
    model, batch = tiny("distilbert", torch.float32, n_layers=3)
    from transformers import AutoModelForSequenceClassification as Auto

    units = find_units(model, batch)
    slim_(model, SlimPlan(some(units).units, {units.stages[0]: (0, 2)}))
    expected = logits(model, batch)
    model.save_pretrained(tmp_path / "slim")
    assert torch.equal(logits(Auto.from_pretrained(tmp_path / "slim").eval(), batch), expected)
    unslim_(model)
    model.save_pretrained(tmp_path / "padded")
    torch.save(batch["input_ids"], tmp_path / "ids")
    paths = [str(tmp_path / name) for name in ("slim", "padded", "ids", "logits")]
    subprocess.run([sys.executable, "-c", STOCK, *paths], check=True, capture_output=True)
    assert (torch.load(tmp_path / "logits", weights_only=True) - expected).abs().max() < 1e-5


def test_a_slim_model_is_saved_and_loaded_bit_for_bit(tmp_path):
    model, batch = tiny("bert", torch.float32)
    slim_(model, some(find_units(model, batch)))
    sk.save(model, tmp_path / "slim.safetensors")
    (tmp_path / "plan.json").write_text(json.dumps(slim_plan(model).to_json()))
    whole, _ = tiny("bert", torch.float32)
    before = logits(whole, batch)
    with pytest.raises(ValueError, match=r"cannot load .*slim\.safetensors"):
        sk.load(whole, tmp_path / "slim.safetensors")
    assert torch.equal(logits(whole, batch), before)
    slim_(whole, SlimPlan.from_json(json.loads((tmp_path / "plan.json").read_text())))
    sk.load(whole, tmp_path / "slim.safetensors")
    assert torch.equal(logits(whole, batch), logits(model, batch))
