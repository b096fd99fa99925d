"""Schedules and samplers beside those of diffusers, step by step, with the same network and the same starting noise."""

from itertools import pairwise

import pytest
import torch
from torch import Generator

from stages.parts.prediction import estimates
from stages.parts.samplers.denoise import ddim_step, sample_ddim, sample_euler, sample_heun
from stages.parts.schedules import NOISE_SCHEDULES, timestep_grid

diffusers = pytest.importorskip("diffusers")

TABLES = {
    "ddpm-linear": ("linear", 1e-4, 0.02),
    "scaled-linear": ("scaled_linear", 0.00085, 0.012),
    "cosine": ("squaredcos_cap_v2", 0.1, 0.1),
}
PREDICTIONS = {"noise": "epsilon", "velocity": "v_prediction", "clean": "sample"}


def network(noisy, t):
    """Any smooth function of both arguments will do."""
    return torch.tanh(noisy.roll(1, dims=-1)) * (0.5 + t) - 0.3 * noisy


def start(seed=0):
    return torch.randn(2, 3, 5, 4, generator=Generator().manual_seed(seed), dtype=torch.float64)


def trajectory(run, noise, grid):
    """What a sampler has reached after each step: it is run on the grid cut short."""
    return [run(noise, grid[: length + 1]) for length in range(1, len(grid))]


def ddim_of_diffusers(name, predict, num_steps, **keys):
    kind, first, last = TABLES[name]
    scheduler = diffusers.DDIMScheduler(
        1000,
        first,
        last,
        kind,
        prediction_type=PREDICTIONS[predict],
        timestep_spacing="trailing",
        clip_sample="clip" in keys,
        steps_offset=0,
    )
    scheduler.set_timesteps(num_steps)
    return scheduler


@pytest.mark.parametrize("name", sorted(TABLES))
def test_the_tables_are_those_of_diffusers(name):
    kind, first, last = TABLES[name]
    theirs = diffusers.DDPMScheduler(1000, first, last, kind).alphas_cumprod
    alpha, _ = NOISE_SCHEDULES[name](torch.arange(1, 1001, dtype=torch.float64) / 1000)
    torch.testing.assert_close((alpha**2).float(), theirs, rtol=2e-4, atol=1e-7)  # theirs are products in float32


@pytest.mark.parametrize("predict", sorted(PREDICTIONS))
@pytest.mark.parametrize("name", ["ddpm-linear", "scaled-linear"])
@pytest.mark.parametrize("num_steps", [5, 20])
def test_every_ddim_step_is_that_of_diffusers(name, predict, num_steps):
    scheduler, noisy, grid = ddim_of_diffusers(name, predict, num_steps), start(), timestep_grid(num_steps)
    ours = trajectory(lambda noise, times: sample_ddim(network, noise, times, NOISE_SCHEDULES[name], predict), noisy, grid)
    for entry, found in zip(scheduler.timesteps.tolist(), ours, strict=True):
        noisy = scheduler.step(network(noisy, (entry + 1) / 1000), entry, noisy).prev_sample
        torch.testing.assert_close(found, noisy, rtol=2e-5, atol=2e-5)


def test_the_clipped_ddim_step_is_that_of_diffusers_with_its_noise_recomputed():
    scheduler, noisy, grid = ddim_of_diffusers("cosine", "noise", 10, clip=1.0), start(), timestep_grid(10)
    ours = trajectory(lambda noise, times: sample_ddim(network, noise, times, NOISE_SCHEDULES["cosine"], "noise", clip=1.0), noisy, grid)
    for entry, found in zip(scheduler.timesteps.tolist(), ours, strict=True):
        noisy = scheduler.step(network(noisy, (entry + 1) / 1000), entry, noisy, use_clipped_model_output=True).prev_sample
        torch.testing.assert_close(found, noisy, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("eta", [0.4, 1.0])
def test_a_ddim_step_with_fresh_noise_is_that_of_diffusers(eta):
    scheduler, grid = ddim_of_diffusers("ddpm-linear", "noise", 10), timestep_grid(10)
    noisy = start()
    for entry, (t, s) in zip(scheduler.timesteps.tolist(), pairwise(grid.tolist()), strict=True):
        fresh = torch.stack([torch.randn(3, 5, 4, generator=Generator().manual_seed(row)) for row in range(2)]).double()
        generators = [Generator().manual_seed(row) for row in range(2)]
        times = torch.tensor([t, s], dtype=torch.float64)
        found = sample_ddim(network, noisy, times, NOISE_SCHEDULES["ddpm-linear"], "noise", eta=eta, generators=generators)
        noisy = scheduler.step(network(noisy, t), entry, noisy, eta=eta, variance_noise=fresh).prev_sample
        torch.testing.assert_close(found, noisy, rtol=2e-5, atol=2e-5)


def test_eta_one_is_the_ancestral_step_of_ddpm_with_the_smaller_variance():
    schedule = NOISE_SCHEDULES["ddpm-linear"]
    scheduler = diffusers.DDPMScheduler(
        1000, 1e-4, 0.02, "linear", variance_type="fixed_small", clip_sample=False, timestep_spacing="trailing"
    )
    scheduler.set_timesteps(10)
    noisy = start()
    for entry, (t, s) in zip(scheduler.timesteps.tolist(), pairwise(timestep_grid(10)), strict=True):
        predicted, level = network(noisy, t.item()), schedule.level(t)
        fresh = torch.randn(noisy.shape, generator=Generator().manual_seed(7), dtype=torch.float64)
        found = ddim_step(*estimates("noise", predicted, noisy, level), level, schedule.level(s), eta=1.0, fresh=fresh)
        noisy = scheduler.step(predicted, entry, noisy, generator=Generator().manual_seed(7)).prev_sample
        torch.testing.assert_close(found, noisy, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_every_euler_step_is_that_of_flow_matching_in_diffusers(shift):
    grid = timestep_grid(8, shift=shift)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=grid[:-1].tolist())
    torch.testing.assert_close(scheduler.sigmas.double(), grid, rtol=0, atol=1e-7)
    noisy = start()
    ours = trajectory(lambda noise, times: sample_euler(network, noise, times, NOISE_SCHEDULES["linear"], "velocity"), noisy, grid)
    for timestep, t, found in zip(scheduler.timesteps, grid.tolist(), ours, strict=False):
        noisy = scheduler.step(network(noisy, t), timestep, noisy).prev_sample.double()
        torch.testing.assert_close(found, noisy, rtol=2e-5, atol=2e-5)


def test_heun_is_that_of_flow_matching_in_diffusers_up_to_its_last_step():
    """Their last step is an Euler step, so the last one is left out."""
    scheduler = diffusers.FlowMatchHeunDiscreteScheduler()
    scheduler.set_timesteps(6)
    grid = torch.cat([scheduler.sigmas[:1], scheduler.sigmas[1:-1:2]]).double()
    noisy = start()
    found = sample_heun(network, noisy, grid, NOISE_SCHEDULES["linear"], "velocity")
    levels = scheduler.sigmas.tolist()
    for timestep, t in list(zip(scheduler.timesteps, levels, strict=False))[: 2 * (len(grid) - 1)]:
        noisy = scheduler.step(network(noisy, t), timestep, noisy).prev_sample.double()
    torch.testing.assert_close(found, noisy, rtol=2e-5, atol=2e-5)
