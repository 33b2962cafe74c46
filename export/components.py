"""The components of a bundle: each lowered, its weights stored, its graphs written and, unless that is not
wanted, compared with torch.

Nothing here holds more of a model than one block, or one layer of an encoder, in memory.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from deploy import bundle as format
from export import parity
from export.blockwise import BlockRow, CheckedGraph, check_transformer, draw_states, loud_blocks, streamed
from export.denoiser import LoweredTransformer, lower_transformer
from export.drift import LARGEST, Drift, measure_drift
from export.encoders import (
    decoder_cases,
    encoder_bits,
    is_t5,
    lower_text_encoder,
    lower_vae_decoder,
    text_encoder_cases,
)
from export.errors import ExportError
from export.lint import lint_graphs
from export.lower import Activations
from export.parity import ParityRow, check_graph
from export.passes import QuantizeWeights, StoreWeights, parameters
from export.quantize import Bits, BitsOf, QuantReport, StoredWeights, store_weights
from export.weights import WeightFile
from toolchain.families import Model
from toolchain.families.mmdit import MMDiT
from toolchain.progress import Bar

__all__ = [
    "CUDA_GRAPH",
    "GRAPH",
    "GRAPHS",
    "HALF_GRAPH",
    "Component",
    "GraphKind",
    "Precision",
    "export_text_encoder",
    "export_transformer",
    "export_vae_decoder",
    "max_length",
    "num_tokens",
    "part_bits",
]

GRAPH, HALF_GRAPH, CUDA_GRAPH = "model.onnx", "model.fp16.onnx", "model.fp16.cuda.onnx"
GRAPHS: dict[str, Activations] = {GRAPH: "float32", HALF_GRAPH: "float16", CUDA_GRAPH: "float16"}
"""The transformer's graphs: for processors, for builders of engines, and for onnxruntime on a GPU."""

_WEIGHTS: dict[Bits, parity.Weights] = {4: "int4", 8: "int8", 16: "float16", 32: "float32"}


@dataclass(frozen=True, kw_only=True)
class Component:
    """What one exported component adds to the bundle."""

    graphs: list[format.Graph]
    parity: list[ParityRow]
    """None where it was not compared with torch."""
    blocks: list[BlockRow]
    """Of a transformer, block by block."""
    quantization: QuantReport
    drift: list[Drift]
    """Of a transformer small enough to sample with."""
    float32_blocks: list[str]
    """Blocks that compute in float32 in every graph, because float16 might not hold what they make."""


@dataclass(frozen=True, kw_only=True)
class GraphKind:
    """One of the transformer's graphs; they share their weights."""

    name: str
    """Of `GRAPHS`."""
    fused: bool
    """Whether it has operators of onnxruntime's own, which builders of engines do not know."""

    @property
    def activations(self) -> Activations:
        """In what it computes."""
        return GRAPHS[self.name]


@dataclass(frozen=True, kw_only=True)
class Precision:
    """In what the transformer is stored and computed."""

    bits: Bits
    """Of the weights of its blocks' linears."""
    group_size: int
    weights: Mapping[str, Bits]
    """Bits of weights that differ, by name."""
    graphs: tuple[GraphKind, ...] = (GraphKind(name=GRAPH, fused=True),)
    """What is wanted of it."""
    most_error: float | None = None
    """Relative error of the velocity that rounding may cause; None takes that of the bits."""
    importance: Mapping[str, NDArray[np.float64]] | None = None
    """Mean squares of the inputs of linears, by the names of their weights."""

    @property
    def facts(self) -> dict[str, Any]:
        """All of it as data, arrays by their digests."""
        known = self.importance or {}
        digests = {name: hashlib.sha256(array.tobytes()).hexdigest() for name, array in known.items()}
        return {
            "bits": self.bits,
            "group_size": self.group_size,
            "weights": dict(self.weights),
            "graphs": [asdict(graph) for graph in self.graphs],
            "most_error": self.most_error,
            "importance": digests,
        }


def export_transformer(
    model: Model, precision: Precision, compare: bool, bar: Bar, directory: Path
) -> Component:
    """Write the transformer's graphs and their one weight file.

    Raises:
        ExportError: A weight cannot be stored, or a graph that was to be compared differs from torch.
    """
    weights, mmdit = model.weights("transformer"), model.mmdit
    kinds = precision.graphs
    half = any(kind.activations == "float16" for kind in kinds)
    states = draw_states(model, (num_tokens(model), 5)) if compare or half else []
    loud: frozenset[str] = frozenset()
    if half:
        loud = loud_blocks(mmdit, weights, states, bar("transformer: range", len(mmdit.blocks)))
    advance = bar("transformer: graphs", len(kinds))
    lowered: list[LoweredTransformer] = []
    for kind in kinds:
        lowered.append(
            lower_transformer(
                mmdit,
                weights,
                kind.activations,
                float32_blocks=loud,
                fused=kind.fused,
            )
        )
        advance()
    advance = bar("transformer: weights", len(parameters(lowered[0].graph)))
    with WeightFile(directory) as file:
        stored = store_weights(
            lowered[0].graph,
            weights,
            file,
            bits_of=_bits_of_transformer(mmdit, precision),
            group_size=precision.group_size,
            importance=precision.importance,
            on_tensor=advance,
        )
    in_bits, graphs = _WEIGHTS[precision.bits], []
    for kind, each in zip(kinds, lowered, strict=True):
        _save(each.graph, stored, directory / kind.name)
        graphs.append(
            CheckedGraph(
                name=f"transformer/{kind.name}", lowered=each, activations=kind.activations, weights=in_bits
            )
        )
    lint_graphs(
        [directory / kind.name for kind in kinds],
        _bits_stored(stored.report),
        fused=[kind.name for kind in kinds if kind.fused],
    )
    rows: list[ParityRow] = []
    blocks: list[BlockRow] = []
    drift: list[Drift] = []
    if compare:
        rows, blocks = check_transformer(
            mmdit,
            weights,
            stored,
            graphs,
            states,
            directory,
            bar("transformer: parity", len(lowered[0].blocks) + 2),
            precision.most_error,
        )
    if compare and model.num_parameters <= LARGEST:
        paths = {graph.name: directory / Path(graph.name).name for graph in graphs}
        steps = (1 + len(paths)) * model.defaults.num_inference_steps
        drift = measure_drift(model, weights, paths, on_step=bar("transformer: sampling", steps))
    return Component(
        drift=drift,
        float32_blocks=sorted(loud),
        graphs=[
            format.Graph(path=graph.name, activations=graph.activations, weights=in_bits) for graph in graphs
        ],
        parity=rows,
        blocks=blocks,
        quantization=stored.report,
    )


def export_text_encoder(
    model: Model, name: str, bits: Bits, group_size: int, compare: bool, bar: Bar, directory: Path
) -> Component:
    """Write a text encoder.

    Raises:
        ExportError: It is of an unknown class, or its graph was to be compared and differs from torch.
    """
    encoder, weights = getattr(model.pipeline, name), model.weights(name)
    length = max_length(model, name.removeprefix("text_encoder"))
    graph = lower_text_encoder(encoder, weights)

    def cases() -> list[parity.Case]:
        with streamed(encoder, weights):
            # Of billions of parameters a token takes seconds: the batch of several is of short prompts.
            return text_encoder_cases(encoder, (length, max(2, length // 16)))

    bits_of = encoder_bits(encoder, bits)
    kind = _WEIGHTS[bits] if is_t5(encoder) else _plain(bits)
    return _export_plain(
        name, graph, weights, cases if compare else None, directory, bits_of, group_size, kind, bar
    )


def export_vae_decoder(model: Model, bits: Bits, compare: bool, bar: Bar, directory: Path) -> Component:
    """Write the decoder half of the autoencoder.

    Raises:
        ExportError: It is of an unknown class, or its graph was to be compared and differs from torch.
    """
    vae, weights = model.pipeline.vae, model.weights("vae")
    graph = lower_vae_decoder(vae, weights)

    def cases() -> list[parity.Case]:
        with streamed(vae, weights):
            return decoder_cases(vae)

    return _export_plain(
        "vae_decoder",
        graph,
        weights,
        cases if compare else None,
        directory,
        _decoder_bits(bits),
        64,
        _plain(bits),
        bar,
    )


def part_bits(model: Model, part: str, precision: Precision) -> BitsOf:
    """How the parameters of a part are stored, by their names."""
    if part == "transformer":
        return _bits_of_transformer(model.mmdit, precision)
    if part == "vae":
        return _decoder_bits(precision.bits)
    return encoder_bits(getattr(model.pipeline, part), precision.bits)


def _decoder_bits(bits: Bits) -> BitsOf:
    plain: Bits = 32 if bits == 32 else 16
    return lambda _: (plain, "the decoder is not quantised")


def _plain(bits: Bits) -> parity.Weights:
    return "float32" if bits == 32 else "float16"


def _export_plain(
    name: str,
    graph: ir.Model,
    weights: Mapping[str, Any],
    cases: Callable[[], Sequence[parity.Case]] | None,
    directory: Path,
    bits_of: BitsOf,
    group_size: int,
    kind: parity.Weights,
    bar: Bar,
) -> Component:
    """Write a component that computes in float32 on every target.

    What is not quantised takes 16 bits unless 32 are asked for: checkpoints are published in 16 bits, so
    nothing is lost with those. Without cases it is not compared.
    """
    advance = bar(f"{name}: weights", len(parameters(graph)))
    with WeightFile(directory) as file:
        stored = store_weights(
            graph, weights, file, bits_of=bits_of, group_size=group_size, on_tensor=advance
        )
    _save(graph, stored, directory / GRAPH)
    path = f"{name}/{GRAPH}"
    lint_graphs([directory / GRAPH], _bits_stored(stored.report))
    rows: list[ParityRow] = []
    if cases is not None:
        advance = bar(f"{name}: parity", 2)
        expected = cases()
        advance()
        rows = check_graph(directory / GRAPH, expected, stage=name, graph=path, weights=kind)
        advance()
    return Component(
        graphs=[format.Graph(path=path, activations="float32", weights=kind)],
        parity=rows,
        blocks=[],
        drift=[],
        float32_blocks=[],
        quantization=stored.report,
    )


def max_length(model: Model, suffix: str) -> int:
    """Tokens of a prompt for a text encoder: CLIP's own limit, or what the model is run with for T5.

    Raises:
        ExportError: The model is run with a T5 that is given no prompt.
    """
    tokenizer = getattr(model.pipeline, f"tokenizer{suffix}")
    encoder = getattr(model.pipeline, f"text_encoder{suffix}")
    if is_t5(encoder):
        if (length := model.defaults.max_sequence_length) < 2:
            raise ExportError(
                f"The model has a T5 and a max_sequence_length of {length}, too few for prompts. "
                "Raise it in generation_defaults.json; Stable Diffusion 3 can leave T5 out: --without t5."
            )
        return length
    # A tokenizer saved without a length claims an astronomical one.
    return min(int(tokenizer.model_max_length), int(encoder.config.max_position_embeddings))


def num_tokens(model: Model) -> int:
    """Text tokens the transformer is given."""
    return model.mmdit.num_text_tokens(model.pipeline, model.defaults.max_sequence_length)


def _bits_of_transformer(mmdit: MMDiT, precision: Precision) -> BitsOf:
    """What turns pictures, times and prompts into tokens and back is a few thousandths of the weights and the
    part that all pictures pass through; only the blocks' linears are worth their error."""
    names = {id(item): name for name, item in mmdit.transformer.named_parameters()}
    bits: dict[str, Bits] = {}
    for block in mmdit.blocks:
        bits |= dict.fromkeys((names[id(item)] for item in block.parameters()), precision.bits)
    bits |= precision.weights

    def bits_of(name: str) -> tuple[Bits, str]:
        if name not in bits:
            return (32 if precision.bits == 32 else 16), "outside the transformer blocks"
        return bits[name], f"{bits[name]} bits were asked for"

    return bits_of


def _bits_stored(report: QuantReport) -> dict[str, int]:
    """Of the weights in few bits, by name."""
    return {item.name: item.bits for item in report.quantized}


def _save(graph: ir.Model, stored: StoredWeights, path: Path) -> None:
    QuantizeWeights(stored.blocked)(graph)
    StoreWeights(stored.plain)(graph)
    ir.save(graph, path)
