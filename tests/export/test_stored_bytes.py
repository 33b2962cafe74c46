"""What an export takes is known before it begins, to the byte."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir
import pytest

from export.components import Precision, part_bits
from export.denoiser import LoweredTransformer, lower_transformer
from export.encoders import lower_text_encoder, lower_vae_decoder
from export.passes import parameters
from export.quantize import Bits, store_weights
from export.space import part_parameters, stored_bytes
from export.weights import ALIGNMENT, WEIGHTS, WeightFile
from toolchain.families import Model, open_model


def lower(model: Model, part: str) -> ir.Model:
    if part == "transformer":
        return lower_transformer(model.mmdit, model.weights(part)).graph
    other = lower_vae_decoder if part == "vae" else lower_text_encoder
    return other(getattr(model.pipeline, part), model.weights(part))


def parts(model: Model) -> list[str]:
    names = ("text_encoder", "text_encoder_2", "text_encoder_3", "vae", "transformer")
    return [name for name in names if getattr(model.pipeline, name, None) is not None]


@pytest.mark.parametrize("family", ["tiny_flux_path", "tiny_sd35_path"])
def test_the_parameters_counted_are_those_that_the_graphs_read(
    request: pytest.FixtureRequest, family: str
) -> None:
    model = open_model(str(request.getfixturevalue(family)), precision="none")
    for part in parts(model):
        graph = lower(model, part)
        read, counted = parameters(graph), dict(part_parameters(model, part))
        assert {name: sorted(map(int, value.shape)) for name, value in read.items()} == {
            name: sorted(item.shape) for name, item in counted.items()
        }


@pytest.mark.parametrize("bits", [4, 8, 16, 32])
def test_the_bytes_are_those_of_the_report(
    on_disk: Model, lowered: LoweredTransformer, tmp_path: Path, bits: Bits
) -> None:
    precision = Precision(bits=bits, group_size=64, weights={})
    with WeightFile(tmp_path) as file:
        stored = store_weights(
            lowered.graph,
            on_disk.weights("transformer"),
            file,
            bits_of=part_bits(on_disk, "transformer", precision),
        )
    expected = stored_bytes(on_disk, "transformer", precision)
    assert expected == stored.report.num_bytes
    padding = len(stored) * 2 * ALIGNMENT
    assert expected <= (tmp_path / WEIGHTS).stat().st_size < expected + padding
