"""Whole released models as starts, `--init model=FOLDER`: transformers saves them with random weights, and here they give the same logits.

As in `test_released_language.py`, what the recipe must say is taken from the error that the wrong recipe gets.
"""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from test_released_language import adopted, mmgen
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Generator, Tensor
from worlds import CAPTIONS, make_world, text_tokenizer

from stages.data.sample import Sample
from stages.errors import DataError, UsageError
from stages.model import Model, build_model
from stages.parts.autoencoders import AUTOENCODERS, Autoencoder
from stages.parts.config import parse_part
from stages.parts.tokenizers import TextTokenizer
from stages.parts.tokenizers.picture_entries import code_of
from stages.recipe import Recipe, load_recipe
from stages.sequence.pack import pack
from stages.sequence.plan import Planner
from stages.sequence.segment import Sequence
from stages.training.checkpoint import load_model
from stages.training.released import fill, open_starts

transformers = pytest.importorskip("transformers")

CODES, GRID = 64, (2, 3)
LM = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 6, "num_key_value_heads": 2}
VQ = {"embed_dim": 8, "base_channels": 32, "num_res_blocks": 1, "latent_channels": 8}
SAMPLE = Sample(
    "a",
    {
        "caption": CAPTIONS[0],
        "qa": [{"question": "how many?", "answer": "two"}],
        "image": np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8),
        "image.codes": np.random.default_rng(1).integers(0, CODES, GRID).astype(np.int32),
    },
)


def words_of(recipe: str) -> TextTokenizer:
    return text_tokenizer(load_recipe(recipe, size="tiny").tokenizers["bpe"].special)


def letters(code: int) -> str:
    return "".join("ABCDEFGHIJ"[int(digit)] for digit in str(code))


def rows_of(words: int) -> tuple[list[int], list[int]]:
    """Rows of words and of codes in a vocabulary that has its codes, in no order, amid its words."""
    codes = [9 + code * 5 % CODES for code in range(CODES)]
    return [row for row in range(words + CODES) if row not in codes], codes


def chameleon(words: int) -> Any:
    names = {f"IMGIMG{letters(code)}Z": row for code, row in enumerate(rows_of(words)[1])}
    config = transformers.ChameleonConfig(
        **LM, vocab_size=words + CODES, vocabulary_map={"<image>": 3, **names}, tie_word_embeddings=False,
        vq_config={**VQ, "num_embeddings": CODES, "channel_multiplier": [1]}, rope_parameters={"rope_type": "default", "rope_theta": 5e4},
    )  # fmt: skip
    return transformers.ChameleonForConditionalGeneration(config)


def emu3(words: int) -> Any:
    names = {f"<|visual token {code:06d}|>": words + code for code in range(CODES)}
    text = {**LM, "vocab_size": words + CODES, "pad_token_id": 0, "tie_word_embeddings": False}
    config = transformers.Emu3Config(
        text_config=text, vq_config={**VQ, "codebook_size": CODES, "channel_multiplier": [1], "hidden_size": 32},
        vocabulary_map={"<image>": 3, "<|extra_200|>": 4, **names}, tie_word_embeddings=False,
    )  # fmt: skip
    return transformers.Emu3ForConditionalGeneration(config)


def janus(words: int) -> Any:
    vision = {"hidden_size": 40, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 32, "patch_size": 8, "projection_dim": 48, "num_image_tokens": 6, "mlp_ratio": 3.0, "hidden_act": "gelu_pytorch_tanh"}  # fmt: skip
    vq = {**VQ, "num_embeddings": CODES, "channel_multiplier": [1, 1], "projection_dim": 48, "image_token_embed_dim": 48}
    config = transformers.JanusConfig(
        text_config={"model_type": "llama", **LM, "vocab_size": words, "tie_word_embeddings": False, "rms_norm_eps": 1e-5},
        vision_config=vision, vq_config=vq, image_token_id=words - 1, tie_word_embeddings=False,
    )  # fmt: skip
    return transformers.JanusForConditionalGeneration(config)


RELEASES = {"chameleon": chameleon, "emu3": emu3, "janus": janus, "janus-pro": janus}


def released(name: str, folder: Path, words: int) -> Any:
    """A random model of that family, saved."""
    theirs = RELEASES[name](words).eval()
    generator = Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    theirs.save_pretrained(folder)
    return theirs


def sized(name: str, *sets: str) -> Recipe:
    return load_recipe(name, size="tiny", sets=[f"tokenizers.bpe.vocab_size={words_of(name).vocab_size}", *sets])


def filled(recipe: Recipe, source: Path, words: TextTokenizer | None = None) -> Model:
    model = build_model(recipe, 0).eval()
    fill(model, open_starts({"model": str(source)})[0], {"bpe": words} if words else None)
    return model


def fitting(name: str, source: Path) -> list[str]:
    """What the recipe is told to say, in the words of --set."""
    with pytest.raises(UsageError, match="not the network of") as caught:
        filled(sized(name), source)
    words = shlex.split(caught.value.hint.split(": ", 1)[1])
    assert words[::2] == ["--set"] * (len(words) // 2)
    return words[1::2]


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=2e-4, rtol=1e-3)


def planned(recipe: Recipe, model: Model, task: str) -> Sequence:
    return Planner(recipe, {"bpe": words_of(recipe.name)}, dict(model.encoders.items())).plan(SAMPLE, task, None)


@pytest.mark.rung("agrees")
@pytest.mark.parametrize("task", ["draw", "caption"])
@pytest.mark.parametrize("name", ["chameleon", "emu3"])
@torch.no_grad()
def test_words_and_codes_of_one_vocabulary_agree(name: str, task: str, tmp_path: Path) -> None:
    words = words_of(name).vocab_size
    theirs = released(name, tmp_path, words)
    recipe = sized(name, *fitting(name, tmp_path))
    ours = filled(recipe, tmp_path)
    of_words, of_codes = rows_of(words) if name == "chameleon" else (list(range(words)), list(range(words, words + CODES)))
    sequence = planned(recipe, ours, task)
    ids = torch.cat([torch.tensor(of_words if s.port == "text" else of_codes)[s.payload] for s in sequence.segments])
    mine = ours.predict("text", ours.hidden(pack([sequence], row_length=len(ids)))[0], whole=True)
    expected = theirs.lm_head(theirs.model(input_ids=ids[None]).last_hidden_state)[0]  # the class hides codes from its logits
    close(mine, expected[:, of_words + of_codes])
    close(mine[:, :words], theirs(input_ids=ids[None]).logits[0, :, of_words])
    assert len(set(mine[:, words:].argmax(1).tolist())) > 1


@pytest.mark.rung("agrees")
@pytest.mark.parametrize("name", ["janus", "janus-pro"])
@torch.no_grad()
def test_a_picture_that_is_read_and_one_that_is_written_agree(name: str, tmp_path: Path) -> None:
    tokenizer = words_of(name)
    theirs = released(name, tmp_path, tokenizer.vocab_size)
    recipe = sized(name, *fitting(name, tmp_path))
    ours = filled(recipe, tmp_path)
    sequence = planned(recipe, ours, "caption")
    placeholder = tokenizer.vocab_size - 1
    ids = torch.cat([s.payload if s.port == "text" else torch.full((len(s),), placeholder) for s in sequence.segments])
    (picture,) = [segment.payload for segment in sequence.segments if segment.port == "see"]
    mine = ours.predict("text", ours.hidden(pack([sequence], row_length=len(ids)))[0])
    close(mine, theirs(input_ids=ids[None], pixel_values=picture[None]).logits[0])

    sequence = planned(recipe, ours, "draw")
    mine = ours.predict("draw", ours.hidden(pack([sequence], row_length=len(sequence)))[0])
    embeddings = [
        theirs.get_input_embeddings()(s.payload) if s.port == "text" else theirs.prepare_embeddings_for_image_generation(s.payload)
        for s in sequence.segments
    ]
    expected = theirs.model.language_model(inputs_embeds=torch.cat(embeddings)[None]).last_hidden_state[0]
    close(mine, theirs.model.generation_head(expected))


@pytest.mark.parametrize("name", ["chameleon", "janus"])
def test_on_the_command_line_a_checkpoint_like_any_other(name: str, tmp_path: Path) -> None:
    recipe = sized(name)
    samples = [Sample(f"{n}", {**SAMPLE.fields, "caption": CAPTIONS[n]}) for n in range(4)]
    world = make_world(tmp_path / "world", recipe, samples)
    words = world.recipe(recipe).tokenizers["bpe"].vocab_size
    theirs = released(name, tmp_path / "release", words)
    sets = [word for key in [*fitting(name, tmp_path / "release"), *(f"phases.{phase.name}.steps=0" for phase in recipe.phases)] for word in ("--set", key)]  # fmt: skip
    train = ["train-unified", world.shards, "--recipe", name, "--size", "tiny", "--init", f"model={tmp_path / 'release'}"]
    planned = mmgen(*train, *sets, "--out", tmp_path / "run", "--dry-run")
    assert planned.exit_code == 0 and "would start all weights from" in planned.output, planned.output
    refused = mmgen(*train, "--out", tmp_path / "run", "--dry-run")
    assert refused.exit_code == 2 and "--set backbones.lm.depth=2" in refused.output
    done = mmgen(*train, *sets, "--out", tmp_path / "run")
    assert done.exit_code == 0, done.output
    model = load_model(tmp_path / "run")[1]
    table = theirs.get_input_embeddings().weight
    rows = rows_of(words)[0] if name == "chameleon" else list(range(words))
    assert torch.equal(model.state_dict()["ports.text.connector.weight"][:words], table[rows])
    (start,) = (entry for entry in json.loads((tmp_path / "run" / "run.json").read_text())["inputs"] if "role" in entry)
    assert start["role"] == "init model" and start["layout"] == name
    done = mmgen("sample", tmp_path / "run", "--prompt", "a red circle", "--task", "draw", "--out", tmp_path / "out")
    assert done.exit_code == 0, done.output


# what is refused


def test_weights_that_have_no_place_are_listed_by_both_names(tmp_path: Path) -> None:
    released("janus", tmp_path, words_of("janus").vocab_size)
    recipe = sized("janus", *fitting("janus", tmp_path))
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.generation_aligner.fc1.bias"]
    weights["model.aligner.hidden_layers.1.weight"] = torch.zeros(2)
    weights["model.generation_head.vision_head.weight"] = torch.zeros(3, 48)
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(DataError, match=r"1 missing, 1 unexpected, 1 reshaped .*layout janus") as caught:
        filled(recipe, tmp_path)
    assert "model.generation_aligner.fc1.bias (here ports.draw.connector.aligner.layers.0.bias)" in caught.value.message
    assert "unexpected: model.aligner.hidden_layers.1.weight" in caught.value.message
    assert "ports.draw.head.outer.weight (64, 48), there (3, 48)" in caught.value.message
    del weights["model.vision_model.encoder.layers.2.mlp.fc1.bias"]
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(DataError, match=r"encoders\.siglip from model\.vision_model\..*lacks weights: encoder\.layers\.2\.mlp\.fc1\.bias"):
        filled(recipe, tmp_path)


def test_another_family_other_words_and_other_codes_are_refused(tmp_path: Path) -> None:
    words = words_of("chameleon").vocab_size
    released("chameleon", tmp_path, words)
    sets = fitting("chameleon", tmp_path)
    with pytest.raises(UsageError, match=rf"the {words + 1} words of ports\.text are not the {words} of"):
        filled(sized("chameleon", *sets, f"tokenizers.bpe.vocab_size={words + 1}"), tmp_path)
    with pytest.raises(UsageError, match=r"has 64 codes in its vocabulary, ports\.codes has 32"):
        filled(sized("chameleon", *sets, "autoencoders.image.quantizer.codebook_size=32"), tmp_path)
    released("janus", tmp_path / "janus", words)
    with pytest.raises(UsageError, match=r"one port of content 'features', recipe 'chameleon' has none"):
        filled(sized("chameleon"), tmp_path / "janus")
    config = json.loads((tmp_path / "config.json").read_text())
    for facts, message in (
        ({"model_type": "flava"}, "model_type 'flava'; of whole models chameleon, emu3, janus are read"),
        ({"swin_norm": True}, "norms after each branch (swin_norm)"),
        ({"rms_norm_eps": 1e-3}, "eps 0.001 in its norms and 1e-05 in those of queries and keys"),
    ):
        (tmp_path / "config.json").write_text(json.dumps({**config, **facts}))
        with pytest.raises(UsageError, match=re.escape(message)):
            filled(sized("chameleon", *sets), tmp_path)


# words and pictures of such a release


@pytest.mark.parametrize("entry", [lambda code: f"IMGIMG{letters(code)}Z", lambda code: f"<|visual token {code:06d}|>"])
def test_codes_leave_a_released_vocabulary_and_words_move_up(entry: Any, tmp_path: Path) -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    table = [*alphabet[:100], *(entry(code) for code in range(40)), *alphabet[100:], "re", "<s>", "</s>", "<boi>", "<eoi>"]
    words = [name for name in table if code_of(name) is None]
    assert [code_of(entry(code)) for code in (0, 7, 39, 8191)] == [0, 7, 39, 8191] and len(words) == len(table) - 40
    theirs = Tokenizer(models.BPE(vocab={name: id for id, name in enumerate(table)}, merges=[("r", "e")]))
    theirs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    theirs.add_special_tokens(["<s>", "</s>", "<boi>", "<eoi>", *(name for name in table if code_of(name) is not None)])
    theirs.save(str(tmp_path / "tokenizer.json"))
    told = {"bos_token": "<s>", "eos_token": "</s>", "boi_token": "<boi>", "eoi_token": "<eoi>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(told))
    ours = adopted(tmp_path, "<soi>", "<eoi>", "<eot>")
    assert ours.vocab_size == len(words) + 1  # <soi> and <eoi> are the release's, <eot> is new
    assert ours.encode("are red") == [words.index(table[id]) for id in theirs.encode("are red").ids]
    assert [ours.special_id(name) for name in ("<bos>", "<soi>", "<eoi>", "<eot>")] == [words.index("<s>"), words.index("<boi>"), words.index("<eoi>"), len(words)]  # fmt: skip
    assert ours.extends(tmp_path / "tokenizer.json")
    ours.save(tmp_path / "kept")
    assert (tmp_path / "kept" / "tokenizer.json").read_text().count(entry(7)) == 0


@torch.no_grad()
def test_the_picture_tokenizer_of_janus_is_read_out_of_the_whole(tmp_path: Path) -> None:
    from transformers import JanusVQVAEConfig
    from transformers.models.janus.modeling_janus import JanusVQVAE

    """Under `model.vqmodel`, beside other weights; 128 channels, because theirs always norms 32 groups."""
    sizes = {**VQ, "base_channels": 128, "num_embeddings": CODES, "channel_multiplier": [1, 1], "projection_dim": 8}
    torch.manual_seed(0)
    theirs = JanusVQVAE(JanusVQVAEConfig(**sizes)).eval()
    for parameter in theirs.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.05)
    weights = {f"model.vqmodel.{name}": value for name, value in theirs.state_dict().items()}
    save_file({**weights, "model.generation_embeddings.weight": torch.zeros(3, 2)}, tmp_path / "model.safetensors")
    keys = {"kind": "cnn", "downsample": 2, "channels": 128, "multipliers": [1, 1], "blocks_per_level": 1, "attention": True, "latent_channels": 8}  # fmt: skip
    quantizer = {"kind": "vq", "codebook_size": CODES, "codebook_dim": 8, "l2_normalize": True}
    ours: Any = parse_part(AUTOENCODERS, {**keys, "quantizer": quantizer}, "autoencoders.vq").build()
    assert isinstance(ours, Autoencoder)
    holder = torch.nn.Module()
    holder.autoencoders = torch.nn.ModuleDict({"vq": ours})
    fill(holder, open_starts({"autoencoders.vq": str(tmp_path)})[0])
    ours.eval()
    pictures = torch.rand(2, 3, 16, 24, generator=Generator().manual_seed(1)) * 2 - 1
    codes = ours.encode_codes(pictures)
    # their class looks up codes of unit length when it decodes, and forgets that when it encodes; LlamaGen's code, which trained it, does not
    codebook = F.normalize(theirs.quantize.embedding.weight, dim=-1)
    latents = F.normalize(theirs.quant_conv(theirs.encoder(pictures)), dim=1)
    assert torch.equal(codes, torch.einsum("bchw,nc->bnhw", latents, codebook).argmax(1)) and len(codes.unique()) > 5
    looked_up = codebook[codes]
    close(ours.decode_codes(codes), theirs.decoder(theirs.post_quant_conv(looked_up.permute(0, 3, 1, 2))))
