"""What encoding reports: templates that cannot be masked, answers without an end, boundaries inside tokens."""

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fourbit.data import turns as module
from fourbit.data.batch import Encoded
from fourbit.data.encode import encode, encode_questions, prompt_texts
from fourbit.data.row import BadRow, Place
from fourbit.data.sample import Sample
from fourbit.data.template import ChatTemplate, builtin, template_for
from fourbit.data.turns import UNKNOWN_STOP
from fourbit.errors import InputError


def encoded(sample: Sample, tokenizer: Any, template: ChatTemplate, **options: Any) -> Encoded:
    """The one conversation of a sample in tokens. Raises BadRow."""
    ((_, parts),) = encode([sample], tokenizer, template, **options)
    return parts[0]


HI = {"role": "user", "content": "Hi"}


def row(*messages: dict[str, Any]) -> Sample:
    return Sample([], (list(messages),), Place("rows.jsonl", 3))


def say(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def trained_text(example: Encoded, tokenizer: Any) -> str:
    return tokenizer.decode([t for t, on in zip(example.ids, example.trained, strict=True) if on], skip_special=False)


@pytest.fixture
def chatml() -> ChatTemplate:
    return ChatTemplate(builtin("chatml"))


def bad(conv: Sample, tokenizer: Any, template: ChatTemplate, **options: Any) -> str:
    with pytest.raises(BadRow) as caught:
        encoded(conv, tokenizer, template, **options)
    return str(caught.value)


THINKS = ChatTemplate(
    "{% for m in messages %}{% if m.role == 'user' %}U:{{ m.content }}<|im_end|>{% elif loop.last %}"
    "A:{{ m.content }}<|im_end|>{% else %}A:{{ m.content.split('</think>')[-1] }}<|im_end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}A:{% endif %}"
)


def test_an_answer_that_the_template_changes_later_is_left_out_and_said(tokenizer: Any) -> None:
    """As reasoning models' templates do: an earlier answer loses its thoughts once another follows."""
    conv = row(HI, say("<think>x</think>one"), HI, say("<think>y</think>two"))
    example = encoded(conv, tokenizer, THINKS)
    assert trained_text(example, tokenizer) == "<think>y</think>two<|im_end|>"
    assert example.notes == (module.LEFT_OUT,) and "<think>x" not in example.text
    last = encoded(conv, tokenizer, THINKS, loss_on="last")
    assert last.trained == example.trained and last.notes == ()
    stays = encoded(row(HI, say("one"), HI, say("two")), tokenizer, THINKS)
    assert trained_text(stays, tokenizer) == "one<|im_end|>two<|im_end|>" and stays.notes == ()


def test_a_last_answer_that_the_template_changes_is_refused_with_the_place_and_the_advice_helps(tokenizer: Any) -> None:
    conv = row(HI, say("<think>x</think>one"), HI, say("two", weight=0))
    says = bad(conv, tokenizer, THINKS)
    assert says == (
        "rows.jsonl:3: messages: the template is not prefix-stable at message 1: rendered alone, the conversation so"
        " far goes on with '<think>x</think>one<|im_end|>' where the whole has"
        " 'one<|im_end|>U:Hi<|im_end|>A:two<|im_end|>' (character 16), so the place of the answer cannot be told; name"
        " another template (template=...)"
    )
    assert trained_text(encoded(conv, tokenizer, template_for(tokenizer, "chatml")), tokenizer) == (
        "<think>x</think>one<|im_end|>"
    )


R1 = ChatTemplate(
    "{% for m in messages %}{% if m.role == 'user' %}U:{{ m.content }}{% else %}"
    "A:{{ m.content.split('</think>')[-1] }}<|im_end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}A:<think>\n{% endif %}"
)


def test_an_answers_thoughts_follow_a_prompt_that_begins_them(tokenizer: Any) -> None:
    """As DeepSeek's distilled models: the template leaves out all thoughts, and the prompt ends in their mark."""
    conv = row(HI, say("<think>\nx\n</think>\n\none"), HI, say("<think>\ny\n</think>\n\ntwo"))
    example = encoded(conv, tokenizer, R1)
    assert example.text == "U:HiA:\n\none<|im_end|>U:HiA:<think>\ny\n</think>\n\ntwo<|im_end|>"
    assert trained_text(example, tokenizer) == "y\n</think>\n\ntwo<|im_end|>"
    assert example.notes == (module.LEFT_OUT,)
    (prompt,), answers = encode_questions([conv], tokenizer, R1)
    assert example.ids[: len(prompt)] == prompt and answers == ["y\n</think>\n\ntwo"]
    without = encoded(row(HI, say("one"), HI, say("two")), tokenizer, R1)
    assert trained_text(without, tokenizer) == "two<|im_end|>"
    assert without.notes == (module.LACKS, module.LEFT_OUT)
    assert encode_questions([row(HI, say("one"))], tokenizer, R1)[1] == ["one"]


@pytest.mark.parametrize("answer", ["<b>so</b>", "<thin", "<think>\ny\n</think>\n\n<b>so</b>"])
def test_an_answer_may_begin_as_the_mark_of_thoughts_does(answer: str, tokenizer: Any) -> None:
    """What the text shares with the prompt ends inside the mark then."""
    example = encoded(row(HI, say("<i>one</i>"), HI, say(answer)), tokenizer, R1)
    assert trained_text(example, tokenizer) == answer.removeprefix("<think>\n") + "<|im_end|>"


def test_a_system_text_that_moves_to_the_last_user_turn_is_refused(tokenizer: Any) -> None:
    """As newer Mistral templates do."""
    template = ChatTemplate(
        "{% for m in messages[1:] %}{% if m.role == 'user' %}[INST]"
        "{% if loop.last %}{{ messages[0].content }}\n{% endif %}{{ m.content }}[/INST]"
        "{% else %}{{ m.content }}<|im_end|>{% endif %}{% endfor %}"
    )
    conv = row({"role": "system", "content": "S"}, HI, say("one"))
    assert "is not prefix-stable at message 2" in bad(conv, tokenizer, template)


def test_a_generation_prompt_that_the_whole_lacks_is_said(tokenizer: Any) -> None:
    template = ChatTemplate(builtin("chatml").replace("<|im_start|>assistant\\n", "<|im_start|>assistant\\n<think>\\n"))
    example = encoded(row(HI, say("one")), tokenizer, template)
    assert trained_text(example, tokenizer) == "one<|im_end|>" and example.notes == (module.LACKS,)
    inserts = "{% for m in messages %}{{ '!' if m.role == 'assistant' }}{{ m.content }}|{% endfor %}"
    asks = ChatTemplate(inserts + "{% if add_generation_prompt %}?{% endif %}")
    assert "goes on with '?' where the whole has '!one|'" in bad(row(HI, say("one")), tokenizer, asks)


def test_only_the_last_of_answers_that_change_and_have_no_stop_token_is_trained(tokenizer: Any) -> None:
    """As where the end-of-text token stands at the end of the text alone."""
    template = ChatTemplate(
        "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}{{ '~' if loop.last else '-' }}{% endif %}"
        "{% endfor %}"
    )
    example = encoded(row(HI, say("one"), HI, say(" two")), tokenizer, template)
    assert trained_text(example, tokenizer) == " two~"
    assert example.notes == (module.LEFT_OUT, UNKNOWN_STOP)
    ended = ChatTemplate(
        "{% for m in messages %}{{ m.content }}\n{% endfor %}{% if not add_generation_prompt %}<|im_end|>{% endif %}"
    )
    example = encoded(row(HI, say("one"), HI, say("two")), tokenizer, ended)
    assert trained_text(example, tokenizer) == "two\n<|im_end|>" and module.LEFT_OUT in example.notes
    conv = row(HI, say(" one"), HI, say("two", weight=0))
    assert bad(conv, tokenizer, template) == (
        "rows.jsonl:3: messages: the template changes what follows an answer and ends it with no stop token, so its end"
        " cannot be told; name another template (template=...)"
    )
    assert trained_text(encoded(conv, tokenizer, template_for(tokenizer, "plain")), tokenizer) == " one<|im_end|>"
    every = ChatTemplate("{% for m in messages %}{{ m.content }}{{ '~' if loop.last else '-' }}{% endfor %}")
    assert "not prefix-stable at message 3" in bad(row(HI, say("one"), HI, say("two")), tokenizer, every)


def test_a_conversation_of_too_many_answers_is_told_the_limit_and_its_advice_helps(
    tokenizer: Any, chatml: ChatTemplate
) -> None:
    """Each answer's place needs the conversation up to it: work that grows with the square of the turns has a limit."""
    turns = [(HI, say("yo"))[i % 2] for i in range(20_000)]
    assert bad(row(*turns), tokenizer, chatml) == (
        "rows.jsonl:3: messages: has 20,000 messages with 10,000 answers to train: to find them all, the template would"
        " have to write more than 200,000 messages; split it, or train the last answer (loss_on last)"
    )
    last = encoded(row(*turns), tokenizer, chatml, loss_on="last")
    assert trained_text(last, tokenizer) == "yo<|im_end|>" and len(last.ids) > 100_000
    half = encoded(row(*turns[:600]), tokenizer, chatml)
    assert trained_text(half, tokenizer) == "yo<|im_end|>" * 300


def test_a_template_that_refuses_the_row_is_quoted(tokenizer: Any) -> None:
    template = ChatTemplate("{{ raise_exception('No system messages') }}", name="model's template")
    assert bad(row(HI, say("x")), tokenizer, template) == (
        "rows.jsonl:3: messages: model's template: the template cannot render this: it says: No system messages"
    )


def test_a_broken_template_is_no_rows_fault(tokenizer: Any) -> None:
    with pytest.raises(InputError) as caught:
        encoded(row(HI, say("x")), tokenizer, ChatTemplate("{% broken"))
    assert not isinstance(caught.value, BadRow)


def test_two_bos_tokens_are_refused(make_tokenizer: Callable[..., Any]) -> None:
    tokenizer = make_tokenizer(("<s>", "</s>"), "<s>", "</s>")
    template = ChatTemplate("{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}", {"bos_token": "<s>"})
    conv = Sample([], (), Place("rows.jsonl", 3), text="<s><s>Hi")
    assert bad(conv, tokenizer, template) == (
        "rows.jsonl:3: text: begins with two BOS tokens ('<s>'): the row must not hold one that is added"
    )
    once = encoded(row(HI, say("x")), tokenizer, template)
    assert once.ids.count(tokenizer.bos_id) == 1


def test_an_answer_that_the_template_drops_is_refused(tokenizer: Any) -> None:
    """The template drops the answer altogether."""
    template = ChatTemplate("{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}")
    assert bad(row(HI, say("one")), tokenizer, template) == (
        "rows.jsonl:3: messages[1].content: 'one' stands nowhere in what the template writes for it: the template"
        " cannot say it; name one that can (template=...)"
    )


def test_a_tokenizers_refusal_is_the_rows_problem(chatml: ChatTemplate, make_tokenizer: Callable[..., Any]) -> None:
    class Picky(make_tokenizer):  # type: ignore[misc, valid-type]
        def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
            raise InputError("the text is too long")

    assert bad(row(HI, say("x")), Picky(), chatml) == "rows.jsonl:3: messages: the text is too long"


def test_an_unended_answer_gets_the_end_of_text_token(tokenizer: Any) -> None:
    template = ChatTemplate("{% for m in messages %}{{ m.role }}: {{ m.content }}\n\n{% endfor %}")
    example = encoded(row(HI, say("Hello. ")), tokenizer, template)
    assert example.text == "user: Hi\n\nassistant: Hello."
    assert example.ids == [*tokenizer.encode(example.text), tokenizer.eos_id]
    assert trained_text(example, tokenizer).endswith("Hello.<|im_end|>") and example.trained[-1]
    assert module.NO_END in example.notes
    everything = encoded(row(HI, say("Hello. ")), tokenizer, template, loss_on="all")
    assert everything.ids == example.ids and all(everything.trained[1:])
    talk = encoded(row(HI, say("one"), HI, say("two")), tokenizer, template)
    assert {module.NO_END, module.NEVER_ENDS} <= set(talk.notes)
    assert talk.ids.count(tokenizer.eos_id) == 1


def test_an_unended_answer_without_an_end_of_text_token_is_said(make_tokenizer: Callable[..., Any]) -> None:
    tokenizer = make_tokenizer((), None, None)
    template = ChatTemplate(
        "{% for m in messages %}{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}{% endif %}"
    )
    example = encoded(row(HI, say("Hello.")), tokenizer, template)
    assert trained_text(example, tokenizer) == "Hello."
    assert example.notes == (module.NEVER_ENDS,)


def test_a_token_across_the_end_of_an_answer_is_trained(make_tokenizer: Callable[..., Any]) -> None:
    """It starts inside, so it holds text of the answer."""
    tokenizer = make_tokenizer((), None, None, pieces=(".\n",))
    template = ChatTemplate("{% for m in messages %}{{ m.content }}\n{% endfor %}")
    assert trained_text(encoded(row(HI, say("Yes.")), tokenizer, template), tokenizer) == "Yes.\n"


def test_another_turns_stop_token_ends_no_answer(tokenizer: Any) -> None:
    """Only the talk's very end is marked, and the first answer must not reach up to there."""
    template = ChatTemplate(
        "{% for m in messages %}{{ m.content }}{{ '<|im_end|>' if loop.last else '\n' }}{% endfor %}"
    )
    conv = row(HI, say("one", weight=1), HI, say("two", weight=0))
    assert "ends it with no stop token" in bad(
        conv,
        tokenizer,
        ChatTemplate(
            "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}"
            "{{ '<|im_end|>' if loop.last else '\n' }}{% endif %}{% endfor %}"
        ),
    )
    assert "not prefix-stable" in bad(conv, tokenizer, template)


def test_a_marker_that_is_no_stop_token_is_trained_whole_and_said(make_tokenizer: Callable[..., Any]) -> None:
    """ChatML on a model whose vocabulary lacks its tokens: the marker is spelled in several tokens."""
    tokenizer = make_tokenizer(("<e>",), None, "<e>")
    example = encoded(row(HI, say("Hello.")), tokenizer, ChatTemplate(builtin("chatml")))
    assert trained_text(example, tokenizer) == "Hello.<|im_end|>"
    assert example.notes == (UNKNOWN_STOP,)


def test_text_put_before_the_answer_is_said(tokenizer: Any) -> None:
    source = builtin("chatml").replace(
        "message['role'] + '\\n' + message",
        "message['role'] + '\\n' + ('<think></think>' if message['role'] == 'assistant' else '') + message",
    )
    example = encoded(row(HI, say("Hello.")), tokenizer, ChatTemplate(source))
    assert trained_text(example, tokenizer) == "<think></think>Hello.<|im_end|>"
    assert example.notes == (module.INSERTED,)


def test_a_token_across_the_start_of_an_answer_is_context_and_said(make_tokenizer: Callable[..., Any]) -> None:
    tokenizer = make_tokenizer(pieces=(": H",))
    template = ChatTemplate(
        "{% for m in messages %}{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    example = encoded(row({"role": "user", "content": "x"}, say("Hello")), tokenizer, template)
    assert example.notes == (module.STRADDLE,)
    assert trained_text(example, tokenizer) == "ello<|im_end|>"
    inside = encoded(row({"role": "user", "content": "x"}, say("Yes")), tokenizer, template)
    assert inside.notes == () and trained_text(inside, tokenizer) == "Yes<|im_end|>"


def test_an_answer_that_repeats_the_question_is_found_in_its_own_place(tokenizer: Any, chatml: ChatTemplate) -> None:
    for text in ("Hi", "assistant", "user\nHi", "\n", "|", "im_end"):
        conv = row({"role": "user", "content": text}, say(text.strip() or "x"))
        assert trained_text(encoded(conv, tokenizer, chatml), tokenizer) == (text.strip() or "x") + "<|im_end|>"


def test_weights_hold_for_the_last_turn_and_not_for_all(tokenizer: Any, chatml: ChatTemplate) -> None:
    conv = row(HI, say("one"), HI, say("two", weight=0))
    assert bad(conv, tokenizer, chatml, loss_on="last").endswith("nothing to train: no token of an answer is left")
    everything = encoded(conv, tokenizer, chatml, loss_on="all")
    assert everything.trained == [False] + [True] * (len(everything.ids) - 1)


def test_all_needs_no_stable_template(tokenizer: Any) -> None:
    template = ChatTemplate("{{ messages | length }}{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}")
    conv = row(HI, say("one"))
    assert "not prefix-stable" in bad(conv, tokenizer, template)
    assert trained_text(encoded(conv, tokenizer, template, loss_on="all"), tokenizer) == "Hi<|im_end|>one<|im_end|>"


def test_loss_on_is_checked(tokenizer: Any, chatml: ChatTemplate) -> None:
    with pytest.raises(ValueError, match="loss_on must be one of assistant, all or last, got 'user'"):
        encoded(row(HI, say("x")), tokenizer, chatml, loss_on="user")  # type: ignore[arg-type]


def test_the_prompt_of_the_last_answer(tokenizer: Any, chatml: ChatTemplate) -> None:
    answered = row(HI, say("one"), HI, say("two ", weight=0))
    (ids,), answers = encode_questions([answered], tokenizer, chatml)
    assert tokenizer.decode(ids, skip_special=False) == (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\none<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert answers == ["two "]
    assert [*map(tokenizer.encode, prompt_texts([answered, row(HI, say("one"), HI)], tokenizer, chatml))] == [ids] * 2


def test_prompt_and_completion_join_plainly(make_tokenizer: Callable[..., Any]) -> None:
    tokenizer = make_tokenizer(("<s>", "</s>"), None, "</s>")
    example = encoded(row({"role": "user", "content": "2+2="}, say("4")), tokenizer, template_for(tokenizer, "plain"))
    assert tokenizer.decode(example.ids, skip_special=False) == "2+2=4</s>"
    assert trained_text(example, tokenizer) == "4</s>"


WORDS = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=12).filter(str.strip)


TURNS = st.lists(st.tuples(WORDS, WORDS, st.sampled_from([0, 1])), min_size=1, max_size=4)


@given(turns=TURNS.filter(lambda turns: any(weight for *_, weight in turns)))
def test_the_trained_text_is_the_answers_and_their_ends(turns: list[tuple[str, str, int]], tokenizer: Any) -> None:
    """Decoding the trained tokens gives exactly the answers of weight 1, each with its end-of-turn token."""
    messages = [m for q, a, w in turns for m in ({"role": "user", "content": q}, say(a, weight=w))]
    example = encoded(row(*messages), tokenizer, ChatTemplate(builtin("chatml")))
    assert trained_text(example, tokenizer) == "".join(f"{a}<|im_end|>" for _, a, w in turns if w)
    assert tokenizer.decode(example.ids, skip_special=False) == example.text
