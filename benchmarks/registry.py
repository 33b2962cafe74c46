"""Every benchmark there is: what it asks, the command that answers it, and where the answer goes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import analysis_cost, bits, distill_cost

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """One question."""

    name: str
    """Of its module, and of its results."""
    question: str
    measure: str
    """Command of its module that measures; "" is the module itself."""
    table: str | None = None
    """Command that writes its page."""
    page: str | None = None
    """In docs; None puts `section` into docs/benchmarks.md."""
    section: Callable[[dict[str, Any]], list[str]] | None = None
    """Lines of docs/benchmarks.md, from the results."""
    quick: bool
    """Whether it is part of `make bench`."""
    resumes_from: tuple[str, str] | None = None
    """Option of that command, and the name in results, of what it goes on from when it was stopped."""

    @property
    def results(self) -> Path:
        """Where its numbers are."""
        return RESULTS / f"{self.name}.json"


BENCHMARKS = (
    Benchmark(
        name="paper",
        question="What do the paper's models take in memory and FLOPs, beside what the paper says?",
        measure="compute",
        table="table",
        page="paper.md",
        quick=True,
    ),
    Benchmark(
        name="analysis_cost",
        question="What does an analysis save by sharing the beginning of the forward pass?",
        measure="",
        section=analysis_cost.section,
        quick=True,
    ),
    Benchmark(
        name="distill_cost",
        question="What does distillation save by sharing the frozen beginning of both models?",
        measure="",
        section=distill_cost.section,
        quick=True,
    ),
    Benchmark(
        name="throughput",
        question="How many steps a second does distillation on pictures take, precomputed or not?",
        measure="measure",
        table="table",
        page="data.md",
        quick=True,
    ),
    Benchmark(
        name="bits",
        question="What does each way of rounding cost in velocity error, at which bytes?",
        measure="",
        section=bits.section,
        quick=False,
    ),
    Benchmark(
        name="edge_speed",
        question="How long is a step on a processor, and in how much memory, beside torch and OpenVINO?",
        measure="measure",
        table="table",
        page="edge.md",
        quick=True,
    ),
    Benchmark(
        name="peers",
        question="What do others' ways to 4 bits give on a processor, in bytes, error, time and memory?",
        measure="measure",
        table="table",
        page="peers.md",
        quick=True,
    ),
    Benchmark(
        name="scale_export",
        question="What does an export of 6 to 8 billion parameters take, beside the ordinary way?",
        measure="run",
        table="table",
        page="scale.md",
        quick=False,
        resumes_from=("--results", "scale_export.json"),
    ),
    Benchmark(
        name="serve_load",
        question="What does a server do under load?",
        measure="measure",
        table="table",
        page="serve.md",
        quick=False,
    ),
    Benchmark(
        name="faults",
        question="What survives kill -9, SIGTERM, a full disk, broken data and dead workers?",
        measure="measure",
        table="table",
        page="faults.md",
        quick=False,
    ),
    Benchmark(
        name="fit",
        question="Does what `hptool fit` says come true?",
        measure="check",
        table="table",
        page="fit.md",
        quick=False,
    ),
    Benchmark(
        name="quality",
        question="Which method loses least, at which ratio, after how many steps?",
        measure="run",
        table="table",
        page="quality.md",
        quick=False,
        resumes_from=("--directory", "quality"),
    ),
)
