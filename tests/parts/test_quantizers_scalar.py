"""Quantizers without a codebook to learn: levels, bits, and the entropy that keeps bits in use."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from stages.parts.quantizers import BSQConfig, FSQConfig, LFQConfig
from stages.parts.quantizers.lfq import entropy_of_bits, entropy_of_mean, joint_probabilities


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed))


def bare(config: FSQConfig | LFQConfig):  # type: ignore[no-untyped-def]
    """A quantizer of latents as they are."""
    return config.model_copy(update={"project": False}).build(config.dim)


# levels


@pytest.mark.parametrize(
    ("levels", "size"),
    [((8, 6, 5), 240), ((8, 5, 5, 5), 1000), ((7, 5, 5, 5, 5), 4375), ((8, 8, 8, 6, 5), 15360), ((8, 8, 8, 5, 5, 5), 64000)],
)
def test_the_papers_levels_have_the_papers_number_of_codes(levels: tuple[int, ...], size: int) -> None:
    assert FSQConfig(levels=levels).size == size


@pytest.mark.parametrize("levels", [(8, 6, 5), (3, 4, 7)])
def test_codes_and_levels_are_a_bijection(levels: tuple[int, ...]) -> None:
    quantizer = bare(FSQConfig(levels=levels))
    vectors = quantizer.vectors(torch.arange(math.prod(levels)))
    grid = [[(digit - count // 2) / (count // 2) for digit in range(count)] for count in levels]
    # the first number of a latent counts ones, so it changes fastest
    expected = torch.tensor([digits[::-1] for digits in itertools.product(*reversed(grid))])
    torch.testing.assert_close(vectors, expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize("count", [3, 4, 5, 8, 16])
def test_every_level_is_reached_and_no_other(count: int) -> None:
    quantizer = bare(FSQConfig(levels=(count,)))
    z = torch.linspace(-9, 9, 4001).view(1, 1, 1, -1)
    codes = quantizer.quantize(z).codes.flatten()
    assert torch.equal(codes.unique(), torch.arange(count))
    assert bool((codes.diff() >= 0).all())


@pytest.mark.parametrize("levels", [(8, 8, 8), (5, 7, 3), (8, 5, 4)])
def test_a_latent_of_zero_is_in_the_middle(levels: tuple[int, ...]) -> None:
    quantizer = bare(FSQConfig(levels=levels))
    assert torch.equal(quantizer.quantize(torch.zeros(1, 3, 1, 1)).quantized, torch.zeros(1, 3, 1, 1))
    torch.testing.assert_close(quantizer.bound(torch.zeros(1, 3)), torch.zeros(1, 3), atol=1e-6, rtol=0)


def test_the_shift_of_eight_levels_is_the_papers() -> None:
    """tanh(0.143987) · 3.4965 = 0.5 (the paper's listing, with tan for the inverse of tanh, has 0.143983)."""
    quantizer = bare(FSQConfig(levels=(8,)))
    torch.testing.assert_close(quantizer.bound(torch.tensor([[-0.143987]])), torch.tensor([[-0.5]]), atol=2e-6, rtol=0)


# bits


@pytest.mark.parametrize("kind", [LFQConfig, BSQConfig])
@pytest.mark.parametrize("order", ["most-significant-first", "least-significant-first"])
def test_a_code_is_its_bits(kind: type[LFQConfig], order: str) -> None:
    quantizer = bare(kind(bits=5, bit_order=order))
    for code in range(32):
        bits = [code >> place & 1 for place in range(5)]
        if order == "most-significant-first":
            bits.reverse()
        signs = torch.tensor([2.0 * bit - 1 for bit in bits]) / (math.sqrt(5) if kind is BSQConfig else 1)
        torch.testing.assert_close(quantizer.vectors(torch.tensor([code]))[0], signs)
        assert int(quantizer.quantize(7 * signs.view(1, 5, 1, 1)).codes) == code


def test_spherical_codes_have_length_one_and_only_the_direction_counts() -> None:
    quantizer = bare(BSQConfig(bits=6))
    torch.testing.assert_close(quantizer.vectors(torch.arange(64)).norm(dim=1), torch.ones(64))
    z = normal(2, 6, 3, 5)
    near, far = quantizer.quantize(z), quantizer.quantize(z * 100)
    assert torch.equal(near.codes, far.codes)
    for name, loss in near.losses.items():
        torch.testing.assert_close(loss, far.losses[name])


@pytest.mark.parametrize("kind", [LFQConfig, BSQConfig])
def test_the_sign_is_the_nearest_code(kind: type[LFQConfig]) -> None:
    quantizer = bare(kind(bits=6))
    z = normal(2, 6, 3, 5)
    rows = z.permute(0, 2, 3, 1).reshape(-1, 6).double()
    nearest = torch.cdist(rows, quantizer.vectors(torch.arange(64)).double()).argmin(1)
    assert torch.equal(quantizer.quantize(z).codes.flatten(), nearest)


@pytest.mark.parametrize("kind", [LFQConfig, BSQConfig])
def test_the_commitment_is_its_definition(kind: type[LFQConfig]) -> None:
    quantizer = bare(kind(bits=6, commitment_weight=0.5))
    z = normal(2, 6, 3, 5).requires_grad_()
    loss = quantizer.quantize(z).losses["commitment"]
    moved = F.normalize(z, dim=1) if kind is BSQConfig else z
    squares = (moved - quantizer.lookup(quantizer.quantize(z).codes).detach()).square()
    torch.testing.assert_close(loss, 0.5 * (squares.sum(1).mean() if kind is BSQConfig else squares.mean()))


# entropy


def brute_force(logits: Tensor) -> tuple[Tensor, Tensor]:
    """E H(p) and H(E p) from the softmax of ⟨logits, signs⟩ / 2 over all signs: half, as the log odds of a bit are a difference of two."""
    signs = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=logits.shape[1])), dtype=logits.dtype)
    p = (logits @ signs.T / 2).softmax(1)
    return torch.special.entr(p).sum(1).mean(), torch.special.entr(p.mean(0)).sum()


@pytest.mark.parametrize("bits", [1, 2, 5, 8])
@pytest.mark.parametrize("scale", [0.3, 3.0])
def test_factorised_entropies_equal_those_over_all_codes(bits: int, scale: float) -> None:
    logits = scale * normal(17, bits).double()
    own, shared = brute_force(logits)
    torch.testing.assert_close(entropy_of_bits(logits), own, atol=1e-12, rtol=0)
    torch.testing.assert_close(entropy_of_mean(logits), shared, atol=1e-9, rtol=0)


def test_the_loss_and_its_gradient_equal_those_over_all_codes() -> None:
    """In the paper's terms: the softmax of 2⟨z, c⟩ / temperature over the codes c."""
    config = LFQConfig(bits=6, temperature=0.7, diversity=1.3, entropy_weight=0.2, project=False)
    z = normal(2, 6, 3, 5).requires_grad_()
    loss = config.build(6).quantize(z).losses["entropy"]
    loss.backward()
    plain = z.detach().clone().requires_grad_()
    codes = config.build(6).vectors(torch.arange(64))
    p = (2 * plain.permute(0, 2, 3, 1).reshape(-1, 6) @ codes.T / 0.7).softmax(1)
    expected = 0.2 * (torch.special.entr(p).sum(1).mean() - 1.3 * torch.special.entr(p.mean(0)).sum())
    expected.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(z.grad, plain.grad)


def test_joint_probabilities_are_numbered_from_the_most_significant_bit() -> None:
    p = torch.tensor([0.9, 0.2, 0.6])
    joint = joint_probabilities(torch.logit(p).view(1, 3))[0]
    torch.testing.assert_close(joint[0b101], torch.tensor(0.9 * 0.8 * 0.6))
    torch.testing.assert_close(joint.sum(), torch.tensor(1.0))


def test_groups_of_bits_bound_the_joint_entropy_from_above_and_meet_it_when_independent() -> None:
    logits = 4 * normal(50, 6).double()
    joint = entropy_of_mean(logits)
    groups = torch.stack([entropy_of_mean(group) for group in logits.tensor_split(3, dim=1)]).sum()
    assert joint < groups <= 6 * math.log(2) + 1e-9
    independent = torch.tensor(list(itertools.product([-2.0, 1.0], repeat=4))).double()  # all combinations once: the mean is a product
    torch.testing.assert_close(
        entropy_of_mean(independent), torch.stack([entropy_of_mean(group) for group in independent.tensor_split(2, dim=1)]).sum()
    )


@pytest.mark.parametrize(("bits", "joint_bits"), [(18, 18), (36, 9), (40, 7)])
def test_large_codebooks_are_never_built(bits: int, joint_bits: int) -> None:
    """Codes of 36 bits would fill 256 GB; equally likely bits have the entropy of equally likely codes, bits · ln 2, whatever the groups."""
    quantizer = bare(LFQConfig(bits=bits, joint_bits=joint_bits, entropy_weight=1.0, diversity=1.0))
    z = torch.zeros(1, bits, 2, 2, requires_grad=True)
    loss = quantizer.quantize(z).losses["entropy"]
    torch.testing.assert_close(loss, torch.tensor(0.0), atol=1e-3, rtol=0)  # both entropies have their maximum
    torch.testing.assert_close(entropy_of_bits(z.detach().flatten(2)[0].T), torch.tensor(bits * math.log(2)))


def test_saturated_bits_have_finite_gradients() -> None:
    quantizer = bare(LFQConfig(bits=8))
    z = (100 * normal(2, 8, 3, 5)).requires_grad_()
    sum(quantizer.quantize(z).losses.values()).backward()  # type: ignore[union-attr]
    assert z.grad is not None and bool(torch.isfinite(z.grad).all())


@pytest.mark.parametrize("kind", [LFQConfig, BSQConfig])
def test_the_entropy_loss_spreads_latents_over_the_codes(kind: type[LFQConfig]) -> None:
    """Latents that begin in one corner; the losses alone move them until most codes are in use."""
    quantizer = bare(kind(bits=4, temperature=1.0 if kind is LFQConfig else 0.3, entropy_weight=1.0, commitment_weight=0.1))
    z = (0.5 + 0.2 * normal(1, 4, 8, 8)).requires_grad_()
    optimizer = torch.optim.Adam([z], 0.05)
    for _ in range(80):
        optimizer.zero_grad()
        torch.stack(list(quantizer.quantize(z).losses.values())).sum().backward()
        optimizer.step()
    assert len(quantizer.quantize(z).codes.unique()) >= 14
