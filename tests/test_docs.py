"""Every `>>>` line of the docs is run, and prints what the page says."""

import doctest
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"


@pytest.mark.parametrize("page", ["how-it-works.md", "paging.md", "preferences.md"])
def test_the_page_prints_what_it_says(page: str) -> None:
    result = doctest.testfile(str(DOCS / page), module_relative=False, encoding="utf-8")
    assert result.attempted > 10 and result.failed == 0
