"""Tiny data sets, made on the spot."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Mapping
from pathlib import Path

from PIL import Image


def picture(color: str = "red", size: tuple[int, int] = (8, 8), format: str = "PNG") -> bytes:
    """Of one colour; the size is width and height."""
    file = io.BytesIO()
    Image.new("RGB", size, color).save(file, format)
    return file.getvalue()


def folder(root: Path, files: Mapping[str, bytes], captions: Mapping[str, str]) -> Path:
    """Files, and rows of metadata.jsonl."""
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    if captions:
        rows = [json.dumps({"file_name": name, "text": text}) for name, text in captions.items()]
        (root / "metadata.jsonl").write_text("\n".join(rows) + "\n")
    return root


def tar(path: Path, members: Mapping[str, bytes]) -> Path:
    """An archive of files."""
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return path
