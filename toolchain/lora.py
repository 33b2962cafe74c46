"""LoRA adapters, baked into a model's weights before anything else is done with it."""

from __future__ import annotations

import dataclasses
import logging
import math
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download, list_repo_files
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError
from torch import nn

from toolchain.errors import ToolchainError
from toolchain.families.view import Model

__all__ = ["Adapter", "bake_"]

_USUAL_NAME = "pytorch_lora_weights.safetensors"
# As diffusers spells them, or did: the part of the pipeline, the module, and which of the two matrices.
_KEY = re.compile(
    r"(transformer|text_encoder|text_encoder_2)\.(.+?)"
    r"\.(?:lora_A|lora\.down|lora_down|lora_linear_layer\.down|(lora_B|lora\.up|lora_up|lora_linear_layer\.up))"
    r"\.weight"
)

Place = tuple[str, str]
"""A part of the pipeline, and the name of a module in it."""


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """One adapter, and how much of it counts."""

    source: str
    """A safetensors file, a hub id owner/name, or a file there: owner/name/file.safetensors."""
    scale: float = 1.0

    def __post_init__(self) -> None:
        if not math.isfinite(self.scale) or not self.scale:
            raise ToolchainError(
                f"the scale of {self.source} is {self.scale}; a scale is a number other than zero"
            )

    @staticmethod
    def parse(text: str) -> Adapter:
        """Read SOURCE or SOURCE:SCALE."""
        source, colon, scale = text.rpartition(":")
        try:
            number = float(scale)
        except ValueError:  # a colon of the path itself
            colon = ""
        return Adapter(source=source, scale=number) if colon else Adapter(source=text)

    def __str__(self) -> str:
        return f"{self.source}:{self.scale:g}"


def bake_(model: Model, adapters: Iterable[Adapter]) -> Model:
    """Add adapters to the weights of a model in place, one after another.

    Returns:
        The model, which knows them now.

    Raises:
        ToolchainError: There is no such adapter, or the model has no place for all of its weights.
    """
    baked = list(adapters)
    for adapter in baked:
        _bake_one_(model.pipeline, _found(adapter.source), adapter)
    return dataclasses.replace(model, adapters=(*model.adapters, *map(str, baked)))


def _bake_one_(pipeline: Any, path: Path, adapter: Adapter) -> None:
    source = adapter.source
    try:
        with _warnings() as warned:
            weights = pipeline.lora_state_dict(str(path), use_safetensors=True)
        if warned:
            # Of keys that it leaves out, diffusers only warns.
            raise ToolchainError(f"diffusers would take {source} in part only: {' '.join(warned)}")
        places = _check_fit(pipeline, weights, source)
        with _warnings():
            pipeline.load_lora_weights(str(path), use_safetensors=True)
        parts = {name: getattr(pipeline, name) for name, _ in places}
        taken = {
            (name, where)
            for name, part in parts.items()
            for where, module in part.named_modules()
            if isinstance(module, BaseTunerLayer)
        }
        if taken != places:
            different = ", ".join(sorted(".".join(place) for place in taken ^ places))
            raise ToolchainError(f"diffusers did not take {source} as its keys say: {different}")
        pipeline.fuse_lora(components=list(parts), lora_scale=adapter.scale)
        pipeline.unload_lora_weights()
    except ToolchainError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ToolchainError(f"{source} cannot be baked in as a LoRA adapter: {reason}") from error


def _check_fit(pipeline: Any, weights: dict[str, torch.Tensor], source: str) -> set[Place]:
    """The modules that an adapter changes, all of which the pipeline has."""
    pairs: dict[Place, dict[str, str]] = {}
    bad: list[str] = []
    for key in weights:
        match = _KEY.fullmatch(key)
        module = None if match is None else _module(pipeline, match[1], match[2])
        if match is None or module is None:
            bad.append(key)
        else:
            pairs.setdefault((match[1], module), {})["up" if match[3] else "down"] = key
    for (part, name), keys in pairs.items():
        whole = tuple(getattr(pipeline, part).get_submodule(name).weight.shape)
        shapes = {side: tuple(weights[key].shape) for side, key in keys.items()}
        up, down = shapes.get("up", ()), shapes.get("down", ())
        if not up or not down or (up[0], *down[1:]) != whole or up[1] != down[0]:
            bad += keys.values()
    if bad or not pairs:
        named = ", ".join(sorted(bad)[:5]) + (f" and {len(bad) - 5} more" if len(bad) > 5 else "")
        raise ToolchainError(
            f"{source} is no adapter of this model, which has no place for {len(bad)} of its "
            f"{len(weights)} weights: {named or 'it is empty'}"
        )
    if broken := [key for key, tensor in weights.items() if not tensor.isfinite().all()]:
        raise ToolchainError(f"{source} holds numbers that are not finite, in {broken[0]}")
    return set(pairs)


def _module(pipeline: Any, part: str, name: str) -> str | None:
    """The name of a linear or convolution in a part, which has it as an adapter says or as CLIP is now."""
    for known in (name, name.removeprefix("text_model.")):
        try:
            module = getattr(pipeline, part).get_submodule(known)
        except AttributeError:  # no such part, or no such module in it
            continue
        if isinstance(module, nn.Linear | nn.Conv2d):
            return known
    return None


def _found(source: str) -> Path:
    """The file of an adapter, fetched if it is on the hub.

    Raises:
        ToolchainError: There is none, or more than one.
    """
    if Path(source).is_file():
        if not source.endswith(".safetensors"):
            raise ToolchainError(f"the adapter {source} is no .safetensors file; no other kind is opened")
        return Path(source)
    owner, _, rest = source.partition("/")
    name, _, file = rest.partition("/")
    if not owner or not name or source.startswith((".", "~")) or (file and not file.endswith(".safetensors")):
        raise ToolchainError(
            f"there is no adapter {source!r}: it is neither a file here nor a hub id owner/name, or "
            "owner/name/file.safetensors"
        )
    repository = f"{owner}/{name}"
    try:
        return Path(hf_hub_download(repository, file or _only_file(repository)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ToolchainError(
            f"there is no file {source!r}, and the Hugging Face hub did not give an adapter of that name: "
            f"{reason}"
        ) from error


def _only_file(repository: str) -> str:
    files = [file for file in list_repo_files(repository) if file.endswith(".safetensors")]
    if _USUAL_NAME in files:
        return _USUAL_NAME
    if len(files) != 1:
        raise ToolchainError(
            f"{repository} holds {', '.join(files) or 'no .safetensors file'}; name the adapter among them, "
            f"as {repository}/file.safetensors"
        )
    return files[0]


@contextmanager
def _warnings() -> Iterator[list[str]]:
    """Collects what diffusers warns of, in place of showing it."""
    logger, found = logging.getLogger("diffusers"), list[str]()
    handlers, level = logger.handlers, logger.level
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: found.append(record.getMessage())  # type: ignore[method-assign]
    logger.handlers = [handler]
    logger.setLevel(logging.WARNING)
    try:
        yield found
    finally:
        logger.handlers = handlers
        logger.setLevel(level)
