"""CLIPScore, and the reading of CLIP models that other metrics share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import AutoImageProcessor, AutoTokenizer, CLIPConfig, CLIPModel

from toolchain.artifacts import read_json
from toolchain.errors import ToolchainError
from toolchain.metrics import PictureMetric

OPEN_CLIP_CONFIG, OPEN_CLIP_WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"


class Encoder:
    """A CLIP model that turns texts and pictures into unit vectors of one space."""

    def __init__(self, directory: Path) -> None:
        """Read a model in the layout of transformers or, if it has `open_clip_config.json`, of OpenCLIP.

        Raises:
            ToolchainError: The directory holds neither, or weights are missing.
        """
        is_open_clip = (directory / OPEN_CLIP_CONFIG).is_file()
        if not is_open_clip and not (directory / "config.json").is_file():
            raise ToolchainError(
                f"{directory} holds no CLIP model: neither config.json, as transformers writes it, nor "
                f"{OPEN_CLIP_CONFIG} with {OPEN_CLIP_WEIGHTS}; nothing is downloaded"
            )
        try:
            read = _read_open_clip if is_open_clip else _read_transformers
            self._model, self._processor = read(directory)
            self._tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            raise ToolchainError(f"{directory} cannot be read as a CLIP model: {error}") from error

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> torch.Tensor:
        """Unit vectors [N, width]; what a text has beyond the model's length is cut off."""
        length = self._model.config.text_config.max_position_embeddings
        tokens = self._tokenizer(
            list(texts), padding=True, truncation=True, max_length=length, return_tensors="pt"
        )
        found = self._model.get_text_features(tokens["input_ids"], tokens["attention_mask"])
        return F.normalize(found.pooler_output, dim=-1)

    @torch.no_grad()
    def pictures(self, pictures: Iterable[npt.NDArray[np.uint8]]) -> torch.Tensor:
        """Unit vectors [N, width] of pictures [height, width, 3] of any sizes."""
        pixels = self._processor(list(pictures), return_tensors="pt", input_data_format="channels_last")
        return F.normalize(self._model.get_image_features(pixels["pixel_values"]).pooler_output, dim=-1)

    def cosines(self, texts: Sequence[str], pictures: npt.NDArray[np.uint8]) -> npt.NDArray[np.float64]:
        """Of each text with its own picture, [N]."""
        cosines: npt.NDArray[np.float64] = (
            (self.texts(texts) * self.pictures(pictures)).sum(1).double().numpy()
        )
        return cosines


@dataclass(frozen=True, kw_only=True)
class Clip(PictureMetric):
    """CLIPScore (arXiv 2104.08718) as torchmetrics defines it: 100 cos(text, picture), at least 0."""

    name = "clip"

    directory: Path
    """Of a CLIP model."""

    def check(self, prompts: Sequence[str]) -> None:
        """Any prompt will do; this reads the model."""
        _ = self._encoder

    def scores(self, prompts: Sequence[str], pictures: npt.NDArray[np.uint8]) -> npt.NDArray[np.float64]:
        """See `PictureMetric`."""
        return np.maximum(100 * self._encoder.cosines(prompts, pictures), 0)

    @cached_property
    def _encoder(self) -> Encoder:
        return Encoder(self.directory)


def _read_transformers(directory: Path) -> tuple[Any, Any]:
    model, report = CLIPModel.from_pretrained(
        directory, dtype=torch.float32, local_files_only=True, use_safetensors=True, output_loading_info=True
    )
    if missing := sorted(report["missing_keys"]):
        raise ValueError(f"it lacks the weights {', '.join(missing[:5])}")
    return model.eval(), AutoImageProcessor.from_pretrained(directory, local_files_only=True)


def _read_open_clip(directory: Path) -> tuple[Any, Any]:
    stored = read_json(directory / OPEN_CLIP_CONFIG)
    shape, pixels = stored["model_cfg"], stored.get("preprocess_cfg", {})
    activation = "quick_gelu" if shape.get("quick_gelu") else "gelu"
    seen, read = shape["vision_cfg"], shape["text_cfg"]
    vision = {
        "hidden_size": seen["width"],
        "num_hidden_layers": seen["layers"],
        "num_attention_heads": seen["width"] // seen.get("head_width", 64),
        "intermediate_size": int(seen["width"] * seen.get("mlp_ratio", 4.0)),
        "image_size": seen["image_size"],
        "patch_size": seen["patch_size"],
        "hidden_act": activation,
    }
    text = {
        "hidden_size": read["width"],
        "num_hidden_layers": read["layers"],
        "num_attention_heads": read["heads"],
        "intermediate_size": int(read["width"] * read.get("mlp_ratio", 4.0)),
        "max_position_embeddings": read["context_length"],
        "vocab_size": read["vocab_size"],
        "hidden_act": activation,
        # The end token is the last of the vocabulary, and what pads does not matter: attention is causal.
        "bos_token_id": read["vocab_size"] - 2,
        "eos_token_id": read["vocab_size"] - 1,
        "pad_token_id": None,
    }
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=shape["embed_dim"]))
    weights = load_file(directory / OPEN_CLIP_WEIGHTS)
    model.load_state_dict(_from_open_clip(weights), strict=True)
    size = seen["image_size"]
    mean_and_std = {f"image_{name}": pixels[name] for name in ("mean", "std") if name in pixels}
    # The one that works without torchvision is the only one in older versions and has a name of its own now.
    kind = getattr(transformers, "CLIPImageProcessorPil", None) or transformers.CLIPImageProcessor
    processor = kind(size={"shortest_edge": size}, crop_size=size, **mean_and_std)
    return model.float().eval(), processor


def _from_open_clip(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights of OpenCLIP's ViT under the names, and in the shapes, of transformers' CLIPModel."""
    fixed = {
        "logit_scale": "logit_scale",
        "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
        "positional_embedding": "text_model.embeddings.position_embedding.weight",
        "ln_final": "text_model.final_layer_norm",
        "text_projection": "text_projection.weight",
        "visual.class_embedding": "vision_model.embeddings.class_embedding",
        "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
        "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
        "visual.ln_pre": "vision_model.pre_layrnorm",
        "visual.ln_post": "vision_model.post_layernorm",
        "visual.proj": "visual_projection.weight",
    }
    inner = {
        "ln_1": "layer_norm1",
        "ln_2": "layer_norm2",
        "mlp.c_fc": "mlp.fc1",
        "mlp.c_proj": "mlp.fc2",
        "attn.out_proj": "self_attn.out_proj",
    }
    renamed = {}
    for name, tensor in weights.items():
        stem, _, kind = name.rpartition(".")
        tower = "vision_model" if name.startswith("visual.") else "text_model"
        if "resblocks." in name:
            layer, _, rest = name.partition("resblocks.")[2].partition(".")
            prefix = f"{tower}.encoder.layers.{layer}"
            if rest.startswith("attn.in_proj_"):
                for part, piece in zip("qkv", tensor.chunk(3), strict=True):
                    renamed[f"{prefix}.self_attn.{part}_proj.{rest.removeprefix('attn.in_proj_')}"] = piece
            else:
                renamed[f"{prefix}.{inner[rest.rpartition('.')[0]]}.{kind}"] = tensor
        elif name in ("text_projection", "visual.proj"):
            renamed[fixed[name]] = tensor.T  # they multiply from the right there
        elif name in fixed:
            renamed[fixed[name]] = tensor
        elif name != "attn_mask":
            renamed[f"{fixed[stem]}.{kind}"] = tensor
    return renamed
