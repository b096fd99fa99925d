"""What every quantizer promises: the lookup is the quantization, gradients pass straight through, codes are codes, nothing is left to chance."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stages.errors import DataError, RecipeError
from stages.parts.config import parse_part
from stages.parts.quantizers import (
    QUANTIZERS,
    BSQConfig,
    FSQConfig,
    IBQConfig,
    LFQConfig,
    MultiScaleConfig,
    Quantizer,
    QuantizerConfig,
    ResidualConfig,
    VQConfig,
)

CODEBOOK = {"codebook_size": 11, "codebook_dim": 6}
CONFIGS: dict[str, QuantizerConfig] = {
    "vq": VQConfig(**CODEBOOK),
    "vq-ema": VQConfig(**CODEBOOK, decay=0.9, revive=0),
    "vq-ema-revive": VQConfig(**CODEBOOK, decay=0.9, revive=0.1),
    "vq-l2": VQConfig(codebook_size=11, codebook_dim=4, l2_normalize=True, revive=0.3),
    "vq-3x3": VQConfig(**CODEBOOK, kernel_size=3),
    "residual": ResidualConfig(**CODEBOOK, depth=3, decay=0.9, revive=0.1),
    "residual-own": ResidualConfig(**CODEBOOK, depth=3, shared=False, decay=0.9, revive=0.1),
    "residual-gradient": ResidualConfig(**CODEBOOK, depth=3, shared=False, decay=0),
    "multi-scale": MultiScaleConfig(**CODEBOOK, sides=(1, 2, 3, 5)),
    "multi-scale-ema": MultiScaleConfig(**CODEBOOK, sides=(1, 3), phis=2, decay=0.9),
    "fsq": FSQConfig(levels=(4, 5, 3)),
    "lfq": LFQConfig(bits=5),
    "lfq-least": LFQConfig(bits=5, bit_order="least-significant-first", joint_bits=3),
    "lfq-uncounted": LFQConfig(bits=40, joint_bits=8),
    "bsq": BSQConfig(bits=7),
    "ibq": IBQConfig(**CODEBOOK),
}
IDEMPOTENT = ("vq", "vq-ema", "vq-l2", "lfq", "lfq-least", "lfq-uncounted", "bsq")  # a code is the nearest to its own vector
GRID = (3, 7)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def latents(b: int = 2, d: int = 5, seed: int = 0) -> Tensor:
    return torch.randn(b, d, *GRID, generator=generator(seed))


def built(name: str, in_dim: int = 5) -> Quantizer:
    torch.manual_seed(1)
    quantizer = CONFIGS[name].build(in_dim)
    for key, value in quantizer.state_dict().items():
        if key == "codebook":  # the published ±1/k is so small that one code would win everything
            value.copy_(torch.randn(value.shape) / 2)
    return quantizer


def state_of(quantizer: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in quantizer.state_dict().items()}


every = pytest.mark.parametrize("name", CONFIGS)


def test_every_kind_of_the_family_is_tested_here() -> None:
    assert {config.kind for config in CONFIGS.values()} == set(QUANTIZERS)
    assert {kind: config().kind for kind, config in QUANTIZERS.items()} == {kind: kind for kind in QUANTIZERS}


@every
@pytest.mark.parametrize("training", [False, True])
def test_looking_up_the_codes_gives_exactly_the_quantized_latents(name: str, training: bool) -> None:
    quantizer = built(name).train(training)
    before = state_of(quantizer)
    result = quantizer.quantize(latents(), generator())
    quantizer.load_state_dict(before)  # in training a codebook may have moved after it was used
    assert result.codes.shape == (2, *CONFIGS[name].code_shape(*GRID))
    assert result.codes.dtype == torch.int64
    assert result.quantized.shape == (2, 5, *GRID)
    assert len(result.codes.unique()) > 3
    assert torch.equal(quantizer.lookup(result.codes, GRID), result.quantized)


@every
def test_codes_lie_in_range(name: str) -> None:
    codes = built(name).quantize(20 * latents(b=5), generator()).codes
    assert 0 <= int(codes.min()) <= int(codes.max()) < CONFIGS[name].size


@every
def test_one_picture_of_one_cell_has_a_code(name: str) -> None:
    quantizer = built(name)
    before = state_of(quantizer)
    result = quantizer.quantize(torch.randn(1, 5, 1, 1, generator=generator()), generator())
    quantizer.load_state_dict(before)
    assert result.codes.shape == (1, *CONFIGS[name].code_shape(1, 1))
    assert torch.equal(quantizer.lookup(result.codes), result.quantized)  # one cell is a square grid


@every
def test_no_latent_depends_on_the_others_of_the_batch(name: str) -> None:
    quantizer = built(name).eval()
    z = latents(b=3)
    together = quantizer.quantize(z).codes
    assert torch.equal(torch.cat([quantizer.quantize(part).codes for part in z.split(1)]), together)


@every
def test_gradients_pass_straight_through_to_the_latents(name: str) -> None:
    """The quantizer is replaced by what stands between the projections; in evaluation that has the value of the codes, too."""
    quantizer = built(name).eval()
    z = latents().requires_grad_()
    weight = torch.randn(2, 5, *GRID, generator=generator(5))
    (quantizer.quantize(z).quantized * weight).sum().backward()
    smooth = latents().requires_grad_()
    projected = quantizer.project_in(smooth)
    if name in ("vq-l2", "bsq"):
        projected = F.normalize(projected, dim=1)
    if name == "fsq":
        projected = quantizer.bound(projected.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) / (quantizer.levels // 2).view(-1, 1, 1)
    if name == "ibq":  # the softmax stands in for the choice
        rows = projected.permute(0, 2, 3, 1)
        projected = ((rows @ quantizer.codebook.T).softmax(-1) @ quantizer.codebook).permute(0, 3, 1, 2)
    out = quantizer.project_out
    (F.conv2d(projected, out.weight, out.bias, padding=out.padding) * weight).sum().backward()
    assert z.grad is not None and float(z.grad.abs().max()) > 0
    torch.testing.assert_close(z.grad, smooth.grad)


@every
def test_the_decoders_gradient_leaves_the_codebook_alone_except_where_it_is_the_method(name: str) -> None:
    quantizer = built(name)
    quantizer.quantize(latents(), generator()).quantized.square().sum().backward()
    learned = {key for key, value in quantizer.named_parameters() if value.grad is not None and key[:7] != "project"}
    assert learned == ({"codebook"} if name == "ibq" else set())


@pytest.mark.parametrize("name", IDEMPOTENT)
def test_quantizing_what_was_quantized_changes_nothing(name: str) -> None:
    torch.manual_seed(1)
    config = CONFIGS[name].model_copy(update={"project": False})
    quantizer = config.build(config.dim).eval()
    codes = torch.randint(config.size, (3, *GRID), generator=generator())
    assert torch.equal(quantizer.quantize(quantizer.lookup(codes)).codes, codes)


@every
def test_codes_are_found_in_float32_inside_autocast(name: str) -> None:
    quantizer = built(name).eval()
    with torch.autocast("cpu", torch.bfloat16):
        inside = quantizer.quantize(latents())
        looked_up = quantizer.lookup(inside.codes, GRID)
    outside = quantizer.quantize(latents())
    assert torch.equal(inside.codes, outside.codes)
    assert torch.equal(inside.quantized, outside.quantized) and torch.equal(looked_up, outside.quantized)
    assert inside.quantized.dtype == torch.float32
    half = quantizer.quantize(latents().bfloat16())  # what an encoder inside autocast hands over
    assert half.quantized.dtype == torch.float32 and all(loss.dtype == torch.float32 for loss in half.losses.values())


@every
def test_five_steps_twice_are_the_same_bits(name: str) -> None:
    """Losses, gradients and buffers depend on nothing but the generator."""
    seen = []
    for _ in range(2):
        quantizer = built(name)
        torch.rand(3)  # the global generator moves on in between
        optimizer = torch.optim.SGD(quantizer.parameters(), 0.1)
        for step in range(5):
            z = latents(seed=step).requires_grad_()
            result = quantizer.quantize(z, generator(step))
            optimizer.zero_grad()
            torch.stack([result.quantized.square().mean(), *result.losses.values()]).sum().backward()
            optimizer.step()
        assert z.grad is not None
        seen.append([z.grad, result.codes, *quantizer.state_dict().values()])
    assert all(torch.equal(first, second) for first, second in zip(*seen, strict=True))


@every
def test_nothing_is_learned_outside_training(name: str) -> None:
    quantizer = built(name).eval()
    before = state_of(quantizer)
    quantizer.quantize(latents())
    assert all(torch.equal(value, before[key]) for key, value in quantizer.state_dict().items())


@every
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_latents_that_are_not_finite_have_codes_and_teach_nothing(name: str, poison: float) -> None:
    """The loss of such a step is not finite either, so the step is refused; no buffer may have learned from it before."""
    quantizer = built(name)
    quantizer.quantize(latents(seed=1), generator(1))
    before = state_of(quantizer)
    z = latents()
    z[0, 0, 1, 2] = poison
    result = quantizer.quantize(z, generator())
    assert 0 <= int(result.codes.min()) <= int(result.codes.max()) < CONFIGS[name].size
    bounded = name == "fsq" and poison == math.inf  # tanh has a value there
    assert bool(torch.isfinite(result.quantized).all()) == bounded
    assert all(torch.equal(value, before[key]) for key, value in quantizer.state_dict().items())


@every
def test_training_counts_what_was_won(name: str) -> None:
    quantizer = built(name)
    codes = quantizer.quantize(latents(), generator()).codes
    if CONFIGS[name].size > 1 << 20:
        assert quantizer.health() == {}
        return
    health = quantizer.health()
    if getattr(CONFIGS[name], "revive", 0) == 0:
        share = torch.bincount(codes.flatten(), minlength=CONFIGS[name].size) / codes.numel()
        assert health["perplexity"] == pytest.approx(float((-torch.xlogy(share, share).sum()).exp()), rel=1e-4)
        assert health["dead"] == int((share * CONFIGS[name].size < 0.01).sum())
    else:
        assert 1 < health["perplexity"] <= CONFIGS[name].size + 1e-3


@every
def test_the_perplexity_of_equal_shares_is_the_number_of_codes(name: str) -> None:
    quantizer = built(name)
    if CONFIGS[name].size <= 1 << 20:
        quantizer.counts.fill_(0.3)
        assert quantizer.health() == {"perplexity": pytest.approx(CONFIGS[name].size, rel=1e-4), "dead": 0.0}


@every
def test_without_projections_the_latents_have_the_width_of_the_codes(name: str) -> None:
    config = CONFIGS[name].model_copy(update={"project": False})
    quantizer = config.build(config.dim)
    assert not any(key.startswith("project") for key in quantizer.state_dict())
    z = torch.randn(2, config.dim, *GRID, generator=generator())
    assert quantizer.quantize(z, generator()).quantized.shape == z.shape
    with pytest.raises(RecipeError, match=f"'{config.kind}' with project = false: its codes have width {config.dim}, the latents 9"):
        config.build(9)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"kind": "vq", "kernel_size": 2}, "odd size"),
        ({"kind": "fsq", "levels": [8, 2]}, "3 levels at least"),
        ({"kind": "multi-scale", "sides": [1, 3, 3]}, "sides must grow"),
        ({"kind": "lfq", "bit_order": "most-significant"}, "most-significant-first"),
        ({"kind": "residual", "deepth": 4}, "did you mean 'depth'"),
        ({"kind": "residul"}, "did you mean 'residual'"),
    ],
)
def test_impossible_settings_are_refused_with_a_word_about_what_would_do(table: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError) as raised:
        parse_part(QUANTIZERS, table, "autoencoders.image.quantizer")
    assert message in f"{raised.value.message} {raised.value.hint}"


def test_a_perplexity_that_nobody_counts_cannot_be_asked_for() -> None:
    with pytest.raises(RecipeError, match="min_perplexity needs counts"):
        LFQConfig(bits=30, min_perplexity=5).build(8)


def test_codes_in_a_row_name_the_grid_they_do_not_fit() -> None:
    quantizer = built("multi-scale")
    codes = quantizer.quantize(latents(), generator()).codes
    with pytest.raises(DataError, match="not those of a square grid"):
        quantizer.lookup(codes)
    with pytest.raises(DataError, match="a grid of 4 x 4 latents has"):
        quantizer.lookup(codes, (4, 4))
