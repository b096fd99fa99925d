"""Samplers against closed forms: ideal denoisers, exact counts, exact probabilities, and independence of the batch."""

import itertools
import math

import pytest
import torch
from torch import Generator

from stages.errors import RecipeError
from stages.parts.config import parse_part
from stages.parts.prediction import target
from stages.parts.samplers import SAMPLERS, AutoregressiveConfig, DdimConfig, EulerConfig, HeunConfig, MaskedConfig
from stages.parts.samplers.denoise import ddim_step, sample_ddim, sample_denoised, sample_euler, sample_heun
from stages.parts.samplers.guidance import SamplerConfig, guided, renormalised
from stages.parts.samplers.logits import keep_top_k, keep_top_p, sample_logits
from stages.parts.samplers.masked import annealing_factors, masked_decode
from stages.parts.samplers.noise import sample_generator, sample_normals, sample_uniforms
from stages.parts.schedules import NOISE_SCHEDULES, hidden_counts, timestep_grid

MEAN, STD = 0.7, 0.5  # of the data that the ideal denoiser knows


def scalar(t):
    return torch.tensor(t, dtype=torch.float64)


def ideal(schedule, predict, mean=MEAN, std=STD):
    """The best possible denoiser of N(mean, std²): E[clean | noisy], as a prediction of any kind."""

    def denoise(noisy, t):
        level = schedule.level(scalar(t))
        variance = level.alpha**2 * std**2 + level.sigma**2
        residual = noisy - level.alpha * mean
        clean = mean + level.alpha * std**2 / variance * residual
        return target(predict, clean, level.sigma / variance * residual, level)

    return denoise


def affine(sample):
    """Offset and slope of a deterministic sampler with a Gaussian's ideal denoiser, which is affine: read off at 0 and 1."""
    at_zero, at_one = sample(torch.tensor([[0.0], [1.0]], dtype=torch.float64)).squeeze(1).tolist()
    return at_zero, at_one - at_zero


def moments(sample, mean=0.0, std=1.0):
    """Mean and standard deviation of what a deterministic sampler makes of N(mean, std²)."""
    offset, slope = affine(sample)
    return offset + slope * mean, slope * std


def start_of(schedule):
    """Mean and standard deviation of noisy data at t = 1."""
    level = schedule.level(scalar(1.0))
    return (level.alpha * MEAN).item(), math.sqrt(level.alpha**2 * STD**2 + level.sigma**2)


# ---- denoising samplers


@pytest.mark.parametrize(("num_steps", "expected"), [(5, 0.3054), (10, 0.3846), (20, 0.4336), (40, 0.4626)])
def test_ddim_shrinks_a_gaussian_as_its_closed_form_says(num_steps, expected):
    schedule = NOISE_SCHEDULES["scaled-linear"]
    denoise = ideal(schedule, "noise")
    mean, std = moments(lambda noise: sample_ddim(denoise, noise, timestep_grid(num_steps), schedule, "noise"), *start_of(schedule))
    assert std == pytest.approx(expected, abs=6e-5)
    assert mean == pytest.approx(MEAN, abs=1e-6)


def test_ddim_of_a_gaussian_is_the_product_of_its_steps():
    schedule = NOISE_SCHEDULES["scaled-linear"]
    alpha, sigma = schedule(timestep_grid(20))
    gain = alpha[:-1] * STD**2 / (alpha[:-1] ** 2 * STD**2 + sigma[:-1] ** 2)
    slope = torch.prod(alpha[1:] * gain + sigma[1:] * (1 - alpha[:-1] * gain) / sigma[:-1]).item()
    found = affine(lambda noise: sample_ddim(ideal(schedule, "noise"), noise, timestep_grid(20), schedule, "noise"))[1]
    assert found == pytest.approx(slope, rel=1e-12)
    assert slope * start_of(schedule)[1] == pytest.approx(0.433619, abs=1e-6)


@pytest.mark.parametrize(("num_steps", "expected"), [(10, 0.3582), (50, 0.4508), (250, 0.4852), (1000, 0.4952)])
def test_ancestral_steps_keep_the_variance_that_their_closed_form_says(num_steps, expected):
    schedule = NOISE_SCHEDULES["scaled-linear"]
    levels = [schedule.level(t) for t in timestep_grid(num_steps)]
    zero, one = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    variance = start_of(schedule)[1] ** 2
    for level, after in itertools.pairwise(levels):
        noisy_variance = level.alpha**2 * STD**2 + level.sigma**2
        clean, noise = (
            level.alpha * STD**2 / noisy_variance * one,
            level.sigma / noisy_variance * one,
        )  # estimates for data of mean 0 at noisy = 1
        slope = ddim_step(clean, noise, level, after, eta=1.0, fresh=zero).item()
        fresh = ddim_step(zero, zero, level, after, eta=1.0, fresh=one).item()
        variance = slope**2 * variance + fresh**2
    assert math.sqrt(variance) == pytest.approx(expected, abs=6e-5)


@pytest.mark.parametrize("name", sorted(NOISE_SCHEDULES))
def test_an_ancestral_step_is_the_posterior_of_the_path(name):
    """q(x_s | x_t, clean): the product of two Gaussians, computed from scratch."""
    schedule = NOISE_SCHEDULES[name]
    level, after = schedule.level(scalar(0.8)), schedule.level(scalar(0.55))
    ratio = level.alpha / after.alpha  # x_t given x_s is N(ratio · x_s, spread)
    spread = level.sigma**2 - ratio**2 * after.sigma**2
    clean, noisy = scalar(0.3), scalar(-1.1)
    variance = 1 / (1 / after.sigma**2 + ratio**2 / spread)
    mean = variance * (after.alpha * clean / after.sigma**2 + ratio * noisy / spread)
    noise = (noisy - level.alpha * clean) / level.sigma
    torch.testing.assert_close(ddim_step(clean, noise, level, after, eta=1.0, fresh=scalar(0.0)), mean)
    added = ddim_step(clean, noise, level, after, eta=1.0, fresh=scalar(1.0)) - mean
    torch.testing.assert_close(added, variance.sqrt())


@pytest.mark.parametrize(("num_steps", "expected"), [(4, 0.3405), (16, 0.4557), (64, 0.4886), (256, 0.4971)])
def test_euler_on_the_straight_path_of_a_gaussian(num_steps, expected):
    schedule = NOISE_SCHEDULES["linear"]
    denoise = ideal(schedule, "velocity")
    mean, std = moments(lambda noise: sample_euler(denoise, noise, timestep_grid(num_steps), schedule, "velocity"))
    assert std == pytest.approx(expected, abs=6e-5)
    assert mean == pytest.approx(MEAN, abs=1e-9)


@pytest.mark.parametrize(("num_steps", "expected"), [(4, 0.5048), (16, 0.5008), (64, 0.50006), (256, 0.500004)])
def test_heun_on_the_straight_path_of_a_gaussian(num_steps, expected):
    schedule = NOISE_SCHEDULES["linear"]
    denoise = ideal(schedule, "velocity")
    mean, std = moments(lambda noise: sample_heun(denoise, noise, timestep_grid(num_steps), schedule, "velocity"))
    assert std == pytest.approx(expected, abs=6e-5)
    assert mean == pytest.approx(MEAN, abs=0.02)


@pytest.mark.parametrize(("shift", "expected"), [(1.0, 0.485), (3.0, 0.472), (5.0, 0.457)])
def test_a_shifted_grid_costs_spread_as_the_closed_form_says(shift, expected):
    schedule = NOISE_SCHEDULES["linear"]
    config = EulerConfig(num_steps=50, timestep_shift=shift)
    std = affine(lambda noise: sample_denoised(config, ideal(schedule, "velocity"), noise, schedule, "velocity", timestep_shift=9.0))[1]
    assert std == pytest.approx(expected, abs=6e-4)


def test_without_a_shift_of_its_own_a_sampler_takes_the_objectives():
    torch.testing.assert_close(EulerConfig(num_steps=7).times(3.0), timestep_grid(7, shift=3.0))
    torch.testing.assert_close(EulerConfig(num_steps=7, timestep_shift=1.0).times(3.0), timestep_grid(7))


@pytest.mark.parametrize("name", ["linear", "cosine", "ddpm-linear"])
@pytest.mark.parametrize(("config", "order"), [(EulerConfig, 1), (DdimConfig, 1), (HeunConfig, 2)])
def test_doubling_the_steps_divides_the_error_by_two_to_the_order(name, config, order):
    schedule = NOISE_SCHEDULES[name]
    denoise = ideal(schedule, "velocity")

    def error(num_steps):
        sampled = moments(
            lambda noise: sample_denoised(config(num_steps=num_steps), denoise, noise, schedule, "velocity"), *start_of(schedule)
        )
        return abs(sampled[1] - STD)

    assert error(256) / error(512) == pytest.approx(2**order, rel=0.1)


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_the_flow_of_a_mixture_is_its_quantile_map(name):
    """In one dimension the exact flow keeps the order of points, hence takes each quantile of the noise to that of the data."""
    schedule, normal = NOISE_SCHEDULES[name], torch.distributions.Normal(0.0, 1.0)
    weights, means, stds = torch.tensor([[0.3, 0.7], [-1.0, 1.5], [0.3, 0.5]], dtype=torch.float64)

    def denoise(noisy, t):
        level = schedule.level(scalar(t))
        variance = level.alpha**2 * stds**2 + level.sigma**2
        residual = noisy - level.alpha * means
        share = (weights.log() - residual**2 / variance / 2 - variance.log() / 2).softmax(-1)
        clean = (share * (means + level.alpha * stds**2 / variance * residual)).sum(-1, keepdim=True)
        noise = (share * level.sigma / variance * residual).sum(-1, keepdim=True)
        return target("velocity", clean, noise, level)

    noise = torch.linspace(-2, 2, 9, dtype=torch.float64).unsqueeze(1)
    found = sample_heun(denoise, noise, timestep_grid(300), schedule, "velocity")
    reached = (weights * normal.cdf((found - means) / stds)).sum(-1, keepdim=True)
    torch.testing.assert_close(reached, normal.cdf(noise), rtol=0, atol=1e-3)


def test_euler_on_the_straight_path_is_a_step_along_the_velocity():
    schedule = NOISE_SCHEDULES["linear"]
    noise = torch.randn(2, 3, 5, generator=Generator().manual_seed(0), dtype=torch.float64)
    times = timestep_grid(6, shift=2.0)

    def denoise(noisy, t):
        return torch.sin(3 * noisy) + t

    noisy = noise
    for t, s in zip(times.tolist(), times.tolist()[1:], strict=False):
        noisy = noisy + (s - t) * denoise(noisy, t)
    torch.testing.assert_close(sample_euler(denoise, noise, times, schedule, "velocity"), noisy)


def test_ddim_is_euler_in_rescaled_variables():
    schedule = NOISE_SCHEDULES["ddpm-linear"]
    noise = torch.randn(2, 7, generator=Generator().manual_seed(0), dtype=torch.float64)
    times = timestep_grid(9)

    def denoise(noisy, t):
        return torch.tanh(noisy) * (1 + t)

    rescaled = noise / schedule(scalar(1.0))[0]
    for t, s in itertools.pairwise(times):
        (alpha, sigma), (alpha_after, sigma_after) = schedule(t), schedule(s)
        rescaled = rescaled + (sigma_after / alpha_after - sigma / alpha) * denoise(alpha * rescaled, t.item())
    torch.testing.assert_close(sample_ddim(denoise, noise, times, schedule, "noise"), rescaled, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", sorted(NOISE_SCHEDULES))
@pytest.mark.parametrize("config", [EulerConfig(num_steps=6), DdimConfig(num_steps=6, eta=0.7), HeunConfig(num_steps=6)])
def test_what_is_predicted_does_not_matter_to_an_ideal_denoiser(name, config):
    schedule = NOISE_SCHEDULES[name]
    noise = sample_normals([sample_generator(0, key) for key in "abc"], (2,)).double()

    def run(predict):
        generators = [sample_generator(1, key) for key in "abc"]
        return sample_denoised(config, ideal(schedule, predict), noise, schedule, predict, generators=generators)

    by_velocity = run("velocity")
    assert by_velocity.isfinite().all()
    if name == "linear":  # at t = 1 there is nothing of the data in the input: predicted noise cannot say what is clean
        assert run("noise").isfinite().all()
    else:
        torch.testing.assert_close(run("noise"), by_velocity, rtol=1e-6, atol=1e-6)
    if config.kind == "heun":  # predicted clean data have no velocity at t = 0, so the last step is first order
        assert run("clean").isfinite().all()
    else:
        torch.testing.assert_close(run("clean"), by_velocity, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", sorted(NOISE_SCHEDULES))
@pytest.mark.parametrize("config", [EulerConfig(num_steps=3), DdimConfig(num_steps=3, eta=1.0), HeunConfig(num_steps=3)])
def test_data_at_a_single_point_are_found_from_any_noise(name, config):
    point = torch.tensor([0.25, -0.75])
    noise = sample_normals([sample_generator(0, key) for key in "abc"], (2,))
    generators = [sample_generator(1, key) for key in "abc"]
    found = sample_denoised(config, lambda noisy, t: point.expand_as(noisy), noise, NOISE_SCHEDULES[name], "clean", generators=generators)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, point.expand(3, 2))


def test_a_clipped_estimate_keeps_a_wild_network_in_range():
    noise = sample_normals([sample_generator(0, "a")], (4,))
    for config in (EulerConfig(num_steps=5, clip=1.0), HeunConfig(num_steps=5, clip=1.0)):
        found = sample_denoised(config, lambda noisy, t: -40 * noisy, noise, NOISE_SCHEDULES["cosine"], "noise")
        assert found.abs().max() <= 1


def test_fresh_noise_needs_a_generator_for_each_sample():
    with pytest.raises(ValueError, match="one generator for each of 2"):
        sample_ddim(lambda noisy, t: noisy, torch.zeros(2, 3), timestep_grid(2), NOISE_SCHEDULES["cosine"], "noise", eta=1.0)


def test_a_sample_does_not_depend_on_its_batch():
    schedule = NOISE_SCHEDULES["scaled-linear"]

    def run(keys):
        noise = sample_normals([sample_generator(5, key, "start") for key in keys], (2, 3))
        generators = [sample_generator(5, key, "steps") for key in keys]
        return sample_ddim(ideal(schedule, "noise"), noise, timestep_grid(4), schedule, "noise", eta=1.0, generators=generators)

    assert torch.equal(run(["a", "b", "c"])[1], run(["b"])[0])


# ---- guidance


def test_guidance_one_is_the_condition_and_zero_is_none_to_the_bit():
    uncond, cond = torch.randn(2, 3, 7, generator=Generator().manual_seed(0))
    assert torch.equal(guided(uncond, cond, 1.0), cond)
    assert torch.equal(guided(uncond, cond, 0.0), uncond)
    torch.testing.assert_close(guided(uncond, cond, 4.5), uncond + 4.5 * (cond - uncond))


def test_guidance_moves_a_gaussian_to_the_extrapolated_mean():
    """Scores of two Gaussians of one width: guidance 3 between means 0 and 1 samples the Gaussian at 3."""
    schedule = NOISE_SCHEDULES["linear"]
    uncond, cond = ideal(schedule, "velocity", mean=0.0), ideal(schedule, "velocity", mean=1.0)
    mean, std = moments(
        lambda noise: sample_heun(
            lambda noisy, t: guided(uncond(noisy, t), cond(noisy, t), 3.0), noise, timestep_grid(800), schedule, "velocity"
        )
    )
    assert mean == pytest.approx(3.0, abs=1e-3)
    assert std == pytest.approx(0.5, abs=1e-4)


VALUES = {frozenset(): 4.0, frozenset({"text"}): 1.0, frozenset({"image"}): 2.0, frozenset({"text", "image"}): 0.0}  # f, i, t, u


def combined(config, groups=("text", "image"), t=None):
    guide = config.guide(groups)
    value = guide.combine([torch.full((1, 1), VALUES[drop]) for drop in guide.passes(t)])
    return value.item()


def table(kind, *terms, **keys):
    return SAMPLERS["euler"](guidance={"kind": kind, "terms": [{"drop": drop, "scale": scale} for drop, scale in terms], **keys})


def test_two_conditions_additive_and_nested():
    additive = (["text", "image"], 1.0), (["text"], 1.5), ([], 4.0)
    assert combined(table("additive", *additive)) == 13.5
    nested = (["text"], 4.0), (["image"], 1.5)
    assert combined(table("nested", *nested)) == 18.5
    assert combined(table("nested", *nested, renorm="global")) == pytest.approx(4.0)


def test_scales_of_one_are_the_full_condition_in_one_pass_if_nested():
    config = table("nested", (["text"], 1.0), (["image"], 1.0), renorm="global")
    assert config.guide(["text", "image"]).passes() == (frozenset(),)
    assert combined(config) == 4.0
    assert combined(table("additive", (["text", "image"], 1.0), (["text"], 1.0), ([], 1.0))) == 4.0
    assert SamplerConfig(kind="euler").guide(["text"]).passes() == (frozenset(),)


def test_a_term_for_conditions_that_a_task_lacks_is_left_out():
    """f = 1, u = 0.2, scales 4 and 1.5: 3.4. Counting the full condition a second time would give 4.6."""
    guide = table("nested", (["text"], 4.0), (["image"], 1.5)).guide(["text"])
    assert guide.passes() == (frozenset(), frozenset({"text"}))
    assert guide.combine([torch.tensor([1.0]), torch.tensor([0.2])]).item() == pytest.approx(3.4)
    only_text = table("additive", (["text", "image"], 1.0), (["text"], 1.5), ([], 4.0)).guide(["text"])
    assert only_text.combine([torch.tensor([1.0]), torch.tensor([0.2])]).item() == pytest.approx(3.4)


def test_a_condition_that_has_not_come_yet_pulls_nowhere():
    """f = 1 also without the picture that is not there yet, u = 0.2: 3.4 as if there were no second term."""
    outputs = [torch.tensor([value]) for value in (1.0, 0.2, 1.0)]
    nested = table("nested", (["text"], 4.0), (["image"], 1.5)).guide(["text", "image"])
    assert nested.after({"text"}).combine(outputs).item() == pytest.approx(3.4)
    assert nested.after({"text", "image"}) == nested
    additive = table("additive", (["text", "image"], 1.0), (["text"], 1.5), ([], 4.0)).guide(["text", "image"])
    outputs = [torch.tensor([{True: 0.2, False: 1.0}["text" in drop]]) for drop in additive.drops]
    assert additive.after({"text"}).combine(outputs).item() == pytest.approx(3.4)


def test_one_scale_drops_every_group_at_once():
    guide = EulerConfig(guidance_scale=3.0).guide(["image", "text"])
    assert guide.passes() == (frozenset(), frozenset({"image", "text"}))
    assert combined(EulerConfig(guidance_scale=3.0)) == 12.0
    assert EulerConfig(guidance_scale=3.0).guide([]).passes() == (frozenset(),)


def test_an_interval_is_open_below_and_costs_nothing_outside():
    config = table("nested", (["text"], 4.0), interval=(0.4, 1.0))
    guide = config.guide(["text"])
    times = timestep_grid(49, shift=3.0)[:-1].tolist()
    assert sum(len(guide.passes(t)) == 2 for t in times) == 41
    assert len(guide.passes(0.4)) == 1
    assert combined(config, ["text"], t=0.3) == 4.0
    assert combined(config, ["text"], t=1.0) == 13.0


def test_renormalisation_never_raises_the_norm_and_is_per_sample_or_per_token():
    value = torch.randn(2, 3, 5, generator=Generator().manual_seed(0))
    full = torch.randn(2, 3, 5, generator=Generator().manual_seed(1))
    whole, tokens = renormalised(3 * value, full, "global"), renormalised(3 * value, full, "channel")
    torch.testing.assert_close(whole.flatten(1).norm(dim=1), full.flatten(1).norm(dim=1))
    torch.testing.assert_close(tokens.norm(dim=2), torch.minimum(full.norm(dim=2), 3 * value.norm(dim=2)))
    torch.testing.assert_close(renormalised(3 * value, full, "global")[:1], renormalised(3 * value[:1], full[:1], "global"))
    assert torch.equal(renormalised(full, full, "global"), full)
    assert renormalised(torch.zeros(1, 2, 3), full[:1, :2, :3], "channel").isfinite().all()


# ---- ids from logits


def test_ids_come_with_exactly_their_probabilities():
    """Inverse sampling at evenly spaced uniform numbers counts each id as often as its probability says, to one in a row."""
    logits = torch.tensor([0.5, -1.0, 2.0, -torch.inf, 0.0])
    count = 10_000
    uniforms = (torch.arange(count) + 0.5) / count
    ids = sample_logits(logits.expand(count, -1), uniforms, temperature=0.7)
    expected = (logits / 0.7).softmax(0) * count
    assert ((torch.bincount(ids, minlength=5) - expected).abs() <= 1).all()
    assert (ids != 3).all()


def test_random_ids_follow_the_filtered_distribution():
    logits = torch.randn(1, 11, generator=Generator().manual_seed(2)).expand(60_000, -1)
    uniforms = torch.rand(60_000, generator=Generator().manual_seed(3))
    ids = sample_logits(logits, uniforms, temperature=1.3, top_k=7, top_p=0.8)
    probabilities = keep_top_p(keep_top_k(logits[:1] / 1.3, 7), 0.8).softmax(-1)[0]
    kept = probabilities > 0
    frequencies = torch.bincount(ids, minlength=11) / len(ids)
    assert (frequencies[~kept] == 0).all()
    deviation = (frequencies - probabilities)[kept] / (probabilities * (1 - probabilities) / len(ids)).sqrt()[kept]
    assert deviation.abs().max() < 4


def test_top_p_keeps_the_smallest_set_that_reaches_the_mass():
    logits = torch.tensor([[0.1, 0.4, 0.2, 0.3]]).log()
    assert keep_top_p(logits, 0.69).isfinite().tolist() == [[False, True, False, True]]
    assert keep_top_p(logits, 0.71).isfinite().tolist() == [[False, True, True, True]]
    assert keep_top_p(logits, 1e-6).isfinite().tolist() == [[False, True, False, False]]


def test_top_k_larger_than_the_vocabulary_keeps_all():
    logits = torch.tensor([[1.0, 3.0, 2.0]])
    assert keep_top_k(logits, 2).isfinite().tolist() == [[False, True, True]]
    assert torch.equal(keep_top_k(logits, 9), logits)


def test_temperature_zero_takes_the_likeliest_and_top_one_too():
    logits = torch.randn(6, 9, generator=Generator().manual_seed(0))
    uniforms = torch.rand(6, generator=Generator().manual_seed(1))
    assert torch.equal(sample_logits(logits, uniforms, temperature=0), logits.argmax(-1))
    assert torch.equal(sample_logits(logits, uniforms, temperature=1e-300), logits.argmax(-1))  # no division that overflows
    assert torch.equal(sample_logits(logits, uniforms, top_k=1), logits.argmax(-1))


def test_extreme_uniform_numbers_never_pick_an_impossible_id():
    logits = torch.full((2, 4), -torch.inf)
    logits[:, 1:3] = torch.tensor([[5.0, -90.0], [0.0, 0.0]])
    for uniform in (0.0, 1 - 2**-24):
        ids = sample_logits(logits, torch.full((2,), uniform))
        assert set(ids.tolist()) <= {1, 2}


def test_a_row_draws_the_same_id_in_any_batch():
    logits = torch.randn(5, 13, generator=Generator().manual_seed(0))
    uniforms = sample_uniforms([sample_generator(0, str(key)) for key in range(5)])
    config = AutoregressiveConfig(temperature=0.9, top_k=6, top_p=0.95)
    together = config.choose(logits, uniforms)
    assert [config.choose(logits[i : i + 1], uniforms[i : i + 1]).item() for i in range(5)] == together.tolist()


# ---- masked decoding


def test_masked_decoding_reveals_each_code_once_and_finishes_on_the_last_round():
    seen = []

    def predict(codes, hidden):
        seen.append((codes.clone(), hidden.clone()))
        generator = Generator().manual_seed(len(seen))
        return torch.randn(2, 17, 5, generator=generator)

    codes = masked_decode(predict, 17, [sample_generator(0, key) for key in "ab"], num_steps=6)
    assert [hidden.sum(1).tolist() for _, hidden in seen] == [[n, n] for n in [17, *hidden_counts("cosine", 6, 17)[:-1]]]
    seen.append((codes, torch.zeros(2, 17, dtype=torch.bool)))
    for (before, hidden), (after, still) in itertools.pairwise(seen):
        assert (still <= hidden).all()  # nothing is hidden again
        assert torch.equal(before[~hidden], after[~hidden])  # nothing shown changes
        assert (after[still] == 0).all()
    assert codes.shape == (2, 17)
    assert codes.dtype == torch.int64


def test_a_certain_network_is_obeyed():
    truth = torch.randint(0, 6, (3, 10), generator=Generator().manual_seed(0))
    logits = 40.0 * torch.nn.functional.one_hot(truth, 6)
    generators = [sample_generator(0, key) for key in "abc"]
    assert torch.equal(MaskedConfig(num_steps=4).sample(lambda codes, hidden: logits, 10, generators), truth)


def test_without_noise_the_most_confident_codes_come_first():
    confidence = torch.tensor([0.1, 0.9, 0.5, 0.7, 0.3])
    order = []

    def predict(codes, hidden):
        order.append((~hidden[0]).nonzero().flatten().tolist())
        return torch.stack([confidence.expand(1, 5), torch.zeros(1, 5)], dim=-1) * 5

    masked_decode(predict, 5, [sample_generator(0, "a")], num_steps=5, schedule="linear", temperature=0, choice_temperature=0)
    assert order == [[], [1], [1, 3], [1, 2, 3], [1, 2, 3, 4]]


def test_two_certain_but_dependent_codes_agree_only_if_decoded_in_two_rounds():
    """Codes (0, 0) and (1, 1) are equally likely. In one round they are drawn apart; in two the second sees the first."""

    def predict(codes, hidden):
        other_known = ~hidden.flip(1)
        certain = 50.0 * torch.nn.functional.one_hot(codes.flip(1), 2)
        return torch.where(other_known.unsqueeze(-1), certain, torch.zeros(2))

    generators = [sample_generator(0, str(key)) for key in range(400)]
    codes = masked_decode(predict, 2, generators, num_steps=2)
    assert torch.equal(codes[:, 0], codes[:, 1])
    assert codes.float().mean().item() == pytest.approx(0.5, abs=0.1)
    apart = masked_decode(predict, 2, generators, num_steps=1)
    assert (apart[:, 0] == apart[:, 1]).float().mean().item() == pytest.approx(0.5, abs=0.1)


def test_more_rounds_than_codes_cost_no_extra_predictions():
    calls = []

    def predict(codes, hidden):
        calls.append(hidden.sum().item())
        return torch.zeros(1, 3, 4)

    codes = masked_decode(predict, 3, [sample_generator(0, "a")], num_steps=12, schedule="linear")
    assert calls == [3, 2, 1]
    assert codes.shape == (1, 3)


def test_a_masked_sample_does_not_depend_on_its_batch():
    def predict(codes, hidden):
        position = torch.arange(codes.shape[1]).unsqueeze(-1) * torch.arange(7)
        return torch.sin(position + codes.sum(1)[:, None, None]) * 2

    def run(keys):
        return masked_decode(predict, 9, [sample_generator(0, key) for key in keys], num_steps=4, choice_temperature=3.0)

    assert torch.equal(run("xyz")[1], run("y")[0])


def test_cumulative_annealing_is_the_running_product_of_the_linear_factors():
    assert annealing_factors("linear", 4) == [0.75, 0.5, 0.25, 0.0]
    expected = [0.917, 0.764, 0.573, 0.382, 0.223, 0.111, 0.046]
    assert annealing_factors("cumulative", 12)[:7] == pytest.approx(expected, abs=6e-4)
    assert annealing_factors("cumulative", 12)[-1] == 0


# ---- randomness of a sample


def test_a_generator_depends_on_seed_key_and_stream_and_on_nothing_else():
    def first(*name):
        return torch.rand(4, generator=sample_generator(*name)).tolist()

    names = [(0, "a"), (1, "a"), (0, "b"), (0, "a", "noise"), (0, "a", 1), (0, "a", "1"), (0, "a1")]
    assert len({tuple(first(*name)) for name in names}) == len(names)
    assert first(0, "a", "noise") == first(0, "a", "noise")


def test_blocks_of_noise_are_drawn_row_by_row():
    both = sample_normals([sample_generator(0, "a"), sample_generator(0, "b")], (2, 3), like=torch.zeros(0, dtype=torch.float64))
    assert both.dtype == torch.float64
    torch.testing.assert_close(both[1], torch.randn(2, 3, generator=sample_generator(0, "b")).double())
    uniforms = sample_uniforms([sample_generator(0, "a"), sample_generator(0, "b")])
    assert uniforms.shape == (2,)


# ---- the family


def test_a_recipe_table_becomes_its_samplers_config():
    config = parse_part(SAMPLERS, {"kind": "masked", "num_steps": 18, "mask_schedule": "cosine", "guidance_scale": 6.0}, "sample.codes")
    assert config == MaskedConfig(num_steps=18, guidance_scale=6.0)
    with pytest.raises(RecipeError, match=r"sample\.codes\.mask_schedule: .*'cosin'.*'cosine'"):
        parse_part(SAMPLERS, {"kind": "masked", "mask_schedule": "cosin"}, "sample.codes")
    with pytest.raises(RecipeError, match=r"not both"):
        parse_part(SAMPLERS, {"kind": "euler", "guidance_scale": 2.0, "guidance": {"terms": [{"drop": ["text"]}]}}, "sample.draw")
    with pytest.raises(RecipeError, match=r"sample\.draw\.eta"):
        parse_part(SAMPLERS, {"kind": "euler", "eta": 1.0}, "sample.draw")


@pytest.mark.parametrize("kind", sorted(SAMPLERS))
def test_every_sampler_has_defaults_and_guidance_off(kind):
    config = parse_part(SAMPLERS, {"kind": kind}, "sample.x")
    assert config.kind == kind
    assert config.guide(["text"]).passes() == (frozenset(),)
