"""Finished components, kept by what they were made of: an export that was interrupted goes on with the next.

An entry is a component's directory with `component.json` beside its files. Its name is a digest of all that
the component depends on: the model's files, how it is stored, the versions of the tools and the code of this
package. Delete the cache whenever you like.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from deploy import bundle as format
from export.components import Component
from export.digests import FileDigests
from export.traces import versions
from profiles.typed import TypedDataError, from_data
from toolchain.artifacts import new_directory, read_json, sha256, write_json
from toolchain.errors import ToolchainError
from toolchain.families import Model
from toolchain.families.stored import weight_files

__all__ = ["ComponentCache", "component_key", "source_files"]

_RECORD = "component.json"
_CHUNK = 1 << 22
"""Bytes of a file that are copied at a time."""


class ComponentCache:
    """A directory of finished components.

    Args:
        path: The directory.
        digests: Of the files that components are made of; by default they are remembered there too.
    """

    def __init__(self, path: Path, digests: FileDigests | None = None) -> None:
        self.path = path
        self.digests = digests or FileDigests(path)

    def get(
        self, key: str, make: Callable[[Path], Component], destination: Path
    ) -> tuple[Component, dict[str, format.File]]:
        """Copy a component's files to a new directory, made now if they are not there yet or are damaged.

        Returns:
            The component, and what its files are, by name.

        Raises:
            ToolchainError: The cache cannot be written.
        """
        if (found := self._copy(key, destination)) is not None:
            return found
        entry = self._entry(key)
        shutil.rmtree(entry, ignore_errors=True)
        with new_directory(entry) as directory, ThreadPoolExecutor(1) as beside:
            component = make(directory)
            copied = beside.submit(_copy_files, directory, destination)
            files = {
                path.name: format.File(sha256=sha256(path), bytes=path.stat().st_size)
                for path in sorted(directory.iterdir())
            }
            copied.exception()
            record = {name: dataclasses.asdict(file) for name, file in files.items()}
            write_json(directory / _RECORD, {"files": record, "component": dataclasses.asdict(component)})
        copied.result()  # kept by now, should the other disk be full
        return component, files

    def holds(self, key: str) -> bool:
        """Whether a component is there."""
        return (self._entry(key) / _RECORD).exists()

    def _entry(self, key: str) -> Path:
        return self.path / "components" / key

    def _copy(self, key: str, destination: Path) -> tuple[Component, dict[str, format.File]] | None:
        entry = self._entry(key)
        try:
            record = read_json(entry / _RECORD)
            component = from_data(Component, record["component"])
            files = {name: from_data(format.File, values) for name, values in record["files"].items()}
        except (ToolchainError, TypedDataError, KeyError):
            return None
        destination.mkdir()
        for name, file in files.items():
            try:
                digest = _copy_file(entry / name, destination / name)
            except FileNotFoundError:
                break
            if digest != file.sha256:
                break
        else:
            return component, files
        shutil.rmtree(destination)
        return None


def _copy_files(source: Path, destination: Path) -> None:
    destination.mkdir()
    for path in source.iterdir():
        shutil.copyfile(path, destination / path.name)


def _copy_file(source: Path, destination: Path) -> str:
    """Copy a file in one pass, and return the digest of what was written."""
    digest = hashlib.sha256()
    with source.open("rb") as read, destination.open("xb") as written:
        while chunk := read.read(_CHUNK):
            digest.update(chunk)
            written.write(chunk)
    return digest.hexdigest()


def component_key(model: Model, part: str, options: dict[str, Any], cache: ComponentCache) -> str:
    """Digest of all that a component depends on.

    Args:
        model: On disk.
        part: Directory of the model that the component is made of.
        options: How it is made.
        cache: Remembers digests.
    """
    facts = {
        "files": [cache.digests.digest(path) for path in source_files(model, part)],
        "part": part,
        "options": options,
        **versions(),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def source_files(model: Model, part: str) -> list[Path]:
    """The files that a component is made of."""
    directory = model.path / part
    return [directory / "config.json", *weight_files(directory)]
