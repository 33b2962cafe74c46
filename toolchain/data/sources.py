"""What a data set is, decided once, and the captioned pictures in it.

Nothing in it is trusted: no code comes from it, no path leads out of it, and a sample that cannot be read is
named and passed over.
"""

from __future__ import annotations

import csv
import io
import json
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Literal, TypeAlias

from toolchain.errors import ToolchainError

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset

PICTURES = (".jpg", ".jpeg", ".png", ".webp")
_CAPTIONS = ("text", "caption")
"""Names of a caption; the first one there counts."""
_METADATA = ("metadata.jsonl", "metadata.csv")
_MOST_BYTES = 1 << 28
"""Of a picture's file; what is larger is no picture."""
_MOST_CAPTION_BYTES = 1 << 16

Kind = Literal["prompts", "folder", "webdataset", "datasets", "parquet"]


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A picture, not yet decoded, and what it shows."""

    key: str
    """Where it is in its data set."""
    picture: bytes
    caption: str


@dataclass(frozen=True, kw_only=True)
class Skipped:
    """What was passed over, and why."""

    key: str
    reason: str


Found: TypeAlias = Sample | Skipped


@dataclass(frozen=True, kw_only=True)
class Source:
    """A data set whose kind is known."""

    path: Path
    kind: Kind
    num_bytes: int
    """Of its files."""
    samples: Callable[[], Iterator[Found]]
    """Reads it from its start, always in the same order; prompts have none."""


def open_source(path: Path) -> Source:
    """Tell what kind of data set a path is.

    Raises:
        ToolchainError: It is of no kind, or of several.
    """
    if path.is_file() and path.suffix in _OF_FILE:
        return _source(path, _OF_FILE[path.suffix], [path])
    if not path.is_dir():
        raise ToolchainError(
            f"{path} is no data set: {'it is a file' if path.exists() else 'it does not exist'}; a data set "
            "is a .txt of prompts, a folder of pictures with captions, a .tar of WebDataset or a directory "
            "of them, a directory of the `datasets` library, or .parquet"
        )
    splits = sorted(item.parent.name for item in path.glob("*/state.json"))
    if splits and (path / "dataset_dict.json").is_file():
        raise ToolchainError(f"{path} holds the splits {', '.join(splits)}; name one, as {path / splits[0]}")
    if (path / "state.json").is_file() and (path / "dataset_info.json").is_file():
        num_bytes = sum(item.stat().st_size for item in path.glob("*.arrow"))
        data = _open_datasets(path)
        return Source(
            path=path,
            kind="datasets",
            num_bytes=num_bytes,
            samples=lambda: _in_tables(path.name, data.iter(batch_size=_ROWS)),
        )
    files = sorted(item for item in path.rglob("*") if item.is_file())
    found: dict[Kind, list[Path]] = {
        "webdataset": [item for item in files if item.suffix == ".tar"],
        "parquet": [item for item in files if item.suffix == ".parquet"],
        "folder": [item for item in files if item.suffix.lower() in PICTURES],
    }
    kinds = [kind for kind, items in found.items() if items]
    if len(kinds) != 1:
        raise ToolchainError(
            f"{path} holds {' and '.join(kinds)} data side by side; name one of them"
            if kinds
            else f"{path} holds no data: no pictures ({', '.join(PICTURES)}), no .tar and no .parquet"
        )
    return _source(path, kinds[0], found[kinds[0]])


_OF_FILE: dict[str, Kind] = {".txt": "prompts", ".tar": "webdataset", ".parquet": "parquet"}


def _source(path: Path, kind: Kind, files: list[Path]) -> Source:
    readers: dict[Kind, Callable[[], Iterator[Found]]] = {
        "prompts": lambda: iter(()),
        "folder": lambda: _in_folder(path, files),
        "webdataset": lambda: _in_tars(path, files),
        "parquet": lambda: _in_parquet(path, files),
    }
    num_bytes = sum(item.stat().st_size for item in files)
    return Source(path=path, kind=kind, num_bytes=num_bytes, samples=readers[kind])


def read_prompts(path: Path, least: int = 1) -> list[str]:
    """The lines of a text file that are not empty.

    Raises:
        ToolchainError: It cannot be read, or holds too few.
    """
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ToolchainError(f"the prompts in {path} cannot be read: {error}") from error
    if len(lines) < least:
        raise ToolchainError(f"{path} holds {len(lines)} prompts; at least {least} are needed")
    return lines


class _UnusableError(Exception):
    """Why a sample is passed over."""


def _in_folder(root: Path, pictures: list[Path]) -> Iterator[Found]:
    """Pictures with a row of metadata beside or above them, or with a text file of their name."""
    there = {path.resolve() for path in pictures}
    captions: dict[Path, str | _UnusableError] = {}
    for table in sorted(item for name in _METADATA for item in root.rglob(name)):
        for number, row in _rows_of(table):
            try:
                if isinstance(row, _UnusableError):
                    raise row
                if not (name := row.get("file_name")) or not isinstance(name, str):
                    raise _UnusableError("it names no picture: no text under file_name")
                path = _inside(table.parent / name, root)
                if path not in there:
                    raise _UnusableError(f"there is no picture {name}")
            except _UnusableError as error:
                yield Skipped(key=f"{table.relative_to(root).as_posix()}:{number}", reason=str(error))
                continue
            try:
                captions[path] = _caption_of(row)
            except _UnusableError as error:
                captions[path] = error
    for picture in pictures:
        key = picture.relative_to(root).as_posix()
        try:
            caption = captions.get(path := _inside(picture, root))
            if isinstance(caption, _UnusableError):
                raise caption
            if caption is None:
                beside = picture.with_suffix(".txt")
                if not beside.is_file():
                    raise _UnusableError(f"it has no caption: neither a row of metadata nor {beside.name}")
                caption = _caption_in(_read(_inside(beside, root), _MOST_CAPTION_BYTES))
            yield Sample(key=key, picture=_read(path, _MOST_BYTES), caption=caption)
        except _UnusableError as error:
            yield Skipped(key=key, reason=str(error))


def _rows_of(table: Path) -> Iterator[tuple[int, Mapping[str, object] | _UnusableError]]:
    """With the number of each row's line, or of its last one."""
    try:
        data = table.read_bytes()
        if table.suffix == ".csv":
            reader = csv.DictReader(io.StringIO(data.decode("utf-8-sig"), newline=""), strict=True)
            yield from ((reader.line_num, row) for row in reader)
            return
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        yield 1, _UnusableError(f"it cannot be read: {error}")
        return
    for number, line in enumerate(data.splitlines(), 1):
        if line.strip():
            try:
                yield number, _object_in(line)
            except _UnusableError as error:
                yield number, error


def _inside(path: Path, root: Path) -> Path:
    """Where a path leads."""
    try:
        found = path.resolve()
    except (OSError, ValueError, RuntimeError) as error:  # a loop of links is a RuntimeError until 3.13
        raise _UnusableError(f"its path cannot be followed: {error}") from error
    if not found.is_relative_to(root.resolve()):
        raise _UnusableError(f"{path.name} lies outside the data set")
    return found


def _read(path: Path, most: int) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(most + 1)
    except OSError as error:
        raise _UnusableError(f"{path.name} cannot be read: {error.strerror}") from error
    if len(data) > most:
        raise _UnusableError(f"{path.name} is larger than {most} bytes")
    return data


def _in_tars(root: Path, paths: list[Path]) -> Iterator[Found]:
    for path in paths:
        key = path.name if path == root else path.relative_to(root).as_posix()
        try:
            with tarfile.open(path, "r:") as archive, path.open("rb") as raw:
                yield from _in_tar(key, archive)
                # tarfile takes whatever is no header for the end, which is a block of zeros.
                raw.seek(archive.offset)
                if raw.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                    reason = f"it is damaged or cut off at byte {archive.offset}; what came before was read"
                    yield Skipped(key=key, reason=reason)
        except (tarfile.TarError, OSError) as error:
            yield Skipped(key=key, reason=f"it cannot be read to its end: {error}")


def _in_tar(name: str, archive: tarfile.TarFile) -> Iterator[Found]:
    """Files next to each other whose names are one up to their first dot make a sample."""

    def split(member: tarfile.TarInfo) -> tuple[str, str]:
        path = PurePosixPath(member.name)
        stem, _, ending = path.name.partition(".")
        return str(path.with_name(stem) if stem else path), f".{ending.lower()}"

    files = (member for member in archive if member.isreg())
    for stem, members in groupby(files, lambda member: split(member)[0]):
        parts: dict[str, bytes] = {}
        key = f"{name}/{stem}"
        try:
            for member in members:
                ending = split(member)[1]
                most = _MOST_BYTES if ending in PICTURES else _MOST_CAPTION_BYTES
                if ending in (*PICTURES, ".txt", ".json"):
                    if member.size > most:
                        raise _UnusableError(f"{member.name} is larger than {most} bytes")
                    file = archive.extractfile(member)
                    assert file is not None  # of a regular file there is one
                    parts[ending] = file.read()
            picture = next((parts[ending] for ending in PICTURES if ending in parts), None)
            if picture is None:
                raise _UnusableError(f"it has no picture ({', '.join(PICTURES)})")
            if ".txt" in parts:
                caption = _caption_in(parts[".txt"])
            elif ".json" in parts:
                caption = _caption_of(_object_in(parts[".json"]))
            else:
                raise _UnusableError("it has no caption: neither .txt nor .json")
            yield Sample(key=key, picture=picture, caption=caption)
        except _UnusableError as error:
            yield Skipped(key=key, reason=str(error))


def _open_datasets(path: Path) -> Dataset:
    from datasets import load_from_disk

    try:
        return load_from_disk(str(path)).with_format("arrow")
    # It reads JSON and Arrow of any content, and wraps nothing.
    except Exception as error:
        raise ToolchainError(f"{path} cannot be read as a directory of `datasets`: {error}") from error


def _in_parquet(root: Path, paths: list[Path]) -> Iterator[Found]:
    import pyarrow as pa
    from pyarrow import parquet

    for path in paths:
        key = path.name if path == root else path.relative_to(root).as_posix()
        try:
            with parquet.ParquetFile(path) as file:
                yield from _in_tables(key, file.iter_batches(batch_size=_ROWS))
        except (pa.ArrowException, OSError) as error:
            yield Skipped(key=key, reason=f"it cannot be read to its end: {error}")


_ROWS = 16
"""Read at once; each may hold a large picture."""


def _in_tables(name: str, tables: Iterable[pa.Table | pa.RecordBatch]) -> Iterator[Found]:
    number = 0
    for table in tables:
        columns = [column for column in ("image", *_CAPTIONS) if column in table.schema.names]
        if "image" not in columns or len(columns) < 2:
            yield Skipped(
                key=name,
                reason=f"it has the columns {', '.join(table.schema.names)}; needed are image, and "
                f"{' or '.join(_CAPTIONS)}",
            )
            return
        for row in table.select(columns).to_pylist():
            key, number = f"{name}:{number}", number + 1
            try:
                yield Sample(key=key, picture=_picture_of(row["image"]), caption=_caption_of(row))
            except _UnusableError as error:
                yield Skipped(key=key, reason=str(error))


def _picture_of(value: object) -> bytes:
    """As `datasets` stores it, bytes with a path; a path alone leads out of the data set."""
    data = value.get("bytes") if isinstance(value, dict) else value
    if not isinstance(data, bytes):
        raise _UnusableError("its picture is not in the data set: the column image holds no bytes")
    return data


def _caption_of(values: Mapping[str, object]) -> str:
    for name in _CAPTIONS:
        if isinstance(text := values.get(name), str) and text.strip():
            return " ".join(text.split())
    raise _UnusableError(f"it has no caption: no text under {' or '.join(_CAPTIONS)}")


def _caption_in(data: bytes) -> str:
    try:
        return _caption_of({"text": data.decode("utf-8-sig")})
    except UnicodeDecodeError as error:
        raise _UnusableError(f"its caption is no UTF-8: {error}") from error


def _object_in(data: bytes) -> dict[str, object]:
    try:
        found = json.loads(data)
    except (ValueError, RecursionError) as error:  # what is no UTF-8 is a ValueError
        raise _UnusableError(f"its JSON cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise _UnusableError("its JSON is no object")
    return found
