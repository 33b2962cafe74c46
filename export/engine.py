"""The engines of a bundle: which targets share one, and whether it holds the weights as stored."""

from __future__ import annotations

import dataclasses
import importlib.util
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from deploy.bundle import Architecture, File, Variant, graph_digests
from deploy.choice import obstacle_of
from deploy.engine import Engine, EngineRuntime, engine_key, engine_request, kept_engine
from deploy.errors import DeployError
from export.errors import ExportError
from export.packed import count_found, int4_weights
from toolchain.progress import Bar

__all__ = ["ENGINES", "TURING", "EngineReport", "build_engines", "num_engines", "require_tensorrt_rtx"]

ENGINES = "engines.json"
"""The report, in a bundle."""

TURING = "7.5"
"""TensorRT-RTX makes one engine for all later GPUs, and wants another for this one."""

# An engine holds the graph's weights and, for each optimisation profile, code that grows with the nodes:
# 11 to 14 kB a node were measured. Where weights are the larger part, as with billions of parameters,
# 4 bits expanded to 16 exceed this bound; in a model of a few megabytes the code hides them, and only gross
# errors show.
_MOST_OF_WEIGHTS = 1.5
_MOST_CODE_BYTES_PER_NODE = 24 * 1024
_LEAST_OF_WEIGHTS = 0.5


@dataclass(frozen=True, kw_only=True)
class EngineReport:
    """One engine of an export, for whoever wants to know what is in it."""

    targets: list[str]
    runtime: EngineRuntime
    compute_capabilities: list[str]
    weight_bytes: int
    """Of the graph it is built from."""
    num_int4: int
    """Weights of 4 bits among them."""
    path: str | None = None
    """In the bundle; None for `tensorrt`, whose engines lie in the cache of the device they run on."""
    bytes: int | None = None
    """As all that follows None for an engine that its device builds when it first runs there."""
    ratio: float | None = None
    """Bytes by those of the weights."""
    num_found: int | None = None
    """Weights of 4 bits that lie in the engine as they are stored, so that none of these was expanded."""
    builder: str | None = None
    seconds: float | None = None
    """That building took, now or when it came into the cache."""


def build_engines(
    variants: Sequence[Variant],
    directory: Path,
    *,
    files: Mapping[str, File],
    architecture: Architecture,
    cache: Path,
    bar: Bar,
) -> tuple[list[Variant], list[EngineReport], dict[str, File]]:
    """Build the engines that a bundle's variants need, each once for all targets that can share it.

    Args:
        variants: In the order of the manifest. Those of engines name the compute capability of their target;
            the path of `tensorrt-rtx` is as yet that of the graph it is built from.
        directory: The bundle, with its graphs.
        files: What is in it.
        architecture: The model's.
        cache: Where engines are kept.
        bar: Starts progress bars.

    Returns:
        The variants with the engines' paths and all their compute capabilities, a report of each engine, and
        what files came into the bundle.

    Raises:
        ExportError: An engine cannot be built, or does not hold the weights as they are.
    """
    finished, reports, written = list(variants), [], dict[str, File]()
    for indices in _groups(variants):
        members = [variants[index] for index in indices]
        shared = _shared(members)
        graph = _read_graph(directory / shared.path)
        request = engine_request(graph.path, shared, architecture)
        report = EngineReport(
            targets=[one.target for one in members],
            runtime=request.runtime,
            compute_capabilities=shared.compute_capabilities,
            weight_bytes=graph.weight_bytes,
            num_int4=len(graph.int4),
        )
        if request.runtime == "tensorrt-rtx" or obstacle_of(shared) is None:
            digests = graph_digests(files, shared.path)
            try:
                kept, engine = kept_engine(request, digests, cache, _lazily(bar, shared))
            except DeployError as error:
                raise ExportError(str(error)) from error
            _require_weights(engine, graph, num_profiles=len(request.latent_sizes))
            report = dataclasses.replace(
                report,
                bytes=engine.bytes,
                ratio=round(engine.bytes / graph.weight_bytes, 3),
                num_found=count_found(kept, graph.int4),
                builder=engine.builder,
                seconds=engine.seconds,
            )
            if request.runtime == "tensorrt-rtx":
                names = "-".join(f"sm{text.replace('.', '')}" for text in shared.compute_capabilities)
                path = f"engines/{names}-{engine_key(request, digests)[:8]}.engine"
                (directory / path).parent.mkdir(exist_ok=True)
                shutil.copyfile(kept, directory / path)
                written[path] = File(sha256=engine.sha256, bytes=engine.bytes)
                report = dataclasses.replace(report, path=path)
                for index in indices:
                    finished[index] = _finished(variants[index], path, shared.compute_capabilities)
        reports.append(report)
    return finished, reports, written


def num_engines(variants: Sequence[Variant]) -> int:
    """Return how many engines a bundle of these variants holds."""
    return sum(variants[indices[0]].runtime == "tensorrt-rtx" for indices in _groups(variants))


def require_tensorrt_rtx() -> None:
    """Refuse to go on without what builds engines.

    Raises:
        ExportError: It is not installed.
    """
    missing = [name for name in ("tensorrt_rtx", "polygraphy") if importlib.util.find_spec(name) is None]
    if missing:
        raise ExportError(
            f"This target needs an engine, and {' and '.join(missing)} is not installed to build it: "
            "run `pip install 'hptool[rtx]'`, or export with --target cpu-x86."
        )


def _groups(variants: Sequence[Variant]) -> list[list[int]]:
    """Return the places of the variants that share an engine, group by group."""
    groups: dict[tuple[Any, ...], list[int]] = {}
    for index, variant in enumerate(variants):
        if variant.shapes is None:
            continue
        # An engine of `tensorrt` is for what its device asks for, and for the GPU it is built on.
        alone = variant.runtime == "tensorrt"
        turing = TURING in variant.compute_capabilities
        facts = (
            variant.runtime,
            variant.path,
            tuple(variant.shapes.sizes),
            variant.shapes.max_batch if alone else None,
            tuple(variant.compute_capabilities) if alone or turing else None,
        )
        groups.setdefault(facts, []).append(index)
    return list(groups.values())


def _shared(variants: Sequence[Variant]) -> Variant:
    """Return what serves all of them: the largest batch costs no bytes, and memory only where it is used."""
    capabilities = {text for variant in variants for text in variant.compute_capabilities}
    shapes = [variant.shapes for variant in variants if variant.shapes is not None]
    return dataclasses.replace(
        variants[0],
        compute_capabilities=sorted(capabilities, key=_number),
        shapes=dataclasses.replace(shapes[0], max_batch=max(shape.max_batch for shape in shapes)),
    )


def _finished(variant: Variant, path: str, capabilities: Sequence[str]) -> Variant:
    own = variant.compute_capabilities
    others = [text for text in capabilities if text not in own]
    return dataclasses.replace(variant, path=path, compute_capabilities=[*own, *others])


def _number(capability: str) -> tuple[int, ...]:
    return tuple(map(int, capability.split(".")))


def _lazily(bar: Bar, variant: Variant) -> Callable[[int, int], None]:
    """Return a bar that starts with its first step: an engine from the cache takes none."""
    advance: list[Callable[..., None]] = []

    def step(_: int, total: int) -> None:
        if not advance:
            advance.append(bar(f"engine for {', '.join(variant.compute_capabilities)}", total))
        advance[0]()

    return step


@dataclass(frozen=True, kw_only=True)
class _Graph:
    """What is compared with an engine of it."""

    path: Path
    weight_bytes: int
    num_nodes: int
    int4: list[ir.TensorProtocol]


def _read_graph(path: Path) -> _Graph:
    model = ir.load(path)
    tensors = [value.const_value for value in model.graph.initializers.values()]
    return _Graph(
        path=path,
        weight_bytes=sum(tensor.nbytes for tensor in tensors if tensor is not None),
        num_nodes=len(model.graph),
        int4=int4_weights(model),
    )


def _require_weights(engine: Engine, graph: _Graph, *, num_profiles: int) -> None:
    """Refuse an engine that shows that weights were not taken as they are."""
    name = graph.path.name
    if engine.num_int4 != len(graph.int4):
        raise ExportError(
            f"The builder was given {engine.num_int4} weights of 4 bits to expand where {name} has "
            f"{len(graph.int4)}: they were not taken as stored. Report this graph."
        )
    _require_size(
        engine.bytes,
        weight_bytes=graph.weight_bytes,
        num_nodes=graph.num_nodes,
        num_profiles=num_profiles,
        name=name,
    )


def _require_size(
    engine_bytes: int, *, weight_bytes: int, num_nodes: int, num_profiles: int, name: str
) -> None:
    least = _LEAST_OF_WEIGHTS * weight_bytes
    most = _MOST_OF_WEIGHTS * weight_bytes + _MOST_CODE_BYTES_PER_NODE * num_nodes * num_profiles
    if not least <= engine_bytes <= most:
        raise ExportError(
            f"The engine of {name} has {engine_bytes} bytes where {weight_bytes} bytes of weights let "
            f"expect {least:.0f} to {most:.0f}: its weights were not taken as stored. Report this graph."
        )
