"""From torch modules to ONNX graphs: traced without weights, which are bound to the finished graph.

A module is traced as a copy whose parameters have shapes and no storage, so a graph costs memory by its nodes
and not by its weights. The initialisers keep the names of the torch parameters, and each is read from the
module, one at a time, when the graph is written.
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MethodType
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import onnx_ir as ir
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim

from export.errors import ExportError
from export.passes import canonicalize, is_transposed

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, SD3Transformer2DModel
    from transformers import CLIPTextModelWithProjection

__all__ = ["Activations", "lower_text_encoder", "lower_transformer", "lower_vae_decoder"]

Activations = Literal["float32", "float16"]

OPSET = 21  # the first with blocked DequantizeLinear; 23 has no readers yet
_DTYPES = {"float32": torch.float32, "float16": torch.float16}


def lower_transformer(transformer: SD3Transformer2DModel, activations: Activations = "float32") -> ir.Model:
    """Lower the denoiser; batch, height, width and the number of text tokens stay free.

    Raises:
        ExportError: The transformer is of another family, or its weights do not fit the type.
    """
    _require(transformer, "SD3Transformer2DModel")
    if not transformer.pos_embed.pos_embed_max_size:
        raise ExportError(
            "The transformer has no pos_embed_max_size, so its position table fits one picture size only. "
            "Set pos_embed_max_size in the transformer's config.json."
        )
    config, dtype = transformer.config, _DTYPES[activations]
    copied, fake = _without_weights(transformer, dtype)
    copied.pos_embed.cropped_pos_embed = MethodType(_crop_position_table, copied.pos_embed)
    patch = config.patch_size
    batch, tokens = Dim("batch"), Dim("tokens")
    height, width = patch * Dim("height"), patch * Dim("width")
    with fake:
        inputs = {
            # Sizes differ from each other and from 1, or the tracer takes them for one or a constant.
            "hidden_states": torch.empty(2, config.in_channels, 4 * patch, 6 * patch, dtype=dtype),
            "timestep": torch.empty(2),
            "encoder_hidden_states": torch.empty(2, 7, config.joint_attention_dim, dtype=dtype),
            "pooled_projections": torch.empty(2, config.pooled_projection_dim, dtype=dtype),
        }
    shapes = ({0: batch, 2: height, 3: width}, {0: batch}, {0: batch, 1: tokens}, {0: batch})
    model = _trace(_Denoiser(copied), fake, inputs, ["velocity"], shapes)
    return _bind(model, transformer)


def lower_text_encoder(encoder: CLIPTextModelWithProjection) -> ir.Model:
    """Lower a CLIP text encoder in float32; batch and length stay free.

    Raises:
        ExportError: The encoder is of another class.
    """
    _require(encoder, "CLIPTextModelWithProjection")
    copied, fake = _without_weights(encoder, torch.float32)
    with fake:
        inputs = {"input_ids": torch.zeros(2, 7, dtype=torch.int64)}
    shapes = ({0: Dim("batch"), 1: Dim("length")},)
    model = _trace(_TextEncoder(copied), fake, inputs, ["hidden_states", "pooled"], shapes)
    return _bind(model, encoder)


def lower_vae_decoder(vae: AutoencoderKL) -> ir.Model:
    """Lower the decoder half of the autoencoder in float32; batch, height and width stay free.

    Raises:
        ExportError: The autoencoder is of another class.
    """
    _require(vae, "AutoencoderKL")
    copied, fake = _without_weights(vae, torch.float32)
    with fake:
        inputs = {"latents": torch.empty(2, vae.config.latent_channels, 4, 6)}
    shapes = ({0: Dim("batch"), 2: Dim("height"), 3: Dim("width")},)
    model = _trace(_Decoder(copied), fake, inputs, ["image"], shapes)
    return _bind(model, vae)


class _Denoiser(nn.Module):
    def __init__(self, module: Any) -> None:
        super().__init__()
        self.module = module

    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        pooled_projections: torch.Tensor,
    ) -> Any:
        return self.module(
            hidden_states=hidden_states,
            timestep=timestep,
            encoder_hidden_states=encoder_hidden_states,
            pooled_projections=pooled_projections,
            return_dict=False,
        )[0]


class _TextEncoder(nn.Module):
    def __init__(self, module: Any) -> None:
        super().__init__()
        self.module = module

    def forward(self, input_ids: torch.Tensor) -> Any:
        output = self.module(input_ids, output_hidden_states=True)
        return output.hidden_states[-2], output.text_embeds


class _Decoder(nn.Module):
    def __init__(self, module: Any) -> None:
        super().__init__()
        self.module = module

    def forward(self, latents: torch.Tensor) -> Any:
        return self.module.decode(latents, return_dict=False)[0]


def _crop_position_table(embed: Any, height: int, width: int) -> torch.Tensor:
    """Take the centre of the position table, in arithmetic that stays right as a graph.

    The tracer rewrites (size - rows) // 2 with a negative operand, and ONNX divides towards zero where Python
    divides down: an odd number of rows would be cropped one row too large.
    """
    size = embed.pos_embed_max_size
    table = embed.pos_embed.reshape(size, size, -1)
    rows, columns = height // embed.patch_size, width // embed.patch_size
    top, left = size - (size + rows + 1) // 2, size - (size + columns + 1) // 2
    table = table.index_select(0, torch.arange(rows, device=table.device) + top)
    table = table.index_select(1, torch.arange(columns, device=table.device) + left)
    cropped: torch.Tensor = table.reshape(1, rows * columns, -1)
    return cropped


def _require(module: nn.Module, supported: str) -> None:
    # By name, so that a class is told apart without importing the libraries of all others.
    if not any(kind.__name__ == supported for kind in type(module).__mro__):
        raise ExportError(
            f"A {type(module).__name__} cannot be exported; {supported} is supported in its place. "
            "Export a Stable Diffusion 3 pipeline."
        )


def _without_weights(module: Any, dtype: torch.dtype) -> tuple[Any, FakeTensorMode]:
    """Copy a module's structure with parameters and buffers that have a shape and a type only."""
    fake = FakeTensorMode()
    memo: dict[int, Any] = {}
    with fake:
        for tensor in [*module.parameters(), *module.buffers()]:
            kind = dtype if tensor.is_floating_point() else tensor.dtype
            empty = torch.empty(tensor.shape, dtype=kind)
            is_parameter = isinstance(tensor, nn.Parameter)
            memo[id(tensor)] = nn.Parameter(empty, requires_grad=False) if is_parameter else empty
    return copy.deepcopy(module, memo), fake


def _trace(
    wrapper: nn.Module,
    fake: FakeTensorMode,
    inputs: Mapping[str, torch.Tensor],
    outputs: list[str],
    shapes: tuple[dict[int, Any], ...],
) -> ir.Model:
    with fake, _quiet():
        program = torch.onnx.export(
            wrapper.eval(),
            tuple(inputs.values()),
            input_names=list(inputs),
            output_names=outputs,
            dynamic_shapes=shapes,
            opset_version=OPSET,
            dynamo=True,
            optimize=False,  # it would fold constants, and these weights have no values
            verbose=False,
        )
    assert program is not None
    model = program.model
    for name, value in list(model.graph.initializers.items()):
        value.const_value = None
        model.graph.initializers.pop(name)
        value.name = name.removeprefix("module.")
        model.graph.initializers.add(value)
    with _quiet():
        canonicalize(model)
    return model


def _bind(model: ir.Model, module: nn.Module) -> ir.Model:
    """Give each initialiser without a value the parameter of its name, read when it is written."""
    tensors: dict[str, torch.Tensor] = {
        **dict(module.named_parameters(remove_duplicate=False)),
        **dict(module.named_buffers(remove_duplicate=False)),
    }
    for name, value in model.graph.initializers.items():
        if value.const_value is None:
            if name not in tensors:
                raise ExportError(
                    f"{type(module).__name__} makes the constant {name!r} while it runs, which cannot be "
                    "exported. Keep it as a buffer of the module."
                )
            value.const_value = _lazy(name, tensors[name], value)
    return model


def _lazy(name: str, tensor: torch.Tensor, value: ir.Value) -> ir.LazyTensor:
    assert value.dtype is not None
    assert isinstance(value.shape, ir.Shape)
    dtype, transposed = value.dtype, is_transposed(value)

    def read() -> ir.Tensor[Any]:
        with np.errstate(over="ignore"):
            array = (
                tensor.detach().cpu().float().numpy() if tensor.is_floating_point() else tensor.cpu().numpy()
            )
            array = array.T if transposed else array
            converted = np.ascontiguousarray(array.astype(dtype.numpy()))
        check_finite(name, converted)
        return ir.Tensor(converted, name=name)

    return ir.LazyTensor(read, dtype=dtype, shape=value.shape, name=name)


def check_finite(name: str, array: np.ndarray[Any, Any]) -> None:
    """Refuse infinities and NaN, those of a value too large for its new type included.

    Raises:
        ExportError: There is one.
    """
    if np.issubdtype(array.dtype, np.floating) and not np.isfinite(array).all():
        raise ExportError(
            f"The weight {name!r} is not finite as {array.dtype}: it holds NaN or values outside that type's "
            "range. Export with --bits 32, or mend the model."
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """Hold back what tracing says of libraries that are not used and of values that are bound later."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnx_ir", "onnxscript")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            for logger in loggers:
                logger.setLevel(logging.ERROR)
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
