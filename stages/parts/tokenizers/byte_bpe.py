"""Byte-level byte-pair encoding (GPT-2, "Language Models are Unsupervised Multitask Learners", section 2.2).

The alphabet is the 256 bytes, so there is no unknown token and any string has ids; merges are learned within the pieces of GPT-2's
regular expression. Ids are laid out as special tokens, bytes, merges in the order learned.
"""

from collections.abc import Iterable
from typing import Literal

from pydantic import field_validator, model_validator
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from stages.parts.config import Entries
from stages.parts.tokenizers.text import BOS, EOS, PAD, TextTokenizer, TokenizerConfig

BYTES = 256


class ByteBPEConfig(TokenizerConfig):
    """Byte-level BPE. `vocab_size` counts special tokens and bytes; training stops there or when no pair occurs twice."""

    kind: Literal["byte-bpe"] = "byte-bpe"
    vocab_size: Entries = 2048

    @field_validator("special")
    @classmethod
    def _plain_special(cls, special: tuple[str, ...]) -> tuple[str, ...]:
        for token in special:
            if not token or token in (PAD, BOS, EOS) or special.count(token) > 1:
                raise ValueError(
                    f"special tokens are distinct, not empty, and not {PAD}, {BOS} or {EOS}, which are always there; found {token!r}"
                )
        return special

    @model_validator(mode="after")
    def _room_for_bytes(self) -> "ByteBPEConfig":
        least = BYTES + 3 + len(self.special)
        if self.vocab_size < least:
            raise ValueError(f"vocab_size must be at least {least}: {BYTES} bytes and {least - BYTES} special tokens")
        return self

    def train(self, texts: Iterable[str]) -> TextTokenizer:
        """Learn the merges; the same texts give the same tokenizer, whatever their order or the number of threads."""
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=self.vocab_size,
            min_frequency=2,
            special_tokens=[PAD, BOS, EOS, *self.special],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(texts, trainer)
        return TextTokenizer(self, tokenizer)
