"""Computing once what a training needs of a data set, so that it loads neither autoencoder nor text encoders.

What is finished lies in `OUTPUT.work` until all of it is: shard by shard, in an order that follows from the
data set alone. The same call made again goes on at the shard it was in, and ends the same. Several processes
share out what captions and prompts take; pictures are encoded by the first.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from toolchain.artifacts import check_new_directory, read_json, sha256, write_json
from toolchain.data.buckets import BrokenPictureError, Size, buckets_of, fitted
from toolchain.data.shards import (
    INDEX_FILE,
    PAIRS_FILE,
    Facts,
    Index,
    Shard,
    Texts,
    check_shard,
    index_to_json,
    read_shard,
    weights_digest,
    write_shard,
    writing,
)
from toolchain.data.sources import Skipped, Source, read_prompts
from toolchain.errors import ToolchainError
from toolchain.families.view import Model
from toolchain.prefix import lent
from toolchain.processes import processes
from toolchain.progress import Bar
from toolchain.trajectories import sample_states

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a data set is computed."""

    batch_size: int = 8
    """Pictures, captions or prompts at once."""
    shard_rows: int = 128
    """Pictures or captions of a file; a file of states holds those of one batch of prompts."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Of tensors on disk. In bfloat16 they lose what products of a training in bfloat16 lose anyway."""
    seed: int = 0
    """Of the noise that prompts are painted from."""
    one_size: bool = False
    """Whether every picture is cut to the model's own size, whatever its proportions: for a model that was
    trained in no other. What its velocity is in others is nothing to learn."""

    def __post_init__(self) -> None:
        if min(self.batch_size, self.shard_rows) < 1 or self.seed < 0:
            raise ToolchainError(
                f"a batch of {self.batch_size}, {self.shard_rows} rows a shard and the seed {self.seed}: "
                "the first two are at least 1, the seed at least 0"
            )
        if self.dtype not in ("bfloat16", "float32"):
            raise ToolchainError(f"unknown dtype {self.dtype!r}; there are bfloat16 and float32")


def precompute(model: Model, source: Source, output: Path, settings: Settings, *, bar: Bar) -> Index:
    """Write what a training needs of a data set.

    Args:
        model: Its autoencoder and text encoders see the pictures and captions; prompts it paints itself.
        source: Of pictures or of prompts.
        output: A new directory.
        settings: How.
        bar: Starts progress bars.

    Raises:
        ToolchainError: The data set cannot be read or holds nothing, or `OUTPUT.work` is of another one.
    """
    here = processes()
    here.first(lambda: check_new_directory(output))
    prompts = read_prompts(source.path) if source.kind == "prompts" else None
    facts = here.first(lambda: _facts(model, source, settings))
    work = _Work(output.with_name(f"{output.name}.work"), facts, bar)
    skipped: list[Skipped] = []
    if prompts is not None:
        texts = _write_texts(model, prompts, work, settings, bar)
        _write_states(model, prompts, texts, work, settings, bar)
    else:
        pairs, skipped = here.first(lambda: _write_latents(model, source, work, settings, bar))
        if not pairs:
            here.first(work.remove)
            reasons = "".join(f"; {item.key}: {item.reason}" for item in skipped[:3])
            raise ToolchainError(
                f"{source.path} holds no picture with a caption that can be read; {len(skipped)} were skipped"
                f"{reasons}"
            )
        texts = _write_texts(model, [pair.caption for pair in pairs], work, settings, bar)
        here.first(lambda: _write_pairs(pairs, texts, work))
    return here.first(lambda: work.finish(tuple(skipped), output))


def _facts(model: Model, source: Source, settings: Settings) -> Facts:
    parts = [name for name in model.pipeline.components if name.startswith("text_encoder")]
    parts += ["transformer" if source.kind == "prompts" else "vae"]
    values = asdict(settings)
    if source.kind == "prompts":
        defaults = model.defaults
        values |= {name: getattr(defaults, name) for name in ("num_inference_steps", "guidance_scale")}
    return Facts(
        kind="states" if source.kind == "prompts" else "latents",
        model=model.source,
        weights={
            name: weights_digest(model, name) for name in parts if getattr(model.pipeline, name) is not None
        },
        max_sequence_length=model.defaults.max_sequence_length,
        size=(model.defaults.height, model.defaults.width),
        source=source.path.name,
        source_kind=source.kind,
        source_bytes=source.num_bytes,
        settings=values,
    )


class _Work:
    """The directory of what is finished: the facts it was begun with, a journal, and the shards.

    The journal is written by the first process; the others may write shards.
    """

    def __init__(self, directory: Path, facts: Facts, bar: Bar) -> None:
        self.directory, self._facts = directory, facts
        self._shards = directory / "shards"
        self._journal = directory / "journal.jsonl"
        self._done = processes().first(lambda: self._begin(bar))

    def _begin(self, bar: Bar) -> dict[str, Shard]:
        """What is there already."""
        begun = self.directory / "facts.json"
        try:
            self._shards.mkdir(parents=True, exist_ok=True)
            if not begun.exists():
                write_json(begun, asdict(self._facts))
        except OSError as error:
            raise ToolchainError(
                f"cannot write {self.directory}: {error.strerror}; choose another --output"
            ) from error
        now, before = json.loads(json.dumps(asdict(self._facts))), read_json(begun)
        if differing := [key for key in now.keys() | before.keys() if now.get(key) != before.get(key)]:
            raise ToolchainError(
                f"{self.directory} holds what was begun with other {', '.join(sorted(differing))}; give the "
                "command it was begun with, remove it, or choose another --output"
            )
        done = self._read_journal()
        with writing(self._journal):
            text = "".join(map(_line, done.values()))
            beside = self._journal.with_suffix(".part")
            beside.write_text(text, encoding="utf-8")
            beside.replace(self._journal)
        if done:
            advance = bar("checking what is there", len(done))
            for shard in done.values():
                check_shard(self._shards, shard)
                advance()
        return done

    def _read_journal(self) -> dict[str, Shard]:
        done: dict[str, Shard] = {}
        if self._journal.exists():
            for line in self._journal.read_text(encoding="utf-8").splitlines():
                try:
                    shard = Shard(**json.loads(line))
                except (ValueError, TypeError):
                    break  # torn by the end of the process; what it was to say was not yet relied on
                # A shard that was removed is made again.
                if (self._shards / shard.file).exists():
                    done[shard.file] = shard
        return done

    def paths(self, kind: str) -> list[Path]:
        return [self._shards / name for name in sorted(self._done) if name.startswith(f"{kind}-")]

    def __contains__(self, name: str) -> bool:
        return name in self._done

    def write(self, name: str, tensors: Tensors, **notes: object) -> None:
        """Write a shard, as the first process alone."""
        self._note(self._written(name, tensors, notes))

    def fill(self, wanted: Mapping[str, Callable[[], tuple[Tensors, dict[str, object]]]]) -> Iterator[str]:
        """Make those shards that are missing, the processes sharing them out; names as they are there."""
        missing = [name for name in wanted if name not in self._done]
        found = processes().each(missing, lambda name: self._written(name, *wanted[name]()))
        for name in wanted:
            if name not in self._done:
                self._note(next(found))
            yield name

    def _written(self, name: str, tensors: Tensors, notes: Mapping[str, object]) -> Shard:
        write_shard(self._shards / name, tensors, notes)
        return Shard(file=name, sha256=sha256(self._shards / name), rows=len(next(iter(tensors.values()))))

    def _note(self, shard: Shard) -> None:
        self._done[shard.file] = shard
        if processes().is_first:
            with writing(self._journal), self._journal.open("a", encoding="utf-8") as file:
                file.write(_line(shard))

    def finish(self, skipped: tuple[Skipped, ...], output: Path) -> Index:
        shards = tuple(self._done[name] for name in sorted(self._done))
        for path in self._shards.iterdir():
            if path.name not in self._done:
                path.unlink()  # a shard that the journal does not know was made again under its name
        index = Index(facts=self._facts, shards=shards, skipped=skipped)
        with writing(output):
            write_json(self._shards / INDEX_FILE, index_to_json(index))
            self._shards.replace(output)
        shutil.rmtree(self.directory, ignore_errors=True)
        return index

    def remove(self) -> None:
        shutil.rmtree(self.directory)


def _line(shard: Shard) -> str:
    return json.dumps(asdict(shard)) + "\n"


@dataclass(frozen=True, kw_only=True)
class _Pair:
    size: Size
    """Of the latents."""
    row: int
    """Among all of that size."""
    caption: str


class _Shelf:
    """Pictures of one size on their way into shards: each shard follows from the pictures in it alone."""

    def __init__(self, model: Model, size: Size, work: _Work, settings: Settings) -> None:
        self._model, self._size, self._work, self._settings = model, size, work, settings
        self._names: list[str] = []
        self._waiting: list[npt.NDArray[np.uint8]] = []
        self._latents: list[torch.Tensor] = []
        self._number = 0
        self._pass_finished()

    def add(self, name: str, pixels: npt.NDArray[np.uint8]) -> int:
        """Take a picture; its row among all of the size."""
        row = self._number * self._settings.shard_rows + len(self._names)
        self._names.append(name)
        self._waiting.append(pixels)
        if len(self._waiting) == self._settings.batch_size:
            self._encode()
        if len(self._names) == self._settings.shard_rows:
            self.write()
        return row

    def write(self) -> None:
        """Write what there is of a shard."""
        if not self._names:
            return
        if self._waiting:
            self._encode()
        latents = torch.cat(self._latents)
        self._work.write(self._file(), {"latents": latents}, pictures=self._names)
        self._names, self._latents = [], []
        self._pass_finished()

    def _encode(self) -> None:
        found = encode_pictures(self._model, np.stack(self._waiting))
        self._latents.append(found.to(getattr(torch, self._settings.dtype)))
        self._waiting = []

    def _pass_finished(self) -> None:
        while self._file() in self._work:
            self._number += 1

    def _file(self) -> str:
        return f"latents-{_named(self._size)}-{self._number:06}.safetensors"


def _named(size: Size) -> str:
    return f"{size[0]}x{size[1]}"


@torch.no_grad()
def encode_pictures(model: Model, pixels_BHWC: npt.NDArray[np.uint8]) -> torch.Tensor:
    """The middle of what the autoencoder takes pictures for, scaled as the pipeline does."""
    vae = model.pipeline.vae
    pictures = torch.from_numpy(pixels_BHWC).permute(0, 3, 1, 2) / 127.5 - 1
    latents = vae.encode(pictures.to(vae.device, vae.dtype)).latent_dist.mode().float()
    scaled: torch.Tensor = (latents - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor
    return _finite(model, "latents", scaled)


def _finite(model: Model, what: str, values: torch.Tensor) -> torch.Tensor:
    if not torch.isfinite(values).all():
        raise ToolchainError(f"{model.source} gives {what} that are not finite: its weights are damaged")
    return values.cpu()


def _write_latents(
    model: Model, source: Source, work: _Work, settings: Settings, bar: Bar
) -> tuple[list[_Pair], list[Skipped]]:
    defaults, factor = model.defaults, model.pipeline.vae_scale_factor
    buckets = buckets_of(
        defaults.height,
        defaults.width,
        multiple=factor * model.mmdit.patch_size,
        longest=factor * model.mmdit.max_latent_size,
    )
    if settings.one_size:
        buckets = buckets[:1]
    places: dict[str, tuple[Size, int]] = {}
    for path in work.paths("latents"):
        tensors, notes = read_shard(path)
        height, width = tensors["latents"].shape[2:]
        first = int(path.stem.rpartition("-")[2]) * settings.shard_rows
        places |= {name: ((height, width), first + row) for row, name in enumerate(notes["pictures"])}
    shelves: dict[Size, _Shelf] = {}
    pairs: dict[_Pair, None] = {}
    skipped: list[Skipped] = []
    advance = bar("encoding pictures", None)
    with lent(model.pipeline.vae):
        for found in source.samples():
            advance(note=f"{len(skipped)} skipped" if skipped else "")
            if isinstance(found, Skipped):
                skipped.append(found)
                continue
            name = hashlib.sha256(found.picture).hexdigest()
            if name not in places:
                try:
                    pixels = fitted(found.picture, buckets)
                except BrokenPictureError as error:
                    skipped.append(Skipped(key=found.key, reason=str(error)))
                    continue
                size = (pixels.shape[0] // factor, pixels.shape[1] // factor)
                if size not in shelves:
                    shelves[size] = _Shelf(model, size, work, settings)
                places[name] = (size, shelves[size].add(name, pixels))
            size, row = places[name]
            pairs[_Pair(size=size, row=row, caption=found.caption)] = None
        for shelf in shelves.values():
            shelf.write()
    return list(pairs), skipped


def _write_texts(model: Model, captions: Sequence[str], work: _Work, settings: Settings, bar: Bar) -> Texts:
    """Each caption once, behind the empty one."""
    distinct, size = list(dict.fromkeys(["", *captions])), settings.shard_rows
    parts = {
        f"text-{number:06}.safetensors": distinct[start : start + size]
        for number, start in enumerate(range(0, len(distinct), size))
    }

    def encode(part: list[str]) -> tuple[Tensors, dict[str, object]]:
        with lent(*model.text_encoders):  # once for all batches
            found = [
                model.encode(part[first : first + settings.batch_size])
                for first in range(0, len(part), settings.batch_size)
            ]
        tensors = {
            "tokens": torch.cat([item.tokens_BTJ for item in found]),
            "pooled": torch.cat([item.pooled_BP for item in found]),
        }
        dtype = getattr(torch, settings.dtype)
        return (
            {key: _finite(model, "text states", value).to(dtype) for key, value in tensors.items()},
            {"captions": part},
        )

    advance = bar("encoding captions", len(distinct))
    for name in work.fill({name: partial(encode, part) for name, part in parts.items()}):
        for _ in parts[name]:
            advance()
    texts = Texts(work.paths("text"))
    if list(texts.rows) != distinct:
        raise ToolchainError(
            "the captions are others than when this was begun: the data set was changed meanwhile; remove "
            f"{work.directory} and begin again"
        )
    return texts


def _write_states(
    model: Model, prompts: list[str], texts: Texts, work: _Work, settings: Settings, bar: Bar
) -> None:
    size, painter = settings.batch_size, replace(model, texts=texts)
    parts = [prompts[start : start + size] for start in range(0, len(prompts), size)]

    def paint(number: int) -> tuple[Tensors, dict[str, object]]:
        part = parts[number]
        states = sample_states(painter, part, seed=(settings.seed, number), batch_size=size, share=False)
        rows = torch.tensor([texts.rows[prompt] for prompt in (*part, "")])
        # Under guidance the row with the empty prompt comes first, of a painting of the other's prompt.
        own = states.prompt_index.reshape(-1, states.copies)[:, -1].repeat_interleave(states.copies)
        dtype = getattr(torch, settings.dtype)
        return {
            "latents": states.latents.to(dtype),
            "timesteps": states.timesteps,
            "velocities": states.velocities.to(dtype),
            "captions": rows[states.prompt_index],
            "prompts": rows[own],
        }, {}

    advance = bar("painting prompts", len(prompts))
    wanted = {f"states-{number:06}.safetensors": partial(paint, number) for number in range(len(parts))}
    for part, _ in zip(parts, work.fill(wanted), strict=True):
        for _ in part:
            advance()


def _write_pairs(pairs: list[_Pair], texts: Texts, work: _Work) -> None:
    sizes = sorted({pair.size for pair in pairs})
    rows = [[sizes.index(pair.size), pair.row, texts.rows[pair.caption]] for pair in pairs]
    work.write(PAIRS_FILE, {"pairs": torch.tensor(rows)}, sizes=sizes)
