"""Bundles travel through a registry and the hub, and what arrives is checked before it has its name."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from deploy import transfer
from deploy.bundle import MANIFEST, SIGNATURE, BundleError, open_bundle
from deploy.errors import DeployError
from deploy.transfer import pull_bundle, push_bundle, push_files
from tests.servers import Hub, Registry, serving
from toolchain import cli

MakeBundle = Callable[..., Path]

GRAPH = "transformer/model.onnx"
Served = tuple[str, dict[str, Any], list[str]]


@pytest.fixture(params=["oci", "hf"])
def place(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[Served]:
    """Where to push to, what is stored there, and what was asked for."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))  # nobody's credentials
    with serving(Registry if request.param == "oci" else Hub) as (host, server):
        if request.param == "hf":
            monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
            hub = partial(huggingface_hub.HfApi, endpoint=f"http://{host}", token="hf_none")
            monkeypatch.setattr(huggingface_hub, "HfApi", hub)
        name = f"oci://{host}/owner/name:v1" if request.param == "oci" else "hf://owner/name"
        yield name, server.contents, server.requests


def stored(place: Served, content: bytes) -> str:
    """Where something is stored."""
    return next(name for name, held in place[1].items() if held == content)


def test_what_was_pushed_is_pulled(place: Served, make_bundle: MakeBundle, tmp_path: Path) -> None:
    path = make_bundle()
    (path / SIGNATURE).write_text("{}")
    push_bundle(path, place[0])
    pulled = pull_bundle(place[0], tmp_path / "pulled")
    assert pulled == open_bundle(tmp_path / "pulled")
    for file in (file for file in path.rglob("*") if file.is_file()):
        assert (tmp_path / "pulled" / file.relative_to(path)).read_bytes() == file.read_bytes()
    assert sorted(item.name for item in tmp_path.iterdir() if item.name.startswith(".")) == []
    assert not (tmp_path / "pulled" / ".cache").exists()


def test_a_file_that_was_changed_on_the_way_is_refused(
    place: Served, make_bundle: MakeBundle, tmp_path: Path
) -> None:
    path = make_bundle()
    push_bundle(path, place[0])
    content = (path / GRAPH).read_bytes()
    place[1][stored(place, content)] = content[:-1] + bytes([content[-1] ^ 1])
    with pytest.raises(DeployError, match=r"model\.onnx'? (did not arrive as|is not the file)"):
        pull_bundle(place[0], tmp_path / "pulled")
    assert not (tmp_path / "pulled").exists()
    place[1][stored(place, content[:-1] + bytes([content[-1] ^ 1]))] = content
    pull_bundle(place[0], tmp_path / "pulled")


def test_an_interrupted_pull_goes_on_with_what_it_lacks(
    place: Served, make_bundle: MakeBundle, tmp_path: Path
) -> None:
    path = make_bundle()
    push_bundle(path, place[0])
    content = (path / GRAPH).read_bytes()
    missing = stored(place, content)
    place[1][missing] = None  # listed, and cannot be had
    with pytest.raises(DeployError, match="did not work"):
        pull_bundle(place[0], tmp_path / "pulled")
    place[1][missing] = content
    before = len(place[2])
    pull_bundle(place[0], tmp_path / "pulled")
    fetched = [line for line in place[2][before:] if line.startswith("GET")]
    assert any(line.endswith(missing) for line in fetched)
    if place[0].startswith("oci"):  # the hub's client fetches in an order of its own
        encoder = stored(place, (path / "text_encoder/model.onnx").read_bytes())
        assert not any(line.endswith(encoder) for line in fetched)


def test_an_unsigned_bundle_is_not_pulled_where_a_key_is_given(
    place: Served, make_bundle: MakeBundle, tmp_path: Path
) -> None:
    push_bundle(make_bundle(), place[0])
    with pytest.raises(BundleError, match="is not signed"):
        pull_bundle(place[0], tmp_path / "pulled", key=tmp_path / "public.pem")
    assert not (tmp_path / "pulled").exists()


def test_files_of_others_are_left_where_they_are(
    place: Served, make_bundle: MakeBundle, tmp_path: Path
) -> None:
    push_bundle(make_bundle(), place[0])
    place[1]["README.md"] = place[1][".gitattributes"] = b"of the repository"
    pull_bundle(place[0], tmp_path / "pulled")
    assert not (tmp_path / "pulled" / "README.md").exists()


def test_a_damaged_bundle_is_not_pushed(place: Served, make_bundle: MakeBundle) -> None:
    path = make_bundle()
    (path / GRAPH).write_bytes(b"damaged")
    with pytest.raises(BundleError, match="has 7 bytes where its manifest says"):
        push_bundle(path, place[0])
    assert place[2] == []


def test_a_place_without_a_bundle_is_one_error(place: Served, tmp_path: Path) -> None:
    with pytest.raises(DeployError, match=r"did not work: .*\. Check the name"):
        pull_bundle(place[0], tmp_path / "pulled")
    assert not (tmp_path / "pulled").exists()


@pytest.mark.parametrize("place", ["hf"], indirect=True)
def test_a_branch_of_the_hub_is_made_if_it_is_new(
    place: Served, make_bundle: MakeBundle, tmp_path: Path
) -> None:
    push_bundle(make_bundle(), f"{place[0]}@v2")
    assert "POST /api/models/owner/name/branch/v2" in place[2]
    assert any(line.startswith("POST /api/models/owner/name/commit/v2") for line in place[2])
    pull_bundle(f"{place[0]}@v2", tmp_path / "pulled")
    assert any(line.startswith("GET /api/models/owner/name/revision/v2") for line in place[2])


@pytest.mark.parametrize("place", ["oci"], indirect=True)
def test_a_large_file_goes_up_in_chunks_and_comes_down_from_where_it_stopped(
    place: Served, make_bundle: MakeBundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfer, "_CHUNK_BYTES", 1000)
    path = make_bundle()
    push_bundle(path, place[0])
    assert any(line.startswith("PATCH") for line in place[2])
    content = (path / GRAPH).read_bytes()
    begun = tmp_path / ".pulled.pull" / "transformer" / f"{hashlib.sha256(content).hexdigest()}.part"
    begun.parent.mkdir(parents=True)
    begun.write_bytes(content[:100])
    pull_bundle(place[0], tmp_path / "pulled")
    assert [line for line in place[2] if line.endswith("bytes=100-")] == [
        f"GET {stored(place, content)} bytes=100-"
    ]


@pytest.mark.parametrize("place", ["oci"], indirect=True)
def test_a_registry_cannot_fill_the_disk_or_write_elsewhere(
    place: Served, make_bundle: MakeBundle, tmp_path: Path
) -> None:
    path = make_bundle()
    push_bundle(path, place[0])
    content = (path / GRAPH).read_bytes()
    place[1][stored(place, content)] = content + bytes(10_000_000)
    with pytest.raises(DeployError, match=r"'model\.onnx' did not arrive as it was published"):
        pull_bundle(place[0], tmp_path / "pulled")
    assert max(file.stat().st_size for file in tmp_path.rglob("*") if file.is_file()) < 100_000

    (name,) = (name for name in place[1] if "/manifests/" in name)
    data = json.loads((path / MANIFEST).read_text())
    data["files"]["../outside"] = data["files"].pop(GRAPH)
    forged = json.dumps(data).encode()
    digest = f"sha256:{hashlib.sha256(forged).hexdigest()}"
    listing = json.loads(place[1][name])
    for layer in listing["layers"]:
        if layer["annotations"]["org.opencontainers.image.title"] == MANIFEST:
            layer |= {"digest": digest, "size": len(forged)}
    place[1][name] = json.dumps(listing).encode()
    place[1][f"/v2/owner/name/blobs/{digest}"] = forged
    with pytest.raises(BundleError, match=r"'\.\./outside' is not the path of a file inside"):
        pull_bundle(place[0], tmp_path / "pulled")
    assert not (tmp_path / "outside").exists()


def test_a_directory_that_holds_something_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("kept")
    for target in (tmp_path, tmp_path / "kept"):
        with pytest.raises(DeployError, match="is there already"):
            pull_bundle("oci://127.0.0.1:1/owner/name", target)


@pytest.mark.parametrize(
    "address", ["owner/name", "hf://name", "hf://a/b/c", "oci://name", "oci://owner/name", "s3://a/b", ""]
)
def test_an_address_of_another_form_is_refused(address: str, tmp_path: Path) -> None:
    with pytest.raises(DeployError, match="is no place for bundles"):
        pull_bundle(address, tmp_path / "pulled")


@pytest.mark.parametrize("place", ["hf"], indirect=True)
def test_files_go_up_in_one_commit(place: Served, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"on disk")
    push_files({"dir/a": tmp_path / "a", "b": b"in memory"}, place[0], message="two files")
    assert place[1] == {"dir/a": b"on disk", "b": b"in memory"}
    assert len([line for line in place[2] if "/commit/" in line]) == 1


def test_a_registry_takes_bundles_alone(tmp_path: Path) -> None:
    with pytest.raises(DeployError, match="is a registry, which takes bundles alone"):
        push_files({"a": b""}, "oci://localhost:5000/name:tag", message="none")


@pytest.mark.parametrize("place", ["oci"], indirect=True)
def test_as_typed_a_bundle_is_pushed_and_pulled(
    place: Served, make_bundle: MakeBundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        cli.app(["push", str(make_bundle()), place[0], "--json"])
    assert json.loads(capsys.readouterr().out)["destination"] == place[0]
    with pytest.raises(SystemExit):
        cli.app(["pull", place[0], str(tmp_path / "pulled"), "--json"])
    size = sum(file.bytes for file in open_bundle(tmp_path / "pulled").manifest.files.values())
    expected = {"bundle": str(tmp_path / "pulled"), "bytes": size, "signature_checked": False}
    assert json.loads(capsys.readouterr().out) == expected
