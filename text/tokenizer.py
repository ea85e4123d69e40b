"""Text to token ids and back: one small class over the `tokenizers` library.

It never adds a token by itself: what the chat template renders is what the model sees, so a doubled BOS cannot come
from here. Special tokens that stand in the text are recognised as one id. Offsets are characters of the given string,
blanks before a word included, because loss masks are cut by character position.
"""

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence

import tokenizers

from ..errors import FourbitError, InputError

NEEDED = ("bos_token", "eos_token", "pad_token")  # with an id, where they are named
MAX_TEXT_BYTES = 4 << 20  # about a million tokens; at up to 2 us a byte the time is linear but has to end

# Tokens that end an answer, as the common chat formats name them. The second group also stands inside an answer in
# some formats, so it counts only where the model's own chat template writes it.
_ENDS_TEXT = ("<|endoftext|>", "<|end_of_text|>", "<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<end_of_turn>")
_ENDS_TURN = ("<|end|>", "<|eot|>", "<|end_of_turn|>", "<EOT>", "</s>", "<|EOT|>", "<|return|>", "<|call|>")
_HARMONY = {"<|return|>", "<|call|>"}  # where both are, <|end|> ends a message of a turn that goes on
NOTHING = "{{% set {} = '' %}}"  # in front of a chat template: a token that it is to write as nothing


class Tokenizer:
    """A tokenizer with what the model's files say about chat.

    Attributes:
        backend: the `tokenizers.Tokenizer`; truncation, padding and the post-processor are switched off in it.
        chat_template: Jinja source, or None.
        bos_token, eos_token, pad_token: the special tokens' text, or None; `bos_id`, `eos_id`, `pad_id` their ids.
        stop_ids: ids that end an answer: EOS and the end-of-turn tokens, sorted.
        adds_bos: whether texts begin with BOS, as far as the model's files say.
        named_tokens: the texts of the special tokens that have a name, as templates know them: `bos_token` and others.
        special_tokens: the texts of all special tokens: those that no message may spell.
        vocab_size: the highest id + 1.
        source: the folder or file it was read from, whose files go with what is saved; "" where it is not known.

    Raises InputError for a special token that is not in the vocabulary and a stop id outside it."""

    source: str = ""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        chat_template: str | None = None,
        named_tokens: Mapping[str, str] | None = None,
        stop_ids: Iterable[int] = (),
        adds_bos: bool | None = None,
    ) -> None:
        backend.no_truncation()
        backend.no_padding()
        backend.post_processor = None  # with no token to add, all it would do is cut blanks off the offsets
        self.backend, self.chat_template, self.adds_bos = backend, chat_template, adds_bos
        vocab, self.named_tokens = backend.get_vocab(with_added_tokens=True), dict(named_tokens or {})
        self.vocab_size = max(vocab.values(), default=-1) + 1
        self.bos_token, self.eos_token, self.pad_token = map(self.named_tokens.get, NEEDED)
        self.bos_id, self.eos_id, self.pad_id = (_id(vocab, name, self.named_tokens.get(name)) for name in NEEDED)
        self.stop_ids = self._stop_ids(stop_ids)
        # Of the added tokens alone: no other is found whole in a text.
        known = {*self.named_tokens.values(), *(backend.id_to_token(stop) for stop in self.stop_ids)}
        added = backend.get_added_tokens_decoder().values()
        self.special_tokens = tuple(token.content for token in added if token.special or token.content in known)

    def encode(self, text: str) -> list[int]:
        """Token ids; nothing is added. Errors as `encode_with_offsets`."""
        _check_text(text)
        with fenced("the tokenizer cannot encode this text"):  # which without offsets takes half the time
            return self.backend.encode_batch_fast([text], add_special_tokens=False)[0].ids

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Token ids and, for each, the characters [start, end) it came from: tokens that share one (an emoji cut into
        bytes) all have its span. Raises InputError for a lone surrogate, a text above 4 MiB, and one that the
        `tokenizers` library fails at."""
        _check_text(text)
        with fenced("the tokenizer cannot encode this text"):
            encoding = self.backend.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Text of the ids; bytes that form no character become U+FFFD. Ids outside the vocabulary stand for nothing."""
        with fenced("the tokenizer cannot decode these tokens"):
            return self.backend.decode(list(ids), skip_special_tokens=skip_special)

    def _stop_ids(self, given: Iterable[int]) -> tuple[int, ...]:
        stops = set(given)
        if outside := [stop for stop in stops if not 0 <= stop < self.vocab_size]:
            raise InputError(f"stop token id {outside[0]} lies outside the vocabulary of {self.vocab_size} tokens.")
        whole = {token.content: id for id, token in self.backend.get_added_tokens_decoder().items()}
        stops.update(whole[name] for name in _ENDS_TEXT if name in whole)
        stops.update(whole[name] for name in _ENDS_TURN if name in whole and name in (self.chat_template or ""))
        if whole.keys() >= _HARMONY and "<|return|>" in (self.chat_template or "<|return|>"):
            stops.discard(whole.get("<|end|>", -1))
        if self.eos_id is not None:
            stops.add(self.eos_id)
        return tuple(sorted(stops))


def writes_bos(template: str) -> bool:
    """Whether a chat template writes BOS."""
    return "bos_token" in template and not template.startswith(NOTHING.format("bos_token"))


@contextlib.contextmanager
def fenced(what: str) -> Iterator[None]:
    """What the tokenizers library raises, a plain Exception or at a panic not even one, as an InputError."""
    try:
        yield
    except (FourbitError, MemoryError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        raise InputError(f"{what}: {error}.") from None


def _id(vocab: Mapping[str, int], what: str, token: str | None) -> int | None:
    if token is None:
        return None
    if token not in vocab:
        raise InputError(f"{what} is {token!r}, which is not in the tokenizer's vocabulary of {len(vocab)} tokens.")
    return vocab[token]


def _check_text(text: str) -> None:
    try:
        size = len(text.encode("utf-8"))
    except UnicodeEncodeError as error:
        raise InputError(
            f"the text holds half a surrogate pair (U+{ord(text[error.start]):04X}) at position {error.start}, "
            "which is no character; mend the text."
        ) from None
    if size > MAX_TEXT_BYTES:
        raise InputError(f"the text has {size} bytes; at most {MAX_TEXT_BYTES} are encoded at once. Split it.")
