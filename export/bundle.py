"""From a pipeline on disk to the bundle directory that a device reads."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from deploy import bundle as format
from deploy.bundle import Bundle, open_bundle
from deploy.engine import build_memory_bytes
from export.ahead import traced_ahead
from export.cache import ComponentCache, component_key, source_files
from export.calibration import GROUP_SIZE, Calibration
from export.components import (
    CUDA_GRAPH,
    GRAPH,
    GRAPHS,
    HALF_GRAPH,
    Component,
    GraphKind,
    Precision,
    export_text_encoder,
    export_transformer,
    export_vae_decoder,
    num_tokens,
)
from export.engine import ENGINES, TURING, build_engines, num_engines, require_tensorrt_rtx
from export.errors import ExportError
from export.harm import weight_bits
from export.lower import Activations
from export.quantize import Bits
from export.space import (
    NODES_PER_BLOCK,
    Needs,
    export_memory_bytes,
    require_space,
    stored_bytes,
)
from export.tokenizers import export_tokenizer
from profiles.schema import PROCESSOR_RUNTIMES, load_profile
from toolchain.artifacts import check_new_directory, new_directory, sha256, write_json
from toolchain.card import licence_files
from toolchain.progress import Bar, silent

if TYPE_CHECKING:
    from profiles.schema import Profile, Runtime
    from toolchain.families import Model

__all__ = ["export_bundle"]

# Runs wherever onnxruntime does; every bundle has it, so that one made for a GPU can be looked at without it.
_CPU_TARGET = "cpu-x86"
_BUILDERS = (*format.ENGINE_RUNTIMES, "onnxruntime-tensorrt")
"""What reads a graph to build an engine of it, and so knows ONNX's own operators alone."""

# Options that change the sigmas in ways the device's sampler does not know, and their off values.
_UNSUPPORTED_SCHEDULER_OPTIONS = {
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "use_flow_sigmas": False,
    "stochastic_sampling": False,
    "invert_sigmas": False,
    "shift_terminal": None,
}

_TOOLS = (
    "hptool",
    "torch",
    "diffusers",
    "transformers",
    "onnx",
    "onnx-ir",
    "onnxscript",
    "onnxruntime",
    "nncf",
)
_ENGINE_TOOLS = ("polygraphy", "tensorrt-rtx-cu13", "tensorrt-rtx")


def export_bundle(
    model: Model,
    *,
    targets: Sequence[Profile],
    output: Path,
    bits: int | None = None,
    bits_of_components: Mapping[str, int] | None = None,
    calibration: Calibration | None = None,
    max_bytes: int | None = None,
    most_error: float | None = None,
    compare: bool = True,
    cache: ComponentCache,
    bar: Bar = silent,
    plan_sha256: str | None = None,
    base_model: str | None = None,
    base_revision: str | None = None,
    license: str | None = None,
) -> Bundle:
    """Write a pipeline as a bundle for the given devices.

    Args:
        model: Its parts may lie on the meta device: then their tensors are read one at a time.
        targets: Devices; the CPU variant is there with any of them.
        output: Directory that appears when the bundle is whole.
        bits: Of the weights of the transformer blocks' linears; 32 leaves everything in float32, and None
            takes what the targets say.
        bits_of_components: Bits of components of the transformer that differ, as `7.ff`.
        calibration: Of this model: rounding heeds the inputs that matter.
        max_bytes: Of the blocks' linears, whose bits are then chosen one by one so that rounding harms least.
        most_error: Relative error of the velocity that rounding may cause; None takes that of the bits.
        compare: Whether each graph is compared with torch before it is kept.
        cache: Where finished components are kept: an export that was interrupted goes on with the next one.
        bar: Starts progress bars.
        plan_sha256: Digest of the plan the student was made with.
        base_model: What the student was made of.
        base_revision: Its commit on the hub.
        license: Of the weights; files that lie with the model and say it in full go into the bundle.

    Raises:
        ExportError: The pipeline or a target cannot be exported, a graph differs from torch, or there is not
            enough space.
        ToolchainError: `output` cannot be written, or the model's files are damaged.
    """
    check_new_directory(output)
    _require_pipeline(model.pipeline)
    checked_bits, group_size = _require_targets(targets, bits)
    variants = _variants(model, targets, checked_bits)
    weights = weight_bits(model.mmdit, bits_of_components or {})
    if max_bytes is not None:
        if calibration is None or weights:
            raise ExportError(
                "Bits are chosen by a calibration where no plan names them. Give one with --calibration, of "
                "a model whose plan.json names no bits."
            )
        group_size, weights = GROUP_SIZE, calibration.bits(max_bytes)
    _require_turing(targets, {checked_bits, *weights.values()})
    precision = Precision(
        bits=checked_bits,
        group_size=group_size,
        graphs=_graphs(variants),
        weights={name: _require_bits(value) for name, value in weights.items()},
        most_error=most_error,
        importance=None if calibration is None else calibration.importance,
    )
    parts = _parts(model, precision, compare, bar)
    needs = _needs(model, parts, precision, num_engines(variants), cache)
    require_space(needs, output=output, cache=cache.path)
    new = [part.source for name, part in parts.items() if name in needs.components]
    # Reading the transformer's weights for its key takes as long as the text encoders do.
    sources = [path for part in parts.values() for path in source_files(model, part.source)]
    with (
        traced_ahead(model, new, precision.graphs),
        cache.digests.ahead(sources),
        new_directory(output) as directory,
    ):
        components: dict[str, Component] = {}
        files: dict[str, format.File] = {}
        for name, part in parts.items():
            key = component_key(model, part.source, part.options, cache)
            components[name], written = cache.get(key, part.make, directory / name)
            files |= {f"{name}/{path}": file for path, file in written.items()}
        tokenizers = {
            name: export_tokenizer(model, name, directory)
            for name in (encoder.replace("text_encoder", "tokenizer") for encoder in _encoders(model))
        }
        variants, engines, written = build_engines(
            variants,
            directory,
            files=files,
            architecture=_architecture(model),
            cache=cache.path,
            bar=bar,
        )
        files |= written
        if engines:
            report = {"schema_version": 1, "engines": [dataclasses.asdict(engine) for engine in engines]}
            write_json(directory / ENGINES, report)
        write_json(directory / "parity.json", _parity_report(components))
        for path in licence_files(model.path):
            shutil.copyfile(path, directory / path.name)
        manifest = format.Manifest(
            schema_version=format.SCHEMA_VERSION,
            architecture=_architecture(model),
            scheduler=_scheduler(model),
            defaults=format.Defaults(**dataclasses.asdict(model.defaults)),
            tokenizers=tokenizers,
            graphs={name: component.graphs for name, component in components.items()},
            variants=variants,
            provenance=format.Provenance(
                model=model.source,
                revision=model.revision,
                base_model=base_model,
                base_revision=base_revision,
                license=license,
                plan_sha256=plan_sha256,
                calibration_sha256=None if calibration is None else calibration.sha256,
                tools=_tool_versions(with_engines=num_engines(variants) > 0),
            ),
            files=_digests(directory, files),
        )
        write_json(directory / format.MANIFEST, format.manifest_to_json(manifest))
        open_bundle(directory, verify=False)  # the digests are of what was just written
    return open_bundle(output, verify=False)


@dataclass(frozen=True, kw_only=True)
class _Part:
    """One component: the directory of the model it is made of, how, and by what."""

    source: str
    options: dict[str, Any]
    make: Callable[[Path], Component]


def _parts(model: Model, precision: Precision, compare: bool, bar: Bar) -> dict[str, _Part]:
    """The text encoders come first: they are small, and what is wrong shows early."""
    settings = {
        "bits": precision.bits,
        "max_sequence_length": model.defaults.max_sequence_length,
        "compare": compare,
    }
    parts = {
        name: _Part(
            source=name,
            options={**settings, "group_size": precision.group_size},
            make=partial(
                export_text_encoder, model, name, precision.bits, precision.group_size, compare, bar
            ),
        )
        for name in _encoders(model)
    }
    parts["vae_decoder"] = _Part(
        source="vae",
        options=settings,
        make=partial(export_vae_decoder, model, precision.bits, compare, bar),
    )
    parts["transformer"] = _Part(
        source="transformer",
        options={**settings, "precision": precision.facts},
        make=partial(export_transformer, model, precision, compare, bar),
    )
    return parts


def _needs(
    model: Model,
    parts: Mapping[str, _Part],
    precision: Precision,
    num_engines: int,
    cache: ComponentCache,
) -> Needs:
    sizes = {name: stored_bytes(model, part.source, precision) for name, part in parts.items()}
    # Of files that were never digested here nothing is kept; those that were moved count as if they were new.
    held = {
        name
        for name, part in parts.items()
        if cache.digests.remembers(source_files(model, part.source))
        and cache.holds(component_key(model, part.source, part.options, cache))
    }
    building = 0
    if num_engines:
        building = build_memory_bytes(sizes["transformer"], NODES_PER_BLOCK * len(model.mmdit.blocks))
    return Needs(
        components={name: size for name, size in sizes.items() if name not in held},
        cached={name: sizes[name] for name in held},
        engines=num_engines * sizes["transformer"],
        memory=max(export_memory_bytes(model), building),
    )


def _variants(model: Model, targets: Sequence[Profile], bits: Bits) -> list[format.Variant]:
    """What the bundle is going to have; those of engines are finished by `build_engines`."""
    variants = [_variant(model, target, runtime, bits) for target in targets for runtime in target.runtimes]
    if _CPU_TARGET not in {variant.target for variant in variants}:
        cpu = load_profile(_CPU_TARGET)
        variants += [_variant(model, cpu, runtime, bits) for runtime in cpu.runtimes]
    return variants


def _variant(model: Model, target: Profile, runtime: Runtime, bits: Bits) -> format.Variant:
    # A processor computes in float32, and would convert from float16 at every step.
    whole = bits == 32 or runtime in PROCESSOR_RUNTIMES
    activations: Activations = "float32" if whole else target.activations
    built = runtime in format.ENGINE_RUNTIMES
    assert not built or target.compute_capability is not None
    return format.Variant(
        target=target.name,
        runtime=runtime,
        path=f"transformer/{_graph(runtime, activations)}",
        activations=activations,
        compute_capabilities=[target.compute_capability] if built and target.compute_capability else [],
        shapes=_shapes(model, target) if built else None,
    )


def _graph(runtime: Runtime, activations: Activations) -> str:
    if activations == "float32":
        return GRAPH
    return CUDA_GRAPH if runtime == "onnxruntime-cuda" else HALF_GRAPH


def _graphs(variants: Sequence[format.Variant]) -> tuple[GraphKind, ...]:
    """What the variants read. A builder of engines may read that of processors, where 32 bits are wanted."""
    read = {Path(variant.path).name for variant in variants}
    built = {Path(variant.path).name for variant in variants if variant.runtime in _BUILDERS}
    return tuple(GraphKind(name=name, fused=name not in built) for name in GRAPHS if name in read)


def _shapes(model: Model, target: Profile) -> format.Shapes:
    """What the target's engines are built for.

    Raises:
        ExportError: The model does not take it.
    """
    architecture = _architecture(model)
    unit = architecture.vae_scale_factor * architecture.patch_size
    most = architecture.max_latent_size * architecture.vae_scale_factor
    sizes = list(target.buckets or [(model.defaults.height, model.defaults.width)])
    for picture in sizes:
        if any(side % unit or side > most for side in picture):
            raise ExportError(
                f"The target {target.name} asks for pictures of {picture[0]}x{picture[1]}, which the model "
                f"cannot make: both sides must be multiples of {unit} up to {most}. Change the buckets of "
                "its profile."
            )
    made = num_tokens(model)
    if target.text_tokens not in (0, made):
        raise ExportError(
            f"The target {target.name} asks for engines of {target.text_tokens} text tokens, and prompts of "
            f"this model make {made}. Leave text_tokens out of its profile."
        )
    return format.Shapes(sizes=sizes, max_batch=target.max_batch, text_tokens=made)


def _architecture(model: Model) -> format.Architecture:
    mmdit, vae = model.mmdit, model.pipeline.vae.config
    return format.Architecture(
        family=cast("Any", mmdit.family),
        classifier_free=mmdit.classifier_free,
        guidance_embeds=mmdit.embeds_guidance,
        latent_channels=mmdit.latent_channels,
        vae_scale_factor=mmdit.vae_scale_factor,
        patch_size=mmdit.patch_size,
        max_latent_size=mmdit.max_latent_size,
        scaling_factor=float(vae.scaling_factor),
        shift_factor=float(vae.shift_factor or 0.0),
        joint_attention_dim=mmdit.transformer.config.joint_attention_dim,
    )


def _scheduler(model: Model) -> format.Scheduler:
    config = model.pipeline.scheduler.config
    values: dict[str, Any] = {"spacing": "unit" if model.mmdit.family == "flux" else "train_range"}
    for field in dataclasses.fields(format.Scheduler):
        if field.name in config:
            value = config[field.name]
            values[field.name] = float(value) if field.name.endswith("shift") else value
    return format.Scheduler(**values)


def _encoders(model: Model) -> list[str]:
    """The text encoders that are there, in their order."""
    names = ("text_encoder", "text_encoder_2", "text_encoder_3")
    return [name for name in names if getattr(model.pipeline, name, None) is not None]


def _require_bits(bits: int) -> Bits:
    if bits not in (4, 8, 16, 32):
        raise ExportError(
            f"Weights can be stored in 4, 8, 16 or 32 bits, not {bits}. Choose one of these with --bits."
        )
    return cast("Bits", bits)


def _require_pipeline(pipeline: Any) -> None:
    if missing := [
        name
        for name in ("transformer", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
        if getattr(pipeline, name, None) is None
    ]:
        raise ExportError(
            f"The pipeline was saved without {', '.join(missing)}, and a bundle needs all "
            "of its parts. Save the whole pipeline and export that."
        )
    scheduler = pipeline.scheduler
    if type(scheduler).__name__ != "FlowMatchEulerDiscreteScheduler":
        raise ExportError(
            f"The pipeline samples with {type(scheduler).__name__}; only FlowMatchEulerDiscreteScheduler "
            "runs on a device. Replace the pipeline's scheduler and save it again."
        )
    for name, off in _UNSUPPORTED_SCHEDULER_OPTIONS.items():
        if (value := scheduler.config.get(name, off)) != off:
            raise ExportError(
                f"The pipeline's scheduler has {name}={value}, which does not run on a device. "
                f"Set it to {off} in scheduler_config.json, or choose another scheduler."
            )


def _require_targets(targets: Sequence[Profile], bits: int | None) -> tuple[Bits, int]:
    """Check before any work is done what can be; return the bits and group size that all targets share."""
    if not targets:
        raise ExportError("There is no target to export for. Name at least one with --target.")
    names = [target.name for target in targets]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ExportError(f"The target {', '.join(twice)} is named twice. Name each --target once.")
    if bits is None:
        bits = _agreed({target.name: target.weight_bits for target in targets}, "weights of different bits")
    checked = _require_bits(bits)
    sizes = {target.name: target.group_size for target in targets}
    size = targets[0].group_size if checked >= 16 else _agreed(sizes, "weights in groups of different sizes")
    if any("tensorrt-rtx" in target.runtimes for target in targets):
        require_tensorrt_rtx()
    return checked, size


def _require_turing(targets: Sequence[Profile], bits: set[int]) -> None:
    turing = [
        target.name
        for target in targets
        if target.compute_capability == TURING and "tensorrt-rtx" in target.runtimes
    ]
    if turing and 4 in bits:
        raise ExportError(
            f"TensorRT-RTX builds no engine with 4-bit weights for compute capability {TURING}, which "
            f"{', '.join(turing)} has. Export with --bits 8 or 16, or take tensorrt-rtx out of its runtimes."
        )


def _agreed(wishes: Mapping[str, int], what: str) -> int:
    if len(set(wishes.values())) > 1:
        listed = ", ".join(f"{name} {value}" for name, value in wishes.items())
        raise ExportError(
            f"The targets want {what} ({listed}), and a bundle stores them once. Export a bundle for each, "
            "or choose the bits for all with --bits."
        )
    return next(iter(wishes.values()))


def _parity_report(components: Mapping[str, Component]) -> dict[str, Any]:
    parts = {name: dataclasses.asdict(component) for name, component in components.items()}
    return {
        "schema_version": 2,
        "rows": [row for part in parts.values() for row in part["parity"]],
        "blocks": [row for part in parts.values() for row in part["blocks"]],
        "drift": [row for part in parts.values() for row in part["drift"]],
        "float32_blocks": components["transformer"].float32_blocks,
        "quantization": {name: part["quantization"] for name, part in parts.items()},
    }


def _tool_versions(*, with_engines: bool) -> dict[str, str]:
    versions = {}
    for name in _TOOLS + (_ENGINE_TOOLS if with_engines else ()):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # a package under its other name, or a checkout that is not installed
    return versions


def _digests(directory: Path, known: Mapping[str, format.File]) -> dict[str, format.File]:
    """What all files of the bundle are; those of components were digested as they were copied."""
    files = {}
    for path in sorted(path for path in directory.rglob("*") if path.is_file()):
        name = path.relative_to(directory).as_posix()
        files[name] = known.get(name) or format.File(sha256=sha256(path), bytes=path.stat().st_size)
    return files
