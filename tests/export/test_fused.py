"""Parts of a block as one operator: what they compute, and what they are not told of is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from diffusers.models.normalization import RMSNorm
from torch import nn
from torch.export import Dim

from export.errors import ExportError
from export.fused import use_torch_norms
from export.lower import bind, trace, without_weights


class Calling(nn.Module):
    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.norm = RMSNorm(4, eps=1e-3)
        self.norm.weight.data = torch.tensor([1.0, 2.0, 3.0, 4.0])
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(self.norm(x))


def traced(module: nn.Module) -> ir.Model:
    copied, fake = without_weights(module, torch.float32)
    use_torch_norms(copied)
    with fake:
        x = torch.empty(2, 3, 5, 4)
    model = trace(copied, fake, {"x": x}, ["y"], ({0: Dim("batch"), 2: Dim("tokens")},), fused=True)
    return bind(model, dict(module.named_parameters()))


def kinds(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


def computed(model: ir.Model, path: Path, x: torch.Tensor) -> np.ndarray[Any, Any]:
    ir.save(model, path)
    (y,) = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {"x": x.numpy()})
    return y


def test_a_norm_without_weights_is_one_operator_too(tmp_path: Path) -> None:
    x = torch.randn(3, 3, 7, 4, generator=torch.Generator().manual_seed(0))
    module = Calling(lambda y: nn.functional.rms_norm(y, (4,), eps=1e-3))
    model = traced(module)
    assert kinds(model).count("SimplifiedLayerNormalization") == 2
    np.testing.assert_allclose(computed(model, tmp_path / "x.onnx", x), module(x).detach(), atol=1e-6)


def test_a_transposition_goes_behind_the_norm(tmp_path: Path) -> None:
    x = torch.randn(3, 3, 7, 4, generator=torch.Generator().manual_seed(0))
    module = Calling(lambda y: nn.functional.rms_norm(y.transpose(1, 2), (4,), eps=1e-3))
    model = traced(module)
    names = kinds(model)
    assert names[-1] == "Transpose"
    assert names.count("Transpose") == 1
    np.testing.assert_allclose(computed(model, tmp_path / "x.onnx", x), module(x).detach(), atol=1e-6)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: nn.functional.rms_norm(x, (5, 4), eps=1e-3),
        lambda x: nn.functional.rms_norm(x, (4,)),
        lambda x: nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True),
        lambda x: nn.functional.scaled_dot_product_attention(x, x, x, scale=2.0),
    ],
)
def test_what_an_operator_is_not_told_of_is_refused(function: Callable[..., torch.Tensor]) -> None:
    with pytest.raises(Exception, match="A block") as raised:
        traced(Calling(function))
    assert any(isinstance(each, ExportError) for each in chain(raised.value))


def chain(error: BaseException | None) -> list[BaseException]:
    return [] if error is None else [error, *chain(error.__cause__ or error.__context__)]
