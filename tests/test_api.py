"""The public surface: every name, and the arguments by which it is called."""

import inspect
from types import ModuleType

import pytest

import sparsekit as sk

SIGNATURES = {
    "nm_mask": "score, n, m",
    "nm_mask_bits": "score, n, m",
    "nm_prune": "weight, n, m, *, scale=None",
    "nm_prune_": "weight, n, m, *, scale=None",
    "transposable_mask24": "score",
    "block_scores": "weight, block=(16, 16), *, scale=None, mask=None",
    "block_topk_mask": "score, k, block=(16, 16)",
    "tier_prune": "weight, tiers, k, block=(16, 16), *, scale=None, score_scale=None, nested=False",
    "tier_scores": "weight, k, block=(16, 16), *, scale=None, score_scale=None, squared=False",
    "pack24": "weight, mask=None, *, check=None",
    "prune_pack24": "weight, *, scale=None",
    "linear24": "x, packed, bias=None",
    "pack_tiered": "weight, mask=None, *, k=10, block=(16, 16)",
    "linear_tiered": "x, packed, bias=None",
    "show_config": "",
    "prune_": "model, method, batches=None, *, where=None, axis='input', calibration=None, progress=None, resume=None",
    "Calibration": "sequential=True, forward=None, token_mask=None, batchnorm=True, group='world'",
    "Magnitude": "pattern",
    "Wanda": "pattern",
    "RIA": "pattern, power=0.5",
    "SparseGPT": "pattern, damp=0.01, columns=128",
    "ADMM": "pattern, iterations=20, ramp=15, damp=0.1",
    "Swaps": "method, *, passes=20",
    "LeastSquares": "method, *, iterations=100, damp=0.01, tolerance=0.0003",
    "reestimate_batchnorm_": "model, batches, *, forward=None, group='world'",
    "keep_masks": "model, optimizer",
    "compress_": "model, batches=None, *, where=None, forward=None, objective='speed', keep_dense=False, measure=None, "
    "progress=None",
    "Measure": "tokens=None, budget=0.5, graphs=False",
    "decompress_": "model",
    "sparse_training_": "model, *, backward='straight_through', decay=0.0, where=None",
    "to_sparse_semi_structured": "packed, *, layout=None, alg_id=0",
    "from_sparse_semi_structured": "tensor, *, layout=None",
    "save": "model, path, *, format='sparsekit'",
    "load": "model, path, *, dense=False",
}
REPORTS = {"SparseTraining", "PruneReport", "CompressReport", "Packed24", "TieredWeight"}


def test_every_public_name():
    public = {name for name, value in vars(sk).items() if name[0] != "_" and not isinstance(value, ModuleType)}
    assert public == SIGNATURES.keys() | REPORTS
    assert all(isinstance(module, ModuleType) for module in (sk.ops, sk.nn, sk.tiers))


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature(name):
    signature = inspect.signature(getattr(sk, name))
    plain = [parameter.replace(annotation=parameter.empty) for parameter in signature.parameters.values()]
    assert str(signature.replace(parameters=plain, return_annotation=signature.empty)) == f"({SIGNATURES[name]})"


@pytest.mark.parametrize("name", [*SIGNATURES, *sorted(REPORTS)])
def test_is_documented(name):
    assert inspect.getdoc(getattr(sk, name))
