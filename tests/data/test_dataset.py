"""Loading whole files: what is refused, skipped, cut and counted; splitting, overlap and fingerprints."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fourbit.data import forms
from fourbit.data.batch import Encoded, Example, pack
from fourbit.data.encode import SPECIAL_IN_TEXT, WHOLE, Dataset, load, prompt_texts
from fourbit.data.order import count_overlap, fingerprint, split_validation
from fourbit.data.row import Row
from fourbit.data.sample import Sample
from fourbit.data.template import ChatTemplate, builtin
from fourbit.errors import InputError


def chat(question: str, answer: str, **more: Any) -> dict[str, Any]:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": turns, **more}


def rows(count: int, start: int = 0) -> list[dict[str, Any]]:
    return [chat(f"Question {i}?", f"Answer {i}.") for i in range(start, start + count)]


def parts(data: Dataset) -> list[Encoded]:
    return [part for example in data.examples for part in example.parts]


def test_files_are_read_in_order_and_counted(write: Callable[..., Path], tokenizer: Any) -> None:
    first = write(rows(3), "a.jsonl")
    second = write([{"prompt": "p", "completion": "c"}], "b.jsonl")
    data = load([first, second], tokenizer)
    assert [e.source for e in data.examples] == [f"{first}:1", f"{first}:2", f"{first}:3", f"{second}:1"]
    assert len(data) == 4 and [c.place.number for c in data.samples] == [1, 2, 3, 1]
    report = data.report
    assert (report.rows, report.skipped.kinds, report.truncated, report.duplicates) == (4, {}, 0, 0)
    assert report.tokens == sum(len(e.ids) for e in parts(data))
    assert report.trained == sum(sum(e.trained) for e in parts(data))
    assert report.longest == max(len(e.ids) for e in parts(data))
    assert len(load(str(first), tokenizer)) == 3


def test_every_bad_row_is_listed_at_once(write: Callable[..., Path], tokenizer: Any) -> None:
    path = write(["{", *rows(2), {"messages": []}, chat("q", ""), chat("q", "a")])
    with pytest.raises(InputError) as caught:
        load(path, tokenizer)
    assert str(caught.value).split("\n") == [
        "3 of 6 rows cannot be used; mend them, or leave them out with on_bad_row skip:",
        f"{path}:1: line: ends before the JSON value is complete: each row must stand whole on one line",
        f"{path}:4: messages: is an empty list",
        f"{path}:5: messages[1].content: is empty",
    ]


def test_the_first_20_of_many_bad_rows_are_shown(
    write: Callable[..., Path], tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write([chat("q", "") for _ in range(50)])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as caught:
        load("rows.jsonl", tokenizer)
    lines = str(caught.value).split("\n")
    assert lines[0].startswith("50 of 50 rows cannot be used") and len(lines) == 22
    assert lines[20].startswith("rows.jsonl:20: ") and lines[21] == "... and 30 more"
    longer = write([{"messages": 1}] * 31, "x" * 99 + ".jsonl")
    with pytest.raises(InputError) as caught:
        load(longer, tokenizer)
    lines = str(caught.value).split("\n")
    assert len(str(caught.value)) <= 1900 and lines[-1] == f"... and {31 - len(lines[1:-1])} more"


def test_skipped_rows_are_counted_by_kind(write: Callable[..., Path], tokenizer: Any) -> None:
    lines = ["no", *rows(2), chat("q", ""), {"txt": "t"}, {"prompt": "p", "completion": "c"}, chat("q", "long " * 50)]
    path = write([*lines, {"messages": [{"role": "user", "content": "x"}]}])
    data = load(path, tokenizer, on_bad_row="skip", max_length=60)
    assert data.report.rows == 2
    assert data.report.skipped.kinds == {"json": 1, "empty": 1, "form": 2, "nothing to train": 1, "too long": 1}
    assert [problem.place.number for problem in data.report.skipped] == [1, 4, 5, 6, 8, 7]
    with pytest.raises(ValueError, match="on_bad_row must be error or skip"):
        load(path, tokenizer, on_bad_row="drop")  # type: ignore[arg-type]


def test_skipping_everything_is_still_an_error(write: Callable[..., Path], tokenizer: Any) -> None:
    path = write(["no"])
    with pytest.raises(InputError, match="1 of 1 rows cannot be used"):
        load(path, tokenizer, on_bad_row="skip")
    with pytest.raises(InputError, match="holds no rows"):
        load([], tokenizer)
    with pytest.raises(InputError, match="cannot be opened: No such file"):
        load([path, "none.jsonl"], tokenizer, on_bad_row="skip")


def test_a_broken_template_is_said_once_and_not_per_row(write: Callable[..., Path], tokenizer: Any) -> None:
    path = write(rows(3))
    with pytest.raises(InputError) as caught:
        load(path, tokenizer, template=ChatTemplate("{% oops %}", name="mine"), on_bad_row="skip")
    assert str(caught.value) == ("mine: the chat template cannot be used: line 1: Encountered unknown tag 'oops'.")


def test_an_answer_is_never_cut_short(write: Callable[..., Path], tokenizer: Any) -> None:
    path = write([chat("q", "word " * 40)])
    length = load(path, tokenizer).report.longest
    whole = load(path, tokenizer, max_length=length)
    assert whole.report.truncated == 0
    cut = load(path, tokenizer, max_length=length - 1)  # the line break after the end of turn
    assert cut.report.truncated == 1
    assert parts(cut)[0].ids == parts(whole)[0].ids[:-1]
    assert parts(cut)[0].trained == parts(whole)[0].trained[:-1]
    assert cut.report.trained == whole.report.trained
    with pytest.raises(InputError) as caught:
        load(path, tokenizer, max_length=length - 2)
    assert str(caught.value).split("\n")[1] == (
        f"{path}:1: length: {length} tokens, and max_length {length - 2} cuts off the end of an answer:"
        " raise it or skip such rows"
    )


def test_a_tail_that_is_not_trained_is_cut_and_counted(write: Callable[..., Path], tokenizer: Any) -> None:
    row = chat("q", "a")
    masked = {"role": "assistant", "content": "word " * 40, "weight": 0}
    row["messages"] += [{"role": "user", "content": "more"}, masked]
    data = load(write([row]), tokenizer, max_length=30)
    assert data.report.truncated == 1 and len(parts(data)[0].ids) == 30 and data.report.trained == 2


def test_notices_are_counted(write: Callable[..., Path], tokenizer: Any) -> None:
    path = write([*rows(2), chat("Question 0?", "Answer 0."), chat("b", "a")])
    notices = load(path, tokenizer).report.notices
    assert "using chatml" in notices[0]
    assert notices[1:] == [
        "1 of 4 rows repeat an earlier row",
    ]
    dated = ChatTemplate(builtin("chatml") + "{% if false %}{{ strftime_now('%d') }}{% endif %}")
    assert load(write(rows(1), "b.jsonl"), tokenizer, template=dated).report.notices == [
        "the chat template writes today's date into every example: another day gives other tokens"
    ]
    fixed = ChatTemplate(dated.source, date="2025-01-31")
    assert load(write(rows(1), "c.jsonl"), tokenizer, template=fixed).report.notices == []


def test_a_key_that_only_the_template_can_use_is_told_of_where_it_does_not(
    write: Callable[..., Path], tokenizer: Any
) -> None:
    path = write(
        [{"messages": [{"role": "user", "content": "q", "mood": "gay", "id": 3}, *chat("", "a")["messages"][1:]]}]
    )
    assert load(path, tokenizer).report.notices[1:] == [
        "1 of 1 rows: not used: 'messages[].id'",
        "1 of 1 rows: not used: 'messages[].mood'",
    ]
    moody = builtin("chatml").replace("+ message['content']", "+ message['content'] + message.mood | default('')")
    data = load(path, tokenizer, template=ChatTemplate(moody))
    assert data.report.notices == ["1 of 1 rows: not used: 'messages[].id'"] and "qgay" in parts(data)[0].text
    first = "{% if loop.first %}{{ message.mood }}{% endif %}"
    some = ChatTemplate(builtin("chatml").replace("{% endfor %}", first + "{% endfor %}", 1))
    row = chat("q", "a")
    row["messages"] = [{**row["messages"][0], "mood": "gay"}, {**row["messages"][1], "mood": "gray"}]
    told = load(write([row], "b.jsonl"), tokenizer, template=some)
    assert told.report.notices == ["1 of 1 rows: not used: 'messages[].mood'"], "the second one stands nowhere"


def test_a_rows_variables_reach_the_template(write: Callable[..., Path], tokenizer: Any) -> None:
    """And make another row of it. A null one stays unknown there."""
    kwargs = [{"style": "short"}, '{"style": "long"}', {"style": None}, None]
    path = write([chat("q", "a", chat_template_kwargs=given) for given in kwargs])
    template = ChatTemplate("{{ style is defined and style or '-' }}:" + builtin("chatml"))
    data = load(path, tokenizer, template=template)
    assert [part.text.split(":")[0] for part in parts(data)] == ["short", "long", "-", "-"]
    assert data.report.duplicates == 1
    prompts = prompt_texts(data.samples, tokenizer, template)
    assert [text.split(":")[0] for text in prompts] == ["short", "long", "-", "-"]


def test_duplicates_are_told_by_content(write: Callable[..., Path], tokenizer: Any) -> None:
    same = chat("q", "a")
    other_order = {"messages": [{"content": "q", "role": "user"}, {"content": "a", "role": "assistant"}], "id": 7}
    pair = {"prompt": "q", "completion": "a"}
    first, second = write([same, other_order, chat("q", "b")], "a.jsonl"), write([pair], "b.jsonl")
    data = load([first, second], tokenizer)
    assert data.report.duplicates == 2
    train, validation = load(first, tokenizer), load(second, tokenizer)
    assert count_overlap(train, validation) == 1 and count_overlap(validation, train) == 2


def questions(data: Dataset) -> set[str]:
    return {sample.answers[0][0]["content"] for sample in data.samples}


def test_a_split_stays_when_rows_are_added_or_moved(write: Callable[..., Path], tokenizer: Any) -> None:
    small = load(write(rows(1000), "a.jsonl"), tokenizer)
    more = load(write(rows(200, 1000)[::-1] + rows(1000)[::-1], "b.jsonl"), tokenizer)
    train, held = split_validation(small, 0.3)
    more_train, more_held = split_validation(more, 0.3)
    assert questions(held) < questions(more_held) and questions(train) < questions(more_train)
    assert questions(held) | questions(train) == questions(small) and not questions(held) & questions(train)
    assert abs(len(held) - 300) < 73  # five deviations of a binomial of 1000 at 0.3
    assert len(held) + len(train) == 1000 == held.report.rows + train.report.rows
    assert held.report.tokens + train.report.tokens == small.report.tokens
    assert held.report.trained == sum(sum(e.trained) for e in parts(held))
    assert [e.source for e in train.examples] == [str(c.place) for c in train.samples]


def test_more_is_held_back_as_the_fraction_grows(write: Callable[..., Path], tokenizer: Any) -> None:
    data = load(write(rows(100)), tokenizer)
    held = [questions(split_validation(data, fraction)[1]) for fraction in (0.05, 0.2, 0.5, 0.9)]
    assert held[0] < held[1] < held[2] < held[3]


@pytest.mark.parametrize("count", [2, 3, 7, 10])
def test_both_sides_get_a_row_where_there_are_two(count: int, write: Callable[..., Path], tokenizer: Any) -> None:
    data = load(write(rows(count)), tokenizer)
    for fraction in (1 / count, 0.5, 1 - 1 / count):
        train, held = split_validation(data, fraction)
        assert len(train) + len(held) == count
        assert len(train) >= 1 and len(held) >= 1
    for fraction in (1e-9, 0.9 / count, 1 - 0.9 / count, 1 - 1e-9):
        with pytest.raises(
            InputError, match=f"of {count} rows for validation is less than a row on one side"
        ) as caught:
            split_validation(data, fraction)
        least = float(str(caught.value).partition("side needs ")[2].partition("%")[0]) / 100
        assert split_validation(data, least)[1].examples and split_validation(data, 1 - least)[0].examples


def test_equal_rows_go_to_one_side(write: Callable[..., Path], tokenizer: Any) -> None:
    data = load(write(rows(30) * 3), tokenizer)
    train, held = split_validation(data, 0.3)
    assert count_overlap(train, held) == 0
    assert len(held) % 3 == 0 == len(train) % 3 and len(held) > 0
    assert train.report.duplicates == len(train) // 3 * 2


@pytest.mark.parametrize("fraction", [0, 1, -0.1, 5])
def test_a_fraction_outside_0_to_1_is_refused(fraction: float, write: Callable[..., Path], tokenizer: Any) -> None:
    with pytest.raises(InputError, match="must lie between 0 and 1, got"):
        split_validation(load(write(rows(2)), tokenizer), fraction)


def test_the_fingerprint_is_of_ids_masks_and_order(write: Callable[..., Path], tokenizer: Any) -> None:
    data = load(write(rows(3), "a.jsonl"), tokenizer)
    again = load(write(rows(3), "b.jsonl"), tokenizer)
    assert fingerprint(data) == fingerprint(again) and len(fingerprint(data)) == 64
    others = [
        load(write(rows(3)[::-1], "c.jsonl"), tokenizer),
        load(write(rows(4), "d.jsonl"), tokenizer),
        load(write([*rows(2), chat("Question 2?", "Answer 2!")], "e.jsonl"), tokenizer),
        load(write(rows(3), "f.jsonl"), tokenizer, loss_on="all"),
    ]
    assert len({fingerprint(d) for d in [data, *others]}) == 5


@given(split=st.lists(st.integers(1, 5), min_size=1, max_size=6))
def test_the_fingerprint_sees_where_examples_end(split: Sequence[int]) -> None:
    """The same tokens cut into other examples are other data."""

    def cut(lengths: Sequence[int]) -> str:
        examples = [Example((Encoded([1] * n, [True] * n, "", ""),)) for n in lengths]
        return fingerprint(Dataset("sft", examples))

    assert cut(split) == cut(list(split))
    assert (cut(split) == cut([sum(split)])) == (len(split) == 1)


def test_ten_thousand_short_rows_load_in_seconds(tmp_path: Path, tokenizer: Any) -> None:
    import time

    path = tmp_path / "many.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows(10_000)))
    start = time.process_time()
    assert len(load(path, tokenizer)) == 10_000
    assert time.process_time() - start < 15


def test_other_tools_rows_become_the_same_examples(write: Callable[..., Path], tokenizer: Any) -> None:
    same = {
        "chat": chat("Sky?", "Blue."),
        "pair": {"prompt": "Sky?", "completion": "Blue."},
        "sharegpt": {"conversations": [{"from": "human", "value": "Sky?"}, {"from": "gpt", "value": "Blue."}]},
        "alpaca": {"instruction": "Sky?", "input": "", "output": "Blue."},
    }
    assert len({fingerprint(load(write([row], f"{name}.jsonl"), tokenizer)) for name, row in same.items()}) == 1


@pytest.mark.parametrize("loss_on", ["assistant", "last", "all"])
def test_plain_text_is_trained_whole_between_the_models_marks(
    loss_on: Any, write: Callable[..., Path], make_tokenizer: Callable[..., Any]
) -> None:
    tokenizer = make_tokenizer(("<s>", "</s>"), "<s>", "</s>")
    path = write([{"text": "the quick fox"}, {"text": "<s>the quick fox</s>"}])
    assert SPECIAL_IN_TEXT in str(load(write([{"text": "a</s>b"}], "s.jsonl"), tokenizer).report.notices)
    data = load(path, tokenizer, loss_on=loss_on, template=ChatTemplate("{% broken"))
    for example in parts(data):
        assert tokenizer.decode(example.ids, skip_special=False) == "<s>the quick fox</s>"
        assert example.trained == [False] + [True] * (len(example.ids) - 1)
    whole = [f"2 of 2 rows: {WHOLE}"] if loss_on == "last" else []
    assert data.report.notices == whole, "no template is used, so none is spoken of"
    bare = load(write([{"text": "fox"}], "b.jsonl"), make_tokenizer((), None, None))
    assert parts(bare)[0].text == "fox" and bare.report.notices == []


def test_plain_text_that_is_too_long_is_a_bad_row(write: Callable[..., Path], tokenizer: Any) -> None:
    path = write([{"text": "word " * 40}])
    with pytest.raises(
        InputError, match=r"rows.jsonl:1: length: \d+ tokens, and max_length 9 cuts off the end: raise it"
    ):
        load(path, tokenizer, max_length=9)


def test_prompts_are_tokens_of_which_none_is_trained(write: Callable[..., Path], tokenizer: Any) -> None:
    data = load(write([{"prompt": "Sky?", "id": 3}]), tokenizer, "prompts")
    assert tokenizer.decode(parts(data)[0].ids, skip_special=False) == (
        "<|im_start|>user\nSky?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert not any(parts(data)[0].trained) and data.samples[0].row == {"prompt": "Sky?", "id": 3}
    assert data.report.notices[1:] == ["1 of 1 rows: not used: 'id'"]


@pytest.mark.parametrize("loss_on", ["last", "all"])
@pytest.mark.parametrize("kind", ["pairs", "judged", "prompts"])
def test_only_rows_to_learn_from_take_loss_on(
    kind: Any, loss_on: Any, write: Callable[..., Path], tokenizer: Any
) -> None:
    row = {"prompt": "q", "chosen": "a", "rejected": "b", "completion": "a", "label": True}
    with pytest.raises(InputError, match=f"loss_on {loss_on} is for rows to learn from"):
        load(write([row]), tokenizer, kind, loss_on=loss_on)


def test_a_form_is_one_entry_of_the_table(
    write: Callable[..., Path], tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def riddle(row: Row) -> Sample:
        turns = chat(row.data["riddle"], row.data["solution"])["messages"]
        return Sample([], (turns,), row.place)

    form = forms.Form("sft", "riddle", lambda row: "riddle" in row, riddle)
    path = write([{"riddle": "Sky?", "solution": "Blue.", "hint": "B"}])
    with pytest.raises(InputError, match="is not a row to learn from"):
        load(path, tokenizer)
    monkeypatch.setattr(forms, "FORMS", (*forms.FORMS, form))
    data = load(path, tokenizer)
    assert fingerprint(data) == fingerprint(load(write([chat("Sky?", "Blue.")], "b.jsonl"), tokenizer))
    assert pack([(0, data.examples[0])]).trained == sum(parts(data)[0].trained)
    assert data.report.notices[1:] == ["1 of 1 rows: not used: 'hint'"]
