"""Text tokenizers: exact inverses, special tokens that no data can inject, the same bytes every time."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.errors import DataError, RecipeError, UsageError
from stages.parts.config import parse_part
from stages.parts.tokenizers import TOKENIZERS, ByteBPEConfig, TextTokenizer, load_tokenizer, texts_of

TEXTS = [f"a {size} {colour} {shape}, {place}" for size in ("small", "large") for colour in ("red", "blue") for shape in ("circle", "ring") for place in ("top left", "top right")]  # fmt: skip
SPECIAL = ("<soi>", "<eoi>")
TRAINED = ByteBPEConfig(vocab_size=300, special=SPECIAL).train(TEXTS)


@given(st.text(max_size=60))
def test_decoding_an_encoded_string_gives_it_back(text: str) -> None:
    assert TRAINED.decode(TRAINED.encode(text)) == text


@pytest.mark.parametrize(
    "text", ["", " ", "\r\n\t", "naïve Ünïcödé 你好 🟥👩🏽‍🚀 e\u0301", "\x00\x1f\ufeff", "a<soi>b", "<|endoftext|>", "Ġ Ċ Ä"]
)
def test_awkward_strings_come_back_exactly(text: str) -> None:
    assert TRAINED.decode(TRAINED.encode(text)) == text
    assert TRAINED.decode(TRAINED.encode_batch([text, "other"])[0]) == text


@given(st.lists(st.sampled_from(["<pad>", "<bos>", "<eos>", *SPECIAL, "<", ">", "soi", " a"]), max_size=8))
def test_text_from_data_never_becomes_a_special_token(pieces: list[str]) -> None:
    text = "".join(pieces)
    reserved = {TRAINED.special_id(name) for name in TRAINED.special}
    ids = TRAINED.encode(text)
    assert not reserved & set(ids)
    assert TRAINED.decode(ids) == text


def test_special_tokens_are_parsed_only_where_asked() -> None:
    ids = TRAINED.encode("<soi>a red ring<eoi><eos>", special=True)
    assert ids[0] == TRAINED.special_id("<soi>")
    assert ids[-2:] == [TRAINED.special_id("<eoi>"), TRAINED.special_id("<eos>")]
    assert ids[1:-2] == TRAINED.encode("a red ring")
    assert TRAINED.decode(ids) == "a red ring"
    assert TRAINED.decode(ids, special=True) == "<soi>a red ring<eoi><eos>"


def test_ids_are_laid_out_as_special_tokens_then_bytes_then_merges() -> None:
    assert [TRAINED.special_id(name) for name in ("<pad>", "<bos>", "<eos>", *SPECIAL)] == [0, 1, 2, 3, 4]
    assert sorted(TRAINED.encode(chr(0) + "~é")) == sorted(set(TRAINED.encode(chr(0) + "~é")))  # four bytes, none merged
    assert max(TRAINED.encode("~")) < 5 + 256 <= max(TRAINED.encode("red"))


def test_frequent_words_become_one_token() -> None:
    assert len(TRAINED.encode(" red")) == 1
    assert len(TRAINED.encode("zyx")) == 3


def test_the_vocabulary_stops_where_there_is_nothing_left_to_merge() -> None:
    assert ByteBPEConfig(vocab_size=5000).train(["ab ab ab", "ab"]).vocab_size == 3 + 256 + 2  # "ab" and " ab"


def test_training_is_the_same_in_any_order_and_process() -> None:
    backwards = ByteBPEConfig(vocab_size=300, special=SPECIAL).train(TEXTS[::-1])
    assert backwards.fingerprint == TRAINED.fingerprint
    program = (
        "from stages.parts.tokenizers import ByteBPEConfig; from test_tokenizers import TEXTS, SPECIAL;"
        "print(ByteBPEConfig(vocab_size=300, special=SPECIAL).train(TEXTS).fingerprint)"
    )
    here = Path(__file__)
    environment = os.environ | {"PYTHONPATH": f"{here.parents[2]}:{here.parent}", "PYTHONHASHSEED": "7", "RAYON_NUM_THREADS": "2"}
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment)
    assert result.stdout.strip() == TRAINED.fingerprint


def test_a_saved_tokenizer_is_the_same_tokenizer(tmp_path: Path) -> None:
    TRAINED.save(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert isinstance(loaded, TextTokenizer)
    assert loaded.fingerprint == TRAINED.fingerprint
    assert loaded.vocab_size == TRAINED.vocab_size
    assert loaded.config == TRAINED.config
    assert loaded.encode("<eos> a red ring") == TRAINED.encode("<eos> a red ring")


def test_the_fingerprint_tells_tokenizers_apart() -> None:
    others = [
        ByteBPEConfig(vocab_size=300, special=SPECIAL).train([*TEXTS, "zebra zebra zebra zebra zebra"]),
        ByteBPEConfig(vocab_size=299, special=SPECIAL).train(TEXTS),
        ByteBPEConfig(vocab_size=300, special=SPECIAL[:1]).train(TEXTS),
    ]
    assert len({tokenizer.fingerprint for tokenizer in [*others, TRAINED]}) == 4


def test_ids_outside_the_vocabulary_and_half_surrogates_are_refused() -> None:
    with pytest.raises(ValueError, match="outside the vocabulary"):
        TRAINED.decode([TRAINED.vocab_size])
    with pytest.raises(DataError, match="surrogate"):
        TRAINED.encode("a\ud800b")


def test_an_unknown_special_token_names_the_nearest() -> None:
    with pytest.raises(RecipeError) as caught:
        TRAINED.special_id("<so>")
    assert "<soi>" in caught.value.hint


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ({"kind": "byte-bpe", "vocab_size": 100}, "at least 259"),
        ({"kind": "byte-bpe", "special": ["<eos>"]}, "always there"),
        ({"kind": "byte-bpe", "special": ["<a>", "<a>"]}, "distinct"),
        ({"kind": "byte-bpe", "vocab": 300}, "no such key"),
        ({"kind": "byte-bp"}, "there is no"),
    ],
)
def test_impossible_configs_say_why(table: dict[str, object], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        parse_part(TOKENIZERS, table, "tokenizers.bpe")


def test_a_damaged_folder_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"tokenizer\.json"):
        load_tokenizer(tmp_path)
    TRAINED.save(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match=r"tokenizer\.json"):
        load_tokenizer(tmp_path)
    TRAINED.save(tmp_path)
    table = json.loads((tmp_path / "tokenizer.json").read_text())
    table["added_tokens"] = table["added_tokens"][:3]
    table["model"]["vocab"] = {key: value for key, value in table["model"]["vocab"].items() if key != "<eoi>"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(table))
    with pytest.raises(DataError, match="<eoi>"):
        load_tokenizer(tmp_path)


def test_texts_are_found_in_strings_lists_and_records() -> None:
    assert list(texts_of("one")) == ["one"]
    assert list(texts_of(["one", "two"])) == ["one", "two"]
    assert list(texts_of([{"question": "what?", "answer": "that", "type": "existence"}])) == ["what?", "that"]
    assert list(texts_of({"count": 3})) == []


@pytest.mark.slow
def test_transformers_opens_the_folder_and_agrees(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    TRAINED.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.eos_token_id == TRAINED.special_id("<eos>")
    assert theirs("a large blue circle, top left")["input_ids"] == TRAINED.encode("a large blue circle, top left")
