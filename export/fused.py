"""Parts of a block as one operator each, of onnxruntime's own: attention, RMSNorm and rotary embedding.

In operators of ONNX they read and write the same values many times over, and attention keeps all its scores.
Builders of engines do not know these, and find the parts again by themselves.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.normalization import RMSNorm
from diffusers.models.transformers import transformer_flux
from onnx.defs import OpSchema
from onnxscript import opset21 as op
from onnxscript.values import Op, Opset
from torch import nn

from export.errors import ExportError

__all__ = ["DOMAIN", "FUSED", "TRANSLATIONS", "rotary_as_one", "use_torch_norms"]

DOMAIN = "com.microsoft"
_INT, _FLOAT = OpSchema.AttrType.INT, OpSchema.AttrType.FLOAT


def _operator(
    name: str, domain: str, inputs: tuple[str, ...], attributes: dict[str, OpSchema.AttrType]
) -> Op:
    """One that onnx knows nothing of."""
    schema = OpSchema(
        name,
        domain,
        1,
        inputs=[OpSchema.FormalParameter(each, "M" if each == "positions" else "T") for each in inputs],
        outputs=[OpSchema.FormalParameter("output", "T")],
        type_constraints=[("T", ["tensor(float)", "tensor(float16)"], ""), ("M", ["tensor(int64)"], "")],
        attributes=[OpSchema.Attribute(each, kind, required=True) for each, kind in attributes.items()],
    )
    return Op(Opset(domain, 1), name, schema)


_MULTI_HEAD_ATTENTION = _operator(
    "MultiHeadAttention", DOMAIN, ("query", "key", "value"), {"num_heads": _INT}
)
_RMS_NORM = _operator(  # in the set of ONNX, where onnxruntime has it
    "SimplifiedLayerNormalization", "", ("x", "scale"), {"axis": _INT, "epsilon": _FLOAT, "stash_type": _INT}
)
_ROTARY_EMBEDDING = _operator(
    "RotaryEmbedding", DOMAIN, ("x", "positions", "cosines", "sines"), {"interleaved": _INT}
)
FUSED = {each.name for each in (_MULTI_HEAD_ATTENTION, _RMS_NORM, _ROTARY_EMBEDDING)}
"""Their names."""


def _attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """Attention of B, N heads, S tokens and H features, which never holds all scores at once.

    onnxruntime takes and gives [B, S, N * H]; its rewriter removes transpositions that undo each other.
    """
    if attn_mask is not None or is_causal or scale is not None or enable_gqa or dropout_p:
        raise ExportError("A block masks or scales its attention, which the fused operator is not told of.")
    heads = query.shape[1]
    assert isinstance(heads, int)
    flat = [_flat(op.Transpose(item, perm=(0, 2, 1, 3))) for item in (query, key, value)]
    mixed = _MULTI_HEAD_ATTENTION(*flat, num_heads=heads)
    return op.Transpose(_apart(mixed, heads), perm=(0, 2, 1, 3))


def _rms_norm(x: Any, normalized_shape: list[int], weight: Any = None, eps: float | None = None) -> Any:
    """RMSNorm over the last dimension, computed in float32 whatever it is given."""
    if len(normalized_shape) != 1 or eps is None:
        raise ExportError("A block has an RMSNorm of several dimensions or without an epsilon.")
    if weight is None:
        ones: Any = op.Constant(value_floats=[1.0] * normalized_shape[0])
        weight = op.CastLike(ones, x)
    norm = partial(_RMS_NORM, axis=-1, epsilon=eps, stash_type=1)
    before = x.producer()
    if before is not None and before.op_type == "Transpose":
        # Behind the norm, it meets those of the attention, and onnxruntime removes them.
        perm = before.attributes.get_ints("perm")
        if perm[-1] == len(perm) - 1:
            return op.Transpose(norm(before.inputs[0], weight), perm=perm)
    return norm(x, weight)


def _rotary(x: Any, cosines: Any, sines: Any) -> Any:
    """Rotary embedding of [B, S, N, H]; cosines and sines [S, H] have each value twice, once for each of two.

    Places are given one by one: OpenVINO takes a single offset for the place of every token.
    """
    once = [op.CastLike(op.Slice(item, *map(_integers, (0, 2**31, 1, 2))), x) for item in (cosines, sines)]
    tokens = op.Squeeze(op.Shape(cosines, start=0, end=1))
    places = op.Unsqueeze(op.Range(_integer(0), tokens, _integer(1)), _integers(0))
    places = op.Expand(places, op.Concat(op.Shape(x, start=0, end=1), _integers(1), axis=0))
    return _apart(_ROTARY_EMBEDDING(_flat(x), places, *once, interleaved=1), x.shape[2])


def _flat(x: Any) -> Any:
    return op.Reshape(x, _integers(0, 0, -1))


def _apart(x: Any, heads: int) -> Any:
    return op.Reshape(x, _integers(0, 0, heads, -1))


def _integer(value: int) -> Any:
    return op.Constant(value_int=value)


def _integers(*values: int) -> Any:
    return op.Constant(value_ints=values)


@torch.library.custom_op("hptool::rotary_embedding", mutates_args=())
def _rotary_embedding(x: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor) -> torch.Tensor:
    turned: torch.Tensor = apply_rotary_emb(x, (cosines, sines), sequence_dim=1)
    return turned


@_rotary_embedding.register_fake
def _(x: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


TRANSLATIONS: dict[Any, Any] = {
    torch.ops.aten.scaled_dot_product_attention.default: _attention,
    torch.ops.aten.rms_norm.default: _rms_norm,
    torch.ops.hptool.rotary_embedding.default: _rotary,
}
"""For the tracer, which takes each of these as one."""


@contextmanager
def rotary_as_one() -> Iterator[None]:
    """Within, diffusers' rotary embedding is called as one operator."""

    def as_one(x: torch.Tensor, waves: tuple[torch.Tensor, torch.Tensor], sequence_dim: int) -> torch.Tensor:
        assert sequence_dim == 1
        turned: torch.Tensor = _rotary_embedding(x, *waves)
        return turned

    known = transformer_flux.apply_rotary_emb
    transformer_flux.apply_rotary_emb = as_one
    try:
        yield
    finally:
        transformer_flux.apply_rotary_emb = known


def use_torch_norms(block: nn.Module) -> None:
    """Put torch's RMSNorm in the place of diffusers' own, in place: it reaches the tracer as one operator."""
    for module in list(block.modules()):
        for name, child in module.named_children():
            if isinstance(child, RMSNorm) and child.bias is None:
                norm = nn.RMSNorm(child.dim, eps=child.eps, elementwise_affine=False)
                norm.weight = child.weight
                setattr(module, name, norm)
