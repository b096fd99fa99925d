"""Masked autoregression of latents, piece by piece: what is hidden, what the head computes, what the sampler draws and when."""

from collections import Counter
from dataclasses import replace
from statistics import NormalDist

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.normalization import AdaLayerNormContinuous, AdaLayerNormZeroSingle
from torch import Generator, Tensor, nn

from stages.parts.connectors import MaskedEncoderConfig
from stages.parts.heads import DiffusionHead, DiffusionMLPConfig
from stages.parts.objectives import MaskedDenoiseConfig, NextFeatureConfig
from stages.parts.picture_blocks import BlocksConfig, PictureBlocks
from stages.parts.prediction import target
from stages.parts.samplers import MaskedDenoiseSamplerConfig, sample_masked_latents
from stages.parts.samplers.noise import sample_generator
from stages.parts.schedules import NOISE_SCHEDULES, hidden_counts
from stages.sequence.pack import pack
from stages.sequence.segment import MaskKind, PortRows, Role, Segment, Sequence


def generator(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed))


def rows_of(pictures: list[tuple[int, int]], role: Role = Role.TARGET, channels: int = 5) -> PortRows:
    segments = [
        Segment(port="p", payload=noise(h * w, channels, seed=seed), grid=(h, w), role=role, mask=MaskKind.FULL)
        for seed, (h, w) in enumerate(pictures)
    ]
    return pack([Sequence(key=str(n), task="t", segments=(segment,)) for n, segment in enumerate(segments)]).ports["p"]


def lively(module: nn.Module, seed: int = 0) -> nn.Module:
    """Every weight random, those that start at zero or one among them."""
    with torch.no_grad():
        for place, parameter in enumerate(module.parameters()):
            parameter.copy_(noise(*parameter.shape, seed=seed + place) * (0.3 if parameter.dim() == 1 else parameter.shape[1] ** -0.5))
    return module.eval()


# the head


def test_the_head_is_mar_s_denoiser_built_of_diffusers_pieces() -> None:
    width, channels, depth = 24, 5, 2
    head = lively(DiffusionMLPConfig(width=width, depth=depth).build(16, channels))
    assert isinstance(head, DiffusionHead)
    embed = TimestepEmbedding(256, width)
    embed.linear_1.load_state_dict(head.timestep.inner.state_dict())
    embed.linear_2.load_state_dict(head.timestep.outer.state_dict())
    waves = Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=0)
    x, t, z = noise(7, channels), torch.rand(7, generator=generator(1)), noise(7, 16, seed=2)

    by = embed(waves(1000 * t)) + head.condition_in(z)
    h = head.inner(x)
    for block in head.blocks:
        norm = AdaLayerNormZeroSingle(width)
        norm.linear.load_state_dict(block.modulation.state_dict())
        norm.norm = nn.LayerNorm(width, eps=1e-6)
        norm.norm.load_state_dict(block.norm.state_dict())
        # its tokens are rows of a sequence, modulated by one vector a sample
        modulated, gate = norm(h.unsqueeze(1), emb=by)
        h = h + gate * block.down(F.silu(block.up(modulated.squeeze(1))))
    last = AdaLayerNormContinuous(width, width, elementwise_affine=False, eps=1e-6)
    shift, scale = head.modulation_out.weight.chunk(2)  # diffusers has the scale first
    shift_bias, scale_bias = head.modulation_out.bias.chunk(2)
    last.linear.load_state_dict({"weight": torch.cat([scale, shift]), "bias": torch.cat([scale_bias, shift_bias])})
    expected = head.outer(last(h.unsqueeze(1), by).squeeze(1))
    torch.testing.assert_close(head(x, t, z), expected, atol=1e-5, rtol=1e-4)


def test_the_head_starts_by_predicting_zero() -> None:
    head = DiffusionMLPConfig(width=8, depth=1).build(8, 4)
    head.init_weights(generator())
    assert torch.equal(head(noise(3, 4), torch.rand(3), noise(3, 8)), torch.zeros(3, 4))


# what is hidden


def test_the_truncated_normal_ratio_inverts_its_distribution() -> None:
    law, config = NormalDist(1.0, 0.25), MaskedDenoiseConfig()
    low = law.cdf(0.7)
    for u in (0.0, 0.1, 0.5, 0.9, 0.999999):
        ratio = config.ratio(u)
        assert 0.7 - 1e-9 <= ratio <= 1.0
        assert (law.cdf(ratio) - low) / (0.5 - low) == pytest.approx(u, abs=1e-9)


def test_hidden_counts_follow_the_truncated_normal() -> None:
    """Ten tokens: 8, 9 or 10 are hidden, as often as the mass between the tenths says; which ones is even."""
    law, config = NormalDist(1.0, 0.25), MaskedDenoiseConfig()
    rows = config.corrupt(rows_of([(2, 5)] * 4000, channels=1), generator())
    assert rows.hidden is not None
    hidden = rows.hidden.view(4000, 10)
    found = Counter(hidden.sum(dim=1).tolist())
    mass = 0.5 - law.cdf(0.7)
    assert set(found) == {8, 9, 10}
    for count in found:
        expected = (law.cdf(count / 10) - law.cdf(count / 10 - 0.1)) / mass
        assert found[count] / 4000 == pytest.approx(expected, abs=4 * (0.25 / 4000) ** 0.5)
    shares = hidden.double().mean(dim=0)
    torch.testing.assert_close(shares, shares.mean().expand(10), atol=0.02, rtol=0.0)


def test_hidden_latents_are_not_shown_and_only_they_are_judged() -> None:
    clean = rows_of([(2, 3), (3, 3)])
    rows = MaskedDenoiseConfig(mask_ratio="linear").corrupt(clean, generator(3))
    assert rows.hidden is not None
    assert rows.supervised is not None
    assert torch.equal(rows.hidden, rows.supervised)
    assert 0 < int(rows.hidden.sum()) < len(rows.hidden)
    assert torch.equal(rows.values[~rows.hidden], clean.values[~rows.hidden])
    assert not rows.values[rows.hidden].any()
    assert rows.goal is not None
    assert torch.equal(rows.goal, clean.values)
    assert rows.read is not None
    assert torch.equal(rows.read, clean.rows)  # in its own row


def test_a_picture_that_is_given_is_all_visible_and_judges_nothing() -> None:
    clean = rows_of([(2, 3)], role=Role.CONTEXT)
    rows = MaskedDenoiseConfig().corrupt(clean, generator())
    assert rows.supervised is not None
    assert not rows.supervised.any()
    assert torch.equal(rows.values, clean.values)


# what a hidden token costs


@pytest.mark.parametrize(
    ("schedule", "predict"), [("cosine", "noise"), ("linear", "velocity"), ("cosine", "velocity"), ("linear", "clean")]
)
def test_with_all_hidden_it_is_plain_diffusion_of_single_tokens(schedule: str, predict: str) -> None:
    """Equation 1 of MAR written out, on every token; the objective adds nothing to it."""
    config = MaskedDenoiseConfig(schedule=schedule, predict=predict, repeats=3, mask_ratio="truncated-normal", mask_ratio_min=0.9999)
    rows = config.corrupt(rows_of([(2, 3)]), generator())
    assert rows.hidden is not None
    assert rows.hidden.all()
    clean, z = rows.goal, noise(6, 4, seed=9)
    assert clean is not None

    def head(noisy: Tensor, t: Tensor, z: Tensor) -> Tensor:
        return torch.tanh(noisy * t[:, None] + z.sum(dim=1, keepdim=True))

    losses = config.denoising_loss(head, clean, z, generator(7))
    numbers = generator(7)
    t = (1 - torch.rand(18, generator=numbers, dtype=torch.float64)).float()
    eps = torch.randn(18, 5, generator=numbers)
    expected = torch.zeros(6)
    for draw in range(18):
        level = NOISE_SCHEDULES[schedule].level(t[draw])
        x0 = clean[draw % 6]
        noisy = (level.alpha * x0 + level.sigma * eps[draw])[None]
        goal = target(predict, x0, eps[draw], level)  # type: ignore[arg-type]
        expected[draw % 6] += (head(noisy, t[draw : draw + 1], z[draw % 6][None])[0] - goal).square().mean() / 3
    torch.testing.assert_close(losses, expected, atol=1e-5, rtol=1e-5)


# blocks over a picture


def test_pictures_of_several_sizes_are_computed_as_if_alone() -> None:
    blocks = lively(PictureBlocks(BlocksConfig(width=16, depth=2, heads=2)))
    grids = [(2, 3), (1, 4), (2, 3), (3, 2)]
    x = noise(sum(h * w for h, w in grids), 16)
    together = blocks(x, grids).split([6, 4, 6, 6])
    for own, alone, grid in zip(x.split([6, 4, 6, 6]), together, grids, strict=True):
        torch.testing.assert_close(blocks(own, [grid]), alone, atol=1e-5, rtol=1e-4)


def test_a_hidden_latent_leaves_no_trace_in_the_encoder_but_its_place() -> None:
    encoder = lively(MaskedEncoderConfig(width=16, depth=2, heads=2).build(5, 24))
    values, hidden = noise(6, 5), torch.tensor([True, False, True, False, False, True])
    changed = torch.where(hidden[:, None], noise(6, 5, seed=4), values)
    vectors, memory = encoder(values, [(2, 3)], hidden)
    assert (vectors.shape, memory.shape) == ((6, 24), (6, 16))
    assert torch.equal(encoder(changed, [(2, 3)], hidden)[0], vectors)
    assert float((vectors[0] - vectors[2]).abs().max().detach()) > 1e-3  # places tell hidden tokens apart
    assert not torch.equal(encoder(values, [(2, 3)])[0], vectors)


def test_the_decoder_adds_the_network_s_rows_to_the_memory() -> None:
    """Only the sum matters: what is moved from the rows' projection to the memory changes nothing."""
    head = lively(DiffusionMLPConfig(width=8, depth=1, decoder=BlocksConfig(width=16, depth=1, heads=2)).build(24, 5))
    hidden, memory = noise(6, 24), noise(6, 16, seed=1)
    projected = head.decoder.into(F.silu(head.decoder.up(hidden)))
    nothing = torch.zeros(6, 24)
    base = head.decoder.into(F.silu(head.decoder.up(nothing)))
    both = head.condition(hidden, [(2, 3)], memory)
    torch.testing.assert_close(head.condition(nothing, [(2, 3)], memory + projected - base), both, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(
        head.condition(hidden, [(2, 3)], None), head.condition(nothing, [(2, 3)], projected - base), atol=1e-5, rtol=1e-4
    )


# sampling


MEAN, STD, N, C = 0.7, 0.5, 10, 3
SCHEDULE = NOISE_SCHEDULES["cosine"]


def draw(config: MaskedDenoiseSamplerConfig, keys: str = "ab", record: list[tuple[Tensor, Tensor, float]] | None = None) -> Tensor:
    """Samples of independent N(MEAN, STD²) latents with the ideal denoiser, which z tells the mean."""

    def condition(latents: Tensor, hidden: Tensor) -> Tensor:
        if record is not None:
            record.append((latents.clone(), hidden.clone(), -1.0))
        return torch.full((1, *hidden.shape, 1), MEAN)

    def denoise(noisy: Tensor, t: float, *, z: Tensor, share: float) -> Tensor:
        if record is not None:
            record[-1] = (*record[-1][:2], share)
        level = SCHEDULE.level(torch.tensor(t, dtype=torch.float64))
        variance = level.alpha**2 * STD**2 + level.sigma**2
        return (level.sigma / variance * (noisy - level.alpha * z[0])).float()

    generators = [sample_generator(1, key) for key in keys]
    return sample_masked_latents(config, condition, denoise, (N, C), SCHEDULE, "noise", generators, like=torch.zeros(1))


def test_rounds_show_what_the_schedule_says_and_never_change_it_again() -> None:
    record: list[tuple[Tensor, Tensor, float]] = []
    config = MaskedDenoiseSamplerConfig(num_steps=4, head_steps=3, guidance_schedule="linear")
    final = draw(config, record=record)
    counts = [N, *hidden_counts("cosine", 4, N)]
    assert [int(hidden.sum(dim=1)[0]) for _, hidden, _ in record] == counts[:-1]
    assert not torch.equal(record[1][1][0], record[1][1][1])  # every sample has its own order
    for latents, hidden, _ in record:
        assert not latents[hidden].any()
        assert torch.equal(latents[~hidden], final[~hidden])
    assert [share for *_, share in record] == pytest.approx([(N - left) / N for left in counts[1:]])  # MAR's linear guidance


def test_more_rounds_than_tokens_cost_a_pass_a_token() -> None:
    record: list[tuple[Tensor, Tensor, float]] = []
    draw(MaskedDenoiseSamplerConfig(num_steps=40, head_steps=1, mask_schedule="linear"), record=record)
    assert len(record) == N


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_the_ideal_denoiser_gives_the_distribution_it_knows(eta: float) -> None:
    keys = [chr(200 + i) for i in range(300)]
    drawn = draw(MaskedDenoiseSamplerConfig(num_steps=3, head_steps=60, eta=eta), keys="".join(keys))
    assert float(drawn.mean()) == pytest.approx(MEAN, abs=0.03)
    assert float(drawn.std()) == pytest.approx(STD, abs=0.03)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_a_low_temperature_narrows_what_is_drawn(eta: float) -> None:
    keys = "".join(chr(200 + i) for i in range(100))
    drawn = draw(MaskedDenoiseSamplerConfig(num_steps=3, head_steps=60, eta=eta, temperature=0.3), keys=keys)
    assert float(drawn.mean()) == pytest.approx(MEAN, abs=0.05)
    assert float(drawn.std()) < 0.6 * STD


def test_a_sample_does_not_depend_on_its_neighbours() -> None:
    config = MaskedDenoiseSamplerConfig(num_steps=4, head_steps=5)
    torch.testing.assert_close(draw(config, "ab")[1], draw(config, "b")[0])


# next feature


def test_features_are_read_in_the_row_before() -> None:
    text = Segment(port="text", payload=torch.arange(3), grid=(3,))
    picture = Segment(port="p", payload=noise(4, 5), grid=(4,), role=Role.TARGET)
    rows = pack([Sequence(key="a", task="t", segments=(text, picture))]).ports["p"]
    rows = NextFeatureConfig().corrupt(rows, generator())
    assert rows.read is not None
    assert rows.read.tolist() == [2, 3, 4, 5]
    assert rows.supervised is not None
    assert rows.supervised.all()
    alone = pack([Sequence(key="a", task="t", segments=(picture,))]).ports["p"]
    first = NextFeatureConfig().corrupt(replace(alone), generator()).supervised
    assert first is not None
    assert first.tolist() == [False, True, True, True]  # nothing stands before the first


def test_the_three_distances() -> None:
    prediction, goal = torch.tensor([[3.0, 0.0], [0.5, 0.0]]), torch.tensor([[0.0, 0.0], [0.0, 0.5]])
    assert NextFeatureConfig().loss(prediction, goal).tolist() == pytest.approx([4.5, 0.25])
    assert NextFeatureConfig(distance="smooth-l1").loss(prediction, goal).tolist() == pytest.approx([1.25, 0.125])
    cosine = NextFeatureConfig(distance="cosine")
    assert cosine.loss(torch.tensor([[1.0, 1.0]]), torch.tensor([[2.0, 0.0]])).tolist() == pytest.approx([1 - 0.5**0.5])
    assert cosine.loss(7 * prediction[:1], prediction[:1]).tolist() == pytest.approx([0.0], abs=1e-6)
