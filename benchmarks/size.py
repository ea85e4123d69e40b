"""Lines of the package by folder, beside the first house's: `python -m benchmarks.size` (`make size`).

Every `.py` of the package counts, with comments and empty lines; tests, benchmarks and examples do not. A function's
length is its lines from `def` to its end, docstring included. The last line printed is JSON.
"""

import ast
import json
import sys
from collections import Counter
from pathlib import Path
from statistics import median
from typing import Any

from . import CHECKOUT

FIRST_HOUSE = {  # commit 10f0cbb
    "kernels": 4163,
    "lora": 1540,
    "optim": 3101,
    "data": 2889,
    "text": 0,
    "models": 2363,
    "trainer": 4013,
    "cli": 2381,
    "root": 84,
}
LINES, FILE, FUNCTION = 14_000, 400, 8  # at most: of the package, of a file, of the median function


def package_files() -> list[Path]:
    """Every Python file of the package."""
    inside = [folder for folder in FIRST_HOUSE if folder != "root"]
    return [
        *sorted(CHECKOUT.glob("*.py")),
        *(path for name in inside for path in sorted((CHECKOUT / name).rglob("*.py"))),
    ]


def lines(path: Path) -> int:
    return len(path.read_text().splitlines())


def function_lengths(source: str) -> list[int]:
    """Lines of each function and method."""
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    return [(node.end_lineno or node.lineno) - node.lineno + 1 for node in nodes]


def kinds_of_lines(source: str) -> Counter[str]:
    """How many lines are docstrings, empty, and all else."""
    owners = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    first = [node.body[0] for node in ast.walk(ast.parse(source)) if isinstance(node, owners) and node.body]
    said = [n for n in first if isinstance(n, ast.Expr) and isinstance(getattr(n.value, "value", None), str)]
    inside = {line for node in said for line in range(node.lineno, (node.end_lineno or 0) + 1)}
    every = enumerate(source.splitlines(), 1)
    return Counter("docstring" if i in inside else "other" if line.strip() else "empty" for i, line in every)


def measured() -> dict[str, Any]:
    """Lines by folder and by kind, the longest files, and the median function."""
    files = {str(path.relative_to(CHECKOUT)): path for path in package_files()}
    sizes = {name: lines(path) for name, path in files.items()}
    folders: Counter[str] = Counter()
    for name, size in sizes.items():
        folders[Path(name).parts[0] if "/" in name else "root"] += size
    functions = [length for path in files.values() for length in function_lengths(path.read_text())]
    return {
        "folders": {name: folders[name] for name in FIRST_HOUSE},
        "lines": sum(sizes.values()),
        "kinds": dict(sum((kinds_of_lines(path.read_text()) for path in files.values()), Counter[str]())),
        "longest": dict(sorted(sizes.items(), key=lambda item: -item[1])[:5]),
        "files": len(sizes),
        "functions": len(functions),
        "median_function": median(functions),
        "longest_function": max(functions),
    }


def main() -> int:
    found = measured()
    folders, total = found["folders"], found["lines"]
    print(f"{'lines':10}{'first house':>13}{'now':>8}")
    for name, before in FIRST_HOUSE.items():
        print(f"{name:10}{before:13,}{folders[name]:8,}")
    print(f"{'in all':10}{sum(FIRST_HOUSE.values()):13,}{total:8,}  (at most {LINES:,})\n")
    print("of these:", ", ".join(f"{number:,} {kind}" for kind, number in sorted(found["kinds"].items())))
    print("longest files:", ", ".join(f"{name} {size}" for name, size in found["longest"].items()), f"(at most {FILE})")
    print(f"median of {found['functions']} functions: {found['median_function']:g} lines (at most {FUNCTION})")
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
