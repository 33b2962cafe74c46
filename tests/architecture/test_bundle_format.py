"""The page of the bundle format names every field of the manifest, and no other."""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from deploy.bundle import MAX_FILES, MAX_MANIFEST_BYTES, SCHEMA_VERSION, Manifest

PAGE = (Path(__file__).parents[2] / "docs" / "bundle.md").read_text(encoding="utf-8")


def fields(kind: Any, name: str = "") -> Iterator[str]:
    """Names of what a dataclass holds, with dots, and a star for what a list or table holds."""
    arguments = typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        for field in dataclasses.fields(kind):
            own = f"{name}.{field.name}".removeprefix(".")
            yield own
            yield from fields(hints[field.name], own)
    elif typing.get_origin(kind) is types.UnionType:
        yield from fields(arguments[0], name)
    elif arguments and typing.get_origin(kind) is not typing.Literal:
        yield from fields(arguments[-1], name if name.endswith("*") else f"{name}.*")


def test_the_page_names_every_field_and_no_other() -> None:
    rows = re.findall(r"^\| (`[^|]+`) \|", PAGE, re.MULTILINE)
    named = [name for row in rows for name in re.findall(r"`([^`]+)`", row)]
    assert sorted(named) == sorted(fields(Manifest))


def test_the_page_states_the_limits_and_the_version() -> None:
    assert f"describes schema {SCHEMA_VERSION}." in PAGE
    assert f"| `schema_version` | {SCHEMA_VERSION}." in PAGE
    assert f"{MAX_MANIFEST_BYTES >> 20} MiB at most" in PAGE
    assert f"{MAX_FILES:,} at most" in PAGE
