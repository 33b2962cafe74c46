"""Bundles to and from the Hugging Face hub and registries of containers.

A bundle that was fetched gets its name when every file of it is what its manifest says; one that was
interrupted goes on where it was.
"""

from __future__ import annotations

import glob
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from deploy.bundle import (
    MANIFEST,
    MAX_MANIFEST_BYTES,
    SIGNATURE,
    Bundle,
    BundleError,
    File,
    open_bundle,
    read_manifest,
    regular_files,
)
from deploy.errors import DeployError, extra
from deploy.signature import open_signed_bundle

__all__ = ["pull_bundle", "push_bundle", "push_files"]

Bar = Callable[[str, int], Callable[..., None]]

_CONFIG_TYPE = "application/vnd.hptool.bundle.manifest+json"
_MANIFEST_TYPE = "application/vnd.oci.image.manifest.v1+json"
_FILE_TYPE = "application/octet-stream"
_TITLE = "org.opencontainers.image.title"
_CHUNK_BYTES = 64 << 20
_LOOPBACK = ("localhost", "127.0.0.1", "[::1]")


def _silent(description: str, total: int) -> Callable[..., None]:
    return lambda *_: None


def push_bundle(
    path: str | os.PathLike[str], destination: str, *, private: bool = False, bar: Bar = _silent
) -> None:
    """Publish a bundle that is as its manifest says, with its signature if it has one.

    Args:
        path: The bundle's directory.
        destination: `hf://owner/name[@branch]` or `oci://registry/repository:tag`. Who may write there is
            for `hf auth login` and `docker login` to say.
        private: Whether a repository that is new on the hub is seen by its owner alone.
        bar: Starts progress bars; the hub's client draws its own.

    Raises:
        DeployError: The bundle is damaged, or the other side cannot be reached or does not take it.
    """
    scheme, place = _parsed(destination)
    bundle = open_bundle(path)
    signed = (bundle.path / SIGNATURE).exists()
    files = dict(bundle.manifest.files)
    for name in (SIGNATURE, MANIFEST) if signed else (MANIFEST,):
        path = bundle.path / name
        files[name] = File(sha256=_sha256(path), bytes=path.stat().st_size)
    if scheme == "hf":
        held = {name: bundle.path / name for name in files}
        _push_hub(held, place, f"hptool push {bundle.path.name}", private=private)
    else:
        _push_registry(bundle.path, files, place, bar)


def push_files(
    files: Mapping[str, Path | bytes], destination: str, *, message: str, private: bool = False
) -> None:
    """Publish files on the hub in one commit: all of them, or none.

    Args:
        files: By their names in the repository.
        destination: `hf://owner/name[@branch]`.
        message: Of the commit.
        private: As `push_bundle` takes it.

    Raises:
        DeployError: The destination is not on the hub, or it cannot be reached or does not take them.
    """
    scheme, place = _parsed(destination)
    if scheme != "hf":
        raise DeployError(f"{destination} is a registry, which takes bundles alone. Give hf://owner/name.")
    _push_hub(files, place, message, private=private)


def pull_bundle(
    source: str,
    directory: str | os.PathLike[str],
    *,
    key: str | os.PathLike[str] | None = None,
    bar: Bar = _silent,
) -> Bundle:
    """Fetch a bundle; what does not belong to it is left where it is.

    Args:
        source: As the destination of `push_bundle`, or a commit of the hub, or `@sha256:...` of a registry.
        directory: New; it appears when the bundle is whole.
        key: Public key that must have signed it.
        bar: Starts progress bars; the hub's client draws its own.

    Raises:
        DeployError: The other side cannot be reached or has no bundle there, or the directory is taken.
        BundleError: What was fetched is not what its manifest says, or not signed with the key.
    """
    scheme, place = _parsed(source)
    target = Path(directory)
    if target.is_symlink() or (target.exists() and (not target.is_dir() or any(target.iterdir()))):
        raise DeployError(f"{target} is there already. Name a new directory, or remove it first.")
    staging = target.with_name(f".{target.name}.pull")
    try:
        staging.mkdir(parents=True, exist_ok=True)
        if scheme == "hf":
            _pull_hub(place, staging)
        else:
            _pull_registry(place, staging, bar)
        _remove_others(staging)
        bundle = open_bundle(staging) if key is None else open_signed_bundle(staging, key)
        for name in regular_files(staging):
            with (staging / name).open("rb") as stream:
                os.fsync(stream.fileno())  # a device may lose power: the name must not last longer than this
        staging.replace(target)
    except BundleError:
        shutil.rmtree(staging, ignore_errors=True)  # nothing to go on with
        raise
    except OSError as error:
        raise DeployError(f"{target} cannot be written: {error}. What is there is used again.") from error
    return Bundle(target, bundle.manifest)


def _parsed(address: str) -> tuple[str, str]:
    scheme, _, place = address.partition("://")
    if scheme == "hf" and place.partition("@")[0].count("/") == 1:
        return scheme, place
    host, _, repository = place.partition("/")
    # Without a dot or a port it would be taken for a part of Docker Hub.
    if scheme == "oci" and repository and ("." in host or ":" in host):
        return scheme, place
    raise DeployError(
        f"{address!r} is no place for bundles. Give hf://owner/name[@revision] or "
        "oci://registry/repository:tag, the registry with its dot or port, as docker.io or localhost:5000."
    )


@contextmanager
def _remote(place: str, login: str) -> Iterator[None]:
    try:
        yield
    except DeployError:
        raise
    except Exception as error:  # of two clients and what these are made with: there is no base in common
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise DeployError(
            f"{place} did not work: {reason}. "
            f"Check the name, the connection, and that you are let in ({login})."
        ) from error


def _push_hub(files: Mapping[str, Path | bytes], place: str, message: str, *, private: bool) -> None:
    with extra("hub"):
        from huggingface_hub import CommitOperationAdd, HfApi
    repository, _, branch = place.partition("@")
    with _remote(f"hf://{place}", "hf auth login"):
        hub = HfApi()
        hub.create_repo(repository, private=private, exist_ok=True)
        if branch:
            hub.create_branch(repository, branch=branch, exist_ok=True)
        hub.create_commit(
            repository,
            [CommitOperationAdd(path_in_repo=name, path_or_fileobj=held) for name, held in files.items()],
            commit_message=message,
            revision=branch or None,
        )


def _pull_hub(place: str, staging: Path) -> None:
    with extra("hub"):
        from huggingface_hub import HfApi
    repository, _, revision = place.partition("@")
    with _remote(f"hf://{place}", "hf auth login"):
        hub = HfApi()
        # One commit for all of it, whoever writes to the repository meanwhile.
        commit = hub.model_info(repository, revision=revision or None).sha
        hub.hf_hub_download(repository, MANIFEST, revision=commit, local_dir=staging)
        names = [*read_manifest(staging).files, MANIFEST, SIGNATURE]
        hub.snapshot_download(
            repository,
            revision=commit,
            local_dir=staging,
            allow_patterns=[glob.escape(name) for name in names],
        )


def _push_registry(root: Path, files: Mapping[str, File], place: str, bar: Bar) -> None:
    client, container = _registry(place)
    layers = [
        {
            "mediaType": _FILE_TYPE,
            "digest": f"sha256:{file.sha256}",
            "size": file.bytes,
            "annotations": {_TITLE: name},
        }
        for name, file in files.items()
    ]
    with _remote(f"oci://{place}", "docker login"):
        advance = bar("pushing", len(layers))
        for (name, file), layer in zip(files.items(), layers, strict=True):
            # In chunks, for the client reads anything else into memory as a whole.
            chunked = file.bytes > _CHUNK_BYTES
            client.upload_blob(
                str(root / name), container, layer, do_chunked=chunked, chunk_size=_CHUNK_BYTES
            ).raise_for_status()
            advance()
        config = {
            "mediaType": _CONFIG_TYPE,
            "digest": f"sha256:{files[MANIFEST].sha256}",
            "size": files[MANIFEST].bytes,
        }
        manifest = {"schemaVersion": 2, "mediaType": _MANIFEST_TYPE, "config": config, "layers": layers}
        client.upload_manifest(manifest, container).raise_for_status()


def _pull_registry(place: str, staging: Path, bar: Bar) -> None:
    client, container = _registry(place)
    with _remote(f"oci://{place}", "docker login"):
        layers = {
            (layer.get("annotations") or {}).get(_TITLE): layer
            for layer in client.get_manifest(container).get("layers", [])
        }
        for name in (MANIFEST, SIGNATURE):
            (staging / name).unlink(missing_ok=True)
            if name in layers:
                size, digest = int(layers[name]["size"]), str(layers[name]["digest"])
                if size > MAX_MANIFEST_BYTES:
                    raise BundleError(f"{name} of oci://{place} has {size} bytes, which is too much.")
                _fetch(client, container, digest.removeprefix("sha256:"), size, staging / name)
        files = read_manifest(staging).files
        advance = bar("pulling", len(files))
        for name, file in files.items():
            # By the digest of the bundle's own manifest: what the registry says of the file is not needed.
            _fetch(client, container, file.sha256, file.bytes, staging / name)
            advance()


def _registry(place: str) -> tuple[Any, Any]:
    with extra("oci"):
        from oras.client import OrasClient
    host = place.partition("/")[0].rpartition(":")[0] or place.partition("/")[0]
    client = OrasClient(insecure=host in _LOOPBACK)
    with _remote(f"oci://{place}", "docker login"):
        container = client.get_container(place)
        client.auth.load_configs(container)
    return client, container


def _fetch(client: Any, container: Any, sha256: str, size: int, path: Path) -> None:
    """Fetch a blob unless it is there, from where the last attempt ended."""
    if path.is_file() and path.stat().st_size == size and _sha256(path) == sha256:
        return
    if not (len(sha256) == 64 and set(sha256) <= set("0123456789abcdef")):
        raise BundleError(f"{path.name!r} has {sha256!r} for its sha256, which is none.")
    begun = path.parent / f"{sha256}.part"
    begun.parent.mkdir(parents=True, exist_ok=True)
    done = begun.stat().st_size if begun.exists() else 0
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={done}-"} if done else {})
    url = f"{client.prefix}://{container.get_blob_url(f'sha256:{sha256}')}"
    with client.do_request(url, "GET", headers=headers, stream=True) as response:
        response.raise_for_status()
        done = done if response.status_code == 206 else 0
        with begun.open("ab" if done else "wb") as stream:
            for chunk in response.iter_content(1 << 20):
                done += len(chunk)
                if done > size:
                    break
                stream.write(chunk)
    if done != size or _sha256(begun) != sha256:
        begun.unlink()
        raise DeployError(
            f"{path.name!r} did not arrive as it was published: its {size} bytes should have the sha256 "
            f"{sha256[:12]}. Pull again; if that does not help, have the bundle pushed again."
        )
    begun.replace(path)


def _remove_others(staging: Path) -> None:
    """Remove what an earlier attempt or a client left: files of neither the manifest nor the format."""
    wanted = {*read_manifest(staging).files, MANIFEST, SIGNATURE}
    shutil.rmtree(staging / ".cache", ignore_errors=True)  # the hub's client notes there what it has fetched
    for name in regular_files(staging) - wanted:
        (staging / name).unlink()


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
