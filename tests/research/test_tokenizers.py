"""transformers' tokenizers given where ours are: the same tokens, masks and files as their folder read by us."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

import fourbit
from fourbit.data.encode import load
from fourbit.data.order import fingerprint
from fourbit.data.template import template_for
from fourbit.errors import InputError
from fourbit.text.tokenizer_folder import as_tokenizer, folder_tokenizer

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CORPUS = ["the quick brown fox jumps over the lazy dog", "Hello, how can I help you today?\nYes, no, maybe. caf\u00e9"]
TEXTS = [
    *CORPUS,
    "<|im_start|>user\n hi  there<|im_end|>\n",
    " \U0001f600 x<pad>y",
    "caf\u00e9 \n\n\u4f60\u597d",
    "THE fox",
]
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<|im_start|>", "<|im_end|>"]


def byte_level() -> Tokenizer:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    )
    made.post_processor = processors.ByteLevel(trim_offsets=True)
    return made


def unigram() -> Tokenizer:
    made = Tokenizer(models.Unigram())
    made.normalizer, made.decoder = normalizers.NFKC(), decoders.Metaspace()
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    letters = sorted({letter for text in CORPUS for letter in text})
    how: dict[str, Any] = {"vocab_size": 120, "unk_token": "<unk>", "special_tokens": ["<unk>"]}
    made.train_from_iterator(CORPUS, trainers.UnigramTrainer(**how, initial_alphabet=letters, show_progress=False))
    return made


def word_piece() -> Tokenizer:
    made = Tokenizer(models.WordPiece(unk_token="<unk>"))
    made.normalizer, made.decoder = normalizers.BertNormalizer(lowercase=True), decoders.WordPiece()
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=150, special_tokens=["<unk>"], show_progress=False)
    made.train_from_iterator(CORPUS, trainer)
    return made


MADE: dict[str, Callable[[], Tokenizer]] = {"BPE": byte_level, "Unigram": unigram, "WordPiece": word_piece}


@pytest.fixture(params=MADE)
def theirs(request: pytest.FixtureRequest) -> Any:
    """One that adds BOS and EOS by itself, pads on the left and cuts off, as one in use may."""
    from transformers import PreTrainedTokenizerFast

    backend = MADE[request.param]()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    ids = [(token, backend.token_to_id(token)) for token in ("<s>", "</s>")]
    backend.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ids)
    names = {"bos_token": "<s>", "eos_token": "<|im_end|>", "pad_token": "<pad>", "unk_token": "<unk>"}
    made = PreTrainedTokenizerFast(tokenizer_object=backend, **names, padding_side="left")
    made.chat_template = CHATML
    made(["a longer text", "b"], padding="max_length", truncation=True, max_length=4)  # sets both in the backend
    return made


def test_tokens_and_masks_are_those_of_its_folder(theirs: Any, rows: Path, tmp_path: Path) -> None:
    theirs.save_pretrained(tmp_path)
    before, said = theirs("the fox").input_ids, theirs.backend_tokenizer.to_str()
    ours, folder = as_tokenizer(theirs), folder_tokenizer(tmp_path)
    for text in TEXTS:
        assert ours.encode_with_offsets(text) == folder.encode_with_offsets(text)
        assert ours.encode(text) == theirs(text, add_special_tokens=False, padding=False, truncation=False).input_ids
    for name in (
        "chat_template",
        "named_tokens",
        "special_tokens",
        "stop_ids",
        "vocab_size",
        "bos_id",
        "eos_id",
        "pad_id",
    ):
        assert getattr(ours, name) == getattr(folder, name), name
    assert fingerprint(load(rows, theirs)) == fingerprint(load(rows, folder))
    talk = [{"role": "user", "content": "hi"}]
    for taken in (ours, theirs):
        assert template_for(taken).render(talk) == theirs.apply_chat_template(talk, tokenize=False)
    theirs("the fox", padding=False, truncation=False)
    assert theirs("the fox").input_ids == before and "TemplateProcessing" in said, "theirs is left as it was"
    assert as_tokenizer(ours) is ours


def test_of_named_templates_the_default_one_is_taken(theirs: Any) -> None:
    theirs.chat_template = {"tool_use": "{{ 'tools' }}", "default": CHATML}
    assert as_tokenizer(theirs).chat_template == CHATML
    theirs.chat_template = {"tool_use": "{{ 'tools' }}"}
    with pytest.raises(InputError, match=r"chat_template has no entry named 'default', only \['tool_use'\]"):
        as_tokenizer(theirs)
    theirs.chat_template = None
    assert "using chatml" in template_for(theirs).notice == template_for(as_tokenizer(theirs)).notice


def test_what_was_changed_after_loading_counts(theirs: Any) -> None:
    theirs.add_special_tokens({"extra_special_tokens": ["<|extra|>"]})
    theirs.eos_token = "</s>"
    ours = as_tokenizer(theirs)
    assert "<|extra|>" in ours.special_tokens and len(ours.encode("a<|extra|>")) == len(ours.encode("a")) + 1
    assert ours.eos_token == "</s>" and {"</s>", "<|im_end|>"} == {*map(theirs.convert_ids_to_tokens, ours.stop_ids)}


def test_it_trains_scores_and_answers_as_ours_does(tiny_folder: Path, rows: Path, tmp_path: Path) -> None:
    """Stop tokens of the folder's generation_config.json too; a whole model that is saved takes its files along."""
    from transformers import AutoTokenizer

    folder = tmp_path / "model"
    folder.mkdir()
    for file in tiny_folder.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [256, 258]}))
    theirs = AutoTokenizer.from_pretrained(folder)
    model, ours = fourbit.load(folder)
    assert as_tokenizer(theirs).stop_ids == ours.stop_ids == (256, 258)
    config = fourbit.SFTConfig(out=str(tmp_path / "out"), full=True, batch_size=22, epochs=1)
    trainer = fourbit.SFTTrainer(model, theirs, train=rows, config=config)
    assert trainer.fingerprint == fourbit.SFTTrainer(model, ours, train=rows, config=config).fingerprint
    trainer.train(display=None)
    assert AutoTokenizer.from_pretrained(tmp_path / "out").encode("hello") == theirs.encode("hello")
    given = {"rows": rows, "max_new_tokens": 3}
    answers = [[*fourbit.answer_all(model, tokenizer, None, **given)] for tokenizer in (theirs, ours)]
    assert answers[0] == answers[1]
    assert fourbit.evaluate_loss(model, rows, theirs) == fourbit.evaluate_loss(model, rows, ours)
    fourbit.attach(model, fourbit.LoRAConfig(rank=2))
    drawn = [fourbit.Run(model, given).sample(["Hello"], max_new_tokens=8, seed=3) for given in (theirs, ours)]
    assert drawn[0] == drawn[1]
    scorer = fourbit.RewardModel(model, trainer.model.lm_head.weight[:1].detach())
    asked = [json.loads(line) for line in rows.read_text().splitlines()[:2]]
    assert scorer.score(theirs, asked) == scorer.score(ours, asked)


@pytest.mark.parametrize("other", [None, "gpt2", byte_level])
def test_what_is_no_fast_tokenizer_is_refused(other: Any, rows: Path) -> None:
    with pytest.raises(InputError, match=r"a fast one of transformers \(with .backend_tokenizer\), got "):
        load(rows, other() if callable(other) else other)


def test_a_slow_tokenizer_is_refused(rows: Path, tmp_path: Path) -> None:
    from transformers import ByT5Tokenizer

    with pytest.raises(InputError, match=r"got ByT5Tokenizer: take AutoTokenizer's, or fourbit.load's for the folder"):
        load(rows, ByT5Tokenizer())
