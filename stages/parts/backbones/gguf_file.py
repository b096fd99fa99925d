"""GGUF, the one-file format of llama.cpp: its weights, dequantised, under the names of `published`; its facts; its tokenizer.

Needs the package gguf (the extra `gguf`). Quantised weights become the float32 values they stand for. Rows of Llama's queries and keys are
stored in pairs (2i, 2i + 1) that turn together; here, as in transformers, those are i and i + half a head.
"""

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stages.errors import DataError, MmgenError, UsageError

ARCHITECTURES = ("llama", "qwen2", "qwen3")
IN_PAIRS = ("llama",)
TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
FACTS = {  # ours is config.json's
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "rope_theta": "rope.freq_base",
    "sliding_window": "attention.sliding_window",
}
DIGITS, WORDS = {"type": "Digits", "individual_digits": True}, {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
SPLITS = {"gpt-2": [WORDS], "smollm": [DIGITS, WORDS]}  # how a text is cut before entries are merged, by the name GGUF gives it
CONTROL = 3  # the token type of special tokens


@lru_cache(maxsize=1)
def opened(path: Path) -> Any:
    """The package's reader; it takes seconds to read a header, so that of the last file is kept."""
    try:
        from gguf import GGUFReader
    except ImportError:
        raise UsageError(f"{path}: reading GGUF needs the package gguf", hint="pip install 'mmgen-cli[gguf]'") from None
    try:
        return GGUFReader(path)
    except MmgenError:  # the run was asked to stop while it read
        raise
    except Exception as error:  # whatever the bytes make of it: numpy, struct and value errors
        raise DataError(f"{path}: cannot be read as GGUF ({str(error).splitlines()[0] if str(error) else type(error).__name__})") from None


def fact(reader: Any, key: str) -> Any:
    """One entry of the header, None where it is not there."""
    entry = reader.get_field(key)
    return None if entry is None else entry.contents()


def read_gguf(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A language model's weights (float32) by the names of transformers, and what config.json would say of it.

    UsageError for an architecture or scaled positions that are not read, DataError for damage and for weights without a place.
    """
    from gguf.quants import dequantize

    reader = opened(path)
    kind = fact(reader, "general.architecture")
    if kind not in ARCHITECTURES:
        raise UsageError(f"{path}: architecture {kind!r}; of GGUF files {', '.join(ARCHITECTURES)} are read")
    scaling = fact(reader, f"{kind}.rope.scaling.type")
    names = [tensor.name for tensor in reader.tensors]
    if scaling not in (None, "none") or "rope_freqs.weight" in names:
        raise UsageError(f"{path}: scales its rotary positions, which is read from config.json only; take the release's safetensors")
    facts = {ours: fact(reader, f"{kind}.{theirs}") for ours, theirs in FACTS.items()}
    config = {ours: float(f"{value:.7g}") if isinstance(value, float) else value for ours, value in facts.items() if value is not None}
    config |= {"model_type": kind, "use_sliding_window": "sliding_window" in config, "tie_word_embeddings": "output.weight" not in names}

    tensors: dict[str, Tensor] = {}
    unknown = []
    for stored in reader.tensors:
        name = translated(stored.name)
        if name is None:
            unknown.append(stored.name)
            continue
        value = torch.from_numpy(dequantize(stored.data, stored.tensor_type).astype("float32"))
        heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}.get(name.split(".")[-2])
        if kind in IN_PAIRS and heads is not None:
            value = value.unflatten(0, (config[heads], -1, 2)).transpose(1, 2).reshape(value.shape)
        tensors[name] = value
    if unknown:
        raise DataError(f"{path}: weights that no language model read here has: {', '.join(unknown[:6])}{' …' if len(unknown) > 6 else ''}")
    return tensors, config


def translated(name: str) -> str | None:
    """`blk.3.attn_q.weight` → `model.layers.3.self_attn.q_proj.weight`."""
    path, _, leaf = name.rpartition(".")
    if path in TOP:
        return f"{TOP[path]}.{leaf}"
    block, _, role = path.partition(".")[2].partition(".")
    return f"model.layers.{block}.{LAYER[role]}.{leaf}" if path.startswith("blk.") and role in LAYER else None


def tokenizer_of(path: Path) -> tuple[str, dict[str, str]]:
    """The text of a tokenizer.json with the file's entries and merges, and its special tokens as tokenizer_config.json names them."""
    reader = opened(path)
    kind, split = fact(reader, "tokenizer.ggml.model"), fact(reader, "tokenizer.ggml.pre")
    if kind != "gpt2" or split not in SPLITS:
        raise UsageError(f"{path}: a tokenizer {kind} that cuts texts as {split}; read are gpt2 and {', '.join(SPLITS)}")
    entries = fact(reader, "tokenizer.ggml.tokens")
    types = fact(reader, "tokenizer.ggml.token_type")
    special = [
        {"id": id, "content": entry, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        for id, (entry, type) in enumerate(zip(entries, types, strict=True))
        if type == CONTROL
    ]
    table = {
        "version": "1.0",
        "added_tokens": special,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [{**cut, "trim_offsets": True} if cut is WORDS else cut for cut in SPLITS[split]],
        },
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "vocab": {entry: id for id, entry in enumerate(entries)},
            "merges": [merge.split(" ") for merge in fact(reader, "tokenizer.ggml.merges")],
        },
    }
    roles = {"bos_token": "bos", "eos_token": "eos", "pad_token": "padding"}
    ids = {role: fact(reader, f"tokenizer.ggml.{name}_token_id") for role, name in roles.items()}
    return json.dumps(table), {role: entries[id] for role, id in ids.items() if id is not None}
