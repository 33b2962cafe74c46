"""An ONNX graph in OpenVINO, which multiplies with 4-bit weights faster than onnxruntime on x86-64."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deploy.errors import DeployError, extra
from deploy.memory import give_back

with extra("edge"):
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["OpenvinoSession"]


class OpenvinoSession:
    """A graph compiled for this processor.

    It computes in bfloat16, as PyTorch does with these models, where the processor multiplies in it.
    Elsewhere it computes in float32, but for the inputs of linears with rounded weights: those are rounded
    to 8 bits in groups each time they run, which is where the speed is from.
    """

    def __init__(self, path: str | os.PathLike[str], *, threads: int | None = None) -> None:
        """Compile a graph, its external weights from beside it.

        Args:
            threads: Of one operator; None takes one for every core.

        Raises:
            DeployError: OpenVINO is not installed, or does not take the graph.
        """
        self.path = Path(path)
        with extra("openvino"):
            import openvino
        options: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY"}
        if threads is not None:
            options["INFERENCE_NUM_THREADS"] = threads
        try:
            compiled = openvino.Core().compile_model(str(self.path), "CPU", options)
        except Exception as error:  # it raises bare RuntimeErrors
            raise DeployError(f"OpenVINO cannot compile {path}: {_first_line(error)}") from error
        self._dtypes = {port.get_any_name(): port.get_element_type().to_dtype() for port in compiled.inputs}
        self._outputs = [port.get_any_name() for port in compiled.outputs]
        self._request = compiled.create_infer_request()
        self._warm = False

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Run the graph once, as `Session.run`."""
        feeds = {name: np.ascontiguousarray(array, self._dtypes.get(name)) for name, array in inputs.items()}
        try:
            outputs = self._request.infer(feeds, share_inputs=True)
        except Exception as error:  # as above
            shapes = ", ".join(f"{name} {list(array.shape)}" for name, array in feeds.items())
            raise DeployError(f"{self.path} did not run on {shapes}: {_first_line(error)}") from error
        if not self._warm:  # weights are rearranged when they are first used, and their file no longer is
            give_back(self.path.parent)
            self._warm = True
        # Its buffers are overwritten by the next call.
        return {name: np.array(outputs[name]) for name in self._outputs}

    def close(self) -> None:
        """Give the memory back, as `Session.close`."""
        del self._request
        give_back()


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
