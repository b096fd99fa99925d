"""Text tokenizers: strings ↔ token ids."""

from stages.parts.tokenizers.byte_bpe import ByteBPEConfig
from stages.parts.tokenizers.released import ReleasedTokenizerConfig
from stages.parts.tokenizers.text import TextTokenizer, TokenizerConfig, load_tokenizer, texts_of

TOKENIZERS: dict[str, type[TokenizerConfig]] = {
    "byte-bpe": ByteBPEConfig,
    "hf": ReleasedTokenizerConfig,
}

__all__ = ["TOKENIZERS", "ByteBPEConfig", "ReleasedTokenizerConfig", "TextTokenizer", "TokenizerConfig", "load_tokenizer", "texts_of"]
