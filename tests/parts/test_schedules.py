"""Noise schedules, timestep draws and mask schedules against published tables and closed forms."""

import itertools
import math

import pytest
import torch
from torch import Generator

from stages.parts.schedules import (
    MASK_SCHEDULES,
    NOISE_SCHEDULES,
    TIMESTEP_DISTRIBUTIONS,
    draw_timesteps,
    hidden_counts,
    num_hidden,
    shift_timestep,
    timestep_grid,
)

ALL = sorted(NOISE_SCHEDULES)
TABLES = {  # betas of the published tables, T = 1000
    "ddpm-linear": torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64),
    "scaled-linear": torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2,
}


def doubles(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("name", sorted(TABLES))
def test_the_table_is_met_at_every_entry(name):
    alpha, sigma = NOISE_SCHEDULES[name](torch.arange(1, 1001, dtype=torch.float64) / 1000)
    alpha_bar = torch.cumprod(1 - TABLES[name], 0)
    torch.testing.assert_close(alpha**2, alpha_bar, rtol=1e-12, atol=0)
    torch.testing.assert_close(sigma**2, 1 - alpha_bar, rtol=1e-10, atol=0)


def test_cosine_is_its_table_at_every_entry_and_the_last_beta_is_capped():
    cosine = torch.cos((torch.arange(1001, dtype=torch.float64) / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2
    alpha_bar = torch.cumprod(1 - (1 - cosine[1:] / cosine[:-1]).clamp(max=0.999), 0)
    alpha, _ = NOISE_SCHEDULES["cosine"](torch.arange(1, 1001, dtype=torch.float64) / 1000)
    torch.testing.assert_close(alpha**2, alpha_bar, rtol=1e-9, atol=0)


@pytest.mark.parametrize(
    ("name", "alpha_bar"), [("scaled-linear", 0.0046601), ("ddpm-linear", 4.036e-5), ("cosine", 2.43e-9), ("linear", 0)]
)
def test_signal_left_at_pure_noise(name, alpha_bar):
    alpha, _ = NOISE_SCHEDULES[name](doubles(1.0))
    assert alpha.item() ** 2 == pytest.approx(alpha_bar, rel=2e-3)


@pytest.mark.parametrize(("name", "entries"), [("ddpm-linear", 259), ("cosine", 496)])
def test_number_of_entries_with_more_signal_than_noise(name, entries):
    alpha, _ = NOISE_SCHEDULES[name](torch.arange(1, 1001, dtype=torch.float64) / 1000)
    assert (alpha**2 > 0.5).sum() == entries


@pytest.mark.parametrize("name", ALL)
def test_every_schedule_starts_clean_and_loses_signal_all_the_way(name):
    schedule = NOISE_SCHEDULES[name]
    alpha, sigma = schedule(torch.linspace(0, 1, 777, dtype=torch.float64))
    assert alpha[0] == 1
    assert sigma[0] == 0
    assert (alpha.diff() < 0).all()
    assert (sigma.diff() > 0).all() or name == "cosine"  # on the cosine's end sigma is 1 to rounding
    assert (sigma.diff() >= 0).all()
    total = alpha + sigma if schedule.path == "line" else alpha**2 + sigma**2
    torch.testing.assert_close(total, torch.ones_like(total), rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", ALL)
def test_rates_are_the_derivatives_along_the_path(name):
    schedule = NOISE_SCHEDULES[name]
    t = doubles(0.05, 0.3333, 0.71, 0.9)
    here, ahead = schedule.level(t), schedule.level(t + 1e-6)
    step = ahead.place - here.place
    torch.testing.assert_close((ahead.alpha - here.alpha) / step, here.alpha_rate, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close((ahead.sigma - here.sigma) / step, here.sigma_rate, rtol=1e-4, atol=1e-5)
    determinant = here.alpha * here.sigma_rate - here.sigma * here.alpha_rate
    torch.testing.assert_close(determinant, torch.ones_like(determinant), rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", ALL)
def test_coefficients_keep_shape_and_dtype_and_are_accurate_near_clean(name):
    t = torch.tensor([[1e-5, 1e-3, 0.5]])
    alpha, sigma = NOISE_SCHEDULES[name](t)
    assert alpha.dtype == sigma.dtype == torch.float32
    assert sigma.shape == (1, 3)
    exact = NOISE_SCHEDULES[name](t.double())
    torch.testing.assert_close(sigma.double(), exact[1], rtol=1e-7, atol=0)


def test_shift_moves_log_snr_by_twice_the_logarithm_on_the_straight_path():
    t = torch.linspace(0.01, 0.99, 37, dtype=torch.float64)

    def log_snr(time):
        alpha, sigma = NOISE_SCHEDULES["linear"](time)
        return 2 * (alpha / sigma).log()

    moved = log_snr(shift_timestep(t, 3.0)) - log_snr(t)
    torch.testing.assert_close(moved, torch.full_like(t, -2 * math.log(3)), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("shift", [0.1, 0.7, 1.0, 3.0, 7.0])
def test_shift_fixes_both_ends_exactly_and_is_undone_by_its_inverse(shift):
    t = torch.linspace(0, 1, 19, dtype=torch.float64)
    shifted = shift_timestep(t, shift)
    assert shifted[0] == 0
    assert shifted[-1] == 1
    torch.testing.assert_close(shift_timestep(shifted, 1 / shift), t, rtol=1e-12, atol=1e-15)


def test_the_grid_of_eleven_times_with_shift_three():
    expected = doubles(1, 0.9643, 0.9231, 0.875, 0.8182, 0.75, 0.6667, 0.5625, 0.4286, 0.25, 0)
    torch.testing.assert_close(timestep_grid(10, shift=3.0), expected, rtol=0, atol=5e-5)


def test_the_unshifted_grid_is_trailing_spacing_of_a_table():
    entries = timestep_grid(50)[:-1] * 1000 - 1
    torch.testing.assert_close(entries, torch.arange(999, -1, -20, dtype=torch.float64), rtol=0, atol=1e-9)


def test_a_grid_without_steps_is_refused():
    with pytest.raises(ValueError, match="found 0"):
        timestep_grid(0)


def test_uniform_and_logit_normal_draws_have_their_moments():
    for kind, variance in {"uniform": 1 / 12, "logit-normal": 0.0434}.items():
        drawn = TIMESTEP_DISTRIBUTIONS[kind](200_000, Generator().manual_seed(3))
        assert drawn.mean().item() == pytest.approx(0.5, abs=0.003)
        assert drawn.var().item() == pytest.approx(variance, rel=0.01)


def test_drawn_timesteps_are_shifted_never_clean_and_repeat_with_the_generator():
    first = draw_timesteps("logit-normal", 1000, Generator().manual_seed(1), shift=3.0)
    again = draw_timesteps("logit-normal", 1000, Generator().manual_seed(1))
    assert first.dtype == torch.float32
    assert (first > 0).all()
    assert (first <= 1).all()
    torch.testing.assert_close(first, shift_timestep(again.double(), 3.0).float())


def test_cosine_mask_sizes_in_training():
    assert [num_hidden("cosine", u, 64) for u in (0, 0.25, 0.5, 0.75, 0.99)] == [64, 59, 45, 24, 1]
    assert num_hidden("linear", 0.25, 64) == 48
    assert num_hidden("square", 0.5, 64) == 48
    assert num_hidden("linear", 0.999, 5) == 1


def test_cosine_counts_in_decoding():
    assert hidden_counts("cosine", 12, 256) == [253, 247, 236, 221, 203, 181, 155, 128, 97, 66, 33, 0]
    assert hidden_counts("cosine", 8, 64) == [62, 59, 53, 45, 35, 24, 12, 0]


@pytest.mark.parametrize("schedule", sorted(MASK_SCHEDULES))
@pytest.mark.parametrize(("num_steps", "num_tokens"), [(1, 7), (5, 7), (7, 7), (12, 7), (3, 1)])
def test_decoding_counts_fall_until_one_is_left_and_end_at_zero(schedule, num_steps, num_tokens):
    counts = [num_tokens, *hidden_counts(schedule, num_steps, num_tokens)]
    assert len(counts) == num_steps + 1
    assert counts[-1] == 0
    assert all(after < before or after == before == 1 for before, after in itertools.pairwise(counts))


def test_a_mask_schedule_hides_all_at_first_and_nothing_at_last():
    for ratio in MASK_SCHEDULES.values():
        assert ratio(0.0) == 1
        assert ratio(1.0) == pytest.approx(0, abs=1e-15)
