"""The parts of benchmarks/scale_export.py that need the heavy packages, each run in a process of its own.

The last line that each prints is its result as JSON.
"""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import onnx_ir as ir
import typer

from benchmarks.watch import memory
from deploy.bundle import Bundle, open_bundle

app = typer.Typer(add_completion=False)

GRAPH, HALF_GRAPH = "transformer/model.onnx", "transformer/model.fp16.onnx"
COMPUTE_CAPABILITY = "8.9"


@app.command()
def build_engine(
    bundle: Annotated[Path, typer.Argument(help="With a float16 graph.")],
    engine: Annotated[Path, typer.Argument(help="Where to write it.")],
) -> None:
    """Build an engine for pictures of the bundle's default size, one at a time."""
    from deploy.engine import EngineRequest
    from deploy.engine import build_engine as build
    from export.packed import count_found, int4_weights

    opened = open_bundle(bundle, verify=False)
    defaults, architecture = opened.manifest.defaults, opened.manifest.architecture
    factor = architecture.vae_scale_factor
    graph = bundle / HALF_GRAPH
    request = EngineRequest(
        runtime="tensorrt-rtx",
        graph=str(graph),
        compute_capabilities=(COMPUTE_CAPABILITY,),
        latent_sizes=((defaults.height // factor, defaults.width // factor),),
        num_tokens=num_tokens(opened),
        batches=(1, 2, 2) if architecture.classifier_free else (1, 1, 1),
    )
    build(request, engine)
    files = [path for path in graph.parent.iterdir() if path == graph or path.suffix != ".onnx"]
    weights = int4_weights(ir.load(graph))
    found = {"num_int4": len(weights), "num_found": count_found(engine, weights)}
    print(json.dumps({"onnx_bytes": sum(path.stat().st_size for path in files), **found}))


@app.command()
def one_step(
    bundle: Annotated[Path, typer.Argument(help="With a float32 graph.")],
    way: Annotated[Literal["device", "plain"], typer.Argument(help="`deploy` opens it, or onnxruntime.")],
    side: Annotated[int, typer.Option(help="Latents on a side.")] = 32,
    repeats: Annotated[int, typer.Option(help="Steps to take, after one to warm up.")] = 3,
) -> None:
    """Open the transformer and take steps."""
    opened = open_bundle(bundle, verify=False)
    inputs = draw_inputs(bundle / GRAPH, side, num_tokens(opened))
    before = memory()["VmRSS"]
    started = time.perf_counter()
    take = _device(opened) if way == "device" else _plain(bundle / GRAPH)
    opening = time.perf_counter() - started
    seconds = []
    for _ in range(1 + repeats):
        started = time.perf_counter()
        (velocity,) = take(inputs).values()
        seconds.append(time.perf_counter() - started)
    if not np.isfinite(velocity).all():
        raise SystemExit("the velocity is not finite")
    now = memory()
    result = {
        "seconds_to_open": opening,
        "seconds_first_step": seconds[0],
        "seconds_per_step": statistics.median(seconds[1:]),
        "resident_bytes": now["VmRSS"],
        "resident_anonymous_bytes": now["RssAnon"],
        "resident_file_bytes": now["RssFile"],
        "resident_before_bytes": before,
    }
    print(json.dumps(result))


def _device(bundle: Bundle) -> Any:
    from deploy.kept import cache_directory
    from deploy.session import open_variant

    variant = next(item for item in bundle.manifest.variants if item.runtime == "onnxruntime-cpu")
    return open_variant(bundle, variant, cache=cache_directory()).run


def _plain(graph: Path) -> Any:
    import onnxruntime

    session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    names = [node.name for node in session.get_outputs()]
    return lambda inputs: dict(zip(names, session.run(names, inputs), strict=True))


def num_tokens(bundle: Bundle) -> int:
    """Text tokens that the transformer is given."""
    own = bundle.manifest.defaults.max_sequence_length
    family: str = bundle.manifest.architecture.family
    if family == "flux":
        return own
    return bundle.manifest.tokenizers["tokenizer"].max_length + own


def draw_inputs(graph: Path, side: int, tokens: int, batch: int = 1) -> dict[str, np.ndarray[Any, Any]]:
    """Inputs of pictures in the graph's own types; sizes that the graph leaves open are these."""
    known = {"hidden_states": {2: side, 3: side}, "encoder_hidden_states": {1: tokens}}
    generator = np.random.default_rng(0)
    inputs = {}
    for value in ir.load(graph).graph.inputs:
        assert value.name is not None
        assert value.shape is not None
        assert value.dtype is not None
        sizes = {0: batch} | known.get(value.name, {})
        shape = [int(sizes.get(axis, dim)) for axis, dim in enumerate(value.shape)]  # type: ignore[arg-type]
        inputs[value.name] = generator.standard_normal(shape).astype(value.dtype.numpy())
    inputs["timestep"] = np.full([batch], 500.0, dtype=np.float32)
    return inputs


if __name__ == "__main__":
    app()
