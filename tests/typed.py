"""A command as a user types it, in the process of the test."""

from __future__ import annotations

import sys

import pytest

from toolchain import cli


def hptool(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Its exit code."""
    monkeypatch.setattr(sys, "argv", ["hptool", *arguments])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    return int(stopped.value.code or 0)
