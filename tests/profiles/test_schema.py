from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest

from profiles.schema import (
    RTX_COMPUTE_CAPABILITIES,
    Profile,
    ProfileError,
    available_profiles,
    load_profile,
)
from profiles.typed import field_docs

OWN = """
name = "own"
description = "A board of mine"
runtimes = ["tensorrt-rtx", "onnxruntime-cuda"]
compute_capability = "12.0"
memory_gib = 8
reserved_gib = 0.5
bandwidth_gb_s = 448.0
peak_tflops = 45
activations = "float16"
weight_bits = 4
group_size = 64
buckets = [[512, 768], [1024, 1024]]
max_batch = 1

[sources]
compute_capability = "its data sheet"
memory_gib = "its data sheet"
bandwidth_gb_s = "its data sheet"
peak_tflops = "measured"
"""


def load(directory: Path, text: str, name: str = "own") -> Profile:
    (directory / f"{name}.toml").write_text(text)
    return load_profile(str(directory / f"{name}.toml"))


@pytest.mark.parametrize("name", available_profiles())
def test_every_profile_that_comes_along_loads(name: str) -> None:
    profile = load_profile(name)
    assert profile.name == name
    assert profile.buckets == (), "a model that paints other sizes could not be exported for it"


def test_rtx4090_is_one() -> None:
    profile = load_profile("rtx4090")
    assert (profile.runtimes[0], profile.compute_capability) == ("tensorrt-rtx", "8.9")
    assert (profile.memory_gib, profile.bandwidth_gb_s) == (24.0, 1008.0)
    assert (profile.activations, profile.weight_bits, profile.group_size) == ("float16", 4, 64)


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("RTX-4090", "rtx4090"),
        ("rtx409", "rtx4090"),
        ("jetson", "jetson-agx-orin-64gb or jetson-orin-nano-8gb"),
        ("rtx4091", "rtx4090 or rtx5090"),
    ],
)
def test_unknown_name_offers_the_nearest_and_all(name: str, near: str) -> None:
    with pytest.raises(
        ProfileError, match=rf"named '{name}'. Did you mean {near}\? Known targets: a100, .*, rtx5090;"
    ):
        load_profile(name)


@pytest.mark.parametrize("name", ["", "schema", "../profiles/rtx4090", "__init__"])
def test_only_names_of_profiles_are_names(name: str) -> None:
    with pytest.raises(ProfileError, match="There is no target named"):
        load_profile(name)


def test_own_file_is_read_from_its_path(tmp_path: Path) -> None:
    profile = load(tmp_path, OWN)
    assert profile.buckets == ((512, 768), (1024, 1024))
    assert (profile.memory_gib, type(profile.memory_gib)) == (8.0, float)
    assert profile.text_tokens == 0


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("max_batch = 1", "", "missing key 'max_batch'"),
        ("max_batch = 1", "max_batch = 1\ndla = true", "unknown key 'dla'"),
        ("max_batch = 1", "max_batch = 0", "max_batch must be a number above zero, not 0"),
        ("weight_bits = 4", "weight_bits = 5", "weight_bits must be 4 or 8 or 16 or 32, not 5"),
        ('"12.0"', '"sm_120"', "compute_capability must look like"),
        ('["tensorrt-rtx", "onnxruntime-cuda"]', '["directml"]', r"runtimes\[0\] must be 'tensorrt-rtx' or"),
        ("[512, 768]", "[512]", r"buckets\[0\] must have 2 entries, not 1"),
        ("[512, 768]", "[512, 7.5]", r"buckets\[0\]\[1\] must be of type int"),
        ("buckets = [[512, 768], [1024, 1024]]", "buckets = 512", "buckets must be a list"),
        ('peak_tflops = "measured"', "peak_tflops = 1", r"sources\['peak_tflops'\] must be of type str"),
        ('"own"', '"other"', "is named 'other' inside"),
        ('name = "own"', "name = ", "cannot be used"),
    ],
)
def test_own_file_is_read_strictly(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in OWN
    with pytest.raises(ProfileError, match=message):
        load(tmp_path, OWN.replace(old, new))


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match=r"Cannot read the device profile .*gone\.toml: No such file"):
        load_profile(str(tmp_path / "gone.toml"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"runtimes": ()}, "runtimes must name at least one"),
        ({"runtimes": ("tensorrt", "onnxruntime-cuda", "tensorrt")}, "runtimes names tensorrt twice"),
        ({"compute_capability": None}, "tensorrt-rtx runs on a GPU: give its compute_capability"),
        (
            {"runtimes": ("onnxruntime-cpu", "onnxruntime-tensorrt"), "compute_capability": None},
            "onnxruntime-tensorrt runs on a GPU: give its compute_capability",
        ),
        ({"runtimes": ("onnxruntime-cpu",)}, "compute_capability is 8.9, but onnxruntime-cpu uses no GPU"),
        (
            {"compute_capability": "9.0"},
            r"no engines for compute capability 9.0, only for 7.5, .* 12.1: name the runtime tensorrt",
        ),
        (
            {"runtimes": ("onnxruntime-cpu",), "compute_capability": None},
            "would convert float16 activations",
        ),
        (
            {
                "runtimes": ("onnxruntime-cpu",),
                "compute_capability": None,
                "activations": "float32",
                "memory_shared": True,
            },
            "memory_shared is said of a GPU's memory, but onnxruntime-cpu uses no GPU",
        ),
        ({"reserved_gib": 24.0}, "reserved_gib must be from zero to below memory_gib, which is 24, not 24"),
        ({"reserved_gib": -1.0}, "reserved_gib must be from zero"),
        ({"bandwidth_gb_s": 0.0}, "bandwidth_gb_s must be a number above zero, not 0"),
        ({"peak_tflops": float("nan")}, "peak_tflops must be a number above zero, not nan"),
        ({"memory_gib": float("inf")}, "memory_gib must be a number above zero, not inf"),
        ({"text_tokens": -1}, "text_tokens must not be negative"),
        ({"group_size": 48}, "4-bit weights take a group_size of 32, 64, 128, not 48"),
        (
            {"buckets": ((512, 0),)},
            r"a bucket is \[height, width\] in pixels, both above zero, not \[512, 0\]",
        ),
        ({"buckets": ((64, 96), (96, 64), (64, 96))}, r"buckets names \[64, 96\] twice"),
        ({"sources": {}}, "say where compute_capability, memory_gib, bandwidth_gb_s, peak_tflops is from"),
    ],
)
def test_contradictions_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ProfileError, match=message):
        dataclasses.replace(load_profile("rtx4090"), **changes)


def test_a_source_is_of_a_field() -> None:
    profile = load_profile("rtx4090")
    with pytest.raises(ProfileError, match="sources names wattage, which a profile does not have"):
        dataclasses.replace(profile, sources=profile.sources | {"wattage": "a guess"})


def test_weights_that_are_not_rounded_in_groups_take_any_group_size() -> None:
    assert dataclasses.replace(load_profile("rtx4090"), weight_bits=16, group_size=1).group_size == 1


def test_a_device_without_an_rtx_engine_takes_tensorrt() -> None:
    profile = dataclasses.replace(
        load_profile("rtx4090"), runtimes=("tensorrt", "onnxruntime-cuda"), compute_capability="9.0"
    )
    assert "9.0" not in RTX_COMPUTE_CAPABILITIES
    assert profile.uses_gpu


def test_own_keys_lie_over_those_of_the_extended_profile(tmp_path: Path) -> None:
    base = load_profile("rtx4090")
    text = """
    name = "mine"
    description = "A card whose memory I share"
    extends = "rtx4090"
    memory_gib = 20
    peak_tflops = 150
    buckets = [[1024, 1024]]
    sources = { peak_tflops = "measured" }
    """
    mine = load(tmp_path, text, "mine")
    assert mine == dataclasses.replace(
        base,
        name="mine",
        description="A card whose memory I share",
        memory_gib=20.0,
        peak_tflops=150.0,
        buckets=((1024, 1024),),
        sources=mine.sources,
    )
    # The whitepaper says nothing of the 20 GiB.
    assert mine.sources["memory_gib"] == str(tmp_path / "mine.toml")
    assert mine.sources["peak_tflops"] == "measured"
    assert mine.sources["bandwidth_gb_s"] == base.sources["bandwidth_gb_s"]


def test_a_file_is_extended_by_its_path_from_the_extending_one(tmp_path: Path) -> None:
    (tmp_path / "boards").mkdir()
    load(tmp_path, OWN)
    text = 'name = "big"\ndescription = "More of it"\nextends = "../own.toml"\nmax_batch = 8\n'
    assert load(tmp_path / "boards", text, "big").max_batch == 8
    text = 'name = "third"\ndescription = "Same"\nextends = "boards/big.toml"\n'
    third = load(tmp_path, text, "third")
    assert (third.max_batch, third.memory_gib) == (8, 8.0)


@pytest.mark.parametrize("key", ["name", "description"])
def test_what_names_a_device_is_not_inherited(tmp_path: Path, key: str) -> None:
    lines = ['name = "mine"', 'description = "Mine"', 'extends = "rtx4090"']
    with pytest.raises(ProfileError, match=f"missing key '{key}'"):
        load(tmp_path, "\n".join(line for line in lines if not line.startswith(key)), "mine")


@pytest.mark.parametrize(
    ("extends", "message"),
    [
        ('"rtx409"', r"mine\.toml cannot be used: There is no target named 'rtx409'. Did you mean rtx4090"),
        ('"gone.toml"', r"Cannot read the device profile .*gone\.toml: No such file"),
        ("7", "extends must be the name of a target or the path of a .toml file, not 7"),
        ('"rtx4090"\nruntimes = ["onnxruntime-cpu"]', "compute_capability is 8.9, but onnxruntime-cpu"),
        ('"rtx4090"\nsources = 7', "sources must be a table"),
        ('"mine.toml"', r"mine\.toml extends .*mine\.toml, which goes round in a circle"),
    ],
)
def test_extends_is_read_strictly(tmp_path: Path, extends: str, message: str) -> None:
    with pytest.raises(ProfileError, match=message):
        load(tmp_path, f'name = "mine"\ndescription = "Mine"\nextends = {extends}\n', "mine")


def test_a_longer_circle_is_refused_too(tmp_path: Path) -> None:
    for name, other in (("one", "two"), ("two", "one")):
        (tmp_path / f"{name}.toml").write_text(
            f'name = "{name}"\ndescription = "Round"\nextends = "./{other}.toml"\n'
        )
    with pytest.raises(ProfileError, match=r"one\.toml extends .*two\.toml extends .*one\.toml, which goes"):
        load_profile(str(tmp_path / "one.toml"))


def test_every_field_has_its_text() -> None:
    docs = field_docs(Profile)
    assert list(docs) == [field.name for field in dataclasses.fields(Profile)]
    assert all(re.fullmatch(r"[A-Z].*\.", doc) for doc in docs.values())
