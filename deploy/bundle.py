"""The bundle directory: what its manifest says, and the strict reader that holds the directory to it.

Standard library only, so that a bundle can be checked where nothing is installed to run it. The digests find
damage and mix-ups; who made the bundle is for a signature to say (`deploy.signature`).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import stat
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from deploy.errors import BundleError, DeployError
from profiles.schema import Runtime
from profiles.typed import TypedDataError, from_data

__all__ = [
    "MANIFEST",
    "MAX_FILES",
    "MAX_MANIFEST_BYTES",
    "SCHEMA_VERSION",
    "SIGNATURE",
    "Architecture",
    "Bundle",
    "BundleError",
    "Defaults",
    "DeployError",
    "File",
    "Graph",
    "Manifest",
    "Provenance",
    "Scheduler",
    "Shapes",
    "Tokenizer",
    "Variant",
    "bundle_root",
    "graph_digests",
    "graph_files",
    "manifest_from_json",
    "manifest_to_json",
    "open_bundle",
    "read_manifest",
    "regular_files",
]

SCHEMA_VERSION = 3
MANIFEST = "manifest.json"
SIGNATURE = "bundle.sig"
"""The one file that may lie in a bundle and is not listed: it is made of all others."""
# Far above what any bundle has: what exceeds them was made to exhaust memory or time.
MAX_MANIFEST_BYTES = 16 << 20
MAX_FILES = 10_000
# By family, the components that a bundle has besides the transformer and the decoder, and those it may have.
ENCODERS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "sd3": (("text_encoder", "text_encoder_2"), ("text_encoder_3",)),
    "flux": (("text_encoder", "text_encoder_2"), ()),
}
# These run what was built for one kind of GPU and for sizes that were chosen then.
ENGINE_RUNTIMES = ("tensorrt-rtx", "tensorrt")
# The other tokenizers of a family are CLIP's.
T5_TOKENIZERS = {"sd3": "tokenizer_3", "flux": "tokenizer_2"}

_DAMAGED = "Copy the bundle again, or export it again."


@dataclass(frozen=True, kw_only=True)
class Graph:
    """One ONNX file; its external weights lie beside it."""

    path: str
    """Relative to the bundle, with forward slashes, as every path of the manifest."""
    activations: Literal["float32", "float16"]
    """Type of the graph's floating-point inputs and outputs."""
    weights: Literal["float32", "float16", "int8", "int4"]
    """How the linears' weights are stored."""


@dataclass(frozen=True, kw_only=True)
class Tokenizer:
    """A `tokenizer.json` and how its tokens are brought to one length."""

    path: str
    max_length: int
    """Tokens of a prompt after truncation and padding, start and end included."""
    pad_id: int


@dataclass(frozen=True, kw_only=True)
class Scheduler:
    """The options of the flow-matching Euler scheduler that change its sigmas."""

    spacing: Literal["train_range", "unit"]
    """Before they are shifted they run evenly from the first to the last that the model was trained with, or
    from 1 to 1 / steps."""
    num_train_timesteps: int
    shift: float
    use_dynamic_shifting: bool
    base_shift: float
    max_shift: float
    base_image_seq_len: int
    max_image_seq_len: int
    time_shift_type: Literal["exponential", "linear"]


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """The sizes that the code around the graphs needs."""

    family: Literal["sd3", "flux"]
    classifier_free: bool
    """Whether guidance compares two passes, with the prompt and with a negative one."""
    guidance_embeds: bool
    """Whether the guidance scale is one of the transformer's inputs."""
    latent_channels: int
    vae_scale_factor: int
    """Picture pixels along a side of one latent."""
    patch_size: int
    """Latents along a side of one transformer token."""
    max_latent_size: int
    """Largest latent height and width that the transformer's position table covers."""
    scaling_factor: float
    shift_factor: float
    joint_attention_dim: int
    """Width that text embeddings are padded to."""


@dataclass(frozen=True, kw_only=True)
class Defaults:
    """What a picture is made with when the caller does not say."""

    num_inference_steps: int
    guidance_scale: float
    max_sequence_length: int
    """T5 tokens of a prompt, or the zero tokens that stand for them where a bundle does not hold T5."""
    height: int
    width: int


@dataclass(frozen=True, kw_only=True)
class Shapes:
    """All that an engine can be asked for; an ONNX graph takes any size."""

    sizes: list[tuple[int, int]]
    """Of pictures (height, width) in pixels."""
    max_batch: int
    """Most pictures at a time; guidance doubles the transformer's batch on top of it."""
    text_tokens: int


@dataclass(frozen=True, kw_only=True)
class Variant:
    """How the transformer runs on one target; a target may have several, best first."""

    target: str
    """Name of the device profile."""
    runtime: Runtime
    path: str
    """The engine of `tensorrt-rtx`; for all others an ONNX graph, from which `tensorrt` builds an engine on
    the device."""
    activations: Literal["float32", "float16"]
    compute_capabilities: list[str]
    """GPUs that an engine is for, as in "8.9", the target's own first; none for onnxruntime."""
    shapes: Shapes | None
    """What an engine takes; None for onnxruntime."""


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """Where the weights came from and what made the bundle of them."""

    model: str
    """What was exported: a directory, or a repository of the hub."""
    revision: str | None
    """Commit of that repository, if it is one."""
    base_model: str | None
    """What the model was compressed from, if it was."""
    base_revision: str | None
    """Its commit, if it came from the hub."""
    license: str | None
    """Identifier of the model card, or the name of the licence's file in the bundle."""
    plan_sha256: str | None
    """Digest of the `plan.json` the model was pruned by."""
    calibration_sha256: str | None
    """Digest of the calibration that rounding heeded: of its `moments.safetensors`, then its `harms.json`."""
    tools: dict[str, str]
    """Versions of the tools that had a hand in it, by name."""


@dataclass(frozen=True, kw_only=True)
class File:
    """What a file of the bundle has to be."""

    sha256: str
    bytes: int


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The whole of `manifest.json`."""

    schema_version: int
    architecture: Architecture
    scheduler: Scheduler
    defaults: Defaults
    tokenizers: dict[str, Tokenizer]
    """By the name of the component: `tokenizer` to `tokenizer_3`, one for each text encoder."""
    graphs: dict[str, list[Graph]]
    """By the name of the component: `transformer`, `vae_decoder`, `text_encoder` to `text_encoder_3`."""
    variants: list[Variant]
    provenance: Provenance
    files: dict[str, File]
    """Every file of the bundle but the manifest and the signature, by path."""


@dataclass(frozen=True)
class Bundle:
    """A bundle directory that agreed with its manifest when it was opened."""

    path: Path
    manifest: Manifest

    def file(self, relative: str) -> Path:
        """Return where a file of the bundle lies.

        Raises:
            BundleError: The manifest does not list it.
        """
        if relative not in self.manifest.files:
            raise BundleError(f"{self.path} has no file {relative!r} in its manifest.")
        return self.path / relative  # listed paths were found to stay inside when the manifest was read


def graph_files(files: Mapping[str, File], path: str) -> dict[str, File]:
    """Return a graph among a bundle's files and the weights beside it, by path."""
    component = path.rpartition("/")[0]
    return {
        name: file
        for name, file in files.items()
        if name == path or (name.rpartition("/")[0] == component and not name.endswith(".onnx"))
    }


def graph_digests(files: Mapping[str, File], path: str) -> dict[str, str]:
    """Return the digests of what `graph_files` returns."""
    return {name: file.sha256 for name, file in graph_files(files, path).items()}


def manifest_to_json(manifest: Manifest) -> dict[str, Any]:
    """Turn the manifest into the plain data that `manifest_from_json` reads."""
    data: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(manifest)))  # tuples are lists there
    return data


def manifest_from_json(data: Any) -> Manifest:
    """Read a manifest and check that its parts agree with each other.

    Raises:
        BundleError: It is of another schema version, a key is unknown, missing or of the wrong type, a path
            leaves the bundle, or one part names what another does not have.
    """
    version = data.get("schema_version") if isinstance(data, dict) else None
    if type(version) is int and version != SCHEMA_VERSION:
        raise BundleError(
            f"{MANIFEST} has schema_version {version}, and this version of hptool reads {SCHEMA_VERSION}. "
            "Export the bundle again with this version, or install the one that wrote it."
        )
    try:
        manifest = from_data(Manifest, data)
    except TypedDataError as error:
        raise BundleError(f"{MANIFEST} cannot be used: {error}. Export the bundle again.") from error
    if fault := _fault(manifest):
        raise BundleError(f"{MANIFEST} contradicts itself: {fault}. Export the bundle again.")
    return manifest


def open_bundle(path: str | os.PathLike[str], *, verify: bool = True) -> Bundle:
    """Open a bundle after holding every file of it to the manifest, before any of them is parsed.

    Args:
        verify: False leaves out the digests, which cost a read of every file; everything else stays checked.

    Raises:
        BundleError: A file is missing, damaged, a link, not listed, or the manifest cannot be used.
    """
    root = bundle_root(path)
    try:
        return _open(root, verify=verify)
    except OSError as error:
        raise BundleError(
            f"{root} cannot be read: {error}. Check the disk and who may read these files."
        ) from error


def bundle_root(path: str | os.PathLike[str]) -> Path:
    """Return the directory of a bundle.

    Raises:
        BundleError: It is none.
    """
    root = Path(path)
    if not root.is_dir():
        what = "is not a directory" if root.exists() else "does not exist"
        raise BundleError(f"{root} {what}. Give the directory that `hptool export` wrote.")
    return root


def _open(root: Path, *, verify: bool) -> Bundle:
    manifest = read_manifest(root)
    present = regular_files(root) - {MANIFEST, SIGNATURE}
    if missing := sorted(manifest.files.keys() - present):
        raise BundleError(f"{root} lacks {_named(missing)} of its manifest. {_DAMAGED}")
    if unlisted := sorted(present - manifest.files.keys()):
        raise BundleError(
            f"{root} holds {_named(unlisted)}, which its manifest does not list. "
            "Remove what does not belong there, or copy the bundle again."
        )
    for relative, file in manifest.files.items():
        _check_file(root / relative, file, digest=verify)
    return Bundle(root, manifest)


def read_manifest(root: Path) -> Manifest:
    """Read the manifest of a bundle's directory, whose files need not be there yet.

    Raises:
        BundleError: It is missing, or cannot be used.
    """
    path = root / MANIFEST
    if path.is_symlink() or not path.is_file():
        raise BundleError(
            f"{root} has no {MANIFEST} that is a regular file, so it is not a bundle. "
            "Give the directory that `hptool export` wrote."
        )
    if (size := path.stat().st_size) > MAX_MANIFEST_BYTES:
        raise BundleError(f"{path} has {size} bytes, and at most {MAX_MANIFEST_BYTES} are read. {_DAMAGED}")
    try:
        data = json.loads(
            path.read_text(encoding="utf-8"),
            object_pairs_hook=_unique,
            parse_constant=_refuse_constant,
            parse_float=_finite,
        )
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{path} is not the JSON it should be: {error}. {_DAMAGED}") from error
    return manifest_from_json(data)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        (name, _), *_ = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"the key {name!r} is there twice")
    return table


def _refuse_constant(text: str) -> float:
    raise ValueError(f"{text} is not a number of JSON")


def _finite(text: str) -> float:
    if math.isinf(number := float(text)):
        raise ValueError(f"the number {text} is too large")
    return number


def _fault(manifest: Manifest) -> str | None:
    """Return what in the manifest does not agree with the rest of it, None where everything does."""
    if len(manifest.files) > MAX_FILES:
        return f"it lists {len(manifest.files)} files, and a bundle has at most {MAX_FILES}"
    for relative in manifest.files:
        if not _is_confined(relative) or relative in (MANIFEST, SIGNATURE):
            return f"{relative!r} is not the path of a file inside the bundle"
    needed, possible = ENCODERS[manifest.architecture.family]
    encoders = [*needed, *(name for name in possible if name in manifest.graphs)]
    names = [name.replace("text_encoder", "tokenizer") for name in encoders]
    for what, wanted, there in (
        ("graphs", ["transformer", *encoders, "vae_decoder"], manifest.graphs.keys()),
        ("tokenizers", names, manifest.tokenizers.keys()),
    ):
        if set(wanted) != set(there):
            return f"{what} must be those of {', '.join(wanted)}, not of {', '.join(there) or 'nothing'}"
    if empty := [name for name, graphs in manifest.graphs.items() if not graphs]:
        return f"graphs[{empty[0]!r}] is empty"
    graphs = [graph.path for component in manifest.graphs.values() for graph in component]
    tokenizers = [tokenizer.path for tokenizer in manifest.tokenizers.values()]
    for relative in [*graphs, *tokenizers, *(variant.path for variant in manifest.variants)]:
        if relative not in manifest.files:
            return f"{relative!r} is used but not among its files"
    scheduler = manifest.scheduler
    if scheduler.use_dynamic_shifting and scheduler.max_image_seq_len <= scheduler.base_image_seq_len:
        return "scheduler.max_image_seq_len must be above its base_image_seq_len"
    if fault := _family_fault(manifest):
        return fault
    if not manifest.variants:
        return "there are no variants to run"
    for part in (manifest.architecture, manifest.scheduler, manifest.defaults):
        for name, value in dataclasses.asdict(part).items():
            least = 0 if name == "max_sequence_length" else 1
            if type(value) is int and value < least:
                return f"{type(part).__name__.lower()}.{name} must be {least} at least"
    kinds = [(variant.target, variant.runtime) for variant in manifest.variants]
    if len(set(kinds)) < len(kinds):
        return f"two variants share a target and a runtime, of {', '.join(map(' '.join, kinds))}"
    for variant in manifest.variants:
        if fault := _variant_fault(manifest, variant):
            return f"the variant {variant.target!r} of {variant.runtime} {fault}"
    return None


def _variant_fault(manifest: Manifest, variant: Variant) -> str | None:
    transformers = {graph.path: graph.activations for graph in manifest.graphs["transformer"]}
    if variant.runtime == "tensorrt-rtx":
        if variant.path.endswith(".onnx"):
            return "has a graph for an engine"
    elif transformers.get(variant.path) != variant.activations:
        return "is not one of the transformer's graphs"
    if variant.runtime not in ENGINE_RUNTIMES:
        built = variant.compute_capabilities or variant.shapes
        return "names what engines are built for, and has none" if built else None
    if not variant.compute_capabilities:
        return "is an engine without compute_capabilities"
    if variant.shapes is None:
        return "is an engine without shapes"
    return _shapes_fault(manifest, variant.shapes)


def _shapes_fault(manifest: Manifest, shapes: Shapes) -> str | None:
    architecture = manifest.architecture
    unit = architecture.vae_scale_factor * architecture.patch_size
    most = architecture.max_latent_size * architecture.vae_scale_factor
    if not shapes.sizes or len(set(shapes.sizes)) < len(shapes.sizes):
        return "has an engine for no size, or for one twice"
    for height, width in shapes.sizes:
        if any(side % unit or not unit <= side <= most for side in (height, width)):
            return f"has an engine for pictures of {height}x{width}, which the model cannot make"
    if shapes.max_batch < 1:
        return "has an engine for a max_batch below 1"
    if shapes.text_tokens != (tokens := _num_text_tokens(manifest)):
        return f"has an engine for {shapes.text_tokens} text tokens, and the transformer is given {tokens}"
    return None


def _num_text_tokens(manifest: Manifest) -> int:
    """T5's tokens, after those of both CLIP encoders side by side where the family's text is of all three."""
    num_tokens = manifest.defaults.max_sequence_length
    clip = manifest.tokenizers["tokenizer"].max_length
    return num_tokens if manifest.architecture.family == "flux" else clip + num_tokens


def _family_fault(manifest: Manifest) -> str | None:
    """Return what does not suit the family: lengths of prompts, and ways to guide."""
    lengths = {name: tokenizer.max_length for name, tokenizer in manifest.tokenizers.items()}
    architecture, num_tokens = manifest.architecture, manifest.defaults.max_sequence_length
    t5 = T5_TOKENIZERS[architecture.family]
    if (length := lengths.pop(t5, None)) is not None and not 1 <= length == num_tokens:
        return (
            f"the max_length of {t5}, which is T5's, is {length}; it must be that of "
            f"defaults.max_sequence_length, {num_tokens}, and 1 at least"
        )
    # The states of both CLIP encoders stand side by side, token by token.
    if len(set(lengths.values())) > 1 or min(lengths.values()) < 2:
        return "the tokenizers of the CLIP encoders need one max_length, of two tokens at least"
    if architecture.family == "sd3" and architecture.guidance_embeds:
        return "architecture.guidance_embeds is true, and no transformer of sd3 is told the guidance scale"
    if architecture.family == "flux" and architecture.classifier_free:
        return "architecture.classifier_free is true, and flux makes no second pass"
    return None


def _is_confined(relative: str) -> bool:
    """Whether the path stays inside the directory it is relative to, on any operating system."""
    path = PurePosixPath(relative)
    if path.is_absolute() or str(path) != relative or relative == ".":
        return False
    return not any(part == ".." for part in path.parts) and not set(relative) & set("\\:\0")


def regular_files(root: Path) -> set[str]:
    """Return the paths of all files under `root`, relative and with forward slashes.

    Raises:
        BundleError: Something is neither a plain file nor a directory, or there are too many.
    """
    files: set[str] = set()
    count = 0
    for directory, subdirectories, names in os.walk(root):
        count += len(subdirectories) + len(names)
        if count > MAX_FILES:
            raise BundleError(
                f"{root} holds more than {MAX_FILES} files, so it is not a bundle. "
                "Give the directory that `hptool export` wrote."
            )
        for name in [*subdirectories, *names]:
            path = Path(directory, name)
            mode = path.lstat().st_mode
            if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
                kind = "a symbolic link" if stat.S_ISLNK(mode) else "not a regular file"
                raise BundleError(
                    f"{path} is {kind}; a bundle holds plain files only. "
                    "Copy the bundle with its files (cp -rL), or export it again."
                )
            if stat.S_ISREG(mode):
                files.add(path.relative_to(root).as_posix())
    return files


def _check_file(path: Path, file: File, *, digest: bool) -> None:
    size = path.stat().st_size
    if size != file.bytes:
        raise BundleError(f"{path} has {size} bytes where its manifest says {file.bytes}. {_DAMAGED}")
    if digest:
        with path.open("rb") as stream:
            found = hashlib.file_digest(stream, "sha256").hexdigest()
        if found != file.sha256:
            raise BundleError(
                f"{path} is not the file that was exported: its sha256 starts with {found[:12]}, "
                f"and its manifest says {file.sha256[:12]}. {_DAMAGED}"
            )


def _named(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(repr(name) for name in names[:3]) + more
