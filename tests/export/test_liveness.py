"""Sizes, lifetimes and work of a graph's values, on graphs small enough to count by hand."""

from __future__ import annotations

import onnx_ir as ir
import pytest
from onnx import parser

from export.denoiser import lower_transformer
from export.liveness import activation_bytes, attention_scores
from export.roofline import least_seconds, work_of
from export.sized import SizedGraph, size_graph
from toolchain.families import Model, open_model


def graph(body: str, *, outputs: str = "float[N,4] y", constants: str = "") -> ir.Model:
    head = '<ir_version: 10, opset_import: ["" : 21]>'
    text = f"{head} g (float[N,4] x) => ({outputs}) <{constants}> {{ {body} }}"
    return ir.from_proto(parser.parse_model(text))


def sized(body: str, **names: str) -> SizedGraph:
    return size_graph(graph(body, **names), {"x": (2, 4)})


ROW = 2 * 4 * 4  # bytes of x


def test_an_elementwise_operator_writes_over_what_nothing_reads_again() -> None:
    assert activation_bytes(sized("a = Sqrt(x) b = Sqrt(a) y = Sqrt(b)")) == ROW


def test_what_is_read_again_stays() -> None:
    assert activation_bytes(sized("a = Sqrt(x) y = Add(a, x)")) == 2 * ROW


def test_a_view_takes_nothing() -> None:
    x = sized("y = Reshape(x, s)", outputs="float[4,2] y", constants="int64[2] s = {4, 2}")
    assert activation_bytes(x) == ROW


def test_a_view_keeps_what_it_shows() -> None:
    body = "v = Reshape(x, s) a = Transpose<perm=[1, 0]>(v) b = Transpose<perm=[1, 0]>(a) y = Add(b, v)"
    x = sized(body, outputs="float[4,2] y", constants="int64[2] s = {4, 2}")
    assert activation_bytes(x) == 3 * ROW


def test_other_operators_need_a_place_of_their_own() -> None:
    assert activation_bytes(sized("y = Transpose<perm=[1, 0]>(x)", outputs="float[4,N] y")) == 2 * ROW


def test_what_depends_on_no_input_belongs_to_the_weights() -> None:
    x = sized("d = Neg(c) y = Add(x, d)", constants="float[4] c = {1, 2, 3, 4}")
    assert activation_bytes(x) == ROW
    assert [node.op_type for node in x.nodes] == ["Add"]


ATTENTION = "k = Transpose<perm=[1, 0]>(x) s = MatMul(x, k) p = Softmax<axis=-1>(s) y = MatMul(p, x)"


def test_scores_are_what_lies_between_the_products_of_attention() -> None:
    assert attention_scores(sized(ATTENTION)) == {"s", "p"}


def test_fused_attention_has_no_scores_in_memory() -> None:
    x = size_graph(graph(ATTENTION), {"x": (64, 4)})
    row, scores = 64 * 4 * 4, 64 * 64 * 4
    assert activation_bytes(x) == row + 2 * scores
    assert activation_bytes(x, fused_attention=True) == 2 * row


def test_work_is_counted_by_kind() -> None:
    linears, attention, rest = work_of(sized(ATTENTION))
    assert (linears.kind, linears.flops) == ("linears", 0)
    # [2, 4] x [4, 2] and [2, 2] x [2, 4]; both x are read, its transpose, and y is written.
    assert (attention.kind, attention.flops) == ("attention", 2 * (2 * 4 * 2) + 2 * (2 * 2 * 4))
    assert attention.activation_bytes == 4 * ROW
    # A transpose of 8 numbers and a softmax of 4.
    assert (rest.kind, rest.flops, rest.activation_bytes) == ("rest", 8 + 4, 0)


def test_a_step_is_bound_by_the_slower_of_arithmetic_and_memory() -> None:
    work = work_of(sized(ATTENTION))
    only_weights = least_seconds(
        work, weight_bytes=10**9, activation_scale=0, peak_tflops=1e12, bandwidth_gb_s=100
    )
    assert only_weights == pytest.approx(0.01)
    faster = least_seconds(work, weight_bytes=10**9, activation_scale=0, peak_tflops=1e12, bandwidth_gb_s=200)
    assert faster == pytest.approx(only_weights / 2)


@pytest.mark.parametrize("family", ["tiny_dual_path", "tiny_flux_path"])
def test_the_products_of_a_graph_are_those_of_the_geometry(
    request: pytest.FixtureRequest, family: str
) -> None:
    model: Model = open_model(str(request.getfixturevalue(family)), precision="config")
    lowered = lower_transformer(model.mmdit, model.weights("transformer")).graph
    channels, height, width = model.latent_shape
    geometry = model.geometry
    known = {"hidden_states": (1, channels, height, width), "timestep": (1,), "guidance": (1,)}
    config = model.pipeline.transformer.config
    known["encoder_hidden_states"] = (1, geometry.text_tokens, config.joint_attention_dim)
    known["pooled_projections"] = (1, config.pooled_projection_dim)
    sizes = {str(value.name): known[str(value.name)] for value in lowered.graph.inputs}
    work = work_of(size_graph(lowered, sizes))
    assert sum(item.flops for item in work if item.kind != "rest") == geometry.size.flops
