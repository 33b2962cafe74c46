from __future__ import annotations

from pathlib import Path

import pytest

from profiles.schema import ProfileError, available_profiles, load_profile

OWN = """
name = "own"
description = "A board of mine"
runtime = "tensorrt-rtx"
compute_capability = "12.0"
memory_gib = 8
activations = "float16"
weight_bits = 4
group_size = 64
buckets = [[512, 768], [1024, 1024]]
max_batch = 1
"""


@pytest.mark.parametrize("name", available_profiles())
def test_every_profile_that_comes_along_loads(name: str) -> None:
    assert load_profile(name).name == name


def test_rtx4090_is_one() -> None:
    profile = load_profile("rtx4090")
    assert (profile.runtime, profile.compute_capability, profile.memory_gib) == ("tensorrt-rtx", "8.9", 24.0)
    assert (profile.activations, profile.weight_bits, profile.group_size) == ("float16", 4, 64)


def test_unknown_name_offers_the_nearest_and_all() -> None:
    with pytest.raises(
        ProfileError, match=r"named 'RTX-4090'. Did you mean rtx4090\? Known targets: cpu-x86, rtx"
    ):
        load_profile("RTX-4090")


@pytest.mark.parametrize("name", ["", "schema", "../profiles/rtx4090", "__init__"])
def test_only_names_of_profiles_are_names(name: str) -> None:
    with pytest.raises(ProfileError, match="There is no target named"):
        load_profile(name)


def test_own_file_is_read_from_its_path(tmp_path: Path) -> None:
    (tmp_path / "own.toml").write_text(OWN)
    profile = load_profile(str(tmp_path / "own.toml"))
    assert profile.buckets == ((512, 768), (1024, 1024))
    assert (profile.memory_gib, type(profile.memory_gib)) == (8.0, float)
    assert profile.text_tokens == 0


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("max_batch = 1", "", "missing key 'max_batch'"),
        ("max_batch = 1", "max_batch = 1\ndla = true", "unknown key 'dla'"),
        ("max_batch = 1", "max_batch = 0", "max_batch must be above zero, not 0"),
        ("weight_bits = 4", "weight_bits = 8", "weight_bits must be 4 or 16 or 32, not 8"),
        ('"12.0"', '"sm_120"', "compute_capability must look like"),
        ('compute_capability = "12.0"', "", "an engine is built for one GPU"),
        ("[512, 768]", "[512]", r"buckets\[0\] must have 2 entries, not 1"),
        ("[512, 768]", "[512, 0]", r"a bucket is \[height, width\]"),
        ("[512, 768]", "[512, 7.5]", r"buckets\[0\]\[1\] must be of type int"),
        ("buckets = [[512, 768], [1024, 1024]]", "buckets = 512", "buckets must be a list"),
        ('"own"', '"other"', "is named 'other' inside"),
        ('name = "own"', "name = ", "cannot be used"),
    ],
)
def test_own_file_is_read_strictly(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in OWN
    (tmp_path / "own.toml").write_text(OWN.replace(old, new))
    with pytest.raises(ProfileError, match=message):
        load_profile(str(tmp_path / "own.toml"))


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match=r"Cannot read the device profile .*gone\.toml: No such file"):
        load_profile(str(tmp_path / "gone.toml"))
