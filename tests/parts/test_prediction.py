"""Conversions between what a denoiser may predict: inverses, published formulas, error identities, and both ends of the path."""

import pytest
import torch
from torch import Generator

from stages.parts.prediction import (
    clean_to_noise,
    estimates,
    noise_to_clean,
    target,
    velocity,
    velocity_to_clean,
    velocity_to_noise,
)
from stages.parts.schedules import NOISE_SCHEDULES

ALL = sorted(NOISE_SCHEDULES)
PREDICTIONS = ("noise", "velocity", "clean")


def pair(rows=3, channels=5, seed=0):
    generator = Generator().manual_seed(seed)
    clean = torch.randn(rows, channels, generator=generator, dtype=torch.float64)
    return clean, torch.randn(rows, channels, generator=generator, dtype=torch.float64)


def times(*values):
    return torch.tensor(values, dtype=torch.float64).unsqueeze(1)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("predict", PREDICTIONS)
def test_a_perfect_prediction_gives_back_clean_and_noise(name, predict):
    clean, noise = pair()
    level = NOISE_SCHEDULES[name].level(times(0.07, 0.5, 0.93))
    noisy = level.alpha * clean + level.sigma * noise
    found = estimates(predict, target(predict, clean, noise, level), noisy, level)
    torch.testing.assert_close(found, (clean, noise), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("predict", PREDICTIONS)
def test_the_estimates_of_any_prediction_explain_the_noisy_input(name, predict):
    guess, noisy = pair(seed=4)
    level = NOISE_SCHEDULES[name].level(times(0.07, 0.5, 0.93))
    clean, noise = estimates(predict, guess, noisy, level)
    torch.testing.assert_close(level.alpha * clean + level.sigma * noise, noisy, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(target(predict, clean, noise, level), guess, rtol=1e-9, atol=1e-9)


def test_velocity_is_noise_minus_clean_on_the_line_and_v_on_the_circle():
    clean, noise = pair()
    t = times(0.2, 0.6, 1.0)
    torch.testing.assert_close(velocity(clean, noise, NOISE_SCHEDULES["linear"].level(t)), noise - clean)
    alpha, sigma = NOISE_SCHEDULES["cosine"](t)
    torch.testing.assert_close(velocity(clean, noise, NOISE_SCHEDULES["cosine"].level(t)), alpha * noise - sigma * clean)


def test_the_published_inverses_of_velocity():
    predicted, noisy = pair()
    t = times(0.2, 0.6, 0.9)
    line = NOISE_SCHEDULES["linear"].level(t)
    torch.testing.assert_close(velocity_to_clean(predicted, noisy, line), noisy - t * predicted)
    torch.testing.assert_close(velocity_to_noise(predicted, noisy, line), noisy + (1 - t) * predicted)
    circle = NOISE_SCHEDULES["ddpm-linear"].level(t)
    torch.testing.assert_close(velocity_to_clean(predicted, noisy, circle), circle.alpha * noisy - circle.sigma * predicted)
    torch.testing.assert_close(velocity_to_noise(predicted, noisy, circle), circle.sigma * noisy + circle.alpha * predicted)


@pytest.mark.parametrize("name", ALL)
def test_errors_of_the_three_predictions_are_multiples_of_each_other(name):
    clean, noise = pair()
    wrong = clean + 0.1 * pair(seed=9)[0]
    level = NOISE_SCHEDULES[name].level(times(0.1, 0.4, 0.8))
    noisy = level.alpha * clean + level.sigma * noise
    clean_error = (wrong - clean).square().sum(1, keepdim=True)
    wrong_noise = clean_to_noise(wrong, noisy, level)
    snr = (level.alpha / level.sigma) ** 2
    torch.testing.assert_close((wrong_noise - noise).square().sum(1, keepdim=True), snr * clean_error)
    velocity_error = (velocity(wrong, wrong_noise, level) - velocity(clean, noise, level)).square().sum(1, keepdim=True)
    torch.testing.assert_close(velocity_error, clean_error / level.sigma**2)  # on the circle 1 / sigma² is SNR + 1


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("predict", PREDICTIONS)
def test_both_ends_of_the_path_are_finite_and_right_for_a_perfect_network(name, predict):
    clean, noise = pair(rows=2)
    level = NOISE_SCHEDULES[name].level(times(0.0, 1.0))
    noisy = level.alpha * clean + level.sigma * noise
    found_clean, found_noise = estimates(predict, target(predict, clean, noise, level), noisy, level)
    assert found_clean.isfinite().all()
    assert found_noise.isfinite().all()
    torch.testing.assert_close(level.alpha * found_clean + level.sigma * found_noise, noisy, rtol=1e-9, atol=1e-9)


def test_the_smallest_divisor_touches_no_published_table():
    for name in ("cosine", "ddpm-linear", "scaled-linear"):
        clean, noise = pair(rows=1)
        level = NOISE_SCHEDULES[name].level(times(1.0))
        torch.testing.assert_close(noise_to_clean(noise, level.alpha * clean + level.sigma * noise, level), clean, rtol=1e-6, atol=1e-9)
        level = NOISE_SCHEDULES[name].level(times(0.001))
        torch.testing.assert_close(clean_to_noise(clean, level.alpha * clean + level.sigma * noise, level), noise, rtol=1e-6, atol=1e-9)
