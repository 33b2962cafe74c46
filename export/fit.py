"""Whether a model fits on devices, and how much of it has to go: from its configuration, before any work.

Weights are counted to the byte. Activations follow from the lifetimes of values in the lowered transformer
and decoder (`export.liveness`). What a process takes beyond these, and how onnxruntime holds weights, was
measured; what a GPU's driver takes is an assumption, for want of one to measure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Literal

from deploy.engine import build_memory_bytes
from deploy.memory import TILE
from export.components import Precision, num_tokens, part_bits
from export.denoiser import lower_transformer
from export.encoders import is_t5, lower_vae_decoder
from export.liveness import activation_bytes
from export.quantize import Bits, choose_form
from export.roofline import least_seconds, work_of
from export.sized import SizedGraph, size_graph
from export.space import export_memory_bytes, part_parameters, stored_bytes
from profiles.schema import Profile
from toolchain.families import Model
from toolchain.progress import Bar, silent

__all__ = ["ALL_BITS", "Fit", "ModelSize", "PartSize", "TargetFit", "fit", "fit_target"]

ALL_BITS: tuple[Bits, ...] = (16, 8, 4)
_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")

_PROCESS_BYTES = 110_000_000
"""Of Python with numpy and onnxruntime; measured on Linux."""
_ARENA = 1.25
"""What onnxruntime's allocator and its operators take, by what the values do themselves; measured from 256 to
768 pixels on a transformer of 6.35 billion parameters."""
_PREPARED_FROM = 64 << 20
"""Of weights; smaller graphs are held as they were read and as they were rearranged."""
_GPU_CONTEXT_BYTES = 500_000_000
"""Of CUDA and TensorRT on a GPU; assumed."""
_CUDA_BYTES, _CUDA_ARENA, _CUDA_DECODING = 1_300_000_000, 4.4, 2.7
"""The same of CUDA and onnxruntime, and what that takes by what a transformer's values do, and a decoder's;
measured on an H100 at two transformers (benchmarks/gpu_speed.py) and one decoder."""
_PREPARED_DISK = 2.3
"""Bytes of a prepared graph's files by those of the weights; measured."""
_LARGEST_RATIO = 0.5
"""Beyond it no pruned model has been seen to stay good."""

Verdict = Literal["fits", "fits, one part at a time", "does not fit"]


@dataclass(frozen=True, kw_only=True)
class PartSize:
    """One part of a pipeline."""

    parameters: int
    stored: dict[int, int]
    """Bytes of its weights in a bundle, by the bits that are asked for."""
    loaded: dict[int, int]
    """Bytes they take in memory once onnxruntime has opened them on a processor."""


@dataclass(frozen=True, kw_only=True)
class TargetFit:
    """Whether a model fits on one device."""

    target: str
    bits: int
    ratio: float
    """Of the transformer's parameters that are taken to be gone, beyond what the model already lacks."""
    height: int
    """Pixels, as `width`, of the pictures this is about."""
    width: int
    batch: int
    """Of the transformer: guidance makes two passes."""
    available: int
    """Bytes of the device's memory that are left to us."""
    together: int
    """Bytes that are needed there if all parts stay loaded."""
    in_turn: int
    """The same if each part is loaded when its turn comes."""
    host: int
    """Bytes of the computer's own memory beside the GPU's, in turn; 0 where there is none."""
    activations: int
    """Bytes of the transformer's, among these."""
    disk: int
    """Bytes on the device: the bundle, and what is prepared from it."""
    build: int
    """Bytes of memory where the engine is built: on the device itself with plain TensorRT, on any machine
    with TensorRT-RTX, of which alone this was measured; 0 where there is no engine."""
    verdict: Verdict
    missing: int
    """Bytes that it is too large by; 0 if it fits."""
    least_ratio: dict[int, float | None]
    """By bits, the smallest further ratio with which it fits; None where even half of it does not."""
    floor: int
    """Bytes that are needed in turn in 4 bits and without half of the transformer: the least there is."""
    floor_part: str
    """The part that these are for."""
    least_step_seconds: float
    """A step cannot be faster, by the device's peak rates; no forecast."""


@dataclass(frozen=True, kw_only=True)
class Fit:
    """A model on some devices."""

    model: str
    parts: dict[str, PartSize]
    export_memory: int
    """Bytes at the peak of an export, engines apart."""
    engine_memory: int
    """Bytes at the peak of building an engine, at 4 bits."""
    export_disk: int
    """Bytes that an export takes at 4 bits: what is kept for the next one, the bundle, an engine."""
    targets: list[TargetFit]


class ModelSize:
    """The sizes of a model that do not depend on a device."""

    def __init__(self, model: Model, group_size: int = 64, bar: Bar = silent) -> None:
        """Count the weights, and lower the transformer and the decoder without them.

        Raises:
            ExportError: The model cannot be exported.
        """
        self.model = model
        self.parts = {name: _part_size(model, name, group_size) for name in _parts(model)}
        advance = bar("lowering", 2)
        self._transformer = lower_transformer(model.mmdit, model.weights("transformer")).graph
        advance()
        self._decoder = lower_vae_decoder(model.pipeline.vae, model.weights("vae"))
        advance()
        self._sized: dict[tuple[int, ...], SizedGraph] = {}

    @cached_property
    def num_nodes(self) -> int:
        """Of the transformer's graph."""
        return len(self._transformer.graph)

    def transformer(self, batch: int, height: int, width: int, tokens: int) -> SizedGraph:
        """The transformer's graph for pictures of a size in pixels."""
        key = (batch, height, width, tokens)
        if key not in self._sized:
            factor = self.model.pipeline.vae_scale_factor
            known = {
                "hidden_states": {2: height // factor, 3: width // factor},
                "encoder_hidden_states": {1: tokens},
            }
            sizes = {}
            for value in self._transformer.graph.inputs:
                assert value.name is not None
                assert value.shape is not None
                own = {0: batch} | known.get(value.name, {})
                sizes[value.name] = [own.get(axis, dim) for axis, dim in enumerate(value.shape)]
            self._sized[key] = size_graph(self._transformer, sizes)
        return self._sized[key]

    def working(self, height: int, width: int) -> dict[str, int]:
        """Bytes of activations of all parts but the transformer, by name."""
        factor = self.model.pipeline.vae_scale_factor
        # Large pictures are decoded tile by tile.
        sides = (min(side // factor, TILE) for side in (height, width))
        latents = size_graph(self._decoder, {"latents": (1, self.model.mmdit.latent_channels, *sides)})
        encoders = [name for name in self.parts if name.startswith("text_encoder")]
        found = {name: self._encoder_bytes(name) for name in encoders} | {"vae": activation_bytes(latents)}
        return {name: _arena(num_bytes) for name, num_bytes in found.items()}

    def _encoder_bytes(self, name: str) -> int:
        """Of a feed-forward or of attention, whichever is larger: encoders are small beside their weights."""
        encoder = getattr(self.model.pipeline, name)
        config = encoder.config
        if is_t5(encoder):
            tokens, width = self.model.defaults.max_sequence_length, config.d_model
            inner, heads = config.d_ff, config.num_heads
        else:
            tokens, width = config.max_position_embeddings, config.hidden_size
            inner, heads = config.intermediate_size, config.num_attention_heads
        return int(4 * tokens * (4 * width + max(3 * inner, 2 * heads * tokens)))


def fit(
    model: Model,
    targets: Sequence[Profile],
    *,
    bits: Bits | None = None,
    ratio: float = 0.0,
    bar: Bar = silent,
) -> Fit:
    """Say for each device whether a model fits, and what would have to go if it does not.

    Args:
        model: Its weights need not be there.
        targets: Devices.
        bits: Of the transformer's and T5's linears; None takes each device's own.
        ratio: Of the transformer's parameters that are taken to be gone.

    Raises:
        ExportError: The model cannot be exported.
    """
    size = ModelSize(model, bar=bar)
    stored = {name: part.stored[4] for name, part in size.parts.items()}
    kept = round((1 - ratio) * stored["transformer"])
    bundle = sum(stored.values()) - stored["transformer"] + kept
    return Fit(
        model=model.source,
        parts=size.parts,
        export_memory=export_memory_bytes(model),
        engine_memory=build_memory_bytes(kept, size.num_nodes),
        export_disk=2 * bundle + kept,
        targets=[fit_target(size, target, bits or target.weight_bits, ratio) for target in targets],
    )


def fit_target(size: ModelSize, target: Profile, bits: Bits, ratio: float = 0.0) -> TargetFit:
    """Say whether a model fits on a device, in some bits and without some share of its transformer."""
    model = size.model
    height, width = max(
        target.buckets or [(model.defaults.height, model.defaults.width)],
        key=lambda sides: sides[0] * sides[1],
    )
    batch = 2 if model.guided else 1
    graph = size.transformer(batch, height, width, target.text_tokens or num_tokens(model))
    has_engine = target.runtimes[0] in ("tensorrt", "tensorrt-rtx")
    # Engines and onnxruntime's own operator compute attention in pieces.
    values = _scale(target) * activation_bytes(graph, fused_attention=True)
    activations = round((_CUDA_ARENA if target.runtimes[0] == "onnxruntime-cuda" else _ARENA) * values)
    need = partial(_need, size.parts, size.working(height, width), target, activations)
    found = need(bits, ratio)
    kept = round((1 - ratio) * size.parts["transformer"].stored[bits])
    build = build_memory_bytes(kept, size.num_nodes) if has_engine else 0
    available = round(2**30 * (target.memory_gib - target.reserved_gib))
    least: dict[int, float | None] = {}
    for each in ALL_BITS:
        ratios = (step / 100 for step in range(round(100 * _LARGEST_RATIO) + 1))
        least[each] = next((item for item in ratios if need(each, item).in_turn <= available), None)
    smallest = need(4, _LARGEST_RATIO)
    verdict: Verdict = "does not fit"
    if found.together <= available:
        verdict = "fits"
    elif found.in_turn <= available:
        verdict = "fits, one part at a time"
    return TargetFit(
        target=target.name,
        bits=bits,
        ratio=ratio,
        height=height,
        width=width,
        batch=batch,
        available=available,
        together=found.together,
        in_turn=found.in_turn,
        host=found.host,
        activations=activations,
        disk=found.disk,
        build=build,
        verdict=verdict,
        missing=max(0, found.in_turn - available),
        least_ratio=least,
        floor=smallest.in_turn,
        floor_part=smallest.largest,
        least_step_seconds=(1 - ratio)
        * least_seconds(
            work_of(graph),
            weight_bytes=size.parts["transformer"].stored[bits],
            activation_scale=_scale(target),
            peak_tflops=target.peak_tflops,
            bandwidth_gb_s=target.bandwidth_gb_s,
        ),
    )


@dataclass(frozen=True, kw_only=True)
class _Need:
    together: int
    in_turn: int
    largest: str
    """The part that takes the most in its turn."""
    host: int
    disk: int


def _need(
    parts: Mapping[str, PartSize],
    working: Mapping[str, int],
    target: Profile,
    activations: int,
    bits: int,
    ratio: float,
) -> _Need:
    """What a device has to hold; `working` has the activations of all parts but the transformer."""
    loaded = {name: parts[name].loaded[bits] for name in working}
    turns = {name: loaded[name] + working[name] for name in working}
    stored = {name: part.stored[bits] for name, part in parts.items()}
    kept = round((1 - ratio) * stored["transformer"])
    bundle = sum(stored.values()) - stored["transformer"] + kept
    context = _CUDA_BYTES if target.runtimes[0] == "onnxruntime-cuda" else _GPU_CONTEXT_BYTES
    gpu = context + kept + activations
    if target.uses_gpu and not target.memory_shared:
        # The other parts go there, too, if there is room for them, and stay on the processor if not.
        others = sum(loaded.values()) + round(_CUDA_DECODING / _ARENA * max(working.values()))
        host = _PROCESS_BYTES + max(turns.values())
        together = gpu - context + _CUDA_BYTES + others
        return _Need(together=together, in_turn=gpu, largest="transformer", host=host, disk=bundle + kept)
    if target.uses_gpu:
        together, prepared = gpu + sum(loaded.values()) + max(working.values()), kept
        turns["transformer"] = gpu
    else:
        transformer = round((1 - ratio) * parts["transformer"].loaded[bits])
        together = sum(loaded.values()) + transformer + max(activations, *working.values())
        turns["transformer"], prepared = transformer + activations, round(_PREPARED_DISK * kept)
    largest = max(turns, key=lambda name: turns[name])
    return _Need(
        together=_PROCESS_BYTES + together,
        in_turn=_PROCESS_BYTES + turns[largest],
        largest=largest,
        host=0,
        disk=bundle + prepared,
    )


def _parts(model: Model) -> list[str]:
    encoders = [name for name in _ENCODERS if getattr(model.pipeline, name, None) is not None]
    return [*encoders, "transformer", "vae"]


def _part_size(model: Model, part: str, group_size: int) -> PartSize:
    sizes = [item.numel() for _, item in part_parameters(model, part)]
    stored: dict[int, int] = {}
    loaded: dict[int, int] = {}
    for bits in (32, *ALL_BITS):
        precision = Precision(bits=bits, group_size=group_size, weights={})
        stored[bits] = stored_bytes(model, part, precision)
        loaded[bits] = _loaded_bytes(model, part, precision)
        if stored[bits] < _PREPARED_FROM:
            loaded[bits] += stored[bits]
    return PartSize(parameters=sum(sizes), stored=stored, loaded=loaded)


def _loaded_bytes(model: Model, part: str, precision: Precision) -> int:
    """Of weights as onnxruntime rearranges them: in float32, and beside each scale the sum of its group."""
    bits_of = part_bits(model, part, precision)
    total = 0
    for name, item in part_parameters(model, part):
        shape, linear = item.shape[::-1], item.ndim == 2
        form = choose_form(name, shape, bits_of, precision.group_size, linear=linear)
        if form.group_size:
            total += item.numel() * form.bits // 8 + 8 * item.numel() // form.group_size
        else:
            total += 4 * item.numel()
    return total


def _scale(target: Profile) -> float:
    """Bytes of an activation on the device by those in float32."""
    return 0.5 if target.activations == "float16" else 1.0


def _arena(activations: int) -> int:
    return round(_ARENA * activations)
