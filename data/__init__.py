"""From rows to batches: files and objects read, chats in tokens with their loss mask, packing; `__all__` is public."""

from ..text.tokenizer_folder import as_tokenizer
from .batch import Batch, pack
from .encode import Dataset, encode_chat, load
from .protocol import TokenizerLike
from .read import read_rows
from .template import ChatTemplate, template_for

__all__ = ["Batch", "ChatTemplate", "Dataset", "as_tokenizer", "encode_chat", "load", "pack", "read_rows"]
__all__ += ["TokenizerLike", "template_for"]
