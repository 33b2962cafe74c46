"""FLUX.1: blocks of two streams, then blocks of one, and latents packed two by two."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from torch import nn

from toolchain.families.blocks import (
    PassThrough,
    SparseBlock,
    SparseJointBlock,
    count,
    finished,
    gated,
    joint_geometry,
    linear_flops,
    linear_from,
    modulate,
    modulation,
    modulation_parts,
    part,
    rows_of,
)
from toolchain.families.mmdit import (
    MMDiT,
    OpenedByOurselves,
    Streams,
    TextStates,
)
from toolchain.geometry import Block, Semantics

Rotary = tuple[torch.Tensor, torch.Tensor]

_PACKED = 2
"""Latents on a side of an image token."""


class SparseFluxTransformer2DModel(OpenedByOurselves, FluxTransformer2DModel):  # type: ignore[misc]
    """A transformer some of whose blocks lack components."""


class SparseFluxBlock(SparseJointBlock):
    """Called as diffusers' transformer calls its own."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        temb: torch.Tensor,
        image_rotary_emb: Rotary | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Text and image behind the block."""
        text, image = self.run(
            hidden_states,
            encoder_hidden_states,
            temb,
            image_rotary_emb=image_rotary_emb,
            **(joint_attention_kwargs or {}),
        )
        return None if text is None else _within_range(text), image


class SparseFluxSingleBlock(SparseBlock):
    """A block of one stream without some of its components; attention and MLP share the last projection."""

    def __init__(self, block: Any, removed: Collection[str], semantics: Semantics) -> None:
        super().__init__(block, removed, semantics)
        self.act_mlp = nn.GELU(approximate="tanh")
        keeps_attn, keeps_mlp = "attn" not in removed, "mlp" not in removed
        self.attn: nn.Module | None = block.attn if keeps_attn else None
        self.proj_mlp: nn.Module | None = block.proj_mlp if keeps_mlp else None
        self.proj_out: nn.Module | None = block.proj_out
        if semantics == "identity":
            self.attn = self.attn or PassThrough()
            self.proj_out = block.proj_out if keeps_mlp else None
        elif self.attn is None and self.proj_mlp is None:
            self.proj_out = None
        elif not keeps_attn:
            self.proj_out = _columns(block.proj_out, slice(-block.proj_mlp.out_features, None))
        elif not keeps_mlp:
            self.proj_out = _columns(block.proj_out, slice(-block.proj_mlp.out_features))
        read = rows_of(block.norm) if self.attn is not None or self.proj_mlp is not None else ()
        gone = "norm" in removed
        self.norm = None if gone and semantics == "identity" else modulation(block.norm, read, constant=gone)

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        temb: torch.Tensor,
        image_rotary_emb: Rotary | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Text and image behind the block."""
        both = torch.cat([encoder_hidden_states, hidden_states], dim=1)
        values = {} if self.norm is None else self.norm(temb)
        inner, outputs = modulate(both, values, "msa"), []
        if self.attn is not None:
            kwargs = joint_attention_kwargs or {}
            outputs.append(self.attn(hidden_states=inner, image_rotary_emb=image_rotary_emb, **kwargs))
        if self.proj_mlp is not None:
            outputs.append(self.act_mlp(self.proj_mlp(inner)))
        if outputs:
            output = torch.cat(outputs, dim=2)
            output = output if self.proj_out is None else self.proj_out(output)
            both = _within_range(both + gated(output, values, "msa"))
        text_tokens = encoder_hidden_states.shape[1]
        return both[:, :text_tokens], both[:, text_tokens:]


class RotaryPositions(nn.Module):
    """Cosines and sines of the rotary embedding in float32, which diffusers computes in float64.

    Args:
        embed: Of diffusers.
    """

    def __init__(self, embed: Any) -> None:
        super().__init__()
        self.axes = [size // 2 for size in embed.axes_dim]
        self.frequencies: torch.Tensor
        powers = torch.cat([torch.arange(0, size, 2, dtype=torch.float64) / size for size in embed.axes_dim])
        self.register_buffer("frequencies", (1.0 / embed.theta**powers).float())

    def forward(self, places: torch.Tensor) -> Rotary:
        """Of tokens at places [tokens, axes]: two of [tokens, 2 x frequencies]."""
        along = [places[:, axis, None].expand(-1, size) for axis, size in enumerate(self.axes)]
        angles = torch.cat(along, dim=1).float() * self.frequencies
        return angles.cos().repeat_interleave(2, dim=1), angles.sin().repeat_interleave(2, dim=1)


class Flux(MMDiT):
    """FLUX.1; guidance is embedded by `dev` and unknown to `schnell`."""

    family = "flux"
    classifier_free = False
    plain = FluxTransformer2DModel
    sparse = SparseFluxTransformer2DModel
    embedders = ("x_embedder", "time_text_embed", "context_embedder", "pos_embed")

    @classmethod
    def usual_settings(cls, config: dict[str, Any]) -> dict[str, Any]:
        """Without an embedded guidance it is distilled to few steps, as schnell."""
        if config.get("guidance_embeds"):
            return {"num_inference_steps": 28, "guidance_scale": 3.5, "max_sequence_length": 512}
        return {"num_inference_steps": 4, "guidance_scale": 0.0, "max_sequence_length": 512}

    @property
    def blocks(self) -> list[nn.Module]:
        """Those of two streams, then those of one."""
        return [*self.transformer.transformer_blocks, *self.transformer.single_transformer_blocks]

    @property
    def latent_channels(self) -> int:
        """C."""
        return int(self.transformer.config.in_channels) // _PACKED**2

    @property
    def patch_size(self) -> int:
        """Latents on a side that make one image token."""
        return _PACKED

    @property
    def max_latent_size(self) -> int:
        """Positions are computed; beyond this, 4 megapixels and more on a side, nobody has gone."""
        return 512

    @property
    def rotary_width(self) -> int:
        """That of an attention head."""
        return int(self.transformer.config.attention_head_dim)

    @property
    def embeds_guidance(self) -> bool:
        """True of `dev`."""
        return bool(self.transformer.config.guidance_embeds)

    def begin(self, latents_BCHW: torch.Tensor, timesteps_B: torch.Tensor, text: TextStates) -> Streams:
        """What the first block is given."""
        transformer = self.transformer
        latents_BCHW, text = latents_BCHW.to(transformer.dtype), text.to(transformer.dtype)
        image = transformer.x_embedder(self.pipeline_latents(latents_BCHW))
        # Times go by way of 0 to 1 because diffusers' do, which matters in 16 bits.
        times = [(timesteps_B.to(latents_BCHW.dtype) / 1000).to(image.dtype) * 1000]
        if self.embeds_guidance:
            scale = torch.as_tensor(self.guidance_scale, device=image.device).expand(image.shape[0])
            times.append(scale.to(image.dtype) * 1000)
        height, width = latents_BCHW.shape[2:]
        rows, columns = torch.meshgrid(
            torch.arange(height // _PACKED, device=image.device),
            torch.arange(width // _PACKED, device=image.device),
            indexing="ij",
        )
        places = torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).flatten(0, 1)
        text_places = places.new_zeros(text.tokens_BTJ.shape[1], 3)
        return Streams(
            image_BND=image,
            text_BTD=transformer.context_embedder(text.tokens_BTJ),
            conditioning_BD=transformer.time_text_embed(*times, text.pooled_BP),
            rotary=transformer.pos_embed(torch.cat([text_places, places])),
            size=(height, width),
        )

    def apply(self, block: nn.Module, streams: Streams) -> Streams:
        """One block."""
        text, image = block(
            hidden_states=streams.image_BND,
            encoder_hidden_states=streams.text_BTD,
            temb=streams.conditioning_BD,
            image_rotary_emb=streams.rotary,
        )
        return replace(streams, image_BND=image, text_BTD=text)

    def end(self, streams: Streams) -> torch.Tensor:
        """The velocity [B, C, H, W]."""
        transformer = self.transformer
        patches = transformer.proj_out(transformer.norm_out(streams.image_BND, streams.conditioning_BD))
        height, width = streams.size
        rows, columns = height // _PACKED, width // _PACKED
        patches = patches.reshape(patches.shape[0], rows, columns, -1, _PACKED, _PACKED)
        latents: torch.Tensor = patches.permute(0, 3, 1, 4, 2, 5).reshape(patches.shape[0], -1, height, width)
        return latents

    def computed_positions(self, weights: Mapping[str, torch.Tensor]) -> nn.Module:
        """Rotary embeddings of image and text tokens."""
        return RotaryPositions(self.transformer.pos_embed)

    @classmethod
    def encode_prompts(
        cls,
        pipeline: FluxPipeline,
        prompts: list[str],
        max_sequence_length: int,
        device: torch.device | None = None,
    ) -> TextStates:
        """Encode prompts as the pipeline does for itself, on its device unless another is named."""
        with torch.no_grad():
            tokens, pooled, _ = pipeline.encode_prompt(
                prompt=prompts, prompt_2=None, device=device, max_sequence_length=max_sequence_length
            )
        return TextStates(tokens_BTJ=tokens, pooled_BP=pooled)

    @classmethod
    def num_text_tokens(cls, pipeline: FluxPipeline, max_sequence_length: int) -> int:
        """T5's alone; CLIP gives the pooled text."""
        return max_sequence_length

    def set_timesteps(
        self, scheduler: FlowMatchEulerDiscreteScheduler, num_inference_steps: int, height: int, width: int
    ) -> None:
        """Lay out the steps as the pipeline does, shifted by size."""
        config = scheduler.config
        sigmas = np.linspace(1.0, 1 / num_inference_steps, num_inference_steps)
        mu = calculate_shift(
            (height // _PACKED) * (width // _PACKED),
            config.get("base_image_seq_len", 256),
            config.get("max_image_seq_len", 4096),
            config.get("base_shift", 0.5),
            config.get("max_shift", 1.15),
        )
        if config.get("use_flow_sigmas"):
            scheduler.set_timesteps(num_inference_steps, mu=mu)
        else:
            scheduler.set_timesteps(sigmas=sigmas, mu=mu)

    def pipeline_latents(self, latents_BCHW: torch.Tensor) -> torch.Tensor:
        """Latents packed into image tokens [B, N, 4C]."""
        packed: torch.Tensor = FluxPipeline._pack_latents(latents_BCHW.contiguous(), *latents_BCHW.shape)
        return packed

    def _block_geometry(self, block: nn.Module, image_tokens: int, text_tokens: int) -> Block:
        if _is_single(block):
            return _single_geometry(block, image_tokens + text_tokens)
        return joint_geometry(block, image_tokens, text_tokens, text_may_end=False)

    def _other_flops(self, image_tokens: int, text_tokens: int) -> int:
        own = self.transformer
        return (
            linear_flops([own.x_embedder, own.proj_out], image_tokens)
            + linear_flops([own.context_embedder], text_tokens)
            + linear_flops([own.time_text_embed, own.norm_out], 1)
        )

    def _modules_of(self, block: Any, component: str) -> tuple[nn.Module | None, ...]:
        if component == "mlp":
            return (block.proj_mlp, None if block.proj_mlp is None else block.proj_out)
        if component == "attn" and _is_single(block) and block.proj_mlp is None:
            return (block.attn, block.proj_out)
        return (getattr(block, component),)

    def _thinned(self, block: nn.Module, removed: Collection[str], semantics: Semantics) -> nn.Module:
        kind = SparseFluxSingleBlock if _is_single(block) else SparseFluxBlock
        return kind(block, removed, semantics)

    def _put_in_(self, transformer: Any, blocks: Sequence[tuple[int, nn.Module]]) -> None:
        double = nn.ModuleList(block for _, block in blocks if not _is_single(block))
        single = nn.ModuleList(block for _, block in blocks if _is_single(block))
        transformer.transformer_blocks, transformer.single_transformer_blocks = double, single
        transformer.register_to_config(num_layers=len(double), num_single_layers=len(single))


def _single_geometry(block: Any, tokens: int) -> Block:
    parts = modulation_parts("norm", block.norm, {"msa": ("attn", "mlp")})
    mlp_columns = 0
    if (mlp := block.proj_mlp) is not None:
        mlp_columns = mlp.out_features
        flops = linear_flops([mlp], tokens)
        parts.append(part("proj_mlp", parameters=count(mlp), flops=flops, gone_with=("mlp",)))
    if block.attn is not None and not isinstance(block.attn, PassThrough):
        flops = linear_flops([block.attn], tokens) + 4 * tokens**2 * block.attn.to_q.out_features
        parts.append(part("attn", parameters=count(block.attn), flops=flops, gone_with=("attn",)))
    if (out := block.proj_out) is not None:
        for name, columns in (("attn", out.in_features - mlp_columns), ("mlp", mlp_columns)):
            entries = columns * out.out_features
            parts.append(
                part(
                    f"proj_out.{name}",
                    parameters=entries,
                    flops=2 * tokens * entries,
                    zero=[(name,)],
                    identity=[("mlp",)],
                )
            )
        width = out.out_features
        parts.append(part("proj_out.bias", parameters=width, zero=[("attn", "mlp")], identity=[("mlp",)]))
    return finished(block, "single", parts)


def _is_single(block: nn.Module) -> bool:
    return hasattr(block, "proj_mlp")


def _columns(linear: Any, columns: slice) -> nn.Linear:
    weight = linear.weight.detach()[:, columns].clone()
    return linear_from(nn.Parameter(weight, requires_grad=linear.weight.requires_grad), linear.bias)


def _within_range(hidden: torch.Tensor) -> torch.Tensor:
    return hidden.clip(-65504, 65504) if hidden.dtype == torch.float16 else hidden
