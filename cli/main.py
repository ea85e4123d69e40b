"""`fourbit COMMAND ...`: finds the command, runs it, and turns every failure into one clear paragraph and an exit code.

Exit codes: 0 done, 1 a fault of fourbit, 2 bad input, 3 the machine lacks something, 4 out of memory, 5 the disk, 6 NaN
or infinity, 130 Ctrl-C, 143 SIGTERM. Tracebacks come with --debug only.

A command is a module beside this one: `Options`, a dataclass whose docstring heads its help, and
`run(options, sources)`, which returns the exit code. Only the one asked for is imported.
"""

import ctypes
import errno
import importlib
import io
import os
import re
import sys
import traceback
from collections.abc import Sequence

from .. import __version__
from ..errors import FourbitError, InputError, clean
from ..synonyms import hint
from .parse import help_page, parse

COMMANDS = {
    "sft": "fine-tune a model on chat rows: fourbit sft --model M --data train.jsonl --out DIR",
    "dpo": "train on preferred and rejected answers, on top of an adapter or afresh",
    "reward": "train a model that scores answers, from preferred and rejected ones",
    "rl": "train by rewards for a model's own answers: fourbit rl --model M --data P --reward number --out DIR",
    "distill": "train a student to predict what a teacher predicts, on chat rows",
    "plan": "what a fine-tuning takes before it runs: memory by part, what fits, time; no weights are read",
    "eval": "loss, perplexity and exact match on held-out rows, without and with an adapter",
    "generate": "answer every row of a file: fourbit generate --model M --data prompts.jsonl --out answers.jsonl",
    "chat": "talk to a model in the terminal",
    "adapter": "look at an adapter, compare two, make one smaller: fourbit adapter show DIR",
    "merge": "base and adapters as one model, and how much of them it keeps",
    "quantize": "write a model as a folder in 4 bits: fourbit quantize --model M --out DIR --budget 4.0GiB",
    "export": "write a model or an adapter as other tools open it: fourbit export --model M --to gguf --out FILE",
    "data": "look at training data as the model sees it: tokens, what is trained, lengths, problems",
    "doctor": "what is installed, what the machine has, and what will be used",
}
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
OURS = False  # whether the process is: a library leaves its host's allocator alone
PACKAGE = __name__.partition(".")[0]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    args = list(sys.argv[1:] if argv is None else argv)
    if argv is None:
        global OURS
        OURS = True
        give_memory_back()
    debug = "--debug" in args
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # None where it is closed
            stream.reconfigure(errors="replace" if stream is sys.stdin else "backslashreplace")
    try:
        code = _dispatch([arg for arg in args if arg != "--debug"])
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:  # `fourbit data ... | head`
        _drop_output()
        return 0
    except (Exception, KeyboardInterrupt) as error:
        if debug:
            traceback.print_exc()
        message, code = explain(error)
        if isinstance(error, OSError):
            _drop_output()
        if sys.stderr is not None:
            message = "\n".join([message, *getattr(error, "__notes__", ())])
            print(clean(as_flags(message)), file=sys.stderr, flush=True)
    return code


def give_memory_back(size: int = 8 << 20) -> None:
    """Have glibc map blocks of 8 MiB or more one by one, so that they go back to the system when they are freed.

    In its heap, where it puts those of up to 32 MiB, freed blocks stay as holes between what layers keep: most of the
    memory of a step on thousands of tokens. Steps on fewer allocate less at a time and go on in the heap. Other
    allocators, and one that MALLOC_MMAP_THRESHOLD_ or MALLOC_TRIM_THRESHOLD_ have set, stay as they are."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None and not {f"MALLOC_{name}_THRESHOLD_" for name in ("MMAP", "TRIM")} & {*os.environ}:
        mallopt(M_MMAP_THRESHOLD, size)
        mallopt(M_TRIM_THRESHOLD, 64 << 20)  # with the first alone it is 128 KB, and the heap's end comes and goes


def as_flags(message: str) -> str:
    """What the library says of arguments, as the command line has them: `resume="auto"` is --resume auto."""
    said = re.sub(r"\banother (out|match)\b", r"another --\1", message.replace("quant_type=None", "--quant none"))
    said = re.sub(r"\bstart='([\w-]+)'", r"--start \1", said)
    return re.sub(r"\b(dtype|force|overwrite|resume|template)=(True|\.\.\.)", r"--\1", said).replace(
        'resume="auto"', "--resume auto"
    )


def _drop_output() -> None:
    """Let what stdout cannot take go nowhere: else Python says so once more at its exit, with a code of its own."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def explain(error: BaseException) -> tuple[str, int]:
    """The paragraph to print for a failure, and the exit code."""
    if isinstance(error, KeyboardInterrupt):
        return "stopped by Ctrl-C", 130
    if isinstance(error, FourbitError):
        return f"fourbit: {error}", error.exit_code
    what = str(error).strip().partition("\n")[0] or type(error).__name__
    if isinstance(error, ModuleNotFoundError) and error.name and not error.name.startswith(f"{PACKAGE}."):
        needed = error.name.partition(".")[0].replace("yaml", "pyyaml")
        return f"fourbit: needs the package {needed}: pip install {needed}", 3
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        advice = (
            "In training take a smaller --micro-batch or --max-length, or --checkpointing on; for answers a smaller "
            "--batch-size or --max-new-tokens; --quant nf4 makes the model smaller (not with --full)."
        )
        return f"fourbit: out of memory ({what}). {advice}", 4
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"fourbit: the disk is full: {what}", 5
    if isinstance(error, OSError) and error.filename is not None:
        return f"fourbit: {error.filename}: {error.strerror}", 2
    what = f"{type(error).__name__}: {what}"
    return f"fourbit: this is a fault of fourbit, not of your input ({what}). Run again with --debug to see where.", 1


def _dispatch(args: list[str]) -> int:
    name = args[0] if args else "help"
    if name in ("-h", "--help", "help"):
        print(usage())
        return 0
    if name in ("-V", "--version", "version"):
        print(f"fourbit {__version__}")
        return 0
    if name.startswith("-"):
        raise InputError(f"a command comes first, got {name!r}: one of {', '.join(COMMANDS)}")
    if name not in COMMANDS:
        raise InputError(f"unknown command {name!r}" + (hint(name, COMMANDS) or f"; there are {', '.join(COMMANDS)}"))
    command = importlib.import_module(f".{name}", __package__)
    if "-h" in args or "--help" in args:
        print(help_page(command.Options, name))
        return 0
    return int(command.run(*parse(command.Options, name, args[1:])))


def usage() -> str:
    """The page that `fourbit --help` prints."""
    commands = "\n".join(f"  fourbit {name:<9} {about}" for name, about in COMMANDS.items())
    return (
        f"fourbit: fine-tune language models with LoRA and QLoRA\n\n{commands}\n\n"
        "  fourbit COMMAND --help    all flags of a command; each may stand in a YAML file too: fourbit sft run.yaml\n"
        "  fourbit --version         --debug prints tracebacks"
    )
