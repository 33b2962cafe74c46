"""Engines of TensorRT-RTX and TensorRT: built in a process of their own, and kept by what they were made of.

A builder takes several times the weights in memory, which only the end of its process gives back, and
Polygraphy serves one of the two runtimes in a process. `python -m deploy.engine` is that process: it reads a
request from standard input and answers with lines of JSON, how far it is and then what it built. It ends when
whoever asked does.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import importlib.util
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import IO, Any, Literal

from rich.filesize import decimal

from deploy.bundle import Architecture, Variant
from deploy.errors import DeployError, extra
from deploy.gpu import read_gpus
from deploy.kept import kept_directory, key_of
from profiles.typed import from_data

__all__ = [
    "Engine",
    "EngineRequest",
    "EngineRuntime",
    "build_engine",
    "build_memory_bytes",
    "engine_key",
    "engine_request",
    "import_tensorrt",
    "kept_engine",
]

EngineRuntime = Literal["tensorrt-rtx", "tensorrt"]

MODULES: dict[EngineRuntime, str] = {"tensorrt-rtx": "tensorrt_rtx", "tensorrt": "tensorrt"}
EXTRAS: dict[EngineRuntime, str] = {"tensorrt-rtx": "rtx", "tensorrt": "tensorrt"}

_BUILD_BASE_BYTES = 300_000_000
_BUILD_BYTES_PER_NODE = 270_000
_BUILD_BYTES_PER_NODE_AND_PROFILE = 55_000
_BUILD_BYTES_PER_BYTE = 3.38
"""What a TensorRT-RTX build of 1.7 takes, measured at 5 MB, 3.4 GB and 4.5 GB of weights."""
_USUAL_NODES = 5000
_DISK_SHARE = 2
"""Disk by bytes of weights, with room for the code of small models."""
_DISK_LEAST = 64 << 20
_KILLED = -9
"""Status of a process that the system ended, where systems do so."""
_ENGINE, _RECORD = "transformer.engine", "engine.json"
_ROOT = Path(__file__).resolve().parents[1]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class EngineRequest:
    """All that decides what is built, besides the builder and, for `tensorrt`, the GPU it runs on."""

    runtime: EngineRuntime
    graph: str
    """Path of the transformer's ONNX file, its weights beside it; the engine computes in its types."""
    compute_capabilities: tuple[str, ...]
    """GPUs that the engine is for, as in "8.9"; none for `tensorrt`, which builds for this machine's."""
    latent_sizes: tuple[tuple[int, int], ...]
    """Heights and widths, with one optimisation profile each, in this order."""
    num_tokens: int
    """Text tokens of a prompt."""
    batches: tuple[int, int, int]
    """Least, usual and largest batch; the usual one is what the engine is fastest for."""


@dataclass(frozen=True, kw_only=True)
class Engine:
    """What was built."""

    bytes: int
    sha256: str
    num_int4: int
    """Layers that the builder was given to expand 4-bit weights."""
    builder: str
    """The runtime and its version."""
    seconds: float


def engine_request(graph: Path, variant: Variant, architecture: Architecture) -> EngineRequest:
    """Return what is to be built from a graph for a variant, whose compute capabilities come in any order."""
    assert variant.runtime == "tensorrt-rtx" or variant.runtime == "tensorrt"
    assert variant.shapes is not None
    factor, most = architecture.vae_scale_factor, variant.shapes.max_batch
    named = variant.compute_capabilities if variant.runtime == "tensorrt-rtx" else []
    return EngineRequest(
        runtime=variant.runtime,
        graph=str(graph),
        compute_capabilities=tuple(sorted(named, key=lambda text: tuple(map(int, text.split("."))))),
        latent_sizes=tuple((height // factor, width // factor) for height, width in variant.shapes.sizes),
        num_tokens=variant.shapes.text_tokens,
        # Guidance takes two passes of a picture.
        batches=(1, 2, 2 * most) if architecture.classifier_free else (1, 1, most),
    )


def build_memory_bytes(weight_bytes: int, num_nodes: int = _USUAL_NODES, num_profiles: int = 1) -> int:
    """Return the memory that the process of the builder takes at its peak.

    Args:
        weight_bytes: Of the graph, as they are stored.
        num_nodes: Of the graph, weights not yet taken apart into values and scales.
        num_profiles: Sizes of pictures that the engine is for.
    """
    nodes = _BUILD_BYTES_PER_NODE + _BUILD_BYTES_PER_NODE_AND_PROFILE * (num_profiles - 1)
    return round(_BUILD_BASE_BYTES + nodes * num_nodes + _BUILD_BYTES_PER_BYTE * weight_bytes)


def import_tensorrt(runtime: EngineRuntime) -> ModuleType:
    """Import a runtime's own module, after the tools that drive it were found.

    Raises:
        DeployError: Either is not installed; the message says how to install it.
    """
    with extra(EXTRAS[runtime]):
        # Not imported: it would settle on one of the runtimes.
        if importlib.util.find_spec("polygraphy") is None:
            raise ModuleNotFoundError(name="polygraphy")
        return importlib.import_module(MODULES[runtime])


def kept_engine(
    request: EngineRequest,
    digests: Mapping[str, str],
    cache: Path,
    on_step: Callable[[int, int], None] | None = None,
) -> tuple[Path, Engine]:
    """Return an engine from the cache, built now if it is not there or was damaged.

    Args:
        digests: Of the graph's and its weights' files, by any name.
        cache: Where engines lie, each in a directory of its own.
        on_step: As of `build_engine`.

    Raises:
        DeployError: It cannot be built, or not be kept.
    """
    entry = cache / "engines" / engine_key(request, digests)
    if entry.exists() and (found := _read_kept(entry)) is None:
        logger.warning("the engine in %s was damaged and is built again", entry)
        shutil.rmtree(entry, ignore_errors=True)

    def write(directory: Path) -> None:
        memory = decimal(build_memory_bytes(_weight_bytes(request)))
        logger.info(
            "building an engine of %s, once; it takes minutes and about %s of memory, and is kept in %s",
            request.graph,
            memory,
            entry,
        )
        built = build_engine(request, directory / _ENGINE, on_step)
        (directory / _RECORD).write_text(json.dumps(dataclasses.asdict(built)), encoding="utf-8")

    try:
        room = _DISK_LEAST + _DISK_SHARE * _weight_bytes(request)
        kept_directory(entry, write, num_bytes=room)
    except OSError as error:
        raise DeployError(
            f"An engine cannot be kept in {entry.parent}: {error}. Make room there, or set HPTOOL_CACHE to a "
            "directory on another disk."
        ) from error
    found = _read_kept(entry)
    if found is None:
        raise DeployError(f"{entry} was damaged as it was written. Check the disk.")
    return entry / _ENGINE, found


def engine_key(request: EngineRequest, digests: Mapping[str, str]) -> str:
    """Return the digest of all that an engine depends on: contents, options, builder and GPU, but no path.

    Raises:
        DeployError: The runtime is not installed, so its version is not known.
    """
    facts = dataclasses.asdict(request) | {
        "graph": sorted(digests.values()),
        "builder": import_tensorrt(request.runtime).__version__,
    }
    if request.runtime == "tensorrt":
        gpus = read_gpus()
        facts["gpu"] = [dataclasses.asdict(gpu) for gpu in gpus.devices[:1]]
        facts["driver"] = [gpus.driver_version, gpus.cuda_version]
    return key_of(facts)


def build_engine(
    request: EngineRequest, engine: Path, on_step: Callable[[int, int], None] | None = None
) -> Engine:
    """Build the transformer's engine in a process of its own.

    Args:
        engine: Where it goes; it appears when it is whole.
        on_step: Called with how many hundredths of the builder's steps are done, and 100; they differ in
            length, and the longest is one of the last.

    Raises:
        DeployError: The runtime is missing, refuses the graph or the GPU, or ran out of memory.
    """
    import_tensorrt(request.runtime)
    beside = engine.with_name(f".{engine.name}.part")
    engine.parent.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    try:
        answer = _ask({"request": dataclasses.asdict(request), "engine": str(beside)}, request, on_step)
        beside.replace(engine)
    finally:
        beside.unlink(missing_ok=True)
    return Engine(**answer, seconds=round(time.monotonic() - start, 1))


def _ask(
    job: dict[str, Any], request: EngineRequest, on_step: Callable[[int, int], None] | None
) -> dict[str, Any]:
    """Run the builder's process and return its answer; nothing of it is left when this ends."""
    # Without the current directory on its path (-P), which may hold modules of these names.
    command = [sys.executable, "-P", "-m", "deploy.engine"]
    paths = [str(_ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "POLYGRAPHY_USE_TENSORRT_RTX": str(int(request.runtime == "tensorrt-rtx")),
    }
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, env=environment, text=True
        )
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            answer = _talk(process.stdin, process.stdout, job, on_step)
            if answer is not None and "engine" in answer:
                found: dict[str, Any] = answer["engine"]
                return found
            status = process.wait()
        finally:
            process.kill()
            process.wait()
            process.stdout.close()
        errors.seek(0)
        raise DeployError(_failure(request, status, answer, errors.read().decode(errors="replace")))


def _talk(
    requests: IO[str],
    answers: IO[str],
    job: dict[str, Any],
    on_step: Callable[[int, int], None] | None,
) -> dict[str, Any] | None:
    """Return the last answer, None where there was none."""
    try:
        print(json.dumps(job), file=requests, flush=True)
    except BrokenPipeError:
        return None
    # The pipe stays open meanwhile: its end tells the builder that nobody waits any more.
    try:
        for line in answers:
            answer: dict[str, Any] = json.loads(line)
            if "percent" not in answer:
                return answer
            if on_step is not None:
                on_step(answer["percent"], 100)
        return None
    finally:
        requests.close()


def _failure(request: EngineRequest, status: int, answer: dict[str, Any] | None, errors: str) -> str:
    graph = Path(request.graph).name
    if status == _KILLED:
        needed = decimal(build_memory_bytes(_weight_bytes(request)))
        return (
            f"The builder of the engine of {graph} was killed, most often for lack of memory: it needs about "
            f"{needed}. Close other programs, or build on a machine with more memory."
        )
    lines = [line.strip() for line in errors.splitlines() if line.strip()]
    # Polygraphy's exceptions often say only that something failed; the runtime's own reason is in its log.
    logged = [line.removeprefix("[E]") for line in lines if line.startswith("[E]")]
    said = logged[-1:] if answer else lines[-1:]
    reasons = [text.strip(" .") for text in ([answer["error"]] if answer else []) + said]
    capabilities = ", ".join(request.compute_capabilities)
    gpus = f"compute capability {capabilities}" if capabilities else "this machine's GPU"
    return (
        f"{request.runtime} could not build an engine of {graph} for {gpus}: "
        f"{'; '.join(reasons) or f'its process ended with status {status} and said nothing'}. "
        "Choose another --target, or report this graph."
    )


def _read_kept(entry: Path) -> Engine | None:
    """Return what an entry of the cache holds, None where it is not what was written."""
    try:
        found = from_data(Engine, json.loads((entry / _RECORD).read_text(encoding="utf-8")))
        with (entry / _ENGINE).open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
    except (OSError, ValueError):  # as TypedDataError is
        return None
    return found if digest == found.sha256 else None


def _weight_bytes(request: EngineRequest) -> int:
    graph = Path(request.graph)
    return sum(path.stat().st_size for path in graph.parent.iterdir() if path.suffix != ".onnx")


# What follows runs in the builder's process.


def _serve() -> int:
    """Build what standard input asks for, and return the exit status."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print is no answer

    def say(**answer: Any) -> None:
        print(json.dumps(answer), file=answers, flush=True)

    job = json.loads(sys.stdin.buffer.readline())
    threading.Thread(target=_end_with_the_asker, daemon=True).start()
    request = from_data(EngineRequest, job["request"])
    try:
        built = _build(request, Path(job["engine"]), lambda percent: say(percent=percent))
    except Exception as error:  # Polygraphy's, TensorRT's and the driver's have no base in common
        say(error=str(error) or type(error).__name__)
        return 1
    say(engine=built)
    return 0


def _end_with_the_asker() -> None:
    while os.read(0, 1):
        pass
    os._exit(1)


def _build(request: EngineRequest, engine: Path, on_percent: Callable[[int], None]) -> dict[str, Any]:
    trt = import_tensorrt(request.runtime)
    from polygraphy.backend import trt as polygraphy
    from polygraphy.backend.tensorrt_rtx import CreateConfigRTX
    from polygraphy.logger import G_LOGGER

    G_LOGGER.severity = G_LOGGER.ERROR
    builder, network, parser = polygraphy.network_from_onnx_path(request.graph, strongly_typed=True)
    profiles = [_profile(polygraphy, network, request, size) for size in request.latent_sizes]
    monitor = _progress_monitor(trt, on_percent)
    options = {"profiles": profiles, "progress_monitor": monitor}
    if request.runtime == "tensorrt-rtx":
        capabilities = [tuple(map(int, text.split("."))) for text in request.compute_capabilities]
        config = CreateConfigRTX(compute_capabilities=capabilities, **options)
    else:
        config = polygraphy.CreateConfig(**options)
    num_int4 = _num_int4(trt, network)
    data = memoryview(polygraphy.engine_bytes_from_network((builder, network, parser), config))
    with engine.open("wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
    monitor.reach(100)
    return {
        "bytes": data.nbytes,
        "sha256": hashlib.sha256(data).hexdigest(),
        "num_int4": num_int4,
        "builder": f"{request.runtime} {trt.__version__}",
    }


def _profile(polygraphy: Any, network: Any, request: EngineRequest, size: tuple[int, int]) -> Any:
    """Return the shapes of the network's inputs: one size, one length of text, and the batches asked for."""
    known = {"hidden_states": {2: size[0], 3: size[1]}, "encoder_hidden_states": {1: request.num_tokens}}
    profile = polygraphy.Profile()
    for tensor in (network.get_input(index) for index in range(network.num_inputs)):
        dims = dict(enumerate(tensor.shape)) | known.get(tensor.name, {})
        rest = [dims[axis] for axis in sorted(dims)][1:]
        if any(dim < 1 for dim in rest):
            raise ValueError(f"the input {tensor.name} has a dimension of no known size: {tensor.shape}")
        least, usual, most = ([batch, *rest] for batch in request.batches)
        profile.add(tensor.name, min=least, opt=usual, max=most)
    return profile


def _num_int4(trt: Any, network: Any) -> int:
    layers = (network.get_layer(index) for index in range(network.num_layers))
    expanded = (layer for layer in layers if layer.type == trt.LayerType.DEQUANTIZE)
    return sum(layer.get_input(0).dtype == trt.DataType.INT4 for layer in expanded)


def _progress_monitor(trt: Any, on_percent: Callable[[int], None]) -> Any:
    """Return what TensorRT tells of its phases, each of which is a step of the one it lies in."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]  # known when the runtime is
        def __init__(self) -> None:
            super().__init__()
            self.phases: dict[str, list[int]] = {}  # steps done and in all, outermost first
            self.percent = 0

        def phase_start(self, name: str, parent: str | None, num_steps: int) -> None:
            self.phases[name] = [0, max(num_steps, 1)]

        def step_complete(self, name: str, step: int) -> bool:
            self.phases[name][0] = step + 1
            share = 0.0
            for done, steps in reversed(self.phases.values()):
                share = min(1.0, (done + share) / steps)
            self.reach(int(100 * share))
            return True

        def phase_finish(self, name: str) -> None:
            del self.phases[name]

        def reach(self, percent: int) -> None:
            for passed in range(self.percent + 1, percent + 1):
                on_percent(passed)
            self.percent = max(self.percent, percent)

    return Monitor()


if __name__ == "__main__":
    sys.exit(_serve())
