"""One call over what runs a graph on a device: onnxruntime, or an engine for a GPU."""

from __future__ import annotations

import logging
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any

from deploy.bundle import Bundle, Variant, graph_digests, graph_files
from deploy.engine import EngineRuntime, engine_request, import_tensorrt, kept_engine
from deploy.errors import DeployError, extra
from deploy.kept import cache_directory
from deploy.memory import give_back
from deploy.openvino_session import OpenvinoSession
from deploy.prepared import MINIMUM_BYTES, WEIGHTS, prepared_graph, processor

with extra("edge"):
    import numpy as np
    import onnxruntime
    from numpy.typing import NDArray

__all__ = [
    "CONVOLVING_OPTIONS",
    "PROVIDERS",
    "AnySession",
    "EngineSession",
    "Session",
    "available_providers",
    "open_graph",
    "open_variant",
]

Array = NDArray[Any]

logger = logging.getLogger(__name__)

CPU = ("CPUExecutionProvider",)
# What a provider does not run goes to the next, which onnxruntime takes from the first to the last.
PROVIDERS: dict[str, tuple[str, ...]] = {
    "onnxruntime-tensorrt": ("TensorrtExecutionProvider", "CUDAExecutionProvider", *CPU),
    "onnxruntime-cuda": ("CUDAExecutionProvider", *CPU),
    "onnxruntime-cpu": CPU,
}
"""By runtime, onnxruntime's execution providers, best first."""

_CUDA_OPTIONS = {"arena_extend_strategy": "kSameAsRequested"}
"""It would take the next power of two."""
CONVOLVING_OPTIONS = {"cudnn_conv_algo_search": "HEURISTIC"}
"""To try each way of a convolution takes a second for every new size of picture."""

_DTYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int64)": np.int64}


class Session:
    """An ONNX graph in onnxruntime. Floating-point inputs are cast to the graph's own type."""

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        providers: tuple[str, ...] = CPU,
        cuda_options: Mapping[str, str] | None = None,
        threads: int | None = None,
        optimize: bool = True,
    ) -> None:
        """Load a graph, with its external weights from beside it.

        Args:
            providers: onnxruntime's execution providers, all of which have to be there.
            cuda_options: Of the one for CUDA, beside our own.
            threads: Of one operator; None takes one for every core.
            optimize: Whether to rewrite the graph for the provider; one that was prepared has been.

        Raises:
            DeployError: A provider is not there or did not start, or the graph cannot be loaded.
        """
        self.path = Path(path)
        if threads is not None and threads < 1:
            raise DeployError(f"A session takes one thread at least, not {threads}.")
        available = available_providers()
        if absent := [provider for provider in providers if provider not in available]:
            raise DeployError(
                f"onnxruntime {onnxruntime.__version__} has no {', '.join(absent)} here, "
                f"only {', '.join(available)}. Install the onnxruntime package that brings it."
            )
        chosen = _with_options(providers, cuda_options or {})
        self._session = _load(self.path, _options(optimize=optimize, threads=threads), chosen)
        # A provider that fails to start is left out with a line in the log, and everything runs on the CPU.
        actual = self._session.get_providers()
        if lost := [provider for provider in providers if provider not in actual]:
            raise DeployError(
                f"onnxruntime did not start {', '.join(lost)} for {self.path}; it would have run on "
                f"{', '.join(actual)} instead. Check the device's driver, and that CUDA and cuDNN are there "
                "(pip install 'onnxruntime-gpu[cuda,cudnn]')."
            )
        self._session.disable_fallback()
        self._dtypes = {node.name: _DTYPES[node.type] for node in self._session.get_inputs()}
        self._outputs = [node.name for node in self._session.get_outputs()]

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run the graph once; returns its outputs by name, in the graph's own type.

        Raises:
            DeployError: onnxruntime refused the inputs or failed on them.
        """
        feeds = {name: array.astype(self._dtypes.get(name), copy=False) for name, array in inputs.items()}
        try:
            outputs = self._session.run(self._outputs, feeds)
        except Exception as error:  # its exceptions have no public base class
            raise DeployError(f"{self.path} did not run on {_shapes(feeds)}: {_first_line(error)}") from error
        return dict(zip(self._outputs, outputs, strict=True))

    def close(self) -> None:
        """Give the memory back; the session cannot run any more."""
        del self._session
        give_back()


class EngineSession:
    """An engine of TensorRT-RTX or TensorRT, driven through Polygraphy's runner.

    An engine runs on the GPUs it was built for and nowhere else. No test executes one: tests cover how it is
    built and refused, and the ONNX graph it was built from is what its pictures are checked with.
    """

    def __init__(self, path: str | os.PathLike[str], runtime: EngineRuntime) -> None:
        """Load an engine onto the GPU. The first load of one of TensorRT-RTX compiles it and takes a while.

        Raises:
            DeployError: The runtime is not installed, or does not take the engine.
        """
        self.path = Path(path)
        # Polygraphy reads this once, when its configuration is imported.
        os.environ["POLYGRAPHY_USE_TENSORRT_RTX"] = str(int(runtime == "tensorrt-rtx"))
        import_tensorrt(runtime)  # Polygraphy loads it lazily, and would offer to install it
        import polygraphy.config
        from polygraphy.backend.trt import EngineFromPath, TrtRunner

        if (runtime == "tensorrt-rtx") != polygraphy.config.USE_TENSORRT_RTX:
            raise DeployError(
                f"This process has driven another runtime than {runtime}, and Polygraphy serves one in a "
                "process. Open this bundle in a process of its own."
            )
        # "runtime": memory for the shapes that run, and not for the largest of the engine.
        self._runner = TrtRunner(EngineFromPath(str(self.path)), allocation_strategy="runtime")
        try:
            self._runner.activate()
        except Exception as error:  # Polygraphy's, TensorRT's and the driver's have no base in common
            raise DeployError(
                f"{runtime} cannot load {self.path}: {_first_line(error)} "
                "Check the driver, and that the runtime has the version the engine was built with."
            ) from error
        self._active = 0
        metadata = self._runner.get_input_metadata(use_numpy_dtypes=True)
        self._dtypes = {name: np.dtype(entry.dtype) for name, entry in metadata.items()}

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run the engine once, as `Session.run`."""
        feeds = {name: np.ascontiguousarray(array, self._dtypes.get(name)) for name, array in inputs.items()}
        try:
            if (profile := self._profile(feeds)) != self._active:
                self._runner.set_profile(profile)
                self._active = profile
            outputs = self._runner.infer(feeds)
        except DeployError:
            raise
        except Exception as error:  # as above
            raise DeployError(f"{self.path} did not run on {_shapes(feeds)}: {_first_line(error)}") from error
        # The runner's buffers are overwritten by the next call.
        return {name: np.array(array) for name, array in outputs.items()}

    def _profile(self, feeds: Mapping[str, Array]) -> int:
        """Return which of the optimisation profiles takes these inputs; there is one for each size."""
        engine = self._runner.engine
        for index in range(engine.num_optimization_profiles):
            bounds = {name: engine.get_tensor_profile_shape(name, index) for name in feeds}
            if all(
                least <= size <= most
                for name, array in feeds.items()
                for size, least, most in zip(array.shape, bounds[name][0], bounds[name][2], strict=True)
            ):
                return index
        raise DeployError(f"{self.path} was not built for {_shapes(feeds)}. Export again for these sizes.")

    def close(self) -> None:
        """Give the GPU's memory back, as `Session.close`."""
        self._runner.deactivate()


AnySession = Session | EngineSession | OpenvinoSession


def available_providers() -> list[str]:
    """Return the execution providers that onnxruntime was built with."""
    providers: list[str] = onnxruntime.get_available_providers()
    return providers


def open_variant(
    bundle: Bundle, variant: Variant, *, threads: int | None = None, cache: Path | None = None
) -> AnySession:
    """Open the transformer as the variant runs it.

    Args:
        threads: As of `open_graph`.
        cache: As of `open_graph`; the engine of `tensorrt` is built when it is not there.

    Raises:
        DeployError: It cannot be loaded, or its engine cannot be built here.
    """
    if variant.runtime == "tensorrt-rtx":
        return EngineSession(bundle.file(variant.path), variant.runtime)
    if variant.runtime == "tensorrt":
        kept = cache_directory() if cache is None else cache
        request = engine_request(bundle.file(variant.path), variant, bundle.manifest.architecture)
        engine, _ = kept_engine(request, graph_digests(bundle.manifest.files, variant.path), kept)
        return EngineSession(engine, variant.runtime)
    if variant.runtime == "openvino":
        return OpenvinoSession(bundle.file(variant.path), threads=threads)
    if variant.runtime == "onnxruntime-cpu":
        return open_graph(bundle, variant.path, threads=threads, cache=cache)
    return Session(bundle.file(variant.path), providers=PROVIDERS[variant.runtime], threads=threads)


def open_graph(
    bundle: Bundle,
    path: str,
    *,
    on_gpu: bool = False,
    threads: int | None = None,
    cache: Path | None = None,
) -> Session:
    """Open a graph of a bundle in onnxruntime.

    Args:
        path: In the bundle.
        on_gpu: Whether it runs on the GPU and not on the processor.
        threads: Of one operator; None takes one for every core.
        cache: Where the graph is kept as this processor wants it, if its weights are many; None opens it as
            it is.

    Raises:
        DeployError: The graph cannot be loaded.
    """
    graph = bundle.file(path)
    if on_gpu:
        cuda = PROVIDERS["onnxruntime-cuda"]
        return Session(graph, providers=cuda, cuda_options=CONVOLVING_OPTIONS, threads=threads)
    num_bytes = sum(file.bytes for file in graph_files(bundle.manifest.files, path).values())
    if cache is not None and num_bytes >= MINIMUM_BYTES:
        facts = graph_digests(bundle.manifest.files, path)
        facts |= {"onnxruntime": onnxruntime.__version__, "processor": processor()}
        prepared = prepared_graph(graph, facts, num_bytes, partial(_prepare, graph), cache)
        if prepared is not None and (session := _open_prepared(prepared, threads)) is not None:
            return session
    return Session(graph, threads=threads)


def _open_prepared(prepared: Path, threads: int | None) -> Session | None:
    """Open a graph that was prepared; if its files were damaged, they go and it is None."""
    try:
        session = Session(prepared, threads=threads, optimize=False)
    except DeployError as error:
        logger.warning("%s; it is removed and made again the next time", error)
        shutil.rmtree(prepared.parent, ignore_errors=True)
        return None
    # Opening reads every scale for the weights that it would rearrange, were they not so already.
    give_back(prepared.parent)
    return session


def _prepare(graph: Path, prepared: Path) -> None:
    """Write a graph whose weights are there as in the file, and as this processor multiplies with them.

    In two passes, because rewriting the graph and rearranging its weights each hold all of them in memory.

    Raises:
        DeployError: The graph cannot be loaded.
    """
    rewritten = prepared.with_name("rewritten.onnx")
    _rewrite(graph, rewritten, "rewritten.data", optimize=True, prepack=False)
    _rewrite(rewritten, prepared, WEIGHTS, optimize=False, prepack=True)
    for path in (rewritten, rewritten.with_suffix(".data")):
        path.unlink()


def _rewrite(graph: Path, written: Path, weights: str, *, optimize: bool, prepack: bool) -> None:
    options = _options(optimize=optimize)
    options.optimized_model_filepath = str(written)
    entries = {
        "disable_prepacking": str(int(not prepack)),
        "save_external_prepacked_constant_initializers": str(int(prepack)),
        "optimized_model_external_initializers_file_name": weights,
        "optimized_model_external_initializers_min_size_in_bytes": "1024",
    }
    for key, value in entries.items():
        options.add_session_config_entry(f"session.{key}", value)
    _load(graph, options, CPU)
    give_back()


def _options(*, optimize: bool, threads: int | None = None) -> Any:
    options, levels = onnxruntime.SessionOptions(), onnxruntime.GraphOptimizationLevel
    # Zero is onnxruntime's own word for one thread per core. Operators run one after another: the graphs are
    # chains, so a second pool of threads would only take cores from the first.
    options.intra_op_num_threads = threads or 0
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    # Blocked int4 weights become one fused operator at this level; below it they would be unpacked at every
    # step.
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimize else levels.ORT_DISABLE_ALL
    # What it warns of at load (initialisers nothing uses any more) is nothing a user can act on.
    options.log_severity_level = 3
    return options


def _with_options(providers: Sequence[str], cuda_options: Mapping[str, str]) -> list[Any]:
    if "CUDAExecutionProvider" not in providers:
        return list(providers)
    with redirect_stdout(sys.stderr):  # what it does not find it says on standard output
        onnxruntime.preload_dlls()  # from packages beside it, where the system does not look
    own = {"CUDAExecutionProvider": {**_CUDA_OPTIONS, **cuda_options}}
    return [(provider, own.get(provider, {})) for provider in providers]


def _load(path: Path, options: Any, providers: Sequence[Any]) -> Any:
    try:
        return onnxruntime.InferenceSession(path, options, providers=list(providers))
    except Exception as error:  # its exceptions have no public base class
        raise DeployError(f"onnxruntime cannot load {path}: {_first_line(error)}") from error


def _shapes(feeds: Mapping[str, Array]) -> str:
    return ", ".join(f"{name} {list(array.shape)}" for name, array in feeds.items())


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
