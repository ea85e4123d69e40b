"""pytest as on the image of a rented GPU: what IMAGE and its requirements do not bring cannot be imported.

python -P tests/gpu_image.py tests/kernels -k ...
"""

import re
import sys
from collections.abc import Iterable, Iterator
from importlib import metadata
from importlib.machinery import ModuleSpec, PathFinder
from typing import Any

IMAGE = ("torch", "triton", "numpy", "safetensors", "tokenizers", "pytest", "peft", "transformers", "fourbit")


def plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def brought(names: Iterable[str]) -> set[str]:
    """The distributions that installing `names` brings, extras left out."""
    found, waiting = set[str](), [plain(name) for name in names]
    while waiting:
        if (name := waiting.pop()) in found:
            continue
        found.add(name)
        try:
            needs = metadata.requires(name) or ()
        except metadata.PackageNotFoundError:
            continue
        own = name == "fourbit"  # it is run from the checkout there
        waiting += [plain(re.match(r"[\w.-]+", need)[0]) for need in needs if "extra ==" not in need and not own]  # type: ignore[index]
    return found


THERE = brought(IMAGE)
HIDDEN = {
    module
    for module, distributions in metadata.packages_distributions().items()
    if not THERE & {plain(distribution) for distribution in distributions} and not module.startswith("_distutils")
}


class Image(PathFinder):
    """Finds what the image has."""

    @classmethod
    def find_spec(cls, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        hidden = path is None and fullname in HIDDEN
        return None if hidden else super().find_spec(fullname, path, target)

    @classmethod
    def find_distributions(cls, *args: Any, **kwargs: Any) -> Iterator[Any]:  # type: ignore[override]
        return (found for found in super().find_distributions(*args, **kwargs) if plain(found.name) in THERE)


if __name__ == "__main__":
    sys.meta_path[sys.meta_path.index(PathFinder)] = Image
    import pytest

    sys.exit(pytest.main(sys.argv[1:]))
