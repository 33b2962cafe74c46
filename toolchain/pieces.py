"""Finished pieces of long work, by name: what was done once is not done again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from toolchain.artifacts import read_json, write_json
from toolchain.errors import ToolchainError
from toolchain.processes import processes

SETTINGS_FILE = "settings.json"


class Pieces:
    """JSON objects by name; on disk if there is a directory, where the first process acts for all.

    Args:
        directory: Made with the first piece. None keeps them in memory.
        settings: What the work depends on, as JSON takes it. Pieces of other work are refused.
        work: What to call it in messages.

    Raises:
        ToolchainError: The directory is that of other work.
    """

    def __init__(self, directory: Path | None, settings: dict[str, Any], *, work: str) -> None:
        self._directory, self._settings = directory, json.loads(json.dumps(settings))
        self._pieces: dict[str, dict[str, Any]] = {}
        if directory is not None:
            processes().first(lambda: self._check(directory, work))

    def _check(self, directory: Path, work: str) -> None:
        if not directory.exists() or not any(directory.iterdir()):
            return
        stored = directory / SETTINGS_FILE
        if not stored.exists():
            raise ToolchainError(
                f"{directory} holds something, but no {SETTINGS_FILE} of {work}; name another"
            )
        found, now = read_json(stored), self._settings
        other = sorted(key for key in {*found, *now} if found.get(key) != now.get(key))
        if other:
            raise ToolchainError(
                f"{directory} holds {work} with other settings: "
                + "; ".join(f"{key} is {found.get(key)!r} there, {now.get(key)!r} now" for key in other)
                + ". Name another directory, or remove it to begin anew"
            )

    def __contains__(self, name: str) -> bool:
        if name not in self._pieces and self._directory is not None:
            path = self._directory / f"{name}.json"
            found = processes().first(lambda: read_json(path) if path.exists() else None)
            if found is not None:
                self._pieces[name] = found
        return name in self._pieces

    def __getitem__(self, name: str) -> dict[str, Any]:
        if name not in self:
            raise KeyError(name)
        return self._pieces[name]

    def __setitem__(self, name: str, piece: dict[str, Any]) -> None:
        if self._directory is not None and processes().is_first:
            self._directory.mkdir(parents=True, exist_ok=True)
            if not (settings := self._directory / SETTINGS_FILE).exists():
                write_json(settings, self._settings)
            write_json(self._directory / f"{name}.json", piece)
        self._pieces[name] = piece
