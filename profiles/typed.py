"""Plain data (JSON, TOML) into frozen dataclasses: nothing unknown, nothing missing, no coercion; and what
is written of their fields."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import reprlib
import types
import typing
from typing import Any, TypeVar

T = TypeVar("T")

_short = reprlib.Repr()
_short.maxstring = _short.maxother = 60


class TypedDataError(ValueError):
    """Data that does not have the shape of its dataclass; the message names the key."""


def from_data(cls: type[T], data: Any, where: str = "") -> T:
    """Build the dataclass `cls` from nested dicts and lists.

    Args:
        where: Dotted name of `data` in its file, put before the keys that errors name.

    Raises:
        TypedDataError: A key is unknown or missing, or a value has another type than its field.
    """
    if not isinstance(data, dict):
        raise TypedDataError(f"{where or 'the top level'} must be a table, not {_shown(data)}")
    hints = typing.get_type_hints(cls)
    prefix = f"{where}." if where else ""
    fields = dataclasses.fields(cls)  # type: ignore[arg-type]
    names = [field.name for field in fields]
    if unknown := [key for key in data if key not in names]:
        raise TypedDataError(f"unknown key {_quoted(prefix, unknown)}; known are {', '.join(names)}")
    required = [
        field.name
        for field in fields
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    if missing := [name for name in required if name not in data]:
        raise TypedDataError(f"missing key {_quoted(prefix, missing)}")
    return cls(**{key: _value(hints[key], value, f"{prefix}{key}") for key, value in data.items()})


def field_docs(cls: type[Any]) -> dict[str, str]:
    """What is written under each field of the dataclass `cls`, in the order of the fields."""
    (definition,) = ast.parse(inspect.getsource(cls)).body
    assert isinstance(definition, ast.ClassDef)
    docs = {}
    for field, doc in zip(definition.body, definition.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(doc, ast.Expr):
            assert isinstance(field.target, ast.Name)
            docs[field.target.id] = inspect.cleandoc(ast.literal_eval(doc.value)).replace("\n", " ")
    return docs


def _value(kind: Any, value: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return from_data(kind, value, where)
    if origin is typing.Literal:
        # `1 == True == 1.0`, so the type has to agree as well.
        if any(type(value) is type(choice) and value == choice for choice in arguments):
            return value
        choices = " or ".join(repr(choice) for choice in arguments)
        raise TypedDataError(f"{where} must be {choices}, not {_shown(value)}")
    if origin is types.UnionType:  # only ever `X | None`
        inner = next(argument for argument in arguments if argument is not type(None))
        return None if value is None else _value(inner, value, where)
    if origin is dict:
        if isinstance(value, dict):
            return {key: _value(arguments[1], item, f"{where}[{key!r}]") for key, item in value.items()}
        raise TypedDataError(f"{where} must be a table, not {_shown(value)}")
    if origin in (list, tuple):
        return _sequence(origin, arguments, value, where)
    if kind is float and type(value) is int:
        try:
            return float(value)
        except OverflowError:
            raise TypedDataError(f"{where} must be of type float, and {_shown(value)} is too large") from None
    if type(value) is not kind:
        raise TypedDataError(f"{where} must be of type {kind.__name__}, not {_shown(value)}")
    return value


def _sequence(origin: type, arguments: tuple[Any, ...], value: Any, where: str) -> Any:
    if not isinstance(value, list):
        raise TypedDataError(f"{where} must be a list, not {_shown(value)}")
    fixed = origin is tuple and arguments[-1] is not Ellipsis
    if fixed and len(value) != len(arguments):
        raise TypedDataError(f"{where} must have {len(arguments)} entries, not {len(value)}")
    kinds = arguments if fixed else (arguments[0],) * len(value)
    items = zip(kinds, value, strict=True)
    return origin(_value(kind, item, f"{where}[{index}]") for index, (kind, item) in enumerate(items))


def _quoted(prefix: str, names: list[str]) -> str:
    return ", ".join(repr(f"{prefix}{name}") for name in names)


def _shown(value: Any) -> str:
    # Not `repr`: the data may be nested so deeply, or be so large, that it has none.
    return f"{_short.repr(value):.60} ({type(value).__name__})"
