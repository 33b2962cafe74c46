"""What harm is measured by: metrics by name, and each of them on stand-ins small enough to see through."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torchmetrics.functional.multimodal import clip_score
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPProcessor,
    DetrConfig,
    DetrForObjectDetection,
    DetrForSegmentation,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    ResNetConfig,
    SwinConfig,
)

from toolchain.errors import ToolchainError
from toolchain.metrics import known_metrics, open_metric
from toolchain.metrics.clip import OPEN_CLIP_CONFIG, OPEN_CLIP_WEIGHTS, Clip, Encoder
from toolchain.metrics.geneval import COLORS, Found, Geneval
from toolchain.metrics.hpsv2 import Hpsv2
from toolchain.metrics.shapes import Shapes, read_caption
from toolchain.metrics.velocity import Velocity
from toolchain.shapes.model import build_tokenizer
from toolchain.shapes.world import TASKS, evaluation_captions, render, sample_scene

WIDTH, LAYERS, SIDE = 64, 2, 32
PROMPTS = ["a red circle", "two blue squares"]
PICTURES = np.random.default_rng(0).integers(0, 256, (2, 48, 48, 3), dtype=np.uint8)


@pytest.fixture(scope="session")
def clip_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """CLIP's layout in transformers, with random weights that find one of `PICTURES` unlike its prompt."""
    torch.manual_seed(6)
    tokenizer = build_tokenizer(16)
    tower = {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "intermediate_size": 4 * WIDTH}
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    text = (
        tower | ends | {"num_attention_heads": 1, "vocab_size": len(tokenizer), "max_position_embeddings": 16}
    )
    vision = tower | {"num_attention_heads": 1, "image_size": SIDE, "patch_size": 16}
    activation = {"hidden_act": "gelu"}
    config = CLIPConfig(text_config=text | activation, vision_config=vision | activation, projection_dim=8)
    path = tmp_path_factory.mktemp("clip")
    CLIPModel(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    kind = getattr(transformers, "CLIPImageProcessorPil", None) or transformers.CLIPImageProcessor
    kind(size={"shortest_edge": SIDE}, crop_size=SIDE).save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def detector_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """DETR's layout, with random weights."""
    torch.manual_seed(0)
    backbone = ResNetConfig(embedding_size=4, hidden_sizes=[4, 4, 4, 8], depths=[1, 1, 1, 1])
    config = DetrConfig(
        backbone_config=backbone,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        num_queries=5,
        use_pretrained_backbone=False,
        id2label={0: "cup", 1: "mouse"},
        label2id={"cup": 0, "mouse": 1},
    )
    path = tmp_path_factory.mktemp("detr")
    DetrForObjectDetection(config).save_pretrained(path)
    kind = getattr(transformers, "DetrImageProcessorPil", None) or transformers.DetrImageProcessor
    kind(size={"height": 64, "width": 64}).save_pretrained(path)
    return path


# Finding a metric by its name


def test_all_metrics_that_come_with_the_tool_are_found_by_name(clip_path: Path) -> None:
    assert set(known_metrics()) >= {"velocity", "shapes", "clip", "hpsv2", "geneval"}
    assert open_metric("velocity") == Velocity()
    assert open_metric(f"clip:directory={clip_path}") == Clip(directory=clip_path)
    assert open_metric(f"clip:directory={clip_path}").options == {"directory": str(clip_path)}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("beauty", "the metric 'beauty' is not installed; there are clip, geneval, hpsv2, shapes, velocity"),
        ("velocity:speed=3", "'speed=3' is no option: the metric 'velocity' takes no options"),
        ("clip", "the metric 'clip' needs directory: write clip:directory=VALUE"),
        ("clip:directory=a,directory=b", "directory is given twice"),
        ("clip:directory=", "directory is empty"),
        ("geneval:detector=a,metadata=b,threshold=high", "geneval:threshold is 'high', which is no float"),
    ],
)
def test_what_cannot_be_a_metric_is_refused(text: str, message: str) -> None:
    with pytest.raises(ToolchainError) as error:
        open_metric(text)
    assert message in str(error.value)


# Velocity and shapes


def test_velocity_errors_are_relative_squares() -> None:
    teacher = torch.tensor([[3.0, 4.0], [0.0, 2.0]])[:, :, None, None]
    found = torch.tensor([[3.0, 4.0], [0.0, 1.0]])[:, :, None, None]
    assert Velocity().errors(found, teacher).tolist() == [0.0, 0.25]


def test_every_caption_is_read_back_and_a_true_picture_of_it_scores_one() -> None:
    captions = [caption for seed in range(2) for caption in evaluation_captions(10, seed=seed)]
    assert {caption.task for caption in captions} == set(TASKS)
    prompts = [caption.text for caption in captions]
    Shapes().check(prompts)
    assert [read_caption(caption.text) for caption in captions] == captions
    rng = np.random.default_rng(0)
    pictures = np.stack([render(sample_scene(caption, rng)) for caption in captions])
    assert Shapes().scores(prompts, pictures).mean() == 1
    assert Shapes().scores(prompts, np.full_like(pictures, 255)).mean() == 0


@pytest.mark.parametrize("prompt", ["a cat", "a red", "a circle and a square and a triangle"])
def test_a_prompt_of_another_world_cannot_be_judged(prompt: str) -> None:
    with pytest.raises(ToolchainError, match="is no caption of the shapes world"):
        Shapes().check(["a red circle", prompt])


# CLIP


class BareFeatures(CLIPModel):
    """Gives features as torchmetrics expects them: tensors, as transformers gave them before version 5."""

    def get_text_features(self, *args: Any, **options: Any) -> Any:
        return super().get_text_features(*args, **options).pooler_output

    def get_image_features(self, *args: Any, **options: Any) -> Any:
        return super().get_image_features(*args, **options).pooler_output


def test_clip_score_is_what_torchmetrics_computes_and_never_below_zero(clip_path: Path) -> None:
    kind = getattr(transformers, "CLIPImageProcessorPil", None) or transformers.CLIPImageProcessor
    processor = CLIPProcessor(image_processor=kind.from_pretrained(clip_path), tokenizer=build_tokenizer(16))
    model = BareFeatures.from_pretrained(clip_path).eval()
    expected = [
        clip_score(picture, prompt, model_name_or_path=lambda: (model, processor)).item()
        for picture, prompt in zip(torch.from_numpy(PICTURES).permute(0, 3, 1, 2), PROMPTS, strict=True)
    ]
    assert Clip(directory=clip_path).scores(PROMPTS, PICTURES) == pytest.approx(expected, abs=1e-3)
    assert min(expected) == 0 < max(expected)


def test_hpsv2_is_a_hundred_times_the_cosine(clip_path: Path) -> None:
    model = CLIPModel.from_pretrained(clip_path).eval()
    texts = build_tokenizer(16)(PROMPTS, padding=True, return_tensors="pt")
    kind = getattr(transformers, "CLIPImageProcessorPil", None) or transformers.CLIPImageProcessor
    pixels = kind.from_pretrained(clip_path)(list(PICTURES), return_tensors="pt")
    with torch.no_grad():
        cosines = model(**texts, pixel_values=pixels["pixel_values"]).logits_per_image.diagonal()
        expected = (100 * cosines / model.logit_scale.exp()).numpy()
    assert expected.min() < 0
    assert Hpsv2(directory=clip_path).scores(PROMPTS, PICTURES) == pytest.approx(expected, abs=1e-3)


def as_open_clip(source: Path, path: Path, *, quick_gelu: bool) -> Path:
    """The same model in the layout of OpenCLIP."""
    weights = load_file(source / "model.safetensors")
    renamed = {"logit_scale": weights["logit_scale"]}
    renamed["token_embedding.weight"] = weights["text_model.embeddings.token_embedding.weight"]
    renamed["positional_embedding"] = weights["text_model.embeddings.position_embedding.weight"]
    renamed["text_projection"] = weights["text_projection.weight"].T.contiguous()
    renamed["visual.proj"] = weights["visual_projection.weight"].T.contiguous()
    renamed["visual.class_embedding"] = weights["vision_model.embeddings.class_embedding"]
    renamed["visual.conv1.weight"] = weights["vision_model.embeddings.patch_embedding.weight"]
    renamed["visual.positional_embedding"] = weights["vision_model.embeddings.position_embedding.weight"]
    norms = {
        "ln_final": "text_model.final_layer_norm",
        "visual.ln_pre": "vision_model.pre_layrnorm",
        "visual.ln_post": "vision_model.post_layernorm",
    }
    for tower, prefix in (("text_model", ""), ("vision_model", "visual.")):
        for layer in range(LAYERS):
            here, there = f"{prefix}transformer.resblocks.{layer}", f"{tower}.encoder.layers.{layer}"
            norms |= {f"{here}.ln_1": f"{there}.layer_norm1", f"{here}.ln_2": f"{there}.layer_norm2"}
            norms |= {f"{here}.mlp.c_fc": f"{there}.mlp.fc1", f"{here}.mlp.c_proj": f"{there}.mlp.fc2"}
            norms |= {f"{here}.attn.out_proj": f"{there}.self_attn.out_proj"}
            for kind in ("weight", "bias"):
                parts = [weights[f"{there}.self_attn.{part}_proj.{kind}"] for part in "qkv"]
                renamed[f"{here}.attn.in_proj_{kind}"] = torch.cat(parts)
    for here, there in norms.items():
        renamed |= {f"{here}.{kind}": weights[f"{there}.{kind}"] for kind in ("weight", "bias")}
    path.mkdir()
    save_file(renamed, path / OPEN_CLIP_WEIGHTS)
    vision = {"width": WIDTH, "layers": LAYERS, "image_size": SIDE, "patch_size": 16}
    text = {"width": WIDTH, "layers": LAYERS, "heads": 1, "context_length": 16}
    text["vocab_size"] = len(weights["text_model.embeddings.token_embedding.weight"])
    shape = {"embed_dim": 8, "vision_cfg": vision, "text_cfg": text}
    config = {"model_cfg": shape | ({"quick_gelu": True} if quick_gelu else {})}
    (path / OPEN_CLIP_CONFIG).write_text(json.dumps(config))
    for name in source.iterdir():
        if name.name not in ("config.json", "model.safetensors", "preprocessor_config.json"):
            (path / name.name).write_bytes(name.read_bytes())
    return path


@pytest.mark.parametrize("quick_gelu", [False, True])
def test_both_layouts_of_a_clip_model_give_the_same_embeddings(
    quick_gelu: bool, clip_path: Path, tmp_path: Path
) -> None:
    source = shutil.copytree(clip_path, tmp_path / "transformers")
    if quick_gelu:
        config = (source / "config.json").read_text()
        (source / "config.json").write_text(config.replace('"gelu"', '"quick_gelu"'))
    expected = Encoder(source)
    found = Encoder(as_open_clip(source, tmp_path / "open_clip", quick_gelu=quick_gelu))
    torch.testing.assert_close(found.texts(PROMPTS), expected.texts(PROMPTS), atol=1e-5, rtol=0)
    torch.testing.assert_close(found.pictures(PICTURES), expected.pictures(PICTURES), atol=1e-5, rtol=0)


def test_a_clip_model_that_is_not_whole_is_refused(clip_path: Path, tmp_path: Path) -> None:
    with pytest.raises(ToolchainError, match="holds no CLIP model"):
        Clip(directory=tmp_path).check(PROMPTS)
    for file in clip_path.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    del weights["visual_projection.weight"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ToolchainError, match=r"it lacks the weights visual_projection\.weight"):
        Clip(directory=tmp_path).check(PROMPTS)


# GenEval

CUPS = {"tag": "counting", "prompt": "two cups", "include": [{"class": "cup", "count": 2}]}
CUPS["exclude"] = [{"class": "cup", "count": 3}]
BESIDE = {
    "tag": "position",
    "prompt": "a cup left of a computer mouse",
    "include": [
        {"class": "computer mouse", "count": 1},
        {"class": "cup", "count": 1, "position": ["left of", 0]},
    ],
}
ABOVE = {
    "tag": "position",
    "prompt": "a cup above a mouse",
    "include": [{"class": "mouse", "count": 1}, {"class": "cup", "count": 1, "position": ["above", 0]}],
}
RED = {"tag": "colors", "prompt": "a red cup", "include": [{"class": "cup", "count": 1, "color": "red"}]}


def geneval(tmp_path: Path, detector: Path, *entries: dict[str, Any], **options: Any) -> Geneval:
    metadata = tmp_path / "metadata.jsonl"
    metadata.write_text("\n".join(map(json.dumps, entries)))
    return Geneval(detector=detector, metadata=metadata, **options)


def at(label: str, left: float, top: float = 10, *, score: float = 0.95) -> Found:
    return Found(label=label, score=score, box=(left, top, left + 10, top + 10))


@pytest.mark.parametrize(
    ("asked", "there", "fits"),
    [
        (CUPS, [at("cup", 0), at("cup", 20)], True),
        (CUPS, [at("cup", 0)], False),
        (CUPS, [at("cup", 0), at("cup", 20), at("cup", 40)], False),
        (CUPS, [at("cup", 0), at("cup", 20, score=0.5)], False),  # counting asks for surer detections
        (BESIDE, [at("cup", 0), at("mouse", 40)], True),
        (BESIDE, [at("cup", 40), at("mouse", 0)], False),
        (BESIDE, [at("cup", 0), at("mouse", 0)], False),
        (BESIDE, [at("cup", 0)], False),
        (ABOVE, [at("cup", 10, 0), at("mouse", 10, 30)], True),
        (ABOVE, [at("cup", 10, 30), at("mouse", 10, 0)], False),
    ],
)
def test_a_picture_fits_if_it_shows_what_is_asked_where_it_is_asked(
    asked: dict[str, Any],
    there: list[Found],
    fits: bool,
    tmp_path: Path,
    detector_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def detect(_: Geneval, picture: object, threshold: float) -> list[Found]:
        return [item for item in there if item.score > threshold]

    monkeypatch.setattr(Geneval, "detect", detect)
    metric = geneval(tmp_path, detector_path, asked)
    metric.check([asked["prompt"]])
    assert metric.scores([asked["prompt"]], PICTURES[:1]).tolist() == [float(fits)]


class Namer:
    """Stands in for CLIP: calls a crop red or blue, by what it has more of, and keeps it."""

    def __init__(self) -> None:
        self.crops: list[np.ndarray] = []

    def texts(self, texts: list[str]) -> torch.Tensor:
        named = [next(color for color in COLORS if color in text.split("-")[0].split()) for text in texts]
        return torch.eye(len(COLORS))[[COLORS.index(color) for color in named]]

    def pictures(self, crops: list[np.ndarray]) -> torch.Tensor:
        self.crops += crops
        redder = [crop[..., 0].mean() > crop[..., 2].mean() for crop in crops]
        return torch.eye(len(COLORS))[[COLORS.index("red" if red else "blue") for red in redder]]


def test_the_colour_of_an_object_is_that_of_its_box_or_mask_alone(
    tmp_path: Path, detector_path: Path, clip_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture = np.zeros((48, 48, 3), np.uint8)
    picture[..., 2] = 255
    picture[10:20, 10:20] = 255, 0, 0
    red = picture[..., 0] == 255
    whole = (0.0, 0.0, 48.0, 48.0)
    objects = {
        "box": (at("cup", 10), 1.0),
        "elsewhere": (at("cup", 30), 0.0),
        "box of all": (Found(label="cup", score=0.9, box=whole), 0.0),
        "mask": (Found(label="cup", score=0.9, box=whole, mask=red), 1.0),
    }
    metric, namer = geneval(tmp_path, detector_path, RED, clip=clip_path), Namer()
    monkeypatch.setattr(Geneval, "_encoder", namer)
    for name, (item, fits) in objects.items():
        monkeypatch.setattr(Geneval, "detect", lambda *_, item=item: [item])
        assert metric.scores(["a red cup"], picture[None]).tolist() == [fits], name
    assert namer.crops[0].shape == (11, 11, 3)  # GenEval's crops reach one pixel further
    assert namer.crops[-1][0, 0].tolist() == [153, 153, 153]


def test_a_detector_of_the_layout_of_transformers_is_read_and_run(
    tmp_path: Path, detector_path: Path
) -> None:
    metric = geneval(tmp_path, detector_path, CUPS)
    found = metric.detect(PICTURES[0], 0.0)
    assert {item.label for item in found} <= {"cup", "mouse"}
    assert len(found) == 5
    assert all(item.box[0] < item.box[2] and item.box[1] < item.box[3] for item in found)
    with pytest.raises(ToolchainError, match="cannot be read as a detector"):
        geneval(tmp_path, tmp_path, CUPS).check(["two cups"])


def test_objects_of_a_model_of_masks_may_overlap(tmp_path: Path) -> None:
    torch.manual_seed(0)
    backbone = SwinConfig(
        image_size=64, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 1, 1], window_size=2,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = Mask2FormerConfig(
        backbone_config=backbone, feature_size=32, mask_feature_size=32, hidden_dim=32, num_attention_heads=2,
        encoder_feedforward_dim=16, dim_feedforward=16, encoder_layers=1, decoder_layers=2, num_queries=5,
        id2label={0: "cup", 1: "mouse"}, label2id={"cup": 0, "mouse": 1},
    )  # fmt: skip
    Mask2FormerForUniversalSegmentation(config).save_pretrained(tmp_path)
    name = "Mask2FormerImageProcessor"
    kind = getattr(transformers, f"{name}Pil", None) or getattr(transformers, name)
    kind(size={"height": 64, "width": 64}).save_pretrained(tmp_path)
    metric = geneval(tmp_path, tmp_path, CUPS)
    found = metric.detect(PICTURES[0], 0.0)
    masks = [item.mask for item in found if item.mask is not None]
    assert len(masks) == len(found) > 1
    assert {item.label for item in found} <= {"cup", "mouse"}
    assert np.sum(masks, axis=0).max() > 1
    for item, mask in zip(found, masks, strict=True):
        left, top, right, bottom = map(int, item.box)
        assert mask.shape == PICTURES[0].shape[:2]
        assert mask[top:bottom, left:right].sum() == mask.sum() > 0
        assert mask[top].any()
        assert mask[:, left].any()
        assert mask[bottom - 1].any()
        assert mask[:, right - 1].any()
    assert metric.detect(PICTURES[0], 1.0) == []


def test_a_model_whose_masks_cover_each_other_is_refused(tmp_path: Path) -> None:
    backbone = ResNetConfig(
        embedding_size=4, hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1],
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = DetrConfig(
        backbone_config=backbone, d_model=128, encoder_layers=1, decoder_layers=1, encoder_attention_heads=8,
        decoder_attention_heads=8, encoder_ffn_dim=16, decoder_ffn_dim=16, num_queries=5,
    )  # fmt: skip
    DetrForSegmentation(config).save_pretrained(tmp_path)
    kind = getattr(transformers, "DetrImageProcessorPil", None) or transformers.DetrImageProcessor
    kind(size={"height": 64, "width": 64}).save_pretrained(tmp_path)
    with pytest.raises(ToolchainError, match=r"DetrForSegmentation, from which .* no masks that may overlap"):
        geneval(tmp_path, tmp_path, CUPS).check(["two cups"])


def test_colours_need_something_that_names_them(tmp_path: Path, detector_path: Path, clip_path: Path) -> None:
    with pytest.raises(ToolchainError, match="the tasks colors ask for colours"):
        geneval(tmp_path, detector_path, RED, CUPS).check(["a red cup", "two cups"])
    geneval(tmp_path, detector_path, RED, CUPS).check(["two cups"])
    geneval(tmp_path, detector_path, RED, clip=clip_path).check(["a red cup"])


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({**CUPS, "include": [{"class": "dog", "count": 1}]}, "knows no dog"),
        ({**RED, "include": [{"class": "cup", "count": 1, "color": "teal"}]}, "is no metadata of GenEval"),
        ({"prompt": "two cups"}, "is no metadata of GenEval"),
    ],
)
def test_metadata_that_makes_no_sense_is_refused(
    entry: dict[str, Any], message: str, tmp_path: Path, detector_path: Path
) -> None:
    with pytest.raises(ToolchainError, match=message):
        geneval(tmp_path, detector_path, entry).check([entry["prompt"]])


def test_prompts_of_which_the_metadata_says_nothing_are_refused(tmp_path: Path, detector_path: Path) -> None:
    with pytest.raises(ToolchainError, match="says nothing of 1 of the prompts, like 'a dog'"):
        geneval(tmp_path, detector_path, CUPS).check(["two cups", "a dog"])
