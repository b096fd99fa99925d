"""Emu3's recipe beside Emu3ForCausalLM: a caption and a picture in rows, one vocabulary, the same random weights."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Generator
from worlds import CAPTIONS, text_tokenizer

from stages.data.sample import Sample
from stages.model import build_model
from stages.recipe import load_recipe
from stages.sequence.pack import pack
from stages.sequence.plan import Planner

transformers = pytest.importorskip("transformers")

TOKENIZER = text_tokenizer(("<soi>", "<eot>", "<eoi>"))
CODES = 64
SAMPLE = Sample("a", {"caption": CAPTIONS[0], "image.codes": np.random.default_rng(1).integers(0, CODES, (2, 3))})


def test_logits_over_words_and_codes_and_the_weighted_loss_agree() -> None:
    recipe = load_recipe("emu3", size="tiny", sets=[f"tokenizers.bpe.vocab_size={TOKENIZER.vocab_size}"])
    lm = recipe.backbones["lm"]
    config = transformers.Emu3TextConfig(
        vocab_size=TOKENIZER.vocab_size + CODES,
        hidden_size=lm.width,
        intermediate_size=lm.mlp_width,
        num_hidden_layers=lm.depth,
        num_attention_heads=lm.heads,
        num_key_value_heads=lm.kv_heads,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    theirs = transformers.Emu3ForCausalLM(config).eval()
    generator = Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    state = {name: value.clone() for name, value in theirs.state_dict().items()}
    weights = {
        "ports.text.connector.weight": state.pop("model.embed_tokens.weight"),
        "ports.text.head.weight": state.pop("lm_head.weight"),
        "backbones.lm.experts.main.final_norm.weight": state.pop("model.norm.weight"),
    }
    for n in range(lm.depth):
        here, there = f"backbones.lm.experts.main.layers.{n}.", f"model.layers.{n}."
        weights[here + "qkv.weight"] = torch.cat([state.pop(f"{there}self_attn.{part}_proj.weight") for part in "qkv"])
        weights[here + "out.weight"] = state.pop(there + "self_attn.o_proj.weight")
        weights[here + "mlp.gate_up.weight"] = torch.cat([state.pop(f"{there}mlp.{part}_proj.weight") for part in ("gate", "up")])
        weights[here + "mlp.down.weight"] = state.pop(there + "mlp.down_proj.weight")
        weights[here + "attention_norm.weight"] = state.pop(there + "input_layernorm.weight")
        weights[here + "mlp_norm.weight"] = state.pop(there + "post_attention_layernorm.weight")
    assert not state
    ours = build_model(recipe, 0).eval()
    ours.load_state_dict(weights, strict=True)

    sequence = Planner(recipe, {"bpe": TOKENIZER}).plan(SAMPLE, "draw", None)
    words = [TOKENIZER.decode(s.payload.tolist(), special=True) if s.port == "text" else len(s) for s in sequence.segments]
    assert words == ["<bos>", CAPTIONS[0], "<soi>", 3, "<eot>", 3, "<eot>", "<eoi>", "<eos>"]
    is_code = torch.cat([torch.full((len(s),), s.port == "codes") for s in sequence.segments])
    ids = torch.cat([s.payload for s in sequence.segments]) + is_code * TOKENIZER.vocab_size
    batch = pack([sequence], row_length=len(ids))
    with torch.no_grad():
        expected = theirs(ids[None]).logits[0]
        torch.testing.assert_close(ours.predict("text", ours.hidden(batch)[0], whole=True), expected, atol=1e-4, rtol=1e-3)
        losses = ours.losses(batch, Generator())
    each = F.cross_entropy(expected[:-1], ids[1:], reduction="none")
    torch.testing.assert_close(losses["codes"].total, each[is_code[1:]].sum(), atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(losses["text"].total, each[~is_code[1:]].sum(), atol=1e-3, rtol=1e-4)
    assert recipe.ports["codes"].loss_weight == 0.5
