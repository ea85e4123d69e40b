"""Tokenizers from Hugging Face folders: the files that may hold each thing, the traps in them, and bad files."""

import json
import os
from pathlib import Path
from random import Random
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors

from fourbit.errors import InputError
from fourbit.text.tokenizer_folder import as_tokenizer, folder_tokenizer

LETTERS = sorted(pre_tokenizers.ByteLevel.alphabet())
BOS, EOS = len(LETTERS) + 2, len(LETTERS) + 3


def backend() -> tokenizers.Tokenizer:
    """A byte-level tokenizer with every trap switched on: added BOS, truncation, padding, trimmed offsets."""
    vocab = {letter: id for id, letter in enumerate([*LETTERS, "he", "Ġhe"])}
    built = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[("h", "e"), ("Ġ", "he")]))
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    built.decoder = decoders.ByteLevel()
    built.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    adds_bos = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    built.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=True), adds_bos])
    built.enable_truncation(4)
    built.enable_padding(length=16)
    return built


def write(folder: Path, **files: Any) -> Path:
    """A folder with tokenizer.json and `files` (name without .json -> object; None leaves one out)."""
    everything = {"tokenizer": json.loads(backend().to_str()), **files}
    for name, content in everything.items():
        if content is not None:
            (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


CONFIG = {"bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": False}, "chat_template": "T"}


def test_everything_is_gathered(tmp_path: Path) -> None:
    tokenizer = folder_tokenizer(write(tmp_path, tokenizer_config=CONFIG))
    assert (tokenizer.bos_token, tokenizer.bos_id) == ("<s>", BOS)
    assert (tokenizer.eos_token, tokenizer.eos_id) == ("</s>", EOS)
    assert (tokenizer.pad_token, tokenizer.pad_id) == (None, None)
    assert tokenizer.chat_template == "T"
    assert tokenizer.stop_ids == (EOS,)
    assert tokenizer.vocab_size == EOS + 1
    assert tokenizer.adds_bos is None
    folder = write(tmp_path, tokenizer_config=CONFIG | {"eos_token": "</s>", "add_bos_token": False})
    assert folder_tokenizer(folder).adds_bos is False
    from transformers import AutoTokenizer

    saved = as_tokenizer(AutoTokenizer.from_pretrained(folder))
    assert saved.adds_bos is False and folder_tokenizer(Path(saved.source)).adds_bos is False


def test_templates_get_the_named_tokens_that_transformers_gives_them(tmp_path: Path) -> None:
    """Any key that ends in _token, as text or object, and those of `extra_special_tokens`; null and flags are none."""
    from transformers import PreTrainedTokenizerFast

    config = CONFIG | {
        "eos_token": "</s>",
        "add_bos_token": True,
        "pad_token": None,
        "unk_token": "</s>",
        "image_token": "<s>",
    }
    config |= {"cls_token": {"__type": "AddedToken", "content": "<s>"}, "extra_special_tokens": {"boi_token": "</s>"}}
    tokenizer = folder_tokenizer(write(tmp_path, tokenizer_config=config))
    assert tokenizer.named_tokens == PreTrainedTokenizerFast.from_pretrained(tmp_path).special_tokens_map
    assert set(tokenizer.named_tokens) == {f"{kind}_token" for kind in ("bos", "eos", "unk", "cls", "image", "boi")}
    assert tokenizer.special_tokens == ("<s>", "</s>")


def test_a_named_token_without_an_id_is_a_name_alone(tmp_path: Path) -> None:
    """CodeLlama's fill_token, which only its own tokenizer class knows, has none."""
    names = {"fill_token": "<FILL_ME>", "mask_token": "<mask>"}
    tokenizer = folder_tokenizer(write(tmp_path, tokenizer_config=CONFIG | names))
    assert names.items() <= tokenizer.named_tokens.items()
    assert (tokenizer.vocab_size, tokenizer.special_tokens) == (EOS + 1, ("<s>", "</s>"))


FLAGS = st.fixed_dictionaries({}, optional=dict.fromkeys(("lstrip", "rstrip", "special", "normalized"), st.booleans()))
WHOLE = {
    "<s>": BOS,
    "</s>": EOS,
    "<|a|>": EOS + 1,
    "<|b|>": EOS + 2,
    "<|new|>": EOS + 3,
}  # the last by the config alone
NAMED = st.sampled_from(["<s>", "</s>", "<|a|>", "he"]).flatmap(
    lambda text: FLAGS.map(lambda flags: {"__type": "AddedToken", "content": text, **flags}) | st.just(text)
)
CONFIGS = st.fixed_dictionaries(
    {},
    optional={
        **dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token", "image_token"), NAMED),
        "additional_special_tokens": st.lists(NAMED, max_size=2),
        "extra_special_tokens": st.lists(NAMED, max_size=2) | st.dictionaries(st.just("boi_token"), NAMED),
        "added_tokens_decoder": st.fixed_dictionaries(
            {}, optional={text: FLAGS.map(lambda flags, text=text: {"content": text, **flags}) for text in WHOLE}
        ).map(lambda found: {str(WHOLE[text]): token for text, token in found.items()}),
    },
)


@settings(max_examples=25)  # of 80 texts each
@given(
    CONFIGS, st.none() | st.fixed_dictionaries({"bos_token": NAMED, "eos_token": st.just("he")}), st.integers(0, 2**32)
)
def test_tokens_of_any_flags_and_names_are_transformers_tokens(
    tmp_path_factory: pytest.TempPathFactory, config: Any, older: Any, seed: int
) -> None:
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.getbasetemp() / "flags"
    if not folder.exists():  # once: a file that is known is not tried again
        folder.mkdir()
        built = backend()
        built.no_padding()
        built.no_truncation()
        built.normalizer = normalizers.Lowercase()
        built.add_tokens([AddedToken("<|a|>", special=True), AddedToken("<|b|>", rstrip=True, normalized=True)])
        (folder / "tokenizer.json").write_text(built.to_str())
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "special_tokens_map.json").unlink(missing_ok=True)
    if older is not None:
        (folder / "special_tokens_map.json").write_text(json.dumps(older))
    ours, theirs = folder_tokenizer(folder), PreTrainedTokenizerFast.from_pretrained(folder)
    assert ours.named_tokens == theirs.special_tokens_map
    assert set(ours.special_tokens) == {t.content for t in theirs.added_tokens_decoder.values() if t.special}
    random, pieces = Random(seed), [*WHOLE, "he", "HE", " ", "  ", "\n", "<S>", "<|A|>", "<|B|>", "x", "é"]
    for _ in range(80):
        text = "".join(random.choices(pieces, k=9))
        assert ours.encode(text) == theirs.backend_tokenizer.encode(text, add_special_tokens=False).ids, text


def test_nothing_is_added_cut_off_padded_or_trimmed(tmp_path: Path) -> None:
    tokenizer = folder_tokenizer(write(tmp_path))
    text = "he he he he he</s>"
    ids, offsets = tokenizer.encode_with_offsets(text)
    assert ids == tokenizer.encode(text)
    assert [text[start:end] for start, end in offsets] == ["he", " he", " he", " he", " he", "</s>"]
    assert tokenizer.decode(ids) == "he he he he he"


def test_dropout_in_the_file_does_not_make_encoding_random(tmp_path: Path) -> None:
    data = json.loads(backend().to_str())
    data["model"]["dropout"] = 0.9
    tokenizer = folder_tokenizer(write(tmp_path, tokenizer=data))
    assert {tuple(tokenizer.encode("he he he")) for _ in range(20)} == {(BOS - 2, BOS - 1, BOS - 1)}


def test_older_names_of_special_tokens_are_read(tmp_path: Path) -> None:
    older = {"bos_token": {"content": "<s>"}, "eos_token": "<s>", "pad_token": "</s>"}
    tokenizer = folder_tokenizer(write(tmp_path, special_tokens_map=older, tokenizer_config={"eos_token": "</s>"}))
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (BOS, BOS, EOS)  # as in transformers


def test_the_older_file_says_nothing_but_special_tokens(tmp_path: Path) -> None:
    older = {"chat_template": "evil", "added_tokens_decoder": {"7": {"content": "nowhere"}}}
    assert folder_tokenizer(write(tmp_path, special_tokens_map=older)).chat_template is None


@pytest.mark.parametrize(("value", "stops"), [(7, (7, EOS)), ([9, 7, 9], (7, 9, EOS)), ([], (EOS,)), (None, (5, EOS))])
def test_stop_ids_come_from_the_generation_config_then_the_config(value: Any, stops: Any, tmp_path: Path) -> None:
    files = {"generation_config": {"eos_token_id": value}, "config": {"eos_token_id": 5}}
    assert folder_tokenizer(write(tmp_path, tokenizer_config=CONFIG, **files)).stop_ids == stops


def test_the_template_file_wins_and_of_named_templates_the_default_one(tmp_path: Path) -> None:
    named = [{"name": "tool_use", "template": "B"}, {"name": "default", "template": "A"}]
    write(tmp_path, tokenizer_config=CONFIG | {"chat_template": named})
    assert folder_tokenizer(tmp_path).chat_template == "A"
    (tmp_path / "chat_template.jinja").write_text("\ufeffC é", encoding="utf-8")
    assert folder_tokenizer(tmp_path).chat_template == "C é"


def test_what_transformers_saves_is_read(tmp_path: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    fast = PreTrainedTokenizerFast(tokenizer_object=backend(), bos_token="<s>", eos_token="</s>", pad_token="</s>")
    fast.chat_template = "{{ messages }}"
    fast.save_pretrained(tmp_path)
    ours = folder_tokenizer(tmp_path)
    assert (ours.bos_id, ours.eos_id, ours.pad_id, ours.chat_template) == (BOS, EOS, EOS, "{{ messages }}")
    for text in ("he said: 12 é😀", "<s>he</s> he", "", " \n "):
        assert ours.encode(text) == fast(text, add_special_tokens=False, truncation=False, padding=False)["input_ids"]


def test_a_sentencepiece_style_tokenizer_json_is_read(tmp_path: Path) -> None:
    """Llama 2's kind: blanks as U+2581, a blank put before the text, unknown bytes as <0xNN>."""
    tokens = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "h", "e", "▁he", "he"]
    vocab, merges = {token: id for id, token in enumerate(tokens)}, [("h", "e"), ("▁", "he")]
    model = models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    built = tokenizers.Tokenizer(model)
    built.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    built.decoder = decoders.Sequence(steps)
    tokenizer = folder_tokenizer(write(tmp_path, tokenizer=json.loads(built.to_str())))
    assert tokenizer.encode("he he") == [260, 260]
    ids, offsets = tokenizer.encode_with_offsets("he é")
    assert tokenizer.decode(ids) == "he é" and offsets[0] == (0, 2) and offsets[-2:] == [(3, 4), (3, 4)]


# ---- bad files


def test_a_folder_without_tokenizer_json_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"needs tokenizer\.json or tokenizer\.model, found none"):
        folder_tokenizer(tmp_path)
    (tmp_path / "vocab.json").write_text("{}")
    with pytest.raises(InputError, match=r"found only vocab.json.*AutoTokenizer.from_pretrained"):
        folder_tokenizer(tmp_path)


TOKENIZER, CONFIG_FILE, GENERATION = "tokenizer.json", "tokenizer_config.json", "generation_config.json"
UNREADABLE, TOKEN_IDS = "not a readable tokenizer", "eos_token_id must be a whole number"
BAD: list[tuple[str, Any, str]] = [  # a file, its bytes or object, words of the refusal
    *((TOKENIZER, raw, UNREADABLE) for raw in (b"", b"{", b"[]", b'{"version": "1.0"}', b"[" * 20000)),
    (TOKENIZER, b'{"version": "\xff"}', "must be UTF-8"),
    *((CONFIG_FILE, raw, "must be JSON") for raw in (b"{'a': 1}", b'{"a":' * 20000)),
    (CONFIG_FILE, b"[]", "must be a JSON object"),
    (CONFIG_FILE, b'{"bos_token": "\xff"}', "must be UTF-8"),
    (GENERATION, b"eos", "must be JSON"),
    ("chat_template.jinja", b"\xff\xfe{\0", "must be UTF-8"),
    ("chat_template.jinja", b"x" * ((1 << 20) + 1), "at most 1,048,576 bytes"),
    (CONFIG_FILE, {"bos_token": 3}, "bos_token must be a token's text"),
    (CONFIG_FILE, {"eos_token": {"content": 1}}, "eos_token must be a token's text"),
    (CONFIG_FILE, {"chat_template": 3}, "chat_template must be"),
    (CONFIG_FILE, {"add_bos_token": 3}, "add_bos_token must be"),
    (CONFIG_FILE, {"chat_template": [{"name": "rag", "template": "x"}]}, "only ['rag']"),
    (CONFIG_FILE, {"chat_template": [{"name": [], "template": "x"}]}, "only ['[]']"),
    (
        CONFIG_FILE,
        {"added_tokens_decoder": {"300": {"content": "<|new|>"}}},
        "added token '<|new|>' has id 300, in tokenizer.json 260",
    ),
    (CONFIG_FILE, {"added_tokens_decoder": {"300": 3}}, "objects under token ids, got '300': 3"),
    (CONFIG_FILE, {"added_tokens_decoder": {"258": {"content": "<s>", "lstrip": "yes"}}}, "lstrip of added_tokens"),
    (CONFIG_FILE, {"added_tokens_decoder": {"259": {"content": "<s>"}}}, "'<s>' has id 259, in tokenizer.json 258"),
    (CONFIG_FILE, {"added_tokens_decoder": {"-1": {"content": "<s>"}}}, "objects under token ids"),
    (CONFIG_FILE, {"added_tokens_decoder": [1]}, "added_tokens_decoder must be an object"),
    (CONFIG_FILE, {"extra_special_tokens": "<s>"}, "extra_special_tokens must be a list"),
    (CONFIG_FILE, {"extra_special_tokens": ["none such"]}, "'none such' is not in the tokenizer's vocabulary"),
    (CONFIG_FILE, {"bos_token": "\ud800"}, "bos_token must be a token's text"),
    *((GENERATION, {"eos_token_id": ids}, TOKEN_IDS) for ids in (["</s>"], True)),
]


@pytest.mark.parametrize(("name", "content", "words"), BAD, ids=[f"{i} {case[0]}" for i, case in enumerate(BAD)])
def test_an_unreadable_file_or_a_bad_value_is_named(name: str, content: Any, words: str, tmp_path: Path) -> None:
    raw = content if isinstance(content, bytes) else json.dumps(content).encode()
    (write(tmp_path) / name).write_bytes(raw)
    with pytest.raises(InputError) as caught:
        folder_tokenizer(tmp_path)
    assert words in str(caught.value) and str(tmp_path / name) in str(caught.value)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"tokenizer_config": {"eos_token": "<|eos|>"}}, r"the special token '<\|eos\|>' is not in"),
        ({"generation_config": {"eos_token_id": [10**6]}}, "stop token id 1000000 lies outside"),
        ({"generation_config": {"eos_token_id": -1}}, "stop token id -1 lies outside"),
    ],
)
def test_a_token_outside_the_vocabulary_is_named(files: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=words):
        folder_tokenizer(write(tmp_path, **files))


PANICS: dict[str, Any] = {  # what the library panics at, takes gigabytes for, or does not come back from
    "a charsmap that is none": {"type": "Precompiled", "precompiled_charsmap": ""},
    "a pattern of nothing": {"type": "Replace", "pattern": {"String": ""}, "content": "x"},
    "times 10^9": {"type": "Sequence", "normalizers": [
        {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 1000}] * 3},
    "200,000 steps": {"type": "Sequence", "normalizers": [{"type": "NFKD"}] * 200_000},
}  # fmt: skip


@pytest.mark.parametrize("name", PANICS)
def test_what_the_library_does_not_survive_is_refused(
    name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, tokenizer={**json.loads(JSON), "normalizer": PANICS[name]})
    with pytest.raises(InputError, match=r"tokenizer\.json: not a readable tokenizer"):
        folder_tokenizer(tmp_path)
    assert "panicked" not in capfd.readouterr().err


def test_a_text_that_the_library_fails_at_is_an_error_of_ours(tmp_path: Path) -> None:
    words = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "none"}
    write(tmp_path, tokenizer={**json.loads(JSON), "model": words, "added_tokens": [], "pre_tokenizer": None})
    tokenizer = folder_tokenizer(tmp_path)
    assert tokenizer.encode("a") == [0]
    with pytest.raises(InputError, match="cannot encode this text"):
        tokenizer.encode("b")


def test_letters_that_would_vanish_are_refused(tmp_path: Path) -> None:
    model = {
        **json.loads(JSON)["model"],
        "vocab": {letter: id for id, letter in enumerate(LETTERS) if not letter.isalnum()},
    }
    file = {**json.loads(JSON), "model": {**model, "merges": []}, "added_tokens": []}
    with pytest.raises(InputError, match=r"json has no token for any letter.*give its model an unk_token"):
        folder_tokenizer(write(tmp_path, tokenizer=file))
    file["model"]["unk_token"] = "!"  # the advice
    assert folder_tokenizer(write(tmp_path, tokenizer=file)).encode("q")


def test_an_added_token_under_anothers_id_is_refused(tmp_path: Path) -> None:
    changed = json.loads(JSON)
    changed["added_tokens"][0]["id"] = 10**9
    with pytest.raises(InputError, match=r"added token '<s>' has id 1000000000, in the vocabulary 258"):
        folder_tokenizer(write(tmp_path, tokenizer=changed))


def test_a_fifo_in_the_folder_does_not_hang(tmp_path: Path) -> None:
    write(tmp_path)
    os.mkfifo(tmp_path / "chat_template.jinja")  # no regular file: as if absent
    assert folder_tokenizer(tmp_path).chat_template is None
    for name in (CONFIG_FILE, TOKENIZER):
        (tmp_path / name).unlink(missing_ok=True)
        os.mkfifo(tmp_path / name)
        with pytest.raises(InputError, match="needs"):
            folder_tokenizer(tmp_path)


JSON = backend().to_str().encode()
CHANGES = st.lists(st.tuples(st.integers(0, len(JSON) - 1), st.integers(0, 255)), min_size=1, max_size=4)


@settings(max_examples=200)
@given(CHANGES)
def test_a_changed_tokenizer_json_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, changes: Any) -> None:
    """Also without the child: here each panic of the library comes to us."""
    raw = bytearray(JSON)
    for at, value in changes:
        raw[at] = value
    folder = tmp_path_factory.getbasetemp()
    (folder / "tokenizer.json").write_bytes(bytes(raw))
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("fourbit.text.tokenizer_folder._tried", lambda *version: "")
            tokenizer = folder_tokenizer(folder)
        tokenizer.decode(tokenizer.encode("he 12 é😀</s>"))
    except InputError:
        pass
