"""An adapter that diffusers wrote is baked in as diffusers would apply it, as a whole or not at all."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn

from toolchain import cli, lora
from toolchain.artifacts import read_json
from toolchain.errors import ToolchainError
from toolchain.families import open_model
from toolchain.lora import Adapter, bake_


def write(pipeline: Any, directory: Path, *, seed: int = 0) -> Path:
    """An adapter with random weights, as diffusers writes it; the pipeline has it from then on."""
    torch.manual_seed(seed)
    transformer = pipeline.transformer
    config = LoraConfig(
        r=4, lora_alpha=8, target_modules=["to_q", "to_out.0", "add_k_proj", "pos_embed.proj", "x_embedder"]
    )
    transformer.add_adapter(config)
    for name, item in transformer.named_parameters():
        if "lora_" in name:
            nn.init.normal_(item, std=0.3)
    layers = get_peft_model_state_dict(transformer, adapter_name="default")
    notes = {"transformer_lora_adapter_metadata": config.to_dict()}
    pipeline.save_lora_weights(directory, transformer_lora_layers=layers, **notes)
    return directory / "pytorch_lora_weights.safetensors"


@pytest.fixture(params=["tiny_dual_path", "tiny_flux_path"])
def path(request: pytest.FixtureRequest) -> Path:
    """A model of each family."""
    found: Path = request.getfixturevalue(request.param)
    return found


@pytest.fixture
def adapter(path: Path, tmp_path: Path) -> Path:
    return write(open_model(str(path)).pipeline, tmp_path / "lora")


one_family = pytest.mark.parametrize("path", ["tiny_dual_path"], indirect=True)


def latents(pipeline: Any) -> torch.Tensor:
    images: torch.Tensor = pipeline(
        "a bee",
        height=64,
        width=64,
        num_inference_steps=2,
        max_sequence_length=0,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
    ).images
    return images


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_the_baked_model_paints_what_diffusers_paints_with_the_adapter(
    path: Path, adapter: Path, scale: float
) -> None:
    plain, theirs, ours = (open_model(str(path)) for _ in range(3))
    theirs.pipeline.load_lora_weights(str(adapter), adapter_name="one")
    theirs.pipeline.set_adapters("one", scale)
    baked = bake_(ours, [Adapter(source=str(adapter), scale=scale)])
    expected = latents(theirs.pipeline)
    torch.testing.assert_close(latents(baked.pipeline), expected, rtol=1e-4, atol=1e-4)
    assert (latents(plain.pipeline) - expected).abs().mean() > 0.01
    assert baked.adapters == (f"{adapter}:{scale:g}",)


def test_adapters_add_up_and_leave_no_trace_but_in_the_weights(
    path: Path, adapter: Path, tmp_path: Path
) -> None:
    other = write(open_model(str(path)).pipeline, tmp_path / "other", seed=1)
    plain, one, two, both = (open_model(str(path)) for _ in range(4))
    bake_(one, [Adapter(source=str(adapter))])
    bake_(two, [Adapter(source=str(other))])
    baked = bake_(both, [Adapter(source=str(adapter)), Adapter(source=str(other))])
    assert baked.adapters == (f"{adapter}:1", f"{other}:1")
    weights = [model.pipeline.transformer.state_dict() for model in (plain, one, two, both)]
    assert weights[3].keys() == weights[0].keys()
    assert not any(item.requires_grad for item in both.pipeline.transformer.parameters())
    changed = 0
    for name, before in weights[0].items():
        expected = weights[1][name] + weights[2][name] - before
        torch.testing.assert_close(weights[3][name], expected, rtol=1e-4, atol=1e-4)
        changed += not torch.equal(weights[3][name], before)
    assert changed == len(load_file(adapter)) // 2


@one_family
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"transformer.nosuch.lora_A.weight": (4, 8), "transformer.nosuch.lora_B.weight": (8, 4)}, "nosuch"),
        ({"transformer.transformer_blocks.0.attn.to_k.lora_A.weight": (4, 32)}, r"to_k\.lora_A\.weight"),
        (
            {
                "transformer.transformer_blocks.0.attn.to_k.lora_A.weight": (4, 48),
                "transformer.transformer_blocks.0.attn.to_k.lora_B.weight": (32, 4),
            },
            r"no place for 2 of its .* weights: .*to_k\.lora_A",
        ),
        ({"text_encoder_3.encoder.lora_A.weight": (4, 8)}, r"text_encoder_3"),
        ({"transformer.transformer_blocks.0.attn.to_q.dora_scale": (32,)}, "dora_scale"),
        ({"transformer.transformer_blocks.0.attn.to_q.diff": (32, 32)}, r"to_q\.diff"),
    ],
)
def test_an_adapter_that_fits_in_part_is_refused_by_its_keys_and_changes_nothing(
    path: Path, adapter: Path, change: dict[str, tuple[int, ...]], message: str
) -> None:
    tensors = load_file(adapter) | {name: torch.ones(shape) for name, shape in change.items()}
    save_file(tensors, adapter)
    model, plain = open_model(str(path)), open_model(str(path))
    with pytest.raises(ToolchainError, match=message):
        bake_(model, [Adapter(source=str(adapter))])
    before = plain.pipeline.transformer.state_dict()
    after = model.pipeline.transformer.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


@one_family
def test_an_adapter_of_another_model_is_refused(
    path: Path, adapter: Path, tiny_path: Path, tmp_path: Path
) -> None:
    with pytest.raises(ToolchainError, match="is no adapter of this model, which has no place for"):
        bake_(open_model(str(tiny_path)), [Adapter(source=str(adapter))])
    save_file({}, tmp_path / "empty.safetensors")
    with pytest.raises(ToolchainError, match="it is empty"):
        bake_(open_model(str(path)), [Adapter(source=str(tmp_path / "empty.safetensors"))])


@one_family
def test_numbers_that_are_not_finite_are_refused(path: Path, adapter: Path) -> None:
    tensors = load_file(adapter)
    name = min(tensors)
    save_file(tensors | {name: tensors[name] * float("nan")}, adapter)
    with pytest.raises(ToolchainError, match="not finite"):
        bake_(open_model(str(path)), [Adapter(source=str(adapter))])


@one_family
def test_what_diffusers_takes_otherwise_than_its_keys_say_is_refused(
    path: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = open_model(str(path))
    monkeypatch.setattr(type(model.pipeline), "load_lora_weights", lambda *_, **__: None)
    with pytest.raises(ToolchainError, match=r"diffusers did not take .*transformer_blocks\.0\.attn\.to_q"):
        bake_(model, [Adapter(source=str(adapter))])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("lora.bin", b"", r"no \.safetensors file; no other kind is opened"),
        ("lora.safetensors", b"not one", "cannot be baked in as a LoRA adapter"),
        ("nosuch", None, "there is no adapter"),
    ],
)
def test_a_file_that_is_no_adapter_is_one_error(
    tiny_path: Path, tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ToolchainError, match=message):
        bake_(open_model(str(tiny_path)), [Adapter(source=str(tmp_path / name))])


@pytest.mark.parametrize(
    ("text", "source", "scale"),
    [
        ("a.safetensors", "a.safetensors", 1.0),
        ("owner/name:0.8", "owner/name", 0.8),
        ("owner/name:-1", "owner/name", -1.0),
        ("C:/a.safetensors", "C:/a.safetensors", 1.0),
    ],
)
def test_a_scale_stands_behind_a_colon(text: str, source: str, scale: float) -> None:
    assert Adapter.parse(text) == Adapter(source=source, scale=scale)


@pytest.mark.parametrize("scale", ["nan", "inf", "0"])
def test_a_scale_of_no_use_is_refused(scale: str) -> None:
    with pytest.raises(ToolchainError, match="a scale is a number other than zero"):
        Adapter.parse(f"owner/name:{scale}")


@one_family
@pytest.mark.parametrize(
    ("source", "files", "fetched"),
    [
        ("owner/name", ["README.md", "style.safetensors"], "style.safetensors"),
        (
            "owner/name",
            ["a.safetensors", "pytorch_lora_weights.safetensors"],
            "pytorch_lora_weights.safetensors",
        ),
        ("owner/name/b/a.safetensors", ["b/a.safetensors", "c.safetensors"], "b/a.safetensors"),
    ],
)
def test_an_adapter_on_the_hub_is_its_only_file_or_the_one_named(
    adapter: Path,
    path: Path,
    monkeypatch: pytest.MonkeyPatch,
    source: str,
    files: list[str],
    fetched: str,
) -> None:
    asked = []

    def fetch(repository: str, name: str) -> str:
        asked.append((repository, name))
        return str(adapter)

    monkeypatch.setattr(lora, "list_repo_files", lambda _: files)
    monkeypatch.setattr(lora, "hf_hub_download", fetch)
    assert bake_(open_model(str(path)), [Adapter(source=source)]).adapters == (f"{source}:1",)
    assert asked == [("owner/name", fetched)]


def test_a_repository_of_several_adapters_has_to_be_told_which(
    tiny_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lora, "list_repo_files", lambda _: ["a.safetensors", "b.safetensors"])
    with pytest.raises(ToolchainError, match=r"holds a\.safetensors, b\.safetensors; name the adapter"):
        bake_(open_model(str(tiny_path)), [Adapter(source="owner/name")])


def test_a_student_is_of_the_model_with_its_adapters(
    tiny_dual_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    adapter = write(open_model(str(tiny_dual_path)).pipeline, tmp_path)
    Path("prompts.txt").write_text("\n".join(f"a picture of {index} cats" for index in range(4)))
    command = ["hptool", "compress", str(tiny_dual_path), "--lora", f"{adapter}:0.5", "--remove", "1"]
    command += ["--steps", "0", "--prompts", "prompts.txt", "--num-prompts", "2", "-o", "student"]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert not stopped.value.code
    ours = open_model("student").pipeline.transformer.transformer_blocks[0].state_dict()
    baked = bake_(open_model(str(tiny_dual_path)), [Adapter(source=str(adapter), scale=0.5)])
    theirs = baked.pipeline.transformer.transformer_blocks[0].state_dict()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor.bfloat16().float(), rtol=0, atol=0)
    assert read_json(Path("student/report.json"))["adapters"] == [f"{adapter}:0.5"]
