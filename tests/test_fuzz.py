"""Files that somebody else wrote, damaged in every way: what opens them succeeds or raises an error that is meant for people, nothing else."""

import copy
import json
import os
import random
import struct
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from worlds import mixed_recipe, text_tokenizer

from stages.data.sample import Sample
from stages.data.shards import ShardWriter, open_shards
from stages.documents import MAX_DEPTH
from stages.errors import MmgenError
from stages.evaluate import describe_shards, sampling_of
from stages.inspect_path import describe
from stages.model import build_model
from stages.parts.backbones.gguf_file import opened, read_gguf, tokenizer_of
from stages.parts.tokenizers import ReleasedTokenizerConfig, load_tokenizer
from stages.recipe import RECIPES, load_recipe
from stages.report import report
from stages.tools.toolbox import open_tools
from stages.training.checkpoint import checkpoint_input, open_checkpoint, save_checkpoint
from stages.training.released import read_released, weight_files

MANY = int(os.environ.get("MMGEN_FUZZ", "0"))  # examples of each test, where more are wanted than the usual few
fuzzed = settings(
    max_examples=MANY or 40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=not MANY, database=None
)
ODD: tuple[Any, ...] = (
    None, True, 0, -1, 2**31, 2**63, 2**64, 10**30, 10**400, 0.0, -0.5, 1e308, float("nan"), float("inf"), "", "x", "\0", "\x1b[2J", "../../etc",
    "/dev/zero", "é" * 50, "a" * 3000, [], {}, [[]], [None], {"": None}, {"a": "x"}, [3], ["x", 3], "2020-01-01", "9999", "true", "3",
)  # fmt: skip


def damaged(value: Any, choose: random.Random) -> Any:
    """A document with one to three places replaced, removed, repeated, or renamed."""
    value = copy.deepcopy(value)
    for _ in range(choose.randint(1, 3)):
        places: list[tuple[Any, Any]] = []
        level = [value]
        while level:
            item = level.pop()
            pairs = list(item.items()) if isinstance(item, dict) else list(enumerate(item)) if isinstance(item, list) else []
            places += [(item, key) for key, _ in pairs]
            level += [inner for _, inner in pairs]
        odd = copy.deepcopy(choose.choice(ODD))
        if not places or choose.random() < 0.05:
            return odd
        holder, key = choose.choice(places)
        action = choose.random()
        if action < 0.6:
            holder[key] = odd
        elif action < 0.75:
            del holder[key]
        elif action < 0.85 and isinstance(holder, dict):
            holder[choose.choice(["", "x", "kind", "name", "é", "a.b"])] = holder.pop(key)
        elif action < 0.95:
            holder[key] = [holder[key]]
        else:
            for _ in range(choose.choice([10, MAX_DEPTH + 10])):
                holder[key] = {"deep": holder[key]} if choose.random() < 0.5 else [holder[key]]
    return value


def damaged_bytes(data: bytes, choose: random.Random) -> bytes:
    """A file that was cut, overwritten in places, or is something else altogether."""
    if choose.random() < 0.1:
        return choose.choice([b"", b"\0" * 100, b"\xff\xfe" + data, b"[" * 100_000, b"a=" + b"[" * 5000, b'{"a":' * 20_000, b"null", b"3", b'"x"',
            b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 3\n", b"1" * 6000, b"x = 0x" + b"f" * 6000, b'"\\ud800"', b"\xef\xbb\xbf" + data])  # fmt: skip
    content = bytearray(data)
    for _ in range(choose.randint(1, 4)):
        at = choose.randrange(len(content) + 1)
        action = choose.random()
        if action < 0.3:
            del content[at:]
        elif action < 0.7:
            content[at : at + choose.randint(1, 8)] = choose.choice(
                [b"\0", b"\xff" * 8, b"[", b"}", b'"', b"-1", b"9" * 30, b"nan", b"=", b"\n", b"{"]
            )
        else:
            content[at:at] = content[choose.randrange(len(content) + 1) :][: choose.randint(1, 50)]
    return bytes(content)


def as_json(value: Any, choose: random.Random) -> bytes:
    try:
        data = json.dumps(value).encode()
    except (ValueError, RecursionError):  # an integer with more digits than Python prints
        return b"1" * 6000
    return damaged_bytes(data, choose) if choose.random() < 0.25 else data


def as_toml(value: Any, choose: random.Random) -> bytes:
    try:
        data = tomli_w.dumps(value).encode()
    except (TypeError, ValueError, AttributeError, RecursionError):  # what TOML has no word for
        data = b"x = 3\n"
    return damaged_bytes(data, choose) if choose.random() < 0.25 else data


def only_our_errors(act: Callable[[], object]) -> None:
    try:
        act()
    except MmgenError as error:
        told = error.message
    else:
        return
    assert told and len(told) < 20_000


seeds = st.integers(0, 2**32).map(random.Random)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    recipe = mixed_recipe()
    facts = {"picture_size": [8, 8], "grids": {"image": [2, 2]}, "unknown": {"deep": [1, {"x": None}]}}
    save_checkpoint(folder, recipe, build_model(recipe, 0).state_dict(), facts=facts)
    (folder / "run.json").write_text(json.dumps(RECORD | {"recipe": recipe.to_toml()}))
    (folder / "status.json").write_text(
        json.dumps({"state": "done", "exit_code": 0, "stage": "train-unified", "step": 7, "of": 9, "message": ""})
    )
    lines = [{"step": n, "loss/text": 3.0 / (n + 1), "val/text": 2.0, "lr": 0.1 * n, "seconds": n * 1.5} for n in range(5)]
    lines += [{"height": 8, "width": 8, "encode_per_second": 3.0, "decode_per_second": 2.5, "batch": 3, "threads": 1, "device": "cpu"}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    protocol = {"resize": "none", "sampling": {"image": {"steps": 3}, "seed": 0}}
    row = {
        "metric": "psnr",
        "category": "all",
        "split": "val",
        "n": 3,
        "value": 20.0,
        "interval": [19.0, 21.0],
        "chance": 0.1,
        "protocol": protocol,
    }
    (folder / "results.json").write_text(json.dumps({"inputs": [], "results": [row | {"control": None}, row | {"control": "untrained"}]}))
    return folder


INPUT = {
    "path": "data",
    "fingerprint": "ab",
    "provenance": {"stage": "import", "command": ["mmgen", "import"], "started": "2026-01-01T00:00:00+00:00"},
}
RECORD: dict[str, Any] = {
    "stage": "train-unified", "command": ["mmgen", "train-unified"], "seed": 3, "identity": {"stage": "x"}, "inputs": [INPUT, {**INPUT, "provenance": None}],
    "versions": {"python": "3.11"}, "git_commit": "abc", "machine": {"platform": "linux", "processor": "x", "cpus": 2, "threads": 2, "gpus": ["a"]},
    "started": "2026-01-01T00:00:00+00:00", "finished": "2026-01-01T01:00:00+00:00", "joined": [{"path": "x", "fingerprint": "y"}],
    "launches": [{"command": [], "started": "x", "finished": None, "state": "done"}], "readme": None, "importer": "folder", "arguments": {"source": "x"},
}  # fmt: skip


def replaced(folder: Path, name: str, choose: random.Random, change: Callable[[bytes], bytes]) -> Iterator[None]:
    """While it is iterated, a file of the folder holds something else."""
    file = folder / name
    before = file.read_bytes()
    file.write_bytes(change(before))
    try:
        yield
    finally:
        file.write_bytes(before)


def json_change(choose: random.Random) -> Callable[[bytes], bytes]:
    return lambda data: as_json(damaged(json.loads(data), choose), choose)


def toml_change(choose: random.Random) -> Callable[[bytes], bytes]:
    return lambda data: as_toml(damaged(tomllib.loads(data.decode()), choose), choose)


@fuzzed
@given(seeds)
def test_the_config_of_a_checkpoint(checkpoint: Path, choose: random.Random) -> None:
    for _ in replaced(checkpoint, "config.json", choose, json_change(choose)):
        only_our_errors(lambda: open_checkpoint(checkpoint))
        only_our_errors(lambda: describe(str(checkpoint)))
        only_our_errors(lambda: read_released(checkpoint, family="autoencoders"))


@fuzzed
@given(seeds, st.sampled_from(["run.json", "status.json", "results.json"]))
def test_the_records_of_a_run(checkpoint: Path, tmp_path: Path, choose: random.Random, name: str) -> None:
    for _ in replaced(checkpoint, name, choose, json_change(choose)):
        only_our_errors(lambda: report([checkpoint], tmp_path / "report.html"))
        only_our_errors(lambda: checkpoint_input("x", checkpoint))


@settings(fuzzed, max_examples=MANY or 12)
@given(seeds)
def test_the_lines_of_metrics(checkpoint: Path, tmp_path: Path, choose: random.Random) -> None:
    def change(data: bytes) -> bytes:
        return b"".join(as_json(damaged(json.loads(line), choose), choose) + b"\n" for line in data.splitlines())

    for _ in replaced(checkpoint, "metrics.jsonl", choose, change):
        report([checkpoint], tmp_path / "report.html")  # a line that is none is left out


@fuzzed
@given(seeds)
def test_the_recipe_of_a_checkpoint(checkpoint: Path, choose: random.Random) -> None:
    for _ in replaced(checkpoint, "recipe.toml", choose, toml_change(choose)):
        only_our_errors(lambda: load_recipe(checkpoint))
        only_our_errors(lambda: open_checkpoint(checkpoint))


@fuzzed
@given(seeds, st.sampled_from(sorted(RECIPES.glob("*/*.toml"))), st.sampled_from(["tiny", "small", "paper"]))
def test_a_recipe_with_its_sizes(tmp_path: Path, choose: random.Random, recipe: Path, size: str) -> None:
    file = tmp_path / "recipe.toml"
    file.write_bytes(toml_change(choose)(recipe.read_bytes()))
    only_our_errors(lambda: load_recipe(file, size=size))


@fuzzed
@given(st.text(max_size=30), st.text(max_size=30), st.sampled_from(["", "phases", "ports.text", "backbones.lm", "sample", "name"]))
def test_an_override(address: str, value: str, start: str) -> None:
    only_our_errors(lambda: load_recipe("show-o", size="tiny", sets=[f"{start}.{address}={value}"]))
    only_our_errors(lambda: load_recipe("show-o", size="tiny", sets=[f"{start}={value}"]))


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    with ShardWriter(folder, provenance=INPUT["provenance"]) as writer:  # type: ignore[arg-type]
        for number in range(3):
            writer.write(
                Sample(
                    f"{number}", {"caption": "a red circle", "sample.caption": "x", "meta": {"tasks": ["reconstruct"], "prompt_key": "0"}}
                )
            )
    return folder


@fuzzed
@given(seeds)
def test_the_index_of_shards(shards: Path, tmp_path: Path, choose: random.Random) -> None:
    for _ in replaced(shards, ".mmgen/shardindex.json", choose, json_change(choose)):
        only_our_errors(lambda: [sample.key for sample in open_shards(str(shards))])
        only_our_errors(lambda: describe(str(shards)))
        only_our_errors(lambda: [describe_shards("x", found) and sampling_of(found) for found in [open_shards(str(shards))]])
        only_our_errors(lambda: report([shards], tmp_path / "report.html"))


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("words")
    text_tokenizer().save(folder)
    return folder


@fuzzed
@given(seeds, st.sampled_from(["tokenizer.json", "tokenizer_config.json"]))
def test_a_text_tokenizer(words: Path, choose: random.Random, name: str) -> None:
    def use() -> None:
        for tokenizer in (load_tokenizer(words), ReleasedTokenizerConfig().adopt(words)):
            assert isinstance(tokenizer.decode(tokenizer.encode("a red circle, ü")), str) and tokenizer.fingerprint

    for _ in replaced(words, name, choose, json_change(choose)):
        only_our_errors(lambda: load_tokenizer(words))
        only_our_errors(lambda: ReleasedTokenizerConfig().adopt(words))
        only_our_errors(use)


TOOLS = {"tools": {"answer": {"description": "", "model": "m", "task": "caption", "reads": {"image": "image"}, "writes": "caption"}}}


@fuzzed
@given(seeds)
def test_a_toolbox(tmp_path: Path, choose: random.Random) -> None:
    (tmp_path / "tools.toml").write_bytes(as_toml(damaged(TOOLS, choose), choose))
    only_our_errors(lambda: open_tools(tmp_path / "tools.toml"))


def gguf_file(path: Path) -> bytes:
    gguf = pytest.importorskip("gguf", reason="pip install 'mmgen-cli[gguf]'")
    import numpy as np

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(["a", "b", "ab", "<eos>"])
    writer.add_token_types([1, 1, 1, 3])
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(3)
    for name, shape in (("token_embd.weight", (4, 8)), ("blk.0.attn_q.weight", (8, 8)), ("blk.0.attn_k.weight", (4, 8))):
        writer.add_tensor(name, np.ones(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


@fuzzed
@given(seeds)
def test_a_gguf_header(tmp_path_factory: pytest.TempPathFactory, choose: random.Random) -> None:
    folder = tmp_path_factory.getbasetemp() / "gguf"
    folder.mkdir(exist_ok=True)
    whole = folder / "whole.gguf"
    content = bytearray(whole.read_bytes() if whole.exists() else gguf_file(whole))
    for _ in range(choose.randint(1, 3)):
        at = choose.randrange(4, 700)
        number = choose.choice(
            [0, 1, 2, 3, 7, 8, 9, 12, 13, 255, 2**16, 2**31, 2**32 - 1, 2**61, 2**62, 2**63, 2**64 - 1, choose.getrandbits(64)]
        )
        kind = choose.choice(["<Q", "<I", "<B"])
        content[at : at + struct.calcsize(kind)] = struct.pack(kind, number % 2 ** (8 * struct.calcsize(kind)))
    if choose.random() < 0.2:
        del content[choose.randrange(len(content)) :]
    file = folder / "damaged.gguf"
    file.write_bytes(content)
    opened.cache_clear()
    only_our_errors(lambda: read_gguf(file))
    only_our_errors(lambda: tokenizer_of(file))
    only_our_errors(lambda: ReleasedTokenizerConfig().adopt(file))
    only_our_errors(lambda: read_released(file, family="backbones").fingerprint())


LLAMA = {
    "model_type": "llama", "hidden_act": "silu", "num_attention_heads": 2, "num_hidden_layers": 1, "rms_norm_eps": 1e-5, "rope_theta": 1e4,
    "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64},
    "tie_word_embeddings": True, "sliding_window": None, "text_config": None, "vocabulary_map": {"IMGIMGBZ": 2},
    "vision_config": {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 4, "hidden_act": "gelu"},
}  # fmt: skip


@fuzzed
@given(seeds, st.sampled_from(["llama", "janus", "chameleon"]), st.sampled_from(["backbones", "model"]))
def test_the_config_of_a_released_model(tmp_path_factory: pytest.TempPathFactory, choose: random.Random, kind: str, family: str) -> None:
    import torch
    from safetensors.torch import save_file

    folder = tmp_path_factory.getbasetemp() / "released"
    if not folder.exists():
        folder.mkdir()
        part = {"self_attn.q_proj": (8, 8), "self_attn.k_proj": (4, 8), "mlp.gate_proj": (16, 8)}
        weights = {f"model.layers.0.{name}.weight": torch.ones(shape) for name, shape in part.items()}
        save_file({"model.embed_tokens.weight": torch.ones(4, 8), **weights}, folder / "model-1.safetensors")
    section = (
        LLAMA
        if kind == "llama"
        else {"model_type": kind, "text_config": LLAMA, "vision_config": LLAMA["vision_config"], "vocabulary_map": {}}
    )
    index = {"weight_map": {"model.embed_tokens.weight": "model-1.safetensors"}}
    (folder / "model.safetensors.index.json").write_bytes(as_json(damaged(index, choose) if choose.random() < 0.2 else index, choose))
    (folder / "config.json").write_bytes(as_json(damaged(section, choose), choose))
    only_our_errors(lambda: weight_files(folder))
    only_our_errors(lambda: read_released(folder / "model-1.safetensors", family=family).fingerprint())


@pytest.mark.slow
def test_many_more_of_each() -> None:
    """In a process of its own, because a fault of a library may end it."""
    variables = {**os.environ, "MMGEN_FUZZ": "1000"}
    answer = subprocess.run(
        [sys.executable, "-m", "pytest", "-m", "not slow", "-x", __file__], env=variables, capture_output=True, text=True
    )
    assert answer.returncode == 0, answer.stdout[-3000:]
