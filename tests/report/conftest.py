"""A student and its bundle as directories: all that a report reads, and nothing that could run."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from deploy.bundle import (
    MANIFEST,
    SCHEMA_VERSION,
    Architecture,
    Defaults,
    File,
    Graph,
    Manifest,
    Provenance,
    Scheduler,
    Tokenizer,
    Variant,
    manifest_to_json,
)
from export.blockwise import BlockRow
from export.drift import Drift
from export.engine import ENGINES, EngineReport
from export.parity import ParityRow
from export.quantize import QuantizedTensor, QuantReport, SkippedTensor
from report.evidence import PARITY_FILE
from toolchain.artifacts import sha256, write_json
from toolchain.compress import REPORT_FILE, REPORT_VERSION, Outcome
from toolchain.evaluate import ShapesScore
from toolchain.geometry import Block, Geometry, Part, Unit
from toolchain.history import HISTORY_FILE
from toolchain.judge import Stage
from toolchain.plan import PLAN_FILE, SENSITIVITY_FILE, CompressionPlan, Harm, Sensitivity, to_json
from toolchain.tries import Try

HOSTILE = '<script>alert("1")</script>'
"""What a model, a prompt or a recipe may be called by whoever means harm."""

COMPONENTS = {"attn": (600, 6000), "ff": (300, 3000), "norm1": (100, 0)}
GEOMETRY = Geometry(
    family="toy",
    blocks=tuple(
        Block(
            kind="joint" if index < 3 else "single",
            components=tuple(COMPONENTS),
            parts=tuple(
                Part(name=name, parameters=parameters, flops=flops, zero=((name,),), identity=((name,),))
                for name, (parameters, flops) in COMPONENTS.items()
            ),
        )
        for index in range(4)
    ),
    other_parameters=0,
    other_flops=0,
    height=64,
    width=64,
    text_tokens=7,
)
PLAN = CompressionPlan(
    model=HOSTILE,
    geometry=GEOMETRY,
    semantics="zero",
    rule="manual",
    removed=(Unit(1, "attn"), Unit(2)),
    strength={"embedders": 0.0, "0": 0.0, "1": 1.0, "3": 0.6, "head": 1.0},
    asked={},
)
SENSITIVITY = Sensitivity(
    model=HOSTILE,
    geometry=GEOMETRY,
    semantics="zero",
    metric="velocity",
    baseline=0.0,
    settings={},
    harms=tuple(
        Harm(removed=(Unit(block, name),), harm=10.0 ** -(block + at), standard_error=0.001)
        for block in range(4)
        for at, name in enumerate((None, "attn", "ff"))
    ),
)


def score(mean: float) -> ShapesScore:
    tasks = {"counting": mean, "two_object": mean}
    return ShapesScore(mean=mean, standard_error=0.0125, tasks=tasks, num_per_task=40, seed=0)


def stage(name: str, parameters: int, error: float, mean: float) -> Stage:
    return Stage(
        name=name,
        num_parameters=parameters,
        transformer_bytes=2 * parameters,
        velocity_error=error,
        score=score(mean),
        gate=mean,
    )


OUTCOME = Outcome(
    model=HOSTILE,
    adapters=("style.safetensors:1",),
    student="student",
    rule="manual",
    removed="2,1.attn",
    ratio_reached=PLAN.ratio_reached,
    flops_ratio_reached=PLAN.flops_ratio_reached,
    stages=(
        stage("original", 4000, 0.0, 0.975),
        stage("pruned", 2400, 0.51, 0.625),
        stage("distilled", 2400, 0.0432, 0.925),
    ),
    gate="shapes>=0.9",
    tries=(
        Try(removed="1-2", ratio_reached=0.5, flops_ratio_reached=0.5, steps=3, gate=0.8125, passed=False),
        Try(removed="2,1.attn", ratio_reached=0.4, flops_ratio_reached=0.4, steps=3, gate=0.925, passed=True),
    ),
)
HISTORY = {
    "losses": [0.5, 0.25, 0.125],
    "rates": [0.001, 0.0005, 0.0],
    "checks": [{"step": 3, "velocity_error": 0.0432, "score": 0.9, "gate": None}],
}


@pytest.fixture
def student(tmp_path: Path) -> Path:
    path = tmp_path / "toy-student"
    path.mkdir()
    write_json(path / PLAN_FILE, to_json(PLAN))
    write_json(path / SENSITIVITY_FILE, to_json(SENSITIVITY))
    write_json(path / HISTORY_FILE, {"schema_version": 1, **HISTORY})
    recipe = {"steps": 3, "decision": {"rule": HOSTILE}}
    write_json(path / REPORT_FILE, {"schema_version": REPORT_VERSION, "recipe": recipe, **asdict(OUTCOME)})
    return path


@pytest.fixture
def bundle(tmp_path: Path, student: Path) -> Path:
    path = tmp_path / "toy-bundle"
    graphs = {
        name: [Graph(path=f"{name}/model.onnx", activations="float32", weights="int4")]
        for name in ("text_encoder", "text_encoder_2", "transformer", "vae_decoder")
    }
    for name in graphs:
        (path / name).mkdir(parents=True)
        (path / name / "model.onnx").write_bytes(b"x" * 100)
        (path / name / "weights.data").write_bytes(b"x" * 900)
    (path / "tokenizer.json").write_text("{}")
    write_json(path / PARITY_FILE, {"schema_version": 2, **parity()})
    write_json(path / ENGINES, {"schema_version": 1, "engines": [asdict(ENGINE)]})
    files = {
        file.relative_to(path).as_posix(): File(
            sha256=hashlib.sha256(file.read_bytes()).hexdigest(), bytes=file.stat().st_size
        )
        for file in sorted(path.rglob("*"))
        if file.is_file()
    }
    manifest = Manifest(
        schema_version=SCHEMA_VERSION,
        architecture=ARCHITECTURE,
        scheduler=SCHEDULER,
        defaults=Defaults(
            num_inference_steps=2, guidance_scale=3.0, max_sequence_length=0, height=64, width=64
        ),
        tokenizers={
            name: Tokenizer(path="tokenizer.json", max_length=7, pad_id=0)
            for name in ("tokenizer", "tokenizer_2")
        },
        graphs=graphs,
        variants=[
            Variant(
                target="cpu-x86",
                runtime="onnxruntime-cpu",
                path="transformer/model.onnx",
                activations="float32",
                compute_capabilities=[],
                shapes=None,
            )
        ],
        provenance=Provenance(
            model=str(student),
            revision=None,
            base_model=HOSTILE,
            base_revision=None,
            license="apache-2.0",
            plan_sha256=sha256(student / PLAN_FILE),
            calibration_sha256=None,
            tools={"torch": "2.13.0"},
        ),
        files=files,
    )
    (path / MANIFEST).write_text(json.dumps(manifest_to_json(manifest)))
    return path


def parity() -> dict[str, Any]:
    graph = "transformer/model.onnx"
    row = ParityRow(
        stage="transformer",
        graph=graph,
        weights="int4",
        activations="float32",
        output="velocity",
        shape={"batch": 1},
        max_abs_error=0.5,
        relative_error=0.0321,
        cosine=0.9995,
        num_non_finite=0,
        limit=0.2,
    )
    report = QuantReport(
        quantized=(QuantizedTensor(name="w", bits=4, group_size=64, bytes=500),),
        skipped=(SkippedTensor(name="b", bytes=400, reason="no linear"),),
    )
    return {
        "rows": [asdict(row)],
        "blocks": [
            asdict(BlockRow(graph=graph, block=name, graph_error=1e-6, rounding_error=0.01))
            for name in ("embedders", "blocks.0", "head")
        ],
        "drift": [asdict(Drift(graph=graph, errors=[0.01, 0.02]))],
        "float32_blocks": [],
        "quantization": {"transformer": asdict(report)},
    }


ENGINE = EngineReport(
    targets=["rtx4090"],
    runtime="tensorrt-rtx",
    compute_capabilities=["8.9"],
    weight_bytes=900,
    num_int4=7,
    path="engines/one.engine",
    bytes=1200,
    ratio=1.33,
    num_found=7,
    builder="tensorrt-rtx 1.7",
    seconds=12.0,
)
ARCHITECTURE = Architecture(
    family="sd3",
    classifier_free=True,
    guidance_embeds=False,
    latent_channels=4,
    vae_scale_factor=8,
    patch_size=2,
    max_latent_size=64,
    scaling_factor=1.0,
    shift_factor=0.0,
    joint_attention_dim=8,
)
SCHEDULER = Scheduler(
    spacing="train_range",
    num_train_timesteps=1000,
    shift=3.0,
    use_dynamic_shifting=False,
    base_shift=0.5,
    max_shift=1.15,
    base_image_seq_len=256,
    max_image_seq_len=4096,
    time_shift_type="exponential",
)
