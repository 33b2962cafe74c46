"""The exported tokenizers give the ids that the pipelines of diffusers feed to their text encoders."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch

from deploy import bundle as format
from export.errors import ExportError
from export.tokenizers import export_tokenizer
from toolchain.families import Model, open_model

PROMPTS = {
    "short": "a big cab",
    "empty": "",
    "blank": "  \n a\t",
    "unicode": "ein Käfer, 红色的圆 🦊 ｆｕｌｌ ﬁ",
    "special": "</s> a <pad> <|endoftext|> b",
    "long": "a red cab above a blue bed " * 40,
}


@pytest.fixture(scope="module", params=["tiny_sd35_path", "tiny_flux_path"])
def pipeline_model(request: pytest.FixtureRequest) -> Model:
    return open_model(str(request.getfixturevalue(request.param)))


def fed(model: Model, prompt: str) -> dict[str, list[int]]:
    """What the pipeline gives each of its text encoders, by the name of the tokenizer."""
    found: dict[str, list[int]] = {}

    def note(name: str) -> Any:
        def hook(_: torch.nn.Module, inputs: tuple[torch.Tensor]) -> None:
            found[name] = inputs[0][0].tolist()

        return hook

    encoders = {name: part for name, part in model.pipeline.components.items() if "text_encoder" in name}
    hooks = [
        part.register_forward_pre_hook(note(name.replace("text_encoder", "tokenizer")))
        for name, part in encoders.items()
        if part is not None
    ]
    with torch.no_grad():
        model.mmdit.encode_prompts(model.pipeline, [prompt], model.defaults.max_sequence_length)
    for hook in hooks:
        hook.remove()
    return found


def device_ids(described: format.Tokenizer, directory: Path, prompt: str) -> list[int]:
    """By the manifest: what is too long is cut before its end token, what is too short is padded."""
    tokenizer = tokenizers.Tokenizer.from_file(str(directory / described.path))
    assert tokenizer.truncation is None
    assert tokenizer.padding is None
    ids = tokenizer.encode(prompt).ids
    if len(ids) > described.max_length:
        ids = [*ids[: described.max_length - 1], ids[-1]]
    return ids + [described.pad_id] * (described.max_length - len(ids))


@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS)
def test_the_ids_are_those_that_diffusers_feeds(pipeline_model: Model, tmp_path: Path, prompt: str) -> None:
    expected = fed(pipeline_model, prompt)
    assert len(expected) == len([name for name in pipeline_model.pipeline.components if "tokenizer" in name])
    for name, ids in expected.items():
        described = export_tokenizer(pipeline_model, name, tmp_path)
        assert device_ids(described, tmp_path, prompt) == ids


def test_the_file_keeps_nothing_of_a_call_that_padded_and_truncated(
    pipeline_model: Model, tmp_path: Path
) -> None:
    pipeline_model.pipeline.tokenizer("a", padding="max_length", max_length=4, truncation=True)
    described = export_tokenizer(pipeline_model, "tokenizer", tmp_path)
    stored = tokenizers.Tokenizer.from_file(str(tmp_path / described.path))
    assert (stored.truncation, stored.padding) == (None, None)


def test_lengths_are_clips_own_and_what_t5_is_run_with(tiny_flux_path: Path, tmp_path: Path) -> None:
    model = open_model(str(tiny_flux_path), precision="none")
    model = dataclasses.replace(model, defaults=dataclasses.replace(model.defaults, max_sequence_length=5))
    assert export_tokenizer(model, "tokenizer", tmp_path).max_length == 16
    assert export_tokenizer(model, "tokenizer_2", tmp_path).max_length == 5


def test_a_t5_that_is_given_no_tokens_is_refused(tiny_flux_path: Path, tmp_path: Path) -> None:
    model = open_model(str(tiny_flux_path), precision="none")
    model = dataclasses.replace(model, defaults=dataclasses.replace(model.defaults, max_sequence_length=0))
    with pytest.raises(ExportError, match=r"max_sequence_length of 0, .* --without t5"):
        export_tokenizer(model, "tokenizer_2", tmp_path)


@pytest.mark.parametrize("side", ["padding_side", "truncation_side"])
def test_a_tokenizer_that_works_from_the_left_is_refused(
    tiny_flux_path: Path, tmp_path: Path, side: str
) -> None:
    model = open_model(str(tiny_flux_path), precision="none")
    setattr(model.pipeline.tokenizer, side, "left")
    with pytest.raises(ExportError, match=f"The tokenizer has the {side} 'left'"):
        export_tokenizer(model, "tokenizer", tmp_path)


def test_a_tokenizer_that_only_python_runs_is_refused(tiny_flux_path: Path, tmp_path: Path) -> None:
    model = open_model(str(tiny_flux_path), precision="none")

    class PythonTokenizer:
        pad_token_id = 0

    model.pipeline.tokenizer = PythonTokenizer()
    with pytest.raises(ExportError, match="The tokenizer is a PythonTokenizer, which runs in Python only"):
        export_tokenizer(model, "tokenizer", tmp_path)
