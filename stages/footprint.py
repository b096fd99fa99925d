"""How much memory a training step should take: weights, gradients and Adam's moments counted, activations estimated.

Convolutions and encoders run once with fake tensors, which have a size but no memory and choose the kernels of a real device, and what
autograd would keep is added up.
The transformer cannot (its experts and masks look at values), so what one token leaves behind in one layer is written down as a formula;
a test holds it against what autograd really keeps. Temporary buffers and what the allocator rounds up are not in any of these numbers.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from stages.anatomy import holds, learns
from stages.model import vocabulary_slices
from stages.parts.backbones import MoEConfig, TransformerConfig
from stages.recipe import Phase, Recipe, vocabulary_owner

FLOAT = 4  # bytes; weights, gradients, moments and activations are float32


def kept_by_autograd(module: nn.Module, run: Callable[[], Any]) -> int:
    """Bytes of the distinct buffers that `run` saves for its backward pass, the weights of `module` apart; with fake tensors none
    of them exists."""
    weights = {parameter.untyped_storage()._cdata for parameter in module.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}  # held, so that no other buffer can get the number of one that was let go

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        run()
    return sum(storage.nbytes() for storage in kept.values())


def transformer_bytes(config: TransformerConfig, row_length: int) -> int:
    """Bytes one token leaves in all layers of a transformer, for rows of `row_length` tokens.

    A layer keeps its two inputs, two normed copies (RMS keeps each once more), q, the rotated q, what was attended and its copy, k and v
    with the rotated k, and of the MLP 2 (GELU) or 4 (SwiGLU) hidden rows; the mask of a row is shared by all layers. Learned experts keep
    what enters the router, and for each expert of a token what enters and leaves it.
    """
    attention = config.heads * config.attention_dim
    keys = (config.kv_heads or config.heads) * config.attention_dim
    layer = (6 if config.norm.kind == "rms" else 4) * config.width + 4 * attention + 3 * keys
    if isinstance(config.mlp, MoEConfig):
        layer += 4 * (config.mlp.top_k + config.mlp.shared) * config.mlp_width
        layer += (1 + 2 * config.mlp.top_k) * config.width + 2 * config.mlp.experts
    else:
        layer += (4 if config.mlp.kind == "swiglu" else 2) * config.mlp_width
    layer += attention + keys if config.qk_norm else 0
    return FLOAT * (config.depth * layer + 2 * config.width + row_length)


def encoder_bytes(recipe: Recipe, name: str) -> int:
    """Bytes one sample leaves in an encoder that learns: a picture of its view's size, or a text of its greatest length."""
    port = next(port for port in recipe.ports.values() if port.encoder == name)
    config: Any = recipe.encoders[name]
    with FakeTensorMode():
        if port.tokenizer:
            encoder = config.build(recipe.tokenizers[port.tokenizer].vocab_size)
            ids = torch.zeros(1, config.max_length, dtype=torch.int64)
            return kept_by_autograd(encoder, lambda: encoder(ids, torch.ones(1, dtype=torch.int64)))
        encoder = config.build(port.view.size)
        return kept_by_autograd(encoder, lambda: encoder(torch.zeros(1, 3, port.view.size, port.view.size)))


def autoencoder_bytes(recipe: Recipe, name: str, height: int, width: int) -> int:
    """Bytes one picture leaves in an autoencoder that learns, its quantizer apart."""
    config = recipe.autoencoders[name]
    with FakeTensorMode():
        autoencoder: Any = config.build()
        picture, latents = torch.zeros(1, 3, height, width), torch.zeros(1, config.latent_channels, *config.grid(height, width))
        return kept_by_autograd(autoencoder, lambda: (autoencoder.encoder(picture), autoencoder.decode(latents)))


def footprint(
    recipe: Recipe,
    phase: Phase,
    weights: Mapping[str, int],
    *,
    samples: float,
    tokens: float,
    row_length: int,
    supervised: Mapping[str, float],
    picture: tuple[int, int] | None = None,
) -> dict[str, int]:
    """Bytes of one step of a phase. samples, tokens: in a batch. supervised: port → tokens of a batch that carry loss. picture: height and
    width that an autoencoder is trained on."""
    own = {name: count for name, count in weights.items() if holds(phase, name)}
    learning = {name: count for name, count in own.items() if learns(phase, name)}
    trained = sum(learning.values())
    activations = 0.0
    if any(name.startswith(("backbones.", "ports.", "encoders.")) for name in learning):
        activations += sum(tokens * transformer_bytes(network, row_length) for network in recipe.backbones.values())
    slices = vocabulary_slices(recipe)
    for port, count in supervised.items():
        if port in slices and recipe.ports[vocabulary_owner(recipe, port)].head is not None:
            activations += 2 * FLOAT * count * slices[port].size  # logits and their gradient
    for name in recipe.encoders:
        if any(key.startswith(f"encoders.{name}.") for key in learning):
            activations += samples * encoder_bytes(recipe, name)
    for name in recipe.autoencoders if phase.stage == "pretrain-tokenizer" and picture is not None else ():
        assert picture is not None
        activations += samples * autoencoder_bytes(recipe, name, *picture)
    bytes_of = {
        "weights": FLOAT * sum(own.values()),
        "gradients": FLOAT * trained,
        "adam_moments": 2 * FLOAT * trained,
        "moving_average": FLOAT * trained if phase.ema_decay is not None else 0,
        "activations": round(activations),
    }
    return {**bytes_of, "total": sum(bytes_of.values())}
