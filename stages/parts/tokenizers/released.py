"""A text tokenizer that came with a released model: its vocabulary as it is, so that the model's own words can be used.

Read is tokenizer.json, the file of Hugging Face's `tokenizers`, or what a GGUF file holds of one; which of its entries begin and end a text is said beside it, in
tokenizer_config.json or config.json. Special tokens that a recipe asks for and the release lacks get ids behind its last one.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field
from tokenizers import Tokenizer

from stages.documents import read_object_if_any
from stages.errors import DataError, RecipeError, UsageError
from stages.parts.backbones.gguf_file import tokenizer_of
from stages.parts.tokenizers.text import BOS, EOS, PAD, TextTokenizer, TokenizerConfig, read_table, rust_faults

ROLES = {BOS: "bos_token", EOS: "eos_token", PAD: "pad_token"}
AROUND_PICTURES = {"<soi>": "boi_token", "<eoi>": "eoi_token"}  # where a recipe asks for them and a unified model has them


class ReleasedTokenizerConfig(TokenizerConfig):
    """names: what the release calls <pad>, <bos>, <eos> and further special tokens. `vocab_size` is counted when it is read.

    Decoding gives back what was encoded as far as the release does: those that normalise a text (NFC in Qwen2) or put a space before
    it (SentencePiece in Llama 2) are exact but for that.
    """

    kind: Literal["hf"] = "hf"
    vocab_size: int = Field(default=0, ge=0, le=2**22)
    names: Mapping[str, str] = Field(default_factory=dict)

    def written(self, token: str) -> str:
        return self.names.get(token, token)

    def train(self, texts: Iterable[str]) -> TextTokenizer:
        raise RecipeError(
            "a tokenizer of kind 'hf' is not trained", hint="--init tokenizers.NAME=hf://ORG/NAME, or a folder with tokenizer.json"
        )

    def adopt(self, source: Path) -> TextTokenizer:
        """The tokenizer of a release (tokenizer.json, the folder it is in, or a GGUF file) with this config's special tokens."""
        file = table_beside(source)
        if not file.is_file():
            raise UsageError(f"{source}: there is no tokenizer.json, the file of a released text tokenizer")
        tokenizer = read_table(file)
        with rust_faults(str(file)):
            names = {**special_names(file, tokenizer, self.special), **self.names}
            missing = [name for name in self.names.values() if tokenizer.token_to_id(name) is None]
            if missing:
                raise UsageError(f"{source}: names {', '.join(missing)} for special tokens, which its tokenizer.json does not have")
            tokenizer.add_special_tokens([token for token in self.special if token not in names and tokenizer.token_to_id(token) is None])
            size = 1 + max(tokenizer.get_vocab().values())
        return TextTokenizer(self.model_copy(update={"vocab_size": size, "names": names}), tokenizer)


def table_beside(source: Path) -> Path:
    """Where the tokenizer of a release is: in its GGUF file, or in tokenizer.json in its folder."""
    return source if source.suffix == ".gguf" else (source if source.is_dir() else source.parent) / "tokenizer.json"


def special_names(file: Path, tokenizer: Tokenizer, special: Iterable[str] = ()) -> dict[str, str]:
    """<bos>, <eos>, <pad>, and of `special` <soi> and <eoi> → what the release calls them.

    Where it has no beginning or padding, as GPT-2, that is the end of a text.
    """
    folder = file.parent
    if file.suffix == ".gguf":
        settings, config = tokenizer_of(file)[1], dict[str, Any]()
    else:
        settings, config = read_object_if_any(folder / "tokenizer_config.json"), read_object_if_any(folder / "config.json")
    found: dict[str, str] = {}
    for token, role in {**ROLES, **{token: role for token, role in AROUND_PICTURES.items() if token in special}}.items():
        said = settings.get(role)
        name = said.get("content") if isinstance(said, dict) else said
        number = config.get(f"{role}_id")
        if name is None and isinstance(number, int) and 0 <= number < 2**32:
            name = tokenizer.id_to_token(number)
        if isinstance(name, str) and tokenizer.token_to_id(name) is not None:
            found[token] = name
    if EOS not in found:
        raise DataError(f"{file}: neither tokenizer_config.json nor config.json beside it says which token ends a text (eos_token)")
    return {**{token: found[EOS] for token in ROLES}, **found}
