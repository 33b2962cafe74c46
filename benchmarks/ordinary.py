"""The ordinary way from a checkpoint to 4-bit ONNX: load it, `torch.onnx.export`, `nncf.compress_weights`.

    python -m benchmarks.ordinary DIRECTORY OUTPUT

What it does beyond the two calls is what these refuse to do without: linears on vectors come out as Gemm with
a transposed weight, for which NNCF writes scales along the wrong axis, and convolutions get scales that
onnxruntime does not take.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

app = typer.Typer(add_completion=False)


@app.command()
def main(
    directory: Annotated[Path, typer.Argument(help="Of a Stable Diffusion 3 pipeline.")],
    output: Annotated[Path, typer.Argument(help="Directory for the graphs.")],
    group_size: Annotated[int, typer.Option(help="Weights that share a scale.")] = 64,
) -> None:
    """Export and compress a transformer."""
    output.mkdir(parents=True, exist_ok=True)
    export(directory, output / "full.onnx")
    compress(output / "full.onnx", output / "model.onnx", group_size)


def export(directory: Path, path: Path) -> None:
    """Write the transformer in float32, its weights beside the graph."""
    import torch
    from diffusers import SD3Transformer2DModel
    from torch.export import Dim

    transformer = SD3Transformer2DModel.from_pretrained(directory / "transformer", dtype=torch.float32).eval()
    config = transformer.config
    inputs = {
        "hidden_states": torch.zeros(2, config.in_channels, 8, 12),
        "encoder_hidden_states": torch.zeros(2, 7, config.joint_attention_dim),
        "pooled_projections": torch.zeros(2, config.pooled_projection_dim),
        "timestep": torch.zeros(2),
    }
    batch, tokens = Dim("batch"), Dim("tokens")
    sizes = {0: batch, 2: 2 * Dim("height"), 3: 2 * Dim("width")}
    torch.onnx.export(
        transformer,
        kwargs=inputs,
        f=path,
        dynamo=True,
        opset_version=21,
        external_data=True,
        dynamic_shapes={
            "hidden_states": sizes,
            "encoder_hidden_states": {0: batch, 1: tokens},
            "pooled_projections": {0: batch},
            "timestep": {0: batch},
        },
        output_names=["velocity"],
        verbose=False,
    )


def compress(full: Path, path: Path, group_size: int) -> None:
    """Compress the weights of an exported transformer to 4 bits."""
    import nncf
    import onnx
    from nncf.onnx.quantization.backend_parameters import BackendParameters

    model = onnx.load(full, load_external_data=False)
    _multiply_where_gemm(model, full.parent)
    del model.graph.value_info[:]  # shapes of what there was before
    parameters = nncf.AdvancedCompressionParameters(
        backend_params={BackendParameters.EXTERNAL_DATA_DIR: str(full.parent.resolve())}
    )
    compressed = nncf.compress_weights(
        model,
        mode=nncf.CompressWeightsMode.INT4_SYM,
        group_size=group_size,
        ratio=1.0,
        all_layers=True,
        ignored_scope=nncf.IgnoredScope(types=["Conv"]),
        advanced_parameters=parameters,
    )
    onnx.save(compressed, path, save_as_external_data=True, location=f"{path.name}.data")


def _multiply_where_gemm(model: Any, directory: Path) -> None:
    """Turn each Gemm with a transposed weight into MatMul and Add, and the weight in its file with it."""
    import onnx

    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    nodes = []
    for node in model.graph.node:
        if node.op_type != "Gemm":
            nodes.append(node)
            continue
        inputs, weight, bias = node.input
        _transpose_in_file(weights[weight], directory)
        product = f"{node.output[0]}_product"
        nodes += [
            onnx.helper.make_node("MatMul", [inputs, weight], [product], name=f"{node.name}_matmul"),
            onnx.helper.make_node("Add", [product, bias], list(node.output), name=f"{node.name}_add"),
        ]
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def _transpose_in_file(tensor: Any, directory: Path) -> None:
    from onnx import numpy_helper

    rows, columns = tensor.dims
    if not tensor.external_data:  # small ones stay in the graph
        turned = numpy_helper.from_array(np.ascontiguousarray(numpy_helper.to_array(tensor).T), tensor.name)
        tensor.CopyFrom(turned)
        return
    place = {entry.key: entry.value for entry in tensor.external_data}
    stored = np.memmap(
        directory / place["location"],
        dtype=np.float32,
        mode="r+",
        offset=int(place.get("offset", 0)),
        shape=(math.prod(tensor.dims),),
    )
    stored[:] = np.ascontiguousarray(stored.reshape(rows, columns).T).reshape(-1)
    stored.flush()
    tensor.dims[:] = [columns, rows]


if __name__ == "__main__":
    app()
