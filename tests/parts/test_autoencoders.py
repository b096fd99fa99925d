"""Autoencoders: shapes on grids that are not square, both directions, published sizes, latents of unit variance."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from stages.errors import DataError, RecipeError
from stages.parts.autoencoders import AUTOENCODERS, Autoencoder, AutoencoderConfig, CNNConfig, KLCNNConfig
from stages.parts.autoencoders.kl_cnn import KLAutoencoder
from stages.parts.config import parse_part

VQ = {"kind": "vq", "codebook_size": 11, "codebook_dim": 6}
CONFIGS: dict[str, AutoencoderConfig] = {
    "cnn": CNNConfig(downsample=4, channels=8, multipliers=(1, 1, 2), blocks_per_level=1, latent_channels=5, quantizer=VQ),
    "cnn-patches": CNNConfig(downsample=8, patch_size=4, channels=8, multipliers=(1, 2), attention=False, latent_channels=5, quantizer=VQ),
    "kl-cnn": KLCNNConfig(downsample=4, channels=8, multipliers=(1, 1, 2), blocks_per_level=1, latent_channels=5),
    "kl-cnn-bare": KLCNNConfig(downsample=2, channels=8, multipliers=(1, 2), latent_channels=5, pointwise=False, attention=True),
}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(height: int = 16, width: int = 24, b: int = 2) -> Tensor:
    return torch.rand(b, 3, height, width, generator=generator()) * 2 - 1


def built(name: str) -> Autoencoder:
    torch.manual_seed(0)
    return CONFIGS[name].build().eval()


def test_every_kind_of_the_family_is_tried() -> None:
    assert {config.kind for config in CONFIGS.values()} == set(AUTOENCODERS)


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_pictures_become_a_grid_and_come_back_in_their_size(name: str) -> None:
    autoencoder, config = built(name), CONFIGS[name]
    h, w = autoencoder.grid(16, 24)
    assert (h, w) == (16 // config.downsample, 24 // config.downsample)
    latents = autoencoder.encode(images())
    assert latents.shape == (2, autoencoder.latent_channels, h, w)
    assert autoencoder.decode(latents).shape == (2, 3, 16, 24)
    if autoencoder.codebook_size is None:
        with pytest.raises(TypeError, match="no codebook"):
            autoencoder.encode_codes(images())
    else:
        codes = autoencoder.encode_codes(images())
        assert codes.shape == (2, h, w)
        assert codes.dtype == torch.int64
        assert int(codes.max()) < autoencoder.codebook_size == 11
        assert torch.equal(autoencoder.decode_codes(codes), autoencoder.decode(latents))


@pytest.mark.parametrize("name", CONFIGS)
def test_reconstruction_trains_every_weight(name: str) -> None:
    autoencoder = built(name).train()
    result = autoencoder.reconstruct(images(), generator())
    loss = F.mse_loss(result.images, images()) + torch.stack(list(result.losses.values())).sum()
    loss.backward()
    for address, parameter in autoencoder.named_parameters():
        assert parameter.grad is not None, address
        assert parameter.grad.isfinite().all(), address
        if not address.endswith("key.bias"):  # shifts all scores of a query alike: softmax does not see it
            assert parameter.grad.abs().max() > 0, address
    assert autoencoder.last_layer.grad is not None


@pytest.mark.parametrize("name", ["cnn", "cnn-patches"])
@torch.no_grad()
def test_reconstruction_is_what_the_codes_decode_to(name: str) -> None:
    autoencoder = built(name)
    result = autoencoder.reconstruct(images(), generator())
    assert result.codes is not None
    assert torch.equal(autoencoder.decode_codes(result.codes), result.images)


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_pictures_of_a_batch_do_not_see_each_other(name: str) -> None:
    autoencoder = built(name)
    both = images(b=2)
    torch.testing.assert_close(autoencoder.encode(both)[1:], autoencoder.encode(both[1:]), atol=1e-5, rtol=1e-4)


def test_sizes_that_do_not_divide_are_refused_with_the_nearest_that_does() -> None:
    with pytest.raises(DataError, match="16 x 30") as caught:
        built("cnn").encode(images(16, 30))
    assert "16 x 32" in caught.value.hint
    with pytest.raises(DataError) as caught:
        built("cnn").grid(29, 29)
    assert "--size 28" in caught.value.hint


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
