"""What turns prompts into tokens and latents into pictures, as graphs: CLIP, T5 and the VAE's decoder.

All of them compute in float32 on every target. T5 was trained in bfloat16, whose range is float32's, and what
its feed-forwards multiply can exceed 65504, the largest number of float16: there it becomes infinite, and the
states of the whole prompt NaN. Encoders run once a picture, where the transformer runs at every step.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import product
from typing import Any

import onnx_ir as ir
import torch
from torch import nn
from torch.export import Dim

from export.errors import ExportError
from export.lower import bind, trace, without_weights
from export.parity import Case, case_of
from export.quantize import Bits, BitsOf
from export.repeated import TRACED, repeat_layer

__all__ = [
    "decoder_cases",
    "encoder_bits",
    "is_t5",
    "lower_text_encoder",
    "lower_vae_decoder",
    "text_encoder_cases",
]

_BATCHES = (1, 3)
_T5_LINEAR = re.compile(
    r"encoder\.block\.\d+\.layer\.\d+\.(SelfAttention\.[qkvo]|DenseReluDense\.w(i|i_0|i_1|o))\.weight"
)
_T5_OUT = re.compile(r".*\.DenseReluDense\.wo\.weight")


class _Clip(nn.Module):
    """The states that Stable Diffusion 3 reads, and the pooled ones.

    Marked, it also gives the states before the last layer but one, and behind it.
    """

    outputs: tuple[str, ...] = ("hidden_states", "pooled")
    marks: tuple[str, ...] = ("before",)
    """Beside the outputs; where `after` is not among them, it is the first output."""

    def __init__(self, module: Any) -> None:
        super().__init__()
        self.module, self.marked = module, False

    def forward(self, input_ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
        output = self.module(input_ids, output_hidden_states=True)
        marks = output.hidden_states[-3:-1][: len(self.marks)] if self.marked else ()
        return (*self.read(output), *marks)

    def read(self, output: Any) -> tuple[torch.Tensor, ...]:
        """What is wanted of the module's outputs."""
        return output.hidden_states[-2], output.text_embeds


class _PooledClip(_Clip):
    """The pooled state without a projection, all that FLUX.1 reads of CLIP."""

    outputs, marks = ("pooled",), ("before", "after")

    def read(self, output: Any) -> tuple[torch.Tensor, ...]:
        return (output.pooler_output,)


class _T5(_Clip):
    outputs, marks = ("hidden_states",), ("before", "after")

    def read(self, output: Any) -> tuple[torch.Tensor, ...]:
        return (output.last_hidden_state,)


_ENCODERS: dict[str, type[_Clip]] = {
    "CLIPTextModelWithProjection": _Clip,
    "CLIPTextModel": _PooledClip,
    "T5EncoderModel": _T5,
}


class _Decoder(nn.Module):
    def __init__(self, module: Any) -> None:
        super().__init__()
        self.module = module

    def forward(self, latents: torch.Tensor) -> Any:
        return self.module.decode(latents, return_dict=False)[0]


def lower_text_encoder(encoder: nn.Module, weights: Mapping[str, torch.Tensor]) -> ir.Model:
    """Lower a text encoder; batch and length stay free.

    Args:
        encoder: It may lie on the meta device.
        weights: Its tensors, each asked for when it is written.

    Raises:
        ExportError: The encoder is of another class.
    """
    copied, fake = without_weights(encoder, torch.float32)
    wrapper = _wrapped(copied)
    layers, count = _shorten_(copied)
    wrapper.marked = count > TRACED
    with fake:
        inputs = {"input_ids": torch.zeros(2, 7, dtype=torch.int64)}
    # CLIP has no more positions than these, and T5 no limit. Left to find it out, the tracer begins again.
    longest = getattr(encoder.config, "max_position_embeddings", None)
    shapes = ({0: Dim("batch"), 1: Dim("length", max=longest)},)
    names = [*wrapper.outputs, *(wrapper.marks if wrapper.marked else ())]
    model = trace(wrapper, fake, inputs, names, shapes)
    if wrapper.marked:
        outputs = model.graph.outputs
        before, after = [*outputs, outputs[0]][len(wrapper.outputs) :][:2]
        repeat_layer(model.graph, layers, count, before, after)
        del model.graph.outputs[len(wrapper.outputs) :]
    return bind(model, weights, encoder.named_buffers())


def lower_vae_decoder(vae: nn.Module, weights: Mapping[str, torch.Tensor]) -> ir.Model:
    """Lower the decoder half of the autoencoder; batch, height and width stay free.

    Args:
        vae: It may lie on the meta device.
        weights: Its tensors, each asked for when it is written.

    Raises:
        ExportError: The autoencoder is of another class.
    """
    _require(vae, ["AutoencoderKL"])
    copied, fake = without_weights(vae, torch.float32)
    with fake:
        inputs = {"latents": torch.empty(2, copied.config.latent_channels, 4, 6)}
    copied.encoder = copied.quant_conv = None  # the tracer handles each parameter, read or not
    # Without a limit the tracer finds this one out at the end, and begins again with it.
    shapes = ({0: Dim("batch", max=63), 2: Dim("height"), 3: Dim("width")},)
    model = trace(_Decoder(copied), fake, inputs, ["image"], shapes)
    return bind(model, weights, vae.named_buffers())


def text_encoder_cases(encoder: Any, lengths: tuple[int, int], *, seed: int = 0) -> list[Case]:
    """Draw prompts of two lengths, one of the first and several of the second.

    Their end token stands at another place in each row: CLIP's pooled output hangs on it.
    """
    wrapper, generator = _wrapped(encoder), torch.Generator().manual_seed(seed)
    cases = []
    for length, batch in zip(lengths, _BATCHES, strict=True):
        ids = torch.randint(0, encoder.config.vocab_size, (batch, length), generator=generator)
        for row in range(batch):
            ids[row, length - 1 - row % length :] = encoder.config.eos_token_id
        with torch.no_grad():
            outputs = dict(zip(wrapper.outputs, wrapper(ids), strict=True))
        cases.append(case_of({"batch": batch, "length": length}, {"input_ids": ids}, outputs))
    return cases


def decoder_cases(vae: Any, *, seed: int = 0) -> list[Case]:
    """Draw latents of two sizes, one of them not square, in two batches."""
    generator = torch.Generator().manual_seed(seed)
    cases = []
    for (height, width), batch in product(((4, 4), (3, 6)), _BATCHES):
        latents = torch.randn(batch, vae.config.latent_channels, height, width, generator=generator)
        with torch.no_grad():
            image = vae.decode(latents, return_dict=False)[0]
        shape = {"batch": batch, "height": height, "width": width}
        cases.append(case_of(shape, {"latents": latents}, {"image": image}))
    return cases


def is_t5(encoder: nn.Module) -> bool:
    """Whether it is the encoder that is larger than all others together."""
    return _kind(encoder) is _T5


def encoder_bits(encoder: nn.Module, bits: Bits) -> BitsOf:
    """How a text encoder is stored beside a transformer in some bits.

    T5 holds as many weights as a transformer, so its linears are rounded as those are; the ones at the end
    of its feed-forwards, whose inputs are the largest by far, to no less than 8 bits. CLIP is small,
    published in 16 bits, and stays so.
    """
    plain: Bits = 32 if bits == 32 else 16

    def bits_of(name: str) -> tuple[Bits, str]:
        if not is_t5(encoder) or not _T5_LINEAR.fullmatch(name):
            return plain, "only the linears of T5's blocks are quantised"
        if _T5_OUT.fullmatch(name) and bits < 8:
            return 8, ""
        return bits, f"{bits} bits were asked for"

    return bits_of


def _shorten_(encoder: nn.Module) -> tuple[str, int]:
    """Leave three layers of an encoder, and return what their list is called and how many there were."""
    name, layers = next(
        (name, module) for name, module in encoder.named_modules() if isinstance(module, nn.ModuleList)
    )
    if (count := len(layers)) > TRACED:
        parent, _, last = name.rpartition(".")
        short = nn.ModuleList([layers[0], layers[1], layers[-1]])
        setattr(encoder.get_submodule(parent), last, short)
    return name, count


def _wrapped(encoder: nn.Module) -> _Clip:
    return _kind(encoder)(encoder).eval()


def _kind(encoder: nn.Module) -> type[_Clip]:
    return _ENCODERS[_require(encoder, list(_ENCODERS))]


def _require(module: nn.Module, supported: list[str]) -> str:
    # By name, so that a class is told apart without importing the libraries of all others.
    for kind in type(module).__mro__:
        if kind.__name__ in supported:
            return kind.__name__
    raise ExportError(f"A {type(module).__name__} cannot be exported; supported: {', '.join(supported)}.")
