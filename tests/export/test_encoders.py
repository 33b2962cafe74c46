"""Text encoders as graphs: they compute what torch does at any length, stored in the bits that suit each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModel,
    T5Config,
    T5EncoderModel,
)

from export.components import Component, export_text_encoder
from export.encoders import encoder_bits, lower_text_encoder, text_encoder_cases
from export.errors import ExportError
from export.parity import LIMITS, check_graph
from export.pieces import parity_session, run_in_pieces
from export.quantize import Bits
from export.repeated import repeat_layer
from toolchain.families import Model, open_model
from toolchain.progress import silent


def changed(config: Any, **changes: object) -> Any:
    return type(config)(**{**config.to_dict(), **changes})


T5 = T5Config(
    vocab_size=40,
    d_model=32,
    d_kv=16,  # heads as wide together as the states are not
    d_ff=64,
    num_layers=5,  # more than are traced
    num_heads=3,
    feed_forward_proj="gated-gelu",
)
CLIP = CLIPTextConfig(
    vocab_size=40,
    hidden_size=32,
    intermediate_size=48,
    projection_dim=24,
    num_hidden_layers=5,
    num_attention_heads=2,
    max_position_embeddings=20,
    eos_token_id=7,
)
# Published CLIPs say 2 for their end token, and then it is the largest id of the prompt.
OLD_CLIP = changed(CLIP, eos_token_id=2)
KINDS = {
    "t5": (T5EncoderModel, T5, (9, 150)),  # positions further apart than 128 share a bias
    "t5-relu": (T5EncoderModel, changed(T5, feed_forward_proj="relu"), (5, 12)),
    "clip": (CLIPTextModel, CLIP, (5, 20)),
    "clip-projected": (CLIPTextModelWithProjection, CLIP, (5, 20)),
    "clip-old": (CLIPTextModel, OLD_CLIP, (5, 20)),
    "clip-of-two-layers": (CLIPTextModelWithProjection, changed(CLIP, num_hidden_layers=2), (5, 20)),
}


def random(kind: Any, config: Any, std: float = 0.3) -> nn.Module:
    torch.manual_seed(0)
    encoder: nn.Module = kind(config).eval()
    for parameter in encoder.parameters():
        nn.init.normal_(parameter, std=std)
    return encoder


@pytest.mark.parametrize("name", KINDS)
def test_a_graph_of_an_encoder_without_weights_computes_what_torch_does(tmp_path: Path, name: str) -> None:
    kind, config, lengths = KINDS[name]
    encoder = random(kind, config)
    with init_empty_weights(include_buffers=False):
        skeleton = kind(config)
    graph = lower_text_encoder(skeleton, encoder.state_dict())
    ir.save(graph, tmp_path / "model.onnx")
    rows = check_graph(
        tmp_path / "model.onnx",
        text_encoder_cases(encoder, lengths),
        stage=name,
        graph="model.onnx",
        weights="float32",
    )
    assert [(row.shape["batch"], row.shape["length"]) for row in rows[:: len(rows) // 2]] == [
        (1, lengths[0]),
        (3, lengths[1]),
    ]
    assert max(row.relative_error for row in rows) < 1e-5
    # The same in pieces as small as they get, as one that is larger than memory would be.
    cases = text_encoder_cases(encoder, lengths)
    found = run_in_pieces(
        tmp_path / "model.onnx", [case.inputs for case in cases], list(cases[0].outputs), most_bytes=0
    )
    for case, outputs in zip(cases, found, strict=True):
        for expected, output in zip(case.outputs.values(), outputs, strict=True):
            np.testing.assert_allclose(output, expected, rtol=1e-3, atol=1e-4)


def test_nothing_of_a_length_is_fixed_in_the_graph_of_t5() -> None:
    encoder = random(T5EncoderModel, T5)
    graph = lower_text_encoder(encoder, encoder.state_dict()).graph
    weights = encoder.state_dict()
    others = {name: value for name, value in graph.initializers.items() if name not in weights}
    assert all(value.const_value.size <= 4 for value in others.values()), others.keys()
    assert {value.dtype for value in graph.initializers.values()} <= {ir.DataType.FLOAT, ir.DataType.INT64}
    # The embeddings have two names and are there once.
    assert len([name for name in graph.initializers if name.startswith(("shared.", "encoder.embed"))]) == 1


def test_what_a_layer_computes_for_others_keeps_it_from_being_repeated() -> None:
    before, other = ir.Value(name="before"), ir.Value(name="other")
    inner = ir.node("Relu", [before])
    last = ir.node("Add", [inner.outputs[0], other])
    outside = ir.node("Mul", [last.outputs[0], inner.outputs[0]])
    graph = ir.Graph([before, other], outside.outputs, nodes=[inner, last, outside], opset_imports={"": 21})
    with pytest.raises(ExportError, match="A layer cannot be repeated"):
        repeat_layer(graph, "layers", 5, before, last.outputs[0])


def test_an_encoder_of_another_kind_is_refused() -> None:
    config = CLIPVisionConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    with pytest.raises(
        ExportError, match=r"A CLIPVisionModel cannot be exported; supported: .*T5EncoderModel"
    ):
        lower_text_encoder(CLIPVisionModel(config), {})


@pytest.mark.parametrize(
    ("bits", "linear", "out", "other"), [(4, 4, 8, 16), (8, 8, 8, 16), (16, 16, 16, 16), (32, 32, 32, 32)]
)
def test_t5_is_rounded_as_the_transformer_is_and_its_widest_inputs_less(
    bits: Bits, linear: int, out: int, other: int
) -> None:
    encoder = T5EncoderModel(T5)
    bits_of = encoder_bits(encoder, bits)
    found = {name: bits_of(name)[0] for name in encoder.state_dict()}
    for name, chosen in found.items():
        if name.endswith(".wo.weight"):
            assert chosen == out, name
        elif name.split(".")[-2] in ("q", "k", "v", "o", "wi_0", "wi_1"):
            assert chosen == linear, name
        else:
            assert chosen == other, name
    clip = CLIPTextModel(CLIP)
    assert {encoder_bits(clip, bits)(name)[0] for name in clip.state_dict()} == {other}


@pytest.fixture
def loud_model(tiny_flux_path: Path) -> Model:
    """A FLUX.1 whose T5 is loud: what enters the last linear of a feed-forward is beyond float16's range."""
    model = open_model(str(tiny_flux_path))
    config = changed(T5, num_layers=2, d_model=24, vocab_size=model.pipeline.text_encoder_2.config.vocab_size)
    # T5 does not scale its scores: the attention of large random weights would be all or nothing.
    encoder = random(T5EncoderModel, config, std=0.1)
    with torch.no_grad():
        for block in encoder.encoder.block:
            block.layer[1].DenseReluDense.wi_0.weight.mul_(1e4)
            block.layer[1].DenseReluDense.wi_1.weight.mul_(1e4)
    model.pipeline.text_encoder_2 = encoder.requires_grad_(False)
    return model


def largest(encoder: nn.Module, ids: torch.Tensor) -> float:
    """Of all that enters a `wo`."""
    found: list[float] = []
    hooks = [
        part.register_forward_pre_hook(lambda _, inputs: found.append(float(inputs[0].abs().max())))
        for name, part in encoder.named_modules()
        if name.endswith(".wo")
    ]
    with torch.no_grad():
        encoder(ids)
    for hook in hooks:
        hook.remove()
    return max(found)


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_a_t5_that_float16_cannot_hold_is_exported(loud_model: Model, tmp_path: Path, bits: Bits) -> None:
    encoder = loud_model.pipeline.text_encoder_2
    ids = torch.arange(3, 11)[None] % encoder.config.vocab_size
    assert largest(encoder, ids) > 65504
    component: Component = export_text_encoder(loud_model, "text_encoder_2", bits, 64, True, silent, tmp_path)
    kinds = {4: "int4", 8: "int8", 16: "float16"}
    assert [(graph.weights, graph.activations) for graph in component.graphs] == [(kinds[bits], "float32")]
    assert {row.limit for row in component.parity} == {LIMITS[kinds[bits], "float32"]}
    session = parity_session(tmp_path / "model.onnx")
    (found,) = session.run(None, {"input_ids": ids.numpy()})
    with torch.no_grad():
        expected = encoder(ids).last_hidden_state.numpy()
    assert np.isfinite(found).all()
    error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    assert error < LIMITS[kinds[bits], "float32"]
    stored = {item.name: item.bits for item in component.quantization.quantized}
    if bits == 4:
        assert {bits for name, bits in stored.items() if name.endswith(".wo.weight")} == {8}
        assert {bits for name, bits in stored.items() if not name.endswith(".wo.weight")} == {4}
    else:
        assert set(stored.values()) == ({8} if bits == 8 else set())
