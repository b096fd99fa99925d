"""A trained text tokenizer, whatever trained it: strings ↔ token ids, exactly, and safe against its own special tokens.

The tables and the merging are Hugging Face's `tokenizers`; this file adds the three promises the stages rely on. *Exact*: decoding
what was encoded gives the string back, for any string. *Not injectable*: text from data that happens to read "<eos>" becomes
ordinary bytes; only a caller that asks for `special=True` (a recipe's literals) gets the special token's id. *Traceable*: the
fingerprint depends on the vocabulary, the merges and the settings, not on how or where they are stored.
"""

import hashlib
import json
import re
import secrets
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models

from stages.documents import parse_object, read_bytes, read_object
from stages.errors import DataError, MmgenError, RecipeError, UsageError, nearest
from stages.files import write_atomic
from stages.parts.backbones.gguf_file import tokenizer_of
from stages.parts.config import MAX_ENTRIES, Entries, Names, PartConfig
from stages.parts.tokenizers.picture_entries import without_codes

PAD, BOS, EOS = "<pad>", "<bos>", "<eos>"  # in every tokenizer; with ids 0, 1 and 2 in those trained here
TEXT_FIELDS = ("caption", "captions", "qa", "instruction", "text", "request", "plan")
RECORD_KEYS = ("question", "answer", "text", "caption", "instruction")  # what is language in a record such as one of `qa`


class TokenizerConfig(PartConfig):
    """What every text tokenizer is told: its size at most, its special tokens, and the fields it learns from and encodes."""

    vocab_size: Entries
    special: Names = ()  # after <pad>, <bos> and <eos>, which are always there
    fields: Names = TEXT_FIELDS

    def written(self, token: str) -> str:
        """What the table calls a special token."""
        return token

    def train(self, texts: Iterable[str]) -> "TextTokenizer":
        raise NotImplementedError


class TextTokenizer:
    """Strings ↔ token ids. `vocab_size` is the real size, which is less than the recipe's when the texts have no more to merge."""

    def __init__(self, config: TokenizerConfig, tokenizer: Tokenizer) -> None:
        self.config = config
        self.special = (PAD, BOS, EOS, *config.special)
        self._tokenizer = tokenizer
        self._tokenizer.encode_special_tokens = True  # "<eos>" inside a text is five letters
        found = {token: tokenizer.token_to_id(config.written(token)) for token in self.special}
        self._special_ids = {token: index for token, index in found.items() if index is not None}
        self._own = frozenset(self._special_ids.values())
        if len(self._special_ids) < len(self.special):
            raise DataError(f"the text tokenizer's table lacks the special tokens {sorted(set(self.special) - set(self._special_ids))}")
        self.vocab_size: int = 1 + max(tokenizer.get_vocab().values())
        if self.vocab_size > MAX_ENTRIES:
            raise DataError(f"the text tokenizer's table has ids up to {self.vocab_size - 1:,}, expected less than {MAX_ENTRIES:,}")
        marked = {index for index, token in tokenizer.get_added_tokens_decoder().items() if token.special}
        self.reserved = self._own | (marked - {unknown_id(tokenizer)})  # ids that no text from data may get
        self._special_pattern = re.compile("(" + "|".join(re.escape(token) for token in sorted(self.special, key=len, reverse=True)) + ")")

    def special_id(self, name: str) -> int:
        """Id of a special token such as "<eos>". RecipeError if the tokenizer has none of that name."""
        if name not in self._special_ids:
            raise RecipeError(f"the text tokenizer has no special token '{name}'", hint=nearest(name, self.special))
        return self._special_ids[name]

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Ids of a text. Only with special=True do "<bos>" and its like become special tokens; in text from data they stay letters.

        DataError if the text holds half a surrogate pair, which no UTF-8 file can.
        """
        if special:
            ids: list[int] = []
            for piece in self._special_pattern.split(text):
                ids += [self._special_ids[piece]] if piece in self._special_ids else self.encode(piece)
            return ids
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of many texts, none of them with special tokens."""
        for text in texts:
            if not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text):
                raise DataError(f"not a valid text: {text[:60]!r} holds half a surrogate pair")
        with rust_faults("the text tokenizer"):
            found: list[list[int]] = [encoding.ids for encoding in self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]
            for place, ids in enumerate(found):
                if not self.reserved.isdisjoint(ids):
                    spelled = self._without_reserved.encode(texts[place], add_special_tokens=False).ids
                    found[place] = [token for token in spelled if token not in self.reserved]  # what is left is the table's unknown token
        return found

    @cached_property
    def _without_reserved(self) -> Tokenizer:
        """The same table without the reserved entries, for texts that spell one: some tables hold them as entries like any other, and some
        normalise other letters to theirs. They are renamed, so that no id moves and their letters are encoded as letters."""
        table = json.loads(self._tokenizer.to_str())
        model, unknown = table["model"], unknown_id(self._tokenizer)
        secret = secrets.token_hex(16)
        names = {self._tokenizer.id_to_token(index): f"{secret}-{index}" for index in self.reserved if index != unknown}
        for entry in table["added_tokens"]:
            entry["content"] = names.get(entry["content"], entry["content"])
            entry["special"] = entry["special"] or entry["id"] in self.reserved
        if isinstance(model["vocab"], list):
            model["vocab"] = [[names.get(token, token), score] for token, score in model["vocab"]]
        else:
            model["vocab"] = {names.get(token, token): index for token, index in model["vocab"].items()}
        if "merges" in model:
            prefix = model.get("continuing_subword_prefix") or ""
            pairs = [pair if isinstance(pair, list) else pair.split(" ") for pair in model["merges"]]
            model["merges"] = [[a, b] for a, b in pairs if names.keys().isdisjoint((a, b, a + b.removeprefix(prefix)))]
        table["post_processor"] = None  # it adds special tokens by their names
        tokenizer = Tokenizer.from_str(json.dumps(table))
        tokenizer.encode_special_tokens = True
        return tokenizer

    def is_text(self, ids: Sequence[int]) -> bool:
        """Whether these can be the ids of a text: entries of the vocabulary, none of them reserved."""
        return self.reserved.isdisjoint(ids) and (not len(ids) or (min(ids) >= 0 and max(ids) < self.vocab_size))

    def decode(self, ids: Sequence[int], *, special: bool = False) -> str:
        """The text of some ids: the exact inverse of `encode`. Special tokens are left out unless special=True.

        Bytes that are no UTF-8 (a model may write any ids) become U+FFFD. Ids outside the vocabulary are a ValueError.
        """
        for token in ids:
            if not 0 <= token < self.vocab_size:
                raise ValueError(f"token id {token} is outside the vocabulary of {self.vocab_size}")
        kept = ids if special else [token for token in ids if token not in self._own]
        with rust_faults("the text tokenizer"):
            return self._tokenizer.decode(list(kept), skip_special_tokens=not special)

    def extends(self, file: Path) -> bool:
        """Whether every entry of another tokenizer.json, or of the tokenizer in a GGUF file, has the same id here."""
        return read_table(file).get_vocab().items() <= self._tokenizer.get_vocab().items()

    @property
    def fingerprint(self) -> str:
        """sha256 of the vocabulary, the merges and the settings: equal for tokenizers that give the same ids, wherever they lie."""
        content = {"config": self.config.model_dump(mode="json"), "tokenizer": json.loads(self._tokenizer.to_str())}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def save(self, folder: Path) -> None:
        """Write tokenizer.json and tokenizer_config.json, which `transformers.AutoTokenizer` opens too."""
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "pad_token": self.config.written(PAD),
            "bos_token": self.config.written(BOS),
            "eos_token": self.config.written(EOS),
            "clean_up_tokenization_spaces": False,
            "mmgen": self.config.model_dump(mode="json"),
        }
        write_atomic(folder / "tokenizer.json", self._tokenizer.to_str(pretty=True))
        write_atomic(folder / "tokenizer_config.json", json.dumps(settings, indent=2) + "\n")


def unknown_id(tokenizer: Tokenizer) -> int | None:
    """The id that stands for what the table cannot spell, if it has one: texts may have it, though it is marked as special."""
    if isinstance(tokenizer.model, models.Unigram):
        return json.loads(tokenizer.to_str())["model"].get("unk_id")
    name = getattr(tokenizer.model, "unk_token", None)
    return None if name is None else tokenizer.token_to_id(name)


def load_tokenizer(folder: Path) -> TextTokenizer:
    """The text tokenizer that `save` wrote into a folder. UsageError names what is missing."""
    from stages.parts.config import parse_part
    from stages.parts.tokenizers import TOKENIZERS

    for name in ("tokenizer.json", "tokenizer_config.json"):
        if not (folder / name).is_file():
            raise UsageError(f"{folder}: expected a text tokenizer, but there is no {name}")
    settings = read_object(folder / "tokenizer_config.json")
    if "mmgen" not in settings:
        raise UsageError(f"{folder / 'tokenizer_config.json'}: no 'mmgen' section, so it was not written by pretrain-tokenizer")
    config = parse_part(TOKENIZERS, settings["mmgen"], f"{folder / 'tokenizer_config.json'}: mmgen")
    return TextTokenizer(config, read_table(folder / "tokenizer.json"))


def read_table(file: Path) -> Tokenizer:
    """A tokenizer.json without entries that are codes of pictures, or the tokenizer in a GGUF file. DataError if it is damaged."""
    text = tokenizer_of(file)[0] if file.suffix == ".gguf" else read_bytes(file).decode("utf-8", "replace")
    parse_object(text, file)  # what is too deep would end the library, and with it the process
    with rust_faults(str(file)):
        table = Tokenizer.from_str(without_codes(text))
        ids = table.get_vocab().values()
        if not ids or max(ids) >= MAX_ENTRIES:  # the library's memory grows with the largest id, and so do embeddings
            raise DataError(f"{file}: ids of entries up to {max(ids, default=0):,}, expected one at least and fewer than {MAX_ENTRIES:,}")
        table.no_padding()
        table.no_truncation()
        return table


@contextmanager
def rust_faults(where: str) -> Iterator[None]:
    """What `tokenizers` raises for tables that it cannot use becomes a DataError: bare Exceptions, and panics, which are not even those."""
    try:
        yield
    except (MmgenError, KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError):
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        told = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"{where}: no text tokenizer that can be used ({told:.200})") from None


def texts_of(value: Any) -> Iterator[str]:
    """Every text in a field: the string itself, each of a list, and the question, answer … of a record; other values have none."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for entry in value:
            yield from texts_of(entry)
    elif isinstance(value, dict):
        for key in RECORD_KEYS:
            if key in value:
                yield from texts_of(value[key])
