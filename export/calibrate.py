"""What the inputs of a model's linears look like while it samples: the mean square of every channel.

A weight's rounding error reaches the output times the input it meets, so an error at an input that is small
or mostly off costs little. These moments weigh the errors when scales are chosen (`rounding.py`) and when
bits are handed out (`bits.py`).

They are gathered while the model samples prompts at its own defaults, so nothing else has to be computed, and
written down after every batch of prompts: a run that was stopped goes on with the batches that are missing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from torch import nn

from export.errors import ExportError
from toolchain.trajectories import sample_states

if TYPE_CHECKING:
    from toolchain.families import Model

__all__ = ["Moments", "collect_moments", "read_moments", "weights_digest"]

SCHEMA_VERSION = 1
Array = np.ndarray[Any, Any]


@dataclass(frozen=True, kw_only=True)
class Moments:
    """Second moments of the inputs of a transformer's linears."""

    sums: Mapping[str, Array]
    """By the name of the weight parameter: float64 [K], the sum over tokens of each input's square."""
    counts: Mapping[str, int]
    """Tokens (or pictures, where a linear sees one vector for each) that were summed."""
    batches: int
    """Batches of prompts that are in the sums."""
    settings: Mapping[str, Any]
    """What the numbers depend on: the digest of the weights, prompts, seed, steps, guidance."""

    def importance(self, name: str) -> Array:
        """The mean square of each input of a linear, float64 [K].

        Raises:
            ExportError: Nothing has passed through a linear of this name.
        """
        if not self.counts.get(name):
            raise ExportError(
                f"no input of {name!r} was seen while the model sampled; calibrate the model that is exported"
            )
        mean: Array = self.sums[name] / self.counts[name]
        return mean


def collect_moments(
    model: Model,
    prompts: Sequence[str],
    path: Path,
    *,
    seed: int = 0,
    batch_size: int = 8,
    on_step: Callable[[], None] | None = None,
) -> Moments:
    """Let a model sample prompts and sum the squares of what enters its linears.

    Args:
        model: The model that will be exported; its own sampling decides what its linears see.
        prompts: What users would ask for; a few dozen are enough.
        path: A safetensors file, complete when this returns. What is in it already is not done again.
        seed: Of the first batch's initial noise; every batch has noise of its own.
        batch_size: Prompts at once.
        on_step: Called after every step of every batch.

    Raises:
        ExportError: The file holds moments of something else, or is damaged.
        ToolchainError: The model's velocities are not finite.
    """
    if not prompts:
        raise ExportError("calibration needs prompts, and none were given")
    settings = {
        "model": model.source,
        "weights": weights_digest(model.weights("transformer")),
        "prompts_sha256": hashlib.sha256("\n".join(prompts).encode()).hexdigest(),
        "num_prompts": len(prompts),
        "seed": seed,
        "batch_size": batch_size,
        "generation": asdict(model.defaults),
    }
    total = -(-len(prompts) // batch_size)
    done = (
        _resumed(path, settings)
        if path.exists()
        else Moments(sums={}, counts={}, batches=0, settings=settings)
    )
    for number in range(done.batches, total):
        batch = list(prompts[number * batch_size : (number + 1) * batch_size])
        with _summing(model.pipeline.transformer) as (sums, counts):
            sample_states(model, batch, seed=seed + number, batch_size=batch_size, on_step=on_step)
        done = Moments(
            sums={name: done.sums.get(name, 0.0) + value for name, value in sums.items()},
            counts={name: done.counts.get(name, 0) + value for name, value in counts.items()},
            batches=number + 1,
            settings=settings,
        )
        _write(path, done)
    return done


def read_moments(path: Path) -> Moments:
    """Read what `collect_moments` wrote, strictly.

    Raises:
        ExportError: The file is missing, damaged or of another schema.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            sums = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no mapping)
        if metadata.get("schema_version") != str(SCHEMA_VERSION) or metadata.get("kind") != "moments":
            raise ExportError(
                f"{path} holds no moments of schema version {SCHEMA_VERSION}; remove it to calibrate anew"
            )
        counts = json.loads(metadata["counts"])
        if counts.keys() != sums.keys():
            raise ExportError(f"{path} counts other linears than it sums; remove it to calibrate anew")
        return Moments(
            sums=sums,
            counts=counts,
            batches=int(metadata["batches"]),
            settings=json.loads(metadata["settings"]),
        )
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        if isinstance(error, ExportError):
            raise
        raise ExportError(
            f"{path} cannot be read as moments: {error}; remove it to calibrate anew"
        ) from error


def weights_digest(weights: Mapping[str, torch.Tensor]) -> str:
    """Hex digest of a module's tensors in float32, whatever they are held in, their names included."""
    digest = hashlib.sha256()
    for name, tensor in weights.items():
        digest.update(f"{name} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().float().numpy().tobytes())
    return digest.hexdigest()


@contextmanager
def _summing(module: nn.Module) -> Iterator[tuple[dict[str, Array], dict[str, int]]]:
    """Sum the squares of whatever enters the linears of a module meanwhile."""
    sums: dict[str, Array] = {}
    counts: dict[str, int] = {}

    def see(name: str, _: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        rows = inputs[0].detach().flatten(0, -2)
        # In float32, for the square of an activation may leave float16's range.
        found = rows.float().square().sum(0).double().cpu().numpy()
        sums[name] = sums[name] + found if name in sums else found
        counts[name] = counts.get(name, 0) + len(rows)

    linears = {name: part for name, part in module.named_modules() if isinstance(part, nn.Linear)}
    handles = [
        part.register_forward_pre_hook(partial(see, f"{name}.weight")) for name, part in linears.items()
    ]
    try:
        yield sums, counts
    finally:
        for handle in handles:
            handle.remove()


def _resumed(path: Path, settings: Mapping[str, Any]) -> Moments:
    found = read_moments(path)
    wanted = json.loads(json.dumps(settings))
    if other := sorted(
        key for key in {*found.settings, *wanted} if found.settings.get(key) != wanted.get(key)
    ):
        raise ExportError(
            f"{path} holds moments with another "
            + ", another ".join(f"{key} ({found.settings.get(key)}, not {wanted.get(key)})" for key in other)
            + "; name another file, or remove it to calibrate anew"
        )
    return found


def _write(path: Path, moments: Moments) -> None:
    metadata = {
        "schema_version": str(SCHEMA_VERSION),
        "kind": "moments",
        "batches": str(moments.batches),
        "counts": json.dumps(moments.counts),
        "settings": json.dumps(moments.settings),
    }
    beside = path.with_name(f".{path.name}.part")
    beside.write_bytes(save(dict(moments.sums), metadata))
    beside.replace(path)
