"""Who compares answers here: someone that knows how a ticket is filed, and prefers more fields that are right."""

from collections.abc import Mapping
from typing import Any


def fields_right(prompt: str, answer: str, row: Mapping[str, Any]) -> int:
    """How many of the fields of `category: a / priority: b / team: c` are as the ticket's own, in their places."""
    right = row["messages"][-1]["content"].split(" / ")
    said = answer.strip().split(" / ")
    return sum(a == b for a, b in zip(said, right, strict=False)) - abs(len(said) - len(right))
