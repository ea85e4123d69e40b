"""Shapes and dtypes of tensors, written once, where a function takes them, and checked whenever it is called.

`policy: Annotated[Tensor, "float [2, P]"]` under `@checked` is a floating-point tensor of two rows. A letter stands for
one size in all tensors of a call, "..." for one whole shape: what does not fit is refused, never broadcast.
"""

from collections.abc import Callable
from functools import wraps
from inspect import signature
from typing import Annotated, ParamSpec, TypeVar, get_args, get_origin, get_type_hints

from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")
Rows = Annotated[Tensor, "float [P]"]
Pair = Annotated[Tensor, "float [2, P]"]
Tokens = Annotated[Tensor, "int64 [2, P]"]
Judged = Annotated[Tensor, "bool [P]"]
Number = Annotated[Tensor, "float []"]
Alike = Annotated[Tensor, "float [...]"]
Hidden = Annotated[Tensor, "float [N, D]"]
Targets = Annotated[Tensor, "int64 [N]"]


def checked(function: Callable[P, R]) -> Callable[P, R]:
    """The function, which first raises ValueError unless its tensors have the annotated forms."""
    parameters, forms = list(signature(function).parameters), dict[str, str]()
    for name, hint in get_type_hints(function, include_extras=True).items():
        for each in (hint, *get_args(hint)):  # or one of a union
            if get_origin(each) is Annotated:
                forms[name] = each.__metadata__[0]

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        given, sizes = dict(zip(parameters, args, strict=False)) | kwargs, dict[str, object]()
        tensors = {name: given[name] for name in forms if given.get(name) is not None}
        if not all([_fits(x, forms[name], sizes) for name, x in tensors.items()]):
            wanted = ", ".join(f"{name} {form}" for name, form in forms.items())
            got = ", ".join(f"{name} {_form(x)}" for name, x in tensors.items())
            raise ValueError(f"{function.__qualname__} takes {wanted}; got {got}")
        return function(*args, **kwargs)

    return call


def _fits(x: object, form: str, sizes: dict[str, object]) -> bool:
    """Whether x has this form, its sizes being those that letters stand for already; of new letters they are put in."""
    dtype, shape = form[:-1].split(" [")
    if not isinstance(x, Tensor) or not (x.is_floating_point() if dtype == "float" else _form(x).startswith(dtype)):
        return False
    if shape == "...":
        return bool(sizes.setdefault(shape, x.shape) == x.shape)
    letters = shape.split(", ") if shape else []
    known = [int(a) if a.isdigit() else sizes.setdefault(a, n) for a, n in zip(letters, x.shape, strict=False)]
    return len(letters) == x.ndim and known == list(x.shape)


def _form(x: object) -> str:
    return f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
