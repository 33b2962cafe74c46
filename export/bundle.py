"""From a torch pipeline to the bundle directory that a device reads."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import onnx_ir as ir
from tokenizers import Tokenizer as BackendTokenizer

from deploy import bundle as format
from deploy.bundle import Bundle, open_bundle
from export import parity
from export.denoiser import lower_transformer
from export.engine import build_engine, require_tensorrt_rtx
from export.errors import ExportError
from export.lower import lower_text_encoder, lower_vae_decoder
from export.parity import ParityRow, check_graph
from export.passes import QuantizeWeights, StoreWeights
from export.quantize import Bits, QuantReport, StoredWeights, store_weights
from export.weights import WEIGHTS, WeightFile
from toolchain.artifacts import check_new_directory, new_directory, sha256, write_json

if TYPE_CHECKING:
    from profiles.schema import Profile
    from toolchain.families import Model

__all__ = ["export_bundle"]

# Runs wherever onnxruntime does; every bundle has it, so that one made for a GPU can be looked at without it.
_CPU_TARGET = "cpu-x86"

_GRAPH = "model.onnx"
_HALF_GRAPH = "model.fp16.onnx"
_TOKENIZER = "tokenizer.json"

# Options that change the sigmas in ways the device's sampler does not know, and their off values.
_UNSUPPORTED_SCHEDULER_OPTIONS = {
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
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

Report = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class _Component:
    """What one exported component adds to the bundle."""

    graphs: list[format.Graph]
    parity: list[ParityRow]
    quantization: QuantReport | None = None


def export_bundle(
    model: Model,
    *,
    targets: Sequence[Profile],
    output: Path,
    bits: int = 4,
    progress: Report | None = None,
    plan_sha256: str | None = None,
    base_model: str | None = None,
    license: str | None = None,
) -> Bundle:
    """Write a pipeline as a bundle for the given devices, each graph compared with torch before it is kept.

    Args:
        model: The pipeline, in float32 on the CPU.
        targets: Devices; the CPU variant is there with any of them.
        output: Directory that appears when the bundle is whole.
        bits: Of the weights of the transformer blocks' linears; 32 leaves everything in float32.
        progress: Called with a line for each step.
        plan_sha256: Digest of the plan the student was made with.
        base_model: What the student was made of.
        license: Of the weights.

    Raises:
        ExportError: The pipeline or a target cannot be exported, or a graph differs from torch.
        ToolchainError: `output` cannot be written.
    """
    report = progress or (lambda _: None)
    check_new_directory(output)
    checked_bits = _require_bits(bits)
    _require_pipeline(model.pipeline)
    group_size = _require_targets(model, targets, checked_bits)
    with new_directory(output) as directory:
        components = {
            "transformer": _export_transformer(model, targets, directory, checked_bits, group_size, report),
            "text_encoder": _export_text_encoder(model, "", directory, checked_bits, report),
            "text_encoder_2": _export_text_encoder(model, "_2", directory, checked_bits, report),
            "vae_decoder": _export_vae_decoder(model, directory, checked_bits, report),
        }
        tokenizers = {
            name: _export_tokenizer(model, name, directory) for name in ("tokenizer", "tokenizer_2")
        }
        variants = [_export_variant(model, target, directory, checked_bits, report) for target in targets]
        if _CPU_TARGET not in {variant.target for variant in variants}:
            variants.append(_onnxruntime_variant(_CPU_TARGET, "float32"))
        write_json(directory / "parity.json", _parity_report(components))
        manifest = format.Manifest(
            schema_version=format.SCHEMA_VERSION,
            architecture=_architecture(model.pipeline),
            scheduler=_scheduler(model.pipeline.scheduler),
            defaults=format.Defaults(**dataclasses.asdict(model.defaults)),
            tokenizers=tokenizers,
            graphs={name: component.graphs for name, component in components.items()},
            variants=variants,
            provenance=format.Provenance(
                model=model.source,
                base_model=base_model,
                license=license,
                plan_sha256=plan_sha256,
                tools=_tool_versions(with_engines=any(variant.compute_capability for variant in variants)),
            ),
            files=_digests(directory),
        )
        report("checking the bundle")
        write_json(directory / format.MANIFEST, format.manifest_to_json(manifest))
        open_bundle(directory)
    return open_bundle(output, verify=False)


def _export_transformer(
    model: Model,
    targets: Sequence[Profile],
    directory: Path,
    bits: Bits,
    group_size: int,
    report: Report,
) -> _Component:
    here, tensors = directory / "transformer", model.weights("transformer")
    here.mkdir()
    report("lowering the transformer")
    full = lower_transformer(model.mmdit, tensors).graph
    half = lower_transformer(model.mmdit, tensors, "float16").graph if _wants_half(targets, bits) else None
    cases = parity.transformer_cases(model, (_num_tokens(model), 5))
    rows = []
    if bits != 32:
        report("comparing the transformer with torch before its weights are rounded")
        rows += _check_unrounded(full, cases, directory)
    report(f"storing the transformer's weights in {bits} bits")
    with WeightFile(here) as file:
        stored = store_weights(full, file, bits=bits, group_size=group_size)
    weights = _weights_name(bits)
    graphs = []
    lowered: list[tuple[str, ir.Model | None, Literal["float32", "float16"]]]
    lowered = [(_GRAPH, full, "float32"), (_HALF_GRAPH, half, "float16")]
    for name, graph, activations in lowered:
        if graph is None:
            continue
        _save(graph, stored, here / name)
        report(f"comparing transformer/{name} with torch")
        path = f"transformer/{name}"
        rows += check_graph(
            here / name, cases, stage="transformer", graph=path, weights=weights, activations=activations
        )
        graphs.append(format.Graph(path=path, activations=activations, weights=weights))
    return _Component(graphs=graphs, parity=rows, quantization=stored.report)


def _export_text_encoder(
    model: Model, suffix: str, directory: Path, bits: Bits, report: Report
) -> _Component:
    name = f"text_encoder{suffix}"
    encoder = getattr(model.pipeline, name)
    length = _max_length(model.pipeline, suffix)
    report(f"lowering {name}")
    cases = parity.text_encoder_cases(encoder, (length, max(2, length // 2)))
    return _export_component(name, lower_text_encoder(encoder), cases, directory, bits)


def _export_vae_decoder(model: Model, directory: Path, bits: Bits, report: Report) -> _Component:
    report("lowering the VAE decoder")
    vae = model.pipeline.vae
    return _export_component(
        "vae_decoder", lower_vae_decoder(vae), parity.decoder_cases(vae), directory, bits
    )


def _export_component(
    name: str, graph: ir.Model, cases: Sequence[parity.Case], directory: Path, bits: Bits
) -> _Component:
    """Write a component that computes in float32 on every target.

    Its weights take 16 bits unless 32 are asked for: checkpoints are published in 16 bits, so nothing is lost
    with those, and of a bundle with a 4-bit transformer these parts would be the larger half. Computing in
    float32 keeps the activations of text encoders and decoders, which are known to leave float16's range, out
    of trouble.
    """
    here = directory / name
    here.mkdir()
    with WeightFile(here) as file:
        stored = store_weights(graph, file, bits=32 if bits == 32 else 16)
    _save(graph, stored, here / _GRAPH)
    weights: Literal["float32", "float16"] = "float32" if bits == 32 else "float16"
    path = f"{name}/{_GRAPH}"
    rows = check_graph(here / _GRAPH, cases, stage=name, graph=path, weights=weights)
    return _Component(graphs=[format.Graph(path=path, activations="float32", weights=weights)], parity=rows)


def _save(graph: ir.Model, stored: StoredWeights, path: Path) -> None:
    QuantizeWeights(stored.int4)(graph)
    StoreWeights(stored.plain)(graph)
    ir.save(graph, path)


def _check_unrounded(graph: ir.Model, cases: Sequence[parity.Case], directory: Path) -> list[ParityRow]:
    """Compare the graph as it was lowered, so that an error of the graph is not taken for one of rounding."""
    with tempfile.TemporaryDirectory(dir=directory) as scratch:
        path = Path(scratch) / _GRAPH
        ir.save(graph.clone(), path, external_data=WEIGHTS)
        note = "as lowered, not kept"
        return check_graph(path, cases, stage="transformer", graph=note, weights="float32")


def _export_tokenizer(model: Model, name: str, directory: Path) -> format.Tokenizer:
    tokenizer = getattr(model.pipeline, name)
    backend = BackendTokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    # The device truncates and pads by the manifest; a second opinion in the file would be followed silently.
    backend.no_truncation()
    backend.no_padding()
    path = f"{name}/{_TOKENIZER}"
    (directory / name).mkdir()
    (directory / path).write_text(backend.to_str(), encoding="utf-8")
    max_length = _max_length(model.pipeline, name.removeprefix("tokenizer"))
    return format.Tokenizer(path=path, max_length=max_length, pad_id=tokenizer.pad_token_id)


def _export_variant(
    model: Model, target: Profile, directory: Path, bits: Bits, report: Report
) -> format.Variant:
    activations: Literal["float32", "float16"] = "float32" if bits == 32 else target.activations
    if target.runtime == "onnxruntime":
        return _onnxruntime_variant(target.name, activations)
    assert target.compute_capability is not None
    report(f"building the engine for {target.name}")
    path = f"engines/{target.name}/transformer.engine"
    build_engine(
        directory / _transformer_graph(activations),
        directory / path,
        compute_capability=target.compute_capability,
        latent_sizes=_latent_sizes(model, target),
        num_tokens=target.text_tokens or _num_tokens(model),
        max_batch=target.max_batch,
    )
    return format.Variant(
        target=target.name,
        runtime=target.runtime,
        path=path,
        activations=activations,
        compute_capability=target.compute_capability,
    )


def _onnxruntime_variant(target: str, activations: Literal["float32", "float16"]) -> format.Variant:
    return format.Variant(
        target=target,
        runtime="onnxruntime",
        path=_transformer_graph(activations),
        activations=activations,
        compute_capability=None,
    )


def _transformer_graph(activations: str) -> str:
    return f"transformer/{_GRAPH if activations == 'float32' else _HALF_GRAPH}"


def _wants_half(targets: Sequence[Profile], bits: Bits) -> bool:
    return bits != 32 and any(target.activations == "float16" for target in targets)


def _weights_name(bits: Bits) -> Literal["float32", "float16", "int4"]:
    names: dict[int, Literal["float32", "float16", "int4"]] = {4: "int4", 16: "float16", 32: "float32"}
    return names[bits]


def _num_tokens(model: Model) -> int:
    """Text tokens the transformer is given: the CLIP encoders' side by side, then those for T5."""
    return _max_length(model.pipeline, "") + model.defaults.max_sequence_length


def _max_length(pipeline: Any, suffix: str) -> int:
    # A tokenizer saved without a length claims an astronomical one.
    tokenizer, encoder = getattr(pipeline, f"tokenizer{suffix}"), getattr(pipeline, f"text_encoder{suffix}")
    return min(int(tokenizer.model_max_length), int(encoder.config.max_position_embeddings))


def _latent_sizes(model: Model, target: Profile) -> list[tuple[int, int]]:
    architecture = _architecture(model.pipeline)
    factor, patch = architecture.vae_scale_factor, architecture.patch_size
    sizes = []
    for picture in target.buckets or [(model.defaults.height, model.defaults.width)]:
        if any(side % (factor * patch) or side // factor > architecture.max_latent_size for side in picture):
            raise ExportError(
                f"The target {target.name} asks for pictures of {picture[0]}x{picture[1]}, which the model "
                f"cannot make: both sides must be multiples of {factor * patch} up to "
                f"{architecture.max_latent_size * factor}. Change the buckets of its profile."
            )
        sizes.append((picture[0] // factor, picture[1] // factor))
    return sizes


def _architecture(pipeline: Any) -> format.Architecture:
    transformer, vae = pipeline.transformer.config, pipeline.vae.config
    return format.Architecture(
        family="sd3",
        latent_channels=transformer.in_channels,
        vae_scale_factor=2 ** (len(vae.block_out_channels) - 1),
        patch_size=transformer.patch_size,
        max_latent_size=transformer.pos_embed_max_size * transformer.patch_size,
        scaling_factor=float(vae.scaling_factor),
        shift_factor=float(vae.shift_factor or 0.0),
        joint_attention_dim=transformer.joint_attention_dim,
    )


def _scheduler(scheduler: Any) -> format.Scheduler:
    names = [field.name for field in dataclasses.fields(format.Scheduler)]
    values = {name: scheduler.config[name] for name in names}
    for name in ("shift", "base_shift", "max_shift"):
        values[name] = float(values[name])
    return format.Scheduler(**values)


def _require_bits(bits: int) -> Bits:
    if bits not in (4, 16, 32):
        raise ExportError(
            f"Weights can be stored in 4, 16 or 32 bits, not {bits}. Choose one of these with --bits."
        )
    return cast("Bits", bits)


def _require_pipeline(pipeline: Any) -> None:
    from diffusers import SD3Transformer2DModel

    if not isinstance(pipeline.transformer, SD3Transformer2DModel):
        name = type(pipeline).__name__
        raise ExportError(f"A {name} cannot be exported yet; pipelines of Stable Diffusion 3 and 3.5 can.")
    if getattr(pipeline, "text_encoder_3", None) is not None:
        raise ExportError(
            "The pipeline has a third text encoder (T5), which is not exported yet. Load the pipeline with "
            "text_encoder_3=None and tokenizer_3=None, save it, and export that."
        )
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


def _require_targets(model: Model, targets: Sequence[Profile], bits: Bits) -> int:
    """Check before any work is done what can be, and return the group size that all targets share."""
    if not targets:
        raise ExportError("There is no target to export for. Name at least one with --target.")
    names = [target.name for target in targets]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ExportError(f"The target {', '.join(twice)} is named twice. Name each --target once.")
    sizes = {target.group_size for target in targets}
    if len(sizes) > 1 and bits == 4:
        listed = ", ".join(f"{target.name} {target.group_size}" for target in targets)
        raise ExportError(
            f"The targets want weights in groups of different sizes ({listed}), and a bundle stores them "
            "once. Export a bundle for each."
        )
    for target in targets:
        if target.runtime != "onnxruntime":
            require_tensorrt_rtx()
            _latent_sizes(model, target)
    return sizes.pop()


def _parity_report(components: dict[str, _Component]) -> dict[str, Any]:
    quantization = components["transformer"].quantization
    assert quantization is not None
    return {
        "schema_version": 1,
        "rows": [dataclasses.asdict(row) for component in components.values() for row in component.parity],
        "quantization": dataclasses.asdict(quantization),
    }


def _tool_versions(*, with_engines: bool) -> dict[str, str]:
    versions = {}
    for name in _TOOLS + (_ENGINE_TOOLS if with_engines else ()):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # a package under its other name, or a checkout that is not installed
    return versions


def _digests(directory: Path) -> dict[str, format.File]:
    paths = sorted(path for path in directory.rglob("*") if path.is_file())
    return {
        path.relative_to(directory).as_posix(): format.File(sha256=sha256(path), bytes=path.stat().st_size)
        for path in paths
    }
