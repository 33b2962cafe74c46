"""What a model card says of where a model came from, and the card and licence that a student inherits."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolchain.errors import ToolchainError

if TYPE_CHECKING:
    from toolchain.families import Model

__all__ = ["Card", "licence_files", "read_card", "write_student_card"]

_CARD = "README.md"


@dataclass(frozen=True, kw_only=True)
class Card:
    """The part of a model card that a bundle passes on."""

    license: str | None
    """Identifier of the licence, its name if it has no identifier, or else the name of its file."""
    base_revision: str | None
    """Commit of the base model's repository on the hub."""


def read_card(directory: Path) -> Card:
    """Read the card in a model's directory; without one, a licence is known by its file alone.

    Raises:
        ToolchainError: Its metadata cannot be read.
    """
    values = _metadata(directory)
    license = _text(values.get("license"))
    if license in (None, "other"):
        files = licence_files(directory)
        license = _text(values.get("license_name")) or (files[0].name if files else license)
    return Card(license=license, base_revision=_text(values.get("base_model_revision")))


def licence_files(directory: Path) -> list[Path]:
    """The files that say on what terms a model may be used: whoever passes it on passes these on."""
    names = ("license", "licence", "notice")
    return sorted(
        path for path in directory.iterdir() if path.is_file() and path.name.lower().startswith(names)
    )


def write_student_card(teacher: Model, directory: Path) -> None:
    """Write the card of a student, and copy its teacher's licence.

    Args:
        teacher: What the student was made of; it is named only if others can find it on the hub.
        directory: The student's.
    """
    from huggingface_hub import metadata_save

    own = _metadata(teacher.path)
    values = {
        **{key: own.get(key) for key in ("license", "license_name", "license_link")},
        "base_model": teacher.repository,
        "base_model_revision": teacher.revision,
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
    }
    metadata_save(directory / _CARD, {key: value for key, value in values.items() if value is not None})
    for path in licence_files(teacher.path):
        shutil.copyfile(path, directory / path.name)


def _metadata(directory: Path) -> dict[str, Any]:
    from huggingface_hub import metadata_load
    from yaml import YAMLError

    path = directory / _CARD
    try:
        return (metadata_load(path) if path.is_file() else None) or {}
    except (OSError, ValueError, YAMLError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ToolchainError(
            f"the metadata at the top of {path} cannot be read: {reason}; mend it, or remove the file"
        ) from error


def _text(value: object) -> str | None:
    """A value of metadata as text; of several licences, all."""
    if isinstance(value, list):
        value = ", ".join(map(str, value)) or None
    return None if value is None else str(value)
