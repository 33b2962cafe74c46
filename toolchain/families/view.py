"""Opening a model: which directory or hub repository it is, what family, and how it wants to be run."""

from __future__ import annotations

import copy
import dataclasses
import logging
import math
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from toolchain.artifacts import read_json, write_json
from toolchain.errors import ToolchainError
from toolchain.families.names import stored_names
from toolchain.families.stored import StoredTensors, require_same_names, weight_files

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch
    from diffusers import DiffusionPipeline

    from toolchain.families.mmdit import MMDiT, TextStates
    from toolchain.geometry import Geometry, Semantics, Unit

BUILT_IN = "shapes"
DEFAULTS_FILE = "generation_defaults.json"

_PUBLISHED = Path(__file__).parent / "published"
"""Configurations of published models, by their hub ids: what `config` opens without a network."""

FILES = (
    *("*.json", "*/*.json", "*/*.txt", "*/*.model", "*/*.safetensors"),
    *("README.md", "LICENSE*", "NOTICE*"),  # on what terms it may be used
)
"""What is fetched of a repository on the hub: never pickled weights or single-file copies."""

_SCHEMA_VERSION = 1
# By the class of the pipeline. A new family is a module with a subclass of MMDiT, and a line here.
_FAMILIES = {
    "StableDiffusion3Pipeline": "toolchain.families.sd3:SD3",
    "FluxPipeline": "toolchain.families.flux:Flux",
}

Precision = Literal["float32", "stored", "none", "config"]


@dataclass(frozen=True, kw_only=True)
class GenerationDefaults:
    """How a model is run unless told otherwise; the values here are diffusers' own for Stable Diffusion 3."""

    num_inference_steps: int = 28
    guidance_scale: float = 7.0
    max_sequence_length: int = 256
    """T5 tokens; in Stable Diffusion 3 behind the CLIP tokens, zeros where there is no T5."""
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


class Texts(Protocol):
    """Text states that were computed before."""

    def encode(self, prompts: list[str]) -> TextStates | None:
        """Those of prompts; None unless all of them are known."""


@dataclass(frozen=True, kw_only=True)
class Model:
    """A text-to-image pipeline and where it came from."""

    source: str
    """What the user called it: `shapes`, a directory or a hub id."""
    path: Path
    pipeline: DiffusionPipeline
    """On the CPU, ready for inference."""
    stored_dtype: torch.dtype
    """Precision of the transformer's weights on disk, which its students keep."""
    defaults: GenerationDefaults
    world: Literal["shapes"] | None
    """The built-in world whose captions and detector fit this model; None for all others."""
    config_only: bool = False
    """Whether it was opened without weights, which then are zeros."""
    adapters: tuple[str, ...] = ()
    """LoRA adapters that were baked into its weights, each with its scale."""
    texts: Texts | None = None
    """What its text encoders made of some prompts before; None if nothing."""

    @property
    def repository(self) -> str | None:
        """Where on the hub the files are from, as owner/name; None for a model from elsewhere."""
        folder, inside = self.path.parent.parent.name, self.path.parent.name
        if inside != "snapshots" or not folder.startswith("models--"):
            return None
        return folder.removeprefix("models--").replace("--", "/")

    @property
    def revision(self) -> str | None:
        """Commit of that repository which the files are of."""
        return self.path.name if self.repository else None

    @property
    def mmdit(self) -> MMDiT:
        """The view of the transformer that every stage uses."""
        return _family(type(self.pipeline).__name__)(
            self.pipeline.transformer,
            guidance_scale=self.defaults.guidance_scale,
            vae_scale_factor=self.pipeline.vae_scale_factor,
        )

    @property
    def geometry(self) -> Geometry:
        """The transformer as numbers, for pictures and prompts of the default size."""
        mmdit = self.mmdit
        return mmdit.geometry(
            height=self.defaults.height,
            width=self.defaults.width,
            text_tokens=mmdit.num_text_tokens(self.pipeline, self.defaults.max_sequence_length),
        )

    @property
    def guided(self) -> bool:
        """Whether each step of sampling asks twice, with the prompt and with the empty one."""
        return self.mmdit.classifier_free and self.defaults.guidance_scale > 1

    @property
    def num_parameters(self) -> int:
        """Parameters of the transformer."""
        return sum(item.numel() for item in self.pipeline.transformer.parameters())

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of the latents of a picture of the default size."""
        factor = self.pipeline.vae_scale_factor
        channels = self.mmdit.latent_channels
        return (channels, self.defaults.height // factor, self.defaults.width // factor)

    def without_t5(self) -> Model:
        """The same model, its T5 text encoder left out: zeros take the place of what it would say.

        Raises:
            ToolchainError: It has none, or cannot do without.
        """
        if getattr(self.pipeline, "text_encoder_3", None) is None:
            reason = "has no T5" if self.mmdit.family == "sd3" else "cannot do without its T5"
            raise ToolchainError(f"{self.source} {reason}; of Stable Diffusion 3 and 3.5 it can be left out")
        parts = {**self.pipeline.components, "text_encoder_3": None, "tokenizer_3": None}
        with _quiet():
            return dataclasses.replace(self, pipeline=type(self.pipeline)(**parts))

    def without_units(self, removed: Iterable[Unit], semantics: Semantics = "zero") -> Model:
        """The same model, some of its blocks and components gone from its transformer; weights are shared.

        Raises:
            ToolchainError: There is no such block or component.
        """
        parts = {
            **self.pipeline.components,
            "transformer": self.mmdit.without(removed, semantics).transformer,
        }
        with _quiet():
            return dataclasses.replace(self, pipeline=type(self.pipeline)(**parts))

    def weights(self, part: str) -> Mapping[str, torch.Tensor]:
        """Tensors of a part by the names of its state dict, read from disk one at a time where it holds none.

        Raises:
            ToolchainError: The files do not hold exactly what the part is made of.
        """
        import torch

        module = getattr(self.pipeline, part)
        held: dict[str, torch.Tensor] = module.state_dict()
        if self.config_only:
            return {name: torch.zeros(1).expand(tensor.shape) for name, tensor in held.items()}
        if any(tensor.is_meta for tensor in held.values()):
            return StoredTensors(self.source, self.path / part, module, stored_names(module))
        return held

    @property
    def text_encoders(self) -> list[torch.nn.Module]:
        """Those there are."""
        parts = self.pipeline.components.items()
        return [part for name, part in parts if name.startswith("text_encoder") and part is not None]

    def encode(self, prompts: list[str]) -> TextStates:
        """What the text encoders make of prompts at the default settings, or made of them before."""
        known = None if self.texts is None else self.texts.encode(prompts)
        if known is not None:
            return known
        from toolchain.prefix import lent
        from toolchain.processes import processes

        with lent(*self.text_encoders):
            return self.mmdit.encode_prompts(
                self.pipeline, prompts, self.defaults.max_sequence_length, processes().device
            )

    def paint(self, prompts: list[str], noise: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
        """Paint prompts at the default settings, from initial noise [N, C, H, W].

        Returns:
            Pictures [N, height, width, 3].
        """
        import torch

        from toolchain.prefix import lent
        from toolchain.processes import processes

        parts = [item for item in self.pipeline.components.values() if isinstance(item, torch.nn.Module)]
        latents = torch.from_numpy(noise).to(processes().device)
        with lent(*parts):
            pictures = self.pipeline(
                prompts,
                num_inference_steps=self.defaults.num_inference_steps,
                guidance_scale=self.defaults.guidance_scale,
                max_sequence_length=self.defaults.max_sequence_length,
                height=self.defaults.height,
                width=self.defaults.width,
                latents=self.mmdit.pipeline_latents(latents),
                output_type="np",
            ).images
        images: npt.NDArray[np.uint8] = (pictures * 255).round().astype("uint8")
        return images


def open_model(source: str, *, precision: Precision = "float32", transformer_only: bool = False) -> Model:
    """Open `shapes`, a local diffusers directory, or a pipeline on the Hugging Face hub.

    Args:
        source: A directory wins over a hub id of its name; `shapes` is always the model that comes with the
            tool, and `./shapes` a directory of that name.
        precision: `float32` is what a CPU computes and trains in, whatever the weights are stored in.
            `stored` keeps the weights of each part as they lie on disk, without a second copy, for models of
            billions of parameters; what is to learn of them is for the training to hold in float32. `none`
            leaves all parameters on the meta device, for `Model.weights` to read one at a time. `config`
            takes the configurations alone, of a model whose weights need not be there: its tensors are zeros
            that take no memory, and tokenizers may be missing too. Some published models are known by their
            hub ids.
        transformer_only: Leave the weights of all other parts on disk, where `save_model` copies them from.

    Raises:
        ToolchainError: There is no such model, its class is not supported, or its files are damaged.
    """
    import torch

    path = _resolve(source, config_only=precision == "config")
    index = read_json(path / "model_index.json")
    name = index.get("_class_name")
    if name not in _FAMILIES:
        raise ToolchainError(
            f"{source} is a {name}; supported: {', '.join(_FAMILIES)} "
            "(Stable Diffusion 3 and 3.5, FLUX.1, and their students)"
        )
    family = _family(name)
    part = index.get("transformer")
    if not isinstance(part, list) or part[-1] not in (family.plain.__name__, family.sparse.__name__):
        raise ToolchainError(
            f"the transformer of {source} is {part}; that of a {name} is a {family.plain.__name__}"
        )
    transformer = read_json(path / "transformer" / "config.json")
    usual = GenerationDefaults(**family.usual_settings(transformer))
    # A repository says how its model is run on its page only, which is no data.
    said = path if (path / DEFAULTS_FILE).exists() else _PUBLISHED / source
    defaults, world = _read_defaults(said, usual)
    pipeline = _load(source, path, index, family, precision, transformer_only)
    model = Model(
        source=source,
        path=path,
        pipeline=pipeline,
        stored_dtype=torch.bfloat16 if precision == "config" else _stored_dtype(path / "transformer"),
        defaults=defaults,
        world=world,
        config_only=precision == "config",
    )
    unit = pipeline.vae_scale_factor * model.mmdit.patch_size
    if defaults.height % unit or defaults.width % unit:
        raise ToolchainError(
            f"{source} is to make pictures of {defaults.height}x{defaults.width} pixels, but it takes "
            f"multiples of {unit} only; change {DEFAULTS_FILE}"
        )
    return model


def save_model(model: Model, path: Path) -> None:
    """Write a pipeline as a plain diffusers directory, its generation defaults beside it.

    Args:
        model: It is written in the precision it was stored in, and left as it is; parts whose weights were
            left on disk are copied from there.
        path: An existing directory.
    """
    resting = {name for name, part in model.pipeline.components.items() if _rests(part)}
    with _quiet():
        parts = {
            name: None if name in resting else _cast(part, model.stored_dtype)
            for name, part in model.pipeline.components.items()
        }
        type(model.pipeline)(**parts).save_pretrained(path, safe_serialization=True)
    if resting:
        index, own = read_json(path / "model_index.json"), read_json(model.path / "model_index.json")
        write_json(path / "model_index.json", index | {name: own[name] for name in resting})
        for name in sorted(resting):
            part = model.path / name
            (path / name).mkdir()
            for file in (part / "config.json", *weight_files(part), *part.glob("*.safetensors.index.json")):
                shutil.copyfile(file, path / name / file.name)
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


def _rests(part: Any) -> bool:
    """Whether a part's weights were left on disk."""
    import torch

    return isinstance(part, torch.nn.Module) and any(item.is_meta for item in part.parameters())


def _cast(part: Any, dtype: torch.dtype) -> Any:
    """A part in another precision; it shares nothing with the part, which other models may have in use."""
    import torch

    if not isinstance(part, torch.nn.Module) or {item.dtype for item in part.parameters()} == {dtype}:
        return part
    return copy.deepcopy(part).to(dtype)


def built_in_path() -> Path:
    """Directory of the model that comes with the tool."""
    return Path(__file__).parent.parent / "shapes" / "weights"


def _resolve(source: str, *, config_only: bool) -> Path:
    if source == BUILT_IN:
        return built_in_path()
    if Path(source).is_dir():
        if not (Path(source) / "model_index.json").is_file():
            raise ToolchainError(
                f"{source} is a directory without model_index.json; give that of a diffusers pipeline"
            )
        return Path(source)
    if source.count("/") != 1 or source.startswith((".", "/", "~")) or source.endswith("/"):
        raise ToolchainError(
            f"there is no model {source!r}: it is neither a directory here nor {BUILT_IN!r}, the model that "
            "comes with the tool; a model on the Hugging Face hub is named owner/name"
        )
    if config_only and (_PUBLISHED / source / "model_index.json").is_file():
        return _PUBLISHED / source
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        patterns = [name for name in FILES if not (config_only and name.endswith(".safetensors"))]
        return Path(snapshot_download(source, allow_patterns=patterns, ignore_patterns="*.fp16.*"))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ToolchainError(
            f"there is no directory {source!r}, and the Hugging Face hub did not give a model of that name: "
            f"{reason}"
        ) from error


def _family(pipeline: str) -> type[MMDiT]:
    module, _, name = _FAMILIES[pipeline].partition(":")
    family: type[MMDiT] = getattr(import_module(module), name)
    return family


def _load(
    source: str,
    path: Path,
    index: dict[str, Any],
    family: type[MMDiT],
    precision: Precision,
    transformer_only: bool,
) -> DiffusionPipeline:
    import diffusers
    import torch
    import transformers
    from safetensors import SafetensorError

    parts: dict[str, Any] = {}
    try:
        with _quiet():
            for name, part in index.items():
                if name.startswith("_"):
                    continue
                where, (library, kind) = path / name, part
                if kind is None:  # so diffusers notes a part that is not there
                    parts[name] = None
                    continue
                if name == "transformer":
                    parts[name] = _load_transformer(source, where, family, precision)
                    continue
                made = getattr({"diffusers": diffusers, "transformers": transformers}[library], kind)
                weighs = name == "vae" or name.startswith(("text_encoder", "image_encoder"))
                if precision == "config" and not weighs and not where.is_dir():
                    parts[name] = None  # a tokenizer, which would only say how long prompts may be
                elif not weighs:
                    parts[name] = made.from_pretrained(where, local_files_only=True)
                elif precision in ("none", "config"):
                    parts[name] = _skeleton(where, made)
                else:
                    dtype = torch.float32 if precision == "float32" else _stored_dtype(where)
                    if transformer_only:
                        parts[name] = _skeleton(where, made).to(dtype)
                        continue
                    # Either library only warns of what a file lacks, and makes it up.
                    parts[name], report = made.from_pretrained(
                        where,
                        local_files_only=True,
                        dtype=dtype,
                        use_safetensors=True,
                        output_loading_info=True,
                    )
                    require_same_names(source, name, report["missing_keys"], ())
            pipeline = getattr(diffusers, index["_class_name"])(**parts)
    except ToolchainError:
        raise
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ToolchainError(f"{source} cannot be opened as a diffusers pipeline: {reason}") from error
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval().requires_grad_(False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _load_transformer(source: str, path: Path, family: type[MMDiT], precision: Precision) -> torch.nn.Module:
    """A transformer with all weights of its files and no others, tensor by tensor."""
    import torch

    from toolchain.families.mmdit import REMOVED_KEY, SEMANTICS_KEY

    config = read_json(path / "config.json")
    removed, semantics = config.pop(REMOVED_KEY, None), config.pop(SEMANTICS_KEY, None)
    with torch.device("meta"):
        transformer: torch.nn.Module = family.plain.from_config(config)
    if removed is not None:
        gone = {int(block): tuple(names) for block, names in removed.items()}
        transformer = family(transformer, guidance_scale=1.0).with_removed(gone, semantics).transformer
    if precision == "config":
        return transformer
    stored = StoredTensors(source, path, transformer)
    if precision != "none":
        weights = {name: stored[name] for name in stored}
        if precision == "float32":
            weights = {name: tensor.float() for name, tensor in weights.items()}
        transformer.load_state_dict(weights, assign=True)
    return transformer


def _skeleton(path: Path, kind: Any) -> torch.nn.Module:
    """A text encoder or an autoencoder whose parameters have a shape and no storage."""
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        if hasattr(kind, "from_config"):
            module: torch.nn.Module = kind.from_config(kind.load_config(path))
        else:
            module = kind(kind.config_class.from_pretrained(path))
    return module.float()  # whatever its config says: it is the type that its weights are read into


def _stored_dtype(part: Path) -> torch.dtype:
    import torch
    from safetensors import safe_open

    with safe_open(weight_files(part)[0], framework="pt") as stored:
        name = stored.get_slice(next(iter(stored.keys()))).get_dtype()
    known = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    if name not in known:
        raise ToolchainError(f"{part} is stored as {name}; supported: {', '.join(known)}")
    return known[name]


def _read_defaults(
    path: Path, own: GenerationDefaults
) -> tuple[GenerationDefaults, Literal["shapes"] | None]:
    stored = path / DEFAULTS_FILE
    if not stored.exists():
        return own, None
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
