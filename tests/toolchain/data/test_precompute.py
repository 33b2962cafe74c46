"""What is precomputed is what the model makes of it itself, and the same however often it was stopped."""

from __future__ import annotations

import errno
import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.toolchain.data.conftest import folder, picture
from toolchain.artifacts import read_json
from toolchain.data import precompute as module
from toolchain.data import shards
from toolchain.data.precompute import Settings, precompute
from toolchain.data.shards import Precomputed, open_precomputed
from toolchain.data.sources import Skipped, open_source
from toolchain.errors import ToolchainError
from toolchain.families import Model, open_model
from toolchain.progress import silent
from toolchain.trajectories import sample_states

SMALL = Settings(batch_size=2, shard_rows=3, dtype="float32")
COLORS = ("red", "green", "blue", "black", "white", "yellow", "purple", "pink")


def make(model: Model, source: Path, output: Path, settings: Settings = SMALL) -> Precomputed:
    precompute(model, open_source(source), output, settings, bar=silent)
    return open_precomputed(output)


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Eight pictures, every other one wide; one again with another caption, one broken."""
    files = {f"{n}.png": picture(color, (80, 48) if n % 2 else (8, 8)) for n, color in enumerate(COLORS)}
    files |= {"again.png": files["0.png"], "broken.png": b"junk"}
    captions = {name: f"a {name}" for name in files} | {"3.png": "a 1.png"}
    return folder(tmp_path / "set", files, captions)


def test_latents_and_text_are_those_of_the_pipeline(tiny: Model, pictures: Path, tmp_path: Path) -> None:
    made = make(tiny, pictures, tmp_path / "out")
    pairs, latents = made.pairs()
    assert [len(rows) for rows in latents] == [4, 4]
    assert made.index.skipped == (Skipped(key="broken.png", reason="its picture is no JPEG, PNG, WEBP"),)
    captions = list(made.texts.rows)
    found = {(captions[caption], int(size), int(row)) for size, row, caption in pairs.tolist()}
    # Sizes in order: 6x10 latents, then 8x8. The picture that is there twice lies there once.
    assert found == {
        ("a 1.png", 0, 0), ("a 1.png", 0, 1), ("a 5.png", 0, 2), ("a 7.png", 0, 3),
        ("a 0.png", 1, 0), ("a again.png", 1, 0), ("a 2.png", 1, 1), ("a 4.png", 1, 2), ("a 6.png", 1, 3),
    }  # fmt: skip
    assert captions[0] == ""
    assert len(captions) == 9
    vae = tiny.pipeline.vae
    vae.register_to_config(shift_factor=0.25, scaling_factor=2.0)
    shifted = make(tiny, pictures, tmp_path / "shifted")
    for color, row, size in (("green", 0, 0), ("blue", 1, 1)):
        image = Image.open(io.BytesIO(picture(color, (80, 48) if size == 0 else (64, 64))))
        pixels = tiny.pipeline.image_processor.preprocess(image)
        with torch.no_grad():
            clean = vae.encode(pixels).latent_dist.mode()[0]
        torch.testing.assert_close(latents[size][torch.tensor([row])][0], clean, rtol=1e-4, atol=1e-5)
        again = shifted.pairs()[1][size][torch.tensor([row])][0]
        torch.testing.assert_close(again, (clean - 0.25) * 2, rtol=1e-4, atol=1e-5)
    expected = tiny.mmdit.encode_prompts(tiny.pipeline, captions, 0)
    stored = made.texts.encode(captions)
    assert stored is not None
    torch.testing.assert_close(stored.tokens_BTJ, expected.tokens_BTJ)
    torch.testing.assert_close(stored.pooled_BP, expected.pooled_BP)
    assert made.texts.encode(["unknown"]) is None


def test_a_model_of_one_size_gets_every_picture_in_it(tiny: Model, pictures: Path, tmp_path: Path) -> None:
    pairs, latents = make(tiny, pictures, tmp_path / "out", replace(SMALL, one_size=True)).pairs()
    assert [rows.whole().shape[2:] for rows in latents] == [(8, 8)]
    assert sorted(set(pairs[:, 1].tolist())) == [*range(8)]


def test_prompts_become_states_of_the_models_own_sampling(tiny: Model, tmp_path: Path) -> None:
    """A prompt that is there twice is painted twice and encoded once."""
    (tmp_path / "p.txt").write_text("a cat\na dog\na cat\n")
    made = make(tiny, tmp_path / "p.txt", tmp_path / "out")
    assert list(made.texts.rows) == ["", "a cat", "a dog"]
    columns = made.tensors("states")
    expected = sample_states(tiny, ["a cat", "a dog"], seed=(0, 0))
    first = torch.arange(len(expected))
    assert len(columns["latents"]) == 12  # three prompts, two steps, with and without the prompt
    for name in ("latents", "timesteps", "velocities"):
        torch.testing.assert_close(columns[name][first], getattr(expected, name))
    text = made.texts.index(columns["captions"][first])
    torch.testing.assert_close(text.tokens_BTJ, expected.text.index(expected.prompt_index).tokens_BTJ)
    prompts, captions = (columns[name].whole().reshape(-1, 2) for name in ("prompts", "captions"))
    assert captions[:, 0].tolist() == [0] * 6
    assert (prompts[:, 0] == prompts[:, 1]).all()
    assert (prompts[:, 1] == captions[:, 1]).all()


class Died(BaseException):
    """As a process does, past every `except Exception`."""


@pytest.mark.parametrize("kind", ["pictures", "prompts"])
def test_stopped_after_any_shard_it_ends_the_same(
    kind: str, tiny: Model, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = pictures
    if kind == "prompts":
        source = tmp_path / "p.txt"
        source.write_text("".join(f"number {n}\n" for n in range(5)))
    whole = contents(make(tiny, source, tmp_path / "whole").directory)
    encoded: list[str] = []
    writer = module.write_shard

    def dies(path: Path, *rest: object) -> None:
        writer(path, *rest)  # type: ignore[arg-type]
        encoded.append(path.name)
        raise Died

    monkeypatch.setattr(module, "write_shard", dies)
    for _ in range(len(whole) - 1):
        with pytest.raises(Died):
            make(tiny, source, tmp_path / "out")
        # It died before the journal knew: what lies there is made again, once, and journaled.
        monkeypatch.setattr(module, "write_shard", once_then(writer, dies))
    monkeypatch.setattr(module, "write_shard", writer)
    assert not (tmp_path / "out").exists()
    assert contents(make(tiny, source, tmp_path / "out").directory) == whole
    assert not (tmp_path / "out.work").exists()


def once_then(first: Callable[..., None], later: Callable[..., None]) -> Callable[..., None]:
    calls = [first]

    def call(*arguments: object) -> None:
        (calls.pop() if calls else later)(*arguments)

    return call


def test_a_removed_shard_is_made_again_in_its_place(
    tiny: Model, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = contents(make(tiny, pictures, tmp_path / "whole").directory)
    stop_before_text(monkeypatch)
    with pytest.raises(Died):
        make(tiny, pictures, tmp_path / "out")
    monkeypatch.undo()
    (tmp_path / "out.work" / "shards" / "latents-8x8-000000.safetensors").unlink()
    assert contents(make(tiny, pictures, tmp_path / "out").directory) == whole


def stop_before_text(monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object) -> None:
        raise Died

    monkeypatch.setattr(module, "_write_texts", stop)


def test_a_damaged_shard_is_one_error_that_names_it(
    tiny: Model, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "latents-6x10-000000.safetensors"
    stop_before_text(monkeypatch)
    with pytest.raises(Died):
        make(tiny, pictures, tmp_path / "out")
    monkeypatch.undo()
    flip(tmp_path / "out.work" / "shards" / name)
    with pytest.raises(ToolchainError, match=f"{name} is damaged"):
        make(tiny, pictures, tmp_path / "out")
    (tmp_path / "out.work" / "shards" / name).unlink()
    made = make(tiny, pictures, tmp_path / "out")
    flip(made.directory / name)
    with pytest.raises(ToolchainError, match=f"{name} is damaged"):
        open_precomputed(made.directory)
    (made.directory / name).unlink()
    with pytest.raises(ToolchainError, match=f"{name} is missing"):
        open_precomputed(made.directory)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_a_full_disk_says_what_to_do_and_keeps_what_is_whole(
    tiny: Model, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = contents(make(tiny, pictures, tmp_path / "whole").directory)
    calls = []

    def full(*arguments: object, **options: object) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        writer(*arguments, **options)  # type: ignore[arg-type]

    writer = shards.save_file
    monkeypatch.setattr(shards, "save_file", full)
    with pytest.raises(
        ToolchainError, match=r"its disk is full .* make room, and give the same command again"
    ):
        make(tiny, pictures, tmp_path / "out")
    kept = [path.name for path in (tmp_path / "out.work" / "shards").iterdir()]
    assert kept == ["latents-8x8-000000.safetensors"]
    assert contents(make(tiny, pictures, tmp_path / "out").directory) == whole


def test_work_of_another_data_set_or_model_is_refused(
    tiny: Model, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_before_text(monkeypatch)
    with pytest.raises(Died):
        make(tiny, pictures, tmp_path / "out")
    monkeypatch.undo()
    with pytest.raises(ToolchainError, match="begun with other settings; give the command it was begun with"):
        make(tiny, pictures, tmp_path / "out", replace(SMALL, dtype="bfloat16"))
    folder(tmp_path / "other", {"a.png": picture()}, {"a.png": "a"})
    with pytest.raises(ToolchainError, match="begun with other source, source_bytes"):
        make(tiny, tmp_path / "other", tmp_path / "out")
    tiny.pipeline.vae.encoder.conv_in.bias.data += 1
    with pytest.raises(ToolchainError, match="begun with other weights"):
        make(tiny, pictures, tmp_path / "out")


def test_a_data_set_of_nothing_that_can_be_read_leaves_nothing(tiny: Model, tmp_path: Path) -> None:
    source = folder(tmp_path / "set", {"a.png": b"junk", "b.png": picture()}, {"a.png": "a"})
    with pytest.raises(
        ToolchainError,
        match=r"set holds no picture .* 2 were skipped; a.png: its .*; b.png: it has",
    ):
        make(tiny, source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_a_damaged_model_is_refused(tiny: Model, pictures: Path, tmp_path: Path) -> None:
    tiny.pipeline.vae.encoder.conv_in.bias.data[0] = float("nan")
    with pytest.raises(ToolchainError, match="gives latents that are not finite"):
        make(tiny, pictures, tmp_path / "out")


def test_bfloat16_takes_half_the_bytes_and_little_off(tiny: Model, pictures: Path, tmp_path: Path) -> None:
    exact = make(tiny, pictures, tmp_path / "a").pairs()[1][0].whole()
    rough = make(tiny, pictures, tmp_path / "b", replace(SMALL, dtype="bfloat16")).pairs()[1][0].whole()
    assert (exact.dtype, rough.dtype) == (torch.float32, torch.bfloat16)
    torch.testing.assert_close(rough.float(), exact, rtol=2**-8, atol=0)


def test_flux_is_precomputed_alike(tiny_flux_path: Path, pictures: Path, tmp_path: Path) -> None:
    model = open_model(str(tiny_flux_path))
    made = make(model, pictures, tmp_path / "out")
    assert made.index.facts.weights.keys() == {"vae", "text_encoder", "text_encoder_2"}
    text = made.texts.encode(["", "a 0.png"])
    assert text is not None
    assert text.tokens_BTJ.shape == (2, 8, 24)


def test_an_index_with_anything_else_in_it_is_refused(tiny: Model, pictures: Path, tmp_path: Path) -> None:
    made = make(tiny, pictures, tmp_path / "out")
    index = read_json(made.directory / "index.json")
    for change, message in (
        ({"schema_version": 2}, "schema version 1 but of 2"),
        ({"more": 1}, "no index of precomputed data"),
        ({"shards": [{"file": "a"}]}, "no index of precomputed data"),
        ({"facts": {}}, "no index of precomputed data"),
    ):
        with pytest.raises(ToolchainError, match=message):
            shards.index_from_json(index | change)
    assert shards.index_to_json(shards.index_from_json(index)) == shards.index_to_json(made.index)
    assert sum(item.rows for item in made.index.of("latents")) == 8
    with pytest.raises(ToolchainError, match=r"set is no precomputed data set: it has no index\.json"):
        open_precomputed(pictures)
