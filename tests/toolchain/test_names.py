"""Every tensor of a text encoder is found, under the names that files have and have had for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import init_empty_weights
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from toolchain.errors import ToolchainError
from toolchain.families.names import stored_names
from toolchain.families.stored import StoredTensors

Tensors = dict[str, torch.Tensor]

CLIP = CLIPTextConfig(
    vocab_size=8,
    hidden_size=4,
    intermediate_size=6,
    projection_dim=3,
    num_hidden_layers=2,
    num_attention_heads=1,
    max_position_embeddings=5,
)
T5 = T5Config(vocab_size=8, d_model=6, d_kv=4, d_ff=10, num_layers=2, num_heads=1)
POSITIONS = torch.arange(5)[None]


def bare(tensors: Tensors) -> Tensors:
    """CLIPTextModel's own names since transformers 5."""
    return {name.removeprefix("text_model."): tensor for name, tensor in tensors.items()}


def prefixed(tensors: Tensors) -> Tensors:
    """CLIPTextModel's names until then, which FLUX.1 is published under."""
    return {f"text_model.{name}": tensor for name, tensor in bare(tensors).items()}


def with_positions(tensors: Tensors) -> Tensors:
    """Older files hold the table of positions, too."""
    return tensors | {"text_model.embeddings.position_ids": POSITIONS}


def shared(tensors: Tensors) -> Tensors:
    """The embeddings of T5 once, as tied tensors are saved."""
    return {name: tensor for name, tensor in tensors.items() if name != "encoder.embed_tokens.weight"}


def embedded(tensors: Tensors) -> Tensors:
    """The same, under the other name."""
    kept = shared(tensors)
    return {"encoder.embed_tokens.weight": kept.pop("shared.weight"), **kept}


def both(tensors: Tensors) -> Tensors:
    """Twice, each under its name."""
    return tensors | {"encoder.embed_tokens.weight": tensors["shared.weight"].clone()}


def as_saved(tensors: Tensors) -> Tensors:
    return tensors


@pytest.mark.parametrize(
    ("kind", "config", "history"),
    [
        (CLIPTextModel, CLIP, as_saved),
        (CLIPTextModel, CLIP, bare),
        (CLIPTextModel, CLIP, prefixed),
        (CLIPTextModel, CLIP, lambda tensors: with_positions(prefixed(tensors))),
        (CLIPTextModelWithProjection, CLIP, as_saved),
        (CLIPTextModelWithProjection, CLIP, with_positions),
        (T5EncoderModel, T5, as_saved),
        (T5EncoderModel, T5, shared),
        (T5EncoderModel, T5, embedded),
        (T5EncoderModel, T5, both),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_tensor_is_found(
    tmp_path: Path, kind: Any, config: Any, history: Callable[[Tensors], Tensors], dtype: torch.dtype
) -> None:
    module = kind(config).to(dtype)
    found = stored(tmp_path, module, history)
    assert found.keys() == module.state_dict().keys()
    for name, tensor in module.state_dict().items():
        assert torch.equal(found[name], tensor)


@pytest.mark.parametrize(
    ("kind", "config", "lost"),
    [
        (CLIPTextModel, CLIP, "final_layer_norm.bias"),
        (CLIPTextModelWithProjection, CLIP, "text_projection.weight"),
        (T5EncoderModel, T5, "encoder.block.1.layer.1.DenseReluDense.wo.weight"),
        (T5EncoderModel, T5, "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"),
        (T5EncoderModel, T5, "shared.weight"),
    ],
)
def test_a_missing_tensor_is_one_clear_error(tmp_path: Path, kind: Any, config: Any, lost: str) -> None:
    def lose(tensors: Tensors) -> Tensors:
        return {name: tensor for name, tensor in tensors.items() if name.removeprefix("text_model.") != lost}

    with pytest.raises(ToolchainError, match=rf"^a model lacks weights of its part: .*{lost}$"):
        stored(tmp_path, kind(config), lose)


@pytest.mark.parametrize(
    ("kind", "config", "extra"),
    [
        (CLIPTextModel, CLIP, "text_projection.weight"),
        (T5EncoderModel, T5, "encoder.block.2.layer.0.layer_norm.weight"),
    ],
)
def test_a_tensor_of_a_larger_model_is_refused(tmp_path: Path, kind: Any, config: Any, extra: str) -> None:
    with pytest.raises(ToolchainError, match=f"holds weights its part has no place for: {extra}"):
        stored(tmp_path, kind(config), lambda tensors: tensors | {extra: torch.ones(4)})


def stored(path: Path, module: Any, history: Callable[[Tensors], Tensors]) -> StoredTensors:
    """Save a module as transformers does, rename what it wrote, and look for the tensors of a skeleton."""
    part = path / "part"
    module.save_pretrained(part)
    written = history(load_file(part / "model.safetensors"))
    save_file({name: tensor.contiguous() for name, tensor in written.items()}, part / "model.safetensors")
    with init_empty_weights(include_buffers=False):
        skeleton = type(module)(module.config)
    return StoredTensors("a model", part, skeleton, stored_names(skeleton))
