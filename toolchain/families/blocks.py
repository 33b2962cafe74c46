"""What a block lacks and what it weighs: blocks without some of their components, and blocks as numbers.

Shapes are written B batch, N image tokens, T text tokens, D inner width, R rows of a modulation.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from diffusers.models.normalization import (
    AdaLayerNormContinuous,
    AdaLayerNormZero,
    AdaLayerNormZeroSingle,
    SD35AdaLayerNormZeroX,
)
from torch import nn
from torch.nn import functional as F

from toolchain.geometry import Block, Part, Semantics


class SparseBlock(nn.Module):
    """A block without some of its components.

    Args:
        block: Of diffusers, or one of these.
        removed: Components it has.
        semantics: What they leave behind.
    """

    def __init__(self, block: nn.Module, removed: Collection[str], semantics: Semantics) -> None:
        super().__init__()
        self.semantics = semantics
        self.components = tuple(name for name in components_of(block) if name not in removed)
        self.removed = frozenset(removed) | getattr(block, "removed", frozenset())


class PassThrough(nn.Module):
    """Stands, under `identity`, where an attention or a feed-forward was."""

    def forward(
        self, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor | None = None, **_: Any
    ) -> Any:
        """Give what was given, as an attention does over one or both streams."""
        if encoder_hidden_states is None:
            return hidden_states
        return hidden_states, encoder_hidden_states


class Constant(nn.Module):
    """What is left of a linear without its weight."""

    def __init__(self, bias: nn.Parameter) -> None:
        super().__init__()
        self.bias = bias

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """The bias alone, in a batch of one."""
        return self.bias[None].to(inputs.dtype)


# Rows of the linears that make shifts, scales and gates from the conditioning, in diffusers' order.
_TRIPLE = ("shift_msa", "scale_msa", "gate_msa")
_ROWS: dict[Any, tuple[str, ...]] = {
    AdaLayerNormZero: (*_TRIPLE, "shift_mlp", "scale_mlp", "gate_mlp"),
    SD35AdaLayerNormZeroX: (
        *_TRIPLE,
        *("shift_mlp", "scale_mlp", "gate_mlp"),
        *("shift_msa2", "scale_msa2", "gate_msa2"),
    ),
    AdaLayerNormContinuous: ("scale_msa", "shift_msa"),
    AdaLayerNormZeroSingle: _TRIPLE,
}


class Modulation(nn.Module):
    """An AdaLN that makes only the shifts, scales and gates that something reads."""

    def __init__(self, rows: tuple[str, ...], linear: nn.Module) -> None:
        super().__init__()
        self.rows = rows
        self.linear = linear

    def forward(self, conditioning_BD: torch.Tensor) -> dict[str, torch.Tensor]:
        """Shifts, scales and gates [B or 1, 1, D] by name."""
        values_BR = self.linear(F.silu(conditioning_BD))
        return dict(zip(self.rows, values_BR[:, None].chunk(len(self.rows), dim=-1), strict=True))


def rows_of(norm: nn.Module | None) -> tuple[str, ...]:
    """Names of the rows of an AdaLN of diffusers or of ours."""
    if norm is None:
        return ()
    return norm.rows if isinstance(norm, Modulation) else _ROWS[type(norm)]


def modulation(norm: nn.Module | None, rows: Collection[str], *, constant: bool) -> Modulation | None:
    """An AdaLN with some of its rows in their order, as constants where its weight is to go.

    None if there is none to keep.
    """
    names = rows_of(norm)
    live = tuple(name for name in names if name in rows)
    if norm is None or not live:
        return None
    linear: Any = norm.linear
    if live != names:
        linear = pick_rows(linear, names, live)
    return Modulation(live, Constant(linear.bias) if constant else linear)


def pick_rows(linear: Any, names: tuple[str, ...], rows: tuple[str, ...]) -> nn.Module:
    """A linear with copies of some groups of its rows, in the order given."""

    def pick(tensor: torch.Tensor) -> nn.Parameter:
        groups = dict(zip(names, tensor.detach().chunk(len(names)), strict=True))
        return nn.Parameter(torch.cat([groups[name] for name in rows]), requires_grad=tensor.requires_grad)

    bias = pick(linear.bias)
    return Constant(bias) if isinstance(linear, Constant) else linear_from(pick(linear.weight), bias)


def linear_from(weight: nn.Parameter, bias: nn.Parameter) -> nn.Linear:
    """A linear of these very parameters."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    linear.weight, linear.bias = weight, bias
    return linear


def modulate(hidden: torch.Tensor, values: dict[str, torch.Tensor], branch: str) -> torch.Tensor:
    """Normalise, then scale and shift where there is something to do it with."""
    hidden = F.layer_norm(hidden, hidden.shape[-1:], eps=1e-6)
    if f"scale_{branch}" in values:
        hidden = hidden * (1 + values[f"scale_{branch}"]) + values[f"shift_{branch}"]
    return hidden


def gated(hidden: torch.Tensor, values: dict[str, torch.Tensor], branch: str) -> torch.Tensor:
    """Multiply by the gate; without one it is open."""
    gate = values.get(f"gate_{branch}")
    return hidden if gate is None else gate * hidden


class SparseJointBlock(SparseBlock):
    """A block of two streams, of whatever family, without some of its components."""

    def __init__(self, block: Any, removed: Collection[str], semantics: Semantics) -> None:
        gone = set(removed)
        if semantics == "identity" and "attn" in gone:
            gone |= {"attn2"} & set(components_of(block))
        super().__init__(block, gone, semantics)
        self.context_pre_only = getattr(block, "context_pre_only", False)

        def sublayer(name: str) -> nn.Module | None:
            module: nn.Module | None = getattr(block, name, None)
            if module is None or name not in gone:
                return module
            return None if semantics == "zero" else PassThrough()

        self.attn = sublayer("attn")
        self.attn2 = sublayer("attn2")
        self.ff = sublayer("ff")
        self.ff_context = sublayer("ff_context")

        def norm(name: str, readers: dict[str, nn.Module | None]) -> Modulation | None:
            if semantics == "identity" and name in gone:
                return None
            whole = getattr(block, name)
            live = [row for row in rows_of(whole) if readers[row.partition("_")[2]] is not None]
            return modulation(whole, live, constant=name in gone)

        self.norm1 = norm("norm1", {"msa": self.attn, "msa2": self.attn2, "mlp": self.ff})
        self.norm1_context = norm("norm1_context", {"msa": self.attn, "mlp": self.ff_context})

    def run(
        self, image_BND: torch.Tensor, text_BTD: torch.Tensor, conditioning_BD: torch.Tensor, **attention: Any
    ) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Text and image behind the block."""
        image, text = image_BND, text_BTD
        of_image = {} if self.norm1 is None else self.norm1(conditioning_BD)
        of_text = {} if self.norm1_context is None else self.norm1_context(conditioning_BD)
        first = image
        if self.attn is not None:
            seen_image, seen_text = self.attn(
                hidden_states=modulate(image, of_image, "msa"),
                encoder_hidden_states=modulate(text, of_text, "msa"),
                **attention,
            )
            image = image + gated(seen_image, of_image, "msa")
            text = text if self.context_pre_only else text + gated(seen_text, of_text, "msa")
        if self.attn2 is not None:
            seen_image = self.attn2(hidden_states=modulate(first, of_image, "msa2"))
            image = image + gated(seen_image, of_image, "msa2")
        if self.ff is not None:
            image = image + gated(self.ff(modulate(image, of_image, "mlp")), of_image, "mlp")
        if self.context_pre_only:
            return None, image
        if self.ff_context is not None:
            text = text + gated(self.ff_context(modulate(text, of_text, "mlp")), of_text, "mlp")
        return text, image


def joint_geometry(block: Any, image_tokens: int, text_tokens: int, *, text_may_end: bool) -> Block:
    """A block of two streams as numbers.

    Args:
        block: Of diffusers or of ours.
        image_tokens: N.
        text_tokens: T.
        text_may_end: Whether nothing reads the text behind the last block.
    """
    both = image_tokens + text_tokens
    parts = []
    if (attn := _weighty(block, "attn")) is not None:
        ending = getattr(attn, "to_add_out", None)
        text_side = [attn.add_q_proj, attn.add_k_proj, attn.add_v_proj]
        image_side = [attn.to_q, attn.to_k, attn.to_v, *attn.to_out]
        parts.append(
            part(
                "attn",
                parameters=count(attn) - count(ending),
                flops=linear_flops(image_side, image_tokens)
                + linear_flops(text_side, text_tokens)
                + 4 * both * both * attn.to_q.out_features,
                gone_with=("attn",),
            )
        )
        if ending is not None:
            parts.append(
                part(
                    "attn.to_add_out",
                    parameters=count(ending),
                    flops=linear_flops([ending], text_tokens),
                    gone_with=("attn",),
                    only_for_next=text_may_end,
                )
            )
    if (attn2 := _weighty(block, "attn2")) is not None:
        flops = linear_flops([attn2], image_tokens) + 4 * image_tokens**2 * attn2.to_q.out_features
        parts.append(
            part(
                "attn2",
                parameters=count(attn2),
                flops=flops,
                zero=[("attn2",)],
                identity=[("attn2",), ("attn",)],
            )
        )
    for name, tokens in (("ff", image_tokens), ("ff_context", text_tokens)):
        if (module := _weighty(block, name)) is not None:
            ends = text_may_end and name == "ff_context"
            flops = linear_flops([module], tokens)
            parts.append(
                part(name, parameters=count(module), flops=flops, gone_with=(name,), only_for_next=ends)
            )
    for name, mlp in (("norm1", "ff"), ("norm1_context", "ff_context")):
        readers = {"msa": ("attn",), "msa2": ("attn2",), "mlp": (mlp,)}
        parts += modulation_parts(name, getattr(block, name), readers, text_may_end=text_may_end)
    return finished(block, "joint", parts)


def modulation_parts(
    name: str, norm: Any, readers: Mapping[str, tuple[str, ...]], *, text_may_end: bool = False
) -> list[Part]:
    """An AdaLN as numbers: weight and bias of rows that are read together, gone with all that read them."""
    groups: dict[tuple[str, bool], int] = {}
    for row in rows_of(norm):
        ends = text_may_end and name == "norm1_context" and row not in ("shift_msa", "scale_msa")
        branch = row.partition("_")[2]
        groups[branch, ends] = groups.get((branch, ends), 0) + 1
    parts = []
    for (branch, ends), num_rows in groups.items():
        width = num_rows * norm.linear.bias.numel() // len(rows_of(norm))
        title, reader = f"{name}.{branch}{'.next' if ends else ''}", readers[branch]
        if (weight := getattr(norm.linear, "weight", None)) is not None:
            entries = width * weight.shape[1]
            parts.append(
                part(
                    f"{title}.weight",
                    parameters=entries,
                    flops=2 * entries,
                    zero=[(name,), reader],
                    identity=[(name,)],
                    only_for_next=ends,
                )
            )
        parts.append(
            part(
                f"{title}.bias",
                parameters=width,
                zero=[reader],
                identity=[(name,)],
                only_for_next=ends,
            )
        )
    return parts


def part(
    name: str,
    *,
    parameters: int,
    flops: int = 0,
    gone_with: tuple[str, ...] = (),
    zero: Sequence[tuple[str, ...]] = (),
    identity: Sequence[tuple[str, ...]] = (),
    only_for_next: bool = False,
) -> Part:
    """A part that is gone with the components of `gone_with` in either way, or in each as it says."""
    both = (gone_with,) if gone_with else ()
    return Part(
        name=name,
        parameters=parameters,
        flops=flops,
        zero=(*both, *zero),
        identity=(*both, *identity),
        only_for_next=only_for_next,
    )


def finished(block: Any, kind: str, parts: Iterable[Part]) -> Block:
    """A block of the components it still has, its parts told apart by those alone."""
    components = components_of(block)

    def left(sets: tuple[tuple[str, ...], ...]) -> tuple[tuple[str, ...], ...]:
        rest = (tuple(name for name in together if name in components) for together in sets)
        return tuple(together for together in rest if together)

    return Block(
        kind=kind,
        components=components,
        parts=tuple(replace(item, zero=left(item.zero), identity=left(item.identity)) for item in parts),
    )


def components_of(block: Any) -> tuple[str, ...]:
    """What may be removed of a block of diffusers, or of what is left of one."""
    if isinstance(block, SparseBlock):
        return block.components
    if hasattr(block, "proj_mlp"):
        return ("norm", "attn", "mlp")
    joint = ("attn", "attn2", "ff", "ff_context", "norm1", "norm1_context")
    return tuple(name for name in joint if getattr(block, name, None) is not None)


def count(module: nn.Module | None) -> int:
    """Parameters of a module; those of nothing are 0."""
    return 0 if module is None else sum(item.numel() for item in module.parameters())


def linear_flops(modules: Iterable[nn.Module], tokens: int) -> int:
    """Of all linears and patch convolutions in some modules, each applied once a token."""
    return sum(
        2 * tokens * inner.weight.numel()
        for module in modules
        for inner in module.modules()
        if isinstance(inner, nn.Linear | nn.Conv2d)
    )


def _weighty(block: Any, name: str) -> Any:
    module = getattr(block, name, None)
    return None if isinstance(module, PassThrough) else module
