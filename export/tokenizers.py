"""What turns prompts into token ids, as one file for the device's tokenizer library and two numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as BackendTokenizer

from deploy import bundle as format
from export.components import max_length
from export.errors import ExportError
from toolchain.families import Model

__all__ = ["export_tokenizer"]

_FILE = "tokenizer.json"


def export_tokenizer(model: Model, name: str, directory: Path) -> format.Tokenizer:
    """Write a tokenizer of CLIP or T5 that neither pads nor truncates.

    The device does both by the manifest; a second opinion in the file would be followed silently.

    Args:
        model: Whose tokenizer it is.
        name: Of the part, as `tokenizer_2`; its directory is made.
        directory: Of the bundle.

    Raises:
        ExportError: The tokenizer is of a kind that only Python can run, or it pads or truncates in a way
            that the device does not.
    """
    tokenizer = getattr(model.pipeline, name)
    backend = BackendTokenizer.from_str(_backend(name, tokenizer).to_str())
    backend.no_truncation()
    backend.no_padding()
    if tokenizer.pad_token_id is None:
        raise ExportError(f"The {name} has no token to pad with. Set pad_token in its tokenizer_config.json.")
    for side in ("padding_side", "truncation_side"):
        if (found := getattr(tokenizer, side)) != "right":
            raise ExportError(
                f"The {name} has the {side} {found!r}, and a device pads and truncates on the right. "
                "If the model was trained that way it cannot be exported; else change tokenizer_config.json."
            )
    (directory / name).mkdir()
    path = f"{name}/{_FILE}"
    (directory / path).write_text(backend.to_str(), encoding="utf-8")
    return format.Tokenizer(
        path=path,
        max_length=max_length(model, name.removeprefix("tokenizer")),
        pad_id=tokenizer.pad_token_id,
    )


def _backend(name: str, tokenizer: Any) -> Any:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ExportError(
            f"The {name} is a {type(tokenizer).__name__}, which runs in Python only. Save it with a class of "
            "transformers that has a backend_tokenizer, as CLIPTokenizer and T5Tokenizer do."
        )
    return backend
