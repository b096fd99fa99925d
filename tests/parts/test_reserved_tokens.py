"""Text from data never gets the id of a special token, whatever the tokenizer it came with does with it."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from stages.errors import DataError
from stages.parts.tokenizers import ByteBPEConfig, ReleasedTokenizerConfig, TextTokenizer

MARKERS = ("<soi>", "<eoi>", "<image>", "<mask>")
TEXTS = [
    "a red circle left of a blue square",
    "two green triangles, <so",
    "nothing but i> a small > < image",
    "the mask of soi and eoi",
] * 3
LETTERS = sorted(set("".join(TEXTS)) | set("<>_/| abcdefghijklmnopqrstuvwxyz▁"))


def byte_level(*, prefix: bool = False, ignore_merges: bool = False) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False))
    return tokenizer


def whole_entries() -> Tokenizer:
    """Byte-level BPE that looks words up before it merges (Llama 3), with the markers among its entries."""
    table = json.loads(byte_level(ignore_merges=True).to_str())
    for marker in MARKERS:
        table["model"]["vocab"][marker] = len(table["model"]["vocab"])
    table["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "WhitespaceSplit"},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
        ],
    }
    return Tokenizer.from_str(json.dumps(table))


def merged_markers() -> Tokenizer:
    """Characters merged into whole markers, and a letter more behind one: the model itself learned them."""
    letters = list("<soi>eimagk ")
    vocab = {letter: number for number, letter in enumerate(dict.fromkeys(LETTERS + letters))}
    merges = []
    for marker in MARKERS:
        for end in range(2, len(marker) + 1):
            if marker[:end] not in vocab:
                merges.append((marker[: end - 1], marker[end - 1]))
                vocab[marker[:end]] = len(vocab)
    merges.append(("<soi>", "a"))
    vocab["<soi>a"] = len(vocab)
    return Tokenizer(models.BPE(vocab=vocab, merges=merges))


def unigram() -> Tokenizer:
    """SentencePiece's kind: a space in front, and the markers as pieces that are likelier than their letters."""
    pieces = [("<unk>", 0.0), *((letter, -8.0) for letter in LETTERS), *((marker, -1.0) for marker in MARKERS)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    tokenizer.add_special_tokens(["<unk>"])
    return tokenizer


def normalised() -> Tokenizer:
    """One that turns other letters into those of the markers before it looks for them."""
    tokenizer = byte_level()
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    return tokenizer


def words() -> Tokenizer:
    """Whole words, of which the markers are some."""
    entries = ["[UNK]", *MARKERS, "a", "red", "circle"]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(entries)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


def pieces() -> Tokenizer:
    """WordPiece without a splitter of punctuation."""
    entries = ["[UNK]", *MARKERS, *LETTERS, *(f"##{letter}" for letter in LETTERS)]
    tokenizer = Tokenizer(models.WordPiece({word: number for number, word in enumerate(entries)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


BUILT: dict[str, Callable[[], Tokenizer]] = {
    "byte-level": byte_level,
    "a space in front": lambda: byte_level(prefix=True),
    "whole entries first": whole_entries,
    "merged markers": merged_markers,
    "unigram": unigram,
    "normalised": normalised,
    "words": words,
    "word pieces": pieces,
}


def released(name: str, *, special: bool) -> Iterator[TextTokenizer]:
    """Each built tokenizer with the markers as added tokens that it calls special, or not, in two spellings of what an added token strips."""
    for strip in (False, True):
        tokenizer = BUILT[name]()
        add = tokenizer.add_special_tokens if special else tokenizer.add_tokens
        add([AddedToken(marker, special=special, lstrip=strip, rstrip=strip, normalized=not strip) for marker in (*MARKERS, "<end>")])
        size = 1 + max(tokenizer.get_vocab().values())
        names = {"<pad>": "<end>", "<bos>": "<end>", "<eos>": "<end>"}
        yield TextTokenizer(ReleasedTokenizerConfig(vocab_size=size, special=MARKERS, names=names), tokenizer)


TOKENIZERS = [
    (f"{name}, {'special' if special else 'plain'}", one)
    for name in BUILT
    for special in (True, False)
    for one in released(name, special=special)
]
PIECES = [*MARKERS, "<end>", "＜ｓｏｉ＞", "<SOI>", " <soi>", "<soi> ", "<so", "i>", "<", ">", " ", "a", "red", "é", "\n", "<<soi>soi>"]


@pytest.mark.parametrize(("name", "tokenizer"), TOKENIZERS, ids=[f"{place}-{name}" for place, (name, _) in enumerate(TOKENIZERS)])
@given(parts=st.lists(st.sampled_from(PIECES), max_size=6))
def test_text_that_spells_a_marker_never_gets_its_id(name: str, tokenizer: TextTokenizer, parts: list[str]) -> None:
    text = "".join(parts)
    ids = tokenizer.encode(text)
    assert {tokenizer.special_id(token) for token in tokenizer.special}.isdisjoint(ids)
    assert tokenizer.is_text(ids)
    if name.startswith("byte-level"):
        assert tokenizer.decode(ids) == text
    if name.startswith("merged markers") and set(text) <= set(LETTERS):
        assert tokenizer.decode(ids).replace(" ", "") == text.replace(" ", "")


@pytest.mark.parametrize(("name", "tokenizer"), TOKENIZERS, ids=[f"{place}-{name}" for place, (name, _) in enumerate(TOKENIZERS)])
def test_literals_get_the_markers_and_plain_text_its_ids_as_before(name: str, tokenizer: TextTokenizer) -> None:
    ids = tokenizer.encode("<soi>red<eoi>", special=True)
    assert (ids[0], ids[-1]) == (tokenizer.special_id("<soi>"), tokenizer.special_id("<eoi>"))
    assert ids[1:-1] == tokenizer.encode("red") == tokenizer._tokenizer.encode("red", add_special_tokens=False).ids


def test_a_marker_that_the_release_does_not_call_special_is_left_out_of_the_text_a_model_wrote() -> None:
    tokenizer = next(released("byte-level", special=False))
    assert tokenizer.decode([tokenizer.special_id("<soi>"), *tokenizer.encode("red")]) == "red"


def test_the_unknown_token_stays_where_a_text_cannot_be_spelled() -> None:
    tokenizer = next(released("words", special=True))
    assert tokenizer.encode("a zebra") == [tokenizer._tokenizer.token_to_id("a"), tokenizer._tokenizer.token_to_id("[UNK]")]


def test_a_table_with_ids_without_end_is_refused(tmp_path: Path) -> None:
    ByteBPEConfig(vocab_size=300).train(TEXTS).save(tmp_path)
    table = json.loads((tmp_path / "tokenizer.json").read_text())
    table["model"]["vocab"]["zzz"] = 2**31
    tokenizer = Tokenizer.from_str(json.dumps(table))
    with pytest.raises(DataError, match="ids up to"):
        TextTokenizer(ByteBPEConfig(vocab_size=300), tokenizer)
