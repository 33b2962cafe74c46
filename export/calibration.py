"""What an export may know of a model beside its weights: which inputs matter, and what rounding does.

A directory of two files, `moments.safetensors` and `harms.json`. It is made with the model in memory; the
export that uses it needs no more than one tensor at a time.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from export.bits import Weight, assign_bits, num_bytes
from export.calibrate import Moments, collect_moments, read_moments, weights_digest
from export.errors import ExportError
from export.harm import rounding_harms
from profiles.typed import TypedDataError, from_data
from toolchain.artifacts import read_json, write_json
from toolchain.families import Model
from toolchain.progress import Bar
from toolchain.trajectories import sample_states

__all__ = ["GROUP_SIZE", "Calibration", "calibrate", "read_calibration"]

_MOMENTS, _HARMS = "moments.safetensors", "harms.json"
_SCHEMA_VERSION = 1
GROUP_SIZE = 128
"""Of mixed widths: what larger groups save is spent where it helps more."""


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Of one model."""

    moments: Moments
    harms: tuple[Weight, ...]
    """Of all linears of the blocks, in groups of `GROUP_SIZE`."""
    sha256: str
    """Digest of the two files, one after the other."""

    @property
    def importance(self) -> dict[str, NDArray[np.float64]]:
        """The mean square of each input of the linears, by the names of their weights."""
        return {item.name: self.moments.importance(item.name) for item in self.harms}

    def bits(self, max_bytes: int) -> dict[str, int]:
        """The best widths, by the names of the weights, that fit.

        Raises:
            ExportError: None do.
        """
        return assign_bits(self.harms, max_bytes=max_bytes)

    def uniform_bytes(self, group_size: int) -> int:
        """What the weights take in 4 bits, in groups of another size."""
        return sum(-(-item.bytes16 // 4) + item.bytes16 // group_size for item in self.harms)

    def num_bytes(self, bits: Mapping[str, int]) -> int:
        """What the weights take in some widths."""
        return num_bytes(self.harms, bits)


def calibrate(model: Model, prompts: Sequence[str], directory: Path, *, seed: int, bar: Bar) -> Calibration:
    """Let a model sample prompts, and note what its linears see and what rounding them would do.

    Args:
        model: With its weights, as it is going to be exported.
        prompts: What users would ask for; some dozens.
        directory: Where the files go; what is there already is not done again.
        seed: Of the noise.
        bar: Starts progress bars.

    Raises:
        ExportError: The directory holds the calibration of another model.
    """
    directory.mkdir(parents=True, exist_ok=True)
    steps = model.defaults.num_inference_steps * -(-len(prompts) // 8)
    moments = collect_moments(
        model, prompts, directory / _MOMENTS, seed=seed, on_step=bar("inputs of the linears", steps)
    )
    if not (directory / _HARMS).exists():
        steps = model.defaults.num_inference_steps * -(-len(prompts) // 32)
        states = sample_states(model, list(prompts), seed=seed + 1000, on_step=bar("states", steps))
        count = 64
        harms = rounding_harms(
            model,
            moments,
            states,
            group_size=GROUP_SIZE,
            num_states=count,
            seed=seed,
            on_step=bar("harm of rounding", min(count, len(states) // states.copies)),
        )
        record = {
            "schema_version": _SCHEMA_VERSION,
            "weights": moments.settings["weights"],
            "harms": [dataclasses.asdict(item) for item in harms],
        }
        write_json(directory / _HARMS, record)
    return read_calibration(directory, model)


def read_calibration(directory: Path, model: Model) -> Calibration:
    """Read what `calibrate` wrote about this very model.

    Raises:
        ExportError: It is missing, damaged, not finished or of another model.
    """
    moments = read_moments(directory / _MOMENTS)
    try:
        record = read_json(directory / _HARMS)
        harms = tuple(from_data(Weight, item) for item in record["harms"])
        digest: Any = record["weights"]
    except (ValueError, KeyError, TypedDataError) as error:
        raise ExportError(
            f"{directory} is no finished calibration: {error}. Run `hptool calibrate` with it as --output."
        ) from error
    if not digest == moments.settings["weights"] == weights_digest(model.weights("transformer")):
        raise ExportError(
            f"{directory} is the calibration of {moments.settings['model']}, whose weights are not those of "
            f"{model.source}. Calibrate the model that is exported: hptool calibrate {model.source}."
        )
    whole = hashlib.sha256()
    for name in (_MOMENTS, _HARMS):
        whole.update((directory / name).read_bytes())
    return Calibration(moments=moments, harms=harms, sha256=whole.hexdigest())
