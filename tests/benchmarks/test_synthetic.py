"""Synthetic models are laid out as published ones are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from benchmarks.synthetic import STUDENTS, skeleton, write_student
from toolchain.errors import ToolchainError
from toolchain.families import open_model

TINY = ["tiny-sd3.5", "tiny-flux"]


@pytest.fixture(scope="module", params=TINY)
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("synthetic") / request.param
    write_student(path, request.param, shard_bytes=100_000)
    return path


def weights_of(path: Path) -> dict[str, torch.Tensor]:
    found = {}
    for file in sorted(path.glob("transformer/*.safetensors")):
        with safe_open(file, framework="pt") as stored:
            found |= {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 - it is no mapping
    return found


def test_it_opens_and_its_velocities_are_finite(written: Path) -> None:
    model = open_model(str(written), precision="stored")
    assert model.stored_dtype == torch.bfloat16
    assert model.latent_shape == (16, 8, 8)
    assert not model.guided
    text = model.mmdit.encode_prompts(model.pipeline, ["a red circle"], model.defaults.max_sequence_length)
    noise = torch.randn(1, *model.latent_shape)
    with torch.no_grad():
        velocity = model.mmdit.velocity(noise, torch.tensor([500.0]), text)
    assert 0.1 < float(velocity.float().std()) < 10


def test_it_opens_without_its_weights(written: Path) -> None:
    model = open_model(str(written), precision="none")
    weights = model.weights("transformer")
    assert set(weights) == set(model.pipeline.transformer.state_dict())


def test_its_configuration_can_be_had_alone(written: Path, tmp_path: Path) -> None:
    write_student(tmp_path / "model", written.name, weights=False)
    assert not weights_of(tmp_path / "model")
    configured = open_model(str(tmp_path / "model"), precision="config")
    assert configured.geometry == open_model(str(written), precision="none").geometry


def test_the_index_names_each_tensors_shard(written: Path) -> None:
    (index,) = written.glob("transformer/*.index.json")
    stored = json.loads(index.read_text())
    found = {}
    for file in sorted(written.glob("transformer/*.safetensors")):
        with safe_open(file, framework="pt") as shard:
            found |= dict.fromkeys(shard.keys(), file.name)
    assert stored["weight_map"] == found
    assert len(set(found.values())) > 1
    assert stored["metadata"]["total_size"] == sum(item.nbytes for item in weights_of(written).values())


@pytest.mark.parametrize("name", TINY)
def test_a_seed_gives_the_same_weights_again_and_another_one_others(name: str, tmp_path: Path) -> None:
    for directory, seed in (("a", 0), ("b", 0), ("c", 1)):
        write_student(tmp_path / directory, name, seed=seed)
    a, b, c = (weights_of(tmp_path / directory) for directory in "abc")
    assert all(torch.equal(item, b[key]) for key, item in a.items())
    assert any(not torch.equal(item, c[key]) for key, item in a.items())


def test_linears_keep_the_size_of_what_they_are_given(tmp_path: Path) -> None:
    write_student(tmp_path / "model", "tiny-sd3.5")
    weight = weights_of(tmp_path / "model")["transformer_blocks.0.ff.net.2.weight"].float()
    assert float(weight.std()) * weight.shape[1] ** 0.5 == pytest.approx(1, rel=0.02)


def test_positions_are_those_that_diffusers_computes(tmp_path: Path) -> None:
    write_student(tmp_path / "model", "tiny-sd3.5")
    stored = weights_of(tmp_path / "model")["pos_embed.pos_embed"]
    student = STUDENTS["tiny-sd3.5"]
    computed = student.kind.plain(**student.config).pos_embed.pos_embed
    assert torch.equal(stored, computed.bfloat16())


@pytest.mark.parametrize("name", TINY)
def test_fewer_blocks_can_be_kept(name: str, tmp_path: Path) -> None:
    write_student(tmp_path / "model", name, blocks=2)
    model = open_model(str(tmp_path / "model"), precision="stored")
    assert len(model.mmdit.blocks) == 2
    with pytest.raises(ToolchainError, match="blocks, not 9"):
        write_student(tmp_path / "other", name, blocks=9)


@pytest.mark.parametrize(
    ("name", "billions", "share", "blocks"),
    [("sd3.5-large-turbo-pruned", 6.353, 0.7885, 30), ("flux.1-schnell-pruned", 8.295, 0.6975, 40)],
)
def test_real_students_have_the_parameters_of_the_published_model_less_the_removed(
    name: str, billions: float, share: float, blocks: int
) -> None:
    transformer = skeleton(STUDENTS[name])
    with torch.device("meta"):
        whole = STUDENTS[name].kind.plain(**STUDENTS[name].config)
    kept, full = (sum(item.numel() for item in module.parameters()) for module in (transformer, whole))
    assert (round(kept / 1e9, 3), round(kept / full, 4)) == (billions, share)
    view = STUDENTS[name].kind(transformer, guidance_scale=0.0)
    assert len(view.blocks) == blocks


def test_an_unknown_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ToolchainError, match="no synthetic model 'sd4'"):
        write_student(tmp_path / "model", "sd4")
