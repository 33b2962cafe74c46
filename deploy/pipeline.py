"""Text to picture from a bundle: what diffusers' pipelines of SD3 and FLUX.1 do, without torch.

Shapes: B pictures, C latent channels, H and W of the latent, T text tokens, D features.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, TypedDict

from deploy.bundle import Bundle, Variant, open_bundle
from deploy.choice import choose_variant, place_others
from deploy.errors import Cancelled, DeployError, extra
from deploy.kept import cache_directory
from deploy.memory import Keep, Placement, available_bytes, choose_keep
from deploy.sampler import euler_step, sigmas
from deploy.session import AnySession, open_graph, open_variant
from deploy.signature import open_signed_bundle
from deploy.tiles import decode_tiled

with extra("edge"):
    import numpy as np
    from numpy.typing import NDArray
    from PIL import Image
    from tokenizers import Tokenizer

__all__ = ["EdgePipeline", "Result", "Timings", "save_png"]

Floats = NDArray[np.float32]

logger = logging.getLogger(__name__)

_KEPT_PROMPTS = 8
"""Prompts whose text states stay in memory between calls: those of FLUX.1 take 8 MB each."""


class Timings(TypedDict):
    """Wall time in milliseconds, as data that prints as JSON."""

    load: float
    """Opening what this call was the first to need; not in the parts below."""
    text_encoders: float
    transformer: float
    vae_decoder: float
    steps: list[float]
    """Each transformer step; they make up `transformer`."""
    total: float


@dataclass(frozen=True, kw_only=True)
class Result:
    """Pictures and how they were made."""

    images: list[Image.Image]
    """The pictures of the first prompt, then those of the next."""
    seeds: list[int]
    """The seed of each picture's noise; unused when the caller gave the latents."""
    timings_ms: Timings
    variant: Variant
    """What ran the transformer."""


class EdgePipeline:
    """A bundle ready to make pictures. Parts are loaded when first used, and stay where memory allows it."""

    def __init__(
        self,
        bundle: Bundle,
        variant: Variant,
        *,
        reasons: Sequence[str] = (),
        threads: int | None = None,
        keep: Keep = "all",
        cache: Path | None = None,
        placement: Placement | None = None,
    ) -> None:
        """Take a bundle that is open and the variant of its transformer to run; see `open`."""
        self.bundle = bundle
        self.variant = variant
        self.reasons = list(reasons)
        """Why this variant, one line for each that was looked at."""
        self.keep = keep
        """Which parts stay loaded: all, or the one that ran last."""
        self._threads, self._cache, self._placement = threads, cache, placement or Placement()
        self._sessions: dict[str, AnySession] = {}
        self._tokenizers: dict[str, Tokenizer] = {}
        self._texts: dict[str, tuple[Floats, Floats]] = {}
        self._load_ms = 0.0

    @classmethod
    def open(
        cls,
        path: str | PathLike[str],
        target: str | None = None,
        threads: int | None = None,
        verify: bool = True,
        keep: Keep | None = None,
        cache: str | PathLike[str] | None = None,
        runtime: str | None = None,
        key: str | PathLike[str] | None = None,
    ) -> EdgePipeline:
        """Open a bundle directory for this machine.

        Args:
            target: Variant to run, by the name of its device profile; None takes the best that runs here.
            threads: Of one operator; None takes one for every core.
            verify: Whether to check the digest of every file before it is used.
            keep: "all" keeps parts loaded; "one" drops each before the next is loaded, so that memory is that
                of the largest and every call loads them again. None keeps all where they fit into the
                memory that is available now.
            cache: Directory for what is made for this machine once, large graphs as the processor wants them
                and engines that are built on their device; None takes `$HPTOOL_CACHE` or the user's own.
            runtime: What has to run the transformer, as `onnxruntime-cpu`; None takes the best.
            key: Public key of whoever is trusted to make bundles: one that it did not sign is refused before
                any of its files is parsed. Every file is read then, whatever `verify` says.

        Raises:
            DeployError: The bundle is damaged or not signed, or has no such variant, or it cannot run here.
        """
        if threads is not None and threads < 1:
            raise DeployError(f"A session takes one thread at least, not {threads}.")
        bundle = open_bundle(path, verify=verify) if key is None else open_signed_bundle(path, key)
        available = available_bytes()
        variant, reasons = choose_variant(bundle, target, runtime=runtime, available=available)
        placement = place_others(bundle, variant)
        if placement.reason:
            reasons.append(placement.reason)
        if keep is None and (keep := placement.keep) == "all":
            keep, reason = choose_keep(bundle, variant, available, placement.on_gpu)
            reasons.append(reason)
        for reason in reasons:
            logger.info("%s", reason)
        kept = cache_directory() if cache is None else Path(cache)
        return cls(
            bundle,
            variant,
            reasons=reasons,
            threads=threads,
            keep=keep,
            cache=kept,
            placement=placement,
        )

    def __call__(
        self,
        prompt: str | Sequence[str],
        negative_prompt: str | Sequence[str] = "",
        *,
        steps: int | None = None,
        guidance_scale: float | None = None,
        height: int | None = None,
        width: int | None = None,
        num_images: int = 1,
        seed: int = 0,
        latents: Floats | None = None,
        allow_flat: bool = False,
        on_step: Callable[[int, int], None] | None = None,
        cancel: Callable[[], bool] | None = None,
    ) -> Result:
        """Make `num_images` pictures of each prompt. What is left out comes from the bundle's defaults.

        Args:
            negative_prompt: What to keep away from, for all prompts or one for each; used with guidance only,
                and refused by a model that is not guided by it.
            guidance_scale: 1 or less makes one transformer pass a step instead of two, where there are two.
            height: Of the picture in pixels, as `width`.
            seed: Of the first picture; each next one takes the number after, so that any picture of a call
                can be made again alone. The noise is numpy's, which is not torch's for the same seed.
            latents: Initial noise [B, C, H, W] to take instead.
            allow_flat: Whether a picture of a single colour is a result, as it is to whoever measures
                quality, and not an error.
            on_step: Called after each step with how many are done, and of how many.
            cancel: Asked before each step and before the pictures are decoded whether to stop.

        Raises:
            Cancelled: `cancel` said so.
            DeployError: The request does not fit the model, a part failed, or what came out is no picture.
        """
        start, loaded = time.perf_counter(), self._load_ms
        defaults, architecture = self.bundle.manifest.defaults, self.bundle.manifest.architecture
        steps = defaults.num_inference_steps if steps is None else steps
        self.check(negative_prompt, guidance_scale=guidance_scale, height=height, width=width)
        guidance_scale = defaults.guidance_scale if guidance_scale is None else guidance_scale
        height = defaults.height if height is None else height
        width = defaults.width if width is None else width
        if num_images < 1:
            raise DeployError(f"num_images must be one at least, not {num_images}.")
        prompts = _prompts("prompt", prompt)
        guided = architecture.classifier_free and guidance_scale > 1
        negatives = _prompts("negative_prompt", negative_prompt, len(prompts)) if guided else []

        factor, patch = architecture.vae_scale_factor, architecture.patch_size
        shape = (len(prompts) * num_images, architecture.latent_channels, height // factor, width // factor)
        self._check_engine(height, width, shape[0])
        seeds = [seed + index for index in range(shape[0])]
        noise = _noise(seeds, shape) if latents is None else _checked_latents(latents, shape)
        timesteps, levels = sigmas(
            self.bundle.manifest.scheduler, steps, (shape[2] // patch) * (shape[3] // patch)
        )

        clock = self._clock()
        hidden, pooled = self._encode([*negatives, *prompts])
        text_ms = self._clock() - clock
        # Every picture of a prompt shares its encoding; the negative half comes before the other. They are
        # cast here and not in every step: millions of numbers to 16 bits take milliseconds.
        hidden, pooled = (
            np.repeat(encoding, num_images, axis=0).astype(self.variant.activations, copy=False)
            for encoding in (hidden, pooled)
        )
        state, step_ms = noise, []
        for step, timestep in enumerate(timesteps):
            _stop_if(cancel)
            clock = self._clock()
            velocity = self._velocity(state, timestep, hidden, pooled, guidance_scale, guided=guided)
            if not np.isfinite(velocity).all():
                raise DeployError(
                    f"The transformer gave values that are not finite in step {step + 1} of {steps}: there "
                    f"is no picture (variant {self.variant.target}, {self.variant.activations} activations). "
                    "Run another target, or export again."
                )
            state = euler_step(state, velocity, levels[step], levels[step + 1])
            step_ms.append(self._clock() - clock)
            if on_step is not None:
                on_step(step + 1, steps)
        _stop_if(cancel)
        clock = self._clock()
        pixels = self._decode(state)
        decode_ms = self._clock() - clock
        for index, picture in enumerate(pixels):
            if not allow_flat and (picture == picture[0, 0]).all():
                raise DeployError(
                    f"Picture {index + 1} is one flat colour, {picture[0, 0].tolist()}: the model has "
                    "collapsed. Try another target, or check the exported model."
                )
        return Result(
            images=[Image.fromarray(picture) for picture in pixels],
            seeds=seeds,
            timings_ms=Timings(
                load=self._load_ms - loaded,
                text_encoders=text_ms,
                transformer=sum(step_ms),
                vae_decoder=decode_ms,
                steps=step_ms,
                total=_milliseconds_since(start),
            ),
            variant=self.variant,
        )

    def check(
        self,
        negative_prompt: str | Sequence[str] = "",
        *,
        guidance_scale: float | None = None,
        height: int | None = None,
        width: int | None = None,
    ) -> None:
        """Refuse what this model cannot heed or make. What is left out comes from the bundle's defaults.

        Raises:
            DeployError: Guidance, or a size, that is not the model's.
        """
        self._check_guidance(negative_prompt, guidance_scale)
        if guidance_scale is not None and not np.isfinite(guidance_scale):
            raise DeployError(f"guidance_scale must be a number, not {guidance_scale}.")
        defaults = self.bundle.manifest.defaults
        self._check_size(
            height=defaults.height if height is None else height,
            width=defaults.width if width is None else width,
        )

    def load(self) -> None:
        """Load every part now, and not when it is first used, so that a part that cannot run is found."""
        for component in self.bundle.manifest.graphs:
            self._session(component)
        for tokenizer in self.bundle.manifest.tokenizers:
            self._tokenizer(tokenizer)

    @property
    def size_unit(self) -> int:
        """Pixels that the height and width of a picture are multiples of."""
        architecture = self.bundle.manifest.architecture
        return architecture.vae_scale_factor * architecture.patch_size

    @property
    def largest_size(self) -> int:
        """Pixels of the largest height or width."""
        architecture, unit = self.bundle.manifest.architecture, self.size_unit
        return architecture.max_latent_size * architecture.vae_scale_factor // unit * unit

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of the latents of a picture of the default size."""
        architecture, defaults = self.bundle.manifest.architecture, self.bundle.manifest.defaults
        factor = architecture.vae_scale_factor
        return architecture.latent_channels, defaults.height // factor, defaults.width // factor

    def paint(self, prompts: list[str], noise: Floats) -> NDArray[np.uint8]:
        """Make one picture of each prompt at the default settings, from initial noise [B, C, H, W].

        Returns:
            Pictures [B, height, width, 3], flat ones too: for measuring quality.
        """
        images = self(prompts, latents=noise, allow_flat=True).images
        return np.stack([np.asarray(image) for image in images])

    def _encode(self, prompts: list[str]) -> tuple[Floats, Floats]:
        """Return hidden states [B, T, D] and pooled projections [B, P], known ones without encoding."""
        if unknown := [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._texts]:
            hidden, pooled = self._encode_together(unknown)
            for index, prompt in enumerate(unknown):
                # A copy: a row of the batch would keep all of it.
                self._texts[prompt] = hidden[index].copy(), pooled[index].copy()
        for prompt in prompts:
            self._texts[prompt] = self._texts.pop(prompt)  # the last used stand last
        states = [self._texts[prompt] for prompt in prompts]
        for prompt in list(self._texts)[:-_KEPT_PROMPTS]:
            del self._texts[prompt]
        return np.stack([hidden for hidden, _ in states]), np.stack([pooled for _, pooled in states])

    def _encode_together(self, prompts: list[str]) -> tuple[Floats, Floats]:
        """Return hidden states [B, T, D] and pooled projections [B, P] of all encoders together."""
        if self.bundle.manifest.architecture.family == "flux":
            pooled = self._encoded("", prompts)["pooled"]
            return self._encoded("_2", prompts)["hidden_states"], pooled
        return self._encode_sd3(prompts)

    def _encode_sd3(self, prompts: list[str]) -> tuple[Floats, Floats]:
        """CLIP's states side by side, as wide as T5's, which stand behind them, or zeros in their place."""
        manifest = self.bundle.manifest
        clips = [self._encoded(suffix, prompts) for suffix in ("", "_2")]
        clip = np.concatenate([outputs["hidden_states"] for outputs in clips], axis=-1)
        pooled = np.concatenate([outputs["pooled"] for outputs in clips], axis=-1)
        width, num_tokens = manifest.architecture.joint_attention_dim, manifest.defaults.max_sequence_length
        hidden = np.zeros((clip.shape[0], clip.shape[1] + num_tokens, width), np.float32)
        hidden[:, : clip.shape[1], : clip.shape[2]] = clip
        if "text_encoder_3" in manifest.graphs:
            hidden[:, clip.shape[1] :] = self._encoded("_3", prompts)["hidden_states"]
        return hidden, pooled

    def _encoded(self, suffix: str, prompts: list[str]) -> dict[str, Floats]:
        """Return what one text encoder says of each prompt, whatever the others are.

        They are run one by one: in a batch the last place of a number depends on the batch's size, and then a
        picture would depend on which calls came before.
        """
        tokens = self._tokens(f"tokenizer{suffix}", prompts)
        rows = [self._run(f"text_encoder{suffix}", input_ids=row[None]) for row in tokens]
        return {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}

    def _tokens(self, name: str, prompts: list[str]) -> NDArray[np.int64]:
        """Return token ids [B, max_length]; a prompt that is too long is cut, its end token kept."""
        entry = self.bundle.manifest.tokenizers[name]
        tokenizer = self._tokenizer(name)
        tokens = np.full((len(prompts), entry.max_length), entry.pad_id, np.int64)
        for row, prompt in zip(tokens, prompts, strict=True):
            encoding = tokenizer.encode(prompt)
            ids = encoding.ids
            if len(ids) > entry.max_length:
                kept = entry.max_length - 1
                logger.warning(
                    "The prompt is longer than the %d tokens the model reads, so this was left out: %r",
                    entry.max_length,
                    prompt[encoding.offsets[kept][0] :],
                )
                ids = [*ids[:kept], ids[-1]]
            row[: len(ids)] = ids
        return tokens

    def _velocity(
        self,
        state: Floats,
        timestep: np.float32,
        hidden: NDArray[np.floating],
        pooled: NDArray[np.floating],
        guidance_scale: float,
        *,
        guided: bool,
    ) -> Floats:
        """Return the velocity [B, C, H, W]; guided, it is that of two passes."""
        batch = np.concatenate([state, state]) if guided else state
        embedded = {}
        if self.bundle.manifest.architecture.guidance_embeds:
            embedded["guidance"] = np.full(len(batch), guidance_scale, np.float32)
        velocity = self._run(
            "transformer",
            hidden_states=batch,
            timestep=np.full(len(batch), timestep, np.float32),
            encoder_hidden_states=hidden,
            pooled_projections=pooled,
            **embedded,
        )["velocity"]
        if not guided:
            return velocity
        negative, positive = np.split(velocity, 2)
        return negative + guidance_scale * (positive - negative)

    def _decode(self, state: Floats) -> NDArray[np.uint8]:
        """Return pictures [B, height, width, 3] of the final latents."""
        architecture = self.bundle.manifest.architecture
        scaled = state / architecture.scaling_factor + architecture.shift_factor
        pictures = []
        for index in range(len(scaled)):  # one by one: the decoder is where memory peaks
            image = self._image(scaled[index])
            if not np.isfinite(image).all():
                raise DeployError(
                    f"The decoder gave values that are not finite for picture {index + 1}, so it is no "
                    "picture. Export the bundle again."
                )
            unit = np.clip(image * 0.5 + 0.5, 0, 1).transpose(1, 2, 0)
            picture = (unit * 255).round().astype(np.uint8)
            pictures.append(picture)
        return np.stack(pictures)

    def _image(self, scaled: Floats) -> Floats:
        """Return the picture [3, height, width], -1..1, of latents [C, H, W]; large ones go in tiles."""

        def decode(tile: Floats) -> Floats:
            image: Floats = self._run("vae_decoder", latents=tile[None])["image"][0]
            return image

        tile = self._placement.tile
        if max(scaled.shape[1:]) <= tile:
            return decode(scaled)
        return decode_tiled(decode, scaled, self.bundle.manifest.architecture.vae_scale_factor, tile)

    def _run(self, component: str, **inputs: NDArray[Any]) -> dict[str, Floats]:
        outputs = self._session(component).run(inputs)
        return {name: array.astype(np.float32, copy=False) for name, array in outputs.items()}

    def _session(self, component: str) -> AnySession:
        if component not in self._sessions:
            start = time.perf_counter()
            if self.keep == "one":
                while self._sessions:
                    self._sessions.popitem()[1].close()
            if component == "transformer":
                session = open_variant(self.bundle, self.variant, threads=self._threads, cache=self._cache)
            else:
                graphs = self.bundle.manifest.graphs[component]
                graph = next((graph for graph in graphs if graph.activations == "float32"), graphs[0])
                session = open_graph(
                    self.bundle,
                    graph.path,
                    on_gpu=component in self._placement.on_gpu,
                    threads=self._threads,
                    cache=self._cache,
                )
            self._sessions[component] = session
            self._load_ms += _milliseconds_since(start)
        return self._sessions[component]

    def _tokenizer(self, name: str) -> Tokenizer:
        if name not in self._tokenizers:
            start = time.perf_counter()
            path = self.bundle.file(self.bundle.manifest.tokenizers[name].path)
            try:
                tokenizer = Tokenizer.from_file(str(path))
            except Exception as error:  # the library raises bare Exception
                raise DeployError(f"{path} is not a tokenizer: {error}. Export the bundle again.") from error
            # The file may carry settings of its own; the manifest's are the ones that count.
            tokenizer.no_padding()
            tokenizer.no_truncation()
            self._tokenizers[name] = tokenizer
            self._load_ms += _milliseconds_since(start)
        return self._tokenizers[name]

    def _clock(self) -> float:
        """Return a time in milliseconds that stands still while parts are loaded."""
        return 1000 * time.perf_counter() - self._load_ms

    def _check_guidance(self, negative_prompt: str | Sequence[str], guidance_scale: float | None) -> None:
        """Refuse what the caller asked for and the model cannot heed."""
        architecture = self.bundle.manifest.architecture
        if architecture.classifier_free:
            return
        if any(negative_prompt):
            raise DeployError(
                "This model makes no second pass, so a negative prompt changes nothing. Leave it out."
            )
        if not architecture.guidance_embeds and guidance_scale is not None and guidance_scale > 1:
            raise DeployError(
                f"This model was distilled to a fixed guidance, so guidance_scale {guidance_scale} changes "
                "nothing. Leave it out."
            )

    def _check_engine(self, height: int, width: int, num_images: int) -> None:
        """Refuse what the engine was not built for."""
        if (shapes := self.variant.shapes) is None:
            return
        engine = f"The engine for {self.variant.target}"
        if (height, width) not in shapes.sizes:
            sizes = ", ".join(f"{height}x{width}" for height, width in shapes.sizes)
            raise DeployError(
                f"{engine} makes pictures of (height x width) {sizes}, not {height}x{width}. Ask for one of "
                "these, or export again for a profile of your own that extends this one and has "
                f"[{height}, {width}] among its buckets."
            )
        if num_images > shapes.max_batch:
            raise DeployError(
                f"{engine} makes {shapes.max_batch} pictures at a time at most, not {num_images}. Ask for "
                "fewer, or export again for a profile of your own that extends this one with a larger "
                "max_batch."
            )

    def _check_size(self, **sizes: int) -> None:
        unit, most = self.size_unit, self.largest_size
        for name, size in sizes.items():
            if size % unit or not unit <= size <= most:
                nearest = min(max(round(size / unit), 1), most // unit) * unit
                raise DeployError(
                    f"This model cannot make a picture of {name} {size}: it takes multiples of {unit} from "
                    f"{unit} to {most}. The nearest is {nearest}."
                )


def save_png(images: Sequence[Image.Image], path: str | PathLike[str]) -> None:
    """Write pictures of one size side by side into one PNG file.

    Raises:
        DeployError: The file cannot be written.
    """
    width, height = images[0].size
    strip = Image.new("RGB", (width * len(images), height))
    for index, image in enumerate(images):
        strip.paste(image, (index * width, 0))
    try:
        strip.save(path, format="PNG")
    except OSError as error:
        raise DeployError(f"Cannot write the picture {path}: {error.strerror or error}.") from error


def _stop_if(cancel: Callable[[], bool] | None) -> None:
    if cancel is not None and cancel():
        raise Cancelled("The picture was cancelled before it was finished.")


def _prompts(name: str, given: str | Sequence[str], count: int | None = None) -> list[str]:
    """Return a list of prompts, a single one repeated `count` times."""
    prompts = [given] * (count or 1) if isinstance(given, str) else list(given)
    if not prompts or (count is not None and len(prompts) != count):
        wanted = f"one for each of the {count} prompts" if count else "one at least"
        raise DeployError(f"{name} has {len(prompts)} entries; give {wanted}.")
    return prompts


def _noise(seeds: list[int], shape: tuple[int, ...]) -> Floats:
    if seeds[0] < 0:
        raise DeployError(f"seed must not be negative, not {seeds[0]}.")
    return np.stack([np.random.default_rng(seed).standard_normal(shape[1:], np.float32) for seed in seeds])


def _checked_latents(latents: Floats, shape: tuple[int, ...]) -> Floats:
    if latents.shape != shape:
        raise DeployError(f"latents have the shape {list(latents.shape)}; this call needs {list(shape)}.")
    return latents.astype(np.float32, copy=False)


def _milliseconds_since(start: float) -> float:
    return 1000 * (time.perf_counter() - start)
