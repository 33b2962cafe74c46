"""A data set is of one kind, and what cannot be read in it is named and passed over."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pytest

from tests.toolchain.data.conftest import folder, picture, tar
from toolchain.data.sources import Sample, Skipped, open_source, read_prompts
from toolchain.errors import ToolchainError

RED, BLUE = picture("red"), picture("blue")


def read(path: Path) -> dict[str, str]:
    """Captions by key, and reasons of what was skipped behind a `!`."""
    found: dict[str, str] = {}
    for item in open_source(path).samples():
        found[item.key] = item.caption if isinstance(item, Sample) else f"! {item.reason}"
    return found


def test_a_folder_is_read_by_its_metadata_and_by_texts_beside_pictures(tmp_path: Path) -> None:
    files = {"a.png": RED, "b.jpg": picture(format="JPEG"), "b.txt": b" two\n words ", "sub/c.webp": BLUE}
    folder(tmp_path, files, {"a.png": "one", "sub/c.webp": "three"})
    assert read(tmp_path) == {"a.png": "one", "b.jpg": "two words", "sub/c.webp": "three"}
    first = next(open_source(tmp_path).samples())
    assert isinstance(first, Sample)
    assert first.picture == RED


def test_metadata_may_be_csv_in_a_folder_below_and_call_its_text_caption(tmp_path: Path) -> None:
    folder(tmp_path / "train", {"a.png": RED}, {})
    (tmp_path / "train" / "metadata.csv").write_text('file_name,caption\na.png,"a cat, ""big"""\n')
    assert read(tmp_path) == {"train/a.png": 'a cat, "big"'}


def test_broken_parts_of_a_folder_are_named(tmp_path: Path) -> None:
    outside = tmp_path / "outside.png"
    outside.write_bytes(RED)
    root = folder(tmp_path / "set", dict.fromkeys(("good.png", "bare.png", "odd.png", "null.png"), RED), {})
    (root / "odd.txt").write_bytes(b"\xff\xfe")
    (root / "link.png").symlink_to(outside)
    rows = [
        '{"file_name": "good.png", "text": "good"}',
        "{not json",
        '["a list"]',
        '{"text": "of nothing"}',
        '{"file_name": "../outside.png", "text": "stolen"}',
        f'{{"file_name": "{outside}", "text": "stolen"}}',
        '{"file_name": "gone.png", "text": "gone"}',
        '{"file_name": "null.png", "text": null}',
        '{"file_name": "a\\u0000b", "text": "x"}',
    ]
    (root / "metadata.jsonl").write_text("\n".join(rows))
    found = read(root)
    assert found.pop("good.png") == "good"
    expected = {
        "metadata.jsonl:2": "JSON cannot be read",
        "metadata.jsonl:3": "JSON is no object",
        "metadata.jsonl:4": "it names no picture",
        "metadata.jsonl:5": "outside.png lies outside the data set",
        "metadata.jsonl:6": "outside.png lies outside the data set",
        "metadata.jsonl:7": "there is no picture gone.png",
        "metadata.jsonl:9": "its path cannot be followed",
        "bare.png": "it has no caption",
        "link.png": "link.png lies outside the data set",
        "null.png": "it has no caption",
        "odd.png": "its caption is no UTF-8",
    }
    assert found.keys() == expected.keys()
    for key, reason in expected.items():
        assert found[key].startswith("! "), key
        assert reason in found[key], key


def test_a_tar_is_read_by_names_up_to_the_first_dot(tmp_path: Path) -> None:
    members = {
        "x/1.2.png": RED,
        "x/1.txt": b"one",
        "x/2.JPG": BLUE,
        "x/2.json": b'{"caption": "two"}',
        "x/3.png": RED,
        "x/4.txt": b"four",
        "x/5.png": RED,
        "x/5.json": b"[]",
        "x/6.pickle": b"anything",
    }
    found = read(tar(tmp_path / "a.tar", members))
    assert found.pop("a.tar/x/2") == "two"
    assert {key: reason[:20] for key, reason in found.items()} == {
        "a.tar/x/1": "! it has no picture ",  # `.2.png` is not the ending of a picture
        "a.tar/x/3": "! it has no caption:",
        "a.tar/x/4": "! it has no picture ",
        "a.tar/x/5": "! its JSON is no obj",
        "a.tar/x/6": "! it has no picture ",
    }


def test_links_in_a_tar_are_not_followed(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as archive:
        for name, kind in (("1.png", tarfile.SYMTYPE), ("1.txt", tarfile.LNKTYPE)):
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname = kind, "/etc/passwd"
            archive.addfile(entry)
        entry = tarfile.TarInfo("2.png")
        entry.size = len(RED)
        archive.addfile(entry, io.BytesIO(RED))
    assert list(read(path)) == ["a.tar/2"]


@pytest.mark.parametrize("damage", ["cut in a picture", "cut between files", "garbage", "empty"])
def test_a_damaged_tar_gives_what_came_before_and_the_next_one_all(tmp_path: Path, damage: str) -> None:
    members = {"1.png": RED, "1.txt": b"one", "2.png": BLUE, "2.txt": b"two"}
    whole = tar(tmp_path / "a.tar", members).read_bytes()
    tar(tmp_path / "b.tar", {"3.png": RED, "3.txt": b"three"})
    assert len(RED) < 512
    second = 4 * 512  # a block for each name and one for each content
    broken = {
        "cut in a picture": whole[: second + 512 + 10],
        "cut between files": whole[:second],
        "garbage": whole[:second] + b"\xff" * (len(whole) - second),
        "empty": b"",
    }[damage]
    (tmp_path / "a.tar").write_bytes(broken)
    found = read(tmp_path)
    assert found.pop("b.tar/3") == "three"
    assert (found.pop("a.tar/1", None) == "one") == (damage != "empty")
    assert list(found) == ["a.tar"]
    assert found["a.tar"].startswith("! it ")


def test_a_directory_of_datasets_is_read(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    # Not the library's own kind for pictures, which reads what lies at a path when it saves.
    stored = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
    features = datasets.Features({"image": stored, "text": datasets.Value("string")})
    rows = {
        "image": [{"bytes": RED, "path": None}, {"bytes": None, "path": "/etc/passwd"}],
        "text": ["a", "b"],
    }
    data = datasets.Dataset.from_dict(rows, features=features)
    data.save_to_disk(str(tmp_path / "one"))
    found = read(tmp_path / "one")
    assert found["one:0"] == "a"
    assert "holds no bytes" in found["one:1"]
    # A selection is kept as a list of rows, which has to be obeyed.
    data.select([0, 0]).save_to_disk(str(tmp_path / "two"))
    assert list(read(tmp_path / "two").values()) == ["a", "a"]
    pictures = data.cast_column("image", datasets.Image())
    pictures.select([0]).save_to_disk(str(tmp_path / "pictures"))
    assert read(tmp_path / "pictures") == {"pictures:0": "a"}
    datasets.DatasetDict({"train": data, "test": data}).save_to_disk(str(tmp_path / "both"))
    with pytest.raises(ToolchainError, match=r"holds the splits test, train; name one, as .*both/test"):
        open_source(tmp_path / "both")
    state = json.loads((tmp_path / "one" / "state.json").read_text())
    (tmp_path / "one" / state["_data_files"][0]["filename"]).write_bytes(b"no arrow")
    with pytest.raises(ToolchainError, match="one cannot be read as a directory of `datasets`"):
        open_source(tmp_path / "one")


def test_parquet_is_read_and_a_broken_file_passed_over(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pa.table({"image": [RED, None], "caption": ["a", "b"]}), tmp_path / "1.parquet")
    parquet.write_table(pa.table({"picture": [RED], "caption": ["a"]}), tmp_path / "2.parquet")
    (tmp_path / "3.parquet").write_bytes(b"PAR1 no more")
    found = read(tmp_path)
    assert found.pop("1.parquet:0") == "a"
    assert {key: reason[:24] for key, reason in found.items()} == {
        "1.parquet:1": "! its picture is not in ",
        "2.parquet": "! it has the columns pic",
        "3.parquet": "! it cannot be read to i",
    }


def test_what_is_no_data_set_is_refused_by_name(tmp_path: Path) -> None:
    for name in ("empty", "both"):
        (tmp_path / name).mkdir()
    folder(tmp_path / "both", {"a.png": RED}, {})
    tar(tmp_path / "both" / "a.tar", {})
    (tmp_path / "a.zip").write_bytes(b"")
    for name, message in {
        "nosuch": "nosuch is no data set: it does not exist",
        "pipe:cat x.tar": "it does not exist",
        "a.zip": "a.zip is no data set: it is a file",
        "empty": "empty holds no data: no pictures",
        "both": "both holds webdataset and folder data side by side",
    }.items():
        with pytest.raises(ToolchainError, match=message):
            open_source(tmp_path / name)


def test_prompts_are_lines_that_are_not_empty(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text(" a cat \n\n a dog\n")
    assert open_source(tmp_path / "p.txt").kind == "prompts"
    assert read_prompts(tmp_path / "p.txt") == ["a cat", "a dog"]
    with pytest.raises(ToolchainError, match="holds 2 prompts; at least 3 are needed"):
        read_prompts(tmp_path / "p.txt", 3)


def test_a_file_that_may_not_be_read_is_passed_over(tmp_path: Path) -> None:
    folder(tmp_path, {"a.png": RED, "b.png": RED}, {"a.png": "a", "b.png": "b"})
    source = open_source(tmp_path)
    (tmp_path / "a.png").unlink()  # between the listing and the reading
    assert [type(item) for item in source.samples()] == [Skipped, Sample]
