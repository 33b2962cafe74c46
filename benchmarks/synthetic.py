"""Checkpoints with the geometry of published models and random weights, for measuring what size costs.

    python -m benchmarks.synthetic sd3.5-large-turbo-pruned DIRECTORY      # 13 GB
    python -m benchmarks.synthetic flux.1-schnell-pruned DIRECTORY         # 17 GB
    python -m benchmarks.synthetic t5-xxl DIRECTORY                        # 11 GB

The transformer is that of a pruned student, in sharded bfloat16 safetensors as it would be published. Nothing
larger than a few chunks of one tensor is ever in memory. Linears are drawn so that what flows through all
blocks neither dies out nor overflows, and AdaLN's smaller, for in a trained transformer a block changes what
flows through it by little. Text encoders and the decoder have the widths that the transformer
expects and hardly any depth, but for the T5 of `t5-xxl`, beside which the transformer has none.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import string
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import torch
import typer
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
from diffusers.models.embeddings import get_1d_sincos_pos_embed_from_grid
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from toolchain.artifacts import new_directory, write_json
from toolchain.errors import ToolchainError
from toolchain.families.flux import Flux
from toolchain.families.mmdit import MMDiT
from toolchain.families.sd3 import SD3
from toolchain.families.view import DEFAULTS_FILE
from toolchain.geometry import Unit
from toolchain.shapes.model import ShapesConfig, build_tokenizer, build_vae

Bits16 = npt.NDArray[np.uint16]

SHARD_BYTES = 5_000_000_000
_CHUNK = 1 << 24
"""Weights drawn at a time; with a chunk for each thread and one being written, far below half a gigabyte."""
_THREADS = 2
_STEM = "diffusion_pytorch_model"
_GAINS = {
    r"\.norm\w*\.linear\.weight$": 0.25,  # AdaLN within the blocks
    r"\.(o|wo)\.weight$": 0.25,  # what T5 adds to its states, which begin as
    r"^shared\.weight$": 64.0,  # embeddings of this size
    r"\.q\.weight$": 0.125,  # T5 does not scale its scores
}
"""Of the deviation that keeps the size of what a linear is given, where it is another."""


@dataclass(frozen=True, kw_only=True)
class Student:
    """A published transformer and what its student lacks."""

    kind: type[MMDiT]
    config: Mapping[str, Any] = field(default_factory=dict)
    """What differs from the defaults of diffusers' class."""
    removed: tuple[int, ...] = ()
    """Whole blocks, in the order they run."""
    clip_widths: tuple[int, ...]
    """Of the CLIP text encoders."""
    clip_tokens: int = 77
    t5_tokens: int = 256
    t5: Mapping[str, int] | None = None
    """Geometry of its T5; None takes one of hardly any depth."""
    size: int = 1024
    """Pixels on a side."""
    shift: float
    """Of the scheduler."""
    scaling: tuple[float, float]
    """Factor and shift of the latents."""


_SD35_LARGE = {
    "sample_size": 128,
    "num_layers": 38,
    "num_attention_heads": 38,
    "attention_head_dim": 64,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 2432,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 192,
    "qk_norm": "rms_norm",
}

_T5_XXL = {
    "d_model": 4096,
    "d_ff": 10240,
    "d_kv": 64,
    "num_layers": 24,
    "num_heads": 64,
    "vocab_size": 32128,
}

STUDENTS = {
    "sd3.5-large-turbo": Student(
        kind=SD3, config=_SD35_LARGE, clip_widths=(768, 1280), shift=3.0, scaling=(1.5305, 0.0609)
    ),
    # The paper's set for 20 %.
    "sd3.5-large-turbo-pruned": Student(
        kind=SD3,
        config=_SD35_LARGE,
        removed=(*range(25, 29), *range(31, 35)),
        clip_widths=(768, 1280),
        shift=3.0,
        scaling=(1.5305, 0.0609),
    ),
    # The paper does not say which blocks make 30 %. 6 of the 19 double and 11 of the 38 single ones do; here
    # they are late ones of each kind, as in the set above.
    "flux.1-schnell-pruned": Student(
        kind=Flux,
        removed=(*range(11, 14), *range(15, 18), *range(44, 50), *range(51, 56)),
        clip_widths=(768,),
        shift=1.0,
        scaling=(0.3611, 0.1159),
    ),
    # The text encoder that Stable Diffusion 3.5 and FLUX.1 share, beside as little as a pipeline can have.
    "t5-xxl": Student(
        kind=SD3,
        config={**_SD35_LARGE, "num_layers": 2},
        clip_widths=(768, 1280),
        t5=_T5_XXL,
        shift=3.0,
        scaling=(1.5305, 0.0609),
    ),
    # Half a billion parameters, between `shapes` and the published ones.
    "mid-sd3": Student(
        kind=SD3,
        config={
            **_SD35_LARGE,
            "num_layers": 24,
            "num_attention_heads": 12,
            "joint_attention_dim": 2048,
            "caption_projection_dim": 768,
        },
        clip_widths=(768, 1280),
        size=512,
        shift=3.0,
        scaling=(1.5305, 0.0609),
    ),
    "tiny-sd3.5": Student(
        kind=SD3,
        config={
            "sample_size": 8,
            "num_layers": 6,
            "num_attention_heads": 2,
            "attention_head_dim": 32,
            "joint_attention_dim": 96,
            "caption_projection_dim": 64,
            "pooled_projection_dim": 80,
            "pos_embed_max_size": 16,
            "qk_norm": "rms_norm",
        },
        removed=(2, 4),
        clip_widths=(32, 48),
        clip_tokens=16,
        t5_tokens=8,
        size=64,
        shift=3.0,
        scaling=(1.5305, 0.0609),
    ),
    "tiny-flux": Student(
        kind=Flux,
        config={
            "num_layers": 3,
            "num_single_layers": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 32,
            "joint_attention_dim": 48,
            "pooled_projection_dim": 32,
            "axes_dims_rope": (8, 12, 12),
        },
        removed=(1, 4),
        clip_widths=(32,),
        clip_tokens=16,
        t5_tokens=8,
        size=64,
        shift=1.0,
        scaling=(0.3611, 0.1159),
    ),
}

app = typer.Typer(add_completion=False)


def write_student(
    directory: Path,
    name: str,
    *,
    blocks: int | None = None,
    seed: int = 0,
    shard_bytes: int = SHARD_BYTES,
    weights: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write a pipeline directory that `open_model` takes.

    Args:
        directory: It appears when it is whole.
        name: One of `STUDENTS`.
        blocks: Keep so many of the student's blocks, spread evenly over its depth, and no others.
        seed: Of all weights; a tensor's do not depend on which others there are.
        shard_bytes: Most bytes of tensors in a file.
        weights: Whether what is large has any; without, `open_model` takes the configuration alone.
        progress: Called with bytes written and bytes in all.

    Raises:
        ToolchainError: There is no such student, it has fewer blocks, or `directory` is not empty.
    """
    if name not in STUDENTS:
        raise ToolchainError(f"there is no synthetic model {name!r}; there are {', '.join(STUDENTS)}")
    student = STUDENTS[name]
    transformer = skeleton(student, blocks)
    shown = progress or (lambda *_: None)
    with new_directory(directory) as path:
        transformer.save_config(path / "transformer")
        if weights:
            write_weights(path / "transformer", transformer, _STEM, seed, shard_bytes, shown)
        _write_small_parts(path, student, seed)
        if student.t5 is not None:
            part = path / "text_encoder_3"
            shutil.rmtree(part)
            with torch.device("meta"):
                t5 = T5EncoderModel(T5Config(feed_forward_proj="gated-gelu", dtype="bfloat16", **student.t5))
            t5.config.architectures = [type(t5).__name__]
            t5.config.save_pretrained(part)
            if weights:
                write_weights(part, t5, "model", seed, shard_bytes, shown)


def skeleton(student: Student, blocks: int | None = None) -> Any:
    """The student's transformer on the meta device.

    Raises:
        ToolchainError: It has fewer blocks than asked for.
    """
    with torch.device("meta"):
        whole = student.kind.plain(**student.config)
    view = student.kind(whole, guidance_scale=0.0)
    kept = [index for index in range(len(view.blocks)) if index not in student.removed]
    if blocks is not None:
        if not 1 <= blocks <= len(kept):
            raise ToolchainError(f"the student has 1 to {len(kept)} blocks, not {blocks}")
        last = len(kept) - 1
        kept = [kept[round(place * last / max(1, blocks - 1))] for place in range(blocks)]
    gone = [Unit(index) for index in range(len(view.blocks)) if index not in kept]
    return view.without(gone, "zero").transformer


def write_weights(
    directory: Path,
    module: Any,
    stem: str,
    seed: int,
    shard_bytes: int,
    progress: Callable[[int, int], None],
) -> None:
    """Write random bfloat16 weights of a module on the meta device, in shards named by the stem."""
    tied = getattr(module, "all_tied_weights_keys", None) or {}
    tensors = {name: tuple(item.shape) for name, item in module.state_dict().items() if name not in tied}
    shards = _shards(tensors, shard_bytes)
    total = 2 * sum(map(math.prod, tensors.values()))
    weight_map: dict[str, str] = {}
    done = 0
    with ThreadPoolExecutor(_THREADS) as pool:
        for number, names in enumerate(shards, start=1):
            file = f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors"
            weight_map |= dict.fromkeys(names, file)
            with (directory / file).open("wb") as stream:
                stream.write(_header({name: tensors[name] for name in names}))
                for name in names:
                    for chunk in _chunks(module, name, tensors[name], seed, pool):
                        stream.write(chunk.data)
                        done += chunk.nbytes
                        progress(done, total)
                stream.flush()
                os.fsync(stream.fileno())
                # What is written is read next by something else, and until then only pushes other files out.
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(directory / f"{stem}.safetensors.index.json", index)


def _shards(tensors: Mapping[str, tuple[int, ...]], most: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    size = 0
    for name, shape in tensors.items():
        num_bytes = 2 * math.prod(shape)
        if shards[-1] and size + num_bytes > most:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += num_bytes
    return shards


def _header(tensors: Mapping[str, tuple[int, ...]]) -> bytes:
    """The beginning of a safetensors file that holds these tensors in this order."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in tensors.items():
        start, end = end, end + 2 * math.prod(shape)
        entries[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _chunks(
    module: Any, name: str, shape: tuple[int, ...], seed: int, pool: ThreadPoolExecutor
) -> Iterator[Bits16]:
    """The bits of a tensor, in pieces."""
    if name == "pos_embed.pos_embed":
        yield from _position_table(module.config)
        return
    mean, deviation = _distribution(name, shape)
    # Half a step from either end, or the first would be infinite.
    levels = (torch.arange(1 << 16, dtype=torch.float64) + 0.5) / (1 << 16)
    table = _bits(mean + deviation * torch.special.ndtri(levels))
    size = math.prod(shape)

    def draw(start: int) -> Bits16:
        stream = np.random.SeedSequence([seed, zlib.crc32(name.encode()), start])
        generator = np.random.Generator(np.random.SFC64(stream))
        return table[generator.integers(1 << 16, size=min(_CHUNK, size - start), dtype=np.uint16)]

    waiting: deque[Future[Bits16]] = deque()
    for start in range(0, size, _CHUNK):
        waiting.append(pool.submit(draw, start))
        if len(waiting) > _THREADS:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _distribution(name: str, shape: tuple[int, ...]) -> tuple[float, float]:
    """Mean and deviation of a tensor's weights."""
    if name.endswith(".bias"):
        return 0.0, 0.02
    if len(shape) == 1:  # the weight of a norm
        return 1.0, 0.02
    gain = next((gain for pattern, gain in _GAINS.items() if re.search(pattern, name)), 1.0)
    return 0.0, gain / math.sqrt(math.prod(shape[1:]))


def _position_table(config: Any) -> Iterator[Bits16]:
    """Sines and cosines of the columns and then of the rows of places, as diffusers computes them."""
    side, base = config.pos_embed_max_size, config.sample_size // config.patch_size
    width = config.num_attention_heads * config.attention_head_dim
    places = torch.arange(side, dtype=torch.float32) / (side / base)
    of_place = get_1d_sincos_pos_embed_from_grid(width // 2, places)
    for row in range(side):
        yield _bits(torch.cat([of_place, of_place[row].expand(side, -1)], dim=1))


def _bits(values: torch.Tensor) -> Bits16:
    bits: Bits16 = values.float().bfloat16().view(torch.uint16).numpy().reshape(-1)
    return bits


def _write_small_parts(path: Path, student: Student, seed: int) -> None:
    flux = student.kind is Flux
    tokenizer = build_tokenizer(student.clip_tokens)
    with torch.device("meta"):
        config = student.kind.plain(**student.config).config
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        clips = [_clip(width, tokenizer, projected=not flux) for width in student.clip_widths]
        t5, t5_tokenizer = _t5(config.joint_attention_dim)
        vae = AutoencoderKL.from_config(
            build_vae(ShapesConfig(vae_channels=(8, 8, 8, 8), latent_channels=16)).config,
            sample_size=student.size,
            scaling_factor=student.scaling[0],
            shift_factor=student.scaling[1],
        )
    encoders = [*((clip, tokenizer) for clip in clips), (t5, t5_tokenizer)]
    parts: dict[str, Any] = {"scheduler": FlowMatchEulerDiscreteScheduler(shift=student.shift), "vae": vae}
    for number, (encoder, own) in enumerate(encoders, start=1):
        suffix = "" if number == 1 else f"_{number}"
        parts |= {f"text_encoder{suffix}": encoder, f"tokenizer{suffix}": own}
    index: dict[str, Any] = {
        "_class_name": "FluxPipeline" if flux else "StableDiffusion3Pipeline",
        "_diffusers_version": version("diffusers"),
        "transformer": ["diffusers", student.kind.plain.__name__],
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
    }
    for name, part in parts.items():
        if isinstance(part, torch.nn.Module):
            part.to(torch.bfloat16)
        part.save_pretrained(path / name)
        index[name] = [type(part).__module__.partition(".")[0], type(part).__name__]
    write_json(path / "model_index.json", dict(sorted(index.items())))
    defaults = {
        "schema_version": 1,
        "world": None,
        "num_inference_steps": 4,
        "guidance_scale": 0.0,
        "max_sequence_length": student.t5_tokens,
        "height": student.size,
        "width": student.size,
    }
    write_json(path / DEFAULTS_FILE, defaults)


def _clip(width: int, tokenizer: Any, *, projected: bool) -> Any:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=width,
        projection_dim=width,
        num_hidden_layers=2,
        num_attention_heads=width // 16,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config)


def _t5(width: int) -> tuple[Any, Any]:
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces += [(letter, -3.0) for letter in f"▁{string.ascii_letters}{string.digits}"]
    tokenizer = T5Tokenizer(vocab=pieces, extra_ids=0)
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=width,
        d_kv=16,
        d_ff=64,
        num_layers=1,
        num_heads=2,
        feed_forward_proj="gated-gelu",
    )
    return T5EncoderModel(config), tokenizer


@app.command()
def main(
    name: Annotated[str, typer.Argument(help=f"One of {', '.join(STUDENTS)}.")],
    directory: Annotated[Path, typer.Argument(help="Where to write it.")],
    blocks: Annotated[int | None, typer.Option(help="Keep so many blocks; default: the student's.")] = None,
    seed: Annotated[int, typer.Option(help="Of the weights.")] = 0,
) -> None:
    """Write a synthetic model."""
    shown = 0

    def show(done: int, total: int) -> None:
        nonlocal shown
        if done - shown >= 1e9 or done == total:
            shown = done
            print(f"{done / 1e9:.1f} of {total / 1e9:.1f} GB", flush=True)

    write_student(directory, name, blocks=blocks, seed=seed, progress=show)


if __name__ == "__main__":
    app()
