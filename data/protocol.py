"""What this folder asks of a tokenizer: little enough that any tokenizer can be wrapped to fit."""

from collections.abc import Sequence
from typing import Protocol


class TokenizerLike(Protocol):
    """A tokenizer that never adds special tokens by itself and recognises those written in the text.

    `stop_ids` are the tokens that end a generation (end of text and end of turn).
    """

    @property
    def chat_template(self) -> str | None: ...
    @property
    def bos_token(self) -> str | None: ...
    @property
    def eos_token(self) -> str | None: ...
    @property
    def bos_id(self) -> int | None: ...
    @property
    def eos_id(self) -> int | None: ...
    @property
    def stop_ids(self) -> Sequence[int]: ...
    def encode(self, text: str) -> list[int]: ...
    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Token ids, and for each the (start, end) characters of `text` it covers."""
        ...

    def decode(self, ids: list[int], skip_special: bool = True) -> str: ...
