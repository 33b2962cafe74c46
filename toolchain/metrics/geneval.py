"""GenEval (arXiv 2310.11513): are the objects there that the prompt names, in number, colour and place?

The rules and thresholds are those of its authors; the detector is any that transformers can load.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForObjectDetection,
    AutoModelForUniversalSegmentation,
)

from toolchain.errors import ToolchainError
from toolchain.metrics import PictureMetric
from toolchain.metrics.clip import Encoder

COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
RELATIONS = ("left of", "right of", "above", "below")
_TEMPLATES = ("a photo of a {} {}", "a photo of a {}-colored {}", "a photo of a {} object")
_MAX_OBJECTS = 16
# Share of the two objects' sizes by which their centres may differ and still be level.
_SLACK = 0.1
_GREY = 153
# GenEval's names of COCO classes that detectors call by a shorter name.
_SHORT = {"computer mouse": "mouse", "computer keyboard": "keyboard", "tv remote": "remote"}


@dataclass(frozen=True, kw_only=True)
class Found:
    """An object in a picture."""

    label: str
    score: float
    box: tuple[float, float, float, float]
    """Left, top, right and bottom in pixels."""
    mask: npt.NDArray[np.bool_] | None = None
    """[height, width], from detectors that make one."""


@dataclass(frozen=True, kw_only=True)
class Geneval(PictureMetric):
    """1 for a picture that shows what its metadata asks for, else 0."""

    name = "geneval"

    detector: Path
    """Directory of a model for object detection, or of Mask2Former's kind, as transformers writes it."""
    metadata: Path
    """JSON lines as GenEval has them: prompt, tag, include and perhaps exclude."""
    clip: Path | None = None
    """Directory of a CLIP model that names colours; tasks with colours need it."""
    threshold: float = 0.3
    """Scores below it are no objects."""
    counting_threshold: float = 0.9
    """The same for the task `counting`."""

    def check(self, prompts: Sequence[str]) -> None:
        """See `PictureMetric`; this reads the models."""
        unknown = [prompt for prompt in prompts if prompt not in self._asked]
        if unknown:
            raise ToolchainError(
                f"{self.metadata} says nothing of {len(unknown)} of the prompts, like {unknown[0]!r}"
            )
        asked = [self._asked[prompt] for prompt in prompts]
        colored = {item["tag"] for item in asked if any("color" in part for part in item["include"])}
        if colored and self.clip is None:
            raise ToolchainError(
                f"the tasks {', '.join(sorted(colored))} ask for colours, which a CLIP model has to name: "
                "add clip=DIRECTORY to the options of geneval, or leave their prompts out"
            )
        named = {part["class"] for item in asked for part in (*item["include"], *item.get("exclude", ()))}
        labels, _ = self._detector
        if strange := sorted(name for name in named if not {name, _SHORT.get(name, name)} & labels):
            raise ToolchainError(
                f"{self.detector} knows no {', '.join(strange)}; it knows {', '.join(labels)}"
            )
        if self.clip is not None:
            _ = self._encoder

    def scores(self, prompts: Sequence[str], pictures: npt.NDArray[np.uint8]) -> npt.NDArray[np.float64]:
        """See `PictureMetric`."""
        pairs = zip(prompts, pictures, strict=True)
        return np.array([float(self.fits(self._asked[prompt], picture)) for prompt, picture in pairs])

    def fits(self, asked: dict[str, Any], picture: npt.NDArray[np.uint8]) -> bool:
        """Whether a picture [height, width, 3] shows what one entry of the metadata asks for."""
        threshold = self.counting_threshold if asked["tag"] == "counting" else self.threshold
        seen = sorted(self.detect(picture, threshold), key=lambda item: -item.score)
        by_label: dict[str, list[Found]] = {}
        for item in seen:
            by_label.setdefault(item.label, []).append(item)

        def objects(name: str) -> list[Found]:
            labelled = by_label.get(name) or by_label.get(_SHORT.get(name, name), [])
            return labelled[:_MAX_OBJECTS]

        groups: list[list[Found]] = []
        for part in asked["include"]:
            group = objects(part["class"])[: part["count"]]
            groups.append(group)
            if len(group) < part["count"]:
                return False
            if "color" in part:
                colors = self._colors(picture, group, part["class"])
                if colors.count(part["color"]) < part["count"]:
                    return False
            if "position" in part:
                relation, target = part["position"]
                if not all(relation in _relations(item, other) for item in group for other in groups[target]):
                    return False
        return all(len(objects(part["class"])) < part["count"] for part in asked.get("exclude", ()))

    def detect(self, picture: npt.NDArray[np.uint8], threshold: float) -> list[Found]:
        """All objects of a picture [height, width, 3] with a score above a threshold."""
        return self._detector[1](picture, threshold)

    def _colors(self, picture: npt.NDArray[np.uint8], group: list[Found], name: str) -> list[str]:
        texts = [template.format(color, name) for color in COLORS for template in _TEMPLATES]
        embedded = self._encoder.texts(texts).reshape(len(COLORS), len(_TEMPLATES), -1)
        crops = self._encoder.pictures([_crop(picture, item) for item in group])
        nearest = (crops @ F.normalize(embedded.mean(1), dim=-1).T).argmax(1)
        return [COLORS[int(index)] for index in nearest]

    @cached_property
    def _asked(self) -> dict[str, dict[str, Any]]:
        asked: dict[str, dict[str, Any]] = {}
        try:
            for line in self.metadata.read_text(encoding="utf-8").splitlines():
                if line.strip():
                    item = json.loads(line)
                    _check_entry(item)
                    asked[item["prompt"]] = item
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ToolchainError(f"{self.metadata} is no metadata of GenEval: {error!r}") from error
        return asked

    @cached_property
    def _encoder(self) -> Encoder:
        assert self.clip is not None
        return Encoder(self.clip)

    @cached_property
    def _detector(self) -> tuple[set[str], Callable[[npt.NDArray[np.uint8], float], list[Found]]]:
        """The names of all classes, and what finds objects."""
        try:
            config = AutoConfig.from_pretrained(self.detector, local_files_only=True)
            # A configuration like DETR's serves both kinds; what was saved says which one it is.
            boxes = any(name.endswith("ForObjectDetection") for name in config.architectures or ())
            segments = not boxes and type(config) in AutoModelForUniversalSegmentation._model_mapping
            kind = AutoModelForUniversalSegmentation if segments else AutoModelForObjectDetection
            model, report = kind.from_pretrained(
                self.detector,
                dtype=torch.float32,
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
            )
            processor = AutoImageProcessor.from_pretrained(self.detector, local_files_only=True)
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise ToolchainError(f"{self.detector} cannot be read as a detector: {error}") from error
        if missing := sorted(report["missing_keys"]):
            raise ToolchainError(f"{self.detector} lacks weights of its detector: {', '.join(missing[:5])}")
        # Objects overlap. In the one map that other models of masks make, each covers those before it.
        if segments and (
            "return_binary_maps"
            not in inspect.signature(processor.post_process_instance_segmentation).parameters
        ):
            raise ToolchainError(
                f"{self.detector} is a {type(model).__name__}, from which transformers gives no masks that "
                "may overlap; use Mask2Former, MaskFormer or a model for object detection"
            )
        labels = {int(index): str(name) for index, name in config.id2label.items()}
        model.eval()

        @torch.no_grad()
        def find(picture: npt.NDArray[np.uint8], threshold: float) -> list[Found]:
            inputs = processor([picture], return_tensors="pt", input_data_format="channels_last")
            outputs, sizes = model(**inputs), [picture.shape[:2]]
            if segments:
                (seen,) = processor.post_process_instance_segmentation(
                    outputs, threshold=threshold, target_sizes=sizes, return_binary_maps=True
                )
                return [
                    _segment(seen["segmentation"][item["id"]], item, labels) for item in seen["segments_info"]
                ]
            (seen,) = processor.post_process_object_detection(
                outputs, threshold=threshold, target_sizes=sizes
            )
            return [
                Found(label=labels[int(label)], score=float(score), box=tuple(box.tolist()))
                for label, score, box in zip(seen["labels"], seen["scores"], seen["boxes"], strict=True)
            ]

        return set(labels.values()), find


def _segment(mask_HW: torch.Tensor, item: dict[str, Any], labels: dict[int, str]) -> Found:
    mask: npt.NDArray[np.bool_] = mask_HW.bool().numpy()
    y, x = np.nonzero(mask)
    box = (float(x.min()), float(y.min()), float(x.max() + 1), float(y.max() + 1))
    return Found(label=labels[item["label_id"]], score=float(item["score"]), box=box, mask=mask)


def _crop(picture: npt.NDArray[np.uint8], item: Found) -> npt.NDArray[np.uint8]:
    if item.mask is not None:
        picture = np.where(item.mask[:, :, None], picture, np.uint8(_GREY))
    height, width = picture.shape[:2]
    left, top = (max(0, int(value)) for value in item.box[:2])
    right, bottom = min(width, int(item.box[2]) + 1), min(height, int(item.box[3]) + 1)
    return picture[min(top, height - 1) : max(bottom, 1), min(left, width - 1) : max(right, 1)]


def _relations(item: Found, other: Found) -> set[str]:
    """Where an object lies as seen from another; none of the four if they overlap too much."""
    boxes = np.array([item.box, other.box])
    sizes = boxes[:, 2:] - boxes[:, :2]
    offset = boxes[0].reshape(2, 2).mean(0) - boxes[1].reshape(2, 2).mean(0)
    beyond = np.maximum(np.abs(offset) - _SLACK * sizes.sum(0), 0) * np.sign(offset)
    if (np.abs(beyond) < 1e-3).all():
        return set()
    dx, dy = beyond / np.linalg.norm(offset)
    return {
        name
        for name, holds in zip(RELATIONS, (dx < -0.5, dx > 0.5, dy < -0.5, dy > 0.5), strict=True)
        if holds
    }


def _check_entry(item: dict[str, Any]) -> None:
    for part in (*item["include"], *item.get("exclude", ())):
        relation, target = part.get("position", (RELATIONS[0], 0))
        if relation not in RELATIONS or not 0 <= target < len(item["include"]):
            raise ValueError(f"the position {part['position']} in {item['prompt']!r}")
        if (
            part.get("color", COLORS[0]) not in COLORS
            or not isinstance(part["class"], str)
            or part["count"] < 1
        ):
            raise ValueError(f"{part} in {item['prompt']!r}")
    if not isinstance(item["prompt"], str) or not isinstance(item["tag"], str):
        raise ValueError(f"{item}")
