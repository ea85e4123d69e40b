"""The public API, walked: what `__all__` lists is documented, has types, and is all that the docs use."""

import inspect
import re
import typing
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
from torch import Tensor

import fourbit

SHAPES = r"\[[\w, .*/+]*\]|0-d|shape"
OF_TORCH = {"state_dict", "load_state_dict", "add_param_group", "params"}  # whose types torch.optim says
ERRORS = r"Error|EnvironmentProblem|raises if"
NAMESPACES = [fourbit, *(value for name in fourbit.__all__ if isinstance(value := getattr(fourbit, name), ModuleType))]
NAMED = {
    f"{space.__name__}.{name}": getattr(space, name)
    for space in NAMESPACES
    for name in space.__all__
    if not isinstance(getattr(space, name), ModuleType)
}


def members(value: type) -> Iterator[tuple[str, Any]]:
    """What a class has of ours: methods, and properties by their getters; nothing that torch or dataclasses wrote."""
    for kind in value.__mro__:
        for name, member in vars(kind).items():
            member = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
            own = inspect.isfunction(member) and member.__code__.co_filename != "<string>"
            if own and kind.__module__.startswith("fourbit") and (not name.startswith("_") or name == "__init__"):
                yield name, member


PUBLIC = {path: (value, "") for path, value in NAMED.items()}  # -> a function or class, and what its class says
for path, value in NAMED.items():
    if inspect.isclass(value) and not getattr(value, "_is_protocol", False):  # its class says what it asks for
        said = inspect.getdoc(value) or ""
        found = {name: member for name, member in reversed([*members(value)])}
        PUBLIC |= {f"{path}.{name}": (member, said) for name, member in found.items()}


def parts(hint: Any) -> Iterator[Any]:
    yield hint
    for inner in typing.get_args(hint):
        yield from parts(inner) if not isinstance(inner, list) else (p for each in inner for p in parts(each))


def faults(name: str, value: Any, of_class: str) -> Iterator[str]:
    """What a function or class lacks. A constructor and `forward` are described by their class."""
    doc = inspect.getdoc(value) or ""
    said = f"{doc}\n{of_class}"
    if name != "__init__" and not (value.__doc__ or doc):
        yield "has no docstring"
    hints = typing.get_type_hints(value)
    if inspect.isclass(value):
        hints = {key: hint for key, hint in hints.items() if key in value.__annotations__ and not key.startswith("_")}
    for key, hint in hints.items():
        if not {name, key} & OF_TORCH and any(part is Any for part in parts(hint)):
            yield f"{key} is Any"
    if not inspect.isfunction(value):
        return
    if name in ("__init__", "forward"):
        doc = said
    takes = [key for key, hint in hints.items() if key != "return" and hint in (Tensor, Tensor | None)]
    if takes and not re.search(SHAPES, doc):
        yield f"does not say the shape of {', '.join(takes)}"
    if re.search(r"\braise (?!NotImplemented|self|problem)\w", inspect.getsource(value)) and not re.search(
        ERRORS, said
    ):
        yield "does not say what it raises"


@pytest.mark.parametrize("path", PUBLIC)
def test_what_is_public_is_documented_and_typed(path: str) -> None:
    value, of_class = PUBLIC[path]
    assert not list(faults(path.rpartition(".")[2], value, of_class))
