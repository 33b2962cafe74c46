"""Stable Diffusion 3 and 3.5: blocks of two streams, the last of which ends the text."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from diffusers.models.normalization import AdaLayerNormContinuous
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import calculate_shift
from torch import nn

from toolchain.errors import ToolchainError
from toolchain.families.blocks import (
    Modulation,
    SparseJointBlock,
    joint_geometry,
    linear_flops,
    pick_rows,
    rows_of,
)
from toolchain.families.mmdit import (
    MMDiT,
    OpenedByOurselves,
    Streams,
    TextStates,
    shallow_copy,
)
from toolchain.geometry import Block, Semantics


class SparseSD3Transformer2DModel(OpenedByOurselves, SD3Transformer2DModel):  # type: ignore[misc]
    """A transformer some of whose blocks lack components."""


class SparseSD3Block(SparseJointBlock):
    """Called as diffusers' transformer calls its own."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        temb: torch.Tensor,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Text and image behind the block."""
        return self.run(hidden_states, encoder_hidden_states, temb, **(joint_attention_kwargs or {}))


class ComputedPositions(nn.Module):
    """The patch embedding with the position table taken apart: one row of it and one column make it all.

    The table of SD3.5-Large holds 90 million numbers, a tenth of the model in 4 bits. As a table of sines and
    cosines it depends in one half of its width on the column alone and in the other on the row.

    Args:
        embed: Of diffusers; it may lie on the meta device.
        table_1SD: Its position table of S = size x size places.

    Raises:
        ToolchainError: The table is not of that kind.
    """

    def __init__(self, embed: Any, table_1SD: torch.Tensor) -> None:
        super().__init__()
        self.proj, self.patch_size, self.size = embed.proj, embed.patch_size, embed.pos_embed_max_size
        self.columns: torch.Tensor
        self.rows: torch.Tensor
        table = table_1SD.reshape(self.size, self.size, -1)
        half = table.shape[2] // 2
        columns, rows = table[0, :, :half], table[:, 0, half:]
        for row in range(self.size):  # row by row, for all of them at once would be a second table
            same = (table[row, :, :half] == columns).all() and (table[row, :, half:] == rows[row]).all()
            if not bool(same):
                raise ToolchainError(
                    "the position table of the transformer is not one of sines and cosines, and no other can "
                    f"be exported: its row {row} is not made of a half for the column and one for the row"
                )
        self.register_buffer("columns", columns.float().clone())
        self.register_buffer("rows", rows.float().clone())

    def forward(self, latents_BCHW: torch.Tensor) -> torch.Tensor:
        """Image tokens [B, N, D] at the centre of the table."""
        patches_BDHW = self.proj(latents_BCHW)
        height, width = (length // self.patch_size for length in latents_BCHW.shape[2:])
        places = torch.cat(
            [
                self._centre(self.columns, width)[None, :].expand(height, -1, -1),
                self._centre(self.rows, height)[:, None].expand(-1, width, -1),
            ],
            dim=2,
        )
        tokens_BND = patches_BDHW.flatten(2).transpose(1, 2)
        placed_BND: torch.Tensor = tokens_BND + places.reshape(1, height * width, -1).to(tokens_BND.dtype)
        return placed_BND

    def _centre(self, table: torch.Tensor, length: int) -> torch.Tensor:
        # As a graph, (size - length) // 2 would be wrong: the tracer rewrites it with a negative operand, and
        # ONNX divides towards zero where Python divides down.
        first = self.size - (self.size + length + 1) // 2
        return table.index_select(0, torch.arange(length, device=table.device) + first)


class SD3(MMDiT):
    """Stable Diffusion 3 and 3.5."""

    family = "sd3"
    classifier_free = True
    plain = SD3Transformer2DModel
    sparse = SparseSD3Transformer2DModel
    embedders = ("pos_embed", "time_text_embed", "context_embedder")

    @property
    def blocks(self) -> list[nn.Module]:
        """In the order they run."""
        return list(self.transformer.transformer_blocks)

    @property
    def latent_channels(self) -> int:
        """C."""
        return int(self.transformer.config.in_channels)

    @property
    def patch_size(self) -> int:
        """Latents on a side that make one image token."""
        return int(self.transformer.config.patch_size)

    @property
    def max_latent_size(self) -> int:
        """That of the position table; without one for several sizes, that of the only one."""
        config = self.transformer.config
        return int(config.pos_embed_max_size or config.sample_size // config.patch_size) * self.patch_size

    def begin(self, latents_BCHW: torch.Tensor, timesteps_B: torch.Tensor, text: TextStates) -> Streams:
        """What the first block is given."""
        transformer = self.transformer
        latents_BCHW, text = latents_BCHW.to(transformer.dtype), text.to(transformer.dtype)
        return Streams(
            image_BND=transformer.pos_embed(latents_BCHW).contiguous(),
            text_BTD=transformer.context_embedder(text.tokens_BTJ),
            conditioning_BD=transformer.time_text_embed(timesteps_B, text.pooled_BP),
            rotary=None,
            size=(latents_BCHW.shape[2], latents_BCHW.shape[3]),
        )

    def apply(self, block: nn.Module, streams: Streams) -> Streams:
        """One block."""
        text, image = block(
            hidden_states=streams.image_BND,
            encoder_hidden_states=streams.text_BTD,
            temb=streams.conditioning_BD,
        )
        return replace(streams, image_BND=image, text_BTD=text)

    def end(self, streams: Streams) -> torch.Tensor:
        """The velocity [B, C, H, W]."""
        transformer = self.transformer
        patches = transformer.proj_out(transformer.norm_out(streams.image_BND, streams.conditioning_BD))
        side, channels = self.patch_size, transformer.out_channels
        rows, columns = (length // side for length in streams.size)
        patches = patches.reshape(patches.shape[0], rows, columns, side, side, channels)
        patches = torch.einsum("nhwpqc->nchpwq", patches)
        return patches.reshape(patches.shape[0], channels, rows * side, columns * side)

    def computed_positions(self, weights: Mapping[str, torch.Tensor]) -> nn.Module:
        """The patch embedding, its table in two parts.

        Raises:
            ToolchainError: The table fits one size of picture only, or is not one of sines and cosines.
        """
        embed = self.transformer.pos_embed
        if not embed.pos_embed_max_size:
            raise ToolchainError(
                "the transformer has no pos_embed_max_size, so its position table fits one picture size "
                "only; set pos_embed_max_size in the transformer's config.json"
            )
        return ComputedPositions(embed, weights["pos_embed.pos_embed"])

    @classmethod
    def encode_prompts(
        cls,
        pipeline: StableDiffusion3Pipeline,
        prompts: list[str],
        max_sequence_length: int,
        device: torch.device | None = None,
    ) -> TextStates:
        """Encode prompts as the pipeline does for itself, on its device unless another is named."""
        with torch.no_grad():
            tokens, _, pooled, _ = pipeline.encode_prompt(
                prompt=prompts,
                prompt_2=None,
                prompt_3=None,
                do_classifier_free_guidance=False,
                device=device,
                max_sequence_length=max_sequence_length,
            )
        return TextStates(tokens_BTJ=tokens, pooled_BP=pooled)

    @classmethod
    def num_text_tokens(cls, pipeline: StableDiffusion3Pipeline, max_sequence_length: int) -> int:
        """CLIP's, then T5's, which are zeros where there is no T5."""
        return int(pipeline.tokenizer_max_length) + max_sequence_length

    def set_timesteps(
        self, scheduler: FlowMatchEulerDiscreteScheduler, num_inference_steps: int, height: int, width: int
    ) -> None:
        """Lay out the steps as the pipeline does, shifted by size only where the scheduler says so."""
        config, mu = scheduler.config, None
        if config.get("use_dynamic_shifting"):
            mu = calculate_shift(
                (height // self.patch_size) * (width // self.patch_size),
                config.get("base_image_seq_len", 256),
                config.get("max_image_seq_len", 4096),
                config.get("base_shift", 0.5),
                config.get("max_shift", 1.16),
            )
        scheduler.set_timesteps(num_inference_steps, mu=mu)

    def _block_geometry(self, block: nn.Module, image_tokens: int, text_tokens: int) -> Block:
        return joint_geometry(block, image_tokens, text_tokens, text_may_end=True)

    def _other_flops(self, image_tokens: int, text_tokens: int) -> int:
        own = self.transformer
        return (
            linear_flops([own.pos_embed, own.proj_out], image_tokens)
            + linear_flops([own.context_embedder], text_tokens)
            + linear_flops([own.time_text_embed, own.norm_out], 1)
        )

    def _modules_of(self, block: nn.Module, component: str) -> tuple[nn.Module | None, ...]:
        return (getattr(block, component),)

    def _thinned(self, block: nn.Module, removed: Collection[str], semantics: Semantics) -> nn.Module:
        return SparseSD3Block(block, removed, semantics)

    def _ended(self, block: Any) -> Any:
        """The block without what only makes the text for a next one, as diffusers builds the last."""
        if block.context_pre_only:
            return block
        new: Any = shallow_copy(block)
        new.context_pre_only = True
        new.ff_context = None
        if getattr(new.attn, "to_add_out", None) is not None:
            new.attn = shallow_copy(new.attn)
            new.attn.context_pre_only = True
            new.attn.to_add_out = None
        norm, rows = block.norm1_context, ("scale_msa", "shift_msa")
        if isinstance(block, SparseJointBlock):
            new.components = tuple(name for name in block.components if name != "ff_context")
            read = block.attn is not None and norm is not None
            new.norm1_context = Modulation(rows, pick_rows(norm.linear, norm.rows, rows)) if read else None
            return new
        new.norm2_context = None
        width = norm.linear.in_features
        with torch.device("meta"):
            new.norm1_context = AdaLayerNormContinuous(width, width, elementwise_affine=False, eps=1e-6)
        new.norm1_context.linear = pick_rows(norm.linear, rows_of(norm), rows)
        return new

    def _put_in_(self, transformer: Any, blocks: Sequence[tuple[int, nn.Module]]) -> None:
        dual = transformer.config.dual_attention_layers
        transformer.transformer_blocks = nn.ModuleList(block for _, block in blocks)
        transformer.register_to_config(
            num_layers=len(blocks),
            dual_attention_layers=tuple(new for new, (old, _) in enumerate(blocks) if old in dual),
        )
