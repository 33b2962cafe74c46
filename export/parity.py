"""Whether a written graph computes what the torch module does, on onnxruntime's CPU, over several shapes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from export.errors import ExportError
from export.pieces import run_in_pieces

__all__ = [
    "Case",
    "ParityRow",
    "case_of",
    "check_graph",
    "compare",
    "require_close",
]

Array = np.ndarray[Any, Any]
Weights = Literal["float32", "float16", "int8", "int4"]

# Largest relative error (L2) by the graph's weights and activations. 32 bits allow for another order of
# summing; 16 for rounding each weight, and each activation as well; 4 for three times what
# rounding costs a deep model of random weights: beyond it, something else than rounding is wrong.
LIMITS: dict[tuple[Weights, Literal["float32", "float16"]], float] = {
    ("float32", "float32"): 1e-4,
    ("float16", "float32"): 5e-3,
    ("float16", "float16"): 2e-2,
    ("int8", "float32"): 2e-2,
    ("int8", "float16"): 4e-2,
    ("int4", "float32"): 0.2,
    ("int4", "float16"): 0.2,
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """Inputs of one shape and what the torch module makes of them in float32."""

    shape: dict[str, int]
    inputs: dict[str, Array]
    outputs: dict[str, Array]


@dataclass(frozen=True, kw_only=True)
class ParityRow:
    """One output of one graph at one shape."""

    stage: str
    graph: str
    """Path of the graph in the bundle, or a note that it was written for the comparison only."""
    weights: Weights
    activations: Literal["float32", "float16"]
    output: str
    shape: dict[str, int]
    max_abs_error: float
    relative_error: float
    """L2 norm of the difference by that of torch's output."""
    cosine: float
    num_non_finite: int
    limit: float
    """Largest relative error that is accepted."""


def check_graph(
    path: Path,
    cases: Sequence[Case],
    *,
    stage: str,
    graph: str,
    weights: Weights,
    activations: Literal["float32", "float16"] = "float32",
) -> list[ParityRow]:
    """Run a graph over the cases and hold it to the limit of its types.

    Raises:
        ExportError: An output is not finite or too far from torch's.
    """
    rows: list[ParityRow] = []
    names = list(cases[0].outputs)
    for case, outputs in zip(cases, run_in_pieces(path, [case.inputs for case in cases], names), strict=True):
        for name, found in zip(names, outputs, strict=True):
            row = ParityRow(
                stage=stage,
                graph=graph,
                weights=weights,
                activations=activations,
                output=name,
                shape=case.shape,
                limit=LIMITS[weights, activations],
                **compare(case.outputs[name], found.astype(np.float32)),
            )
            require_close(row)
            rows.append(row)
    return rows


def case_of(shape: dict[str, int], inputs: dict[str, torch.Tensor], outputs: dict[str, torch.Tensor]) -> Case:
    """Of torch's inputs and outputs."""
    return Case(
        shape=shape,
        inputs={name: tensor.numpy() for name, tensor in inputs.items()},
        outputs={name: tensor.numpy() for name, tensor in outputs.items()},
    )


def compare(expected: Array, found: Array) -> dict[str, Any]:
    """The measures of a row."""
    non_finite = int((~np.isfinite(found)).sum())
    found = np.nan_to_num(found, posinf=0.0, neginf=0.0)  # counted above; JSON has no word for them
    expected, found = expected.astype(np.float64), found.astype(np.float64)
    norm, other, distance = (float(np.linalg.norm(array)) for array in (expected, found, found - expected))
    # A model that was not trained yet may put out zeros: then the difference itself is judged.
    cosine = float((expected * found).sum() / (norm * other)) if norm and other else float(norm == other)
    return {
        "max_abs_error": float(np.abs(found - expected).max()),
        "relative_error": distance / norm if norm else distance,
        "cosine": cosine,
        "num_non_finite": non_finite,
    }


def require_close(row: ParityRow, hint: str = "") -> None:
    """Refuse a row that is beyond its limit.

    Raises:
        ExportError: It is; the message ends with the hint.
    """
    if faults := list(_faults(row)):
        at = ", ".join(f"{name} {size}" for name, size in row.shape.items())
        raise ExportError(
            f"The exported {row.stage} ({row.graph}) differs from the torch model at {at}: its {row.output} "
            f"{' and '.join(faults)}. {hint} Nothing was written; --bits 32 shows whether rounding is to "
            "blame. If it is, --calibration or more --bits make it less, and --max-error accepts it."
        )


def _faults(row: ParityRow) -> Iterator[str]:
    if row.num_non_finite:
        yield f"holds {row.num_non_finite} values that are not finite"
    if not row.relative_error <= row.limit:
        yield f"has a relative error of {row.relative_error:.3g} where {row.limit:g} is accepted"
