"""Text to integers: the interface of tokenizers, and a byte-level one that needs no file.

A tokenizer adds its own separators: ``encode`` is called once per document.
"""

from dataclasses import dataclass
from typing import ClassVar, Protocol

__all__ = ["ByteTokenizer", "Tokenizer"]


class Tokenizer(Protocol):
    """Interface that the data needs; torchtitan's and most other tokenizers have it."""

    def encode(self, text: str) -> list[int]:
        """Token ids of one document, each in ``[0, get_vocab_size())``."""
        ...

    def get_vocab_size(self) -> int:
        """The number of token ids."""
        ...


@dataclass
class ByteTokenizer:
    """UTF-8 bytes of the text, then a zero byte as the end of the document.

    Texts with zeros are bad samples, so 256 ids suffice and the vocabulary divides evenly over
    tensor-parallel ranks.
    """

    bos_id: ClassVar[int | None] = None
    eos_id: ClassVar[int | None] = 0

    separators: bool = True
    """True to append the zero byte; without it, documents run into each other."""

    def encode(self, text: str) -> list[int]:
        """Bytes of ``text`` and the end of the document."""
        return [*text.encode(), 0] if self.separators else [*text.encode()]

    def decode(self, token_ids: list[int]) -> str:
        """Text of ``token_ids`` without the ends of documents."""
        return bytes(token for token in token_ids if token).decode(errors="replace")

    def get_vocab_size(self) -> int:
        """256."""
        return 256
