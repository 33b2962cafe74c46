from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from deploy.bundle import (
    MANIFEST,
    BundleError,
    manifest_from_json,
    manifest_to_json,
    open_bundle,
)

MakeBundle = Callable[..., Path]

GRAPH = "transformer/model.onnx"


def change(path: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    data = json.loads((path / MANIFEST).read_text())
    edit(data)
    (path / MANIFEST).write_text(json.dumps(data))


def test_whole_bundle_opens(make_bundle: MakeBundle) -> None:
    path = make_bundle()
    bundle = open_bundle(path)
    assert bundle.file(GRAPH) == path / GRAPH
    assert manifest_from_json(json.loads((path / MANIFEST).read_text())) == bundle.manifest


def test_manifest_survives_the_way_through_json(make_bundle: MakeBundle) -> None:
    manifest = open_bundle(make_bundle()).manifest
    assert manifest_from_json(json.loads(json.dumps(manifest_to_json(manifest)))) == manifest


def test_altered_file_is_refused(make_bundle: MakeBundle) -> None:
    path = make_bundle()
    content = bytearray((path / GRAPH).read_bytes())
    content[-1] ^= 1
    (path / GRAPH).write_bytes(content)
    with pytest.raises(BundleError, match=r"transformer/model\.onnx is not the file that was exported"):
        open_bundle(path)


def test_only_digests_are_left_out_without_verification(make_bundle: MakeBundle) -> None:
    path = make_bundle()
    content = bytearray((path / GRAPH).read_bytes())
    content[-1] ^= 1
    (path / GRAPH).write_bytes(content)
    open_bundle(path, verify=False)
    (path / GRAPH).write_bytes(content[:-1])
    with pytest.raises(BundleError, match=f"has {len(content) - 1} bytes where its manifest says"):
        open_bundle(path, verify=False)


def test_missing_file_is_refused(make_bundle: MakeBundle) -> None:
    path = make_bundle()
    (path / GRAPH).unlink()
    with pytest.raises(BundleError, match=r"lacks 'transformer/model\.onnx'"):
        open_bundle(path)


def test_unlisted_file_is_refused(make_bundle: MakeBundle) -> None:
    path = make_bundle()
    (path / "transformer" / "extra.bin").touch()
    with pytest.raises(
        BundleError, match=r"holds 'transformer/extra\.bin', which its manifest does not list"
    ):
        open_bundle(path)


def test_link_to_a_file_is_refused_even_with_the_right_content(
    make_bundle: MakeBundle, tmp_path: Path
) -> None:
    path = make_bundle()
    (path / GRAPH).rename(tmp_path / "outside.onnx")
    (path / GRAPH).symlink_to(tmp_path / "outside.onnx")
    with pytest.raises(BundleError, match=r"model\.onnx is a symbolic link"):
        open_bundle(path)


def test_link_to_a_folder_is_refused(make_bundle: MakeBundle, tmp_path: Path) -> None:
    path = make_bundle()
    (path / "transformer").rename(tmp_path / "outside")
    (path / "transformer").symlink_to(tmp_path / "outside")
    with pytest.raises(BundleError, match="transformer is a symbolic link"):
        open_bundle(path)


def test_pipe_is_refused(make_bundle: MakeBundle) -> None:
    path = make_bundle()
    os.mkfifo(path / "pipe")
    with pytest.raises(BundleError, match="pipe is not a regular file"):
        open_bundle(path)


def test_linked_manifest_is_refused(make_bundle: MakeBundle, tmp_path: Path) -> None:
    path = make_bundle()
    (path / MANIFEST).rename(tmp_path / "outside.json")
    (path / MANIFEST).symlink_to(tmp_path / "outside.json")
    with pytest.raises(BundleError, match=r"no manifest\.json that is a regular file"):
        open_bundle(path)


@pytest.mark.parametrize(
    "relative", ["../outside", "/etc/passwd", "a/../../b", "./a", "a//b", "a\\b", "C:a", "", ".", MANIFEST]
)
def test_path_that_leaves_the_bundle_is_refused(make_bundle: MakeBundle, relative: str) -> None:
    path = make_bundle()
    change(path, lambda data: data["files"].update({relative: {"sha256": "0", "bytes": 0}}))
    with pytest.raises(BundleError, match="is not the path of a file inside the bundle"):
        open_bundle(path)


def test_only_listed_files_are_given_out(make_bundle: MakeBundle) -> None:
    bundle = open_bundle(make_bundle())
    for relative in ("../outside", MANIFEST, "transformer"):
        with pytest.raises(BundleError, match="has no file"):
            bundle.file(relative)


def _set(*keys: Any, to: Any) -> Callable[[dict[str, Any]], None]:
    def edit(data: Any) -> None:
        for key in keys[:-1]:
            data = data[key]
        data[keys[-1]] = to

    return edit


def _drop(*keys: Any) -> Callable[[dict[str, Any]], None]:
    def edit(data: Any) -> None:
        for key in keys[:-1]:
            data = data[key]
        del data[keys[-1]]

    return edit


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (_set("extra", to=1), "unknown key 'extra'"),
        (_set("architecture", "colour", to=1), r"unknown key 'architecture\.colour'"),
        (_drop("defaults", "width"), r"missing key 'defaults\.width'"),
        (_drop("schema_version"), "missing key 'schema_version'"),
        (_set("schema_version", to=1), "has schema_version 1, and this version of hptool reads 3"),
        (_set("schema_version", to=True), "schema_version must be of type int"),
        (_set("defaults", "width", to="64"), r"defaults\.width must be of type int, not '64' \(str\)"),
        (_set("defaults", "width", to=64.0), r"defaults\.width must be of type int, not 64\.0 \(float\)"),
        (_set("scheduler", "shift", to=True), r"scheduler\.shift must be of type float, not True \(bool\)"),
        (_set("architecture", "family", to="sdxl"), r"family must be 'sd3' or 'flux', not 'sdxl'"),
        (
            _set("graphs", "transformer", 0, "weights", to="int3"),
            r"graphs\['transformer'\]\[0\]\.weights must be",
        ),
        (_set("variants", to={}), "variants must be a list"),
        (_set("provenance", "tools", to=[]), r"provenance\.tools must be a table"),
        (_drop("graphs", "vae_decoder"), "graphs must be those of transformer"),
        (_set("graphs", "transformer", to=[]), r"graphs\['transformer'\] is empty"),
        (
            _set("graphs", "transformer", 0, "path", to="gone.onnx"),
            r"'gone\.onnx' is used but not among its files",
        ),
        (_set("variants", to=[]), "no variants to run"),
        (
            lambda data: data["variants"].append(data["variants"][0]),
            "two variants share a target and a runtime",
        ),
        (_set("variants", 0, "compute_capabilities", to=[]), "is an engine without compute_capabilities"),
        (_set("variants", 0, "shapes", to=None), "'rtx4090' of tensorrt-rtx is an engine without shapes"),
        (_set("variants", 0, "path", to=GRAPH), "has a graph for an engine"),
        (_set("variants", 0, "runtime", to="tensorrt"), "of tensorrt is not one of the transformer's graphs"),
        (
            _set("variants", 0, "runtime", to="onnxruntime"),
            r"variants\[0\]\.runtime must be 'tensorrt-rtx' or",
        ),
        (_set("variants", 0, "shapes", "sizes", to=[]), "an engine for no size, or for one twice"),
        (_set("variants", 0, "shapes", "sizes", to=[[64, 64], [64, 64]]), "or for one twice"),
        (_set("variants", 0, "shapes", "sizes", to=[[64]]), r"sizes\[0\] must have 2 entries, not 1"),
        (_set("variants", 0, "shapes", "sizes", to=[[64, 72]]), "64x72, which the model cannot make"),
        (_set("variants", 0, "shapes", "sizes", to=[[64, 256]]), "64x256, which the model cannot make"),
        (_set("variants", 0, "shapes", "max_batch", to=0), "a max_batch below 1"),
        (
            _set("variants", 0, "shapes", "text_tokens", to=16),
            "16 text tokens, and the transformer is given 23",
        ),
        (_set("variants", 1, "compute_capabilities", to=["8.9"]), "names what engines are built for"),
        (_set("variants", 1, "path", to="vae_decoder/model.onnx"), "not one of the transformer's graphs"),
        (_set("variants", 1, "activations", to="float16"), "not one of the transformer's graphs"),
        (_set("architecture", "patch_size", to=0), r"architecture\.patch_size must be 1 at least"),
        (_set("defaults", "max_sequence_length", to=-1), r"defaults\.max_sequence_length must be 0 at least"),
        (_set("tokenizers", "tokenizer", "max_length", to=8), "CLIP encoders need one max_length"),
        (_set("architecture", "guidance_embeds", to=True), "no transformer of sd3 is told the guidance"),
        (_drop("architecture", "classifier_free"), r"missing key 'architecture\.classifier_free'"),
        (
            _drop("graphs", "text_encoder_2"),
            "graphs must be those of transformer, text_encoder, text_encoder_2",
        ),
        (_drop("tokenizers", "tokenizer_2"), "tokenizers must be those of tokenizer, tokenizer_2, not of"),
    ],
)
def test_manifest_is_read_strictly(
    make_bundle: MakeBundle, edit: Callable[[dict[str, Any]], None], message: str
) -> None:
    path = make_bundle()
    change(path, edit)
    with pytest.raises(BundleError, match=message):
        open_bundle(path)


def test_whole_numbers_are_floats_too(make_bundle: MakeBundle) -> None:
    path = make_bundle()
    change(path, _set("scheduler", "shift", to=3))
    shift = open_bundle(path).manifest.scheduler.shift
    assert (shift, type(shift)) == (3.0, float)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not the JSON it should be"),
        ("[]", "the top level must be a table"),
        ('{"schema_version": 1, "schema_version": 1}', "'schema_version' is there twice"),
        ('{"schema_version": NaN}', "NaN is not a number of JSON"),
        ("[" * 100_000, "is not the JSON it should be"),
    ],
)
def test_broken_manifest_is_refused(make_bundle: MakeBundle, text: str, message: str) -> None:
    path = make_bundle()
    (path / MANIFEST).write_text(text)
    with pytest.raises(BundleError, match=message):
        open_bundle(path)


def test_what_is_no_bundle_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="does not exist"):
        open_bundle(tmp_path / "gone")
    with pytest.raises(BundleError, match=r"has no manifest\.json"):
        open_bundle(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(BundleError, match="is not a directory"):
        open_bundle(tmp_path / "file")


def test_dynamic_shifting_needs_a_range(make_bundle: MakeBundle) -> None:
    manifest = open_bundle(make_bundle()).manifest
    scheduler = replace(manifest.scheduler, use_dynamic_shifting=True, max_image_seq_len=256)
    with pytest.raises(BundleError, match="max_image_seq_len must be above"):
        manifest_from_json(manifest_to_json(replace(manifest, scheduler=scheduler)))


def test_bundles_are_checked_with_the_standard_library_alone() -> None:
    code = (
        "import sys; import deploy, deploy.bundle; deploy.open_bundle; "
        "print(sorted({'numpy', 'onnxruntime', 'torch', 'PIL', 'tokenizers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
