"""The transformer as a graph: what is before, between and behind its blocks, each kind of block traced once.

A model of 57 blocks has a handful of kinds, and tracing takes seconds a block. So a block is traced with
inputs of its own, and its graph is put in as often as the model has one like it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir import passes
from onnx_ir.passes import common
from torch import nn
from torch.export import Dim

from export.fused import DOMAIN, use_torch_norms
from export.lower import DTYPES, Activations, bind, trace, without_weights
from export.traces import structure
from toolchain.families.mmdit import MMDiT, Streams, TextStates, shallow_copy

__all__ = ["Boundary", "LoweredTransformer", "lower_transformer", "trace_backwards"]

# Rotary embeddings by the names of a block's inputs, and lengths to trace with.
_WAVES = {"cosines_text": 7, "cosines_image": 24, "sines_text": 7, "sines_image": 24}


@dataclass(frozen=True, kw_only=True)
class Boundary:
    """Names of the values that one block gives to the next."""

    image: str
    text: str | None
    """None behind a block that ends the text."""


@dataclass(frozen=True, kw_only=True)
class LoweredTransformer:
    """A transformer's graph, and where in it one block ends and the next begins."""

    graph: ir.Model
    blocks: tuple[str, ...]
    """Names of the blocks' modules, in the order they run; the names of their weights begin so."""
    boundaries: tuple[Boundary, ...]
    """What the first block is given, then what each block gives."""
    shared: tuple[str, ...]
    """Names of what each block is given beside: conditioning, and rotary embeddings of text and image."""
    positions: nn.Module
    """What the graph has in the place of the transformer's `pos_embed`."""

    def clone(self) -> LoweredTransformer:
        """A copy whose graph can be changed; the weights are shared."""
        return replace(self, graph=self.graph.clone())


def lower_transformer(
    mmdit: MMDiT,
    weights: Mapping[str, torch.Tensor],
    activations: Activations = "float32",
    *,
    float32_blocks: Collection[str] = (),
    fused: bool = False,
) -> LoweredTransformer:
    """Lower the denoiser; batch, height, width and the number of text tokens stay free.

    Args:
        mmdit: Its transformer may lie on the meta device.
        weights: Its tensors, each asked for when it is written and not before.
        activations: What the graph computes in.
        float32_blocks: Names of blocks that compute in float32 all the same.
        fused: Whether operators of onnxruntime's own are used (export/fused.py).

    Raises:
        ToolchainError: Its positions cannot be computed for every size of picture.
    """
    pieces = _Pieces(mmdit, weights, activations, float32_blocks, fused)
    model = pieces.frame()
    velocity, image, text, *shared = model.graph.outputs
    model.graph.outputs[:] = [velocity]
    behind = [(use.node, use.idx) for use in image.uses()]
    assembly, traced = _Assembly(model.graph), dict[str, ir.Model]()
    streams = [image, text]
    boundaries = [_boundary(streams)]
    for name, kind in pieces.blocks.items():
        if kind not in traced:
            traced[kind] = pieces.block(kind)
        streams = assembly.append(traced[kind], [*streams, *shared], name)
        boundaries.append(_boundary(streams))
    for node, index in behind:
        node.replace_input_with(index, streams[0])
    if fused:
        model.opset_imports[DOMAIN] = 1
    passes.Sequential(common.TopologicalSortPass(), common.CommonSubexpressionEliminationPass())(model)
    return LoweredTransformer(
        graph=bind(model, weights, pieces.positions.named_buffers("pos_embed")),
        blocks=tuple(pieces.blocks),
        boundaries=tuple(boundaries),
        shared=tuple(str(value.name) for value in shared),
        positions=pieces.positions,
    )


def trace_backwards(
    mmdit: MMDiT,
    weights: Mapping[str, torch.Tensor],
    activations: Activations = "float32",
    *,
    fused: bool = False,
) -> None:
    """Trace what `lower_transformer` does, the last kind of block first, so that it finds it."""
    pieces = _Pieces(mmdit, weights, activations, (), fused)
    for kind in reversed(dict.fromkeys(pieces.blocks.values())):
        pieces.block(kind)
    pieces.frame()


class _Pieces:
    """A transformer without weights, in what is traced apart: its frame, and each kind of its blocks."""

    def __init__(
        self,
        mmdit: MMDiT,
        weights: Mapping[str, torch.Tensor],
        activations: Activations,
        float32_blocks: Collection[str],
        fused: bool,
    ) -> None:
        transformer = shallow_copy(mmdit.transformer)
        transformer.pos_embed = self.positions = mmdit.computed_positions(weights)
        self._dtype, self._fused = DTYPES[activations], fused
        copied, self._fake = without_weights(transformer, self._dtype)
        self._view = type(mmdit)(copied, guidance_scale=1.0, vae_scale_factor=mmdit.vae_scale_factor)
        self.blocks: dict[str, str] = {}
        """Names of the blocks' modules in the order they run, and of which kind each is."""
        self._kinds: dict[str, tuple[nn.Module, torch.dtype]] = {}
        names = {id(module): name for name, module in copied.named_modules()}
        for block in self._view.blocks:
            name = names[id(block)]
            own = torch.float32 if name in float32_blocks else self._dtype
            self.blocks[name] = f"{own} {structure(block)}"
            self._kinds.setdefault(self.blocks[name], (block, own))

    def frame(self) -> ir.Model:
        """What is before and behind the blocks, as if there were none."""
        view, patch, dtype = self._view, self._view.patch_size, self._dtype
        frame, config = shallow_copy(view.transformer), view.transformer.config
        for name, child in view.transformer.named_children():
            if isinstance(child, nn.ModuleList):
                setattr(frame, name, nn.ModuleList())  # the tracer handles each parameter, read or not
        with self._fake:
            inputs = {
                # Sizes differ from each other and from 1, or the tracer takes them for one or a constant.
                "hidden_states": torch.empty(2, view.latent_channels, 4 * patch, 6 * patch, dtype=dtype),
                "timestep": torch.empty(2),
                "encoder_hidden_states": torch.empty(2, 7, config.joint_attention_dim, dtype=dtype),
                "pooled_projections": torch.empty(2, config.pooled_projection_dim, dtype=dtype),
            }
            if view.embeds_guidance:
                inputs["guidance"] = torch.empty(2)
        batch, tokens = Dim("batch"), Dim("tokens")
        height, width = patch * Dim("height"), patch * Dim("width")
        shapes = ({0: batch, 2: height, 3: width}, {0: batch}, {0: batch, 1: tokens}, {0: batch}, {0: batch})
        wrapper = _Frame(type(view), frame)
        return trace(wrapper, self._fake, inputs, ["velocity"], shapes[: len(inputs)])

    def block(self, kind: str) -> ir.Model:
        """One of its blocks."""
        view, dtype, (block, own) = self._view, self._dtype, self._kinds[kind]
        width, rotary = view.inner_width, view.rotary_width
        block, fake = without_weights(block, own)  # a copy of its own, for its type is its own
        if self._fused:
            use_torch_norms(block)
        with fake:
            inputs = {
                "image": torch.empty(2, 24, width, dtype=dtype),
                "text": torch.empty(2, 7, width, dtype=dtype),
                "conditioning": torch.empty(2, width, dtype=dtype),
            }
            if rotary:
                inputs |= {name: torch.empty(length, rotary) for name, length in _WAVES.items()}
        batch, tokens, patches = Dim("batch"), Dim("tokens"), Dim("patches")
        shapes = (
            {0: batch, 1: patches}, {0: batch, 1: tokens}, {0: batch}, *({0: tokens}, {0: patches}) * 2
        )  # fmt: skip
        return trace(
            _Block(view, block, dtype),
            fake,
            inputs,
            ["image_out"],
            shapes[: len(inputs)],
            fused=self._fused,
            about=[block, type(view), dtype],  # a block is given all it needs
        )


def _boundary(streams: list[ir.Value]) -> Boundary:
    image, text = (*(str(value.name) for value in streams), None)[:2]
    return Boundary(image=str(image), text=text)


class _Assembly:
    """A graph that others are put into."""

    def __init__(self, graph: ir.Graph) -> None:
        self._graph = graph
        self._constants: dict[tuple[Any, ...], ir.Value] = {}

    def append(self, model: ir.Model, inputs: list[ir.Value], prefix: str) -> list[ir.Value]:
        """Put in a copy of a graph, its names prefixed, and return its outputs."""
        part = model.clone().graph
        known: dict[int, ir.Value] = {}
        for own, given in zip(part.inputs, inputs, strict=True):
            own.replace_all_uses_with(given)
            known[id(own)] = given
        outputs = [known.get(id(value), value) for value in part.outputs]
        part.outputs.clear()
        for value in list(part.initializers.values()):
            part.initializers.pop(str(value.name))
            if (same := self._same_constant(value)) is not None:
                value.replace_all_uses_with(same)
                continue
            value.name = f"{prefix}.{value.name}"
            self._graph.initializers.add(value)
        nodes = list(part)
        part.remove(nodes)
        for node in nodes:
            node.name = None
            for value in node.outputs:
                value.name = f"{prefix}.{value.name}"
        self._graph.extend(nodes)
        return outputs

    def _same_constant(self, value: ir.Value) -> ir.Value | None:
        """One that is there already; the blocks' graphs bring the same few again and again."""
        if (tensor := value.const_value) is None:
            return None
        key = (tensor.dtype, tuple(tensor.shape), tensor.tobytes())
        same = self._constants.setdefault(key, value)
        return None if same is value else same


class _Frame(nn.Module):
    """What is before the blocks and what is behind them, and what flows in between."""

    def __init__(self, kind: type[MMDiT], transformer: nn.Module) -> None:
        super().__init__()
        self.module, self._kind = transformer, kind

    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        pooled_projections: torch.Tensor,
        guidance: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor | None, ...]:
        view = self._kind(self.module, guidance_scale=guidance)  # type: ignore[arg-type]
        text = TextStates(tokens_BTJ=encoder_hidden_states, pooled_BP=pooled_projections)
        streams = view.begin(hidden_states, timestep, text)
        tokens = encoder_hidden_states.shape[1]
        # In two parts, because the length of both together is no size of its own for the tracer.
        waves = [part for wave in streams.rotary or () for part in (wave[:tokens], wave[tokens:])]
        return view.end(streams), streams.image_BND, streams.text_BTD, streams.conditioning_BD, *waves


class _Block(nn.Module):
    """One block, as the view calls it."""

    def __init__(self, view: MMDiT, block: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.module, self._apply_block, self._dtype = block, view.apply, dtype

    def forward(
        self,
        image: torch.Tensor,
        text: torch.Tensor,
        conditioning: torch.Tensor,
        cosines_text: torch.Tensor | None = None,
        cosines_image: torch.Tensor | None = None,
        sines_text: torch.Tensor | None = None,
        sines_image: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, ...]:
        rotary = None
        if cosines_text is not None:
            assert cosines_image is not None
            assert sines_text is not None
            assert sines_image is not None
            rotary = (torch.cat([cosines_text, cosines_image]), torch.cat([sines_text, sines_image]))
        own = next(self.module.parameters()).dtype
        image, text, conditioning = (item.to(own) for item in (image, text, conditioning))
        given = Streams(
            image_BND=image, text_BTD=text, conditioning_BD=conditioning, rotary=rotary, size=(0, 0)
        )
        given = self._apply_block(self.module, given)
        outputs = (given.image_BND,) if given.text_BTD is None else (given.image_BND, given.text_BTD)
        return tuple(item.to(self._dtype) for item in outputs)
