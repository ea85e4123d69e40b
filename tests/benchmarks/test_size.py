"""`benchmarks.size` counts every file of the package and no other, and functions by their lines."""

import subprocess

from benchmarks import CHECKOUT, size

LINES_NOW = 27_424  # lower it with the package


def test_every_file_of_the_package_counts() -> None:
    tracked = subprocess.run(["git", "ls-files", "*.py"], cwd=CHECKOUT, capture_output=True, text=True, check=True)
    ours = [
        name for name in tracked.stdout.split() if name.split("/")[0] not in ("tests", "benchmarks", "docs", "examples")
    ]
    assert {str(path.relative_to(CHECKOUT)) for path in size.package_files()} >= set(ours)


def test_the_package_stays_small() -> None:
    """Files and functions are held to their limits; the whole is not at its aim yet, and may only shrink towards it."""
    found = size.measured()
    assert max(found["longest"].values()) <= size.FILE, found["longest"]
    assert found["median_function"] <= size.FUNCTION
    assert found["lines"] <= max(size.LINES, LINES_NOW), "a package that grows says in CHANGELOG what for"


def test_a_function_is_as_long_as_its_lines() -> None:
    source = "class A:\n    @cached\n    def b(self):\n        '''c'''\n\n        return 1\n\n\nasync def d(): ...\n"
    assert size.function_lengths(source) == [1, 4]


def test_every_line_is_of_one_kind() -> None:
    source = '"""a\n\nb"""\n\ndef f():\n    """c"""\n    x = """d"""\n\n    return x\n'
    assert size.kinds_of_lines(source) == {"docstring": 4, "empty": 2, "other": 3}
    found = size.measured()
    assert sum(found["kinds"].values()) == found["lines"]
