"""The earlier path of `neox.data.text.tokenizer`, for programs written before the data package was split."""

from neox.data.text.tokenizer import Tokenizer, TokenizerFile

__all__ = ["Tokenizer", "TokenizerFile"]
