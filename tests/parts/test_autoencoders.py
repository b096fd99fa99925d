"""Autoencoders: shapes on grids that are not square, both directions, published sizes, latents of unit variance."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from stages.errors import DataError, RecipeError
from stages.parts.autoencoders import (
    AUTOENCODERS,
    Autoencoder,
    AutoencoderConfig,
    CNNConfig,
    DiscreteAutoencoder,
    KLCNNConfig,
    StridedCNNConfig,
    ViT1DConfig,
    ViTConfig,
)
from stages.parts.autoencoders.cnn import AdaptiveNorm
from stages.parts.autoencoders.kl_cnn import KLAutoencoder
from stages.parts.config import parse_part

VQ = {"kind": "vq", "codebook_size": 11, "codebook_dim": 6}
CONFIGS: dict[str, AutoencoderConfig] = {
    "cnn": CNNConfig(downsample=4, channels=8, multipliers=(1, 1, 2), blocks_per_level=1, latent_channels=5, quantizer=VQ),
    "cnn-patches": CNNConfig(downsample=8, patch_size=4, channels=8, multipliers=(1, 2), attention=False, latent_channels=5, quantizer=VQ),
    "cnn-without-attention": CNNConfig(
        downsample=4,
        channels=8,
        multipliers=(1, 1, 2),
        blocks_per_level=1,
        decoder_blocks_per_level=1,
        middle_blocks=3,
        attention=False,
        middle_attention=False,
        upsample="depth-to-space",
        adaptive_norm=True,
        latent_channels=5,
        quantizer=VQ,
    ),
    "vit": ViTConfig(downsample=4, width=24, depth=2, decoder_depth=1, heads=3, latent_channels=5, quantizer=VQ),
    "vit-1d": ViT1DConfig(image_size=16, num_latents=7, downsample=4, width=24, depth=2, heads=3, latent_channels=5, quantizer=VQ),
    "depth": CNNConfig(
        downsample=4,
        channels=8,
        multipliers=(1, 1, 2),
        attention=False,
        latent_channels=5,
        quantizer={"kind": "residual", "codebook_size": 11, "codebook_dim": 5, "depth": 3, "decay": 0.0},
    ),
    "scales": CNNConfig(
        downsample=4,
        channels=8,
        multipliers=(1, 1, 2),
        attention=False,
        latent_channels=5,
        quantizer={"kind": "multi-scale", "codebook_size": 11, "codebook_dim": 5, "sides": [1, 2, 4], "phis": 2},
    ),
    "vit-signs": ViTConfig(
        downsample=4, width=24, depth=1, heads=3, latent_channels=4, quantizer={"kind": "lfq", "bits": 4, "project": False}
    ),
    "vq-vae": StridedCNNConfig(downsample=4, channels=8, residual_channels=6, latent_channels=5, quantizer=VQ),
    "vq-vae-2": StridedCNNConfig(
        downsample=2, levels=2, channels=8, residual_channels=6, residual_blocks=1, latent_channels=10, quantizer=VQ
    ),
    "kl-cnn": KLCNNConfig(downsample=4, channels=8, multipliers=(1, 1, 2), blocks_per_level=1, latent_channels=5),
    "kl-cnn-bare": KLCNNConfig(downsample=2, channels=8, multipliers=(1, 2), latent_channels=5, pointwise=False, attention=True),
}

DISCRETE = [name for name, config in CONFIGS.items() if config.codebook_size is not None]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(height: int = 16, width: int = 24, b: int = 2) -> Tensor:
    return torch.rand(b, 3, height, width, generator=generator()) * 2 - 1


def size_for(name: str) -> tuple[int, int]:
    """Height and width of pictures to try: not square where that is allowed."""
    config = CONFIGS[name]
    return (config.image_size, config.image_size) if isinstance(config, ViT1DConfig) else (16, 24)


def built(name: str) -> Autoencoder:
    torch.manual_seed(0)
    return CONFIGS[name].build().eval()


def test_every_kind_of_the_family_is_tried() -> None:
    assert {config.kind for config in CONFIGS.values()} == set(AUTOENCODERS)


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_pictures_become_a_grid_and_come_back_in_their_size(name: str) -> None:
    autoencoder, (height, width) = built(name), size_for(name)
    h, w = autoencoder.grid(height, width)
    assert (h, w) == ((1, 7) if name == "vit-1d" else (height // autoencoder.downsample, width // autoencoder.downsample))
    pictures = images(height, width)
    latents = autoencoder.encode(pictures)
    assert latents.shape == (2, autoencoder.latent_channels, h, w)
    assert autoencoder.decode(latents).shape == (2, 3, height, width)
    if autoencoder.codebook_size is None:
        with pytest.raises(TypeError, match="no codebook"):
            autoencoder.encode_codes(pictures)
    else:
        codes = autoencoder.encode_codes(pictures)
        assert codes.shape == (2, *autoencoder.config.code_shape(height, width))
        assert codes.dtype == torch.int64
        assert int(codes.max()) < autoencoder.codebook_size
        assert torch.equal(autoencoder.decode_codes(codes, (h, w)), autoencoder.decode(latents))


@pytest.mark.parametrize(
    ("name", "shape"), [("cnn", (4, 4)), ("vit", (4, 4)), ("vit-1d", (7,)), ("vq-vae", (4, 4)), ("vq-vae-2", (16 + 64,))]
)
@torch.no_grad()
def test_codes_of_a_square_picture_decode_without_a_grid(name: str, shape: tuple[int, ...]) -> None:
    autoencoder, pictures = built(name), images(16, 16)
    codes = autoencoder.encode_codes(pictures)
    assert autoencoder.config.code_shape(16, 16) == codes.shape[1:] == shape
    assert torch.equal(autoencoder.decode_codes(codes), autoencoder.decode(autoencoder.encode(pictures)))


@pytest.mark.parametrize("name", DISCRETE)
@torch.no_grad()
def test_lookup_of_the_codes_is_what_was_quantized(name: str) -> None:
    autoencoder, pictures = built(name), images(*size_for(name))
    assert isinstance(autoencoder, DiscreteAutoencoder)
    quantized = autoencoder.quantizer.quantize(autoencoder.encoder(pictures))
    assert torch.equal(autoencoder.quantizer.lookup(quantized.codes, autoencoder.grid(*size_for(name))), quantized.quantized)
    assert torch.equal(autoencoder.encode(pictures), quantized.quantized)


@pytest.mark.parametrize("name", CONFIGS)
def test_reconstruction_trains_every_weight(name: str) -> None:
    autoencoder, pictures = built(name).train(), images(*size_for(name))
    result = autoencoder.reconstruct(pictures, generator())
    loss = F.mse_loss(result.images, pictures) + torch.stack(list(result.losses.values())).sum()
    loss.backward()
    for address, parameter in autoencoder.named_parameters():
        assert parameter.grad is not None, address
        assert parameter.grad.isfinite().all(), address
        if not address.endswith("key.bias"):  # shifts all scores of a query alike: softmax does not see it
            assert parameter.grad.abs().max() > 0, address
    assert autoencoder.last_layer.grad is not None


@pytest.mark.parametrize("name", DISCRETE)
@torch.no_grad()
def test_reconstruction_is_what_the_codes_decode_to(name: str) -> None:
    autoencoder, size = built(name), size_for(name)
    result = autoencoder.reconstruct(images(*size), generator())
    assert result.codes is not None
    assert result.codes.shape == (2, *autoencoder.config.code_shape(*size))
    assert torch.equal(autoencoder.decode_codes(result.codes, autoencoder.grid(*size)), result.images)


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_pictures_of_a_batch_do_not_see_each_other(name: str) -> None:
    autoencoder = built(name)
    both = images(*size_for(name), b=2)
    torch.testing.assert_close(autoencoder.encode(both)[1:], autoencoder.encode(both[1:]), atol=1e-5, rtol=1e-4)


def test_sizes_that_do_not_divide_are_refused_with_the_nearest_that_does() -> None:
    with pytest.raises(DataError, match="16 x 30") as caught:
        built("cnn").encode(images(16, 30))
    assert "16 x 32" in caught.value.hint
    with pytest.raises(DataError) as caught:
        built("cnn").grid(29, 29)
    assert "--size 28" in caught.value.hint
    with pytest.raises(DataError, match="multiples of 4"):  # the top grid is half of the bottom one
        built("vq-vae-2").encode(images(16, 22))
    with pytest.raises(DataError, match="takes 16 x 16 only") as caught:
        built("vit-1d").encode(images(32, 32))
    assert "--size 16" in caught.value.hint


@torch.no_grad()
def test_kl_has_its_closed_form() -> None:
    """Against torch's own Gaussians; the published sum over latents, divided by the numbers of a picture."""
    autoencoder = built("kl-cnn")
    assert isinstance(autoencoder, KLAutoencoder)
    mean, log_variance = autoencoder.moments(images())
    posterior = torch.distributions.Normal(mean, (0.5 * log_variance).exp())
    expected = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0.0, 1.0)).sum((1, 2, 3)) / (3 * 16 * 24)
    torch.testing.assert_close(autoencoder.reconstruct(images(), generator()).losses["kl"], expected.mean())


@torch.no_grad()
def test_training_decodes_samples_of_the_posterior() -> None:
    autoencoder = built("kl-cnn")
    assert isinstance(autoencoder, KLAutoencoder)
    drawn = [autoencoder.reconstruct(images(), generator(seed)).images for seed in (1, 1, 2)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    autoencoder.to_moments.weight.zero_()  # mean 0, variance 1: what is decoded is the noise itself
    autoencoder.to_moments.bias.zero_()
    noise = torch.randn(2, 5, 4, 6, generator=generator(3))
    torch.testing.assert_close(autoencoder.reconstruct(images(), generator(3)).images, autoencoder.decode(noise))


@torch.no_grad()
def test_measured_latents_have_mean_zero_and_variance_one_in_every_channel() -> None:
    autoencoder = built("kl-cnn")
    assert isinstance(autoencoder, KLAutoencoder)
    before = autoencoder.decode(autoencoder.encode(images()))
    pictures = images(b=6)
    autoencoder.fit_latent_scale([pictures[:4], pictures[4:]])
    latents = autoencoder.encode(pictures)
    torch.testing.assert_close(latents.mean((0, 2, 3)), torch.zeros(5), atol=1e-4, rtol=0)
    torch.testing.assert_close(latents.std((0, 2, 3), correction=0), torch.ones(5), atol=1e-3, rtol=0)
    torch.testing.assert_close(autoencoder.decode(autoencoder.encode(images())), before, atol=1e-4, rtol=1e-4)  # decode undoes it


@torch.no_grad()
def test_a_configured_scale_is_kept() -> None:
    autoencoder = KLCNNConfig(downsample=2, channels=8, multipliers=(1, 1), latent_scale=0.18215, latent_shift=0.5).build().eval()
    mean, _ = autoencoder.moments(images())
    autoencoder.fit_latent_scale([images()])
    torch.testing.assert_close(autoencoder.encode(images()), (mean - 0.5) * 0.18215)


@pytest.mark.parametrize(
    ("config", "published"),
    [
        (KLCNNConfig(), 83_653_863),  # AutoencoderKL of Stable Diffusion 1
        (CNNConfig(), 72_141_699),  # vqgan_imagenet_f16_1024, see the parity tests
        (KLCNNConfig(latent_channels=16, pointwise=False), 83_819_683),  # AutoencoderKL of Stable Diffusion 3
        (
            CNNConfig(quantizer={"kind": "vq", "codebook_size": 16384, "codebook_dim": 8}),
            71_883_403,
        ),  # LlamaGen's VQ-16, see the parity tests
    ],
)
def test_paper_sizes_have_the_published_numbers_of_parameters(config: AutoencoderConfig, published: int) -> None:
    with torch.device("meta"):
        autoencoder = config.build()
    assert sum(parameter.numel() for parameter in autoencoder.parameters()) == published


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ({"kind": "cnn", "downsample": 8}, "gives 16"),
        ({"kind": "kl-cnn", "downsample": 8, "patch_size": 2}, "gives 16"),
        ({"kind": "cnn", "channels": 30}, "multiple of 4"),
        ({"kind": "cnn", "quantizer": {"kind": "vg"}}, "no 'vg'"),
        ({"kind": "cnn", "quantizer": {"kind": "vq", "codebook": 5}}, "no such key"),
        ({"kind": "kl-cnn", "quantizer": {"kind": "vq"}}, "no such key"),
        ({"kind": "vit", "width": 30, "heads": 4}, "heads must divide"),
        ({"kind": "vit-1d", "image_size": 250}, "multiple of downsample"),
        ({"kind": "strided-cnn", "downsample": 6}, "power of two"),
        ({"kind": "strided-cnn", "levels": 2, "latent_channels": 5}, "must be even"),
        ({"kind": "strided-cnn", "levels": 2, "quantizer": {"kind": "residual"}}, "every latent one code"),
        ({"kind": "vit-1d", "quantizer": {"kind": "multi-scale"}}, "every latent one code"),
    ],
)
def test_impossible_configs_say_why(table: dict[str, object], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        parse_part(AUTOENCODERS, table, "autoencoders.image")


@pytest.mark.parametrize("config", [CNNConfig, KLCNNConfig])
def test_a_local_encoder_sees_one_cell_at_a_time(config: type[CNNConfig] | type[KLCNNConfig]) -> None:
    torch.manual_seed(0)
    encoder = config(downsample=4, patch_size=2, multipliers=(1, 1), channels=8, latent_channels=3, local=True).build().eval().encoder
    pictures = torch.randn(2, 3, 8, 12)
    with torch.no_grad():
        latents = encoder(pictures)
        assert latents.shape[2:] == (2, 3)
        alone = encoder(pictures[1:, :, 4:8, 8:12])  # the last cell, as a picture of its own
        torch.testing.assert_close(latents[1:, :, 1:, 2:], alone, atol=1e-5, rtol=1e-4)
        pictures[:, :, :4, :4] += 1
        changed = (encoder(pictures) - latents).abs().amax(dim=(0, 1)) > 1e-6
    assert changed.tolist() == [[True, False, False], [False, False, False]]


@torch.no_grad()
def test_a_transformer_sees_where_a_patch_is() -> None:
    """Patches that change places do not just change places in the latents."""
    encoder = built("vit").encoder
    pictures = images(8, 8)
    swapped = torch.cat([pictures[..., 4:], pictures[..., :4]], dim=3)
    latents = encoder(pictures)
    assert not torch.allclose(encoder(swapped), latents.flip(3), atol=1e-3)


@torch.no_grad()
def test_the_top_codes_steer_the_bottom_ones_and_the_picture() -> None:
    """Of a hierarchy: the bottom is quantized knowing the top, and both grids reach the decoder."""
    autoencoder = built("vq-vae-2")
    codes = autoencoder.encode_codes(images())
    for place in (0, 24):  # the first of the 24 top codes, the first of the bottom ones
        other = codes.clone()
        other[:, place] = (other[:, place] + 1) % 11
        assert not torch.equal(autoencoder.decode_codes(other, (8, 12)), autoencoder.decode_codes(codes, (8, 12)))
    with torch.no_grad():
        autoencoder.quantizer.top.codebook.add_(1.0)
        autoencoder.quantizer.top.project_out.weight.mul_(30.0)
    assert not torch.equal(autoencoder.encode_codes(images())[:, 24:], codes[:, 24:])
    with pytest.raises(DataError, match="120 codes are not those") as caught:  # of a grid that is not square
        autoencoder.decode_codes(codes)
    assert "not square" in caught.value.hint


@torch.no_grad()
def test_adaptive_norm_follows_the_latents() -> None:
    """Mean and deviation of the latents set shift and scale of the normed features; written out by hand."""
    norm = AdaptiveNorm(5, 8)
    x, latents = torch.randn(2, 8, 3, 4, generator=generator(1)), torch.randn(2, 5, 3, 4, generator=generator(2))
    groups = x.view(2, 2, 4 * 12)
    normed = ((groups - groups.mean(2, keepdim=True)) / groups.std(2, correction=0, keepdim=True)).view_as(x)
    scale, shift = norm.scale(latents.std((2, 3))), norm.shift(latents.mean((2, 3)))
    torch.testing.assert_close(norm(x, latents), scale[:, :, None, None] * normed + shift[:, :, None, None], atol=1e-4, rtol=1e-4)
