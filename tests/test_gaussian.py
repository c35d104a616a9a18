"""Gaussian diffusion against closed forms, diffusers' scheduler, and itself in two processes."""

import copy
import os
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from running import leave_group
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from sparsekit.diffusion import GaussianDiffusion, drop_labels, guided

PUBLISHED = GaussianDiffusion(500, beta_end=0.028)


def optimal(diffusion, mean, variance):
    """Returns the best model of the noise in numbers from a normal distribution; it is linear in x."""

    def eps(x, t, labels=None):
        bar = diffusion.alpha_bars[t].view(-1, *[1] * (x.dim() - 1)).to(x.dtype)
        return (1 - bar).sqrt() * (x - bar.sqrt() * mean) / (bar * variance + 1 - bar)

    return eps


class Labeled(nn.Module):
    """A small model of the noise that heeds the step and the label."""

    def __init__(self):
        super().__init__()
        self.inner, self.label = nn.Conv2d(1, 4, 3, padding=1), nn.Embedding(11, 4)
        self.outer = nn.Conv2d(4, 1, 3, padding=1)

    def forward(self, x, t, labels):
        return self.outer((self.inner(x) + (self.label(labels) * (1 + t[:, None] / 500))[..., None, None]).tanh())


def test_the_schedule_is_the_published_one():
    paper = GaussianDiffusion()
    assert paper.betas[[0, -1]].tolist() == [1e-4, 0.02] and paper.betas.dtype == torch.float64
    assert paper.alpha_bars[-1].item() == pytest.approx(4.04e-5, rel=1e-2)
    assert PUBLISHED.alpha_bars[-1].item() == pytest.approx(8.3e-4, rel=1e-2)


def test_q_sample_literal():
    diffusion = GaussianDiffusion(2, 0.19, 0.75)  # alpha bars 0.81 and 0.2025
    x, noise = torch.ones(2, 1, 1, 1), torch.full((2, 1, 1, 1), 2.0)
    noisy = diffusion.q_sample(x, torch.tensor([0, 1]), noise).flatten().tolist()
    assert noisy == pytest.approx([0.9 + 2 * 0.19**0.5, 0.45 + 2 * 0.7975**0.5])
    assert diffusion.q_sample(x.bfloat16(), torch.tensor([0, 1]), noise).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("steps", "last", "mean", "variance", "expected"),
    [
        (500, 0.028, 0.0, 1.0, (0.0, 0.999900, 0.985354)),
        (500, 0.028, 0.5, 0.25, (0.499896, 0.251329, 0.243791)),
        (1000, 0.02, 0.0, 1.0, (0.0, 0.999900, 0.991067)),
        (1000, 0.02, 0.5, 0.25, (0.499995, 0.250752, 0.246125)),
    ],
)
def test_ancestral_sampling_of_normal_numbers_has_the_exact_mean_and_variance(steps, last, mean, variance, expected):
    diffusion = GaussianDiffusion(steps, beta_end=last)
    model = optimal(diffusion, mean, variance)
    for rule, target in (("fixed_large", expected[1]), ("fixed_small", expected[2])):
        now, spread = 0.0, 1.0
        for t in reversed(range(steps)):
            x = torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64)  # a step is linear in x and in the noise
            eps = model(x, torch.full((3,), t))
            zero, one, noise = diffusion.ancestral_step(x, eps, t, torch.tensor([0.0, 0.0, 1.0]), rule).tolist()
            now, spread = zero + (one - zero) * now, (one - zero) ** 2 * spread + (noise - zero) ** 2
        assert (now, spread) == pytest.approx((expected[0], target), abs=1e-6)


@pytest.mark.parametrize("variance", ["fixed_large", "fixed_small"])
def test_a_step_is_that_of_diffusers(variance):
    scheduler = pytest.importorskip("diffusers").DDPMScheduler(
        500, 1e-4, 0.028, variance_type=variance, clip_sample=False
    )
    x, eps = torch.randn(2, 1, 64).unbind()
    for t in (499, 250, 50, 10, 1, 0):
        theirs = scheduler.step(eps, t, x, generator=torch.Generator().manual_seed(t)).prev_sample
        noise = torch.randn(1, 64, generator=torch.Generator().manual_seed(t))
        error = (PUBLISHED.ancestral_step(x, eps, t, noise, variance) - theirs).abs().max()
        assert error <= (1e-5 if t >= 10 else 1e-3)  # diffusers has alpha bars in float32


def test_samplers_draw_from_the_distribution():
    pytest.importorskip("diffusers")
    model = optimal(PUBLISHED, 0.2, 0.01)
    samples = {}
    for sampler, steps in (("ancestral", None), ("ddpm", None), ("ddim", None), ("dpm-solver++", 200)):
        generator = torch.Generator().manual_seed(0)
        x = PUBLISHED.sample(model, (4096, 1, 1, 1), sampler=sampler, steps=steps, generator=generator)
        assert x.mean().item() == pytest.approx(0.2, abs=0.008)
        assert x.std().item() == pytest.approx(0.1, abs=0.008), sampler
        samples[sampler] = x
    torch.testing.assert_close(samples["ancestral"], samples["ddpm"], atol=2e-3, rtol=0)
    few = PUBLISHED.sample(model, (4096, 1, 1, 1), sampler="ddim", steps=50)
    assert few.std().item() < 0.085, "a step that is wrong by little shows"


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm-solver++"])
def test_any_number_of_steps_is_spread_over_all(sampler):
    """Rounding errors in diffusers give 10 of these numbers of steps one more, at -1."""
    pytest.importorskip("diffusers")
    diffusion, last = GaussianDiffusion(69, beta_end=0.2), 68
    for steps in range(1, 70):
        timesteps = []
        keep = {"progress": lambda spread, timesteps=timesteps: timesteps.extend(spread) or ()}
        diffusion.sample(Labeled(), (1, 1), sampler=sampler, steps=steps, **keep)
        assert len(timesteps) == steps and timesteps[0] == last and timesteps[-1] >= 0
        assert timesteps == sorted(set(timesteps), reverse=True)
    if sampler != "ddim":  # which leaves noise here, as the docstring says
        x = diffusion.sample(optimal(diffusion, 0.2, 0.01), (2048, 1), sampler=sampler, steps=62)
        assert (x.mean().item(), x.std().item()) == pytest.approx((0.2, 0.1), abs=0.04)


def test_samples_depend_on_the_generator_and_are_clipped():
    def model(x, t, labels):
        assert t.shape == labels.shape == (3,) and not torch.is_grad_enabled()
        return 0 * x

    state = torch.get_rng_state()
    draws = [
        GaussianDiffusion(20).sample(
            model,
            (3, 1, 2, 2),
            torch.tensor([1, 2, 3]),
            sampler="ancestral",
            generator=torch.Generator().manual_seed(seed),
        )
        for seed in (0, 0, 1)
    ]
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    assert draws[0].abs().max() == 1


@pytest.mark.parametrize("sampler", ["ancestral", "ddpm", "ddim", "dpm-solver++"])
def test_samples_are_the_same_in_every_surrounding(sampler):
    pytest.importorskip("diffusers")

    def drawn():
        diffusion, generator = GaussianDiffusion(20), torch.Generator("cpu").manual_seed(0)
        return diffusion.sample(lambda x, t, labels: 0.1 * x, (2, 1, 2, 2), sampler=sampler, generator=generator)

    plain = drawn()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"), torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(drawn(), plain) and drawn().dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


def test_loss_is_the_mean_over_all_elements():
    x, t, noise = torch.randn(4, 1, 3, 3), torch.tensor([0, 9, 99, 499]), torch.randn(4, 1, 3, 3)
    loss = PUBLISHED.loss(lambda x, t, labels: torch.zeros_like(x), x, t=t, noise=noise)
    assert loss.item() == pytest.approx(noise.square().sum().item() / 36)
    assert PUBLISHED.loss(optimal(PUBLISHED, 0, 1), torch.randn(4096, 1, 4, 4), t=t.repeat(1024)).item() < 0.75


def test_loss_draws_what_is_not_given():
    model, x, labels = Labeled(), torch.randn(8, 1, 4, 4), torch.arange(8)
    state = torch.get_rng_state()
    losses = [PUBLISHED.loss(model, x, labels, generator=torch.Generator().manual_seed(3)) for _ in range(2)]
    assert losses[0] == losses[1] and torch.equal(torch.get_rng_state(), state)
    generator = torch.Generator().manual_seed(3)
    t, noise = torch.randint(500, (8,), generator=generator), torch.randn(x.shape, generator=generator)
    assert PUBLISHED.loss(model, x, labels, t=t, noise=noise) == losses[0]
    with torch.autocast("cpu", torch.bfloat16):
        assert PUBLISHED.loss(model, x, labels, t=t, noise=noise).dtype == torch.float32


def test_tables_made_in_inference_mode_serve_training():
    diffusion = GaussianDiffusion(10)
    with torch.inference_mode():
        diffusion.q_sample(torch.randn(1, 2), torch.tensor([3]), torch.randn(1, 2))
    x = torch.randn(1, 2, requires_grad=True)
    diffusion.q_sample(x, torch.tensor([3]), torch.randn(1, 2)).sum().backward()
    assert x.grad.flatten().tolist() == pytest.approx([diffusion.alpha_bars[3].sqrt().item()] * 2)


def test_guidance():
    model, calls = Labeled(), []
    x, t, labels = torch.randn(5, 1, 4, 4), torch.randint(500, (5,)), torch.tensor([1, 2, 3, 4, 10])

    def counted(x, t, labels):
        calls.append(len(x))
        return model(x, t, labels)

    conditional, unconditional = model(x, t, labels), model(x, t, torch.zeros_like(labels))
    torch.testing.assert_close(guided(counted, 1.8)(x, t, labels), 2.8 * conditional - 1.8 * unconditional)
    assert calls == [10], "one pass over a doubled batch"
    assert guided(model, 0) is model
    torch.testing.assert_close(guided(model, 1.8)(x, t, 0 * labels), unconditional)
    with pytest.raises(ValueError, match="guidance needs labels, got None"):
        guided(model, 1.8)(x, t, None)


def test_labels_are_dropped_one_by_one_and_resume_exactly():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(1, 11, (200, 500))
    dropped = drop_labels(labels, 0.1, generator) == 0
    assert dropped.float().mean().item() == pytest.approx(0.1, abs=3 * (0.09 / labels.numel()) ** 0.5)
    in_batch = dropped.float().mean(1)  # per sample, not per batch: every batch of 500 has its share
    assert in_batch.std().item() == pytest.approx((0.09 / 500) ** 0.5, rel=0.2)
    stored = generator.get_state()
    first = drop_labels(labels, 0.1, generator)
    assert torch.equal(drop_labels(labels, 0.1, torch.Generator().set_state(stored)), first)
    assert torch.equal(first[first > 0], labels[first > 0])
    assert torch.equal(drop_labels(labels, 0), labels) and not drop_labels(labels, 1).any()


def test_rejects():
    with pytest.raises(ValueError, match="steps must be an integer of at least 1, got 0"):
        GaussianDiffusion(0)
    with pytest.raises(ValueError, match=r"betas must rise within 0 and 1, got 0.02 to 0.01"):
        GaussianDiffusion(10, 0.02, 0.01)
    with pytest.raises(ValueError, match="rate must be from 0 to 1, got 10"):
        drop_labels(torch.ones(1), 10)
    for arguments, said in (
        ({"sampler": "euler"}, "sampler must be one of ancestral, ddpm, ddim, dpm-solver.., got 'euler'"),
        ({"sampler": "ancestral", "steps": 9}, "steps of the sampler 'ancestral' must be 500, got 9"),
        ({"steps": 501}, "must be 1 to 500, got 501"),
        ({"variance": "learned"}, "variance must be one of fixed_large, fixed_small, got 'learned'"),
    ):
        with pytest.raises(ValueError, match=said):
            PUBLISHED.sample(Labeled(), (1, 1, 4, 4), **arguments)


def gradients(model):
    return [getattr(each.grad, "full_tensor", lambda each=each: each.grad)() for each in model.parameters()]


def _work(rank, rendezvous, model, batch, expected, published):
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    x, labels, t, noise = (each[rank::2] for each in batch)
    parallel = DistributedDataParallel(copy.deepcopy(model))
    PUBLISHED.loss(parallel, x, labels, t=t, noise=noise).backward()
    torch.testing.assert_close(gradients(parallel), expected, atol=1e-6, rtol=0)
    parallel.zero_grad()
    (PUBLISHED.loss(parallel, x, labels, t=t, noise=noise) * x.numel() / len(x) ** 2).backward()
    torch.testing.assert_close(gradients(parallel), [2 * each for each in published], atol=1e-4, rtol=1e-4)
    sharded = fully_shard(copy.deepcopy(model), mesh=dist.device_mesh.init_device_mesh("cpu", (2,)))
    PUBLISHED.loss(sharded, x, labels, t=t, noise=noise).backward()
    torch.testing.assert_close(gradients(sharded), expected, atol=1e-6, rtol=0)
    leave_group()


@pytest.mark.slow
@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch without gloo")
def test_two_processes_have_the_gradients_of_one(tmp_path):
    """The published ``sum / b**2`` does not: with W processes its gradients are W times too large."""
    torch.manual_seed(0)
    model = Labeled()
    batch = torch.randn(8, 1, 8, 8), torch.arange(8), torch.randint(500, (8,)), torch.randn(8, 1, 8, 8)
    x, labels, t, noise = batch
    PUBLISHED.loss(model, x, labels, t=t, noise=noise).backward()
    expected = gradients(model)
    published = [each * x.numel() / len(x) ** 2 for each in expected]
    model.zero_grad()
    context = mp.get_context("spawn")
    arguments = (os.fspath(tmp_path / "rendezvous"), model, batch, expected, published)
    workers = [context.Process(target=_work, args=(rank, *arguments)) for rank in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timedelta(minutes=2).total_seconds())
        if worker.is_alive():
            worker.kill()
    assert [worker.exitcode for worker in workers] == [0, 0]
