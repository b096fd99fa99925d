"""Released language models as starts: every family as transformers saves it, random in every weight, gives transformers' logits here.

What the recipe must say is not written in these tests: it is taken from the error that the wrong recipe gets, as a user would.
"""

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_llama import IDS, LM, SHARED, VOCAB, batch_of, randomised
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Generator, Tensor
from typer.testing import CliRunner
from worlds import CAPTIONS, make_world, planner_of, recipe_from, sample_of, text_tokenizer

from mmgen_cli.app import app
from stages.data.shards import open_shards
from stages.decoding import Prompt, Session
from stages.errors import DataError, UsageError
from stages.model import Model, build_model
from stages.options import RunOptions
from stages.parts.samplers import AutoregressiveConfig
from stages.parts.tokenizers import ReleasedTokenizerConfig, TextTokenizer, load_tokenizer
from stages.recipe import Recipe, SegmentSpec, load_recipe
from stages.sequence.segment import Role, Segment
from stages.train_unified import copy_experts, train_unified
from stages.training.checkpoint import read_weights
from stages.training.released import fill, open_starts

transformers = pytest.importorskip("transformers")

ANY = LM % "heads = 4"  # a recipe that is none of the networks below
SIZES = {key: value for key, value in SHARED.items() if key != "rope_parameters"}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def plain(theta: float) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": theta}


def llama(**keys: Any) -> Any:
    keys = {"num_attention_heads": 6, "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "rope_parameters": plain(1e5), **keys}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**SIZES, **keys}))


def mistral() -> Any:
    keys = {"num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 6, "sliding_window": None, "rope_parameters": plain(1e6)}
    return transformers.MistralForCausalLM(transformers.MistralConfig(**{**SIZES, **keys}))


def qwen2() -> Any:
    keys = {"num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-6, "rope_parameters": plain(1e6)}
    return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**{**SIZES, **keys}))


def qwen3(**keys: Any) -> Any:
    keys = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 10, "rope_parameters": plain(1e6), **keys}
    return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**{**SIZES, **keys}))


FAMILIES: dict[str, Callable[[], Any]] = {
    "llama": llama,
    "llama-3.1": lambda: llama(rope_parameters=LLAMA3),
    "llama-linear": lambda: llama(rope_parameters={**plain(500.0), "rope_type": "linear", "factor": 3.0}),
    "llama-tied": lambda: llama(tie_word_embeddings=True),
    "llama-biased": lambda: llama(attention_bias=True, mlp_bias=True),
    "mistral": mistral,
    "qwen2": qwen2,
    "qwen3": qwen3,
}


def release(folder: Path, model: Any, *, pieces: bool = False) -> Path:
    model.save_pretrained(folder, max_shard_size=20_000 if pieces else "1GB")
    assert (len(list(folder.glob("*.safetensors"))) > 2) == pieces
    return folder


def filled(recipe: Recipe, source: Path | str, address: str = "backbones.lm", text: dict[str, TextTokenizer] | None = None) -> Model:
    model = build_model(recipe, 0).eval()
    fill(model, open_starts({address: str(source)})[0], text)
    return model


def fitting(text: str, source: Path | str) -> Recipe:
    """The recipe with the keys that the error asks for."""
    with pytest.raises(UsageError, match="not the network of backbones") as caught:
        filled(recipe_from(text), source)
    words = shlex.split(caught.value.hint.split(": ", 1)[1])
    assert words[::2] == ["--set"] * (len(words) // 2)
    return recipe_from(text, sets=words[1::2])


def logits(model: Model, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model.predict("text", model.hidden(batch_of(ids)).flatten(0, 1)).unflatten(0, ids.shape)


@pytest.mark.rung("agrees", "lm")
@pytest.mark.parametrize("name", FAMILIES)
def test_one_message_says_the_recipe_and_then_the_logits_agree(name: str, tmp_path: Path) -> None:
    theirs = randomised(FAMILIES[name]())
    source = release(tmp_path, theirs, pieces=name in ("qwen2", "llama-tied"))
    ours = filled(fitting(ANY, source), source)
    long = torch.randint(0, VOCAB, (2, 60), generator=Generator().manual_seed(1))  # llama3's scale shows beyond 32
    with torch.no_grad():
        for ids in (IDS, long):
            torch.testing.assert_close(logits(ours, ids), theirs(ids).logits, atol=2e-4, rtol=1e-4)


@pytest.mark.rung("agrees", "lm")
@pytest.mark.parametrize("name", FAMILIES)
def test_decoding_with_the_cache_writes_what_theirs_does(name: str, tmp_path: Path) -> None:
    theirs = randomised(FAMILIES[name]())
    source = release(tmp_path, theirs)
    ours = filled(fitting(ANY, source), source)
    sampler = AutoregressiveConfig(temperature=0.0, max_tokens=12)
    spec = SegmentSpec(port="text", field="caption", role=Role.TARGET)
    prompts = [IDS[0, :7], IDS[1, :4]]
    contexts = [[[Segment(port="text", payload=ids, grid=(len(ids),))]] for ids in prompts]
    asked = [Prompt(str(n), "", context) for n, context in enumerate(contexts)]
    with torch.no_grad():
        session = Session(ours, planner_of(ours.recipe), asked, sampler.guide(set()), 12, 0)
        written, _ = session.write_text(spec, sampler, stop=[])
        for ids, wrote in zip(prompts, written, strict=True):
            kept = theirs.generate(ids[None], max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)[0]
            assert kept[len(ids) :].tolist() == wrote


@pytest.mark.parametrize("name", ["llama-3.1", "llama-tied", "qwen2", "qwen3"])
def test_a_recipe_that_says_it_right_is_told_nothing_and_one_wrong_key_alone(name: str, tmp_path: Path) -> None:
    source = release(tmp_path, randomised(FAMILIES[name]()))
    recipe = fitting(ANY, source)
    filled(recipe, source)
    wrong = recipe_from(recipe.to_toml().replace('name = "test"\n', ""), sets=["backbones.lm.norm.eps=0.5"])
    with pytest.raises(UsageError) as caught:
        filled(wrong, source)
    (setting,) = re.findall(r"--set (\S+)", caught.value.hint)
    assert setting.startswith("backbones.lm.norm.eps=")


def test_a_head_of_its_own_needs_one_here_and_a_tied_one_fills_both(tmp_path: Path) -> None:
    source = release(tmp_path / "a", randomised(llama()))
    recipe = recipe_from(fitting(ANY, source).to_toml(), sets=["ports.text.head.tied=true"])
    with pytest.raises(UsageError, match=r"a head of its own, here ports\.text\.head is the embedding") as caught:
        filled(recipe, source)
    assert caught.value.hint.endswith("--set ports.text.head.tied=false")
    tied = release(tmp_path / "b", randomised(llama(tie_word_embeddings=True)))
    filled(recipe, tied)
    assert torch.equal(filled(fitting(ANY, source), tied).state_dict()["ports.text.head.weight"], load_file(tied / "model.safetensors")["model.embed_tokens.weight"])  # fmt: skip


# what is refused


def changed(folder: Path, **facts: Any) -> Path:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **facts}))
    return folder


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        (
            {"model_type": "gemma"},
            "model_type 'gemma'; of language models llama, mistral, qwen2, qwen3, chameleon, emu3_text_model are read",
        ),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1.0, "factor": 2.0}}, "scales its rotary positions by 'yarn'"),
        ({"rope_parameters": {**plain(1.0), "partial_rotary_factor": 0.5}}, "rotates a part of each head only"),
        ({"model_type": "mistral", "sliding_window": 8}, "sliding window of 8 tokens"),
        ({"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 8}, "sliding window of 8 tokens"),
    ],
)
def test_what_the_transformer_cannot_do_is_refused(facts: dict[str, Any], message: str, tmp_path: Path) -> None:
    source = release(tmp_path, randomised(llama()))
    with pytest.raises(UsageError, match=re.escape(message)):
        filled(recipe_from(ANY), changed(source, **facts))


def test_a_config_that_leaves_out_what_is_needed_is_refused(tmp_path: Path) -> None:
    source = release(tmp_path, randomised(llama()))
    changed(source, rope_parameters={**plain(1.0), "rope_type": "llama3", "factor": 2.0})
    with pytest.raises(DataError, match=r"does not say low_freq_factor, high_freq_factor, original_max_position_embeddings"):
        filled(recipe_from(ANY), source)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({key: value for key, value in config.items() if key != "num_attention_heads"}))
    with pytest.raises(DataError, match=r"config\.json does not say num_attention_heads"):
        filled(recipe_from(ANY), source)


def test_biases_that_only_some_have_are_refused(tmp_path: Path) -> None:
    source = release(tmp_path, randomised(llama(attention_bias=True)))
    with pytest.raises(UsageError, match="biases on queries True, on the output of attention True, in the MLP False"):
        filled(recipe_from(ANY), source)


def test_weights_without_their_config_are_refused(tmp_path: Path) -> None:
    source = release(tmp_path, randomised(llama()))
    (source / "config.json").unlink()
    with pytest.raises(DataError, match=r"there is no config\.json beside the weights"):
        filled(recipe_from(ANY), source)


def test_weights_missing_left_over_and_reshaped_are_listed_by_their_own_names(tmp_path: Path) -> None:
    source = release(tmp_path, randomised(llama()))
    recipe = fitting(ANY, source)
    weights = load_file(source / "model.safetensors")
    del weights["model.layers.1.self_attn.k_proj.weight"]
    weights["model.layers.2.mlp.down_proj.weight"] = torch.zeros(3, 4)
    weights["model.layers.2.mlp.extra.weight"] = torch.zeros(2)
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(2)  # in old files, and no weight
    save_file(weights, source / "model.safetensors")
    with pytest.raises(DataError) as caught:
        filled(recipe, source)
    assert "1 weights missing, 1 unexpected, 1 reshaped (layout llama)" in caught.value.message
    assert "missing: model.layers.1.self_attn.k_proj.weight" in caught.value.message
    assert "unexpected: model.layers.2.mlp.extra.weight" in caught.value.message
    assert re.search(r"reshaped: model\.layers\.2\.mlp\.down_proj\.weight \(3, 4\), expected \(24, \d+\)", caught.value.message)


def test_an_autoencoder_is_no_language_model(tmp_path: Path) -> None:
    save_file({"encoder.conv_in.weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(DataError, match=r"no weight is called …embed_tokens\.weight"):
        open_starts({"backbones.lm": str(tmp_path)})


def test_other_parts_start_from_checkpoints_alone(tmp_path: Path) -> None:
    source = release(tmp_path, randomised(llama()))
    with pytest.raises(UsageError, match=r"not a checkpoint, there is no recipe\.toml"):
        filled(recipe_from(ANY), source, "ports.text")


# where it goes


def several(recipe: Recipe, *sets: str) -> Recipe:
    return recipe_from(recipe.to_toml(), sets=['backbones.lm.experts=["words", "pictures"]', 'ports.text.expert="words"', *sets])


def test_a_model_inside_a_larger_one_is_found_and_two_are_a_choice(tmp_path: Path) -> None:
    theirs = randomised(qwen2())
    source = release(tmp_path, theirs)
    recipe, config = fitting(ANY, source), json.loads((source / "config.json").read_text())
    weights = load_file(source / "model.safetensors")
    inner = {f"language_model.{name}": value for name, value in weights.items()} | {"vision.patch.weight": torch.zeros(2)}
    save_file(inner, source / "model.safetensors")
    (source / "config.json").write_text(json.dumps({"model_type": "llava", "text_config": config}))
    torch.testing.assert_close(logits(filled(recipe, source), IDS), theirs(IDS).logits, atol=2e-4, rtol=1e-4)
    save_file({**inner, "other.model.embed_tokens.weight": torch.zeros(2, 2)}, source / "model.safetensors")
    with pytest.raises(DataError, match="holds 2 language models") as caught:
        filled(recipe, source)
    assert "language_model.model." in caught.value.hint
    torch.testing.assert_close(logits(filled(recipe, f"{source}#language_model"), IDS), theirs(IDS).logits, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("duplicate", [("norm", "qkv", "out", "mlp"), ("mlp",), ("norm", "qkv")])
def test_the_first_expert_and_what_all_share_are_filled(duplicate: tuple[str, ...], tmp_path: Path) -> None:
    theirs = randomised(qwen3())
    source = release(tmp_path, theirs)
    recipe = several(fitting(ANY, source), f"backbones.lm.duplicate={list(duplicate)}")
    model = filled(recipe, source)
    torch.testing.assert_close(logits(model, IDS), theirs(IDS).logits, atol=2e-4, rtol=1e-4)
    fresh, state = build_model(recipe, 0).state_dict(), model.state_dict()
    assert all(torch.equal(value, fresh[name]) == (".pictures." in name) for name, value in state.items())


def test_all_experts_start_as_copies_where_the_recipe_says_so(tmp_path: Path) -> None:
    source = release(tmp_path, randomised(llama()))
    model = filled(several(fitting(ANY, source), 'backbones.lm.expert_init="copy"'), source)
    copy_experts(model, ["backbones.lm"])
    state = model.state_dict()
    copies = [name for name in state if ".pictures." in name]
    assert len(copies) == sum(".words." in name for name in state) == 19  # six a layer, and the last norm
    assert all(torch.equal(state[name], state[name.replace(".pictures.", ".words.")]) for name in copies)


def test_a_named_expert_is_filled_alone(tmp_path: Path) -> None:
    source = release(tmp_path, randomised(llama()))
    recipe = several(fitting(ANY, source))
    first, second = filled(recipe, source).state_dict(), filled(recipe, source, "backbones.lm.experts.pictures").state_dict()
    fresh = build_model(recipe, 0).state_dict()
    for name, value in second.items():
        assert torch.equal(value, first[name.replace(".pictures.", ".words.")] if ".pictures." in name else fresh[name]), name
    with pytest.raises(UsageError, match=r"--init backbones\.lm\.experts\.sound") as caught:
        filled(recipe, source, "backbones.lm.experts.sound")
    assert "backbones.lm.experts.pictures" in caught.value.hint


# words

TEXTS = [*CAPTIONS, "naïve 你好 <|end|> <soi>", "two  spaces\n"]


def released_words(folder: Path, *, rows: int = 330) -> Tokenizer:
    """A GPT-2-like tokenizer.json, whose special tokens stand last and are called as its makers liked; its own padding and truncation on."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(CAPTIONS * 3, trainers.BpeTrainer(vocab_size=rows - 2, initial_alphabet=alphabet, show_progress=False))
    tokenizer.add_special_tokens(["<|end|>", "<|start|>"])
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=4)
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    told = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": {"content": "<|end|>"}, "bos_token": "<|start|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(told))
    return tokenizer


def adopted(folder: Path, *special: str) -> TextTokenizer:
    return ReleasedTokenizerConfig(special=special).adopt(folder)


def test_a_released_tokenizer_gives_its_own_ids(tmp_path: Path) -> None:
    size = released_words(tmp_path / "release").get_vocab_size()
    ours = adopted(tmp_path / "release", "<soi>", "<eoi>")
    ours.save(tmp_path / "kept")
    assert load_tokenizer(tmp_path / "kept").fingerprint == ours.fingerprint
    ours = load_tokenizer(tmp_path / "kept")
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "release" / "tokenizer.json"), eos_token="<|end|>")
    for text in CAPTIONS:
        assert ours.encode(text) == theirs(text, truncation=False, padding=False)["input_ids"]
    assert ours.vocab_size == size + 2
    assert [ours.special_id(name) for name in ("<eos>", "<bos>", "<pad>", "<soi>", "<eoi>")] == [size - 2, size - 1, size - 2, size, size + 1]  # fmt: skip
    assert ours.extends(tmp_path / "release" / "tokenizer.json")
    assert not text_tokenizer().extends(tmp_path / "release" / "tokenizer.json")


def test_texts_come_back_and_never_become_its_special_tokens(tmp_path: Path) -> None:
    released_words(tmp_path)
    ours = adopted(tmp_path, "<soi>")
    for text in TEXTS:
        ids = ours.encode(text)
        assert ours.decode(ids) == text
        assert max(ids) < ours.special_id("<eos>")
    written = ours.encode("<bos>a<soi><eos>", special=True)
    assert written == [ours.special_id("<bos>"), *ours.encode("a"), ours.special_id("<soi>"), ours.special_id("<eos>")]


@pytest.mark.parametrize(
    ("settings", "config", "expected"),
    [
        ({"eos_token": "<|end|>"}, {}, ("<|end|>", "<|end|>", "<|end|>")),  # GPT-2: one token ends, begins and pads
        ({"eos_token": "<|end|>", "bos_token": None}, {"bos_token_id": 0}, ("!", "<|end|>", "<|end|>")),  # Qwen: said by number
        ({}, {"eos_token_id": 0}, ("!", "!", "!")),
        ({"eos_token": "<|end|>", "bos_token": "<|start|>", "pad_token": {"content": "!"}}, {}, ("<|start|>", "<|end|>", "!")),
    ],
)
def test_what_begins_ends_and_pads_is_read(settings: Any, config: Any, expected: tuple[str, ...], tmp_path: Path) -> None:
    table = released_words(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "config.json").write_text(json.dumps(config))
    ours = adopted(tmp_path)
    assert [ours.special_id(name) for name in ("<bos>", "<eos>", "<pad>")] == [table.token_to_id(token) for token in expected]


def test_a_release_that_says_no_end_or_has_no_table_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"there is no tokenizer\.json"):
        adopted(tmp_path)
    released_words(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    with pytest.raises(DataError, match="which token ends a text"):
        adopted(tmp_path)


@pytest.mark.parametrize("extra", [2, 9])
def test_its_own_words_come_with_a_model_and_no_others_do(extra: int, tmp_path: Path) -> None:
    """Rows that a release keeps behind its vocabulary (here 5) start special tokens that the recipe adds; further ones start anew."""
    size = released_words(tmp_path).get_vocab_size()
    source = release(tmp_path, randomised(llama(vocab_size=size + 5)))
    words = adopted(tmp_path, *(f"<{n}>" for n in range(extra)))
    table = {"kind": "hf", "vocab_size": words.vocab_size, "special": list(words.config.special)}
    recipe = fitting(ANY, source).with_parts({"tokenizers.bpe": table})
    model, weights = filled(recipe, source, text={"bpe": words}), load_file(source / "model.safetensors")
    fresh = build_model(recipe, 0).state_dict()
    for ours, theirs in (("connector", "model.embed_tokens"), ("head", "lm_head")):
        rows, count = model.state_dict()[f"ports.text.{ours}.weight"], min(size + extra, size + 5)
        assert torch.equal(rows[:count], weights[f"{theirs}.weight"][:count])
        assert torch.equal(rows[count:], fresh[f"ports.text.{ours}.weight"][count:])
        assert len(rows) == size + extra
    other = filled(fitting(ANY, source), source, text={"bpe": text_tokenizer()})
    assert torch.equal(other.state_dict()["ports.text.head.weight"], build_model(other.recipe, 0).state_dict()["ports.text.head.weight"])


def test_the_fingerprint_is_of_weights_and_of_what_is_read_of_the_config(tmp_path: Path) -> None:
    def found() -> str:
        return str(open_starts({"backbones.lm": str(tmp_path)})[0].as_input()["fingerprint"])

    source = release(tmp_path, randomised(llama()))
    first = found()
    release(source, randomised(llama()), pieces=False)
    assert found() == first
    changed(source, transformers_version="0")
    assert found() == first
    changed(source, rms_norm_eps=1e-3)
    assert found() != first
    release(source, randomised(qwen2()))
    assert found() != first


# the whole way, as it is typed


def mmgen(*words: str | Path) -> Any:
    return CliRunner().invoke(app, [str(word) for word in words])


def test_a_release_and_its_words_answer_on_the_command_line_as_in_transformers(tmp_path: Path) -> None:
    shards = make_world(tmp_path / "world", load_recipe("lm", size="tiny"), [sample_of(number) for number in range(4)]).shards
    size = released_words(tmp_path / "words").get_vocab_size()
    theirs = randomised(qwen3(vocab_size=size + 8))
    source = release(tmp_path / "lm", theirs)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (source / name).write_bytes((tmp_path / "words" / name).read_bytes())

    words = tmp_path / "kept-words"
    done = mmgen("pretrain-tokenizer", shards, "--recipe", "text-bpe", "--init", f"tokenizers.bpe={source}", "--out", words)
    assert done.exit_code == 0, done.output
    train = ["train-unified", shards, "--tokenizer", words, "--recipe", "lm", "--size", "tiny", "--init", f"backbones.lm={source}", "--set", "phases.pretrain.steps=0"]  # fmt: skip
    refused = mmgen(*train, "--out", tmp_path / "run")
    assert refused.exit_code == 2
    asked = re.findall(r"--set (backbones\.lm\.\S+)", refused.output)
    assert len(asked) == 6, refused.output
    done = mmgen(*train, *(word for key in asked for word in ("--set", key)), "--out", tmp_path / "run")
    assert done.exit_code == 0, done.output
    (start,) = (entry for entry in json.loads((tmp_path / "run" / "run.json").read_text())["inputs"] if "role" in entry)
    expected = open_starts({"backbones.lm": str(source)})[0].as_input()
    assert start == expected and expected["role"] == "init backbones.lm" and len(expected["fingerprint"]) == 64

    done = mmgen("sample", tmp_path / "run", "--prompt", "a red circle", "--task", "chat", "--out", tmp_path / "out")
    assert done.exit_code == 0, done.output
    (answer,) = open_shards(str(tmp_path / "out"))
    table = load_tokenizer(words)
    ids = torch.tensor([table.encode("<bos>a red circle", special=True)])
    end = table.special_id("<eos>")
    kept = theirs.generate(ids, max_new_tokens=16, do_sample=False, eos_token_id=end, pad_token_id=end)[0, ids.shape[1] :]
    assert answer.fields["sample.qa"][0]["answer"] == table.decode(kept.tolist()).strip()


def test_two_experts_begin_as_the_release_and_only_the_second_learns(tmp_path: Path) -> None:
    """LMFusion: the words' expert is frozen as released, the pictures' one starts as its copy."""
    source = release(tmp_path / "lm", randomised(llama()))
    sets = [setting for setting in re.findall(r"--set (\S+)", hint_for("lmfusion", source)) if not setting.startswith("ports")]
    sets += ['phases.joint.trainable=["backbones.lm.experts.image", "ports.image"]', "phases.joint.steps=1", "phases.joint.batch_tokens=64"]
    recipe = load_recipe("lmfusion", size="tiny", sets=sets)
    world = make_world(tmp_path / "world", recipe, [sample_of(n, **{"image.latents": torch.randn(4, 4, 4).numpy()}) for n in range(4)])
    out = train_unified(
        recipe, str(world.shards), tmp_path / "run", RunOptions(quiet=True, dtype="fp32"), init={"backbones.lm": str(source)}
    )
    state, start = read_weights(out / "model.safetensors"), filled(world.recipe(recipe), source).state_dict()
    for name, value in start.items():
        if ".experts.text." in name:
            assert torch.equal(state[name], value), name
            moved = (state[name.replace(".text.", ".image.")] - value).abs().max()
            assert 0 < moved < 0.01, name


def hint_for(recipe: str, source: Path) -> str:
    with pytest.raises(UsageError) as caught:
        filled(load_recipe(recipe, size="tiny"), source)
    return caught.value.hint
