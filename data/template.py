"""Chat templates: messages in, the exact text a model sees out.

A template is a program that comes with a model, so it is treated as one: the first rendering of each happens in a child
process with limits on memory and time, all later ones in a sandbox that counts (see `sandbox.py`).
"""

import json
import os
import subprocess
import sys
from datetime import date as Date
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..errors import EnvironmentProblem, InputError
from .protocol import TokenizerLike

MAX_SOURCE_BYTES = 64 * 1024
CHILD_WALL_SECONDS = 300  # for a machine that is busy; the limit that counts is on processor time
SHOWN_ERROR = 500
MAX_STRIKES = 3
CHILD_ENVIRONMENT = ("PATH", "LD_LIBRARY_PATH", "SYSTEMROOT")  # what starting an interpreter may need

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for message in messages %}{{ '<|start_header_id|>' + message['role'] }}"
    "{{ '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
ZEPHYR = (
    "{{ bos_token }}{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] }}"
    "{{ eos_token + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
PLAIN = (
    "{{ bos_token }}{% for message in messages %}{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
)
BUILTINS = {"chatml": CHATML, "llama3": LLAMA3, "zephyr": ZEPHYR, "plain": PLAIN}


class Unrenderable(InputError):
    """A template that works, but not on these messages."""


class ChatTemplate:
    """A chat template in Jinja, as Hugging Face writes them.

    `date` (ISO, such as "2025-01-31") fixes what `strftime_now` gives; None is the present. `notice` is a sentence for
    the user about where the template came from, or "". Rendering raises InputError for a template that is broken or
    breaks a limit, and its subclass Unrenderable for messages that it does not suit; both name `name`.
    """

    def __init__(
        self,
        source: str,
        bos_token: str = "",
        eos_token: str = "",
        *,
        name: str = "chat template",
        date: str | None = None,
    ) -> None:
        size = len(source.encode("utf-8", "surrogatepass"))
        if size > MAX_SOURCE_BYTES:
            raise InputError(f"{name}: the chat template has {size} bytes; at most {MAX_SOURCE_BYTES} are allowed.")
        if date is not None:
            Date.fromisoformat(date)
        self.source, self.bos_token, self.eos_token = source, bos_token, eos_token
        self.name, self.date, self.notice = name, date, ""

    def render(
        self,
        messages: list[dict[str, Any]],
        *,
        add_generation_prompt: bool = False,
        tools: list[dict[str, Any]] | None = None,
    ) -> str:
        """The text for `messages`; with `add_generation_prompt` it ends where the assistant's answer begins."""
        variables = {
            "messages": [{key: value for key, value in message.items() if key != "weight"} for message in messages],
            "add_generation_prompt": add_generation_prompt,
            "tools": tools,
            "bos_token": self.bos_token,
            "eos_token": self.eos_token,
        }
        return _checked(self.source).render(variables, self.date, self.name)


class _Checked:
    """One template source of this process: its first rendering goes to a child, the rest happen here.

    A source that is broken or breaks a limit in the child stays refused, as no row can mend it; so does one that later
    takes too much for three rows.
    """

    def __init__(self, source: str) -> None:
        self.source = source
        self.compiled: Any = None
        self.broken = ""
        self.strikes = 0

    def render(self, variables: dict[str, Any], date: str | None, name: str) -> str:
        from . import sandbox

        if self.compiled is None and not self.broken:
            self._check(variables, date)
        if self.broken:
            raise InputError(f"{name}: the chat template cannot be used: {self.broken[:SHOWN_ERROR].rstrip('.')}.")
        try:
            box, template = self.compiled
            return sandbox.render(box, template, variables, date)
        except sandbox.Refused as error:
            if isinstance(error, sandbox.TooMuch):
                self.strikes += 1
                self.broken = str(error) if self.strikes >= MAX_STRIKES else ""
            raise Unrenderable(f"{name}: the template cannot render this: {str(error)[:SHOWN_ERROR]}") from None

    def _check(self, variables: dict[str, Any], date: str | None) -> None:
        """Render once in the child; only a template that came through is compiled in this process."""
        from . import sandbox

        self.broken = _broken_in_child(self.source, variables, date)
        if not self.broken:
            self.compiled = sandbox.compile_template(self.source)


@lru_cache(maxsize=64)
def _checked(source: str) -> _Checked:
    return _Checked(source)


def _broken_in_child(source: str, variables: dict[str, Any], date: str | None) -> str:
    """What makes the template unusable for any row, or "", tried in a fresh interpreter that imports jinja2 alone."""
    import jinja2
    import markupsafe

    from . import sandbox
    from .sandbox import CHILD_MEMORY, CHILD_SECONDS

    folders = [str(Path(module.__file__).parent.parent) for module in (jinja2, markupsafe) if module.__file__]
    start = "import sys, runpy; sys.path += sys.argv[2:]; runpy.run_path(sys.argv[1], run_name='__main__')"
    job = json.dumps({"source": source, "variables": variables, "date": date})
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-X", "utf8", "-c", start, sandbox.__file__, *folders],
            input=job.encode(),
            capture_output=True,
            timeout=CHILD_WALL_SECONDS,
            env={key: os.environ[key] for key in CHILD_ENVIRONMENT if key in os.environ},
        )
    except subprocess.TimeoutExpired:
        return f"it did not render one conversation in {CHILD_WALL_SECONDS} seconds"
    except OSError as error:
        raise EnvironmentProblem(f"the child process that tries chat templates does not start: {error}") from None
    if done.returncode == 0:
        return str(json.loads(done.stdout).get("broken", ""))
    last = done.stderr.decode(errors="replace").strip().rpartition("\n")[2]
    if done.returncode > 0 and "MemoryError" not in last:
        raise EnvironmentProblem(f"the child process that tries chat templates does not run here: {last}")
    return f"rendering one conversation took more than {CHILD_SECONDS} seconds or {CHILD_MEMORY // 2**20} MiB"


def template_for(
    tokenizer: TokenizerLike,
    override: "str | os.PathLike[str] | ChatTemplate | None" = None,
    *,
    date: str | None = None,
) -> ChatTemplate:
    """The template to use: `override` (a built-in's name, a file, a template), else the tokenizer's, else a built-in.

    A tokenizer without a template gets chatml if its vocabulary has chatml's two tokens, else zephyr, whose marks are
    plain text and whose turns end in the end-of-text token: so no token is ever added. `.notice` says so.
    """
    if isinstance(override, ChatTemplate):
        return override
    if override is not None:
        return _named(tokenizer, override, date)
    if tokenizer.chat_template:
        bos, eos = tokenizer.bos_token or "", tokenizer.eos_token or ""
        return ChatTemplate(tokenizer.chat_template, bos, eos, name="the model's own template", date=date)
    known = all(len(tokenizer.encode(mark)) == 1 for mark in ("<|im_start|>", "<|im_end|>"))
    template = _builtin(tokenizer, "chatml" if known else "zephyr", date)
    why = (
        "its two tokens are in the vocabulary"
        if known
        else "its marks are plain text and turns end in the end-of-text token"
    )
    template.notice = f"the model has no chat template: using {template.name} ({why}; no new tokens are added)"
    return template


def _named(tokenizer: TokenizerLike, override: str | os.PathLike[str], date: str | None) -> ChatTemplate:
    name = os.fspath(override)
    if name in BUILTINS:
        return _builtin(tokenizer, name, date)
    path = Path(name)
    if not path.is_file():
        known = ", ".join(sorted(BUILTINS))
        raise InputError(
            f"template {name!r}: neither a built-in ({known}) nor a file: name one of those or a .jinja file."
        )
    if path.stat().st_size > MAX_SOURCE_BYTES:
        raise InputError(
            f"{name}: the chat template has {path.stat().st_size} bytes; at most {MAX_SOURCE_BYTES} are allowed."
        )
    try:
        source = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{name}: the chat template cannot be read: {error}.") from None
    return ChatTemplate(source, tokenizer.bos_token or "", tokenizer.eos_token or "", name=name, date=date)


def _builtin(tokenizer: TokenizerLike, name: str, date: str | None) -> ChatTemplate:
    bos = (tokenizer.bos_token or "") if name == "llama3" or _expects_bos(tokenizer) else ""
    return ChatTemplate(BUILTINS[name], bos, tokenizer.eos_token or "", name=name, date=date)


def _expects_bos(tokenizer: TokenizerLike) -> bool:
    """Whether texts begin with BOS for this model: its own template says, else a BOS that is not also EOS is one."""
    if tokenizer.chat_template:
        return "bos_token" in tokenizer.chat_template
    return tokenizer.bos_token is not None and tokenizer.bos_id != tokenizer.eos_id
