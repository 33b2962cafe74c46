"""Lowered graphs: their names, types and free dimensions, and that they compute what torch does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch

from export.passes import parameters
from toolchain.families import Model

Lower = Callable[..., ir.Model]


@pytest.fixture(scope="module")
def transformer(model: Model, lower: Lower) -> ir.Model:
    return lower("lower_transformer", model.mmdit, model.weights("transformer"), "float32").graph


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


@pytest.mark.parametrize("activations", ["float32", "float16"])
def test_nothing_is_float64(model: Model, lower: Lower, activations: str) -> None:
    graph = lower("lower_transformer", model.mmdit, model.weights("transformer"), activations).graph.graph
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


def test_each_prompt_of_a_batch_is_pooled_at_its_own_end(model: Model, lower: Lower, tmp_path: Path) -> None:
    encoder = model.pipeline.text_encoder
    end = encoder.config.eos_token_id
    ids = torch.tensor([[5, 6, 7, 8, end], [5, end, end, end, end], [5, 6, 7, end, 9]])
    with torch.no_grad():
        expected = encoder(ids, output_hidden_states=True)
    graph = lower("lower_text_encoder", encoder)
    hidden_states, pooled = run(graph, tmp_path / "model.onnx", {"input_ids": ids})
    np.testing.assert_allclose(hidden_states, expected.hidden_states[-2].numpy(), atol=1e-5)
    np.testing.assert_allclose(pooled, expected.text_embeds.numpy(), atol=1e-5)
