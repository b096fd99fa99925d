"""Quantizers whose codes add up: residual and multi-scale; and the one that learns its codebook through the softmax."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stages.parts.quantizers import IBQConfig, MultiScaleConfig, ResidualConfig
from stages.parts.quantizers.codebook import nearest_codes


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed))


def bare(config: ResidualConfig | MultiScaleConfig | IBQConfig, codebook: Tensor | None = None):  # type: ignore[no-untyped-def]
    """A quantizer of latents as they are."""
    torch.manual_seed(2)
    quantizer = config.model_copy(update={"project": False}).build(config.dim)
    if codebook is not None:
        with torch.no_grad():
            quantizer.codebook.copy_(codebook)
    return quantizer


# residual


def residual(depth: int = 4, **keys: object):  # type: ignore[no-untyped-def]
    config = ResidualConfig(**{"codebook_size": 12, "codebook_dim": 4, "depth": depth, "decay": 0, "revive": 0, **keys})  # type: ignore[arg-type]
    shape = (12, 4) if config.shared else (depth, 12, 4)
    return bare(config, 0.7 * normal(*shape, seed=3))


@pytest.mark.parametrize("shared", [True, False])
def test_each_level_takes_the_nearest_code_to_what_is_left_over(shared: bool) -> None:
    quantizer = residual(shared=shared)
    z = normal(2, 4, 3, 5)
    result = quantizer.quantize(z)
    left = z.permute(0, 2, 3, 1).reshape(-1, 4)
    for level in range(4):
        table = (quantizer.codebook if shared else quantizer.codebook[level]).detach()
        expected = torch.cdist(left.double(), table.double()).argmin(1)
        assert torch.equal(result.codes[:, level].flatten(), expected)
        left = left - table[expected]
    torch.testing.assert_close(result.quantized, z - left.view(2, 3, 5, 4).permute(0, 3, 1, 2), atol=1e-6, rtol=0)


def test_every_level_of_a_fitted_codebook_brings_the_sum_nearer() -> None:
    """k-means++ seeds and running means, one codebook a level; the error after more levels is never larger."""
    z = normal(2, 4, 8, 8)
    quantizer = residual(shared=False, decay=0.8, revive=0.1)
    for step in range(60):
        quantizer.quantize(z, generator(step))
    quantizer.eval()
    codes = quantizer.quantize(z).codes
    parts = torch.stack([F.embedding(codes[:, level], quantizer.codebook[level]).permute(0, 3, 1, 2) for level in range(4)])
    errors = [float((z - parts[: level + 1].sum(0)).square().mean()) for level in range(4)]
    assert errors == sorted(errors, reverse=True)
    assert errors[3] < 0.2 * errors[0]


def test_the_decoders_gradient_arrives_once_not_once_a_level() -> None:
    z = normal(2, 4, 3, 5).requires_grad_()
    weight = normal(2, 4, 3, 5, seed=9)
    (residual().quantize(z).quantized * weight).sum().backward()
    assert torch.equal(z.grad, weight)  # type: ignore[arg-type]


def test_the_commitment_of_every_level_moves_the_encoder() -> None:
    """With the residual taken from straight-through outputs, levels after the first would give no gradient. Here each partial sum does."""
    quantizer = residual(commitment_weight=0.5)
    z = normal(2, 4, 3, 5).requires_grad_()
    result = quantizer.quantize(z)
    result.losses["commitment"].backward()
    sums = torch.stack([F.embedding(result.codes[:, level], quantizer.codebook).permute(0, 3, 1, 2) for level in range(4)]).cumsum(0)
    torch.testing.assert_close(result.losses["commitment"], 0.5 * (z - sums).square().mean())
    each = 0.5 * 2 * (z - sums).detach() / z.numel() / 4
    torch.testing.assert_close(z.grad, each.sum(0))
    assert all(float(gradient.abs().sum()) > 0 for gradient in each)
    assert quantizer.codebook.grad is None


def test_each_level_is_pulled_to_what_was_left_over_for_it() -> None:
    quantizer = residual(shared=False)
    z = normal(2, 4, 3, 5).requires_grad_()
    result = quantizer.quantize(z)
    result.losses["codebook"].backward()
    assert z.grad is None
    left = z.detach().permute(0, 2, 3, 1).reshape(-1, 4)
    for level in range(4):
        codes, table = result.codes[:, level].flatten(), quantizer.codebook[level].detach()
        expected = torch.zeros_like(table).index_add_(0, codes, 2 * (table[codes] - left) / left.numel() / 4)
        torch.testing.assert_close(quantizer.codebook.grad[level], expected)
        left = left - table[codes]


def test_one_level_is_vector_quantization() -> None:
    quantizer = residual(depth=1)
    z = normal(2, 4, 3, 5)
    codes = nearest_codes(z.permute(0, 2, 3, 1).reshape(-1, 4), quantizer.codebook).view(2, 1, 3, 5)
    assert torch.equal(quantizer.quantize(z).codes, codes)


def test_a_shared_codebook_learns_from_all_levels_together() -> None:
    """One step from zero counts: each code becomes the mean of everything it won, at whatever level."""
    quantizer = residual(decay=0.9)
    before = quantizer.codebook.clone()
    z = normal(2, 4, 3, 5)
    codes = quantizer.quantize(z).codes
    left, rows = z.permute(0, 2, 3, 1).reshape(-1, 4), []
    for level in range(4):
        rows.append(left)
        left = left - before[codes[:, level].flatten()]
    for code in range(12):
        won = torch.cat(rows)[codes.permute(1, 0, 2, 3).flatten() == code]
        torch.testing.assert_close(quantizer.codebook[code], won.mean(0) if len(won) else before[code], atol=1e-5, rtol=1e-4)


# multi-scale


def multi_scale(**keys: object):  # type: ignore[no-untyped-def]
    config = MultiScaleConfig(**{"codebook_size": 12, "codebook_dim": 4, "sides": (1, 2, 3, 5), "revive": 0, **keys})  # type: ignore[arg-type]
    return bare(config, 0.7 * normal(12, 4, seed=3))


def test_scales_keep_their_proportion_to_the_grid() -> None:
    published = MultiScaleConfig()
    assert published.grids(16, 16) == [(side, side) for side in published.sides]
    assert published.code_shape(16, 16) == (680,)
    assert published.grids(32, 32)[:3] == [(2, 2), (4, 4), (6, 6)]
    assert published.grids(8, 16)[:5] == [(1, 1), (1, 2), (2, 3), (2, 4), (3, 5)]  # halves are rounded up, nothing below 1
    assert published.grids(3, 7)[-1] == (3, 7)


def algorithm_1(
    quantizer: nn.Module, latents: Tensor, grids: list[tuple[int, int]], ratio: float, phis: list[int]
) -> tuple[Tensor, list[Tensor]]:
    """VAR's algorithm 1 and 2, step by step: the codes of each scale, and the partial sums."""
    left, total, codes, sums = latents.clone(), torch.zeros_like(latents), [], []
    for (h, w), phi in zip(grids, phis, strict=True):
        small = F.adaptive_avg_pool2d(left, (h, w))
        nearest = torch.cdist(small.flatten(2).transpose(1, 2).double(), quantizer.codebook.double()).argmin(2)
        vectors = quantizer.codebook[nearest].transpose(1, 2).reshape(len(left), -1, h, w)
        large = F.interpolate(vectors, latents.shape[2:], mode="bicubic") if (h, w) != grids[-1] else vectors
        convolution = quantizer.phi[phi]
        part = (1 - ratio) * large + ratio * F.conv2d(large, convolution.weight, convolution.bias, padding=1)
        left, total = left - part, total + part
        codes.append(nearest)
        sums.append(total)
    return torch.cat(codes, 1), sums


@pytest.mark.parametrize("grid", [(5, 5), (3, 7), (10, 10)])
def test_codes_and_sums_are_those_of_the_papers_algorithms(grid: tuple[int, int]) -> None:
    quantizer = multi_scale(commitment_weight=0.5)
    z = normal(2, 4, *grid).requires_grad_()
    result = quantizer.quantize(z)
    codes, sums = algorithm_1(quantizer, z.detach(), quantizer.config.grids(*grid), 0.5, [0, 1, 2, 3])
    assert torch.equal(result.codes, codes)
    torch.testing.assert_close(result.quantized, sums[-1], atol=1e-5, rtol=1e-5)
    errors = torch.stack([F.mse_loss(part, z.detach()) for part in sums]).mean()
    torch.testing.assert_close(result.losses["codebook"], errors)
    torch.testing.assert_close(result.losses["commitment"], 0.5 * errors)


def test_scales_share_convolutions_as_in_the_published_code() -> None:
    """Ticks 1/12, 13/36, 23/36, 11/12 for four convolutions; ten scales at 0, 1/9, ... 1 take the nearest.

    2/9 and 7/9 lie halfway: rounded as by the published numpy expression, both go up.
    """
    quantizer = bare(MultiScaleConfig(codebook_size=4, codebook_dim=2))
    assert [quantizer.phi_of(number) for number in range(10)] == [0, 0, 1, 1, 1, 2, 2, 3, 3, 3]
    own = bare(MultiScaleConfig(codebook_size=4, codebook_dim=2, sides=(1, 2, 3, 4, 5), phis=5))
    assert [own.phi_of(number) for number in range(5)] == [0, 1, 2, 3, 4]
    assert bare(MultiScaleConfig(codebook_size=4, codebook_dim=2, sides=(3,), phis=1)).phi_of(0) == 0


def test_the_losses_of_a_multi_scale_quantizer_go_where_they_belong() -> None:
    quantizer = multi_scale()
    z = normal(2, 4, 5, 5).requires_grad_()
    result = quantizer.quantize(z)
    result.losses["commitment"].backward(retain_graph=True)
    assert quantizer.codebook.grad is None and all(phi.weight.grad is None for phi in quantizer.phi)
    _, sums = algorithm_1(quantizer, z.detach(), quantizer.config.grids(5, 5), 0.5, [0, 1, 2, 3])
    torch.testing.assert_close(z.grad, sum(0.25 * 2 * (z - part) / z.numel() / 4 for part in sums).detach())  # type: ignore[union-attr]
    z.grad = None
    result.losses["codebook"].backward()
    assert z.grad is None
    assert float(quantizer.codebook.grad.abs().sum()) > 0 and all(float(phi.weight.grad.abs().sum()) > 0 for phi in quantizer.phi)


def test_the_decoders_gradient_passes_a_multi_scale_quantizer_unchanged() -> None:
    z, weight = normal(2, 4, 5, 5).requires_grad_(), normal(2, 4, 5, 5, seed=9)
    (multi_scale().quantize(z).quantized * weight).sum().backward()
    assert torch.equal(z.grad, weight)  # type: ignore[arg-type]


# index backpropagation


def one_hot_reference(codebook: Tensor, z: Tensor, temperature: float) -> tuple[Tensor, dict[str, Tensor]]:
    """Everything at once, with all n · k numbers in memory: hard choice forwards, softmax backwards."""
    logits = z @ codebook.T
    soft = logits.softmax(1)
    hard = F.one_hot(soft.argmax(1), len(codebook)).to(z.dtype)
    moved, chosen = (hard - soft.detach() + soft) @ codebook, hard @ codebook
    p = (logits / temperature).softmax(1)
    return moved, {
        "quantization": (moved - z).square().mean(),
        "commitment": (z - chosen.detach()).square().mean(),
        "codebook": 0.25 * (chosen - z.detach()).square().mean(),
        "entropy": 0.1 * (torch.special.entr(p).sum(1).mean() - torch.special.entr(p.mean(0)).sum()),
    }


@pytest.mark.parametrize("block", [1 << 22, 12 * 7])  # all latents at once; seven at a time, the last block short
def test_index_backpropagation_equals_the_dense_computation(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stages.parts.quantizers.ibq.BLOCK_NUMBERS", block)
    codebook = normal(12, 4, seed=3)
    quantizer = bare(IBQConfig(codebook_size=12, codebook_dim=4, entropy_weight=0.1, temperature=0.8), codebook)
    z = normal(2, 4, 3, 5)
    ours, dense_z, dense = z.clone().requires_grad_(), z.clone().requires_grad_(), codebook.clone().requires_grad_()
    result = quantizer.quantize(ours)
    moved, losses = one_hot_reference(dense, dense_z.permute(0, 2, 3, 1).reshape(-1, 4), 0.8)
    weight = normal(30, 4, seed=8)
    torch.testing.assert_close(result.quantized.permute(0, 2, 3, 1).reshape(-1, 4), moved)
    for name, expected in losses.items():
        torch.testing.assert_close(result.losses[name], expected)
    ((result.quantized.permute(0, 2, 3, 1).reshape(-1, 4) * weight).sum() + sum(result.losses.values())).backward()
    ((moved * weight).sum() + sum(losses.values())).backward()
    torch.testing.assert_close(ours.grad, dense_z.grad)
    torch.testing.assert_close(quantizer.codebook.grad, dense.grad)


def test_every_code_feels_every_gradient() -> None:
    quantizer = bare(IBQConfig(codebook_size=12, codebook_dim=4, entropy_weight=0), normal(12, 4, seed=3))
    quantizer.quantize(normal(1, 4, 1, 1)).quantized.sum().backward()
    assert int((quantizer.codebook.grad.abs().sum(1) > 0).sum()) == 12


def test_equal_products_have_the_largest_entropy_there_is() -> None:
    quantizer = bare(IBQConfig(codebook_size=12, codebook_dim=4, entropy_weight=1.0))
    own = quantizer.entropy(torch.zeros(7, 4)) + math.log(12)  # H(E p) is ln 12, and so is E H(p)
    torch.testing.assert_close(own, torch.tensor(math.log(12)))
