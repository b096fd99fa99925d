"""Released autoencoders under their published names: `--init` reads them, and what they encode, quantize and decode stays the same.

diffusers and transformers have their classes. For taming transformers, LlamaGen and VAR there is no package; their forward passes are
written here once more, as functions that ask for weights by the published names, so that a run of the function also makes the weights:
random, norms and biases too, so that a swapped one shows.
"""

import json
import os
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from typer.testing import CliRunner

from mmgen_cli.app import app
from stages.data.sample import Sample
from stages.data.shards import ShardWriter, open_shards
from stages.errors import DataError, UsageError
from stages.options import RunOptions
from stages.parts.autoencoders import AUTOENCODERS, Autoencoder
from stages.parts.autoencoders.published import OUR_OWN, translate
from stages.parts.config import parse_part
from stages.pretrain_tokenizer import pretrain_tokenizer
from stages.recipe import load_recipe
from stages.tokenize_shards import tokenize_shards
from stages.training.checkpoint import load_autoencoder, read_weights
from stages.training.released import fill, open_starts, read_released, read_torch

SIZES = {
    "downsample": 4,
    "channels": 128,
    "multipliers": [1, 1, 2],
    "blocks_per_level": 1,
    "attention": True,
}  # 32 groups need 128 channels
VQ_SIZES = {"kind": "cnn", **SIZES, "latent_channels": 6, "quantizer": {"kind": "vq", "codebook_size": 23, "codebook_dim": 5}}
KL_SIZES = {"kind": "kl-cnn", **SIZES, "attention": False, "latent_channels": 3}
QUIET = RunOptions(quiet=True)


@pytest.fixture(autouse=True)
def as_it_was() -> Iterator[None]:
    """Training sets deterministic algorithms; the next test may not want them."""
    yield
    torch.use_deterministic_algorithms(False)


def pictures() -> Tensor:
    return torch.rand(2, 3, 16, 24, generator=torch.Generator().manual_seed(1)) * 2 - 1


# --- the published forward passes, written once more -------------------------------------------------------------------------------


class Weights:
    """A state dict that comes into being as a forward pass asks for it."""

    def __init__(self, device: str = "cpu") -> None:
        self.tensors: dict[str, Tensor] = {}
        self.device, self.generator = device, torch.Generator().manual_seed(0)

    def __call__(self, name: str, *shape: int, mean: float = 0.0, std: float = 0.3) -> Tensor:
        if name not in self.tensors:
            made = torch.empty(shape, device="meta") if self.device == "meta" else torch.randn(shape, generator=self.generator) * std + mean
            self.tensors[name] = made
        return self.tensors[name]

    def conv(self, name: str, x: Tensor, out: int, kernel: int = 3, stride: int = 1, pad: bool = True) -> Tensor:
        weight = self(f"{name}.weight", out, x.shape[1], kernel, kernel, std=(x.shape[1] * kernel**2) ** -0.5)
        return F.conv2d(x, weight, self(f"{name}.bias", out), stride, kernel // 2 if pad else 0)

    def norm(self, name: str, x: Tensor) -> Tensor:
        return F.group_norm(x, 32, self(f"{name}.weight", x.shape[1], mean=1.0), self(f"{name}.bias", x.shape[1]), eps=1e-6)

    def block(self, name: str, x: Tensor, out: int) -> Tensor:
        hidden = self.conv(f"{name}.conv1", F.silu(self.norm(f"{name}.norm1", x)), out)
        hidden = self.conv(f"{name}.conv2", F.silu(self.norm(f"{name}.norm2", hidden)), out)
        return hidden + (x if x.shape[1] == out else self.conv(f"{name}.nin_shortcut", x, out, 1))

    def attention(self, name: str, x: Tensor, joint: bool) -> Tensor:
        """softmax(qᵀk / √c) over all cells, one head; `joint`: one convolution for query, key and value (VAR)."""
        c, normed = x.shape[1], self.norm(f"{name}.norm", x)
        if joint:
            q, k, v = self.conv(f"{name}.qkv", normed, 3 * c, 1).flatten(2).split(c, 1)
        else:
            q, k, v = (self.conv(f"{name}.{letter}", normed, c, 1).flatten(2) for letter in "qkv")
        weights = torch.einsum("bci,bcj->bij", q, k).mul(c**-0.5).softmax(2)
        return x + self.conv(f"{name}.proj_out", torch.einsum("bij,bcj->bci", weights, v).reshape(x.shape), c, 1)


class Published:
    """Encoder and decoder of taming transformers, or with `llamagen` under the names of LlamaGen, or with `joint` as in VAR."""

    def __init__(self, w: Weights, sizes: dict[str, Any], *, llamagen: bool = False, joint: bool = False) -> None:
        self.w, self.sizes, self.llamagen, self.joint = w, sizes, llamagen, joint
        self.widths = [sizes["channels"] * multiplier for multiplier in sizes["multipliers"]]

    def middle(self, half: str, x: Tensor) -> Tensor:
        names = [f"{half}.mid.{i}" for i in range(3)] if self.llamagen else [f"{half}.mid.{n}" for n in ("block_1", "attn_1", "block_2")]
        x = self.w.attention(names[1], self.w.block(names[0], x, x.shape[1]), self.joint)
        return self.w.block(names[2], x, x.shape[1])

    def level(self, stem: str, x: Tensor, width: int, blocks: int, lowest: bool) -> Tensor:
        for i in range(blocks):
            x = self.w.block(f"{stem}.res.{i}" if self.llamagen else f"{stem}.block.{i}", x, width)
            if lowest and self.sizes["attention"]:
                x = self.w.attention(f"{stem}.attn.{i}", x, self.joint)
        return x

    def end(self, half: str, x: Tensor, out: int) -> Tensor:
        return self.w.conv(f"{half}.conv_out", F.silu(self.w.norm(f"{half}.norm_out", x)), out)

    def encode(self, images: Tensor, out: int) -> Tensor:
        x, levels = self.w.conv("encoder.conv_in", images, self.sizes["channels"]), len(self.widths)
        for i, width in enumerate(self.widths):
            stem = f"encoder.conv_blocks.{i}" if self.llamagen else f"encoder.down.{i}"
            x = self.level(stem, x, width, self.sizes["blocks_per_level"], i == levels - 1)
            if i < levels - 1:
                x = self.w.conv(f"{stem}.downsample.conv", F.pad(x, (0, 1, 0, 1)), width, stride=2, pad=False)
        return self.end("encoder", self.middle("encoder", x), out)

    def decode(self, latents: Tensor) -> Tensor:
        levels = len(self.widths)
        x = self.middle("decoder", self.w.conv("decoder.conv_in", latents, self.widths[-1]))
        for i in reversed(range(levels)):
            stem = f"decoder.conv_blocks.{levels - 1 - i}" if self.llamagen else f"decoder.up.{i}"
            x = self.level(stem, x, self.widths[i], self.sizes["blocks_per_level"] + 1, i == levels - 1)
            if i > 0:
                x = self.w.conv(f"{stem}.upsample.conv", x.repeat_interleave(2, 2).repeat_interleave(2, 3), self.widths[i])
        return self.end("decoder", x, 3)


class PublishedVQ(Published):
    """VQGAN; with llamagen, codes and latents are compared at unit length."""

    def __init__(self, w: Weights, sizes: dict[str, Any], **style: bool) -> None:
        super().__init__(w, sizes, **style)
        self.quantizer = sizes["quantizer"]

    def before_codes(self, images: Tensor) -> Tensor:
        latents = self.w.conv("quant_conv", self.encode(images, self.sizes["latent_channels"]), self.quantizer["codebook_dim"], 1)
        return F.normalize(latents, dim=1) if self.llamagen else latents

    def codebook(self) -> Tensor:
        table = self.w("quantize.embedding.weight", self.quantizer["codebook_size"], self.quantizer["codebook_dim"], std=1.0)
        return F.normalize(table, dim=1) if self.llamagen else table

    def codes(self, images: Tensor) -> Tensor:
        rows = self.before_codes(images)
        b, d, h, w = rows.shape
        return torch.cdist(rows.permute(0, 2, 3, 1).reshape(-1, d), self.codebook()).argmin(1).view(b, h, w)

    def decode_codes(self, codes: Tensor) -> Tensor:
        quantized = F.embedding(codes, self.codebook()).permute(0, 3, 1, 2)
        return self.decode(self.w.conv("post_quant_conv", quantized, self.sizes["latent_channels"], 1))


class PublishedVAR(Published):
    """VAR's tokenizer: codes of ever finer square grids, what is left over averaged down, looked up, brought back, convolved, subtracted."""

    def __init__(self, w: Weights, sizes: dict[str, Any]) -> None:
        super().__init__(w, sizes, joint=True)
        self.quantizer = sizes["quantizer"]
        self.sides = self.quantizer["sides"]

    def before_codes(self, images: Tensor) -> Tensor:
        return self.w.conv("quant_conv", self.encode(images, self.sizes["latent_channels"]), self.quantizer["codebook_dim"])

    def codebook(self) -> Tensor:
        return self.w("quantize.embedding.weight", self.quantizer["codebook_size"], self.quantizer["codebook_dim"], std=1.0)

    def part(self, codes: Tensor, scale: int) -> Tensor:
        """(b, side · side) codes → what they add to the latents. Of four convolutions at 1/12, 13/36, 23/36, 11/12 the nearest."""
        b, side, last = len(codes), self.sides[scale], len(self.sides) - 1
        vectors = F.embedding(codes, self.codebook()).view(b, side, side, -1).permute(0, 3, 1, 2)
        if scale < last:
            vectors = F.interpolate(vectors, size=(self.sides[-1],) * 2, mode="bicubic")
        nearest = min(range(4), key=lambda i: abs(1 / 12 + i * (11 / 12 - 1 / 12) / 3 - scale / last))
        for i in range(4):  # all of them are there, used or not
            self.w.conv(f"quantize.quant_resi.qresi_ls.{i}", vectors, vectors.shape[1])
        return 0.5 * vectors + 0.5 * self.w.conv(f"quantize.quant_resi.qresi_ls.{nearest}", vectors, vectors.shape[1])

    def codes(self, images: Tensor) -> Tensor:
        left, found = self.before_codes(images), []
        for scale, side in enumerate(self.sides):
            rows = F.adaptive_avg_pool2d(left, side).flatten(2).transpose(1, 2)
            found.append(torch.cdist(rows, self.codebook().expand(len(rows), -1, -1)).argmin(2))
            left = left - self.part(found[-1], scale)
        return torch.cat(found, 1)

    def decode_codes(self, codes: Tensor) -> Tensor:
        parts = codes.split([side**2 for side in self.sides], 1)
        latents = torch.stack([self.part(part, scale) for scale, part in enumerate(parts)]).sum(0)
        return self.decode(self.w.conv("post_quant_conv", latents, self.sizes["latent_channels"]))


class PublishedKL(Published):
    """The autoencoder of latent diffusion; without `pointwise` as in SD3 and FLUX."""

    def moments(self, images: Tensor) -> Tensor:
        channels = 2 * self.sizes["latent_channels"]
        moments = self.encode(images, channels)
        return self.w.conv("quant_conv", moments, channels, 1) if self.sizes.get("pointwise", True) else moments

    def decode_latents(self, latents: Tensor) -> Tensor:
        if self.sizes.get("pointwise", True):
            latents = self.w.conv("post_quant_conv", latents, latents.shape[1], 1)
        return self.decode(latents)


def spread_codes(rows: Tensor, codebook: Tensor) -> None:
    """Put the codes among the latents (b, d, h, w), so that many are used."""
    flat = rows.permute(0, 2, 3, 1).reshape(-1, rows.shape[1])
    codebook.copy_(flat[torch.arange(len(codebook)) % len(flat)] + 0.01)


# --- reading them ------------------------------------------------------------------------------------------------------------------


class Holder(nn.Module):
    """An autoencoder at its address, as pretrain-tokenizer has it."""

    def __init__(self, sizes: dict[str, Any], name: str = "a") -> None:
        super().__init__()
        torch.manual_seed(7)
        self.autoencoders = nn.ModuleDict({name: parse_part(AUTOENCODERS, sizes, "autoencoders.a").build()}).eval()  # type: ignore[attr-defined]

    @property
    def autoencoder(self) -> Autoencoder:
        (module,) = self.autoencoders.values()
        assert isinstance(module, Autoencoder)
        return module


def started(sizes: dict[str, Any], source: Path | str) -> Any:
    holder = Holder(sizes)
    fill(holder, open_starts({"autoencoders.a": str(source)})[0])
    return holder.autoencoder


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def save_torch(path: Path, content: Any) -> Path:
    torch.save(content, path)
    return path


def vqgan_weights() -> PublishedVQ:
    theirs = PublishedVQ(Weights(), VQ_SIZES)
    theirs.decode_codes(theirs.codes(pictures()))
    spread_codes(theirs.before_codes(pictures()), theirs.codebook())
    return theirs


@torch.no_grad()
def test_taming_vqgan(tmp_path: Path) -> None:
    """A Lightning checkpoint: weights under `state_dict`, those of the loss among them."""
    theirs = vqgan_weights()
    loss = {"loss.discriminator.main.0.weight": torch.zeros(3), "loss.perceptual_loss.lin0.model.1.weight": torch.zeros(2)}
    path = save_torch(tmp_path / "last.ckpt", {"epoch": 3, "state_dict": {**theirs.w.tensors, **loss}})
    ours = started(VQ_SIZES, path)
    codes = theirs.codes(pictures())
    assert len(codes.unique()) > 5
    assert torch.equal(ours.encode_codes(pictures()), codes)
    close(ours.decode_codes(codes), theirs.decode_codes(codes))
    assert (ours.quantizer.counts == 100).all()


@torch.no_grad()
def test_llamagen(tmp_path: Path) -> None:
    """Codes at unit length; the file holds the weights and their average, which is the one that is meant, and a counter."""
    sizes = {**VQ_SIZES, "quantizer": {**VQ_SIZES["quantizer"], "l2_normalize": True}}  # type: ignore[dict-item]
    theirs = PublishedVQ(Weights(), sizes, llamagen=True)
    theirs.decode_codes(theirs.codes(pictures()))
    spread_codes(3 * theirs.before_codes(pictures()), theirs.w.tensors["quantize.embedding.weight"])
    weights = {**theirs.w.tensors, "quantize.codebook_used": torch.zeros(65536)}
    path = save_torch(tmp_path / "vq.pt", {"model": {name: value + 1 for name, value in weights.items()}, "ema": weights, "steps": 9})
    ours = started(sizes, path)
    codes = theirs.codes(pictures())
    assert len(codes.unique()) > 5
    assert torch.equal(ours.encode_codes(pictures()), codes)
    close(ours.decode_codes(codes), theirs.decode_codes(codes))


@torch.no_grad()
def test_var(tmp_path: Path) -> None:
    """Query, key and value in one convolution, 3 x 3 around the codes, four φ for all scales; a counter of hits is left out."""
    images = pictures()[..., :16]
    sizes = {**VQ_SIZES, "quantizer": {"kind": "multi-scale", "codebook_size": 23, "codebook_dim": 5, "sides": [1, 2, 3, 4]}}
    theirs = PublishedVAR(Weights(), sizes)
    theirs.decode_codes(theirs.codes(images))
    spread_codes(theirs.before_codes(images), theirs.codebook())
    path = save_torch(tmp_path / "vae.pth", {**theirs.w.tensors, "quantize.ema_vocab_hit_SV": torch.zeros(4, 23)})
    ours = started(sizes, path)
    codes = theirs.codes(images)
    assert len(codes.unique()) > 5
    assert torch.equal(ours.encode_codes(images), codes)
    close(ours.decode_codes(codes), theirs.decode_codes(codes))


@pytest.mark.parametrize("pointwise", [True, False])
@torch.no_grad()
def test_latent_diffusion(tmp_path: Path, pointwise: bool) -> None:
    """Inside a whole model (first_stage_model.), beside other weights that are none of its business."""
    sizes = {**KL_SIZES, "pointwise": pointwise}
    theirs = PublishedKL(Weights(), sizes)
    theirs.decode_latents(theirs.moments(pictures())[:, :3])
    inside = {f"first_stage_model.{name}": value for name, value in theirs.w.tensors.items()}
    save_file({**inside, "model.diffusion_model.out.0.weight": torch.zeros(4)}, tmp_path / "sd.safetensors")
    ours = started(sizes, tmp_path / "sd.safetensors")
    mean, log_variance = theirs.moments(pictures()).chunk(2, 1)
    close(ours.encode(pictures()), mean)
    close(ours.moments(pictures())[1], log_variance.clamp(-30, 20))
    close(ours.decode(mean), theirs.decode_latents(mean))


# diffusers and transformers


def randomised(module: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.dim() == 1:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator) + (1 if "norm" in name and "weight" in name else 0))
    return module.eval()


def diffusers_keys(sizes: dict[str, Any]) -> dict[str, Any]:
    levels = len(sizes["multipliers"])
    down, up = ["DownEncoderBlock2D"] * levels, ["UpDecoderBlock2D"] * levels
    if sizes["attention"]:
        down[-1], up[0] = "AttnDownEncoderBlock2D", "AttnUpDecoderBlock2D"
    return {
        "down_block_types": down,
        "up_block_types": up,
        "block_out_channels": [sizes["channels"] * multiplier for multiplier in sizes["multipliers"]],
        "layers_per_block": sizes["blocks_per_level"],
        "latent_channels": sizes["latent_channels"],
        "norm_num_groups": 32,
    }


def their_kl(sizes: dict[str, Any], **more: Any) -> Any:
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    pointwise = sizes.get("pointwise", True)
    return randomised(AutoencoderKL(**diffusers_keys(sizes), use_quant_conv=pointwise, use_post_quant_conv=pointwise, **more))


@pytest.mark.rung("agrees", "kl-autoencoder", "kl-autoencoder-16")
@pytest.mark.parametrize(("pointwise", "shift"), [(True, None), (False, 0.0609)])
@torch.no_grad()
def test_diffusers_autoencoder_kl(tmp_path: Path, pointwise: bool, shift: float | None) -> None:
    """Stable Diffusion's, and SD3's without the 1 x 1 convolutions, as save_pretrained writes them, in several pieces too."""
    sizes = {**KL_SIZES, "pointwise": pointwise, "latent_scale": 1.5305, "latent_shift": shift or 0.0}
    theirs = their_kl(sizes, scaling_factor=1.5305, shift_factor=shift)
    theirs.save_pretrained(tmp_path / "vae", max_shard_size="4MB" if shift else "10GB")
    assert (len(list((tmp_path / "vae").glob("*.safetensors"))) > 1) == bool(shift)
    ours = started(sizes, tmp_path / "vae")
    mean = theirs.encode(pictures()).latent_dist.mean
    close(ours.encode(pictures()), (mean - (shift or 0)) * 1.5305)
    close(ours.decode((mean - (shift or 0)) * 1.5305), theirs.decode(mean).sample)
    assert read_released(tmp_path / "vae").scale_and_shift == (1.5305, shift or 0.0)


@torch.no_grad()
def test_diffusers_attention_before_2023(tmp_path: Path) -> None:
    """query, key, value, proj_attn, and no scaling_factor in the config: 0.18215 was the only one."""
    theirs = their_kl(KL_SIZES)
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    weights = {}
    for name, value in theirs.state_dict().items():
        for new, before in old.items():
            name = name.replace(f".{new}.", f".{before}.")
        weights[name] = value
    save_file(weights, tmp_path / "diffusion_pytorch_model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKL", "norm_num_groups": 32}))
    close(started(KL_SIZES, tmp_path).encode(pictures()), theirs.encode(pictures()).latent_dist.mean)
    assert read_released(tmp_path).scale_and_shift == (0.18215, 0.0)


@pytest.mark.rung("agrees", "vqgan")
@torch.no_grad()
def test_diffusers_vq_model(tmp_path: Path) -> None:
    from diffusers import VQModel

    torch.manual_seed(0)
    theirs: Any = randomised(VQModel(**diffusers_keys(VQ_SIZES), num_vq_embeddings=23, vq_embed_dim=5))
    spread_codes(theirs.encode(pictures()).latents, theirs.quantize.embedding.weight)
    theirs.save_pretrained(tmp_path / "vq")
    ours = started(VQ_SIZES, tmp_path / "vq")
    latents = theirs.encode(pictures()).latents
    quantized, _, (_, _, codes) = theirs.quantize(latents)
    assert len(codes.unique()) > 5
    assert torch.equal(ours.encode_codes(pictures()).flatten(), codes)
    close(ours.encode(pictures()), theirs.post_quant_conv(quantized))
    close(ours.decode_codes(codes.view(2, 4, 6)), theirs.decode(latents).sample)


@torch.no_grad()
def test_chameleon_of_transformers_is_read_half_by_half(tmp_path: Path) -> None:
    """Its class has no decoder: encoder and quantizer can be filled, the whole is refused. `#` finds it inside the language model."""
    from transformers import ChameleonVQVAEConfig
    from transformers.models.chameleon.modeling_chameleon import ChameleonVQVAE

    sizes = {**VQ_SIZES, "attention": False}
    config = ChameleonVQVAEConfig(
        embed_dim=5, num_embeddings=23, latent_channels=6, resolution=16, base_channels=128, channel_multiplier=[1, 1, 2], num_res_blocks=1,
        attn_resolutions=None,
    )  # fmt: skip
    torch.manual_seed(0)
    theirs: Any = randomised(ChameleonVQVAE(config))
    spread_codes(theirs.quant_conv(theirs.encoder(pictures().clone())), theirs.quantize.embedding.weight)
    weights = {f"model.vqmodel.{name}": value for name, value in theirs.state_dict().items()}
    save_file({**weights, "model.embed_tokens.weight": torch.zeros(3, 2)}, tmp_path / "model.safetensors")
    with pytest.raises(DataError, match=r"weights missing, 0 unexpected, 0 reshaped .*missing: decoder\."):
        started(sizes, tmp_path)
    holder = Holder(sizes)
    halves = {"autoencoders.a.encoder": str(tmp_path), "autoencoders.a.quantizer": f"{tmp_path}#model.vqmodel"}
    for start in open_starts(halves):
        fill(holder, start)
    codes = holder.autoencoder.encode_codes(pictures())
    theirs_codes = theirs.quantize(theirs.quant_conv(theirs.encoder(pictures().clone())))[2]
    assert len(codes.unique()) > 5
    assert torch.equal(codes.flatten(), theirs_codes)


# --- at full size ------------------------------------------------------------------------------------------------------------------


def full(recipe: str) -> tuple[Any, dict[str, Any]]:
    (config,) = load_recipe(recipe, size="paper").autoencoders.values()
    return config, config.model_dump()


def run_vq(sizes: dict[str, Any], **style: bool) -> dict[str, Tensor]:
    theirs = PublishedVQ(Weights("meta"), sizes, **style)
    theirs.decode_codes(theirs.codes(torch.empty(1, 3, 32, 32, device="meta")))
    return theirs.w.tensors


def run_var(sizes: dict[str, Any]) -> dict[str, Tensor]:
    theirs = PublishedVAR(Weights("meta"), sizes)
    theirs.decode_codes(theirs.codes(torch.empty(1, 3, 256, 256, device="meta")))
    return theirs.w.tensors


def run_kl(sizes: dict[str, Any]) -> dict[str, Tensor]:
    theirs = PublishedKL(Weights("meta"), sizes)
    theirs.decode_latents(theirs.moments(torch.empty(1, 3, 32, 32, device="meta"))[:, : sizes["latent_channels"]])
    return theirs.w.tensors


def run_diffusers(sizes: dict[str, Any]) -> dict[str, Tensor]:
    from diffusers import VQModel

    with torch.device("meta"):
        if "quantizer" not in sizes:
            return dict(their_kl(sizes).state_dict())
        quantizer = sizes["quantizer"]
        return dict(
            VQModel(
                **diffusers_keys(sizes), num_vq_embeddings=quantizer["codebook_size"], vq_embed_dim=quantizer["codebook_dim"]
            ).state_dict()
        )


FULL: dict[str, tuple[str, Callable[[dict[str, Any]], dict[str, Tensor]]]] = {
    "taming": ("vqgan", run_vq),
    "chameleon": ("chameleon-vq", run_vq),
    "llamagen": ("llamagen-vq", partial(run_vq, llamagen=True)),
    "var": ("var-tokenizer", run_var),
    "ldm-16": ("kl-autoencoder-16", run_kl),
    "diffusers-kl-16": ("kl-autoencoder-16", run_diffusers),
    "ldm": ("kl-autoencoder", run_kl),
    "diffusers-vq": ("vqgan", run_diffusers),
    "diffusers-kl": ("kl-autoencoder", run_diffusers),
}


@pytest.mark.parametrize("layout", FULL)
def test_recipes_of_published_size_have_every_weight_and_no_other(layout: str) -> None:
    recipe, theirs = FULL[layout]
    config, sizes = full(recipe)
    with torch.device("meta"):
        ours = config.build()
    found = translate(ours, theirs(sizes), layout)
    assert {name: value.shape for name, value in found.items()} == {n: v.shape for n, v in ours.state_dict().items() if n not in OUR_OWN}


# --- what does not fit -------------------------------------------------------------------------------------------------------------


def test_every_difference_is_told(tmp_path: Path) -> None:
    weights = dict(vqgan_weights().w.tensors)
    del weights["decoder.up.2.attn.1.norm.bias"]
    weights["encoder.down.3.block.0.conv1.weight"] = torch.zeros(1)
    weights["quantize.embedding.weight"] = torch.zeros(24, 5)
    with pytest.raises(DataError) as caught:
        started(VQ_SIZES, save_torch(tmp_path / "a.pt", weights))
    message = str(caught.value)
    assert "1 weights missing, 1 unexpected, 1 reshaped" in message
    assert "missing: decoder.up.2.attn.1.norm.bias" in message
    assert "unexpected: encoder.down.3.block.0.conv1.weight" in message
    assert "reshaped: quantize.embedding.weight (24, 5), expected (23, 5)" in message
    assert "paper" in caught.value.hint


def test_what_is_no_autoencoder_is_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no weight is called encoder\.conv_in\.weight") as caught:
        started(VQ_SIZES, save_torch(tmp_path / "a.pt", {"blocks.0.weight": torch.zeros(1)}))
    assert "CompVis, LlamaGen, diffusers" in caught.value.hint
    with pytest.raises(DataError, match="in a layout that is not known"):
        started(
            VQ_SIZES, save_torch(tmp_path / "b.pt", {"encoder.conv_in.weight": torch.zeros(1), "encoder.stages.0.weight": torch.zeros(1)})
        )
    two = {f"{name}.encoder.{weight}": torch.zeros(1) for name in ("left", "right") for weight in ("conv_in.weight", "down.0.x")}
    with pytest.raises(DataError, match="holds 2 autoencoders") as caught:
        started(VQ_SIZES, save_torch(tmp_path / "c.pt", two))
    assert "left., right." in caught.value.hint
    with pytest.raises(UsageError, match="no such file or folder"):
        started(VQ_SIZES, tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "vq.pt").write_bytes(b"")
    with pytest.raises(UsageError, match="found none") as other:
        started(VQ_SIZES, tmp_path / "empty")
    assert "vq.pt" in other.value.hint
    with pytest.raises(DataError, match="cannot be read as weights"):
        started(VQ_SIZES, tmp_path / "empty" / "vq.pt")
    (tmp_path / "broken.safetensors").write_bytes(b"12345678")
    with pytest.raises(DataError, match="cannot be read as safetensors"):
        started(VQ_SIZES, tmp_path / "broken.safetensors")


class Bomb:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


def test_code_in_a_checkpoint_is_not_run(tmp_path: Path) -> None:
    weights = vqgan_weights().w.tensors
    path = save_torch(tmp_path / "bomb.ckpt", {"state_dict": weights, "callbacks": Bomb(tmp_path / "made")})
    assert read_torch(path).keys() == weights.keys()
    assert not (tmp_path / "made").exists()
    torch.save({"state_dict": weights, "callbacks": Bomb(tmp_path / "made")}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(UsageError, match=r"holds Python objects .*mkdir"):
        started(VQ_SIZES, path)
    assert not (tmp_path / "made").exists()


class Callback:
    """As Lightning keeps them: the class itself is a key, an instance of it a value."""

    def __init__(self) -> None:
        self.best = {"score": torch.ones(2)}


def test_a_lightning_checkpoint_gives_its_tensors_and_nothing_else(tmp_path: Path) -> None:
    tied = torch.randn(4, 6)
    weights = OrderedDict(
        {
            "a": torch.arange(12.0).view(3, 4),
            "part": torch.arange(12.0).view(3, 4)[1:, ::2],
            "half": torch.randn(3).bfloat16(),
            "count": torch.tensor(7),
            "none": torch.empty(0, 3),
            "tied": tied,
            "turned": tied.t(),
            "learned": torch.nn.Parameter(torch.randn(2)),
        }
    )
    weights._metadata = {"": {"version": 1}}  # type: ignore[attr-defined]
    more = {"callbacks": {Callback: Callback()}, "loops": [Callback(), Path("x")], "hyper_parameters": {"lr": 1e-4, "f": os.getcwd}}
    path = save_torch(tmp_path / "last.ckpt", {"epoch": 3, "state_dict": weights, **more})
    found = read_torch(path)
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[name], weights[name]) and found[name].dtype == weights[name].dtype for name in weights)
    shapes = read_torch(path, "meta")
    assert {name: value.shape for name, value in shapes.items()} == {name: value.shape for name, value in weights.items()}
    assert all(value.is_meta for value in shapes.values())


@pytest.mark.parametrize("what", ["storage too short", "no storage", "size is no number", "stride outside", "calls of calls", "cut pickle"])
def test_a_pickle_that_lies_about_its_tensors_is_bad_data(tmp_path: Path, what: str) -> None:
    path, rewritten = save_torch(tmp_path / "a.ckpt", {"x": Callback(), "w": torch.zeros(6)}), tmp_path / "b.ckpt"
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(rewritten, "w") as new:
        for name in old.namelist():
            data = old.read(name)
            if name.endswith("data.pkl"):
                assert b"K\x00K\x06\x85" in data  # offset 0, size (6,)
                data = {
                    "size is no number": data.replace(b"K\x00K\x06\x85", b"K\x00N\x85"),
                    "stride outside": data.replace(b"K\x00K\x06\x85", b"K\x05K\x06\x85"),
                    "calls of calls": pickle.PROTO + b"\x02" + b"(" * 3000 + b"t" * 3000 + b"R.",
                    "cut pickle": data[: len(data) // 2],
                }.get(what, data)
            if name.endswith("data/0") or name.endswith("data/1"):
                data = data[:8] if what == "storage too short" else data
                if what == "no storage":
                    continue
            new.writestr(name, data)
    with pytest.raises(DataError, match=r"b\.ckpt"):
        read_torch(rewritten)


def test_norms_of_other_groups_are_refused(tmp_path: Path) -> None:
    """Same shapes, other numbers: only the config shows it."""
    sizes = {**KL_SIZES, "pointwise": True}
    from diffusers import AutoencoderKL

    AutoencoderKL(**{**diffusers_keys(sizes), "norm_num_groups": 16}).save_pretrained(tmp_path)
    with pytest.raises(DataError, match=r"norm_num_groups = 16, the norms of this recipe have \[32\]"):
        started(sizes, tmp_path)


def test_a_recipe_of_another_size_or_kind_is_told_so(tmp_path: Path) -> None:
    path = save_torch(tmp_path / "a.pt", vqgan_weights().w.tensors)
    with pytest.raises(DataError, match=r"weights missing, .*missing: encoder\.down\.0\.block\.1\.norm1\.weight"):
        started({**VQ_SIZES, "blocks_per_level": 2, "attention": False}, path)
    vit = {"kind": "vit", "downsample": 8, "width": 16, "depth": 1, "heads": 2}
    with pytest.raises(DataError, match=r"a convolutional autoencoder \(layout CompVis\), and this recipe's is of kind 'vit'"):
        started(vit, path)


def test_half_precision_becomes_single(tmp_path: Path) -> None:
    weights = {name: value.half() for name, value in vqgan_weights().w.tensors.items()}
    ours = started(VQ_SIZES, save_torch(tmp_path / "a.pt", weights)).state_dict()
    assert torch.equal(ours["encoder.conv_in.weight"], weights["encoder.conv_in.weight"].float())
    assert all(value.dtype == torch.float32 for value in ours.values())


def test_only_autoencoders_start_from_a_release(tmp_path: Path) -> None:
    start = open_starts({"autoencoders.b": str(save_torch(tmp_path / "a.pt", vqgan_weights().w.tensors))})[0]
    with pytest.raises(UsageError, match=r"--init autoencoders\.b: .*no such part") as caught:
        fill(Holder(VQ_SIZES), start)
    assert "autoencoders.a" in caught.value.hint


# --- as a user would ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for split, count in (("train", 6), ("val", 4)):
        with ShardWriter(folder / split, split=split) as writer:
            for n in range(count):
                noise = torch.randint(0, 256, (16, 24, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(n))
                writer.write(Sample(f"{split}-{n}", {"image": noise.numpy(), "caption": "noise"}))
    return folder


def sets(address: str, sizes: dict[str, Any], **more: Any) -> list[str]:
    """--set values that give a recipe of size paper these sizes."""
    flat = {f"{address}.{key}": value for key, value in sizes.items() if key not in ("kind", "quantizer")}
    flat |= {f"{address}.quantizer.{key}": value for key, value in sizes.get("quantizer", {}).items() if key != "kind"}
    flat |= {"phases.train.steps": 0, "phases.train.batch_size": 2, **{key.replace("__", "."): value for key, value in more.items()}}
    return [f"{key}={json.dumps(value)}" for key, value in flat.items()]


def typed(*words: str) -> None:
    answer = CliRunner().invoke(app, [*words, "-q"])
    assert answer.exit_code == 0, answer.output


def test_from_the_command_line(shards: Path, tmp_path: Path) -> None:
    """Released weights as a tokenizer, without training: the latents in the shards are those of the public class."""
    theirs = their_kl(KL_SIZES, scaling_factor=0.5)
    theirs.save_pretrained(tmp_path / "vae")
    overrides = [word for assignment in sets("autoencoders.vae", KL_SIZES) for word in ("--set", assignment)]
    start, out = f"autoencoders.vae={tmp_path / 'vae'}", str(tmp_path / "out")
    typed("pretrain-tokenizer", str(shards), "--recipe", "kl-autoencoder", "--size", "paper", "--init", start, *overrides, "--out", out)
    typed("tokenize", str(shards), "--tokenizer", out, "--out", str(tmp_path / "latents"))
    sample = open_shards(str(tmp_path / "latents"), split="val")[0]
    with torch.no_grad():
        image = torch.from_numpy(sample.fields["image"]).permute(2, 0, 1)[None] / 127.5 - 1
        expected = theirs.encode(image).latent_dist.mean[0] * 0.5
    torch.testing.assert_close(
        torch.from_numpy(sample.fields["image.latents"]).float(), expected, atol=2e-3, rtol=2e-3
    )  # stored as float16


def test_released_latents_keep_the_scale_of_their_release(shards: Path, tmp_path: Path) -> None:
    """No step is made; the scale of the config stands in the resolved recipe, and what the user writes goes before it."""
    theirs = their_kl(KL_SIZES, scaling_factor=0.5, shift_factor=0.25)
    theirs.save_pretrained(tmp_path / "vae")
    init = {"autoencoders.vae": str(tmp_path / "vae")}
    recipe = load_recipe("kl-autoencoder", size="paper", sets=sets("autoencoders.vae", KL_SIZES, phases__train__ema_decay=0.9))
    out = pretrain_tokenizer(recipe, str(shards), tmp_path / "out", QUIET, init=init)
    ours = load_autoencoder(out)
    with torch.no_grad():
        close(ours.encode(pictures()), (theirs.encode(pictures()).latent_dist.mean - 0.25) * 0.5)
    assert load_recipe(out).autoencoders["vae"].latent_scale == 0.5  # type: ignore[attr-defined]
    facts = json.loads((out / "config.json").read_text())
    assert (facts["steps"], facts["pictures"]) == (0, 4)
    entry = json.loads((out / "run.json").read_text())["inputs"][1]
    assert (entry["role"], entry["layout"], entry["path"]) == ("init autoencoders.vae", "diffusers", init["autoencoders.vae"])
    own = load_recipe("kl-autoencoder", size="paper", sets=sets("autoencoders.vae", {**KL_SIZES, "latent_scale": 2.0}))
    weights = read_weights(pretrain_tokenizer(own, str(shards), tmp_path / "own", QUIET, init=init) / "model.safetensors")
    assert (weights["autoencoders.vae.latent_scale"] == 2.0).all()


def test_what_it_starts_from_is_part_of_the_run(shards: Path, tmp_path: Path) -> None:
    """The same weights elsewhere are the same run, in another file too; others are refused, and a run without a start too."""
    weights = vqgan_weights().w.tensors
    first, second = save_torch(tmp_path / "a.pt", weights), save_torch(tmp_path / "b.ckpt", {"state_dict": weights})
    other = save_torch(tmp_path / "c.pt", {**weights, "encoder.conv_in.bias": weights["encoder.conv_in.bias"] + 1})
    recipe = load_recipe("vqgan", size="paper", sets=sets("autoencoders.vq", VQ_SIZES))

    def run(init: dict[str, str], out: Path = tmp_path / "out") -> Path:
        return pretrain_tokenizer(recipe, str(shards), out, QUIET, init=init)

    out = run({"autoencoders.vq": str(first)})
    assert run({"autoencoders.vq": str(second)}) == out
    with pytest.raises(UsageError, match=r"holds another run:\n  input 2 \(init autoencoders\.vq\)"):
        run({"autoencoders.vq": str(other)})
    with pytest.raises(UsageError, match=r"input 2 \(init autoencoders\.vq\): .* here \(absent\)"):
        run({})
    again = run({"autoencoders.vq": str(out)}, tmp_path / "again")  # a checkpoint of ours, at the same address
    assert all(
        torch.equal(value, read_weights(again / "model.safetensors")[name])
        for name, value in read_weights(out / "model.safetensors").items()
    )
    tokens = tokenize_shards(str(shards), [out], tmp_path / "tokens", QUIET)
    assert open_shards(str(tokens), split="val")[0].fields["image.codes"].shape == (4, 6)


def test_training_goes_on_from_the_release(shards: Path, tmp_path: Path) -> None:
    """One step with a codebook that revives dead codes: none of the released ones counts as dead."""
    theirs = vqgan_weights()
    path = save_torch(tmp_path / "a.pt", theirs.w.tensors)
    told = sets("autoencoders.vq", VQ_SIZES, phases__train__steps=1, phases__train__lr=1e-6, objectives__reconstruct__terms__perceptual=0.0)
    out = pretrain_tokenizer(
        load_recipe("vqgan", size="paper", sets=told), str(shards), tmp_path / "out", QUIET, init={"autoencoders.vq": str(path)}
    )
    found = read_weights(out / "model.safetensors")
    change = (found["autoencoders.vq.quantizer.codebook"] - theirs.codebook()).abs().max()
    assert 0 < change < 1e-4
    with pytest.raises(UsageError, match="has no autoencoder"):
        pretrain_tokenizer(
            load_recipe("text-bpe", size="tiny"), str(shards), tmp_path / "words", QUIET, init={"autoencoders.vq": str(path)}
        )
