"""Lowered graphs: their names, types and free dimensions, and that they compute what torch does."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch

from export import denoiser
from export.denoiser import LoweredTransformer, lower_transformer
from export.passes import parameters
from toolchain.errors import ToolchainError
from toolchain.families import Model, open_model
from toolchain.families.mmdit import MMDiT, TextStates
from toolchain.geometry import Unit


@pytest.fixture
def transformer(lowered: LoweredTransformer) -> ir.Model:
    return lowered.clone().graph


def run(graph: ir.Model, path: Path, inputs: dict[str, torch.Tensor]) -> list[np.ndarray[Any, Any]]:
    ir.save(graph, path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    outputs: list[np.ndarray[Any, Any]] = session.run(None, {name: x.numpy() for name, x in inputs.items()})
    return outputs


def test_inputs_and_outputs_have_the_names_and_free_dimensions_of_the_contract(transformer: ir.Model) -> None:
    shapes = {value.name: str(value.shape) for value in transformer.graph.inputs}
    assert shapes == {
        "hidden_states": "[batch,8,2*height,2*width]",
        "timestep": "[batch]",
        "encoder_hidden_states": "[batch,tokens,192]",
        "pooled_projections": "[batch,192]",
    }
    assert [value.name for value in transformer.graph.outputs] == ["velocity"]


def test_initialisers_keep_the_names_of_the_torch_parameters(model: Model, transformer: ir.Model) -> None:
    module = model.pipeline.transformer
    assert parameters(transformer).keys() == dict(module.named_parameters()).keys()


def test_nothing_is_float64(transformer: ir.Model) -> None:
    graph = transformer.graph
    values = [*graph.initializers.values(), *graph.inputs, *graph.outputs]
    assert ir.DataType.DOUBLE not in {value.dtype for value in values}
    casts = {node.attributes.get_int("to", 0) for node in graph if node.op_type == "Cast"}
    assert int(ir.DataType.DOUBLE) not in casts


def test_onnxruntime_reads_the_versions(transformer: ir.Model) -> None:
    assert transformer.ir_version <= 10
    assert transformer.opset_imports == {"": 21}


def test_every_linear_is_a_matmul(transformer: ir.Model) -> None:
    assert "Gemm" not in {node.op_type for node in transformer.graph}


@pytest.mark.parametrize(
    ("batch", "height", "width", "tokens"),
    [(1, 8, 8, 16), (5, 2, 16, 1), pytest.param(3, 6, 10, 4, id="odd-patches"), (2, 16, 16, 77)],
)
def test_sizes_that_were_not_traced_agree_with_torch(
    model: Model, transformer: ir.Model, tmp_path: Path, batch: int, height: int, width: int, tokens: int
) -> None:
    torch.manual_seed(1)
    inputs = {
        "hidden_states": torch.randn(batch, 8, height, width),
        "timestep": torch.rand(batch) * 1000,
        "encoder_hidden_states": torch.randn(batch, tokens, 192),
        "pooled_projections": torch.randn(batch, 192),
    }
    with torch.no_grad():
        expected = model.pipeline.transformer(**inputs, return_dict=False)[0]
    (velocity,) = run(transformer, tmp_path / "model.onnx", inputs)
    np.testing.assert_allclose(velocity, expected.numpy(), atol=1e-5)


def inputs_of(mmdit: MMDiT, batch: int, height: int, width: int, tokens: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    config = mmdit.transformer.config
    inputs = {
        "hidden_states": torch.randn(batch, mmdit.latent_channels, height, width),
        "timestep": torch.rand(batch) * 1000,
        "encoder_hidden_states": torch.randn(batch, tokens, config.joint_attention_dim),
        "pooled_projections": torch.randn(batch, config.pooled_projection_dim),
    }
    if mmdit.embeds_guidance:
        inputs["guidance"] = torch.full((batch,), float(mmdit.guidance_scale))
    return inputs


@pytest.mark.parametrize(
    ("family", "removed"),
    [
        ("tiny_dual_path", []),
        ("tiny_dual_path", ["0.attn2", "1.attn", "2.ff", "2.ff_context", "3.norm1"]),
        ("tiny_flux_path", []),
        ("tiny_flux_path", ["0.ff_context", "1.attn", "2.mlp"]),
    ],
)
def test_students_of_every_family_agree_with_torch_at_sizes_that_were_not_traced(
    request: pytest.FixtureRequest, tmp_path: Path, family: str, removed: list[str]
) -> None:
    whole = open_model(str(request.getfixturevalue(family))).mmdit
    mmdit = whole.without([Unit.parse(unit) for unit in removed], "zero") if removed else whole
    graph = lower_transformer(mmdit, mmdit.transformer.state_dict()).graph
    for number, sizes in enumerate([(1, 4, 6, 3), (3, 6, 2, 11)]):
        inputs = inputs_of(mmdit, *sizes)
        text = TextStates(tokens_BTJ=inputs["encoder_hidden_states"], pooled_BP=inputs["pooled_projections"])
        with torch.no_grad():
            expected = mmdit.velocity(inputs["hidden_states"], inputs["timestep"], text)
        (velocity,) = run(graph, tmp_path / f"{number}.onnx", inputs)
        np.testing.assert_allclose(velocity, expected.numpy(), atol=2e-5)


def test_a_kind_of_block_is_traced_once(on_disk: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    traced, trace = [], denoiser.trace
    monkeypatch.setattr(
        denoiser, "trace", lambda *args, **options: traced.append(1) or trace(*args, **options)
    )
    lowered = lower_transformer(on_disk.mmdit, on_disk.weights("transformer"))
    assert lowered.blocks == ("transformer_blocks.0", "transformer_blocks.1")
    assert len(traced) == 3  # what is around the blocks, a block, and the one that ends the text


def test_a_table_of_positions_that_is_not_of_sines_is_refused(model: Model) -> None:
    weights = dict(model.weights("transformer"))
    table = weights["pos_embed.pos_embed"].clone()
    table[0, 3, 5] += 1
    with pytest.raises(ToolchainError, match="not one of sines and cosines"):
        lower_transformer(model.mmdit, weights | {"pos_embed.pos_embed": table})


@pytest.mark.parametrize("family", ["tiny_path", "tiny_dual_path", "tiny_flux_path"])
def test_operators_of_onnxruntimes_own_compute_the_same(
    request: pytest.FixtureRequest, tmp_path: Path, family: str
) -> None:
    model = open_model(str(request.getfixturevalue(family)))
    config, height, width = model.pipeline.transformer.config, 6, 10
    generator = torch.Generator().manual_seed(1)
    inputs = {
        "hidden_states": torch.randn(2, model.mmdit.latent_channels, height, width, generator=generator),
        "timestep": torch.tensor([900.0, 3.0]),
        "encoder_hidden_states": torch.randn(2, 5, config.joint_attention_dim, generator=generator),
        "pooled_projections": torch.randn(2, config.pooled_projection_dim, generator=generator),
    }
    graphs = [
        lower_transformer(model.mmdit, model.weights("transformer"), fused=fused).graph
        for fused in (False, True)
    ]
    plain, fused = (Counter(node.op_type for node in graph.graph) for graph in graphs)
    assert plain["Softmax"] == fused["MultiHeadAttention"] > 0
    assert plain["ReduceMean"] == fused["SimplifiedLayerNormalization"]
    assert fused["RotaryEmbedding"] == (2 * plain["Softmax"] if model.mmdit.rotary_width else 0)
    assert not {"Softmax", "ReduceMean", "Neg"} & fused.keys()
    paths = [tmp_path / "plain.onnx", tmp_path / "fused.onnx"]
    (expected,), (found,) = (run(graph, path, inputs) for graph, path in zip(graphs, paths, strict=True))
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(found, expected, atol=1e-5)
    openvino = pytest.importorskip("openvino")
    compiled = openvino.compile_model(str(paths[1]), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    (by_openvino,) = compiled({name: x.numpy() for name, x in inputs.items()}).values()
    np.testing.assert_allclose(by_openvino, expected, atol=1e-5)
