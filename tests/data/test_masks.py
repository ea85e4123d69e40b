"""The loss mask over eight chat templates as models bring them (written here from their formats, in small).

For each: exactly the answers and their end-of-turn tokens are trained, the last trained label of every example is the
end-of-turn token, also where the padding token has the same id, there is one BOS at most, and the prompt a model is
given when it answers is the very beginning of what it was trained on.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import pytest

from fourbit.data.batch import Encoded, Example, pad
from fourbit.data.encode import encode, encode_questions
from fourbit.data.row import Place
from fourbit.data.sample import Sample
from fourbit.data.template import ChatTemplate, builtin, template_for


def encoded(sample: Sample, tokenizer: Any, template: ChatTemplate, **options: Any) -> Encoded:
    """The one conversation of a sample in tokens. Raises BadRow."""
    ((_, parts),) = encode([sample], tokenizer, template, **options)
    return parts[0]


@dataclass(frozen=True)
class Format:
    """A model's chat format: its template, its special tokens, and what a plain two-turn talk looks like in it."""

    source: str
    specials: tuple[str, ...]
    bos: str | None
    eos: str
    end: str  # of an assistant turn
    text: str
    stops: tuple[str, ...] = ()
    lead: str = ""  # what the template puts between generation prompt and content


SMOLLM2 = Format(
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    "<|im_start|>",
    "<|im_end|>",
    "<|im_end|>",
    "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello!<|im_end|>\n"
    "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\nBecause\nso.<|im_end|>\n",
)
LLAMA3 = Format(
    "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' +"
    " message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
    ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|eot_id|>",
    "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nHello!<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nWhy?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nBecause\nso.<|eot_id|>",
    ("<|eot_id|>",),
)
QWEN25 = Format(
    "{%- if tools %}\n{{- '<|im_start|>system\\n# Tools\\n' }}{%- for tool in tools %}{{- '\\n' }}{{- tool | tojson }}"
    "{%- endfor %}{{- '<|im_end|>\\n' }}\n{%- else %}\n    {%- if messages[0]['role'] == 'system' %}\n"
    "        {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}\n    {%- else %}\n"
    "        {{- '<|im_start|>system\\nYou are Qwen.<|im_end|>\\n' }}\n    {%- endif %}\n{%- endif %}\n"
    "{%- for message in messages %}\n"
    '    {%- if (message.role == "user") or (message.role == "system" and not loop.first)'
    ' or (message.role == "assistant" and not message.tool_calls) %}\n'
    "        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}\n"
    "    {%- elif message.role == \"assistant\" %}\n        {{- '<|im_start|>' + message.role }}\n"
    "        {%- for tool_call in message.tool_calls %}\n            {%- if tool_call.function is defined %}\n"
    "                {%- set tool_call = tool_call.function %}\n            {%- endif %}\n"
    '            {{- \'\\n<tool_call>\\n{"name": "\' }}{{- tool_call.name }}{{- \'", "arguments": \' }}'
    "{{- tool_call.arguments | tojson }}{{- '}\\n</tool_call>' }}\n        {%- endfor %}\n"
    "        {{- '<|im_end|>\\n' }}\n    {%- endif %}\n{%- endfor %}\n"
    "{%- if add_generation_prompt %}\n    {{- '<|im_start|>assistant\\n' }}\n{%- endif %}\n",
    ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    None,
    "<|im_end|>",
    "<|im_end|>",
    "<|im_start|>system\nYou are Qwen.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
    "<|im_start|>assistant\nHello!<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n"
    "<|im_start|>assistant\nBecause\nso.<|im_end|>\n",
    ("<|endoftext|>",),
)
MISTRAL = Format(
    "{{ bos_token }}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] + eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}",
    ("<unk>", "<s>", "</s>"),
    "<s>",
    "</s>",
    "</s>",
    "<s>[INST] Hi [/INST] Hello!</s>[INST] Why? [/INST] Because\nso.</s>",
    lead=" ",
)
GEMMA = Format(
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}"
    "{% for message in messages %}{% if (message['role'] == 'assistant') %}{% set role = 'model' %}"
    "{% else %}{% set role = message['role'] %}{% endif %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}",
    ("<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"),
    "<bos>",
    "<eos>",
    "<end_of_turn>",
    "<bos><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\nHello!<end_of_turn>\n"
    "<start_of_turn>user\nWhy?<end_of_turn>\n<start_of_turn>model\nBecause\nso.<end_of_turn>\n",
    ("<end_of_turn>",),
)
ZEPHYR = Format(
    "{% for message in messages %}\n"
    "{% if message['role'] == 'user' %}\n{{ '<|user|>\n' + message['content'] + eos_token }}\n"
    "{% elif message['role'] == 'system' %}\n{{ '<|system|>\n' + message['content'] + eos_token }}\n"
    "{% elif message['role'] == 'assistant' %}\n{{ '<|assistant|>\n'  + message['content'] + eos_token }}\n"
    "{% endif %}\n"
    "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}",
    ("<unk>", "<s>", "</s>"),
    "<s>",
    "</s>",
    "</s>",
    "<|user|>\nHi</s>\n<|assistant|>\nHello!</s>\n<|user|>\nWhy?</s>\n<|assistant|>\nBecause\nso.</s>\n",
)
PHI3 = Format(
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{'<|system|>\n' + message['content'] + '<|end|>\n'}}"
    "{% elif message['role'] == 'user' %}{{'<|user|>\n' + message['content'] + '<|end|>\n'}}"
    "{% elif message['role'] == 'assistant' %}{{'<|assistant|>\n' + message['content'] + '<|end|>\n'}}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}",
    ("<s>", "<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
    "<s>",
    "<|endoftext|>",
    "<|end|>",
    "<|user|>\nHi<|end|>\n<|assistant|>\nHello!<|end|>\n<|user|>\nWhy?<|end|>\n<|assistant|>\nBecause\nso.<|end|>\n"
    "<|endoftext|>",
    ("<|end|>",),
)
CHATML = Format(
    builtin("chatml"),
    ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    "<|endoftext|>",
    "<|endoftext|>",
    "<|im_end|>",
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello!<|im_end|>\n"
    "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\nBecause\nso.<|im_end|>\n",
    ("<|im_end|>",),
)
FORMATS = {
    "smollm2": SMOLLM2,
    "llama3": LLAMA3,
    "qwen2.5": QWEN25,
    "mistral": MISTRAL,
    "gemma": GEMMA,
    "zephyr": ZEPHYR,
    "phi3": PHI3,
    "chatml": CHATML,
}
WITH_SYSTEM = [name for name in FORMATS if name not in ("mistral", "gemma")]


def talk(*contents: str, system: str | None = None, weights: Sequence[int] = ()) -> Sample:
    """User and assistant in turn; `weights` of the assistant's turns."""
    messages: list[dict[str, Any]] = [] if system is None else [{"role": "system", "content": system}]
    for i, content in enumerate(contents):
        messages.append({"role": ("user", "assistant")[i % 2], "content": content})
        if i % 2 and weights:
            messages[-1]["weight"] = weights[i // 2]
    return Sample([], (messages,), Place("rows.jsonl", 1))


TALK = talk("Hi", "Hello!", "Why?", "Because\nso.")


@pytest.fixture(params=FORMATS)
def made(request: pytest.FixtureRequest, make_tokenizer: Callable[..., Any]) -> tuple[Format, Any, ChatTemplate]:
    form = FORMATS[request.param]
    tokenizer = make_tokenizer(form.specials, form.bos, form.eos, form.stops, form.source)
    return form, tokenizer, template_for(tokenizer)


def trained_runs(example: Encoded, tokenizer: Any) -> list[str]:
    """The text of each unbroken run of trained tokens."""
    pairs = groupby(zip(example.ids, example.trained, strict=True), key=lambda pair: pair[1])
    return [tokenizer.decode([token for token, _ in run], skip_special=False) for trained, run in pairs if trained]


def test_the_template_gives_the_models_own_format(made: tuple[Format, Any, ChatTemplate]) -> None:
    form, _, template = made
    assert template.render(TALK.answers[0]) == form.text


def test_transformers_renders_the_same(made: tuple[Format, Any, ChatTemplate]) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    form, _, template = made
    tokens = {"bos_token": form.bos or "", "eos_token": form.eos}
    for upto, generate in [(4, False), (3, True), (1, True), (2, False)]:
        messages = TALK.answers[0][:upto]
        theirs, _ = render_jinja_template(
            [messages], chat_template=form.source, add_generation_prompt=generate, **tokens
        )
        assert template.render(messages, add_generation_prompt=generate) == theirs[0]


def test_exactly_the_answers_and_their_ends_are_trained(made: tuple[Format, Any, ChatTemplate]) -> None:
    form, tokenizer, template = made
    example = encoded(TALK, tokenizer, template)
    assert trained_runs(example, tokenizer) == [f"{form.lead}Hello!{form.end}", f"{form.lead}Because\nso.{form.end}"]
    assert tokenizer.decode(example.ids, skip_special=False) == form.text == example.text
    assert example.notes == ()
    assert example.source == "rows.jsonl:1"


def test_last_and_all_and_weights(made: tuple[Format, Any, ChatTemplate]) -> None:
    form, tokenizer, template = made
    first, second = f"{form.lead}Hello!{form.end}", f"{form.lead}Because\nso.{form.end}"
    last = encoded(TALK, tokenizer, template, loss_on="last")
    assert trained_runs(last, tokenizer) == [second]
    everything = encoded(TALK, tokenizer, template, loss_on="all")
    assert everything.ids == last.ids and everything.trained == [False] + [True] * (len(last.ids) - 1)
    for weights, runs in [((0, 1), [second]), ((1, 0), [first]), ((1, 1), [first, second])]:
        conv = talk("Hi", "Hello!", "Why?", "Because\nso.", weights=weights)
        assert trained_runs(encoded(conv, tokenizer, template), tokenizer) == runs


@pytest.mark.parametrize(
    "answer", ["Yes", "Yes.\n", "  Two  spaces", "caf\u00e9 \U0001f600", "a\n\nb\n", "end", "user"]
)
def test_the_last_trained_label_is_the_end_of_turn_token_even_if_it_pads(
    made: tuple[Format, Any, ChatTemplate], answer: str
) -> None:
    form, tokenizer, template = made
    end = tokenizer.id(form.end)
    for conv in (talk("Hi", answer), talk("A", "B", "C", answer)):
        example = encoded(conv, tokenizer, template)
        assert [token for token, trained in zip(example.ids, example.trained, strict=True) if trained][-1] == end
        batch = pad(
            [
                (0, Example((example,))),
                (1, Example((replace(example, ids=example.ids + [end] * 3, trained=example.trained + [False] * 3),))),
            ],
            pad_id=end,
        )
        count = sum(example.trained)
        assert batch.trained == 2 * count and batch.targets[[count - 1, -1]].tolist() == [end, end]


def test_there_is_one_bos_at_most(made: tuple[Format, Any, ChatTemplate]) -> None:
    form, tokenizer, template = made
    ids = encoded(TALK, tokenizer, template).ids
    if "bos_token" in form.source:
        assert ids.count(tokenizer.bos_id) == 1 and ids[0] == tokenizer.bos_id


def test_a_model_answers_after_the_very_tokens_it_was_trained_on(made: tuple[Format, Any, ChatTemplate]) -> None:
    _, tokenizer, template = made
    example = encoded(TALK, tokenizer, template, loss_on="last")
    (prompt,), (answer,) = encode_questions([TALK], tokenizer, template)
    assert answer.strip() == "Because\nso."
    assert example.ids[: len(prompt)] == prompt
    assert example.trained.index(True) == len(prompt)


@pytest.mark.parametrize("name", WITH_SYSTEM)
def test_a_system_message_is_context(name: str, make_tokenizer: Callable[..., Any]) -> None:
    form = FORMATS[name]
    tokenizer = make_tokenizer(form.specials, form.bos, form.eos, form.stops, form.source)
    conv = talk("Hi", "Hello!", system="Be brief.")
    example = encoded(conv, tokenizer, template_for(tokenizer))
    assert "Be brief." in example.text
    assert trained_runs(example, tokenizer) == [f"Hello!{form.end}"]


def test_a_tool_call_is_trained_and_its_result_is_not(make_tokenizer: Callable[..., Any]) -> None:
    tokenizer = make_tokenizer(QWEN25.specials, None, QWEN25.eos, QWEN25.stops, QWEN25.source)
    call = {"type": "function", "function": {"name": "look", "arguments": {"at": "caf\u00e9 <1>"}}}
    messages = [
        {"role": "user", "content": "Look."},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "user", "content": "I see it."},
        {"role": "assistant", "content": "Good."},
    ]
    example = encoded(Sample([], (messages,), Place("f", 1), [{"name": "look"}]), tokenizer, template_for(tokenizer))
    assert trained_runs(example, tokenizer) == [
        '<tool_call>\n{"name": "look", "arguments": {"at": "caf\u00e9 <1>"}}\n</tool_call><|im_end|>',
        "Good.<|im_end|>",
    ]
    assert '# Tools\n\n{"name": "look"}<|im_end|>' in example.text
