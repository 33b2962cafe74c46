"""What is found out about a transformer one block at a time."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch

from export import blockwise
from export.blockwise import draw_states, encode_prompts, loud_blocks, streamed
from export.denoiser import lower_transformer
from toolchain.families import Model


def test_encoders_on_disk_say_what_encoders_in_memory_do(model: Model, on_disk: Model) -> None:
    prompts = ["a red circle", "two blue squares"]
    there = encode_prompts(on_disk, prompts)
    here = model.mmdit.encode_prompts(model.pipeline, prompts, model.defaults.max_sequence_length)
    assert torch.equal(there.tokens_BTJ, here.tokens_BTJ)
    assert torch.equal(there.pooled_BP, here.pooled_BP)
    assert {parameter.device.type for parameter in on_disk.pipeline.text_encoder.parameters()} == {"meta"}


def test_states_are_of_all_sizes_batches_and_texts_together(on_disk: Model) -> None:
    shapes = [tuple(state.shape.values()) for state in draw_states(on_disk, (16, 5))]
    assert [len({shape[axis] for shape in shapes}) for axis in (1, 0, 3)] == [2, 2, 2]
    assert len(shapes) == len(set(shapes)) == 8


def test_a_block_that_makes_values_near_the_end_of_float16_computes_in_float32(
    model: Model, on_disk: Model, tmp_path: Path
) -> None:
    weights = {name: tensor.clone() for name, tensor in model.weights("transformer").items()}
    states = draw_states(on_disk, (16, 5))[:1]
    assert loud_blocks(on_disk.mmdit, weights, states, lambda: None) == frozenset()
    weights["transformer_blocks.0.ff.net.0.proj.weight"] *= 1e5
    weights["transformer_blocks.0.ff.net.2.weight"] *= 1e-5
    loud = loud_blocks(on_disk.mmdit, weights, states, lambda: None)
    assert loud == {"transformer_blocks.0"}
    graph = lower_transformer(on_disk.mmdit, weights, "float16", float32_blocks=loud).graph
    types = {
        name.split(".")[1]: value.dtype
        for name, value in graph.graph.initializers.items()
        if name.endswith("ff.net.0.proj.weight")
    }
    assert types == {"0": ir.DataType.FLOAT, "1": ir.DataType.FLOAT16}
    ir.save(graph, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    (state,) = states
    feeds = {
        "hidden_states": state.latents_BCHW.numpy().astype(np.float16),
        "timestep": state.timesteps_B.numpy(),
        "encoder_hidden_states": state.text.tokens_BTJ.numpy().astype(np.float16),
        "pooled_projections": state.text.pooled_BP.numpy().astype(np.float16),
    }
    (found,) = session.run(None, feeds)
    transformer = copy.deepcopy(model.pipeline.transformer)
    transformer.load_state_dict(weights)
    view = type(model.mmdit)(transformer, guidance_scale=1.0)
    with torch.no_grad():
        expected = view.velocity(state.latents_BCHW, state.timesteps_B, state.text)
    np.testing.assert_allclose(found.astype(np.float32), expected.numpy(), atol=0.02)


def test_states_of_a_large_model_are_small(on_disk: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blockwise, "_LARGE", 0)
    monkeypatch.setattr(blockwise, "_FEW_TOKENS", 8)
    states = draw_states(on_disk, (16, 5))
    shapes = {(state.shape["batch"], state.shape["tokens"]) for state in states}
    assert shapes == {(1, 8), (2, 5), (2, 8), (1, 5)}


def test_a_module_that_was_streamed_is_what_it_was(on_disk: Model) -> None:
    encoder = on_disk.pipeline.text_encoder
    before = [sorted(vars(module)) for module in encoder.modules()]
    with streamed(encoder, on_disk.weights("text_encoder")):
        assert [sorted(vars(module)) for module in encoder.modules()] != before
    assert [sorted(vars(module)) for module in encoder.modules()] == before
