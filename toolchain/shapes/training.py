"""How the `shapes` pipeline is trained, from nothing, part by part.

The text encoders learn to read captions, the autoencoder learns to draw, then the transformer learns
to paint what was read. Each part resumes where it was stopped; a batch depends on its step's number
alone, so an interrupted run ends as an undisturbed one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel, StableDiffusion3Pipeline
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

from toolchain.checkpoints import Checkpoints
from toolchain.optimize import Schedule, optimize_
from toolchain.shapes import world

Progress = Callable[[int, float], None]

TEXT_SCHEDULE = Schedule(steps=400, learning_rate=1e-3)
VAE_SCHEDULE = Schedule(steps=3000, learning_rate=2e-3, ema_decay=0.99)
TRANSFORMER_SCHEDULE = Schedule(steps=5000, learning_rate=2e-3, warmup_steps=200, ema_decay=0.999)
TEXT_BATCH, VAE_BATCH, TRANSFORMER_BATCH = 256, 16, 128
NUM_SCENES = 40_000

# Several objects are what is hard to learn, so they are seen more often.
TASK_WEIGHTS: dict[world.Task, float] = {
    "single_object": 0.5,
    "two_object": 1.5,
    "counting": 1.2,
    "colors": 0.6,
    "position": 1.6,
    "color_attr": 1.6,
}
# Share of captions replaced by the empty one, so that guidance has something to guide away from.
_CAPTION_DROPOUT = 0.1


@dataclass(frozen=True, kw_only=True)
class Scenes:
    """The transformer's training set: what each scene's caption says and how the picture is encoded."""

    token_ids: torch.Tensor
    """int64 [num_scenes + 1, tokens]; the last row is the empty caption."""
    latents: torch.Tensor
    """float32 [num_scenes, channels, height, width], scaled and shifted as the transformer sees them."""


def train_text_(
    encoders: list[CLIPTextModelWithProjection],
    tokenizer: CLIPTokenizer,
    *,
    schedule: Schedule = TEXT_SCHEDULE,
    checkpoints: Checkpoints | None = None,
    on_step: Progress | None = None,
) -> None:
    """Teach the encoders to read: all that a caption says must follow linearly from what they return.

    Stands in for CLIP's contrastive training, which a world this small does not need. The linear
    readers on the last token's penultimate state and on the pooled output are thrown away.
    """
    readers = nn.ModuleList(
        nn.Linear(encoder.config.hidden_size, sum(_MEANING_SIZES)) for encoder in encoders for _ in range(2)
    )
    device = encoders[0].device
    model = nn.ModuleDict({"encoders": nn.ModuleList(encoders), "readers": readers}).to(device)

    def loss_at(step: int) -> torch.Tensor:
        stream = world.captions(held_out=False, seed=1_000_000 + step, weights=TASK_WEIGHTS)
        captions = [next(stream) for _ in range(TEXT_BATCH)]
        ids = tokenize(tokenizer, [caption.text for caption in captions]).to(device)
        meanings = torch.tensor([_meaning(caption) for caption in captions], device=device)
        last = (ids == tokenizer.eos_token_id).int().argmax(dim=1)
        rows = torch.arange(len(ids))
        states = []
        for encoder in encoders:
            output = encoder(ids, output_hidden_states=True)
            states += [output.hidden_states[-2][rows, last], output.text_embeds]
        loss = torch.zeros((), device=device)
        for state, reader in zip(states, readers, strict=True):
            for logits, meaning in zip(reader(state).split(_MEANING_SIZES, dim=1), meanings.T, strict=True):
                loss = loss + F.cross_entropy(logits, meaning)
        return loss / len(states)

    optimize_(model, loss_at, schedule, checkpoints=checkpoints, on_step=on_step)


def train_vae_(
    vae: AutoencoderKL,
    *,
    schedule: Schedule = VAE_SCHEDULE,
    checkpoints: Checkpoints | None = None,
    on_step: Progress | None = None,
) -> None:
    """Train the autoencoder on rendered scenes, then set its scale and shift from their latents."""

    def loss_at(step: int) -> torch.Tensor:
        rng = np.random.default_rng((1, step))
        images = _render_batch(rng, VAE_BATCH).to(vae.device)
        with torch.autocast(images.device.type, torch.bfloat16):
            latent = vae.encode(images).latent_dist
            noise = torch.from_numpy(rng.standard_normal(latent.mean.shape, dtype=np.float32))
            decoded = vae.decode(latent.mean + latent.std * noise.to(vae.device)).sample
        error = decoded.float() - images
        kl = latent.kl().mean() / latent.mean[0].numel()
        loss: torch.Tensor = error.abs().mean() + error.square().mean() + 1e-4 * kl
        return loss

    optimize_(vae, loss_at, schedule, checkpoints=checkpoints, on_step=on_step)
    with torch.no_grad():
        pictures = _render_batch(np.random.default_rng(2), 512).to(vae.device)
        latents = vae.encode(pictures).latent_dist.mean
    vae.register_to_config(scaling_factor=float(1 / latents.std()), shift_factor=float(latents.mean()))


def encode_scenes(
    pipeline: StableDiffusion3Pipeline, num_scenes: int = NUM_SCENES, *, on_step: Progress | None = None
) -> Scenes:
    """Render and encode the transformer's training set once, so that training runs no autoencoder."""
    rng = np.random.default_rng(3)
    stream = world.captions(held_out=False, seed=3, weights=TASK_WEIGHTS)
    captions = [next(stream) for _ in range(num_scenes)]
    vae = pipeline.vae
    latents = []
    for start in range(0, num_scenes, 100):
        batch = captions[start : start + 100]
        images = _to_tensor([world.render(world.sample_scene(caption, rng)) for caption in batch]).to(
            vae.device
        )
        with torch.no_grad(), torch.autocast(images.device.type, torch.bfloat16):
            mean = vae.encode(images).latent_dist.mean.float()
        latents.append((mean - vae.config.shift_factor).cpu() * vae.config.scaling_factor)
        if on_step is not None:
            on_step(start // 100, float("nan"))
    texts = [caption.text for caption in captions] + [""]
    return Scenes(token_ids=tokenize(pipeline.tokenizer, texts), latents=torch.cat(latents))


def train_transformer_(
    pipeline: StableDiffusion3Pipeline,
    scenes: Scenes,
    *,
    schedule: Schedule = TRANSFORMER_SCHEDULE,
    checkpoints: Checkpoints | None = None,
    on_step: Progress | None = None,
) -> None:
    """Train the transformer by flow matching, sigma logit-normal as in SD3 (arXiv 2403.03206)."""
    transformer: SD3Transformer2DModel = pipeline.transformer
    # Compiling takes minutes, and pays only in a run of hundreds of steps.
    velocity_of = torch.compile(transformer) if schedule.steps > 500 else transformer
    device = transformer.device
    empty = len(scenes.latents)

    def loss_at(step: int) -> torch.Tensor:
        rng = np.random.default_rng((4, step))
        rows = torch.from_numpy(rng.integers(empty, size=TRANSFORMER_BATCH))
        clean = scenes.latents[rows].to(device)
        noise = torch.from_numpy(rng.standard_normal(clean.shape, dtype=np.float32)).to(device)
        sigma = torch.from_numpy(rng.normal(0.4, 1.0, TRANSFORMER_BATCH)).float().sigmoid().to(device)
        dropped = torch.from_numpy(rng.random(TRANSFORMER_BATCH) < _CAPTION_DROPOUT)
        text, pooled = embed(pipeline, scenes.token_ids[rows.masked_fill(dropped, empty)].to(device))
        mixed = torch.lerp(clean, noise, sigma[:, None, None, None])
        # The fused attention's backward pass on the CPU is several times slower at 32 tokens.
        with torch.autocast(clean.device.type, torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            velocity = velocity_of(
                hidden_states=mixed,
                timestep=sigma * 1000,
                encoder_hidden_states=text,
                pooled_projections=pooled,
                return_dict=False,
            )[0]
        loss: torch.Tensor = F.mse_loss(velocity.float(), noise - clean)
        return loss

    optimize_(transformer, loss_at, schedule, checkpoints=checkpoints, on_step=on_step)


def tokenize(tokenizer: CLIPTokenizer, texts: list[str]) -> torch.Tensor:
    """Token ids [texts, tokens], padded to the tokenizer's length as the pipeline does."""
    batch = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt")
    ids: torch.Tensor = batch.input_ids
    return ids


@torch.no_grad()
def embed(pipeline: StableDiffusion3Pipeline, token_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Text states [batch, tokens, joint width] and pooled text [batch, pooled width], as the pipeline's."""
    outputs = [
        encoder(token_ids, output_hidden_states=True)
        for encoder in (pipeline.text_encoder, pipeline.text_encoder_2)
    ]
    return (
        torch.cat([output.hidden_states[-2] for output in outputs], dim=-1),
        torch.cat([output.text_embeds for output in outputs], dim=-1),
    )


# Sizes of what is read off a caption: shape and colour of either thing, how many, and their relation.
_MEANING_SIZES = [len(world.SHAPES), len(world.COLORS) + 1] * 2 + [4, len(world.RELATIONS) + 1]
_MEANING_SIZES[2] += 1


def _meaning(caption: world.Caption) -> list[int]:
    colors = list(world.COLORS)
    codes = []
    for thing in caption.things[:2]:
        codes += [
            world.SHAPES.index(thing.shape),
            len(colors) if thing.color is None else colors.index(thing.color),
        ]
    if len(caption.things) == 1:
        codes += [len(world.SHAPES), len(colors)]
    relation = len(world.RELATIONS) if caption.relation is None else world.RELATIONS.index(caption.relation)
    return [*codes, len(caption.things) - 1, relation]


def _render_batch(rng: np.random.Generator, count: int) -> torch.Tensor:
    stream = world.captions(held_out=False, seed=int(rng.integers(2**31)))
    return _to_tensor([world.render(world.sample_scene(next(stream), rng)) for _ in range(count)])


def _to_tensor(pictures: list[npt.NDArray[np.uint8]]) -> torch.Tensor:
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1
