"""Janus's recipe beside JanusForConditionalGeneration: one set of random weights, reading a picture and writing one.

Everything between pixels or ids and logits is compared, then the loss's gradients down to the tower's patches, then a picture that both
write greedily under guidance.
"""

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Generator, Tensor
from worlds import CAPTIONS, text_tokenizer

from stages.data.sample import Sample
from stages.decoding import Prompt, Session
from stages.model import Model, build_model
from stages.parts.samplers import AutoregressiveConfig
from stages.recipe import load_recipe
from stages.sequence.pack import pack
from stages.sequence.plan import Planner

transformers = pytest.importorskip("transformers")

TOKENIZER = text_tokenizer(("<soi>", "<eoi>"))
WIDTH, CODES, GRID = 64, 64, (2, 3)
PLACEHOLDER = TOKENIZER.vocab_size - 1  # their id for "a feature stands here"; the texts below do not use it
SAMPLE = Sample(
    "a",
    {
        "caption": CAPTIONS[0],
        "image": np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8),
        "image.codes": np.random.default_rng(1).integers(0, CODES, GRID),
    },
)


@cache
def pair() -> tuple[Any, Model, Planner]:
    """Theirs, ours with the same weights, and what plans for ours. No weight of theirs is left over but those of their VQ tokenizer."""
    recipe = load_recipe("janus", size="tiny", sets=[f"tokenizers.bpe.vocab_size={TOKENIZER.vocab_size}"])
    lm = recipe.backbones["lm"]
    config = transformers.JanusConfig(
        text_config={
            "model_type": "llama",
            "vocab_size": TOKENIZER.vocab_size,
            "hidden_size": WIDTH,
            "intermediate_size": lm.mlp_width,
            "num_hidden_layers": lm.depth,
            "num_attention_heads": lm.heads,
            "rms_norm_eps": lm.norm.eps,
            "tie_word_embeddings": False,
        },
        vision_config={
            "hidden_size": WIDTH,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": 32,
            "patch_size": 8,
            "projection_dim": WIDTH,
            "num_image_tokens": GRID[0] * GRID[1],
        },
        vq_config={
            "embed_dim": 8,
            "num_embeddings": CODES,
            "base_channels": 32,
            "channel_multiplier": [1],
            "num_res_blocks": 1,
            "projection_dim": WIDTH,
            "image_token_embed_dim": WIDTH,
        },
        image_token_id=PLACEHOLDER,
        tie_word_embeddings=False,
    )
    theirs = transformers.JanusForConditionalGeneration(config).eval()
    generator = Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    ours = build_model(recipe, 0).eval()
    state = {name: value.clone() for name, value in theirs.state_dict().items() if "vqmodel" not in name}
    ours.load_state_dict(translated(state, ours), strict=True)
    assert not state, f"weights of theirs that have no place here: {sorted(state)}"
    return theirs, ours, Planner(recipe, {"bpe": TOKENIZER}, dict(ours.encoders.items()))


def translated(state: dict[str, Tensor], ours: Model) -> dict[str, Tensor]:
    tower: Any = ours.encoders["siglip"]
    theirs = {name: state.pop(name) for name in list(state) if "vision_model." in name}
    weights = {f"encoders.siglip.{name}": value for name, value in tower.import_weights(theirs).items()}
    for kind in ("weight", "bias"):
        weights[f"ports.see.connector.layers.0.{kind}"] = state.pop(f"model.aligner.fc1.{kind}")
        weights[f"ports.see.connector.layers.1.{kind}"] = state.pop(f"model.aligner.hidden_layers.0.{kind}")
        weights[f"ports.draw.connector.aligner.layers.0.{kind}"] = state.pop(f"model.generation_aligner.fc1.{kind}")
        weights[f"ports.draw.connector.aligner.layers.1.{kind}"] = state.pop(f"model.generation_aligner.hidden_layers.0.{kind}")
        weights[f"ports.draw.head.inner.{kind}"] = state.pop(f"model.generation_head.proj_out.{kind}")
        weights[f"ports.draw.head.outer.{kind}"] = state.pop(f"model.generation_head.vision_head.{kind}")
    weights["ports.draw.connector.table.weight"] = state.pop("model.generation_embeddings.weight")
    weights["ports.text.connector.weight"] = state.pop("model.language_model.embed_tokens.weight")
    weights["ports.text.head.weight"] = state.pop("lm_head.weight")
    weights["backbones.lm.experts.main.final_norm.weight"] = state.pop("model.language_model.norm.weight")
    for n in range(ours.backbone.config.depth):
        here, there = f"backbones.lm.experts.main.layers.{n}.", f"model.language_model.layers.{n}."
        weights[here + "qkv.weight"] = torch.cat([state.pop(f"{there}self_attn.{part}_proj.weight") for part in "qkv"])
        weights[here + "out.weight"] = state.pop(there + "self_attn.o_proj.weight")
        weights[here + "mlp.gate_up.weight"] = torch.cat([state.pop(f"{there}mlp.{part}_proj.weight") for part in ("gate", "up")])
        weights[here + "mlp.down.weight"] = state.pop(there + "mlp.down_proj.weight")
        weights[here + "attention_norm.weight"] = state.pop(there + "input_layernorm.weight")
        weights[here + "mlp_norm.weight"] = state.pop(there + "post_attention_layernorm.weight")
    return weights


def reading() -> tuple[Any, Tensor, Tensor, Tensor]:
    """Our batch of one picture and its caption; their ids, pixels and labels of the same."""
    _, _, planner = pair()
    sequence = planner.plan(SAMPLE, "caption", None)
    ids = torch.cat([s.payload if s.port == "text" else torch.full((len(s),), PLACEHOLDER) for s in sequence.segments])
    (picture,) = [segment.payload for segment in sequence.segments if segment.port == "see"]
    labels = torch.cat([s.payload if s.role == "target" else torch.full((len(s),), -100) for s in sequence.segments])
    return pack([sequence], row_length=len(ids)), ids[None], picture[None], labels


def close(actual: Tensor, expected: Tensor, scale: float = 1.0) -> None:
    torch.testing.assert_close(actual, expected, atol=1e-4 * scale, rtol=1e-3)


@torch.no_grad()
def test_words_after_a_picture_agree() -> None:
    theirs, ours, _ = pair()
    batch, ids, picture, _ = reading()
    close(ours.predict("text", ours.hidden(batch)[0]), theirs(input_ids=ids, pixel_values=picture).logits[0])


def test_gradients_reach_the_tower_as_theirs_do() -> None:
    theirs, ours, _ = pair()
    batch, ids, picture, labels = reading()
    theirs.zero_grad()
    ours.zero_grad()
    logits = theirs(input_ids=ids, pixel_values=picture).logits[0, :-1]
    expected = F.cross_entropy(logits, labels[1:], ignore_index=-100)
    loss = ours.losses(batch, Generator())["text"].mean
    close(loss, expected)
    expected.backward()
    loss.backward()
    gradients = {n: p.grad.clone() for n, p in theirs.named_parameters() if p.grad is not None and "vision_model" in n}
    tower: Any = ours.encoders["siglip"]
    for name, gradient in tower.import_weights(gradients).items():
        close(tower.get_parameter(name).grad, gradient, scale=max(1.0, float(gradient.abs().max())))


@torch.no_grad()
def test_codes_after_a_caption_agree() -> None:
    theirs, ours, planner = pair()
    sequence = planner.plan(SAMPLE, "draw", None)
    length = len(sequence)
    hidden = ours.hidden(pack([sequence], row_length=length))[0]
    embeddings = [
        theirs.get_input_embeddings()(s.payload) if s.port == "text" else theirs.prepare_embeddings_for_image_generation(s.payload)
        for s in sequence.segments
    ]
    expected = theirs.model.language_model(inputs_embeds=torch.cat(embeddings)[None]).last_hidden_state[0]
    close(hidden, expected)
    close(ours.predict("draw", hidden), theirs.model.generation_head(expected))


@torch.no_grad()
def test_a_picture_written_under_guidance_is_the_same_picture() -> None:
    """Greedily, at scale 5: their unconditional rows see <pad> in the caption's places, as ours do."""
    theirs, ours, planner = pair()
    given = Sample("a", {"caption": CAPTIONS[1]})
    sampler = AutoregressiveConfig(temperature=0.0, guidance_scale=5.0)
    guide = sampler.guide({"caption"})
    passes = [planner.prompt(given, "draw", drop=drop)[0] for drop in guide.drops]
    spec = planner.prompt(given, "draw")[1][0]
    session = Session(ours, planner, [Prompt("a", "", passes)], guide, 16, 0)
    codes = session.write_picture(spec, sampler, GRID, [True], commit=False)
    boi = TOKENIZER.special_id("<soi>")
    ids = torch.cat([*(segment.payload for segment in passes[0]), torch.tensor([boi])])[None]
    theirs.generation_config.generation_kwargs = {"boi_token_id": boi}
    written = theirs.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        generation_mode="image",
        do_sample=False,
        guidance_scale=5.0,
        bos_token_id=TOKENIZER.special_id("<bos>"),
        pad_token_id=TOKENIZER.special_id("<pad>"),
        max_length=64,
    )
    assert codes.flatten().tolist() == written[0].tolist()
    assert len(set(codes.flatten().tolist())) > 1
