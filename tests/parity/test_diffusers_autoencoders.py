"""The convolutional autoencoders beside the classes of diffusers: random weights copied across, outputs equal to float noise."""

import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stages.parts.autoencoders import CNNConfig, KLCNNConfig
from stages.parts.autoencoders.cnn import Attention, ConvolutionalConfig, Double, Halve, ResidualBlock
from stages.recipe import load_recipe

# 128 channels and up, because diffusers has one number of groups for all widths
SMALL_KL = KLCNNConfig(downsample=4, channels=128, multipliers=(1, 1, 2), blocks_per_level=1, latent_channels=3)
SMALL_VQ = CNNConfig(
    downsample=4, channels=128, multipliers=(1, 1, 2), blocks_per_level=1, latent_channels=6, quantizer={"kind": "vq", "codebook_size": 23, "codebook_dim": 5}
)  # fmt: skip


def their_name(name: str) -> str:
    """Our name of a weight below `encoder.` or `decoder.` as diffusers calls it, the numbering of layers aside."""
    for ours, theirs in [
        ("shortcut", "conv_shortcut"), (".norm.", ".group_norm."), ("query", "to_q"), ("key", "to_k"), ("value", "to_v"),
        (".out.", ".to_out.0."), ("norm_out", "conv_norm_out"),
    ]:  # fmt: skip
        name = name.replace(ours, theirs)
    return name


def their_layers(config: ConvolutionalConfig) -> dict[str, list[str]]:
    """diffusers' module names in the order of our `layers`, for encoder and decoder."""
    levels, blocks = len(config.multipliers), config.blocks_per_level

    def level(kind: str, index: int, count: int, attention: bool) -> Iterator[str]:
        for number in range(count):
            yield f"{kind}_blocks.{index}.resnets.{number}"
            if attention:
                yield f"{kind}_blocks.{index}.attentions.{number}"

    middle = ["mid_block.resnets.0", "mid_block.attentions.0", "mid_block.resnets.1"]
    encoder: list[str] = []
    decoder = list(middle)
    for index in range(levels):
        encoder += level("down", index, blocks, config.attention and index == levels - 1)
        encoder += [f"down_blocks.{index}.downsamplers.0"] if index < levels - 1 else []
        decoder += level("up", index, blocks + 1, config.attention and index == 0)
        decoder += [f"up_blocks.{index}.upsamplers.0"] if index < levels - 1 else []
    return {"encoder": encoder + middle, "decoder": decoder}


def translated(ours: nn.Module, config: ConvolutionalConfig) -> dict[str, Tensor]:
    """Our weights under diffusers' names."""
    layers = their_layers(config)
    top = {
        "to_moments": "quant_conv", "from_latents": "post_quant_conv",
        "quantizer.project_in": "quant_conv", "quantizer.project_out": "post_quant_conv", "quantizer.codebook": "quantize.embedding.weight",
    }  # fmt: skip
    weights = {}
    for name, value in ours.state_dict().items():
        if name in ("latent_shift", "latent_scale", "quantizer.counts"):  # what only training keeps
            continue
        if matched := re.fullmatch(r"(encoder|decoder)\.layers\.(\d+)\.(.*)", name):
            part, number, rest = matched.groups()
            target = f"{part}.{layers[part][int(number)]}.{their_name('.' + rest + ' ').strip(' .')}"
        elif name.startswith(("encoder.", "decoder.")):
            target = their_name(name)
        else:
            prefix = next(prefix for prefix in top if name.startswith(prefix))
            target = name.replace(prefix, top[prefix])
        assert target not in weights
        weights[target] = value
    return weights


def randomised(module: nn.Module) -> nn.Module:
    """Norms and biases too away from where they start, so that a swapped one shows."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in module.named_parameters():
        if parameter.dim() == 1:
            with torch.no_grad():
                noise = 0.3 * torch.randn(parameter.shape, generator=generator)
                parameter.copy_(noise + (1 if "norm" in name and name.endswith("weight") else 0))
    return module


def block_types(config: ConvolutionalConfig, kind: str) -> list[str]:
    plain, attentive = {"down": ("DownEncoderBlock2D", "AttnDownEncoderBlock2D"), "up": ("UpDecoderBlock2D", "AttnUpDecoderBlock2D")}[kind]
    types = [plain] * len(config.multipliers)
    if config.attention:
        types[-1 if kind == "down" else 0] = attentive
    return types


def their_keys(config: ConvolutionalConfig) -> dict[str, Any]:
    return {
        "down_block_types": block_types(config, "down"),
        "up_block_types": block_types(config, "up"),
        "block_out_channels": [config.channels * multiplier for multiplier in config.multipliers],
        "layers_per_block": config.blocks_per_level,
        "latent_channels": config.latent_channels,
        "norm_num_groups": 32,
    }


def pictures() -> Tensor:
    return torch.rand(2, 3, 16, 24, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.mark.rung("agrees", "kl-autoencoder")
@torch.no_grad()
def test_kl_cnn_is_diffusers_autoencoder_kl() -> None:
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    ours = randomised(SMALL_KL.build()).eval()
    theirs = AutoencoderKL(**their_keys(SMALL_KL)).eval()
    theirs.load_state_dict(translated(ours, SMALL_KL), strict=True)
    mean, log_variance = ours.moments(pictures())
    posterior = theirs.encode(pictures()).latent_dist
    torch.testing.assert_close(mean, posterior.mean, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(log_variance, posterior.logvar, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(ours.decode(mean), theirs.decode(mean).sample, atol=1e-4, rtol=1e-4)
    kl = ours.reconstruct(pictures(), torch.Generator().manual_seed(0)).losses["kl"]
    torch.testing.assert_close(kl * 3 * 16 * 24, posterior.kl().mean(), atol=1e-5, rtol=1e-4)


@pytest.mark.rung("agrees", "vqgan")
@torch.no_grad()
def test_cnn_is_diffusers_vq_model() -> None:
    from diffusers import VQModel

    torch.manual_seed(0)
    ours = randomised(SMALL_VQ.build()).eval()
    rows = ours.quantizer.project_in(ours.encoder(pictures())).permute(0, 2, 3, 1).reshape(-1, 5)
    ours.quantizer.codebook.copy_(rows[:23] + 0.01)  # codes among the latents, so that many are used
    theirs = VQModel(**their_keys(SMALL_VQ), num_vq_embeddings=23, vq_embed_dim=5).eval()
    theirs.load_state_dict(translated(ours, SMALL_VQ), strict=True)
    codes = ours.encode_codes(pictures())
    latents = theirs.encode(pictures()).latents
    quantized, _, (_, _, their_codes) = theirs.quantize(latents)
    assert len(codes.unique()) > 3
    assert torch.equal(codes.flatten(), their_codes)
    torch.testing.assert_close(ours.quantizer.project_in(ours.encoder(pictures())), latents, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(ours.decode_codes(codes), theirs.decode(latents).sample, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(ours.encode(pictures()), theirs.post_quant_conv(quantized), atol=1e-5, rtol=1e-4)


@pytest.mark.rung("agrees", "kl-autoencoder-16")
def test_kl_cnn_without_pointwise_convolutions_is_diffusers_autoencoder_kl() -> None:
    """As in Stable Diffusion 3, whose latents are shifted too."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    config = KLCNNConfig(
        downsample=2, channels=128, multipliers=(1, 2), blocks_per_level=1, latent_channels=6, pointwise=False, latent_scale=1.5305, latent_shift=0.0609
    )  # fmt: skip
    ours = randomised(config.build()).eval()
    theirs = AutoencoderKL(**their_keys(config), use_quant_conv=False, use_post_quant_conv=False).eval()
    theirs.load_state_dict(translated(ours, config), strict=True)
    mean = theirs.encode(pictures()).latent_dist.mean
    torch.testing.assert_close(ours.encode(pictures()), (mean - 0.0609) * 1.5305, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(ours.decode((mean - 0.0609) * 1.5305), theirs.decode(mean).sample, atol=1e-4, rtol=1e-4)


def at_paper_size(name: str) -> Any:
    """The autoencoder of a recipe."""
    (config,) = load_recipe(name, size="paper").autoencoders.values()
    return config


@pytest.mark.parametrize("name", ["kl-autoencoder", "kl-autoencoder-16", "vqgan", "llamagen-vq", "chameleon-vq"])
def test_published_configurations_have_every_weight_of_the_public_class(name: str) -> None:
    """Equal names, shapes and counts, on the meta device."""
    from diffusers import AutoencoderKL, VQModel

    config = at_paper_size(name)
    with torch.device("meta"):
        ours = config.build()
        if isinstance(config, CNNConfig):
            theirs = VQModel(**their_keys(config), num_vq_embeddings=config.quantizer.size, vq_embed_dim=config.quantizer.dim)
        else:
            theirs = AutoencoderKL(**their_keys(config), use_quant_conv=config.pointwise, use_post_quant_conv=config.pointwise)
    assert {name: value.shape for name, value in translated(ours, config).items()} == {n: v.shape for n, v in theirs.state_dict().items()}
    assert {type(layer) for layer in ours.encoder.layers} == {ResidualBlock, Attention, Halve}
    assert Double in {type(layer) for layer in ours.decoder.layers}


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_counts_of_transformers_classes() -> None:
    """Chameleon's published encoder and codebook (its decoder is not in the library), and Janus, which draws with LlamaGen's tokenizer."""
    from transformers.models.chameleon.configuration_chameleon import ChameleonVQVAEConfig
    from transformers.models.chameleon.modeling_chameleon import ChameleonVQVAE
    from transformers.models.janus.configuration_janus import JanusVQVAEConfig
    from transformers.models.janus.modeling_janus import JanusVQVAE

    with torch.device("meta"):
        chameleon, janus = ChameleonVQVAE(ChameleonVQVAEConfig()), JanusVQVAE(JanusVQVAEConfig())
        ours = at_paper_size("chameleon-vq").build()
        assert count(ours.encoder) == count(chameleon.encoder)
        assert count(ours.encoder) + count(ours.quantizer) == count(chameleon)
        assert count(at_paper_size("llamagen-vq").build()) == count(janus)
