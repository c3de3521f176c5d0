"""Text to integers: what a tokenizer must offer, and the byte-level one that needs no file.

A tokenizer adds its own separators: ``encode`` is called once per document.
"""

from dataclasses import dataclass
from typing import ClassVar, Protocol

__all__ = ["ByteTokenizer", "Tokenizer"]


class Tokenizer(Protocol):
    """What the data needs of a tokenizer; torchtitan's and most others have it."""

    def encode(self, text: str) -> list[int]:
        """Token ids of one document, each in ``[0, get_vocab_size())``."""
        ...

    def get_vocab_size(self) -> int:
        """The number of token ids."""
        ...


@dataclass
class ByteTokenizer:
    """The UTF-8 bytes of the text, then a zero byte that ends the document.

    Texts with zeros are refused as bad samples, so 256 ids suffice and the vocabulary divides
    evenly over tensor-parallel ranks.
    """

    bos_id: ClassVar[int | None] = None
    eos_id: ClassVar[int | None] = 0

    separators: bool = True
    """Put the zero byte; without it, documents run into each other."""

    def encode(self, text: str) -> list[int]:
        """The bytes of ``text`` and the end of the document."""
        return [*text.encode(), 0] if self.separators else [*text.encode()]

    def decode(self, token_ids: list[int]) -> str:
        """The text of ``token_ids`` without the ends of documents."""
        return bytes(token for token in token_ids if token).decode(errors="replace")

    def get_vocab_size(self) -> int:
        """256."""
        return 256
