"""The view of an MMDiT that every stage uses.

Shapes are written B batch, C channels, H and W latent height and width, N image tokens, T text tokens,
J joint width, P pooled width, D inner width.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from torch import nn

from toolchain.errors import ToolchainError
from toolchain.families.blocks import SparseBlock, components_of
from toolchain.geometry import Block, Geometry, Semantics, Unit, components_removed

REMOVED_KEY, SEMANTICS_KEY = "removed_components", "removal_semantics"
"""What the config of a transformer without some components holds beside its class's own keys."""

_ModuleT = TypeVar("_ModuleT", bound=nn.Module)


@dataclass(frozen=True, kw_only=True)
class TextStates:
    """What the text encoders make of a list of prompts."""

    tokens_BTJ: torch.Tensor
    pooled_BP: torch.Tensor

    def index(self, rows: slice | torch.Tensor) -> TextStates:
        """Those of some prompts."""
        return TextStates(tokens_BTJ=self.tokens_BTJ[rows], pooled_BP=self.pooled_BP[rows])

    def to(self, where: torch.dtype | torch.device) -> TextStates:
        """The same in another precision, or on a device."""
        return TextStates(tokens_BTJ=self.tokens_BTJ.to(where), pooled_BP=self.pooled_BP.to(where))


@dataclass(frozen=True, kw_only=True)
class Streams:
    """All that flows from one block to the next."""

    image_BND: torch.Tensor
    text_BTD: torch.Tensor | None
    """None behind a block that ends the text stream, as the last one of Stable Diffusion 3."""
    conditioning_BD: torch.Tensor
    rotary: tuple[torch.Tensor, torch.Tensor] | None
    size: tuple[int, int]
    """H and W."""


class MMDiT(ABC):
    """What every stage sees of a transformer, which it wraps and does not own.

    Args:
        transformer: Of diffusers, or one of ours without some of its components.
        guidance_scale: For families that embed it.
        vae_scale_factor: Pixels a latent is wide; geometries are of pictures.
    """

    family: ClassVar[str]
    classifier_free: ClassVar[bool]
    """Whether guidance compares two passes, one of them with the empty prompt."""
    plain: ClassVar[Any]
    """The transformer's class in diffusers."""
    sparse: ClassVar[Any]
    """The class that takes its place where components are missing."""
    embedders: ClassVar[tuple[str, ...]]
    """Children of the transformer that run before the blocks."""
    head: ClassVar[tuple[str, ...]] = ("norm_out", "proj_out")
    """Those that run after them."""

    def __init__(self, transformer: nn.Module, *, guidance_scale: float, vae_scale_factor: int = 8) -> None:
        self.transformer: Any = transformer
        self.guidance_scale = guidance_scale
        self.vae_scale_factor = vae_scale_factor

    @property
    @abstractmethod
    def blocks(self) -> list[nn.Module]:
        """In the order they run."""

    @property
    @abstractmethod
    def latent_channels(self) -> int:
        """Of what the transformer takes and gives."""

    @property
    @abstractmethod
    def patch_size(self) -> int:
        """Latents on a side that make one image token."""

    @property
    @abstractmethod
    def max_latent_size(self) -> int:
        """Largest H and W whose positions the transformer knows."""

    @property
    def inner_width(self) -> int:
        """D."""
        config = self.transformer.config
        return int(config.num_attention_heads * config.attention_head_dim)

    @property
    def rotary_width(self) -> int:
        """Of the rotary embedding that blocks are given; 0 where they are given none."""
        return 0

    @property
    def embeds_guidance(self) -> bool:
        """Whether the guidance scale is one of the transformer's inputs."""
        return False

    @abstractmethod
    def begin(self, latents_BCHW: torch.Tensor, timesteps_B: torch.Tensor, text: TextStates) -> Streams:
        """What the first block is given, in the transformer's precision.

        Timesteps run from 0 (clean) to 1000 (noise).
        """

    @abstractmethod
    def apply(self, block: nn.Module, streams: Streams) -> Streams:
        """One block. It may be any module with its signature, so gradient checkpointing is the caller's."""

    @abstractmethod
    def end(self, streams: Streams) -> torch.Tensor:
        """The velocity [B, C, H, W] behind the last block."""

    @abstractmethod
    def computed_positions(self, weights: Mapping[str, torch.Tensor]) -> nn.Module:
        """What takes the place of the transformer's `pos_embed` in a graph for every size of picture.

        It computes in float32 with real numbers; its buffers are small and become constants of the graph.

        Args:
            weights: Tensors of the transformer, of which it may want its table.
        """

    @classmethod
    @abstractmethod
    def encode_prompts(
        cls,
        pipeline: DiffusionPipeline,
        prompts: list[str],
        max_sequence_length: int,
        device: torch.device | None = None,
    ) -> TextStates:
        """Encode prompts as the pipeline does for itself, on its device unless another is named."""

    @classmethod
    @abstractmethod
    def num_text_tokens(cls, pipeline: DiffusionPipeline, max_sequence_length: int) -> int:
        """How many tokens `encode_prompts` gives."""

    @abstractmethod
    def set_timesteps(
        self, scheduler: FlowMatchEulerDiscreteScheduler, num_inference_steps: int, height: int, width: int
    ) -> None:
        """Lay out the steps of sampling as the pipeline does for latents of this size."""

    @classmethod
    def usual_settings(cls, config: dict[str, Any]) -> dict[str, Any]:
        """Where a model that does not say how it wants to be run differs from `GenerationDefaults`.

        Args:
            config: Of its transformer.
        """
        return {}

    def pipeline_latents(self, latents_BCHW: torch.Tensor) -> torch.Tensor:
        """Latents as the pipeline takes them."""
        return latents_BCHW

    @abstractmethod
    def _block_geometry(self, block: nn.Module, image_tokens: int, text_tokens: int) -> Block: ...

    @abstractmethod
    def _other_flops(self, image_tokens: int, text_tokens: int) -> int: ...

    @abstractmethod
    def _modules_of(self, block: nn.Module, component: str) -> tuple[nn.Module | None, ...]:
        """The modules that make up a component, None in place of what is gone."""

    @abstractmethod
    def _thinned(self, block: nn.Module, removed: Collection[str], semantics: Semantics) -> nn.Module: ...

    @abstractmethod
    def _put_in_(self, transformer: Any, blocks: Sequence[tuple[int, nn.Module]]) -> None:
        """Give a transformer other blocks, each named with its number here, and note it in its config."""

    def _ended(self, block: nn.Module) -> nn.Module:
        """A block as it has to be when it comes last."""
        return block

    def velocity(
        self, latents_BCHW: torch.Tensor, timesteps_B: torch.Tensor, text: TextStates
    ) -> torch.Tensor:
        """The velocity [B, C, H, W], to the bit what the transformer's own forward pass gives."""
        streams = self.begin(latents_BCHW, timesteps_B, text)
        for block in self.blocks:
            streams = self.apply(block, streams)
        return self.end(streams)

    def geometry(self, *, height: int, width: int, text_tokens: int) -> Geometry:
        """The transformer as numbers, for pictures of a size in pixels; weights may be on the meta device."""
        side = self.vae_scale_factor * self.patch_size
        image_tokens = (height // side) * (width // side)
        return Geometry(
            family=self.family,
            blocks=tuple(self._block_geometry(block, image_tokens, text_tokens) for block in self.blocks),
            other_parameters=sum(
                item.numel() for unit in ("embedders", "head") for item in self.parameters_of(unit)
            ),
            other_flops=self._other_flops(image_tokens, text_tokens),
            height=height,
            width=width,
            text_tokens=text_tokens,
        )

    def sparse_block(self, index: int, removed: Collection[str], semantics: Semantics) -> nn.Module:
        """A block without some of its components, in the place of which it can be called.

        It shares the weights of what stays, except the rows and columns it cuts out of a weight.

        Raises:
            ToolchainError: There is no such component, or the block already lacks some in the other way.
        """
        gone = self._components_removed(Unit(index, name) for name in removed)
        return self._checked_thinned(self.blocks[index], gone.get(index, frozenset()), semantics)

    def without(self, removed: Iterable[Unit], semantics: Semantics) -> MMDiT:
        """A view of a new transformer that lacks some units, its blocks renumbered; it shares all it can.

        Raises:
            ToolchainError: There is no such unit, no block would be left, or blocks already lack
                components in the other way.
        """
        gone = self._components_removed(removed)
        kept = [
            index
            for index, block in enumerate(self.blocks)
            if gone.get(index) != frozenset(components_of(block))
        ]
        if not kept:
            raise ToolchainError("no block of the transformer would be left; remove fewer")
        blocks = [(index, self.blocks[index]) for index in kept]
        blocks[-1] = (kept[-1], self._ended(blocks[-1][1]))
        return self._with_blocks(
            [
                (index, self._checked_thinned(block, gone.get(index, frozenset()), semantics))
                for index, block in blocks
            ]
        )

    def with_removed(self, removed: Mapping[int, Collection[str]], semantics: Semantics) -> MMDiT:
        """`without` for components alone, where no block is taken to be gone; how a skeleton is made."""
        return self._with_blocks(
            [
                (index, self._checked_thinned(block, removed.get(index, ()), semantics))
                for index, block in enumerate(self.blocks)
            ]
        )

    def parameters_of(self, unit: str) -> list[nn.Parameter]:
        """Parameters of `embedders`, of `head`, of a block (`7`) or of a component (`7.ff`).

        Each parameter belongs to one of the embedders, the head and the components.

        Raises:
            ToolchainError: There is no such unit.
        """
        modules: Iterable[nn.Module | None]
        if unit in ("embedders", "head"):
            modules = [getattr(self.transformer, name) for name in getattr(self, unit)]
        else:
            parsed = Unit.parse(unit)
            # Those that are gone included, for something of them may be left: norm1 leaves its constant.
            known = [(*components_of(block), *getattr(block, "removed", ())) for block in self.blocks]
            components_removed(known, [parsed])
            names = known[parsed.block] if parsed.component is None else (parsed.component,)
            block = self.blocks[parsed.block]
            modules = [module for name in names for module in self._modules_of(block, name)]
        return [item for module in modules if module is not None for item in module.parameters()]

    def _components_removed(self, removed: Iterable[Unit]) -> dict[int, frozenset[str]]:
        return components_removed([components_of(block) for block in self.blocks], removed)

    def _checked_thinned(self, block: nn.Module, removed: Collection[str], semantics: Semantics) -> nn.Module:
        present = [name for name in removed if name in components_of(block)]
        if not present:
            return block
        # The config of a transformer has one word for all of its blocks.
        before = {item.semantics for item in self.blocks if isinstance(item, SparseBlock)}
        if before - {semantics}:
            raise ToolchainError(
                f"components of this model were removed with the semantics {', '.join(before)!r}, so no more "
                f"can be removed with {semantics!r}"
            )
        return self._thinned(block, present, semantics)

    def _with_blocks(self, blocks: Sequence[tuple[int, nn.Module]]) -> MMDiT:
        transformer = shallow_copy(self.transformer)
        thinned = {str(new): block for new, (_, block) in enumerate(blocks) if isinstance(block, SparseBlock)}
        if thinned:
            transformer.__class__ = self.sparse
        if isinstance(transformer, self.sparse):
            removed = {new: sorted(block.removed) for new, block in thinned.items()}
            semantics = next((block.semantics for block in thinned.values()), "zero")
            transformer.register_to_config(**{REMOVED_KEY: removed, SEMANTICS_KEY: semantics})
        self._put_in_(transformer, blocks)
        return type(self)(
            transformer, guidance_scale=self.guidance_scale, vae_scale_factor=self.vae_scale_factor
        )


class OpenedByOurselves:
    """Comes first among the bases of a transformer without some components.

    diffusers would fill in what is missing with random weights, were it to open one.
    """

    @classmethod
    def from_pretrained(cls, *_: Any, **__: Any) -> Any:
        """Refuse."""
        raise ToolchainError(
            f"{cls.__name__} lacks components that diffusers does not know how to leave out; open the "
            "directory of its pipeline with toolchain.families.open_model"
        )


def shallow_copy(module: _ModuleT) -> _ModuleT:
    """A module that shares parameters and children, and can be given others without a trace in the first."""
    new = copy.copy(module)
    for key, value in vars(new).items():
        if type(value) in (dict, OrderedDict):  # its parameters, buffers, children and hooks
            vars(new)[key] = value.copy()
    return new
