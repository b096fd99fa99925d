"""A trained text tokenizer, whatever trained it: strings ↔ token ids, exactly, and safe against its own special tokens.

The tables and the merging are Hugging Face's `tokenizers`; this file adds the three promises the stages rely on. *Exact*: decoding
what was encoded gives the string back, for any string. *Not injectable*: text from data that happens to read "<eos>" becomes
ordinary bytes; only a caller that asks for `special=True` (a recipe's literals) gets the special token's id. *Traceable*: the
fingerprint depends on the vocabulary, the merges and the settings, not on how or where they are stored.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from stages.errors import DataError, MmgenError, RecipeError, UsageError, nearest
from stages.files import write_atomic
from stages.parts.backbones.gguf_file import tokenizer_of
from stages.parts.config import PartConfig
from stages.parts.tokenizers.picture_entries import without_codes

PAD, BOS, EOS = "<pad>", "<bos>", "<eos>"  # in every tokenizer; with ids 0, 1 and 2 in those trained here
TEXT_FIELDS = ("caption", "captions", "qa", "instruction", "text", "request", "plan")
RECORD_KEYS = ("question", "answer", "text", "caption", "instruction")  # what is language in a record such as one of `qa`


class TokenizerConfig(PartConfig):
    """What every text tokenizer is told: its size at most, its special tokens, and the fields it learns from and encodes."""

    vocab_size: int
    special: tuple[str, ...] = ()  # after <pad>, <bos> and <eos>, which are always there
    fields: tuple[str, ...] = TEXT_FIELDS

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
        if len(self._special_ids) < len(self.special):
            raise DataError(f"the text tokenizer's table lacks the special tokens {sorted(set(self.special) - set(self._special_ids))}")
        self._special_pattern = re.compile("(" + "|".join(re.escape(token) for token in sorted(self.special, key=len, reverse=True)) + ")")
        self.vocab_size: int = 1 + max(tokenizer.get_vocab().values())

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
        return [encoding.ids for encoding in self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int], *, special: bool = False) -> str:
        """The text of some ids: the exact inverse of `encode`. Special tokens are left out unless special=True.

        Bytes that are no UTF-8 (a model may write any ids) become U+FFFD. Ids outside the vocabulary are a ValueError.
        """
        for token in ids:
            if not 0 <= token < self.vocab_size:
                raise ValueError(f"token id {token} is outside the vocabulary of {self.vocab_size}")
        return self._tokenizer.decode(list(ids), skip_special_tokens=not special)

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


def load_tokenizer(folder: Path) -> TextTokenizer:
    """The text tokenizer that `save` wrote into a folder. UsageError names what is missing."""
    from stages.parts.config import parse_part
    from stages.parts.tokenizers import TOKENIZERS

    for name in ("tokenizer.json", "tokenizer_config.json"):
        if not (folder / name).is_file():
            raise UsageError(f"{folder}: expected a text tokenizer, but there is no {name}")
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    if "mmgen" not in settings:
        raise UsageError(f"{folder / 'tokenizer_config.json'}: no 'mmgen' section, so it was not written by pretrain-tokenizer")
    config = parse_part(TOKENIZERS, settings["mmgen"], f"{folder / 'tokenizer_config.json'}: mmgen")
    return TextTokenizer(config, read_table(folder / "tokenizer.json"))


def read_table(file: Path) -> Tokenizer:
    """A tokenizer.json without entries that are codes of pictures, or the tokenizer in a GGUF file. DataError if it is damaged."""
    try:
        text = tokenizer_of(file)[0] if file.suffix == ".gguf" else file.read_text(encoding="utf-8")
        return Tokenizer.from_str(without_codes(text))
    except MmgenError:
        raise
    except Exception as error:  # `tokenizers` raises bare Exception for anything it cannot parse
        raise DataError(f"{file}: {error}") from None


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
