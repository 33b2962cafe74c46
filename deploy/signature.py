"""Who made a bundle: signatures as OpenSSF's model-signing makes them, with a key of one's own.

A signature holds the digests of all files of the directory, the manifest too, and `model_signing verify`
takes it as well. It says nothing of files that change after they were checked.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from deploy.bundle import (
    MANIFEST,
    MAX_MANIFEST_BYTES,
    SIGNATURE,
    Bundle,
    BundleError,
    bundle_root,
    open_bundle,
    regular_files,
)
from deploy.errors import DeployError, extra

__all__ = ["open_signed_bundle", "sign_bundle"]


def sign_bundle(
    path: str | os.PathLike[str], key: str | os.PathLike[str], *, password: str | None = None
) -> Bundle:
    """Sign a bundle that is as its manifest says; a signature that is there already is replaced.

    Args:
        path: Where `bundle.sig` is written.
        key: A private key in PEM, of the elliptic curve P-256, P-384 or P-521.
        password: Of the key, if it is encrypted.

    Raises:
        DeployError: The bundle is damaged, the key cannot be used, or the signature cannot be written.
    """
    with extra("sign"):
        from model_signing import signing
    bundle = open_bundle(path)
    secret: Any = None if password is None else password.encode()  # said to be a string, and used as bytes
    try:
        config = signing.Config().use_elliptic_key_signer(private_key=key, password=secret)
    except Exception as error:  # of cryptography, which has no base class for them
        # Now and then what a wrong password decrypts looks like a key up to its last byte.
        doubt = "" if password is None else "Its password may be wrong. "
        raise DeployError(
            f"{key} cannot be used to sign: {_first_line(error)}. {doubt}Give a private key of an "
            "elliptic curve, in PEM (openssl ecparam -name prime256v1 -genkey -noout -out private.pem)."
        ) from error
    beside = bundle.path / f".{SIGNATURE}.part"
    try:
        config.set_hashing_config(_hashing()).sign(bundle.path, beside)
        beside.replace(bundle.path / SIGNATURE)
    except OSError as error:
        raise DeployError(f"{bundle.path / SIGNATURE} cannot be written: {error.strerror}.") from error
    finally:
        beside.unlink(missing_ok=True)
    return bundle


def open_signed_bundle(path: str | os.PathLike[str], key: str | os.PathLike[str]) -> Bundle:
    """Open a bundle after holding every file of it to its signature, before any but the signature is parsed.

    Args:
        path: The bundle's directory.
        key: The public key, in PEM, of whoever is trusted.

    Raises:
        BundleError: The bundle is not signed, not with this key or not as it is now, or cannot be opened.
        DeployError: The key cannot be used.
    """
    root = bundle_root(path)
    signed = _check_signature(root, Path(key))
    bundle = open_bundle(root, verify=False)  # whose contents are those that were signed
    listed = {name: file.sha256 for name, file in bundle.manifest.files.items()}
    if MANIFEST not in signed or listed != {name: signed[name] for name in signed.keys() - {MANIFEST}}:
        raise BundleError(
            f"The signature of {root} is not of just the files that its manifest lists, by their sha256. "
            "Have it signed with `hptool sign`."
        )
    return bundle


def _check_signature(root: Path, key: Path) -> dict[str, str]:
    """Return the digests that were signed, by path, all of them found to be those of the files."""
    with extra("sign"):
        from model_signing import verifying
    signature = root / SIGNATURE
    present = regular_files(root)
    if SIGNATURE not in present:
        raise BundleError(
            f"{root} is not signed: it has no {SIGNATURE}. "
            "Take a bundle from whoever is trusted to make them, or leave the key out."
        )
    if (size := signature.stat().st_size) > MAX_MANIFEST_BYTES:
        raise BundleError(f"{signature} has {size} bytes, and at most {MAX_MANIFEST_BYTES} are read.")
    try:
        config = verifying.Config().use_elliptic_key_verifier(public_key=key)
    except Exception as error:  # of cryptography, which has no base class for them
        raise DeployError(
            f"{key} cannot be used to check signatures: {_first_line(error)}. "
            "Give the public key, in PEM (openssl ec -in private.pem -pubout -out public.pem)."
        ) from error
    try:
        with redirect_stdout(sys.stderr):  # where it warns of old signatures
            config.set_hashing_config(_hashing()).verify(root, signature)
        return _signed_digests(signature)
    except Exception as error:  # of a parser or two, of cryptography, and plain ones
        raise BundleError(
            f"{root} is not what the owner of {key} signed: {_mismatch(root, signature, present, error)}. "
            "Do not use it; take the bundle again from where it was published."
        ) from error


def _hashing() -> Any:
    from model_signing import hashing

    # What git ignores may do harm all the same.
    return hashing.Config().set_ignored_paths(paths=[SIGNATURE], ignore_git_paths=False)


def _signed_digests(signature: Path) -> dict[str, str]:
    envelope = json.loads(signature.read_text(encoding="utf-8"))["dsseEnvelope"]
    resources = json.loads(base64.b64decode(envelope["payload"]))["predicate"]["resources"]
    return {item["name"]: item["digest"] for item in resources if item["algorithm"] == "sha256"}


def _mismatch(root: Path, signature: Path, present: set[str], error: Exception) -> str:
    """Name a file that differs from what was signed, or else what is wrong with the signature."""
    if not str(error).startswith("Signature mismatch"):
        return f"{SIGNATURE} does not hold ({_first_line(error)})"
    signed = _signed_digests(signature)
    names = present - {SIGNATURE}
    for name in sorted(names & signed.keys()):
        with (root / name).open("rb") as stream:
            if hashlib.file_digest(stream, "sha256").hexdigest() != signed[name]:
                return f"{name!r} was changed"
    others = sorted(names ^ signed.keys())
    return f"{others[0]!r} was {'added' if others[0] in names else 'removed'}" if others else str(error)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
