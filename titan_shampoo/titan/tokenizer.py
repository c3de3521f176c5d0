"""Hugging Face tokenizers with marks at the start and the end of a document."""

from torchtitan.components.tokenizer import HuggingFaceTokenizer

__all__ = ["DocumentTokenizer"]


class DocumentTokenizer(HuggingFaceTokenizer):
    """torchtitan's tokenizer, whose ``encode`` marks documents like torchtitan's own loader.

    The beginning-of-sequence token is put first and the end-of-sequence token last, unless the
    tokenizer adds it already or has none. If both are the same token, it is put first only. Texts
    are neither cut nor padded, whatever ``tokenizer.json`` says.
    """

    def __init__(self, folder: str, *, separators: bool = True) -> None:
        """Read the tokenizer.

        Args:
            folder: Folder with ``tokenizer.json`` and, for the two tokens,
                ``tokenizer_config.json``.
            separators: True to mark documents; False to mark only as these files say.
        """
        super().__init__(folder)
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self._infer_should_add_bos_eos()  # again: padding may have been one of the two tokens
        if separators:
            self.default_add_bos = self.default_add_eos = True
        if self.bos_token and self.bos_token == self._get_token_from_config(
            self.config, "eos_token"
        ):
            self.eos_id = self.bos_id  # torchtitan leaves it unset
            self.hf_adds_eos = True  # the mark of the next document ends this one

    def get_vocab_size(self) -> int:
        """Number of ids from 0 to the last one, including ids without a token."""
        return max(self.tokenizer.get_vocab().values(), default=-1) + 1
