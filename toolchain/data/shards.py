"""A precomputed data set on disk: what a training needs of pictures and captions, and nothing else.

A directory of safetensors and one `index.json`, which lists every file with its digest. `text-*` hold what
the text encoders make of each distinct caption, the empty one first. For pictures, `latents-HxW-*` hold each
distinct one once, in the size (in latents) it is trained in, and `pairs` says what belongs together; for
prompts, `states-*` hold states of the teacher's own sampling. Tensors are mapped, never read as a whole.
"""

from __future__ import annotations

import json
import os
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from toolchain.artifacts import is_full, read_json, sha256
from toolchain.data.sources import Skipped
from toolchain.errors import ToolchainError
from toolchain.families.mmdit import TextStates
from toolchain.families.view import Model
from toolchain.prefix import digest
from toolchain.progress import Bar, silent

INDEX_FILE = "index.json"
PAIRS_FILE = "pairs-000000.safetensors"
_SCHEMA_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Shard:
    """A file of an index."""

    file: str
    sha256: str
    rows: int


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What the tensors depend on."""

    kind: Literal["latents", "states"]
    model: str
    """As the user named it."""
    weights: dict[str, str]
    """Digests of the parts of the model that were used."""
    max_sequence_length: int
    size: tuple[int, int]
    """The model's own height and width, in pixels."""
    source: str
    """Name of the data set."""
    source_kind: str
    source_bytes: int
    settings: dict[str, Any]
    """How it was computed."""


@dataclass(frozen=True, kw_only=True)
class Index:
    """All that is known of a precomputed data set."""

    facts: Facts
    shards: tuple[Shard, ...]
    """In the order of their names."""
    skipped: tuple[Skipped, ...]
    """Of the data set, in its order."""

    def of(self, kind: str) -> list[Shard]:
        """Shards whose name begins so."""
        return [shard for shard in self.shards if shard.file.startswith(f"{kind}-")]


def index_to_json(index: Index) -> dict[str, Any]:
    """An index as JSON."""
    return {"schema_version": _SCHEMA_VERSION, **asdict(index)}


def index_from_json(data: dict[str, Any]) -> Index:
    """Read what `index_to_json` wrote, strictly.

    Raises:
        ToolchainError: It is of another schema, or is no index.
    """
    values = dict(data)
    if (version := values.pop("schema_version", None)) != _SCHEMA_VERSION:
        raise ToolchainError(
            f"this is no index of precomputed data of schema version {_SCHEMA_VERSION} but of {version}; "
            "make it again with this version of hptool"
        )
    try:
        return Index(
            **{
                **values,
                "facts": Facts(**{**values["facts"], "size": tuple(values["facts"]["size"])}),
                "shards": tuple(Shard(**item) for item in values["shards"]),
                "skipped": tuple(Skipped(**item) for item in values["skipped"]),
            }
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ToolchainError(f"this is no index of precomputed data: {error!r}") from error


def weights_digest(model: Model, part: str) -> str:
    """Of a part of a model, the same in whatever precision it was opened and whether it holds weights."""
    weights = model.weights(part)
    return digest(weights[name].float() for name in sorted(weights))


def write_shard(path: Path, tensors: Mapping[str, torch.Tensor], notes: Mapping[str, Any]) -> None:
    """Write tensors and, as JSON, notes on their rows, beside their place and renamed.

    Raises:
        ToolchainError: They cannot be written.
    """
    beside = path.with_suffix(".part")
    with writing(path):
        save_file(
            {name: item.contiguous() for name, item in tensors.items()},
            beside,
            metadata={key: json.dumps(value) for key, value in notes.items()},
        )
        beside.chmod(0o644)  # safetensors makes it private
        with beside.open("rb+") as file:
            os.fsync(file.fileno())
        beside.replace(path)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Say what to do where a file cannot be written.

    Raises:
        ToolchainError: It cannot.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise ToolchainError(
            f"cannot write {path}: "
            + (f"its disk is full ({error}); make room" if is_full(error) else f"{error}; mend that")
            + ", and give the same command again: it goes on after the last whole shard"
        ) from error


def read_shard(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Map a shard's tensors, and read its notes.

    Raises:
        ToolchainError: It is none.
    """
    try:
        with safe_open(path, framework="pt") as stored:
            tensors = {name: stored.get_tensor(name) for name in list(stored.keys())}
            return tensors, {key: json.loads(value) for key, value in (stored.metadata() or {}).items()}
    except (SafetensorError, OSError, ValueError) as error:
        raise ToolchainError(f"the shard {path} cannot be read: {error}") from error


class Rows:
    """Tensors of several shards, one row after the other."""

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self._tensors, self._ends = tensors, [0]
        for item in tensors:
            self._ends.append(self._ends[-1] + len(item))

    def __len__(self) -> int:
        """Of all."""
        return self._ends[-1]

    def whole(self) -> torch.Tensor:
        """All, in memory."""
        return torch.cat(list(self._tensors))

    def __getitem__(self, rows: torch.Tensor) -> torch.Tensor:
        """Some, in the order they are asked for; nothing else is read from the disk."""
        found = []
        for row in rows.tolist():
            which = bisect_right(self._ends, row) - 1
            found.append(self._tensors[which][row - self._ends[which]])
        return torch.stack(found)


class Texts:
    """What the text encoders made of captions.

    Args:
        paths: Shards of text.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        shards = [read_shard(path) for path in paths]
        captions = [caption for _, notes in shards for caption in notes["captions"]]
        self.rows = {caption: row for row, caption in enumerate(captions)}
        """By caption, each there once; the empty one is the first."""
        self._tokens, self._pooled = (Rows([it[name] for it, _ in shards]) for name in ("tokens", "pooled"))

    def index(self, rows: torch.Tensor) -> TextStates:
        """Those of some rows."""
        return TextStates(tokens_BTJ=self._tokens[rows], pooled_BP=self._pooled[rows])

    def encode(self, prompts: Sequence[str]) -> TextStates | None:
        """Those of prompts, if all of them are captions here."""
        rows = [self.rows[prompt] for prompt in prompts if prompt in self.rows]
        return self.index(torch.tensor(rows)) if len(rows) == len(prompts) else None


@dataclass(frozen=True, kw_only=True)
class Precomputed:
    """A precomputed data set, open and checked."""

    directory: Path
    index: Index
    texts: Texts

    def digest(self) -> str:
        """Of all of it: the index holds the digests of all else."""
        return sha256(self.directory / INDEX_FILE)

    def tensors(self, kind: str) -> dict[str, Rows]:
        """Those of all shards whose names begin so, by the tensors' names."""
        found = [read_shard(self.directory / shard.file)[0] for shard in self.index.of(kind)]
        return {name: Rows([item[name] for item in found]) for name in found[0]}

    def pairs(self) -> tuple[torch.Tensor, list[Rows]]:
        """Which size, which picture of it and which caption, int64 [pairs, 3]; and pictures by size."""
        tensors, notes = read_shard(self.directory / PAIRS_FILE)
        kinds = [f"latents-{height}x{width}" for height, width in notes["sizes"]]
        return tensors["pairs"], [self.tensors(kind)["latents"] for kind in kinds]

    def check(self, model: Model) -> None:
        """Refuse another model than the one it was made with.

        Raises:
            ToolchainError: It is another.
        """
        facts = self.index.facts
        differing = [name for name, value in facts.weights.items() if _digest_of(model, name) != value]
        if model.defaults.max_sequence_length != facts.max_sequence_length:
            differing.append("max_sequence_length")
        if differing:
            baked = ", the same --lora and the same --precision" if model.adapters else ""
            raise ToolchainError(
                f"{self.directory} was precomputed with {facts.model}: its {', '.join(differing)} "
                f"differ from that of {model.source}; precompute the data with this model{baked}"
            )


def _digest_of(model: Model, part: str) -> str | None:
    return None if getattr(model.pipeline, part, None) is None else weights_digest(model, part)


def open_precomputed(directory: Path, *, bar: Bar = silent) -> Precomputed:
    """Open a precomputed data set, once every file is as the index says.

    Args:
        directory: As `precompute` wrote it.
        bar: Starts a progress bar.

    Raises:
        ToolchainError: It is none, or a file is missing or is not what was written.
    """
    if not (directory / INDEX_FILE).is_file():
        raise ToolchainError(
            f"{directory} is no precomputed data set: it has no {INDEX_FILE}; make one with "
            f"hptool precompute MODEL {directory} --output DIR"
        )
    index = index_from_json(read_json(directory / INDEX_FILE))
    advance = bar("checking the data", len(index.shards))
    for shard in index.shards:
        check_shard(directory, shard)
        advance()
    texts = Texts([directory / shard.file for shard in index.of("text")])
    return Precomputed(directory=directory, index=index, texts=texts)


def check_shard(directory: Path, shard: Shard) -> None:
    """Refuse a file that is not what was written.

    Raises:
        ToolchainError: It is missing or another.
    """
    path = directory / shard.file
    if "/" in shard.file or not path.is_file():
        raise ToolchainError(f"the shard {path} is missing; precompute the data again")
    if sha256(path) != shard.sha256:
        raise ToolchainError(
            f"the shard {path} is damaged: it is not what was written; remove it, and "
            "precompute the data again"
        )
