"""What an answer is worth: checks of ours, a user's functions, reward models; several with weights, each shown apart.

A user's file runs in a process of its own with a time limit for each call. What raises, hangs, ends the process or
returns no number is a failure with a name and a count, and the answer has no reward from there; it never ends a run.
"""

import json
import math
import re
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..child import Child
from ..data.batch import Encoded, Example
from ..data.protocol import TokenizerLike
from ..errors import EnvironmentProblem, InputError, shown
from ..lora.active import using
from ..lora.linear4bit import Module4bit
from ..lora.peft_files import load_adapter, trained_base
from ..models.generate import Sampled
from ..models.protocol import CausalLM
from .evaluate import Match, matches
from .reward_model import HEAD, RewardModel, read_head

LARGEST = 1e9  # of a reward, either way: squares of what is beyond it would not be numbers in fp32
EXPECTED = ("answer", "completion", "output", "expected", "solution", "ground_truth")  # fields of a row, first found
NUMBER = re.compile(r"(?:(?<!\d)[-+])?\d+(?:,\d{3})*(?:\.\d+)?")
KINDS_OF_FAILURES = 20  # that are told apart: a message may hold the answer
RewardFunction = Callable[[str, str, dict[str, object]], object]  # prompt, answer, row -> a number


class Failed(Exception):
    """Why an answer has no reward, in one line."""


@dataclass(frozen=True)
class Answered:
    """An answer to be judged: the prompt and the answer as texts, the row of the prompt, and both as tokens."""

    prompt: str
    answer: str
    row: Mapping[str, Any]
    example: Example


def answered(
    tokenizer: TokenizerLike, row: Mapping[str, Any], prompt: str, ids: Sequence[int], made: Sampled
) -> Answered:
    """An answer as rewards take it, its text up to the token that ended it. prompt, ids: what it answers."""
    said = tokenizer.decode(made.ids[: len(made.ids) - made.ended], skip_special=False)
    return Answered(prompt, said, row, rated(ids, made.ids))


def rated(prompt: Sequence[int], answer: Sequence[int]) -> Example:
    """A prompt and an answer as an example whose answer is rated."""
    return Example((Encoded([*prompt, *answer], [False] * len(prompt) + [True] * len(answer)),), label=True)


Judge = Callable[[Sequence[Answered]], Sequence[object]]  # a number or a `Failed` for each


Earned = dict[str, float]  # by an answer: `reward/NAME` from each source, NaN where it failed, and their sum, `reward`


class Rewards:
    """Judges answers by all sources. given: names and (weight, judge); one of weight 0 is shown and not earned. failed:
    the reward where a source failed; None: the whole answer has none then, and teaches nothing. `failures` counts what
    failed, so far."""

    def __init__(self, given: Mapping[str, tuple[float, Judge]], failed: float | None = None) -> None:
        self.given, self.failed, self.failures = given, failed, Counter[str]()

    def __call__(self, answers: Sequence[Answered]) -> list[Earned]:
        earned: list[Earned] = [{"reward": 0.0} for _ in answers]
        for name, (weight, judge) in self.given.items():
            for found, own in zip(judge(answers), earned, strict=True):
                try:
                    value = own[f"reward/{name}"] = number(found)
                except Failed as failure:
                    what = f"{name}: {failure}"
                    told_apart = what in self.failures or len(self.failures) < KINDS_OF_FAILURES
                    self.failures[what if told_apart else "other failures"] += 1
                    own[f"reward/{name}"] = math.nan
                    value = math.nan if self.failed is None else self.failed
                own["reward"] += weight * value if weight else 0.0  # and not NaN
        return earned


def number(value: object) -> float:
    """A reward as a float. Raises Failed for what is none, or one that was raised before."""
    if isinstance(value, Failed):
        raise value
    try:
        found = float(value) if not isinstance(value, str | bytes) else None  # type: ignore[arg-type]  # tried
    except Exception:
        found = None
    if found is None:
        raise Failed(f"gave {shown(value, 40)}, which is no number")
    if not abs(found) <= LARGEST:
        raise Failed(f"gave {found:g}: a reward is a number from -1e9 to 1e9")
    return found


def each(function: RewardFunction) -> Judge:
    """A judge of one's own function, which runs in this process: f(prompt, answer, row)."""

    def judge(answers: Sequence[Answered]) -> list[object]:
        made = list[object]()
        for one in answers:
            try:
                made.append(function(one.prompt, one.answer, dict(one.row)))
            except Failed as why:
                made.append(why)
            except Exception as error:
                made.append(Failed(f"raised {type(error).__name__}: {shown(str(error))[1:-1]}"))
        return made

    return judge


def by_model(scores: RewardModel, adapter: str) -> Judge:
    """A judge by a reward model whose adapter of that name is on the policy's own base."""

    def judge(answers: Sequence[Answered]) -> list[float]:
        with using(scores.model, adapter):
            return scores.rate([one.example for one in answers])

    return judge


def rewards_of(
    specs: Sequence[str],
    model: CausalLM,
    *,
    seconds: float = 10.0,
    failed: float | None = None,
    force: bool = False,
    tell: Callable[[str], object] = warnings.warn,
) -> Rewards:
    """Rewards as texts name them, each NAME or NAME=WEIGHT: a check (`check`), FILE.py:FUNCTION, or the folder of a
    reward model, whose adapter is put on the model, frozen and not active; force, tell: as `load_adapter` has them.
    seconds: what a call of a function may take. failed: as `Rewards`. Raises InputError for a name that is none of
    these, or comes twice, and for a reward model of another base, or with 4-bit codes of its own."""
    given = dict[str, tuple[float, Judge]]()
    for spec in specs:
        name, weight = named(spec)
        file, _, function = name.rpartition(":")
        if (found := check(name)) is not None:
            judge = each(found)
        elif file.endswith(".py"):
            judge = Worker(file, function, seconds)
        elif (Path(name) / HEAD).is_file():
            own = f"reward-{len(given) + 1}"
            head, identity = read_head(model, name), trained_base(Path(name))
            packed = any(isinstance(module, Module4bit) for module in model.modules())
            if packed and identity is not None and identity.start:
                raise InputError(
                    f"reward {name} began as start={identity.start!r} on 4-bit codes of its own, and the policy has "
                    "others: train it with the default start, or give a base that is not in 4 bits (quant_type=None)"
                )
            load_adapter(model, name, name=own, trainable=False, force=force, tell=tell)
            judge = by_model(RewardModel(model, head), own)
        else:
            known = ", ".join([*COMPARED, *(f"{each}:..." for each in ALONE), f"{LAST_LINE}CHECK"])
            raise InputError(
                f"reward {shown(name)} is no check ({known}), no FILE.py:FUNCTION, and no folder of a reward model "
                "(fourbit reward writes one): give one of these"
            )
        if name in given:
            raise InputError(f"reward {shown(name)} is given twice: give it once, with the sum of the weights")
        given[name] = weight, judge
    if given and not any(weight for weight, _ in given.values()):
        raise InputError("every reward has weight 0, so nothing is earned: give one of them a weight")
    return Rewards(given, failed)


def named(spec: str) -> tuple[str, float]:
    """What a reward's text names, and its weight."""
    return (spec, 1.0) if (Path(spec) / HEAD).is_file() else weighed(spec)


def files_of(specs: Sequence[str]) -> list[Path]:
    """The files of functions and the folders of reward models that the texts of rewards name."""
    names = [named(spec)[0] for spec in specs]
    places = [Path(file if (file := name.rpartition(":")[0]).endswith(".py") else name) for name in names]
    return [place for place in places if place.suffix == ".py" or (place / HEAD).is_file()]


def weighed(spec: str) -> tuple[str, float]:
    """NAME=WEIGHT taken apart; it is 1 where no number stands at the end. InputError for one beyond a reward."""
    name, _, weight = spec.rpartition("=")
    try:
        found = float(weight) if name else 1.0
    except ValueError:
        return spec, 1.0
    if not -LARGEST <= found <= LARGEST:
        raise InputError(f"the weight of a reward is a number from -1e9 to 1e9, got {shown(spec)}")
    return name or spec, found


# The checks that need no code.


def expected(row: Mapping[str, Any]) -> str | None:
    """The answer that a row holds: the first field of EXPECTED, or what the last assistant message says."""
    found = next((row[name] for name in EXPECTED if row.get(name) is not None), None)
    if found is None and isinstance(talk := row.get("messages", row.get("conversations")), list) and talk:
        found = talk[-1].get("content", talk[-1].get("value")) if isinstance(talk[-1], dict) else None
        found = found if talk[-1].get("role", talk[-1].get("from")) in ("assistant", "gpt") else None
    return found if isinstance(found, str | None) else json.dumps(found)


def last_number(text: str) -> float | None:
    """The last number of a text, without its commas."""
    found = NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None


def _same_number(answer: str, wanted: str) -> bool:
    return (found := last_number(answer)) is not None and found == last_number(wanted)


def _has_fields(answer: str, names: str) -> bool:
    with suppress(ValueError):
        made = json.loads(answer)
        return isinstance(made, dict) and made.keys() >= {*names.split(",")}
    return False


def _has_words(answer: str, bounds: str) -> bool:
    least, _, most = bounds.partition("-")
    return int(least) <= len(answer.split()) <= int(most)


def _has_format(answer: str, pattern: str) -> bool:
    return re.fullmatch(pattern, answer.strip(), re.DOTALL) is not None


def _alike(match: Match) -> Callable[[str, str], bool]:
    return lambda answer, wanted: matches(answer, wanted, wanted, match)


COMPARED: dict[str, Callable[[str, str], bool]] = {
    **{name: _alike(name) for name in ("exact", "contains", "regex", "json")},
    "number": _same_number,
}
"""Checks of an answer against the one that its row holds."""
ALONE: dict[str, tuple[str, Callable[[str, str], bool]]] = {
    "fields": (r"[^,]+(,[^,]+)*", _has_fields),  # a JSON object with these
    "words": (r"\d{1,9}-\d{1,9}", _has_words),  # so many
    "format": (r"[\s\S]+", _has_format),
}
"""Checks of an answer against what they are told: a regular expression of that, and the check."""
LAST_LINE = "last-line:"


def check(spec: str) -> RewardFunction | None:
    """The check of ours that a text names, 1.0 where it holds and 0.0 where not; None for a text that names none.
    Raises InputError for one that is told what it cannot be told."""
    if spec.startswith(LAST_LINE):
        inner = check(spec.removeprefix(LAST_LINE))
        return inner and (lambda prompt, answer, row: inner(prompt, answer.strip().rpartition("\n")[2], row))
    name, _, told = spec.partition(":")
    if spec not in COMPARED and name not in ALONE:
        return None
    wanted, holds = ALONE.get(name) or ("", COMPARED[spec])
    try:
        if not re.fullmatch(wanted, told):
            raise InputError(f"the reward {name} is told what matches {wanted}, got {shown(told)}")
        re.compile(told if name == "format" else "")
    except re.error as error:
        raise InputError(f"the reward {shown(spec)} is no regular expression: {error}") from None

    def score(prompt: str, answer: str, row: Mapping[str, Any]) -> float:
        if (other := told or expected(row)) is None:
            raise Failed("has no answer in the row to compare with")
        return float(holds(answer, other))

    return score


# A user's file.


class Worker:
    """A user's function in a process of its own, a judge. It is started on first need, and again after it ended.

    file: a Python file. function: its name: f(prompt, answer, row), or with a first parameter `prompts` one for many:
    f(prompts, answers, rows). seconds: what a call may take. Raises InputError for a file that cannot be run or a
    function that is not there."""

    def __init__(self, file: str | Path, function: str, seconds: float = 10.0) -> None:
        self.file, self.function, self.seconds = Path(file), function, seconds
        self.child: Child | None = None
        self.parameters: Sequence[str] = ()
        self._start()

    def __call__(self, answers: Sequence[Answered]) -> list[Any]:
        if self.parameters[:1] == ["prompts"]:
            columns = [[one.prompt for one in answers], [one.answer for one in answers], [one.row for one in answers]]
            found = self._call(columns)
            if isinstance(found, list) and len(found) == len(answers):
                return found
            wrong = Failed(f"gave {shown(found, 40)}, not a list of {len(answers)} numbers")
            return [found if isinstance(found, Failed) else wrong] * len(answers)
        return [self._call([one.prompt, one.answer, one.row]) for one in answers]

    def _call(self, arguments: Sequence[object]) -> Any:
        """What the function returned, or why it did not."""
        try:
            if self.child is None:
                self._start()
            told = self._ask(json.dumps(arguments, default=str).encode() + b"\n")
        except Failed as failure:
            return failure
        except InputError as error:  # it did start once: this answer has no reward, the run goes on
            return Failed(str(error))
        except BaseException:  # an interrupt, say: its answer would be taken for the next one
            self.stop()
            raise
        return told["value"] if "value" in told else Failed(told["failed"])

    def _start(self) -> None:
        program = Path(__file__).with_name("reward_child.py")
        try:
            self.child = Child([sys.executable, "-P", str(program), str(self.file), self.function])
        except OSError as error:
            raise EnvironmentProblem(f"the process of the reward {self.file} does not start: {error}") from None
        try:
            told = self._ask(b"")
        except Failed as failure:
            told = {"failed": str(failure)}
        if "failed" in told:
            self.stop()
            raise InputError(f"reward {self.file}:{self.function}: the file {told['failed']}: mend it")
        self.parameters = told["parameters"]
        if len(self.parameters) != 3:
            self.stop()
            raise InputError(
                f"reward {self.file}:{self.function} must take (prompt, answer, row), or (prompts, answers, rows) for "
                f"many at a time, got ({', '.join(self.parameters)})"
            )

    def _ask(self, request: bytes) -> dict[str, Any]:
        """The process' next line, after this request. Raises Failed where none comes, and ends the process."""
        assert self.child is not None
        try:
            return dict(json.loads(self.child.ask(request, self.seconds if request else max(60.0, self.seconds))))
        except TimeoutError:
            why = f"took more than {self.seconds:g} s"
        except EOFError:
            why = "ended its process"
        except (ValueError, TypeError):
            why = "wrote into the stream of its answers"
        self.stop()
        raise Failed(why)

    def stop(self) -> None:
        """End the process and what it started, as also happens when nobody holds this object any more."""
        child, self.child = self.child, None
        if child is not None:
            child.stop()
