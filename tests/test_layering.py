"""Imports point one way: cli -> trainer -> {models, data, optim}; models -> lora -> kernels; optim -> kernels;
models, data -> text.

No circle, inside a folder neither; our own modules are imported at the top of a file, but for kernels; and a model is
typed wherever it goes (`models/protocol.py` says what may be asked of it).
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BELOW = {  # layer -> what it may import of ours; everyone may import the leaves
    "kernels": set[str](),
    "text": set[str](),
    "data": {"text"},
    "optim": {"kernels"},
    "lora": {"kernels"},
    "models": {"lora", "kernels", "text"},
    "trainer": {"models", "data", "optim", "lora", "kernels", "text"},
    "cli": {"trainer", "models", "data", "optim", "lora", "kernels", "text", "__version__"},
    "files": set[str](),
    "outputs": set[str](),
    "settings": set[str](),
    "synonyms": set[str](),
    "child": set[str](),
    "errors": set[str](),
}
LEAVES = {"child", "errors", "files", "outputs", "settings", "synonyms"}


MODULES = {
    path.relative_to(ROOT).with_suffix("").parts: path
    for layer in BELOW
    for path in ([ROOT / f"{layer}.py"] if layer in LEAVES else sorted((ROOT / layer).rglob("*.py")))
}
Name = tuple[str, ...]


def imports(source: str, parts: Name) -> Iterator[tuple[Name, bool]]:
    """What the module at `parts` (say, `("lora", "attach")`) imports of ours, each name, and whether in a function."""

    def visit(node: ast.AST, late: bool) -> Iterator[tuple[Name, bool]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                names = [tuple(alias.name.split(".")) for alias in child.names]
                yield from ((name[1:], late) for name in names if name[0] == "fourbit")
            elif isinstance(child, ast.ImportFrom):
                folder = tuple(child.module.split(".")) if child.module else ()
                if child.level or folder[0] == "fourbit":
                    folder = (*parts[: len(parts) - child.level], *folder) if child.level else folder[1:]
                    yield from (((*folder, alias.name), late) for alias in child.names)
            yield from visit(child, late or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef))

    yield from visit(ast.parse(source), False)


def wrong_arrows(source: str, parts: Name) -> set[str]:
    """The parts of the package that the module imports although its layer may not."""
    imported = {name[0] if name else "the package" for name, _ in imports(source, parts)}
    return imported - BELOW[parts[0]] - {parts[0]} - (LEAVES if parts[0] != "errors" else set())


@pytest.mark.parametrize("layer", sorted(BELOW))
def test_imports_point_down(layer: str) -> None:
    files = {parts: path for parts, path in MODULES.items() if parts[0] == layer}
    assert files, f"the layer {layer} has no files"
    for parts, path in files.items():
        wrong = wrong_arrows(path.read_text(), parts)
        assert not wrong, f"{path.relative_to(ROOT)} imports {sorted(wrong)}, which is not below {layer}"


def test_every_folder_has_a_layer() -> None:
    folders = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"benchmarks", "tests", "build"}
    assert folders == set(BELOW) - LEAVES


@pytest.mark.parametrize(
    ("parts", "source", "wrong"),
    [
        (("kernels", "nf4"), "from ..lora.lora import LoRA", {"lora"}),
        (("kernels", "nf4"), "from .. import lora", {"lora"}),
        (("kernels", "nf4"), "import fourbit.lora.lora", {"lora"}),
        (("kernels", "nf4"), "from fourbit.lora import lora", {"lora"}),
        (("kernels", "nf4"), "from fourbit import load", {"load"}),
        (("kernels", "nf4"), "def late():\n    from ..trainer import sft", {"trainer"}),
        (("kernels", "deep", "nf4"), "from ...cli import main", {"cli"}),
        (("data", "read"), "from ..models.load import load_tokenizer", {"models"}),
        (("lora", "attach"), "from ..models import llama", {"models"}),
        (("models", "load"), "from ..data.template import ChatTemplate", {"data"}),
        (("trainer", "sft"), "from ..cli.main import main", {"cli"}),
        (("errors",), "from .kernels import nf4", {"kernels"}),
        (("errors",), "from .files import sync", {"files"}),
        (("files",), "from .kernels import nf4", {"kernels"}),
        (("lora", "attach"), "from ..files import read_json", set()),
        (
            ("lora", "attach"),
            "from .lora import LoRA\nfrom ..kernels import nf4\nfrom ..errors import InputError",
            set(),
        ),
        (("data", "read"), "import json\nfrom torch import nn\nfrom . import template\nfrom .. import errors", set()),
    ],
)
def test_planted_imports_are_judged(parts: tuple[str, ...], source: str, wrong: set[str]) -> None:
    assert wrong_arrows(source, parts) == wrong


# Inside folders.


def imported_modules(source: str, parts: Name, known: set[Name]) -> tuple[set[Name], set[Name]]:
    """Which of `known` the module at `parts` imports at its top (type checkers' imports too), and inside functions."""
    found: tuple[set[Name], set[Name]] = set(), set()
    for name, late in imports(source, parts):
        found[late].update({name, name[:-1]} & known - {parts})
    return found


def circles(arrows: dict[Name, set[Name]]) -> list[set[Name]]:
    """Sets of modules each of which leads to all others of the set."""

    def reached(start: Name) -> set[Name]:
        seen, left = set[Name](), [start]
        while left:
            new = arrows[left.pop()] - seen
            seen |= new
            left += new
        return seen

    leads = {name: reached(name) for name in arrows}
    found: list[set[Name]] = []
    for name in arrows:
        if name in leads[name] and not any(name in circle for circle in found):
            found.append({other for other in leads[name] if name in leads[other]})
    return found


def test_no_circle_of_imports() -> None:
    arrows = {name: imported_modules(path.read_text(), name, set(MODULES))[0] for name, path in MODULES.items()}
    assert sum(map(len, arrows.values())) > 100
    assert circles(arrows) == []


def test_our_own_modules_are_imported_at_the_top() -> None:
    for name, path in MODULES.items():
        late = imported_modules(path.read_text(), name, set(MODULES))[1]
        late = {other for other in late if not other[-1].endswith("_triton")}  # slow to import, and on Linux only
        assert not late, f"{path.relative_to(ROOT)} imports {sorted(late)} inside a function"


def test_planted_circles_and_late_imports_are_seen() -> None:
    a, b, c = ("x", "a"), ("x", "b"), ("y", "c")
    known = {a, b, c}
    source = "from . import b\nif TYPE_CHECKING:\n    from ..y.c import d\ndef f():\n    from .b import e\n"
    assert imported_modules(source, a, known) == ({b, c}, {b})
    assert circles({a: {b}, b: {c}, c: {a}}) == [{a, b, c}]
    assert circles({a: {b}, b: {c}, c: set()}) == []
    assert circles({a: {b, c}, b: {a}, c: {b}}) == [{a, b, c}]


def untyped_models(source: str) -> list[str]:
    """Arguments and attributes that are models and annotated with Any."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.arg):
            name, annotation = node.arg, node.annotation
        elif isinstance(node, ast.AnnAssign):
            name, annotation = ast.unparse(node.target).split(".")[-1], node.annotation
        else:
            continue
        words = "" if annotation is None else ast.unparse(annotation)
        if name in ("model", "student", "teacher", "policy", "base") and "Any" in words:
            found.append(f"{node.lineno}: {name}: {words}")
    return found


def test_models_are_typed() -> None:
    found = {str(path.relative_to(ROOT)): untyped_models(path.read_text()) for path in MODULES.values()}
    assert {file: lines for file, lines in found.items() if lines} == {}


def test_a_planted_any_is_seen() -> None:
    source = "def f(model: Any, other: Any): ...\nclass A:\n    teacher: Any | None\n"
    assert sorted(untyped_models(source)) == ["1: model: Any", "3: teacher: Any | None"]
