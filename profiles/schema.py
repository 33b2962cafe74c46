"""What export and deploy have to know of a target device, read strictly from `profiles/<name>.toml`."""

from __future__ import annotations

import dataclasses
import difflib
import re
import tomllib
from collections import Counter
from dataclasses import dataclass
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, Literal

from profiles.typed import TypedDataError, from_data

__all__ = [
    "RTX_COMPUTE_CAPABILITIES",
    "Profile",
    "ProfileError",
    "Runtime",
    "available_profiles",
    "load_profile",
]

Runtime = Literal[
    "tensorrt-rtx", "tensorrt", "onnxruntime-tensorrt", "onnxruntime-cuda", "openvino", "onnxruntime-cpu"
]
PROCESSOR_RUNTIMES: tuple[Runtime, ...] = ("openvino", "onnxruntime-cpu")
"""Those that use no GPU."""

RTX_COMPUTE_CAPABILITIES = ("7.5", "8.0", "8.6", "8.9", "12.0", "12.1")
"""What TensorRT-RTX builds engines for."""

_GROUP_SIZES = (32, 64, 128)
_NEVER_INHERITED = ("name", "description")


class ProfileError(ValueError):
    """A device profile that does not exist or cannot be read."""


@dataclass(frozen=True, kw_only=True)
class Profile:
    """One target device and what is built for it."""

    name: str
    """Name of the file without `.toml`, and of the target on the command line and in a bundle."""
    description: str
    """The device, in a few words for a list of targets."""
    runtimes: tuple[Runtime, ...]
    """What may run the transformer there, best first. `tensorrt-rtx` and `tensorrt` run an engine that is
    built for the GPU, the others an ONNX graph, on what their name ends in."""
    compute_capability: str | None = None
    """Of the GPU, as in "8.9"; an engine runs on this one only. Left out where there is no GPU to use."""
    memory_gib: float
    """Memory that weights and activations share, in GiB (2^30 bytes): the GPU's, or the machine's where the
    two share it or there is no GPU."""
    memory_shared: bool = False
    """Whether a GPU has no memory of its own, but shares the computer's."""
    reserved_gib: float
    """What the system and its display keep of that memory, in GiB."""
    bandwidth_gb_s: float
    """Peak bandwidth of that memory, in 10^9 bytes a second."""
    peak_tflops: float
    """Peak rate of dense multiply-accumulates at the type of the activations with float32 accumulation, in
    10^12 floating-point operations a second; a multiply and an add are two, sparsity counts nothing."""
    sources: dict[str, str]
    """Where a field's number is from, by the field's name; needed of each that describes the hardware."""
    activations: Literal["float32", "float16"]
    """Type of the transformer's activations."""
    weight_bits: Literal[4, 8, 16, 32]
    """Bits of a transformer linear's weight; 16 and 32 leave the weights as they are."""
    group_size: int
    """Weights along the input axis that share one scale; without a meaning for 16 and 32 bits."""
    buckets: tuple[tuple[int, int], ...] = ()
    """Picture sizes (height, width) in pixels that an engine is built for; none: the model's default size.
    The profiles that come along name none, so that any model can be exported for them."""
    max_batch: int
    """Most pictures made at a time; guidance doubles the transformer's batch on top of it."""
    text_tokens: int = 0
    """Text tokens an engine is built for; 0: as many as the model's own defaults make."""

    def __post_init__(self) -> None:
        self._require_runtimes()
        self._require_sizes()
        self._require_sources()

    @property
    def uses_gpu(self) -> bool:
        """Whether any of the runtimes runs on a GPU."""
        return any(runtime not in PROCESSOR_RUNTIMES for runtime in self.runtimes)

    def _require_runtimes(self) -> None:
        capability = self.compute_capability
        if not self.runtimes:
            raise ProfileError("runtimes must name at least one, best first")
        if twice := _twice(self.runtimes):
            raise ProfileError(f"runtimes names {twice} twice")
        if capability is not None and not re.fullmatch(r"[1-9]\d*\.\d", capability):
            raise ProfileError(f'compute_capability must look like "8.9", not {capability!r}')
        if self.uses_gpu and capability is None:
            named = next(runtime for runtime in self.runtimes if runtime not in PROCESSOR_RUNTIMES)
            raise ProfileError(f'{named} runs on a GPU: give its compute_capability, as in "8.9"')
        if not self.uses_gpu and capability is not None:
            raise ProfileError(
                f"compute_capability is {capability}, but {self.runtimes[0]} uses no GPU: leave it out, or "
                "name a runtime that uses one"
            )
        if not self.uses_gpu and self.memory_shared:
            raise ProfileError(
                f"memory_shared is said of a GPU's memory, but {self.runtimes[0]} uses no GPU: leave it out"
            )
        if "tensorrt-rtx" in self.runtimes and capability not in RTX_COMPUTE_CAPABILITIES:
            raise ProfileError(
                f"TensorRT-RTX builds no engines for compute capability {capability}, only for "
                f"{', '.join(RTX_COMPUTE_CAPABILITIES)}: name the runtime tensorrt instead, whose engine is "
                "built on the device itself"
            )
        if not self.uses_gpu and self.activations == "float16":
            raise ProfileError(
                "a processor would convert float16 activations to float32 at every step: "
                'write activations = "float32"'
            )

    def _require_sizes(self) -> None:
        for option in ("memory_gib", "bandwidth_gb_s", "peak_tflops", "group_size", "max_batch"):
            # Infinity and NaN are numbers in TOML.
            if not 0 < getattr(self, option) < float("inf"):
                raise ProfileError(f"{option} must be a number above zero, not {getattr(self, option)}")
        if not 0 <= self.reserved_gib < self.memory_gib:
            raise ProfileError(
                f"reserved_gib must be from zero to below memory_gib, which is {self.memory_gib:g}, "
                f"not {self.reserved_gib:g}"
            )
        if self.text_tokens < 0:
            raise ProfileError(f"text_tokens must not be negative, not {self.text_tokens}")
        if self.weight_bits == 4 and self.group_size not in _GROUP_SIZES:
            raise ProfileError(
                f"4-bit weights take a group_size of {', '.join(map(str, _GROUP_SIZES))}, "
                f"not {self.group_size}"
            )
        if bad := [bucket for bucket in self.buckets if min(bucket) <= 0]:
            raise ProfileError(f"a bucket is [height, width] in pixels, both above zero, not {list(bad[0])}")
        if twice := _twice(self.buckets):
            raise ProfileError(f"buckets names {list(twice)} twice")

    def _require_sources(self) -> None:
        fields = {field.name for field in dataclasses.fields(self)} - {"sources"}
        if unknown := sorted(self.sources.keys() - fields):
            raise ProfileError(f"sources names {', '.join(unknown)}, which a profile does not have")
        needed = ["memory_gib", "bandwidth_gb_s", "peak_tflops"]
        if self.compute_capability is not None:
            needed.insert(0, "compute_capability")
        if missing := [name for name in needed if not self.sources.get(name, "").strip()]:
            raise ProfileError(f"sources must say where {', '.join(missing)} is from")


def available_profiles() -> list[str]:
    """Return the names of the profiles that come with the package, sorted."""
    return sorted(
        entry.name.removesuffix(".toml")
        for entry in resources.files(__package__).iterdir()
        if entry.name.endswith(".toml")
    )


def load_profile(name_or_path: str) -> Profile:
    """Read a profile that comes with the package, or any file whose name ends in `.toml`.

    A file may extend another profile: `extends` is the name of one that comes along, or the path of a file,
    relative to its own. It has that profile's values where it gives none, except name and description.

    Raises:
        ProfileError: There is no such profile, or it does not say what a profile has to say.
    """
    profile, _ = _load(_find(name_or_path, Path()), ())
    return profile


@dataclass(frozen=True, kw_only=True)
class _Place:
    """Where a profile is read from."""

    name: str
    file: Traversable
    directory: Path
    """What paths in the file are relative to."""
    shown: str


def _find(name_or_path: str, directory: Path) -> _Place:
    if name_or_path.endswith(".toml"):
        path = directory / name_or_path
        # Resolved, so that a file is the same by whatever path a circle comes back to it.
        return _Place(name=path.stem, file=path.resolve(), directory=path.parent, shown=str(path))
    if name_or_path not in available_profiles():
        raise ProfileError(_unknown(name_or_path))
    file = resources.files(__package__).joinpath(f"{name_or_path}.toml")
    return _Place(name=name_or_path, file=file, directory=Path(), shown=f"profiles/{name_or_path}.toml")


def _load(place: _Place, extending: tuple[_Place, ...]) -> tuple[Profile, dict[str, Any]]:
    """Return a profile, and all that its file and those it extends say."""
    try:
        text = place.file.read_text(encoding="utf-8")
    except OSError as error:
        raise ProfileError(f"Cannot read the device profile {place.shown}: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise ProfileError(f"The device profile {place.shown} is not UTF-8 text.") from error
    try:
        data = tomllib.loads(text)
        if "extends" in data:
            data = _laid_over(_base(data.pop("extends"), (*extending, place)), data, place.shown)
        profile = from_data(Profile, data)
    except (TypedDataError, ProfileError, tomllib.TOMLDecodeError) as error:
        raise ProfileError(
            f"The device profile {place.shown} cannot be used: {str(error).rstrip('.')}."
        ) from error
    if profile.name != place.name:
        raise ProfileError(
            f"The device profile {place.shown} is named {profile.name!r} inside: make the two names the same."
        )
    return profile, data


def _base(extends: Any, extending: tuple[_Place, ...]) -> dict[str, Any]:
    if not isinstance(extends, str):
        raise ProfileError(
            f"extends must be the name of a target or the path of a .toml file, not {extends!r}"
        )
    place = _find(extends, extending[-1].directory)
    if place.file in [other.file for other in extending]:
        circle = " extends ".join(other.shown for other in (*extending, place))
        raise ProfileError(f"{circle}, which goes round in a circle; take one extends out")
    return _load(place, extending)[1]


def _laid_over(base: dict[str, Any], own: dict[str, Any], shown: str) -> dict[str, Any]:
    inherited = {key: value for key, value in base.items() if key not in _NEVER_INHERITED}
    if not isinstance(own.get("sources", {}), dict):
        return inherited | own  # refused with its name when it is read
    # What the base says of its own number does not hold for another one.
    replaced = {key: shown for key in own if key in base["sources"]}
    return inherited | own | {"sources": base["sources"] | replaced | own.get("sources", {})}


def _twice(items: tuple[Any, ...]) -> Any:
    return next((item for item, count in Counter(items).items() if count > 1), None)


def _unknown(name: str) -> str:
    names = available_profiles()
    plain = {other.replace("-", ""): other for other in names}
    typed = name.lower().replace("-", "")
    near = [other for key, other in plain.items() if typed and key.startswith(typed)]
    near = near or [plain[key] for key in difflib.get_close_matches(typed, plain, n=2, cutoff=0.5)]
    guess = f" Did you mean {' or '.join(near)}?" if near else ""
    return (
        f"There is no target named {name!r}.{guess} Known targets: {', '.join(names)}; "
        "or give the path of a .toml file of your own."
    )
