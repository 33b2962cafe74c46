"""A signature says who made a bundle; without the right one, no file of it is parsed."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from model_signing import hashing, signing

from deploy.bundle import MANIFEST, SIGNATURE, BundleError, open_bundle
from deploy.errors import DeployError
from deploy.pipeline import EdgePipeline
from deploy.signature import open_signed_bundle, sign_bundle

MakeBundle = Callable[..., Path]

GRAPH = "transformer/model.onnx"


@pytest.fixture
def signed(make_bundle: MakeBundle, keys: Path) -> Path:
    path = make_bundle()
    sign_bundle(path, keys / "private.pem")
    return path


def test_a_signed_bundle_opens_with_the_key_and_without(signed: Path, keys: Path) -> None:
    manifest = open_bundle(signed).manifest
    assert open_signed_bundle(signed, keys / "public.pem").manifest == manifest
    assert EdgePipeline.open(signed, key=keys / "public.pem").bundle.manifest == manifest


def test_an_unsigned_bundle_is_refused_where_a_key_is_given(make_bundle: MakeBundle, keys: Path) -> None:
    with pytest.raises(BundleError, match=r"is not signed: it has no bundle\.sig"):
        EdgePipeline.open(make_bundle(), key=keys / "public.pem")


def test_a_strangers_signature_is_refused(signed: Path, keys: Path) -> None:
    with pytest.raises(BundleError, match=r"bundle\.sig does not hold \(Key mismatch"):
        open_signed_bundle(signed, keys / "strangers-public.pem")


def test_a_signature_that_only_claims_the_key_is_refused(signed: Path, keys: Path) -> None:
    """The hint says which key to take, and the stranger's signature does not become ours by it."""
    ours = json.loads((signed / SIGNATURE).read_text())
    sign_bundle(signed, keys / "strangers-private.pem")
    theirs = json.loads((signed / SIGNATURE).read_text())
    theirs["verificationMaterial"] = ours["verificationMaterial"]
    (signed / SIGNATURE).write_text(json.dumps(theirs))
    with pytest.raises(BundleError, match=r"bundle\.sig does not hold"):
        open_signed_bundle(signed, keys / "public.pem")


def test_every_file_is_covered_the_manifest_included(signed: Path, keys: Path) -> None:
    for relative in (*open_bundle(signed).manifest.files, MANIFEST):
        content = (signed / relative).read_bytes()
        (signed / relative).write_bytes(bytes([content[0] ^ 1]) + content[1:])
        with pytest.raises(BundleError, match=f"{relative!r} was changed"):
            open_signed_bundle(signed, keys / "public.pem")
        (signed / relative).write_bytes(content)
    open_signed_bundle(signed, keys / "public.pem")


def test_a_manifest_that_was_made_to_fit_a_changed_file_is_refused(signed: Path, keys: Path) -> None:
    (signed / GRAPH).write_bytes(b"another graph")
    data = json.loads((signed / MANIFEST).read_text())
    data["files"][GRAPH] = {"sha256": hashlib.sha256(b"another graph").hexdigest(), "bytes": 13}
    (signed / MANIFEST).write_text(json.dumps(data))
    open_bundle(signed)
    with pytest.raises(BundleError, match=r"'manifest\.json' was changed"):
        open_signed_bundle(signed, keys / "public.pem")


@pytest.mark.parametrize("relative", ["extra.bin", ".git/hooks", ".gitattributes"])
def test_a_file_that_was_added_is_refused(signed: Path, keys: Path, relative: str) -> None:
    (signed / relative).parent.mkdir(exist_ok=True)
    (signed / relative).touch()
    with pytest.raises(BundleError, match=f"{relative!r} was added"):
        open_signed_bundle(signed, keys / "public.pem")


def test_a_file_that_was_removed_is_refused(signed: Path, keys: Path) -> None:
    (signed / GRAPH).unlink()
    with pytest.raises(BundleError, match=f"{GRAPH!r} was removed"):
        open_signed_bundle(signed, keys / "public.pem")


def test_a_signature_over_less_than_the_bundle_is_refused(make_bundle: MakeBundle, keys: Path) -> None:
    """Of the right key, and still not of the manifest: what it ignores could be anything."""
    path = make_bundle()
    less = hashing.Config().set_ignored_paths(paths=[SIGNATURE, MANIFEST])
    config = signing.Config().use_elliptic_key_signer(private_key=keys / "private.pem")
    config.set_hashing_config(less).sign(path, path / SIGNATURE)
    with pytest.raises(BundleError, match="is not of just the files that its manifest lists"):
        open_signed_bundle(path, keys / "public.pem")


@pytest.mark.parametrize(
    "content", [b"", b"{}", b"[]", b"null", b"\xff", b"[" * 100_000, b'{"verificationMaterial": {}}']
)
def test_what_is_no_signature_is_refused(signed: Path, keys: Path, content: bytes) -> None:
    (signed / SIGNATURE).write_bytes(content)
    with pytest.raises(BundleError, match=r"bundle\.sig does not hold"):
        open_signed_bundle(signed, keys / "public.pem")


def test_a_signature_too_large_to_be_one_is_not_read(signed: Path, keys: Path) -> None:
    with (signed / SIGNATURE).open("r+b") as stream:
        stream.truncate(1 << 40)
    with pytest.raises(BundleError, match="at most 16777216 are read"):
        open_signed_bundle(signed, keys / "public.pem")


def test_no_file_is_parsed_before_the_signature_holds(
    signed: Path, keys: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (signed / MANIFEST).write_text("no JSON")
    monkeypatch.setattr("deploy.signature.open_bundle", pytest.fail)
    with pytest.raises(BundleError, match=r"'manifest\.json' was changed"):
        open_signed_bundle(signed, keys / "public.pem")


def test_a_damaged_bundle_is_not_signed(make_bundle: MakeBundle, keys: Path) -> None:
    path = make_bundle()
    (path / GRAPH).write_bytes(b"damaged")
    with pytest.raises(BundleError, match="has 7 bytes where its manifest says"):
        sign_bundle(path, keys / "private.pem")
    assert not (path / SIGNATURE).exists()


def test_a_signature_is_replaced_by_the_next(signed: Path, keys: Path) -> None:
    sign_bundle(signed, keys / "strangers-private.pem")
    open_signed_bundle(signed, keys / "strangers-public.pem")
    assert [path.name for path in signed.iterdir() if "sig" in path.name] == [SIGNATURE]


def test_an_encrypted_key_needs_its_password(make_bundle: MakeBundle, keys: Path) -> None:
    path = make_bundle()
    for password, reason in ((None, "Password was not given"), ("wrong", ".*Its password may be wrong")):
        with pytest.raises(DeployError, match=f"cannot be used to sign: {reason}"):
            sign_bundle(path, keys / "encrypted.pem", password=password)
    sign_bundle(path, keys / "encrypted.pem", password="secret")
    open_signed_bundle(path, keys / "public.pem")


@pytest.mark.parametrize("key", ["public.pem", "nosuch.pem"])
def test_a_key_that_cannot_sign_is_refused(make_bundle: MakeBundle, keys: Path, key: str) -> None:
    with pytest.raises(DeployError, match=f"{key} cannot be used to sign"):
        sign_bundle(make_bundle(), keys / key)


@pytest.mark.parametrize("key", ["private.pem", "nosuch.pem"])
def test_a_key_that_cannot_check_is_refused(signed: Path, keys: Path, key: str) -> None:
    with pytest.raises(DeployError, match=f"{key} cannot be used to check signatures"):
        open_signed_bundle(signed, keys / key)


def test_others_check_it_with_the_librarys_own_command(signed: Path, keys: Path) -> None:
    command = [sys.executable, "-m", "model_signing", "verify", "key", str(signed)]
    command += ["--signature", str(signed / SIGNATURE), "--public_key", str(keys / "public.pem")]
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0
    (signed / GRAPH).write_bytes(b"changed")
    assert subprocess.run(command, capture_output=True, check=False).returncode != 0


def hptool(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "toolchain", *arguments],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_as_typed_a_bundle_is_verified_signed_and_run(
    make_bundle: MakeBundle, keys: Path, tmp_path: Path
) -> None:
    path, public = str(make_bundle()), str(keys / "public.pem")
    shown = json.loads(hptool("verify", path, "--json").stdout)
    assert shown["files"] == json.loads((Path(path) / MANIFEST).read_text())["files"]
    assert shown["signature"] == {"present": False, "checked": False}

    paint = ("run", path, "a red circle", "--output", str(tmp_path / "out.png"), "--target", "cpu-x86")
    refused = hptool(*paint, "--require-signature", "--key", public)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr.startswith(f"error: {path} is not signed")

    signing = hptool("sign", path, "--key", str(keys / "encrypted.pem"), HPTOOL_KEY_PASSWORD="secret")
    assert signing.stdout.splitlines() == [str(Path(path) / SIGNATURE)]
    shown = json.loads(hptool("verify", path, "--key", public, "--json").stdout)
    assert shown["signature"] == {"present": True, "checked": True}
    told = hptool("verify", path, "--key", public).stdout
    assert f"signature: made with the key of {public}" in told.replace("\n", "")
    assert hptool(*paint, "--require-signature", "--key", public).returncode == 0
    stranger = hptool(*paint, "--key", str(keys / "strangers-public.pem"))
    assert stranger.returncode == 2
    assert "is not what the owner of" in stranger.stderr


def test_a_run_that_requires_a_signature_needs_a_key(make_bundle: MakeBundle) -> None:
    refused = hptool("run", str(make_bundle()), "a red circle", "--require-signature")
    assert refused.returncode == 2
    assert "--require-signature needs the public key" in refused.stderr
