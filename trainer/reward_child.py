"""The program that runs a user's reward function, apart from the training: JSON lines in, JSON lines out.

`python reward_child.py FILE FUNCTION`. It says {"parameters": [...]} or {"failed": ...} once, and answers each line
[argument, ...] with {"value": ...} or {"failed": ...}. What the function prints goes to standard error, and what it
reads is empty.
"""

import ctypes
import inspect
import json
import os
import runpy
import signal
import sys
from typing import Any


def told(error: BaseException) -> str:
    """One line about what was raised, with the line of the file where it was."""
    frame, line = error.__traceback__, 0
    while frame is not None:
        line, frame = (frame.tb_lineno if frame.tb_frame.f_code.co_filename == sys.argv[1] else line), frame.tb_next
    return f"raised {type(error).__name__}: {error}".strip().replace("\n", " ")[:300] + f" (line {line})" * (line > 0)


def main() -> None:
    """Load the function, say so, and answer calls until there are no more."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: it ends with the training, however that ends
    requests, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    file, name = sys.argv[1:3]
    sys.path.insert(0, os.path.dirname(os.path.abspath(file)))  # as for a program of its own

    def say(**told: Any) -> None:
        print(json.dumps(told), file=answers, flush=True)

    try:
        function = runpy.run_path(file, run_name="rewards").get(name)
        if not callable(function):
            return say(failed=f"has no function {name!r}")
        say(parameters=[*inspect.signature(function).parameters])
    except Exception as error:
        return say(failed=told(error))
    born = os.getpid()
    for line in requests:
        try:
            value = json.dumps({"value": function(*json.loads(line))}, default=float)
        except Exception as error:
            value = json.dumps({"failed": told(error)})
        if os.getpid() != born:  # a fork that the function left: its answer would be taken for the next one
            os._exit(0)
        print(value, file=answers, flush=True)


if __name__ == "__main__":
    main()
