"""Whether the transformer's graph computes what torch does, with one block in memory at a time.

Two errors are told apart. A graph's own is what it gives against torch with the very weights that were
stored: rounding is in both, so little is allowed. That of rounding is what it gives against torch with the
weights as they were, one block at a time from exact inputs, and all together from the first to the velocity.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import torch
from accelerate import cpu_offload
from accelerate.hooks import remove_hook_from_module
from torch import nn

from deploy.memory import give_back
from export.denoiser import LoweredTransformer
from export.errors import ExportError
from export.lower import Activations
from export.parity import LIMITS, Array, ParityRow, Weights, compare, require_close
from export.pieces import part_session
from toolchain.families import Model
from toolchain.families.mmdit import MMDiT, Streams, TextStates, shallow_copy

__all__ = [
    "BlockRow",
    "CheckedGraph",
    "State",
    "check_transformer",
    "draw_states",
    "encode_prompts",
    "loud_blocks",
    "streamed",
]

# Largest relative error of a graph against torch with the same weights: of the order of summing, and of
# rounding every activation to 16 bits.
GRAPH_LIMITS: dict[Activations, float] = {"float32": 1e-3, "float16": 2e-2}

_LOUD = 65504 / 2  # of float16's range
_PROMPTS = ("a red circle left of a blue square", "three yellow triangles", "a green square")
_BATCHES = (1, 3)
# Above so many parameters, states are as small as they can be and still differ: a block's weights are read
# from memory for a few tokens in nearly the time it takes for one.
_LARGE = 1_000_000_000
_FEW_TOKENS = 32


@dataclass(frozen=True, kw_only=True)
class State:
    """What the transformer is given."""

    latents_BCHW: torch.Tensor
    timesteps_B: torch.Tensor
    text: TextStates
    guidance_B: torch.Tensor | None
    """The guidance scale, where it is one of the transformer's inputs."""

    @property
    def shape(self) -> dict[str, int]:
        """Its sizes, by name."""
        batch, _, height, width = self.latents_BCHW.shape
        return {"batch": batch, "height": height, "width": width, "tokens": self.text.tokens_BTJ.shape[1]}


@dataclass(frozen=True, kw_only=True)
class CheckedGraph:
    """A graph of the transformer as it was written."""

    name: str
    """Its path in the bundle."""
    lowered: LoweredTransformer
    activations: Activations
    weights: Weights


@dataclass(frozen=True, kw_only=True)
class BlockRow:
    """One block of one graph: the largest relative errors over all states."""

    graph: str
    block: str
    """Its module, or `embedders` and `head`."""
    graph_error: float
    """Against torch with the weights as they were stored."""
    rounding_error: float
    """Against torch with the weights as they were."""


def draw_states(model: Model, token_counts: tuple[int, int], *, seed: int = 0) -> list[State]:
    """States of two sizes (one odd in patches, not square), two batches and two text lengths.

    All eight of them for a model that is not large, and for one that is the four in which any two of these
    meet, which is where a graph fixes what should be free.
    The first row of a batch is noise, where sampling starts; the others are half way. Prompts are real: what
    a rounded model makes of inputs it would never be given says little about it.
    """
    mmdit, generator = model.mmdit, torch.Generator().manual_seed(seed)
    text = encode_prompts(model, list(_PROMPTS))
    large = model.num_parameters > _LARGE
    largest = mmdit.max_latent_size // mmdit.patch_size
    sizes = ((2, 2), (3, 1)) if large else ((min(4, largest),) * 2, (min(3, largest), min(6, largest)))
    batches = (1, 2) if large else _BATCHES
    most_tokens = _FEW_TOKENS if large else text.tokens_BTJ.shape[1]
    states = []
    for places, ((rows, columns), tokens, batch) in zip(
        product((0, 1), repeat=3), product(sizes, token_counts, batches), strict=True
    ):
        if large and sum(places) % 2:
            continue
        count = min(tokens, most_tokens)
        size = (rows * mmdit.patch_size, columns * mmdit.patch_size)
        noise = torch.randn(batch, mmdit.latent_channels, *size, generator=generator)
        flat = torch.randn(batch, mmdit.latent_channels, 1, 1, generator=generator).expand_as(noise)
        timesteps = torch.tensor([1000.0] + [500.0] * (batch - 1))
        sigmas = timesteps[:, None, None, None] / 1000
        # From everywhere in the text, for its beginning and its end come from different encoders.
        chosen = torch.linspace(0, text.tokens_BTJ.shape[1] - 1, count).long()
        states.append(
            State(
                latents_BCHW=sigmas * noise + (1 - sigmas) * flat,
                timesteps_B=timesteps,
                guidance_B=torch.full((batch,), mmdit.guidance_scale) if mmdit.embeds_guidance else None,
                text=TextStates(tokens_BTJ=text.tokens_BTJ[:batch, chosen], pooled_BP=text.pooled_BP[:batch]),
            )
        )
    return states


def check_transformer(
    mmdit: MMDiT,
    weights: Mapping[str, torch.Tensor],
    stored: Mapping[str, torch.Tensor],
    graphs: Sequence[CheckedGraph],
    states: Sequence[State],
    directory: Path,
    on_block: Callable[[], None] = lambda: None,
    limit: float | None = None,
) -> tuple[list[ParityRow], list[BlockRow]]:
    """Hold graphs to the limits of their types.

    Args:
        mmdit: Its transformer may lie on the meta device.
        weights: As they were, by name.
        stored: As they were stored, by name.
        graphs: Whose external weights lie in `directory`.
        states: What the transformer is asked.
        directory: Of the component; graphs of single blocks are written there for a moment.
        on_block: Called after each block, the embedders and the head.
        limit: Relative error of the velocity that is accepted; None takes that of the graph's types.

    Raises:
        ExportError: A value is not finite, a graph differs from torch with the same weights, or rounding
            costs more than is accepted; the worst block is named.
    """
    runs = [_Run(graph, directory, limit) for graph in graphs]
    with torch.no_grad():
        reference = _begin(mmdit, weights, states)
        # The table of positions is not stored: the graph computes it, and so does what it is compared with.
        computed = shallow_copy(mmdit.transformer)
        computed.pos_embed = graphs[0].lowered.positions
        same = _begin(_view(mmdit, computed), stored, states)
        for run in runs:
            run.begin(states, same, reference)
        on_block()
        for index, name in enumerate(graphs[0].lowered.blocks):
            block = mmdit.blocks[index]
            with _loaded(block, stored, name) as loaded:
                same = [mmdit.apply(loaded, streams) for streams in reference]
            with _loaded(block, weights, name) as loaded:
                following = [mmdit.apply(loaded, streams) for streams in reference]
            for run in runs:
                run.apply(index, reference, same, following)
            reference = following
            on_block()
        velocities = _end(mmdit, weights, reference)
        exact = _end(mmdit, stored, reference)
        for run in runs:
            run.end(states, reference, exact, velocities)
        on_block()
    return [row for run in runs for row in run.rows], [row for run in runs for row in run.blocks]


def loud_blocks(
    mmdit: MMDiT, weights: Mapping[str, torch.Tensor], states: Sequence[State], on_block: Callable[[], None]
) -> frozenset[str]:
    """Names of the blocks in which something comes near the end of float16's range.

    They have to be computed in float32: what is a half of it on a few states is beyond it on others.
    """
    names = {id(module): name for name, module in mmdit.transformer.named_modules()}
    found = set()
    with torch.no_grad():
        given = _begin(mmdit, weights, states)
        for block in mmdit.blocks:
            name, largest = names[id(block)], [0.0]

            def hear(module: nn.Module, inputs: Any, output: Any, largest: list[float] = largest) -> None:
                outputs = output if isinstance(output, tuple) else (output,)
                largest += [float(item.abs().max()) for item in outputs if isinstance(item, torch.Tensor)]

            with _loaded(block, weights, name) as loaded:
                for module in loaded.modules():
                    module.register_forward_hook(hear)
                given = [mmdit.apply(loaded, streams) for streams in given]
            if max(largest) > _LOUD:
                found.add(name)
            on_block()
    return frozenset(found)


@contextmanager
def streamed(module: nn.Module, weights: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Let a module on the meta device run, each of its layers reading its weights when its turn comes."""
    if not any(tensor.is_meta for tensor in module.state_dict().values()):
        yield
        return
    cpu_offload(module, torch.device("cpu"), state_dict=weights)
    try:
        yield
    finally:
        remove_hook_from_module(module, recurse=True)
        for each in module.modules():
            vars(each).pop("forward", None)  # its class's own, which accelerate leaves in its place


def encode_prompts(model: Model, prompts: list[str]) -> TextStates:
    """What the text encoders make of prompts, in float32, one of their layers in memory at a time."""
    with ExitStack() as stack:
        for name, part in model.pipeline.components.items():
            if name.startswith("text_encoder") and part is not None:
                stack.enter_context(streamed(part, model.weights(name)))
        text = model.mmdit.encode_prompts(
            model.pipeline, prompts, model.defaults.max_sequence_length, torch.device("cpu")
        )
    return TextStates(tokens_BTJ=text.tokens_BTJ.float(), pooled_BP=text.pooled_BP.float())


class _Run:
    """One graph on its way through the blocks."""

    def __init__(self, graph: CheckedGraph, directory: Path, limit: float | None) -> None:
        self.rows: list[ParityRow] = []
        self._limit = LIMITS[graph.weights, graph.activations] if limit is None else limit
        self.blocks: list[BlockRow] = []
        self._graph, self._directory = graph, directory
        self._chained: list[Streams] = []

    def begin(self, states: Sequence[State], same: Sequence[Streams], exact: Sequence[Streams]) -> None:
        """From the inputs to the first block."""
        lowered = self._graph.lowered
        session = self._session(_names(lowered.graph.graph.inputs), _given(lowered, 0))
        self._chained = [self._streams(session, _inputs(state), state) for state in states]
        self._note("embedders", self._chained, same, exact)

    def apply(
        self, index: int, given: Sequence[Streams], same: Sequence[Streams], exact: Sequence[Streams]
    ) -> None:
        """Through a block: once from exact streams, once from what this graph made of them so far."""
        lowered = self._graph.lowered
        after = lowered.boundaries[index + 1]
        session = self._session(
            _given(lowered, index), [name for name in (after.image, after.text) if name is not None]
        )
        found = [self._apply(session, index, streams) for streams in given]
        self._chained = [self._apply(session, index, streams) for streams in self._chained]
        self._note(lowered.blocks[index], found, same, exact)

    def end(
        self,
        states: Sequence[State],
        given: Sequence[Streams],
        same: Sequence[torch.Tensor],
        exact: Sequence[torch.Tensor],
    ) -> None:
        """From the last block to the velocity.

        Raises:
            ExportError: The whole of it is too far from what torch makes of the weights as they were.
        """
        lowered = self._graph.lowered
        # The inputs as well, because it may take a size of any of them.
        names = [lowered.boundaries[-1].image, lowered.shared[0]]
        session = self._session([*names, *_names(lowered.graph.graph.inputs)], ["velocity"])
        found = [_velocity(session, names, *pair) for pair in zip(given, states, strict=True)]
        self._note("head", found, same, exact)
        for state, streams, velocity in zip(states, self._chained, exact, strict=True):
            row = ParityRow(
                stage="transformer",
                graph=self._graph.name,
                weights=self._graph.weights,
                activations=self._graph.activations,
                output="velocity",
                shape=state.shape,
                limit=self._limit,
                **compare(velocity.numpy(), _velocity(session, names, streams, state).numpy()),
            )
            worst = max(self.blocks, key=lambda block: block.rounding_error)
            require_close(row, f"Of its parts {worst.block} differs most, by {worst.rounding_error:.3g}.")
            self.rows.append(row)

    def _note(self, block: str, found: Sequence[Any], same: Sequence[Any], exact: Sequence[Any]) -> None:
        graph_error = max(_distance(*pair) for pair in zip(found, same, strict=True))
        rounding_error = max(_distance(*pair) for pair in zip(found, exact, strict=True))
        limit = GRAPH_LIMITS[self._graph.activations]
        if not graph_error <= limit:
            raise ExportError(
                f"The exported transformer ({self._graph.name}) differs from the torch model with the same "
                f"weights in {block}: a relative error of {graph_error:.3g} where {limit:g} is accepted. "
                "Nothing was written; please report the model."
            )
        self.blocks.append(
            BlockRow(
                graph=self._graph.name,
                block=block,
                graph_error=graph_error,
                rounding_error=rounding_error,
            )
        )

    def _session(self, inputs: Sequence[str], outputs: Sequence[str]) -> onnxruntime.InferenceSession:
        """Of the part of the graph between some values."""
        return part_session(self._graph.lowered.graph, inputs, outputs, self._directory)

    def _streams(
        self, session: onnxruntime.InferenceSession, inputs: dict[str, Array], state: State
    ) -> Streams:
        image, text, conditioning, *waves = _run(session, inputs)
        rotary = (torch.cat(waves[:2]), torch.cat(waves[2:])) if waves else None
        height, width = state.latents_BCHW.shape[2:]
        return Streams(
            image_BND=image,
            text_BTD=text,
            conditioning_BD=conditioning,
            rotary=rotary,
            size=(height, width),
        )

    def _apply(self, session: onnxruntime.InferenceSession, index: int, streams: Streams) -> Streams:
        lowered = self._graph.lowered
        assert streams.text_BTD is not None
        tokens = streams.text_BTD.shape[1]
        waves = [part for wave in streams.rotary or () for part in (wave[:tokens], wave[tokens:])]
        values = [streams.image_BND, streams.text_BTD, streams.conditioning_BD, *waves]
        feeds = {name: value.numpy() for name, value in zip(_given(lowered, index), values, strict=True)}
        image, *text = _run(session, feeds)
        return replace(streams, image_BND=image, text_BTD=text[0] if text else None)


def _velocity(
    session: onnxruntime.InferenceSession, names: list[str], streams: Streams, state: State
) -> torch.Tensor:
    values = (streams.image_BND, streams.conditioning_BD)
    feeds = {name: value.numpy() for name, value in zip(names, values, strict=True)}
    (velocity,) = _run(session, feeds | _inputs(state))
    return velocity


def _begin(mmdit: MMDiT, weights: Mapping[str, torch.Tensor], states: Sequence[State]) -> list[Streams]:
    with _with_children(mmdit, mmdit.embedders, weights) as view:
        return [view.begin(state.latents_BCHW, state.timesteps_B, state.text) for state in states]


def _end(mmdit: MMDiT, weights: Mapping[str, torch.Tensor], streams: Sequence[Streams]) -> list[torch.Tensor]:
    with _with_children(mmdit, mmdit.head, weights) as view:
        return [view.end(each) for each in streams]


@contextmanager
def _with_children(
    mmdit: MMDiT, names: Sequence[str], weights: Mapping[str, torch.Tensor]
) -> Iterator[MMDiT]:
    """A view in which some children of the transformer have their weights, whatever the others have."""
    transformer = shallow_copy(mmdit.transformer)
    with ExitStack() as stack:
        for name in names:
            loaded = stack.enter_context(_loaded(getattr(transformer, name), weights, name))
            setattr(transformer, name, loaded)
        yield _view(mmdit, transformer)


def _view(mmdit: MMDiT, transformer: nn.Module) -> MMDiT:
    return type(mmdit)(
        transformer, guidance_scale=mmdit.guidance_scale, vae_scale_factor=mmdit.vae_scale_factor
    )


@contextmanager
def _loaded(module: nn.Module, weights: Mapping[str, torch.Tensor], name: str) -> Iterator[nn.Module]:
    """A copy with its weights in float32, and without them again afterwards."""
    copied = copy.deepcopy(module)
    values = {
        key: tensor
        if not tensor.is_meta and f"{name}.{key}" not in weights
        else weights[f"{name}.{key}"].float()
        for key, tensor in module.state_dict().items()
    }
    copied.load_state_dict(values, assign=True)
    del values
    yield copied.eval()
    # Modules refer to one another in circles, which Python lets go of whenever it likes.
    copied.to("meta")
    give_back()


def _given(lowered: LoweredTransformer, index: int) -> list[str]:
    """Names of what a block is given."""
    boundary = lowered.boundaries[index]
    assert boundary.text is not None
    return [boundary.image, boundary.text, *lowered.shared]


def _names(values: Sequence[ir.Value]) -> list[str]:
    return [str(value.name) for value in values]


def _inputs(state: State) -> dict[str, Array]:
    guidance = {} if state.guidance_B is None else {"guidance": state.guidance_B.numpy()}
    return guidance | {
        "hidden_states": state.latents_BCHW.numpy(),
        "timestep": state.timesteps_B.numpy(),
        "encoder_hidden_states": state.text.tokens_BTJ.numpy(),
        "pooled_projections": state.text.pooled_BP.numpy(),
    }


def _run(session: onnxruntime.InferenceSession, feeds: dict[str, Array]) -> list[torch.Tensor]:
    """Outputs in float32, from inputs in the graph's own types and no others than it has."""
    types = {
        value.name: np.float16 if "float16" in value.type else np.float32 for value in session.get_inputs()
    }
    outputs = session.run(None, {name: feeds[name].astype(kind, copy=False) for name, kind in types.items()})
    return [torch.from_numpy(output.astype(np.float32, copy=False)) for output in outputs]


def _distance(found: Any, expected: Any) -> float:
    """The L2 norm of a difference by that of what was expected; infinite where something is not finite."""
    if isinstance(found, torch.Tensor):
        pairs = [(found, expected)]
    else:
        pairs = [(found.image_BND, expected.image_BND)]
        if expected.text_BTD is not None:
            pairs.append((found.text_BTD, expected.text_BTD))
    errors = [compare(right.numpy(), left.numpy()) for left, right in pairs]
    if any(error["num_non_finite"] for error in errors):
        return float("inf")
    return max(float(error["relative_error"]) for error in errors)
