"""The package list, the pins and the folders on disk agree, and the layout's guards hold."""

import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import fourbit

ROOT = Path(__file__).parents[1]
OUTSIDE = {"tests", "benchmarks", "docs", "examples", "build", "dist"}  # never installed


def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_every_package_folder_is_listed() -> None:
    """A folder of modules that is not listed, or lacks `__init__.py`, would be left out of the wheel in silence."""
    tops = [top for top in ROOT.glob("[!.]*/") if top.is_dir() and top.name not in OUTSIDE]
    folders = {path.parent.relative_to(ROOT) for top in tops for path in top.rglob("*.py")}
    assert all((ROOT / folder / "__init__.py").is_file() for folder in folders)
    listed = project()["tool"]["setuptools"]["packages"]
    assert sorted(listed) == sorted(["fourbit", *(".".join(["fourbit", *folder.parts]) for folder in folders)])


def test_torch_floor_keeps_out_versions_with_known_holes() -> None:
    assert "torch>=2.10" in project()["project"]["dependencies"]
    assert "jinja2>=3.1.6" in project()["project"]["dependencies"]


def test_constraints_are_exact_and_cover_what_we_name() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    assert all("==" in line for line in lines)
    pinned = {line.split("==")[0].lower() for line in lines}
    table = project()["project"]
    wanted = [*table["dependencies"], *table["optional-dependencies"]["dev"]]
    assert {name.split(">=")[0].lower() for name in wanted} <= pinned
    assert "torch==2.13.0" in lines


def test_version_is_said_once() -> None:
    assert fourbit.__version__ == project()["project"]["version"]
    assert f"## {fourbit.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_the_package_under_test_is_this_checkout() -> None:
    assert fourbit.__file__ is not None
    assert Path(fourbit.__file__).resolve() == ROOT / "__init__.py"


def test_a_peer_cannot_import_our_folders() -> None:
    """`import kernels` after `import benchmarks`, started in the checkout as `python -m` does, must not find ours."""
    code = (
        "import sys; sys.path.insert(0, ''); sys.path.insert(0, '.');\n"
        "import benchmarks, importlib.util\n"
        "for name in ('kernels', 'lora', 'optim', 'data', 'models', 'trainer', 'cli', 'errors', 'files'):\n"
        "    spec = importlib.util.find_spec(name)\n"
        f"    assert spec is None or not str(spec.origin).startswith({str(ROOT)!r}), (name, spec)\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_the_planted_shadow_is_seen_without_the_guard() -> None:
    """The check above can fail: without `import benchmarks` the checkout's folders are found."""
    code = "import sys, importlib.util; sys.path.insert(0, '.'); assert importlib.util.find_spec('trainer')"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_no_test_file_name_is_used_twice() -> None:
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert sorted(names) == sorted(set(names))
    assert not list((ROOT / "tests").rglob("__init__.py"))
