"""The states of a training on disk: whole or not at all, of this run or refused, no more than are wanted.

A directory of safetensors files, `step-00000250.safetensors` after 250 steps. Their metadata says what run
they belong to; what the tensors mean is the business of whoever trains.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from toolchain.artifacts import is_full
from toolchain.errors import ToolchainError
from toolchain.tensorfile import tensor_bytes, write_header

_SCHEMA_VERSION = "1"


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """One of them, open. Tensors are read when they are asked for."""

    path: Path
    step: int
    """Steps taken."""
    run: dict[str, Any]
    """What it belongs to, as it was given."""
    harm: float | None
    """What the model was found to be then, less being better; None if nobody looked."""
    names: frozenset[str]
    get: Callable[[str], torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Checkpoints:
    """Where they lie, and which are kept."""

    directory: Path
    keep: int = 1
    """The last so many. The one of least harm stays besides."""

    def __post_init__(self) -> None:
        if self.keep < 1:
            raise ToolchainError(f"{self.keep} checkpoints are to be kept; it is at least 1")

    def paths(self) -> list[Path]:
        """All there are, the last one last."""
        return sorted(self.directory.glob("step-*.safetensors"))

    @contextmanager
    def latest(self) -> Iterator[Checkpoint | None]:
        """Open the one to go on from, if there is one.

        Raises:
            ToolchainError: It is none, or something else than a checkpoint was asked of it.
        """
        paths = self.paths()
        if not paths:
            yield None
            return
        with open_checkpoint(paths[-1]) as found:
            yield found

    def best(self) -> tuple[float, Path] | None:
        """The least harm that was found and where, the earliest of equals."""
        judged = []
        for path in self.paths():
            with open_checkpoint(path) as found:
                if found.harm is not None:
                    judged.append((found.harm, path))
        return min(judged, default=None)

    def write(
        self,
        step: int,
        run: Mapping[str, Any],
        tensors: Mapping[str, torch.Tensor],
        *,
        harm: float | None = None,
        whole: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> None:
        """Write one beside its place, rename it, and remove those that are no longer wanted.

        Args:
            step: Steps taken.
            run: What it belongs to, as JSON.
            tensors: By any names.
            harm: Of the model as it is now, if it is known.
            whole: Makes a tensor's values at hand, of one tensor at a time; its shape is known before.

        Raises:
            ToolchainError: It cannot be written; those before it are as they were.
        """
        path = self.directory / f"step-{step:08}.safetensors"
        beside = path.with_suffix(".part")
        metadata = {
            "schema_version": _SCHEMA_VERSION,
            "step": str(step),
            "run": json.dumps(run),
            "harm": json.dumps(harm),
        }
        ordered = in_file_order(tensors)
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            for leftover in self.directory.glob("step-*.part"):
                leftover.unlink()
            with beside.open("wb") as file:
                write_header(file, ((name, tuple(it.shape), it.dtype) for name, it in ordered), metadata)
                for _, item in ordered:
                    file.write(tensor_bytes(item if whole is None else whole(item)))
                file.flush()
                os.fsync(file.fileno())
            beside.replace(path)
        except OSError as error:
            beside.unlink(missing_ok=True)
            before = self.paths()
            raise ToolchainError(
                f"cannot write the checkpoint {path}: "
                + (f"its disk is full ({error}); make room" if is_full(error) else f"{error}; mend that")
                + ", and give the same command again"
                + (f": it goes on from {before[-1].name}" if before else "")
            ) from error
        best = self.best()
        for old in self.paths()[: -self.keep]:
            if best is None or old != best[1]:
                old.unlink()


def in_file_order(tensors: Mapping[str, torch.Tensor]) -> list[tuple[str, torch.Tensor]]:
    """Named tensors as they follow each other in a file."""
    return sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize)


@contextmanager
def open_checkpoint(path: Path) -> Iterator[Checkpoint]:
    """Open one.

    Raises:
        ToolchainError: It is none, or something else than a checkpoint was asked of it.
    """
    try:
        with safe_open(path, framework="pt") as stored:
            metadata = stored.metadata() or {}
            if metadata["schema_version"] != _SCHEMA_VERSION:
                raise KeyError(f"schema_version {metadata['schema_version']}")
            yield Checkpoint(
                path=path,
                step=int(metadata["step"]),
                run=json.loads(metadata["run"]),
                harm=json.loads(metadata["harm"]),
                names=frozenset(stored.keys()),
                get=stored.get_tensor,
            )
    except (SafetensorError, KeyError, RuntimeError, ValueError, OSError) as error:
        if isinstance(error, ToolchainError):
            raise
        raise ToolchainError(
            f"{path} is no checkpoint of this training: {error}; remove it or name another"
        ) from error
