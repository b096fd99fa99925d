"""Row objectives: what they hide, what they judge, where they read, and what perfect answers cost."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Generator, Tensor

from stages.parts.objectives import DenoiseConfig, MaskedTokenConfig, NextTokenConfig
from stages.parts.objectives.next_token import cross_entropy
from stages.parts.prediction import target
from stages.parts.schedules import NOISE_SCHEDULES, num_hidden
from stages.sequence.pack import pack
from stages.sequence.segment import MaskKind, PortRows, Role, Segment, Sequence

CONTEXT, TARGET = Role.CONTEXT, Role.TARGET


def generator(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed))


def rows_of(*samples: list[Segment], port: str = "p") -> PortRows:
    return pack([Sequence(key=str(n), task="t", segments=tuple(s)) for n, s in enumerate(samples)]).ports[port]


def ids(values: list[int], role: Role = TARGET, port: str = "p") -> Segment:
    return Segment(port=port, payload=torch.tensor(values), grid=(len(values),), role=role)


def codes(h: int, w: int, role: Role = TARGET, start: int = 0) -> Segment:
    return Segment(port="p", payload=torch.arange(start, start + h * w), grid=(h, w), role=role, mask=MaskKind.FULL)


def latents(h: int, w: int, role: Role = TARGET, seed: int = 0, channels: int = 5, span: tuple[float, float] = (0.0, 1.0)) -> Segment:
    payload = noise(h * w, channels, seed=seed)
    return Segment(port="p", payload=payload, grid=(h, w), role=role, mask=MaskKind.FULL, timestep_range=span)


# next token


def test_the_last_prompt_token_predicts_the_first_answer_token() -> None:
    rows = NextTokenConfig().corrupt(rows_of([ids([5, 6, 7], CONTEXT), ids([8, 9])]), generator())
    assert rows.read is not None
    assert rows.goal is not None
    assert rows.supervised is not None
    assert rows.supervised.tolist() == [False, False, False, True, True]
    assert rows.read[rows.supervised].tolist() == [2, 3]
    assert rows.goal[rows.supervised].tolist() == [8, 9]
    assert torch.equal(rows.values, torch.tensor([5, 6, 7, 8, 9]))  # nothing is hidden from the network


def test_the_first_token_of_a_sample_has_no_row_before_it_and_is_not_judged() -> None:
    rows = NextTokenConfig().corrupt(rows_of([ids([5, 6, 7])], [ids([8, 9])]), generator())
    assert rows.supervised is not None
    assert rows.supervised.tolist() == [False, True, True, False, True]


def test_a_token_is_read_at_the_row_before_it_also_when_that_row_is_another_ports() -> None:
    picture = Segment(port="picture", payload=torch.zeros(6, dtype=torch.int64), grid=(2, 3), mask=MaskKind.FULL)
    rows = NextTokenConfig().corrupt(rows_of([ids([5], CONTEXT), picture, ids([8, 9])]), generator())
    assert rows.read is not None
    assert rows.read.tolist() == [-1, 6, 7]


def test_cross_entropy_is_in_nats_and_smallest_at_the_right_answer() -> None:
    uniform = torch.zeros(3, 7)
    goal = torch.tensor([0, 3, 6])
    torch.testing.assert_close(cross_entropy(uniform, goal), torch.full((3,), math.log(7)))
    certain = torch.full((3, 7), -50.0).scatter(1, goal[:, None], 50.0)
    assert float(cross_entropy(certain, goal).max()) < 1e-6


def test_z_loss_adds_the_square_of_the_log_normaliser() -> None:
    logits, goal = noise(4, 7), torch.tensor([0, 2, 4, 6])
    added = NextTokenConfig(z_loss=0.25).loss(logits, goal) - NextTokenConfig().loss(logits, goal)
    torch.testing.assert_close(added, 0.25 * logits.exp().sum(dim=1).log().square(), atol=1e-5, rtol=1e-5)


# masked token


@given(st.integers(0, 200), st.sampled_from(["cosine", "linear", "square"]))
def test_only_hidden_codes_are_judged_and_only_targets_are_hidden(seed: int, schedule: str) -> None:
    clean = rows_of([codes(2, 3), codes(1, 4, CONTEXT)], [codes(3, 2, start=20)])
    rows = MaskedTokenConfig(mask_ratio=schedule).corrupt(clean, generator(seed), mask_id=99)  # type: ignore[arg-type]
    assert rows.supervised is not None
    assert rows.goal is not None
    hidden = rows.values == 99
    assert torch.equal(hidden, rows.supervised)
    assert not (hidden & ~clean.target).any()
    assert torch.equal(rows.values[~hidden], clean.values[~hidden])
    assert torch.equal(rows.goal, clean.values)
    assert torch.equal(rows.read, clean.rows)  # type: ignore[arg-type]


@given(st.integers(0, 200), st.sampled_from(["cosine", "linear", "square"]))
def test_each_segment_hides_as_many_codes_as_its_own_draw_says(seed: int, schedule: str) -> None:
    clean = rows_of([codes(2, 3), codes(5, 4, start=30)], [codes(1, 1, start=70)])
    draws = torch.rand(3, generator=generator(seed)).tolist()
    rows = MaskedTokenConfig(mask_ratio=schedule).corrupt(clean, generator(seed), mask_id=99)  # type: ignore[arg-type]
    counts = torch.bincount(clean.segment, weights=(rows.values == 99).double(), minlength=3).tolist()
    assert counts == [num_hidden(schedule, u, size) for u, size in zip(draws, [6, 20, 1], strict=True)]


def test_every_place_of_a_picture_is_hidden_equally_often() -> None:
    clean = rows_of([codes(2, 3)])
    objective = MaskedTokenConfig(mask_ratio="linear")
    hidden = torch.stack([objective.corrupt(clean, generator(seed), mask_id=99).values == 99 for seed in range(600)]).double()
    share = hidden.mean(dim=0)  # about one half each, standard error 0.02
    assert float(share.max() - share.min()) < 0.1
    assert float(share.mean()) == pytest.approx(0.5, abs=0.06)


def test_the_same_generator_hides_the_same_codes() -> None:
    clean, objective = rows_of([codes(4, 5)]), MaskedTokenConfig()
    first, again, other = (objective.corrupt(clean, generator(seed), mask_id=99).values for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_the_loss_of_hidden_codes_does_not_depend_on_what_stands_elsewhere() -> None:
    rows = MaskedTokenConfig().corrupt(rows_of([codes(4, 5)]), generator(1), mask_id=99)
    assert rows.supervised is not None
    assert rows.goal is not None
    prediction = noise(20, 30)
    judged = MaskedTokenConfig().loss(prediction, rows.goal)[rows.supervised]
    elsewhere = torch.where(rows.supervised, rows.goal, (rows.goal + 3) % 30)
    assert torch.equal(MaskedTokenConfig().loss(prediction, elsewhere)[rows.supervised], judged)


# denoise

CHOICES = [(schedule, predict) for schedule in NOISE_SCHEDULES for predict in ("noise", "velocity", "clean")]


def corrupted(objective: DenoiseConfig, clean: PortRows, seed: int = 0) -> tuple[PortRows, Tensor]:
    """The corrupted rows, and the noise that was drawn: recovered from noisy = alpha clean + sigma noise."""
    rows = objective.corrupt(clean, generator(seed))
    assert rows.timestep is not None
    level = NOISE_SCHEDULES[objective.schedule].level(rows.timestep.double()[:, None])
    return rows, (rows.values.double() - level.alpha * clean.values.double()) / level.sigma.clamp(min=1e-12)


@pytest.mark.parametrize(("schedule", "predict"), CHOICES)
def test_noisy_rows_lie_on_the_path_and_the_goal_is_the_named_prediction(schedule: str, predict: str) -> None:
    objective = DenoiseConfig(schedule=schedule, predict=predict)  # type: ignore[arg-type]
    clean = rows_of([latents(2, 3)], [latents(3, 4, seed=1)])
    rows, drawn = corrupted(objective, clean)
    assert rows.timestep is not None
    assert rows.goal is not None
    level = NOISE_SCHEDULES[schedule].level(rows.timestep.double()[:, None])
    expected = target(predict, clean.values.double(), drawn, level)  # type: ignore[arg-type]
    torch.testing.assert_close(rows.goal.double(), expected, atol=1e-3, rtol=1e-3)
    assert float(objective.loss(rows.goal, rows.goal).max()) == 0.0  # the perfect prediction


def test_a_picture_has_one_noise_level_and_pictures_have_their_own() -> None:
    rows, _ = corrupted(DenoiseConfig(), rows_of([latents(2, 3), latents(2, 2, seed=1)], [latents(3, 4, seed=2)]))
    assert rows.timestep is not None
    levels = [set(rows.timestep[rows.segment == number].tolist()) for number in range(3)]
    assert [len(own) for own in levels] == [1, 1, 1]
    assert len(set.union(*levels)) == 3


def test_context_stays_clean_at_level_zero_and_is_not_judged() -> None:
    clean = rows_of([latents(2, 3, CONTEXT), latents(2, 2, seed=1)])
    rows, _ = corrupted(DenoiseConfig(), clean)
    given = ~clean.target
    assert rows.timestep is not None
    assert torch.equal(rows.values[given], clean.values[given])
    assert not rows.timestep[given].any()
    assert torch.equal(rows.supervised, clean.target)  # type: ignore[arg-type]
    assert (rows.values[clean.target] != clean.values[clean.target]).any(dim=1).all()


@given(st.integers(0, 100), st.sampled_from([(0.0, 0.5), (0.4, 0.6), (1.0, 1.0)]), st.sampled_from(["uniform", "logit-normal"]))
def test_noise_levels_stay_within_the_range_of_their_segment(seed: int, span: tuple[float, float], timesteps: str) -> None:
    clean = rows_of([latents(2, 3, span=span)], [latents(1, 4, seed=1)])
    rows = DenoiseConfig(timesteps=timesteps).corrupt(clean, generator(seed))  # type: ignore[arg-type]
    assert rows.timestep is not None
    own = rows.timestep[rows.segment == 0]
    assert span[0] <= float(own.min()) <= float(own.max()) <= span[1]
    assert 0.0 < float(rows.timestep[rows.segment == 1][0]) <= 1.0


def test_predicting_no_velocity_costs_one_plus_the_variance_of_the_data() -> None:
    """E (noise - clean)² = 1 + E clean²: the loss a velocity network starts at when its head starts at zero."""
    payload = 0.5 * noise(4000, 8, seed=3)
    clean = rows_of([Segment(port="p", payload=payload, grid=(50, 80), role=TARGET, mask=MaskKind.FULL)])
    rows = DenoiseConfig().corrupt(clean, generator(1))
    assert rows.goal is not None
    loss = DenoiseConfig().loss(torch.zeros_like(rows.goal), rows.goal)
    assert loss.shape == (4000,)
    assert float(loss.mean()) == pytest.approx(1.25, rel=0.02)


def test_noise_has_unit_variance_and_no_memory_of_the_data() -> None:
    payload = noise(3000, 8, seed=4)
    clean = rows_of([Segment(port="p", payload=payload, grid=(50, 60), role=TARGET, mask=MaskKind.FULL)])
    goal = DenoiseConfig(predict="noise").corrupt(clean, generator(1)).goal
    assert goal is not None
    assert float(goal.std()) == pytest.approx(1.0, rel=0.02)
    assert abs(float((goal * payload).mean())) < 0.02


def test_levels_are_uniform_unless_shifted_towards_noise() -> None:
    many = rows_of(*[[latents(1, 1, seed=n)] for n in range(2000)])
    plain, shifted = (DenoiseConfig(timestep_shift=shift).corrupt(many, generator(2)).timestep for shift in (1.0, 3.0))
    assert plain is not None
    assert shifted is not None
    assert float(plain.mean()) == pytest.approx(0.5, abs=0.02)
    torch.testing.assert_close(shifted, 3 * plain / (1 + 2 * plain), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("span", [(0.0, 0.0), (1.0, 1.0)])
@pytest.mark.parametrize(("schedule", "predict"), CHOICES)
def test_losses_are_finite_at_both_ends_of_t(schedule: str, predict: str, span: tuple[float, float]) -> None:
    objective = DenoiseConfig(schedule=schedule, predict=predict)  # type: ignore[arg-type]
    rows = objective.corrupt(rows_of([latents(2, 3, span=span)]), generator())
    assert rows.goal is not None
    assert torch.isfinite(rows.values).all()
    assert torch.isfinite(objective.loss(torch.zeros_like(rows.goal), rows.goal)).all()


# what all three share


@pytest.mark.parametrize("objective", [NextTokenConfig(), DenoiseConfig()], ids=lambda config: config.kind)
def test_corruption_leaves_the_clean_rows_alone(objective: NextTokenConfig | DenoiseConfig) -> None:
    clean = rows_of([ids([5, 6, 7])]) if isinstance(objective, NextTokenConfig) else rows_of([latents(2, 3)])
    before = clean.values.clone()
    rows = objective.corrupt(clean, generator())
    assert torch.equal(clean.values, before)
    assert clean.goal is None
    assert replace(rows, values=clean.values).rows is clean.rows
