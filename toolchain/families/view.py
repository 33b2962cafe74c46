"""Opening a model: which directory or hub repository it is, what family, and how it wants to be run."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from toolchain.artifacts import read_json, write_json
from toolchain.errors import ToolchainError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch
    from diffusers import StableDiffusion3Pipeline

BUILT_IN = "shapes"
DEFAULTS_FILE = "generation_defaults.json"

_SUPPORTED_PIPELINES = ("StableDiffusion3Pipeline",)
_SCHEMA_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class GenerationDefaults:
    """How a model is run unless told otherwise; the values here are diffusers' own for SD3."""

    num_inference_steps: int = 28
    guidance_scale: float = 7.0
    max_sequence_length: int = 256
    """T5 tokens behind the CLIP tokens, zeros where there is no T5."""
    height: int = 1024
    """Pixels, as `width`."""
    width: int = 1024

    def __post_init__(self) -> None:
        for name, least in (
            ("num_inference_steps", 1),
            ("max_sequence_length", 0),
            ("height", 1),
            ("width", 1),
        ):
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise ToolchainError(
                    f"{name} is {value!r} in {DEFAULTS_FILE}; it is a number from {least} up"
                )
        if type(self.guidance_scale) not in (int, float) or not math.isfinite(self.guidance_scale):
            raise ToolchainError(
                f"guidance_scale is {self.guidance_scale!r} in {DEFAULTS_FILE}; it is a number"
            )


@dataclass(frozen=True, kw_only=True)
class Model:
    """A text-to-image pipeline and where it came from."""

    source: str
    """What the user called it: `shapes`, a directory or a hub id."""
    path: Path
    pipeline: StableDiffusion3Pipeline
    """In float32 on the CPU, ready for inference."""
    stored_dtype: torch.dtype
    """Precision of the transformer's weights on disk, which its students keep."""
    defaults: GenerationDefaults
    world: Literal["shapes"] | None
    """The built-in world whose captions and detector fit this model; None for all others."""

    @property
    def num_parameters(self) -> int:
        """Parameters of the transformer."""
        return sum(item.numel() for item in self.pipeline.transformer.parameters())

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of the latents of a picture of the default size."""
        factor = self.pipeline.vae_scale_factor
        channels = self.pipeline.transformer.config.in_channels
        return (channels, self.defaults.height // factor, self.defaults.width // factor)

    def paint(self, prompts: list[str], noise: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
        """Paint prompts at the default settings, from initial noise [N, C, H, W].

        Returns:
            Pictures [N, height, width, 3].
        """
        import torch

        pictures = self.pipeline(
            prompts,
            num_inference_steps=self.defaults.num_inference_steps,
            guidance_scale=self.defaults.guidance_scale,
            max_sequence_length=self.defaults.max_sequence_length,
            height=self.defaults.height,
            width=self.defaults.width,
            latents=torch.from_numpy(noise),
            output_type="np",
        ).images
        images: npt.NDArray[np.uint8] = (pictures * 255).round().astype("uint8")
        return images


def open_model(source: str) -> Model:
    """Open `shapes`, a local diffusers directory, or a pipeline on the Hugging Face hub.

    Raises:
        ToolchainError: There is no such model, or its class is not supported.
    """
    path = _resolve(source)
    index = read_json(path / "model_index.json")
    name = index.get("_class_name")
    if name not in _SUPPORTED_PIPELINES:
        raise ToolchainError(
            f"{source} is a {name}; supported: {', '.join(_SUPPORTED_PIPELINES)} "
            "(Stable Diffusion 3 and 3.5 and their students)"
        )
    defaults, world = _read_defaults(path)
    pipeline = _load(source, path, index)
    unit = pipeline.vae_scale_factor * pipeline.transformer.config.patch_size
    if defaults.height % unit or defaults.width % unit:
        raise ToolchainError(
            f"{source} is to make pictures of {defaults.height}x{defaults.width} pixels, but it takes "
            f"multiples of {unit} only; change {DEFAULTS_FILE}"
        )
    return Model(
        source=source,
        path=path,
        pipeline=pipeline,
        stored_dtype=_stored_dtype(path / "transformer"),
        defaults=defaults,
        world=world,
    )


def save_model_(model: Model, path: Path) -> None:
    """Write a pipeline as a plain diffusers directory, its generation defaults beside it.

    Args:
        model: Its weights are cast in place to the precision they were stored in.
        path: An existing directory.
    """
    with _quiet():
        model.pipeline.to(model.stored_dtype)
        model.pipeline.save_pretrained(path, safe_serialization=True)
    for config in (path / "model_index.json", *path.glob("*/config.json")):
        # diffusers notes the directory a part was loaded from, which means nothing anywhere else.
        values = {key: value for key, value in read_json(config).items() if key != "_name_or_path"}
        if "dtype" in values:
            # Unless told a type, transformers takes this one and diffusers float32: they have to agree.
            values["dtype"] = "float32"
        write_json(config, values)
    for weights in path.glob("*/*.safetensors"):
        weights.chmod(0o644)  # safetensors makes them private, unlike every other file here
    write_json(
        path / DEFAULTS_FILE,
        {"schema_version": _SCHEMA_VERSION, "world": model.world, **dataclasses.asdict(model.defaults)},
    )


def built_in_path() -> Path:
    """Directory of the model that comes with the tool."""
    return Path(__file__).parent.parent / "shapes" / "weights"


def _resolve(source: str) -> Path:
    if Path(source).is_dir():
        if not (Path(source) / "model_index.json").is_file():
            raise ToolchainError(
                f"{source} is a directory without model_index.json; give that of a diffusers pipeline"
            )
        return Path(source)
    if source == BUILT_IN:
        return built_in_path()
    if source.count("/") != 1 or source.startswith((".", "/", "~")) or source.endswith("/"):
        raise ToolchainError(
            f"there is no model {source!r}: it is neither a directory here nor {BUILT_IN!r}, the model that "
            "comes with the tool; a model on the Hugging Face hub is named owner/name"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        # Pickled weights and single-file copies are never fetched.
        patterns = ["*.json", "*/*.json", "*/*.safetensors", "*/*.txt", "*/*.model"]
        return Path(snapshot_download(source, allow_patterns=patterns, ignore_patterns="*.fp16.*"))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ToolchainError(
            f"there is no directory {source!r}, and the Hugging Face hub did not give a model of that name: "
            f"{reason}"
        ) from error


def _load(source: str, path: Path, index: dict[str, Any]) -> StableDiffusion3Pipeline:
    import torch
    from diffusers import StableDiffusion3Pipeline
    from safetensors import SafetensorError

    # diffusers saves a part that is not there as [null, null], but wants to be told so when it loads.
    absent = {name: None for name, part in index.items() if part == [None, None]}
    try:
        with _quiet():
            pipeline = StableDiffusion3Pipeline.from_pretrained(
                path, dtype=torch.float32, use_safetensors=True, local_files_only=True, **absent
            )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ToolchainError(f"{source} cannot be opened as a diffusers pipeline: {reason}") from error
    for name in ("transformer", "vae"):
        # diffusers only warns of what a file lacks, and leaves whatever was in memory in its place.
        if missing := sorted(getattr(pipeline, name).state_dict().keys() - _stored_names(path / name)):
            raise ToolchainError(f"{source} lacks weights of its {name}: {', '.join(missing[:5])}")
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval().requires_grad_(False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _stored_names(part: Path) -> set[str]:
    from safetensors import safe_open

    names: set[str] = set()
    for file in part.glob("*.safetensors"):
        with safe_open(file, framework="pt") as stored:
            names.update(stored.keys())
    return names


def _stored_dtype(part: Path) -> torch.dtype:
    import torch
    from safetensors import safe_open

    with safe_open(min(part.glob("*.safetensors")), framework="pt") as stored:
        name = stored.get_slice(next(iter(stored.keys()))).get_dtype()
    return {"F32": torch.float32, "F16": torch.float16}.get(name, torch.bfloat16)


def _read_defaults(path: Path) -> tuple[GenerationDefaults, Literal["shapes"] | None]:
    stored = path / DEFAULTS_FILE
    if not stored.exists():
        return GenerationDefaults(), None
    values = read_json(stored)
    if values.pop("schema_version", None) != _SCHEMA_VERSION:
        raise ToolchainError(f"{stored} is not of schema version {_SCHEMA_VERSION}; update hptool")
    world = values.pop("world", None)
    fields = {field.name for field in dataclasses.fields(GenerationDefaults)}
    if set(values) != fields or world not in ("shapes", None):
        raise ToolchainError(
            f"{stored} has the keys {sorted(values)} and the world {world!r}; "
            f"expected {sorted(fields)} and 'shapes' or null"
        )
    return GenerationDefaults(**values), world


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep diffusers' and transformers' advice and progress bars out of our output; errors still show."""

    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    libraries: tuple[Any, ...] = (diffusers_logging, transformers_logging)
    levels = [library.get_verbosity() for library in libraries]
    for library in libraries:
        library.set_verbosity(logging.ERROR)
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library, level in zip(libraries, levels, strict=True):
            library.set_verbosity(level)
