"""The exported bundle: what lies in it, that its graphs share bytes, and what is refused."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import tokenizers
import torch

from deploy.bundle import Bundle, Graph, Variant
from export import bundle as bundle_module
from export import components, space
from export.bundle import export_bundle
from export.cache import ComponentCache
from export.calibration import calibrate
from export.components import GRAPHS
from export.denoiser import LoweredTransformer
from export.errors import ExportError
from export.quantize import QuantReport
from profiles.schema import Profile, load_profile
from toolchain.families import Model
from toolchain.progress import silent

BLOCK_LINEAR = re.compile(r"transformer_blocks\..*\.weight")


def linears(model: Model) -> set[str]:
    """Names of the weights of all linears in the transformer's blocks, those of AdaLN included."""
    modules = model.pipeline.transformer.transformer_blocks.named_modules()
    return {
        f"transformer_blocks.{name}.weight" for name, module in modules if isinstance(module, torch.nn.Linear)
    }


def stored(bundle: Bundle, graph: str) -> dict[str, ir.ExternalTensor]:
    values = ir.load(bundle.file(graph)).graph.initializers.items()
    return {
        name: value.const_value for name, value in values if isinstance(value.const_value, ir.ExternalTensor)
    }


def run(bundle: Bundle, graph: str, inputs: dict[str, torch.Tensor]) -> list[np.ndarray[Any, Any]]:
    session = onnxruntime.InferenceSession(bundle.file(graph), providers=["CPUExecutionProvider"])
    outputs: list[np.ndarray[Any, Any]] = session.run(None, {name: x.numpy() for name, x in inputs.items()})
    return outputs


def test_the_files_are_those_of_the_format(bundle: Bundle, gpu: Profile) -> None:
    parts = ("text_encoder", "text_encoder_2", "vae_decoder", "transformer")
    expected = {f"{part}/{name}" for part in parts for name in ("model.onnx", "weights.data")}
    expected |= {"transformer/model.fp16.onnx", "transformer/model.fp16.cuda.onnx"}
    expected |= {"parity.json", "engines.json", "LICENSE"}
    expected |= {"tokenizer/tokenizer.json", "tokenizer_2/tokenizer.json"}
    if "tensorrt-rtx" in gpu.runtimes:
        (engine,) = bundle.path.glob("engines/*")
        assert re.fullmatch(r"sm86-sm89-sm120-[0-9a-f]{8}\.engine", engine.name)
        expected.add(f"engines/{engine.name}")
    assert bundle.manifest.files.keys() == expected


def test_the_bundle_says_where_it_came_from_and_on_what_terms(
    model: Model, on_disk: Model, bundle: Bundle, cache: ComponentCache, tmp_path: Path
) -> None:
    found = bundle.manifest.provenance
    assert (found.model, found.revision, found.license) == (str(on_disk.path), None, "mit")
    assert found.calibration_sha256 is None
    assert bundle.file("LICENSE").read_text() == (on_disk.path / "LICENSE").read_text()

    commit = "0123456789abcdef0123456789abcdef01234567"
    snapshot = tmp_path / "models--owner--name" / "snapshots" / commit
    shutil.copytree(on_disk.path, snapshot)
    calibration = calibrate(model, ["a red circle"], tmp_path / "calibration", seed=0, bar=silent)
    found = export_bundle(
        dataclasses.replace(on_disk, path=snapshot),
        targets=[load_profile("cpu-x86")],
        output=tmp_path / "bundle",
        cache=cache,
        calibration=calibration,
        base_model="owner/name",
        base_revision=commit,
    ).manifest.provenance
    assert (found.revision, found.base_model, found.base_revision) == (commit, "owner/name", commit)
    files = [tmp_path / "calibration" / name for name in ("moments.safetensors", "harms.json")]
    content = b"".join(path.read_bytes() for path in files)
    assert found.calibration_sha256 == hashlib.sha256(content).hexdigest()


def test_a_bundle_for_a_gpu_runs_on_a_cpu_too(bundle: Bundle) -> None:
    *_, cpu = bundle.manifest.variants
    assert cpu == Variant(
        target="cpu-x86",
        runtime="onnxruntime-cpu",
        path="transformer/model.onnx",
        activations="float32",
        compute_capabilities=[],
        shapes=None,
    )


def test_a_target_has_a_variant_for_each_of_its_runtimes(bundle: Bundle, gpus: list[Profile]) -> None:
    found = [(variant.target, variant.runtime) for variant in bundle.manifest.variants]
    wanted = [(profile.name, runtime) for profile in gpus for runtime in profile.runtimes]
    assert found == [*wanted, ("cpu-x86", "openvino"), ("cpu-x86", "onnxruntime-cpu")]
    half = {variant.path for variant in bundle.manifest.variants if variant.runtime == "onnxruntime-cuda"}
    assert half == {"transformer/model.fp16.cuda.onnx"}


def test_a_processor_computes_in_float32_whatever_the_target_asks(
    on_disk: Model, gpu: Profile, cache: ComponentCache, tmp_path: Path
) -> None:
    both = dataclasses.replace(gpu, runtimes=("onnxruntime-cuda", "onnxruntime-cpu"))
    made = export_bundle(on_disk, targets=[both], output=tmp_path / "bundle", cache=cache)
    activations = [(variant.runtime, variant.activations) for variant in made.manifest.variants]
    assert activations[:2] == [("onnxruntime-cuda", "float16"), ("onnxruntime-cpu", "float32")]
    assert "engines.json" not in made.manifest.files


@pytest.mark.parametrize("graph", GRAPHS)
def test_every_linear_of_the_blocks_is_int4(model: Model, bundle: Bundle, graph: str) -> None:
    graph = f"transformer/{graph}"
    tensors = stored(bundle, graph)
    int4 = {name for name, tensor in tensors.items() if tensor.dtype == ir.DataType.INT4}
    assert int4 == linears(model)
    assert any("norm1.linear" in name for name in int4)
    blocks = [n for n in ir.load(bundle.file(graph)).graph if n.op_type == "DequantizeLinear"]
    assert {node.attributes.get_int("block_size") for node in blocks} == {64}


def test_all_graphs_point_at_the_same_bytes(bundle: Bundle) -> None:
    full, half, cuda = (
        {name: (x.dtype, x.offset, x.length) for name, x in stored(bundle, f"transformer/{graph}").items()}
        for graph in GRAPHS
    )
    assert full == half == cuda
    size = max(offset + length for _, offset, length in full.values() if offset is not None and length)
    assert bundle.file("transformer/weights.data").stat().st_size == size


def test_a_graph_that_a_builder_reads_has_operators_of_onnx_alone(bundle: Bundle) -> None:
    foreign = {
        graph: {node.domain for node in ir.load(bundle.file(f"transformer/{graph}")).graph} - {""}
        for graph in GRAPHS
    }
    assert foreign == {
        "model.onnx": {"com.microsoft"},
        "model.fp16.onnx": set(),
        "model.fp16.cuda.onnx": {"com.microsoft"},
    }
    for variant in bundle.manifest.variants:
        if variant.runtime in ("tensorrt", "tensorrt-rtx", "onnxruntime-tensorrt"):
            assert variant.path.startswith("engines/") or variant.path == "transformer/model.fp16.onnx"


def test_onnxruntime_multiplies_with_the_4_bit_weights_as_they_are(
    model: Model, bundle: Bundle, tmp_path: Path
) -> None:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    path = bundle.file("transformer/model.onnx")
    onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    kinds = [node.op_type for node in ir.load(tmp_path / "optimized.onnx").graph]
    assert kinds.count("MatMulNBits") == len(linears(model))
    assert "DequantizeLinear" not in kinds


def test_the_report_covers_every_graph_and_every_parameter(model: Model, bundle: Bundle) -> None:
    report = json.loads(bundle.file("parity.json").read_text(encoding="utf-8"))
    compared = {(row["graph"], row["weights"], row["activations"]) for row in report["rows"]}
    assert compared == {
        ("transformer/model.onnx", "int4", "float32"),
        ("transformer/model.fp16.onnx", "int4", "float16"),
        ("transformer/model.fp16.cuda.onnx", "int4", "float16"),
        ("text_encoder/model.onnx", "float16", "float32"),
        ("text_encoder_2/model.onnx", "float16", "float32"),
        ("vae_decoder/model.onnx", "float16", "float32"),
    }
    shapes = [row["shape"] for row in report["rows"] if row["graph"] == "transformer/model.onnx"]
    assert len(shapes) == 8
    quantization = report["quantization"]["transformer"]
    names = [item["name"] for kind in ("quantized", "skipped") for item in quantization[kind]]
    assert sorted(names) == sorted(dict(model.pipeline.transformer.named_parameters()))
    parts = ["embedders", "transformer_blocks.0", "transformer_blocks.1", "head"]
    assert [row["block"] for row in report["blocks"]] == parts * 3
    assert max(row["graph_error"] for row in report["blocks"][:4]) < 1e-5
    assert report["float32_blocks"] == []
    for row in report["drift"]:
        assert len(row["errors"]) == bundle.manifest.defaults.num_inference_steps
        assert 0 < row["errors"][0] < row["errors"][-1] < 1


def test_a_32_bit_bundle_computes_what_torch_does(model: Model, full_bundle: Bundle) -> None:
    torch.manual_seed(1)
    pipeline = model.pipeline
    inputs = {
        "hidden_states": torch.randn(3, 8, 6, 8),
        "timestep": torch.rand(3) * 1000,
        "encoder_hidden_states": torch.randn(3, 9, 192),
        "pooled_projections": torch.randn(3, 192),
    }
    with torch.no_grad():
        velocity = pipeline.transformer(**inputs, return_dict=False)[0]
        image = pipeline.vae.decode(inputs["hidden_states"], return_dict=False)[0]
    found = run(full_bundle, "transformer/model.onnx", inputs)[0]
    np.testing.assert_allclose(found, velocity.numpy(), atol=1e-4)
    found = run(full_bundle, "vae_decoder/model.onnx", {"latents": inputs["hidden_states"]})[0]
    np.testing.assert_allclose(found, image.numpy(), atol=1e-4)
    weights = {graph.weights for graphs in full_bundle.manifest.graphs.values() for graph in graphs}
    assert weights == {"float32"}


def test_the_tokenizer_gives_the_ids_of_the_pipelines(model: Model, bundle: Bundle) -> None:
    described = bundle.manifest.tokenizers["tokenizer"]
    tokenizer = tokenizers.Tokenizer.from_file(str(bundle.file(described.path)))
    assert tokenizer.truncation is None
    assert tokenizer.padding is None
    prompt = "a red circle above a blue square"
    ids = tokenizer.encode(prompt).ids
    ids += [described.pad_id] * (described.max_length - len(ids))
    expected = model.pipeline.tokenizer(prompt, padding="max_length", max_length=described.max_length)
    assert ids == expected.input_ids


def test_a_graph_that_differs_leaves_no_bundle_behind(
    on_disk: Model, lowered: LoweredTransformer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> LoweredTransformer:
        wrong = lowered.clone()
        constant = wrong.graph.graph.initializers["pos_embed.rows"]
        constant.const_value = ir.tensor(np.zeros(constant.const_value.shape.numpy(), dtype=np.float32))
        wrong.graph.opset_imports["com.microsoft"] = 1
        return wrong

    monkeypatch.setattr(components, "lower_transformer", broken)
    cache = ComponentCache(tmp_path / "cache")
    with pytest.raises(ExportError, match=r"exported transformer .* with the same weights in embedders"):
        export_bundle(on_disk, targets=[load_profile("cpu-x86")], output=tmp_path / "bundle", cache=cache)
    assert not (tmp_path / "bundle").exists()
    assert not list(cache.path.glob("**/transformer*"))


def test_without_comparing_the_same_files_are_written_and_torch_never_runs(
    on_disk: Model,
    full_bundle: Bundle,
    cache: ComponentCache,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("draw_states", "check_transformer", "check_graph", "text_encoder_cases", "decoder_cases"):
        monkeypatch.delattr(components, name)
    made = export_bundle(
        on_disk,
        targets=[load_profile("cpu-x86")],
        output=tmp_path / "bundle",
        bits=32,
        compare=False,
        cache=cache,
    )
    report = json.loads(made.file("parity.json").read_text(encoding="utf-8"))
    assert (report["rows"], report["blocks"], report["drift"]) == ([], [], [])
    assert report["quantization"] == json.loads(full_bundle.file("parity.json").read_text())["quantization"]
    other = {"parity.json": made.manifest.files["parity.json"]}
    assert made.manifest.files == full_bundle.manifest.files | other


def test_an_export_that_was_interrupted_goes_on_with_the_component_it_was_in(
    on_disk: Model, tmp_path: Path, cache: ComponentCache, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_: Any) -> None:
        raise KeyboardInterrupt

    own = ComponentCache(tmp_path / "cache")
    target = load_profile("cpu-x86")
    monkeypatch.setattr(bundle_module, "export_transformer", stopped)
    with pytest.raises(KeyboardInterrupt):
        export_bundle(on_disk, targets=[target], output=tmp_path / "bundle", cache=own)
    assert not (tmp_path / "bundle").exists()
    for name in ("export_text_encoder", "export_vae_decoder"):
        monkeypatch.setattr(bundle_module, name, stopped)
    monkeypatch.setattr(bundle_module, "export_transformer", lambda *args: make_from(bundle, args[-1]))
    made = export_bundle(on_disk, targets=[target], output=tmp_path / "bundle", cache=own)
    assert made.manifest.files.keys() >= {"text_encoder/weights.data", "vae_decoder/weights.data"}


def component(report: QuantReport, graphs: list[Graph]) -> components.Component:
    return components.Component(
        graphs=graphs, parity=[], blocks=[], quantization=report, drift=[], float32_blocks=[]
    )


def make_from(bundle: Bundle, directory: Path) -> components.Component:
    """A transformer that was made before."""
    for name in ("model.onnx", "weights.data"):
        shutil.copyfile(bundle.file(f"transformer/{name}"), directory / name)
    graphs = [graph for graph in bundle.manifest.graphs["transformer"] if graph.activations == "float32"]
    report = QuantReport(quantized=(), skipped=())
    return component(report, graphs)


def test_a_damaged_cache_is_not_believed(on_disk: Model, tmp_path: Path, cache: ComponentCache) -> None:
    made: list[Path] = []

    def make(directory: Path) -> components.Component:
        made.append(directory)
        (directory / "weights.data").write_bytes(b"weights")
        report = QuantReport(quantized=(), skipped=())
        return component(report, [])

    own = ComponentCache(tmp_path / "cache")
    own.get("key", make, tmp_path / "a")
    own.get("key", make, tmp_path / "b")
    assert len(made) == 1
    (own.path / "components" / "key" / "weights.data").write_bytes(b"wrong!!")
    own.get("key", make, tmp_path / "c")
    assert len(made) == 2
    assert (tmp_path / "c" / "weights.data").read_bytes() == b"weights"


def test_what_does_not_fit_on_the_disk_is_refused_before_the_work(
    on_disk: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10_000))
    message = refusal(on_disk, [load_profile("cpu-x86")], tmp_path)
    assert re.search(r"takes .* [kM]B on the disk of .* where 10\.0 kB are free\. Make room", message)


def test_what_does_not_fit_into_memory_is_refused_before_the_work(
    on_disk: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(space, "_available_memory", lambda: 10_000)
    message = refusal(on_disk, [load_profile("cpu-x86")], tmp_path)
    assert re.search(r"takes .* GB of memory, and 10\.0 kB are free\. Close other programs", message)


def with_parts(model: Model, **parts: Any) -> Model:
    """The model with parts of its pipeline exchanged."""
    pipeline = SimpleNamespace(**(dict(model.pipeline.components) | parts))
    return dataclasses.replace(model, pipeline=pipeline)


def refusal(model: Model, targets: list[Profile], tmp_path: Path, **options: Any) -> str:
    cache = ComponentCache(tmp_path / "cache")
    with pytest.raises(ExportError) as error:
        export_bundle(model, targets=targets, output=tmp_path / "bundle", cache=cache, **options)
    assert not list(tmp_path.glob("bundle*"))
    return str(error.value)


def test_sigmas_the_device_does_not_know_are_refused_by_name(model: Model, tmp_path: Path) -> None:
    scheduler = type(model.pipeline.scheduler).from_config(
        model.pipeline.scheduler.config, invert_sigmas=True
    )
    changed = with_parts(model, scheduler=scheduler)
    assert "invert_sigmas=True" in refusal(changed, [load_profile("cpu-x86")], tmp_path)


def test_bits_that_do_not_exist_are_refused(model: Model, tmp_path: Path) -> None:
    assert "16 or 32 bits, not 5" in refusal(model, [load_profile("cpu-x86")], tmp_path, bits=5)


def test_a_picture_size_the_model_cannot_make_is_refused(model: Model, gpu: Profile, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    large = dataclasses.replace(gpu, buckets=((64, 64), (64, 1024)))
    assert "64x1024" in refusal(model, [large], tmp_path)


def test_a_length_of_text_the_model_does_not_make_is_refused(
    model: Model, gpu: Profile, tmp_path: Path
) -> None:
    pytest.importorskip("tensorrt_rtx")
    other = dataclasses.replace(gpu, text_tokens=77)
    message = refusal(model, [other], tmp_path)
    assert re.search(r"engines of 77 text tokens, and prompts of this model make \d+", message)


def test_targets_that_want_different_bits_are_refused_unless_bits_are_named(
    on_disk: Model, cache: ComponentCache, tmp_path: Path
) -> None:
    cpu = load_profile("cpu-x86")
    coarse = dataclasses.replace(cpu, name="coarse", weight_bits=8)
    message = refusal(on_disk, [cpu, coarse], tmp_path)
    assert "weights of different bits (cpu-x86 4, coarse 8)" in message
    assert "--bits" in message


def test_bits_are_the_targets_unless_they_are_named(
    on_disk: Model, cache: ComponentCache, tmp_path: Path
) -> None:
    whole = dataclasses.replace(load_profile("cpu-x86"), weight_bits=32)
    made = export_bundle(on_disk, targets=[whole], output=tmp_path / "bundle", cache=cache)
    assert [graph.weights for graph in made.manifest.graphs["transformer"]] == ["float32"]


def test_a_profile_of_ones_own_that_extends_another_is_a_target(
    on_disk: Model, cache: ComponentCache, tmp_path: Path
) -> None:
    text = 'name = "mine"\ndescription = "Mine"\nextends = "rtx4090"\nruntimes = ["onnxruntime-cuda"]\n'
    (tmp_path / "mine.toml").write_text(text)
    target = load_profile(str(tmp_path / "mine.toml"))
    made = export_bundle(on_disk, targets=[target], output=tmp_path / "bundle", cache=cache)
    mine = next(variant for variant in made.manifest.variants if variant.target == "mine")
    assert (mine.activations, mine.path) == ("float16", "transformer/model.fp16.cuda.onnx")


def test_turing_gets_no_engine_of_4_bits(model: Model, gpu: Profile, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    turing = dataclasses.replace(gpu, name="rtx2080", compute_capability="7.5")
    message = refusal(model, [gpu, turing], tmp_path)
    assert "no engine with 4-bit weights for compute capability 7.5, which rtx2080 has" in message
    assert "--bits 8 or 16" in message


def test_no_target_is_refused(model: Model, tmp_path: Path) -> None:
    assert "no target" in refusal(model, [], tmp_path)


def test_rounding_that_costs_more_than_was_said_is_refused_with_what_can_be_done(
    on_disk: Model, tmp_path: Path
) -> None:
    message = refusal(on_disk, [load_profile("cpu-x86")], tmp_path, most_error=1e-6)
    assert re.search(r"velocity has a relative error of \S+ where 1e-06 is accepted", message)
    assert re.search(r"Of its parts transformer_blocks\.\d differs most", message)
    assert "--max-error accepts it" in message
