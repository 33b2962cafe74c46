"""What fits where: rules that hold for any model and device, on models whose weights are not there."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest

from export.fit import ALL_BITS, ModelSize, fit_target
from profiles.schema import Profile, load_profile
from toolchain.errors import ToolchainError
from toolchain.families import Model, open_model
from toolchain.rules import parse_units

PUBLISHED = {
    "stabilityai/stable-diffusion-3.5-large": 8_056_627_520,
    "stabilityai/stable-diffusion-3.5-large-turbo": 8_056_627_520,
    "stabilityai/stable-diffusion-3.5-medium": 2_243_171_520,
    "black-forest-labs/FLUX.1-schnell": 11_891_178_560,
    "black-forest-labs/FLUX.1-dev": 11_901_408_320,
}


@pytest.fixture(scope="module")
def size(path: Path) -> ModelSize:
    return ModelSize(open_model(str(path), precision="config"))


def with_memory(name: str, num_bytes: int) -> Profile:
    return dataclasses.replace(load_profile(name), memory_gib=num_bytes / 2**30 + 1, reserved_gib=1.0)


@pytest.mark.parametrize("target", ["cpu-x86", "rtx4090", "jetson-orin-nano-8gb"])
def test_a_model_fits_to_the_byte(size: ModelSize, target: str) -> None:
    need = fit_target(size, load_profile(target), 4).in_turn
    assert fit_target(size, with_memory(target, need), 4).verdict.startswith("fits")
    short = fit_target(size, with_memory(target, need - 1), 4)
    assert (short.verdict, short.missing) == ("does not fit", 1)


@pytest.mark.parametrize("target", ["cpu-x86", "rtx4090", "jetson-orin-nano-8gb"])
def test_the_smallest_ratio_fits_and_a_smaller_one_does_not(size: ModelSize, target: str) -> None:
    need = fit_target(size, load_profile(target), 4, 0.25)
    found = fit_target(size, with_memory(target, need.in_turn), 4)
    least = found.least_ratio[4]
    assert least is not None
    assert least <= 0.25
    assert fit_target(size, with_memory(target, need.in_turn), 4, least).missing == 0
    if least:
        assert fit_target(size, with_memory(target, need.in_turn), 4, least - 0.01).missing > 0


@pytest.mark.parametrize("target", ["cpu-x86", "rtx4090", "jetson-orin-nano-8gb"])
def test_no_ratio_is_promised_where_not_even_half_of_it_fits(size: ModelSize, target: str) -> None:
    floor = fit_target(size, load_profile(target), 4).floor
    assert floor == fit_target(size, load_profile(target), 4, 0.5).in_turn
    assert fit_target(size, with_memory(target, floor), 4).least_ratio[4] is not None
    assert fit_target(size, with_memory(target, floor - 1), 4).least_ratio[4] is None


def test_what_takes_the_most_in_its_turn_is_named(size: ModelSize) -> None:
    large = dataclasses.replace(load_profile("cpu-x86"), buckets=((512, 512),))
    assert fit_target(size, large, 4).floor_part == "vae"
    assert fit_target(size, load_profile("rtx4090"), 4).floor_part == "transformer"


def test_fewer_bits_and_fewer_parameters_take_less(size: ModelSize) -> None:
    gpu = load_profile("rtx4090")
    needs = [fit_target(size, gpu, bits).in_turn for bits in ALL_BITS]
    assert needs == sorted(needs, reverse=True)
    assert fit_target(size, gpu, 4, 0.3).in_turn < needs[-1]


def test_parts_in_turn_take_no_more_than_all_together(size: ModelSize) -> None:
    for name in ("cpu-x86", "rtx4090", "jetson-orin-nano-8gb"):
        found = fit_target(size, load_profile(name), 4)
        assert found.in_turn <= found.together


def test_only_a_gpu_with_memory_of_its_own_asks_the_host_for_memory(size: ModelSize) -> None:
    hosts = {
        name: fit_target(size, load_profile(name), 4).host
        for name in ("cpu-x86", "rtx4090", "jetson-orin-nano-8gb")
    }
    assert hosts["rtx4090"] > 0
    assert hosts["cpu-x86"] == hosts["jetson-orin-nano-8gb"] == 0


@pytest.mark.parametrize("source", PUBLISHED)
def test_published_models_are_known_without_a_network(
    source: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    assert open_model(source, precision="config").num_parameters == PUBLISHED[source]


def test_a_configuration_counts_what_the_weights_weigh(path: Path, on_disk: Model, tmp_path: Path) -> None:
    shutil.copytree(path, bare := tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors"))
    assert open_model(str(bare), precision="config").geometry == on_disk.geometry
    with pytest.raises(ToolchainError, match="holds no weights"):
        open_model(str(bare), precision="none")


def test_units_can_be_taken_from_a_configuration() -> None:
    model = open_model("stabilityai/stable-diffusion-3.5-large-turbo", precision="config")
    pruned = model.without_units(parse_units("25-28,31-34", model.geometry))
    assert (
        pruned.num_parameters
        == model.geometry.remaining(parse_units("25-28,31-34", model.geometry), "zero").parameters
    )
    assert len(pruned.mmdit.blocks) == 30
