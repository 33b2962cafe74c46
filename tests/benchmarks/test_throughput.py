"""The loop is timed in each way, on the same steps."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks import throughput


def test_every_way_is_timed_and_has_its_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(throughput, "BATCH", 2)
    monkeypatch.setattr(throughput, "RECIPE", replace(throughput.RECIPE, batch_size=2))
    seconds = throughput.seconds_per_step(num_pictures=3, rounds=1)
    assert len(seconds) == 4
    assert min(seconds.values()) > 0
    results = {
        "machine": {"threads": 1, "processor": "P", "torch": "2"},
        "removed": (1,),
        "batch": 2,
        "rounds": 1,
        "seconds_per_step": dict.fromkeys(seconds, 0.5) | {"precomputed, shared prefix": 0.25},
    }
    page = throughput.section(results)
    assert "| precomputed, shared prefix | 4.00 | 8.0 | 1.00 |" in page
    assert page.count("| 2.00 | 4.0 | 2.00 |") == 3
