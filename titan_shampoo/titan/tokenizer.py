"""Hugging Face tokenizers that mark where a document begins and ends."""

from torchtitan.components.tokenizer import HuggingFaceTokenizer

__all__ = ["DocumentTokenizer"]


class DocumentTokenizer(HuggingFaceTokenizer):
    """torchtitan's tokenizer, whose ``encode`` marks documents as torchtitan's own loader does.

    The beginning-of-sequence token is put first and the end-of-sequence token last, each unless the
    tokenizer puts it there by itself or has none. Where both are one token it is put first alone.
    Texts are neither cut nor padded, whatever ``tokenizer.json`` says.
    """

    def __init__(self, folder: str, *, separators: bool = True) -> None:
        """Read the tokenizer.

        Args:
            folder: Its ``tokenizer.json`` and, for the two tokens, ``tokenizer_config.json``.
            separators: Mark documents; if not, only as these files say.
        """
        super().__init__(folder)
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self._infer_should_add_bos_eos()  # anew: padding may be one of the two tokens
        if separators:
            self.default_add_bos = self.default_add_eos = True
        if self.bos_token and self.bos_token == self._get_token_from_config(
            self.config, "eos_token"
        ):
            self.eos_id = self.bos_id  # which torchtitan leaves out
            self.hf_adds_eos = True  # the mark of the next document ends this one

    def get_vocab_size(self) -> int:
        """The number of ids from 0 to the last, though some may stand for no token."""
        return max(self.tokenizer.get_vocab().values(), default=-1) + 1
