"""What this folder asks of a tokenizer: little enough that any tokenizer can be wrapped to fit."""

from collections.abc import Sequence
from typing import Protocol


class TokenizerLike(Protocol):
    """A tokenizer that never adds special tokens by itself and recognises those written in the text.

    `vocab_size` is the highest token + 1; `stop_ids` are the tokens that end a generation (end of text and end of
    turn). `named_tokens` are the special tokens by the names that chat templates know them by, such as `bos_token`;
    `special_tokens` the texts of all of them."""

    chat_template: str | None
    bos_token: str | None
    eos_token: str | None
    bos_id: int | None
    eos_id: int | None
    stop_ids: tuple[int, ...]
    vocab_size: int
    named_tokens: dict[str, str]
    special_tokens: tuple[str, ...]

    def encode(self, text: str) -> list[int]: ...
    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Token ids, and for each the (start, end) characters of `text` it covers."""

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str: ...


class FastTokenizer(Protocol):
    """What `as_tokenizer` uses of a fast tokenizer of transformers."""

    @property
    def backend_tokenizer(self) -> object: ...
    def save_pretrained(self, save_directory: str, /) -> object: ...


AnyTokenizer = TokenizerLike | FastTokenizer
