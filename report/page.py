"""The report as a page: what each section says of the evidence, and the template that shows it."""

from __future__ import annotations

import base64
import io
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import numpy.typing as npt
from PIL import Image
from rich.filesize import decimal

from deploy.bench import Bench, Spread
from deploy.bundle import MANIFEST, SIGNATURE, graph_files
from export.engine import ENGINES
from export.fit import TargetFit
from report.charts import HARM_RANGE, Series, bars, dots, harm_panels, lines, plan_panels
from report.evidence import PARITY_FILE, BundleRun, Evidence
from report.measure import RUNTIME_NAMES, SEED, Measured, bundle_name
from toolchain.compress import REPORT_FILE
from toolchain.evaluate import ShapesScore
from toolchain.history import HISTORY_FILE, History
from toolchain.picture import MEANING, freed
from toolchain.plan import PLAN_FILE, SENSITIVITY_FILE, CompressionPlan
from toolchain.rules import format_units

__all__ = ["render_page"]

_LARGEST_TILE = 320
"""Pixels of a picture on the page; the PNG beside it has them all."""
_HERE = "measured for this report"
_TASKS = {"two_object": "two objects", "color_attr": "attribute binding"}
_STAGES = ("original", "pruned", "distilled")
_BUNDLE_TONE = len(_STAGES)


_Time = tuple[str, int, Spread, str]
"""The name of a stage, its tone, the time of a step, and where it is from."""


@dataclass(kw_only=True)
class Section:
    """A section of the page."""

    id: str
    title: str
    lead: str = ""
    """What its figures say, in a sentence."""
    sources: list[str] = field(default_factory=list)
    """Where its numbers are from."""
    absent: str = ""
    """Why there is nothing to show."""
    data: dict[str, Any] = field(default_factory=dict)
    """What the template's macro of the same id draws."""


def render_page(evidence: Evidence, measured: Measured) -> str:
    """The report as one HTML file that needs no other."""
    environment = jinja2.Environment(
        autoescape=True,
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    sections = [
        _pictures(measured),
        _removed(evidence),
        _sensitivity(evidence),
        _training(evidence),
        _quality(evidence, measured),
        _memory(evidence, measured),
        _latency(evidence, measured),
        _parity(evidence),
        _engines(evidence),
        _provenance(evidence, measured),
    ]
    return environment.get_template("page.html").render(
        title=_title(evidence),
        headline=_headline(evidence),
        tiles=_tiles(evidence, measured),
        sections=sections,
        measured=measured,
        missing=evidence.missing,
        meaning=MEANING,
    )


def _title(evidence: Evidence) -> str:
    if evidence.student is not None:
        return evidence.student.plan.model
    assert evidence.bundle is not None
    provenance = evidence.bundle.bundle.manifest.provenance
    return provenance.base_model or provenance.model


def _headline(evidence: Evidence) -> str:
    parts = []
    if evidence.student is not None:
        parts.append(f"without {_percent(evidence.student.plan.ratio_reached, 1, 0)} of its transformer")
    if evidence.bundle is not None:
        parts.append(f"with {evidence.bundle.weights} weights")
    return " and ".join(parts)


@dataclass(frozen=True, kw_only=True)
class _Tile:
    name: str
    value: str
    note: str


def _tiles(evidence: Evidence, measured: Measured) -> list[_Tile]:
    """What changed from the original to the last stage there is."""
    tiles = []
    student = evidence.student
    if student is not None:
        sizes = student.plan.sizes
        for name, key in (("parameters", "parameters"), ("FLOPs a pass", "flops")):
            before, after = sizes["before"][key], sizes["after"][key]
            tiles.append(
                _Tile(name=name, value=_change(after, before), note=f"{_count(before)} → {_count(after)}")
            )
    stages = _sizes(evidence)
    if len(stages) > 1:
        (_, before), *_, (_, after) = stages
        tiles.append(
            _Tile(
                name="transformer on disk",
                value=_change(after, before),
                note=f"{decimal(before)} → {decimal(after)}",
            )
        )
    if measured.steps_ms and (times := _times(evidence, measured)):
        first, last = times[0][2].p50, _last_time(times)[2].p50
        tiles.append(
            _Tile(name="time a step", value=_change(last, first), note=f"{first:.1f} → {last:.1f} ms")
        )
    scores = list(_scores(evidence, measured).values())
    if len(scores) > 1:
        change = scores[-1].mean - scores[0].mean
        tiles.append(
            _Tile(
                name="ShapesEval",
                value=f"{change:+.3f}".replace("-", "−"),
                note=f"{scores[0].mean:.3f} → {scores[-1].mean:.3f} ± {scores[-1].standard_error:.3f}",
            )
        )
    return tiles


def _pictures(measured: Measured) -> Section:
    section = Section(id="pictures", title="Pictures")
    if not measured.pictures:
        section.absent = next(
            (note for note in measured.notes if "painted" in note or "Pictures" in note), "None were painted."
        )
        return section
    section.lead = "The same prompts and the same noise, through every stage."
    section.sources = [f"Painted for this report with seed {SEED}, at the model's default settings."]
    stages = list(measured.pictures)
    section.data = {
        "stages": stages,
        "rows": [
            (prompt, [(name, _data_uri(measured.pictures[name][at])) for name in stages])
            for at, prompt in enumerate(measured.prompts)
        ],
        "sharp": next(iter(measured.pictures.values())).shape[1] < _LARGEST_TILE // 2,
    }
    return section


def _removed(evidence: Evidence) -> Section:
    section = Section(id="removed", title="What was removed")
    if (student := evidence.student) is None:
        section.absent = evidence.missing
        return section
    plan = student.plan
    section.lead = _removed_in_words(plan)
    section.sources = [f"Decided in {student.path / PLAN_FILE}."]
    harms = {} if student.sensitivity is None else student.sensitivity.by_unit
    whole = plan.geometry.size
    section.data = {
        "panels": plan_panels(plan),
        "used": {cell.state for panel in plan_panels(plan) for _, cells in panel.rows for cell in cells},
        "rows": [
            (
                str(unit),
                "–" if unit not in harms else f"{harms[unit]:.3g}",
                _percent(size.parameters, whole.parameters),
                _percent(size.flops, whole.flops),
            )
            for unit, size in freed(plan)
        ],
    }
    return section


def _removed_in_words(plan: CompressionPlan) -> str:
    blocks = sum(unit.component is None for unit in plan.removed)
    components = len(plan.removed) - blocks
    parts = [
        f"{number} {word}{'' if number == 1 else 's'}"
        for number, word in ((blocks, "whole block"), (components, "component"))
        if number
    ]
    gone = " and ".join(parts) or "nothing"
    return (
        f"Of {len(plan.geometry.blocks)} blocks, {gone} went, by the rule {plan.rule}: "
        f"{_percent(plan.ratio_reached, 1)} of the parameters and {_percent(plan.flops_ratio_reached, 1)} of "
        "the FLOPs."
    )


def _sensitivity(evidence: Evidence) -> Section:
    section = Section(id="sensitivity", title="How much each part matters")
    student = evidence.student
    if student is None or student.sensitivity is None or not student.sensitivity.harms:
        section.absent = evidence.missing if student is None else "This plan was made without an analysis."
        return section
    found = student.sensitivity
    single = [item for item in found.harms if len(item.removed) == 1]
    most = max(single, key=lambda item: item.harm)
    least = min(single, key=lambda item: item.harm)
    section.lead = (
        f"The harm of leaving out one part at a time, by {found.metric}: from {least.harm:.2g} without "
        f"{least.removed[0]} to {most.harm:.2g} without {most.removed[0]}."
    )
    section.sources = [f"Measured in {student.path / SENSITIVITY_FILE}, each part removed alone."]
    section.data = {
        "panels": harm_panels(found, student.plan),
        "least": f"{most.harm / HARM_RANGE:.2g} or less",
        "most": f"{most.harm:.3g}",
    }
    return section


def _training(evidence: Evidence) -> Section:
    section = Section(id="training", title="Training")
    student = evidence.student
    if student is None or student.history is None:
        section.absent = (
            evidence.missing
            if student is None
            else f"{student.path} holds no {HISTORY_FILE}, so there are no curves."
        )
        return section
    history = student.history
    section.sources = [f"Noted in {student.path / HISTORY_FILE}."]
    charts = []
    if history.losses:
        first, last = history.losses[0], history.losses[-1]
        section.lead = f"The loss went from {first:.3g} to {last:.3g} in {len(history.losses):,} steps."
        charts.append(
            lines(
                "loss of each step, and the mean of a twentieth of them",
                [
                    Series("", 2, list(enumerate(history.losses)), faint=True),
                    Series("", 2, _smooth(history.losses)),
                ],
                x_name="step",
                log=True,
            )
        )
    charts += _check_charts(history)
    if history.rates:
        charts.append(lines("learning rate", [Series("", 0, list(enumerate(history.rates)))], x_name="step"))
    tries = student.outcome.tries
    if student.outcome.gate is not None:
        section.sources.append(f"Gate {student.outcome.gate} and tries: {student.path / REPORT_FILE}.")
    section.data = {
        "charts": charts,
        "tries": [
            (
                item.removed or "nothing",
                _percent(item.ratio_reached, 1),
                item.steps,
                f"{item.gate:.4g}",
                "yes" if item.passed else "no",
            )
            for item in tries
            if item.gate is not None
        ],
    }
    return section


def _check_charts(history: History) -> list[Any]:
    charts = []
    if history.checks:
        points = [(check.step, check.velocity_error) for check in history.checks]
        charts.append(lines("velocity error at checks", [Series("", 2, points)], x_name="step", log=True))
    if scored := [(check.step, check.score) for check in history.checks if check.score is not None]:
        charts.append(lines("score at checks", [Series("", 2, scored)], x_name="step"))
    return charts


def _smooth(values: Sequence[float]) -> list[tuple[float, float]]:
    """The mean of what lies around each value, a twentieth of all."""
    half = max(1, len(values) // 40)
    return [(at, statistics.fmean(values[max(0, at - half) : at + half + 1])) for at in range(len(values))]


def _quality(evidence: Evidence, measured: Measured) -> Section:
    section = Section(id="quality", title="Quality")
    scores = _scores(evidence, measured)
    if evidence.student is None and not scores:
        section.absent = evidence.missing
        return section
    if evidence.student is not None:
        section.sources.append(f"Stages up to the student: {evidence.student.path / REPORT_FILE}.")
        stages = evidence.student.outcome.stages
        section.data["errors"] = bars(
            (stage.name, _tone(stage.name), stage.velocity_error, f"{stage.velocity_error:.3g}", None)
            for stage in stages
            if stage.name != "original"
        )
    if measured.scores:
        section.sources.append(f"The bundle: {_HERE}, on the same captions.")
    section.sources += [f"The bundle: {path}." for path in evidence.scores]
    if scores:
        first, last = next(iter(scores.values())), list(scores.values())[-1]
        section.lead = (
            f"ShapesEval, {first.num_per_task} held-out captions for each of {len(first.tasks)} tasks: "
            f"{first.mean:.3f} ± {first.standard_error:.3f} at first, "
            f"{last.mean:.3f} ± {last.standard_error:.3f} at last."
        )
        section.data["scores"] = dots(
            (
                (
                    name,
                    _tone(name),
                    score.mean,
                    score.standard_error,
                    f"{score.mean:.3f} ± {score.standard_error:.3f}",
                )
                for name, score in scores.items()
            ),
            most=1.0,
        )
        section.data["tasks"] = [
            (
                _TASKS.get(task, task.replace("_", " ")),
                [f"{score.tasks[task]:.2f}" for score in scores.values()],
            )
            for task in first.tasks
        ]
        section.data["names"] = list(scores)
    else:
        section.lead = "No score was asked for, or the model is of no world that has one here."
    return section


def _memory(evidence: Evidence, measured: Measured) -> Section:
    section = Section(id="memory", title="Memory")
    sizes = _sizes(evidence)
    if evidence.student is not None:
        section.sources.append(
            f"Transformers in torch: as stored, from {evidence.student.path / REPORT_FILE}."
        )
    section.data["stages"] = bars(
        (name, _tone(name), size, _with_share(size, sizes[0][1]), None) for name, size in sizes
    )
    if (bundle := evidence.bundle) is not None:
        manifest = bundle.bundle.manifest
        section.sources.append(f"The bundle's files: {bundle.bundle.path / MANIFEST}.")
        parts = {name: _component_bytes(bundle, name) for name in manifest.graphs}
        if engines := sum(engine.bytes or 0 for engine in bundle.engines if engine.path is not None):
            parts["engines"] = engines
        section.data["parts"] = bars(
            (_part(name), _BUNDLE_TONE, size, decimal(size), None)
            for name, size in sorted(parts.items(), key=lambda item: -item[1])
        )
    peaks = {
        label: bench.peak_bytes
        for label, bench, _ in _benches(evidence, measured)
        if bench.peak_bytes is not None
    }
    if peaks:
        section.sources.append("Peaks: of the process of hptool bench, Python included.")
        section.data["peaks"] = bars(
            (label, _BUNDLE_TONE, peak, decimal(peak), None) for label, peak in peaks.items()
        )
    if len(sizes) > 1:
        section.lead = f"The transformer takes {decimal(sizes[-1][1])} where it took {decimal(sizes[0][1])}."
    fits = dict(measured.fits) | {f"{fit.model} ({path})": fit.targets for path, fit in evidence.fits.items()}
    if fits:
        section.data["fits"] = _fit_rows(fits)
        section.data["fit_names"] = list(fits)
        if measured.fits:
            section.sources.append(
                "Devices: computed for this report as hptool fit does, from the original's configuration; "
                "the student is taken for that with a smaller transformer."
            )
        section.sources += [f"Devices: {path}." for path in evidence.fits]
    if not sizes and not fits:
        section.absent = evidence.missing
    return section


_SHORT = {"fits": "fits", "fits, one part at a time": "in turn", "does not fit": "no"}


def _fit_rows(fits: Mapping[str, list[TargetFit]]) -> list[dict[str, Any]]:
    """By device: what is there, and what each stage needs."""
    by_target: dict[str, dict[str, TargetFit]] = {}
    for name, targets in fits.items():
        for item in targets:
            by_target.setdefault(item.target, {})[name] = item
    return [
        {
            "target": target,
            "available": decimal(max(item.available for item in row.values())),
            "cells": [
                None
                if (cell := row.get(name)) is None
                else {
                    "verdict": cell.verdict,
                    "short": _SHORT[cell.verdict],
                    "need": decimal(cell.together if cell.verdict == "fits" else cell.in_turn),
                    "step": _seconds(cell.least_step_seconds),
                }
                for name in fits
            ],
        }
        for target, row in by_target.items()
    ]


def _latency(evidence: Evidence, measured: Measured) -> Section:
    section = Section(id="latency", title="Time")
    times = _times(evidence, measured)
    if not times:
        section.absent = next(iter(measured.notes), "Nothing was timed.")
        return section
    last = _last_time(times)
    section.lead = f"A step takes {last[2].p50:.1f} ms with {last[0]}" + (
        f", {times[0][2].p50:.1f} ms with the {times[0][0]}." if last is not times[0] else "."
    )
    section.sources = list(dict.fromkeys(source for *_, source in times))
    section.data["steps"] = bars(
        (name, tone, spread.p50, f"{spread.p50:.1f} ms", spread.p95) for name, tone, spread, _ in times
    )
    section.data["benches"] = [
        (
            label,
            f"{bench.width} × {bench.height}, {bench.steps} steps",
            [
                *(
                    f"{bench.parts_ms[part].p50:.1f}"
                    for part in ("text_encoders", "transformer", "vae_decoder", "total")
                ),
                f"{bench.parts_ms['total'].p95:.1f}",
                f"{bench.cold_ms:.0f}",
            ],
        )
        for label, bench, _ in _benches(evidence, measured)
    ]
    return section


def _parity(evidence: Evidence) -> Section:
    section = Section(id="parity", title="Parity")
    if (bundle := evidence.bundle) is None:
        section.absent = evidence.missing
        return section
    parity = bundle.parity
    if not parity.rows:
        section.absent = (
            "This bundle was exported with --no-compare: whether its graphs compute what torch does is not "
            "known. An export without that option measures it."
        )
        return section
    section.sources = [
        f"Measured at the export, in {bundle.bundle.path / PARITY_FILE}, on onnxruntime's CPU."
    ]
    groups: dict[tuple[str, str], list[Any]] = {}
    for row in parity.rows:
        groups.setdefault((row.stage, row.graph), []).append(row)
    section.data["rows"] = [
        {
            "stage": _part(stage),
            "graph": graph,
            "weights": rows[0].weights,
            "activations": rows[0].activations,
            "error": f"{max(row.relative_error for row in rows):.2e}",
            "limit": f"{rows[0].limit:g}",
            "cosine": f"{min(row.cosine for row in rows):.6f}",
            "cases": len(rows),
            "room": min(100.0, 100 * max(row.relative_error / row.limit for row in rows)),
        }
        for (stage, graph), rows in groups.items()
    ]
    worst = max(parity.rows, key=lambda row: row.relative_error / row.limit)
    section.lead = (
        f"Every graph was compared with torch before it was written: {len(parity.rows)} comparisons, none "
        f"beyond its limit; closest to it came {_part(worst.stage)}, "
        f"with {worst.relative_error:.2g} of {worst.limit:g}."
    )
    charts = []
    graphs = list(dict.fromkeys(row.graph for row in parity.blocks))
    if graphs:
        series = []
        for tone, graph in enumerate(graphs):
            rows = [row for row in parity.blocks if row.graph == graph]
            name = _short_graph(graph)
            series.append(
                Series(
                    f"rounding, {name}",
                    1 + 2 * tone % 3,
                    [(at, row.rounding_error) for at, row in enumerate(rows)],
                )
            )
            series.append(
                Series(
                    f"graph, {name}",
                    (2 + 2 * tone) % 4,
                    [(at, row.graph_error) for at, row in enumerate(rows)],
                )
            )
        charts.append(
            lines(
                "relative error of each block, embedders first and head last", series, x_name="part", log=True
            )
        )
    if parity.drift:
        series = [
            Series(_short_graph(item.graph), (3 + tone) % 4, list(enumerate(item.errors, 1)))
            for tone, item in enumerate(parity.drift)
        ]
        charts.append(lines("drift of the latents from torch's while sampling", series, x_name="step"))
    section.data["charts"] = charts
    section.data["stored"] = [
        (_part(name), len(report.quantized), len(report.skipped), decimal(report.num_bytes))
        for name, report in parity.quantization.items()
    ]
    return section


def _part(name: str) -> str:
    return name.replace("_", " ").replace("vae", "VAE")


def _short_graph(graph: str) -> str:
    return "float16" if "16" in graph else "float32"


def _engines(evidence: Evidence) -> Section:
    section = Section(id="engines", title="Engines")
    bundle = evidence.bundle
    if bundle is None or not bundle.engines:
        section.absent = (
            evidence.missing
            if bundle is None
            else "This bundle was exported for targets that need no engine."
        )
        return section
    section.sources = [f"Noted at the export, in {bundle.bundle.path / ENGINES}. Engines were not run there."]
    built = [engine for engine in bundle.engines if engine.bytes is not None]
    section.lead = f"{len(built)} of {len(bundle.engines)} engines were built at the export" + (
        "." if len(built) == len(bundle.engines) else "; the others are built on their devices."
    )
    section.data["rows"] = [
        (
            ", ".join(engine.targets),
            RUNTIME_NAMES[engine.runtime],
            ", ".join(engine.compute_capabilities),
            "" if engine.bytes is None else decimal(engine.bytes),
            "" if engine.bytes is None else f"{engine.num_found} of {engine.num_int4}",
            "" if engine.seconds is None else f"{engine.seconds:.0f} s",
            engine.path or ("in the cache" if engine.bytes is not None else "on the device"),
        )
        for engine in bundle.engines
    ]
    return section


def _provenance(evidence: Evidence, measured: Measured) -> Section:
    section = Section(id="provenance", title="Provenance")
    groups: list[tuple[str, list[tuple[str, str]]]] = []
    if (student := evidence.student) is not None:
        section.sources.append(f"The student: {student.path / REPORT_FILE}.")
        groups.append(
            (
                "student",
                [
                    ("directory", str(student.path)),
                    ("made of", student.outcome.model),
                    *(("with the adapter", name) for name in student.outcome.adapters),
                    ("removed", format_units(student.plan.removed) or "nothing"),
                    (f"digest of {PLAN_FILE}", student.plan_sha256),
                    *(_flat(student.recipe)),
                ],
            )
        )
    if (bundle := evidence.bundle) is not None:
        manifest, path = bundle.bundle.manifest, bundle.bundle.path
        section.sources.append(f"The bundle: {path / MANIFEST}, whose digests were checked for this report.")
        made = manifest.provenance
        facts = {
            "directory": str(path),
            "made of": made.model,
            "commit": made.revision,
            "base model": made.base_model,
            "its commit": made.base_revision,
            "licence": made.license,
            "digest of the plan": made.plan_sha256,
            "digest of the calibration": made.calibration_sha256,
            "targets": ", ".join(dict.fromkeys(variant.target for variant in manifest.variants)),
            "files": f"{len(manifest.files)}, {decimal(sum(file.bytes for file in manifest.files.values()))}",
            "signature": "there, not checked" if (path / SIGNATURE).exists() else "none",
        }
        groups.append(("bundle", [(key, value) for key, value in facts.items() if value is not None]))
        groups.append(("tools of the export", list(made.tools.items())))
    groups.append(("this report", [("made on", measured.when), ("measured on", measured.machine)]))
    section.data["groups"] = groups
    return section


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
    """A recipe as lines; what was left at nothing is left out."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        elif value is not None:
            yield f"{prefix}{key}".replace("_", " "), str(value)


def _sizes(evidence: Evidence) -> list[tuple[str, int]]:
    """Bytes of the transformer, stage by stage."""
    sizes = []
    if evidence.student is not None:
        sizes = [(stage.name, stage.transformer_bytes) for stage in evidence.student.outcome.stages]
    if evidence.bundle is not None:
        sizes.append((evidence.bundle.weights, _component_bytes(evidence.bundle, "transformer")))
    return sizes


def _component_bytes(bundle: BundleRun, name: str) -> int:
    """Of one graph and its weights; a transformer's second graph shares them."""
    manifest = bundle.bundle.manifest
    return sum(file.bytes for file in graph_files(manifest.files, manifest.graphs[name][0].path).values())


def _scores(evidence: Evidence, measured: Measured) -> dict[str, ShapesScore]:
    scores: dict[str, ShapesScore] = {}
    if evidence.student is not None:
        scores = {
            stage.name: stage.score for stage in evidence.student.outcome.stages if stage.score is not None
        }
    return (
        scores
        | measured.scores
        | {f"bundle, {Path(path).stem}": score for path, score in evidence.scores.items()}
    )


def _benches(evidence: Evidence, measured: Measured) -> list[tuple[str, Bench, str]]:
    """Each with its name and where it is from."""
    here = f"The bundle: {_HERE} by hptool bench, on {measured.machine}."
    assert evidence.bundle is not None or not measured.benches
    found = [
        (bundle_name(evidence.bundle, runtime), bench, here)
        for runtime, bench in measured.benches.items()
        if evidence.bundle is not None
    ]
    return found + [
        (
            f"{Path(path).stem}: {bench.target}, {RUNTIME_NAMES.get(bench.runtime, bench.runtime)}",
            bench,
            f"{path}.",
        )
        for path, bench in evidence.benches.items()
    ]


def _times(evidence: Evidence, measured: Measured) -> list[_Time]:
    """Of a step, stage by stage."""
    here = f"In torch: {_HERE}, float32, on {measured.machine}."
    return [
        *((f"{name} in torch", _tone(name), spread, here) for name, spread in measured.steps_ms.items()),
        *(
            (label, _BUNDLE_TONE, bench.parts_ms["step"], source)
            for label, bench, source in _benches(evidence, measured)
        ),
    ]


def _last_time(times: Sequence[_Time]) -> _Time:
    """Of the last stage; where it was run in several ways, the fastest, for that is the one to take."""
    return min((item for item in times if item[1] == times[-1][1]), key=lambda item: item[2].p50)


def _tone(stage: str) -> int:
    return _STAGES.index(stage) if stage in _STAGES else _BUNDLE_TONE


def _data_uri(picture: npt.NDArray[np.uint8]) -> str:
    image, stream = Image.fromarray(picture), io.BytesIO()
    if max(image.size) > _LARGEST_TILE:
        image.thumbnail((_LARGEST_TILE, _LARGEST_TILE), Image.Resampling.LANCZOS)
        kind = "jpeg"
        image.save(stream, format="JPEG", quality=88)
    else:
        kind = "png"
        image.save(stream, format="PNG", optimize=True)
    return f"data:image/{kind};base64,{base64.b64encode(stream.getvalue()).decode()}"


def _change(after: float, before: float) -> str:
    return f"{100 * (after - before) / before:+.0f}\N{NO-BREAK SPACE}%".replace("-", "−")


def _percent(part: float, whole: float, digits: int = 1) -> str:
    return f"{100 * part / (whole or 1):.{digits}f}\N{NO-BREAK SPACE}%"


def _with_share(size: int, whole: int) -> str:
    return decimal(size) if size == whole else f"{decimal(size)}, {_percent(size, whole, 0)}"


def _count(value: float) -> str:
    for power, letter in ((12, "T"), (9, "B"), (6, "M"), (3, "k")):
        if value >= 10**power:
            return f"{value / 10**power:.3g} {letter}"
    return f"{value:g}"


def _seconds(value: float) -> str:
    return f"{value:.2g} s" if value >= 1 else f"{1000 * value:.2g} ms"
