"""An export that runs out of disk says so in one message, and leaves nothing half-written."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

EXPORT = [sys.executable, "-m", "toolchain", "export"]


def export(
    model: Path, output: Path, cache: Path, *, most_bytes: int | None = None, within: tuple[str, ...] = ()
) -> subprocess.CompletedProcess[str]:
    """The command, in which no file may exceed a size, as under a quota."""

    def limit() -> None:
        if most_bytes is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, most_bytes))

    return subprocess.run(
        [*within, *EXPORT, str(model), "--target", "cpu-x86", "--output", str(output)],
        env=os.environ | {"HPTOOL_CACHE": str(cache), "COLUMNS": "400", "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=limit,
    )


def test_a_disk_that_gets_full_meanwhile_is_one_clear_error(path: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    failed = export(path, tmp_path / "bundle", cache, most_bytes=4096)
    assert failed.returncode == 2
    (line,) = (line for line in failed.stderr.splitlines() if line.startswith("error: "))
    assert "its disk is full" in line
    assert "HPTOOL_CACHE" in line
    assert "Traceback" not in failed.stderr
    assert list((cache / "components").iterdir()) == []
    assert not (tmp_path / "bundle").exists()


def test_a_disk_that_is_too_small_is_refused_before_any_work(path: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = f"mount -t tmpfs -o size=64k tmpfs {disk} && "
    within = ("unshare", "--map-root-user", "--mount", "sh", "-c", mount + 'exec "$@"', "sh")
    if subprocess.run([*within, "true"], capture_output=True, check=False).returncode:
        pytest.skip("this system lets no user mount a file system")
    failed = export(path, disk / "bundle", tmp_path / "cache", within=within)
    assert failed.returncode == 2
    assert f"on the disk of {disk}, where 65.5 kB are free" in failed.stderr
    assert not (tmp_path / "cache" / "components").exists()
