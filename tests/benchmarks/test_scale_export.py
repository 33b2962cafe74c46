"""What is measured is what a command took, and the page says it."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import typer

from benchmarks import scale_export
from benchmarks.scale_export import GB, GIB, MeasurementError, page, run
from benchmarks.watch import memory, seconds_to_read, watch
from toolchain.artifacts import read_json, write_json

MIB = 2**20
HOLD = "import time; held = bytearray({size}); time.sleep({seconds})"


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_the_peak_is_that_of_the_command() -> None:
    none, some = (watch(python(HOLD.format(size=size, seconds=0.5))) for size in (0, 300 * MIB))
    assert 290 * MIB <= some.peak_anonymous_bytes - none.peak_anonymous_bytes < 320 * MIB
    assert 290 * MIB <= some.peak_bytes < 400 * MIB
    assert (some.stopped, some.status) == (None, 0)
    assert some.seconds > 0.5


def test_what_children_hold_counts() -> None:
    child = HOLD.format(size=300 * MIB, seconds=0.5)
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    assert watch(python(code)).peak_anonymous_bytes > 300 * MIB


def test_a_mapped_file_is_resident_and_not_anonymous(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(200 * MIB))
    code = (
        "import mmap, sys, time; stream = open(sys.argv[1], 'rb');"
        "held = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ);"
        "sum(held[place] for place in range(0, len(held), 4096)); time.sleep(0.3)"
    )
    watched = watch([*python(code), str(path)])
    assert watched.peak_file_bytes > 200 * MIB
    assert watched.peak_anonymous_bytes < 100 * MIB
    assert watched.peak_bytes > 200 * MIB


def test_a_command_is_killed_above_its_limit_and_that_is_said() -> None:
    watched = watch(python(HOLD.format(size=400 * MIB, seconds=60)), most_bytes=300 * MIB)
    assert watched.stopped in ("killed at 0.3 GiB", "killed at 0.4 GiB")
    assert watched.seconds < 30


def test_a_command_is_killed_when_the_disk_fills_or_time_runs_out(tmp_path: Path) -> None:
    waits = python("import time; time.sleep(60)")
    assert watch(waits, most_seconds=0.2).stopped == "killed after 0 s"
    assert "disk free" in str(watch(waits, least_free_disk=(tmp_path, 1 << 60)).stopped)


def test_output_and_status_come_back() -> None:
    watched = watch(python("import sys; print('out'); print('why', file=sys.stderr); sys.exit(3)"))
    assert (watched.output, watched.errors, watched.status) == ("out\n", "why\n", 3)


def test_ones_own_memory_is_known() -> None:
    assert memory()["VmRSS"] >= memory()["RssAnon"] > MIB


def test_files_are_read_to_their_end(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in "ab"]
    for path in paths:
        path.write_bytes(bytes(20 * MIB))
    assert 0 < seconds_to_read(paths) < 60


def measured(**values: Any) -> dict[str, Any]:
    machine = {"processor": "a processor", "cores": 2, "memory_bytes": 24 * GIB, "torch": "2.13.0"}
    return values | {"machine": machine}


def peaks(gib: float, seconds: float) -> dict[str, Any]:
    return {
        "seconds": seconds,
        "peak_bytes": gib * GIB,
        "peak_anonymous_bytes": gib * GIB / 2,
        "peak_file_bytes": gib * GIB / 2,
    }


def test_only_what_is_missing_is_measured_and_failures_are_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def make(model: str, directory: Path) -> None:
        directory.mkdir()
        asked.append(("make", model))

    def succeed(place: scale_export.Place) -> dict[str, Any]:
        asked.append(("export", place.name))
        return {"value": 1}

    def fail(place: scale_export.Place) -> dict[str, Any]:
        asked.append(("step", place.name))
        raise MeasurementError("no")

    monkeypatch.setattr(scale_export, "_make", make)
    monkeypatch.setattr(scale_export, "MEASURES", {"export": succeed, "step": fail})
    monkeypatch.setattr(scale_export, "measure_ordinary", lambda *_: {"blocks": 4})
    results, checkpoint = tmp_path / "results.json", tmp_path / "tiny"
    measure = partial(run, scratch=tmp_path, results=results, models=["tiny"], rows=None, keep=False)
    for _ in range(2):
        with pytest.raises(typer.Exit) as ended:
            measure()
        assert ended.value.exit_code == 1
        assert checkpoint.exists()  # what is not measured yet needs it
    assert asked == [("make", "tiny"), ("export", "tiny"), ("step", "tiny"), ("step", "tiny")]
    measure(rows=["export"])
    assert asked[4:] == [("export", "tiny")]
    found = read_json(results)
    assert set(found["rows"]["tiny"]) == {"export"}
    assert found["rows"]["tiny"]["export"]["value"] == found["ordinary"]["blocks"] - 3 == 1
    assert found["ordinary"]["machine"]["cores"] > 0

    monkeypatch.setitem(scale_export.MEASURES, "step", succeed)
    measure(keep=True)
    assert checkpoint.exists()
    measure()
    assert not checkpoint.exists()


def test_the_ordinary_way_is_tried_at_falling_depths_until_it_survives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def make(_: str, directory: Path, blocks: int | None = None) -> None:
        directory.mkdir(parents=True)
        write_json(directory / "depth.json", {"blocks": blocks})

    def watched(command: list[str], **_: Any) -> scale_export.Watched:
        survives = read_json(Path(command[3]) / "depth.json")["blocks"] == 4
        if survives:
            Path(command[4]).mkdir()
            for name in ("model.onnx", "model.onnx.data"):
                (Path(command[4]) / name).write_bytes(bytes(50))
        return scale_export.Watched(
            seconds=60.0, peak_bytes=8 * GIB, peak_anonymous_bytes=0, peak_file_bytes=0,
            stopped=None if survives else "killed at 20.1 GiB", status=0 if survives else -9,
            output="", errors="",
        )  # fmt: skip

    def export(place: scale_export.Place, _: str, output: Path) -> scale_export.Watched:
        (output / "transformer").mkdir(parents=True)
        (output / "transformer" / "model.onnx").write_bytes(bytes(80))
        return scale_export.Watched(
            seconds=30.0, peak_bytes=GIB, peak_anonymous_bytes=0, peak_file_bytes=0, stopped=None, status=0,
            output="", errors="",
        )  # fmt: skip

    monkeypatch.setattr(scale_export, "_make", make)
    monkeypatch.setattr(scale_export, "watch", watched)
    monkeypatch.setattr(scale_export, "_export", export)
    monkeypatch.setattr(scale_export, "ORDINARY_DISK", 0)
    found = scale_export.measure_ordinary(tmp_path, "model", (8, 4, 2), 64)
    assert [attempt["stopped"] for attempt in found["attempts"]] == ["killed at 20.1 GiB", None]
    assert found["attempts"][1]["transformer_bytes"] == 100
    assert (found["blocks"], found["ratios"]) == (4, {"peak_bytes": 8.0, "seconds": 2.0})
    assert list(tmp_path.iterdir()) == []
    text = page({"rows": {}, "ordinary": measured(**found)})
    assert "| 8 | killed at 20.1 GiB | 60 s | 8.00 GiB | – |" in text
    assert "At 4 blocks the ordinary way takes 8.0 times the memory\nand 2.0 times the time." in text


def test_the_ordinary_way_is_not_blamed_for_a_disk_that_was_full_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scale_export, "ORDINARY_DISK", 1 << 60)
    with pytest.raises(MeasurementError, match="GB free, and this takes"):
        scale_export.measure_ordinary(tmp_path, "model", (8, 4, 2), 64)


def test_the_page_says_what_was_measured_and_what_missed_its_aim() -> None:
    step = {"seconds_to_open": 5.0, "seconds_per_step": 4.0, "resident_bytes": 4.4 * GB}
    export = measured(
        **peaks(2.0, 100.0),
        seconds_to_read=10.0,
        checkpoint_bytes=12.7 * GB,
        transformer_bytes=3.4 * GB,
        stages=scale_export._stages("a line\ntransformer: weights     ━━━━━━━ 970/970 0:00:30 \n"),
    )
    rows = {
        "write": export | {"seconds": 70.0},
        "export": export,
        "engine": measured(**peaks(13.0, 90.0), engine_bytes=3.3 * GB, onnx_bytes=3.4 * GB),
        "step": measured(
            weight_bytes=3.4 * GB, first=step, device=step, plain=step | {"resident_bytes": 6.8 * GB}
        ),
    }
    text = page({"rows": {"sd3.5-large-turbo-pruned": rows}, "ordinary": None})
    cells_of = [[cell.strip() for cell in line.split("|")] for line in text.splitlines() if "|" in line]
    lines = {cells[1]: cells[2] for cells in cells_of}
    cells = [lines[title] for title, _ in scale_export._ROWS]
    assert cells == [
        "2.00 GiB (1.00 without files)",
        (
            "70 s, 7.0 × one read **(above what was aimed at)**; "
            "30 s of it rounding and storing weights (12.7 GB read in 10 s)"
        ),
        "100 s, 10.0 × one read, 2.00 GiB",
        "3.40 GB",
        "3.30 GB, 0.971 × ONNX",
        "90 s, 13.0 GiB",
        "4.00 s; opened plainly, with pre-packed weights beside the file's, 4.00 s",
        "1.29 × weights; opened plainly 2.00 ×",
        "5.0 s, the first time 5.0 s; plainly 5.0 s",
        "not measured",
    ]
    assert "- a processor, 2 cores, 24 GiB; torch 2.13.0" in text
    assert "Not measured." in text
