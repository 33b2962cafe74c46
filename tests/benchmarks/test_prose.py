"""What the page on the method says in numbers, a table says as well: none is typed by hand and gets old."""

from __future__ import annotations

import re
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"
TABLES = ("quality.md", "benchmarks.md", "paper.md")
NUMBER = re.compile(r"(?<![\w.])\d+\.\d{1,3}(?![\w.]*\d)")


def numbers(page: str) -> set[str]:
    return set(NUMBER.findall((DOCS / page).read_text(encoding="utf-8")))


def test_each_measured_number_of_the_method_is_in_a_table() -> None:
    said = numbers("method.md")
    assert said
    assert said <= set().union(*map(numbers, TABLES))
