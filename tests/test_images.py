"""FID and KID against closed forms, and what a score must say before it is compared."""

import dataclasses

import pytest
import torch
from torch import nn

from sparsekit.evaluate import ImageFeatures, fid, image_features, inception, kid

pytest.importorskip("torchmetrics")
D = 8


def features(values, digest="d"):
    return ImageFeatures(values.double(), "test", digest)


def exactly(mean, covariance, n=200):
    """Features whose sample mean and covariance are these."""
    x = torch.randn(n, len(mean), dtype=torch.float64)
    x -= x.mean(0)
    factor = torch.linalg.cholesky(x.T @ x / (n - 1))
    x = torch.linalg.solve_triangular(factor, x.T, upper=False).T
    return features(x @ torch.linalg.cholesky(covariance).T + mean)


def score(real, generated):
    return fid(real, generated, resamples=0).value


def test_fid_of_normal_distributions_is_their_closed_form():
    a, b = torch.rand(2, D, dtype=torch.float64) + 0.5
    mean = torch.randn(D, dtype=torch.float64)
    diagonal = score(exactly(0 * mean, a.diag()), exactly(mean, b.diag()))
    assert diagonal == pytest.approx(float(mean.square().sum() + (a.sqrt() - b.sqrt()).square().sum()), rel=1e-9)


def test_fid_is_a_distance_that_turns_with_the_features():
    x, y = torch.randn(300, D), 1.3 * torch.randn(300, D) + 0.1
    value = score(features(x), features(y))
    assert score(features(x), features(x)) == pytest.approx(0, abs=1e-9)
    assert score(features(y), features(x)) == pytest.approx(value, rel=1e-9)
    turn = torch.linalg.qr(torch.randn(D, D, dtype=torch.float64))[0]
    assert score(features(x.double() @ turn), features(y.double() @ turn)) == pytest.approx(value, rel=1e-9)
    shift = torch.randn(D)
    assert score(features(x), features(x + shift)) == pytest.approx(shift.square().sum().item(), rel=1e-4)


def test_fid_has_a_bias_at_few_images_that_kid_has_not():
    sets = [features(torch.randn(400, 64)) for _ in range(2)]
    few = [features(each.values[:100]) for each in sets]
    assert score(*few) > 3 * score(*sets) > 3
    assert abs(kid(*few, resamples=0).value) < 0.1 and abs(kid(*sets, resamples=0).value) < 0.03


def test_kid_is_the_unbiased_distance_of_kernel_means():
    x, y = torch.randn(2, 30, D, dtype=torch.float64)
    xx, yy, xy = ((a @ b.T / D + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
    off = (xx.sum() - xx.trace() + yy.sum() - yy.trace()) / (30 * 29)
    assert kid(features(x), features(y), resamples=0).value == pytest.approx(float(off - 2 * xy.mean()), rel=1e-9)


def test_the_interval_holds_the_spread_over_other_samples():
    torch.manual_seed(0)
    real = features(torch.randn(300, D))
    values = torch.tensor([score(real, features(torch.randn(300, D) + 0.3)) for _ in range(40)])
    made = fid(real, features(torch.randn(300, D) + 0.3), resamples=40)
    low, high = made.interval
    assert low < made.value < high
    assert 1 < (high - low) / (2 * 1.96 * values.std().item()) < 2.2, "both sets are resampled, one varies here"


def test_scores_are_the_same_again_and_leave_the_random_state():
    x, y = features(torch.randn(50, D)), features(torch.randn(50, D))
    state = torch.get_rng_state()
    assert fid(x, y, resamples=5) == fid(x, y, resamples=5) and kid(x, y, resamples=5) == kid(x, y, resamples=5)
    with torch.device("meta"), torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        elsewhere = fid(x, y, resamples=5), kid(x, y, resamples=5)
    assert elsewhere == (fid(x, y, resamples=5), kid(x, y, resamples=5))
    assert fid(x, y, resamples=5, seed=1).interval != fid(x, y, resamples=5).interval
    assert torch.equal(torch.get_rng_state(), state)


def test_features_do_not_depend_on_batches_modes_or_surroundings():
    extractor = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.AdaptiveAvgPool2d(1)).train()
    images = torch.randn(10, 1, 8, 8)
    whole, parts = image_features([images], extractor), image_features(images.split(3), extractor, name="mine")
    assert whole.values.shape == (10, 4) and whole.values.dtype == torch.float64
    torch.testing.assert_close(whole.values, parts.values, atol=1e-6, rtol=0)
    assert (whole.extractor, parts.extractor) == ("Sequential", "mine") and whole.digest == parts.digest
    assert extractor[1].training and extractor[1].num_batches_tracked == 0
    with torch.device("meta"), torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(image_features([images], extractor).values, whole.values)
    with torch.no_grad():
        extractor[0].bias += 1
    assert image_features([images], extractor).digest != whole.digest


def test_a_score_says_how_it_was_measured():
    x, y = features(torch.randn(20, D)), features(torch.randn(30, D))
    first = fid(x, y, resamples=0)
    assert dataclasses.astuple(first)[2:] == (None, 30, 20, "test", "d")
    assert first.minus(dataclasses.replace(first, value=0.0)) == first.value
    with pytest.raises(ValueError, match="scores of different n cannot be compared: 30 and 20"):
        first.minus(fid(x, x, resamples=0))
    with pytest.raises(ValueError, match="scores of different n_real"):
        first.minus(fid(y, y, resamples=0))
    with pytest.raises(ValueError, match="scores of different metric"):
        first.minus(kid(x, y, resamples=0))
    with pytest.raises(ValueError, match="scores of different digest cannot be compared: d and e"):
        first.minus(dataclasses.replace(first, digest="e"))


@pytest.mark.parametrize("score", [fid, kid])
def test_rejects(score):
    x = features(torch.randn(20, D))
    with pytest.raises(ValueError, match="must be of the same extractor, got test d and test e"):
        score(x, features(torch.randn(20, D), "e"))
    with pytest.raises(ValueError, match="at least 2 real and 2 generated images are needed, got 20 and 1"):
        score(x, features(torch.randn(1, D)))


def test_rejects_features():
    with pytest.raises(ValueError, match="no images"):
        image_features([], nn.Identity())
    with pytest.raises(ValueError, match="features must be finite, got 3 that are not"):
        image_features([torch.full((1, 3), torch.nan)], nn.Identity())


def test_inception_needs_its_package():
    try:
        import torch_fidelity  # noqa: F401
    except ImportError:
        with pytest.raises(ImportError, match="needs torch-fidelity and torchvision"):
            inception("weights.pth")
