"""GGUF, the one-file format of llama.cpp: its weights, dequantised, under the names of `published`; its facts; its tokenizer.

Needs the package gguf (the extra `gguf`). Quantised weights become the float32 values they stand for. Rows of Llama's queries and keys are
stored in pairs (2i, 2i + 1) that turn together; here, as in transformers, those are i and i + half a head.
"""

import json
import math
import struct
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stages.documents import Document, check, refuse_pointer
from stages.errors import DataError, MmgenError, UsageError
from stages.parts.backbones.published import LanguageFacts

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


SCALARS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # type of an entry: its bytes
STRING, ARRAY = 8, 9
MAX_LISTED, MAX_NESTED, MAX_AXES = 4_000_000, 4, 8  # the largest vocabularies have 300,000 entries and 500,000 merges


class Words(Document):
    """What a file must say of its tokenizer."""

    tokens: list[str]
    token_type: list[int]
    merges: list[str]


@lru_cache(maxsize=1)
def opened(path: Path) -> Any:
    """The package's reader; it takes seconds to read a header, so that of the last file is kept."""
    try:
        from gguf import GGUFReader
    except ImportError:
        raise UsageError(f"{path}: reading GGUF needs the package gguf", hint="pip install 'mmgen-cli[gguf]'") from None
    refuse_pointer(path)
    try:
        check_header(path)
        return GGUFReader(path)
    except MmgenError:  # the run was asked to stop while it read
        raise
    except Exception as error:  # whatever the bytes make of it: numpy, struct and value errors
        raise DataError(f"{path}: cannot be read as GGUF ({str(error).splitlines()[0] if str(error) else type(error).__name__})") from None


def check_header(path: Path) -> None:
    """Raises ValueError where the header is not what it says: the package's reader would follow a forged count until memory ends."""
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(0)
        start = file.read(8)
        if start[:4] != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        order = ">" if start[4:6] == b"\0\0" else "<"
        listed = 0  # entries of all arrays

        def number(kind: str) -> int:
            data = file.read(struct.calcsize(kind))
            if len(data) < struct.calcsize(kind):
                raise ValueError("its header is cut")
            return int(struct.unpack(order + kind, data)[0])

        def skip(length: int) -> None:
            if length > size - file.tell():
                raise ValueError(f"something of {length:,} bytes at byte {file.tell():,} of {size:,}")
            file.seek(length, 1)

        def value(kind: int, count: int, depth: int) -> None:
            nonlocal listed
            listed += count if depth else 0
            if listed > MAX_LISTED or depth > MAX_NESTED:
                raise ValueError(f"lists of more than {MAX_LISTED:,} entries, or within each other")
            if kind in SCALARS:
                skip(SCALARS[kind] * count)
                return
            if kind not in (STRING, ARRAY):
                raise ValueError(f"an entry of the type {kind}, which there is not")
            for _ in range(count):
                if kind == STRING:
                    skip(number("Q"))
                else:
                    value(number("I"), number("Q"), depth + 1)

        tensors, keys = number("Q"), number("Q")
        if max(tensors, keys) > MAX_LISTED:
            raise ValueError(f"{tensors:,} tensors and {keys:,} facts")
        for _ in range(keys):
            skip(number("Q"))
            value(number("I"), 1, 0)
        for _ in range(tensors):
            skip(number("Q"))
            if (axes := number("I")) > MAX_AXES:
                raise ValueError(f"a tensor with {axes:,} axes")
            if math.prod(number("Q") for _ in range(axes)) > 2 * 8 * size:  # no format has less than a bit a number
                raise ValueError("a tensor that is larger than the file")
            number("I")
            if (offset := number("Q")) > size:
                raise ValueError(f"a tensor at byte {offset:,} of {size:,}")


def fact(reader: Any, key: str) -> Any:
    """One entry of the header, None where it is not there. DataError for a text that is no UTF-8."""
    entry = reader.get_field(key)
    try:
        return None if entry is None else entry.contents()
    except (ValueError, IndexError) as error:
        raise DataError(f"{reader.data.filename}: {key} cannot be read ({error})") from None


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
    check(config, str(path), LanguageFacts)
    config |= {"model_type": kind, "use_sliding_window": "sliding_window" in config, "tie_word_embeddings": "output.weight" not in names}

    tensors: dict[str, Tensor] = {}
    unknown = []
    for stored in reader.tensors:
        name = translated(stored.name)
        if name is None:
            unknown.append(stored.name)
            continue
        try:
            value = torch.from_numpy(dequantize(stored.data, stored.tensor_type).astype("float32"))
        except (NotImplementedError, ValueError) as error:
            raise DataError(f"{path}: {stored.name} cannot be read ({error})") from None
        heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}.get(name.split(".")[-2])
        if kind in IN_PAIRS and heads is not None:
            count = config.get(heads)
            if not count or value.dim() == 0 or value.shape[0] % (2 * count):
                raise DataError(f"{path}: {stored.name} {tuple(value.shape)} does not divide into pairs of {heads} = {count}")
            value = value.unflatten(0, (count, -1, 2)).transpose(1, 2).reshape(value.shape)
        tensors[name] = value
    if "model.embed_tokens.weight" not in tensors:
        raise DataError(f"{path}: there is no token_embd.weight, so this is no language model")
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
    words = {name: fact(reader, f"tokenizer.ggml.{name}") for name in ("tokens", "token_type", "merges")}
    check({name: found for name, found in words.items() if found is not None}, f"{path}: tokenizer.ggml", Words)
    entries, types, merges = words.values()
    if len(entries) != len(types):
        raise DataError(f"{path}: tokenizer.ggml: {len(entries):,} tokens and {len(types):,} types of tokens")
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
            "merges": [merge.split(" ") for merge in merges],
        },
    }
    roles = {"bos_token": "bos", "eos_token": "eos", "pad_token": "padding"}
    ids = {role: fact(reader, f"tokenizer.ggml.{name}_token_id") for role, name in roles.items()}
    known = {role: entries[id] for role, id in ids.items() if type(id) is int and 0 <= id < len(entries)}
    return json.dumps(table), known
