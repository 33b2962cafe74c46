from __future__ import annotations

import mmap
import os
import random
import re
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest

from deploy.bundle import Bundle, open_bundle
from deploy.memory import (
    DECODING_BYTES,
    TILE,
    available_bytes,
    choose_keep,
    give_back,
    loaded_bytes,
    place_on_gpu,
    total_bytes,
)

MakeBundle = Callable[..., Path]


@pytest.fixture
def bundle(make_bundle: MakeBundle) -> Bundle:
    def add_weights(path: Path) -> None:
        (path / "transformer" / "weights.bin").write_bytes(bytes(7000))

    return open_bundle(make_bundle(add_weights))


def test_weights_beside_the_graphs_count_and_tokenizers_do_not(bundle: Bundle) -> None:
    components = ("transformer", "text_encoder", "text_encoder_2", "vae_decoder")
    files = [file for name in components for file in (bundle.path / name).iterdir()]
    engine, cpu = bundle.manifest.variants
    assert loaded_bytes(bundle, cpu) == sum(file.stat().st_size for file in files)
    transformer = sum(file.stat().st_size for file in files if file.parent.name == "transformer")
    assert loaded_bytes(bundle, engine) == loaded_bytes(bundle, cpu) - transformer


def test_parts_stay_while_twice_their_files_fit(bundle: Bundle) -> None:
    cpu = bundle.manifest.variants[1]
    needed = 2 * loaded_bytes(bundle, cpu)
    assert choose_keep(bundle, cpu, needed)[0] == "all"
    assert choose_keep(bundle, cpu, needed - 1)[0] == "one"
    assert choose_keep(bundle, cpu, None)[0] == "all"


OTHERS = {"text_encoder", "text_encoder_2", "vae_decoder"}


def test_what_is_on_the_gpu_takes_none_of_the_machines_memory(bundle: Bundle) -> None:
    engine, cpu = bundle.manifest.variants
    assert loaded_bytes(bundle, engine, OTHERS) == 0
    assert loaded_bytes(bundle, engine, ["vae_decoder"]) < loaded_bytes(bundle, engine)
    assert loaded_bytes(bundle, cpu, OTHERS) == loaded_bytes(bundle, cpu) - loaded_bytes(bundle, engine)
    assert choose_keep(bundle, engine, 0, OTHERS)[0] == "all"


def test_parts_go_to_the_gpu_as_its_memory_allows(bundle: Bundle) -> None:
    decoder = bundle.manifest.files["vae_decoder/model.onnx"]
    encoder = bundle.manifest.files["text_encoder/model.onnx"]
    files = bundle.manifest.files | {
        "text_encoder/model.onnx": replace(encoder, bytes=2_000_000_000),
        "vae_decoder/model.onnx": replace(decoder, bytes=0),
    }
    large = Bundle(bundle.path, replace(bundle.manifest, files=files))
    rest = sum(
        (1 if path.startswith("transformer") else 2) * file.bytes
        for path, file in files.items()
        if path.partition("/")[0] in ("transformer", "text_encoder_2")
    )
    rest += 2_000_000_000 + 2 * 2_000_000_000  # for the transformer to compute in; an encoder's weights
    found = []
    for free in (
        None,
        rest + DECODING_BYTES[TILE],
        rest + DECODING_BYTES[TILE] - 1,
        rest + DECODING_BYTES[TILE // 2],
        rest + DECODING_BYTES[TILE // 2] - 1,
        4_500_000_000,
        3_999_999_999,
    ):
        placement = place_on_gpu(large, free)
        found.append((set(placement.on_gpu), placement.tile, placement.keep))
        assert "GPU" in placement.reason
    assert found == [
        (OTHERS, TILE // 2, "all"),
        (OTHERS, TILE, "all"),
        (OTHERS, TILE // 2, "all"),
        (OTHERS, TILE // 2, "all"),
        ({"vae_decoder"}, TILE // 2, "all"),  # the transformer stays, and prompts are encoded elsewhere
        (OTHERS, TILE // 2, "one"),
        (set(), TILE, "all"),
    ]


def test_reason_names_both_sizes(bundle: Bundle) -> None:
    cpu = bundle.manifest.variants[1]
    weights = bundle.manifest.files["transformer/weights.bin"]
    files = bundle.manifest.files | {"transformer/weights.bin": replace(weights, bytes=4_000_000_000)}
    large = Bundle(bundle.path, replace(bundle.manifest, files=files))
    assert choose_keep(large, cpu, 6_000_000_000) == (
        "one",
        "parts are loaded one at a time: together they take 8.0 GB, and 6.0 GB of memory are available",
    )


MEMINFO = {"proc/meminfo": "MemTotal: 9000 kB\nMemAvailable: 4000 kB\nHugePages_Total: 0\n"}
V2 = {
    "sys/fs/cgroup/memory.current": "900000\n",
    "sys/fs/cgroup/memory.stat": "anon 5\ninactive_file 100000\n",
}
V1 = {
    "sys/fs/cgroup/memory/memory.limit_in_bytes": "1000000\n",
    "sys/fs/cgroup/memory/memory.usage_in_bytes": "900000\n",
    "sys/fs/cgroup/memory/memory.stat": "cache 5\ntotal_inactive_file 300000\n",
}


@pytest.mark.parametrize(
    ("files", "available", "total"),
    [
        ({}, None, None),
        (MEMINFO, 4_096_000, 9_216_000),
        (MEMINFO | V2 | {"sys/fs/cgroup/memory.max": "max\n"}, 4_096_000, 9_216_000),
        (MEMINFO | V2 | {"sys/fs/cgroup/memory.max": "1000000\n"}, 200_000, 1_000_000),
        (MEMINFO | V2 | {"sys/fs/cgroup/memory.max": "9000000\n"}, 4_096_000, 9_000_000),
        (MEMINFO | V2 | {"sys/fs/cgroup/memory.max": "700000\n"}, 0, 700_000),
        (MEMINFO | V1, 400_000, 1_000_000),
    ],
    ids=["silent", "no container", "unlimited", "limited", "limit above", "over the limit", "version 1"],
)
def test_memory_is_what_the_system_and_its_container_leave(
    tmp_path: Path, files: dict[str, str], available: int | None, total: int | None
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert available_bytes(tmp_path) == available
    assert total_bytes(tmp_path) == total


@pytest.mark.skipif(sys.platform != "linux", reason="other systems are not asked for their pages")
@pytest.mark.parametrize("typed", ["", "given back", "link"])
def test_pages_of_mapped_files_go_and_come_back_as_they_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, typed: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to("given back")
    content = random.Random(0).randbytes(64 * mmap.PAGESIZE)
    for name in ("given back", "kept"):
        (tmp_path / name).mkdir()
        with (tmp_path / name / "weights.data").open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # pages that are on their way to the disk stay until they are there
    paths = [tmp_path / name / "weights.data" for name in ("given back", "kept")]
    with ExitStack() as stack:
        files = [stack.enter_context(path.open("rb")) for path in paths]
        maps = [stack.enter_context(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)) for file in files]
        assert [bytes(each) for each in maps] == [content, content]
        give_back(Path(typed) if typed else tmp_path / "given back")
        assert [resident_bytes(path) for path in paths] == [0, len(content)]
        assert bytes(maps[0]) == content


def resident_bytes(path: Path) -> int:
    """Of the mappings of a file."""
    text = Path("/proc/self/smaps").read_text()
    (size,) = re.findall(rf"{re.escape(str(path))}\n(?:.*\n)*?Rss: +(\d+) kB", text)
    return 1024 * int(size)
