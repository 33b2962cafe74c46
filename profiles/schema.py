"""What export and deploy have to know of a target device, read strictly from `profiles/<name>.toml`."""

from __future__ import annotations

import difflib
import re
import tomllib
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Literal

from profiles.typed import TypedDataError, from_data


class ProfileError(ValueError):
    """A device profile that does not exist or cannot be read."""


@dataclass(frozen=True, kw_only=True)
class Profile:
    """One target device and what is built for it."""

    name: str
    """Name of the file without `.toml`, and of the target on the command line and in a bundle."""
    description: str
    """The device, in a few words for a list of targets."""
    runtime: Literal["onnxruntime", "tensorrt-rtx"]
    """What runs the transformer there; anything but onnxruntime is an engine built at export."""
    compute_capability: str | None = None
    """Of the GPU, as in "8.9"; an engine runs on this one only. Left out where no engine is built."""
    memory_gib: float
    """Memory that weights and activations share: the GPU's, or the machine's where there is none."""
    activations: Literal["float32", "float16"]
    """Type of the transformer's activations."""
    weight_bits: Literal[4, 16, 32]
    """Bits of a transformer linear's weight; 16 and 32 leave the weights as they are."""
    group_size: int
    """Weights along the input axis that share one scale; only 4-bit weights have them."""
    buckets: tuple[tuple[int, int], ...] = ()
    """Picture sizes (height, width) in pixels that an engine is built for; none: the model's default size."""
    max_batch: int
    """Most pictures made at a time; guidance doubles the transformer's batch on top of it."""
    text_tokens: int = 0
    """Text tokens an engine is built for; 0: as many as the model's own defaults make."""

    def __post_init__(self) -> None:
        if self.compute_capability is not None and not re.fullmatch(r"\d+\.\d", self.compute_capability):
            raise ProfileError(f'compute_capability must look like "8.9", not {self.compute_capability!r}')
        if self.runtime == "tensorrt-rtx" and self.compute_capability is None:
            raise ProfileError('an engine is built for one GPU: give its compute_capability, as in "8.9"')
        for option in ("memory_gib", "group_size", "max_batch"):
            if not getattr(self, option) > 0:
                raise ProfileError(f"{option} must be above zero, not {getattr(self, option)}")
        if self.text_tokens < 0:
            raise ProfileError(f"text_tokens must not be negative, not {self.text_tokens}")
        if bad := [bucket for bucket in self.buckets if min(bucket) <= 0]:
            raise ProfileError(f"a bucket is [height, width] in pixels, both above zero, not {list(bad[0])}")


def available_profiles() -> list[str]:
    """Return the names of the profiles that come with the package, sorted."""
    return sorted(
        entry.name.removesuffix(".toml")
        for entry in resources.files(__package__).iterdir()
        if entry.name.endswith(".toml")
    )


def load_profile(name_or_path: str) -> Profile:
    """Read a profile that comes with the package, or any file whose name ends in `.toml`.

    Raises:
        ProfileError: There is no such profile, or it does not say what a profile has to say.
    """
    if name_or_path.endswith(".toml"):
        name, origin = Path(name_or_path).stem, name_or_path
        try:
            text = Path(name_or_path).read_text(encoding="utf-8")
        except OSError as error:
            raise ProfileError(f"Cannot read the device profile {origin}: {error.strerror}.") from error
        except UnicodeDecodeError as error:
            raise ProfileError(f"The device profile {origin} is not UTF-8 text.") from error
    else:
        name, origin = name_or_path, f"profiles/{name_or_path}.toml"
        if name not in available_profiles():
            raise ProfileError(_unknown(name))
        text = resources.files(__package__).joinpath(f"{name}.toml").read_text(encoding="utf-8")
    try:
        profile = from_data(Profile, tomllib.loads(text))
    except (TypedDataError, ProfileError, tomllib.TOMLDecodeError) as error:
        raise ProfileError(f"The device profile {origin} cannot be used: {error}.") from error
    if profile.name != name:
        raise ProfileError(
            f"The device profile {origin} is named {profile.name!r} inside: make the two names the same."
        )
    return profile


def _unknown(name: str) -> str:
    names = available_profiles()
    near = difflib.get_close_matches(name.lower(), names, n=2, cutoff=0.5)
    guess = f" Did you mean {' or '.join(near)}?" if near else ""
    return (
        f"There is no target named {name!r}.{guess} Known targets: {', '.join(names)}; "
        "or give the path of a .toml file of your own."
    )
