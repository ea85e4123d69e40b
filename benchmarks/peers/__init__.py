"""Other tools doing the same work, each optional and at its best setting. A file a tool; none is imported by fourbit.

`missing()` of each says why it cannot run here, or None; it is the only function that may be called without the tool.
"""

from functools import cache
from importlib import import_module


def load() -> None:
    """Import every peer that is here, so that none is imported between two measurements."""
    for name in ("bnb", "peft_lora", "torchao_nf4", "torchao_optim", "liger"):
        import_module(f"{__name__}.{name}").missing()


@cache
def import_problem(name: str) -> str | None:
    """Why `name` cannot be imported here, or None. A peer broken by another version is missing too, not an error."""
    try:
        import_module(name)
    except Exception as problem:
        return f"{name}: {type(problem).__name__}: {str(problem).splitlines()[0] if str(problem) else 'no message'}"
    return None
