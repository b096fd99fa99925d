"""Against vector-quantize-pytorch, on its weights: same codes, vectors, losses, gradients, and codebooks after a few steps.

Where conventions differ, the test says how they are brought together:
- its VectorQuantize scales a mean over codes with a Laplace term (eps 1e-5), ours has none: codebooks agree to 1e-4;
- its cosine codebook averages unit vectors and renormalises after each step, as ours does;
- its codes of depth come last, (b, n, depth), ours first;
- its FSQ has bounds of (L - 1)(1 + eps)/2 where the paper's listing, and ours, have (1 - eps);
- its LFQ numbers bits from the most significant, clamps probabilities at 1e-5 within the logarithm, has a mean commitment also on the
  sphere (ours: the squared distance), and scales latents and codes of the sphere to length 1 as ours does.
"""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from vector_quantize_pytorch import FSQ, LFQ, ResidualVQ, VectorQuantize

from stages.parts.quantizers import BSQConfig, FSQConfig, LFQConfig, ResidualConfig, VQConfig


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed))


@pytest.mark.parametrize(("l2", "decay"), [(False, 0.8), (True, 0.8), (True, 0.0), (False, 0.0)])
def test_vector_quantization(l2: bool, decay: float) -> None:
    torch.manual_seed(0)
    theirs = VectorQuantize(
        dim=4, codebook_size=13, decay=decay or 0.8, use_cosine_sim=l2, accept_image_fmap=True,
        commitment_weight=0.25, kmeans_init=False, threshold_ema_dead_code=0, rotation_trick=False,
        learnable_codebook=not decay and not l2, ema_update=bool(decay),
    )  # fmt: skip
    ours = VQConfig(codebook_size=13, codebook_dim=4, decay=decay, l2_normalize=l2, commitment_weight=0.25, revive=0, project=False).build(
        4
    )
    table = F.normalize(normal(13, 4, seed=1), dim=-1) if l2 else normal(13, 4, seed=1)
    with torch.no_grad():
        ours.codebook.copy_(table)
        theirs._codebook.embed.copy_(table[None])
        if decay:  # equal running statistics: one latent a code so far
            theirs._codebook.embed_avg.copy_(table[None])
            theirs._codebook.cluster_size.fill_(1.0)
            ours.sums.copy_(table)
            ours.counts.fill_(1.0)
    ours.train(bool(decay))
    theirs.train(bool(decay))
    for step in range(3 if decay else 1):
        z, other = normal(3, 4, 3, 7, seed=step).requires_grad_(), normal(3, 4, 3, 7, seed=step).requires_grad_()
        result = ours.quantize(z)
        quantized, codes, loss = theirs(other)
        assert torch.equal(result.codes, codes)
        torch.testing.assert_close(result.quantized, quantized, atol=1e-5, rtol=1e-4)
        if decay and not l2:  # outside training theirs has no loss; its cosine commitment is to latents that are not normalised
            torch.testing.assert_close(result.losses["commitment"], loss.squeeze())
            (result.quantized.square().sum() + result.losses["commitment"]).backward()
            (quantized.square().sum() + loss.squeeze()).backward()
            torch.testing.assert_close(z.grad, other.grad, atol=1e-4, rtol=1e-4)
    if decay:
        torch.testing.assert_close(ours.codebook, theirs._codebook.embed[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("decay", [0.8, 0.0])
def test_residual_quantization(decay: float) -> None:
    torch.manual_seed(0)
    depth = 3
    theirs = ResidualVQ(
        dim=4, num_quantizers=depth, codebook_size=13, decay=decay or 0.8, commitment_weight=0.25, kmeans_init=False,
        threshold_ema_dead_code=0, rotation_trick=False, learnable_codebook=not decay, ema_update=bool(decay),
    )  # fmt: skip
    ours = ResidualConfig(codebook_size=13, codebook_dim=4, depth=depth, shared=False, decay=decay, revive=0, project=False).build(4)
    tables = normal(depth, 13, 4, seed=1) * torch.tensor([1.0, 0.5, 0.3]).view(3, 1, 1)
    with torch.no_grad():
        ours.codebook.copy_(tables)
        for layer, table in zip(theirs.layers, tables, strict=True):
            layer._codebook.embed.copy_(table[None])
            if decay:
                layer._codebook.embed_avg.copy_(table[None])
                layer._codebook.cluster_size.fill_(1.0)
    if decay:
        ours.sums.copy_(tables)
        ours.counts.fill_(1.0)
    for step in range(3):
        z, other = normal(3, 4, 3, 7, seed=step).requires_grad_(), normal(3, 4, 3, 7, seed=step).requires_grad_()
        result = ours.quantize(z)
        quantized, codes, losses = theirs(other.flatten(2).transpose(1, 2))  # its pictures (b, d, h, w) fail in 1.32
        quantized = quantized.transpose(1, 2).view(z.shape)
        assert torch.equal(result.codes, codes.movedim(-1, 1).view(result.codes.shape))
        torch.testing.assert_close(result.quantized, quantized, atol=1e-5, rtol=1e-4)
        if decay:  # the sum of what each level leaves over is that of the partial sums; ours is the mean
            torch.testing.assert_close(result.losses["commitment"], losses.mean())
            (result.quantized.square().sum() + result.losses["commitment"]).backward()
            quantized.square().sum().backward(retain_graph=True)
            theirs_direct = other.grad.clone()  # type: ignore[union-attr]
            losses.mean().backward()
            # every level of theirs has a straight-through step of its own, so the decoder's gradient arrives `depth` times
            torch.testing.assert_close(z.grad - theirs_direct / depth, other.grad - theirs_direct, atol=1e-4, rtol=1e-4)  # type: ignore[operator]
    if decay:
        for level, layer in enumerate(theirs.layers):
            torch.testing.assert_close(ours.codebook[level], layer._codebook.embed[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("levels", [(8, 5, 5), (7, 4, 3, 6)])
def test_finite_scalar_quantization(levels: tuple[int, ...]) -> None:
    theirs = FSQ(levels=list(levels), dim=len(levels))
    theirs.bound = partial(theirs.bound, eps=-1e-3)
    ours = FSQConfig(levels=levels, project=False).build(len(levels))
    z, other = (2 * normal(3, len(levels), 5, 7)).requires_grad_(), (2 * normal(3, len(levels), 5, 7)).requires_grad_()
    result = ours.quantize(z)
    quantized, codes = theirs(other)
    assert torch.equal(result.codes, codes.long())
    torch.testing.assert_close(result.quantized, quantized, atol=1e-6, rtol=1e-5)
    weight = normal(3, len(levels), 5, 7, seed=4)
    (result.quantized * weight).sum().backward()
    (quantized * weight).sum().backward()
    torch.testing.assert_close(z.grad, other.grad)
    every = torch.arange(ours.codebook_size)
    torch.testing.assert_close(ours.vectors(every), theirs.implicit_codebook, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("spherical", [False, True])
@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_lookup_free_quantization(spherical: bool, temperature: float) -> None:
    bits = 7
    theirs = LFQ(
        dim=bits, codebook_size=2**bits, entropy_loss_weight=0.2, diversity_gamma=1.5, commitment_loss_weight=0.25, spherical=spherical
    )
    kind = BSQConfig if spherical else LFQConfig
    ours = kind(
        bits=bits, joint_bits=bits, entropy_weight=0.2, diversity=1.5, commitment_weight=0.25, temperature=temperature, project=False
    ).build(bits)
    z, other = normal(3, bits, 3, 5).requires_grad_(), normal(3, bits, 3, 5).requires_grad_()
    result = ours.quantize(z)
    (quantized, codes, _), parts = theirs(other, inv_temperature=1 / temperature, return_loss_breakdown=True)
    assert torch.equal(result.codes, codes.long())
    torch.testing.assert_close(result.quantized, quantized, atol=1e-6, rtol=1e-5)
    entropy = 0.2 * (parts.per_sample_entropy - 1.5 * parts.batch_entropy)
    torch.testing.assert_close(result.losses["entropy"], entropy, atol=1e-4, rtol=1e-4)
    commitment = 0.25 * parts.commitment * (bits if spherical else 1)
    torch.testing.assert_close(result.losses["commitment"], commitment)
    weight = normal(3, bits, 3, 5, seed=4)
    ((result.quantized * weight).sum() + sum(result.losses.values())).backward()
    ((quantized * weight).sum() + entropy + commitment).backward()
    torch.testing.assert_close(z.grad, other.grad, atol=1e-4, rtol=1e-4)
